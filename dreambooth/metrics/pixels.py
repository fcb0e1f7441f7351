"""Scores that look at pixels, with no network that could have learnt to forgive: sharpness, how much pictures differ, the drift of colours."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

FINE_OCTAVES, OCTAVES = 1, 4  # detail of about 1 pixel, against that of 2, 4 and 8 pixels
SMALLEST_PX = 20  # along each side, for the coarsest octave's blur to fit
FAINT = 1.0  # grey level of 255: detail below it is rounding, not detail
LUMA = (0.299, 0.587, 0.114)
D65 = (0.95047, 1.0, 1.08883)  # the white that sRGB is made for, CIE XYZ
SRGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
LIGHTNESS_STEP, CHROMA_STEP, CHROMA_LIMIT = 12.5, 20.0, 120.0  # CIELAB units; no colour of sRGB has |a*| or |b*| above 108
PIXELS_AT_ONCE = 1 << 18  # bounds memory
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's five scales, finest first
WINDOW_PX = 11  # of SSIM's Gaussian window


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Returns pictures (N, C, H, W) under a Gaussian of `sigma` pixels; the edges are mirrored."""
    radius = max(1, int(3 * sigma + 0.5))
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=pictures.device)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    channels = pictures.shape[1]
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    across = F.conv2d(F.pad(pictures, (radius, radius, 0, 0), mode="reflect"), kernel, groups=channels)
    return F.conv2d(F.pad(across, (0, 0, radius, radius), mode="reflect"), kernel.transpose(-1, -2), groups=channels)


def octaves(pictures: Tensor, count: int) -> list[Tensor]:
    """Returns the detail of pictures by its size, finest first: differences of successive Gaussian blurs (a Laplacian stack), each (N, C, H, W).

    Args:
        pictures: (N, C, H, W).
        count: octaves; the blurs are of 0.7, 1.4, 2.8... pixels.
    """
    bands = []
    for octave in range(count):
        softer = blur(pictures, 0.7 * 2**octave)
        bands.append(pictures - softer)
        pictures = softer
    return bands


def fine_detail(images: Tensor) -> Tensor:
    """Returns what share of each image's detail is fine, (N,) in [0, 1).

    It is the root mean square of the finest octave of its brightness (about 1 pixel) over the sum of those of the finest four (1, 2, 4
    and 8 pixels) and one grey level. As a share it does not depend on contrast, and on how much there is to see only as far as real
    scenes differ; the grey level makes a blank image 0 rather than rounding noise over rounding noise.

    Args:
        images: uint8 (N, H, W, 3), at least SMALLEST_PX pixels along each side.

    Raises:
        ValueError: the images are not of this kind.
    """
    _check_pixels(images)
    if min(images.shape[1:3]) < SMALLEST_PX:
        raise ValueError(f"images must have at least {SMALLEST_PX} pixels along each side for four octaves of detail, got {tuple(images.shape)}")
    shares = []
    for image in images:  # one at a time: 100 images of 512 x 512 with four octaves are 600 MB
        grey = (image.float() * torch.tensor(LUMA, device=image.device)).sum(-1)[None, None]  # (1, 1, H, W)
        strengths = torch.stack([band.pow(2).mean().sqrt() for band in octaves(grey, OCTAVES)])  # (OCTAVES,)
        shares.append(strengths[:FINE_OCTAVES].sum() / (strengths.sum() + FAINT))
    return torch.stack(shares) if shares else torch.empty(0, device=images.device)


def sharpness(images: Tensor, photos: Tensor) -> Tensor:
    """Returns how sharp each image is beside the subject's photos: its `fine_detail` over the mean of theirs.

    Args:
        images: uint8 (N, H, W, 3).
        photos: uint8 (M, h, w, 3), the subject's; of another size, they are first brought to the images' (bicubic, antialiased), because
            what is fine is counted in pixels.

    Returns:
        (N,) from 0; 1 = as sharp as the photos, lower is blurred, clearly above 1 is noise or over-sharpening. NaN without photos.

    Raises:
        ValueError: the images or photos are not uint8 RGB, or smaller than 20 pixels.
    """
    _check_pixels(photos)
    if len(photos) and photos.shape[1:3] != images.shape[1:3]:
        resized = F.interpolate(photos.permute(0, 3, 1, 2).float(), size=images.shape[1:3], mode="bicubic", antialias=True)
        photos = resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1)  # (M, H, W, 3)
    return fine_detail(images) / fine_detail(photos).mean()


def structural_distances(images: Tensor) -> Tensor:
    """Returns how much each pair of images differs to the eye, 1 - MS-SSIM, (N, N) in [0, 1]: a perceptual distance without a network.

    RGB in [0, 1], Gaussian window of 11 px (sigma 1.5), negative terms cut off at 0. Of the five scales those are used that fit, their
    weights brought to a sum of 1: five from 176 px, four from 99, three from 44, two from 22, one from 11. Distances of images of other
    sizes are not comparable. NaN off the diagonal for images that are smaller.

    Args:
        images: uint8 (N, H, W, 3).

    Raises:
        ValueError: the images are not of this kind.

    Source: Wang et al. 2003, "Multi-scale structural similarity"; as a measure of diversity Odena et al. 2017 (AC-GAN), sec. 4.2.
    """
    _check_pixels(images)
    side, pairs = min(images.shape[1:3], default=0), torch.combinations(torch.arange(len(images)))  # (P, 2)
    fitting = [scales for scales in range(1, len(SCALE_WEIGHTS) + 1) if side // max(1, scales - 1, (scales - 1) ** 2) >= WINDOW_PX]
    fitting = [scales for scales in fitting if side // 2 ** (scales - 1) >= WINDOW_PX]
    distances = torch.full((len(images), len(images)), 0.0 if fitting else float("nan")).fill_diagonal_(0.0)
    if not fitting or not len(pairs):
        return distances
    weights = torch.tensor(SCALE_WEIGHTS[: fitting[-1]], dtype=torch.float64)
    betas = tuple((weights / weights.sum()).tolist())
    pixels = images.permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
    for part in pairs.split(max(1, PIXELS_AT_ONCE * 16 // (side * side))):
        first, second = part.to(images.device).T
        alike = multiscale_structural_similarity_index_measure(
            pixels[first], pixels[second], data_range=1.0, betas=betas, normalize="relu", reduction="none"
        )  # (p,)
        distances[part[:, 0], part[:, 1]] = distances[part[:, 1], part[:, 0]] = 1 - alike.float().cpu()
    return distances


def cielab(images: Tensor) -> Tensor:
    """Returns the colours of images in CIELAB: L* in [0, 100], a* and b* in about [-108, 99].

    Args:
        images: uint8 sRGB (..., 3).

    Source: IEC 61966-2-1 (sRGB, white D65), CIE 15 (CIELAB).
    """
    encoded = images.float() / 255
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = linear @ torch.tensor(SRGB_TO_XYZ, device=images.device).T / torch.tensor(D65, device=images.device)
    cube = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = cube.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def color_histograms(images: Tensor) -> Tensor:
    """Returns the colour histogram of each image, (N, 9 * 13 * 13), summing to 1.

    The space is CIELAB (sRGB, D65). The nodes lie at L* = 0, 12.5, ..., 100 and at a*, b* = -120, -100, ..., 120; a pixel gives its weight
    to the eight nodes around it by trilinear interpolation, so that a change of colour too small to see moves little weight (with hard
    bins it can move all of it).

    Args:
        images: uint8 (N, H, W, 3).

    Raises:
        ValueError: the images are not of this kind.
    """
    _check_pixels(images)
    sizes = (round(100 / LIGHTNESS_STEP) + 1, round(2 * CHROMA_LIMIT / CHROMA_STEP) + 1, round(2 * CHROMA_LIMIT / CHROMA_STEP) + 1)
    start = torch.tensor([0.0, -CHROMA_LIMIT, -CHROMA_LIMIT], device=images.device)
    step = torch.tensor([LIGHTNESS_STEP, CHROMA_STEP, CHROMA_STEP], device=images.device)
    last = torch.tensor(sizes, device=images.device) - 2  # the last node that has one above it
    stride = torch.tensor([sizes[1] * sizes[2], sizes[2], 1], device=images.device)
    histograms = torch.zeros(len(images), sizes[0] * sizes[1] * sizes[2], dtype=torch.float64, device=images.device)
    for image, histogram in zip(images, histograms, strict=True):
        for pixels in image.reshape(-1, 3).split(PIXELS_AT_ONCE):
            place = (cielab(pixels) - start) / step  # (pixels, 3), in nodes
            lower = place.floor().long().clamp(min=0).minimum(last)
            above = (place - lower).clamp(0, 1).double()  # share of the node above, along each axis
            for corner in range(8):
                up = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=images.device)
                weight = torch.where(up.bool(), above, 1 - above).prod(dim=1)  # (pixels,)
                histogram.index_add_(0, ((lower + up) * stride).sum(dim=1), weight)
    return (histograms / histograms.sum(dim=1, keepdim=True)).float()


def color_drift(tuned: Tensor, base: Tensor) -> Tensor:
    """Returns how far the colours of each pair of images have moved: the total variation distance of their colour histograms.

    Args:
        tuned: uint8 (N, H, W, 3), drawn by the tuned model for prompts of other classes than the subject's.
        base: uint8 (N, H, W, 3), drawn by the un-tuned base for the same prompts and noise: base[i] belongs to tuned[i].

    Returns:
        (N,) in [0, 1]: half the sum of absolute differences of `color_histograms`, the share of the image that would have to change its
        colour; 0 for the base itself, 1 when no colour is left. **Lower** is better.

    Raises:
        ValueError: the images are not uint8 RGB, or not as many.
    """
    if len(tuned) != len(base):
        raise ValueError(f"base must hold one image for each tuned one, {len(tuned)}, got {len(base)}")
    return (color_histograms(tuned) - color_histograms(base)).abs().sum(dim=1) / 2  # (N, bins) -> (N,)


def _check_pixels(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape (images, height, width, 3), got {images.dtype} of shape {tuple(images.shape)}")
