"""The rows an evaluation leaves as it goes, one JSON object a line, in runs/<name>/eval/<stamp>/.

samples.jsonl: one generated answer a line
| key | meaning |
|---|---|
| `arm` | who answered, and how it was asked: a served name, or `<served name>/native`, `<served name>/few-shot` |
| `question_id` | of the held-out question (see train.data) |
| `sample` | 0, 1, ...: which of several answers to the same question |
| `text` | the answer; `""` when it is empty or failed |
| `finish_reason` | `stop` or `length` as the server says; null when failed |
| `prompt_tokens`, `completion_tokens` | as the server counts them; null when failed or not counted |
| `latency_s` | seconds from sending the last attempt to its end |
| `attempts` | requests sent: 1 + retries |
| `error` | null, or what failed; such a row is counted and never scored |

likelihood.jsonl: how well a model predicts one human answer, one a line
| key | meaning |
|---|---|
| `arm`, `question_id` | as above |
| `answer` | 0, 1, ...: which of the question's reference answers |
| `nll_nats` | minus the sum of ln p over the answer's tokens; null when failed or left out |
| `tokens`, `bytes` | of the answer as the template renders it: tokens scored, UTF-8 bytes |
| `attempts`, `error` | as above; those in `FINAL_ERRORS` leave an answer out: no failure, and not asked again |
"""

import fcntl
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from counsel.errors import UserError
from counsel.files import write_jsonl

Row = dict[str, Any]
Key = tuple[Any, ...]

SAMPLE_KEY = ("arm", "question_id", "sample")
LIKELIHOOD_KEY = ("arm", "question_id", "answer")
TOO_LONG = "too long"
NOT_RENDERED = "the chat template does not render this answer"
# These lie in the answer and the base, not in what an arm did: the answer is left out for good.
FINAL_ERRORS = (TOO_LONG, NOT_RENDERED)


class RowLog:
    """An append-only JSONL file with one row per key, that survives being killed at any moment.

    Opening it drops a torn last line and the rows that failed, so that exactly these are done again; `done` holds the
    rest by key. `keep` says which of these still hold; the others are dropped as well. A second process that opens the
    same file is refused.
    """

    def __init__(self, path: Path, key: Sequence[str], keep: Callable[[Row], bool] = lambda row: True) -> None:
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_name(f".{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"{str(path)!r} is being written by another process; wait for it to end") from error
        rows = read_rows(path)
        strange = next((number for number, row in enumerate(rows, 1) if not {"error", *key} <= row.keys()), None)
        if strange:
            raise UserError(f"line {strange} of {str(path)!r} is no row of ours; name another file")
        kept = [row for row in rows if not failed(row) and keep(row)]
        self.done: dict[Key, Row] = {self._key_of(row): row for row in kept}
        if len(self.done) != len(kept):
            raise UserError(f"{str(path)!r} holds a key twice: it was edited; remove {str(path.parent)!r}, start again")
        if path.exists():
            write_jsonl(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a row. It is in the file, whole, when this returns: a killed process loses none."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self.done[self._key_of(row)] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.close()

    def _key_of(self, row: Row) -> Key:
        return tuple(row[name] for name in self.key)


def failed(row: Row) -> bool:
    """Whether a row must be asked again: its request failed, as opposed to one that is done or left out for good."""
    return row.get("error") not in (None, *FINAL_ERRORS)


def read_rows(path: Path) -> list[Row]:
    """The rows of a log, without what a kill tore: its last line, or where logs were merged the start of another.

    [] when there is no file. Raises UserError for any other line that is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _whole_row(line)
        if row is None:
            raise UserError(f"line {number} of {str(path)!r} is broken, and is not its last")
        rows.append(row)
    return rows


def _whole_row(line: str) -> Row | None:
    """The row that a line ends in; before it may stand the torn end of another log. None when there is none."""
    start = 0
    while start >= 0:
        try:
            row = json.loads(line[start:])
        except ValueError:
            # Every row starts so; within a row, what is nested leaves a closing brace behind.
            start = line.find('{"', start + 1)
            continue
        return row if isinstance(row, dict) else None
    return None
