"""Images -> scores, with encoders whose answers are known: which images count for what, what is absent, and how the intervals are made."""

from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dreambooth.encoders import LoadedEncoders, Pixels
from dreambooth.evaluation import Item
from dreambooth.metrics.table import METRICS
from dreambooth.scoring import pair_mean_pseudovalues, reference, references, score
from dreambooth.statistics.intervals import bootstrap_interval


class Colors(LoadedEncoders):
    """Sees the mean colour of an image, green twice as strong where it is compared with the words red, green and blue; counts its work.

    Its patches are the four quarters of an image.
    """

    def __init__(self) -> None:
        self.version, self.device, self.seen = "colours", torch.device("cpu"), {"identity": 0, "image": 0, "text": 0}

    def _identity_with_patches(self, images: list[Pixels]) -> tuple[Tensor, Tensor]:
        self.seen["identity"] += len(images)
        x = torch.stack([torch.from_numpy(np.array(image)).float() for image in images])  # (n, H, W, 3)
        quarters = torch.nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)  # (n, 2, 2, 3)
        return x.mean((1, 2)), quarters

    def _patch_shares(self, mask: np.ndarray) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None], 2)[0]

    def _image(self, images: list[Pixels]) -> Tensor:
        self.seen["image"] += len(images)
        return torch.stack([torch.from_numpy(image.astype(np.float32).mean((0, 1))) for image in images]) * torch.tensor([1, 2, 1])

    def _text(self, prompts: list[str]) -> Tensor:
        self.seen["text"] += len(prompts)
        return torch.tensor([[float(word in prompt) for word in ("red", "green", "blue")] for prompt in prompts])


RED, GREEN, BLUE, YELLOW = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)
ROOT_HALF = 0.5**0.5
YELLOW_RED, YELLOW_GREEN = 1 / 5**0.5, 2 / 5**0.5  # cosines of image features: yellow is (1, 2, 0) there


def image(*quarters: tuple[int, int, int], side: int = 24) -> np.ndarray:
    """Returns an image of one colour, or of four quarters."""
    colors = np.array(quarters if len(quarters) == 4 else quarters * 4, np.uint8).reshape(2, 2, 3)
    return colors.repeat(side // 2, 0).repeat(side // 2, 1)


class Case(NamedTuple):
    images: np.ndarray
    items: list[Item]


def item(kind: str, template: str, k: int) -> Item:
    return Item(kind, template, template.format(subject="green thing"), template.format(subject="thing"), (0, 0, 1, k))


@pytest.fixture
def case() -> Case:
    """Two prompts of the subject (two images and one), two class images between them, one of another class."""
    drawn = [
        (image(RED), item("subject", "a red {subject}", 0)),
        (image(GREEN), item("class", "a {subject}", 0)),
        (image(YELLOW), item("subject", "a red {subject}", 1)),
        (image(GREEN), item("other", "a blue car", 0)),
        (image(RED), item("class", "a {subject}", 1)),
        (image(GREEN), item("subject", "a blue {subject}", 0)),
    ]
    return Case(np.stack([pixels for pixels, _ in drawn]), [entry for _, entry in drawn])


@pytest.fixture
def photos() -> np.ndarray:
    return np.stack([image(RED), image(YELLOW)])


def test_score_of_a_hand_worked_case(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    values = score(case.images, case.items, reference(photos, encoders), encoders).values
    fidelity = {"red": (1 + ROOT_HALF) / 2, "yellow": (1 + ROOT_HALF) / 2, "green": (0 + ROOT_HALF) / 2}
    per_prompt = [(fidelity["red"] + fidelity["yellow"]) / 2, fidelity["green"]]
    assert values["identity_fidelity"] == pytest.approx(np.mean(per_prompt))  # prompts count once: over images it would be higher
    assert values["image_fidelity"] == pytest.approx(((1 + YELLOW_RED) / 2 + (0 + YELLOW_GREEN) / 2) / 2)
    assert values["prompt_alignment"] == pytest.approx(((1 + YELLOW_RED) / 2 + 0) / 2)  # green against "a blue thing" is 0
    assert values["drift"] == pytest.approx((fidelity["green"] + fidelity["red"]) / 2)  # the car is no class image
    # flat images: only brightness differs, in one of three channels (red, yellow) or two (red, green); 24 px hold two scales, and it counts
    # at the coarser, 0.2856 / (0.0448 + 0.2856) of the exponent; the lone image of the second prompt says nothing
    faint = 0.01**2 / ((200 / 255) ** 2 + 0.01**2)
    alike = [((3 - other + other * faint) / 3) ** (0.2856 / 0.3304) for other in (1, 2)]
    assert values["diversity"] == pytest.approx(1 - alike[0], abs=1e-5)
    assert values["class_diversity"] == pytest.approx(1 - alike[1], abs=1e-5)
    assert values["class_identity_diversity"] == pytest.approx(1)
    assert values["memorisation"] == pytest.approx(((1 + 1) / 2 + ROOT_HALF) / 2 - ROOT_HALF)  # the photos are 0.71 from each other


def test_runs_on_fewer_photos_are_measured_against_the_same_ones(case: Case) -> None:
    """Only what is learned by heart is a matter of the photos that were trained on."""
    encoders, photos = Colors(), np.stack([image(RED), image(YELLOW), image(GREEN)])
    marks = [reference(photos, encoders), reference(photos[:1], encoders, others=photos[1:])]
    all_, one = (score(case.images, case.items, mark, encoders) for mark in marks)
    for column in ("identity", "image", "alignment"):
        assert np.allclose(one.per_image[column], all_.per_image[column], equal_nan=True)
    assert one.per_image.nearest_photo_index.tolist() == [0] * 6 and all_.per_image.nearest_photo_index.nunique() == 3
    ours, theirs = (references(mark, ["a red thing"], encoders) for mark in marks)
    assert ours["real_photos"]["identity_fidelity"] == theirs["real_photos"]["identity_fidelity"]
    assert theirs["copy_baseline"]["identity_fidelity"] == pytest.approx((1 + ROOT_HALF + 0) / 3)  # copies of the one photo that it had


def test_score_reads_prompts_without_the_identifier_and_with_it(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    values = score(case.images, case.items, reference(photos, encoders), encoders).values
    # "a red green thing" is (1, 1, 0): red 0.71, yellow (1 + 2) / sqrt(2 * 5); "a blue green thing": green 0.71
    assert values["prompt_alignment_with_identifier"] == pytest.approx(((ROOT_HALF + 3 / 10**0.5) / 2 + ROOT_HALF) / 2)


def test_score_leaves_out_what_cannot_be_measured(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    values = score(case.images, case.items, reference(photos[:1], encoders), encoders).values
    assert not {"masked_identity", "lpips_diversity", "other_class_drift", "other_class_color_drift", "memorisation"} & set(values)
    assert not any(np.isnan(value) for value in values.values())


def test_score_of_other_classes_is_against_the_base_on_the_same_items(case: Case, photos: np.ndarray) -> None:
    encoders, base = Colors(), case.images.copy()
    base[:3], base[3] = image(BLUE), image(GREEN, GREEN, GREEN, RED)  # only the image of kind "other" may count
    scores = score(case.images, case.items, reference(photos, encoders), encoders, base)
    assert scores.values["other_class_drift"] == pytest.approx(1 - 3 / 10**0.5)
    assert scores.values["other_class_color_drift"] == pytest.approx(0.25, abs=1e-5)
    assert scores.per_image.other_class_drift.notna().tolist() == [False, False, False, True, False, False]


def test_score_of_the_base_itself_has_no_drift_of_other_classes(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    values = score(case.images, case.items, reference(photos, encoders), encoders, case.images).values
    assert (values["other_class_drift"], values["other_class_color_drift"]) == (pytest.approx(0, abs=1e-6), 0)


def test_score_finds_the_subject_in_images_without_masks(photos: np.ndarray) -> None:
    encoders = Colors()
    photos, masks = np.stack([image(RED, GREEN, GREEN, GREEN)] * 2), np.zeros((2, 24, 24), np.float32)
    masks[:, :12, :12] = 1
    known = reference(photos, encoders, masks)
    images = np.stack([image(GREEN, GREEN, GREEN, RED), image(GREEN)])
    scores = score(images, [item("subject", "a red {subject}", k) for k in range(2)], known, encoders)
    assert scores.per_image.masked_identity.tolist() == pytest.approx([1, 0], abs=1e-6)
    assert scores.values["masked_identity"] == pytest.approx(0.5)
    assert scores.values["identity_fidelity"] > 0.9  # which the surroundings alone would give


def test_score_holds_copies_against_held_out_photos(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    copies = np.stack([image(RED), image(YELLOW)])
    items = [item("subject", "a red {subject}", k) for k in range(2)]
    values = score(copies, items, reference(photos, encoders, held_out=np.stack([image(GREEN)])), encoders).values
    assert values["memorisation"] == pytest.approx(1 - ROOT_HALF)  # green is 0.71 from yellow


def test_score_gives_the_nearest_photo_of_each_image(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    rows = score(case.images, case.items, reference(photos, encoders), encoders).per_image
    assert rows.nearest_photo_index.tolist() == [0, 1, 1, 1, 0, 1]
    assert rows.nearest_photo.tolist() == pytest.approx([1, ROOT_HALF, 1, ROOT_HALF, 1, ROOT_HALF])


def test_score_runs_each_network_once_over_the_images(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    known = reference(photos, encoders, np.ones((2, 24, 24)) * np.linspace(0, 1, 24))
    encoders.seen = dict.fromkeys(encoders.seen, 0)
    score(case.images, case.items, known, encoders, case.images)
    assert encoders.seen == {"identity": 6 + 1, "image": 3, "text": 2 + 2}  # 1: the base's image of another class; each prompt once


def test_scores_are_the_means_of_their_columns(case: Case, photos: np.ndarray) -> None:
    encoders = Colors()
    scores = score(case.images, case.items, reference(photos, encoders), encoders, case.images)
    for info in METRICS:
        if info.key in scores.values:
            own = scores.per_image[scores.per_image.kind == info.kind]
            assert own.groupby("template")[info.column].mean().mean() == pytest.approx(scores.values[info.key]), info.key


def test_scores_have_an_interval_each_around_their_value(photos: np.ndarray) -> None:
    encoders, generator = Colors(), np.random.default_rng(0)
    items = [
        item(kind, f"{kind} {n} {{subject}} red", k) for kind, n in (("subject", 0), ("subject", 1), ("subject", 2), ("class", 3)) for k in range(4)
    ]
    items += [item("other", f"{n} blue car", k) for n in range(3) for k in range(2)]
    images = np.stack([image(*map(tuple, generator.integers(0, 255, (4, 3)))) for _ in items])
    base = np.stack([image(*map(tuple, generator.integers(0, 255, (4, 3)))) for _ in items])
    scores = score(images, items, reference(photos, encoders), encoders, base)
    assert set(scores.intervals) == set(scores.values) and len(scores.values) == len(METRICS) - 7  # no masks, LPIPS, DINOv2, ground truth
    for key, interval in scores.intervals.items():
        assert interval.mean == pytest.approx(scores.values[key], abs=1e-6), key
        assert interval.low < scores.values[key] < interval.high, key
    assert (scores.intervals["drift"].n, scores.intervals["drift"].unit) == (4, "image")
    assert (scores.intervals["other_class_drift"].n, scores.intervals["other_class_drift"].unit) == (3, "prompt")


def test_pseudovalues_have_the_mean_over_pairs_and_the_jackknife_spread() -> None:
    points = np.random.default_rng(0).normal(size=7)
    per_image = np.array([np.mean([abs(a - b) for j, b in enumerate(points) if j != i]) for i, a in enumerate(points)])
    pseudo = pair_mean_pseudovalues(per_image)

    def over_pairs(values: np.ndarray) -> float:
        return float(np.mean([abs(a - b) for a, b in combinations(values, 2)]))

    left_out = [7 * over_pairs(points) - 6 * over_pairs(np.delete(points, i)) for i in range(7)]
    assert pseudo.tolist() == pytest.approx(left_out)
    assert pseudo.mean() == pytest.approx(over_pairs(points))


def test_pseudovalues_give_an_interval_that_covers() -> None:
    generator, truth, covered, naive = np.random.default_rng(1), 2 / np.pi**0.5, 0, 0  # mean distance of two draws from a normal
    for _ in range(300):
        points = generator.normal(size=12)
        distances = np.abs(points[:, None] - points[None, :]).sum(1) / 11
        for values, is_pseudo in ((pair_mean_pseudovalues(distances), True), (distances, False)):
            interval = bootstrap_interval(values, resamples=300)
            hit = interval.low <= truth <= interval.high
            covered, naive = covered + (hit and is_pseudo), naive + (hit and not is_pseudo)
    assert covered / 300 > 0.86 and naive / 300 < 0.75


def test_references_hold_the_oracle_both_ways_and_the_copy_baseline(photos: np.ndarray) -> None:
    encoders = Colors()
    found = references(reference(photos, encoders), ["a red thing", "a blue thing", "a red thing"], encoders)
    assert found["real_photos"]["identity_fidelity"] == pytest.approx(ROOT_HALF)
    assert found["real_photos_with_self_pairs"]["identity_fidelity"] == pytest.approx((1 + ROOT_HALF) / 2)
    assert found["real_photos"]["image_fidelity"] == pytest.approx(YELLOW_RED)
    assert found["copy_baseline"]["identity_fidelity"] == pytest.approx((1 + ROOT_HALF) / 2)
    assert found["copy_baseline"]["prompt_alignment"] == pytest.approx((1 + YELLOW_RED + 0 + 0) / 4)  # red and yellow against red, blue


def test_reference_refuses_masks_of_another_size(photos: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"one for each of 2 photos and of its size, \(24, 24\), got \[\(12, 12\), \(12, 12\)\]"):
        reference(photos, Colors(), np.ones((2, 12, 12)))


def test_reference_of_a_photo_without_a_mask_leaves_it_out_of_the_masked_identity() -> None:
    photos, mask = np.stack([image(RED, GREEN, GREEN, GREEN), image(BLUE)]), np.zeros((24, 24), np.float32)
    mask[:12, :12] = 1
    known = reference(photos, Colors(), [mask, None]).foreground
    assert known is not None and known.photos.tolist() == [[1, 0, 0]]
    assert reference(photos, Colors(), [None, None]).foreground is None


def test_reference_with_masks_that_tell_nothing_has_no_foreground(photos: np.ndarray) -> None:
    assert reference(photos, Colors(), np.ones((2, 24, 24), np.float32)).foreground is None


def test_score_of_images_too_small_for_sharpness_leaves_it_out(photos: np.ndarray) -> None:
    encoders = Colors()
    small = np.stack([image(RED, side=16)] * 2)
    values = score(small, [item("subject", "a red {subject}", k) for k in range(2)], reference(photos, encoders), encoders).values
    assert "sharpness" not in values and values["identity_fidelity"] == pytest.approx((1 + ROOT_HALF) / 2)
