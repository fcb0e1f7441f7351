"""Correlations against scipy, hand computation and simulated coverage."""

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from dreambooth.statistics.correlation import _weighted, correlation
from dreambooth.statistics.intervals import Interval

NAN = math.nan
CLUSTERS = np.repeat(np.arange(8), 6)


def _scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two related scores of 48 images, with ties."""
    draws = np.random.default_rng(seed)
    x = draws.integers(0, 8, 48).astype(float)
    return x, np.round(x + draws.normal(0, 3, 48))


def test_correlation_agrees_with_scipy() -> None:
    x, y = _scores()
    assert correlation(x, y).mean == pytest.approx(spearmanr(x, y).statistic)
    assert correlation(x, y, kind="pearson").mean == pytest.approx(pearsonr(x, y).statistic)


def test_correlation_interval_agrees_with_resampling_clusters_in_a_loop() -> None:
    x, y = _scores()
    draws, members = np.random.default_rng(1), [np.flatnonzero(CLUSTERS == cluster) for cluster in range(8)]
    resampled = []
    for _ in range(3000):
        rows = np.concatenate([members[cluster] for cluster in draws.integers(8, size=8)])
        resampled.append(np.corrcoef(x[rows], y[rows])[0, 1])
    interval = correlation(x, y, CLUSTERS, "pearson", level=0.8, resamples=6000)
    tail = 0.0652  # of the normal distribution below sqrt(8 / 7) x (-1.4149), the 10 % point of Student's t with 7 degrees of freedom
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(resampled, [tail, 1 - tail])), abs=0.02)


@pytest.mark.parametrize(("kind", "known"), [("spearman", spearmanr), ("pearson", pearsonr)])
def test_correlation_of_a_resample_is_that_of_its_rows_written_out(kind: str, known) -> None:
    x, y = _scores()
    times = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=20)[:, CLUSTERS]  # (draws, rows)
    expected = [known(np.repeat(x, row), np.repeat(y, row)).statistic for row in times]  # ranks are those of the resample
    assert _weighted(x, y, times.astype(float), kind) == pytest.approx(np.array(expected))


def test_correlation_by_hand() -> None:
    assert correlation([1, 2, 3, 4], [10, 30, 20, 40]).mean == pytest.approx(0.8)  # 1 - 6 (0 + 1 + 1 + 0) / (4 x 15)


def test_correlation_of_ranks_sees_any_rising_relation_as_one() -> None:
    x = np.arange(1.0, 9.0)
    assert correlation(x, np.exp(x)).mean == pytest.approx(1.0) and correlation(x, np.exp(x), kind="pearson").mean < 0.8


def test_correlation_does_not_depend_on_units() -> None:
    x, y = _scores()
    assert correlation(x * 1e-9 + 5, y * 1e6, CLUSTERS, "pearson")[:3] == pytest.approx(correlation(x, y, CLUSTERS, "pearson")[:3], abs=1e-6)


def test_correlation_over_clusters_covers_where_images_would_not() -> None:
    draws, covered = np.random.default_rng(2), {True: 0, False: 0}
    subjects = np.repeat(np.arange(10), 20)
    for seed in range(200):  # subjects differ in both scores, which have nothing to do with each other: the true correlation is 0
        x, y = (draws.normal(size=10)[subjects] + draws.normal(0, 0.5, 200) for _ in range(2))
        for clustered in covered:
            interval = correlation(x, y, subjects if clustered else None, "pearson", resamples=300, seed=seed)
            covered[clustered] += interval.low <= 0 <= interval.high
    assert 0.87 <= covered[True] / 200 <= 0.98 and covered[False] / 200 <= 0.55


def test_correlation_within_clusters_leaves_out_differences_between_them() -> None:
    offsets = np.repeat([0.0, 10.0, 20.0], 4)
    x, y = offsets + np.tile([1.0, 2.0, 3.0, 4.0], 3), offsets + np.tile([4.0, 3.0, 2.0, 1.0], 3)
    clusters = np.repeat([0, 1, 2], 4)
    assert correlation(x, y, clusters, "pearson").mean > 0.9
    assert correlation(x, y, clusters, "pearson", within=True).mean == pytest.approx(-1.0)


def test_correlation_of_two_subjects_has_no_interval() -> None:
    x, y = _scores()
    interval = correlation(x, y, CLUSTERS < 4, unit="subject")
    assert interval == Interval(pytest.approx(spearmanr(x, y).statistic), None, None, 2, "subject")


def test_correlation_leaves_out_half_measured_rows() -> None:
    x, y = _scores()
    assert correlation([NAN, 5.0, *x], [1.0, NAN, *y], [9, 10, *CLUSTERS]) == correlation(x, y, CLUSTERS)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_correlation_with_what_does_not_vary_is_nan(kind: str) -> None:
    interval = correlation([1.0, 2.0, 3.0, 4.0], [0.1] * 4, kind=kind)
    assert math.isnan(interval.mean) and interval.low is None


def test_correlation_of_nothing_is_nan() -> None:
    assert math.isnan(correlation([], []).mean)


@pytest.mark.parametrize("bad", [{"kind": "kendall"}, {"level": 1.0}, {"clusters": [1]}, {"within": True}])
def test_correlation_of_wrong_arguments_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], **bad)
