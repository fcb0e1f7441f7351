"""Arms of an experiment against a baseline: means, paired differences, tests, and the sentence that says what they rest on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dreambooth.statistics.intervals import (
    FEWEST_UNITS,
    WEAKEST_P,
    Interval,
    PermutationTest,
    describe,
    fewest_words,
    hierarchical_interval,
    holm,
    sign_flip_test,
)


class ArmRow(NamedTuple):
    """One arm in a table of arms."""

    arm: str
    mean: Interval  # of the score, macro over subjects
    difference: Interval | None  # arm minus baseline, paired; None for the baseline itself
    test: PermutationTest | None  # that the difference is 0
    holm_p: float  # the test's p, corrected for the number of arms; NaN for the baseline
    subjects: int
    seeds: tuple[int, int]  # fewest and most training seeds of a subject; 0 for an arm without any (the un-tuned base)
    unpaired: int  # measured images that had no partner in the baseline


class Comparison(NamedTuple):
    """A table of arms for one score, and what belongs right under its header."""

    score: str
    baseline: str
    sentence: str
    rows: list[ArmRow]


def compare_arms(
    frame: pd.DataFrame,
    score: str,
    baseline: str,
    arm: str = "arm",
    cluster: str = "subject",
    seed: str = "seed",
    pairs: Sequence[str] = ("prompt", "k"),
    level: float = 0.95,
    resamples: int = 2000,
    random_seed: int = 0,
) -> Comparison:
    """Returns each arm's mean and its paired difference to the baseline, with intervals, permutation tests and Holm's correction.

    Means are macro: images of a training run, then runs of a subject, then subjects. Intervals resample subjects and, within them,
    seeds. Tests flip the sign of whole subjects.

    Args:
        frame: one row an image; rows whose score is NaN are left out.
        score: column with the score.
        baseline: the arm that the others are held against.
        arm: column that names the arm.
        cluster: column with the independent units.
        seed: column with the training seed; an arm that has none there at all (the un-tuned base) is paired with every seed.
        pairs: columns that, with subject and seed, name the partner of an image: the same prompt and noise.
        level: wanted coverage, in (0, 1).
        resamples: number of bootstrap draws.
        random_seed: of the draws.

    Returns:
        The rows, the baseline first, then the arms in the order of the frame.

    Raises:
        ValueError: a column or the baseline is missing, or two images of an arm have the same subject, seed and pair.
    """
    keys = [cluster, seed, *pairs]
    missing = [column for column in (score, arm, *keys) if column not in frame.columns]
    if missing:
        raise ValueError(f"frame must have the columns {', '.join(missing)}, got {', '.join(map(str, frame.columns))}")
    frame = frame.loc[frame[score].notna(), [arm, *keys, score]]
    arms = {str(name): rows.drop(columns=arm) for name, rows in frame.groupby(arm, sort=False)}
    if baseline not in arms:
        raise ValueError(f"baseline must be one of {', '.join(arms) or 'no measured arm'}, got {baseline}")
    for name, rows in arms.items():
        if rows.duplicated(keys).any():
            raise ValueError(f"arm {name} must have one image for each {', '.join(keys)}, got {int(rows.duplicated(keys).sum())} twice")
    options = {"level": level, "resamples": resamples, "seed": random_seed, "unit": cluster}
    found = []
    for name in [baseline, *(other for other in arms if other != baseline)]:
        rows = arms[name]
        mean = hierarchical_interval(rows[score], rows[cluster], _labels(rows[seed]), **options)
        difference, test, unpaired = None, None, 0
        if name != baseline:
            both = _paired(rows, arms[baseline], cluster, seed, list(pairs))
            delta = (both[f"{score}_a"] - both[f"{score}_b"]).to_numpy(dtype=float)
            difference = hierarchical_interval(delta, both[cluster], _labels(both["seed_of_pair"]), **options)
            subjects = _subject_means(delta, both[cluster].to_numpy(), _labels(both["seed_of_pair"]))
            test = sign_flip_test(subjects, seed=random_seed, unit=cluster)
            unpaired = len(rows) - len(both.drop_duplicates([cluster, "seed_of_a", *pairs]))
        counts = rows.groupby(cluster)[seed].nunique()
        found.append(ArmRow(name, mean, difference, test, math.nan, len(counts), (int(counts.min()), int(counts.max())), unpaired))
    corrected = holm([row.test.p if row.test else math.nan for row in found])
    found = [row._replace(holm_p=float(p)) for row, p in zip(found, corrected, strict=True)]
    return Comparison(score, baseline, _sentence(found, level, cluster, pairs), found)


def to_table(comparison: Comparison, digits: int = 3) -> pd.DataFrame:
    """Returns the comparison as text cells, one row an arm; the sentence belongs right under its header (`to_markdown` puts it there)."""
    rows = []
    for row in comparison.rows:
        difference = "baseline" if row.difference is None else describe(row.difference, digits)
        p, holm_p = (_p(row.test.p), _p(row.holm_p)) if row.test else ("", "")
        low, high = row.seeds
        seeds = str(low) if low == high else f"{low} to {high}"
        rows.append((row.arm, describe(row.mean, digits), difference, p, holm_p, row.subjects, seeds))
    unit = comparison.rows[0].mean.unit
    return pd.DataFrame(rows, columns=["arm", comparison.score, f"minus {comparison.baseline}", "p", "p (Holm)", f"{unit}s", "seeds"])


def to_markdown(comparison: Comparison, digits: int = 3) -> str:
    """Returns the comparison in Markdown: the header, the sentence that says what the numbers rest on, then the table."""
    table = to_table(comparison, digits)
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(map(str, row)) for row in table.itertuples(index=False)]
    header = f"**{comparison.score.replace('_', ' ')}, against {comparison.baseline}**"
    return "\n".join([header, "", comparison.sentence, "", *(f"| {line} |" for line in lines)])


def _paired(a: pd.DataFrame, b: pd.DataFrame, cluster: str, seed: str, pairs: list[str]) -> pd.DataFrame:
    """Returns the pairs of two arms' images; an arm without any training seed is paired with every seed of the other."""
    seeded = a[seed].notna().any() and b[seed].notna().any()
    a, b = a.assign(seed_of_a=a[seed], seed_of_pair=a[seed]), b.assign(seed_of_b=b[seed])
    if seeded:
        return a.merge(b.drop(columns="seed_of_b"), on=[cluster, seed, *pairs], suffixes=("_a", "_b"))
    both = a.drop(columns=seed).merge(b.drop(columns=seed), on=[cluster, *pairs], suffixes=("_a", "_b"))
    return both.assign(seed_of_pair=both.seed_of_a.where(both.seed_of_a.notna(), both.seed_of_b))


def _labels(seeds: pd.Series) -> np.ndarray:
    """Returns the seeds as text, with one and the same label for those that are missing."""
    return np.array(["none" if pd.isna(value) else str(value) for value in seeds], dtype=str)


def _subject_means(values: np.ndarray, subjects: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Returns the macro mean of each subject, (subjects,): of its training runs, each of which is the mean of its images."""
    runs = pd.Series(values).groupby([subjects, seeds]).mean()
    return runs.groupby(level=0).mean().to_numpy()


def _sentence(rows: list[ArmRow], level: float, unit: str, pairs: Sequence[str]) -> str:
    """Returns what the intervals, the differences and the p values rest on, and what they therefore cannot show."""
    others = rows[1:]
    units = _range([row.difference.n for row in others] or [rows[0].subjects])
    seeds = _range([count for row in rows for count in row.seeds if count])
    basis = f"{_count(units, unit)} x {_count(seeds, 'training seed')}" if seeds else _count(units, unit)
    if max(units) < FEWEST_UNITS:
        words = [f"no intervals: {basis}, and {FEWEST_UNITS} {unit}s are the fewest that can be resampled"]
    else:
        words = [f"{level:.0%} intervals over {basis}" + (f" ({unit}s resampled, and seeds within them)" if seeds and max(seeds) > 1 else "")]
    if seeds and max(seeds) == 1:
        words.append("one training seed: what another would change is not in them")
    if others:
        test = min((row.test for row in others), key=lambda test: test.n)
        way = "all patterns of signs" if test.exact else "drawn patterns of signs"
        words.append(f"differences pair images of the same {' and '.join(pairs)}; p is two-sided, from {way} of {unit} means")
        words += [fewest_words(test)] if test.smallest_p > WEAKEST_P else []
        words += [f"Holm's correction over {len(others)} arms"] if len(others) > 1 else []
    if len({row.subjects for row in rows}) > 1:
        words.append(f"the arms do not have the same number of {unit}s, so compare the differences, not the means")
    if any(row.unpaired for row in others):
        words.append(f"{sum(row.unpaired for row in others)} images without a partner are not in the differences")
    text = "; ".join(words)
    return text[0].upper() + text[1:] + "."


def _range(counts: Sequence[int]) -> tuple[int, int] | None:
    return (min(counts), max(counts)) if counts else None


def _count(bounds: tuple[int, int], word: str) -> str:
    low, high = bounds
    return f"{low if low == high else f'{low} to {high}'} {word}{'' if high == 1 else 's'}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}" if value >= 0.001 else "<0.001"
