"""Intervals and tests against scipy, hand computation and simulated coverage."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, permutation_test, t

from dreambooth.statistics.intervals import (
    Interval,
    PermutationTest,
    bootstrap_interval,
    describe,
    describe_test,
    hierarchical_interval,
    holm,
    paired_difference,
    sign_flip_test,
)

NAN = math.nan


def test_interval_mean_is_the_plain_mean() -> None:
    assert bootstrap_interval([0.1, 0.2, 0.6]).mean == pytest.approx(0.3)


def test_interval_agrees_with_scipy_at_the_expanded_level() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=12)
    tail = norm.cdf(math.sqrt(12 / 11) * t.ppf(0.025, 11))
    expected = bootstrap((values,), np.mean, confidence_level=1 - 2 * tail, n_resamples=40000, method="percentile", rng=1)
    ours = bootstrap_interval(values, resamples=40000)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.03)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(5)
    intervals = [bootstrap_interval(draws.normal(1.0, 2.0, size=8), resamples=1000, seed=seed) for seed in range(1500)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.92 <= covered <= 0.96  # 5000 such runs give 0.94 (standard error here 0.006), and the plain percentile interval 0.88


def test_interval_over_clusters_covers_where_images_would_not() -> None:
    draws = np.random.default_rng(6)
    subjects = np.repeat(np.arange(8), 25)
    covered = {True: 0, False: 0}
    for seed in range(150):
        values = draws.normal(0, 1, size=8)[subjects] + draws.normal(0, 0.3, size=200)
        for clustered in covered:
            low, high = bootstrap_interval(values, subjects if clustered else None, resamples=500, seed=seed)[1:3]
            covered[clustered] += low <= 0 <= high
    assert covered[True] / 150 >= 0.90 and covered[False] / 150 <= 0.50


def test_interval_of_clusters_weighs_subjects_equally() -> None:
    interval = bootstrap_interval([1.0] * 8 + [0.0, 0.4], ["dog"] * 8 + ["cat", "vase"])
    assert interval.mean == pytest.approx((1.0 + 0.0 + 0.4) / 3) and interval.n == 3


def test_interval_of_clusters_equals_that_of_their_means() -> None:
    values, clusters = [0.1, 0.3, 0.5, 0.7, 0.2, 0.4], ["a", "a", "b", "b", "c", "c"]
    assert bootstrap_interval(values, clusters)[:4] == bootstrap_interval([0.2, 0.6, 0.3])[:4]


def test_interval_of_two_subjects_with_many_images_is_not_faked() -> None:
    interval = bootstrap_interval(np.linspace(0, 1, 100), [0] * 50 + [1] * 50, unit="subject")
    assert interval == Interval(pytest.approx(0.5), None, None, 2, "subject")


def test_interval_of_nothing_is_nan_without_bounds() -> None:
    interval = bootstrap_interval([])
    assert math.isnan(interval.mean) and interval.low is None and interval.n == 0


def test_interval_leaves_out_what_was_not_measured() -> None:
    assert bootstrap_interval([0.1, NAN, 0.2, 0.6]) == bootstrap_interval([0.1, 0.2, 0.6])


def test_interval_of_equal_values_has_no_width() -> None:
    interval = bootstrap_interval([0.7] * 5)
    assert (interval.low, interval.high) == pytest.approx((0.7, 0.7))


def test_interval_is_wider_at_a_higher_level() -> None:
    values = np.random.default_rng(0).normal(size=20)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=20)
    np.random.seed(1)
    first = bootstrap_interval(values, seed=3)
    np.random.seed(2)
    assert bootstrap_interval(values, seed=3) == first != bootstrap_interval(values, seed=4)


def test_interval_does_not_depend_on_how_the_draws_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=10)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("dreambooth.statistics.intervals.DRAWS_AT_ONCE", 70)
    assert bootstrap_interval(values) == whole


@pytest.mark.parametrize("bad", [{"values": [[1.0]]}, {"values": [1.0], "clusters": [1, 2]}, {"values": [1.0], "level": 1.0}])
def test_interval_of_wrong_arguments_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="must"):
        bootstrap_interval(**bad)


def test_paired_difference_is_a_minus_b() -> None:
    assert paired_difference([0.5, 0.6, 0.7], [0.4, 0.4, 0.4]).mean == pytest.approx(0.2)


def test_paired_difference_sees_what_two_intervals_cannot() -> None:
    draws = np.random.default_rng(0)
    subjects = draws.normal(0.7, 0.1, size=15)
    a, b = subjects + draws.normal(0.02, 0.01, size=15), subjects + draws.normal(0, 0.01, size=15)
    assert bootstrap_interval(a).low < bootstrap_interval(b).high and paired_difference(a, b).low > 0


def test_paired_difference_leaves_out_half_measured_pairs() -> None:
    difference = paired_difference([0.5, NAN, 0.7, 0.9], [0.4, 0.1, NAN, 0.7])
    assert difference == Interval(pytest.approx(0.15), None, None, 2, "pair")


def test_paired_difference_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1.0, 2.0], [1.0])


def test_describe_prints_mean_and_bounds() -> None:
    assert describe(Interval(0.8211, 0.789, 0.8543, 30, "subject")) == "0.82 (0.79 to 0.85)"


def test_describe_says_why_there_is_no_interval() -> None:
    assert describe(Interval(0.8211, None, None, 2, "subject")) == "0.82 (no interval: 2 subjects)"


def test_describe_of_nothing_says_so() -> None:
    assert describe(bootstrap_interval([NAN])) == "not measured"


def _design(subjects: int, seeds: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """The subject and the seed of each image of a complete experiment."""
    return np.repeat(np.arange(subjects), seeds * images), np.tile(np.repeat(np.arange(seeds), images), subjects)


def test_hierarchical_interval_weighs_subjects_then_seeds_then_images_equally() -> None:
    values = [1.0, 0.0, 0.0, 0.6, 0.2, 0.3, 0.5]
    subjects, seeds = ["a", "a", "a", "b", "b", "c", "c"], [0, 1, 1, 0, 1, 0, 0]
    assert hierarchical_interval(values, subjects, seeds).mean == pytest.approx(((1.0 + 0.0) / 2 + (0.6 + 0.2) / 2 + 0.4) / 3)


def test_hierarchical_interval_counts_subjects_and_not_runs() -> None:
    subjects, seeds = _design(4, 3, 2)
    assert hierarchical_interval(np.arange(24.0), subjects, seeds)[3:] == (4, "subject")


def test_hierarchical_interval_with_one_seed_is_that_over_subjects() -> None:
    values = np.random.default_rng(0).normal(size=18)
    subjects, _ = _design(6, 1, 3)
    ours, known = hierarchical_interval(values, subjects, np.zeros(18)), bootstrap_interval(values, subjects, unit="subject")
    assert ours == (pytest.approx(known.mean), pytest.approx(known.low), pytest.approx(known.high), 6, "subject")


def test_hierarchical_interval_is_as_wide_as_that_of_the_subject_means() -> None:
    draws, widths = np.random.default_rng(7), []
    subjects, seeds = _design(12, 3, 1)
    for seed in range(40):
        values = draws.normal(0, 1, 12)[subjects] + draws.normal(0, 1, 36)
        intervals = hierarchical_interval(values, subjects, seeds, seed=seed), bootstrap_interval(values, subjects, seed=seed)
        widths.append([interval.high - interval.low for interval in intervals])
    ours, known = np.mean(widths, axis=0)
    assert ours == pytest.approx(known, rel=0.03)  # drawing seeds without drawing subjects in makes it 8 % wider


def test_hierarchical_interval_keeps_the_spread_of_seeds_where_subjects_agree_by_chance() -> None:
    values, (subjects, seeds) = np.tile([0.2, 0.5, 0.8], 4), _design(4, 3, 1)
    interval = hierarchical_interval(values, subjects, seeds)
    assert bootstrap_interval(values, subjects)[1:3] == pytest.approx((0.5, 0.5)) and interval.low < 0.4 and interval.high > 0.6


def test_hierarchical_interval_covers_where_runs_or_images_taken_as_independent_would_not() -> None:
    draws = np.random.default_rng(8)
    subjects, seeds = _design(6, 3, 4)
    runs, covered = subjects * 3 + seeds, {"subjects and seeds": 0, "runs": 0, "images": 0}
    for seed in range(300):
        values = draws.normal(0, 1, 6)[subjects] + draws.normal(0, 0.5, 18)[runs] + draws.normal(0, 0.3, 72)
        options = {"resamples": 400, "seed": seed}
        intervals = (
            hierarchical_interval(values, subjects, seeds, **options),
            bootstrap_interval(values, runs, **options),
            bootstrap_interval(values, **options),
        )
        for name, interval in zip(covered, intervals, strict=True):
            covered[name] += interval.low <= 0 <= interval.high
    assert 0.90 <= covered["subjects and seeds"] / 300 <= 0.98
    assert covered["runs"] / 300 <= 0.82 and covered["images"] / 300 <= 0.60


def test_hierarchical_interval_covers_where_seeds_are_all_that_varies() -> None:
    draws = np.random.default_rng(9)
    subjects, seeds = _design(6, 3, 1)
    intervals = [hierarchical_interval(draws.normal(size=18), subjects, seeds, resamples=400, seed=seed) for seed in range(400)]
    assert 0.93 <= np.mean([i.low <= 0 <= i.high for i in intervals]) <= 0.985


def test_hierarchical_interval_takes_unequal_numbers_of_seeds() -> None:
    values, subjects, seeds = [0.1, 0.3, 0.5, 0.2, 0.9, 0.7], [0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]
    interval = hierarchical_interval(values, subjects, seeds)
    assert interval.mean == pytest.approx((0.3 + 0.55 + 0.7) / 3) and 0.1 <= interval.low < interval.mean < interval.high <= 0.9


def test_hierarchical_interval_of_two_subjects_is_not_faked() -> None:
    subjects, seeds = _design(2, 10, 5)
    assert hierarchical_interval(np.arange(100.0), subjects, seeds) == Interval(pytest.approx(49.5), None, None, 2, "subject")


def test_hierarchical_interval_leaves_out_what_was_not_measured() -> None:
    whole = hierarchical_interval([0.1, 0.2, 0.6, 0.5], [0, 1, 2, 2], [0, 0, 0, 1])
    assert hierarchical_interval([0.1, NAN, 0.2, 0.6, 0.5, NAN], [0, 0, 1, 2, 2, 3], [0, 1, 0, 0, 1, 0]) == whole


def test_hierarchical_interval_of_nothing_is_nan_without_bounds() -> None:
    interval = hierarchical_interval([], [], [])
    assert math.isnan(interval.mean) and interval.low is None and interval.n == 0


def test_hierarchical_interval_of_wrong_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        hierarchical_interval([1.0], [0], [0, 1])
    with pytest.raises(ValueError, match="level"):
        hierarchical_interval([1.0], [0], [0], level=0.0)


def test_sign_flip_test_of_three_by_hand() -> None:
    test = sign_flip_test([0.3, 0.2, 0.1])  # of 8 patterns only +++ and --- reach a sum of 0.6
    assert test == PermutationTest(0.25, 0.25, 3, True, "pair")


def test_sign_flip_test_with_one_contrary_subject_by_hand() -> None:
    assert sign_flip_test([0.4, 0.3, 0.2, -0.1]).p == pytest.approx(4 / 16)  # sums of 0.8 and 1.0, to either side; the next is 0.6


@pytest.mark.parametrize("n", [4, 9])
def test_sign_flip_test_agrees_with_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1.0, size=n)
    expected = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided")
    assert sign_flip_test(values).p == pytest.approx(expected.pvalue)


def test_sign_flip_test_does_not_depend_on_which_arm_is_first() -> None:
    values = np.random.default_rng(1).normal(0.5, 1.0, size=8)
    assert sign_flip_test(values).p == sign_flip_test(-values).p


def test_sign_flip_test_with_drawn_patterns_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, size=12)
    exact = sign_flip_test(values)
    monkeypatch.setattr("dreambooth.statistics.intervals.EXACT_UP_TO", 0)
    drawn = sign_flip_test(values)
    assert exact.exact and not drawn.exact and drawn.p == pytest.approx(exact.p, abs=0.015)  # three standard errors of 9999 draws


def test_sign_flip_test_with_drawn_patterns_is_never_zero() -> None:
    test = sign_flip_test(np.full(40, 0.5), resamples=999)
    assert test.p == test.smallest_p == 1 / 1000


def test_sign_flip_test_flips_images_of_a_subject_together() -> None:
    subjects = np.repeat(np.arange(3), 20)
    test = sign_flip_test(np.array([0.3, 0.2, 0.1])[subjects], subjects, unit="subject")
    assert test == PermutationTest(0.25, 0.25, 3, True, "subject")  # 60 independent images would give p below 0.001


def test_sign_flip_test_raises_false_alarms_as_often_as_it_says() -> None:
    draws = np.random.default_rng(10)
    values, subjects = draws.normal(size=(1000, 8, 1)) + draws.normal(0, 0.3, size=(1000, 8, 5)), np.repeat(np.arange(8), 5)
    alarms = np.mean([sign_flip_test(row.reshape(-1), subjects).p <= 0.05 for row in values])
    assert 0.03 <= alarms <= 0.065  # 12 of 256 patterns: 0.047


def test_sign_flip_test_of_no_difference_at_all_is_one() -> None:
    assert sign_flip_test([0.0] * 6).p == 1.0


def test_sign_flip_test_counts_equal_patterns_in_spite_of_rounding() -> None:
    values = [-9, -9, -9, -7, 9]  # in tenths some of the equal sums differ by 1e-16
    signs = [[1 - 2 * (pattern >> k & 1) for k in range(5)] for pattern in range(32)]
    reached = sum(abs(sum(s * v for s, v in zip(row, values, strict=True))) >= 25 for row in signs)
    assert sign_flip_test([value / 10 for value in values]).p == reached / 32 == 12 / 32


def test_sign_flip_test_of_nothing_is_nan() -> None:
    test = sign_flip_test([NAN])
    assert math.isnan(test.p) and test.n == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 0.04 x 1 is lifted to 0.03 x 2


def test_holm_ends_at_one_and_leaves_a_single_p_alone() -> None:
    assert holm([0.4, 0.6, 0.9]) == pytest.approx([1, 1, 1]) and holm([0.04]) == pytest.approx([0.04])


def test_holm_does_not_count_what_was_not_tested() -> None:
    assert holm([NAN, 0.01, 0.04]) == pytest.approx([NAN, 0.02, 0.04], nan_ok=True)


def test_holm_keeps_the_chance_of_any_false_alarm_at_the_level() -> None:
    p = np.random.default_rng(11).random((4000, 5))
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (PermutationTest(0.125, 0.0625, 5, True, "subject"), "p = 0.12 (5 subjects: p cannot be below 0.06)"),
        (PermutationTest(0.031, 0.03125, 6, True, "subject"), "p = 0.031"),
        (PermutationTest(0.0001, 0.0001, 30, False, "subject"), "p < 0.001"),
        (PermutationTest(1.0, 1.0, 1, True, "subject"), "p = 1 (1 subject: p cannot be below 1)"),
        (PermutationTest(NAN, NAN, 0, True, "subject"), "not tested"),
    ],
)
def test_describe_test_says_what_few_subjects_cannot_show(test: PermutationTest, words: str) -> None:
    assert describe_test(test) == words
