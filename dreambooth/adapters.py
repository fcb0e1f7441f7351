"""Methods: which parameters learn, and how they are kept. Typed choices of the config.

A method is attached to a loaded base: it freezes all, then opens what it trains and returns it in groups that the optimiser
gives learning rates to. What is trainable is what a checkpoint keeps: `trainable_state` and `load_trainable_state` serve every method.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreambooth.base.protocol import BaseModel
from dreambooth.errors import UserError


class ParamGroup(NamedTuple):
    """Parameters that share a learning rate; `part` is "unet", "text_encoder" or "token"."""

    part: str
    parameters: list[nn.Parameter]


class TokenRows(nn.Module):
    """A token embedding of which a few rows learn and the rest is frozen.

    Gradients of a whole embedding matrix would move (by weight decay and momentum) or at least store every row of the
    vocabulary; here the learned rows are parameters of their own.

    Args:
        embedding: the frozen table, (V, D).
        token_ids: rows that learn; each in [0, V).
    """

    def __init__(self, embedding: nn.Embedding, token_ids: list[int]) -> None:
        super().__init__()
        self.embedding = embedding
        self.token_ids = token_ids
        self.rows = nn.Parameter(embedding.weight.detach()[token_ids].clone())  # (k, D)

    @property
    def weight(self) -> Tensor:
        """The frozen table; read by callers that ask for its dtype or shape."""
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the embeddings (B, L, D) of token ids (B, L)."""
        embedded = self.embedding(ids)  # (B, L, D)
        for row, token_id in zip(self.rows, self.token_ids, strict=True):
            embedded = torch.where((ids == token_id)[..., None], row, embedded)
        return embedded

    def merged(self) -> nn.Embedding:
        """Returns the plain embedding with the learned rows written into it."""
        with torch.no_grad():
            self.embedding.weight[self.token_ids] = self.rows.detach()
        return self.embedding


@dataclass(slots=True)
class Method:
    """Parent of the methods."""

    name: str = "method"

    def attach(self, base: BaseModel, identifier: str) -> list[ParamGroup]:
        """Opens what this method trains, in place, and returns it; everything else is frozen.

        Args:
            base: a freshly loaded base; its output does not change by attaching.
            identifier: the rare word, whose token rows some methods learn.
        """
        raise NotImplementedError

    def merge(self, base: BaseModel) -> None:
        """Turns an attached base back into plain modules with the same output, in place, so that any tool can load it."""
        raise NotImplementedError


@dataclass(slots=True)
class Full(Method):
    """Every weight of the UNet learns, as in the paper; the text encoder and the identifier's own embedding on request."""

    name: str = "full"
    train_text_encoder: bool | None = None  # also the text encoder's layers; null: the base's recipe
    train_token: bool | None = None  # also the identifier's embedding row, at its own rate; null: the base's recipe

    def attach(self, base: BaseModel, identifier: str) -> list[ParamGroup]:
        base.requires_grad_(False)
        groups = [ParamGroup("unet", list(base.unet.requires_grad_(True).parameters()))]
        if self.train_text_encoder:
            layers = base.text_encoder.requires_grad_(True)
            layers.get_input_embeddings().requires_grad_(False)  # the vocabulary stays; the identifier's row is `train_token`
            groups.append(ParamGroup("text_encoder", [p for p in layers.parameters() if p.requires_grad]))
        if self.train_token:
            rows = TokenRows(base.text_encoder.get_input_embeddings(), base.token_id(identifier))
            base.text_encoder.set_input_embeddings(rows)
            groups.append(ParamGroup("token", [rows.rows]))
        return groups

    def merge(self, base: BaseModel) -> None:
        embedding = base.text_encoder.get_input_embeddings()
        if isinstance(embedding, TokenRows):
            base.text_encoder.set_input_embeddings(embedding.merged())


def trainable_state(base: BaseModel) -> dict[str, Tensor]:
    """Returns the learned tensors by name, detached: all that tells the tuned model from its base."""
    return {name: p.detach() for name, p in base.named_parameters() if p.requires_grad}


def load_trainable_state(base: BaseModel, state: dict[str, Tensor], source: str) -> None:
    """Writes learned tensors into an attached base, in place.

    Args:
        source: the file they came from, for the message.

    Raises:
        UserError: if the names or shapes are not exactly those that the method trains.
    """
    own = {name: p for name, p in base.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ state.keys()) or sorted(n for n, p in own.items() if p.shape != state[n].shape)
    if odd:
        raise UserError(
            source,
            "must hold exactly the tensors that the method trains",
            f"{len(odd)} that differ, the first {odd[0]}",
            "use the base and the method that it was trained with",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
