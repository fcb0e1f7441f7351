import hashlib
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth import photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.photo_folder import PhotoSet, read_photo_folder

DREAMBENCH = Path(__file__).parents[1] / ".." / "shared" / "dreambench"


def write(path: Path, seed: int, size: tuple[int, int] = (80, 64), form: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, form)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("2.png", "10.png", "1.png")):
        write(tmp_path / name, number)
    return tmp_path


def read(folder: Path, **options: object) -> PhotoSet:
    return read_photo_folder(str(folder), 64, **options)


def names(found: PhotoSet) -> list[str]:
    return [photo.name for photo in found.photos]


def test_read_photo_folder_says_nothing_about_good_photos(folder: Path) -> None:
    found = read(folder)
    assert (found.skipped, found.warnings) == ([], [])


def test_read_photo_folder_sorts_2_before_10(folder: Path) -> None:
    write(folder / "A3.png", 3)
    write(folder / "a20.png", 4)
    write(folder / "sub" / "0.png", 5)
    assert names(read(folder)) == ["1.png", "2.png", "10.png", "A3.png", "a20.png", "sub/0.png"]


def test_read_photo_folder_can_leave_subfolders_out(folder: Path) -> None:
    write(folder / "sub" / "0.png", 5)
    assert names(read(folder, recursive=False)) == ["1.png", "2.png", "10.png"]


def test_read_photo_folder_records_the_size_in_the_file(folder: Path) -> None:
    photo = read(folder).photos[0]
    assert (photo.width, photo.height, photo.path) == (80, 64, str(folder / "1.png"))


def test_read_photo_folder_keeps_what_any_later_crop_needs(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / f"{seed}.png", seed, (331, 207))
    full = Image.open(tmp_path / "1.png").convert("RGB")
    kept = read(tmp_path).photos[1].image
    assert kept.size == (102, 64)
    for crop, flip, u in (("center", False, (0.5, 0.5)), ("random", True, (0.1, 0.9)), ("random", False, (0.99, 0.0))):
        np.testing.assert_array_equal(photos.prepare(kept, 64, crop, flip, u), photos.prepare(full, 64, crop, flip, u))


def test_read_photo_folder_does_not_store_an_enlarged_photo(tmp_path: Path) -> None:
    write(tmp_path / "small.png", 0, (50, 40))
    assert read(tmp_path).photos[0].image.size == (50, 40)


# digest


def test_digest_is_blind_to_names_and_dates_and_folders(folder: Path) -> None:
    before = read(folder).digest
    (folder / "1.png").rename(folder / "z.jpg")
    (folder / "sub").mkdir()
    (folder / "2.png").rename(folder / "sub" / "new.png")
    os.utime(folder / "10.png", (0, 0))
    assert read(folder).digest == before


def test_digest_changes_with_one_photo(folder: Path) -> None:
    before = read(folder).digest
    write(folder / "1.png", 99)
    assert read(folder).digest != before


def test_digest_is_the_sha256_of_the_sorted_sha256(folder: Path) -> None:
    sums = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir())
    assert read(folder).digest == hashlib.sha256("\n".join(sums).encode()).hexdigest()


# what is passed over


def test_hidden_and_system_files_are_ignored_in_silence(folder: Path) -> None:
    for name in (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\1junk")
    write(folder / ".ipynb_checkpoints" / "1-checkpoint.png", 7)
    write(folder / "__MACOSX" / "1.png", 8)
    found = read(folder)
    assert (len(found.photos), found.skipped, found.warnings) == (3, [], [])


@pytest.mark.parametrize("name", ["1.txt", "1.png.txt", "2.json"])
def test_side_files_of_a_photo_are_ignored_in_silence(folder: Path, name: str) -> None:
    (folder / name).write_text("a photo of a sks dog")
    assert read(folder).warnings == []


def test_stray_files_share_one_line(folder: Path) -> None:
    (folder / "notes.txt").write_text("BM wrote this")
    (folder / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    found = read(folder)
    assert found.skipped == [] and found.warnings == ["ignored what is no photo (2): clip.mp4, notes.txt"]


def test_a_pipe_named_like_a_photo_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    assert read(folder).warnings == ["ignored what is no photo (1): pipe.jpg"]


@pytest.mark.parametrize("name", ["3.jpg", "photo", "3.txt"])
def test_the_content_decides_and_not_the_ending(folder: Path, name: str) -> None:
    write(folder / name, 5)
    assert name in names(read(folder)) and read(folder).warnings == []


# bad photos


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("bad.jpg", b"\xff\xd8\xff\xe0 not a jpeg", "must be a photo that decodes completely, got"),
        ("page.jpg", b"<html>404</html>", "got 'no known image format'"),
        ("empty.png", b"", "the file is empty (0 bytes)"),
        ("IMG_1.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC cannot be read here: export it as JPEG"),
    ],
)
def test_a_bad_photo_is_skipped_with_its_reason(folder: Path, name: str, data: bytes, reason: str) -> None:
    (folder / name).write_bytes(data)
    found = read(folder)
    assert len(found.photos) == 3 and [skipped[0] for skipped in found.skipped] == [name]
    assert reason in found.skipped[0][1] and found.warnings == [f"{name} is skipped: it {found.skipped[0][1]}"]


def test_a_truncated_photo_is_found_before_training(folder: Path) -> None:
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    assert read(folder).skipped[0][0] == "1.png"


def test_a_photo_far_too_small_is_skipped(folder: Path) -> None:
    write(folder / "icon.png", 5, (31, 31))
    assert read(folder).skipped == [
        ("icon.png", "is 31 px on the short side, below the resolution of 64: it is enlarged 2.1 times; use another photo")
    ]


def test_a_photo_somewhat_too_small_stays_with_a_warning(folder: Path) -> None:
    write(folder / "small.png", 5, (40, 40))
    found = read(folder)
    assert len(found.photos) == 4
    assert found.warnings == ["small.png is 40 px on the short side, below the resolution of 64: it is enlarged 1.6 times"]


def test_refuse_names_the_file_the_reason_and_the_way_out(folder: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read(folder, on_bad_photo="refuse", config_path="data.class_dir")
    assert str(caught.value) == (
        f"{folder}/bad.jpg must be a photo, but the file is empty (0 bytes); copy it again, or delete it;"
        " or set data.on_bad_photo=skip to train without it"
    )


def test_an_unknown_policy_is_a_config_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="""data.on_bad_photo must be "skip" or "refuse", got 'ignore'"""):
        read(folder, on_bad_photo="ignore")


def test_a_photo_without_read_permission_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open

    def guarded(path: Path, *args: object, **options: object) -> object:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    assert read(folder).skipped == [("2.png", "must be readable (Permission denied); check the permissions of the file")]


# links and names


def test_links_to_photos_and_folders_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "linked.png").symlink_to(write(elsewhere / "one.png", 5))
    (folder / "more").symlink_to(write(elsewhere / "many" / "two.png", 6).parent)
    assert names(read(folder))[-2:] == ["linked.png", "more/two.png"]


def test_a_broken_link_is_a_bad_photo(folder: Path) -> None:
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    assert read(folder).skipped == [("gone.jpg", "must be readable (No such file or directory); check where the link leads")]


def test_a_link_back_up_does_not_go_round_for_ever(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    found = read(folder)
    assert len(found.photos) == 3 and found.warnings == []


@pytest.mark.parametrize("name", ["hündchen 犬.png", "line\nbreak.png", "\u202egnp.png", os.fsdecode(b"odd\xff.png")])
def test_any_file_name_is_read_and_shown_safely(folder: Path, name: str) -> None:
    write(folder / "x.png", 5).rename(folder / name)
    shown = next(photo.name for photo in read(folder).photos if photo.path == str(folder / name))
    assert shown.isprintable() and shown == (name if name.isprintable() else repr(name))
    assert all(unicodedata.category(letter) != "Cs" for letter in shown)


# the folder as a whole


def test_the_same_file_twice_counts_once(folder: Path) -> None:
    before = read(folder).digest
    shutil.copy(folder / "1.png", folder / "copy of 1.png")
    found = read(folder)
    assert len(found.photos) == 3 and found.digest == before
    assert found.warnings == ["copy of 1.png is the same file as 1.png: counted once"]


def test_the_same_shot_saved_again_is_a_warning(folder: Path) -> None:
    with Image.open(folder / "1.png") as image:
        image.save(folder / "again.jpg", quality=90)
    assert read(folder).warnings == ["again.jpg is almost the same shot as 1.png: that view counts twice"]


@pytest.mark.parametrize(("count", "words"), [(1, "only 1 photo: 3 to 30"), (2, "only 2 photos: 3 to 30")])
def test_fewer_than_three_photos_is_a_warning(tmp_path: Path, count: int, words: str) -> None:
    for seed in range(count):
        write(tmp_path / f"{seed}.png", seed)
    (warning,) = read(tmp_path).warnings
    assert warning.startswith(words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "must be an existing folder, got '.*'; set data.class_dir=path/to/folder with 3 to 30 photos"),
        (lambda path: path.write_text("x"), "must be a folder, not a file"),
        (lambda path: path.mkdir(), "at least one photo that can be used, got '.*'; put 3 to 30 photos of one subject there$"),
        (lambda path: write(path / "a.png", 0, (9, 9)), "got '.*'; skipped 1: a.png is 9 px on the short side"),
    ],
)
def test_a_folder_without_photos_is_an_error_with_the_config_path(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=f"^data.class_dir .*{words}"):
        read(tmp_path / "photos", config_path="data.class_dir")


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"what it holds is no photo, such as notes\.txt"):
        read(tmp_path)


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match="data.subject_dir must be an existing folder, got ''"):
        read_photo_folder("", 64)


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="needs ../shared/dreambench")
def test_real_photos_of_one_subject_pass_without_a_word() -> None:
    found = read_photo_folder(str(DREAMBENCH / "dog6"), 512)
    assert (len(found.photos), found.skipped, found.warnings) == (5, [], [])
    assert {photo.image.size for photo in found.photos} == {(512, 512)}


# captions and masks beside photos


def mask_file(path: Path, size: tuple[int, int] = (80, 64), white: int = 20) -> Path:
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[:, :white] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", ["1.mask.png", "1-mask.png"])
def test_masks_are_no_photos_and_no_strays(folder: Path, name: str) -> None:
    mask_file(folder / name)
    found = read(folder)
    assert names(found) == ["1.png", "2.png", "10.png"] and found.warnings == [] and found.photos[0].mask is None


def test_a_photo_that_is_merely_called_mask_stays_a_photo(folder: Path) -> None:
    write(folder / "my-mask.png", 9)
    assert "my-mask.png" in names(read(folder))


def test_masks_have_the_size_of_the_kept_photo(folder: Path) -> None:
    write(folder / "1.png", 4, (160, 128))
    mask_file(folder / "1.mask.png", (320, 256), white=80)
    photo = read(folder, masks="sidecar").photos[0]
    assert photo.image.size == photo.mask.size == (80, 64)
    assert [photo.mask.getpixel((x, 30)) for x in (5, 15, 25, 70)] == [255, 255, 0, 0]


def test_photos_without_a_mask_are_named(folder: Path) -> None:
    mask_file(folder / "1.mask.png")
    assert read(folder, masks="sidecar").warnings == ["no mask for 2 of 3 photos (2.png, 10.png): all of them counts alike"]


def test_masks_that_are_asked_for_must_be_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.masks must find a mask beside a photo .*; set data.masks=null"):
        read(folder, masks="sidecar")


def test_mask_of_another_shape_is_refused(folder: Path) -> None:
    mask_file(folder / "1.mask.png", (64, 80))
    with pytest.raises(UserError, match=r"1\.mask\.png must have the shape of its photo, 80 x 64 px upright, got '64 x 80'"):
        read(folder, masks="sidecar")


def test_mask_that_shows_nothing_is_refused(folder: Path) -> None:
    mask_file(folder / "1.mask.png", white=0)
    with pytest.raises(UserError, match=r"1\.mask\.png must be white where the subject is"):
        read(folder, masks="sidecar")


def test_transparency_is_a_mask_where_there_is_no_file(folder: Path) -> None:
    for number in (1, 2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[:, 40:, 3] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    mask_file(folder / "1.mask.png")
    found = {photo.name: photo.mask for photo in read(folder, masks="alpha").photos}
    assert [found["1.png"].getpixel((x, 9)) for x in (5, 70)] == [255, 0]
    assert [found["2.png"].getpixel((x, 9)) for x in (5, 70)] == [0, 255]
    assert found["10.png"] is None


def test_automatic_masks_need_their_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ConfigError, match=r"data.masks must not be auto without the package rembg, got 'auto'; pip install rembg"):
        read(folder, masks="auto")


def test_automatic_masks_are_made_for_photos_without_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library, which finds the left half."""
    asked = []

    def remove(image: Image.Image, session: str, only_mask: bool) -> Image.Image:
        asked.append((image.size, session, only_mask))
        return Image.fromarray(np.repeat([[255] * 40 + [0] * 40], 64, 0).astype(np.uint8))

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove, new_session=lambda: "one session"))
    mask_file(folder / "1.mask.png")
    found = {photo.name: photo.mask for photo in read(folder, masks="auto").photos}
    assert asked == [((80, 64), "one session", True)] * 2
    assert [found["2.png"].getpixel((x, 9)) for x in (30, 50)] == [255, 0] and found["1.png"].getpixel((30, 9)) == 0


def test_photos_carry_their_captions_as_templates(folder: Path) -> None:
    (folder / "1.txt").write_text("a {subject} in the snow")
    (folder / "2.txt").write_bytes(b"\xff\xfe")
    found = read(folder)
    assert [photo.caption for photo in found.photos] == ["a {subject} in the snow", None, None]
    assert found.warnings == ["2.txt must be UTF-8 text; save the caption again as UTF-8: that caption is not used"]
