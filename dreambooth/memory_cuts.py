"""What makes a run fit into less memory: changes to its config, each with what it saves by the same estimate."""

import copy
from collections.abc import Callable
from typing import NamedTuple

from dreambooth.adapters.lora import Lora
from dreambooth.base.protocol import BaseModel
from dreambooth.config import Config, to_plain
from dreambooth.errors import ConfigError
from dreambooth.memory import estimate, gigabytes
from dreambooth.optimization import RATES, AdamW, AdamW8bit
from dreambooth.priors import ClassImages
from dreambooth.sharding import check as check_sharding

WORTH = 0.01  # a cut that saves a smaller share of what the run needs is not named


class Cut(NamedTuple):
    """A change to the config that saves memory."""

    words: str  # as on the command line
    saved: int  # bytes, by this cut alone
    together: int  # bytes that the run needs with this cut and those before it

    def describe(self) -> str:
        """Returns the words and what they save."""
        return f"{self.words} (saves {gigabytes(self.saved)})"


def find_cuts(config: Config, base: BaseModel, device: str, room: int) -> list[Cut]:
    """Returns the changes that save memory, in the order of how little they change the result, up to the one with which the run fits.

    Args:
        config, base, device: as for `estimate`.
        room: bytes that there are.
    """
    own = needed = estimate(config, base, device).total
    found: list[Cut] = []
    together = config
    for words, needs_gpu, change in CUTS:
        alone = _changed(config, change)
        if alone is None or (needs_gpu and device == "cpu"):
            continue
        saved = own - estimate(alone, base, device).total
        next_config = _changed(together, change) or together
        with_it = own - saved if together is config else estimate(next_config, base, device).total
        if with_it > needed - WORTH * own:
            continue
        together, needed = next_config, with_it
        found.append(Cut(words, saved, needed))
        if needed <= room:
            break
    return found


def _changed(config: Config, change: Callable[[Config], None]) -> Config | None:
    """Returns a copy of the config with a change, or None where it changes nothing."""
    other = copy.deepcopy(config)
    change(other)
    return None if to_plain(other) == to_plain(config) else other


def _draw_one(config: Config) -> None:
    config.sampling.batch_size = 1


def _sharding(config: Config) -> None:
    config.trainer.sharding = True
    try:
        check_sharding(config)
    except ConfigError:
        config.trainer.sharding = False


def _checkpointing(config: Config) -> None:
    config.trainer.gradient_checkpointing = True


def _eight_bit(config: Config) -> None:
    if isinstance(config.optim, AdamW) and not config.trainer.sharding:
        config.optim = AdamW8bit(**{key: getattr(config.optim, key) for key in RATES})


def _one_sample(config: Config) -> None:
    config.data.batch_size = 1
    if config.prior.class_samples:
        config.prior.batch_size = 1


def _half_precision(config: Config) -> None:
    if config.trainer.precision == "32-true":
        config.trainer.precision = "bf16-mixed"


def _class_images(config: Config) -> None:
    if config.prior.asks_frozen_model:
        kept = {key: getattr(config.prior, key) for key in ("weight", "batch_size", "num_images", "prompts", "seed")}
        config.prior = ClassImages(**kept)


def _no_average(config: Config) -> None:
    config.trainer.ema_decay = None


def _frozen_text_encoder(config: Config) -> None:
    if getattr(config.method, "train_text_encoder", None):
        config.method.train_text_encoder = False


def _adapter(config: Config) -> None:
    if not config.method.is_additive and not config.trainer.sharding:
        config.method = Lora(train_text_encoder=getattr(config.method, "train_text_encoder", False), train_token=False)


CUTS: tuple[tuple[str, bool, Callable[[Config], None]], ...] = (  # words, whether only a GPU gains by it, change
    ("sampling.batch_size=1", False, _draw_one),
    ("trainer.sharding=true", True, _sharding),
    ("trainer.gradient_checkpointing=true", False, _checkpointing),
    ("optim=adamw8bit", True, _eight_bit),
    ("trainer.precision=bf16-mixed", True, _half_precision),
    ("data.batch_size=1 prior.batch_size=1", False, _one_sample),
    ("trainer.ema_decay=null", False, _no_average),
    ("prior=class_images", False, _class_images),
    ("method.train_text_encoder=false", False, _frozen_text_encoder),
    ("method=lora", False, _adapter),
)
