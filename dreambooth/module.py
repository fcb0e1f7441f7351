"""The LightningModule: one training step, the optimiser, and what a checkpoint keeps."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.adapters import ParamGroup, trainable_state
from dreambooth.base.protocol import BaseModel
from dreambooth.config import ClassImages, Config, to_plain
from dreambooth.data import Batch
from dreambooth.diffusion import prior_preservation_loss
from dreambooth.errors import UserError
from dreambooth.randomness import POSTERIOR, normals


class DreamBoothModule(pl.LightningModule):
    """UNet, text encoder and VAE under the prior-preservation loss.

    Args:
        config: resolved.
        base: the live model, with the method attached.
        groups: what learns, as the method returned it.
    """

    def __init__(self, config: Config, base: BaseModel, groups: list[ParamGroup]) -> None:
        super().__init__()
        self.save_hyperparameters({"config": to_plain(config)})  # plain, so that checkpoints load with weights_only=True
        self.config, self.base, self.groups, self.objective = config, base, groups, config.objective
        self.prior_loss_weight = config.prior.weight if isinstance(config.prior, ClassImages) else 0.0
        self.strict_loading = False  # a checkpoint holds what learns; `on_load_checkpoint` checks that it holds all of it

    def on_train_start(self) -> None:
        """Puts what learns in training mode; the VAE stays as it is."""
        self.base.unet.train()
        self.base.text_encoder.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a mixed batch."""
        posterior_noise = normals(self.base.latent_shape(*batch.pixel_values.shape[-2:]), POSTERIOR, batch.keys)  # (B, C, h, w)
        latents = self.base.encode_images(batch.pixel_values, posterior_noise)  # (B, C, h, w)
        text = self.base.encode_prompts(batch.prompts)  # (B, L, D)
        noisy, t, target, weight = self.objective.corrupt(latents, batch.keys, self.base)  # randomness = f(seed, step, sample)
        pred = self.base.predict(noisy, t, text)  # (B, C, h, w)
        loss = prior_preservation_loss(pred, target, batch.is_prior, self.prior_loss_weight, weight)
        self.log_dict(loss.as_logs("train/"), batch_size=len(latents))
        return loss.total

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns the optimiser and its schedule over optimiser steps."""
        optimizer = self.config.optim.build(self.groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.config.optim.factor(step, self.config.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what learns: the frozen weights are the base's and lie in its folder."""
        checkpoint["state_dict"] = {f"base.{name}": tensor for name, tensor in trainable_state(self.base).items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not hold exactly what learns."""
        own = {f"base.{name}" for name in trainable_state(self.base)}
        odd = sorted(own ^ checkpoint["state_dict"].keys())
        if odd:
            raise UserError(
                "checkpoints/last.ckpt",
                "must hold exactly the tensors that the method trains",
                f"{len(odd)} that differ, the first {odd[0]}",
                "delete the run folder to start again",
            )
