"""A loss that is no number: the run ends before the weights change, and the samples that it came from are named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.data import DreamBoothData, ImageSet, class_set, subject_set
from dreambooth.errors import UserError
from dreambooth.finite_loss import StopAtNonFinite
from dreambooth.module import DreamBoothModule
from dreambooth.subject_photos import SubjectPhotos

BAD = 3  # which image is spoiled, of the kind that a test spoils
PLAIN = {"data.batch_size": 2, "prior.batch_size": 2, "trainer.max_steps": 8, "data.cache": "off"}


def photos(count: int) -> SubjectPhotos:
    images = [Image.new("RGB", (64, 64), (40 * k, 40 * k, 40 * k)) for k in range(count)]
    return SubjectPhotos(images, [f"photo-{k}.png" for k in range(count)], "", [], "", captions=[f"a sks dog {k}" for k in range(count)])


def stopped(config: Config, base: StableDiffusionModel, is_bad: Callable[[str, bool], bool]) -> tuple[str, int, DreamBoothModule]:
    """Returns the error of a training in which the samples of some (name, is class) have no finite loss, the batches until then, the module."""
    seen, shown = 0, photos(5)

    class Spoiled(DreamBoothModule):
        def training_step(self, batch, batch_idx):
            nonlocal seen
            seen += 1
            bad = [is_bad(name, bool(prior)) for name, prior in zip(batch.names, batch.is_prior, strict=True)]
            pixels = batch.pixel_values.clone()
            pixels[torch.tensor(bad)] = float("nan")
            return super().training_step(batch._replace(pixel_values=pixels), batch_idx)

    bank = ImageSet([image.copy() for image in shown.images], ["a dog"] * 5, names=[f"class-{k}.png" for k in range(5)])
    classes = class_set(config, shown.images, bank if config.prior.wants_bank else None, names=shown.names)
    data, module = DreamBoothData(config, subject_set(shown, False), classes), Spoiled(config, base, config.method.attach(base, "sks", "dog"))
    trainer = pl.Trainer(
        max_steps=config.trainer.max_steps,
        accelerator="cpu",
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        callbacks=[StopAtNonFinite(config)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(UserError) as error:
        trainer.fit(module, data)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    return str(error.value), seen, module


@pytest.mark.parametrize("is_class", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_finite_loss_names_the_step_and_the_sample(make_config, fresh_base, is_class: bool, every: int) -> None:
    config = make_config(PLAIN | {"trainer.accumulate_grad_batches": every})
    name = f"class-{BAD}.png" if is_class else f"photo-{BAD}.png"
    error, batches, module = stopped(config, fresh_base, lambda own, _: own == name)
    step, part = divmod(batches - 1, every)
    place = f"at step {step + 1}" + (f" (batch {part + 1} of {every})" if every > 1 else "")
    sample = f"class sample {name} ('a dog')" if is_class else f"subject image {name} ('a sks dog {BAD}')"
    t = int(module.last.t[~torch.isfinite(module.last.per_sample)])
    assert error.startswith(f"the loss must stay finite, {place}, for {sample} at timestep {t}, got nan; ")
    assert module.trainer.global_step == step and error.count(".png") == 1 and "look at what is named here" in error


def test_finite_loss_leaves_the_weights_as_they_were_before_the_batch(make_config, fresh_base) -> None:
    before = {name: parameter.clone() for name, parameter in fresh_base.named_parameters()}
    error, batches, module = stopped(make_config(PLAIN), fresh_base, lambda name, prior: True)
    assert batches == 1 and "at step 1, for all 4 samples of the batch: " in error and "look at" not in error
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.base.named_parameters())


def test_finite_loss_names_the_photo_of_a_class_sample_of_the_self_distilled_prior(make_config, fresh_base) -> None:
    config = make_config(PLAIN | {"prior.name": "self_distilled", "prior.prompts": ["a {subject}"]})
    error, _, _ = stopped(config, fresh_base, lambda name, prior: prior and name == f"photo-{BAD}.png")
    assert f"for class sample photo-{BAD}.png ('a dog') at timestep" in error


@pytest.mark.parametrize(("precision", "is_advised"), [("32-true", False), ("bf16-mixed", True)])
def test_finite_loss_advises_full_precision_only_where_it_is_not_there_yet(make_config, fresh_base, precision: str, is_advised: bool) -> None:
    error, _, _ = stopped(make_config(PLAIN | {"trainer.precision": precision}), fresh_base, lambda name, prior: True)
    assert ("trainer.precision=32-true" in error) is is_advised and "lower optim.learning_rate" in error


def test_class_images_of_a_folder_keep_their_names(make_config, tmp_path: Path) -> None:
    from small_runs import make_photos

    from dreambooth.class_images import read_user_bank

    folder = make_photos(tmp_path / "dogs")
    bank = read_user_bank(make_config({"prior.class_dir": str(folder)}))
    assert len(bank.names) == len(bank.images) and set(bank.names) == {path.name for path in folder.iterdir()}
