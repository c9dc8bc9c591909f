"""A results directory, each file read once: what the verdict, the report and `compare` are made from.

config.json      the scenario                          loadtest/scenario.py
target.json      models that were asked, provenance    loadtest/prepare.py
plan.jsonl       every planned request                 loadtest/workload.py
requests.jsonl   every request that was made           loadtest/records.py
client.jsonl     the client's view of itself           loadtest/collector.py
server.jsonl     the server's metrics                  loadtest/scrape.py
churn.jsonl      versions published during the run     loadtest/churn.py
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, read_jsonl
from loadtest.metrics import measured
from loadtest.records import RequestRecord, read_records
from loadtest.scenario import Scenario, read_scenario
from loadtest.window import Window, arrivals_end_s, closed_window, open_window
from loadtest.workload import Arrival

# Keys that earlier versions wrote to config.json, and their names now.
_RENAMED = {
    "good": "goodput_slo",
    "bare": "no_system_prompt",
    "unique": "unique_prompts",
    "silence_s": "idle_timeout_s",
    "request_s": "request_timeout_s",
    "join": "bind",
    "exact_output": "ignore_eos",
}


@dataclass(frozen=True)
class Results:
    """What a run left in its directory."""

    directory: Path
    scenario: Scenario
    target: Mapping[str, Any]
    plan: Sequence[Arrival]
    records: Sequence[RequestRecord]
    client_seconds: Sequence[Mapping[str, Any]]
    server_samples: Sequence[Mapping[str, Any]]
    churn_errors: Sequence[str]

    @property
    def arrivals_end_s(self) -> float:
        """When the arrivals of an open loop ended (s). For a run that was stopped early: when it was stopped."""
        due_s = [arrival.due_s for arrival in self.plan]
        limited, trace = self.scenario.requests == len(self.plan), bool(self.scenario.trace)
        end_s = arrivals_end_s(due_s, self.scenario.duration_s, limited=limited, trace=trace)
        if len({record.id for record in self.records}) < len(self.plan):
            end_s = min(end_s, max((second["t_s"] for second in self.client_seconds), default=end_s))
        return end_s

    @property
    def window(self) -> Window:
        """The window in which replies count toward rates."""
        if self.scenario.closed:
            return closed_window(measured(self.records, self.scenario.warmup_s))
        end_s = self.arrivals_end_s
        return open_window(self.records, min(self.scenario.warmup_s, end_s), end_s)


def read_results(directory: Path) -> Results:
    """Read a results directory, also of a run that was killed: its files may be cut off, or not there yet.

    Raises UserError for a directory without a scenario, or with one of an older version.
    """
    _check_version(directory)
    # Written when a run has ended.
    samples, churn = directory / "server.jsonl", directory / "churn.jsonl"
    published = read_jsonl(churn, torn=True) if churn.exists() else []
    return Results(
        directory=directory,
        scenario=read_scenario(directory),
        target=read_json(directory / "target.json"),
        plan=[Arrival.from_json(line) for line in read_jsonl(directory / "plan.jsonl")],
        records=read_records(directory / "requests.jsonl"),
        client_seconds=read_jsonl(directory / "client.jsonl", torn=True),
        server_samples=read_jsonl(samples) if samples.exists() else [],
        churn_errors=[line["error"] for line in published if "error" in line],
    )


def _check_version(directory: Path) -> None:
    """Raise UserError when the scenario has keys of an older version."""
    path = directory / "config.json"
    unknown = sorted(set(read_json(path)) - {field.name for field in dataclasses.fields(Scenario)})
    if not unknown:
        return
    changes = [f"{key} is now {_RENAMED[key]}" for key in unknown if key in _RENAMED]
    advice = f"rename the keys ({', '.join(changes)})" if len(changes) == len(unknown) else "use the version it is from"
    raise UserError(
        f"{str(path)!r} is from another version of this load test: it has {', '.join(unknown)}; "
        f"{advice}, or run the load test again"
    )
