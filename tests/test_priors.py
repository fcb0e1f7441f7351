"""The priors: lambda over the steps, what the class samples are made of, and the un-tuned model that the self-distilled one asks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config, from_plain, to_plain
from dreambooth.data import Batch, DreamBoothData, ImageSet, class_set, describe_batch
from dreambooth.errors import ConfigError
from dreambooth.module import DreamBoothModule
from dreambooth.objective import Epsilon, FollowBase, Objective, Sample, Velocity
from dreambooth.priors import ClassImages, FrozenModel, NoPrior, SelfDistilled, distilled_targets
from dreambooth.subject_photos import SubjectPhotos

MakeConfig = Callable[..., Config]
DISTILLED = {"prior.name": "self_distilled"}
METHODS = {
    "full": {"method.name": "full"},
    "full with text encoder and token": {"method.name": "full", "method.train_text_encoder": True, "method.train_token": True},
    "lora": {"method.name": "lora"},
}
PHOTOS = SubjectPhotos([Image.new("RGB", (8, 8))] * 5, list("abcde"), "", [], "")
EVERYWHERE = [True, False, True, False, False]


def some_batch(is_prior: list[bool], seed: int = 5, step: int = 3) -> Batch:
    images = torch.rand(len(is_prior), 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    keys = torch.tensor([[seed, step, sample] for sample in range(len(is_prior))])
    return Batch(images, ["a photo of a dog" if prior else "a photo of a sks dog" for prior in is_prior], torch.tensor(is_prior), keys)


def make_module(config: Config) -> DreamBoothModule:
    base = config.base.load()
    return DreamBoothModule(config, base, config.method.attach(base, "sks", "dog", config.seed))


def losses(module: DreamBoothModule, batch: Batch) -> dict[str, Tensor]:
    """What one training step logs, and what it returns as "total"."""
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **options: logged.update(values)
    total = module.training_step(batch, 0)
    return {key.removeprefix("train/"): value for key, value in logged.items()} | {"total": total}


def learn(module: DreamBoothModule) -> None:
    """Moves all that learns far from where it began."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in module.groups:
            for parameter in group.parameters:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def noised(module: DreamBoothModule, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and ordinary targets of a batch."""
    latents = torch.randn(len(batch.prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return module.objective.corrupt(latents, batch.keys, module.base)[:3]


# lambda over the steps


def test_weight_without_a_prior_is_zero() -> None:
    assert NoPrior().weight_at(3, 10) == 0.0


def test_weight_without_an_end_is_the_same_at_every_step() -> None:
    assert [ClassImages(weight=0.7).weight_at(step, 10) for step in (0, 5, 9)] == [0.7] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.2]),
    ],
)
def test_weight_goes_from_the_first_to_the_last_step_as_worked_out_by_hand(shape: str, expected: list[float]) -> None:
    prior = SelfDistilled(weight=1.0, weight_end=0.2, weight_shape=shape)
    assert [prior.weight_at(step, 5) for step in range(5)] == pytest.approx(expected)


def test_weight_may_rise_and_end_at_zero() -> None:
    assert ClassImages(weight=0.0, weight_end=2.0).weight_at(9, 10) == 2.0 and ClassImages(weight_end=0.0).weight_at(9, 10) == 0.0


def test_weight_of_a_run_of_one_step_is_the_first() -> None:
    assert ClassImages(weight=0.3, weight_end=0.9).weight_at(0, 1) == 0.3


@pytest.mark.parametrize(("step", "every", "expected"), [(0, 1, 1.0), (2, 1, 0.5), (4, 1, 0.0), (5, 2, 0.5), (9, 2, 0.0)])
def test_training_step_takes_lambda_of_its_optimiser_step(make_config: MakeConfig, step: int, every: int, expected: float) -> None:
    """With two batches a step, batches 4 and 5 are those of step 2."""
    config = make_config({"prior.weight_end": 0.0, "trainer.max_steps": 5, "trainer.accumulate_grad_batches": every})
    with torch.no_grad():
        found = losses(make_module(config), some_batch([False, True], step=step))
    assert float(found["total"]) == pytest.approx(float(found["subject_loss"]) + expected * float(found["prior_loss"]), rel=1e-6)
    assert float(found["prior_loss"]) > 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0),
        ("weight", math.nan),
        ("weight", math.inf),
        ("weight_end", -0.1),
        ("weight_end", math.nan),
        ("weight_shape", "step"),
        ("batch_size", 0),
        ("num_images", -3),
        ("prompts", ["a dog"]),
        ("prompts", []),
    ],
)
def test_class_term_refuses_what_makes_no_sense(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^prior\.{key} must "):
        ClassImages(**{key: value})


def test_self_distilled_refuses_other_images_than_it_knows() -> None:
    with pytest.raises(ConfigError, match="^prior.images must be subject or class, got 'mine'"):
        SelfDistilled(images="mine")


def test_self_distilled_refuses_a_class_folder_that_it_would_not_use() -> None:
    with pytest.raises(ConfigError, match="^prior.class_dir must be null unless prior.images=class"):
        SelfDistilled(class_dir="photos")
    assert SelfDistilled(images="class", class_dir="photos").wants_bank


def test_priors_come_back_from_their_plain_form(make_config: MakeConfig) -> None:
    config = make_config({**DISTILLED, "prior.images": "class", "prior.weight_end": 0.0, "prior.weight_shape": "cosine"})
    assert from_plain(to_plain(config)) == config and type(from_plain(to_plain(config)).prior) is SelfDistilled


# what the class samples are made of


def test_class_set_is_the_bank_where_there_is_one(make_config: MakeConfig) -> None:
    bank = ImageSet([Image.new("RGB", (8, 8))], ["a dog"])
    assert class_set(make_config(), ["photo"], bank) is bank
    assert class_set(make_config({**DISTILLED, "prior.images": "class"}), ["photo"], bank) is bank


def test_class_set_of_the_self_distilled_prior_pairs_every_photo_with_every_class_prompt(make_config: MakeConfig) -> None:
    found = class_set(make_config({**DISTILLED, "prior.prompts": ["a {subject}", "a {subject} at night"]}), ["p", "q", "r"], None)
    assert sorted(zip(found.images, found.captions, strict=True)) == [(photo, caption) for photo in "pqr" for caption in ("a dog", "a dog at night")]


def test_class_set_without_a_prior_is_none(make_config: MakeConfig) -> None:
    assert class_set(make_config({"prior.name": "none"}), ["p"], None) is None


@pytest.mark.parametrize(("subject", "prior"), [(1, 3), (3, 1), (2, 2)])
def test_batches_of_the_self_distilled_prior_have_any_ratio_and_meet_every_pair_equally_often(
    make_config: MakeConfig, subject: int, prior: int
) -> None:
    """Three photos and two prompts make six pairs; 12 steps of 1, 2 or 3 class samples are 2, 4 or 6 rounds."""
    photos = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    changes = {"data.batch_size": subject, "prior.batch_size": prior, "trainer.max_steps": 12, "prior.prompts": ["a {subject}", "one {subject}"]}
    config = make_config(DISTILLED | changes)
    data = DreamBoothData(config, ImageSet(photos, ["a sks dog"] * 3), class_set(config, photos, None))
    data.trainer = None
    seen: dict[tuple, int] = {}
    for batch in data.train_dataloader():
        assert (len(batch.prompts), int(batch.is_prior.sum())) == (subject + prior, prior)
        for row in batch.is_prior.nonzero().flatten().tolist():
            pair = (batch.prompts[row], *(round(float(value)) for value in batch.pixel_values[row, :, 0, 0]))
            seen[pair] = seen.get(pair, 0) + 1
    assert len(seen) == 6 and set(seen.values()) == {2 * prior}


def test_describe_batch_says_what_the_self_distilled_prior_does(make_config: MakeConfig) -> None:
    changes = {"prior.batch_size": 3, "prior.prompts": ["a {subject}"] * 2, "trainer.max_steps": 100, "prior.weight_end": 0.25}
    config = make_config({**DISTILLED, "data.batch_size": 2, **changes})
    assert describe_batch(config, PHOTOS, 10) == (
        "each step: 2 subject images (each of 5 photos is seen 40 times in 100 steps)"
        " + 3 class samples (the subject's own photos under class prompts; each of 5 photos x 2 class prompts: 30.0 times),"
        " whose target is the un-tuned model's prediction, prior loss weight from 1 to 0.25 (linear)"
    )


def test_describe_batch_says_that_class_images_are_distilled_on(make_config: MakeConfig) -> None:
    config = make_config({**DISTILLED, "prior.images": "class", "data.batch_size": 1, "prior.batch_size": 1, "trainer.max_steps": 10})
    assert describe_batch(config, PHOTOS, 20) == (
        "each step: 1 subject images (each of 5 photos is seen 2 times in 10 steps)"
        " + 1 class images (each of 20: 0.5 times), whose target is the un-tuned model's prediction, prior loss weight 1"
    )


# the un-tuned model


@pytest.mark.parametrize("method", METHODS)
def test_distilled_targets_are_the_untuned_models_after_training(make_config: MakeConfig, shared_base: StableDiffusionModel, method: str) -> None:
    """The reference is another model, loaded from disk and never trained."""
    module, batch = make_module(make_config(DISTILLED | METHODS[method])), some_batch(EVERYWHERE)
    learn(module)
    noisy, t, target = noised(module, batch)
    found = distilled_targets(module.base, module.frozen, target, noisy, t, batch.prompts, batch.is_prior)
    with torch.no_grad():
        expected = shared_base.predict(noisy, t, shared_base.encode_prompts(batch.prompts))
        tuned = module.base.predict(noisy, t, module.base.encode_prompts(batch.prompts))
    torch.testing.assert_close(found[batch.is_prior], expected[batch.is_prior], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[~batch.is_prior], target[~batch.is_prior])
    assert float((tuned - expected)[batch.is_prior].abs().max()) > 1e-2  # it has moved


@pytest.mark.parametrize("method", METHODS)
def test_distilled_targets_leave_what_was_learned(make_config: MakeConfig, method: str) -> None:
    module, batch = make_module(make_config(DISTILLED | METHODS[method])), some_batch(EVERYWHERE)
    learn(module)
    before = {name: tensor.clone() for name, tensor in module.base.state_dict().items()}
    noisy, t, target = noised(module, batch)
    distilled_targets(module.base, module.frozen, target, noisy, t, batch.prompts, batch.is_prior)
    after = module.base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_self_distilled_prior_loss_is_nothing_before_the_first_step(make_config: MakeConfig, method: str) -> None:
    module = make_module(make_config(DISTILLED | METHODS[method]))
    module.base.unet.train(), module.base.text_encoder.train()
    found = losses(module, some_batch(EVERYWHERE))
    assert float(found["prior_loss"]) < 1e-10 and float(found["subject_loss"]) > 0.1


def test_self_distilled_prior_loss_is_the_squared_distance_from_the_untuned_model(make_config: MakeConfig, shared_base: StableDiffusionModel) -> None:
    module, batch = make_module(make_config(DISTILLED)), some_batch(EVERYWHERE)
    learn(module)
    with torch.no_grad():
        found = losses(module, batch)
        latents = shared_base.encode_images(batch.pixel_values, posterior(batch))
        noisy, t, *_ = FollowBase().corrupt(latents, batch.keys, shared_base)
        text = shared_base.encode_prompts(batch.prompts)
        distance = (module.base.predict(noisy, t, text) - shared_base.predict(noisy, t, text)).square().flatten(1).mean(1)
    assert float(found["prior_loss"]) == pytest.approx(float(distance[batch.is_prior].mean()), rel=1e-4)


def posterior(batch: Batch) -> Tensor:
    from dreambooth.randomness import POSTERIOR, normals

    return normals((4, 8, 8), POSTERIOR, batch.keys)


def test_self_distilled_prior_keeps_its_samples_when_they_are_shuffled(make_config: MakeConfig) -> None:
    module, batch, order = make_module(make_config(DISTILLED)), some_batch(EVERYWHERE), torch.tensor([3, 0, 4, 2, 1])
    learn(module)
    shuffled = Batch(batch.pixel_values[order], [batch.prompts[i] for i in order], batch.is_prior[order], batch.keys[order])
    with torch.no_grad():
        straight, other = losses(module, batch), losses(module, shuffled)
    assert all(float(straight[key]) == pytest.approx(float(other[key]), rel=1e-5) for key in straight)


@pytest.mark.parametrize("method", METHODS)
def test_self_distilled_gradient_pulls_back_to_the_untuned_model(make_config: MakeConfig, method: str) -> None:
    """Only class samples: one small step against the gradient must bring the tuned model nearer to the un-tuned one."""
    module, batch = make_module(make_config(DISTILLED | METHODS[method])), some_batch([True, True])
    learn(module)
    first = losses(module, batch)["total"]
    first.backward()
    with torch.no_grad():
        parameters = [p for group in module.groups for p in group.parameters if p.grad is not None]
        norm = sum(p.grad.square().sum() for p in parameters)
        assert norm > 0
        for parameter in parameters:
            parameter -= 0.02 * first.detach() / norm * parameter.grad
        assert float(losses(module, batch)["total"]) < float(first)


def test_self_distilled_targets_have_no_gradient(make_config: MakeConfig) -> None:
    module, batch = make_module(make_config(DISTILLED)), some_batch(EVERYWHERE)
    noisy, t, target = noised(module, batch)
    assert not distilled_targets(module.base, module.frozen, target, noisy, t, batch.prompts, batch.is_prior).requires_grad


@pytest.mark.parametrize("method", ["full", "lora"])
def test_self_distilled_under_autocast_mixes_up_no_weights(make_config: MakeConfig, shared_base: StableDiffusionModel, method: str) -> None:
    """Autocast remembers the half-precision copy of each parameter: the un-tuned copy must not serve the tuned model, nor the other way."""
    module, batch = make_module(make_config(DISTILLED | METHODS[method])), some_batch(EVERYWHERE)
    learn(module)
    noisy, t, target = noised(module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        tuned = module.base.predict(noisy, t, module.base.encode_prompts(batch.prompts))  # fills the memory with tuned copies
        found = distilled_targets(module.base, module.frozen, target, noisy, t, batch.prompts, batch.is_prior)
        with torch.no_grad():
            expected = shared_base.predict(noisy, t, shared_base.encode_prompts(batch.prompts))
        again = module.base.predict(noisy, t, module.base.encode_prompts(batch.prompts))
    moved = float((tuned.detach() - expected)[batch.is_prior].abs().mean())
    assert float((found - expected)[batch.is_prior].abs().mean()) < 0.2 * moved
    assert torch.equal(again, tuned) and again.requires_grad


def test_frozen_model_puts_the_learned_values_back_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    frozen, untuned = FrozenModel(list(layer.parameters())), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1.0
    learned = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="on the way"), frozen.in_place():
        assert torch.equal(layer.weight, untuned) and not torch.is_grad_enabled()
        raise RuntimeError("on the way")
    assert torch.equal(layer.weight, learned) and torch.is_grad_enabled()


def test_frozen_model_follows_its_parameters_to_another_dtype() -> None:
    layer = nn.Linear(3, 2)
    frozen, before = FrozenModel(list(layer.parameters())), layer.weight.detach().clone()
    layer.to(torch.bfloat16)
    with frozen.in_place():
        assert torch.equal(layer.weight, before.to(torch.bfloat16))


def test_frozen_model_says_what_it_costs() -> None:
    assert FrozenModel([nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]).nbytes == 5 * 4 + 3 * 2


def test_frozen_model_of_an_adapter_costs_the_adapter_alone(make_config: MakeConfig) -> None:
    sizes = {name: make_module(make_config(DISTILLED | METHODS[name])).frozen.nbytes for name in ("full", "lora")}
    unet = sum(p.numel() * 4 for p in make_config().base.load().unet.parameters())
    assert sizes["full"] == unet and sizes["lora"] < 0.2 * unet


def test_frozen_model_is_not_in_the_checkpoint(make_config: MakeConfig) -> None:
    with_prior, without = (make_module(make_config(changes)) for changes in (DISTILLED, {"prior.name": "none"}))
    states: list[dict] = [{}, {}]
    for module, state in zip((with_prior, without), states, strict=True):
        module.on_save_checkpoint(state)
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys() and without.frozen is None


# every objective with every prior

OBJECTIVES: dict[str, type[Objective]] = {"follow_base": FollowBase, "epsilon": Epsilon, "velocity": Velocity, "sample": Sample}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prior", ["none", "class_images", "self_distilled"])
def test_every_objective_trains_with_every_prior_on_every_base(
    make_config: MakeConfig, tiny_folder: Callable, kind: str, objective: str, prior: str
) -> None:
    config = make_config({"base.path": str(tiny_folder("sd1", kind)), "objective.name": objective, "prior.name": prior})
    assert type(config.objective) is OBJECTIVES[objective]
    module, batch = make_module(config), some_batch([False, True] if prior != "none" else [False])
    found = losses(module, batch)
    found["total"].backward()
    gradients = [p.grad for group in module.groups for p in group.parameters if p.grad is not None]
    assert math.isfinite(float(found["total"])) and float(found["subject_loss"]) > 0
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert np.isclose(float(found["prior_loss"]), 0.0, atol=1e-10) == (prior != "class_images")
