"""What a results directory says: figures, checks of the client, objectives, one verdict. Made from files alone.

summary.json, the summary, written last:
  verdict    passed | missed (an objective) | invalid (the client did not keep its promises) | unjudged (no objectives)
  invalid    why, one text each; empty when the run may be believed
  checks, slo, window_s, all, models      see loadtest.validity, loadtest.slo and loadtest.figures
"""

from pathlib import Path
from typing import Any

from loadtest.figures import rounded, summarise
from loadtest.rows import read_rows
from loadtest.scenario import read_scenario
from loadtest.slo import is_good, judge, parse_limit, parse_objective
from loadtest.validity import check_client, check_rows
from train.files import read_jsonl

EXIT_STATUS = {"passed": 0, "unjudged": 0, "missed": 1, "invalid": 2}


def conclude(directory: Path) -> dict[str, Any]:
    """The summary of a finished run."""
    scenario = read_scenario(directory)
    rows = read_rows(directory / "requests.jsonl")
    limits = [parse_limit(text) for text in scenario.good]
    found = summarise(rows, scenario.warmup_s, lambda row: is_good(row, limits))
    judged = judge([parse_objective(text) for text in scenario.slo], found)
    seconds = read_jsonl(directory / "client.jsonl")
    planned = len(read_jsonl(directory / "plan.jsonl"))
    checks = check_client(scenario, planned, rows, seconds, found["all"]["ttft_s"]["p50"]) + check_rows(judged)
    broken = [
        f"{check.name} is {check.value:.3g}, must be {check.sign} {check.bound:.3g}"
        for check in checks
        if not check.held
    ]
    if broken:
        verdict = "invalid"
    elif not judged:
        verdict = "unjudged"
    else:
        verdict = "passed" if all(item.held for item in judged) else "missed"
    return rounded(
        {
            "dir": str(directory),
            "verdict": verdict,
            "invalid": broken,
            "checks": [check._asdict() for check in checks],
            "slo": [item._asdict() for item in judged],
            **found,
        }
    )
