"""One record per request. Every metric of a run is derived from these records.

requests.jsonl has one line per request (one turn of a conversation), in the order in which they ended. Times are
seconds after the start of the run on one monotonic clock, so changes of the wall clock do not affect them. null means
that it did not happen.
  id, turn        the arrival in plan.jsonl, and its turn (0, 1, ...)
  model           the model that was requested
  worker          the client process that sent it
  due_s           when it was due: in the plan; for a later turn, the end of the previous reply plus think time; in a
                  closed loop, when it was sent
  sent_s          when the request was handed to its connection (opened first, if none was open); if there was no
                  response at all, when the client call started; null: dropped at the in-flight limit
  first_s         first chunk with any output: text, reasoning, a refusal or a tool call (the role chunk has none)
  content_s       first chunk with visible text
  last_s          last chunk with output; or the finish reason, where it marks a token without text (the end of
                  sequence): the reply did not end at its limit and has fewer chunks than tokens
  end_s           when the outcome was known
  gaps_s          seconds between successive chunks with output (length = chunks with output - 1)
  first_tokens    tokens in the first of these chunks: from the usage in it, or from its share of the text; 1 where
                  most chunks are one token
  prompt_tokens, completion_tokens, cached_tokens    from the server's `usage`; null: the server did not report it
  finish          the server's finish_reason
  outcome         see OUTCOMES
  served          the model that the server reports; for an adapter, its exact version
  status          HTTP status; null: no response
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
    "ok": "a complete reply with usage",
    "cancelled": "the client hung up, as planned",
    "dropped": "not sent: the in-flight cap was reached",
    "http_error": "the server answered 4xx or 5xx",
    "server_error": "the server reported an error inside the stream",
    "aborted": "the server ended the reply early: its finish reason is not one of COMPLETE",
    "connect_error": "no connection, or it broke before any response",
    "broken_stream": "the stream ended without a finish reason",
    "timeout": "no data, or no end, within the limits",
    "no_usage": "a complete reply, but the server did not count its tokens",
    "empty": "a complete reply without any output",
    "unfinished": "still running when the run was stopped",
}
# Finish reasons of a complete reply: the model ended it, it reached the requested limit, or it made a tool call. vLLM
# adds `repetition`, TGI `eos_token`. With any other (`abort`, `error`, `content_filter`) the reply is partial, and a
# partial reply is quick.
COMPLETE = ("stop", "length", "tool_calls", "function_call", "repetition", "eos_token")
FAILED = tuple(outcome for outcome in OUTCOMES if outcome not in ("ok", "cancelled"))

# Tags an arrival whose client is planned to hang up, unless the reply ends first.
HANGS_UP = "hangs_up"


@dataclass(slots=True)
class RequestRecord:
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
        """Whether the client was planned to wait for the end of the reply, whatever happened then."""
        return HANGS_UP not in self.tags and self.outcome != "cancelled"

    @property
    def ttft_s(self) -> float | None:
        """Sending to first output."""
        return None if self.first_s is None or self.sent_s is None else self.first_s - self.sent_s

    @property
    def ttft_due_s(self) -> float | None:
        """Due to first output: how long a user who wanted to ask at that moment waited."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def ttfc_s(self) -> float | None:
        """Sending to first visible text."""
        return None if self.content_s is None or self.sent_s is None else self.content_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk; None if no token came after it."""
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
        """Due to the last token."""
        return None if self.last_s is None else self.last_s - self.due_s

    @property
    def lag_s(self) -> float | None:
        """Due to sending: the client's own delay."""
        return None if self.sent_s is None else self.sent_s - self.due_s

    def to_json(self) -> str:
        return json.dumps({name: _shortened(getattr(self, name)) for name in COLUMNS}, ensure_ascii=False)


COLUMNS = tuple(field.name for field in fields(RequestRecord))


def read_records(path: Path) -> list[RequestRecord]:
    """All complete lines of a requests.jsonl. A kill or a full disk may have cut off the last one; it is ignored."""
    return [RequestRecord(**line) for line in read_jsonl(path, torn=True)]


def append_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """Add `records` at the end of the file."""
    text = "".join(record.to_json() + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _shortened(value: Any) -> Any:
    """`value` in microseconds, which is finer than any clock here; more digits would triple the file."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return value
