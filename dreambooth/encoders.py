"""Feature extractors for the scores, as typed choices of the config: images and prompts in, unit vectors out."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dreambooth.errors import ConfigError, UserError

T = TypeVar("T")
Pixels = NDArray[np.uint8]  # (H, W, 3)
BLANK: Pixels = np.zeros((32, 32, 3), np.uint8)  # encoded in place of no image at all, to learn the width of the features
Images = Tensor | Pixels | Sequence[Tensor | Pixels]  # uint8: (N, H, W, 3), or N images of any sizes

FileGroups = tuple[tuple[str, ...], ...]  # one file of each group is needed
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers takes the first that is there
DINO_FILES: FileGroups = (("config.json",), WEIGHTS)
CLIP_FILES: FileGroups = (*DINO_FILES, ("tokenizer.json", "merges.txt"))
LAB_FILES: FileGroups = (("identity.safetensors",), ("image.safetensors",), ("text.safetensors",))


class Preprocessing(NamedTuple):
    """How a network wants its images: short side resized, centre cropped, scaled to [0, 1], mean and spread per channel."""

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def words(self) -> str:
        """The geometry, for a version string."""
        return f"resize {self.resize_px} bicubic, crop {self.crop_px}"

    def __call__(self, image: Pixels) -> Tensor:
        """Returns an image (H, W, 3) uint8 as (3, crop_px, crop_px) float32.

        The numbers are those of torchvision's Resize(bicubic, antialias), CenterCrop, ToTensor and Normalize on a PIL image,
        which the published scores were made with; Hugging Face's processors differ (by a pixel of crop, or by no crop at all).
        """
        height, width = image.shape[:2]
        short = min(height, width)
        size = (int(self.resize_px * width / short), int(self.resize_px * height / short))
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - self.crop_px) / 2), round((size[1] - self.crop_px) / 2)
        cropped = np.array(resized.crop((left, top, left + self.crop_px, top + self.crop_px)))
        x = torch.from_numpy(cropped).permute(2, 0, 1).float() / 255  # (crop, crop, 3) -> (3, crop, crop)
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def clip_preprocessing(image_size: int) -> Preprocessing:
    """Returns the preprocessing that OpenAI's CLIP was trained with, for its input size in pixels (B/32: 224)."""
    return Preprocessing(image_size, image_size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def dino_preprocessing(crop_px: int) -> Preprocessing:
    """Returns DINO's evaluation preprocessing (Caron et al. 2021): short side 256, crop 224, or that ratio for another crop."""
    return Preprocessing(round(crop_px * 256 / 224), crop_px, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LoadedEncoders(ABC):
    """Networks in memory that turn images and prompts into unit vectors; the cosine of two is their dot product.

    Attributes:
        version: the evaluator, in words, to be written beside every score: networks, layer, pooling, preprocessing, hash of the weights.
            Scores of different versions are not comparable.
        device: where the networks are; features always come back on the CPU, in float32.
    """

    version: str
    device: torch.device

    def identity(self, images: Images, batch_size: int = 32) -> Tensor:
        """Returns features that tell one individual from another, (N, D) float32 of length 1.

        Args:
            images: uint8 RGB, (N, H, W, 3), or a sequence of N images (H, W, 3) of any sizes.
            batch_size: images in one forward pass; changes memory, not results.

        Raises:
            ValueError: the images are not uint8 RGB.
        """
        return self._in_batches(self._identity, _pixels(images), BLANK, batch_size)

    def image(self, images: Images, batch_size: int = 32) -> Tensor:
        """Returns features of images in the space that they share with `text`, (N, E) float32 of length 1; arguments as `identity`."""
        return self._in_batches(self._image, _pixels(images), BLANK, batch_size)

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
        return self._in_batches(self._text, list(prompts), "", batch_size)

    @abstractmethod
    def _identity(self, images: list[Pixels]) -> Tensor: ...  # one batch, (N, D), not yet of length 1

    @abstractmethod
    def _image(self, images: list[Pixels]) -> Tensor: ...  # (N, E)

    @abstractmethod
    def _text(self, prompts: list[str]) -> Tensor: ...  # (N, E)

    def _in_batches(self, encode: Callable[[list[T]], Tensor], items: list[T], blank: T, batch_size: int) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # a score does not depend on the training's precision
            batches = [encode(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
            features = torch.cat(batches or [encode([blank])[:0]])  # (N, D)
        return F.normalize(features.float(), dim=-1).cpu()


@dataclass(slots=True)
class Encoders:
    """Parent of the choices of feature extractors."""

    name: str = "encoders"

    def missing(self) -> str | None:
        """Returns one sentence that says which weights this machine lacks and what to do, or None; quick, and never asks the network."""
        try:
            self.check()
        except ConfigError as problem:
            return str(problem)
        return None

    def check(self) -> None:
        """Raises ConfigError if this machine lacks weights; looks at names of files only."""
        raise NotImplementedError

    def load(self, device: str | torch.device = "cpu") -> LoadedEncoders:
        """Returns the networks, ready to encode on the device.

        Raises:
            UserError: the weights cannot be had, or are not of this kind.
        """
        raise NotImplementedError


@dataclass(slots=True)
class LabEncoders(Encoders):
    """The lab's own scorers, trained on the procedural world: for `base=lab` only."""

    name: str = "lab"
    folder: str | None = None  # of the scorers' weights; null: the ones shipped with the package

    def check(self) -> None:
        """Raises ConfigError if a file of the scorers is not there."""
        _require_files("encoders.folder", self._weights(), LAB_FILES, "set it to null for the shipped scorers")

    def load(self, device: str | torch.device = "cpu") -> LoadedEncoders:
        """Returns the scorers, ready to encode on the device."""
        from dreambooth.lab.scorers import LabScorers

        self.check()
        folder = self._weights()
        version = f"lab: scorers, sha256 {_sha256(folder / name for (name,) in LAB_FILES)}"
        return LoadedLab(LabScorers.load(folder).to(device), torch.device(device), version)

    def _weights(self) -> Path:
        from dreambooth.lab.paths import SCORERS_FOLDER

        return SCORERS_FOLDER if self.folder is None else Path(self.folder).expanduser()


class LoadedLab(LoadedEncoders):
    """The lab's scorers behind the interface that all encoders share.

    Args:
        scorers: has identity(x) and image(x) of x (N, 3, H, W) in [-1, 1], and text(list of N texts), each giving (N, D).
        device: where to compute.
        version: the evaluator in words.
    """

    def __init__(self, scorers: Any, device: torch.device, version: str) -> None:
        self.device, self.version = device, version
        self.scorers = scorers

    def _identity(self, images: list[Pixels]) -> Tensor:
        return torch.cat([self.scorers.identity(x) for x in self._same_sizes(images)])

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

    def check(self) -> None:
        """Raises ConfigError if a model is neither in its folder nor in the Hugging Face cache."""
        _find("encoders.clip_path", self.clip_path, CLIP_FILES)
        _find("encoders.dino_path", self.dino_path, DINO_FILES)

    def load(self, device: str | torch.device = "cpu") -> LoadedEncoders:
        """Returns the networks; weights that are not on this machine are downloaded if Hugging Face can be reached."""
        clip = _obtain("encoders.clip_path", self.clip_path, CLIP_FILES)
        dino = _obtain("encoders.dino_path", self.dino_path, DINO_FILES)
        return LoadedClipDino(clip, dino, torch.device(device))


class LoadedClipDino(LoadedEncoders):
    """CLIP's image and text projections, and the class token of DINO (or DINOv2) after its final layer norm.

    Args:
        clip_folder: a CLIPModel and its tokenizer, as transformers saves them.
        dino_folder: a ViTModel or Dinov2Model.
        device: where to compute.

    Source: Ruiz et al. 2023, sec. 4.1; which token, crop and sizes: google/dreambooth issue 3.
    """

    def __init__(self, clip_folder: Path, dino_folder: Path, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel

        self.device = device
        self.clip = _network("encoders.clip_path", clip_folder, {"clip": (CLIPModel, {})}).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(clip_folder, local_files_only=True)
        backbones = {"vit": (ViTModel, {"add_pooling_layer": False}), "dinov2": (Dinov2Model, {})}  # ViT's own pooler is random
        self.dino = _network("encoders.dino_path", dino_folder, backbones).to(device)
        self.clip_preprocessing = clip_preprocessing(self.clip.config.vision_config.image_size)
        self.dino_preprocessing = dino_preprocessing(_dino_crop_px(self.dino.config))
        self.version = self._describe(_sha256([_weights_file(clip_folder)]), _sha256([_weights_file(dino_folder)]))

    def _identity(self, images: list[Pixels]) -> Tensor:
        x = torch.stack([self.dino_preprocessing(image) for image in images]).to(self.device)  # (N, 3, crop, crop)
        return self.dino(pixel_values=x).last_hidden_state[:, 0]  # (N, 1 + patches, D) -> (N, D)

    def _image(self, images: list[Pixels]) -> Tensor:
        x = torch.stack([self.clip_preprocessing(image) for image in images]).to(self.device)  # (N, 3, crop, crop)
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output)  # (N, E)

    def _text(self, prompts: list[str]) -> Tensor:
        limit = self.clip.config.text_config.max_position_embeddings
        for prompt, ids in zip(prompts, self.tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > limit:
                raise UserError(f"the prompt {prompt!r}", f"must fit into CLIP's {limit} tokens", len(ids), "shorten it")
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.device)
        pooled = self.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return self.clip.text_projection(pooled)  # (N, E)

    def _describe(self, clip_sha256: str, dino_sha256: str) -> str:
        clip, dino = self.clip.config, self.dino.config
        return (
            f"clip_dino: identity = {dino.model_type} patch {dino.patch_size}, class token after the final norm, {dino.hidden_size}-d, "
            f"{self.dino_preprocessing.words}, ImageNet mean and std, sha256 {dino_sha256}; "
            f"image and text = clip patch {clip.vision_config.patch_size}, projections, {clip.projection_dim}-d, "
            f"{self.clip_preprocessing.words}, CLIP mean and std, sha256 {clip_sha256}"
        )


def _pixels(images: Images) -> list[Pixels]:
    """Returns the images as a list of arrays (H, W, 3), each checked."""
    arrays = [np.asarray(image.cpu() if isinstance(image, Tensor) else image) for image in images]
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"images must be uint8 of shape (height, width, 3), got {array.dtype} of shape {array.shape}")
    return arrays


def _find(where: str, path: str, files: FileGroups) -> Path:
    """Returns the folder of a model on this machine, the path itself or its snapshot in the Hugging Face cache; asks no network.

    Raises:
        ConfigError: it is not there, or lacks one of the files.
    """
    from huggingface_hub import try_to_load_from_cache

    next_step = f"run `hf download {path}` where there is a network, or set it to a folder that holds the model"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(path, "config.json")
        except ValueError:  # not a Hugging Face id: a path that is not there
            config, next_step = None, "set it to a folder that holds the model, or to a Hugging Face id"
        if not isinstance(config, str):
            raise ConfigError(where, "must be a model on this machine, as a folder or in the Hugging Face cache", path, next_step)
        folder = Path(config).parent
    _require_files(where, folder, files, next_step)
    return folder


def _require_files(where: str, folder: Path, files: FileGroups, next_step: str) -> None:
    """Raises ConfigError unless the folder holds one file of each group."""
    for group in files:
        if not any((folder / name).is_file() for name in group):
            raise ConfigError(where, f"must be a folder with {' or '.join(group)}", str(folder), next_step)


def _obtain(where: str, path: str, files: FileGroups) -> Path:
    """Returns what `_find` does, after a download if the model is not on this machine and Hugging Face can be reached."""
    from huggingface_hub import snapshot_download

    try:
        return _find(where, path, files)
    except ConfigError:
        if Path(path).expanduser().is_dir():
            raise
    for weights in WEIGHTS:  # the old format only if there is not the new one
        with suppress(OSError, ValueError, ConfigError):  # offline or no such model; not a Hugging Face id; files still missing
            snapshot_download(path, allow_patterns=["*.json", "merges.txt", weights])
            return _find(where, path, files)
    return _find(where, path, files)


def _network(where: str, folder: Path, kinds: Mapping[str, tuple[type, dict[str, Any]]]) -> nn.Module:
    """Returns a transformers model in float32 and eval mode, frozen.

    Args:
        where: config path, for messages.
        folder: of the model.
        kinds: for each model type that will do, its class and further arguments to load it with.

    Raises:
        ConfigError: the model is of another type, or its file lacks weights, which transformers would fill with random numbers.
    """
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found not in kinds:
        raise ConfigError(where, f"must be a model of type {' or '.join(kinds)}", f"{found} in {folder}", "choose another model")
    kind, options = kinds[found]
    model, info = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"]:
        lost = f"{folder} without {min(info['missing_keys'])}"
        raise ConfigError(where, f"must hold all weights of a {kind.__name__}", lost, "download the model again")
    return model.eval().requires_grad_(False)


def _dino_crop_px(config: Any) -> int:
    """Returns the input size in pixels: the config's, but 224 for DINOv2, whose 518 is not what it is evaluated with."""
    return min(224, config.image_size) if config.model_type == "dinov2" else config.image_size


def _weights_file(folder: Path) -> Path:
    """Returns the weights file that transformers loads."""
    return next(folder / name for name in WEIGHTS if (folder / name).is_file())


def _sha256(paths: Iterable[Path]) -> str:
    """Returns the first 12 digits of the hash of files, one after the other; `cat FILES | sha256sum` shows the same."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:12]
