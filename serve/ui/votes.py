"""Votes of people on answers: what a vote may hold, and the file that keeps them.

`votes.jsonl` has one vote per line. A vote with `consent` holds its conversation, in the form that TRL's trainers read:
`prompt`, `chosen` and `rejected` for a choice between two answers, `prompt`, `completion` and `label` for a verdict on
one; each is a list of {role, content}. Contact details in it are masked. A vote without `consent`, and a tie, hold no
text at all. Every vote has:

| key | meaning |
|---|---|
| `id` | 32 hex digits; who knows them may delete the vote |
| `time_utc`, `rater` | when, and the name of the API key |
| `base` | name and fingerprint of the base model |
| `models` | the exact versions that answered, in the order in which they were shown |
| `choice` | `first`, `second` or `tie`; for one answer `good` or `bad` |
| `blind` | whether the names were hidden until the choice |
| `reasons` | what decided, from REASONS |
| `sampling` | how the answers were drawn |
| `consent` | whether the person agreed that the text is kept |
| `comment` | in their own words, where the person agreed |
"""

import datetime
import json
import os
import secrets
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from counsel.contacts import mask
from counsel.files import locked, read_jsonl, write_text
from serve.api_errors import ApiError
from serve.name_table import NameTable

VOTES = "/v1/votes"
Reason = Literal["warmth", "understanding", "usefulness", "clarity", "length", "safety"]
REASONS: tuple[str, ...] = get_args(Reason)
MAX_BYTES = 256 << 20
# Only the owner of the server may read what people said.
_MODE = 0o600

_Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class VotedTurn(_Strict):
    role: Literal["system", "user", "assistant"]
    content: _Text


class VotedAnswer(_Strict):
    model: Annotated[str, Field(max_length=160)]
    text: _Text | None = None


class Sampling(_Strict):
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    seed: int | None = None


class Vote(_Strict):
    """The body of `POST /v1/votes`. Text comes only with `consent`, and then with the whole conversation."""

    answers: Annotated[list[VotedAnswer], Field(min_length=1, max_length=2)]
    choice: Literal["first", "second", "tie", "good", "bad"]
    blind: bool
    consent: bool
    reasons: Annotated[list[Reason], Field(max_length=len(REASONS))] = []
    sampling: Sampling = Sampling()
    prompt: list[VotedTurn] = []
    comment: Annotated[str, Field(max_length=2000)] = ""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (len(self.answers) == 2) != (self.choice in ("first", "second", "tie")):
            raise ValueError("choice must be first, second or tie for two answers, and good or bad for one")
        texts = [answer.text for answer in self.answers]
        if self.consent:
            if self.choice == "tie":
                raise ValueError("a tie is kept without text; send it with consent false")
            if None in texts or not self.prompt:
                raise ValueError("with consent, prompt and the text of every answer are needed")
            if self.prompt[-1].role != "user":
                raise ValueError("prompt must end with the person's turn")
        elif any(texts) or self.prompt or self.comment:
            raise ValueError("without consent, no prompt, text or comment may be sent")
        return self


def parse_vote(body: dict[str, Any]) -> Vote:
    """The vote in a request's body. Raises ApiError 400, which never repeats what was sent."""
    try:
        return Vote.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # The name of a field that does not exist is the caller's own words.
        where = ".".join(map(str, first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]))
        raise ApiError(400, f"{where or 'the vote'}: {first['msg'].removeprefix('Value error, ')}") from error


def vote_row(vote: Vote, names: NameTable, rater: str) -> dict[str, Any]:
    """The line that is kept of a vote. Raises ApiError 400 for a model that is not an exact one of this server."""
    for answer in vote.answers:
        manifest = names.find(answer.model)
        if answer.model != names.base_name and (manifest is None or manifest.id != answer.model):
            raise ApiError(400, "a vote names the exact models that the replies named, and one of these is not served")
    row: dict[str, Any] = {
        "id": secrets.token_hex(16),
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rater": rater,
        "base": {"name": names.base_name, "fingerprint": names.server.base_fingerprint},
        "models": [answer.model for answer in vote.answers],
        "choice": vote.choice,
        "blind": vote.blind,
        "reasons": list(vote.reasons),
        "sampling": vote.sampling.model_dump(exclude_none=True),
        "consent": vote.consent,
    }
    if not vote.consent:
        return row
    row["comment"] = mask(vote.comment)
    row["prompt"] = [{"role": turn.role, "content": mask(turn.content)} for turn in vote.prompt]
    texts = [[{"role": "assistant", "content": mask(answer.text or "")}] for answer in vote.answers]
    if vote.choice in ("good", "bad"):
        return row | {"completion": texts[0], "label": vote.choice == "good"}
    chosen = 0 if vote.choice == "first" else 1
    return row | {"chosen": texts[chosen], "rejected": texts[1 - chosen]}


class VoteFile:
    """`votes.jsonl` in one folder; several servers may share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "votes.jsonl"

    def add(self, row: dict[str, Any]) -> None:
        """Append a vote; it is on disk when this returns. Raises ApiError 503 when the file is full."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with locked(self.path.parent):
            opened = os.open(self.path, os.O_RDWR | os.O_CREAT, _MODE)
            with os.fdopen(opened, "r+b") as file:
                end = _end_of_last_line(file)
                if end + len(line) > MAX_BYTES:
                    raise ApiError(503, f"votes.jsonl has reached {MAX_BYTES >> 20} MiB; move it away")
                file.seek(end)
                file.truncate()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def delete(self, vote_id: str) -> None:
        """Remove a vote with all it holds. Raises ApiError 404 when there is none."""
        with locked(self.path.parent):
            rows = read_jsonl(self.path, torn=True) if self.path.exists() else []
            kept = [row for row in rows if row["id"] != vote_id]
            if len(kept) == len(rows):
                raise ApiError(404, f"there is no vote {vote_id}")
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), _MODE)


def _end_of_last_line(file: IO[bytes]) -> int:
    """Where the next line begins. What follows the last newline was cut short by a full disk or a power failure."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read() in (b"", b"\n"):
        return end
    file.seek(0)
    return file.read().rfind(b"\n") + 1
