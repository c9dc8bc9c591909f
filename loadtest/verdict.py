"""What a results directory says: figures, checks of the client, objectives, one verdict. Made from files alone.

summary.json, the summary, written last:
  verdict    passed | missed (an objective, or no whole reply came) | invalid (the client did not keep its promises)
             | unjudged (no objectives)
  invalid    why, one text each; empty when the run may be believed
  checks, slo, server, cold, steps, window, all, models      see loadtest.validity, .slo, .scrape, .figures, .window
"""

from collections.abc import Callable
from typing import Any

from counsel.cli import CANNOT_BE_JUDGED, MISSED
from loadtest.arrivals import rate_knots
from loadtest.metrics import cold_penalty, measured, rounded, step_points, summarise
from loadtest.records import Row
from loadtest.results import Results
from loadtest.scrape import server_metrics
from loadtest.slo import is_good, judge, parse_limit, parse_objective
from loadtest.validity import check_client, check_rows

# Of a run, and of a comparison of two.
EXIT_STATUS = {
    "passed": 0, "unjudged": 0, "better": 0, "no difference": 0,
    "missed": MISSED, "worse": MISSED,
    "invalid": CANNOT_BE_JUDGED, "cannot tell": CANNOT_BE_JUDGED, "different loads": CANNOT_BE_JUDGED,
}  # fmt: skip


def conclude(results: Results, note: str = "", stopped: str = "") -> dict[str, Any]:
    """The summary of a run; `note` is what the scraper had to say, `stopped` why the run did not come to its end."""
    scenario, rows = results.scenario, results.rows
    limits = [parse_limit(text) for text in scenario.goodput_slo]

    def good(row: Row) -> bool:
        return is_good(row, limits)

    asked = results.target.get("asked", results.target["models"])
    found = summarise(rows, asked, scenario.warmup_s, results.window, good)
    judged = judge([parse_objective(text) for text in scenario.slo], found, measured(rows, scenario.warmup_s))
    checks = check_client(results, found["all"]["ttft_s"]) + check_rows(judged)
    broken = [
        f"{check.name} is {check.value:.3g}, must be {check.sign} {check.bound:.3g}"
        for check in checks
        if not check.held
    ]
    broken += [stopped] if stopped else []
    broken += [f"the churn stopped: {error}" for error in results.churn_errors]
    if broken:
        verdict = "invalid"
    elif not found["all"]["ok"]:
        # Whatever was asked of it, or nothing: a server that gave no whole reply has not passed.
        verdict = "missed"
    elif not judged:
        verdict = "unjudged"
    else:
        verdict = "passed" if all(item.held for item in judged) else "missed"
    return rounded(
        {
            "dir": str(results.directory),
            "verdict": verdict,
            "stopped": stopped,
            "invalid": broken,
            "checks": [check._asdict() for check in checks],
            "slo": [item._asdict() for item in judged],
            "server": server_metrics(results.server_samples, note),
            "cold": cold_penalty(rows, results.target["base"], scenario.warmup_s),
            "steps": _steps(results, good),
            **found,
        }
    )


def _steps(results: Results, good: Callable[[Row], bool]) -> list[dict[str, Any]]:
    """The points of the curves of a run whose rate goes in steps; none of any other."""
    scenario = results.scenario
    if scenario.closed or scenario.trace or not scenario.rate.strip().startswith("steps"):
        return []
    knots = rate_knots(scenario.rate, scenario.duration_s)
    edges_s = [0.0, *(knot.t_s for knot in knots[1::2])]
    return step_points(results.rows, edges_s, scenario.warmup_s, good)
