"""What the server logs: one JSON object per line, never what anyone wrote.

requests.jsonl: time_utc request_id key method path adapter status code streamed prompt_tokens completion_tokens ttft_s
duration_s; where a canary chose the version, also canary and unit (counsel/canary.py). audit.jsonl, for admin actions:
time_utc request_id key method path status target.

requests.jsonl also holds requests without a valid key, so it is bounded: at 64 MiB it is renamed to requests.jsonl.1,
which replaces the one before. audit.jsonl holds only requests with a key, and is kept whole.
"""

import datetime
import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20


class AccessLog:
    """Two files in one folder; each line is in its file as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._requests = RotatingFileHandler(folder / "requests.jsonl", maxBytes=MAX_BYTES, backupCount=1, delay=False)
        self._audit = logging.FileHandler(folder / "audit.jsonl")

    def request(self, **row: Any) -> None:
        """Log a finished or refused request."""
        _write(self._requests, row)

    def audit(self, **row: Any) -> None:
        """Log an admin action, or an attempt at one."""
        _write(self._audit, row)

    def close(self) -> None:
        """Close both files."""
        self._requests.close()
        self._audit.close()


def _write(handler: logging.FileHandler, row: dict[str, Any]) -> None:
    path = Path(handler.baseFilename)
    if not path.exists():
        # The folder was cleared: what is written to the deleted file would be lost.
        path.parent.mkdir(parents=True, exist_ok=True)
        handler.close()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    # In ASCII: UTF-8 cannot encode an unpaired surrogate, which a caller may send, and its line would be missing.
    handler.emit(logging.makeLogRecord({"msg": json.dumps({"time_utc": now, **row})}))
