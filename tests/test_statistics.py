"""Intervals against scipy, hand computation and simulated coverage; the rule for the best step against hand-checked runs."""

import math
import random

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t

from dreambooth.statistics import Interval, StepScores, bootstrap_interval, choose_step, describe, paired_difference

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
    monkeypatch.setattr("dreambooth.statistics.DRAWS_AT_ONCE", 70)
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


BASE = StepScores(0, 0.2, 0.30, 0.10, 0.5)


def test_choose_step_takes_the_most_faithful_admissible_step() -> None:
    rows = [BASE, StepScores(100, 0.6, 0.30, 0.12), StepScores(200, 0.7, 0.29, 0.19), StepScores(300, 0.8, 0.28, 0.19)]
    choice = choose_step(rows)  # step 300: alignment 0.28 < 0.95 x 0.30
    assert choice.step == 200
    assert choice.reason == (
        "step 200 has the highest identity fidelity, 0.700, of the 2 of 3 steps within the limits "
        "(prompt alignment at least 0.285 and drift at most 0.200)"
    )


def test_choose_step_refuses_a_collapsed_class() -> None:
    assert choose_step([BASE, StepScores(100, 0.6, 0.30, 0.15), StepScores(200, 0.9, 0.30, 0.21)]).step == 100


def test_choose_step_keeps_a_step_exactly_at_its_limits() -> None:
    base = StepScores(0, 0.2, 0.30, 0.70)  # 0.7 + 0.1 is 0.7999999999999999 in floating point
    assert choose_step([base, StepScores(100, 0.6, 0.30, 0.75), StepScores(200, 0.9, 0.285, 0.80)]).step == 200


def test_choose_step_without_admissible_step_takes_the_smallest_violation_and_says_so() -> None:
    rows = [BASE, StepScores(100, 0.6, 0.25, 0.15), StepScores(200, 0.9, 0.29, 0.22)]
    choice = choose_step(rows)  # violations 0.035 and 0.02
    assert choice.step == 200
    assert choice.reason == (
        "no step is within the limits (prompt alignment at least 0.285 and drift at most 0.200); "
        "step 200 breaks them least: drift 0.220 is 0.020 too high"
    )


@pytest.mark.parametrize("alignment", [0.30, 0.20])
def test_choose_step_gives_ties_to_the_earlier_step(alignment: float) -> None:
    rows = [StepScores(200, 0.6, alignment, 0.1), BASE, StepScores(100, 0.6, alignment, 0.1)]
    assert choose_step(rows).step == 100


def test_choose_step_never_takes_the_base_beside_a_tuned_step() -> None:
    assert choose_step([StepScores(0, 0.9, 0.9, 0.0), StepScores(10, 0.1, 0.1, 0.9)]).step == 10


def test_choose_step_takes_the_base_if_it_is_alone() -> None:
    assert choose_step([BASE]).step == 0


def test_choose_step_never_takes_nan_beside_a_number() -> None:
    broken = [StepScores(200, NAN, 0.3, 0.1), StepScores(300, 0.9, NAN, 0.1), StepScores(400, 0.9, 0.3, NAN)]
    assert choose_step([BASE, StepScores(100, 0.1, 0.1, 0.9), *broken]).step == 100


def test_choose_step_of_nan_alone_takes_the_last_and_says_so() -> None:
    choice = choose_step([BASE, StepScores(100, NAN, 0.3, 0.1), StepScores(200, NAN, 0.3, 0.1)])
    assert choice.step == 200 and choice.reason == "step 200 is the last one, as no step has all the scores that the rule needs"


def test_choose_step_ignores_diversity() -> None:
    assert choose_step([BASE, StepScores(100, 0.6, 0.3, 0.1, 0.9), StepScores(200, 0.7, 0.3, 0.1, NAN)]).step == 200


def test_choose_step_with_a_base_without_drift_leaves_drift_out() -> None:
    choice = choose_step([StepScores(0, 0.2, 0.3), StepScores(100, 0.6, 0.3), StepScores(200, 0.7, 0.3)])
    assert choice.step == 200 and choice.reason.endswith("within the limits (prompt alignment at least 0.285)")


def test_choose_step_without_a_base_takes_the_most_faithful_and_says_so() -> None:
    choice = choose_step([StepScores(100, 0.8, 0.1, 0.9), StepScores(200, 0.7, 0.3, 0.1)])
    assert choice.step == 100 and choice.reason.endswith("(none, as the base was not scored)")


def test_choose_step_with_negative_base_alignment_does_not_ask_for_more_than_the_base() -> None:
    assert choose_step([StepScores(0, 0, -0.1, 0), StepScores(1, 0.1, -0.1, 0), StepScores(2, 0.9, -0.104, 0)]).step == 2


def test_choose_step_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        choose_step([])


def _random_run(draw: random.Random) -> list[StepScores]:
    def score(nan_share: float) -> float:  # coarse, so that ties happen
        return NAN if draw.random() < nan_share else draw.randint(-2, 10) / 10

    nan_share = draw.choice([0.0, 0.0, 0.3, 0.9])
    return [StepScores(10 * k, score(nan_share), score(nan_share), score(nan_share)) for k in range(draw.randint(2, 9))]


def test_choose_step_online_agrees_with_choosing_at_the_end() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        rows = _random_run(draw)
        best = choose_step(rows).step
        assert choose_step([row for row in rows if row.step <= best]).step == best


def test_choose_step_lets_a_run_keep_one_set_of_weights_as_it_goes() -> None:
    draw = random.Random(2)
    for _ in range(1000):
        rows = _random_run(draw)
        kept = -1
        for end in range(1, len(rows) + 1):
            if choose_step(rows[:end]).step == rows[end - 1].step:
                kept = rows[end - 1].step  # overwrites the weights kept before
        assert choose_step(rows).step == kept


def test_choose_step_does_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(1)
    for _ in range(300):
        rows = _random_run(draw)
        assert choose_step(draw.sample(rows, len(rows))) == choose_step(rows)
