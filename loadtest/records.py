"""One row per request, the truth from which every figure is derived.

requests.jsonl, one request (one turn of a conversation) a line, in the order in which they ended. Times are seconds
after the start of the run by one monotonic clock, so a step of the wall clock cannot bend them; null: did not happen.
  id, turn        the arrival in plan.jsonl, and the turn of it (0, 1, ...)
  model           the model it named
  worker          the client process that sent it
  due_s           when it was due: by the plan; for a later turn, the end of the reply before it plus think time;
                  in a closed loop, the moment it was sent
  sent_s          when the request was handed to its connection (made first, where none is open); for one that had no
                  answer at all, when the client call began; null: dropped at the in-flight cap
  first_s         first chunk with any output: text, reasoning, a refusal or a call (the role chunk has none)
  content_s       first chunk with visible text
  last_s          last chunk with output; or with the finish reason, where that stands for a token without text (the
                  end of sequence): the reply did not end at its limit, and has fewer chunks than tokens
  end_s           when the outcome was known
  gaps_s          seconds between successive chunks with output (len = chunks with output - 1)
  first_tokens    tokens in the first of them: by the usage in it, else by its share of the text; 1 where most chunks
                  are one token
  prompt_tokens, completion_tokens, cached_tokens    from the server's `usage`; null: the server did not say
  finish          the server's finish_reason
  outcome         see OUTCOMES
  served          the model the server says answered: for an adapter its exact version
  status          HTTP status; null: none came
  error           one line
  tags            from the plan
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from counsel.files import read_jsonl

OUTCOMES = {
    "ok": "a whole reply with usage",
    "cancelled": "the client hung up, as planned",
    "dropped": "not sent: the in-flight cap was reached",
    "http_error": "the server answered 4xx or 5xx",
    "server_error": "the server reported an error inside the stream",
    "aborted": "the server ended the reply before it was whole: a finish reason that is none of WHOLE",
    "connect_error": "no connection, or it broke before any answer",
    "broken_stream": "the stream ended without a finish reason",
    "timeout": "no bytes, or no end, within the limits",
    "no_usage": "a whole reply, but the server did not count its tokens",
    "empty": "a whole reply without any output",
    "unfinished": "still running when the run was stopped",
}
# Finish reasons of a whole reply: by the model, by the limit that was asked for, or by a call. vLLM adds `repetition`,
# TGI `eos_token`. Any other (`abort`, `error`, `content_filter`) left a part, and parts are quick.
WHOLE = ("stop", "length", "tool_calls", "function_call", "repetition", "eos_token")
FAILED = tuple(outcome for outcome in OUTCOMES if outcome not in ("ok", "cancelled"))


# The tag of an arrival whose client is to hang up, unless the reply is quicker.
HANGS_UP = "hangs_up"


@dataclass(slots=True)
class Row:
    """One line of requests.jsonl; see the module's docstring for columns and units."""

    id: int
    turn: int
    model: str
    worker: int
    due_s: float
    tags: Sequence[str] = ()
    sent_s: float | None = None
    first_s: float | None = None
    content_s: float | None = None
    last_s: float | None = None
    end_s: float | None = None
    gaps_s: Sequence[float] = ()
    first_tokens: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str | None = None
    outcome: str = "unfinished"
    served: str | None = None
    status: int | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def stays(self) -> bool:
        """Whether the client was to stay to the end, whatever happened then."""
        return HANGS_UP not in self.tags and self.outcome != "cancelled"

    @property
    def ttft_s(self) -> float | None:
        """Sending to first output."""
        return None if self.first_s is None or self.sent_s is None else self.first_s - self.sent_s

    @property
    def ttft_due_s(self) -> float | None:
        """Being due to first output: what someone who wanted to ask at that moment waited."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def ttfc_s(self) -> float | None:
        """Sending to first visible text."""
        return None if self.content_s is None or self.sent_s is None else self.content_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk; None where no token came after it."""
        if self.first_s is None or self.last_s is None:
            return None
        later = (self.completion_tokens or 0) - (self.first_tokens or 1)
        return (self.last_s - self.first_s) / later if later > 0 and self.last_s > self.first_s else None

    @property
    def e2e_s(self) -> float | None:
        """Sending to the last token."""
        return None if self.last_s is None or self.sent_s is None else self.last_s - self.sent_s

    @property
    def e2e_due_s(self) -> float | None:
        """Being due to the last token."""
        return None if self.last_s is None else self.last_s - self.due_s

    @property
    def lag_s(self) -> float | None:
        """Being due to sending: the client's own delay."""
        return None if self.sent_s is None else self.sent_s - self.due_s

    def to_json(self) -> str:
        return json.dumps({name: _shorter(getattr(self, name)) for name in COLUMNS}, ensure_ascii=False)


COLUMNS = tuple(field.name for field in fields(Row))


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a requests.jsonl; what a kill or a full disk left of a last one is left out."""
    return [Row(**row) for row in read_jsonl(path, torn=True)]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add `rows` at the end of the file."""
    text = "".join(row.to_json() + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _shorter(value: Any) -> Any:
    """Microseconds are finer than any clock here; more digits would triple the file."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list | tuple):
        return [_shorter(item) for item in value]
    return value
