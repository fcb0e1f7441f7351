"""The class bank: which images, each with a seed of its own, shared by what is equal, continued after a kill, never taken for another."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import class_bank
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.class_bank import ClassBank, draw_bank, manifest_digest, plan, read_user_bank, wants_class_images
from dreambooth.config import Config
from dreambooth.errors import UserError
from dreambooth.generation import read_recipe

MakeConfig = Callable[..., Config]
BANK = {"prior.num_images": 5, "prior.prompts": ["a photo of a {subject}", "a {subject} on the grass"], "sampling.batch_size": 2}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(BANK)


@pytest.fixture
def drawn(config: Config, shared_base: StableDiffusionModel) -> ClassBank:
    return draw_bank(config, shared_base, "digest")


def folder(bank: ClassBank) -> Path:
    return bank.images[0].parent


def pixels(bank: ClassBank) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in bank.images]).astype(int)


def contents(bank: ClassBank) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bank.images}


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of the images that are really drawn from now on."""
    drawn: list[str] = []

    def generate(base: object, prompts: list[str], *rest: object) -> np.ndarray:
        drawn.extend(prompts)
        return original(base, prompts, *rest)

    original = class_bank.generate
    monkeypatch.setattr(class_bank, "generate", generate)
    return drawn


def test_draw_bank_draws_the_number_of_images_that_was_asked_for(drawn: ClassBank) -> None:
    assert [path.name for path in drawn.images] == [f"{k:05d}.png" for k in range(5)]
    assert sorted(os.listdir(folder(drawn))) == [*(f"{k:05d}.png" for k in range(5)), "manifest.json"]


def test_draw_bank_takes_the_prompts_in_turn_with_the_class_and_without_the_identifier(drawn: ClassBank) -> None:
    assert drawn.captions == ["a photo of a dog", "a dog on the grass"] * 2 + ["a photo of a dog"]


def test_draw_bank_draws_images_of_the_training_resolution_that_differ(drawn: ClassBank) -> None:
    images = pixels(drawn)
    assert images.shape == (5, 64, 64, 3)
    assert len({image.tobytes() for image in images}) == 5


def test_draw_bank_writes_what_made_it(config: Config, drawn: ClassBank) -> None:
    manifest = json.loads((folder(drawn) / "manifest.json").read_text())
    assert manifest["base_digest"] == "digest" and manifest["resolution"] == 64
    assert manifest["sampling"] == {"sampler": "ddim", "steps": 2, "guidance_scale": 7.5}
    assert [(image["name"], image["prompt"]) for image in manifest["images"]] == [(item.name, item.prompt) for item in plan(config)]


def test_draw_bank_writes_prompt_key_and_base_into_each_image(config: Config, drawn: ClassBank) -> None:
    recipes = [read_recipe(path) for path in drawn.images]
    assert recipes == [{"prompt": item.prompt, "key": list(item.key), "base_digest": "digest"} for item in plan(config)]


def test_draw_bank_lies_beside_the_runs_and_is_named_by_its_content(config: Config, drawn: ClassBank) -> None:
    digest = manifest_digest(config, "digest")
    assert folder(drawn) == Path(config.output_dir) / "class_banks" / f"dog-{digest[:12]}"
    assert drawn.digest == digest


def test_plan_gives_each_image_a_key_of_its_own(config: Config) -> None:
    assert len({item.key for item in plan(config)}) == 5


def test_plan_of_more_images_begins_with_the_plan_of_fewer(make_config: MakeConfig) -> None:
    assert plan(make_config(BANK | {"prior.num_images": 9}))[:5] == plan(make_config(BANK))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_draw_bank_image_k_is_the_same_whatever_the_batch_size(
    make_config: MakeConfig, shared_base: StableDiffusionModel, drawn: ClassBank, tmp_path: Path, batch_size: int
) -> None:
    """To one of 255 levels: a matrix product may round otherwise in a batch of another size."""
    other = make_config(BANK | {"sampling.batch_size": batch_size, "output_dir": str(tmp_path / "other")})
    bank = draw_bank(other, shared_base, "digest")
    assert bank.digest == drawn.digest
    assert np.abs(pixels(bank) - pixels(drawn)).max() <= 1


def test_draw_bank_again_draws_nothing(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, before = count_draws(monkeypatch), contents(drawn)
    again = draw_bank(config, shared_base, "digest")
    assert draws == [] and contents(again) == before and again.digest == drawn.digest


@pytest.mark.parametrize("spoil", ["delete", "truncate", "empty"])
def test_draw_bank_after_a_kill_draws_only_what_is_missing(
    config: Config, shared_base: StableDiffusionModel, drawn: ClassBank, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    draws, before, before_pixels, path = count_draws(monkeypatch), contents(drawn), pixels(drawn), drawn.images[3]
    if spoil == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if spoil == "empty" else path.stat().st_size // 2])
    again = draw_bank(config, shared_base, "digest")
    assert draws == ["a dog on the grass"]
    assert {name: data for name, data in contents(again).items() if name != path.name} == {k: v for k, v in before.items() if k != path.name}
    assert np.abs(pixels(again) - before_pixels).max() <= 1 and read_recipe(path) == read_recipe_bytes(before[path.name], path)


def read_recipe_bytes(data: bytes, beside: Path) -> dict:
    copy = beside.with_name("copy.png")
    copy.write_bytes(data)
    try:
        return read_recipe(copy)
    finally:
        copy.unlink()


def test_draw_bank_with_the_same_batches_draws_the_same_bytes(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    before = contents(drawn)
    for path in drawn.images:
        path.unlink()
    assert contents(draw_bank(config, shared_base, "digest")) == before


def test_draw_bank_knows_a_png_that_was_cut_off_anywhere(drawn: ClassBank, tmp_path: Path) -> None:
    """Only bytes that hold no pixel, some checksums at the very end, may be missing."""
    data, path, whole = drawn.images[0].read_bytes(), tmp_path / "cut.png", pixels(drawn)[0]
    for size in {0, 1, 7, 8, 20, 33, 60, *range(100, len(data), 997), *range(len(data) - 64, len(data), 4)}:
        path.write_bytes(data[:size])
        assert not class_bank._is_whole(path) or np.array_equal(np.asarray(Image.open(path)), whole), (
            f"{size} of {len(data)} bytes passed for an image"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"prior.prompts": ["a photo of the {subject}"]},
        {"prior.num_images": 6},
        {"sampling.sampler": "euler"},
        {"sampling.steps": 3},
        {"sampling.guidance_scale": 2.0},
        {"data.resolution": 32},
        {"subject.class_noun": "cat"},
        {"seed": 1},
    ],
    ids=str,
)
def test_manifest_digest_differs_for_another_recipe(make_config: MakeConfig, changes: dict) -> None:
    assert manifest_digest(make_config(BANK | changes), "digest") != manifest_digest(make_config(BANK), "digest")


def test_manifest_digest_differs_for_another_base(config: Config) -> None:
    assert manifest_digest(config, "digest") != manifest_digest(config, "other")


@pytest.mark.parametrize(
    "changes",
    [{"optim.learning_rate": 1.0}, {"prior.weight": 0.3}, {"prior.batch_size": 2}, {"subject.identifier": "ohwx"}, {"trainer.max_steps": 7}],
    ids=str,
)
def test_manifest_digest_is_shared_by_the_runs_of_a_sweep(make_config: MakeConfig, changes: dict) -> None:
    assert manifest_digest(make_config(BANK | changes), "digest") == manifest_digest(make_config(BANK), "digest")


def test_draw_bank_of_another_recipe_is_another_folder(make_config: MakeConfig, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    before = contents(drawn)
    other = draw_bank(make_config(BANK | {"sampling.steps": 1, "prior.num_images": 1}), shared_base, "digest")
    assert folder(other) != folder(drawn) and contents(drawn) == before


def test_draw_bank_refuses_a_manifest_that_was_tampered_with(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    path = folder(drawn) / "manifest.json"
    path.write_text(path.read_text().replace("a photo of a dog", "a photo of a cat"))
    with pytest.raises(UserError, match=f"^{folder(drawn)} holds class images of another recipe; delete the folder"):
        draw_bank(config, shared_base, "digest")


def test_draw_bank_refuses_a_manifest_that_is_no_json(config: Config, shared_base: StableDiffusionModel, drawn: ClassBank) -> None:
    (folder(drawn) / "manifest.json").write_text('{"format": 1, "ima')
    with pytest.raises(UserError, match=str(folder(drawn))):
        draw_bank(config, shared_base, "digest")


def test_draw_bank_tells_how_far_it_is(config: Config, shared_base: StableDiffusionModel) -> None:
    told = []
    draw_bank(config, shared_base, "digest", lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_read_user_bank_captions_every_image_with_the_first_class_prompt(make_config: MakeConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    bank = read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path)}))
    assert bank.captions == ["a photo of a dog"] * 4 and len(bank.images) == 4


def test_read_user_bank_digest_is_that_of_the_contents(make_config: MakeConfig, tmp_path: Path) -> None:
    rng, digests = np.random.default_rng(0), []
    images = [Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)) for _ in range(3)]
    for name, chosen in (("a", images), ("b", images), ("c", images[:2])):
        (tmp_path / name).mkdir()
        for k, image in enumerate(chosen):
            image.save(tmp_path / name / f"{k}.png")
        digests.append(read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path / name)})).digest)
    assert digests[0] == digests[1] != digests[2]


def test_read_user_bank_names_the_setting_when_the_folder_is_missing(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^prior.class_dir"):
        read_user_bank(make_config(BANK | {"prior.class_dir": str(tmp_path / "nowhere")}))


def test_wants_class_images_only_with_the_prior(make_config: MakeConfig) -> None:
    assert wants_class_images(make_config()) and not wants_class_images(make_config({"prior.name": "none"}))
