"""Image work without files: bytes -> upright sRGB photo -> training pixels, and pictures back for people.

Every function depends on its arguments alone. Numbers for a random crop come in as an argument, in [0, 1).
"""

import io
import struct
import warnings
import zlib
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.smart_crop import busiest_corner

Mode = Literal["center", "random", "smart"]
Size = int | tuple[int, int]  # px: the side of a square, or (width, height)

MAX_PIXELS = 120_000_000  # 360 MB as RGB; a 108 megapixel phone photo passes

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000")
_SAVE_AGAIN = "save it again as JPEG or PNG, or delete it"
# What PIL's decoders raise on damaged bytes.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, RuntimeError, struct.error, zlib.error)
_SIGNATURES = (  # (offset, bytes, format)
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"), (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"\0\0\0\x0cjP  ", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"ftypavi", "AVIF"), (4, b"ftyphe", "HEIC"), (4, b"ftypmif1", "HEIC"), (4, b"ftypmsf1", "HEIC"), (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"\xff\x0a", "JPEG XL"), (4, b"ftypcrx", "camera raw"), (0, b"FUJIFILMCCD-RAW", "camera raw"),
)  # fmt: skip


def image_format(head: bytes) -> str | None:
    """Returns the name of the image format that a file's first 32 bytes announce ("JPEG", "HEIC", ...), or None.

    Formats that this program cannot decode (HEIC, JPEG XL, Photoshop, camera raw) are named too, so that an error can name them.
    """
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name if name != "BMP" or head[6:10] == bytes(4) else None  # "BM" alone also begins ordinary text
    return None


def decode(data: bytes, name: str) -> Image.Image:
    """Returns the photo as an upright 8-bit sRGB image, decoded to the last pixel, without metadata.

    The EXIF orientation is applied. Transparency (alpha, palette or key colour) is laid on white. 16-bit grey is scaled (65535 -> 255,
    rounded); of 16-bit colour the upper byte is kept. An ICC profile is converted to sRGB; a broken one, or one for another kind of
    image, is ignored. CMYK without a profile is converted by PIL's plain formula. Of a multi-page TIFF or MPO the first picture counts.

    Args:
        data: the file's bytes: JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF or JPEG 2000, told by content and not by the name.
        name: how errors call the photo.

    Raises:
        UserError: not a picture, damaged or cut off, an animation, camera raw, more than MAX_PIXELS, or a pixel type without a known scale.
    """
    return decode_with_alpha(data, name)[0]


def decode_with_alpha(data: bytes, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Returns the photo as `decode` does, and its transparency (mode L, 255 is opaque), or None where it has none or none that shows."""
    image = _load(data, name)
    profile = image.info.get("icc_profile")
    colour, alpha = _eight_bit(image, name)
    rgb = _to_srgb(colour, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    rgb.info = {}  # the profile and the orientation no longer describe these pixels
    return rgb, alpha if alpha is not None and alpha.getextrema()[0] < 255 else None


def _load(data: bytes, name: str) -> Image.Image:
    """Returns the upright image with all pixels in memory, in the file's own pixel type."""
    found = image_format(data[:32])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's size warning (our limit is below) and remarks on odd metadata
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _refuse_unusable(image, name)
            image.load()
            return _upright(image)
    except Image.DecompressionBombError:
        raise UserError(name, f"must have at most {MAX_PIXELS:,} pixels", next_step="save it smaller: 4000 px a side is plenty") from None
    except Image.UnidentifiedImageError:
        if not data:
            raise UserError(name, "must be a photo, but the file is empty (0 bytes)", next_step="copy it again, or delete it") from None
        if found in ("HEIC", "JPEG XL", "Photoshop", "camera raw"):
            step = f"{found} cannot be read here: export it as JPEG"
            if found == "HEIC":
                step += " (macOS: Preview, File > Export; Linux: heif-convert in.heic out.jpg; iPhone: Camera > Formats > Most Compatible)"
            raise UserError(name, "must be JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF", found, step) from None
        got = f"a damaged {found} header" if found else "no known image format"
        raise UserError(name, "must be a photo that can be decoded", got, _SAVE_AGAIN) from None
    except _DAMAGED as error:
        raise UserError(name, "must be a photo that decodes completely", str(error), _SAVE_AGAIN) from error


def _upright(image: Image.Image) -> Image.Image:
    """Returns the picture turned as its EXIF orientation says; as it is, where the EXIF block is missing or unreadable."""
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED:
        return image


def _refuse_unusable(image: Image.Image, name: str) -> None:
    """Raises UserError for what the header alone rules out: too many pixels, an animation, the preview of a camera raw file."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UserError(name, f"must have at most {MAX_PIXELS:,} pixels", f"{pixels:,}", "save it smaller: 4000 px a side is plenty")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("GIF", "WEBP", "PNG", "AVIF"):
        raise UserError(name, "must be one picture", f"an animation of {frames} frames", "save the frame that you want as JPEG or PNG")
    if image.format == "TIFF" and (50706 in image.tag_v2 or int(image.tag_v2.get(254, 0)) & 1):  # DNGVersion, reduced-size page
        raise UserError(name, "must be a developed photo", "camera raw, of which only a small preview can be read", "export it as JPEG")


def _eight_bit(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Returns the colours (mode L, RGB or CMYK) and, if there is transparency, the alpha channel (mode L, 255 is opaque)."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)  # (H, W)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)), None
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.has_transparency_data:
        kind = "L" if image.mode in ("1", "L", "LA") else "RGB"
        image = image.convert(kind + "A")
        return image.convert(kind), image.getchannel("A")
    kind = {"1": "L", "L": "L", "CMYK": "CMYK", "P": "RGB", "RGB": "RGB", "RGBX": "RGB", "YCbCr": "RGB"}.get(image.mode)
    if kind is None:
        raise UserError(name, "must have 8 or 16 bits a channel in grey, RGB or CMYK", f"PIL mode {image.mode}", "save it as 8-bit PNG")
    return image.convert(kind), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns the image in RGB, through its ICC profile where there is a usable one."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
            pass  # broken, or made for another colour model
    return image.convert("RGB")


def crop_box(width: int, height: int, size: Size, mode: Mode = "center", u: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int, int, int]:
    """Returns the (left, top, right, bottom) of a rectangle of a given size inside a picture, in whole px.

    Args:
        width, height: of the picture; both at least those of `size`.
        size: of the rectangle.
        mode: "center" (an odd pixel goes to the right and bottom; `u` is not used), or "random": every position equally likely.
        u: two numbers in [0, 1), for left and top.

    Raises:
        ValueError: the rectangle does not fit, an unknown mode ("smart" needs the pixels: see `frame`), or a number outside [0, 1).
    """
    wide, high = sides(size)
    if width < wide or height < high:
        raise ValueError(f"crop of {wide} x {high} px must fit the picture, got {width} x {height}")
    if mode not in ("center", "random"):
        raise ValueError(f'crop must be "center" or "random", got {mode!r}')
    if not all(0 <= number < 1 for number in u):
        raise ValueError(f"u must be two numbers in [0, 1), got {u}")
    slack = (width - wide, height - high)
    left, top = (s // 2 if mode == "center" else int(x * (s + 1)) for s, x in zip(slack, u, strict=True))
    return left, top, left + wide, top + high


def sides(size: Size) -> tuple[int, int]:
    """Returns (width, height) of a size in px."""
    return (size, size) if isinstance(size, int) else size


def scaled_to_cover(width: int, height: int, size: Size) -> tuple[int, int]:
    """Returns (width, height) of a picture scaled so that it just covers `size`: proportions kept, one side exact, the other no smaller."""
    wide, high = sides(size)
    scale = max(wide / width, high / height)
    return max(wide, round(width * scale)), max(high, round(height * scale))


def fit_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Returns the picture with a short side of exactly `resolution` px: proportions kept, Lanczos with antialiasing.

    A picture that has that short side already comes back as it is, so `prepare` of the result is bit for bit `prepare` of the original.
    """
    return _scaled(image, scaled_to_cover(*image.size, resolution), Image.Resampling.LANCZOS)


class Frame(NamedTuple):
    """How a picture becomes training pixels: the size that it is scaled to, then the box that is cut out, both in px."""

    scaled: tuple[int, int]  # (width, height)
    box: tuple[int, int, int, int]  # left, top, right, bottom


def frame(image: Image.Image, size: Size, crop: Mode = "center", u: tuple[float, float] = (0.5, 0.5)) -> Frame:
    """Returns how a picture fills a size: scaled until it covers it, never squashed, and cropped. Its mask is cut by the same frame.

    Args:
        image: RGB, of any size; only "smart" looks at its pixels.
        size: what training sees.
        crop: "center", "random" at the place that `u` says, or "smart": the window with the most detail (see `smart_crop`).
        u: two numbers in [0, 1), see `crop_box`.
    """
    scaled = scaled_to_cover(*image.size, size)
    if crop != "smart":
        return Frame(scaled, crop_box(*scaled, size, crop, u))
    wide, high = sides(size)
    if scaled == (wide, high):
        return Frame(scaled, (0, 0, wide, high))
    left, top = busiest_corner(np.asarray(_scaled(image, scaled, Image.Resampling.LANCZOS).convert("L")), wide, high)
    return Frame(scaled, (left, top, left + wide, top + high))


def cut(image: Image.Image, frame: Frame, flip: bool = False) -> np.ndarray:
    """Returns the pixels of a picture, uint8 (H, W, 3), or of a mask, (H, W), in a frame.

    Args:
        image: RGB, or a mask in mode L; of any size with the proportions that the frame was made for.
        frame: from `frame`.
        flip: mirror left and right, after the crop.
    """
    smooth = Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BILINEAR  # a mask must not ring past its edge
    pixels = np.asarray(_scaled(image, frame.scaled, smooth).crop(frame.box))  # (H, W) or (H, W, 3)
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def _scaled(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resampling)


def prepare(image: Image.Image, size: Size, crop: Mode = "center", flip: bool = False, u: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Returns what training sees of a picture, uint8 (H, W, 3): scaled until it covers the size, cropped, never squashed.

    Args:
        image: RGB, of any size.
        size: px, the side of a square or (width, height).
        crop: "center", "random" at the place that `u` says, or "smart".
        flip: mirror left and right, after the crop.
        u: two numbers in [0, 1), see `crop_box`.
    """
    return cut(image, frame(image, size, crop, u), flip)


def to_pixel_values(pixels: np.ndarray) -> Tensor:
    """Returns float32 pixel values (..., 3, H, W) in [-1, 1] of uint8 pixels (..., H, W, 3): 0 -> -1, 255 -> 1.

    Raises:
        ValueError: not uint8, or not three channels at the end.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels must be uint8 (..., H, W, 3), got {pixels.dtype} {pixels.shape}")
    return torch.from_numpy(np.moveaxis(pixels, -1, -3).astype(np.float32) / 127.5 - 1)


def to_uint8(pixel_values: Tensor) -> np.ndarray:
    """Returns uint8 pixels (..., H, W, 3) of pixel values (..., 3, H, W): clamped to [-1, 1], rounded to the nearest level.

    The exact inverse of `to_pixel_values` in float32. Any float type and device; no gradient is kept.

    Raises:
        ValueError: a NaN or an infinity (it would come out as a black or white picture), or not three channels.
    """
    if pixel_values.ndim < 3 or pixel_values.shape[-3] != 3:
        raise ValueError(f"pixel_values must be (..., 3, H, W), got {tuple(pixel_values.shape)}")
    values = pixel_values.detach().float().cpu()
    if not values.isfinite().all():
        raise ValueError("pixel_values must be finite, got NaN or infinity; the model or the VAE overflowed (try float32)")
    levels = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()
