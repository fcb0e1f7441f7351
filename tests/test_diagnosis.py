"""The diagnosis in words: each complaint shows where its scores and interval say so, and nowhere else."""

import math
from typing import Any

import pytest

from dreambooth.diagnosis import (
    BLURRED,
    LIKE_PHOTOS,
    NOT_LIKE,
    OTHER_CLASSES,
    OTHER_CONTEXTS,
    THE_FOUR,
    TOO_LONG,
    TOO_SHORT,
    WHOLE_CLASS,
    Diagnosis,
    Setting,
    diagnose,
)
from dreambooth.step_choice import StepScores

NAN = math.nan
SETTING = Setting(
    max_steps=400,
    eval_every=50,
    min_alignment_ratio=0.95,
    max_drift_gain=0.15,
    learning_rate=2e-4,
    photos=5,
    prior_weight=1.0,
    prior_prompts=9,
    captions=False,
    trains_text_encoder=True,
    text_encoder_learning_rate=4e-4,
)
BASE = {
    "step": 0,
    "identity_fidelity": 0.30,
    "prompt_alignment": 0.80,
    "drift": 0.00,
    "diversity": 0.60,
    "class_diversity": 0.60,
    "memorisation": -0.20,
    "sharpness": 0.90,
}
GOOD = BASE | {"step": 200, "identity_fidelity": 0.80, "prompt_alignment": 0.79, "drift": 0.02, "memorisation": -0.05}
REFERENCES = {"real_photos": {"identity_fidelity": 0.90}, "copy_baseline": {"identity_fidelity": 1.0, "prompt_alignment": 0.20}}


def _interval(low: float | None, high: float | None, mean: float | None = None, unit: str = "prompt") -> dict[str, Any]:
    return {"mean": (low + high) / 2 if mean is None else mean, "low": low, "high": high, "n": 8, "unit": unit}


def _diagnose(best: dict[str, Any], differences: dict[str, Any] | None = None, **options: Any) -> Diagnosis:
    inputs = {"base": BASE, "final": GOOD | best, "references": REFERENCES, "setting": SETTING} | options
    return diagnose(best=GOOD | best, differences={"best - base": differences or {}}, **inputs)


def _complaints(diagnosis: Diagnosis) -> list[str]:
    return [finding.complaint for finding in diagnosis.findings]


def _advice(best: dict[str, Any], complaint: str, **options: Any) -> str:
    return next(finding.advice for finding in _diagnose(best, **options).findings if finding.complaint == complaint)


def test_diagnosis_of_a_good_run_is_none_of_the_four() -> None:
    assert _diagnose({}).lines() == ["none of the four usual complaints shows"]


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ({"identity_fidelity": 0.40}, NOT_LIKE),
        ({"memorisation": 0.08}, LIKE_PHOTOS),
        ({"prompt_alignment": 0.60}, OTHER_CONTEXTS),
        ({"drift": 0.30}, WHOLE_CLASS),
        ({"class_diversity": 0.15}, WHOLE_CLASS),
    ],
)
def test_diagnosis_raises_the_one_complaint_that_the_scores_show(scores: dict[str, float], complaint: str) -> None:
    assert _complaints(_diagnose(scores)) == [complaint]


@pytest.mark.parametrize(
    ("scores", "key", "interval", "complaint"),
    [
        ({"identity_fidelity": 0.40}, "identity_fidelity", _interval(-0.20, 0.40, 0.10), NOT_LIKE),  # half of the way is 0.30
        ({"prompt_alignment": 0.60}, "prompt_alignment", _interval(-0.45, 0.05, -0.20), OTHER_CONTEXTS),
        ({"drift": 0.30}, "drift", _interval(-0.05, 0.65, 0.30), WHOLE_CLASS),
        ({"class_diversity": 0.15}, "class_diversity", _interval(-0.95, 0.05, -0.45), WHOLE_CLASS),
    ],
)
def test_diagnosis_leaves_open_what_the_interval_does_not_support(scores, key: str, interval, complaint: str) -> None:
    diagnosis = _diagnose(scores, {key: interval})
    assert _complaints(diagnosis) == [] and len(diagnosis.unjudged) == 1 and diagnosis.unjudged[0].startswith(f"{complaint}: ")
    assert diagnosis.lines()[0] == "none of the four usual complaints shows, as far as it could be judged"


@pytest.mark.parametrize(
    ("scores", "key", "interval", "complaint"),
    [
        ({"identity_fidelity": 0.40}, "identity_fidelity", _interval(0.00, 0.20, 0.10), NOT_LIKE),
        ({"prompt_alignment": 0.60}, "prompt_alignment", _interval(-0.30, -0.10, -0.20), OTHER_CONTEXTS),
        ({"drift": 0.30}, "drift", _interval(0.20, 0.40, 0.30), WHOLE_CLASS),
        ({"class_diversity": 0.15}, "class_diversity", _interval(-0.60, -0.30, -0.45), WHOLE_CLASS),
    ],
)
def test_diagnosis_raises_what_the_interval_supports(scores, key: str, interval, complaint: str) -> None:
    assert _complaints(_diagnose(scores, {key: interval})) == [complaint]


@pytest.mark.parametrize(
    ("scores", "key", "interval"),
    [
        ({"prompt_alignment": 0.79}, "prompt_alignment", _interval(-0.015, -0.005, -0.01)),
        ({"drift": 0.04}, "drift", _interval(0.03, 0.05, 0.04)),
        ({"class_diversity": 0.50}, "class_diversity", _interval(-0.12, -0.08, -0.10)),
    ],
)
def test_diagnosis_does_not_complain_of_a_loss_that_is_sure_but_small(scores, key: str, interval) -> None:
    diagnosis = _diagnose(scores, {key: interval})
    assert _complaints(diagnosis) == [] and diagnosis.unjudged == []


def test_diagnosis_does_not_complain_of_what_the_rule_for_the_best_step_allows() -> None:
    drift, alignment = {"drift": _interval(0.05, 0.19, 0.12)}, {"prompt_alignment": _interval(-0.10, -0.02, -0.06)}
    assert _complaints(_diagnose({"drift": 0.12}, drift)) == []
    assert _complaints(_diagnose({"drift": 0.12}, drift, setting=SETTING._replace(max_drift_gain=0.1))) == [WHOLE_CLASS]
    assert _complaints(_diagnose({"prompt_alignment": 0.74}, alignment)) == [OTHER_CONTEXTS]
    assert _complaints(_diagnose({"prompt_alignment": 0.74}, alignment, setting=SETTING._replace(min_alignment_ratio=0.9))) == []


def test_diagnosis_needs_the_interval_of_memorisation_above_zero() -> None:
    sure, open_ = ({"memorisation": 0.08, "memorisation_interval": _interval(low, 0.15)} for low in (0.02, -0.02))
    assert _complaints(_diagnose(sure)) == [LIKE_PHOTOS]
    assert _complaints(_diagnose(open_)) == [] and _diagnose(open_).unjudged[0].startswith(f"{LIKE_PHOTOS}: ")


def test_diagnosis_takes_a_missing_bound_for_no_interval() -> None:
    assert _complaints(_diagnose({"drift": 0.30}, {"drift": _interval(None, None, 0.30)})) == [WHOLE_CLASS]


def test_diagnosis_gives_the_numbers_and_the_interval() -> None:
    diagnosis = _diagnose({"identity_fidelity": 0.40}, {"identity_fidelity": _interval(0.00, 0.20, 0.10)})
    assert diagnosis.findings[0].evidence == (
        "identity fidelity 0.30 -> 0.40 (+0.10, 95% interval +0.00 to +0.20 over 8 prompts), 17% of the way to the 0.90 of real photos"
    )


def test_diagnosis_says_where_there_is_no_interval() -> None:
    assert _diagnose({"drift": 0.30}).findings[0].evidence == "drift 0.00 -> 0.30 (+0.30, no interval)"


def test_diagnosis_of_copying_sets_alignment_beside_that_of_the_photos() -> None:
    evidence = _diagnose({"memorisation": 0.08, "memorisation_interval": _interval(0.02, 0.14)}).findings[0].evidence
    assert evidence == (
        "the nearest photo is 0.08 closer than real photos are to each other (95% interval 0.02 to 0.14 over 8 prompts); "
        "prompt alignment 0.79, that of the photos themselves 0.20"
    )


def test_diagnosis_prefers_true_renders_as_the_mark() -> None:
    references = REFERENCES | {"ground_truth": {"identity_fidelity": 0.50}}
    assert _complaints(_diagnose({"identity_fidelity": 0.42}, references=references)) == []  # over half of the way to 0.50
    assert _complaints(_diagnose({"identity_fidelity": 0.42})) == [NOT_LIKE]


@pytest.mark.parametrize(("fidelity", "shown"), [(0.35, [NOT_LIKE]), (0.45, [])])
def test_diagnosis_without_a_mark_asks_for_what_people_notice(fidelity: float, shown: list[str]) -> None:
    assert _complaints(_diagnose({"identity_fidelity": fidelity}, references={})) == shown


@pytest.mark.parametrize("missing", [{}, {"memorisation": None, "drift": NAN, "prompt_alignment": None, "identity_fidelity": NAN}])
def test_diagnosis_bears_missing_scores_and_names_what_it_could_not_judge(missing: dict[str, Any]) -> None:
    diagnosis = diagnose(BASE, missing, missing, {}, {}, SETTING)
    assert [text.split(":")[0] for text in diagnosis.unjudged] == list(THE_FOUR) and diagnosis.findings == []


def test_diagnosis_judges_the_class_by_drift_alone_where_diversity_is_missing() -> None:
    assert _diagnose({"class_diversity": NAN}).unjudged == []


def test_diagnosis_does_not_take_no_loss_of_nothing_for_a_loss() -> None:
    nothing = BASE | {"prompt_alignment": 0.0, "class_diversity": 0.0, "sharpness": 0.0}
    diagnosis = _diagnose({"prompt_alignment": 0.0, "class_diversity": 0.0, "sharpness": 0.0}, base=nothing)
    assert _complaints(diagnosis) == []


def test_diagnosis_of_a_base_that_is_as_close_as_real_photos_says_so() -> None:
    assert "already as close" in _diagnose({}, base=BASE | {"identity_fidelity": 0.95}).unjudged[0]


def test_diagnosis_sees_blur_against_the_base_and_not_against_the_photos() -> None:
    assert _complaints(_diagnose({"sharpness": 0.60})) == [BLURRED]
    assert _complaints(_diagnose({"sharpness": 0.40}, base=BASE | {"sharpness": 0.42})) == []  # the base itself is soft


def test_diagnosis_sees_colours_of_other_classes_only_above_its_bound() -> None:
    assert _complaints(_diagnose({"other_class_color_drift": 0.4})) == [OTHER_CLASSES]
    unsure = {"other_class_color_drift": 0.4, "other_class_color_drift_interval": _interval(0.2, 0.6)}
    assert _complaints(_diagnose(unsure)) == [] and _complaints(_diagnose({"other_class_color_drift": 0.2})) == []


def _course(*fidelities: float) -> list[StepScores]:
    return [StepScores(100 * k, fidelity, 0.8, 0.0) for k, fidelity in enumerate(fidelities)]


def test_diagnosis_of_a_run_that_still_rises_asks_for_more_steps() -> None:
    diagnosis = _diagnose({"step": 400}, course=_course(0.3, 0.4, 0.5, 0.6, 0.7))
    assert _complaints(diagnosis) == [TOO_SHORT] and diagnosis.findings[0].advice == "try trainer.max_steps=800"
    assert diagnosis.findings[0].evidence == "identity fidelity still rose at the end, from 0.60 at step 300 to 0.70 at step 400"


@pytest.mark.parametrize("course", [_course(0.3, 0.6, 0.8, 0.84, 0.86), _course(0.3, 0.31, 0.32), _course(0.3, 0.8)])
def test_diagnosis_of_a_run_that_has_settled_does_not_ask_for_more_steps(course: list[StepScores]) -> None:
    assert TOO_SHORT not in _complaints(_diagnose({"step": course[-1].step}, course=course))


def test_diagnosis_of_a_best_step_long_before_the_end_says_what_the_end_lost() -> None:
    diagnosis = _diagnose({}, course=_course(0.3, 0.7, 0.8, 0.8, 0.7), final=GOOD | {"step": 400, "drift": 0.3})
    assert _complaints(diagnosis) == [TOO_LONG]
    assert diagnosis.findings[0].evidence == (
        "step 200 was not bettered in the 2 evaluations after it, up to step 400; of the last step, unlike it: the whole class looks like the subject"
    )
    assert diagnosis.findings[0].advice == "try trainer.max_steps=200, which gives the same in less time, or optim.learning_rate=0.0001"


def test_diagnosis_of_a_best_step_late_in_the_run_does_not_call_it_too_long() -> None:
    assert _complaints(_diagnose({"step": 300}, course=_course(0.3, 0.7, 0.8, 0.9, 0.7))) == []


@pytest.mark.parametrize(
    ("complaint", "scores", "change", "advice"),
    [
        (NOT_LIKE, {"identity_fidelity": 0.4, "step": 400}, {}, "trainer.max_steps=800"),
        (NOT_LIKE, {"identity_fidelity": 0.4}, {}, "optim.learning_rate=0.0004"),
        (NOT_LIKE, {"identity_fidelity": 0.4}, {"trains_text_encoder": False}, "method.train_text_encoder=true"),
        (NOT_LIKE, {"identity_fidelity": 0.4}, {"photos": 2}, "give 4 to 6 photos in data.subject_dir, not 2"),
        (LIKE_PHOTOS, {"memorisation": 0.1}, {}, "trainer.max_steps=100; and data.captions=auto"),
        (LIKE_PHOTOS, {"memorisation": 0.1, "step": 50}, {"captions": True}, "optim.learning_rate=0.0001"),
        (OTHER_CONTEXTS, {"prompt_alignment": 0.5}, {"prior_weight": None}, "prior=class_images"),
        (
            OTHER_CONTEXTS,
            {"prompt_alignment": 0.5},
            {"prior_prompts": 1},
            """try 'prior.prompts=["a photo of a {subject}","a photo of a {subject} on the beach"]'; or data.captions""",
        ),
        (OTHER_CONTEXTS, {"prompt_alignment": 0.5}, {"prior_prompts": 1, "captions": True}, "optim.text_encoder_learning_rate=0.0002"),
        (OTHER_CONTEXTS, {"prompt_alignment": 0.5}, {"trains_text_encoder": False}, "optim.learning_rate=0.0001"),
        (WHOLE_CLASS, {"drift": 0.5}, {"prior_weight": None}, "prior=class_images"),
        (WHOLE_CLASS, {"drift": 0.5}, {"prior_weight": 0.0}, "prior.weight=1"),
        (WHOLE_CLASS, {"drift": 0.5}, {}, "prior.weight=2"),
        (WHOLE_CLASS, {"drift": 0.5}, {"prior_weight": 4.0}, "trainer.max_steps=100"),
    ],
)
def test_diagnosis_advises_the_knob_that_the_run_has_left(complaint: str, scores: dict, change: dict, advice: str) -> None:
    assert advice in _advice(scores, complaint, setting=SETTING._replace(**change))


def test_diagnosis_does_not_ask_for_more_steps_where_fidelity_has_settled() -> None:
    course = _course(0.3, 0.35, 0.40, 0.40, 0.40)
    assert "max_steps" not in _advice({"identity_fidelity": 0.4, "step": 400}, NOT_LIKE, course=course)


def test_diagnosis_lines_put_the_advice_under_its_complaint() -> None:
    assert _diagnose({"drift": 0.3}).lines() == [
        "the whole class looks like the subject: drift 0.00 -> 0.30 (+0.30, no interval)",
        "  try prior.weight=2",
    ]
