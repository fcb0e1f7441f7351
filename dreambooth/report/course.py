"""A study -> the course of its scores over the steps of training, and what the steps after each one brought. On the selection prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from dreambooth.metrics.table import TITLES
from dreambooth.report.data import ScoredRun, Study
from dreambooth.report.tables import ANSWERING, Table, clipped, short, signed
from dreambooth.statistics.intervals import FEWEST_UNITS, Interval, hierarchical_interval


class Point(NamedTuple):
    """One arm at one step of training, on the selection prompts, over its subjects and seeds."""

    arm: str
    step: int
    values: dict[str, Interval]  # by the key of the score
    on_front: bool = False  # no other tuned point is better in fidelity and not worse in alignment, nor the other way round


def course(study: Study) -> list[Point]:
    """Returns the points of every arm's course, in order of steps, with the Pareto front of fidelity and alignment among tuned ones."""
    points = []
    for arm in study.arms:
        rows = _rows(study.of_arm(arm))
        for step, at in rows.groupby("step") if len(rows) else ():
            keys = [key for key in ANSWERING if key in at.columns and at[key].notna().any()]
            points.append(Point(arm, int(step), {key: clipped(hierarchical_interval(at[key], at.subject, at.seed), key) for key in keys}))
    placed = {k: tuple(p.values[key].mean for key in ANSWERING[:2]) for k, p in enumerate(points) if p.step and set(ANSWERING[:2]) <= set(p.values)}
    front = {k for k, own in placed.items() if not any(_dominates(other, own) for other in placed.values())}
    return [point._replace(on_front=k in front) for k, point in enumerate(points)]


def course_table(points: Sequence[Point]) -> Table:
    """Returns the table of the course: what the drawing of it shows."""
    header = ["arm and step", *(TITLES[key].title for key in ANSWERING), "Pareto front"]
    rows = [
        [f"{p.arm}, step {p.step}", *(short(p.values[key]) if key in p.values else "-" for key in ANSWERING), "yes" if p.on_front else ""]
        for p in points
    ]
    note = "On the selection prompts, those that choose the step; the other tables are on prompts that chose nothing."
    return Table("Scores by step of training", note, header, rows)


class StepsAfter(NamedTuple):
    """What the steps after one brought an arm: the scores at its last step minus those at this one."""

    arm: str
    step: int
    last: int
    values: dict[str, Interval]  # differences, by the key of the score


def steps_after(study: Study) -> list[StepsAfter]:
    """Returns what the steps after each tuned one brought, run by run, so that what subjects and seeds differ in falls out.

    The steps of an arm are those that all its runs have scored, and the last is the last of these. Nothing is said of fewer than 3
    subjects, for which there is no interval, nor of an arm with one such step.
    """
    found = []
    for arm in study.arms:
        runs = [run for run in study.of_arm(arm) if run.course]
        steps = sorted(set.intersection(*({int(row["step"]) for row in run.course if row["step"]} for run in runs))) if runs else []
        rows = _rows(runs)
        if len(steps) < 2 or rows.subject.nunique() < FEWEST_UNITS:
            continue
        at = {step: rows[rows.step == step].set_index(["subject", "seed"]) for step in steps}
        keys = [key for key in ANSWERING if key in rows.columns and rows[key].notna().any()]
        found += [StepsAfter(arm, step, steps[-1], {key: _gain(at[step][key], at[steps[-1]][key], key) for key in keys}) for step in steps[:-1]]
    return found


def steps_after_table(found: Sequence[StepsAfter]) -> Table:
    """Returns the table of what the steps after each one brought."""
    keys = [key for key in ANSWERING if any(key in one.values for one in found)]
    rows = [[f"{one.arm}, step {one.step} to {one.last}", *(signed(one.values.get(key)) for key in keys)] for one in found]
    note = (
        "The last step minus the one named, each run with itself: the same subject, training seed, prompts and noise. 95% intervals over "
        "subjects and seeds; where 0 is inside, it cannot be told whether the steps between changed anything. On the selection prompts."
    )
    return Table("What the steps after brought", note, ["arm and steps", *(TITLES[key].title for key in keys)], rows)


def _rows(runs: Sequence[ScoredRun]) -> pd.DataFrame:
    return pd.DataFrame([row | {"subject": run.subject, "seed": run.config.seed} for run in runs for row in run.course])


def _gain(before: "pd.Series[float]", after: "pd.Series[float]", key: str) -> Interval:
    gains = (after - before).dropna()
    subjects, seeds = (gains.index.get_level_values(name) for name in ("subject", "seed"))
    return clipped(hierarchical_interval(gains, subjects, seeds), key, is_difference=True)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b
