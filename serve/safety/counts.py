"""Counts of what the crisis gate did: Prometheus metrics, and one small file of counts per year. Never a text.

`<logs>/<port>/safety_counts.json` maps a year (UTC) to "action label" and its number. It has no times, keys or request
ids, so a count cannot be traced to a person.
"""

import asyncio
import datetime
from collections import Counter as Tallies
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from counsel.errors import UserError
from counsel.files import read_json, write_json

FILE = "safety_counts.json"


class SafetyCounts:
    """The counts of one server. Lives on one event loop; the file is written in a thread."""

    def __init__(self, folder: Path, registry: CollectorRegistry = REGISTRY) -> None:
        """Continue the counts in `folder`. Raises UserError if its file is not one of counts."""
        self._path = folder / FILE
        self._years = read_counts(self._path) if self._path.exists() else {}
        self._write: asyncio.Task[None] | None = None
        self._dirty = False
        self._actions = Counter(
            "counsel_safety_actions", "what the crisis gate did", ["action", "label"], registry=registry
        )
        self._alarms = Counter(
            "counsel_safety_alarms", "checkers that failed, so that the safe text was sent", ["checker", "reason"],
            registry=registry,
        )  # fmt: skip

    def action(self, action: str, label: str) -> None:
        """Count one action, such as ("crisis", "active")."""
        self._actions.labels(action, label).inc()
        self._count(f"{action} {label}")

    def alarm(self, checker: str, reason: str) -> None:
        """Count that a checker failed: it was too slow (timeout) or raised (error)."""
        self._alarms.labels(checker, reason).inc()
        self._count(f"alarm {checker}")

    def _count(self, name: str) -> None:
        year = str(datetime.datetime.now(datetime.UTC).year)
        self._years.setdefault(year, Tallies())[name] += 1
        self._dirty = True
        if self._write is None or self._write.done():
            self._write = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        # Counts that come while it writes are in the next turn.
        while self._dirty:
            self._dirty = False
            await asyncio.to_thread(write_json, self._path, {year: dict(c) for year, c in self._years.items()})


def read_counts(path: Path) -> dict[str, Tallies[str]]:
    """The counts in a file, by year. Raises UserError if it is not one of counts."""
    document: dict[str, Any] = read_json(path)
    for year, counts in document.items():
        if not isinstance(counts, dict) or not all(isinstance(number, int) for number in counts.values()):
            raise UserError(f"{str(path)!r} is not a file of counts: {year!r} does not map names to numbers; remove it")
    return {year: Tallies(counts) for year, counts in document.items()}


def counts_under(logs: Path) -> dict[str, Tallies[str]]:
    """The counts of every server whose logs are under a folder, by year."""
    total: dict[str, Tallies[str]] = {}
    for path in sorted(logs.glob(f"*/{FILE}")):
        for year, counts in read_counts(path).items():
            total.setdefault(year, Tallies()).update(counts)
    return total
