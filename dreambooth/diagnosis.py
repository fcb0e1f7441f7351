"""The scores of a run as a diagnosis: which of the usual complaints about a tuned model they show, and the knob to turn.

The four complaints: not like the subject; looks like the photos; does not take other contexts or styles; the whole class looks like the
subject. One is raised only if its size matters (a threshold below, with its reason) and its interval supports it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dreambooth.step_choice import StepScores

LEARNED_SHARE = 0.5  # of the way from the base to real photos; below it an image is nearer to any member of the class than to the subject
NOTICEABLE_FIDELITY = 0.1  # cosine; a difference that people clearly notice (Ruiz et al. 2023, sec. 4.2), where there is no mark to go to
COPYING = 0.05  # cosine above real photos' nearest neighbour, which itself rests on a few photos; half of what people notice
CLASS_DIVERSITY_LOSS = 0.4  # share; on the lab good recipes lose up to 0.3, tuning without a prior 0.45 to 0.6
COLOR_DRIFT = 0.3  # total variation; about a third of the colours of another class's picture moved
SHARPNESS_LOSS = 0.2  # share of the base's sharpness; a slight blur costs more than that
STILL_RISING = 0.02  # cosine from one evaluation to the next; under it the curve is flat to the eye
STILL_RISING_SHARE = 0.1  # of all that was gained; a curve that has settled gives less in its last evaluation
EARLY_SHARE = 0.5  # a best step in the first half of the run was long before its end
FEW_PHOTOS = 4  # fidelity rises up to 4 photos (Ruiz et al. 2023, table 5)

NOT_LIKE = "not like the subject"
LIKE_PHOTOS = "looks like the photos"
OTHER_CONTEXTS = "does not take other contexts or styles"
WHOLE_CLASS = "the whole class looks like the subject"
THE_FOUR = (NOT_LIKE, LIKE_PHOTOS, OTHER_CONTEXTS, WHOLE_CLASS)
OTHER_CLASSES = "other classes take on new colours"
BLURRED = "picture quality was lost"
TOO_SHORT = "trained too short"
TOO_LONG = "trained too long"

NAME_PLACES = "data.captions=auto with a photo.txt beside each photo.jpg that names its place"  # so that the place is not learned as the subject

Row = Mapping[str, Any]  # scores by key, with "step", and "<key>_interval" as a dict of low, high, n, unit; keys may be missing or NaN
Differences = Mapping[str, Row]  # "best - base" -> key -> a dict of mean, low, high, n, unit


class Setting(NamedTuple):
    """The facts of a run's config that the advice depends on."""

    max_steps: int
    eval_every: int
    min_alignment_ratio: float  # what the rule for the best step tolerates is no complaint
    max_drift_gain: float
    learning_rate: float
    photos: int
    prior_weight: float | None  # None: no prior
    prior_prompts: int  # different captions of the class images
    captions: bool  # the photos have captions of their own, which name what is in them beside the subject
    trains_text_encoder: bool
    text_encoder_learning_rate: float | None = None


class Finding(NamedTuple):
    """A complaint that the scores show."""

    complaint: str
    evidence: str  # with numbers and, where there is one, the interval
    advice: str  # a config field and a value to try


class Diagnosis(NamedTuple):
    """What the scores show, and what they leave open."""

    findings: list[Finding]
    unjudged: list[str]  # one of the four each, and why: not measured, or an interval too wide to tell

    def lines(self) -> list[str]:
        """Returns the diagnosis as lines of text, without indentation but for the advice under its complaint."""
        lines = [text for f in self.findings for text in (f"{f.complaint}: {f.evidence}", f"  {f.advice}")]
        if not any(finding.complaint in THE_FOUR for finding in self.findings):
            lines.insert(0, "none of the four usual complaints shows" + (", as far as it could be judged" if self.unjudged else ""))
        return lines + [f"left open: {text}" for text in self.unjudged]


class _Verdict(NamedTuple):
    """Whether one complaint shows; `evidence` is why, or, for an open one, why it cannot be told."""

    shown: bool
    is_open: bool
    evidence: str


class _Value(NamedTuple):
    """A number with the bounds of its interval; None where there is no interval."""

    mean: float
    low: float | None
    high: float | None
    words: str  # how it was got, for the evidence


def diagnose(
    base: Row,
    best: Row,
    final: Row,
    references: Mapping[str, Row],
    differences: Differences,
    setting: Setting,
    course: Sequence[StepScores] = (),
) -> Diagnosis:
    """Returns which complaints the chosen step's scores show, with the evidence and the knob for each.

    Args:
        base: scores of the un-tuned base.
        best: scores of the chosen step.
        final: scores of the last step; the chosen one's again where they are the same.
        references: marks to read the scores against, by name: "real_photos", in the lab "ground_truth", "copy_baseline".
        differences: paired differences to the base, as scores.json holds them.
        setting: what the advice depends on.
        course: scores at every evaluation, the base as step 0; without them nothing is said about the length of the training.

    Returns:
        The findings: the four first, then other classes, quality and length. A score that is missing or NaN leaves its complaint open.
    """
    verdicts = _four(base, best, references, differences.get("best - base", {}), setting)
    length = _length(best, course)
    may_rise = length[0] == TOO_SHORT if length else len(course) < 2 and best.get("step") == setting.max_steps  # unknown without a course
    findings = [Finding(name, v.evidence, _advice(name, best, setting, may_rise)) for name, v in verdicts.items() if v.shown]
    findings += _beside_the_four(base, best, differences.get("best - base", {}), setting)
    if length is not None:
        complaint, evidence = length
        if complaint == TOO_LONG:
            at_end = _four(base, final, references, differences.get("final - base", {}), setting)
            worse = [name for name in THE_FOUR if at_end[name].shown and not verdicts[name].shown]
            evidence += f"; of the last step, unlike it: {', '.join(worse)}" if worse else ""
        findings.append(Finding(complaint, evidence, _advice(complaint, best, setting, may_rise)))
    return Diagnosis(findings, [f"{name}: {v.evidence}" for name, v in verdicts.items() if v.is_open])


def _four(base: Row, tuned: Row, references: Mapping[str, Row], differences: Row, setting: Setting) -> dict[str, _Verdict]:
    """Returns the verdict on each of the four complaints for one tuned step."""
    alignment_loss = (1 - setting.min_alignment_ratio) * abs(_number(base, "prompt_alignment"))
    return {
        NOT_LIKE: _not_like(_change("identity_fidelity", base, tuned, differences), base, references),
        LIKE_PHOTOS: _like_photos(tuned, references),
        OTHER_CONTEXTS: _loss("prompt_alignment", base, tuned, differences, alignment_loss),
        WHOLE_CLASS: _whole_class(base, tuned, differences, setting.max_drift_gain),
    }


def _not_like(gain: _Value | None, base: Row, references: Mapping[str, Row]) -> _Verdict:
    """Says whether less than half of the way from the base to real photos was gone."""
    if gain is None:
        return _Verdict(False, True, "identity fidelity was not measured")
    mark, name = _mark(references)
    gap = mark - _number(base, "identity_fidelity")
    if gap <= 0:
        return _Verdict(False, True, f"the un-tuned base is already as close as {name} are to each other")
    wanted = NOTICEABLE_FIDELITY if math.isnan(gap) else LEARNED_SHARE * gap
    way = "less than people notice" if math.isnan(gap) else f"{gain.mean / gap:.0%} of the way to the {mark:.2f} of {name}"
    upper = gain.mean if gain.high is None else gain.high
    return _Verdict(upper < wanted, gain.mean < wanted <= upper, f"identity fidelity {gain.words}, {way}")


def _like_photos(tuned: Row, references: Mapping[str, Row]) -> _Verdict:
    """Says whether images are nearer to a training photo than other real photos are."""
    excess = _own("memorisation", tuned)
    if excess is None:
        return _Verdict(False, True, "memorisation was not measured")
    words = f"the nearest photo is {excess.mean:.2f} closer than real photos are to each other{excess.words}"
    copy = _number(references.get("copy_baseline", {}), "prompt_alignment")
    alignment = _number(tuned, "prompt_alignment")
    words += "" if math.isnan(copy + alignment) else f"; prompt alignment {alignment:.2f}, that of the photos themselves {copy:.2f}"
    lower = excess.mean if excess.low is None else excess.low
    is_large = excess.mean >= COPYING
    return _Verdict(is_large and lower > 0, is_large and lower <= 0, words)


def _whole_class(base: Row, tuned: Row, differences: Row, max_drift_gain: float) -> _Verdict:
    """Says whether the class moved towards the subject, or its images have become alike."""
    drift = _loss("drift", base, tuned, differences, max_drift_gain, up_is_good=False)
    alike = _loss("class_diversity", base, tuned, differences, CLASS_DIVERSITY_LOSS * abs(_number(base, "class_diversity")))
    shown = [verdict.evidence for verdict in (drift, alike) if verdict.shown]
    if shown:
        return _Verdict(True, False, "; ".join(shown))
    is_measured = _change("class_diversity", base, tuned, differences) is not None  # drift alone is enough for a verdict
    return drift if drift.is_open or not is_measured else alike


def _beside_the_four(base: Row, best: Row, differences: Row, setting: Setting) -> list[Finding]:
    """Returns what else is wrong with the chosen step: the colours of other classes, and blur."""
    findings = []
    slower = f"try optim.learning_rate={_half(setting.learning_rate)} or trainer.max_steps={_fewer_steps(best, setting)}"
    colors = _own("other_class_color_drift", best)
    if colors is not None and (colors.mean if colors.low is None else colors.low) > COLOR_DRIFT:
        findings.append(Finding(OTHER_CLASSES, f"{colors.mean:.0%} of the colours in their pictures moved{colors.words}", slower))
    sharpness = _loss("sharpness", base, best, differences, SHARPNESS_LOSS * abs(_number(base, "sharpness")))
    if sharpness.shown:
        findings.append(Finding(BLURRED, sharpness.evidence, slower))
    return findings


def _length(best: Row, course: Sequence[StepScores]) -> tuple[str, str] | None:
    """Returns whether the training was too short or too long, and the evidence; None if neither shows."""
    rows = sorted((row for row in course if not math.isnan(row.identity_fidelity)), key=lambda row: row.step)
    tuned, step = [row for row in rows if row.step > 0], best.get("step")
    if len(tuned) < 2 or step is None:
        return None
    last, before = tuned[-1], tuned[-2]
    if step == last.step:
        rise, total = last.identity_fidelity - before.identity_fidelity, last.identity_fidelity - rows[0].identity_fidelity
        if rise < max(STILL_RISING, STILL_RISING_SHARE * total):
            return None
        fidelities = f"from {before.identity_fidelity:.2f} at step {before.step} to {last.identity_fidelity:.2f} at step {last.step}"
        return TOO_SHORT, f"identity fidelity still rose at the end, {fidelities}"
    later = [row for row in tuned if row.step > step]
    if step > EARLY_SHARE * last.step or len(later) < 2:
        return None
    return TOO_LONG, f"step {step} was not bettered in the {len(later)} evaluations after it, up to step {last.step}"


def _advice(complaint: str, best: Row, setting: Setting, may_rise: bool) -> str:
    """Returns the knob for a complaint, given how the run was set and whether fidelity may rise yet."""
    if complaint == TOO_SHORT:
        return f"try trainer.max_steps={2 * setting.max_steps}"
    if complaint == TOO_LONG:
        return f"try trainer.max_steps={best['step']}, which gives the same in less time, or optim.learning_rate={_half(setting.learning_rate)}"
    fewer = f"trainer.max_steps={_fewer_steps(best, setting)}"
    if complaint == NOT_LIKE:
        few = f"; and give {FEW_PHOTOS} to 6 photos in data.subject_dir, not {setting.photos}" if setting.photos < FEW_PHOTOS else ""
        if may_rise:
            return f"try trainer.max_steps={2 * setting.max_steps}{few}"
        if not setting.trains_text_encoder:
            return f"try method.train_text_encoder=true{few}"
        return f"try optim.learning_rate={2 * setting.learning_rate:.2g}{few}"
    if complaint == LIKE_PHOTOS:
        words = f"try {fewer}" if best.get("step", 0) > setting.eval_every else f"try optim.learning_rate={_half(setting.learning_rate)}"
        return words + ("" if setting.captions else f"; and {NAME_PLACES}")
    if setting.prior_weight is None:
        return "try prior=class_images"
    if complaint == OTHER_CONTEXTS:
        if setting.prior_prompts < 2 and not setting.captions:
            return f"""try 'prior.prompts=["a photo of a {{subject}}","a photo of a {{subject}} on the beach"]'; or {NAME_PLACES}"""
        if setting.trains_text_encoder and setting.text_encoder_learning_rate:
            return f"try optim.text_encoder_learning_rate={_half(setting.text_encoder_learning_rate)}"
        return f"try optim.learning_rate={_half(setting.learning_rate)}"
    return f"try prior.weight={max(1.0, 2 * setting.prior_weight):g}" if setting.prior_weight < 2 else f"try {fewer}"


def _loss(key: str, base: Row, tuned: Row, differences: Row, threshold: float, up_is_good: bool = True) -> _Verdict:
    """Says whether a score got worse by at least the threshold, and its interval holds no 0."""
    name = key.replace("_", " ")
    change = _change(key, base, tuned, differences)
    if change is None or math.isnan(threshold):
        return _Verdict(False, True, f"{name} was not measured")
    loss = -change.mean if up_is_good else change.mean
    bound = change.high if up_is_good else change.low
    supported = bound is None or (bound < 0 if up_is_good else bound > 0)
    is_large = loss >= threshold and loss > 0
    return _Verdict(is_large and supported, is_large and not supported, f"{name} {change.words}")


def _change(key: str, base: Row, tuned: Row, differences: Row) -> _Value | None:
    """Returns how a score changed from the base, with the paired interval where there is one; None if it was not measured."""
    before, after = _number(base, key), _number(tuned, key)
    if math.isnan(before) or math.isnan(after):
        return None
    difference = differences.get(key) or {}
    mean = _number(difference, "mean")
    mean = after - before if math.isnan(mean) else mean
    low, high, words = _bounds(difference, signed=True)
    return _Value(mean, low, high, f"{before:.2f} -> {after:.2f} ({mean:+.2f}{words})")


def _own(key: str, row: Row) -> _Value | None:
    """Returns a score with its own interval; None if it was not measured."""
    value = _number(row, key)
    if math.isnan(value):
        return None
    low, high, words = _bounds(row.get(f"{key}_interval") or {})
    return _Value(value, low, high, f" ({words.removeprefix(', ')})")


def _bounds(interval: Row, signed: bool = False) -> tuple[float | None, float | None, str]:
    """Returns the bounds of an interval, and words for it."""
    low, high = _number(interval, "low"), _number(interval, "high")
    if math.isnan(low) or math.isnan(high):
        return None, None, ", no interval"
    sign = "+" if signed else ""
    return low, high, f", 95% interval {low:{sign}.2f} to {high:{sign}.2f} over {interval.get('n', 'the')} {interval.get('unit', 'unit')}s"


def _mark(references: Mapping[str, Row]) -> tuple[float, str]:
    """Returns the fidelity of real images of the subject, and what they are; NaN if there are none."""
    for key, name in (("ground_truth", "true renders"), ("real_photos", "real photos")):
        mark = _number(references.get(key) or {}, "identity_fidelity")
        if not math.isnan(mark):
            return mark, name
    return math.nan, "real photos"


def _fewer_steps(best: Row, setting: Setting) -> int:
    """Returns about half of the chosen step, a multiple of the evaluations' distance."""
    half = best.get("step", setting.max_steps) / 2
    return max(1, round(half / setting.eval_every)) * setting.eval_every


def _half(rate: float) -> str:
    return f"{rate / 2:.2g}"


def _number(row: Row, key: str) -> float:
    """Returns a score; NaN if it is missing, None or not finite."""
    value = row.get(key)
    return float(value) if value is not None and math.isfinite(value) else math.nan
