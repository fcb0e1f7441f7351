"""Is a decoded photo fit for training? Verdicts in plain words, and when two photos are the same shot. Pure functions of pixels."""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

MIN_SCALE = 0.5  # refused when the short side is under this share of the resolution
WARN_ASPECT, MAX_ASPECT = 2.0, 4.0  # long side over short side
MIN_CONTRAST = 2.0  # standard deviation of the strongest channel at 64 px, of 255: below it the photo shows nothing
MIN_SHARPNESS = 0.1  # 32 real photos at 512 px: 0.25 to 0.92; the same blurred by a 4 px Gaussian: 0.05 at most
NEAR_DUPLICATE_BITS = 36  # of 256: the same photo saved again differs in 19 at most, two photos of one subject in 59 at least


class Verdict(NamedTuple):
    """What `check` thinks of a photo. Reasons are verb phrases, to be read after the photo's name."""

    level: Literal["ok", "warning", "refused"]
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return self.level != "refused"


def check(image: Image.Image, resolution: int, square: bool = True) -> Verdict:
    """Returns whether a decoded photo is fit for training at a resolution, with reasons in plain words.

    Refused: a short side below MIN_SCALE of the resolution, sides over MAX_ASPECT : 1, or (nearly) one flat colour.
    Warning: a short side below the resolution, sides over WARN_ASPECT : 1, black bars, or no sharp detail anywhere.

    Args:
        image: RGB.
        resolution: side of the training square, in px.
        square: whether training crops to a square; with aspect-ratio buckets a long photo loses next to nothing.
    """
    short, long = sorted(image.size)
    refused, warned = [], []
    if short < resolution:
        text = f"is {short} px on the short side, below the resolution of {resolution}: it is enlarged {resolution / short:.1f} times"
        (refused if short < MIN_SCALE * resolution else warned).append(text)
    if long > (WARN_ASPECT if square else MAX_ASPECT) * short:
        text = f"is {long / short:.1f} times as long as wide" + (f": a square crop drops {1 - short / long:.0%} of it" if square else "")
        (refused if long > MAX_ASPECT * short else warned).append(text)
    if (share := black_bars(image)) > 0:
        warned.append(f"has black bars over {share:.0%} of it, which the model would learn: crop them away")
    contrast = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float32).std((0, 1)).max()
    if contrast < MIN_CONTRAST:
        refused.append("shows (nearly) one flat colour")
    elif sharpness(image, resolution) < MIN_SHARPNESS:
        warned.append("looks blurred: no part of it has sharp detail")
    level = "refused" if refused else "warning" if warned else "ok"
    return Verdict(level, tuple(refused + warned))


def black_bars(image: Image.Image) -> float:
    """Returns the share of an RGB photo, in [0, 1], that lies in black bars along two opposite sides (0.0 where there are none).

    A bar is all but black (16 of 255 at most, on a grid of 64 x 64 averages) and at least 1/32 of the side deep.
    """
    grid = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).max(2)  # (64, 64)
    share = 0.0
    for lines in (grid.max(1), grid.max(0)):  # rows, then columns
        lit = np.flatnonzero(lines > 16)
        if len(lit) and min(lit[0], 63 - lit[-1]) >= 2:
            share = max(share, 1 - (lit[-1] + 1 - lit[0]) / 64)
    return float(share)


def sharpness(image: Image.Image, resolution: int) -> float:
    """Returns the detail that is lost at a quarter of the size, in the sharpest fiftieth of 256 tiles, relative to the photo's contrast.

    Measured at the training resolution (512 px at most, never enlarged), so that a soft but large photo counts as sharp. Above 0.2
    for ordinary photos, also with a blurred background; below 0.1 for photos that are out of focus or shaken everywhere.
    """
    side = max(64, min(resolution, 512, *image.size) // 16 * 16)
    grey = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    soft = grey.resize((side // 4, side // 4), Image.Resampling.BOX).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(grey, np.float32)
    lost = (pixels - np.asarray(soft, np.float32)) ** 2
    tiles = lost.reshape(16, side // 16, 16, side // 16).mean((1, 3)) ** 0.5  # (16, 16)
    return float(np.percentile(tiles, 98) / max(float(pixels.std()), 1.0))


def perceptual_hash(image: Image.Image) -> int:
    """Returns 256 bits (a difference hash, 16 x 16) that hardly change when a photo is resized, recompressed or slightly edited.

    `(a ^ b).bit_count()` of two photos at or under NEAR_DUPLICATE_BITS means that they are most likely the same shot.
    """
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")
