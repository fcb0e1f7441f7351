"""What lies beside a photo and belongs to it: its caption (`dog.txt`), and the mask of its subject (`dog.mask.png`, white is the subject)."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from dreambooth import captions, photos
from dreambooth.errors import ConfigError, UserError

MASKS = ("sidecar", "alpha", "auto")
ASPECT_TOLERANCE = 0.02  # a mask may be of another size than its photo, but not of another shape
_CAPTION_ENDINGS = (".txt", ".caption")
_MASK_ENDINGS = (".mask.png", "-mask.png")


def caption_of(path: Path) -> str | None:
    """Returns a photo's own caption: the text file beside it, else what its name says after an @; None where it has neither.

    Args:
        path: the photo, `dog.jpg`; `dog.txt`, `dog.jpg.txt` and the same with `.caption` are its captions. An empty file is none.

    Raises:
        UserError: a caption that is not UTF-8 text.
    """
    for beside in (path.with_suffix(ending) for ending in _CAPTION_ENDINGS):
        for file in (beside, path.with_name(path.name + beside.suffix)):
            if file.is_file() and not photos.image_format(file.read_bytes()[:32]):  # a photo's content counts, not its ending
                try:
                    found = captions.from_text(file.read_text(encoding="utf-8-sig"))
                except UnicodeDecodeError:
                    raise UserError(file.name, "must be UTF-8 text", next_step="save the caption again as UTF-8") from None
                if found:
                    return found
    return captions.from_file_name(path.stem)


def mask_beside(path: Path) -> Path | None:
    """Returns the file with the mask of a photo: `dog.mask.png` or `dog-mask.png` beside `dog.jpg`; None where there is none."""
    return next((file for ending in _MASK_ENDINGS if (file := path.with_name(path.stem + ending)).is_file()), None)


def without_masks(paths: list[Path], photo_endings: Iterable[str]) -> list[Path]:
    """Returns the files that are not the mask of another one of them; a photo that is merely called `my-mask.png` stays."""
    owners = {path.with_suffix("") for path in paths if path.suffix.lower() in photo_endings}
    return [path for path in paths if not any(path.name.endswith(end) and path.with_name(path.name[: -len(end)]) in owners for end in _MASK_ENDINGS)]


def read_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """Returns a mask in mode L at the size of its upright photo, white where the subject is.

    Args:
        file: any image; its brightness counts.
        size: (width, height) of the photo, px.

    Raises:
        UserError: it cannot be decoded, has another shape than its photo, or shows no subject.
    """
    mask = photos.decode(file.read_bytes(), file.name).convert("L")
    aspect = (mask.width / mask.height) / (size[0] / size[1])
    if not 1 - ASPECT_TOLERANCE < aspect < 1 + ASPECT_TOLERANCE:
        rule = f"must have the shape of its photo, {size[0]} x {size[1]} px upright"
        raise UserError(file.name, rule, f"{mask.width} x {mask.height}", "cut the mask from the upright photo")
    if mask.getextrema()[1] < 128:
        raise UserError(file.name, "must be white where the subject is", "a mask that is dark everywhere", "draw it again, or delete it")
    return mask


def require_mask_maker(where: str = "data.masks") -> None:
    """Refuses automatic masks without the library that makes them.

    Raises:
        ConfigError: `rembg` is not installed.
    """
    try:
        import rembg  # noqa: F401 (seconds to import: only when it is asked for)
    except ImportError:
        next_step = "pip install rembg[cpu], or put a mask beside each photo and set data.masks=sidecar"
        raise ConfigError(where, "must not be auto without the package rembg", "auto", next_step) from None


def automatic_masks(images: list[Image.Image]) -> list[Image.Image]:
    """Returns a mask of the most salient thing of each photo, mode L, by the library rembg (U2-Net).

    It is good for one thing before a background, and knows nothing of which thing is meant: look at `photos/masks/` of the run folder.
    Its network's weights are fetched when it is used for the first time.

    Raises:
        ConfigError: `rembg` is not installed.
    """
    require_mask_maker()
    from rembg import new_session, remove

    session = new_session()
    return [remove(image, session=session, only_mask=True).convert("L") for image in images]
