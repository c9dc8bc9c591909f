"""The rows that an evaluation appends while it runs, in runs/<name>/eval/<stamp>/: one JSON object per line.

samples.jsonl: one generated answer per line
| key | meaning |
|---|---|
| `arm` | the model and its prompt: a served name, `<served name>/native` or `<served name>/few-shot` (see eval.arms) |
| `question_id` | the held-out question (see train.data) |
| `sample` | 0, 1, ...: the number of the answer, with several answers per question |
| `text` | the answer; `""` if it is empty or the request failed |
| `finish_reason` | `stop` or `length`, from the server; null if the request failed |
| `prompt_tokens`, `completion_tokens` | the server's counts; null if the request failed or the server does not count |
| `latency_s` | duration of the last attempt, in seconds |
| `attempts` | requests sent: 1 + retries |
| `error` | null, or the error; such a row is counted and never scored |

likelihood.jsonl: the likelihood of one reference answer per line
| key | meaning |
|---|---|
| `arm`, `question_id` | as above |
| `answer` | 0, 1, ...: the number of the reference answer |
| `nll_nats` | negative log-likelihood: minus the sum of ln p over the answer's tokens; null if failed or left out |
| `tokens`, `bytes` | of the answer as the template renders it: tokens scored, UTF-8 bytes |
| `attempts`, `error` | as above; an error in `FINAL_ERRORS` leaves the answer out: not a failure, and not asked again |
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
# Caused by the answer and the base, not by the arm: asking again cannot help.
FINAL_ERRORS = (TOO_LONG, NOT_RENDERED)


class RowLog:
    """An append-only JSONL file with one row per key. The process may be killed at any moment.

    Opening it drops a torn last line, failed rows, and rows for which `keep` is false; `done` holds the others by key.
    A second process that opens the same file gets a UserError.
    """

    def __init__(self, path: Path, key: Sequence[str], keep: Callable[[Row], bool] = lambda row: True) -> None:
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_name(f".{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"{str(path)!r} is open in another process; wait until that ends") from error
        rows = read_rows(path)
        foreign = next((number for number, row in enumerate(rows, 1) if not {"error", *key} <= row.keys()), None)
        if foreign:
            raise UserError(
                f"line {foreign} of {str(path)!r} lacks one of the keys {', '.join(('error', *key))}: something "
                "else wrote it; name another file"
            )
        kept = [row for row in rows if not failed(row) and keep(row)]
        self.done: dict[Key, Row] = {self._key_of(row): row for row in kept}
        if len(self.done) != len(kept):
            raise UserError(
                f"{str(path)!r} has two rows with one key: it was edited; remove {str(path.parent)!r} and start again"
            )
        if path.exists():
            write_jsonl(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Append a row. The complete row is in the file when this returns, so a killed process loses none."""
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
    """Whether a row's request failed and must be sent again; rows that are left out for good have not failed."""
    return row.get("error") not in (None, *FINAL_ERRORS)


def read_rows(path: Path) -> list[Row]:
    """The rows of a log, without partial lines: a kill leaves one at the end, or within the file if logs were merged.

    [] if there is no file. Raises UserError for any other line that is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _last_object(line)
        if row is None:
            raise UserError(
                f"line {number} of {str(path)!r} is not a JSON object; only the last line may be incomplete: remove it"
            )
        rows.append(row)
    return rows


def _last_object(line: str) -> Row | None:
    """The row at the end of a line, after the partial row of another log if there is one; None if there is no row."""
    start = 0
    while start >= 0:
        try:
            row = json.loads(line[start:])
        except ValueError:
            # Every row starts with this; a nested object would leave a closing brace over.
            start = line.find('{"', start + 1)
            continue
        return row if isinstance(row, dict) else None
    return None
