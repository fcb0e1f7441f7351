"""The loss on a fixed batch: a function of the model alone, measured without touching the training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import make_photos, run, weights

from dreambooth.callbacks import SelectionScores
from dreambooth.diffusion import add_noise
from dreambooth.fixed_loss import KEY, fixed_batch_loss, fixed_latents
from dreambooth.metrics_csv import MetricsFile
from dreambooth.module import DreamBoothModule
from dreambooth.photos import to_pixel_values
from dreambooth.randomness import NOISE, TIMESTEP, integer, normal
from dreambooth.runs import RunFolder, save_weights
from dreambooth.step_choice import StepScores

STEPS = 6
WORDS = (f"trainer.max_steps={STEPS}", "trainer.eval_every=3", "subject.class_noun=dog", "prior=none", "optim.learning_rate=1e-3")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos") / "dog", count=5)


def trained(base: Path, photos: Path, output: Path, *words: str) -> RunFolder:
    return run(*WORDS, f"base.path={base}", f"data.subject_dir={photos}", f"output_dir={output}", *words)


def losses(folder: RunFolder) -> dict[int, float]:
    return {int(row["step"]): float(row[KEY]) for row in MetricsFile(folder.path / "metrics.csv").read() if row.get(KEY)}


@pytest.fixture(scope="module")
def measured(tiny_folder, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tiny_folder(), photos, tmp_path_factory.mktemp("measured"), "trainer.fixed_loss_every=2", "data.held_out=2")


def test_fixed_loss_stands_in_the_metrics_at_every_due_step_and_the_ends(measured: RunFolder) -> None:
    assert list(losses(measured)) == [0, 2, 4, 6]


def test_neither_fixed_loss_nor_evaluation_changes_what_is_learned(
    measured: RunFolder, tiny_folder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the measuring of a run left out: the weights are the same to the bit."""

    def only_keep(self: SelectionScores, trainer, module) -> None:
        self.rows.append(StepScores(trainer.global_step, float("nan"), float("nan")))
        if trainer.global_step == STEPS:
            save_weights(self.run, "best", module.base, STEPS)
            save_weights(self.run, "final", module.base, STEPS)

    monkeypatch.setattr(SelectionScores, "evaluate", only_keep)
    bare = trained(tiny_folder(), photos, tmp_path, "trainer.fixed_loss_every=0", "data.held_out=2")
    assert losses(bare) == {}
    ours, theirs = weights(measured), weights(bare)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_held_out_photos_change_the_loss_and_not_the_noise(tiny_folder, photos: Path, measured: RunFolder, tmp_path: Path) -> None:
    """On all five photos the training photos are measured: another number than on the two set aside."""
    other = trained(tiny_folder(), photos, tmp_path, "trainer.fixed_loss_every=2", "data.held_out=0")
    assert losses(other)[0] != losses(measured)[0]


def test_fixed_batch_loss_is_the_mean_squared_error_written_out_by_hand(fresh_base, make_config) -> None:
    base, config = fresh_base, make_config()
    module = DreamBoothModule(config, base, config.method.attach(base, "sks"))
    pictures = to_pixel_values(np.random.default_rng(0).integers(0, 256, (3, base.resolution, base.resolution, 3), dtype=np.uint8))
    keys = torch.tensor([[7, 0, k] for k in range(3)])
    base.unet.train()
    got = fixed_batch_loss(module, fixed_latents(module, pictures), "a photo of a sks dog", keys)
    assert base.unet.training
    acp, errors = base.alphas_cumprod, []
    base.eval()
    for k in range(3):
        with torch.no_grad():
            latents = base.encode_images(pictures[k : k + 1])
            t = torch.tensor([integer(len(acp), TIMESTEP, 7, 0, k)])
            noise = normal(latents.shape[1:], NOISE, 7, 0, k)[None]
            pred = base.predict(add_noise(latents, noise, t, acp), t, base.encode_prompts(["a photo of a sks dog"]))
        errors.append(float((pred - noise).pow(2).mean()))
    assert config.objective.weighting == "uniform" and base.prediction_type == "epsilon"
    assert got == pytest.approx(sum(errors) / 3, rel=1e-5)
