"""What is made from finished runs: capacity search, cold starts, steps, charts, the report; and scenario files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counsel.cli import load_config
from counsel.errors import UserError
from counsel.files import write_jsonl
from loadtest import capacity
from loadtest.capacity import Capacity, SearchResult, search
from loadtest.charts import per_second
from loadtest.metrics import cold_penalty, step_points
from loadtest.scenario import Scenario
from loadtest.workload import Arrival
from tests.test_loadtest_metrics import anything, failure, reply, summarize

SCENARIOS = sorted((Path(__file__).parent.parent / "loadtest/scenarios").glob("*.yaml"))


@pytest.mark.parametrize("true", [0.3, 1.0, 7.3, 100.0])
def test_the_capacity_search_brackets_the_turning_point(true):
    """The answer holds, the rate above it does not, and both are within the precision."""
    tried = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= true

    result = search(holds, lowest=0.1, highest=1000, precision=0.1)

    assert result.held <= true < result.failed <= result.held * 1.1
    assert len(tried) <= 20


def test_the_capacity_search_says_when_all_or_nothing_held():
    """Nothing holds: only a failed rate. All hold: the highest rate, and none that failed."""
    assert search(lambda rate: False, 1, 8, 0.1) == SearchResult(None, 1)
    assert search(lambda rate: True, 1, 9, 0.1) == SearchResult(9, None)


@pytest.fixture
def find_capacity(monkeypatch, tmp_path, capsys):
    """The result of find-capacity if this function of rate and seed gives the verdict on each run."""

    def run(verdict: Callable[[float, int], str], **options: Any) -> tuple[int, dict[str, Any], str, list[Scenario]]:
        runs: list[Scenario] = []

        def run_load_test(scenario: Scenario) -> dict[str, Any]:
            runs.append(scenario)
            given = verdict(float(scenario.rate), scenario.seed)
            if given == "dies":
                raise UserError("no answer from the server")
            metrics = summarize([reply(n, n) for n in range(20)], 0, anything)
            stopped = "it was stopped with Ctrl-C" if given == "stopped" else ""
            given = "invalid" if stopped else given
            return {**metrics, "verdict": given, "invalid": ["the client was late"], "stopped": stopped,
                    "dir": scenario.out}  # fmt: skip

        monkeypatch.setattr(capacity, "run_load_test", run_load_test)
        options = {"slo": ("ttft_p50_s <= 1",), "out": str(tmp_path / "out"), **options}
        result = capacity.find_capacity(Capacity(**options))
        return result.exit_status, result.document, capsys.readouterr().out, runs

    return run


def test_an_invalid_run_is_repeated(find_capacity):
    """The first run at 4 is invalid and passes with another seed; 8 is missed, so the search continues in between."""

    def verdict(rate: float, seed: int) -> str:
        return "invalid" if (rate, seed) == (4, 0) else "passed" if rate < 6 else "missed"

    status, document, text, _ = find_capacity(verdict, lowest=4, precision=0.1)

    assert (status, document["invalid"]) == (0, "")
    assert document["held"] < 6 <= document["failed"] <= 1.1 * document["held"]
    assert "capacity: 5." in text


def test_a_client_that_is_the_limit_gives_a_lower_bound(find_capacity):
    """Above 11 requests/s every run is invalid: the answer is at least that, within the precision."""
    status, document, text, _ = find_capacity(lambda rate, seed: "passed" if rate <= 11 else "invalid", lowest=4)

    assert status == 4
    assert document["held"] <= 11 < document["failed"] <= 1.1 * document["held"]
    assert "capacity: at least 10." in text
    assert "is invalid: the client was late" in text


def test_a_client_that_fails_at_the_lowest_rate_gives_no_capacity(find_capacity):
    """The run at the lowest rate is invalid: there is no capacity, not one of 0 requests/s."""
    status, document, text, runs = find_capacity(lambda rate, seed: "invalid")

    assert (status, document["held"], document["failed"]) == (4, None, 0.5)
    assert "no capacity: the run at 0.5 requests/s, the lowest tried, is invalid: the client was late" in text
    assert len(runs) == 2


def test_ctrl_c_ends_a_search_with_a_lower_bound(find_capacity):
    """Stopped at 8, before any rate has failed: the capacity is at least 4, exit 4."""
    status, document, text, _ = find_capacity(lambda rate, seed: "passed" if rate <= 4 else "stopped", lowest=4)

    assert (status, document["held"], document["failed"]) == (4, 4, None)
    assert document["invalid"] == "it was stopped with Ctrl-C"
    assert "capacity: at least 4 requests/s (it was stopped with Ctrl-C)" in text


def test_ctrl_c_in_the_first_run_finds_nothing(find_capacity):
    """No run was completed."""
    status, document, text, _ = find_capacity(lambda rate, seed: "stopped")

    assert (status, document["held"], document["failed"]) == (4, None, None)
    assert "no capacity: it was stopped with Ctrl-C" in text


def test_a_server_that_dies_in_the_search_keeps_the_result_so_far(find_capacity, tmp_path):
    """It dies at 8: at least 4, the reason, and the points so far are in both files, exit 4."""
    status, document, text, _ = find_capacity(lambda rate, seed: "passed" if rate <= 4 else "dies", lowest=2)

    assert (status, document["held"], document["failed"]) == (4, 4, None)
    assert document["invalid"] == "no answer from the server"
    assert "capacity: at least 4 requests/s (no answer from the server)" in text
    assert [point["offered"] for point in document["points"]] == [2, 2, 4, 4]
    assert json.loads((tmp_path / "out/capacity.json").read_text()) == document
    assert "no answer from the server" in (tmp_path / "out/report.html").read_text()


def test_a_search_that_cannot_start_is_an_error(find_capacity, tmp_path):
    """There is no result yet, so there is the reason and no file."""
    with pytest.raises(UserError, match="no answer from the server"):
        find_capacity(lambda rate, seed: "dies")
    assert not (tmp_path / "out/capacity.json").exists()


def test_every_run_is_long_enough_for_its_objectives(find_capacity):
    """A p99 needs 200 requests: 400 s of constant arrivals at 0.5 requests/s, and the given 60 s at 8."""
    _, _, _, runs = find_capacity(
        lambda rate, seed: "passed", slo=("ttft_p99_s <= 1",), arrivals="constant", warmup_s=10, highest=8, repeats=1
    )

    assert [(float(each.rate), each.duration_s) for each in runs] == [
        (0.5, 410), (1, 210), (2, 110), (4, 60), (8, 60),
    ]  # fmt: skip
    assert {each.warmup_s for each in runs} == {10}


def test_the_search_starts_at_the_rate_of_the_scenario(find_capacity):
    """A plain rate is the start. A rate with a shape is refused, unless --lowest is given."""
    _, _, _, runs = find_capacity(lambda rate, seed: "missed", rate="3")

    assert [float(each.rate) for each in runs] == [3.0]
    with pytest.raises(UserError, match="give --lowest to start with"):
        Capacity(slo=("ttft_p50_s <= 1",), rate="steps(1, 2)")
    assert Capacity(slo=("ttft_p50_s <= 1",), rate="steps(1, 2)", lowest=1).start_rate == 1


def test_a_capacity_needs_an_objective():
    """Without one there is nothing to meet."""
    with pytest.raises(UserError, match="needs at least one --slo"):
        Capacity()


@pytest.mark.parametrize("options", [{"web": True}, {"bind": "127.0.0.1:5557"}])
def test_a_capacity_search_takes_neither_a_page_nor_workers(options):
    """Each of its runs would wait for Ctrl-C, or for workers."""
    with pytest.raises(UserError, match="leave out --web and --bind"):
        Capacity(slo=("ttft_p50_s <= 1",), **options)


def test_the_first_request_of_an_adapter_is_cold():
    """Two adapters have two cold requests of 2 s. The base and the later requests are not cold."""
    records = [
        reply(0, 0, "base"),
        reply(1, 1, "a", ttft_s=2),
        reply(2, 2, "b", ttft_s=2),
        reply(3, 3, "a"),
        reply(4, 4, "b"),
    ]
    penalty = cold_penalty(records, "base", warmup_s=0)

    assert (penalty["cold"]["n"], penalty["cold"]["p50"]) == (2, pytest.approx(2.0))
    assert (penalty["warm"]["n"], penalty["warm"]["p50"]) == (2, pytest.approx(0.5))
    # A warm-up until 1.5 s loads "a", and counts in neither.
    penalty = cold_penalty(records, "base", warmup_s=1.5)
    assert (penalty["cold"]["n"], penalty["warm"]["n"]) == (1, 2)


def test_a_stepped_run_has_one_point_per_step():
    """One request per second for 10 s, then two per second, of which two fail: the achieved rates are 1 and 1.8."""
    records = [reply(n, n + 0.5) for n in range(10)] + [reply(10 + n, 10.25 + n / 2) for n in range(18)]
    records += [failure(28, 19.25), failure(29, 19.75)]
    points = step_points(records, [0, 10, 20], 0, anything)

    assert [(point["offered"], point["n"]) for point in points] == [(1.0, 10), (2.0, 20)]
    assert [point["achieved"] for point in points] == pytest.approx([1.0, 1.8], rel=0.01)


def test_steps_leave_the_warm_up_out():
    """Of steps of 10 s, a warm-up of 15 s leaves nothing of the first and half of the second."""
    records = [reply(n, n / 2 + 0.25, ttft_s=9 if n < 30 else 0.5) for n in range(60)]
    points = step_points(records, [0, 10, 20, 30], 15, anything)

    assert [(point["offered"], point["n"]) for point in points] == [(2.0, 10), (2.0, 20)]
    assert [point["ttft_p90_s"] for point in points] == pytest.approx([0.5, 0.5])


def test_tokens_and_requests_are_counted_per_second():
    """Sent at 0 with tokens at 0.5, 1.0 and 1.5: one token in the first second, two in the next, running in both."""
    seconds, running, tokens = per_second([reply(0, 0, tokens=3, tpot_s=0.5)])

    assert (seconds, running, tokens) == ([0, 1], [1, 1], [1.0, 2.0])


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_file_loads_and_starts_with_its_command(path):
    """Each is a valid scenario, and its first line says how to run it."""
    assert isinstance(load_config(Scenario, str(path), {}), Scenario)
    assert path.read_text().startswith(f"# python -m loadtest --config loadtest/scenarios/{path.name} --run NAME\n")


def write_plan(folder: Path, due_s: list[float], model: str = "base") -> None:
    plan = [Arrival(n, due, model, (0,), 11, 0.0, None, ()) for n, due in enumerate(due_s)]
    write_jsonl(folder / "plan.jsonl", (arrival.to_json() for arrival in plan))


def test_a_report_needs_nothing_from_outside(tmp_path):
    """It is complete and made from files alone, the model's name is escaped, and nothing is fetched."""
    from loadtest.records import append_records
    from loadtest.report import write_report
    from loadtest.results import read_results
    from loadtest.verdict import summarize_run

    scenario = Scenario(duration_s=40, slo=("ttft_p90_s <= 1",))
    (tmp_path / "config.json").write_text(json.dumps(scenario.to_json()))
    (tmp_path / "target.json").write_text(json.dumps({"models": ["<b>"], "base": None}))
    write_plan(tmp_path, [float(n) for n in range(40)], "<b>")
    (tmp_path / "client.jsonl").write_text('{"worker": 0, "t_s": 40, "hub_lag_s": 0, "cpu": 0}\n')
    (tmp_path / "server.jsonl").write_text('{"t_s": 1, "running": 2, "waiting": 1, "kv_used": 0.5}\n')
    append_records(tmp_path / "requests.jsonl", [reply(n, n, "<b>") for n in range(40)])
    results = read_results(tmp_path)
    summary = summarize_run(results)
    page = write_report(results, summary).read_text()

    assert summary["verdict"] == "passed"
    assert page.count("<svg") == 3
    assert "&lt;b&gt;" in page
    assert "<td><b></td>" not in page
    assert "src=" not in page
    assert "<script" not in page
