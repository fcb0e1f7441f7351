"""Sharpness and colour drift: against scipy, textbook colours and hand-worked pictures; on the lab's renders and on real photos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dreambooth.lab.world import CONTEXTS, ground_truth, identity, render, subject_photos
from dreambooth.metrics import pixels

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "dreambench"
SUBJECTS = ("backpack", "cat2", "dog6", "robot_toy", "teapot", "vase")


def plain(color: tuple[int, int, int], side: int = 24) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).expand(1, side, side, 3)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """By scipy, not by the code under test."""
    return torch.from_numpy(gaussian_filter(images.numpy().astype(float), (0, sigma, sigma, 0), mode="mirror").round().astype(np.uint8))


def renders(noun: str, seed: int, count: int) -> Tensor:
    return ground_truth(noun, seed, list(CONTEXTS[:count]), list(range(count))).permute(0, 2, 3, 1)


def real_photos(subject: str, side: int) -> Tensor:
    files = sorted((PHOTOS / subject).glob("*.jpg"))[:3]
    if not files:
        pytest.skip("no DreamBench photos beside the repository")
    return torch.from_numpy(
        np.stack([np.asarray(ImageOps.fit(ImageOps.exif_transpose(Image.open(file)).convert("RGB"), (side, side))) for file in files])
    )


def test_fine_detail_agrees_with_scipy() -> None:
    image = renders("dog", 1, 1)
    grey = image[0].numpy().astype(float) @ [0.299, 0.587, 0.114]
    softer = [grey]
    for sigma in (0.7, 1.4, 2.8, 5.6):
        radius = int(3 * sigma + 0.5)
        softer.append(gaussian_filter(softer[-1], sigma, mode="mirror", truncate=radius / sigma))
    rms = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(softer, softer[1:], strict=False)]
    assert pixels.fine_detail(image).item() == pytest.approx(rms[0] / (sum(rms) + 1), abs=1e-4)


def test_fine_detail_of_a_blank_image_is_zero() -> None:
    assert pixels.fine_detail(plain((90, 90, 90))).item() == pytest.approx(0, abs=1e-4)


def test_fine_detail_hardly_depends_on_contrast() -> None:
    image = renders("car", 2, 4)
    flat = (image.float() * 0.5 + 64).round().byte()
    assert torch.allclose(pixels.fine_detail(flat), pixels.fine_detail(image), rtol=0.1)


@pytest.mark.parametrize("noun", ["dog", "teapot"])
def test_sharpness_of_blurred_renders_is_clearly_below_every_sharp_one(noun: str) -> None:
    photos = subject_photos(noun, 1)[0].permute(0, 2, 3, 1)
    sharp, soft = (pixels.sharpness(images, photos) for images in (renders(noun, 1, 12), blurred(renders(noun, 1, 12), 1)))
    assert (soft / sharp).max() < 0.55 and soft.max() < sharp.min()  # the places differ by less than the blur does
    assert sharp.mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_sharpness_of_blurred_photos_falls_by_half(subject: str, side: int) -> None:
    photos = real_photos(subject, side)
    ratio = pixels.sharpness(blurred(photos, 1), photos) / pixels.sharpness(photos, photos)
    assert ratio.max() < 0.55


@pytest.mark.parametrize("subject", SUBJECTS)
def test_sharpness_of_one_photo_beside_the_others_is_near_one(subject: str) -> None:
    photos = real_photos(subject, 256)
    ratios = [pixels.sharpness(photos[[k]], photos[[j for j in range(len(photos)) if j != k]]).item() for k in range(len(photos))]
    assert 0.6 < min(ratios) and max(ratios) < 1.6


def test_sharpness_compares_at_the_size_of_the_images() -> None:
    subject, contexts = identity("dog", 1), list(CONTEXTS[:4])
    small, large = (render([subject] * 4, contexts, range(4), side).permute(0, 2, 3, 1) for side in (64, 256))
    assert pixels.sharpness(small, large).mean().item() == pytest.approx(1, abs=0.2)


def test_sharpness_of_images_beside_their_own_enlargement_is_near_one() -> None:
    images = renders("dog", 1, 4)
    enlarged = torch.from_numpy(
        np.stack([np.asarray(Image.fromarray(image.numpy()).resize((256, 256), Image.Resampling.BICUBIC)) for image in images])
    )
    # an enlargement has nothing fine at its own size: held against it as it is, the images would be several times as sharp
    assert (pixels.fine_detail(images) / pixels.fine_detail(enlarged)).min() > 3
    assert pixels.sharpness(images, enlarged).mean().item() == pytest.approx(1, abs=0.3)


def test_sharpness_without_photos_is_nan() -> None:
    assert pixels.sharpness(plain((1, 2, 3)), torch.empty(0, 24, 24, 3, dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_cielab_of_known_colors(color: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    """Published values for sRGB and D65."""
    assert pixels.cielab(torch.tensor(color, dtype=torch.uint8)).tolist() == pytest.approx(expected, abs=0.02)


def test_color_histogram_sums_to_one_and_keeps_the_mean_color() -> None:
    image = renders("duck", 3, 1)
    histogram = pixels.color_histograms(image)[0].view(9, 13, 13)
    nodes = torch.stack(torch.meshgrid(torch.arange(9) * 12.5, torch.arange(13) * 20.0 - 120, torch.arange(13) * 20.0 - 120, indexing="ij"))
    assert histogram.sum().item() == pytest.approx(1, abs=1e-5)
    # linear interpolation between nodes keeps means exactly
    assert torch.allclose((nodes * histogram).sum((1, 2, 3)), pixels.cielab(image).mean((0, 1, 2)), atol=0.01)


def test_color_histogram_does_not_depend_on_where_a_color_is() -> None:
    image = renders("duck", 3, 1)
    moved = image.flatten(1, 2)[:, torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))].view(image.shape)
    assert torch.allclose(pixels.color_histograms(moved), pixels.color_histograms(image), atol=1e-6)


def test_color_drift_of_equal_images_is_zero() -> None:
    assert pixels.color_drift(renders("car", 1, 3), renders("car", 1, 3)).tolist() == [0, 0, 0]


def test_color_drift_of_far_colors_is_one() -> None:
    assert pixels.color_drift(plain((255, 0, 0)), plain((0, 0, 255))).item() == pytest.approx(1, abs=1e-5)


def test_color_drift_is_the_share_that_changed_its_color() -> None:
    tuned = plain((255, 0, 0)).clone()
    tuned[:, :6] = torch.tensor((0, 0, 255), dtype=torch.uint8)  # 6 of 24 rows
    assert pixels.color_drift(tuned, plain((255, 0, 0))).item() == pytest.approx(0.25, abs=1e-5)


def test_color_drift_of_a_change_too_small_to_see_is_small() -> None:
    assert pixels.color_drift(plain((120, 120, 120)), plain((122, 121, 120))).item() < 0.15


@pytest.mark.parametrize("bad", [torch.zeros(1, 24, 24, 3), torch.zeros(1, 3, 24, 24, dtype=torch.uint8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])
def test_fine_detail_refuses_what_it_cannot_measure(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="images must"):
        pixels.fine_detail(bad)


def test_color_drift_refuses_images_without_a_pair() -> None:
    with pytest.raises(ValueError, match="one image for each tuned one, 2, got 1"):
        pixels.color_drift(plain((1, 2, 3)).expand(2, -1, -1, -1), plain((1, 2, 3)))


# --- structural distance ----------------------------------------------------------------------------------------------------------------


def ms_ssim(one: np.ndarray, other: np.ndarray, weights: tuple[float, ...]) -> float:
    """Returns MS-SSIM of two images (H, W, 3) in [0, 1] by scipy: structure inside, at the coarsest scale luminance too, edges mirrored."""
    result, c1, c2 = 1.0, 0.01**2, 0.03**2

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (1.5, 1.5, 0), mode="mirror", radius=(5, 5, 0))

    for scale, weight in enumerate(weights):
        a, b = mean(one), mean(other)
        variances, covariance = mean(one**2) - a**2 + mean(other**2) - b**2, mean(one * other) - a * b
        structure = (2 * covariance + c2) / (variances + c2)
        luminance = (2 * a * b + c1) / (a**2 + b**2 + c1)
        is_last = scale == len(weights) - 1
        result *= max(0.0, float((structure * luminance).mean() if is_last else structure[5:-5, 5:-5].mean())) ** (weight / sum(weights))
        one, other = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3)) for x in (one, other))
    return result


@pytest.mark.parametrize(("side", "weights"), [(64, (0.0448, 0.2856, 0.3001)), (24, (0.0448, 0.2856))])
def test_structural_distance_agrees_with_scipy(side: int, weights: tuple[float, ...]) -> None:
    images = renders("dog", 900, 3)[:, :side, :side]
    found, as_numpy = pixels.structural_distances(images), images.numpy() / 255
    expected = [[1 - ms_ssim(one, other, weights) if one is not other else 0.0 for other in as_numpy] for one in as_numpy]
    assert np.allclose(found, expected, atol=1e-3) and found[~torch.eye(3, dtype=torch.bool)].min() > 0.05


def test_structural_distance_sees_pose_and_place_more_than_noise() -> None:
    images = renders("dog", 900, 2)
    grain = torch.randint(-4, 5, images[:1].shape, generator=torch.Generator().manual_seed(0))
    near = torch.cat([images[:1], (images[:1] + grain).clamp(0, 255).byte()])
    assert pixels.structural_distances(near)[0, 1] < 0.1 < 0.4 < pixels.structural_distances(images)[0, 1]


def test_structural_distance_of_images_that_are_too_small_is_nan_not_zero() -> None:
    found = pixels.structural_distances(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert found.isnan().tolist() == [[False, True], [True, False]]
    assert pixels.structural_distances(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).tolist() == [[0.0]]
    assert pixels.structural_distances(torch.zeros(2, 224, 300, 3, dtype=torch.uint8)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
