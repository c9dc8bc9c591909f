"""The pure functions of the load test: arrivals, mixes, plans. Expected values are worked out by hand."""

import itertools
from collections import Counter

import pytest

from counsel.client import ServerModels
from counsel.errors import UserError
from loadtest.arrivals import due_times, expected_count, rate_knots, trace_times
from loadtest.mix import choose_models, shares, with_cold_requests
from loadtest.prepare import Models, build_plan, target_models
from loadtest.scenario import Scenario

QUESTIONS = ["one two three", "four five six", "seven eight nine"]


def times(process: str, rate: str, duration_s: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    return due_times(process, rate_knots(rate, duration_s), burstiness, seed)


def test_constant_arrivals_are_evenly_spaced():
    """At 4 requests/s for 2 s there are eight, a quarter of a second apart; the first is half a gap in."""
    assert times("constant", "4", 2) == pytest.approx([0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875])


def test_constant_arrivals_follow_a_ramp():
    """Under ramp(0, 2) over 2 s the integral is t^2/2, so the arrivals at 0.5 and 1.5 fall at 1 and sqrt(3)."""
    assert times("constant", "ramp(0, 2)", 2) == pytest.approx([1.0, 3**0.5])


def test_the_number_of_requests_is_the_area_under_the_rate():
    """By hand: 10 s of 3; a ramp from 1 to 5; 2, 4, 8 for 4 s each; a spike."""
    assert expected_count(rate_knots("3", 10)) == 30
    assert expected_count(rate_knots("ramp(1, 5)", 10)) == 30
    assert expected_count(rate_knots("steps(2, 4, 8)", 12)) == 56
    assert expected_count(rate_knots("spike(1, 11, 2, 4)", 10)) == pytest.approx(30)
    assert expected_count(rate_knots("spike(1, 11)", 10)) == pytest.approx(30)


def test_steps_divide_the_duration_evenly():
    """steps(2, 8) over 4 s: four arrivals in the first half, sixteen in the second."""
    due = times("constant", "steps(2, 8)", 4)

    assert [sum(t < 2 for t in due), sum(t >= 2 for t in due)] == [4, 16]


@pytest.mark.parametrize(("process", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0)])
def test_random_arrivals_have_the_rate_and_the_irregularity(process, burstiness, variation):
    """Gaps are 1/rate on average, and their relative standard deviation is 1 (Poisson) or 1/sqrt(shape)."""
    due = times(process, "50", 1000, burstiness)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5

    assert len(due) == pytest.approx(50_000, rel=0.03)
    assert spread / mean == pytest.approx(variation, rel=0.03)
    assert due == sorted(due)
    assert 0 <= due[0] <= due[-1] < 1000


@pytest.mark.parametrize("burstiness", [0.0625, 0.25, 1.0, 4.0])
def test_bursts_do_not_raise_the_rate(burstiness):
    """2,000 plans of a rate of 24 arrivals have 24 on average, however bursty they are."""
    counts = [len(times("gamma", "2", 12, burstiness, seed)) for seed in range(2000)]
    spread = (sum((n - 24) ** 2 for n in counts) / len(counts)) ** 0.5

    assert sum(counts) / len(counts) == pytest.approx(24, abs=3.5 * spread / 2000**0.5)


def test_a_trace_that_is_cut_off_is_reported(tmp_path, capsys):
    """Of timestamps over 100 s, a run of 60 s uses a part, and prints how many."""
    (tmp_path / "t.jsonl").write_text("".join(f'{{"timestamp": {n}}}\n' for n in range(100)))
    plan, _ = build_plan(
        Scenario(arrivals="trace", trace=str(tmp_path / "t.jsonl")), Models(("base",), "base"), QUESTIONS
    )

    assert len(plan) == 60
    assert "60 of 100 arrivals are due within duration_s 60" in capsys.readouterr().err


def test_arrivals_repeat_with_their_seed_only():
    """The same seed gives the same times, another seed gives others."""
    assert times("poisson", "5", 20, seed=3) == times("poisson", "5", 20, seed=3)
    assert times("poisson", "5", 20, seed=3) != times("poisson", "5", 20, seed=4)


def test_a_trace_is_shifted_scaled_and_cut():
    """Timestamps 100, 104, 101 at double speed are due at 0, 0.5, 2; a run of 1 s keeps two."""
    assert trace_times([100.0, 104.0, 101.0], 10, 2) == [0.0, 0.5, 2.0]
    assert trace_times([100.0, 104.0, 101.0], 1, 2) == [0.0, 0.5]


def test_zipf_shares_fall_with_rank():
    """zipf(1) over three models gives 6/11, 3/11, 2/11; zipf(0) is uniform."""
    assert shares("zipf(1)", ["a", "b", "c"], None, None) == pytest.approx({"a": 6 / 11, "b": 3 / 11, "c": 2 / 11})
    assert shares("zipf(0)", ["a", "b"], None, None) == {"a": 0.5, "b": 0.5}


def test_the_base_share_is_taken_first():
    """With 0.4 for the base, weights 1 and 2 divide the other 0.6."""
    found = shares("weights(x=1, y=2)", ["base", "x", "y"], "base", 0.4)

    assert found == pytest.approx({"base": 0.4, "x": 0.2, "y": 0.4})


def test_models_are_drawn_by_their_shares():
    """30,000 draws are within 0.02 of each share, and a model with share 0 is never drawn."""
    counts = Counter(choose_models({"a": 0.5, "b": 0.3, "c": 0.2, "d": 0.0}, 30_000, seed=1))

    assert {name: n / 30_000 for name, n in counts.items()} == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2}, abs=0.02)


def test_a_cold_request_goes_to_the_least_recently_used_adapter():
    """All cold: the adapters take turns, unused ones first. None cold: nothing changes."""
    assert with_cold_requests(["a"] * 5, ["a", "b", "c"], 1.0, seed=0) == [(name, True) for name in "abcab"]
    assert with_cold_requests(["a", "base"], ["a", "b"], 0.0, seed=0) == [("a", False), ("base", False)]


def test_a_plan_repeats_and_is_numbered_by_due_time():
    """The same scenario gives the same plan, and each question is used once before any is repeated."""
    scenario = Scenario(rate="3", duration_s=10, unique_prompts=False, output_tokens="uniform(5, 9)")
    plan, texts = build_plan(scenario, Models(("base", "x"), "base"), QUESTIONS)

    assert plan == build_plan(scenario, Models(("base", "x"), "base"), QUESTIONS)[0]
    assert [arrival.id for arrival in plan] == list(range(len(plan)))
    assert [arrival.due_s for arrival in plan] == sorted(arrival.due_s for arrival in plan)
    assert sorted(texts[arrival.prompts[0]] for arrival in plan[:3]) == sorted(QUESTIONS)
    assert {arrival.max_tokens for arrival in plan} <= {5, 6, 7, 8, 9}


def test_shares_of_long_prompts_and_hang_ups_reach_the_plan():
    """Long prompts have the given number of words, clients that hang up a time, both in their share."""
    scenario = Scenario(
        rate="100", duration_s=20, long_share=0.25, long_words=40, cancel_share=0.5, cancel_after_s="2", turns="2"
    )
    plan, texts = build_plan(scenario, Models(("base",), "base"), QUESTIONS)
    long = [arrival for arrival in plan if "long" in arrival.tags]

    assert len(long) / len(plan) == pytest.approx(0.25, abs=0.04)
    assert sum(arrival.cancel_s == 2.0 for arrival in plan) / len(plan) == pytest.approx(0.5, abs=0.04)
    assert {len(texts[arrival.prompts[0]].split()) for arrival in long} == {41}
    assert {len(arrival.prompts) for arrival in plan} == {2}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"rate": "rampp(1, 2)"}, "did you mean 'ramp'"),
        ({"rate": "steps(1, x)"}, "'x' is not a number"),
        ({"rate": "0"}, "numbers above 0"),
        ({"arrivals": "poison"}, "did you mean 'poisson'"),
        ({"arrivals": "trace"}, "give both or neither"),
        ({"cancel_share": 1.5}, "must be from 0 to 1"),
        ({"slo": ("ttft_p91_s <= 1",)}, "did you mean"),
        ({"slo": ("ttft_p90_s < 1",)}, "the form is"),
        ({"duration_s": float("inf")}, "duration_s is inf; it must be above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"slo": ("error_rate <= 5",)}, "a share from 0 to 1, not percent; write 0.05"),
        ({"slo": ("goodput_share >= 90",)}, "a share from 0 to 1, not percent; write 0.9"),
        ({"goodput_slo": ("ttft_s <= soon",)}, "'soon' is not a number"),
    ],
)
def test_a_wrong_scenario_is_one_line_that_says_what_is_allowed(option, says):
    """Every error names the value and what is allowed."""
    with pytest.raises(UserError, match=says) as caught:
        Scenario(**option)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("models", "base"), [((), "base"), (("x", "alias"), "alias"), (("x",), None), (("x@1",), None)], ids=str
)
def test_the_base_of_a_run_is_the_first_base_in_it(monkeypatch, models, base):
    """vLLM lists a base under each --served-model-name; a run may name the second."""
    names = ("base", "alias", "x")
    served = ServerModels("base", ("x",), names, {**dict.fromkeys(names, ""), "x@1": "x@1"}, 512)
    monkeypatch.setattr("loadtest.prepare.list_models", lambda _client: served)
    assert target_models(Scenario(models=models)) == Models(models or names, base)
