"""The plan of an evaluation, its noise, and drawing that goes on where it was cut off."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dreambooth import evaluation
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config, Evaluation
from dreambooth.errors import ConfigError
from dreambooth.evaluation import Item, draw, draw_missing, final_plan, find_kept, image_names, selection_plan
from dreambooth.generation import read_recipe

PROMPTS = ["a {subject} in the snow", "a {subject} on a red street"]
SMALL = {"evaluation.final_prompts": PROMPTS, "evaluation.final_images": 3, "evaluation.class_images": 2, "evaluation.other_images": 1}
RECIPE = {"arm": "best", "step": 7, "model": "abc"}

MakeConfig = Callable[..., Config]


def keys(config: Config) -> list[tuple[int, ...]]:
    return [item.key for item in final_plan(config)]


# --- plan and noise ---------------------------------------------------------------------------------------------------------------------


def test_final_plan_holds_each_prompt_so_many_times_then_the_class_then_other_classes(make_config: MakeConfig) -> None:
    items = final_plan(make_config(SMALL | {"evaluation.other_prompts": ["a photo of a house"]}))
    assert [item.kind for item in items] == ["subject"] * 6 + ["class"] * 2 + ["other"]
    assert [item.prompt for item in items[2:4]] == ["a sks dog in the snow", "a sks dog on a red street"]
    assert [item.scored_prompt for item in items[5:]] == ["a dog on a red street", "a photo of a dog", "a photo of a dog", "a photo of a house"]


def test_noise_is_the_same_for_every_arm_step_and_training_seed_of_a_subject(make_config: MakeConfig) -> None:
    other = {"seed": 3, "optim.learning_rate": 1e-3, "trainer.max_steps": 5, "prior.name": "none", "data.subject_dir": "/elsewhere"}
    assert keys(make_config(SMALL)) == keys(make_config(SMALL | other))


def test_no_two_images_share_noise_and_none_that_chose_the_step_is_scored_in_the_end(make_config: MakeConfig) -> None:
    config = make_config(SMALL)
    found = keys(config) + [item.key for item in selection_plan(config)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("change", [{"subject.name": "dog6"}, {"evaluation.seed": 1}])
def test_noise_of_every_image_depends_on_the_subject_and_the_evaluation_seed(make_config: MakeConfig, change: dict) -> None:
    assert not set(keys(make_config(SMALL))) & set(keys(make_config(SMALL | change)))


def test_two_named_subjects_have_noise_of_their_own(make_config: MakeConfig) -> None:
    first, second = (make_config(SMALL | {"subject.name": name}) for name in ("dog6", "dog7"))
    assert not set(keys(first)) & set(keys(second))


def test_lab_subjects_have_noise_of_their_own(make_config: MakeConfig) -> None:
    lab = {**SMALL, "base.path": "lab", "data.subject_dir": None, "subject.class_noun": "car", "evaluation.final_prompts": None}
    assert not set(keys(make_config(lab))) & set(keys(make_config(lab | {"subject.lab_seed": 5})))
    assert not set(keys(make_config(lab))) & set(keys(make_config(lab | {"subject.class_noun": "teapot"})))


def test_class_noun_of_a_named_subject_can_be_varied_at_the_same_noise(make_config: MakeConfig) -> None:
    named = SMALL | {"subject.name": "dog6"}
    assert keys(make_config(named)) == keys(make_config(named | {"subject.class_noun": "animal"}))


def test_selection_plan_has_no_other_classes(make_config: MakeConfig) -> None:
    assert {item.kind for item in selection_plan(make_config())} == {"subject", "class"}


@pytest.mark.parametrize("noun", ["teapot", "car", "duck", "robot"])
def test_own_class_is_never_an_other_class(make_config: MakeConfig, noun: str) -> None:
    config = make_config({"base.path": "lab", "data.subject_dir": None, "subject.class_noun": noun})
    others = {item.prompt for item in final_plan(config) if item.kind == "other"}
    assert len(others) == 3 and f"a photo of a {noun}" not in others


def test_own_class_asked_for_as_an_other_class_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="^evaluation.other_prompts must not name the subject's class, dog"):
        make_config({"evaluation.other_prompts": ["a photo of a house", "two Dogs in a car"]})
    assert make_config({"evaluation.other_prompts": ["a hotdog"]}).evaluation.other_prompts == ["a hotdog"]


def test_no_other_prompts_is_an_answer(make_config: MakeConfig) -> None:
    assert {item.kind for item in final_plan(make_config({"evaluation.other_prompts": []}))} == {"subject", "class"}


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"final_prompts": ["a {subject}", "a {subject}"]}, "each prompt once"),
        ({"other_prompts": ["a car", "a car"]}, "each prompt once"),
        ({"other_prompts": ["a {subject}"]}, "another class"),
        ({"other_images": 0}, "above 0"),
    ],
)
def test_prompts_that_cannot_be_told_apart_are_refused(settings: dict, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Evaluation(**settings)


def test_prompts_that_read_alike_have_files_of_their_own() -> None:
    long = "a {subject} with a very long description that goes on and on and on until the "
    templates = ["a {subject}, red", "a {subject} red", long + "end", long + "stop", "a {subject}"]
    names = image_names([Item("subject", template, "", "", (0, 0, 0, k)) for template in templates for k in range(2)])
    assert len(set(names)) == 10 and names[-1] == "subject-a-01.png"


# --- drawing that goes on ---------------------------------------------------------------------------------------------------------------


class Painter:
    """Stands in for the model: a picture that depends on the item, and a record of what was drawn together."""

    def __init__(self, resolution: int) -> None:
        self.resolution, self.batches, self.cut_at = resolution, [], 10**9

    def __call__(self, base: object, items: list[Item], config: Config, on_progress: object = None) -> np.ndarray:
        if len(self.batches) == self.cut_at:
            raise KeyboardInterrupt
        self.batches.append([item.key for item in items])
        shape = (self.resolution, self.resolution, 3)
        return np.stack([np.random.default_rng(item.key).integers(0, 256, shape, np.uint8) for item in items])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Painter]:
    painter = Painter(64)
    monkeypatch.setattr(evaluation, "draw", painter)
    return painter


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(SMALL | {"sampling.batch_size": 4, "evaluation.other_prompts": ["a house", "a tree"]})  # 6 + 2 + 2: batches of 4, 4, 2


def finish(config: Config, folder: Path, recipe: dict = RECIPE) -> np.ndarray:
    items = final_plan(config)
    return draw_missing(None, items, config, find_kept(folder, items, config, recipe))


def test_second_time_nothing_is_drawn_and_the_images_are_the_same(painter: Painter, config: Config, tmp_path: Path) -> None:
    first = finish(config, tmp_path)
    assert [len(batch) for batch in painter.batches] == [4, 4, 2]
    assert np.array_equal(finish(config, tmp_path), first) and len(painter.batches) == 3


def test_one_missing_image_has_its_whole_batch_drawn_anew_and_no_other(painter: Painter, config: Config, tmp_path: Path) -> None:
    first = finish(config, tmp_path)
    items = final_plan(config)
    (tmp_path / image_names(items)[5]).unlink()
    assert np.array_equal(finish(config, tmp_path), first)
    assert painter.batches[3:] == [[item.key for item in items[4:8]]]


def test_cut_in_the_middle_of_a_batchs_files_it_goes_on_there(
    painter: Painter, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = evaluation.save_png, []

    def cut(path: Path, *args: object) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(path)
        real(path, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "save_png", cut)
        finish(config, tmp_path / "cut")
    finish(config, tmp_path / "cut")
    assert [len(batch) for batch in painter.batches] == [4, 4, 4, 2]  # the second batch twice
    finish(config, tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other weights"},
        {"step": 8},
        {"sampling.steps": 9},
        {"sampling.guidance_scale": 3.0},
        {"sampling.sampler": "euler"},
        {"sampling.batch_size": 5},
        {"evaluation.seed": 5},
        {"subject.identifier": "zwx"},
    ],
)
def test_stale_image_is_never_taken(painter: Painter, config: Config, make_config: MakeConfig, tmp_path: Path, change: dict) -> None:
    finish(config, tmp_path)
    recipe = RECIPE | {key: value for key, value in change.items() if "." not in key}
    settings = {key: value for key, value in change.items() if "." in key}
    base = {"sampling.batch_size": 4, "evaluation.other_prompts": ["a house", "a tree"]}
    finish(make_config(SMALL | base | settings), tmp_path, recipe)
    anew = sum(map(len, painter.batches[3:]))
    assert anew == (8 if "subject.identifier" in change else 10)  # the last two stand in a batch without the identifier
    assert all(read_recipe(path)["step"] == recipe["step"] for path in tmp_path.iterdir())


def test_image_that_was_drawn_beside_others_is_drawn_anew(painter: Painter, config: Config, tmp_path: Path) -> None:
    finish(config, tmp_path)
    config.evaluation.other_prompts = ["a house"]  # its picture is there, and alone in its batch now
    finish(config, tmp_path)
    assert [len(batch) for batch in painter.batches[3:]] == [1]


def test_damaged_image_is_drawn_anew(painter: Painter, config: Config, tmp_path: Path) -> None:
    first = finish(config, tmp_path)
    path = tmp_path / image_names(final_plan(config))[0]
    path.write_bytes(path.read_bytes()[:-200])
    assert np.array_equal(finish(config, tmp_path), first) and len(painter.batches) == 4


def test_picture_of_another_size_is_drawn_anew(painter: Painter, config: Config, tmp_path: Path) -> None:
    painter.resolution = 32
    finish(config, tmp_path)
    painter.resolution = 64
    assert finish(config, tmp_path).shape == (10, 64, 64, 3) and len(painter.batches) == 6


def test_progress_counts_what_is_kept_too(painter: Painter, config: Config, tmp_path: Path) -> None:
    items, steps = final_plan(config), []
    finish(config, tmp_path)
    kept = find_kept(tmp_path, items, config, RECIPE)
    draw_missing(None, items, config, kept, steps.append)
    assert kept.there == 10 and steps == [4, 4, 2]


def test_kept_images_are_the_models_own_bit_for_bit(make_config: MakeConfig, shared_base: StableDiffusionModel, tmp_path: Path) -> None:
    config = make_config(SMALL | {"evaluation.final_images": 1, "evaluation.class_images": 1})
    items = final_plan(config)
    expected = draw(shared_base, items, config)
    first = draw_missing(shared_base, items, config, find_kept(tmp_path, items, config, RECIPE))
    (tmp_path / image_names(items)[-1]).unlink()
    second = draw_missing(shared_base, items, config, find_kept(tmp_path, items, config, RECIPE))
    assert np.array_equal(first, expected) and np.array_equal(second, expected)
    assert first.flags.c_contiguous and second.flags.c_contiguous  # networks round by the layout in memory
