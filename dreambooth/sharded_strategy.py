"""Lightning's strategy for `trainer.sharding`: FSDP2 over all devices, with one whole file as the state to continue from."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy


class ShardedStrategy(ModelParallelStrategy):
    """Shares out what `DreamBoothModule.configure_model` marks over all devices of the run.

    Args:
        devices: how many.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Returns a checkpoint whose weights and moments are in place by then; with the weights in it, which the parent takes out."""
        found = super().load_checkpoint(checkpoint_path, weights_only)
        found["state_dict"] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return found
