"""A study -> the comparison of its arms and its tables, as text cells that a page and a Markdown file show alike."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from dreambooth.combined_scores import BASE, REFERENCE_WORDS
from dreambooth.metrics.table import METRICS, PAIRWISE, MetricInfo
from dreambooth.report.data import Study, score_alike
from dreambooth.scoring import pair_mean_pseudovalues
from dreambooth.statistics.comparison import ArmRow, Comparison, compare_arms
from dreambooth.statistics.intervals import FEWEST_UNITS, Interval, bootstrap_interval, describe, hierarchical_interval

SHOWN_P = 0.05  # what the answer calls a difference that the test bears out
ANSWERING = ("identity_fidelity", "prompt_alignment", "drift", "class_diversity")  # what was learned, and the paper's PRES and DIV
BY_INTERVAL = "by the interval alone"
BY_INTERVAL_WORDS = (
    f'"{BY_INTERVAL.capitalize()}": the interval leaves out 0, but the test, corrected for the number of arms, stays above {SHOWN_P:g}.'
)
RANGES = {  # of bounded scores; a resampled mean may be set out over their ends, where no score can lie
    **dict.fromkeys(("identity_fidelity", "identity_fidelity_dinov2", "image_fidelity", "masked_identity"), (-1.0, 1.0)),
    **dict.fromkeys(("prompt_alignment", "prompt_alignment_with_identifier", "drift"), (-1.0, 1.0)),
    **dict.fromkeys(("diversity", "class_diversity", "other_class_drift"), (0.0, 2.0)),  # 1 - cosine
    **dict.fromkeys(("true_identity", "true_context", "other_class_color_drift"), (0.0, 1.0)),
    **dict.fromkeys(("sharpness", "lpips_diversity"), (0.0, math.inf)),
}
OWN_YARDSTICK = "not comparable: each arm's own photos are the yardstick"
STEP_WORDS = {"best": "chosen step", "final": "last step"}


class Table(NamedTuple):
    """A table of text cells: the first column names the row."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def compare(study: Study, step: str = "best") -> dict[str, Comparison]:
    """Returns each measured score of the arms against the baseline, paired; with fewer than 3 subjects, over the prompts of those there are.

    Args:
        study: the runs.
        step: "best" or "final"; a study of one arm holds both against the un-tuned base.
    """
    rows, baseline = study.compared(step)
    found = {info.key: _compare_one(rows, info, baseline) for info in METRICS}
    return {key: _within_range(comparison) for key, comparison in found.items() if comparison is not None}


def clipped(interval: Interval, key: str, is_difference: bool = False) -> Interval:
    """Returns an interval cut off at the ends of its score's range; of a difference, at those that two scores of that range can have.

    Args:
        interval: of the score, or of a difference of two.
        key: of the score; one without a known range is left as it is.
        is_difference: it is of a difference.
    """
    low, high = RANGES.get(key, (-math.inf, math.inf))
    low, high = (low - high, high - low) if is_difference else (low, high)
    return interval if interval.low is None else interval._replace(low=max(interval.low, low), high=min(interval.high, high))


def _within_range(comparison: Comparison) -> Comparison:
    key = comparison.score
    rows = [
        row._replace(mean=clipped(row.mean, key), difference=row.difference and clipped(row.difference, key, is_difference=True))
        for row in comparison.rows
    ]
    return comparison._replace(rows=rows)


def own_yardsticks(study: Study) -> list[str]:
    """Returns the keys of the scores in which arms differ from the baseline for the very same pictures of the un-tuned base.

    Some scores are measured from the photos that a run was trained on, and arms may have different ones. Pictures are the same where all of
    an arm have the same scores of those that need no photo.
    """
    base, found = study.images[study.images.arm == "base"], set()
    for arm in study.arms[1:]:
        pair = base[base.label.isin([study.baseline, arm])]
        if any(run.suffix for run in study.of_arm(arm)) or not score_alike(pair, ["alignment", "diversity"]):
            continue
        for info in METRICS:
            rows = pair[pair.kind == info.kind]
            if info.column in rows.columns and not score_alike(rows, [info.column]):
                found.add(info.key)
    return [info.key for info in METRICS if info.key in found]


def is_told(difference: Interval | None) -> bool:
    """Tells whether a difference has an interval that leaves out 0."""
    return difference is not None and difference.low is not None and not difference.low <= 0 <= difference.high


def tested(comparison: Comparison) -> int:
    """Returns how many arms are tested against the baseline, for which p is corrected."""
    return sum(row.test is not None and not math.isnan(row.test.p) for row in comparison.rows)


def can_test(row: ArmRow, arms: int) -> bool:
    """Tells whether the test of a row, corrected for so many arms, could bear out any difference with as many units."""
    return row.test is not None and row.test.smallest_p * arms <= SHOWN_P


def verdict(row: ArmRow, info: MetricInfo, is_arm: bool, arms: int = 1) -> str:
    """Returns what a difference to the baseline says, in words: better, worse, or that it cannot be told.

    Args:
        row: with its difference.
        info: of the score.
        is_arm: the baseline is an arm, not the un-tuned base.
        arms: that are tested with it. Where the test cannot bear out anything, no verdict says that it did not; the report says so once.
    """
    d = row.difference
    if d is None:
        return "baseline"
    if d.low is None:
        return f"cannot be told: {d.n} {d.unit}{'' if d.n == 1 else 's'}"
    if not is_told(d):
        return "cannot be told"
    is_better = (d.mean > 0) == (info.direction == "up")
    words = info.better if is_better else info.worse
    if is_arm:
        words = (info.ahead if is_better else info.behind) or words
    words = words or ("better" if is_better else "worse")
    return f"{words}, {BY_INTERVAL}" if row.holm_p > SHOWN_P and can_test(row, arms) else words


def score_tables(study: Study, best: dict[str, Comparison], last: dict[str, Comparison]) -> list[Table]:
    """Returns the tables of scores: means with reference rows, paired differences, kinds of prompt, subjects."""
    own = own_yardsticks(study)
    tables = [_means(study, best, last, own), _differences("Differences", best, own)]
    if study.has_arms:
        tables.append(_differences("Differences at the last step", last, own))
    kinds = _by_kind(study)
    return [*tables, *([kinds] if kinds else []), _by_subject(study, best)]


def _compare_one(rows: pd.DataFrame, info: MetricInfo, baseline: str) -> Comparison | None:
    rows = rows[rows.kind == info.kind]
    if info.column not in rows.columns or not rows.loc[rows.label == baseline, info.column].notna().any():
        return None
    rows = rows[["label", "subject", "seed", "template", "k", info.column]].dropna(subset=info.column)
    rows = rows.rename(columns={info.column: info.key, "template": "prompt", "k": "noise"})
    if rows.subject.nunique() >= FEWEST_UNITS:
        return compare_arms(rows, info.key, baseline, arm="label", pairs=("prompt", "noise"))
    if info.kind != "class":
        return compare_arms(rows, info.key, baseline, arm="label", cluster="prompt", pairs=("subject", "noise"))
    if info.column in PAIRWISE:
        by_run = rows.groupby(["label", "subject", "seed", "prompt"], dropna=False)[info.key]
        rows = rows.assign(**{info.key: by_run.transform(lambda values: pair_mean_pseudovalues(values.to_numpy(float)))})
    return compare_arms(rows.rename(columns={"noise": "image"}), info.key, baseline, arm="label", cluster="image", pairs=("subject", "prompt"))


def _means(study: Study, best: dict[str, Comparison], last: dict[str, Comparison], own: Sequence[str]) -> Table:
    """Returns the mean of every headline score of the arms, with reference rows above."""
    shown = [info for info in METRICS if info.is_headline and info.key in best]
    rows = [[REFERENCE_WORDS.get(name, name), *(_reference(study, name, info) for info in shown)] for name in study.runs[0].scores["references"]]
    if study.has_arms:
        for label, images in study.base.groupby("label", sort=False):
            rows.append([label, *(_base_mean(images, info) for info in shown)])
    for step, comparisons in (("best", best), ("final", last)) if study.has_arms else (("", best),):
        for arm in dict.fromkeys(row.arm for found in comparisons.values() for row in found.rows):
            cells = [next((short(row.mean) for row in comparisons[info.key].rows if row.arm == arm), "-") for info in shown]
            rows.append([f"{arm}, {STEP_WORDS[step]}" if step else arm, *cells])
    note = f"Means over images, then runs, then subjects, on prompts that chose nothing. {best[shown[0].key].sentence}" if shown else ""
    note += _yardsticks(study, [info for info in shown if info.key in own])
    header = ["", *(f"{info.title} ({'higher' if info.direction == 'up' else 'lower'} is better)" for info in shown)]
    return Table("Scores", note, header, rows)


def _yardsticks(study: Study, shown: Sequence[MetricInfo]) -> str:
    """Returns what arms with photos of their own make of the same pictures, as a sentence; "" where there is no such score."""
    if not shown:
        return ""
    base = study.images[study.images.arm == "base"]
    parts = [
        f"{info.title} {', '.join(f'{_macro(base[(base.label == arm) & (base.kind == info.kind)], info).split()[0]} ({arm})' for arm in study.arms)}"
        for info in shown
    ]
    return (
        f" Measured from each arm's own training photos, which differ: of the same pictures of the un-tuned base they make "
        f"{'; '.join(parts)}. In {'this score' if len(parts) == 1 else 'these scores'} arms cannot be compared."
    )


def _differences(title: str, comparisons: dict[str, Comparison], own: Sequence[str]) -> Table:
    """Returns the paired difference of each arm to the baseline for every headline score, with its test and what it says."""
    rows, sentence, baseline = [], "", ""
    for info in METRICS:
        if not info.is_headline or info.key not in comparisons:
            continue
        comparison = comparisons[info.key]
        sentence, baseline = sentence or comparison.sentence, comparison.baseline
        for row in comparison.rows[1:]:
            p = [_p(row.test.p), _p(row.holm_p)] if row.test else ["", ""]
            words = OWN_YARDSTICK if info.key in own else verdict(row, info, baseline != BASE, tested(comparison))
            rows.append([info.title, row.arm, signed(row.difference), *p, words])
    note = f"{sentence} {BY_INTERVAL_WORDS}" if any(BY_INTERVAL in cell for row in rows for cell in row) else sentence
    return Table(f"{title}, each minus {baseline}", note, ["score", "arm", "difference", "p", "p (Holm)", "in words"], rows)


def _by_kind(study: Study) -> Table | None:
    """Returns the subject's scores by what the prompts ask for; None where all ask for the same."""
    rows, _ = study.compared()
    rows = rows[rows.kind == "subject"]
    if rows.prompt_kind.nunique() < 2:
        return None
    shown = [i for i in METRICS if i.kind == "subject" and i.is_headline and i.column in rows.columns and rows[i.column].notna().any()]
    cells = [
        [f"{label}, {kind} ({len(part)} images)", *(_macro(part, info) for info in shown)]
        for (label, kind), part in rows.groupby(["label", "prompt_kind"], sort=False)
    ]
    note = "A property or an accessory changes the subject by design, so identity fidelity is lower there."
    return Table("By kind of prompt", note, ["", *(info.title for info in shown)], cells)


def _by_subject(study: Study, comparisons: dict[str, Comparison]) -> Table:
    rows, _ = study.compared()
    shown = [info for info in METRICS if info.is_headline and info.key in comparisons]
    cells = []
    for (subject, label), part in rows.groupby(["subject", "label"], sort=False):
        means = [part[part.kind == info.kind].groupby("seed", dropna=False)[info.column].mean().mean() for info in shown]
        cells.append([f"{subject}, {label}", *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in means)])
    return Table("Each subject", "Means over its images, then its training seeds.", ["", *(info.title for info in shown)], cells)


def _reference(study: Study, name: str, info: MetricInfo) -> str:
    values = [run.scores["references"].get(name, {}).get(info.key) for run in study.runs]
    interval = bootstrap_interval([math.nan if v is None else v for v in values], [run.subject for run in study.runs], unit="subject")
    return "-" if math.isnan(interval.mean) else short(clipped(interval, info.key))


def _base_mean(images: pd.DataFrame, info: MetricInfo) -> str:
    rows = images[images.kind == info.kind]
    return _macro(rows, info) if info.column in rows.columns else "-"


def _macro(rows: pd.DataFrame, info: MetricInfo) -> str:
    if not rows[info.column].notna().any():
        return "-"
    return short(clipped(hierarchical_interval(rows[info.column], rows.subject, rows.seed.fillna(-1)), info.key))


def short(interval: Interval) -> str:
    """Returns a mean, with its interval where there is one; never "-0.000"."""
    text = describe(interval, 3) if interval.low is not None else f"{interval.mean:.3f}"
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", text)


def signed(d: Interval | None) -> str:
    """Returns a difference with its sign and interval; "" for none."""
    if d is None:
        return ""
    return f"{d.mean:+.3f}" + (f" ({d.low:+.3f} to {d.high:+.3f})" if d.low is not None else f" (no interval: {d.n} {d.unit}s)")


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}" if value >= 0.001 else "<0.001"
