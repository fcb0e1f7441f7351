"""The LightningModule: one training step, the optimiser, and what a checkpoint keeps."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.adapters.methods import ParamGroup, let_learn, trainable_state
from dreambooth.averaging import AveragedWeights
from dreambooth.base.protocol import BaseModel
from dreambooth.caches import make_caches, text_learns
from dreambooth.config import Config, to_plain
from dreambooth.data import Batch
from dreambooth.diffusion import mask_weight, prior_preservation_loss
from dreambooth.errors import UserError
from dreambooth.priors import FrozenModel, distilled_targets
from dreambooth.randomness import DROPOUT, POSTERIOR, normals, seed_torch
from dreambooth.sharding import gathered, shard, whole


class LastBatch(NamedTuple):
    """What the newest training step gave, sample by sample; all detached."""

    loss: Tensor  # scalar, neither scaled nor divided among the batches of a step
    per_sample: Tensor  # (B,)
    t: Tensor  # (B,) timesteps


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
        parameters = [parameter for group in groups for parameter in group.parameters]
        self.frozen = FrozenModel(parameters) if config.prior.asks_frozen_model else None
        kept, folder = config.data, Path(config.output_dir) / "caches"
        self.caches = make_caches(base, kept.cache, folder, kept.cache_mb * 10**6, kept.cache_dtype)
        decay = config.trainer.ema_decay
        self.averaged = AveragedWeights(parameters, decay) if decay is not None else None
        if config.trainer.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            text = base.text_encoder  # older transformers know it under the other name
            enable = getattr(text, "activation_checkpointing_enable", None) or text.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if config.trainer.compile:
            base.unet.compile()  # in place: no name of the state dict changes
        self.last: LastBatch | None = None  # None before the first training step
        self.strict_loading = False  # a checkpoint holds what learns; `on_load_checkpoint` checks that it holds all of it

    def configure_model(self) -> None:
        """Shares out what learns over the devices, where the run does that; the frozen parts stay whole on each."""
        if self.config.trainer.sharding:
            self.groups = shard(self.base, self.groups, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Puts what learns in training mode; the VAE stays as it is."""
        self.base.unet.train()
        self.base.text_encoder.train(text_learns(self.base))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Lets learn what learns at this step, and makes dropout a function of the seed and the batch."""
        let_learn(self.groups, self.trainer.global_step)
        seed_torch(DROPOUT, *batch.keys[0].tolist())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a mixed batch."""
        posterior_noise = normals(self.base.latent_shape(*batch.pixel_values.shape[-2:]), POSTERIOR, batch.keys)  # (B, C, h, w)
        latents = self.caches.latents(batch.pixel_values, batch.contents, posterior_noise)  # (B, C, h, w)
        text = self.caches.embeddings(batch.prompts)  # (B, L, D)
        noisy, t, target, weight, delta = self.objective.corrupt(latents, batch.keys, self.base)  # randomness = f(seed, step, sample)
        if self.frozen is not None:
            target = distilled_targets(self.base, self.frozen, target, noisy, t, batch.prompts, batch.is_prior)
        pred = self.base.predict(noisy, t, text)  # (B, C, h, w)
        loss = prior_preservation_loss(pred, target, batch.is_prior, self.prior_loss_weight(batch), weight, delta, self.cell_weight(batch))
        self.last = LastBatch(loss.total.detach(), loss.per_sample, t)
        self.log_dict(loss.as_logs("train/"), batch_size=len(latents), sync_dist=self.config.trainer.devices > 1)
        return loss.total

    def cell_weight(self, batch: Batch) -> Tensor | None:
        """Returns how much each latent cell counts, (B, 1, h, w), in a run with masks; None without."""
        if batch.mask is None:
            return None
        return mask_weight(batch.mask, self.base.latent_shape(*batch.mask.shape[-2:])[1:], self.config.data.mask_background_weight)

    def prior_loss_weight(self, batch: Batch) -> float:
        """Returns lambda at the optimiser step that a batch belongs to."""
        step = int(batch.keys[0, 1]) // self.config.trainer.accumulate_grad_batches
        return self.config.prior.weight_at(step, self.config.trainer.max_steps)

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns the optimiser and its schedule over optimiser steps."""
        optimizer = self.config.optim.build(self.groups, self.config.trainer.precision)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.config.optim.group_factors(self.groups, self.config.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and takes the new weights into the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update()

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Puts the weights that are evaluated and kept in place inside the context, in full; all ranks enter it.

        They are the moving average where there is one.
        """
        if self.config.trainer.sharding:
            return whole(self.base)
        return self.averaged.applied() if self.averaged is not None else nullcontext()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what learns: the frozen weights are the base's and lie in its folder."""
        checkpoint["state_dict"] = {f"base.{name}": tensor for name, tensor in gathered(trainable_state(self.base)).items()}
        if self.averaged is not None:
            checkpoint["averaged_weights"] = self.averaged.state_dict()

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
        if self.averaged is not None:
            self.averaged.load_state_dict(checkpoint["averaged_weights"])
