"""What a paper found, beside what the study found: scores of the same arms and their differences, read by their signs.

The figures stand in the header of the experiment's YAML, behind "Figures:", as `score: arm value, arm value; score: ...`; an arm is
named by the value of its setting, as on the command line.
"""

import math
from typing import NamedTuple

from dreambooth.arms import axes
from dreambooth.errors import UserError
from dreambooth.metrics.table import METRICS
from dreambooth.report.data import Study
from dreambooth.report.tables import STEP_WORDS, Table, is_told, short, signed
from dreambooth.statistics.comparison import Comparison
from dreambooth.statistics.intervals import Interval

HEADER_WORD = "Figures"
SAME, OTHER, UNTOLD = "the same way", "the other way", "cannot be told here"


class Published(NamedTuple):
    """One figure of a paper."""

    key: str  # of the score
    arm: str  # value of the setting
    value: float


def read_figures(text: str) -> list[Published]:
    """Returns the figures in a header's text.

    Args:
        text: such as "drift: class_images 0.493, none 0.664; class_diversity: class_images 0.391, none 0.371"; "" has none.

    Raises:
        UserError: another form, or a score that is not known.
    """
    keys, found = {info.key for info in METRICS}, []
    for part in filter(None, map(str.strip, text.split(";"))):
        key, _, arms = part.partition(":")
        for entry in arms.split(","):
            arm, _, value = entry.strip().rpartition(" ")
            if key not in keys or not arm or not _is_number(value):
                raise UserError("Figures", 'must be written like "drift: class_images 0.493, none 0.664"', part, "mend the experiment's header")
            found.append(Published(key, arm, float(value)))
    return found


def beside_the_paper(study: Study, best: dict[str, Comparison], last: dict[str, Comparison]) -> Table | None:
    """Returns the published scores and their differences to the baseline beside the study's own; None where there are none to compare.

    Args:
        study: with its header.
        best: the comparisons at the chosen step.
        last: those at the last step; papers train a fixed number of steps.

    Raises:
        UserError: the header's figures are not written as they must be.
    """
    figures = {(one.key, arm): one.value for one in read_figures(study.header.get(HEADER_WORD, "")) if (arm := _arm_of(study, one.arm)) is not None}
    rows, words = [], []
    for key in dict.fromkeys(key for key, _ in figures):
        others = [arm for of, arm in figures if of == key and arm != study.baseline]
        if not others or (key, study.baseline) not in figures or key not in last:
            continue
        title = next(info.title for info in METRICS if info.key == key)
        for arm in (study.baseline, *others):
            ours = [next((row for row in found[key].rows if row.arm == arm), None) for found in (best, last)]
            values = [f"{figures[key, arm]:.3f}", *(short(row.mean) if row else "-" for row in ours)]
            if arm == study.baseline:
                rows.append([title, arm, *values, "", "", "", "baseline"])
                continue
            theirs, differences = figures[key, arm] - figures[key, study.baseline], [row and row.difference for row in ours]
            words.append(compared_signs(theirs, differences[1]))
            rows.append([title, arm, *values, f"{theirs:+.3f}", *(signed(one) or "-" for one in differences), words[-1]])
    if not rows:
        return None
    where = ["published", f"ours, {STEP_WORDS['best']}", f"ours, {STEP_WORDS['final']}"]
    header = ["score", "arm", *where, *(f"difference {one}" for one in where), f"{STEP_WORDS['final']}, in words"]
    same, other = words.count(SAME), words.count(OTHER)
    counts = f"{same} of {len(words)} differences go the published way, {other} the other way, {len(words) - same - other} cannot be told."
    note = (
        f"{counts} Differences are minus {study.baseline}. Other networks, pictures and scales: signs compare, sizes do not. "
        "Published scores have no intervals."
    )
    return Table("Beside the paper", note, header, rows)


def compared_signs(theirs: float, ours: Interval | None) -> str:
    """Returns in words whether a difference goes the way of a published one; only an interval that leaves out 0 can tell."""
    if not is_told(ours) or theirs == 0:
        return UNTOLD
    return SAME if (ours.mean > 0) == (theirs > 0) else OTHER


def _arm_of(study: Study, value: str) -> str | None:
    """Returns the one arm that has this value of a setting; None for none or several."""
    fitting = [arm for arm in study.arms if value in axes(arm).values()]
    return fitting[0] if len(fitting) == 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
