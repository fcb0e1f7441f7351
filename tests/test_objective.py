"""Noise and timesteps of a sample are its own: whatever stands beside it in the batch, and in every arm of an ablation."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from torch import Tensor

from dreambooth import randomness
from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel
from dreambooth.config import Config, Sampling
from dreambooth.data import Batch, Draw
from dreambooth.diffusion import add_noise, capped_velocity_weight, min_snr_weight, prediction_target, scaled_linear_alphas_cumprod
from dreambooth.errors import ConfigError, UserError
from dreambooth.generation import generate
from dreambooth.interop.ldm import save_single_file
from dreambooth.module import DreamBoothModule
from dreambooth.objective import Epsilon, FollowBase, Objective, Sample, Velocity
from dreambooth.samplers import SAMPLERS, check_sampler, scheduler

KINDS = {"epsilon": Epsilon, "v_prediction": Velocity, "sample": Sample}

ACP = scaled_linear_alphas_cumprod()
LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
KEYS = torch.tensor([[3, 10, sample] for sample in range(4)])


def base(kind: str = "epsilon") -> SimpleNamespace:
    """All that an objective asks of a base."""
    return SimpleNamespace(alphas_cumprod=ACP, prediction_type=kind)


def draw_timesteps(count: int, seed: int = 0) -> Tensor:
    keys = torch.tensor([[seed, step, sample] for step in range(count // 4) for sample in range(4)])
    return FollowBase().corrupt(torch.zeros(count, 1, 1, 1), keys, base()).t


def test_corrupt_gives_a_sample_the_same_noise_whatever_the_batch() -> None:
    whole = FollowBase().corrupt(LATENTS, KEYS, base())
    for i in range(4):
        alone = FollowBase().corrupt(LATENTS[i : i + 1], KEYS[i : i + 1], base())
        assert torch.equal(whole.noisy[i], alone.noisy[0]) and torch.equal(whole.target[i], alone.target[0]) and whole.t[i] == alone.t[0]


def test_corrupt_gives_a_sample_the_same_noise_in_any_place() -> None:
    order = torch.tensor([2, 0, 3, 1])
    straight, shuffled = (FollowBase().corrupt(LATENTS[rows], KEYS[rows], base()) for rows in (torch.arange(4), order))
    assert all(torch.equal(a[order], b) for a, b in zip(straight[:4], shuffled[:4], strict=True))


@pytest.mark.parametrize("column", [0, 1, 2], ids=["seed", "step", "sample"])
def test_corrupt_draws_other_noise_for_another_key(column: int) -> None:
    other = KEYS.clone()
    other[:, column] += 100
    first, second = (FollowBase().corrupt(LATENTS, keys, base()) for keys in (KEYS, other))
    assert not torch.equal(first.t, second.t)
    assert abs(float(torch.corrcoef(torch.stack([first.target.flatten(), second.target.flatten()]))[0, 1])) < 0.16  # 5 standard errors


def test_corrupt_gives_different_samples_different_noise() -> None:
    target = FollowBase().corrupt(LATENTS, KEYS, base()).target.flatten(1)
    off_diagonal = torch.corrcoef(target) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.32


def test_corrupt_leaves_a_subject_sample_its_noise_when_the_prior_is_switched_off() -> None:
    with_prior = [Draw(7, place, is_prior) for place in range(2) for is_prior in (False, True)]
    alone = [Draw(7, place, False) for place in range(2)]
    keys = {name: torch.tensor([[0, d.step, d.sample] for d in draws]) for name, draws in (("both", with_prior), ("alone", alone))}
    both, single = FollowBase().corrupt(LATENTS, keys["both"], base()), FollowBase().corrupt(LATENTS[:2], keys["alone"], base())
    subject = torch.tensor([not d.is_prior for d in with_prior])
    assert torch.equal(both.target[subject], single.target) and torch.equal(both.t[subject], single.t)


def test_corrupt_draws_timesteps_evenly_by_chi_square() -> None:
    counts = torch.bincount(draw_timesteps(4000) // 50, minlength=20).float()  # 20 bins, 200 expected in each
    assert 5 < float(((counts - 200) ** 2 / 200).sum()) < 45  # 19 degrees of freedom


def test_corrupt_draws_the_first_and_the_last_timestep_and_none_beyond() -> None:
    keys = torch.tensor([[0, step, 0] for step in range(200)])
    short = SimpleNamespace(alphas_cumprod=ACP[:7], prediction_type="epsilon")
    t = FollowBase().corrupt(torch.zeros(200, 1, 1, 1), keys, short).t
    assert set(t.tolist()) == set(range(7))


def test_corrupt_draws_timesteps_unrelated_to_those_of_the_next_step() -> None:
    t = draw_timesteps(4000).float()
    assert abs(float(torch.corrcoef(torch.stack([t[:-4], t[4:]]))[0, 1])) < 0.08


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_corrupt_noises_as_ho_et_al_and_targets_what_the_base_predicts(kind: str) -> None:
    noise = FollowBase().corrupt(LATENTS, KEYS, base("epsilon")).target
    noisy, t, target, *_ = FollowBase().corrupt(LATENTS, KEYS, base(kind))
    assert torch.equal(noisy, add_noise(LATENTS, noise, t, ACP))
    assert torch.equal(target, prediction_target(kind, LATENTS, noise, t, ACP))


def test_corrupt_draws_the_same_numbers_for_every_prediction_type() -> None:
    first, second = FollowBase().corrupt(LATENTS, KEYS, base("epsilon")), FollowBase().corrupt(LATENTS, KEYS, base("v_prediction"))
    assert torch.equal(first.noisy, second.noisy) and torch.equal(first.t, second.t)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (None, lambda t: torch.ones(len(t))),
        ("uniform", lambda t: torch.ones(len(t))),
        ("min_snr", lambda t: min_snr_weight(t, ACP, 3.0, "v_prediction")),
        ("capped_velocity", lambda t: capped_velocity_weight(t, ACP, 3.0, "v_prediction")),
    ],
)
def test_weight_is_the_chosen_one(weighting: str | None, expected: Callable[[Tensor], Tensor]) -> None:
    corrupted = FollowBase(weighting=weighting, snr_gamma=3.0).corrupt(LATENTS, KEYS, base("v_prediction"))
    torch.testing.assert_close(corrupted.weight, expected(corrupted.t))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_corrupt_of_a_real_base_takes_its_schedule_and_prediction_type(kind: str, tiny_folder: Callable[..., Path]) -> None:
    model = StableDiffusion(path=str(tiny_folder("sd1", kind))).load()
    noisy, t, target, *_ = FollowBase().corrupt(LATENTS, KEYS, model)
    torch.testing.assert_close(noisy, FollowBase().corrupt(LATENTS, KEYS, base()).noisy)
    torch.testing.assert_close(target, FollowBase().corrupt(LATENTS, KEYS, base(kind)).target)
    assert model.predict(noisy, t, model.encode_prompts(["a photo"] * 4)).shape == target.shape


def test_objective_default_weighting_comes_from_the_recipe(make_config: Callable[..., Config]) -> None:
    assert FollowBase().weighting is None
    assert make_config().objective.weighting == "uniform"


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_objective_refuses_a_cap_that_is_not_positive(gamma: float) -> None:
    with pytest.raises(ConfigError, match="^objective.snr_gamma must be above 0"):
        FollowBase(snr_gamma=gamma)


def training_losses(module: DreamBoothModule, batch: Batch) -> dict[str, float]:
    """What one training step logs, and the loss that it returns."""
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **options: logged.update(values)
    total = module.training_step(batch, 0)
    return {key.removeprefix("train/"): float(value) for key, value in logged.items()} | {"returned": float(total.detach())}


def some_batch(is_prior: list[bool], seed: int = 5) -> Batch:
    images = torch.rand(len(is_prior), 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    keys = torch.tensor([[seed, 3, sample] for sample in range(len(is_prior))])
    return Batch(images, ["a photo of a dog" if prior else "a photo of a sks dog" for prior in is_prior], torch.tensor(is_prior), keys)


def losses_by_hand(model: StableDiffusionModel, batch: Batch, kind: str, is_weighted: bool) -> tuple[list[float], list[float]]:
    """The weighted squared error of every subject and every class sample, one by one, over diffusers' own scheduler."""
    theirs, losses = DDPMScheduler.from_config(model.scheduler.config), ([], [])
    for i, (seed, step, sample) in enumerate(batch.keys.tolist()):
        t = randomness.integer(1000, randomness.TIMESTEP, seed, step, sample)
        noise = randomness.normal((4, 8, 8), randomness.NOISE, seed, step, sample)[None]
        posterior = model.vae.encode(batch.pixel_values[i : i + 1]).latent_dist
        chance = randomness.normal((4, 8, 8), randomness.POSTERIOR, seed, step, sample)[None]
        latents = (posterior.mean + posterior.std * chance) * model.vae.config.scaling_factor
        at = torch.tensor([t])
        text = model.text_encoder(model.tokenize([batch.prompts[i]]))[0]
        pred = model.unet(theirs.add_noise(latents, noise, at), t, encoder_hidden_states=text).sample
        target = noise if kind == "epsilon" else theirs.get_velocity(latents, noise, at)
        snr = float(theirs.alphas_cumprod[t] / (1 - theirs.alphas_cumprod[t]))
        weight = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1) if is_weighted else 1.0
        losses[int(batch.is_prior[i])].append(weight * float((pred.double() - target.double()).square().mean()))
    return losses


@pytest.mark.parametrize("is_prior", [[False, False], [False, True, True, False, True]], ids=["without prior", "with prior"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_training_step_loss_is_a_hand_written_loop_over_diffusers_scheduler(
    kind: str, weighting: str, is_prior: list[bool], make_config: Callable[..., Config], tiny_folder: Callable[..., Path]
) -> None:
    config = make_config({"base.path": str(tiny_folder("sd1", kind)), "objective.weighting": weighting, "prior.weight": 0.7})
    model = config.base.load()
    module = DreamBoothModule(config, model, config.method.attach(model, "sks", "dog", 0))
    batch = some_batch(is_prior)
    with torch.no_grad():
        found, (subject, prior) = training_losses(module, batch), losses_by_hand(model, batch, kind, weighting == "min_snr")
    mean_prior = sum(prior) / len(prior) if prior else 0.0
    expected = {"subject_loss": sum(subject) / len(subject), "prior_loss": mean_prior, "loss": sum(subject) / len(subject) + 0.7 * mean_prior}
    assert found == pytest.approx(expected | {"returned": expected["loss"]}, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("measured", KINDS)
@pytest.mark.parametrize("predicted", KINDS)
def test_an_explicit_objective_is_the_loss_of_that_quantity_as_diffusers_implies_it(predicted: str, measured: str) -> None:
    """What the UNet says is turned into clean latents by diffusers' DDIM step, those into the measured quantity, and that error is squared."""
    noisy, t, target, weight, _ = KINDS[measured]().corrupt(LATENTS, KEYS, base(predicted))
    pred = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=predicted, clip_sample=False)
    theirs.set_timesteps(1000)
    for i in range(4):
        noise, at = randomness.normal((4, 8, 8), randomness.NOISE, *KEYS[i].tolist()), t[i : i + 1]
        x0 = theirs.step(pred[i].double(), int(t[i]), noisy[i].double()).pred_original_sample
        signal = theirs.alphas_cumprod[t[i]].double()
        implied_noise = (noisy[i].double() - signal.sqrt() * x0) / (1 - signal).sqrt()
        implied = {"epsilon": implied_noise, "sample": x0, "v_prediction": theirs.get_velocity(x0[None], implied_noise[None], at)[0]}[measured]
        wanted = {"epsilon": noise, "sample": LATENTS[i], "v_prediction": theirs.get_velocity(LATENTS[i : i + 1], noise[None], at)[0]}[measured]
        by_hand = float((implied - wanted.double()).square().mean())
        assert float(weight[i] * (pred[i] - target[i]).square().mean()) == pytest.approx(by_hand, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_explicit_objective_on_a_base_of_its_kind_is_follow_base(kind: str) -> None:
    own, follow = (choice(weighting="min_snr").corrupt(LATENTS, KEYS, base(kind)) for choice in (KINDS[kind], FollowBase))
    assert all(torch.equal(a, b) for a, b in zip(own[:4], follow[:4], strict=True))


@pytest.mark.parametrize("measured", KINDS)
def test_min_snr_gives_the_same_loss_whatever_is_measured(measured: str) -> None:
    """min-SNR says how much the error of x0 counts (Hang et al. 2023, sec. 3.4), so the measured quantity cannot matter."""
    weight = KINDS[measured](weighting="min_snr").corrupt(LATENTS, KEYS, base("sample")).weight
    snr = ACP / (1 - ACP)
    t = FollowBase().corrupt(LATENTS, KEYS, base()).t
    torch.testing.assert_close(weight, snr[t].clamp(max=5.0), atol=0, rtol=1e-4)


def test_an_explicit_objective_leaves_what_the_base_predicts() -> None:
    model = base("epsilon")
    noise = FollowBase().corrupt(LATENTS, KEYS, model).target
    assert torch.equal(Velocity().corrupt(LATENTS, KEYS, model).target, noise) and model.prediction_type == "epsilon"


def test_describe_says_what_is_predicted_and_what_is_measured() -> None:
    told = Velocity(weighting="min_snr", noise_offset=0.1, min_timestep=200).describe(base("epsilon"))
    assert told == (
        "objective: the UNet predicts the noise (epsilon), as its base; the loss is that of the velocity which follows from it, "
        "min-SNR weights (gamma 5), timesteps 200 to 999, noise offset 0.1"
    )


def test_noise_offset_moves_every_cell_of_a_channel_alike() -> None:
    plain, offset = (FollowBase(noise_offset=strength).corrupt(LATENTS, KEYS, base()).target for strength in (0.0, 0.3))
    moved = offset - plain
    torch.testing.assert_close(moved, moved[:, :, :1, :1].expand_as(moved))
    assert len({round(float(value), 5) for value in moved[:, :, 0, 0].flatten()}) == 16  # another one for each channel of each sample


def test_noise_offset_has_the_strength_that_is_asked_for() -> None:
    keys = torch.tensor([[0, step, 0] for step in range(800)])
    latents = torch.zeros(800, 4, 1, 1)
    plain, offset = (FollowBase(noise_offset=strength).corrupt(latents, keys, base()).target for strength in (0.0, 0.3))
    assert float((offset - plain).std()) == pytest.approx(0.3, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([(offset - plain).flatten(), plain.flatten()]))[0, 1])) < 0.1


def test_noise_offset_is_in_what_the_unet_sees() -> None:
    noisy, t, target, *_ = FollowBase(noise_offset=0.3).corrupt(LATENTS, KEYS, base())
    torch.testing.assert_close(noisy, add_noise(LATENTS, target, t, ACP))


def test_input_perturbation_is_in_what_the_unet_sees_and_not_in_the_target() -> None:
    plain, perturbed = (FollowBase(input_perturbation=strength).corrupt(LATENTS, KEYS, base()) for strength in (0.0, 0.2))
    assert torch.equal(perturbed.target, plain.target)
    sigma = (1 - ACP[plain.t]).sqrt().reshape(-1, 1, 1, 1)
    extra = (perturbed.noisy - plain.noisy) / sigma
    assert float(extra.std()) == pytest.approx(0.2, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([extra.flatten(), plain.target.flatten()]))[0, 1])) < 0.16


def test_timestep_range_holds_its_ends_and_nothing_beyond() -> None:
    keys = torch.tensor([[0, step, 0] for step in range(300)])
    t = FollowBase(min_timestep=500, max_timestep=503).corrupt(torch.zeros(300, 1, 1, 1), keys, base()).t
    assert set(t.tolist()) == {500, 501, 502, 503}


def test_timestep_range_of_one_trains_that_one() -> None:
    assert FollowBase(min_timestep=7, max_timestep=7).corrupt(LATENTS, KEYS, base()).t.tolist() == [7] * 4


@pytest.mark.parametrize("predicted", KINDS)
def test_huber_is_that_of_the_measured_error(predicted: str) -> None:
    """For any prediction type, weight x pseudo-Huber of the prediction's error must be the pseudo-Huber of the velocity's error."""
    noisy, t, target, weight, delta = Velocity(huber_delta=0.2, huber_schedule="constant").corrupt(LATENTS, KEYS, base(predicted))
    alpha, sigma = ACP[t].sqrt().reshape(-1, 1, 1, 1), (1 - ACP[t]).sqrt().reshape(-1, 1, 1, 1)
    v_error = 0.5 * torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    own_error = {"v_prediction": 1.0, "sample": sigma, "epsilon": alpha}[predicted] * v_error
    by_hand = (2 * 0.2 * ((v_error.square() + 0.2**2).sqrt() - 0.2)).flatten(1).mean(1)
    d = delta.reshape(-1, 1, 1, 1)
    found = weight * (2 * d * ((own_error.square() + d.square()).sqrt() - d)).flatten(1).mean(1)
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("choice", [FollowBase(), Velocity(huber_delta=0.1, huber_schedule="constant"), Epsilon(noise_offset=0.1)])
def test_corrupt_does_not_hear_of_torchs_default_dtype(choice: Objective) -> None:
    """Lightning's bf16-true sets it to bfloat16 in a training step."""
    exact = choice.corrupt(LATENTS, KEYS, base("sample"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = choice.corrupt(LATENTS, KEYS, base("sample"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weighting", "snr"),
        ("noise_offset", -0.1),
        ("input_perturbation", math.nan),
        ("min_timestep", -1),
        ("max_timestep", -1),
        ("huber_delta", 0.0),
        ("huber_delta", 2.0),
        ("huber_schedule", "linear"),
    ],
)
def test_objective_refuses_what_makes_no_sense(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^objective.{key} must be .*got"):
        FollowBase(**{key: value})


@pytest.mark.parametrize("key", ["min_timestep", "max_timestep"])
def test_check_refuses_a_timestep_that_the_base_has_not(key: str, shared_base: StableDiffusionModel) -> None:
    Objective(**{key: 999}).check(shared_base)
    with pytest.raises(ConfigError, match=f"^objective.{key} must be below 1000, the timesteps of this base, got 1000; take 999"):
        Objective(**{key: 1000}).check(shared_base)


def velocity_base(tiny_folder: Callable[..., Path]) -> StableDiffusionModel:
    return StableDiffusion(path=str(tiny_folder("sd1", "v_prediction"))).load()


def test_zero_terminal_snr_is_refused_where_the_noise_is_predicted(shared_base: StableDiffusionModel) -> None:
    with pytest.raises(ConfigError, match="^objective.zero_terminal_snr must be false for a base that predicts the noise: at the last timestep"):
        Velocity(zero_terminal_snr=True).check(shared_base)


def test_zero_terminal_snr_is_refused_where_the_noise_is_measured(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="^objective.zero_terminal_snr must be false with objective=epsilon"):
        Epsilon(zero_terminal_snr=True).check(velocity_base(tiny_folder))


@pytest.mark.parametrize("choice", [FollowBase, Velocity, Sample])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "capped_velocity"])
def test_zero_terminal_snr_trains_on_diffusers_schedule_to_the_last_timestep(
    choice: type[Objective], weighting: str, tiny_folder: Callable[..., Path]
) -> None:
    model, objective = velocity_base(tiny_folder), choice(weighting=weighting, zero_terminal_snr=True, min_timestep=999)
    objective.prepare(model)
    betas = rescale_zero_terminal_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").betas)
    torch.testing.assert_close(model.alphas_cumprod, torch.cumprod(1 - betas, 0), atol=1e-6, rtol=0)
    noisy, _, target, weight, _ = objective.corrupt(LATENTS, KEYS, model)
    noise = FollowBase().corrupt(LATENTS, KEYS, base()).target
    assert torch.equal(noisy, noise) and torch.equal(target, -LATENTS)  # v = alpha noise - sigma x0, with alpha 0
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("sampler", [name for name, made in SAMPLERS.items() if made.zero_terminal_snr])
def test_zero_terminal_snr_is_sampled_from_the_last_timestep(sampler: str, tiny_folder: Callable[..., Path]) -> None:
    model = velocity_base(tiny_folder)
    FollowBase(zero_terminal_snr=True).prepare(model)
    theirs = scheduler(model, sampler)
    theirs.set_timesteps(4)
    assert int(theirs.timesteps[0]) == 999 and float(theirs.alphas_cumprod[-1]) < 1e-6
    images = generate(model, ["a dog"], [(1, 2)], Sampling(sampler, 4, 2.0, 1), 64)
    assert np.isfinite(images.astype(float)).all() and images.std() > 0


@pytest.mark.parametrize("sampler", ["heun", "pndm"])
def test_zero_terminal_snr_is_refused_for_a_sampler_that_would_ignore_it(sampler: str, tiny_folder: Callable[..., Path]) -> None:
    kind = getattr(diffusers, SAMPLERS[sampler].kind)
    assert float(kind.from_config(DDPMScheduler(rescale_betas_zero_snr=True).config).alphas_cumprod[-1]) > 1e-6  # it does ignore it
    model = velocity_base(tiny_folder)
    check_sampler(sampler, model)
    with pytest.raises(ConfigError, match="^sampling.sampler must be one of .* over a schedule that ends in pure noise, got"):
        check_sampler(sampler, model, zero_terminal_snr=True)
    FollowBase(zero_terminal_snr=True).prepare(model)
    with pytest.raises(ConfigError, match="^sampling.sampler must be one of"):
        scheduler(model, sampler)


def test_zero_terminal_snr_is_in_the_folder_that_is_saved(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = velocity_base(tiny_folder)
    FollowBase(zero_terminal_snr=True).prepare(model)
    saved = json.loads((model.save(tmp_path / "model") / "scheduler" / "scheduler_config.json").read_text())
    assert saved["rescale_betas_zero_snr"] is True and saved["timestep_spacing"] == "trailing" and saved["prediction_type"] == "v_prediction"
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert float(stock.scheduler.alphas_cumprod[-1]) < 1e-6


def test_zero_terminal_snr_changes_a_scheduler_that_cannot_hold_it(tiny_folder: Callable[..., Path]) -> None:
    model = velocity_base(tiny_folder)
    model.scheduler = PNDMScheduler.from_config(model.scheduler.config)
    FollowBase(zero_terminal_snr=True).prepare(model)
    assert isinstance(model.scheduler, DDIMScheduler) and model.scheduler.config.clip_sample is False
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6


def test_zero_terminal_snr_is_refused_for_a_single_file_that_cannot_say_so(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = velocity_base(tiny_folder)
    FollowBase(zero_terminal_snr=True).prepare(model)
    with pytest.raises(UserError, match="must be a folder for a model with zero terminal SNR"):
        save_single_file(model, tmp_path / "model.safetensors")


def test_prepare_leaves_the_base_alone_by_default(tiny_folder: Callable[..., Path]) -> None:
    model = velocity_base(tiny_folder)
    before, template = model.alphas_cumprod.clone(), model.scheduler
    Velocity().prepare(model)
    assert torch.equal(model.alphas_cumprod, before) and model.scheduler is template
