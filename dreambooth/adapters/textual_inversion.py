"""Textual inversion (Gal et al. 2023) and pivotal tuning as methods: a word learns first, or alone."""

from dataclasses import dataclass, field
from typing import Any

import torch

from dreambooth.adapters.lora import Lora
from dreambooth.adapters.methods import Full, Method, Names, ParamGroup
from dreambooth.adapters.token_rows import open_new_tokens, open_own_rows
from dreambooth.base.protocol import BaseModel
from dreambooth.errors import ConfigError

REST = ("lora", "full")


@dataclass(slots=True)
class TextualInversion(Method):
    """Only the identifier's embedding learns; a file of kilobytes, and every other prompt draws what it drew before."""

    name: str = "textual_inversion"
    num_vectors: int = 1  # embeddings that the identifier stands for; each takes a token of the prompt
    new_token: bool | None = None  # the identifier becomes a token of its own; null: unless it is one already and one vector is enough
    init_word: str | None = None  # whose embedding every vector starts from (the mean, if it has several tokens); null: the class noun

    def __post_init__(self) -> None:
        if self.num_vectors < 1:
            raise ConfigError("method.num_vectors", "must be 1 or more", self.num_vectors, "1 is the paper's")
        if self.num_vectors > 1 and self.new_token is False:
            raise ConfigError("method.new_token", "must not be false with several vectors", False, "leave it out, or set num_vectors=1")
        if self.init_word is not None and not self.init_word.strip():
            raise ConfigError("method.init_word", "must be a word", self.init_word, "leave it out for the class noun")

    @property
    def is_additive(self) -> bool:
        return True

    def makes_new_token(self, tokenizer: Any, identifier: str) -> bool:
        if self.new_token is not None:
            return self.new_token
        return self.num_vectors > 1 or len(tokenizer(identifier, add_special_tokens=False).input_ids) > 1

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        word = self.init_word or names.class_noun
        if not word:
            raise ConfigError("method.init_word", "must be set where the subject has no class noun", None, "name a word to start from")
        table = base.text_encoder.get_input_embeddings().weight.detach()
        start = table[base.token_id(word)].mean(0)  # (D,)
        if self.makes_new_token(base.tokenizer, names.identifier):
            rows = open_new_tokens(base, names.identifier, self.num_vectors)
        else:
            rows = open_own_rows(base, names.identifier)
        with torch.no_grad():
            rows.rows[:] = start
            if rows.old_tokenizer is not None:
                rows.embedding.weight[rows.token_ids] = start  # a new token has no other past
        return [ParamGroup("token", [rows.rows])]


@dataclass(slots=True)
class PivotalTuning(Method):
    """The identifier's embedding learns first; then it stays, and a LoRA or the whole UNet learns around it (after Roich et al. 2022)."""

    name: str = "pivotal_tuning"
    inversion_steps: int | None = None  # steps in which the embedding learns; null: half of trainer.max_steps
    then: str = "lora"  # what learns afterwards: "lora" or "full" (every weight of the UNet)
    inversion: TextualInversion = field(default_factory=TextualInversion)
    lora: Lora = field(default_factory=lambda: Lora(train_text_encoder=False, train_token=False))  # its settings, where then=lora

    def __post_init__(self) -> None:
        if self.inversion_steps is not None and self.inversion_steps < 1:
            raise ConfigError("method.inversion_steps", "must be 1 or more", self.inversion_steps, "or choose method=lora, which has no inversion")
        if self.then not in REST:
            raise ConfigError("method.then", f"must be one of {', '.join(REST)}", self.then, "choose one of them")
        if self.lora.train_token:
            raise ConfigError("method.lora.train_token", "must be false: the embedding has learned by then", True, "leave it out")

    @property
    def is_additive(self) -> bool:
        return self.then == "lora"

    def makes_new_token(self, tokenizer: Any, identifier: str) -> bool:
        return self.inversion.makes_new_token(tokenizer, identifier)

    @property
    def recipe_name(self) -> str:
        return f"{self.name}_{self.then}"

    def _open(self, base: BaseModel, names: Names, seed: int) -> list[ParamGroup]:
        rest = self.lora if self.then == "lora" else Full(train_text_encoder=False, train_token=False)
        groups = [group._replace(start=self.inversion_steps) for group in rest._open(base, names, seed)]
        return [*groups, *(group._replace(stop=self.inversion_steps) for group in self.inversion._open(base, names, seed))]
