"""Real training runs of a few steps, for tests: in this process, or as a user types them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import train as script
from dreambooth import preflight
from dreambooth.callbacks import ContinueState
from dreambooth.config import Config
from dreambooth.memory import Memory
from dreambooth.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SMALL = (  # as few images as an evaluation can have
    "prior.num_images=4",
    "sampling.steps=2",
    "sampling.guidance_scale=2",
    "evaluation.selection_images=1",
    "evaluation.final_images=2",
    "evaluation.class_images=2",
    "trainer.accelerator=cpu",
    "trainer.progress_bar=false",
    "wandb.mode=disabled",
)

LEAST = (  # still fewer and smaller: for runs whose pictures nobody looks at
    "evaluation.selection_prompts=['a photo of a {subject}']",
    "evaluation.final_prompts=['a {subject} in the snow']",
    "evaluation.final_images=1",
    "sampling.steps=1",
    "data.resolution=32",
)


def composed(*overrides: str) -> Config:
    """Returns the typed config that these words on the command line give."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        small = [word for word in SMALL if not ("prior=none" in overrides and word.startswith("prior."))]
        return OmegaConf.to_object(compose("train", [*small, *overrides]))


def first_value(axis: str) -> str:
    """Returns the first setting of an axis of a sweep: "lr=1,2" -> "lr=1"."""
    override = OverridesParser.create().parse_override(axis)
    return f"{override.key_or_group}={next(override.sweep_string_iterator())}" if override.is_sweep_override() else axis


def run(*overrides: str) -> RunFolder:
    """Trains in this process."""
    return script.train(composed(*overrides))


def typed(*words: str, script: str = "train.py", timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user types it."""
    return subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def no_estimate(patch: pytest.MonkeyPatch) -> None:
    """Spares runs the estimate of their memory, which takes seconds for every new method and precision."""
    patch.setattr(preflight, "estimate", lambda config, base, device: Memory(0, 0, 0, 0, 0, 0, 0))


class Cut(Exception):
    """Stands for a crash."""


@contextmanager
def cut(step: int, is_saved: bool = False) -> Iterator[None]:
    """Within it a run must crash at this step, before its state is written or right after."""
    save = ContinueState.on_train_batch_end

    def crash(self: ContinueState, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == step and not is_saved:
            raise Cut
        save(self, trainer, module, *args)
        if trainer.global_step == step:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(ContinueState, "on_train_batch_end", crash)
        yield


def weights(run: RunFolder, name: str = "final") -> dict:
    """Returns the learned tensors of a run."""
    return load_file(run.path / "checkpoints" / f"{name}.safetensors")


def make_dreambench(folder: Path, subjects: dict[str, str], photos: int = 4) -> Path:
    """Writes a DreamBench folder: subjects (name -> class) with photos, one listed subject without, three prompts of each sort."""
    for name in subjects:
        make_photos(folder / name, photos, seed=sum(map(ord, name)))
    rows = "\n".join(f"{name},{noun}" for name, noun in (subjects | {"absent_toy": "toy"}).items())
    lists = {
        "Object": ["a {0} {1} in the snow", "a {0} {1} with a city in the background", "a red {0} {1}"],
        "Live Subject": ["a {0} {1} in the snow", "a {0} {1} wearing a red hat", "a red {0} {1}"],
    }
    parts = ["Classes", f"subject_name,class\n{rows}", "Prompts"]
    for sort, prompts in lists.items():
        lines = ",\n".join(f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts)
        parts += [f"{sort} Prompts", f"prompt_list = [\n{lines}\n]"]
    (folder / "prompts_and_classes.txt").write_text("\n\n".join(parts) + "\n")
    return folder


def make_photos(folder: Path, count: int = 4, size: tuple[int, int] = (96, 80), seed: int = 0) -> Path:
    """Writes photos that differ, as a phone names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        noise = np.random.default_rng([seed, k] if seed else k).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.BICUBIC).save(folder / f"IMG_{k + 1}.jpg", quality=95)
    return folder
