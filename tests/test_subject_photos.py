"""The photos to train on and those set aside."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import composed, make_photos

from dreambooth.errors import ConfigError, UserError
from dreambooth.lab.world import PHOTO_STREAM, identity, render_masks
from dreambooth.recipes import resolve
from dreambooth.subject_photos import KNOWN, PHOTOS, SubjectPhotos, prepared, read_subject_photos, save_photos


def read(folder: Path, *words: str) -> SubjectPhotos:
    return read_subject_photos(resolve(composed(f"data.subject_dir={folder}", "subject.class_noun=dog", *words)))


def test_held_out_photos_are_set_aside_from_training(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "dog", count=5)
    everything, split = read(folder, "data.held_out=0"), read(folder, "data.held_out=2")
    assert (len(everything.images), len(split.images), len(split.held_out)) == (5, 3, 2)
    assert sorted(split.names + split.held_out_names) == sorted(everything.names)
    assert everything.held_out == []


def test_held_out_photos_are_the_same_ones_under_other_names(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "dog", count=5)
    before = [np.asarray(image) for image in read(folder, "data.held_out=2").held_out]
    for number, file in enumerate(sorted(folder.iterdir(), reverse=True)):
        file.rename(folder / f"renamed-{number}.jpg")
    after = [np.asarray(image) for image in read(folder, "data.held_out=2").held_out]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_held_out_must_leave_something_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.held_out must leave photos to train on, of 3, got 3"):
        read(make_photos(tmp_path / "dog", count=3), "data.held_out=3")


def test_fewer_photos_are_a_part_of_all_and_what_is_set_aside_stays_the_same(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "dog", count=6)
    everything, few = read(folder, "data.held_out=2"), read(folder, "data.held_out=2", "data.photos=3")
    assert few.names == everything.names[:3] and few.held_out_names == everything.held_out_names
    assert few.other_names == everything.names[3:] and everything.others == []
    with pytest.raises(ConfigError, match="data.photos must be at most the 4 photos that there are to train on, got 5"):
        read(folder, "data.held_out=2", "data.photos=5")


@pytest.mark.parametrize("count", [1, 3, 10])
def test_built_in_subject_has_as_many_photos_as_are_asked_for(count: int) -> None:
    found, usual = (read_subject_photos(resolve(composed(*words))) for words in ((f"data.photos={count}", "data.held_out=2"), ()))
    assert (len(found.images), len(found.held_out), len(found.masks)) == (count, 2, count)
    for own, same in zip(found.images + found.others, usual.images + usual.others, strict=True):  # the scores look at the same ten
        assert np.array_equal(np.asarray(own), np.asarray(same))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.held_out, usual.held_out, strict=False))


def test_built_in_subject_keeps_its_five_photos_whatever_is_held_out() -> None:
    few, many = (read_subject_photos(resolve(composed(f"data.held_out={count}"))) for count in (0, 3))
    assert (len(few.images), len(many.images), len(many.held_out)) == (PHOTOS, PHOTOS, 3)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(few.images, many.images, strict=True))
    assert not any(np.array_equal(np.asarray(a), np.asarray(b)) for a in many.images + many.others for b in many.held_out)


def test_built_in_subject_has_exact_masks() -> None:
    """The subject's own pixels change with its colours; the world's masks say where they may."""
    found = read_subject_photos(resolve(composed("data.masks=sidecar", "data.held_out=1")))
    assert len(found.masks) == PHOTOS and len(found.held_out_masks) == 1
    keys = [(913, k, PHOTO_STREAM) for k in [*range(PHOTOS), KNOWN]]
    exact = render_masks([identity("dog", 913)] * (PHOTOS + 1), keys)
    for mask, share in zip(found.masks + found.held_out_masks, exact, strict=True):
        assert np.abs(np.asarray(mask) / 255 - share.numpy()).max() <= 0.5 / 255 + 1e-6
    assert None not in read_subject_photos(resolve(composed())).masks  # the scores look at them; the loss does only if data.masks is set


def two_subjects(tmp_path: Path, *words: str) -> SubjectPhotos:
    other = make_photos(tmp_path / "cat", 3)
    extra = f"extra_subjects=[{{identifier: ohwx, class_noun: cat, subject_dir: {other}, repeats: 2}}]"
    return read(make_photos(tmp_path / "dog", 4), "data.held_out=1", extra, *words)


def test_extra_subjects_bring_their_photos_captions_and_repeats(tmp_path: Path) -> None:
    found = two_subjects(tmp_path)
    (extra,) = found.extras
    assert (len(found.images), len(extra.images), extra.held_out, extra.repeats) == (3, 3, [], 2)
    assert set(found.captions) == {"a photo of a sks dog"} and set(extra.captions) == {"a photo of a ohwx cat"}
    assert found.weighted_count == 3 + 2 * 3


def test_extra_subjects_are_part_of_the_digest(tmp_path: Path) -> None:
    both = two_subjects(tmp_path).digest
    assert both != read(tmp_path / "dog", "data.held_out=1").digest
    (tmp_path / "cat" / "IMG_1.jpg").unlink()
    assert two_subjects(tmp_path).digest == both  # made again by the helper
    make_photos(tmp_path / "cat", 4)
    assert two_subjects(tmp_path).digest != both


def test_extra_subject_without_a_folder_is_named_by_its_config_path(tmp_path: Path) -> None:
    words = "extra_subjects=[{identifier: ohwx, class_noun: cat, subject_dir: nowhere}]"
    with pytest.raises(UserError, match=r"extra_subjects\[0\].subject_dir must be an existing folder, got 'nowhere'"):
        read(make_photos(tmp_path / "dog", 4), "data.held_out=0", words)


def test_run_folder_keeps_photos_and_masks_of_each_subject(tmp_path: Path) -> None:
    words = ("data.masks=sidecar", "data.held_out=1", "extra_subjects=[{identifier: o/x, class_noun: teapot, lab_seed: 3}]")
    found = read_subject_photos(resolve(composed(*words)))
    save_photos(tmp_path, found, 64)
    kept = Counter(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert kept == {
        **{"photos": 5, "photos/masks": 5, "photos/others": 5, "photos/held_out": 1, "photos/held_out/masks": 1},
        **{"photos/1-o_x": 5, "photos/1-o_x/masks": 5},
    }
    mask = np.asarray(Image.open(tmp_path / "photos" / "masks" / "002.png"))
    assert np.array_equal(mask, np.asarray(found.masks[2]))


def test_prepared_photos_are_cropped_as_in_training_unless_that_is_random(tmp_path: Path) -> None:
    pixels = np.full((64, 200, 3), 120, np.uint8)
    pixels[10:50, 140:170] = np.random.default_rng(0).integers(0, 256, (40, 30, 3))
    image = Image.fromarray(pixels)
    center, random, smart = (prepared([image], 64, crop)[0] for crop in ("center", "random", "smart"))
    assert np.array_equal(center, random) and center.std() == 0 and smart.std() > 20


def test_photos_of_ones_own_are_all_trained_on_unless_some_are_set_aside(tmp_path: Path) -> None:
    """On the lab too, whose own subject has further photos to measure on."""
    assert read(make_photos(tmp_path / "dog", count=4)).held_out == []
