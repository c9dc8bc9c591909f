"""`python -m loadtest`: load a running server, measure every request, and judge.

    python -m loadtest --run NAME --rate 4 --duration-s 60 --slo 'ttft_p90_s <= 2'
    python -m loadtest --config loadtest/scenarios/skewed.yaml --run NAME

Exit status: 0 the objectives were held (or there were none), 1 one was missed, 2 the run is invalid: the client, not
the server, was measured.
"""

import sys

from loadtest.launch import run_locust
from loadtest.prepare import prepare
from loadtest.report import write_report
from loadtest.scenario import Scenario
from loadtest.scrape import Scraper
from loadtest.table import table, verdict_text
from loadtest.verdict import EXIT_STATUS, conclude
from train.command import Command, Result, main
from train.files import read_json, write_json


def run(scenario: Scenario) -> Result:
    """Prepare, play, conclude, print."""
    directory = prepare(scenario)
    print(f"results in {directory}", file=sys.stderr)
    with Scraper(scenario.url) as scraper:
        run_locust(scenario, directory)
    scraper.write(directory / "server.jsonl", read_json(directory / "start.json")["mono_s"])
    summary = conclude(directory, scraper.note)
    write_report(directory, summary)
    write_json(directory / "summary.json", summary)
    print(table(summary))
    print(verdict_text(summary))
    print(f"report: {directory / 'report.html'}")
    return Result(summary, EXIT_STATUS[summary["verdict"]])


COMMANDS = {"": Command(Scenario, run, "load a running server with a mix of models, measure every request, and judge")}

if __name__ == "__main__":
    sys.exit(main("loadtest", COMMANDS))
