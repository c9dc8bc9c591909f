"""`python -m loadtest`: load a running server, measure every request, and judge the result.

    python -m loadtest --run NAME --rate 4 --duration-s 60 --slo 'ttft_p90_s <= 2'
    python -m loadtest --config loadtest/scenarios/skewed.yaml --run NAME
    python -m loadtest find-capacity --run NAME --slo 'ttft_p90_s <= 2'
    python -m loadtest compare runs/NAME/loadtest/A runs/NAME/loadtest/B

Exit status: 0 the objectives were met (or there were none), 3 one was missed, 4 the run is invalid, because it measured
the client and not the server; 1 an error, 2 wrong usage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel import cli
from counsel.cli import Command, Result, argument, option
from counsel.files import read_json


@dataclass(frozen=True)
class Worker:
    """A process on this machine for a run that another machine leads."""

    dir: str = argument("the run's results directory, shared or copied to this machine once the run waits for workers")
    master: str = option("127.0.0.1:5557", "address of the machine that leads: the HOST:PORT of its --bind")


@dataclass(frozen=True)
class ReportOptions:
    """A run whose files are complete enough to judge."""

    dir: str = argument("results directory of the run")


def _run(scenario: Any) -> Result:
    """Run a `Scenario`, then print the table and the verdict."""
    from loadtest.run import run_load_test

    return _printed(run_load_test(scenario))


def _report(options: ReportOptions) -> Result:
    """Judge a run again from its rows, and write the report."""
    from loadtest.run import judge_directory

    directory = Path(options.dir)
    summary = directory / "summary.json"
    if not summary.exists():
        return _printed(judge_directory(directory, stopped="it did not come to its end"))
    earlier = read_json(summary)
    return _printed(judge_directory(directory, earlier["server"]["note"], earlier.get("stopped", "")))


def _printed(summary: dict[str, Any]) -> Result:
    """Print the table and the verdict."""
    from loadtest.table import result_table, verdict_text
    from loadtest.verdict import EXIT_STATUS

    print(result_table(summary))
    print(verdict_text(summary))
    print(f"report: {Path(summary['dir']) / 'report.html'}")
    return Result(summary, EXIT_STATUS[summary["verdict"]])


def _work(options: Worker) -> Result:
    """Send a share of the requests of a run that another machine leads."""
    from loadtest.launch import run_worker
    from loadtest.scenario import read_scenario

    directory = Path(options.dir)
    read_scenario(directory)
    run_worker(directory, options.master)
    return Result({"dir": options.dir})


COMMANDS = {
    "": Command(
        "loadtest.scenario:Scenario",
        _run,
        "load a running server with a mix of models and measure every request",
    ),
    "find-capacity": Command(
        "loadtest.capacity:Capacity",
        "loadtest.capacity:find_capacity",
        "find the highest rate that meets every --slo",
    ),
    "compare": Command(
        "loadtest.compare:Compare",
        "loadtest.compare:compare_runs",
        "say whether run B is better or worse than run A, with intervals",
    ),
    "report": Command(ReportOptions, _report, "judge a finished or interrupted run again, and write its report"),
    "worker": Command(Worker, _work, "send requests for a run that another machine leads (--bind)"),
}


def main(argv: Sequence[str] | None = None, launcher: str = "python -m") -> int:
    """Run one of COMMANDS; return the exit status."""
    return cli.main("loadtest", COMMANDS, argv, launcher)


if __name__ == "__main__":
    sys.exit(main())
