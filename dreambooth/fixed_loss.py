"""The loss on one fixed batch, now and then while training: same images, same noise, same timesteps, so that it moves only with the model.

On photos that were set aside it is a held-out loss, which rises when the model begins to learn the photos by heart. The training loss says
neither: most of its movement is the luck of timesteps.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.base.protocol import BaseModel
from dreambooth.config import Config
from dreambooth.diffusion import prior_preservation_loss
from dreambooth.metrics_csv import MetricsFile
from dreambooth.module import DreamBoothModule
from dreambooth.photos import to_pixel_values
from dreambooth.ranks import ALONE, Ranks
from dreambooth.runs import RunFolder
from dreambooth.step_choice import dvar_ratio

SAMPLES = 8  # of the batch: the photos in turn, each with noise and a timestep of its own
DVAR_WINDOW = 10  # last measurements whose variance is compared with that of all
KEY = "score/fixed_batch_loss"


class FixedBatchLoss(pl.Callback):
    """Measures every `trainer.fixed_loss_every` steps, and before the first; 0 is off.

    Logged are the loss (`score/fixed_batch_loss`) and the DVAR ratio: the variance of the last losses over that of all, which falls
    towards 0 when nothing more is learned (Voronov et al. 2023, "Is This Loss Informative?"). Its published thresholds are for a loss at every
    step and windows of hundreds; here it is a curve to look at, not a rule to stop by.

    Args:
        run: its clock counts the time as evaluation.
        config: resolved.
        images: uint8 (M, H, W, 3), prepared: photos that were set aside, or the training photos where there are none.
        metrics: earlier losses are read from here when a run is continued.
        ranks: this process among those that train together: the first one measures, the others are there when the weights are put in place.
    """

    def __init__(self, run: RunFolder, config: Config, images: np.ndarray, metrics: MetricsFile, ranks: Ranks = ALONE) -> None:
        self.run, self.ranks = run, ranks
        self.every, self.last_step = config.trainer.fixed_loss_every, -1
        self.pixel_values = to_pixel_values(images[np.arange(SAMPLES) % len(images)])  # (S, 3, H, W)
        self.prompt = config.subject.in_prompt(config.subject.prompt)
        self.keys = torch.tensor([[config.evaluation.seed, 0, sample] for sample in range(SAMPLES)])  # not the training's: other noise
        self.latents: Tensor | None = None  # (S, C, h, w) of the images: the autoencoder is never trained
        self.losses = {int(row["step"]): float(row[KEY]) for row in metrics.read() if row.get(KEY)}

    def on_train_start(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Measures the un-tuned base, unless the run is continued."""
        self.last_step = trainer.global_step
        self._measure_when_due(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: DreamBoothModule, *args: object) -> None:
        """Measures after the optimiser steps that are due, and after the last."""
        if trainer.global_step != self.last_step:  # not after a batch that only accumulated gradients
            self.last_step = trainer.global_step
            self._measure_when_due(trainer, module)

    def _measure_when_due(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        step = trainer.global_step
        if not self.every or (step % self.every and step != trainer.max_steps) or self.ranks.from_first(step in self.losses):
            return
        with self.run.clock("evaluation while training"), module.evaluation_weights():
            if not self.ranks.is_first:
                return
            if self.latents is None:
                self.latents = fixed_latents(module, self.pixel_values)
            self.losses[step] = fixed_batch_loss(module, self.latents, self.prompt, self.keys)
        series = [self.losses[known] for known in sorted(self.losses)]
        row = {KEY: self.losses[step], "score/dvar": dvar_ratio(series, DVAR_WINDOW)}
        for logger in trainer.loggers:
            logger.log_metrics(row, step)


@torch.no_grad()
def fixed_latents(module: DreamBoothModule, pixel_values: Tensor) -> Tensor:
    """Returns the means of the latents of images (S, 3, H, W) in [-1, 1], (S, C, h, w): no third source of chance beside noise and timestep."""
    with _in_eval_mode(module.base):
        return module.base.encode_images(pixel_values)


@torch.no_grad()
def fixed_batch_loss(module: DreamBoothModule, latents: Tensor, prompt: str, keys: Tensor) -> float:
    """Returns the mean loss of images under the noise and timesteps that the keys stand for; leaves the module in its mode.

    Args:
        module: the model in training.
        latents: (S, C, h, w).
        prompt: what all of them show.
        keys: (S, 3) integers; row i decides noise and timestep of image i.
    """
    base = module.base
    with _in_eval_mode(base):
        noisy, t, target, weight, delta = module.objective.corrupt(latents, keys, base)
        text = base.encode_prompts([prompt]).expand(len(keys), -1, -1)  # (S, L, D)
        pred = base.predict(noisy, t, text)  # (S, C, h, w)
        is_prior = torch.zeros(len(keys), dtype=torch.bool, device=pred.device)
        return float(prior_preservation_loss(pred, target, is_prior, 0.0, weight, delta).subject)


@contextmanager
def _in_eval_mode(base: BaseModel) -> Iterator[None]:
    modes = {part: part.training for part in base.modules()}
    base.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
