"""The stream of batches: what is in them, that captions stay with their images, and that step k is the same however it is reached."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.config import Config, Subject
from dreambooth.data import (
    Batch,
    Draw,
    DreamBoothData,
    ImageSet,
    StepSampler,
    class_batch_size,
    class_set,
    describe_batch,
    describe_photos,
    subject_set,
)
from dreambooth.subject_photos import SubjectPhotos

MakeConfig = Callable[..., Config]
SIDE = 64


def flat(level: int) -> Image.Image:
    """A picture of one grey level, which tells which picture it is whatever the crop and the flip."""
    return Image.new("RGB", (SIDE + 16, SIDE), (level, level, level))


def sets(subjects: int = 5, class_images: int = 7) -> tuple[ImageSet, ImageSet | None]:
    """Pictures whose caption says their level: the subject's are 10, 11, ..., the class's 100, 101, ..."""
    kinds = [range(10, 10 + subjects), range(100, 100 + class_images)]
    subject, bank = (ImageSet([flat(level) for level in levels], [f"level {level}" for level in levels]) for levels in kinds)
    return subject, bank if class_images else None


def noisy_sets() -> tuple[ImageSet, ImageSet]:
    """Pictures of noise, in which every crop and every flip shows."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 32, 3), dtype=np.uint8)) for _ in range(12)]
    return ImageSet(images[:5], [f"s{k}" for k in range(5)]), ImageSet(images[5:], [f"c{k}" for k in range(7)])


def photos_of(word: str, count: int, repeats: int, noun: str = "dog") -> SubjectPhotos:
    images, texts = [flat(k) for k in range(count)], [f"{word} {k}" for k in range(count)]
    subject = Subject(identifier=word, class_noun=noun)
    return SubjectPhotos(images, texts, "", [], "", captions=texts, masks=[None] * count, subject=subject, repeats=repeats)


def batches(config: Config, images: tuple[ImageSet, ImageSet | None], start: int = 0, count: int | None = None) -> list[Batch]:
    """The batches that a trainer at step `start` sees."""
    data = DreamBoothData(config, *images)
    data.trainer = SimpleNamespace(global_step=start) if start else None
    return list(itertools.islice(data.train_dataloader(), count))


def level(pixel_values: torch.Tensor) -> int:
    return round(float((pixel_values.mean() + 1) * 127.5))


def same(first: Batch, second: Batch) -> bool:
    tensors = all(torch.equal(a, b) for a, b in ((first.pixel_values, second.pixel_values), (first.is_prior, second.is_prior)))
    return tensors and torch.equal(first.keys, second.keys) and first.prompts == second.prompts


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config({"data.batch_size": 2, "prior.batch_size": 3, "trainer.max_steps": 200, "seed": 4})


@pytest.fixture
def augmented(make_config: MakeConfig) -> Config:
    return make_config({"data.batch_size": 2, "prior.batch_size": 3, "trainer.max_steps": 12, "data.crop": "random", "data.flip": True})


def test_batch_holds_the_subject_and_class_images_that_the_config_says(config: Config) -> None:
    for batch in batches(config, sets(), count=4):
        assert Counter(batch.is_prior.tolist()) == {False: 2, True: 3}
        assert batch.pixel_values.shape == (5, 3, SIDE, SIDE) and len(batch.prompts) == 5 and batch.keys.shape == (5, 3)


def test_batch_flags_the_class_images_and_no_others(config: Config) -> None:
    for batch in batches(config, sets(), count=50):
        assert [level(image) >= 100 for image in batch.pixel_values] == batch.is_prior.tolist()


def test_batch_pixel_values_are_float32_from_minus_one_to_one(config: Config) -> None:
    black_and_white = ImageSet([Image.new("RGB", (SIDE, SIDE), color) for color in ("black", "white")], ["black", "white"])
    batch = batches(config, (black_and_white, sets()[1]), count=1)[0]
    found = {prompt: image.unique().tolist() for prompt, image in zip(batch.prompts[:2], batch.pixel_values[:2], strict=True)}
    assert batch.pixel_values.dtype == torch.float32 and found == {"black": [-1.0], "white": [1.0]}


def test_batch_captions_belong_to_their_images_peer_defect_cached_latents_x_shuffle(config: Config) -> None:
    """Peers that index a cache by the loop's step while the order is shuffled pair 1 - 1/N of all captions with other images."""
    pairs = [(level(image), prompt) for batch in batches(config, sets()) for image, prompt in zip(batch.pixel_values, batch.prompts, strict=True)]
    assert len(pairs) == 200 * 5
    assert [pair for pair in pairs if pair[1] != f"level {pair[0]}"] == []


def test_batch_captions_belong_to_their_files(config: Config, tmp_path: Path) -> None:
    subject, bank = sets()
    files = []
    for k, image in enumerate(bank.images):
        files.append(tmp_path / f"{k}.png")
        image.save(files[-1])
    found = batches(config, (subject, ImageSet(files, bank.captions)), count=20)
    assert all(f"level {level(image)}" == prompt for batch in found for image, prompt in zip(batch.pixel_values, batch.prompts, strict=True))


def test_batch_keys_are_seed_step_and_sample(config: Config) -> None:
    for step, batch in enumerate(batches(config, sets(), count=3)):
        assert batch.keys[:, :2].tolist() == [[4, step]] * 5


def test_batch_keys_are_all_different(config: Config) -> None:
    keys = [tuple(key) for batch in batches(config, sets()) for key in batch.keys.tolist()]
    assert len(set(keys)) == len(keys) == 1000


def test_draw_numbers_of_one_step_never_meet() -> None:
    numbers = [Draw(0, place, is_prior).sample for place in range(50) for is_prior in (False, True)]
    assert len(set(numbers)) == 100


def test_subject_samples_are_the_same_without_the_prior(make_config: MakeConfig) -> None:
    """Image, caption, crop, flip and key: so the arm without the prior differs from the arm with it in the prior alone."""
    common = {"data.batch_size": 2, "trainer.max_steps": 20, "data.crop": "random", "data.flip": True}
    subject, bank = noisy_sets()
    with_prior = batches(make_config(common | {"prior.batch_size": 3}), (subject, bank))
    without = batches(make_config(common | {"prior.name": "none"}), (subject, None))
    for both, alone in zip(with_prior, without, strict=True):
        chosen = ~both.is_prior
        assert torch.equal(both.pixel_values[chosen], alone.pixel_values) and torch.equal(both.keys[chosen], alone.keys)
        assert [p for p, is_prior in zip(both.prompts, both.is_prior, strict=True) if not is_prior] == alone.prompts


def test_every_image_of_a_kind_is_seen_equally_often(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 2, "prior.batch_size": 3, "trainer.max_steps": 70})  # 140 = 28 x 5 and 210 = 30 x 7
    seen = Counter(prompt for batch in batches(config, sets()) for prompt in batch.prompts)
    assert {seen[f"level {10 + k}"] for k in range(5)} == {28} and {seen[f"level {100 + k}"] for k in range(7)} == {30}


def test_no_image_comes_again_before_all_others_came(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 1, "prior.name": "none", "trainer.max_steps": 50})
    prompts = [prompt for batch in batches(config, (sets()[0], None)) for prompt in batch.prompts]
    assert all(len(set(prompts[start : start + 5])) == 5 for start in range(0, 50, 5))


def test_order_differs_between_rounds(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 7, "prior.name": "none", "trainer.max_steps": 6})
    rounds = [tuple(batch.prompts) for batch in batches(config, (sets(7)[0], None))]
    assert len(set(rounds)) == 6


def test_order_differs_between_seeds(make_config: MakeConfig) -> None:
    orders = []
    for seed in (0, 1):
        config = make_config({"data.batch_size": 1, "prior.name": "none", "trainer.max_steps": 20, "seed": seed})
        orders.append([batch.prompts[0] for batch in batches(config, (sets()[0], None))])
    assert orders[0] != orders[1]


def test_order_of_class_images_is_not_that_of_the_subject(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 1, "prior.batch_size": 1, "trainer.max_steps": 30})
    images = [flat(k) for k in range(6)]
    both = batches(config, (ImageSet(images, list("abcdef")), ImageSet(images, list("abcdef"))))
    assert [batch.prompts[0] for batch in both] != [batch.prompts[1] for batch in both]


def test_crops_and_flips_differ_between_the_rounds_of_an_image(augmented: Config) -> None:
    subject, bank = noisy_sets()
    views = [image.numpy().tobytes() for batch in batches(augmented, (ImageSet(subject.images[:1], ["a"]), bank)) for image in batch.pixel_values[:2]]
    assert len(set(views)) > 14  # of 24 draws out of 33 places x 2


def test_crops_and_flips_differ_between_the_images_of_a_round(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 1, "prior.name": "none", "trainer.max_steps": 24, "data.crop": "random", "data.flip": True})
    image = noisy_sets()[0].images[0]
    views = [batch.pixel_values.numpy().tobytes() for batch in batches(config, (ImageSet([image] * 24, ["a"] * 24), None))]
    assert len(set(views)) > 14  # of 24 draws out of 33 places x 2


def test_flip_mirrors_about_half_of_the_images(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 4, "prior.name": "none", "trainer.max_steps": 100, "data.flip": True})
    ramp = Image.fromarray(np.repeat(np.arange(SIDE, dtype=np.uint8)[None, :, None], SIDE, 0).repeat(3, 2))
    found = batches(config, (ImageSet([ramp], ["ramp"]), None))
    flipped = sum(bool(image[0, 0, 0] > image[0, 0, -1]) for batch in found for image in batch.pixel_values)
    assert 150 < flipped < 250  # 400 throws of a coin: 5 standard deviations


def test_without_crop_and_flip_every_round_shows_the_same_pixels(config: Config) -> None:
    subject, bank = noisy_sets()
    views = {image.numpy().tobytes() for batch in batches(config, (subject, bank), count=30) for image in batch.pixel_values}
    assert len(views) == 12


@pytest.mark.parametrize("start", [1, 5, 11])
def test_resume_at_a_step_gives_the_tail_of_the_uninterrupted_stream_bit_for_bit(augmented: Config, start: int) -> None:
    whole, tail = batches(augmented, noisy_sets()), batches(augmented, noisy_sets(), start)
    assert len(whole) == 12 and len(tail) == 12 - start
    assert all(same(a, b) for a, b in zip(whole[start:], tail, strict=True))


def test_resume_with_accumulation_starts_at_the_first_batch_of_the_step(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 2, "trainer.max_steps": 4, "trainer.accumulate_grad_batches": 3, "data.crop": "random"})
    whole, tail = batches(config, noisy_sets()), batches(config, noisy_sets(), 2)
    assert len(whole) == 12 and len(tail) == 6
    assert all(same(a, b) for a, b in zip(whole[6:], tail, strict=True))


def test_workers_change_nothing(augmented: Config, make_config: MakeConfig) -> None:
    alone = batches(augmented, noisy_sets())
    augmented.data.num_workers = 2
    shared = batches(augmented, noisy_sets())
    assert len(alone) == len(shared) == 12 and all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_torch_manual_seed_changes_nothing(augmented: Config) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(batches(augmented, noisy_sets()))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_step_sampler_length_counts_the_batches_before_the_start_too() -> None:
    """Lightning compares its own batch counter, which a checkpoint brings along, with this length."""
    sampler = StepSampler(2, 1, start=3, total=10)
    assert len(sampler) == 10 and len(list(sampler)) == 7


def test_class_batch_size_is_zero_without_a_prior(make_config: MakeConfig) -> None:
    assert class_batch_size(make_config({"prior.name": "none"})) == 0
    assert class_batch_size(make_config({"prior.batch_size": 3})) == 3


def test_describe_batch_counts_images_and_how_often_each_is_seen(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 2, "prior.batch_size": 3, "trainer.max_steps": 100, "prior.weight": 0.5})
    assert describe_batch(config, photos_of("sks", 5, 1), 200) == (
        "each step: 2 subject images (each of 5 photos is seen 40 times in 100 steps)"
        " + 3 class images (each of 200: 1.5 times), prior loss weight 0.5"
    )


def test_describe_batch_counts_accumulated_batches(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 2, "prior.name": "none", "trainer.max_steps": 100, "trainer.accumulate_grad_batches": 4})
    told = describe_batch(config, photos_of("sks", 5, 1), 0)
    assert told == "each step: 8 subject images (each of 5 photos is seen 160 times in 100 steps), no prior preservation"


def test_describe_batch_counts_a_photo_that_is_repeated_once(make_config: MakeConfig) -> None:
    config = make_config({"data.batch_size": 2, "prior.name": "none", "trainer.max_steps": 100})
    told = describe_batch(config, photos_of("sks", 5, 3), 0)
    assert told == "each step: 2 subject images (each of 5 photos is seen 40 times in 100 steps), no prior preservation"


def test_describe_batch_says_how_often_the_photos_of_each_subject_are_seen(make_config: MakeConfig) -> None:
    """As often as the stream shows them: see `test_several_subjects_are_seen_in_proportion_to_photos_and_repeats`."""
    everyone = replace(photos_of("sks", 4, 1), extras=[photos_of("ohwx", 2, 3, "cat")])
    told = describe_batch(make_config({"data.batch_size": 2, "prior.name": "none", "trainer.max_steps": 50}), everyone, 0)
    seen = "each of 4 photos of sks dog is seen 10 times, each of 2 photos of ohwx cat is seen 30 times in 50 steps"
    assert told == f"each step: 2 subject images ({seen}), no prior preservation"


def test_describe_batch_counts_the_pairs_of_repeated_photos_and_class_prompts_once(make_config: MakeConfig) -> None:
    changes = {"prior.name": "self_distilled", "prior.batch_size": 3, "prior.prompts": ["a {subject}", "one {subject}"]}
    config = make_config(changes | {"data.batch_size": 1, "trainer.max_steps": 100})
    photos = photos_of("sks", 5, 3)
    pairs = class_set(config, photos.images, None)
    assert "each of 5 photos x 2 class prompts: 30.0 times" in describe_batch(config, photos, len(pairs.images))


# buckets, masks, several subjects


def shapes(*sizes: tuple[int, int]) -> ImageSet:
    """A flat picture of each (width, height), captioned with its number and told by its level."""
    images = [Image.new("RGB", size, (10 * k + 10,) * 3) for k, size in enumerate(sizes)]
    return ImageSet(images, [f"level {10 * k + 10}" for k in range(len(sizes))])


MIXED = shapes((64, 64), (90, 70), (70, 90), (72, 92), (200, 100))


@pytest.fixture
def bucketed(make_config: MakeConfig) -> Config:
    return make_config({"data.batch_size": 2, "prior.batch_size": 1, "trainer.max_steps": 50, "data.buckets": True, "seed": 2})


def test_buckets_give_every_batch_one_shape_and_every_photo_its_own(bucketed: Config) -> None:
    wanted = {"level 10": (64, 64), "level 20": (56, 72), "level 30": (72, 56), "level 40": (72, 56), "level 50": (48, 88)}  # (H, W)
    for batch in batches(bucketed, (MIXED, sets()[1])):
        for prompt, is_prior, image in zip(batch.prompts, batch.is_prior, batch.pixel_values, strict=True):
            assert is_prior or tuple(image.shape[-2:]) == wanted[prompt]
            assert prompt == f"level {level(image)}"


def test_buckets_show_every_photo_equally_often(bucketed: Config) -> None:
    seen = Counter(prompt for batch in batches(bucketed, (MIXED, sets()[1])) for prompt in batch.prompts[:2])
    assert seen == {f"level {k}": 20 for k in (10, 20, 30, 40, 50)}  # 50 batches of 2 over 5 photos


def test_buckets_of_a_resumed_run_are_those_of_a_straight_one(bucketed: Config) -> None:
    whole, tail = batches(bucketed, (MIXED, sets()[1])), batches(bucketed, (MIXED, sets()[1]), 17)
    assert len(tail) == 33 and all(same(a, b) for a, b in zip(whole[17:], tail, strict=True))


def test_buckets_with_square_photos_are_the_plain_stream(make_config: MakeConfig) -> None:
    common = {"data.batch_size": 2, "trainer.max_steps": 12, "data.flip": True}
    rng = np.random.default_rng(1)
    square = ImageSet([Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(5)], list("abcde"))
    plain, kept = (batches(make_config(common | {"data.buckets": on}), (square, sets()[1])) for on in (False, True))
    assert all(same(a, b) for a, b in zip(plain, kept, strict=True))


def test_masks_are_cropped_and_flipped_as_their_photos(make_config: MakeConfig) -> None:
    """Each photo is its own mask, so what the batch holds of both must be the same picture."""
    config = make_config({"data.batch_size": 4, "prior.batch_size": 2, "trainer.max_steps": 30, "data.crop": "random", "data.flip": True})
    rng = np.random.default_rng(0)
    greys = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 40), dtype=np.uint8)) for _ in range(4)]
    subject = ImageSet([grey.convert("RGB") for grey in greys], list("abcd"), greys)
    for batch in batches(config, (subject, sets()[1])):
        own = ~batch.is_prior
        torch.testing.assert_close(batch.mask[own], (batch.pixel_values[own, :1] + 1) / 2, atol=1e-6, rtol=0)
        assert (batch.mask[batch.is_prior] == 1).all() and batch.mask.shape == (6, 1, SIDE, SIDE)


def test_batch_without_masks_has_none(config: Config) -> None:
    assert batches(config, sets(), count=1)[0].mask is None


def test_batch_contents_tell_images_apart_and_know_them_again(augmented: Config) -> None:
    by_content: dict[str, set[bytes]] = {}
    for batch in batches(augmented, noisy_sets()):
        for content, image in zip(batch.contents, batch.pixel_values, strict=True):
            by_content.setdefault(content, set()).add(image.numpy().tobytes())
    assert all(len(seen) == 1 for seen in by_content.values())
    assert len(by_content) == len({image for seen in by_content.values() for image in seen})


def test_several_subjects_are_seen_in_proportion_to_photos_and_repeats(make_config: MakeConfig) -> None:
    everyone = replace(photos_of("sks", 4, 1), extras=[photos_of("ohwx", 2, 3)])
    assert everyone.weighted_count == 10
    config = make_config({"data.batch_size": 2, "prior.name": "none", "trainer.max_steps": 50})
    seen = Counter(prompt for batch in batches(config, (subject_set(everyone, False), None)) for prompt in batch.prompts)
    assert seen == {**{f"sks {k}": 10 for k in range(4)}, **{f"ohwx {k}": 30 for k in range(2)}}


def test_class_samples_from_photos_name_the_class_of_each(make_config: MakeConfig) -> None:
    config = make_config({"prior.name": "self_distilled", "prior.prompts": ["a {subject}", "one {subject}"]})
    subjects = [Subject("sks", "dog"), Subject("ohwx", "cat")]
    found = class_set(config, [flat(1), flat(2)], None, subjects)
    levels = [image.getpixel((0, 0))[0] for image in found.images]
    assert list(zip(levels, found.captions, strict=True)) == [(1, "a dog"), (2, "a cat"), (1, "one dog"), (2, "one cat")]


def test_describe_photos_is_silent_in_the_plain_case(make_config: MakeConfig) -> None:
    plain = replace(photos_of("sks", 2, 1), captions=["a", "a"])
    assert describe_photos(make_config(), plain) == []
    told = describe_photos(make_config({"data.buckets": True}), replace(plain, extras=[replace(plain, repeats=3)]))
    assert told == ["subjects: sks dog (2 photos x 1), sks dog (2 photos x 3)", "buckets: 8 of 72 x 56 px"]
