"""Intervals, paired differences and tests that respect clusters (subjects) and the levels below them (training seeds)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

FEWEST_UNITS = 3  # below it a bootstrap has next to nothing to resample, so no interval is given
DRAWS_AT_ONCE = 1_000_000  # bounds memory to some 16 MB
EXACT_UP_TO = 14  # units whose 2^14 sign patterns are all tried; above it they are drawn
WEAKEST_P = 0.05  # a test whose smallest possible p is above this cannot show anything at the usual level, and says so


class Interval(NamedTuple):
    """A mean and how far it can be trusted."""

    mean: float  # NaN if nothing was measured
    low: float | None  # None if there are too few units for an interval
    high: float | None
    n: int  # number of independent units
    unit: str  # what a unit is: "value", "cluster", or the caller's word ("subject")


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    unit: str | None = None,
) -> Interval:
    """Returns the mean of the values with a bootstrap interval that respects clusters.

    The mean is macro: of the clusters' means, each with equal weight, and whole clusters are resampled, because images of one subject
    are not independent. The interval is the *expanded percentile* interval (not BCa): quantiles of the resampled means, set further
    out so that few units do not give a narrow interval. On normal data its 95 % covers 92 % at 5 units and 95 % at 10 (the plain
    percentile's 84 % and 90 %); at 3 units it is the range of the units, which covers 75 %, the most that resampling can.

    Args:
        values: (n,) scores; NaN means not measured and is left out.
        clusters: (n,) labels of the independent units (subjects), of any type; None if each value is one.
        level: wanted coverage, in (0, 1).
        resamples: number of bootstrap draws.
        seed: of the draws; equal seeds give equal intervals.
        unit: the word for a unit in a report; by default "value", or "cluster" if there are clusters.

    Returns:
        The interval; its low and high are None if there are fewer than 3 units.

    Raises:
        ValueError: the shapes or the level cannot be used.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (the expanded percentile interval).
    """
    _check_level(level)
    unit = unit or ("value" if clusters is None else "cluster")
    units = _unit_means(values, clusters)
    n = len(units)
    mean = float(units.mean()) if n else math.nan
    if n < FEWEST_UNITS:
        return Interval(mean, None, None, n, unit)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, step):
        draws = rng.integers(n, size=(min(step, resamples - start), n))
        means[start : start + len(draws)] = units[draws].mean(axis=1)  # (draws, n) -> (draws,)
    return Interval(mean, *expanded_percentiles(means, n, level), n, unit)


def hierarchical_interval(
    values: ArrayLike,
    subjects: ArrayLike,
    seeds: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    unit: str = "subject",
) -> Interval:
    """Returns the mean of the values with a bootstrap interval over subjects and, within each, its training seeds.

    The mean is macro on both levels: values are averaged within a training run (a subject and a seed), runs within a subject, then
    subjects. Subjects are resampled, and within each drawn one its seeds. Subject means already differ by what seeds make of them, so
    drawing seeds on top would count that twice (Davison & Hinkley 1997, sec. 3.8: the variance is up to (2 - 1/seeds) times too large);
    the subjects are therefore first drawn in towards the grand mean by just what the seeds add. So the interval is as wide as that of
    the subject means, and never narrower than the spread of the seeds allows, even if few subjects agree by chance.

    Args:
        values: (n,) scores; NaN means not measured and is left out.
        subjects: (n,) labels of the independent units.
        seeds: (n,) labels of the training seeds; the same label in two subjects is two runs.
        level: wanted coverage, in (0, 1).
        resamples: number of bootstrap draws.
        seed: of the draws.
        unit: the word for a subject in a report.

    Returns:
        The interval; n counts subjects, never runs. Low and high are None if there are fewer than 3 subjects.

    Raises:
        ValueError: the shapes or the level cannot be used.
    """
    _check_level(level)
    runs, counts = _run_means(values, subjects, seeds)  # (subjects, most seeds) padded with 0, (subjects,)
    n, most = runs.shape
    units = runs.sum(axis=1) / counts  # (subjects,)
    mean = float(units.mean()) if n else math.nan
    if n < FEWEST_UNITS:
        return Interval(mean, None, None, n, unit)
    has_run = np.arange(most) < counts[:, None]
    of_seeds = float((((runs - units[:, None]) ** 2 * has_run).sum(axis=1) / counts**2).mean())  # variance that drawing seeds adds to a subject mean
    of_units = float(units.var())
    shrink = math.sqrt(max(0.0, 1 - of_seeds / of_units)) if of_units > 0 else 0.0
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, DRAWS_AT_ONCE // (n * most))
    for start in range(0, resamples, step):
        who = rng.integers(n, size=(min(step, resamples - start), n))  # (draws, subjects)
        which = (rng.random((*who.shape, most)) * counts[who][..., None]).astype(int)  # (draws, subjects, seeds)
        drawn = (runs[who[..., None], which] * has_run[who]).sum(axis=-1) / counts[who]  # (draws, subjects)
        means[start : start + len(who)] = mean + (shrink * (units[who] - mean) + drawn - units[who]).mean(axis=1)
    return Interval(mean, *expanded_percentiles(means, n, level), n, unit)


def expanded_percentiles(draws: NDArray[np.float64], n: int, level: float) -> tuple[float, float]:
    """Returns the bounds of an interval from bootstrap draws of n >= 2 units: quantiles set further out, so that few units do not narrow it.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap".
    """
    tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    unit: str | None = None,
) -> Interval:
    """Returns the mean of a - b with a bootstrap interval, for two arms that were scored on the same subjects, prompts and noise.

    Pairing takes out what the arms share (a dog is easier than a backpack), so the interval is far narrower than that of either arm.

    Args:
        a: (n,) scores of one arm.
        b: (n,) scores of the other, b[i] made like a[i] but for the arm; a pair with a NaN is left out.
        clusters: (n,) labels of the independent units, or None.
        level: wanted coverage, in (0, 1).
        resamples: number of bootstrap draws.
        seed: of the draws.
        unit: the word for a unit in a report; by default "pair", or "cluster" if there are clusters.

    Returns:
        The interval; one that holds 0 shows no difference. Low and high are None if there are fewer than 3 units.

    Raises:
        ValueError: the shapes or the level cannot be used.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"a and b must hold pairs, got shapes {a.shape} and {b.shape}")
    unit = unit or ("pair" if clusters is None else "cluster")
    return bootstrap_interval(a - b, clusters, level, resamples, seed, unit)


class PermutationTest(NamedTuple):
    """The answer of a permutation test."""

    p: float  # in (0, 1], two-sided; NaN if nothing was measured
    smallest_p: float  # that so few units, or draws, could have given
    n: int  # number of independent units
    exact: bool  # every pattern of signs was tried
    unit: str  # what a unit is


def sign_flip_test(
    differences: ArrayLike, clusters: ArrayLike | None = None, resamples: int = 9999, seed: int = 0, unit: str | None = None
) -> PermutationTest:
    """Returns how likely a mean difference at least this far from 0, to either side, would be if the arms did not differ.

    If they do not, each subject's mean difference might as well have had the other sign; all patterns of signs are tried, or, above 14
    subjects, drawn (with the observed one among them, so that p is never 0). Images of one subject change sign together.

    Args:
        differences: (n,) one arm minus the other, pair by pair; NaN is left out.
        clusters: (n,) labels of the independent units (subjects), or None if each value is one.
        resamples: number of drawn patterns, where not all are tried.
        seed: of the draws.
        unit: the word for a unit in a report; by default "pair", or "cluster" if there are clusters.

    Returns:
        The test; with n units p cannot be below 2 / 2^n, which `describe_test` says when it is above 0.05 (n <= 5).

    Raises:
        ValueError: the shapes do not fit.

    Source: Fisher 1935, "The Design of Experiments", sec. 21; Phipson & Smyth 2010 for drawn patterns.
    """
    units = _unit_means(differences, clusters)
    n, unit = len(units), unit or ("pair" if clusters is None else "cluster")
    if n == 0:
        return PermutationTest(math.nan, math.nan, 0, True, unit)
    limit = abs(units.sum()) - 1e-9 * np.abs(units).sum()  # rounding must not part a pattern from its equal
    if n <= EXACT_UP_TO:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (patterns, n)
        return PermutationTest(float((np.abs(signs @ units) >= limit).mean()), 2 / 2**n, n, True, unit)
    rng = np.random.default_rng(seed)
    reached, step = 0, max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, step):
        signs = 1 - 2 * rng.integers(2, size=(min(step, resamples - start), n))
        reached += int((np.abs(signs @ units) >= limit).sum())
    return PermutationTest((reached + 1) / (resamples + 1), max(2 / 2**n, 1 / (resamples + 1)), n, False, unit)


def holm(p_values: Sequence[float] | ArrayLike) -> NDArray[np.float64]:
    """Returns p values corrected for there being several, (n,): below 0.05 they are wrong together in at most 5 % of cases.

    The smallest is multiplied by n, the next by n - 1, and so on; none may end below one that was smaller before, nor above 1.

    Args:
        p_values: (n,) in [0, 1]; NaN stays NaN and is not counted.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    corrected = np.full(p.shape, math.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def describe_test(test: PermutationTest) -> str:
    """Returns a test as text: "p = 0.031", "p < 0.001"; with too few units, "p = 0.12 (5 subjects: p cannot be below 0.06)"."""
    if math.isnan(test.p):
        return "not tested"
    words = f"p = {test.p:.2g}" if test.p >= 0.001 else "p < 0.001"
    return f"{words} ({fewest_words(test)})" if test.smallest_p > WEAKEST_P else words


def fewest_words(test: PermutationTest) -> str:
    """Returns the bound that few units set: "5 subjects: p cannot be below 0.06"."""
    return f"{test.n} {test.unit}{'' if test.n == 1 else 's'}: p cannot be below {math.floor(test.smallest_p * 100) / 100:.2g}"


def describe(interval: Interval, digits: int = 2) -> str:
    """Returns an interval as text: "0.82 (0.79 to 0.85)", or why there is none: "0.82 (no interval: 2 subjects)"."""
    if math.isnan(interval.mean):
        return "not measured"
    mean = f"{interval.mean:.{digits}f}"
    if interval.low is None or interval.high is None:
        return f"{mean} (no interval: {interval.n} {interval.unit}{'' if interval.n == 1 else 's'})"
    return f"{mean} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _unit_means(values: ArrayLike, clusters: ArrayLike | None) -> NDArray[np.float64]:
    """Returns the mean of each independent unit, (units,), in the order of the sorted labels; units without a value are left out."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"values must be a list of numbers, got shape {values.shape}")
    measured = ~np.isnan(values)
    if clusters is None:
        return values[measured]
    clusters = np.asarray(clusters)
    if clusters.shape != values.shape:
        raise ValueError(f"clusters must hold one label for each value, {values.shape}, got shape {clusters.shape}")
    _, index = np.unique(clusters[measured], return_inverse=True)
    return np.bincount(index, values[measured]) / np.bincount(index)


def _run_means(values: ArrayLike, subjects: ArrayLike, seeds: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the mean of each training run, (subjects, most seeds), padded with 0, and each subject's number of runs, (subjects,)."""
    values, subjects, seeds = np.asarray(values, dtype=float), np.asarray(subjects), np.asarray(seeds)
    if values.ndim != 1 or subjects.shape != values.shape or seeds.shape != values.shape:
        raise ValueError(f"values, subjects and seeds must be lists of one length, got shapes {values.shape}, {subjects.shape} and {seeds.shape}")
    measured = ~np.isnan(values)
    _, who = np.unique(subjects[measured], return_inverse=True)
    _, which = np.unique(seeds[measured], return_inverse=True)
    runs, index = np.unique(np.stack([who, which], axis=1).reshape(-1, 2), axis=0, return_inverse=True)  # (runs, 2) sorted by subject
    means = np.bincount(index.reshape(-1), values[measured]) / np.bincount(index.reshape(-1))
    counts = np.bincount(runs[:, 0]) if len(runs) else np.zeros(0, dtype=int)
    padded = np.zeros((len(counts), counts.max(initial=0)))
    padded[np.arange(padded.shape[1]) < counts[:, None]] = means
    return padded, counts


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
