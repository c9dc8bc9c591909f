"""What a results directory says: figures, checks of the client, objectives, one verdict. Made from files alone.

summary.json, the summary, written last:
  verdict    passed | missed (an objective, or no whole reply came) | invalid (the client did not keep its promises)
             | unjudged (no objectives)
  invalid    why, one text each; empty when the run may be believed
  checks, slo, server, cold, steps, window, all, models      see loadtest.validity, .slo, .scrape, .figures, .window
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from counsel.cli import CANNOT_BE_JUDGED, MISSED
from counsel.files import read_json, read_jsonl
from loadtest.arrivals import rate_knots
from loadtest.metrics import cold_penalty, measured, rounded, step_points, summarise
from loadtest.records import Row, read_rows
from loadtest.scenario import Scenario, read_scenario
from loadtest.scrape import server_figures
from loadtest.slo import is_good, judge, parse_limit, parse_objective
from loadtest.validity import check_client, check_rows
from loadtest.window import Window, arrivals_end_s, closed_window, open_window
from loadtest.workload import Arrival

# Of a run, and of a comparison of two.
EXIT_STATUS = {
    "passed": 0, "unjudged": 0, "better": 0, "no difference": 0,
    "missed": MISSED, "worse": MISSED,
    "invalid": CANNOT_BE_JUDGED, "cannot tell": CANNOT_BE_JUDGED, "different loads": CANNOT_BE_JUDGED,
}  # fmt: skip


def conclude(directory: Path, note: str = "", stopped: str = "") -> dict[str, Any]:
    """The summary of a run; `note` is what the scraper had to say, `stopped` why the run did not come to its end."""
    scenario = read_scenario(directory)
    rows = read_rows(directory / "requests.jsonl")
    limits = [parse_limit(text) for text in scenario.goodput_slo]

    def good(row: Row) -> bool:
        return is_good(row, limits)

    plan = read_plan(directory)
    target = read_json(directory / "target.json")
    seconds = read_seconds(directory)
    asked = target.get("asked", target["models"])
    found = summarise(rows, asked, scenario.warmup_s, window_of(scenario, plan, rows, seconds), good)
    judged = judge([parse_objective(text) for text in scenario.slo], found, measured(rows, scenario.warmup_s))
    checks = check_client(scenario, len(plan), rows, seconds, found["all"]["ttft_s"]) + check_rows(judged)
    broken = [
        f"{check.name} is {check.value:.3g}, must be {check.sign} {check.bound:.3g}"
        for check in checks
        if not check.held
    ]
    broken += [stopped] if stopped else []
    churn = directory / "churn.jsonl"
    if churn.exists():
        broken += [f"the churn stopped: {row['error']}" for row in read_jsonl(churn, torn=True) if "error" in row]
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
            "dir": str(directory),
            "verdict": verdict,
            "stopped": stopped,
            "invalid": broken,
            "checks": [check._asdict() for check in checks],
            "slo": [item._asdict() for item in judged],
            "server": server_figures(read_samples(directory), note),
            "cold": cold_penalty(rows, target["base"], scenario.warmup_s),
            "steps": _steps(scenario, rows, good),
            **found,
        }
    )


def _steps(scenario: Scenario, rows: list[Row], good: Callable[[Row], bool]) -> list[dict[str, Any]]:
    """The points of the curves of a run whose rate goes in steps; none of any other."""
    if scenario.closed or scenario.trace or not scenario.rate.strip().startswith("steps"):
        return []
    knots = rate_knots(scenario.rate, scenario.duration_s)
    edges_s = [0.0, *(knot.t_s for knot in knots[1::2])]
    return step_points(rows, edges_s, scenario.warmup_s, good)


def read_seconds(directory: Path) -> list[dict[str, Any]]:
    """What the client saw of itself (see loadtest/collector.py), without a last second that was not written whole."""
    return read_jsonl(directory / "client.jsonl", torn=True)


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """The samples of `/metrics`, which are written when a run has ended; none of one that was killed before."""
    path = directory / "server.jsonl"
    return read_jsonl(path) if path.exists() else []


def read_plan(directory: Path) -> list[Arrival]:
    """The plan of a results directory."""
    return [Arrival.from_row(row) for row in read_jsonl(directory / "plan.jsonl")]


def window_of(
    scenario: Scenario, plan: Sequence[Arrival], rows: Sequence[Row], seconds: Sequence[Mapping[str, Any]]
) -> Window:
    """The window in which the replies of a run are counted; `seconds` as in client.jsonl."""
    if scenario.closed:
        return closed_window(measured(rows, scenario.warmup_s))
    end_s = arrivals_until(scenario, plan, rows, seconds)
    return open_window(rows, min(scenario.warmup_s, end_s), end_s)


def arrivals_until(
    scenario: Scenario, plan: Sequence[Arrival], rows: Sequence[Row], seconds: Sequence[Mapping[str, Any]]
) -> float:
    """When the arrivals of an open loop ended (s); of a run that was ended early, that moment."""
    due_s = [arrival.due_s for arrival in plan]
    limited, trace = scenario.requests == len(plan), bool(scenario.trace)
    end_s = arrivals_end_s(due_s, scenario.duration_s, limited=limited, trace=trace)
    if len({row.id for row in rows}) < len(plan):
        end_s = min(end_s, max((second["t_s"] for second in seconds), default=end_s))
    return end_s
