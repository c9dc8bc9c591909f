"""The statistics against hand-computed values and scipy."""

import numpy as np
import pytest
import scipy.stats

from counsel.errors import UserError
from eval.stats import difference, holm, interval, ratio, swap_test, upper_rate


def test_a_ratio_weighs_questions_by_their_denominator() -> None:
    """10 bits over 5 bytes and 2 bits over 1 byte are 12 bits over 6 bytes, not the mean of 2 and 2."""
    assert ratio([10, 3], [5, 1]).value == pytest.approx(13 / 6)


def test_the_interval_is_scipys_bca_interval_at_the_expanded_level() -> None:
    """A skewed sample's bounds, over several seeds, are scipy's BCa bounds at the level that Hesterberg gives for n."""
    n = 60
    values = np.random.default_rng(3).exponential(size=n)
    tail = scipy.stats.norm.sf((n / (n - 1)) ** 0.5 * scipy.stats.t.ppf(0.975, n - 1))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=100_000, batch=1000, method="BCa", confidence_level=1 - 2 * tail, rng=5
    ).confidence_interval
    ours = [interval(ratio(list(values)), seed) for seed in range(20)]

    # At scipy's own 95 % the high bound is 0.0095 lower.
    assert np.mean([one.low for one in ours]) == pytest.approx(theirs.low, abs=0.005)
    assert np.mean([one.high for one in ours]) == pytest.approx(theirs.high, abs=0.005)
    assert {one.n for one in ours} == {n}


def test_ties_are_ties_whatever_the_unit() -> None:
    """Scores divided by three have a third of the interval: ties are found at any scale."""
    whole = np.random.default_rng(11).integers(0, 3, 60)
    thirds, threes = (interval(ratio(list(whole / by)), seed=0) for by in (3, 1))

    assert thirds.low * 3 == pytest.approx(threes.low, rel=1e-9)
    assert thirds.high * 3 == pytest.approx(threes.high, rel=1e-9)
    for size in (1 / 3, 1e-6, 1e6):
        few, none = whole[:10] - 1.0, [0.0] * 10
        assert swap_test(ratio(list(few * size)), ratio(none), seed=0) == swap_test(
            ratio(list(few)), ratio(none), seed=0
        )
        assert difference(ratio(list(few * size)), ratio(none), seed=0).ties == (few == 0).sum()


def test_the_interval_of_few_questions_is_students() -> None:
    """1, 2, 4: mean 7/3, standard error sqrt(7/3/3), t(0.975, 2) = 4.302653."""
    found, theirs = interval(ratio([1, 2, 4]), seed=0), scipy.stats.ttest_1samp([1, 2, 4], 0).confidence_interval()

    assert found.high == pytest.approx(7 / 3 + 4.302653 * (7 / 9) ** 0.5)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("sizes", [None, 0.6], ids=["equal", "bytes"])
@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 10, 30])
def test_luck_is_below_zero_in_one_of_forty(n: int, sizes: float | None) -> None:
    """Without a true difference `high < 0` holds in at most 2.5 % of 4,000 normal samples, plus three standard errors.

    Also with unequal weights: log-normal byte counts with the spread of counselors' answers.
    """
    rng = np.random.default_rng(n)
    passed = 0
    for _ in range(4000):
        bytes_ = np.ones(n) if sizes is None else np.exp(sizes * rng.normal(size=n))
        # Equal to the difference of two arms with the same byte counts, without the slow permutation test.
        passed += interval(ratio(list(rng.normal(size=n) * bytes_), list(bytes_)), seed=0).high < 0

    assert passed / 4000 <= 0.025 + 3 * (0.025 * 0.975 / 4000) ** 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 samples of 30 normal values with mean 0, the 95 % interval holds 0 in 88 to 99 %."""
    rng = np.random.default_rng(0)
    found = [interval(ratio(list(rng.normal(size=30))), seed=1) for _ in range(200)]

    held = sum(one.low <= 0 <= one.high for one in found)

    assert 176 <= held <= 198


def test_one_question_has_no_interval() -> None:
    """With n = 1 there is a value without bounds."""
    assert interval(ratio([0.4]), seed=0) == (0.4, None, None, 1)


def test_the_swap_test_is_exact_for_few_questions() -> None:
    """Differences 1, 2, 3: of 8 sign patterns, +++ and --- are as extreme as observed, so p = 2/8."""
    assert swap_test(ratio([2, 4, 6]), ratio([1, 2, 3]), seed=0) == 0.25


def test_the_swap_test_agrees_with_scipy_for_many_questions() -> None:
    """Forty paired differences give scipy's permutation p within Monte-Carlo noise."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    theirs = scipy.stats.permutation_test(
        (one, other), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples", n_resamples=20_000, rng=2
    ).pvalue

    assert swap_test(ratio(list(one)), ratio(list(other)), seed=0) == pytest.approx(theirs, abs=0.02)


def test_pairing_finds_what_a_comparison_of_two_means_cannot() -> None:
    """Questions vary by 1, the arms by 0.1: the paired p is small where an unpaired test sees nothing."""
    rng = np.random.default_rng(2)
    hardness = rng.normal(size=40)
    better, worse = hardness + 0.1 + rng.normal(0, 0.05, 40), hardness

    assert scipy.stats.ttest_ind(better, worse).pvalue > 0.5
    assert difference(ratio(list(better)), ratio(list(worse)), seed=0).p < 0.001


def test_a_difference_has_an_effect_size_and_no_mde_below_six_questions() -> None:
    """Differences 1, 2, 3 have mean 2, sd 1: d_z = 2. Three questions have no MDE: p is at least 2 of 8."""
    found = difference(ratio([2, 4, 6]), ratio([1, 2, 3]), seed=0)

    assert (found.value, found.n, found.wins, found.ties, found.losses) == (2.0, 3, 3, 0, 0)
    assert found.d_z == pytest.approx(2.0)
    assert found.mde is None


def test_the_mde_of_six_questions() -> None:
    """All six must go one way (p = 2 of 64; one against gives 4): each does with 0.8 ** (1/6), 1.7927 sd from zero."""
    each = np.array([-1.0, 0, 1, 2, 3, 4])
    found = difference(ratio(list(each)), ratio([0] * 6), seed=0)

    assert found.mde == pytest.approx(scipy.stats.norm.ppf(0.8 ** (1 / 6)) * each.std(ddof=1), rel=1e-3)


@pytest.mark.parametrize("n", [6, 8, 10, 11])
def test_the_mde_has_80_percent_power(n: int) -> None:
    """Normal differences with the MDE as mean: the permutation test is below 5 % in 80 % of 1,000 samples."""
    rng = np.random.default_rng(7)
    unit = rng.normal(size=n)
    unit = (unit - unit.mean()) / unit.std(ddof=1)
    mde = difference(ratio(list(unit + 1)), ratio([0] * n), seed=0).mde
    shown = [swap_test(ratio(list(rng.normal(mde, 1, n))), ratio([0] * n), seed=0) < 0.05 for _ in range(1000)]

    assert np.mean(shown) == pytest.approx(0.8, abs=0.04)


def test_the_mde_of_many_questions() -> None:
    """For sixty questions statsmodels' solve_power gives 0.36770 sd at 80 % power."""
    each = np.random.default_rng(3).normal(size=60)
    found = difference(ratio(list(each)), ratio([0] * 60), seed=0)

    assert found.mde / each.std(ddof=1) == pytest.approx(0.36770, rel=1e-3)


def test_effect_size_and_bounds_are_of_the_ratio() -> None:
    """Nine answers of 100 bytes are 2 % worse, one of 2,000 is 5 % better: -82 / 2,900 by bytes, and so d_z.

    d_z by hand: the value over the sd of its jackknife pseudo-values n * value - (n - 1) * value without one question.
    """
    sizes = np.array([100.0] * 9 + [2000])
    theirs, ours = sizes * 1.0, sizes * np.array([1.02] * 9 + [0.95])
    found = difference(ratio(list(ours), list(sizes)), ratio(list(theirs), list(sizes)), seed=0)
    without = [np.delete(ours - theirs, i).sum() / np.delete(sizes, i).sum() for i in range(10)]
    pseudo = [10 * found.value - 9 * each for each in without]

    assert found.value == pytest.approx(-82 / 2900)
    assert found.d_z == pytest.approx(found.value / np.std(pseudo, ddof=1))
    assert found[:4] == pytest.approx(interval(ratio(list(ours - theirs), list(sizes)), seed=0))
    assert (found.wins, found.losses) == (9, 1)


def test_arms_that_never_differ_have_no_p() -> None:
    """Two equal arms: the difference is 0, with neither p nor effect size."""
    found = difference(ratio([1, 2, 3]), ratio([1, 2, 3]), seed=0)

    assert (found.value, found.p, found.d_z, found.mde, found.ties) == (0.0, None, None, None, 3)


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06: times 3, 2, 1 in rising order, and never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_test_without_p_still_counts_in_its_family() -> None:
    """With two arms equal on one of three metrics the smallest p is still multiplied by three."""
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.03), None, pytest.approx(0.08)]


def test_a_constant_difference_has_a_p() -> None:
    """One arm meets a criterion on all of eight questions, the other on none: 2 of the 256 swaps differ as much."""
    found = difference(ratio([1] * 8), ratio([0] * 8), seed=0)

    assert (found.value, found.p, found.wins) == (1.0, 2 / 256, 8)
    assert (found.low, found.d_z, found.mde) == (None, None, None)


def test_zero_in_thirty_follows_the_rule_of_three() -> None:
    """The rule of three: 0 of 30 bounds the rate by 1 - 0.05 ** (1 / 30)."""
    assert upper_rate(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert upper_rate(4, 4) == 1.0


def test_a_score_that_is_not_finite_is_refused() -> None:
    """Nan compares false with everything, which would give a p of 0."""
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="nan or infinity"):
            ratio([1.0, bad])
