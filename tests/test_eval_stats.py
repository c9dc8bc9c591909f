"""The statistics, against values worked by hand and against scipy."""

import numpy as np
import pytest
import scipy.stats

from eval.stats import difference, holm, interval, ratio, swap_test, upper_rate


def test_a_ratio_weighs_questions_by_their_denominator() -> None:
    """10 bits over 5 bytes and 2 bits over 1 byte are 12 bits over 6 bytes, not the mean of 2 and 2."""
    assert ratio([10, 3], [5, 1]).value == pytest.approx(13 / 6)


def test_the_interval_is_scipys_bca_interval() -> None:
    """A skewed sample's interval agrees with scipy's BCa within resampling noise."""
    values = np.random.default_rng(3).exponential(size=60)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", rng=5).confidence_interval

    ours = interval(ratio(list(values)), seed=0)

    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours.n == 60


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 samples of 30 normal values with mean 0, the 95 % interval holds 0 in 88 to 99 %."""
    rng = np.random.default_rng(0)
    found = [interval(ratio(list(rng.normal(size=30))), seed=1) for _ in range(200)]

    held = sum(one.low <= 0 <= one.high for one in found)

    assert 176 <= held <= 198


def test_one_question_has_no_interval() -> None:
    """With n = 1 there is a value and nothing to say about its spread."""
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


def test_a_difference_says_its_size_and_what_could_be_seen() -> None:
    """Differences 1, 2, 3 have mean 2, sd 1: d_z = 2, and 2.8016 / sqrt(3) could be detected."""
    found = difference(ratio([2, 4, 6]), ratio([1, 2, 3]), seed=0)

    assert (found.value, found.n, found.wins, found.ties, found.losses) == (2.0, 3, 3, 0, 0)
    assert found.d_z == pytest.approx(2.0)
    assert found.mde == pytest.approx(2.8016 / 3**0.5)


def test_arms_that_never_differ_have_no_p() -> None:
    """Two equal arms: the difference is 0, and neither p nor effect size is made up."""
    found = difference(ratio([1, 2, 3]), ratio([1, 2, 3]), seed=0)

    assert (found.value, found.p, found.d_z, found.mde, found.ties) == (0.0, None, None, None, 3)


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06: times 3, 2, 1 in rising order, and never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_test_that_shows_nothing_still_counts_in_its_family() -> None:
    """With two arms equal on one of three metrics the smallest p is still multiplied by three."""
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.03), None, pytest.approx(0.08)]


def test_a_difference_that_is_the_same_everywhere_has_a_p() -> None:
    """One arm meets a criterion on all of eight questions, the other on none: 2 of the 256 swaps differ as much."""
    found = difference(ratio([1] * 8), ratio([0] * 8), seed=0)

    assert (found.value, found.p, found.wins) == (1.0, 2 / 256, 8)
    assert (found.low, found.d_z, found.mde) == (None, None, None)


def test_zero_in_thirty_still_allows_one_in_ten() -> None:
    """The rule of three: 0 of 30 bounds the rate by 1 - 0.05 ** (1 / 30)."""
    assert upper_rate(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert upper_rate(4, 4) == 1.0
