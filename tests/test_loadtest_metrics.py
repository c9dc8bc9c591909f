"""From rows to figures, objectives and validity. Expected values are worked by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.metrics import percentile
from loadtest.metrics import summarize as summarize_in
from loadtest.records import RequestRecord, append_records, read_records
from loadtest.results import Results
from loadtest.scenario import Scenario
from loadtest.slo import judge_objectives, parse_limit, parse_objective, within_limits
from loadtest.validity import check_client, check_objectives
from loadtest.window import Window
from loadtest.workload import Arrival


def reply(
    number: int,
    due_s: float,
    model: str = "base",
    ttft_s: float = 0.5,
    tokens: int = 11,
    tpot_s: float = 0.1,
    lag_s: float = 0.0,
) -> RequestRecord:
    """A whole reply: due, sent `lag_s` later, first token after `ttft_s`, then one every `tpot_s`."""
    first_s = due_s + lag_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    return RequestRecord(
        id=number, turn=0, model=model, worker=0, due_s=due_s, sent_s=due_s + lag_s, first_s=first_s, content_s=first_s,
        last_s=last_s, end_s=last_s, gaps_s=[tpot_s] * (tokens - 1), prompt_tokens=7, completion_tokens=tokens,
        finish="stop", outcome="ok", status=200,
    )  # fmt: skip


def failure(number: int, due_s: float, model: str = "base") -> RequestRecord:
    return RequestRecord(number, 0, model, 0, due_s, sent_s=due_s, end_s=due_s + 0.01, outcome="http_error", status=503)


def anything(_: RequestRecord) -> bool:
    return True


def summarize(rows: list[RequestRecord], warmup_s: float, good: Callable[[RequestRecord], bool]) -> dict[str, Any]:
    """The figures of these rows, with rates over 100 s."""
    return summarize_in(rows, (), warmup_s, Window(0, 100), good)


def seconds(n: int, hub_lag_s: float = 0.001, cpu: float = 0.1, **more: float) -> list[dict]:
    calm = {"worker": 0, "hub_lag_s": hub_lag_s, "hub_lag_p50_s": 0.0002, "cpu": cpu}
    return [{**calm, **more, "t_s": float(t)} for t in range(n)]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_percentiles_interpolate_between_ranks(percent, value):
    """Of 4, 1, 3, 2 the median is 2.5 and the 90th percentile 3.7; of nothing there is none."""
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)
    assert percentile([], percent) is None


def test_latencies_count_from_sending_and_from_being_due():
    """Sent 0.2 s late, first token 0.5 s later, ten more at 0.1 s: the two views differ by the lag."""
    row = reply(0, due_s=3.0, lag_s=0.2)

    assert (row.ttft_s, row.ttft_due_s) == pytest.approx((0.5, 0.7))
    assert (row.e2e_s, row.e2e_due_s) == pytest.approx((1.5, 1.7))
    assert row.tpot_s == pytest.approx(0.1)
    assert reply(0, 0.0, tokens=1).tpot_s is None


def test_failures_are_counted_and_never_timed():
    """Two replies and two failures: error rate one half, latencies over the two only."""
    found = summarize([reply(0, 0), failure(1, 1), reply(2, 2, ttft_s=1.5), failure(3, 3)], 0, anything)["all"]

    assert (found["n"], found["ok"], found["errors"], found["error_rate"]) == (4, 2, 2, 0.5)
    assert found["outcomes"] == {"ok": 2, "http_error": 2}
    assert (found["ttft_s"]["n"], found["ttft_s"]["p50"]) == (2, pytest.approx(1.0))


def test_the_warm_up_is_in_no_latency_and_no_count():
    """Of replies due at 0, 4 and 6, the second slow, a warm-up of 5 s leaves one."""
    found = summarize([reply(0, 0), reply(1, 4, ttft_s=9), reply(2, 6)], 5, anything)["all"]

    assert (found["n"], found["ok"]) == (1, 1)
    assert (found["ttft_s"]["n"], found["ttft_s"]["mean"]) == (1, pytest.approx(0.5))


def test_rates_are_of_what_ended_in_the_window():
    """Of replies of 11 tokens that end at 1.5, 10.5 and 21.5 s, two end from 10 to 30 s, one of them too slow."""
    rows = [reply(0, 0), reply(1, 9), reply(2, 19, ttft_s=1.5)]
    found = summarize_in(rows, (), 0, Window(10, 30), lambda row: row.ttft_s < 1)["all"]

    assert (found["requests_per_s"], found["tokens_per_s"], found["goodput_per_s"]) == (0.1, 1.1, 0.05)


def test_goodput_counts_whole_replies_within_every_limit():
    """Of four, one is too slow to start and one failed: half are good; those who hung up are left out."""
    limits = [parse_limit("ttft_s <= 1"), parse_limit("tpot_s<=0.2")]
    gone = reply(4, 4)
    gone.outcome = "cancelled"
    rows = [reply(0, 0), reply(1, 1, ttft_s=1.2), failure(2, 2), reply(3, 3, tokens=1), gone]
    found = summarize(rows, 0, lambda row: within_limits(row, limits))["all"]

    assert found["goodput_share"] == 0.5


def test_objectives_are_judged_overall_and_per_model():
    """A slow adapter misses its own objective while the whole run holds."""
    rows = [reply(n, n, ttft_s=0.5) for n in range(9)] + [reply(9, 9, "gentle", ttft_s=3)]
    summary = summarize(rows, 0, anything)
    texts = ["ttft_p50_s <= 1", "gentle: ttft_p50_s <= 1", "*: error_rate <= 0", "tokens_per_s >= 1e6"]
    judged = judge_objectives([parse_objective(text) for text in texts], summary, rows)

    assert [(item.scope, item.value, item.held) for item in judged[:2]] == [
        ("all", pytest.approx(0.5), True),
        ("gentle", pytest.approx(3.0), False),
    ]
    assert [(item.scope, item.held) for item in judged[2:4]] == [("base", True), ("gentle", True)]
    assert not judged[4].held


def test_an_objective_without_rows_is_missed():
    """Nothing to judge is no pass."""
    rows = [failure(0, 0)]
    judged = judge_objectives([parse_objective("ttft_p50_s <= 1")], summarize(rows, 0, anything), rows)

    assert (judged[0].value, judged[0].held) == (None, False)


def test_a_percentile_counts_the_requests_that_have_it():
    """Of ten requests seven hung up and one had a single token: two or three values are no tenth of anything."""
    rows = [reply(0, 0), reply(1, 1), reply(2, 2, tokens=1), *(failure(n, n) for n in range(3, 10))]
    for row in rows[3:]:
        row.outcome = "cancelled"
    texts = ["ttft_p50_s <= 1", "tpot_p50_s <= 1", "error_rate <= 0"]
    judged = judge_objectives([parse_objective(text) for text in texts], summarize(rows, 0, anything), rows)

    assert [item.n for item in judged] == [3, 2, 3]
    assert [check.held for check in check_objectives(judged)] == [False, False, False]


def test_failed_requests_are_slower_than_any_bound():
    """Of ten, two failed: the median is that of ten, between the 5th and 6th, and the 90th is beyond every bound.

    Those who hung up are nobody's failure: with the two gone instead, both percentiles are held.
    """
    rows = [reply(n, n, ttft_s=0.1 * (n + 1)) for n in range(8)] + [failure(8, 8), failure(9, 9)]
    texts = ["ttft_p50_s <= 1", "ttft_p90_s <= 1"]

    def judged(rows: list[RequestRecord]) -> list[tuple[float | None, bool]]:
        found = judge_objectives([parse_objective(text) for text in texts], summarize(rows, 0, anything), rows)
        return [(item.value, item.held) for item in found]

    assert judged(rows) == [(pytest.approx(0.55), True), (None, False)]
    for row in rows[8:]:
        row.outcome = "cancelled"
    assert judged(rows) == [(pytest.approx(0.45), True), (pytest.approx(0.73), True)]


@pytest.mark.parametrize(("failed", "held"), [(9, True), (10, True), (11, False)])
def test_a_tenth_may_fail_where_nine_tenths_must_hold(failed, held):
    """Of a hundred requests ten fail: ninety had their first token in time, which is what a p90 says."""
    rows = [failure(n, n) if n < failed else reply(n, n, ttft_s=0.5) for n in range(100)]
    found = judge_objectives([parse_objective("ttft_p90_s <= 0.5")], summarize(rows, 0, anything), rows)[0]

    assert (found.held, found.value) == (held, pytest.approx(0.5) if held else None)


def results(rows: list[RequestRecord], watched: list[dict], planned: int, **scenario: Any) -> Results:
    """A run of 40 s with these rows and the client's seconds, of so many planned arrivals."""
    plan = [Arrival(n, float(n), "base", (0,), 11, 0.0, None, ()) for n in range(planned)]
    return Results(Path(), Scenario(duration_s=40, **scenario), {}, plan, rows, watched, (), ())


def broken(rows: list[RequestRecord], watched: list[dict], planned: int | None = None, **scenario: Any) -> set[str]:
    """The names of the checks that fail."""
    ttft_s = {"p50": 0.1, "p95": 0.1, "p99": 0.1}
    found = check_client(results(rows, watched, planned or len(rows), **scenario), ttft_s)
    return {check.name for check in found if not check.held}


def test_a_client_that_keeps_its_promises_is_believed():
    """Forty rows on time, a calm hub and an idle processor break no check."""
    assert broken([reply(n, n, lag_s=0.001) for n in range(40)], seconds(40)) == set()


def test_each_broken_promise_makes_a_run_invalid():
    """Too few rows, late sending, arrivals never sent, a stalled hub, a full core, a vanished worker: each by name."""
    good = [reply(n, n) for n in range(40)]

    assert broken(good[:5], seconds(6)) == {"requests"}
    assert broken([reply(n, n, lag_s=0.03) for n in range(40)], seconds(40)) == {"schedule_lag_s"}
    assert broken(good, seconds(40), planned=50) == {"sent_share"}
    # Twenty arrivals sent twice are no forty.
    assert broken([reply(n % 20, n) for n in range(40)], seconds(40)) == {"sent_share"}
    assert broken(good, seconds(40, hub_lag_s=0.06)) == {"hub_lag_s"}
    assert broken(good, seconds(40, hub_lag_p50_s=0.006)) == {"hub_lag_p50_s"}
    assert broken(good, seconds(40, cpu=0.97)) == {"client_cpu"}
    assert broken(good, seconds(40, clock_error_s=0.03)) == {"clock_error_s"}
    assert broken(good, seconds(40), workers=2) == {"workers"}


def test_one_bad_process_of_many_is_seen():
    """Of thirty processes one has no processor left, or wakes late: a thirtieth of all seconds, and it is named."""
    good = [reply(n, n) for n in range(40)]

    def crowd(**bad: float) -> list[dict]:
        return [second for worker in range(30) for second in seconds(40, worker=worker, **(bad if worker == 7 else {}))]

    assert broken(good, crowd(cpu=0.97)) == {"client_cpu"}
    assert broken(good, crowd(hub_lag_s=0.06)) == {"hub_lag_s"}
    assert broken(good, crowd()) == set()


def test_the_client_is_watched_as_far_out_as_objectives_look():
    """Late in one of forty seconds: it cannot move a 95th percentile, and a 99th it can."""
    good = [reply(n, n) for n in range(40)]
    watched = [*seconds(39), {**seconds(40)[-1], "hub_lag_s": 0.9}]

    assert broken(good, watched, slo=("ttft_p95_s <= 1",)) == set()
    assert broken(good, watched, slo=("ttft_p99_s <= 1",)) == {"hub_lag_s"}


def test_a_fast_server_needs_a_quick_client():
    """20 ms late in reading is nothing to a TTFT of 2 s, and all of one of 20 ms."""
    good = [reply(n, n) for n in range(40)]

    def held(ttft_s: float) -> bool:
        of = dict.fromkeys(("p50", "p95", "p99"), ttft_s)
        checks = check_client(results(good, seconds(40, hub_lag_s=0.02, hub_lag_p50_s=0.003), 40), of)
        return all(check.held for check in checks)

    assert held(2.0)
    assert not held(0.02)


def test_a_cap_that_a_slow_server_fills_is_no_fault_of_the_client():
    """Thirty of forty arrivals are dropped in time, since ten never come back: the run may be judged, and is missed."""
    rows = [reply(n, n) for n in range(10)]
    rows += [RequestRecord(n, 0, "base", 0, n, end_s=n, outcome="dropped") for n in range(10, 40)]

    assert broken(rows, seconds(40)) == set()
    judged = judge_objectives([parse_objective("ttft_p90_s <= 9")], summarize(rows, 0, anything), rows)
    assert (judged[0].held, judged[0].n) == (False, 40)


def test_a_closed_run_that_was_ended_early_is_not_believed():
    """Forty replies in eight of forty seconds, or forty of the fifty requests asked for."""
    quick = [reply(n, n / 5, tokens=2) for n in range(40)]

    assert broken(quick, seconds(9), arrivals="closed") == {"completed_share"}
    assert broken(quick, seconds(9), arrivals="closed", requests=50) == {"completed_share"}
    assert broken(quick, seconds(9), arrivals="closed", requests=40) == set()
    assert broken(quick, seconds(41), arrivals="closed") == set()


def test_rows_survive_the_file(tmp_path):
    """A row written and read again is the same to the microsecond."""
    append_records(tmp_path / "requests.jsonl", [reply(0, 1.25), failure(1, 2.5)])

    again = read_records(tmp_path / "requests.jsonl")

    assert [(row.id, row.outcome, row.ttft_s) for row in again] == [(0, "ok", 0.5), (1, "http_error", None)]
    assert again[0].gaps_s == [0.1] * 10
