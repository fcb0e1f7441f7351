"""Drawing: an image depends on its key and prompt alone, every sampler draws, and each PNG says how it was made."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from dreambooth import randomness
from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel
from dreambooth.config import Sampling
from dreambooth.errors import ConfigError, UserError
from dreambooth.generation import generate, pick_device, read_recipe, save_png
from dreambooth.samplers import SAMPLERS, scheduler

SAMPLING = Sampling(sampler="ddim", steps=3, guidance_scale=4.0, batch_size=4)
PROMPTS = ["a photo of a dog", "a small cat on the grass", "a red car", "sks dog in the snow"]
KEYS = [(5, 0), (5, 1), (5, 2), (5, 3)]


def draw(base: StableDiffusionModel, prompts: list[str] = PROMPTS, keys: list[tuple[int, ...]] = KEYS, **changes: object) -> np.ndarray:
    return generate(base, prompts, keys, dataclasses.replace(SAMPLING, **changes), 64).astype(int)


@pytest.fixture(scope="module")
def images(shared_base: StableDiffusionModel) -> np.ndarray:
    return draw(shared_base)


def test_generate_returns_one_uint8_image_a_prompt(shared_base: StableDiffusionModel) -> None:
    found = generate(shared_base, PROMPTS[:3], KEYS[:3], SAMPLING, 64)
    assert found.shape == (3, 64, 64, 3) and found.dtype == np.uint8


def test_generate_draws_pictures_that_differ_and_are_not_flat(images: np.ndarray) -> None:
    assert len({image.tobytes() for image in images}) == 4
    assert all(image.std() > 2 for image in images)


def test_generate_twice_gives_the_same_bits(shared_base: StableDiffusionModel, images: np.ndarray) -> None:
    assert np.array_equal(draw(shared_base), images)


def test_generate_does_not_hear_of_torch_manual_seed(shared_base: StableDiffusionModel, images: np.ndarray) -> None:
    torch.manual_seed(99)
    assert np.array_equal(draw(shared_base), images)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "ddpm"])  # the last two add noise at every step
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_gives_a_key_the_same_image_whatever_the_batch(shared_base: StableDiffusionModel, sampler: str, batch_size: int) -> None:
    """To one of 255 levels: a matrix product may round otherwise in a batch of another size."""
    whole = draw(shared_base, sampler=sampler)
    assert np.abs(draw(shared_base, sampler=sampler, batch_size=batch_size) - whole).max() <= 1


def test_generate_gives_a_key_the_same_image_in_any_place(shared_base: StableDiffusionModel, images: np.ndarray) -> None:
    order = [2, 0, 3, 1]
    found = draw(shared_base, [PROMPTS[i] for i in order], [KEYS[i] for i in order], sampler="ddim")
    assert np.abs(found - images[order]).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_generate_gives_another_key_another_image(shared_base: StableDiffusionModel, sampler: str) -> None:
    found = draw(shared_base, [PROMPTS[0]] * 3, [(5, 0), (5, 1), (6, 0)], sampler=sampler)
    assert min(np.abs(found[i] - found[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 2


def test_generate_gives_another_prompt_another_image(shared_base: StableDiffusionModel) -> None:
    found = draw(shared_base, PROMPTS[:2], [KEYS[0]] * 2)
    assert not np.array_equal(found[0], found[1])


def test_generate_is_diffusers_pipeline_on_the_keyed_latents(tiny_folder: Callable[..., Path], images: np.ndarray) -> None:
    """An independent pipeline, loaded by diffusers itself from the folder, with its stock DDIM and nothing of ours but the first noise."""
    folder = tiny_folder()
    ddim = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, scheduler=ddim, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([randomness.normal((4, 8, 8), randomness.SAMPLING, *key) for key in KEYS])
    expected = pipeline(PROMPTS, num_inference_steps=3, guidance_scale=4.0, latents=latents, output_type="np").images
    assert np.abs(images - (expected * 255).round()).max() <= 1


def test_generate_takes_back_what_guidance_over_exposes(tiny_folder: Callable[..., Path], shared_base: StableDiffusionModel) -> None:
    """Lin et al. 2024, sec. 3.4, as diffusers does it; and at 0 nothing changes."""
    folder = tiny_folder()
    ddim = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, scheduler=ddim, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([randomness.normal((4, 8, 8), randomness.SAMPLING, *key) for key in KEYS])
    given = {"num_inference_steps": 3, "guidance_scale": 9.0, "latents": latents, "output_type": "np"}
    expected = (pipeline(PROMPTS, guidance_rescale=0.7, **given).images * 255).round()
    found, plain = (draw(shared_base, guidance_scale=9.0, guidance_rescale=share) for share in (0.7, 0.0))
    assert np.abs(found - expected).max() <= 1 and np.abs(found - plain).max() > 2
    assert np.array_equal(plain, draw(shared_base, guidance_scale=9.0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(tiny_folder: Callable[..., Path], sampler: str) -> None:
    found = draw(loaded(tiny_folder, "epsilon"), PROMPTS[:1], KEYS[:1], sampler=sampler, steps=3)
    assert found.shape == (1, 64, 64, 3) and found.std() > 2


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_with_every_prediction_type_or_is_refused_by_name(tiny_folder: Callable[..., Path], sampler: str, kind: str) -> None:
    """Diffusers' euler_a and pndm know no clean-latents prediction (the lab's): that is to be said before a run has begun to draw."""
    base = loaded(tiny_folder, kind)
    try:
        scheduler(base, sampler)
    except ConfigError as error:
        assert str(error).startswith("sampling.sampler") and kind == "sample"
        return
    assert draw(base, PROMPTS[:1], KEYS[:1], sampler=sampler, steps=3).std() > 2


MODELS: dict[str, StableDiffusionModel] = {}


def loaded(tiny_folder: Callable[..., Path], kind: str) -> StableDiffusionModel:
    if kind not in MODELS:
        MODELS[kind] = StableDiffusion(path=str(tiny_folder("sd1", kind))).load()
    return MODELS[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scheduler_has_the_noise_schedule_and_prediction_type_of_the_base(tiny_folder: Callable[..., Path], sampler: str, kind: str) -> None:
    base = loaded(tiny_folder, kind)
    if kind == "sample" and sampler in ("euler_a", "pndm"):
        pytest.skip("diffusers has no such sampler")
    made = scheduler(base, sampler)
    torch.testing.assert_close(made.alphas_cumprod, base.alphas_cumprod)
    assert made.config.prediction_type == kind and type(made).__name__ == SAMPLERS[sampler].kind


def test_scheduler_refuses_an_unknown_sampler(shared_base: StableDiffusionModel) -> None:
    with pytest.raises(ConfigError, match="^sampling.sampler must be one of ddim, .*, got 'ddimm'"):
        scheduler(shared_base, "ddimm")


def test_sampling_refuses_an_unknown_sampler_before_any_model_loads() -> None:
    with pytest.raises(ConfigError, match="^sampling.sampler"):
        Sampling(sampler="ddimm")


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_every_module_in_the_mode_it_was_in(fresh_base: StableDiffusionModel, training: bool) -> None:
    fresh_base.unet.train(training)
    before = [module.training for module in fresh_base.modules()]
    draw(fresh_base, PROMPTS[:1], KEYS[:1], steps=1)
    assert [module.training for module in fresh_base.modules()] == before and any(before) == training


def test_generate_draws_in_eval_mode(fresh_base: StableDiffusionModel) -> None:
    """Dropout has no place in a picture, also when it is drawn between two training steps."""
    fresh_base.train()
    modes: set[bool] = set()
    for part in (fresh_base.unet, fresh_base.text_encoder, fresh_base.vae.decoder):
        part.register_forward_pre_hook(lambda module, inputs: modes.update(inner.training for inner in module.modules()))
    draw(fresh_base, PROMPTS[:1], KEYS[:1], steps=1)
    assert modes == {False}


def test_generate_leaves_the_mode_alone_when_it_fails(fresh_base: StableDiffusionModel) -> None:
    fresh_base.unet.train()
    with pytest.raises(UserError):
        draw(fresh_base, ["dog " * 200], KEYS[:1])
    assert fresh_base.unet.training and not fresh_base.vae.training


def test_generate_leaves_gradients_switched_as_they_were(fresh_base: StableDiffusionModel) -> None:
    fresh_base.unet.requires_grad_(True)
    draw(fresh_base, PROMPTS[:1], KEYS[:1], steps=1)
    assert torch.is_grad_enabled() and all(p.requires_grad and p.grad is None for p in fresh_base.unet.parameters())


def test_generate_refuses_a_prompt_that_would_be_cut(shared_base: StableDiffusionModel) -> None:
    with pytest.raises(UserError, match=r"must be at most 77 tokens long .* got 202; shorten it by 125 tokens"):
        draw(shared_base, ["a photo of a dog", "dog " * 200], KEYS[:2])


def test_generate_draws_at_another_resolution(shared_base: StableDiffusionModel) -> None:
    assert generate(shared_base, PROMPTS[:1], KEYS[:1], dataclasses.replace(SAMPLING, steps=1), 96).shape == (1, 96, 96, 3)


def test_generate_refuses_a_resolution_that_the_autoencoder_cannot_make(shared_base: StableDiffusionModel) -> None:
    with pytest.raises(UserError, match="multiple of 8 px, got 50; take 48"):
        generate(shared_base, PROMPTS[:1], KEYS[:1], SAMPLING, 50)


def test_generate_tells_how_many_images_each_batch_made(shared_base: StableDiffusionModel) -> None:
    told: list[int] = []
    generate(shared_base, PROMPTS, KEYS, dataclasses.replace(SAMPLING, steps=1, batch_size=3), 64, told.append)
    assert told == [3, 1]


def test_save_png_keeps_the_pixels_and_the_recipe(tmp_path: Path, images: np.ndarray) -> None:
    recipe = {"prompt": "a sks dog, Käse 犬", "key": [5, 0], "run": None, "step": 3}
    path = save_png(tmp_path / "a" / "x.png", images[0].astype(np.uint8), recipe)
    assert np.array_equal(np.asarray(Image.open(path)), images[0]) and read_recipe(path) == recipe
    assert os.listdir(path.parent) == ["x.png"]


def test_save_png_gives_the_same_bytes_for_the_same_image(tmp_path: Path, images: np.ndarray) -> None:
    first, second = (save_png(tmp_path / name, images[0].astype(np.uint8), {"a": 1}).read_bytes() for name in ("1.png", "2.png"))
    assert first == second


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_read_recipe_of_a_picture_from_elsewhere_is_empty(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x", form)
    assert read_recipe(tmp_path / "x") == {}


@pytest.mark.parametrize(
    ("accelerator", "gpu", "device"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("gpu", True, "cuda"), ("cpu", True, "cpu")]
)
def test_pick_device_follows_the_accelerator(monkeypatch: pytest.MonkeyPatch, accelerator: str, gpu: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert pick_device(accelerator) == device


def test_pick_device_refuses_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="^trainer.accelerator must be auto or cpu"):
        pick_device("gpu")
