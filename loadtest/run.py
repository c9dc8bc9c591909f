"""One load test from start to summary: what the command, the capacity search and the benches run."""

import sys
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, write_json
from loadtest.churn import churning
from loadtest.launch import run_locust
from loadtest.prepare import prepare
from loadtest.report import write_report
from loadtest.results import read_results
from loadtest.scenario import Scenario
from loadtest.scrape import Scraper
from loadtest.verdict import conclude

_STOPPED = "it was ended by Ctrl-C"


def play(scenario: Scenario) -> dict[str, Any]:
    """Prepare, play, judge, report; return the summary, which is also the last file written.

    Ctrl-C ends the run, not the report: running requests finish, and the run is invalid.
    """
    try:
        directory = prepare(scenario)
        print(f"results in {directory}", file=sys.stderr)
        with Scraper(scenario.url) as scraper, churning(scenario, directory):
            stopped = run_locust(scenario, directory) and not scenario.web
        started = directory / "start.json"
        if started.exists():
            scraper.write(directory / "server.jsonl", read_json(started)["mono_s"])
        return judge(directory, scraper.note, _STOPPED if stopped else "")
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"cannot write {str(error.filename)!r}: {error.strerror}"
        raise UserError(f"{reason}; free some space, or choose another --out") from error


def judge(directory: Path, note: str = "", stopped: str = "") -> dict[str, Any]:
    """Make summary and report of the files of a run; `stopped` says why it did not come to its end."""
    results = read_results(directory)
    summary = conclude(results, note, stopped)
    write_report(results, summary)
    write_json(directory / "summary.json", summary)
    return summary
