"""What the server writes down: one JSON object a line, never what anybody said.

requests.jsonl: time_utc request_id key method path adapter status code streamed prompt_tokens completion_tokens ttft_s
duration_s. audit.jsonl, for admin actions: time_utc request_id key method path status target.
"""

import datetime
import json
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Two append-only files in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._requests = _open(folder / "requests.jsonl")
        self._audit = _open(folder / "audit.jsonl")

    def request(self, **row: Any) -> None:
        """Write down a finished or refused request."""
        _write(self._requests, row)

    def audit(self, **row: Any) -> None:
        """Write down what an admin did, or somebody tried to do as one."""
        _write(self._audit, row)


def _open(path: Path) -> TextIO:
    # Line-buffered: a line is whole in the file as soon as it is written.
    return path.open("a", buffering=1, encoding="utf-8")


def _write(file: TextIO, row: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    file.write(json.dumps({"time_utc": now, **row}, ensure_ascii=False) + "\n")
