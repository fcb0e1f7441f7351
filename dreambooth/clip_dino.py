"""CLIP and DINO behind the interface of the encoders: where their weights are found, how they see an image, which features they give."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.encoders import FileGroups, LoadedEncoders, Pixels, require_files
from dreambooth.errors import ConfigError, UserError
from dreambooth.files import sha256_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers takes the first that is there
DINO_FILES: FileGroups = (("config.json",), WEIGHTS)
CLIP_FILES: FileGroups = (*DINO_FILES, ("tokenizer.json", "merges.txt"))


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
        cropped = np.array(self._resized_and_cropped(Image.fromarray(image)))
        x = torch.from_numpy(cropped).permute(2, 0, 1).float() / 255  # (crop, crop, 3) -> (3, crop, crop)
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def of_mask(self, mask: NDArray[np.float32]) -> Tensor:
        """Returns a mask (H, W) in [0, 1] as the network's view of its image: (crop_px, crop_px) in [0, 1]; bicubic overshoot is clipped."""
        return torch.from_numpy(np.array(self._resized_and_cropped(Image.fromarray(mask)))).clamp(0, 1)

    def _resized_and_cropped(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (int(self.resize_px * side / short) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.crop_px) / 2), round((height - self.crop_px) / 2)
        return resized.crop((left, top, left + self.crop_px, top + self.crop_px))


def clip_preprocessing(image_size: int) -> Preprocessing:
    """Returns the preprocessing that OpenAI's CLIP was trained with, for its input size in pixels (B/32: 224)."""
    return Preprocessing(image_size, image_size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def dino_preprocessing(crop_px: int) -> Preprocessing:
    """Returns DINO's evaluation preprocessing (Caron et al. 2021): short side 256, crop 224, or that ratio for another crop."""
    return Preprocessing(round(crop_px * 256 / 224), crop_px, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Dino:
    """A DINO or DINOv2 that tells individuals apart: its class token after its final layer norm, and its other tokens as patches.

    DINOv2 (Oquab et al. 2023) is seen as DINO is: short side 256, crop 224, though its position embeddings were made for 518; the network
    interpolates them, as in its own evaluation. With patches of 14 that is a grid of 16 x 16, with DINO's of 16 one of 14 x 14.

    Args:
        where: config path of the folder, for messages.
        folder: a ViTModel or Dinov2Model.
        device: where to compute.
        kinds: the model types that will do.

    Attributes:
        layer: what is taken from which network, for a version string.
        view: how it sees an image, and the hash of its weights, for a version string.

    Raises:
        ConfigError: the model is of another type, or its file lacks weights.
    """

    def __init__(self, where: str, folder: Path, device: torch.device, kinds: Sequence[str] = ("vit", "dinov2")) -> None:
        from transformers import Dinov2Model, ViTModel

        backbones = {"vit": (ViTModel, {"add_pooling_layer": False}), "dinov2": (Dinov2Model, {})}  # ViT's own pooler is random
        self.device = device
        self.network = _network(where, folder, {kind: backbones[kind] for kind in kinds}).to(device)
        config = self.network.config
        self.preprocessing = dino_preprocessing(_dino_crop_px(config))
        self.grid_side = self.preprocessing.crop_px // config.patch_size
        self.layer = f"{config.model_type} patch {config.patch_size}, class token after the final norm, {config.hidden_size}-d"
        self.view = f"{self.preprocessing.words}, ImageNet mean and std, sha256 {sha256_of([_weights_file(folder)])}"

    def tokens(self, images: list[Pixels]) -> tuple[Tensor, Tensor]:
        """Returns the class tokens (N, D) and the patch tokens (N, h, w, D) of one batch, of any length."""
        x = torch.stack([self.preprocessing(image) for image in images]).to(self.device)  # (N, 3, crop, crop)
        tokens = self.network(pixel_values=x).last_hidden_state  # (N, 1 + patches, D), after the final norm
        return tokens[:, 0], tokens[:, 1:].unflatten(1, (self.grid_side, self.grid_side))  # (N, D), (N, h, w, D)

    def patch_shares(self, mask: NDArray[np.float32]) -> Tensor:
        """Returns the share of each patch that a mask (H, W) in [0, 1] covers, (h, w)."""
        seen = self.preprocessing.of_mask(mask)[None]  # (1, crop, crop)
        return F.avg_pool2d(seen, self.network.config.patch_size)[0]  # (h, w)


class LoadedClipDino(LoadedEncoders):
    """CLIP's image and text projections, and the tokens of DINO (or DINOv2); on demand a DINOv2 beside it.

    Args:
        clip_folder: a CLIPModel and its tokenizer, as transformers saves them.
        dino_folder: a ViTModel or Dinov2Model.
        device: where to compute.
        dinov2_folder: a Dinov2Model, for a score of its own; None: no such score.

    Source: Ruiz et al. 2023, sec. 4.1; which token, crop and sizes: google/dreambooth issue 3.
    """

    def __init__(self, clip_folder: Path, dino_folder: Path, device: torch.device, dinov2_folder: Path | None = None) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.device = device
        self.clip = _network("encoders.clip_path", clip_folder, {"clip": (CLIPModel, {})}).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(clip_folder, local_files_only=True)
        self.dino = Dino("encoders.dino_path", dino_folder, device)
        self.dinov2 = Dino("encoders.dinov2_path", dinov2_folder, device, ("dinov2",)) if dinov2_folder is not None else None
        self.clip_preprocessing = clip_preprocessing(self.clip.config.vision_config.image_size)
        self.version = self._describe(sha256_of([_weights_file(clip_folder)]))

    def _identity_with_patches(self, images: list[Pixels]) -> tuple[Tensor, Tensor]:
        return self.dino.tokens(images)

    def _patch_shares(self, mask: NDArray[np.float32]) -> Tensor:
        return self.dino.patch_shares(mask)

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

    def _describe(self, clip_sha256: str) -> str:
        clip, side = self.clip.config, self.dino.grid_side
        words = (
            f"clip_dino: identity = {self.dino.layer}, patches = its other tokens, {side} x {side}, {self.dino.view}; "
            f"image and text = clip patch {clip.vision_config.patch_size}, projections, {clip.projection_dim}-d, "
            f"{self.clip_preprocessing.words}, CLIP mean and std, sha256 {clip_sha256}"
        )
        return words if self.dinov2 is None else f"{words}; identity by DINOv2 = {self.dinov2.layer}, {self.dinov2.view}"


def find(where: str, path: str, files: FileGroups) -> Path:
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
    require_files(where, folder, files, next_step)
    return folder


def obtain(where: str, path: str, files: FileGroups) -> Path:
    """Returns what `find` does, after a download if the model is not on this machine and Hugging Face can be reached."""
    from huggingface_hub import snapshot_download

    try:
        return find(where, path, files)
    except ConfigError:
        if Path(path).expanduser().is_dir():
            raise
    for weights in WEIGHTS:  # the old format only if there is not the new one
        with suppress(OSError, ValueError, ConfigError):  # offline or no such model; not a Hugging Face id; files still missing
            snapshot_download(path, allow_patterns=["*.json", "merges.txt", weights])
            return find(where, path, files)
    return find(where, path, files)


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
