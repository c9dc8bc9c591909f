"""What a run shows: metrics, checks of the client, objectives and one verdict, made from the results directory alone.

summary.json is written last:
  verdict    passed | missed (an objective was missed, or no request got a complete reply) | invalid (a check failed)
             | unjudged (no objectives)
  invalid    why, one string per reason; empty if the run is valid
  checks, slo, server, cold, steps, window, all, models    see loadtest.validity, .slo, .scrape, .metrics, .window
"""

from collections.abc import Callable
from typing import Any

from counsel.cli import CANNOT_BE_JUDGED, MISSED
from loadtest.arrivals import rate_knots
from loadtest.metrics import cold_penalty, measured, rounded, step_points, summarize
from loadtest.records import RequestRecord
from loadtest.results import Results
from loadtest.scrape import server_metrics
from loadtest.slo import judge_objectives, parse_limit, parse_objective, within_limits
from loadtest.validity import check_client, check_objectives

# For the verdict on a run, and on a comparison of two.
EXIT_STATUS = {
    "passed": 0, "unjudged": 0, "better": 0, "no difference": 0,
    "missed": MISSED, "worse": MISSED,
    "invalid": CANNOT_BE_JUDGED, "cannot tell": CANNOT_BE_JUDGED, "different loads": CANNOT_BE_JUDGED,
}  # fmt: skip


def summarize_run(results: Results, note: str = "", stopped: str = "") -> dict[str, Any]:
    """The summary of a run. `note` says why server metrics are missing, `stopped` why the run ended early."""
    scenario, records = results.scenario, results.records
    limits = [parse_limit(text) for text in scenario.goodput_slo]

    def good(record: RequestRecord) -> bool:
        return within_limits(record, limits)

    models = results.target.get("asked", results.target["models"])
    metrics = summarize(records, models, scenario.warmup_s, results.window, good)
    objectives = [parse_objective(text) for text in scenario.slo]
    judged = judge_objectives(objectives, metrics, measured(records, scenario.warmup_s))
    checks = check_client(results, metrics["all"]["ttft_s"]) + check_objectives(judged)
    reasons = [check.explain() for check in checks if not check.held]
    reasons += [stopped] if stopped else []
    reasons += [f"churn stopped: {error}" for error in results.churn_errors]
    if reasons:
        verdict = "invalid"
    elif not metrics["all"]["ok"]:
        # With any objectives, or none: a server that gave no complete reply has not passed.
        verdict = "missed"
    elif not judged:
        verdict = "unjudged"
    else:
        verdict = "passed" if all(item.held for item in judged) else "missed"
    summary: dict[str, Any] = rounded(
        {
            "dir": str(results.directory),
            "verdict": verdict,
            "stopped": stopped,
            "invalid": reasons,
            "checks": [check._asdict() for check in checks],
            "slo": [item._asdict() for item in judged],
            "server": server_metrics(results.server_samples, note),
            "cold": cold_penalty(records, results.target["base"], scenario.warmup_s),
            "steps": _steps(results, good),
            **metrics,
        }
    )
    return summary


def _steps(results: Results, good: Callable[[RequestRecord], bool]) -> list[dict[str, Any]]:
    """The points of the curves, for a run whose rate goes in steps; otherwise none."""
    scenario = results.scenario
    if scenario.closed or scenario.trace or not scenario.rate.strip().startswith("steps"):
        return []
    knots = rate_knots(scenario.rate, scenario.duration_s)
    edges_s = [0.0, *(knot.t_s for knot in knots[1::2])]
    return step_points(results.records, edges_s, scenario.warmup_s, good)
