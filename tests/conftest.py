"""What all tests share: no network, one thread, tiny base models, and a resolved config in one call."""

import copy
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch comes: threads that spin would slow the machine's other jobs
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `pytest` finds the package and the scripts in a checkout that is not installed

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_pipelines import build_tiny  # noqa: E402
from written_runs import SHOWN, SUBJECTS, write_run  # noqa: E402

from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel  # noqa: E402
from dreambooth.config import Config, from_plain  # noqa: E402
from dreambooth.recipes import resolve  # noqa: E402

torch.set_num_threads(1)
CHOSEN = {"base": "stable_diffusion", "prior": "class_images", "method": "full", "objective": "follow_base", "optim": "adamw", "encoders": "base"}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives `tiny_folder(family="sd1", prediction_type="epsilon")`: a diffusers folder with random weights, built once a session."""

    @cache
    def build(family: str = "sd1", prediction_type: str = "epsilon", seed: int = 0) -> Path:
        return build_tiny(tmp_path_factory.mktemp("tiny") / f"{family}-{prediction_type}-{seed}", family, prediction_type, seed=seed)

    return build


@pytest.fixture(scope="session")
def shared_base(tiny_folder: Callable[..., Path]) -> StableDiffusionModel:
    """The tiny SD1 model, loaded once: for tests that only look at it."""
    return StableDiffusion(path=str(tiny_folder())).load()


@pytest.fixture
def fresh_base(tiny_folder: Callable[..., Path]) -> StableDiffusionModel:
    """A tiny SD1 model of its own, for a test that changes it."""
    return StableDiffusion(path=str(tiny_folder())).load()


@pytest.fixture
def make_config(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """Gives `make_config({"data.batch_size": 2})`: the resolved config of a run on the tiny SD1 base, with changes by dotted name."""

    def make(changes: dict[str, object] | None = None) -> Config:
        plain: dict = {group: {"name": name} for group, name in CHOSEN.items()}
        settings = {
            "output_dir": str(tmp_path / "runs"),
            "base.path": str(tiny_folder()),
            "subject.class_noun": "dog",
            "data.subject_dir": str(tmp_path / "photos"),
            "sampling.steps": 2,
            "sampling.batch_size": 4,
            "prior.num_images": 4,
            **(changes or {}),
        }
        if settings.get("prior.name") == "none":
            settings = {key: value for key, value in settings.items() if not key.startswith("prior.") or key == "prior.name"}
        for dotted, value in settings.items():
            *parents, last = dotted.split(".")
            node = plain
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        return resolve(from_plain(plain, "test"))

    return make


@pytest.fixture
def write_group(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Path]:
    """Gives `write_group([(changes, gain, drift), ...])`: the folder of one run for every arm, subject and seed."""

    def write(
        arms: Sequence[tuple[dict, float, float]], subjects: Sequence[str] = SUBJECTS, seeds: Sequence[int] = (0, 1), group: str = "prior"
    ) -> Path:
        for number, (changes, gain, drift) in enumerate(arms):
            for subject in subjects:
                for seed in seeds:
                    config = make_config(SHOWN | changes | {"subject.name": subject, "seed": seed, "group": group})
                    write_run(tmp_path / group / f"run-{number}-{subject}-{seed}", copy.deepcopy(config), gain, drift)
        return tmp_path / group

    return write


@pytest.fixture
def prior_group(write_group: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prior preservation off (fidelity 0.6, drift 0.4 above the base's) and on (0.5 and 0.1); off was started first."""
    kept = tmp_path_factory.getbasetemp() / "prior_group"
    if not kept.is_dir():
        shutil.copytree(write_group([({"prior.name": "none"}, 0.6, 0.4), ({}, 0.5, 0.1)]), kept)
    shutil.copytree(kept, tmp_path / "prior", dirs_exist_ok=True)
    return tmp_path / "prior"
