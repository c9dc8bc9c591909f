"""`python -m loadtest`: load a running server, measure every request, and judge.

    python -m loadtest --run NAME --rate 4 --duration-s 60 --slo 'ttft_p90_s <= 2'
    python -m loadtest --config loadtest/scenarios/skewed.yaml --run NAME
    python -m loadtest find-capacity --run NAME --slo 'ttft_p90_s <= 2'
    python -m loadtest compare runs/NAME/loadtest/A runs/NAME/loadtest/B

Exit status: 0 the objectives were held (or there were none), 3 one was missed, 4 the run is invalid: the client, not
the server, was measured; 1 an error, 2 wrong usage.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.cli import Command, Result, argument, main, option
from counsel.files import read_json
from loadtest.capacity import Capacity, find_capacity
from loadtest.compare import Compare, compare
from loadtest.launch import run_worker
from loadtest.run import judge, play
from loadtest.scenario import Scenario, read_scenario
from loadtest.table import table, verdict_text
from loadtest.verdict import EXIT_STATUS


@dataclass(frozen=True)
class Worker:
    """A process on this machine for a run that another machine leads."""

    dir: str = argument("the run's results directory, shared or copied to this machine once the run waits for workers")
    master: str = option("127.0.0.1:5557", "HOST:PORT that the run was given as --bind")


@dataclass(frozen=True)
class Report:
    """A run whose files are there."""

    dir: str = argument("results directory of the run")


def run(scenario: Scenario) -> Result:
    """Play, then print the table and the verdict."""
    return _shown(play(scenario))


def report(options: Report) -> Result:
    """Judge the rows that are there, and write the report."""
    directory = Path(options.dir)
    before = directory / "summary.json"
    if not before.exists():
        return _shown(judge(directory, stopped="it did not come to its end"))
    known = read_json(before)
    return _shown(judge(directory, known["server"]["note"], known.get("stopped", "")))


def _shown(summary: dict[str, Any]) -> Result:
    """Print the table and the verdict."""
    print(table(summary))
    print(verdict_text(summary))
    print(f"report: {Path(summary['dir']) / 'report.html'}")
    return Result(summary, EXIT_STATUS[summary["verdict"]])


def work(options: Worker) -> Result:
    """Send a share of a run that is led elsewhere."""
    directory = Path(options.dir)
    read_scenario(directory)
    run_worker(directory, options.master)
    return Result({"dir": options.dir})


COMMANDS = {
    "": Command(Scenario, run, "load a running server with a mix of models, measure every request, and judge"),
    "find-capacity": Command(Capacity, find_capacity, "search for the highest rate that holds the objectives"),
    "compare": Command(Compare, compare, "say whether run B is better or worse than run A, with intervals"),
    "report": Command(Report, report, "judge the rows of a run again, or of one that was killed, and write its report"),
    "worker": Command(Worker, work, "send requests for a run that another machine leads (--bind)"),
}

if __name__ == "__main__":
    sys.exit(main("loadtest", COMMANDS))
