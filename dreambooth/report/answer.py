"""The answer of a report in sentences: one for all arms, one for each, and what must be known beside them."""

from collections.abc import Sequence

from dreambooth.metrics.table import METRICS, TITLES, MetricInfo
from dreambooth.report.course import StepsAfter
from dreambooth.report.data import Study
from dreambooth.report.record import unmet_limits
from dreambooth.report.tables import ANSWERING, SHOWN_P, STEP_WORDS, can_test, is_told, signed, tested, verdict
from dreambooth.statistics.comparison import ArmRow, Comparison
from dreambooth.statistics.intervals import FEWEST_UNITS, fewest_words

MOST_NAMED = 3  # arms that a caution counts one by one
OF_DRAWING = "A way of drawing changes the un-tuned base's pictures too: what was learned is the difference to the base that was drawn the same way."


def answer(study: Study, comparisons: dict[str, Comparison]) -> list[str]:
    """Returns the answer: a sentence for each arm, with the paired difference of each leading score, its interval, and what it cannot tell.

    With more than two arms a sentence about all of them comes first, which says what they are held against and what the intervals are
    over, so that theirs do not; see `is_led`.
    """
    known = _known(comparisons)
    if not known:
        return ["Nothing can be said: none of the leading scores was measured in the baseline."]
    arms = _others(known, comparisons)
    over = {arm: _over(known, comparisons, arm) for arm in arms}
    lead, against = [], f" against {comparisons[known[0].key].baseline}" + (f" at the {STEP_WORDS['best']}" if study.has_arms else "")
    if is_led(study, comparisons):
        lead, against = [_lead(against, known, comparisons, arms)], ""
        if over[arms[0]] and len(set(over.values())) == 1:  # said once
            lead = [f"{lead[0]} The differences to it, with {over[arms[0]]}:"]
            over = dict.fromkeys(arms, "")
    sentences = []
    for arm in arms:
        told, untold = [], []
        for info in known:
            row = _row(comparisons[info.key], arm)
            if row is not None:
                words = f"{_lower(info.title)} {_in_words(row, info, study.has_arms, tested(comparisons[info.key]))}"
                (told if is_told(row.difference) else untold).append(words)
        parts = ["; ".join(told)] if told else []
        parts += [f"it cannot be told whether anything changed in {'; '.join(untold)}"] if untold else []
        sentences.append(f"{arm}{against}: {'; and '.join(parts)}{f' ({over[arm]})' if over[arm] else ''}.")
    return [*lead, *sentences] or ["There is nothing to compare yet: no arm but the baseline has scores."]


def how_many_steps(study: Study, found: Sequence[StepsAfter]) -> str | None:
    """Returns from which step on no more change can be told in the baseline, and what may still have changed; None where that is not known.

    Args:
        study: the runs.
        found: of `steps_after`.
    """
    own = [one for one in found if one.arm == study.baseline]
    if not own:
        return None
    still, held = [], []
    for key in own[0].values:
        name, told = _lower(TITLES[key].title), [one for one in own if is_told(one.values[key])]
        if told and told[-1] is own[-1]:
            still.append(f"{name} still changes after step {own[-1].step}: {signed(own[-1].values[key])}")
        else:
            first = own[own.index(told[-1]) + 1] if told else own[0]
            held.append(f"{name} from step {first.step} on: {signed(first.values[key])}")
    parts = [*still, *([f"no change up to step {own[0].last} can be told in {'; in '.join(held)}"] if held else [])]
    return f"Steps: with {study.baseline}, on the selection prompts, {'; '.join(parts)}."


def is_led(study: Study, comparisons: dict[str, Comparison]) -> bool:
    """Tells whether the first sentence of the answer speaks of all arms: where more than one is held against the baseline."""
    return study.has_arms and len(_others(_known(comparisons), comparisons)) > 1


def cautions(study: Study, comparisons: dict[str, Comparison]) -> list[str]:
    """Returns what the answer does not say by itself: too few subjects, a test that cannot decide, steps outside the limits, what drawing does."""
    found = [caution(study), _undecided(comparisons), _outside(study), OF_DRAWING if study.is_drawn_again else None]
    return [words for words in found if words is not None]


def caution(study: Study) -> str | None:
    """Returns what the intervals do not speak of: other subjects, where there are fewer than 3; None where there are enough."""
    count = len(study.subjects)
    if count >= FEWEST_UNITS:
        return None
    words = f"Too few subjects ({count}) to say anything of others: {FEWEST_UNITS} are the fewest, 5 or more are advisable."
    return f"{words} The intervals are over prompts (images, for the class), of {'this subject' if count == 1 else 'these two'} alone."


def _undecided(comparisons: dict[str, Comparison]) -> str | None:
    """Returns that the test cannot decide with so few units, said of the first leading score of which that holds; None where it can."""
    for info in _known(comparisons):
        arms = tested(comparisons[info.key])
        row = next((row for row in comparisons[info.key].rows if row.test and is_told(row.difference) and not can_test(row, arms)), None)
        if row is not None:
            times = f", times {arms} for as many arms" if arms > 1 else ""
            return (
                f"The test cannot decide here ({fewest_words(row.test)}{times}, and {SHOWN_P:g} is the limit): "
                "what is said to differ rests on 95% intervals alone."
            )
    return None


def _outside(study: Study) -> str | None:
    """Returns in how many runs no step was within the limits of the choice; None where each run had one, or does not say."""
    counts = unmet_limits(study)
    unmet, runs = sum(count for count, _ in counts.values()), sum(runs for _, runs in counts.values())
    if not unmet:
        return None
    by_arm = [f"{count} of {total} of {arm}" for arm, (count, total) in counts.items()] if 1 < len(counts) <= MOST_NAMED else []
    where = f" ({', '.join(by_arm)})" if by_arm else " (arm by arm: see Reproducibility)" if len(counts) > 1 else ""
    words = "no step was within the limits of the choice, and the one with the highest identity fidelity less its breach was taken."
    return f"In {unmet} of {runs} runs{where} {words} The limits are relative to each run's own un-tuned base."


def _lead(against: str, known: Sequence[MetricInfo], comparisons: dict[str, Comparison], arms: Sequence[str]) -> str:
    """Returns a sentence about all arms: which are better than the baseline in something and worse in nothing that can be told."""
    better, worse = {arm: [] for arm in arms}, {arm: [] for arm in arms}
    for info in known:
        for row in comparisons[info.key].rows[1:]:
            if is_told(row.difference):
                (better if (row.difference.mean > 0) == (info.direction == "up") else worse)[row.arm].append(_lower(info.title))
    best = [f"{arm} ({', '.join(better[arm])})" for arm in arms if better[arm] and not worse[arm]]
    counts = {
        "better in some and worse in others": sum(bool(better[arm] and worse[arm]) for arm in arms),
        "only worse": sum(bool(worse[arm] and not better[arm]) for arm in arms),
        "not to be told from it": sum(not better[arm] and not worse[arm] for arm in arms),
    }
    rest = ", ".join(f"{count} {'is' if count == 1 else 'are'} {words}" for words, count in counts.items() if count)
    held = f"Of {len(arms)} arms held{against} in {len(known)} leading score{'' if len(known) == 1 else 's'}"
    if counts["not to be told from it"] == len(arms):
        return f"{held}, none can be told from it."
    if not best:
        return f"{held}, none is better in any without being worse in another: {rest}."
    ranks = " These are not held against each other." if len(best) > 1 else ""
    named = f"{len(best)} {'is' if len(best) == 1 else 'are'} better in some and worse in none that can be told: {'; '.join(best)}"
    return f"{held}, {named}{f'. Of the others {rest}' if rest else ''}.{ranks}"


def _known(comparisons: dict[str, Comparison]) -> list[MetricInfo]:
    return [info for info in METRICS if info.key in ANSWERING and info.key in comparisons]


def _others(known: Sequence[MetricInfo], comparisons: dict[str, Comparison]) -> list[str]:
    return list(dict.fromkeys(row.arm for info in known for row in comparisons[info.key].rows[1:]))


def _row(comparison: Comparison, arm: str) -> ArmRow | None:
    return next((row for row in comparison.rows if row.arm == arm), None)


def _in_words(row: ArmRow, info: MetricInfo, is_arm: bool, arms: int) -> str:
    d = row.difference
    if d.low is None:
        return f"{d.mean:+.3f} (no interval, {d.n} {d.unit}{'' if d.n == 1 else 's'})"
    words = f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
    return f"{words}, {verdict(row, info, is_arm, arms)}" if is_told(d) else words


def _over(known: Sequence[MetricInfo], comparisons: dict[str, Comparison], arm: str) -> str:
    """Returns what an arm's intervals are over: "95% intervals over 4 prompts and 12 images"; "" if there are none."""
    rows = [row for info in known for row in comparisons[info.key].rows if row.arm == arm and row.difference and row.difference.low is not None]
    units = dict.fromkeys(f"{row.difference.n} {row.difference.unit}s" for row in rows)
    return f"95% intervals over {' and '.join(units)}" if units else ""


def _lower(title: str) -> str:
    return title if title[:2].isupper() else title[0].lower() + title[1:]
