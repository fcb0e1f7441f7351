"""Settings that do not go together: refused where one of them would do nothing, told where it may still be meant."""

import dataclasses

import torch

from dreambooth.adapters.lora import Lora
from dreambooth.adapters.methods import CrossAttentionKV, Full
from dreambooth.adapters.textual_inversion import PivotalTuning, TextualInversion
from dreambooth.config import Config
from dreambooth.errors import ConfigError
from dreambooth.objective import Objective
from dreambooth.optimization import AdamW, AdamW8bit

BFLOAT16_SHARE = 2.0**-8  # half the distance to the next number, of the number itself: a smaller update is rounded away
USUAL_WEIGHT = 0.01  # of a UNet: most of its weights are larger
PEOPLE = frozenset(
    "person people persons human humans man men woman women boy boys girl girls guy lady gentleman child children kid kids baby toddler teenager "
    "adult face portrait selfie actor actress singer celebrity mother father mom dad sister brother son daughter wife husband bride groom".split()
)  # last words of a class noun


def refuse_ignored(config: Config) -> None:
    """Refuses a setting that this config would not use at all.

    Args:
        config: with the recipe filled in.

    Raises:
        ConfigError: `text_encoder_stop_step` where nothing of the text side learns, or `snr_gamma` where no weighting reads it.
    """
    method, where = config.method, "method"
    if isinstance(method, PivotalTuning):
        method, where = method.lora, "method.lora"
    if isinstance(method, Full | Lora) and method.text_encoder_stop_step is not None and not (method.train_text_encoder or method.train_token):
        rule = f"must be null where neither {where}.train_text_encoder nor {where}.train_token is true: there is nothing to stop"
        next_step = f"add {where}.train_text_encoder=true, or leave it out"
        raise ConfigError(f"{where}.text_encoder_stop_step", rule, method.text_encoder_stop_step, next_step)
    default = next(own.default for own in dataclasses.fields(Objective) if own.name == "snr_gamma")
    weighting, gamma = config.objective.weighting, config.objective.snr_gamma
    if weighting == "uniform" and gamma != default:
        rule = f"must be left at {default:g} with objective.weighting=uniform, which does not use it"
        raise ConfigError("objective.snr_gamma", rule, gamma, "add objective.weighting=min_snr, or leave it out")


def odd_settings(config: Config) -> list[str]:
    """Returns what a user may not have meant, one sentence each.

    Args:
        config: resolved.
    """
    return [told for told in (check(config) for check in (_prior_that_teaches_nothing, _mirrored_people, _lost_updates, _no_half_precision)) if told]


def _prior_that_teaches_nothing(config: Config) -> str | None:
    """Tells of a class term beside a method that learns a word alone: a prompt without the word gives it no gradient."""
    word, prompts = config.subject.identifier.casefold(), config.prior_prompts
    if not isinstance(config.method, TextualInversion) or not prompts or any(f" {word} " in f" {text.casefold()} " for text in prompts):
        return None
    told = f"prior={config.prior.name} changes nothing with method={config.method.name}: only the word {config.subject.identifier} learns, "
    return told + "and no class prompt has it; its samples cost time and memory, so add prior=none"


def _mirrored_people(config: Config) -> str | None:
    """Tells of faces that are mirrored: they have a left and a right."""
    nouns = [subject.class_noun or "" for subject in config.subjects]
    noun = next((noun for noun in nouns if PEOPLE & set(noun.casefold().split()[-1:])), None)
    if not config.data.flip or noun is None:
        return None
    return f"data.flip=true mirrors the photos of a {noun}: a face has a left and a right, and its likeness suffers; add data.flip=false"


def _lost_updates(config: Config) -> str | None:
    """Tells of weights in bfloat16 that learn in steps too small for them; AdamW's steps are about as large as its rate."""
    rate = config.optim.learning_rate
    if config.trainer.precision != "bf16-true" or not isinstance(config.method, Full | CrossAttentionKV):
        return None  # the weights of an adapter begin at 0
    if not isinstance(config.optim, AdamW | AdamW8bit) or not rate or rate / BFLOAT16_SHARE >= USUAL_WEIGHT:
        return None
    told = f"trainer.precision=bf16-true rounds steps of optim.learning_rate={rate:g} away in every weight above {rate / BFLOAT16_SHARE:.2g}, "
    return told + "which is most of them, so little is learned; add trainer.precision=bf16-mixed"


def _no_half_precision(config: Config) -> str | None:
    """Tells of the float16 that Lightning replaces on a CPU."""
    if config.trainer.precision != "16-mixed" or config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return None
    told = "trainer.precision=16-mixed is bf16-mixed on a CPU, whatever run.json says; "
    return told + "add trainer.precision=bf16-mixed or 32-true"
