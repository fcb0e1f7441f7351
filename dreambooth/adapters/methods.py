"""Methods: which parameters learn, and how they are kept. Typed choices of the config.

A method is attached to a loaded base: it freezes all, then opens what it trains and returns it in groups that the optimiser
gives learning rates to. What it opened is what a checkpoint keeps: `trainable_state` and `load_trainable_state` serve every method.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreambooth.adapters.peft_layers import merge_adapters, remove_adapters
from dreambooth.adapters.token_rows import merge_rows, open_own_rows, remove_rows
from dreambooth.base.protocol import BaseModel
from dreambooth.errors import ConfigError, UserError


class ParamGroup(NamedTuple):
    """Parameters that share a learning rate; `part` is "unet", "text_encoder" or "token"."""

    part: str
    parameters: list[nn.Parameter]
    start: int = 0  # optimiser steps done when it begins to learn
    stop: int | None = None  # optimiser steps done when it stops for good; None: never

    def learns_at(self, step: int) -> bool:
        """Tells whether the group learns in the step that follows `step` steps."""
        return self.start <= step and (self.stop is None or step < self.stop)


class Names(NamedTuple):
    """What the subject is called: the rare word, and what it is."""

    identifier: str
    class_noun: str


@dataclass(slots=True)
class Method:
    """Parent of the methods: a child says what it opens, the rest holds for all."""

    name: str = "method"

    def attach(self, base: BaseModel, identifier: str, class_noun: str = "", seed: int = 0) -> list[ParamGroup]:
        """Opens what this method trains, in place, and returns it; everything else is frozen.

        Args:
            base: a freshly loaded base. Its output does not change by attaching, but for prompts with a word that gets a new embedding.
            identifier: the rare word, whose token rows some methods learn.
            class_noun: what the subject is; some methods start the identifier from it.
            seed: of what is drawn at random (the first half of a LoRA).
        """
        base.requires_grad_(False)
        groups = self._open(base, Names(identifier, class_noun), seed)
        opened = {id(p.requires_grad_(True)) for group in groups for p in group.parameters}
        base.learned = tuple(name for name, p in base.named_parameters() if id(p) in opened)
        return groups

    @property
    def is_additive(self) -> bool:
        """Whether the base's own weights stay as they are, so that what was learned can be taken off."""
        return False

    def makes_new_token(self, tokenizer: Any, identifier: str) -> bool:
        """Tells whether attaching makes the identifier a token of its own, which has no past, whatever the word is to the base's tokenizer."""
        return False

    @property
    def recipe_name(self) -> str:
        """Under which name the recipes keep what this method wants to be different, as its learning rates."""
        return self.name

    def merge(self, base: BaseModel) -> None:
        """Turns an attached base back into plain modules with the same output, in place, so that any tool can load it."""
        for network in (base.unet, base.text_encoder):
            merge_adapters(network)
        merge_rows(base)
        base.learned = ()

    def detach(self, base: BaseModel) -> None:
        """Takes an additive method off, in place: the base is as it was before `attach`.

        Raises:
            ValueError: the method has changed the base's own weights.
        """
        if not self.is_additive:
            raise ValueError(f"method={self.name} trains the base's own weights; they cannot be taken off")
        for network in (base.unet, base.text_encoder):
            remove_adapters(network)
        remove_rows(base)
        base.learned = ()

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        """Returns what learns, put into a frozen base in place; `attach` turns its gradients on."""
        raise NotImplementedError


@dataclass(slots=True)
class Full(Method):
    """Every weight of the UNet learns, as in the paper; the text encoder and the identifier's own embedding on request."""

    name: str = "full"
    train_text_encoder: bool | None = None  # also the text encoder's layers; null: the base's recipe
    train_token: bool | None = None  # also the identifier's embedding row, at its own rate; null: the base's recipe
    text_encoder_stop_step: int | None = None  # steps after which the text encoder and that row stay as they are; null: never

    def __post_init__(self) -> None:
        check_stop_step(self.text_encoder_stop_step)

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        groups = [ParamGroup("unet", list(base.unet.parameters()))]
        if self.train_text_encoder:
            vocabulary = {id(p) for p in base.text_encoder.get_input_embeddings().parameters()}  # stays; the identifier's row is `train_token`
            layers = [p for p in base.text_encoder.parameters() if id(p) not in vocabulary]
            groups.append(ParamGroup("text_encoder", layers, stop=self.text_encoder_stop_step))
        if self.train_token:
            groups.append(ParamGroup("token", [open_own_rows(base, names.identifier).rows], stop=self.text_encoder_stop_step))
        return groups


@dataclass(slots=True)
class CrossAttentionKV(Method):
    """The keys and values that the UNet makes of the text, and the identifier's embedding (Custom Diffusion, Kumari et al. 2023, sec. 3.2)."""

    name: str = "cross_attention_kv"
    train_token: bool = True  # also the identifier's embedding row, at its own rate

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        ends = (".attn2.to_k.", ".attn2.to_v.")  # attn2 is the attention to the text, attn1 that of the image to itself
        groups = [ParamGroup("unet", [p for name, p in base.unet.named_parameters() if any(end in name for end in ends)])]
        if self.train_token:
            groups.append(ParamGroup("token", [open_own_rows(base, names.identifier).rows]))
        return groups


def check_stop_step(step: int | None) -> None:
    """Refuses a `text_encoder_stop_step` that is no number of steps."""
    if step is not None and step < 1:
        raise ConfigError("method.text_encoder_stop_step", "must be 1 or more", step, "set train_text_encoder=false to leave it frozen throughout")


def let_learn(groups: list[ParamGroup], step: int) -> None:
    """Turns the gradients of each group on or off for the step that follows `step` steps, in place.

    An optimiser passes over a parameter without a gradient, so a group that stopped keeps every bit: no weight decay, no momentum.
    """
    for group in groups:
        learns = group.learns_at(step)
        for parameter in group.parameters:
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)
                parameter.grad = None


def describe_learning(method: Method, groups: list[ParamGroup]) -> str:
    """Returns what learns, with its size, in one sentence."""
    parts = []
    for group in groups:
        until = "" if group.stop is None else f" until step {group.stop}"
        since = f" from step {group.start}" if group.start else ""
        parts.append(f"{group.part.replace('_', ' ')} {sum(p.numel() for p in group.parameters):,}{since}{until}")
    return f"method {method.name}: parameters that learn: {', '.join(parts)}"


def trainable_state(base: BaseModel) -> dict[str, Tensor]:
    """Returns the learned tensors by name, detached: all that tells the tuned model from its base, those that have stopped learning too."""
    learned = set(base.learned)
    return {name: p.detach() for name, p in base.named_parameters() if name in learned}


def load_trainable_state(base: BaseModel, state: dict[str, Tensor], source: str) -> None:
    """Writes learned tensors into an attached base, in place.

    Args:
        source: the file they came from, for the message.

    Raises:
        UserError: if the names or shapes are not exactly those that the method trains.
    """
    own = trainable_state(base)
    odd = sorted(own.keys() ^ state.keys()) or sorted(n for n, p in own.items() if p.shape != state[n].shape)
    if odd:
        raise UserError(
            source,
            "must hold exactly the tensors that the method trains",
            f"{len(odd)} that differ, the first {odd[0]}",
            "use the base and the method that it was trained with",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
