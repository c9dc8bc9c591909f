"""What both sides of a canary did: from the servers' request logs, and from people's votes.

A unit is what the canary keeps on one side: a conversation, or an API key. Requests of one unit depend on each other,
so a unit counts once: as failed if any of its requests failed, and with its mean of the logarithm of each latency.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counsel.canary import Canary
from counsel.files import read_jsonl

LATENCIES = ("ttft_s", "time_per_token_s")


@dataclass
class SideUnit:
    """One unit on one side: when its first request ended, whether any failed, and the logarithms of its latencies."""

    first_utc: str
    failed: bool = False
    logs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LATENCIES})

    def mean_log(self, latency: str) -> float | None:
        """The mean of the logarithm of a latency in seconds; None where no request had it."""
        values = self.logs[latency]
        return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True)
class Votes:
    """Votes on a canary's two versions.

    won, lost: choices of one over the other, counted for the new one. bad: (side, bad?) -> verdicts on one answer.
    """

    won: int = 0
    lost: int = 0
    bad: Counter[tuple[str, bool]] = field(default_factory=Counter)


CURRENT, NEW = "current", "new"
Sample = dict[str, dict[str, SideUnit]]


def log_rows(logs: Path, canary: Canary) -> list[dict[str, Any]]:
    """The logged requests that a canary decided, of all servers with logs in the folder, oldest first.

    What a server rotated away twice is gone.
    """
    files = sorted((*logs.rglob("requests.jsonl.1"), *logs.rglob("requests.jsonl")))
    rows = [row for file in files for row in read_jsonl(file, torn=True) if row.get("canary") == canary.id]
    return sorted(rows, key=lambda row: str(row["time_utc"]))


def sides_in(rows: Iterable[dict[str, Any]], canary: Canary, name: str) -> Sample:
    """The units of both sides. A request that got no version, because it was refused, counts if the server failed."""
    new_id, found = f"{name}@{canary.version}", Sample({CURRENT: {}, NEW: {}})
    for row in rows:
        failed = row["status"] >= 500
        if not row["adapter"] and not failed:
            continue
        is_new = row["adapter"] == new_id if row["adapter"] else canary.chooses(row["unit"])
        unit = found[NEW if is_new else CURRENT].setdefault(row["unit"], SideUnit(row["time_utc"]))
        unit.failed |= failed
        if not failed and row["ttft_s"]:
            unit.logs["ttft_s"].append(math.log(row["ttft_s"]))
            decoding_s, n_tokens = row["duration_s"] - row["ttft_s"], row["completion_tokens"]
            if n_tokens > 1 and decoding_s > 0:
                unit.logs["time_per_token_s"].append(math.log(decoding_s / (n_tokens - 1)))
    return found


def rows_until(rows: Sequence[dict[str, Any]], time_utc: str) -> list[dict[str, Any]]:
    """The rows up to a time, which is included."""
    return [row for row in rows if row["time_utc"] <= time_utc]


def reached_utc(found: Sample, n: int) -> str | None:
    """When both sides had n units; None if they do not yet."""
    times = [sorted(unit.first_utc for unit in side.values()) for side in found.values()]
    return max(side[n - 1] for side in times) if all(len(side) >= n for side in times) else None


def count_votes(rows: Iterable[dict[str, Any]], current: str, new: str) -> Votes:
    """What the rows of votes.jsonl say of two versions, each by its `name@version`."""
    won = lost = 0
    bad: Counter[tuple[str, bool]] = Counter()
    for row in rows:
        models, choice = row["models"], row["choice"]
        if sorted(models) == sorted((current, new)) and choice in ("first", "second"):
            chose_new = models[0 if choice == "first" else 1] == new
            won, lost = won + chose_new, lost + (not chose_new)
        elif len(models) == 1 and models[0] in (current, new):
            bad[NEW if models[0] == new else CURRENT, choice == "bad"] += 1
    return Votes(won, lost, bad)
