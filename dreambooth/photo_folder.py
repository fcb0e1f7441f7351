"""A folder of photos, read and judged completely before anything expensive starts."""

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dreambooth import photo_checks, photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.side_files import automatic_masks, caption_of, mask_beside, read_mask, without_masks

FEWEST = 3  # fewer photos than this: a warning

_SYSTEM_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_PHOTO_ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".jp2"),
    *(".heic", ".heif", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
}
_SIDE_ENDINGS = {".txt", ".caption", ".json", ".xmp", ".aae"}  # beside a photo of the same name: its caption or its edits


@dataclass(frozen=True)
class Photo:
    """One photo that can be trained on.

    Attributes:
        path: the file.
        name: its path inside the folder, with "/" and with unprintable letters escaped, for messages.
        sha256: of the file's bytes, in hex.
        width, height: of the upright photo in the file, in px.
        image: RGB, upright, its short side at most the resolution that the folder was read for. `photos.prepare` of it at that
            resolution is bit for bit `prepare` of the full photo, for every crop and flip.
        caption: the photo's own, as a template, from the file beside it or its name; None where it has none.
        mask: white where the subject is, mode L, of the size of `image`; None where there is none or none was asked for.
    """

    path: str
    name: str
    sha256: str
    width: int
    height: int
    image: Image.Image = field(repr=False, compare=False)
    caption: str | None = None
    mask: Image.Image | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class PhotoSet:
    """The photos of a folder in natural order (2 before 10), what was left out, and what a person should hear about it.

    Attributes:
        folder: as it was asked for.
        photos: at least one; each content once.
        skipped: (name, reason) of every photo that cannot be used.
        warnings: one line each; skipped photos, duplicates and stray files included.
        digest: hex sha256 over the photos' sorted sha256: the same for the same contents, whatever their names, order and dates.
    """

    folder: str
    photos: list[Photo] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(photo.sha256 for photo in self.photos)).encode()).hexdigest()


def read_photo_folder(
    folder: str,
    resolution: int,
    on_bad_photo: str = "skip",
    config_path: str = "data.subject_dir",
    recursive: bool = True,
    masks: str | None = None,
    square: bool = True,
) -> PhotoSet:
    """Returns the folder's photos, every one decoded to the last pixel and checked.

    What counts is the content, not the file's ending. Hidden files, system files (`Thumbs.db`, `__MACOSX`) and side files (the caption
    `dog.txt` and the mask `dog.mask.png` beside `dog.jpg`) are no photos and no strays; other files get one line for all. Memory: one full photo
    at a time, then 3 bytes x resolution x the fitted long side for each (about 1 MB at 512).

    Args:
        folder: path; `~` is the home folder. Links to files and folders are followed.
        resolution: side of the training square, in px.
        on_bad_photo: "skip" (into `skipped`, and a warning) or "refuse": what to do with a photo that is damaged, far too small,
            extremely long or blank.
        config_path: the config field that named the folder, for errors.
        recursive: read folders in the folder too.
        masks: None: no masks are read; "sidecar": the files beside the photos; "alpha": those, else the photo's own transparency; "auto":
            those, else made by `side_files.automatic_masks`.
        square: whether photos will be cropped to a square, for the verdicts on long ones.

    Raises:
        UserError: no such folder, no photo in it, none that can be used, a bad photo under "refuse", or masks that cannot be used.
    """
    policy_path = "data.on_bad_photo"  # one for all folders
    if on_bad_photo not in ("skip", "refuse"):
        raise ConfigError(policy_path, 'must be "skip" or "refuse"', on_bad_photo)
    root = _existing_folder(folder, config_path)
    found = PhotoSet(folder)
    candidates, stray, first_with = [], [], {}
    for path in without_masks(_files(root, recursive, config_path, found.warnings), _PHOTO_ENDINGS):
        name = shown(path.relative_to(root).as_posix())
        try:
            data = _photo_bytes(path, name)
            (stray if data is None else candidates).append(path)
            if data is None:
                continue
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in first_with:
                found.warnings.append(f"{name} is the same file as {first_with[sha256]}: counted once")
                continue
            photo, reasons = _read(data, path, name, sha256, resolution, square)
        except UserError as error:
            _skip_or_refuse(found, root, name, error, on_bad_photo, policy_path)
            continue
        first_with[sha256] = name
        found.photos.append(photo)
        found.warnings.extend(f"{name} {reason}" for reason in reasons)
    if not found.photos:
        raise _nothing_usable(found, stray, config_path)
    found.warnings.extend(_remarks(found, root, stray, candidates))
    found.photos[:] = [_with_caption(photo, found.warnings) for photo in found.photos]
    return _with_masks(found, masks, "data.masks") if masks else found


def shown(name: str) -> str:
    """Returns a file name for messages: as it is where every letter can be printed, else quoted with escapes (line breaks, odd bytes)."""
    return name if name.isprintable() else repr(name)


def natural_key(path: Path) -> tuple[list[list[str | int]], str]:
    """Returns the sort key that puts 2.jpg before 10.jpg, whatever the letters' case; equal names are ordered by their exact spelling."""
    parts = [re.split("([0-9]+)", part.casefold()) for part in path.parts]  # text, digits, text, ...
    return [[int(piece) if number % 2 else piece for number, piece in enumerate(part)] for part in parts], str(path)


def _existing_folder(folder: str, config_path: str) -> Path:
    """Returns the folder's path; UserError where there is none."""
    step = f"set {config_path}=path/to/folder with 3 to 30 photos of one subject"
    root = Path(folder).expanduser()
    if not folder or not root.exists():
        raise UserError(config_path, "must be an existing folder", folder, step)
    if not root.is_dir():
        raise UserError(config_path, "must be a folder, not a file", folder, step)
    return root


def _files(root: Path, recursive: bool, config_path: str, warnings: list[str]) -> list[Path]:
    """Returns the files that are neither hidden nor the system's, in natural order; a subfolder that cannot be opened becomes a warning."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise UserError(config_path, "must be a folder that can be opened", str(root), f"{error.strerror}: check its permissions")
        warnings.append(f"{shown(os.path.relpath(error.filename, root))} cannot be opened ({error.strerror}): its photos are missing here")

    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [name for name in subfolders if recursive and real not in visited and not _is_hidden(name)]
        if real not in visited:  # a link that leads back up would go round for ever
            files.extend(Path(folder, name) for name in names if not _is_hidden(name))
        visited.add(real)
    return sorted(files, key=lambda path: natural_key(path.relative_to(root)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _photo_bytes(path: Path, name: str) -> bytes | None:
    """Returns the bytes of a file that is, or claims to be, a photo; None for any other. UserError for a photo that cannot be read."""
    claims = path.suffix.lower() in _PHOTO_ENDINGS
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None  # a pipe or a device: reading it could wait for ever
        with path.open("rb") as file:
            head = file.read(32)
            return head + file.read() if claims or photos.image_format(head) else None
    except OSError as error:
        if not claims:
            return None
        step = "check where the link leads" if path.is_symlink() else "check the permissions of the file"
        raise UserError(name, f"must be readable ({error.strerror})", next_step=step) from None


def _read(data: bytes, path: Path, name: str, sha256: str, resolution: int, square: bool) -> tuple[Photo, tuple[str, ...]]:
    """Returns a decoded photo, its transparency as its mask, and the reasons for a second look; UserError if it cannot be used."""
    image, alpha = photos.decode_with_alpha(data, name)
    verdict = photo_checks.check(image, resolution, square)
    if not verdict.accepted:
        raise UserError(name, "; ".join(verdict.reasons), next_step="use another photo")
    kept = photos.fit_short_side(image, resolution) if min(image.size) > resolution else image
    mask = alpha.resize(kept.size, Image.Resampling.BILINEAR) if alpha is not None else None
    return Photo(str(path), name, sha256, *image.size, kept, mask=mask), verdict.reasons


def _with_caption(photo: Photo, warnings: list[str]) -> Photo:
    """Returns the photo with its own caption, where it has one; one that cannot be read becomes a warning."""
    try:
        return replace(photo, caption=caption_of(Path(photo.path)))
    except UserError as error:
        warnings.append(f"{error}: that caption is not used")
        return photo


def _with_masks(found: PhotoSet, masks: str, where: str) -> PhotoSet:
    """Returns the photos with the masks that were asked for; those that have none get a line.

    Raises:
        UserError: a mask that cannot be used, or none at all.
    """
    for k, photo in enumerate(found.photos):
        file = mask_beside(Path(photo.path))
        own = read_mask(file, (photo.width, photo.height)).resize(photo.image.size, Image.Resampling.BILINEAR) if file else None
        found.photos[k] = replace(photo, mask=own or (photo.mask if masks == "alpha" else None))
    bare = [k for k, photo in enumerate(found.photos) if photo.mask is None]
    if masks == "auto":
        for k, mask in zip(bare, automatic_masks([found.photos[k].image for k in bare]), strict=True):
            found.photos[k] = replace(found.photos[k], mask=mask)
    elif len(bare) == len(found.photos):
        kind = "a mask beside a photo (dog.mask.png beside dog.jpg)" + (" or a photo with transparency" if masks == "alpha" else "")
        raise UserError(where, f"must find {kind}", masks, f"set {where}=null to train without masks")
    elif bare:
        names = ", ".join(found.photos[k].name for k in bare[:3]) + (", ..." if len(bare) > 3 else "")
        found.warnings.append(f"no mask for {len(bare)} of {len(found.photos)} photos ({names}): all of them counts alike")
    return found


def _skip_or_refuse(found: PhotoSet, root: Path, name: str, error: UserError, on_bad_photo: str, policy_path: str) -> None:
    """Notes a bad photo as skipped, or raises with the way to skip it."""
    reason = str(error).removeprefix(f"{name} ")
    if on_bad_photo == "refuse":
        raise UserError(f"{shown(str(root))}/{name}", reason, next_step=f"or set {policy_path}=skip to train without it") from error
    found.skipped.append((name, reason))
    found.warnings.append(f"{name} is skipped: it {reason}")


def _nothing_usable(found: PhotoSet, stray: list[Path], config_path: str) -> UserError:
    """Returns the error for a folder without a usable photo: what was there instead."""
    if found.skipped:
        reasons = "; ".join(f"{name} {reason}" for name, reason in found.skipped[:3])
        step = f"skipped {len(found.skipped)}: {reasons}" + ("; ..." if len(found.skipped) > 3 else "")
    else:
        other = f" (what it holds is no photo, such as {shown(stray[0].name)})" if stray else ""
        step = f"put 3 to 30 photos of one subject there{other}"
    return UserError(config_path, "must be a folder with at least one photo that can be used", found.folder, step)


def _remarks(found: PhotoSet, root: Path, stray: list[Path], candidates: list[Path]) -> list[str]:
    """Returns the warnings about the folder as a whole: near duplicates, stray files, too few photos."""
    remarks = []
    hashes = [photo_checks.perceptual_hash(photo.image) for photo in found.photos]
    for later, photo in enumerate(found.photos):
        for earlier in range(later):
            if (hashes[later] ^ hashes[earlier]).bit_count() <= photo_checks.NEAR_DUPLICATE_BITS:
                remarks.append(f"{photo.name} is almost the same shot as {found.photos[earlier].name}: that view counts twice")
                break
    described = {path.with_suffix("") for path in candidates} | set(candidates)  # dog.txt or dog.jpg.txt beside dog.jpg
    stray = [path for path in stray if path.suffix.lower() not in _SIDE_ENDINGS or path.with_suffix("") not in described]
    if stray:
        names = ", ".join(shown(path.relative_to(root).as_posix()) for path in stray[:3])
        remarks.append(f"ignored what is no photo ({len(stray)}): {names}" + (", ..." if len(stray) > 3 else ""))
    if (count := len(found.photos)) < FEWEST:
        remarks.append(f"only {count} photo{'s' * (count > 1)}: 3 to 30, with varied views and backgrounds, teach the subject better")
    return remarks
