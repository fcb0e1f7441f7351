"""What tells the runs of a table apart, and which of their rows are one and the same."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from small_runs import composed

from dreambooth.arms import as_typed, settings_that_differ
from dreambooth.combined_scores import BASE, _by_prompt_kind, _compared, _one_base, require_one_evaluator
from dreambooth.config import Config
from dreambooth.encoders import LabEncoders
from dreambooth.errors import UserError
from dreambooth.metrics.table import METRICS
from dreambooth.recipes import resolve, settle_steps

IDENTITY = next(info for info in METRICS if info.key == "identity_fidelity")


def images(base_of_seed_1: float = 0.0, settings: tuple[str, ...] = ("",)) -> pd.DataFrame:
    """Returns scores of 3 subjects x 2 seeds x the settings: identity = subject + 0.1 k, tuned arms + 0.5, and + 0.2 for seed 1."""
    rows = []
    for subject in range(3):
        for seed in (0, 1):
            for setting in settings:
                for arm in ("base", "best"):
                    for k in range(2):
                        gain = 0.5 + 0.2 * seed if arm == "best" else base_of_seed_1 * seed
                        about = {"subject": f"s{subject}", "seed": seed, "setting": setting, "arm": arm, "kind": "subject", "prompt_kind": "property"}
                        rows.append(about | {"template": "a red {subject}", "k": k, "identity": subject + 0.1 * k + gain, "alignment": 0.3})
    return pd.DataFrame(rows)


def test_settings_name_what_varies_but_seed_and_subject(make_config: Callable[..., Config]) -> None:
    runs = [
        ("a", make_config({"subject.name": "a", "prior.name": "none"})),
        ("a", make_config({"subject.name": "a", "prior.name": "class_images", "seed": 1})),
        (
            "b",
            make_config({"subject.name": "b", "prior.name": "none", "subject.class_noun": "cat", "data.subject_dir": "/b"}),
        ),
    ]
    assert settings_that_differ(runs) == ["prior=none", "prior=class_images", "prior=none"]


def test_settings_name_a_number_only_where_a_choice_has_it(make_config: Callable[..., Config]) -> None:
    changes = ({"prior.name": "none"}, {"prior.weight": 0.5}, {"prior.weight": 1.0})
    found = settings_that_differ([("a", make_config({"prior.name": "class_images"} | change)) for change in changes])
    assert found == ["prior=none", "prior=class_images, prior.weight=0.5", "prior=class_images, prior.weight=1.0"]


def test_settings_that_follow_from_a_choice_by_the_recipe_are_no_settings(resolved: Callable[..., Config]) -> None:
    """Each method has learning rates of its own; so has an arm that asks for another one."""
    methods = [("a", resolved(f"method={name}")) for name in ("full", "lora", "cross_attention_kv")]
    assert len({config.optim.learning_rate for _, config in methods}) == 3
    assert settings_that_differ(methods) == ["method=full", "method=lora", "method=cross_attention_kv"]
    asked = ("a", resolved("method=lora", "optim.learning_rate=1e-3"))
    assert settings_that_differ([*methods, asked])[1::2] == [
        "method=lora, optim.learning_rate=0.008", "method=lora, optim.learning_rate=0.001",
    ]  # fmt: skip


def test_setting_that_equals_the_recipe_counts_where_another_arm_differs(resolved: Callable[..., Config]) -> None:
    runs = [("a", resolved(f"optim.learning_rate={rate}")) for rate in (4e-4, 1e-4)]
    assert settings_that_differ(runs) == ["optim.learning_rate=0.0004", "optim.learning_rate=0.0001"]


@pytest.fixture
def resolved() -> Callable[..., Config]:
    """Gives `resolved("method=lora")`: the config that train.py works with, on the lab."""
    return lambda *words: settle_steps(resolve(composed(*words)), 5)


def test_empty_text_is_a_setting_that_can_be_seen(make_config: Callable[..., Config]) -> None:
    runs = [("a", make_config({"subject.name": "a", "subject.prompt_noun": noun})) for noun in (None, "")]
    assert settings_that_differ(runs) == ["subject.prompt_noun=null", "subject.prompt_noun=''"]


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (None, "null"),
        (True, "true"),
        ("", "''"),
        (1, "1"),
        (["to_q", "to_out.0"], "[to_q,to_out.0]"),
        (["a photo of a dog"], "['a photo of a dog']"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_setting_is_shown_as_the_command_line_takes_it(value: object, typed: str) -> None:
    assert as_typed(value) == typed
    assert OverridesParser.create().parse_override(f"key={typed}").value() == value


def test_long_list_is_named_in_brief_where_that_tells_the_arms_apart(make_config: Callable[..., Config]) -> None:
    prompts = [f"a photo of a {{subject}} {place}" for place in ("at night", "in a city", "in the snow")]
    lists = (prompts[:1], prompts, prompts[:2] + ["a {subject}"])
    runs = [("a", make_config({"prior.name": "class_images", "prior.prompts": some})) for some in lists]
    assert settings_that_differ(runs[:2]) == [
        "prior.prompts=['a photo of a {subject} at night']", "prior.prompts=['a photo of a {subject} at night', ... 3 in all]",
    ]  # fmt: skip
    assert settings_that_differ(runs) == [f"prior.prompts={some}" for some in lists]  # two of them look the same in brief


def test_class_noun_is_a_setting_where_one_subject_has_two(make_config: Callable[..., Config]) -> None:
    runs = [("a", make_config({"subject.name": "a", "subject.class_noun": noun})) for noun in ("dog", "animal")]
    assert settings_that_differ(runs) == ["subject.class_noun=dog", "subject.class_noun=animal"]


def test_runs_that_differ_in_nothing_have_no_setting(make_config: Callable[..., Config]) -> None:
    assert settings_that_differ([("a", make_config()), ("a", make_config({"seed": 1}))]) == ["", ""]


def test_base_that_drew_the_same_for_all_seeds_and_settings_is_one_row_without_a_seed() -> None:
    found = _one_base(images(settings=("prior=none", "prior=class_images")))
    base = found[found.arm == "base"]
    assert len(base) == 3 * 2 and base.seed.isna().all() and set(base.label) == {BASE}
    assert set(found[found.arm == "best"].label) == {"prior=none: best step", "prior=class_images: best step"}


def test_base_that_differs_between_seeds_keeps_them() -> None:
    found = _one_base(images(base_of_seed_1=0.01))
    assert len(found[found.arm == "base"]) == 3 * 2 * 2 and found.seed.notna().all()


def test_difference_pairs_each_seed_with_the_one_base() -> None:
    row = _compared(_one_base(images()), IDENTITY).rows[1]
    assert row.arm == "best step" and row.difference.mean == pytest.approx(0.5 + 0.1) and row.difference.n == 3
    assert row.mean.mean == pytest.approx(1 + 0.05 + 0.6) and row.seeds == (2, 2)


def test_split_by_kind_counts_a_base_without_seed_as_one_run() -> None:
    """A missing seed must not make a run of every image: that widens the interval."""
    rows = {row["arm"]: row for row in _by_prompt_kind(_one_base(images()))}
    interval = rows[BASE]["identity_fidelity_interval"]
    assert (interval["low"], interval["high"]) == pytest.approx((0.05, 2.05))  # the range of three subjects
    assert rows[BASE]["identity_fidelity"] == pytest.approx(1.05) and rows[BASE]["images"] == 6


def test_score_that_was_not_measured_is_no_row() -> None:
    frame = images()
    assert _compared(_one_base(frame.assign(identity=np.nan)), IDENTITY) is None


def test_runs_of_two_evaluators_are_refused_before_anything_is_drawn(make_config: Callable[..., Config]) -> None:
    first, second = make_config(), make_config()
    second.encoders = LabEncoders()
    require_one_evaluator([first, first])
    with pytest.raises(UserError, match="^runs must be scored by one evaluator"):
        require_one_evaluator([first, second])
