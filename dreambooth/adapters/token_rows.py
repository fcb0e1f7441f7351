"""The embeddings of a few tokens as parameters of their own: the identifier's rows of the vocabulary, or new tokens added to it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.base.protocol import BaseModel
from dreambooth.errors import ConfigError


class TokenRows(nn.Module):
    """A token embedding of which a few rows learn and the rest is frozen.

    Gradients of a whole embedding matrix would move (by weight decay and momentum) or at least store every row of the
    vocabulary; here the learned rows are parameters of their own.

    Args:
        embedding: the frozen table, (V, D).
        token_ids: rows that learn; each in [0, V).

    Attributes:
        old_tokenizer: the tokenizer before tokens were added to it; None when the rows are the vocabulary's own.
    """

    def __init__(self, embedding: nn.Embedding, token_ids: list[int]) -> None:
        super().__init__()
        self.embedding = embedding
        self.token_ids = token_ids
        self.old_tokenizer: Any | None = None
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

    def vectors(self) -> Tensor:
        """Returns what each of the tokens is embedded as, (k, D); a token that stands twice has one embedding."""
        with torch.no_grad():
            return self(torch.tensor([self.token_ids], device=self.rows.device))[0].detach()  # (k, D)


def token_rows(base: BaseModel) -> TokenRows | None:
    """Returns the learned rows of a base, if it has any."""
    embedding = base.text_encoder.get_input_embeddings()
    return embedding if isinstance(embedding, TokenRows) else None


def open_own_rows(base: BaseModel, identifier: str) -> TokenRows:
    """Makes the rows of a word's own tokens learn, in place: one row, or several for a word that the tokenizer splits."""
    rows = TokenRows(base.text_encoder.get_input_embeddings(), base.token_id(identifier))
    base.text_encoder.set_input_embeddings(rows)
    return rows


def open_new_tokens(base: BaseModel, identifier: str, num_vectors: int) -> TokenRows:
    """Makes a word a token of its own, of one or several vectors that learn, in place.

    Several vectors are the tokens `word`, `word_1`, `word_2`, ..., the custom of diffusers: wherever a prompt says `word`, its pipelines
    and `BaseModel.tokenize` put them all.

    Raises:
        ConfigError: the tokenizer knows one of these names already.
    """
    names = new_token_names(identifier, num_vectors)
    known = sorted(set(names) & base.tokenizer.get_vocab().keys())
    if known:
        rule = "must be a name that the tokenizer does not know, to become a token of its own"
        raise ConfigError("subject.identifier", rule, known[0], f"choose another, as <{identifier.strip('<>')}>, or set method.new_token=false")
    tokenizer = copy.deepcopy(base.tokenizer)  # the old one comes back when the method is taken off
    with_bounds = [_added_token(name) for name in names]
    tokenizer.add_tokens(with_bounds)
    ids = tokenizer.convert_tokens_to_ids(names)
    rows = TokenRows(_resized(base, len(tokenizer)), ids)
    rows.old_tokenizer, base.tokenizer = base.tokenizer, tokenizer
    base.text_encoder.set_input_embeddings(rows)
    return rows


def new_token_names(identifier: str, num_vectors: int) -> list[str]:
    """Returns the tokens that a word of several vectors consists of, as diffusers names them."""
    return [identifier] + [f"{identifier}_{number}" for number in range(1, num_vectors)]


def merge_rows(base: BaseModel) -> None:
    """Writes learned rows into a plain embedding, in place; added tokens stay in the tokenizer."""
    rows = token_rows(base)
    if rows is not None:
        base.text_encoder.set_input_embeddings(rows.merged())


def remove_rows(base: BaseModel) -> None:
    """Takes learned rows off, in place: embedding and tokenizer are as they were."""
    rows = token_rows(base)
    if rows is None:
        return
    base.text_encoder.set_input_embeddings(rows.embedding)
    if rows.old_tokenizer is not None:
        base.tokenizer = rows.old_tokenizer
        base.text_encoder.set_input_embeddings(_resized(base, len(rows.embedding.weight) - len(rows.token_ids)))


def _added_token(name: str) -> Any:
    """Returns a token that is found only as a word of its own: `sks` does not lie in `masks`."""
    from tokenizers import AddedToken

    return AddedToken(name, single_word=True, normalized=True)


def _resized(base: BaseModel, length: int) -> nn.Embedding:
    """Returns the token embedding cut or grown to a number of rows (new ones are 0), and notes it in the text encoder's config."""
    old = base.text_encoder.get_input_embeddings()
    weight = old.weight.new_zeros(length, old.weight.shape[1])  # (length, D)
    shared = min(length, len(old.weight))
    weight[:shared] = old.weight.detach()[:shared]
    base.text_encoder.config.vocab_size = length
    return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=old.padding_idx)
