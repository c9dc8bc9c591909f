"""What the server writes down: one JSON object a line, never what anybody said.

requests.jsonl: time_utc request_id key method path adapter status code streamed prompt_tokens completion_tokens ttft_s
duration_s. audit.jsonl, for admin actions: time_utc request_id key method path status target.

requests.jsonl holds strangers' attempts too, so it is bounded: at 64 MiB it becomes requests.jsonl.1, and the one
before that is gone. Only who has a key gets into audit.jsonl, which is kept whole.
"""

import datetime
import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20


class AccessLog:
    """Two files in one folder; a line is whole in its file as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._requests = RotatingFileHandler(folder / "requests.jsonl", maxBytes=MAX_BYTES, backupCount=1, delay=False)
        self._audit = logging.FileHandler(folder / "audit.jsonl")

    def request(self, **row: Any) -> None:
        """Write down a finished or refused request."""
        _write(self._requests, row)

    def audit(self, **row: Any) -> None:
        """Write down what an admin did, or somebody tried to do as one."""
        _write(self._audit, row)


def _write(file: logging.FileHandler, row: dict[str, Any]) -> None:
    place = Path(file.baseFilename)
    if not place.exists():
        # Somebody cleared the folder: the open file is nowhere now, and what is written to it is lost.
        place.parent.mkdir(parents=True, exist_ok=True)
        file.close()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    # In ASCII: half a surrogate pair, which a caller may send, has no UTF-8, and its line would be missing.
    file.emit(logging.makeLogRecord({"msg": json.dumps({"time_utc": now, **row})}))
