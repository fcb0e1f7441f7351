"""Feature extractors for the scores, as typed choices of the config: images and prompts in, unit vectors out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dreambooth.errors import ConfigError, UserError
from dreambooth.files import sha256_of

if TYPE_CHECKING:
    from dreambooth.clip_dino import Dino
    from dreambooth.perceptual import Lpips

T = TypeVar("T")
Pixels = NDArray[np.uint8]  # (H, W, 3)
BLANK: Pixels = np.zeros((32, 32, 3), np.uint8)  # encoded in place of no image at all, to learn the width of the features
Images = Tensor | Pixels | Sequence[Tensor | Pixels]  # uint8: (N, H, W, 3), or N images of any sizes

FileGroups = tuple[tuple[str, ...], ...]  # one file of each group is needed
LAB_FILES: FileGroups = (("identity.safetensors",), ("image.safetensors",), ("text.safetensors",))


class Patches(NamedTuple):
    """What the identity network sees, place by place."""

    tokens: Tensor  # (N, P, C) float32, of any length; row by row from the upper left
    grid: tuple[int, int]  # rows and columns: P = rows * columns


class LoadedEncoders(ABC):
    """Networks in memory that turn images and prompts into unit vectors; the cosine of two is their dot product.

    Attributes:
        version: the evaluator, in words, to be written beside every score: networks, layer, pooling, preprocessing, hash of the weights.
            Scores of different versions are not comparable.
        device: where the networks are; features always come back on the CPU, in float32.
        perceptual: LPIPS, or None when the config names no weights for it.
        dinov2: a second identity network, or None when the config names none.
    """

    version: str
    device: torch.device
    perceptual: "Lpips | None" = None
    dinov2: "Dino | None" = None

    def identity(self, images: Images, batch_size: int = 32) -> Tensor:
        """Returns features that tell one individual from another, (N, D) float32 of length 1.

        Args:
            images: uint8 RGB, (N, H, W, 3), or a sequence of N images (H, W, 3) of any sizes.
            batch_size: images in one forward pass; changes memory, not results.

        Raises:
            ValueError: the images are not uint8 RGB.
        """
        features = self._in_batches(lambda batch: (self._identity_with_patches(batch)[0],), _pixels(images), BLANK, batch_size)[0]
        return F.normalize(features, dim=-1)

    def identity_dinov2(self, images: Images, batch_size: int = 32) -> Tensor:
        """Returns what `identity` does by the second network, (N, F) float32 of length 1; only where `dinov2` is not None."""
        features = self._in_batches(lambda batch: (self.dinov2.tokens(batch)[0],), _pixels(images), BLANK, batch_size)[0]
        return F.normalize(features, dim=-1)

    def patches(self, images: Images, batch_size: int = 32) -> Patches:
        """Returns the patch tokens behind `identity`: those of its last layer, after its final norm; arguments as `identity`.

        DINO and DINOv2: the tokens other than the class token. Lab: the last feature map before pooling.
        """
        shape: list[torch.Size] = []

        def keep(maps: list[Pixels]) -> tuple[Tensor, ...]:
            tokens = self._identity_with_patches(maps)[1]  # (n, h, w, C)
            shape.append(tokens.shape)
            return (tokens.flatten(1, 2),)

        tokens = self._in_batches(keep, _pixels(images), BLANK, batch_size)[0]
        return Patches(tokens, (shape[0][1], shape[0][2]))

    def identity_with_patches(self, images: Images, reduce: Callable[[Tensor], Tensor], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Returns identity features and what `reduce` makes of the patch tokens, from one forward pass.

        Args:
            images: as for `identity`.
            reduce: patch tokens of a batch on the CPU, (n, P, C) float32 -> (n, ...). The tokens of 3000 images would fill a GB; what is
                made of them need not.
            batch_size: images in one forward pass.

        Returns:
            (N, D) float32 of length 1, and (N, ...).
        """

        def encode(batch: list[Pixels]) -> tuple[Tensor, ...]:
            identity, tokens = self._identity_with_patches(batch)  # (n, D), (n, h, w, C)
            return identity, reduce(tokens.flatten(1, 2).float().cpu())

        identity, reduced = self._in_batches(encode, _pixels(images), BLANK, batch_size)
        return F.normalize(identity, dim=-1), reduced

    def patch_shares(self, masks: NDArray[np.floating] | Sequence[NDArray[np.floating]]) -> Tensor:
        """Returns the share of each patch that a mask covers, (N, P) in [0, 1]; the mask is resized and cropped exactly as its image is.

        Args:
            masks: N masks (H, W) in [0, 1], each of the size of its image.

        Raises:
            ValueError: a mask has another number of dimensions or other values.
        """
        arrays = [np.asarray(mask, np.float32) for mask in masks]
        for mask in arrays:
            if mask.ndim != 2 or not (mask.min() >= 0 and mask.max() <= 1):  # so written, a NaN is refused as well
                raise ValueError(f"masks must be (height, width) in [0, 1], got shape {mask.shape}, {mask.min()} to {mask.max()}")
        return torch.stack([self._patch_shares(mask).flatten() for mask in arrays])

    def image(self, images: Images, batch_size: int = 32) -> Tensor:
        """Returns features of images in the space that they share with `text`, (N, E) float32 of length 1; arguments as `identity`."""
        features = self._in_batches(lambda batch: (self._image(batch),), _pixels(images), BLANK, batch_size)[0]
        return F.normalize(features, dim=-1)

    def text(self, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Returns features of prompts in the space that they share with `image`, (N, E) float32 of length 1.

        Args:
            prompts: N texts.
            batch_size: prompts in one forward pass.

        Raises:
            ValueError: one string instead of a list of strings.
            UserError: a prompt is longer than the network can read.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got the text {prompts!r}")
        features = self._in_batches(lambda batch: (self._text(batch),), list(prompts), "", batch_size)[0]
        return F.normalize(features, dim=-1)

    @abstractmethod
    def _identity_with_patches(self, images: list[Pixels]) -> tuple[Tensor, Tensor]: ...  # one batch, (N, D) and (N, h, w, C), of any length

    @abstractmethod
    def _patch_shares(self, mask: NDArray[np.float32]) -> Tensor: ...  # (H, W) -> (h, w)

    @abstractmethod
    def _image(self, images: list[Pixels]) -> Tensor: ...  # (N, E)

    @abstractmethod
    def _text(self, prompts: list[str]) -> Tensor: ...  # (N, E)

    def _in_batches(self, encode: Callable[[list[T]], tuple[Tensor, ...]], items: list[T], blank: T, batch_size: int) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # a score does not depend on the training's precision
            starts = range(0, len(items), batch_size)
            batches = [tuple(part.float().cpu() for part in encode(items[start : start + batch_size])) for start in starts]
            batches = batches or [tuple(part[:0].float().cpu() for part in encode([blank]))]
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


@dataclass(slots=True)
class Encoders:
    """Parent of the choices of feature extractors."""

    name: str = "encoders"
    lpips_backbone: str | None = None  # file of torchvision's AlexNet weights (.pth or .safetensors), for LPIPS; null: no LPIPS

    def missing(self) -> str | None:
        """Returns one sentence that says which weights this machine lacks and what to do, or None; quick, and never asks the network."""
        try:
            self.check()
        except ConfigError as problem:
            return str(problem)
        return None

    def check(self) -> None:
        """Raises ConfigError if this machine lacks weights; looks at names of files only."""
        if self.lpips_backbone is not None and not Path(self.lpips_backbone).expanduser().is_file():
            rule, next_step = "must be the file of torchvision's AlexNet weights", "correct the path, or set it to null to do without LPIPS"
            raise ConfigError("encoders.lpips_backbone", rule, self.lpips_backbone, next_step)

    def load_or_reason(self, device: str | torch.device = "cpu") -> tuple[LoadedEncoders | None, str | None]:
        """Returns the networks, or else the sentence that says why there are none: a run without scores still has its pictures."""
        try:
            return self.load(device), None
        except UserError as problem:
            return None, str(problem)

    def load(self, device: str | torch.device = "cpu") -> LoadedEncoders:
        """Returns the networks, ready to encode on the device; the network is asked for what this machine lacks, unless it is offline.

        Raises:
            UserError: the weights cannot be had, or are not of this kind.
        """
        Encoders.check(self)  # the small file first: the large ones may take a download
        loaded = self._load(device)
        if self.lpips_backbone is None:
            loaded.version += "; diversity by 1 - MS-SSIM, no LPIPS weights"
            return loaded
        from dreambooth.perceptual import Lpips

        loaded.perceptual = Lpips.load(Path(self.lpips_backbone).expanduser(), device)
        loaded.version += f"; {loaded.perceptual.version}"
        return loaded

    def _load(self, device: str | torch.device) -> LoadedEncoders:
        raise NotImplementedError


@dataclass(slots=True)
class LabEncoders(Encoders):
    """The lab's own scorers, trained on the procedural world: for `base=lab` only."""

    name: str = "lab"
    folder: str | None = None  # of the scorers' weights; null: the ones shipped with the package

    def check(self) -> None:
        """Raises ConfigError if a file of the scorers is not there."""
        Encoders.check(self)  # no super() in a dataclass with slots
        require_files("encoders.folder", self._weights(), LAB_FILES, "set it to null for the shipped scorers")

    def _load(self, device: str | torch.device) -> LoadedEncoders:
        from dreambooth.lab.scorers import LabScorers

        self.check()
        folder = self._weights()
        version = f"lab: scorers; patches = the identity network's last map; sha256 {sha256_of(folder / name for (name,) in LAB_FILES)}"
        return LoadedLab(LabScorers.load(folder).to(device), torch.device(device), version)

    def _weights(self) -> Path:
        from dreambooth.lab.paths import SCORERS_FOLDER

        return SCORERS_FOLDER if self.folder is None else Path(self.folder).expanduser()


class LoadedLab(LoadedEncoders):
    """The lab's scorers behind the interface that all encoders share.

    Args:
        scorers: has image(x) of x (N, 3, H, W) in [-1, 1] and text(list of N texts), each giving (N, D); identity_with_patches(x) giving
            (N, D) and (N, h, w, C); patch_shares(masks (N, H, W)) giving (N, h, w).
        device: where to compute.
        version: the evaluator in words.
    """

    def __init__(self, scorers: Any, device: torch.device, version: str) -> None:
        self.device, self.version = device, version
        self.scorers = scorers

    def _identity_with_patches(self, images: list[Pixels]) -> tuple[Tensor, Tensor]:
        parts = [self.scorers.identity_with_patches(x) for x in self._same_sizes(images)]
        return torch.cat([identity for identity, _ in parts]), torch.cat([tokens for _, tokens in parts])

    def _patch_shares(self, mask: NDArray[np.float32]) -> Tensor:
        return self.scorers.patch_shares(torch.from_numpy(mask)[None])[0]

    def _image(self, images: list[Pixels]) -> Tensor:
        return torch.cat([self.scorers.image(x) for x in self._same_sizes(images)])

    def _text(self, prompts: list[str]) -> Tensor:
        return self.scorers.text(prompts)

    def _same_sizes(self, images: list[Pixels]) -> Iterable[Tensor]:
        for _, group in groupby(images, key=lambda image: image.shape):
            x = torch.from_numpy(np.stack(list(group))).to(self.device)  # (n, H, W, 3)
            yield x.permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, H, W) in [-1, 1]


@dataclass(slots=True)
class ClipDino(Encoders):
    """The paper's extractors: DINO ViT-S/16 for identity, CLIP ViT-B/32 for images against prompts."""

    name: str = "clip_dino"
    clip_path: str = "openai/clip-vit-base-patch32"  # folder or Hugging Face id of a CLIP model
    dino_path: str = "facebook/dino-vits16"  # folder or Hugging Face id of a DINO (ViT) or DINOv2 model
    dinov2_path: str | None = None  # folder or Hugging Face id of a DINOv2 beside it, such as facebook/dinov2-small; null: no DINOv2 score

    def check(self) -> None:
        """Raises ConfigError if a model is neither in its folder nor in the Hugging Face cache."""
        Encoders.check(self)
        from dreambooth.clip_dino import CLIP_FILES, DINO_FILES, find

        find("encoders.clip_path", self.clip_path, CLIP_FILES)
        find("encoders.dino_path", self.dino_path, DINO_FILES)
        if self.dinov2_path is not None:
            find("encoders.dinov2_path", self.dinov2_path, DINO_FILES)

    def _load(self, device: str | torch.device) -> LoadedEncoders:
        from dreambooth.clip_dino import CLIP_FILES, DINO_FILES, LoadedClipDino, obtain

        clip = obtain("encoders.clip_path", self.clip_path, CLIP_FILES)
        dino = obtain("encoders.dino_path", self.dino_path, DINO_FILES)
        dinov2 = obtain("encoders.dinov2_path", self.dinov2_path, DINO_FILES) if self.dinov2_path is not None else None
        return LoadedClipDino(clip, dino, torch.device(device), dinov2)


def _pixels(images: Images) -> list[Pixels]:
    """Returns the images as a list of arrays (H, W, 3), each checked."""
    arrays = [np.asarray(image.cpu() if isinstance(image, Tensor) else image) for image in images]
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"images must be uint8 of shape (height, width, 3), got {array.dtype} of shape {array.shape}")
    return arrays


def require_files(where: str, folder: Path, files: FileGroups, next_step: str) -> None:
    """Raises ConfigError unless the folder holds one file of each group."""
    for group in files:
        if not any((folder / name).is_file() for name in group):
            raise ConfigError(where, f"must be a folder with {' or '.join(group)}", str(folder), next_step)
