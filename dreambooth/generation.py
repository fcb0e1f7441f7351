"""Drawing images from a base or a tuned model over diffusers pipelines: a seed per image, the recipe in each PNG."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth import randomness
from dreambooth.base.protocol import BaseModel
from dreambooth.config import Sampling
from dreambooth.errors import ConfigError
from dreambooth.files import write_png
from dreambooth.samplers import scheduler


def pick_device(accelerator: str) -> str:
    """Returns the torch device of a Lightning accelerator: "cuda" when "auto" finds a GPU or "gpu" asks for one, else "cpu".

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not found:
        raise ConfigError("trainer.accelerator", "must be auto or cpu where PyTorch finds no CUDA GPU", accelerator, "leave it at auto")
    return "cuda" if accelerator != "cpu" and found else "cpu"


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[str],
    keys: Sequence[tuple[int, ...]],
    sampling: Sampling,
    resolution: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Returns one image a prompt, uint8 (N, H, W, 3).

    Args:
        base: the model; left in the mode (train or eval) that it was in.
        prompts: N texts.
        keys: N tuples of integers, one an image: all that its noise depends on, whatever else is drawn beside it.
        sampling: resolved settings.
        resolution: px, side of the images.
        on_progress: called after each batch with the number of images that it made.
    """
    pipeline = base.pipeline(scheduler(base, sampling.sampler))
    was_training = {module: module.training for module in base.modules()}
    base.eval()
    images, device = [], base.device
    try:
        for start in range(0, len(prompts), sampling.batch_size):
            batch, batch_keys = list(prompts[start : start + sampling.batch_size]), keys[start : start + sampling.batch_size]
            base.tokenize(batch)  # refuses a prompt that the pipeline would silently cut
            shape = base.latent_shape(resolution, resolution)
            latents = torch.stack([randomness.normal(shape, randomness.SAMPLING, *key) for key in batch_keys])  # (b, C, h, w)
            output = pipeline(
                batch,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                guidance_rescale=sampling.guidance_rescale or 0.0,
                latents=latents.to(device, base.unet.dtype),
                height=resolution,
                width=resolution,
                generator=[randomness.generator(randomness.SAMPLING, *key, 1) for key in batch_keys],  # for samplers that add noise as they go
                output_type="np",
            )
            images.append((output.images * 255).round().clip(0, 255).astype(np.uint8))  # (b, H, W, 3)
            on_progress(len(batch))
    finally:
        for module, training in was_training.items():
            module.training = training
    return np.concatenate(images)


def save_png(path: Path, image: np.ndarray, recipe: dict[str, Any]) -> Path:
    """Writes an image (H, W, 3) with the recipe that made it as JSON in the PNG's text chunk `dreambooth`."""
    info = PngInfo()
    info.add_text("dreambooth", json.dumps(recipe, ensure_ascii=False))
    return write_png(path, Image.fromarray(image), info)


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the recipe in a PNG that `save_png` wrote; empty for any other image."""
    with Image.open(path) as image:
        return json.loads(getattr(image, "text", {}).get("dreambooth", "{}"))
