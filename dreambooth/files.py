"""Writing files so that nothing is lost (to a temporary name beside the target, flushed, then renamed over it), and telling them by their hash."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dreambooth.errors import UserError


def write_with(path: Path, write: Callable[[Path], None]) -> Path:
    """Calls `write` on a temporary sibling and renames it to `path`; after any failure `path` is as it was.

    Args:
        path: the final name; its folder is made when missing.
        write: writes the whole content to the path it is given.

    Raises:
        OSError: as `write` raised it (a full disk, say); the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own; safetensors would leave the file for its owner's eyes alone
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes a UTF-8 text whole or not at all."""
    return write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Writes indented JSON whole or not at all; NaN and infinity become null, as JSON knows neither."""
    return write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Writes a safetensors file with text metadata whole or not at all."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return write_with(path, lambda temporary: save_file(contiguous, temporary, metadata))


def write_png(path: Path, picture: Image.Image, text: PngInfo | None = None) -> Path:
    """Writes a picture as PNG, with text chunks if there are any, whole or not at all."""
    return write_with(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=text))


def require_free(folder: Path, needed_bytes: int, where: str, purpose: str = "checkpoints") -> None:
    """Refuses a job that the disk has no room for, before it starts.

    Args:
        folder: an existing folder on the disk that will be written to.
        needed_bytes: what the job will write at most.
        where: the config path that can name another place.
        purpose: what the room is for, in the message.

    Raises:
        UserError: when less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            where,
            f"must be on a disk with {needed_bytes / 1e9:.2f} GB free for {purpose}",
            f"{free / 1e9:.2f} GB",
            f"free some space, or set {where} to another disk",
        )


def sha256_of(paths: Iterable[Path]) -> str:
    """Returns the first 12 digits of the hash of files, one after the other; `cat FILES | sha256sum` shows the same."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:12]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
