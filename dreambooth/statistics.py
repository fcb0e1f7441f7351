"""Intervals, paired comparisons, and the declared rule that chooses the best step of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

FEWEST_UNITS = 3  # below it a bootstrap has next to nothing to resample, so no interval is given
DRAWS_AT_ONCE = 1_000_000  # bounds memory to some 16 MB
ROUNDING = 1e-9  # cosine; a score exactly at a limit keeps it


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
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
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
    tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n, unit)


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


@dataclass(slots=True, frozen=True)
class StepScores:
    """The scores of a model after so many steps of training; NaN is a score that was not, or could not be, measured."""

    step: int  # optimiser steps; 0 is the un-tuned base
    identity_fidelity: float
    prompt_alignment: float
    drift: float = math.nan
    diversity: float = math.nan


class Choice(NamedTuple):
    """The chosen step, and why, in a sentence."""

    step: int
    reason: str


class _Limits(NamedTuple):
    """What an admissible step keeps to; NaN where the base gives nothing to compare with, so that it does not bind."""

    alignment: float  # at least
    drift: float  # at most

    def violation(self, row: StepScores) -> float:
        """Returns by how much cosine the row breaks the limits, summed; 0 if it keeps within them."""
        excesses = (self.alignment - row.prompt_alignment, row.drift - self.drift)
        return sum(excess for excess in excesses if excess > ROUNDING)  # false for NaN

    def is_judged(self, row: StepScores) -> bool:
        """Tells whether the row has every score that the rule needs."""
        needs = [row.identity_fidelity]
        needs += [] if math.isnan(self.alignment) else [row.prompt_alignment]
        needs += [] if math.isnan(self.drift) else [row.drift]
        return not any(map(math.isnan, needs))

    def __str__(self) -> str:
        bounds = [] if math.isnan(self.alignment) else [f"prompt alignment at least {self.alignment:.3f}"]
        bounds += [] if math.isnan(self.drift) else [f"drift at most {self.drift:.3f}"]
        return " and ".join(bounds) or "none, as the base was not scored"


def choose_step(rows: Sequence[StepScores], min_alignment_ratio: float = 0.95, max_drift_gain: float = 0.1) -> Choice:
    """Returns the best step by a rule declared beforehand: the most faithful one that has not lost too much.

    The rule: of the steps whose prompt alignment is at least `min_alignment_ratio` times the base's and whose drift is at most
    `max_drift_gain` above the base's, the one with the highest identity fidelity. If no step is admissible, the one that breaks
    the limits least. Ties go to the earlier step. Steps with a NaN where the rule looks are chosen only if all are such: then the last.
    Step 0, the base, is chosen only if it is the only row. A limit whose base score is missing does not bind, and the reason says so.

    Choosing as a run goes is choosing at its end: a row's rank depends on that row and the base alone, so the step chosen in the end
    was also the choice at the moment when it was scored, and no step that was passed over comes back. So a run that keeps the weights
    whenever the newest step is the choice ends with the right ones, provided that the base is scored first.

    Args:
        rows: scores of one run, in any order.
        min_alignment_ratio: share of the base's prompt alignment to keep, in [0, 1].
        max_drift_gain: allowed gain in drift, in cosine, >= 0. Prior preservation moves it by 0.17 in Ruiz et al. 2023, table 3.

    Returns:
        The step and the reason.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold the scores of at least one step, got none")
    rows = sorted(rows, key=lambda row: row.step)
    base = next((row for row in rows if row.step == 0), None)
    tuned = [row for row in rows if row.step != 0]
    if not tuned:
        return Choice(0, "step 0 (the base) is the only one with scores")
    limits = _limits(base, min_alignment_ratio, max_drift_gain)
    judged = [row for row in tuned if limits.is_judged(row)]
    if not judged:
        return Choice(tuned[-1].step, f"step {tuned[-1].step} is the last one, as no step has all the scores that the rule needs")
    admissible = [row for row in judged if limits.violation(row) == 0]
    if admissible:
        best = max(admissible, key=lambda row: row.identity_fidelity)  # the earliest of equals
        words = f"step {best.step} has the highest identity fidelity, {best.identity_fidelity:.3f}"
        return Choice(best.step, f"{words}, of the {len(admissible)} of {len(tuned)} steps within the limits ({limits})")
    best = min(judged, key=limits.violation)  # the earliest of equals
    return Choice(best.step, f"no step is within the limits ({limits}); step {best.step} breaks them least: {_breach_words(best, limits)}")


def _limits(base: StepScores | None, min_alignment_ratio: float, max_drift_gain: float) -> _Limits:
    """Returns the limits that the base sets; for a negative alignment, the ratio counts away from it downwards."""
    if base is None:
        return _Limits(math.nan, math.nan)
    return _Limits(base.prompt_alignment - (1 - min_alignment_ratio) * abs(base.prompt_alignment), base.drift + max_drift_gain)


def _breach_words(row: StepScores, limits: _Limits) -> str:
    """Returns which limits a row breaks, and by how much."""
    short, excess = limits.alignment - row.prompt_alignment, row.drift - limits.drift
    words = [f"prompt alignment {row.prompt_alignment:.3f} is {short:.3f} too low"] if short > ROUNDING else []
    words += [f"drift {row.drift:.3f} is {excess:.3f} too high"] if excess > ROUNDING else []
    return " and ".join(words)
