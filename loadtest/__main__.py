"""`python -m loadtest`: load a running server and say what it did.

python -m loadtest --run NAME --rate 4 --duration-s 60
python -m loadtest --config loadtest/scenarios/skewed.yaml --run NAME
"""

import sys

from loadtest.figures import rounded, summarise
from loadtest.launch import run_locust
from loadtest.prepare import prepare
from loadtest.rows import read_rows
from loadtest.scenario import Scenario
from loadtest.table import table
from train.command import Command, Result, main
from train.files import write_json


def run(scenario: Scenario) -> Result:
    """Prepare, play, summarise, print."""
    directory = prepare(scenario)
    print(f"results in {directory}", file=sys.stderr)
    run_locust(scenario, directory)
    summary = rounded({"dir": str(directory), **summarise(read_rows(directory / "requests.jsonl"), scenario.warmup_s)})
    write_json(directory / "summary.json", summary)
    print(table(summary))
    return Result(summary)


COMMANDS = {"": Command(Scenario, run, "load a running server with a mix of models and measure every request")}

if __name__ == "__main__":
    sys.exit(main("loadtest", COMMANDS))
