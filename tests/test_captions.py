"""What a photo's own text says, and what becomes of it in a prompt."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import composed, make_photos

from dreambooth import captions
from dreambooth.class_images import read_user_bank
from dreambooth.errors import UserError
from dreambooth.recipes import resolve
from dreambooth.side_files import caption_of
from dreambooth.subject_photos import SubjectPhotos, read_subject_photos


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("07@a photo of S C at night", "a photo of {identifier} {class} at night"),
        ("@S", "{identifier}"),
        ("IMG_1", None),
        ("IMG_1@ ", None),
        ("a@b@c", "b@c"),
        ("1@Some Cats sit on a SC sofa", "Some Cats sit on a SC sofa"),
    ],
)
def test_file_name_caption_is_what_stands_after_the_at_sign(stem: str, caption: str | None) -> None:
    assert captions.from_file_name(stem) == caption


def test_fill_replaces_each_placeholder_once_and_leaves_other_braces() -> None:
    text = captions.fill("{subject}, a {class} named {identifier} {x}", "{class} dog", "sks", "dog")
    assert text == "{class} dog, a dog named sks {x}"


def test_fill_without_identifier_leaves_no_doubled_space() -> None:
    assert captions.fill("a photo of {identifier} {class}", "dog", "", "dog") == "a photo of dog"


@pytest.mark.parametrize(("caption", "found"), [("a SKS dog", True), ("many masks", False), ("sks", True), ("dog,sks.", True), ("", False)])
def test_is_word_in_finds_whole_words(caption: str, found: bool) -> None:
    assert captions.is_word_in("sks", caption) == found


def test_describe_says_nothing_when_all_captions_are_the_same() -> None:
    assert captions.describe(["a", "b"], ["x", "x"]) == []
    assert captions.describe(["a", "b"], ["x", "y"]) == ["caption of a: x", "caption of b: y"]


def test_describe_stops_after_forty() -> None:
    lines = captions.describe([str(k) for k in range(50)], [f"c{k}" for k in range(50)])
    assert len(lines) == 41 and lines[-1] == "... and 10 more captions"


@pytest.mark.parametrize("name", ["IMG_1.txt", "IMG_1.jpg.txt", "IMG_1.caption", "IMG_1.jpg.caption"])
def test_side_file_is_the_caption(tmp_path: Path, name: str) -> None:
    photo = make_photos(tmp_path, 1) / "IMG_1.jpg"
    (tmp_path / name).write_text("\ufeffa {subject}\n  on the beach\n", encoding="utf-8")
    assert caption_of(photo) == "a {subject} on the beach"


def test_side_file_goes_before_the_file_name(tmp_path: Path) -> None:
    photo = (make_photos(tmp_path, 1) / "IMG_1.jpg").rename(tmp_path / "1@S C.jpg")
    assert caption_of(photo) == "{identifier} {class}"
    (tmp_path / "1@S C.txt").write_text("from the file")
    assert caption_of(photo) == "from the file"


def test_empty_side_file_is_no_caption(tmp_path: Path) -> None:
    photo = make_photos(tmp_path, 1) / "IMG_1.jpg"
    photo.with_suffix(".txt").write_text(" \n")
    assert caption_of(photo) is None


def test_side_file_must_be_text(tmp_path: Path) -> None:
    photo = make_photos(tmp_path, 1) / "IMG_1.jpg"
    photo.with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"IMG_1\.txt must be UTF-8 text"):
        caption_of(photo)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_photos(tmp_path / "dog", 4)
    for k in range(4):  # sharp ones, about which there is nothing else to say
        pixels = np.random.default_rng(k).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "dog" / f"IMG_{k + 1}.jpg", quality=95)
    (tmp_path / "dog" / "IMG_1.txt").write_text("a {subject} on the beach")
    (tmp_path / "dog" / "IMG_2.jpg").rename(tmp_path / "dog" / "2@S the C at night.jpg")
    (tmp_path / "dog" / "IMG_3.txt").write_text("a brown dog")
    return tmp_path / "dog"


def read(folder: Path, *words: str) -> SubjectPhotos:
    return read_subject_photos(resolve(composed(f"data.subject_dir={folder}", "subject.class_noun=dog", "data.held_out=0", *words)))


def test_auto_captions_are_the_file_then_the_name_then_the_prompt(folder: Path) -> None:
    found = read(folder, "data.captions=auto")
    assert dict(zip(found.names, found.captions, strict=True)) == {
        "IMG_1.jpg": "a sks dog on the beach",
        "2@S the C at night.jpg": "sks the dog at night",
        "IMG_3.jpg": "a brown dog",
        "IMG_4.jpg": "a photo of a sks dog",
    }


def test_auto_captions_warn_of_one_that_does_not_name_the_subject(folder: Path) -> None:
    assert read(folder, "data.captions=auto").warnings == ["the caption of IMG_3.jpg does not name the subject (sks): a brown dog"]


def test_one_prompt_for_all_says_that_captions_are_there(folder: Path) -> None:
    found = read(folder, "data.captions=prompt")
    assert set(found.captions) == {"a photo of a sks dog"}
    assert len(found.warnings) == 1 and found.warnings[0].startswith("3 of 4 photos have a caption of their own that is not used")


def test_captions_that_are_used_are_part_of_the_digest(folder: Path) -> None:
    used, unused = (read(folder, f"data.captions={kind}").digest for kind in ("auto", "prompt"))
    (folder / "IMG_1.txt").write_text("a {subject} in the snow")
    assert read(folder, "data.captions=auto").digest != used and read(folder, "data.captions=prompt").digest == unused


def test_built_in_subject_has_captions_that_name_the_place() -> None:
    found = read_subject_photos(resolve(composed()))  # the lab's own recipe
    assert found.captions[:2] == ["a photo of a sks dog on the grass", "a photo of a sks dog on a wooden table"]


def test_class_images_of_a_folder_take_their_own_captions(folder: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    make_photos(bank, 2)
    (bank / "IMG_1.txt").write_text("a sks {class} on a sofa")
    words = [f"data.subject_dir={folder}", "subject.class_noun=dog", f"prior.class_dir={bank}"]
    own = read_user_bank(resolve(composed(*words, "data.captions=auto")))
    assert sorted(own.captions) == ["a photo of a dog", "a sks dog on a sofa"]
    assert [line for line in own.warnings if "names the subject" in line] == [
        "the caption of the class image IMG_1.jpg names the subject: a sks dog on a sofa"
    ]
    plain = read_user_bank(resolve(composed(*words, "data.captions=prompt")))
    assert plain.captions == ["a photo of a dog"] * 2 and plain.digest != own.digest


def test_a_photo_called_txt_is_no_caption(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.txt", "PNG")
    assert caption_of(make_photos(tmp_path, 1) / "IMG_1.jpg") is None and caption_of(tmp_path / "1.txt") is None
