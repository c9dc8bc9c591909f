"""One load test from start to summary: what the command, the capacity search and the benches run."""

import sys
from typing import Any

from loadtest.churn import churning
from loadtest.launch import run_locust
from loadtest.prepare import prepare
from loadtest.report import write_report
from loadtest.scenario import Scenario
from loadtest.scrape import Scraper
from loadtest.verdict import conclude
from train.files import read_json, write_json


def play(scenario: Scenario) -> dict[str, Any]:
    """Prepare, play, judge, report; return the summary, which is also the last file written."""
    directory = prepare(scenario)
    print(f"results in {directory}", file=sys.stderr)
    with Scraper(scenario.url) as scraper, churning(scenario, directory):
        run_locust(scenario, directory)
    scraper.write(directory / "server.jsonl", read_json(directory / "start.json")["mono_s"])
    summary = conclude(directory, scraper.note)
    write_report(directory, summary)
    write_json(directory / "summary.json", summary)
    return summary
