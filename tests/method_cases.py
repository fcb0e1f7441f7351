"""Every method with its settings and with what it must train, for the contracts; and a training as train.py does it, without evaluation."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

import train as script
from dreambooth.adapters.methods import ParamGroup
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.data import DreamBoothData, ImageSet, class_set
from dreambooth.module import DreamBoothModule

STEPS, BOUNDARY = 4, 2  # of a run; where the text encoder stops, or the inversion ends
UNET = r"^unet\."
TEXT = r"^text_encoder\.(?!.*token_embedding)"
ROWS = r"^text_encoder\..*token_embedding\.rows$"
LORA = r"\.lora_(A|B|magnitude_vector)\.default\.weight$"
KV = r"^unet\..*\.attn2\.to_(k|v)\.weight$"
SIZES = (96, 80), (96, 80), (64, 96), (96, 80), (64, 96)  # (width, height) of the photos, in turn: two buckets


class Case(NamedTuple):
    """A method with its settings, and by what names its parameters are known: an independent statement of what it trains."""

    settings: dict[str, object]
    declares: str  # a pattern that finds the names of all that learns, and no other
    is_additive: bool = False


CASES = {
    "full": Case({"name": "full", "train_text_encoder": False, "train_token": False}, UNET),
    "full with text encoder until a step": Case(
        {"name": "full", "train_text_encoder": True, "train_token": True, "text_encoder_stop_step": BOUNDARY}, f"{UNET}|{TEXT}|{ROWS}"
    ),
    "lora": Case(
        {"name": "lora", "rank": 2, "alpha": 3.0, "train_text_encoder": False, "train_token": False, "dropout": 0.2}, f"^unet.*{LORA}", True
    ),
    "lora with text encoder until a step": Case(
        {"name": "lora", "rank": 2, "train_text_encoder": True, "train_token": True, "text_encoder_stop_step": BOUNDARY}, f"{LORA}|{ROWS}", True
    ),
    "dora": Case({"name": "lora", "rank": 2, "use_dora": True, "train_text_encoder": True, "train_token": False, "init": "kaiming"}, LORA, True),
    "lora of convolutions": Case(
        {"name": "lora", "rank": 2, "target_modules": ["conv1", "proj_in", "to_q"], "train_text_encoder": False, "train_token": False}, LORA, True
    ),
    "keys and values": Case({"name": "cross_attention_kv"}, f"{KV}|{ROWS}"),
    "textual inversion of the own row": Case({"name": "textual_inversion"}, ROWS, True),
    "textual inversion of three vectors": Case({"name": "textual_inversion", "num_vectors": 3}, ROWS, True),
    "pivotal tuning, then lora": Case(
        {"name": "pivotal_tuning", "inversion_steps": BOUNDARY, "lora": {"rank": 2, "train_text_encoder": True}}, f"{LORA}|{ROWS}", True
    ),
    "pivotal tuning, then full": Case({"name": "pivotal_tuning", "inversion_steps": BOUNDARY, "then": "full"}, f"{UNET}|{ROWS}"),
}
NEW_WORD = {"textual inversion of the own row", "textual inversion of three vectors", "pivotal tuning, then lora", "pivotal tuning, then full"}
PRIORS = {"class images": {}, "no prior": {"prior.name": "none"}, "self-distilled": {"prior.name": "self_distilled"}}
T = torch.tensor([10, 700])


def settings(name: str) -> dict[str, object]:
    """Returns the settings of a run of a case in which all that could remember something is on."""
    method = {f"method.{key}": value for key, value in CASES[name].settings.items()}
    hard = {
        "trainer.max_steps": STEPS,
        "trainer.eval_every": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.ema_decay": 0.6,
        "data.buckets": True,
        "data.crop": "random",
        "data.flip": True,
        "data.batch_size": 2,
        "prior.batch_size": 1,
        "optim.schedule": "cosine",
        "optim.warmup_steps": 1,
        "optim.weight_decay": 0.1,
        **{f"optim.{part}learning_rate": 1e-2 for part in ("", "text_encoder_", "token_")},
    }
    return hard | method


def attach(config: Config, base: StableDiffusionModel) -> list[ParamGroup]:
    """Attaches the method of a config, as train.py does."""
    return config.method.attach(base, config.identifiers, config.subject.class_noun, config.seed)


def attached(config: Config) -> tuple[StableDiffusionModel, list[ParamGroup]]:
    base = config.base.load()
    return base, attach(config, base)


def images(count: int, seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in (SIZES * count)[:count]]


def data_of(config: Config, photos: list[Image.Image]) -> DreamBoothData:
    """Returns the data of a run on these photos, with class images where its prior wants some."""
    noun = config.subject.class_noun
    bank = ImageSet(images(3, 1), [f"a photo of a {noun}"] * 3) if config.prior.wants_bank else None
    return DreamBoothData(config, ImageSet(photos, [f"a photo of a sks {noun}"] * len(photos)), class_set(config, photos, bank))


class Fitted(NamedTuple):
    module: DreamBoothModule
    optimizer: torch.optim.Optimizer
    losses: list[float]


class Watch(pl.Callback):
    """Notes the losses and writes the state after each step."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.losses = folder, []

    def on_train_batch_end(self, trainer: pl.Trainer, module: DreamBoothModule, outputs: dict, *args: object) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(config: Config, folder: Path | None = None, state: Path | None = None) -> Fitted:
    """Trains as train.py does, without evaluation.

    Args:
        config: resolved.
        folder: where the state after each step is written.
        state: to continue from.
    """
    base, groups = attached(config)
    module, watch = DreamBoothModule(config, base, groups), Watch(folder)
    trainer = script.make_trainer(config, [], [watch])
    trainer.fit(module, data_of(config, images(5, 0)), ckpt_path=state, weights_only=True)
    return Fitted(module, trainer.optimizers[0], watch.losses)


@torch.no_grad()
def output(base: StableDiffusionModel, words: str = "sks dog", noun: str = "dog") -> Tensor:
    """Returns what a model predicts for a prompt about the subject and one about its class."""
    base.eval()
    noisy = torch.randn(2, base.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return base.predict(noisy, T, base.encode_prompts([f"a photo of a {words}", f"a photo of a {noun}"]))


def snapshot(base: StableDiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in base.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}
