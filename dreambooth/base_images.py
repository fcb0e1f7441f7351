"""Pictures of the model before it learns, drawn once for all runs that would draw the same: the reference of every arm of a sweep.

They lie in `<output_dir>/base_images/<digest>/` as PNG files with a `manifest.json`: all that they depend on. A run that finds them takes
them, pixel for pixel what it would draw itself: whole batches, as they would be drawn, by a model that answers alike to the last bit.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dreambooth import randomness
from dreambooth.base.protocol import BaseModel
from dreambooth.claims import alone_in
from dreambooth.config import Config, to_plain
from dreambooth.evaluation import Item, Kept, draw_missing, find_kept
from dreambooth.files import write_json
from dreambooth.generation import save_png
from dreambooth.runs import RunFolder
from dreambooth.samplers import scheduler


def draw_base(
    run: RunFolder, base: BaseModel, items: Sequence[Item], config: Config, on_progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Returns the images of a plan by a model that has not learned yet, uint8 (N, H, W, 3): drawn by the first run that asks, then read.

    Args:
        run: whose folder says where the shared images are.
        base: with the method attached or not, at its start.
        items: the plan.
        config: its sampling and resolution are used.
        on_progress: called with the number of images that are there more.
    """
    found = recipe(base, run.record["digests"]["base"], items, config)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    folder = run.path.parents[1] / "base_images" / digest[:12]
    about = {"base_images": digest}
    kept = find_kept(folder, items, config, about)
    if kept.there == len(items):
        return draw_missing(base, items, config, kept, on_progress)
    with alone_in(folder, "draws") as claim:
        write_json(folder / "manifest.json", found)
        kept = find_kept(folder, items, config, about)  # another may have drawn them while this one waited

        def still_alone(done: int) -> None:
            claim.check()
            on_progress(done)

        return draw_missing(base, items, config, kept, still_alone)


def keep(kept: Kept, images: np.ndarray) -> np.ndarray:
    """Writes those of the images (N, H, W, 3) that a folder lacks, each with its recipe; returns them all as they were given."""
    for part, there in kept.batches:
        if there is None:
            for name, image, about in zip(kept.names[part], images[part], kept.recipes[part], strict=True):
                save_png(kept.folder / name, np.ascontiguousarray(image), about)
    return images


def recipe(base: BaseModel, base_digest: str, items: Sequence[Item], config: Config) -> dict[str, Any]:
    """Returns all that the images of a plan depend on, as plain values."""
    return {
        "format": 1,
        "base_digest": base_digest,
        "model": answer_digest(base, items, config),
        "device": base.device.type,
        "scheduler": json.loads(json.dumps(dict(scheduler(base, config.sampling.sampler).config), sort_keys=True, default=str)),
        "sampling": to_plain(config.sampling),
        "resolution": config.data.resolution,
        "images": [{"prompt": item.prompt, "key": list(item.key)} for item in items],
    }


@torch.no_grad()
def answer_digest(base: BaseModel, items: Sequence[Item], config: Config) -> str:
    """Returns the hex digest of how a model answers: its text embeddings of a plan's prompts, and its prediction for the first one's noise.

    Methods start where the base is, each in its own way: one gives the identifier a new embedding, one only rounds differently. So it is
    looked at what the model does, to the last bit, not at what it was told to be; another device or number of threads tells as well.
    """
    was_training = {module: module.training for module in base.modules()}
    base.eval()
    try:
        prompts, size = ["", *dict.fromkeys(item.prompt for item in items)], config.sampling.batch_size
        text = torch.cat([base.encode_prompts(prompts[start : start + size]) for start in range(0, len(prompts), size)])  # (P, L, D)
        shape = base.latent_shape(config.data.resolution, config.data.resolution)
        noise = randomness.normal(shape, randomness.SAMPLING, *items[0].key)[None]  # (1, C, h, w)
        middle = torch.tensor([len(base.alphas_cumprod) // 2], device=base.device)
        answer = base.predict(noise.to(base.device, base.unet.dtype), middle, text[1:2])  # (1, C, h, w)
    finally:
        for module, training in was_training.items():
            module.training = training
    digest = hashlib.sha256()
    for tensor in (text, answer):
        digest.update((tensor.double() + 0.0).cpu().numpy().tobytes())  # + 0.0: a zero has no sign
    return digest.hexdigest()
