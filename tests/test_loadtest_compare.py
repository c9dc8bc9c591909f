"""Two finished runs with scripted records are compared: what differs is found, and nothing else."""

import heapq
import json
import random
from pathlib import Path

import numpy as np
import pytest

from counsel.cli import main
from loadtest.__main__ import COMMANDS
from loadtest.blocks import MIN_BLOCKS, Statistic, Values, autocorrelation_time, number_of_blocks, point, resampled
from loadtest.compare import RunData, differences, different_load
from loadtest.records import RequestRecord
from loadtest.scenario import Scenario
from loadtest.window import Window, open_window
from tests.test_loadtest_metrics import failure, reply
from tests.test_loadtest_truth import every, judged, queued, recorded


def run(ttft_s: float, seed: int) -> list[RequestRecord]:
    """A run of 200 s with one request per second and a TTFT around `ttft_s`."""
    noise = random.Random(seed)
    return [reply(n, n, ttft_s=ttft_s * noise.uniform(0.8, 1.2)) for n in range(200)]


def over(records: list[RequestRecord], duration_s: float) -> RunData:
    return RunData(records, Window(0, duration_s), open_window(records, 0, duration_s))


def shown(
    a: list[RequestRecord],
    b: list[RequestRecord],
    margin: float = 0.05,
    block_s: float | None = None,
    paired: bool = False,
    duration_s: float = 200,
) -> dict[str, str]:
    found = differences(over(a, duration_s), over(b, duration_s), block_s, margin, 0, paired=paired)
    return {difference.metric: difference.shows for difference in found}


def test_a_slower_run_is_worse_and_a_faster_one_better():
    """A TTFT up by half is worse, and the reverse is better; throughput does not change."""
    assert shown(run(0.4, 1), run(0.6, 2))["ttft_p50_s"] == "worse"
    assert shown(run(0.6, 2), run(0.4, 1))["ttft_p50_s"] == "better"
    assert shown(run(0.4, 1), run(0.6, 2))["tokens_per_s"] == "-"


def test_two_runs_of_the_same_server_show_no_difference():
    """Only the noise differs, so no latency is better or worse."""
    assert set(shown(run(0.4, 1), run(0.4, 7)).values()) == {"-"}


def test_a_difference_below_the_margin_does_not_count():
    """Every request 3 % slower can be shown, but is only worse with a smaller margin."""
    records = run(0.4, 1)
    slower = [reply(record.id, record.due_s, ttft_s=1.03 * record.ttft_s) for record in records]

    assert shown(records, slower)["ttft_p50_s"] == "-"
    assert shown(records, slower, margin=0.0)["ttft_p50_s"] == "-"  # the noise is larger
    # Paired, the noise cancels out.
    assert shown(records, slower, margin=0.0, paired=True)["ttft_p50_s"] == "worse"
    assert shown(records, slower, paired=True)["ttft_p50_s"] == "-"
    even = [reply(n, n, ttft_s=0.4) for n in range(200)]
    later = [reply(n, n, ttft_s=0.412) for n in range(200)]
    assert shown(even, later)["ttft_p50_s"] == "-"
    assert shown(even, later, margin=0.0)["ttft_p50_s"] == "worse"


def test_errors_are_compared_even_without_a_ratio():
    """One failure in ten is worse than none or one; one against none may be chance. The reverse is better."""

    def failing(which: set[int], seed: int) -> list[RequestRecord]:
        return [failure(record.id, record.due_s) if record.id in which else record for record in run(0.4, seed)]

    tenth = set(range(0, 200, 10))

    assert shown(failing(set(), 1), failing(tenth, 2))["error_rate"] == "worse"
    assert shown(failing({7}, 1), failing(tenth, 2))["error_rate"] == "worse"
    assert shown(failing(set(), 1), failing({7}, 2))["error_rate"] == "-"
    assert shown(failing(tenth, 1), failing(set(), 2))["error_rate"] == "better"


def test_throughput_is_over_replies_in_the_window():
    """Of 24 requests/s, a server for 26 gives 24 and one for 12 gives 12, though all replies come back in the end."""
    a, b = (recorded(queued(slots, 0.5), "24", 60) for slots in (13, 6))
    found = differences(over(a, 60), over(b, 60), None, 0.05, 0)
    tokens = next(each for each in found if each.metric == "tokens_per_s")

    assert (tokens.a, tokens.b) == pytest.approx((24 * 11, 12 * 11), rel=0.01)
    assert (tokens.ratio, tokens.shows) == (pytest.approx(0.5, rel=0.01), "worse")


def near_saturation(seed: int) -> list[RequestRecord]:
    """Four slots of 0.5 s on average, at nine tenths of their capacity for 200 s, all at random."""
    draw = np.random.default_rng(seed)
    due_s = np.sort(draw.uniform(0, 200, draw.poisson(7.2 * 200)))
    free, records = [0.0] * 4, []
    for n, due in enumerate(due_s.tolist()):
        begin_s = max(due, heapq.heappop(free))
        service_s = 0.5 * draw.lognormal(-0.125, 0.5)
        heapq.heappush(free, begin_s + service_s)
        records.append(reply(n, due, ttft_s=begin_s - due + service_s / 2, tokens=11, tpot_s=service_s / 20))
    return records


def test_runs_of_one_server_near_saturation_do_not_differ():
    """Four runs of a server against its slowest run: none differs. With blocks of 5 s, most would."""
    slow, *others = (near_saturation(seed) for seed in (4, 0, 1, 3, 5))

    def differing(block_s: float | None) -> int:
        return sum(bool({"better", "worse"} & set(shown(other, slow, block_s=block_s).values())) for other in others)

    assert differing(None) == 0
    assert differing(5) >= 2


def test_a_run_that_is_too_short_shows_a_question_mark():
    """One long good spell and one long bad one are at most two independent blocks, however many requests they hold."""
    spells = [reply(n, n / 5, ttft_s=0.2 if n < 500 else 2.0) for n in range(1000)]

    assert shown(spells, spells)["ttft_p50_s"] == "?"
    assert shown(spells, spells)["tokens_per_s"] == "-"


def test_the_autocorrelation_time_of_known_series():
    """An autoregressive series with coefficient 0.8 has (1 + 0.8) / (1 - 0.8) = 9, noise and constants have 1."""
    draw = np.random.default_rng(3)
    series = np.zeros(10_000)
    for n in range(1, len(series)):
        series[n] = 0.8 * series[n - 1] + draw.standard_normal()

    assert autocorrelation_time(series) == pytest.approx(9, rel=0.1)
    assert autocorrelation_time(draw.standard_normal(10_000)) == pytest.approx(1, abs=0.1)
    assert autocorrelation_time(np.full(64, 0.3)) == 1


@pytest.mark.parametrize("statistic", [Statistic(50), Statistic(90), Statistic(mean=True), Statistic()])
def test_a_resample_is_the_statistic_of_the_drawn_blocks(statistic):
    """Eight blocks of five values: the same as numpy's result for the joined blocks."""
    draw = np.random.default_rng(0)
    values = Values(np.arange(40) + 0.5, draw.uniform(0, 1, 40), 40.0)
    picks = draw.integers(8, size=(20, 8))
    joined = [np.concatenate([values.value[5 * block : 5 * block + 5] for block in record]) for record in picks]
    of = np.mean if statistic.mean else (lambda v: v.sum() / 40) if statistic.percent is None else (
        lambda v: np.percentile(v, statistic.percent)
    )  # fmt: skip

    assert resampled(values, statistic, picks) == pytest.approx([of(each) for each in joined])
    assert point(values, statistic) == pytest.approx(of(values.value))


def test_a_block_holds_at_least_two_requests():
    """Twenty requests are at most ten blocks, and ten requests are too few to compare."""
    few = Values(np.arange(20.0), np.ones(20), 20.0)

    assert number_of_blocks([few, few], Statistic(50), paired=False) == 10
    assert set(shown(run(0.4, 1)[:10], run(0.4, 2)[:10], duration_s=10).values()) == {"?"}
    assert MIN_BLOCKS == 8


def test_the_rest_of_a_limited_schedule_does_not_count(tmp_path):
    """40 requests of a schedule of 100 s are all due in 10 s: 4 per second in both runs, without empty blocks."""
    for name, answer in (("a", every(0.3)), ("b", every(0.6))):
        judged(tmp_path / name, recorded(answer, "4", 100)[:40], rate="4", duration_s=100, requests=40)
    document = compared(tmp_path, "a", "b")[1]
    by_metric = {each["metric"]: each for each in document["differences"]}

    assert by_metric["tokens_per_s"]["a"] == pytest.approx(44, rel=0.01)
    assert by_metric["tokens_per_s"]["b"] == pytest.approx(44, rel=0.01)
    assert by_metric["e2e_p50_s"]["shows"] == "worse"


def compared(folder: Path, *words: str) -> tuple[int, dict]:
    """`python -m loadtest compare` in that folder: its status and its last line."""
    import contextlib
    import io
    import os

    out, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            status = main("loadtest", COMMANDS, ["compare", *words])
    finally:
        os.chdir(before)
    *text, last = out.getvalue().strip().split("\n")
    return status, {**json.loads(last), "text": "\n".join(text)}


def test_runs_of_different_loads_are_not_judged(tmp_path):
    """Twice the rate and half as fast: no verdict on the server, and the difference is named."""
    judged(tmp_path / "a", recorded(every(0.3), "4", 40), rate="4", duration_s=40)
    judged(tmp_path / "b", recorded(every(0.6), "8", 40), rate="8", duration_s=40)
    status, document = compared(tmp_path, "a", "b")

    assert (status, document["verdict"]) == (4, "different loads")
    assert "rate is '4' in A and '8' in B" in document["text"]


def test_only_keys_of_the_load_make_a_different_load():
    """Where it goes, to which models, the seed and the duration are not the load. The duration of a ramp is."""
    a = Scenario()

    assert (
        different_load(a, Scenario(url="http://x/v1", seed=3, duration_s=90, workers=2, slo=("error_rate <= 1",))) == []
    )
    assert different_load(a, Scenario(output_tokens="8"))
    assert different_load(Scenario(rate="ramp(1, 2)"), Scenario(rate="ramp(1, 2)", duration_s=90))


def test_runs_of_one_plan_are_compared_block_by_block(tmp_path):
    """The same arrivals, each reply a tenth slower: shown, though replies of one run differ by ten times that."""
    noise = random.Random(5)
    times = [noise.uniform(0.2, 3.0) for _ in range(400)]
    for name, factor in (("a", 1.0), ("b", 1.1)):
        records = recorded(lambda n, due_s, factor=factor: every(factor * times[n])(n, due_s), "4", 100)
        judged(tmp_path / name, records, rate="4", duration_s=100)
    status, document = compared(tmp_path, "a", "b")

    assert (document["paired"], document["verdict"], status) == (True, "worse", 3)
