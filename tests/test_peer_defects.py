"""What goes wrong in common trainers, by name: each defect as a test that this program passes and that trainer would not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from small_runs import make_photos, run, weights

from dreambooth import randomness
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.caches import make_caches
from dreambooth.config import Config
from dreambooth.data import Batch, DreamBoothData, ImageSet
from dreambooth.diffusion import prior_preservation_loss
from dreambooth.module import DreamBoothModule
from dreambooth.photos import prepare, to_pixel_values

MakeConfig = Callable[..., Config]
SEED = 11


def min_snr_weight(t: int, scheduler: DDPMScheduler, gamma: float = 5.0) -> float:
    """Hang et al. 2023, for a base that predicts noise."""
    signal = float(scheduler.alphas_cumprod[t])
    return min(signal / (1 - signal), gamma) / (signal / (1 - signal))


def uneven_keys() -> torch.Tensor:
    """One subject and one class sample whose min-SNR weights differ much: 1 and below 0.2."""
    steps = range(400)
    timesteps = {(step, sample): randomness.integer(1000, randomness.TIMESTEP, SEED, step, sample) for step in steps for sample in (0, 1)}
    step = next(step for step in steps if timesteps[step, 0] > 300 and timesteps[step, 1] < 30)
    return torch.tensor([[SEED, step, 0], [SEED, step, 1]])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["subject first", "class first"])
def test_defect_min_snr_with_prior_averages_the_weights_of_subject_and_class_image(make_config: MakeConfig, order: tuple[int, int]) -> None:
    """A common trainer takes the SNR of all 2B timesteps and multiplies it with the B subject losses.

    With B = 1 that broadcasts: the subject is weighed with the mean of its own and the class image's weight, and the class image not at all.
    """
    config = make_config({"objective.weighting": "min_snr", "data.batch_size": 1, "prior.batch_size": 1})
    base = StableDiffusion(path=config.base.path).load()
    module = DreamBoothModule(config, base, config.method.attach(base, "sks", "dog", 0))
    keys, rows = uneven_keys(), list(order)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    is_prior, prompts = torch.tensor([False, True]), ["a photo of a sks dog", "a photo of a dog"]
    batch = Batch(images[rows], [prompts[row] for row in rows], is_prior[rows], keys[rows])
    logged: dict[str, torch.Tensor] = {}
    module.log_dict = lambda values, **options: logged.update(values)
    module.training_step(batch, 0)

    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    plain, weights = [], []
    with torch.no_grad():
        for row in range(2):
            key = keys[row].tolist()
            t = randomness.integer(1000, randomness.TIMESTEP, *key)
            noise = randomness.normal((4, 8, 8), randomness.NOISE, *key)[None]
            latents = base.encode_images(images[row : row + 1], randomness.normal((4, 8, 8), randomness.POSTERIOR, *key)[None])
            noisy = scheduler.add_noise(latents, noise, torch.tensor([t]))
            text = base.text_encoder(base.tokenize([prompts[row]]))[0]
            plain.append(float((base.unet(noisy, t, text).sample - noise).square().mean()))
            weights.append(min_snr_weight(t, scheduler))
    assert weights[0] == 1.0 and weights[1] < 0.2
    assert float(logged["train/subject_loss"]) == pytest.approx(weights[0] * plain[0], rel=1e-5)
    assert float(logged["train/prior_loss"]) == pytest.approx(weights[1] * plain[1], rel=1e-5)


def test_defect_min_snr_with_prior_crashes_on_more_than_one_image() -> None:
    """With B > 1 the same trainer multiplies B losses with 2B weights, and stops with an error of shapes."""
    weight = torch.tensor([1.0, 0.5, 0.2, 0.1])
    loss = prior_preservation_loss(torch.ones(4, 4), torch.zeros(4, 4), torch.tensor([False, False, True, True]), 1.0, weight)
    assert [loss.subject.item(), loss.prior.item()] == pytest.approx([0.75, 0.15])


def test_defect_cached_latents_are_read_by_loop_step_while_the_order_is_shuffled(make_config: MakeConfig) -> None:
    """A common trainer keeps latents in a list and reads it by the step of the loop, while its loader shuffles images and captions.

    Nearly every caption, 1 - 1/N of them, then meets another image's latents. Here the mean of an image's latents tells which image it is.
    """
    config = make_config({"data.batch_size": 3, "prior.batch_size": 2, "trainer.max_steps": 40})
    base = StableDiffusion(path=config.base.path).load()
    grey = [Image.new("RGB", (64, 64), (level, level, 255 - level)) for level in range(0, 240, 20)]
    sets = ImageSet(grey[:7], [f"photo {k}" for k in range(7)]), ImageSet(grey[7:], [f"class {k}" for k in range(5)])
    known = {}
    for images, captions, *_ in sets:
        for image, caption in zip(images, captions, strict=True):
            known[caption] = base.latent_distribution(to_pixel_values(prepare(image, 64))[None].contiguous())[0][0]
    caches, seen = make_caches(base, "memory", Path(), 10**8), 0
    for batch in DreamBoothData(config, *sets).train_dataloader():
        latents = caches.latents(batch.pixel_values, batch.contents, torch.zeros(5, 4, 8, 8))
        assert all(torch.equal(own, known[prompt]) for own, prompt in zip(latents, batch.prompts, strict=True))
        seen += len(latents)
    assert seen == 200 and caches.computed == 12 and caches.found == 188


@pytest.mark.parametrize("method", ["full", "lora"])
def test_defect_training_crashes_at_the_step_where_the_text_encoder_stops(tiny_folder, tmp_path: Path, method: str) -> None:
    """A common trainer puts one model in place of its list of models at that step, and iterates over it at the next.

    Here gradients of two batches are accumulated over that step. The run goes on to its last step, and what it learned of the text encoder is
    what a run has that ends at the boundary.
    """
    photos, words = make_photos(tmp_path / "dog", count=3), (f"method={method}", "method.train_text_encoder=true", "method.train_token=false")
    common = ("prior=none", "trainer.accumulate_grad_batches=2", "trainer.eval_every=2", "optim.learning_rate=1e-3", "optim.schedule=constant")
    own = (f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog", f"output_dir={tmp_path / 'runs'}")
    own += ("optim.text_encoder_learning_rate=1e-3",)
    longer = run(*words, *common, *own, "trainer.max_steps=4", "method.text_encoder_stop_step=2")
    shorter = run(*words, *common, *own, "trainer.max_steps=2")
    ends, stops = weights(longer), weights(shorter)
    text = [name for name in ends if "text" in name]
    assert longer.record["status"] == "done" and text and len(text) < len(ends)
    assert all(torch.equal(ends[name], stops[name]) for name in text)
    assert not all(torch.equal(ends[name], stops[name]) for name in ends if name not in text)
