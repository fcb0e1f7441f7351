"""A loss that is no number ends a run before it spoils the weights, and the samples that it came from are named."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dreambooth.config import Config
from dreambooth.data import Batch
from dreambooth.errors import UserError
from dreambooth.module import DreamBoothModule, LastBatch
from dreambooth.ranks import ALONE, Ranks

MOST_NAMED = 8  # samples in the error


class StopAtNonFinite(pl.Callback):
    """Ends the run, on all ranks, at the first loss that is not a number, before its gradients can spoil the weights; names the samples.

    Args:
        config: resolved.
        ranks: this process among those that train together; all of them look, and all end.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks, self.batch = config, ranks, None

    def on_train_batch_start(self, trainer: pl.Trainer, module: DreamBoothModule, batch: Batch, batch_idx: int) -> None:
        """Keeps the batch, whose samples may have to be named."""
        self.batch = batch

    def on_train_batch_end(self, *args: Any) -> None:
        """Lets go of the batch."""
        self.batch = None

    def on_before_backward(self, trainer: pl.Trainer, module: DreamBoothModule, loss: Tensor) -> None:
        """Looks at the loss of every batch, those that only accumulate gradients too.

        Raises:
            UserError: naming the step and the samples whose own loss is not finite.
        """
        value = self.ranks.mean(module.last.loss)
        if torch.isfinite(value):
            return
        odd = self.ranks.from_first(self.ranks.at_first(self._odd_samples(module.last)))
        named, size = [text for own in odd for text in own], self.ranks.count * len(self.batch.prompts)
        every, advice = self.config.trainer.accumulate_grad_batches, ["lower optim.learning_rate"]
        if self.config.trainer.precision != "32-true":
            advice.append("use trainer.precision=32-true")
        if 0 < len(named) < size:
            advice.append("look at what is named here: the others of the batch are fine")
        part = f" (batch {int(self.batch.keys[0, 1]) % every + 1} of {every})" if every > 1 else ""
        rule = f"must stay finite, at step {trainer.global_step + 1}{part}, {_listed(named, size)}"
        raise UserError("the loss", rule, float(value), ", or ".join(advice))

    def _odd_samples(self, last: LastBatch) -> list[str]:
        """Returns the samples of this rank whose own loss is not finite, each in words."""
        rows = (~torch.isfinite(last.per_sample)).nonzero().flatten().tolist()
        return [f"{self.batch.describe(row)} at timestep {int(last.t[row])}" for row in rows]


def _listed(named: list[str], size: int) -> str:
    """Returns which samples of a batch of some size have no finite loss, for people; not all of very many."""
    if not named:
        return f"but the {size} samples of the batch add up to more than a number can hold"
    rest = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
    whole = f"all {size} samples of the batch: " if len(named) == size > 1 else ""
    return f"for {whole}{', '.join(named[:MOST_NAMED] + rest)}"
