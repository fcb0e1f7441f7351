"""How much memory a run needs, by parts, before its first step.

The estimate is no table: the training step itself runs once on tensors that have shapes but no contents (PyTorch's fake tensors), with the
run's own method, batch, precision and checkpointing, while all storages that are alive at each moment are added up. What it cannot see is
the scratch space inside one kernel and what an allocator leaves unused.
"""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreambooth.adapters.methods import ParamGroup
from dreambooth.base.protocol import BaseModel, quiet
from dreambooth.config import Config, to_plain
from dreambooth.live_storage import LiveStorage
from dreambooth.optimization import AdamW8bit
from dreambooth.sharding import gathered_bytes

PROBE = 65536  # elements of the parameter that an optimiser is tried on


_KNOWN: dict[str, "Memory"] = {}  # estimates made by this process


class Memory(NamedTuple):
    """Bytes on the device that learns, by what they are for. The first five stay for the whole run; of the last two, one at a time."""

    weights: int  # of the whole model, with what a method adds
    gradients: int
    optimizer: int  # its state, from the second step on
    frozen_copy: int  # un-tuned values for a self-distilled prior
    average: int  # moving average of the weights
    activations: int  # all else at the height of a training step
    sampling: int  # all else at the height of drawing an evaluation's pictures
    model_copies: int = 1  # models in this memory while the final scores are drawn: on a CPU the trained one is still there

    @property
    def standing(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.gradients + self.optimizer + self.frozen_copy + self.average

    @property
    def training(self) -> int:
        """The peak of a training step, in bytes."""
        return self.standing + self.activations

    @property
    def drawing(self) -> int:
        """The peak while pictures are drawn, in bytes: in the middle of the training, or for the final scores."""
        return self.sampling + max(self.standing, self.model_copies * self.weights)

    @property
    def total(self) -> int:
        """The peak of the run, in bytes."""
        return max(self.training, self.drawing)

    def describe(self) -> str:
        """Returns the parts and the sum in words."""
        parts = [f"{key.replace('_', ' ')} {gigabytes(value)}" for key, value in zip(self._fields[:-1], self, strict=False) if value]
        return f"about {gigabytes(self.total)} at the peak ({', '.join(parts)})"


def gigabytes(count: int) -> str:
    """Returns a number of bytes for people: "3.44 GB", or "17 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def estimate(config: Config, base: BaseModel, device: str = "cpu") -> Memory:
    """Returns the memory that a run will need, by parts; nothing is allocated and the base stays as it is.

    Args:
        config: resolved.
        base: freshly loaded, nothing attached.
        device: "cpu" or "cuda", where the training will be.
    """
    key = _shape_key(config, base, device)
    if key not in _KNOWN:
        _KNOWN[key] = _estimate(config, base, device)
    return _KNOWN[key]


def _shape_key(config: Config, base: BaseModel, device: str) -> str:
    """Returns what an estimate depends on: the jobs of a sweep often differ in nothing of it."""
    model = [(type(base).__name__, name, tuple(p.shape), str(p.dtype)) for name, p in base.named_parameters()]
    batch = (config.data.batch_size, config.prior.class_samples, config.data.resolution, config.trainer.accumulate_grad_batches)
    trainer = config.trainer
    modes = (trainer.precision, trainer.gradient_checkpointing, trainer.ema_decay is None, config.prior.asks_frozen_model)
    modes += (trainer.sharding, trainer.devices)
    plain = to_plain(config)
    return repr((device, model, batch, modes, plain["method"], plain["optim"], plain["sampling"], config.identifiers, config.subject.class_noun))


def _estimate(config: Config, base: BaseModel, device: str) -> Memory:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about the very calls that the training makes
        meta, _ = _copied(base, lambda tensor: torch.empty_like(tensor, device="meta"))
        groups = config.method.attach(meta, config.identifiers, config.subject.class_noun, config.seed)
        with FakeTensorMode(allow_non_fake_inputs=True):
            dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(config.trainer.precision)
            fake, made = _copied(meta, lambda tensor: _fake(tensor, device, dtype))
            learned = [made[id(parameter)] for group in groups for parameter in group.parameters]
            activations = _step_peak(config, fake, learned, device)
            sampling = _sampling_peak(config, fake, device)
    count, size = sum(p.numel() for p in learned), sum(_nbytes(p) for p in learned)
    average = 4 * count if config.trainer.ema_decay is not None else 0
    share = config.trainer.devices if config.trainer.sharding else 1  # devices that what learns is shared out to
    together = gathered_bytes(fake) if share > 1 else 0
    aside = size if share > 1 or (average and device == "cpu") else 0  # while drawing: the whole networks; or what learns, its average in its place
    return Memory(
        weights=sum(_nbytes(tensor) for tensor in made.values()) - size + size // share,
        gradients=size // share,
        optimizer=math.ceil(sum(p.numel() * state_bytes_per_element(config, p.dtype, device) for p in learned) / share),
        frozen_copy=size if config.prior.asks_frozen_model else 0,
        average=average,
        activations=max(0, activations - size) + together,
        sampling=sampling + aside,
        model_copies=2 if device == "cpu" else 1,
    )


def state_bytes_per_element(config: Config, dtype: torch.dtype, device: str) -> float:
    """Returns the bytes that the optimiser keeps for each element that learns, found by one step of it on a small parameter.

    Args:
        config: resolved; its `optim` is asked.
        dtype: of the parameter.
        device: "cpu" or "cuda".
    """
    if isinstance(config.optim, AdamW8bit):
        return 2.0 + 2 * 4 / 256  # two moments of a byte, a float32 scale for each block of 256 (Dettmers et al. 2022, sec. 2)
    parameter = nn.Parameter(torch.zeros(PROBE, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = config.optim.build([ParamGroup("unet", [parameter])], config.trainer.precision)
    optimizer.step()
    return sum(_nbytes(value) for value in optimizer.state[parameter].values() if isinstance(value, Tensor)) / PROBE


def available_bytes(base: BaseModel, device: str) -> int | None:
    """Returns the memory that a run can have on its device, counting what the loaded base takes already; None where it cannot be told."""
    own = sum(_nbytes(tensor) for tensor in [*base.parameters(), *base.buffers()])
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()  # PyTorch's own reserve holds the base
    free = [free for free in (_proc_available(), _cgroup_available()) if free is not None]
    return min(free) + own if free else None


def _step_peak(config: Config, base: BaseModel, learned: list[nn.Parameter], device: str) -> int:
    """Returns the most bytes that are alive in a training step, its gradients counted, weights and states not.

    In Lightning's order: the last step's gradients are still there in the forward pass, and go before the backward one.
    """
    classes, side = config.prior.class_samples, config.data.resolution
    count = config.data.batch_size + classes
    if config.trainer.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    base.unet.train()
    base.text_encoder.train()
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    for parameter in learned:
        parameter.grad = torch.empty_like(parameter)
    with LiveStorage(known=[parameter.grad for parameter in learned]) as live:
        with torch.autocast(device, autocast) if autocast else nullcontext():
            pixels, t = torch.empty(count, 3, side, side, device=device), torch.zeros(count, dtype=torch.long, device=device)
            noisy = torch.cat([base.encode_images(one) for one in pixels.split(1)])  # as the caches do: what is kept of an image is its own
            target, text = torch.empty_like(noisy), base.encode_prompts([config.subject.in_prompt(config.subject.prompt)] * count)
            if config.prior.asks_frozen_model:
                with torch.no_grad():
                    base.predict(noisy[:classes], t[:classes], text[:classes])
            loss = (base.predict(noisy, t, text).float() - target).square().mean()
        if config.trainer.accumulate_grad_batches == 1:
            for parameter in learned:
                parameter.grad = None
        loss.backward()
    return live.peak


@torch.no_grad()
def _sampling_peak(config: Config, base: BaseModel, device: str) -> int:
    """Returns the most bytes that are alive while a batch of pictures is drawn, weights not counted."""
    count, side = config.sampling.batch_size, config.data.resolution
    passes = 2 if config.sampling.guidance_scale > 1 else 1  # with and without the prompt, side by side
    base.eval()
    with LiveStorage() as live:
        text = base.encode_prompts([config.subject.in_prompt(config.subject.prompt)] * (passes * count))
        latents = torch.empty(count, *base.latent_shape(side, side), device=device)
        t = torch.zeros(passes * count, dtype=torch.long, device=device)
        base.predict(torch.cat([latents] * passes), t, text)
        del text, t
        base.decode(latents)
    return live.peak


def _copied(base: BaseModel, make: Callable[[Tensor], Tensor]) -> tuple[BaseModel, dict[int, Tensor]]:
    """Returns a copy of a model in which `make` gave every tensor, and the new tensors by the `id` of the old ones."""
    made: dict[int, Tensor] = {}
    for parameter in base.parameters():
        made[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
    for buffer in base.buffers():
        made[id(buffer)] = make(buffer)
    shared = {id(thing): thing for thing in (base.tokenizer, base.scheduler)}
    return copy.deepcopy(base, {**shared, **made}), made


def _fake(tensor: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype, device=device)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _proc_available() -> int | None:
    """Returns what the kernel says is available; None where it says nothing (macOS, Windows)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _cgroup_available(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns what is left of a container's limit; None without one."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
