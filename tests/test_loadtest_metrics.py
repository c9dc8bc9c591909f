"""From records to metrics, objectives and validity. Expected values are worked out by hand."""

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
    """A complete reply: due, sent `lag_s` later, first token after `ttft_s`, then one every `tpot_s`."""
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


def summarize(records: list[RequestRecord], warmup_s: float, good: Callable[[RequestRecord], bool]) -> dict[str, Any]:
    """The metrics of these records, with rates over 100 s."""
    return summarize_in(records, (), warmup_s, Window(0, 100), good)


def seconds(n: int, hub_lag_s: float = 0.001, cpu: float = 0.1, **more: float) -> list[dict]:
    calm = {"worker": 0, "hub_lag_s": hub_lag_s, "hub_lag_p50_s": 0.0002, "cpu": cpu}
    return [{**calm, **more, "t_s": float(t)} for t in range(n)]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_percentiles_interpolate_between_ranks(percent, value):
    """Of 4, 1, 3, 2 the median is 2.5 and the 90th percentile 3.7. Without values there is none."""
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)
    assert percentile([], percent) is None


def test_latencies_count_from_sending_and_from_due():
    """Sent 0.2 s late, first token 0.5 s later, ten more every 0.1 s: both views differ by the lag."""
    record = reply(0, due_s=3.0, lag_s=0.2)

    assert (record.ttft_s, record.ttft_due_s) == pytest.approx((0.5, 0.7))
    assert (record.e2e_s, record.e2e_due_s) == pytest.approx((1.5, 1.7))
    assert record.tpot_s == pytest.approx(0.1)
    assert reply(0, 0.0, tokens=1).tpot_s is None


def test_failures_are_counted_and_never_timed():
    """Two replies and two failures: the error rate is one half, and latencies are over the two replies."""
    found = summarize([reply(0, 0), failure(1, 1), reply(2, 2, ttft_s=1.5), failure(3, 3)], 0, anything)["all"]

    assert (found["n"], found["ok"], found["errors"], found["error_rate"]) == (4, 2, 2, 0.5)
    assert found["outcomes"] == {"ok": 2, "http_error": 2}
    assert (found["ttft_s"]["n"], found["ttft_s"]["p50"]) == (2, pytest.approx(1.0))


def test_requests_of_the_warm_up_are_left_out():
    """Of replies due at 0, 4 and 6, the second one slow, a warm-up of 5 s leaves one."""
    found = summarize([reply(0, 0), reply(1, 4, ttft_s=9), reply(2, 6)], 5, anything)["all"]

    assert (found["n"], found["ok"]) == (1, 1)
    assert (found["ttft_s"]["n"], found["ttft_s"]["mean"]) == (1, pytest.approx(0.5))


def test_rates_are_over_replies_that_ended_in_the_window():
    """Replies of 11 tokens end at 1.5, 10.5 and 21.5 s. Two end between 10 and 30 s, one of them too slow."""
    records = [reply(0, 0), reply(1, 9), reply(2, 19, ttft_s=1.5)]
    found = summarize_in(records, (), 0, Window(10, 30), lambda record: record.ttft_s < 1)["all"]

    assert (found["requests_per_s"], found["tokens_per_s"], found["goodput_per_s"]) == (0.1, 1.1, 0.05)


def test_goodput_counts_complete_replies_within_every_limit():
    """Of four requests one starts too slowly and one fails, so half are good. Those that hung up are left out."""
    limits = [parse_limit("ttft_s <= 1"), parse_limit("tpot_s<=0.2")]
    hung_up = reply(4, 4)
    hung_up.outcome = "cancelled"
    records = [reply(0, 0), reply(1, 1, ttft_s=1.2), failure(2, 2), reply(3, 3, tokens=1), hung_up]
    found = summarize(records, 0, lambda record: within_limits(record, limits))["all"]

    assert found["goodput_share"] == 0.5


def test_objectives_are_judged_overall_and_per_model():
    """A slow adapter misses its own objective, while the run as a whole meets it."""
    records = [reply(n, n, ttft_s=0.5) for n in range(9)] + [reply(9, 9, "gentle", ttft_s=3)]
    summary = summarize(records, 0, anything)
    texts = ["ttft_p50_s <= 1", "gentle: ttft_p50_s <= 1", "*: error_rate <= 0", "tokens_per_s >= 1e6"]
    judged = judge_objectives([parse_objective(text) for text in texts], summary, records)

    assert [(item.scope, item.value, item.held) for item in judged[:2]] == [
        ("all", pytest.approx(0.5), True),
        ("gentle", pytest.approx(3.0), False),
    ]
    assert [(item.scope, item.held) for item in judged[2:4]] == [("base", True), ("gentle", True)]
    assert not judged[4].held


def test_an_objective_without_replies_is_missed():
    """No data does not pass."""
    records = [failure(0, 0)]
    judged = judge_objectives([parse_objective("ttft_p50_s <= 1")], summarize(records, 0, anything), records)

    assert (judged[0].value, judged[0].held) == (None, False)


def test_a_percentile_counts_the_requests_that_have_it():
    """Of ten requests seven hung up and one had a single token: two or three values do not make a percentile."""
    records = [reply(0, 0), reply(1, 1), reply(2, 2, tokens=1), *(failure(n, n) for n in range(3, 10))]
    for record in records[3:]:
        record.outcome = "cancelled"
    texts = ["ttft_p50_s <= 1", "tpot_p50_s <= 1", "error_rate <= 0"]
    judged = judge_objectives([parse_objective(text) for text in texts], summarize(records, 0, anything), records)

    assert [item.n for item in judged] == [3, 2, 3]
    assert [check.held for check in check_objectives(judged)] == [False, False, False]
    assert check_objectives(judged)[0].explain() == (
        "requests to all for ttft_p50_s is 3, must be >= 4: too few to judge; run longer"
    )


def test_failed_requests_are_slower_than_any_bound():
    """Two of ten failed: the median lies between the 5th and 6th of ten, and the p90 is beyond every bound.

    A client that hung up is not a failure: if the two had hung up instead, both percentiles would be met.
    """
    records = [reply(n, n, ttft_s=0.1 * (n + 1)) for n in range(8)] + [failure(8, 8), failure(9, 9)]
    texts = ["ttft_p50_s <= 1", "ttft_p90_s <= 1"]

    def judged(records: list[RequestRecord]) -> list[tuple[float | None, bool]]:
        found = judge_objectives([parse_objective(text) for text in texts], summarize(records, 0, anything), records)
        return [(item.value, item.held) for item in found]

    assert judged(records) == [(pytest.approx(0.55), True), (None, False)]
    for record in records[8:]:
        record.outcome = "cancelled"
    assert judged(records) == [(pytest.approx(0.45), True), (pytest.approx(0.73), True)]


@pytest.mark.parametrize(("failed", "held"), [(9, True), (10, True), (11, False)])
def test_a_tenth_may_fail_for_a_p90(failed, held):
    """Ten of a hundred requests fail: ninety had their first token in time, which is what a p90 means."""
    records = [failure(n, n) if n < failed else reply(n, n, ttft_s=0.5) for n in range(100)]
    found = judge_objectives([parse_objective("ttft_p90_s <= 0.5")], summarize(records, 0, anything), records)[0]

    assert (found.held, found.value) == (held, pytest.approx(0.5) if held else None)


def results(records: list[RequestRecord], seconds: list[dict], planned: int, **scenario: Any) -> Results:
    """A run of 40 s with these records and the client's seconds, and the given number of planned arrivals."""
    plan = [Arrival(n, float(n), "base", (0,), 11, 0.0, None, ()) for n in range(planned)]
    return Results(Path(), Scenario(duration_s=40, **scenario), {}, plan, records, seconds, (), ())


def failed_checks(
    records: list[RequestRecord], seconds: list[dict], planned: int | None = None, **scenario: Any
) -> set[str]:
    """The names of the failed checks."""
    ttft_s = {"p50": 0.1, "p95": 0.1, "p99": 0.1}
    checks = check_client(results(records, seconds, planned or len(records), **scenario), ttft_s)
    assert all(check.explain().startswith(f"{check.name} is ") for check in checks)
    return {check.name for check in checks if not check.held}


def test_a_client_within_every_bound_is_valid():
    """Forty requests on time, a calm hub and an idle processor fail no check."""
    assert failed_checks([reply(n, n, lag_s=0.001) for n in range(40)], seconds(40)) == set()


def test_each_check_can_make_a_run_invalid():
    """Too few requests, late sending, unsent arrivals, a stalled hub, a full core, a lost worker: each by name."""
    good = [reply(n, n) for n in range(40)]

    assert failed_checks(good[:5], seconds(6)) == {"requests"}
    assert failed_checks([reply(n, n, lag_s=0.03) for n in range(40)], seconds(40)) == {"schedule_lag_s"}
    assert failed_checks(good, seconds(40), planned=50) == {"sent_share"}
    # Twenty arrivals sent twice do not count as forty.
    assert failed_checks([reply(n % 20, n) for n in range(40)], seconds(40)) == {"sent_share"}
    assert failed_checks(good, seconds(40, hub_lag_s=0.06)) == {"hub_lag_s"}
    assert failed_checks(good, seconds(40, hub_lag_p50_s=0.006)) == {"hub_lag_p50_s"}
    assert failed_checks(good, seconds(40, cpu=0.97)) == {"client_cpu"}
    assert failed_checks(good, seconds(40, clock_error_s=0.03)) == {"clock_error_s"}
    assert failed_checks(good, seconds(40), workers=2) == {"workers"}


def test_one_bad_process_of_many_is_noticed():
    """One of thirty processes has no processor left, or wakes late: only a thirtieth of all seconds, but it counts."""
    good = [reply(n, n) for n in range(40)]

    def processes(**bad: float) -> list[dict]:
        return [second for worker in range(30) for second in seconds(40, worker=worker, **(bad if worker == 7 else {}))]

    assert failed_checks(good, processes(cpu=0.97)) == {"client_cpu"}
    assert failed_checks(good, processes(hub_lag_s=0.06)) == {"hub_lag_s"}
    assert failed_checks(good, processes()) == set()


def test_the_client_is_checked_as_far_out_as_the_objectives_look():
    """Late in one of forty seconds: that does not move a 95th percentile, but a 99th."""
    good = [reply(n, n) for n in range(40)]
    watched = [*seconds(39), {**seconds(40)[-1], "hub_lag_s": 0.9}]

    assert failed_checks(good, watched, slo=("ttft_p95_s <= 1",)) == set()
    assert failed_checks(good, watched, slo=("ttft_p99_s <= 1",)) == {"hub_lag_s"}


def test_a_fast_server_needs_a_quick_client():
    """Reading 20 ms late does not matter for a TTFT of 2 s, and is all of one of 20 ms."""
    good = [reply(n, n) for n in range(40)]

    def held(ttft_s: float) -> bool:
        of = dict.fromkeys(("p50", "p95", "p99"), ttft_s)
        checks = check_client(results(good, seconds(40, hub_lag_s=0.02, hub_lag_p50_s=0.003), 40), of)
        return all(check.held for check in checks)

    assert held(2.0)
    assert not held(0.02)


def test_requests_dropped_because_of_a_slow_server_do_not_make_a_run_invalid():
    """Ten of forty arrivals never end, so thirty are dropped in time: the run is valid, and misses its objective."""
    records = [reply(n, n) for n in range(10)]
    records += [RequestRecord(n, 0, "base", 0, n, end_s=n, outcome="dropped") for n in range(10, 40)]

    assert failed_checks(records, seconds(40)) == set()
    judged = judge_objectives([parse_objective("ttft_p90_s <= 9")], summarize(records, 0, anything), records)
    assert (judged[0].held, judged[0].n) == (False, 40)


def test_a_closed_loop_that_stopped_early_is_invalid():
    """Forty replies in eight of forty seconds, or forty of fifty requests."""
    quick = [reply(n, n / 5, tokens=2) for n in range(40)]

    assert failed_checks(quick, seconds(9), arrivals="closed") == {"completed_share"}
    assert failed_checks(quick, seconds(9), arrivals="closed", requests=50) == {"completed_share"}
    assert failed_checks(quick, seconds(9), arrivals="closed", requests=40) == set()
    assert failed_checks(quick, seconds(41), arrivals="closed") == set()


def test_records_survive_the_file(tmp_path):
    """A record that is written and read again is the same, to the microsecond."""
    append_records(tmp_path / "requests.jsonl", [reply(0, 1.25), failure(1, 2.5)])

    again = read_records(tmp_path / "requests.jsonl")

    assert [(record.id, record.outcome, record.ttft_s) for record in again] == [(0, "ok", 0.5), (1, "http_error", None)]
    assert again[0].gaps_s == [0.1] * 10
