"""The memory estimate against what PyTorch's allocator reports of real steps, and against sums done by hand."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import build_tokenizer, layout
from torch import nn

from dreambooth.adapters.methods import ParamGroup
from dreambooth.base.protocol import BaseModel
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.live_storage import LiveStorage
from dreambooth.memory import Memory, _cgroup_available, available_bytes, estimate, state_bytes_per_element

BATCH = {"data.batch_size": 1, "prior.batch_size": 1, "sampling.batch_size": 2}
MEGA = 10**6


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """Gives the config of a run at 64 px, with changes."""
    return lambda changes=None: make_config(BATCH | (changes or {}))


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A model whose UNet is what takes the memory, as in a real one: 32 x 32 latents of 64 px, a small autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer, parts = build_tokenizer(tmp_path_factory.mktemp("wide")), layout("sd1", "tiny")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**parts.vae | blocks | {"block_out_channels": (8, 8), "norm_num_groups": 4})
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **parts.text_encoder))
    unet = UNet2DConditionModel(**parts.unet | {"sample_size": 32})
    return StableDiffusionModel(unet, text_encoder, vae, tokenizer, DDIMScheduler(clip_sample=False))


def allocator_peak(config: Config, base: BaseModel, tmp_path: Path) -> int:
    """The most bytes allocated during two steps of training written out by hand; the model itself is made under the profiler."""
    side, count = config.data.resolution, config.data.batch_size + config.prior.class_samples
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        own = copy.deepcopy(base)
        parameters = [p for group in config.method.attach(own, "sks", "dog", 0) for p in group.parameters]
        if config.trainer.gradient_checkpointing:
            own.unet.enable_gradient_checkpointing()
        own.unet.train()
        optimizer = config.optim.build([ParamGroup("unet", parameters)])
        for _ in range(2):
            latents = own.encode_images(torch.zeros(count, 3, side, side))
            text = own.encode_prompts(["a photo of a dog"] * count)
            loss = (own.predict(latents, torch.full((count,), 500), text) - torch.ones_like(latents)).square().mean()
            optimizer.zero_grad()  # where Lightning has it: between the forward and the backward pass
            loss.backward()
            optimizer.step()
    file = tmp_path / "trace.json"
    profile.export_chrome_trace(str(file))
    events = [event["args"] for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]  # the counter goes on from the profile before
    return max(event["Total Allocated"] for event in events) - before


@pytest.mark.parametrize("changes", [{"trainer.gradient_checkpointing": True}, {"method.name": "lora"}], ids=["full with checkpointing", "lora"])
def test_estimate_is_within_15_percent_of_what_training_takes(config: Any, wide_base: BaseModel, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = config(changes)
    assert estimate(settings, wide_base).training == pytest.approx(allocator_peak(settings, wide_base, tmp_path), rel=0.15)


def test_estimate_of_activations_is_what_checkpointing_makes_smaller(config: Any, wide_base: BaseModel) -> None:
    plain, less = (estimate(config({"trainer.gradient_checkpointing": on}), wide_base).activations for on in (False, True))
    assert less < 0.6 * plain


def test_estimate_of_lora_is_below_that_of_full_by_gradients_and_states(config: Any, wide_base: BaseModel) -> None:
    full, lora = (estimate(config({"method.name": name}), wide_base) for name in ("full", "lora"))
    assert full.standing - lora.standing == pytest.approx(3 * full.gradients, rel=0.1)


def test_estimate_of_full_fine_tuning_adds_up_by_hand(config: Any, shared_base: BaseModel) -> None:
    memory = estimate(config(), shared_base)
    unet = 4 * sum(p.numel() for p in shared_base.unet.parameters())
    everything = sum(t.numel() * t.element_size() for t in [*shared_base.parameters(), *shared_base.buffers()])
    assert (memory.weights, memory.gradients) == (everything, unet)
    assert memory.optimizer == pytest.approx(2 * unet, rel=1e-3)  # AdamW's two moments
    assert (memory.frozen_copy, memory.average) == (0, 0)
    assert memory.training == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_estimate_counts_what_a_lora_adds_and_no_gradients_of_the_rest(config: Any, shared_base: BaseModel) -> None:
    memory, full = (estimate(config(changes), shared_base) for changes in ({"method.name": "lora", "method.rank": 2}, {}))
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [m for name, m in shared_base.unet.named_modules() if name.endswith(ends) and isinstance(m, nn.Linear)]
    assert memory.gradients == 4 * 2 * sum(m.in_features + m.out_features for m in layers)  # A (2, in) and B (out, 2)
    assert memory.weights == full.weights + memory.gradients


def test_estimate_counts_the_frozen_copy_and_the_average(config: Any, shared_base: BaseModel) -> None:
    memory = estimate(config({"prior.name": "self_distilled", "trainer.ema_decay": 0.9}), shared_base)
    assert memory.frozen_copy == memory.average == memory.gradients > 0


def test_estimate_shares_out_what_stands_and_counts_what_is_gathered(config: Any, shared_base: BaseModel) -> None:
    alone, shared = (estimate(config({"trainer.devices": 2, "trainer.sharding": on}), shared_base) for on in (False, True))
    unet = alone.gradients
    assert shared.gradients == unet // 2 and shared.optimizer == pytest.approx(alone.optimizer / 2, rel=1e-3)
    assert shared.weights == alone.weights - unet + unet // 2
    assert shared.sampling == alone.sampling + unet  # the whole networks, to draw with
    blocks = [m for m in shared_base.unet.modules() if type(m).__name__ in ("ResnetBlock2D", "Transformer2DModel")]
    sizes = [4 * sum(p.numel() for p in block.parameters()) for block in blocks]
    assert shared.activations - alone.activations == 3 * max(sizes) + unet - sum(sizes)


def test_estimate_of_activations_grows_with_the_batch(config: Any, wide_base: BaseModel) -> None:
    one, two = (estimate(config({"data.batch_size": n, "prior.batch_size": n}), wide_base).activations for n in (1, 2))
    assert two / one == pytest.approx(2, rel=0.05)


def test_estimate_of_half_precision_halves_what_stands(config: Any, shared_base: BaseModel) -> None:
    half, whole = (estimate(config({"trainer.precision": precision}), shared_base) for precision in ("bf16-true", "32-true"))
    assert half.gradients == whole.gradients // 2 and half.optimizer == pytest.approx(whole.optimizer / 2, rel=1e-3)
    assert half.weights < 0.51 * whole.weights


def test_estimate_of_sampling_counts_both_halves_of_guidance(config: Any, shared_base: BaseModel) -> None:
    one, many = (estimate(config({"sampling.batch_size": n}), shared_base).sampling for n in (2, 8))
    assert many / one == pytest.approx(4, rel=0.1)


def test_estimate_leaves_the_base_as_it_is(config: Any, fresh_base: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in fresh_base.state_dict().items()}
    tokenizer = fresh_base.tokenizer
    estimate(config({"method.name": "textual_inversion", "method.num_vectors": 2, "subject.identifier": "<rex>"}), fresh_base)
    assert fresh_base.state_dict().keys() == before.keys() and fresh_base.tokenizer is tokenizer and fresh_base.learned == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh_base.state_dict().items())
    assert not any(p.requires_grad for p in fresh_base.parameters()) and not fresh_base.unet.is_gradient_checkpointing


def test_memory_peaks_while_drawing_where_that_takes_more() -> None:
    memory = Memory(10 * MEGA, 10 * MEGA, 20 * MEGA, 0, 0, activations=5 * MEGA, sampling=7 * MEGA, model_copies=2)
    assert (memory.training, memory.drawing, memory.total) == (45 * MEGA, 47 * MEGA, 47 * MEGA)


def test_memory_counts_the_second_model_of_the_final_scores() -> None:
    memory = Memory(10 * MEGA, 1 * MEGA, 2 * MEGA, 0, 0, activations=5 * MEGA, sampling=7 * MEGA, model_copies=2)
    assert memory.total == 27 * MEGA  # two models and what drawing takes; the gradients are gone by then


def test_state_of_adamw_is_two_floats_an_element(config: Any) -> None:
    assert state_bytes_per_element(config(), torch.float32, "cpu") == pytest.approx(8, rel=1e-3)


def test_state_of_8_bit_adamw_is_two_bytes_an_element(config: Any) -> None:
    assert 2 < state_bytes_per_element(config({"optim.name": "adamw8bit"}), torch.float32, "cuda") < 2.1


def test_live_storage_counts_what_is_made_until_it_is_freed() -> None:
    with LiveStorage() as live:
        a = torch.zeros(1000)
        b = a + 1
        view, again = b.view(10, 100), b.add_(1)
        assert live.now == 8000
        del a, b, view, again
        c = torch.zeros(500)
    assert (live.now, live.peak) == (c.numel() * 4, 8000)


def test_live_storage_counts_what_was_there_only_if_it_is_named() -> None:
    old, named = torch.zeros(1000), torch.zeros(100)
    with LiveStorage(known=[named]) as live:
        old.mul_(2)
        assert live.now == 400
        del named
    assert (live.now, live.peak) == (0, 400)


def test_available_bytes_count_the_base_that_is_loaded(shared_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.memory._proc_available", lambda: 500 * MEGA)
    monkeypatch.setattr("dreambooth.memory._cgroup_available", lambda: 300 * MEGA)
    own = sum(t.numel() * t.element_size() for t in [*shared_base.parameters(), *shared_base.buffers()])
    assert available_bytes(shared_base, "cpu") == 300 * MEGA + own


@pytest.mark.parametrize(("limit", "left"), [("1000\n", 400), ("max\n", None), ("500\n", 0)])
def test_cgroup_limit_is_read(tmp_path: Path, limit: str, left: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("600\n")
    assert _cgroup_available(tmp_path) == left
