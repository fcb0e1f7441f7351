"""Renders of the lab's classes as real class images: what the recipe's captions say, in files that a prior can read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import composed

from dreambooth.class_images import bank_digest, read_user_bank, to_draw
from dreambooth.errors import UserError
from dreambooth.lab.class_renders import FIRST_INDIVIDUAL, main, write_renders
from dreambooth.lab.ground_truth import FIRST_RIVAL, RIVAL_STRIDE, RIVALS
from dreambooth.lab.identities import identity
from dreambooth.lab.splits import CLASS_IMAGE_CONTEXTS, HELD_OUT_SEEDS
from dreambooth.lab.world import render_keyed
from dreambooth.recipes import LAB, resolve
from dreambooth.runs import run_path


def test_class_images_show_no_place_of_the_final_scores() -> None:
    assert not [prompt for prompt in LAB["evaluation.final_prompts"] if prompt.endswith(CLASS_IMAGE_CONTEXTS)]


def test_individuals_are_none_of_an_experiment_or_of_the_judge() -> None:
    used = range(FIRST_INDIVIDUAL, FIRST_INDIVIDUAL + 1000)
    assert not set(used) & {*HELD_OUT_SEEDS, *(FIRST_RIVAL + RIVAL_STRIDE * rival for rival in range(RIVALS))}


def test_renders_are_pictures_of_the_world_with_their_captions(tmp_path: Path) -> None:
    files = write_renders(tmp_path, "robot", 20)
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    assert captions == [LAB["prior.prompts"][k % 9].replace("{subject}", "robot") for k in range(20)]
    seed = FIRST_INDIVIDUAL + 11
    expected = render_keyed([identity("robot", seed)], ["on a wooden table"], [(seed, 11, 13)])[0]  # caption 11 is number 2 of the nine
    assert np.array_equal(np.asarray(Image.open(files[11])), expected.permute(1, 2, 0).numpy())


def test_fewer_renders_are_the_first_of_more(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--count", "6", "3", "--classes", "duck"]) == 0
    for file in (tmp_path / "3" / "duck").iterdir():
        assert file.read_bytes() == (tmp_path / "6" / "duck" / file.name).read_bytes()
    assert len(list((tmp_path / "6" / "duck").glob("*.png"))) == 6


@pytest.mark.parametrize(
    ("words", "message"), [(["--classes", "cat"], "must be a class of the lab's world"), (["--count", "0"], "must be 1 or more")]
)
def test_command_says_in_a_sentence_what_it_cannot_do(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    assert main([str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("noun", ["robot", "teapot", "car", "duck", "dog"])
def test_every_render_of_the_study_is_read_as_a_class_image(tmp_path: Path, noun: str) -> None:
    main([str(tmp_path), "--count", "64", "--classes", noun])
    words = [f"prior.class_dir='{tmp_path}/64/{{subject}}'", "prior.top_up=true", "prior.num_images=64", f"subject.class_noun={noun}"]
    config = resolve(composed(*words))
    assert config.prior.class_dir.endswith("/64/{subject}")  # as it was said: one arm of a study, whatever the subject
    own = read_user_bank(config)
    assert len(own.images) == 64 and not any(to_draw(config, own).values())
    assert set(own.captions) == {prompt.replace("{subject}", noun) for prompt in LAB["prior.prompts"]}


def test_folder_without_the_class_is_refused_by_its_name(tmp_path: Path) -> None:
    config = resolve(composed(f"prior.class_dir='{tmp_path}/{{subject}}'", "subject.class_noun=dog"))
    with pytest.raises(UserError, match="^prior.class_dir must be an existing folder, got '.*/dog'"):
        read_user_bank(config)


def test_top_up_without_a_folder_is_the_run_without_it() -> None:
    with_it, without = resolve(composed("prior.top_up=true")), resolve(composed())
    digests = {"base": "b", "photos": "p", "class_images": bank_digest(without, "b", None)}
    assert run_path(with_it, **digests) == run_path(without, **digests)
