"""What a base model is to the rest of the program: pixels to latents, prompts to embeddings, one prediction, and the way back.

A new model family is one file in this folder with two classes: a `BaseModel` that says how its prompts are encoded, how its network
is called and which diffusers pipeline drives it (the three abstract methods), and a dataclass that a config can choose, with the
methods of `StableDiffusion` in `stable_diffusion.py`. Everything else here holds for any latent diffusion model with a KL autoencoder.
"""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class BaseModel(nn.Module, ABC):
    """A latent diffusion model, whole and live: what a method adapts, the module trains and the pipeline samples from.

    It comes frozen and in eval mode: a method turns on the gradients of what it trains. Letters in shapes: B samples, C latent channels,
    H x W pixels, h x w latent cells (H / vae_factor, W / vae_factor), L tokens of a prompt, D width of the text, T training timesteps.

    Attributes:
        unet: the network that is trained to denoise.
        text_encoder: token ids (B, L) to embeddings (B, L, D).
        vae: the autoencoder between pixels and latents.
        tokenizer: a transformers tokenizer with a fixed `model_max_length`.
        scheduler: the diffusers scheduler of the model's folder: a template, `pipeline` works on a copy.
        prediction_type: what the network predicts, "epsilon", "v_prediction" or "sample". Set it when an objective changes it:
            `pipeline` and `save` write it in the scheduler.
        alphas_cumprod: (T,) float32, the share of the signal left at each timestep; from the scheduler's config, whatever its schedule.
        resolution: px, the side of the square images that the model was made for.
        latent_channels: C.
        vae_factor: pixels on a side of one latent cell.
        learned: names of the parameters that an attached method trains; empty for the base itself.
    """

    alphas_cumprod: Tensor

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, vae: nn.Module, tokenizer: Any, scheduler: Any) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.unet, self.text_encoder, self.vae = unet, text_encoder, vae
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.prediction_type: str = scheduler.config.get("prediction_type", "epsilon")
        self.latent_channels: int = vae.config.latent_channels
        self.vae_factor: int = vae_factor(vae.config)
        self.resolution: int = native_resolution(unet.config, vae.config)
        self.learned: tuple[str, ...] = ()
        alphas_cumprod = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.float()  # (T,)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseModel":
        """Moves or converts the networks, as `to` asks; the schedule moves along but stays float32: in bfloat16 its first steps have no noise."""
        schedule = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = schedule.to(self.alphas_cumprod.device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.unet.parameters()).device

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Returns the text embeddings (B, L, D) that the pipeline would use; with gradients where the text encoder is trained.

        Raises:
            UserError: a prompt is too long (see `tokenize`).
        """

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Returns the network's prediction (B, C, h, w), of the kind that `prediction_type` names.

        Args:
            noisy: (B, C, h, w) noised latents.
            t: (B,) integer timesteps in [0, T).
            text: (B, L, D) from `encode_prompts`.
        """

    @abstractmethod
    def pipeline(self, scheduler: Any | None = None) -> Any:
        """Returns a diffusers pipeline over the live modules: it shares their weights, so it always draws with the newest.

        Args:
            scheduler: a diffusers scheduler, used as it is; None: the folder's own, with this model's prediction type.
        """

    def new_scheduler(self, kind: type | None = None, **changes: Any) -> Any:
        """Returns a fresh diffusers scheduler with the model's noise schedule and prediction type.

        Args:
            kind: a scheduler class of diffusers; None: the class that the folder names.
            changes: settings to put in place of the folder's, as `use_karras_sigmas=True`.
        """
        settings = {"prediction_type": self.prediction_type, **changes}
        return (kind or type(self.scheduler)).from_config(self.scheduler.config, **settings)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Returns (C, h, w) of the latents of an image.

        Args:
            height: px, a multiple of `vae_factor`; None: the native resolution.
            width: px, likewise.

        Raises:
            UserError: a side is not a positive multiple of `vae_factor`.
        """
        sides = [self.resolution if side is None else side for side in (height, width)]
        for side in sides:
            if side <= 0 or side % self.vae_factor:
                nearest = max(1, round(side / self.vae_factor)) * self.vae_factor
                raise UserError("image size", f"must be a positive multiple of {self.vae_factor} px", side, f"take {nearest}")
        return self.latent_channels, sides[0] // self.vae_factor, sides[1] // self.vae_factor

    @torch.no_grad()
    def latent_distribution(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the latents of images, both (B, C, h, w) float32, scaled as the network sees them.

        Keeping both lets a cache stay exact: latents are mean + std * noise, with fresh noise each time.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
        """
        parameter = next(self.vae.parameters())
        latents = self.vae.encode(pixel_values.to(parameter.device, parameter.dtype)).latent_dist
        scale, shift = self._latent_scale()
        return (latents.mean.float() - shift) * scale, latents.std.float() * scale

    def encode_images(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns latents (B, C, h, w) float32, without gradients, scaled as the network sees them.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w) standard normal, picks the sample of the autoencoder's posterior; None: the mean.
        """
        mean, std = self.latent_distribution(pixel_values)
        return mean if noise is None else mean + std * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) float32 in [-1, 1] of latents (B, C, h, w), without gradients."""
        parameter = next(self.vae.parameters())
        scale, shift = self._latent_scale()
        unscaled = latents.to(parameter.device, torch.float32) / scale + shift
        return self.vae.decode(unscaled.to(parameter.dtype)).sample.float().clamp(-1.0, 1.0)  # (B, 3, H, W)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Returns token ids (B, L) int64 on the CPU, each prompt padded to the tokenizer's length.

        Raises:
            UserError: a prompt is longer than the text encoder can read; nothing is ever cut off in silence.
        """
        return tokenized(self.tokenizer, prompts)

    def token_id(self, word: str) -> list[int]:
        """Returns the token ids that a word splits into: one for a word of the vocabulary, several for a rare one."""
        return self.tokenizer(word, add_special_tokens=False).input_ids

    def save(self, folder: str | Path, prediction_type: str | None = None) -> Path:
        """Writes the model as a stock diffusers folder, in its present dtype, and returns the folder.

        All is written beside the folder and renamed at the end: the final name never holds half a model. A model that was there before
        is replaced.

        Args:
            folder: where to; made with its parents.
            prediction_type: what the scheduler's config shall say; None: the model's own.

        Raises:
            UserError: the folder holds something else than a model.
            ValueError: an adapter is attached; merge it first.
        """
        folder = Path(folder)
        if folder.exists() and not _is_replaceable(folder):
            raise UserError(str(folder), "holds files that are no model and would be lost", next_step="name another folder or empty it")
        _refuse_attached(self)
        scheduler = self.new_scheduler(prediction_type=prediction_type or self.prediction_type)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with quiet():
                self.pipeline(scheduler).save_pretrained(temporary)
            self._finish_folder(temporary)
            _make_portable(temporary)
            _replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _finish_folder(self, folder: Path) -> None:  # noqa: B027 (a family may have nothing to add)
        """Adds to a folder just written what diffusers leaves out; by default nothing."""

    def _latent_scale(self) -> tuple[float, float]:
        """Returns (scale, shift): latents are (autoencoder output - shift) * scale."""
        return self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0


def tokenized(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Returns token ids (B, L) int64 on the CPU, each prompt padded to the tokenizer's length; see `BaseModel.tokenize`."""
    from diffusers.loaders import TextualInversionLoaderMixin

    # As the pipeline does: an added token that stands for several vectors is spelled out.
    texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    limit = tokenizer.model_max_length
    with quiet():
        rows = tokenizer(texts, padding="max_length", max_length=limit, truncation=False).input_ids
    for prompt, ids in zip(prompts, rows, strict=True):
        if len(ids) > limit:
            rule = f"must be at most {limit} tokens long with its start and end marks"
            raise UserError(f"prompt {prompt!r}", rule, len(ids), f"shorten it by {len(ids) - limit} tokens")
    return torch.tensor(rows)  # (B, L)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bars and the import chatter of diffusers and transformers off the screen; what matters is checked instead."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    levels = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    for log, _, _ in levels:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, has_bar in levels:
            log.set_verbosity(level)
            if has_bar:
                log.enable_progress_bar()


def vae_factor(vae_config: dict[str, Any]) -> int:
    """Returns the pixels on a side of one latent cell, from the autoencoder's config."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def native_resolution(unet_config: dict[str, Any], vae_config: dict[str, Any]) -> int:
    """Returns the side in px of the images that a model was made for, from the two configs alone."""
    cells = unet_config["sample_size"]
    return (cells if isinstance(cells, int) else max(cells)) * vae_factor(vae_config)


def _refuse_attached(model: nn.Module) -> None:
    """Raises a ValueError when adapter layers sit in the model: their names would make a folder that nothing can load."""
    for name, _ in model.named_parameters():
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{name} belongs to an attached adapter; merge or detach it before the model is written")


def _make_portable(folder: Path) -> None:
    """Takes out of a folder just written what ties it to this machine: the path it was loaded from, files only their owner may read."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "model_index.json").stat().st_mode)


def _is_replaceable(folder: Path) -> bool:
    """Tells whether a path is an empty folder or a model that may be written over."""
    return folder.is_dir() and ((folder / "model_index.json").is_file() or not any(folder.iterdir()))


def _replace_folder(new: Path, folder: Path) -> None:
    """Moves a finished folder to its final name, in place of what was there."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
