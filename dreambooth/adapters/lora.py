"""LoRA (Hu et al. 2022) and DoRA (Liu et al. 2024) as a method: small matrices beside frozen layers learn."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dreambooth import randomness
from dreambooth.adapters.methods import Method, Names, ParamGroup, check_stop_step
from dreambooth.adapters.peft_layers import inject, unmatched
from dreambooth.adapters.token_rows import open_own_rows
from dreambooth.base.protocol import BaseModel
from dreambooth.errors import ConfigError

INITS = {"gaussian": "gaussian", "kaiming": True}  # our word -> peft's init_lora_weights; both start as the identity (B = 0)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of a UNet: the layers of Hu et al. 2022 and of the diffusers examples
WITH_CONVOLUTIONS = (*ATTENTION, "conv1", "conv2")  # those of the residual blocks too


@dataclass(slots=True)
class Lora(Method):
    """W + alpha / rank * B A beside each target layer, A and B learn; a file of megabytes instead of gigabytes."""

    name: str = "lora"
    rank: int = 4  # columns of B, 1 or more
    alpha: float | None = None  # the update is scaled by alpha / rank; null: the rank, a scale of 1
    target_modules: list[str] | None = None  # ends of layer names in the UNet; null: the base's recipe, where there is none the attention
    train_text_encoder: bool | None = None  # also adapters in the text encoder; null: the base's recipe
    text_encoder_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj"])
    text_encoder_stop_step: int | None = None  # steps after which the text encoder's part stays as it is; null: never
    train_token: bool | None = None  # also the identifier's embedding row, at its own rate; null: the base's recipe
    dropout: float = 0.0  # share of a layer's input that its adapter does not see, in [0, 1)
    use_dora: bool = False  # DoRA: the length of each output's weight learns apart from its direction
    init: str = "gaussian"  # of A: "gaussian" (standard deviation 1 / rank) or "kaiming"; B starts at 0

    def __post_init__(self) -> None:
        check_stop_step(self.text_encoder_stop_step)
        if self.rank < 1:
            raise ConfigError("method.rank", "must be 1 or more", self.rank, "4 to 32 is usual")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError("method.alpha", "must be above 0 and finite", self.alpha, "null makes it the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError("method.dropout", "must be in [0, 1)", self.dropout, "0 is off")
        if self.init not in INITS:
            raise ConfigError("method.init", f"must be one of {', '.join(INITS)}", self.init, "choose one of them")
        for key in ("target_modules", "text_encoder_target_modules"):
            if getattr(self, key) == []:
                raise ConfigError(f"method.{key}", "must name a layer", [], "leave it out for the base's own choice")

    @property
    def is_additive(self) -> bool:
        return True

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        groups = [ParamGroup("unet", self._inject(base.unet, "target_modules", seed, 0))]
        if self.train_text_encoder:
            layers = self._inject(base.text_encoder, "text_encoder_target_modules", seed, 1)
            groups.append(ParamGroup("text_encoder", layers, stop=self.text_encoder_stop_step))
        if self.train_token:
            groups.append(ParamGroup("token", [open_own_rows(base, names.identifier).rows], stop=self.text_encoder_stop_step))
        return groups

    def _inject(self, network: nn.Module, key: str, seed: int, number: int) -> list[nn.Parameter]:
        """Returns the parameters of adapters put into a network, started as a function of the seed alone."""
        targets = list(getattr(self, key) or ATTENTION)
        lost = next(unmatched(network, targets), None)
        if lost is not None:
            raise ConfigError(f"method.{key}", "must be ends of layer names of the base", lost, "to_q,to_k,to_v,to_out.0 are the UNet's attention")
        with randomness.seeded(randomness.ADAPTER_INIT, seed, number):
            try:
                return inject(network, self.peft_config(targets))
            except ValueError as error:  # a layer of a kind that has no adapter, as a norm
                reason = str(error).split("\n")[0]
                raise ConfigError(f"method.{key}", f"must be linear layers or convolutions ({reason})", targets) from error

    def peft_config(self, targets: list[str]) -> Any:
        """Returns peft's own description of the adapters of one network."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=targets,
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            init_lora_weights=INITS[self.init],
        )
