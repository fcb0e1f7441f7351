"""Several devices that share out what learns: each keeps its part of the weights, gradients and moments (PyTorch's FSDP2, `fully_shard`).

While a block computes it is whole on every device, then its part again. Around the training, to draw, to score and to keep weights, the networks
are made whole for the length of a `with`: the one moment when each device holds them in full, beside its part of the moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dreambooth.adapters.methods import Full, ParamGroup
from dreambooth.base.protocol import BaseModel
from dreambooth.config import Config
from dreambooth.errors import ConfigError
from dreambooth.optimization import AdamW

BLOCKS = ("ResnetBlock2D", "Transformer2DModel", "CLIPEncoderLayer")  # classes whose weights are gathered together, of diffusers and transformers


def check(config: Config) -> None:
    """Refuses `trainer.sharding` with what cannot be shared out, before anything is loaded.

    Args:
        config: resolved.

    Raises:
        ConfigError: naming the setting that excludes it.
    """
    if not config.trainer.sharding:
        return
    rule = "must be {} with trainer.sharding=true, which shares out full tuning among devices"
    method, trainer = config.method, config.trainer
    demands = [
        ("trainer.devices", "2 or more", trainer.devices, trainer.devices > 1),
        ("method", "full", method.name, isinstance(method, Full)),
        ("method.text_encoder_stop_step", "null", getattr(method, "text_encoder_stop_step", None), None),
        ("prior", "class_images or none", config.prior.name, not config.prior.asks_frozen_model),
        ("optim", "adamw", config.optim.name, isinstance(config.optim, AdamW)),
        ("trainer.ema_decay", "null", trainer.ema_decay, None),
        ("trainer.compile", "false", trainer.compile, not trainer.compile),
        ("trainer.precision", "32-true, bf16-mixed or bf16-true", trainer.precision, trainer.precision != "16-mixed"),
    ]
    for where, wanted, value, holds in demands:
        if not (value is None if holds is None else holds):
            raise ConfigError(where, rule.format(wanted), value, "set it so, or leave out trainer.sharding")


def shard(base: BaseModel, groups: list[ParamGroup], mesh: Any) -> list[ParamGroup]:
    """Shares out the networks that learn over the devices of a mesh, in place; all ranks call it. Returns the groups with what learns now.

    Args:
        base: with the method attached, the same on every rank.
        groups: as the method returned them; their parameters are replaced by this rank's parts.
        mesh: torch's DeviceMesh of one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    name_of = {id(parameter): name for name, parameter in base.named_parameters()}
    named = [[name_of[id(parameter)] for parameter in group.parameters] for group in groups]
    for network in (base.unet, base.text_encoder):
        if any(parameter.requires_grad for parameter in network.parameters()):
            for block in [part for part in network.modules() if type(part).__name__ in BLOCKS]:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
    parts = dict(base.named_parameters())
    return [group._replace(parameters=[parts[name] for name in names]) for group, names in zip(groups, named, strict=True)]


@contextmanager
def whole(base: BaseModel) -> Iterator[None]:
    """Makes networks that are shared out whole on every device inside the context; all ranks enter it, and inside none needs the others."""
    networks = _sharded(base)
    for network in networks:
        network.set_reshard_after_forward(False, recurse=False)
        network.unshard()
    try:
        yield
    finally:
        for network in networks:
            network.set_reshard_after_forward(True, recurse=False)
            network.reshard()


def gathered_bytes(base: BaseModel) -> int:
    """Returns the memory in bytes for what is whole at the height of a step: two blocks' weights, one's gradients, what stands outside of blocks."""
    blocks = [part for network in (base.unet, base.text_encoder) for part in network.modules() if type(part).__name__ in BLOCKS]
    sizes = [_learned_bytes(block) for block in blocks]
    return 3 * max(sizes, default=0) + _learned_bytes(base) - sum(sizes)


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with those that are shared out in full; all ranks call it with the same names in the same order."""
    from torch.distributed.tensor import DTensor

    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def _learned_bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters() if parameter.requires_grad)


def _sharded(base: BaseModel) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in base.modules() if isinstance(part, FSDPModule)]
