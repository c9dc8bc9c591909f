"""One load test from start to summary: used by the command, the capacity search and the benchmarks."""

import sys
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, write_json
from loadtest.churn import churning
from loadtest.launch import run_locust
from loadtest.prepare import prepare_run
from loadtest.report import write_report
from loadtest.results import read_results
from loadtest.scenario import Scenario
from loadtest.scrape import Scraper
from loadtest.verdict import summarize_run

_STOPPED = "it was stopped with Ctrl-C"


def run_load_test(scenario: Scenario) -> dict[str, Any]:
    """Prepare, send, judge and report; return the summary, which is also the last file written.

    Ctrl-C stops the run but not the report: running requests finish, and the run is invalid.
    """
    try:
        directory = prepare_run(scenario)
        print(f"results in {directory}", file=sys.stderr)
        with Scraper(scenario.url) as scraper, churning(scenario, directory):
            stopped = run_locust(scenario, directory) and not scenario.web
        start = directory / "start.json"
        if start.exists():
            scraper.write(directory / "server.jsonl", read_json(start)["mono_s"])
        return judge_directory(directory, scraper.note, _STOPPED if stopped else "")
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"cannot write {str(error.filename)!r}: {error.strerror}"
        raise UserError(f"{reason}; free some space, or choose another --out") from error


def judge_directory(directory: Path, note: str = "", stopped: str = "") -> dict[str, Any]:
    """Write summary.json and report.html from the files of a run; `stopped` says why it ended early."""
    results = read_results(directory)
    summary = summarize_run(results, note, stopped)
    write_report(results, summary)
    write_json(directory / "summary.json", summary)
    return summary
