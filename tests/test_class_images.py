"""The user's folder of class images: one that is a drawn bank has to fit the run, and several classes have a folder each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import class_bank
from dreambooth.class_bank import ClassBank, draw_bank
from dreambooth.class_images import bank_digest, complete_bank, read_user_bank, to_draw
from dreambooth.config import Config
from dreambooth.errors import UserError

MakeConfig = Callable[..., Config]
BANK = {"prior.num_images": 4, "prior.prompts": ["a photo of a {subject}", "a {subject} on the grass"], "sampling.batch_size": 2}
TEAPOT = {"extra_subjects": [{"identifier": "ohwx", "class_noun": "tea pot", "subject_dir": "photos"}]}


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is its key's, and no model is asked."""

    def generate(base: object, prompts: list[str], keys: list[tuple[int, ...]], sampling: object, resolution: int) -> np.ndarray:
        return np.stack([np.random.default_rng(key).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8) for key in keys])

    monkeypatch.setattr(class_bank, "generate", generate)


@pytest.fixture
def drawn(make_config: MakeConfig) -> ClassBank:
    """A bank of the very base that the configs name."""
    config = make_config(BANK)
    return draw_bank(config, None, config.base.digest())


def own_images(where: Path, count: int, seed: int = 1) -> Path:
    where.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(where / f"{k}.png")
    return where


def folder(bank: ClassBank) -> Path:
    return bank.images[0].parent


def using(where: Path, **changes: object) -> dict:
    return BANK | {"prior.class_dir": str(where)} | {key.replace("__", "."): value for key, value in changes.items()}


# a folder that this program drew


@pytest.mark.parametrize("captions", ["prompt", "auto"])
def test_a_drawn_folder_that_fits_brings_its_own_captions(make_config: MakeConfig, drawn: ClassBank, captions: str) -> None:
    own = read_user_bank(make_config(using(folder(drawn), data__captions=captions)))
    assert own.images == drawn.images and own.warnings == []
    assert own.captions == ["a photo of a dog", "a dog on the grass"] * 2


def test_a_drawn_folder_gives_its_first_images_however_many_it_holds(make_config: MakeConfig, drawn: ClassBank) -> None:
    config = make_config(using(folder(drawn), prior__num_images=3))
    before = read_user_bank(config)
    larger = make_config(BANK | {"prior.num_images": 8})
    draw_bank(larger, None, larger.base.digest())
    assert len(before.images) == 3 and read_user_bank(config) == before
    assert len(read_user_bank(make_config(using(folder(drawn), prior__num_images=20))).images) == 8


def test_a_drawn_folder_may_have_been_sampled_otherwise(make_config: MakeConfig, drawn: ClassBank) -> None:
    assert len(read_user_bank(make_config(using(folder(drawn), sampling__steps=3, prior__seed=7))).images) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__resolution": 32}, "at another resolution .*; this run's resolution is 32, got 64"),
        ({"prior__prompts": ["a {subject}"]}, r"for other prompts .*; this run's prompts is \['a dog'\], got \['a photo of a dog'"),
        ({"subject__class_noun": "cat"}, "for other prompts .*a photo of a cat"),
    ],
    ids=str,
)
def test_a_drawn_folder_of_other_images_is_refused(make_config: MakeConfig, drawn: ClassBank, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"^prior.class_dir holds class images that were drawn {words}.*; leave prior.class_dir out"):
        read_user_bank(make_config(using(folder(drawn), **changes)))


def test_a_drawn_folder_of_another_base_is_refused(make_config: MakeConfig, drawn: ClassBank, tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="^prior.class_dir holds class images that were drawn by another base .*; leave prior.class_dir out"):
        read_user_bank(make_config(using(folder(drawn), base__path=str(tiny_folder(seed=1)))))


def test_a_drawn_folder_of_another_version_is_refused(make_config: MakeConfig, drawn: ClassBank) -> None:
    path = folder(drawn) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="^prior.class_dir must not hold class images that another version .*; leave prior.class_dir out"):
        read_user_bank(make_config(using(folder(drawn))))


@pytest.mark.parametrize("spoil", ["another image", "missing", "cut off"])
def test_a_drawn_folder_with_an_image_that_is_not_as_drawn_is_refused(make_config: MakeConfig, drawn: ClassBank, spoil: str) -> None:
    path = drawn.images[1]
    if spoil == "another image":
        shutil.copy(drawn.images[2], path)
    elif spoil == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"^{path} must be "):
        read_user_bank(make_config(using(folder(drawn))))


def test_a_drawn_folder_is_not_topped_up_with_what_may_be_its_own_images(make_config: MakeConfig, drawn: ClassBank) -> None:
    with pytest.raises(UserError, match="^prior.top_up must be false .*; leave prior.class_dir out"):
        read_user_bank(make_config(using(folder(drawn), prior__top_up=True, prior__num_images=6)))


def test_a_photo_among_drawn_images_is_not_used_and_told(make_config: MakeConfig, drawn: ClassBank) -> None:
    Image.new("RGB", (64, 64), "red").save(folder(drawn) / "mine.png")
    own = read_user_bank(make_config(using(folder(drawn))))
    assert len(own.images) == 4 and own.warnings == [f"{folder(drawn)}: ignored what its manifest does not name (1): mine.png"]


def test_a_folder_above_drawn_ones_is_refused(make_config: MakeConfig, drawn: ClassBank) -> None:
    with pytest.raises(UserError, match=f"^prior.class_dir must not hold a folder .* got '{folder(drawn)}'; name that folder itself"):
        read_user_bank(make_config(using(folder(drawn).parent)))


def test_a_manifest_of_another_program_is_an_ordinary_stray_file(make_config: MakeConfig, tmp_path: Path) -> None:
    (own_images(tmp_path / "own", 3) / "manifest.json").write_text('{"name": "my album"}')
    own = read_user_bank(make_config(using(tmp_path / "own")))
    assert len(own.images) == 3 and any("ignored what is no photo (1): manifest.json" in line for line in own.warnings)


# several classes


def test_images_of_several_classes_are_counted_and_captioned_by_class(make_config: MakeConfig, tmp_path: Path) -> None:
    own_images(tmp_path / "own" / "Dog", 2)
    own_images(tmp_path / "own" / "tea_pot", 3, seed=2)
    config = make_config(using(tmp_path / "own") | TEAPOT)
    own = read_user_bank(config)
    assert own.captions == ["a photo of a dog"] * 2 + ["a photo of a tea pot"] * 3 and own.nouns == ["dog"] * 2 + ["tea pot"] * 3
    assert to_draw(config, own) == {}
    assert to_draw(make_config(using(tmp_path / "own", prior__top_up=True) | TEAPOT), own) == {"dog": 2, "tea pot": 1}


def test_a_class_without_images_gets_drawn_ones_under_top_up(make_config: MakeConfig, tmp_path: Path) -> None:
    own_images(tmp_path / "own" / "dog", 5)
    config = make_config(using(tmp_path / "own", prior__top_up=True) | TEAPOT)
    own = read_user_bank(config)
    bank = complete_bank(config, None, "digest", own)
    assert bank.nouns == ["dog"] * 5 + ["tea pot"] * 4 and bank.captions[5:] == ["a photo of a tea pot", "a tea pot on the grass"] * 2
    assert bank.digest == bank_digest(config, "digest", own) != bank_digest(config, "other", own)


def test_a_class_without_images_is_refused_otherwise(make_config: MakeConfig, tmp_path: Path) -> None:
    own_images(tmp_path / "own" / "dog", 5)
    with pytest.raises(
        UserError, match=r"^prior.class_dir must hold a folder for each class .*\(dog, tea pot\).*; make .*tea_pot, or set prior.top_up"
    ):
        read_user_bank(make_config(using(tmp_path / "own") | TEAPOT))


@pytest.mark.parametrize("top_up", [False, True])
def test_images_of_several_classes_in_one_folder_are_refused(make_config: MakeConfig, tmp_path: Path, top_up: bool) -> None:
    with pytest.raises(UserError, match="^prior.class_dir must hold a folder for each class .*; put the images of each class into its own"):
        read_user_bank(make_config(using(own_images(tmp_path / "own", 3), prior__top_up=top_up) | TEAPOT))


def test_images_that_belong_to_no_class_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("dog", "tea pot", "cats"):
        own_images(tmp_path / "own" / name, 1)
    with pytest.raises(UserError, match="^prior.class_dir must hold a folder for each class .* nothing else, got 'cats'; move it"):
        read_user_bank(make_config(using(tmp_path / "own") | TEAPOT))


def test_the_drawn_folder_of_a_class_may_be_among_those_of_several(make_config: MakeConfig, drawn: ClassBank, tmp_path: Path) -> None:
    own_images(tmp_path / "own" / "tea pot", 2)
    shutil.copytree(folder(drawn), tmp_path / "own" / "dog")
    own = read_user_bank(make_config(using(tmp_path / "own") | TEAPOT))
    assert own.captions == drawn.captions + ["a photo of a tea pot"] * 2
