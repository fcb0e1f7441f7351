"""The loop that every stage of pretraining runs in: a budget known beforehand, a log, pictures on the way, and a state that survives a kill."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.files import write_json, write_png, write_with
from dreambooth.lab.pretraining.optimizers import average_into, learning_rate_factor, make_optimizers
from dreambooth.ranks import ALONE, Ranks

DATA, AUTOENCODER, IDENTITY, CAPTIONS, DENOISER = range(40, 45)  # streams of randomness, apart from those of `randomness.py`
SETTLING_STEPS = 20  # before the speed is measured: the first steps compile and allocate
PROBE_S = 8.0  # seconds over which it is measured
WORKING_SHARE = 0.93  # of a budget in minutes; the rest is for pictures and saving
SHOW_PAUSES = 20  # measuring on the way takes at most one part in so many
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """How long one stage trains: pictures seen or minutes, whichever is given."""

    images: int | None = None
    minutes: float | None = None


class Place(NamedTuple):
    """Where a stage keeps what it makes, on which device it runs, from which seed, and which of several processes this is."""

    folder: Path
    device: torch.device
    seed: int = 0
    save_every_s: float = 45.0
    show_every_s: float = 60.0
    compiled: bool = False
    ranks: Ranks = ALONE


class Job(ABC):
    """One training: networks, a loss that depends on the step alone, and figures on held-out renders.

    Attributes:
        name: of its state and its lines in the log.
        networks: what is trained, by name; the averages of their weights are what is kept in the end.
        batch_size: pictures a step.
        matrix_lr, other_lr: of Muon and AdamW.
        matrix_decay: weight decay of Muon.
        recipe: all that the result depends on, as plain values; a state of another recipe is refused.
    """

    name: str
    networks: dict[str, nn.Module]
    batch_size: int
    matrix_lr: float
    other_lr: float
    matrix_decay: float = 0.0
    recipe: dict[str, Any]

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a step, and parts of it for the log; of several ranks each takes its share of the batch."""

    @abstractmethod
    def measure(self, averages: dict[str, nn.Module]) -> tuple[dict[str, float], Image.Image | None]:
        """Returns quick figures of the averaged networks on held-out renders, and a picture to look at."""


def generator(place: Place, *key: int) -> torch.Generator:
    """Returns a generator on the device whose numbers depend on the seed and the key alone."""
    state = np.random.SeedSequence((place.seed, *key)).generate_state(2, np.uint32)
    return torch.Generator(place.device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def precision(device: torch.device) -> torch.autocast:
    """Returns the autocast of training: bfloat16 on a GPU; float32 on a CPU, where convolutions learn slower in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Training:
    """A job on its way: the networks, their averages, the optimisers and the step, all of it in one file."""

    def __init__(self, job: Job, budget: Budget, place: Place, say: Say) -> None:
        self.job, self.budget, self.place, self.say = job, budget, place, say
        for network in job.networks.values():
            network.to(place.device, memory_format=torch.channels_last).train()
        self.averages = {name: deepcopy(network).eval().requires_grad_(False) for name, network in job.networks.items()}
        self.optimizers = make_optimizers(list(job.networks.values()), job.matrix_lr, job.other_lr, job.matrix_decay, place.ranks)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.weights = [weight for network in job.networks.values() for weight in network.parameters()]
        self.averaged = [weight for average in self.averages.values() for weight in average.parameters()]
        self.step, self.spent_s, self.figures = 0, 0.0, {}
        self.total = None if budget.images is None else max(1, math.ceil(budget.images / job.batch_size))
        self._recall()

    @property
    def state_file(self) -> Path:
        """Where the state lies."""
        return self.place.folder / f"{self.job.name}.state"

    @property
    def is_done(self) -> bool:
        """Whether the budget is used up."""
        return self.total is not None and self.step >= self.total

    def run(self) -> dict[str, nn.Module]:
        """Trains to the end of the budget, or returns at once when that has been done; the averaged networks, in eval mode."""
        self.say(self._announcement())
        start = last_save = last_show = time.monotonic()
        before_s, probe, show_every_s = self.spent_s, None, self.place.show_every_s
        while not self.is_done:
            logs = self._advance()
            now = time.monotonic()
            self.spent_s = before_s + now - start
            if self.total is None or self.step == SETTLING_STEPS:
                probe = self._plan(probe, now)
                self.total = self.place.ranks.from_first(self.total)
            if not self.place.ranks.is_first:
                continue  # the first one alone measures and saves; the others wait for it at the next step
            if self.total is None:
                continue  # nothing else may take time while the speed is measured
            if self.is_done or now - last_show > show_every_s:
                self._show(logs)
                last_show = time.monotonic()
                show_every_s = max(self.place.show_every_s, SHOW_PAUSES * (last_show - now))
            if self.is_done or now - last_save > self.place.save_every_s:
                self.save()
                last_save = time.monotonic()
        return self.averages

    def _advance(self) -> dict[str, Tensor]:
        """Does one step and returns the parts of its loss."""
        factor = learning_rate_factor(self.step, self.total)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss, logs = self.job.loss(self.step)
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average_into(self.averaged, self.weights, self.step)
        self.step += 1
        return {"loss": loss.detach(), **logs}

    def _share_gradients(self) -> None:
        """Gives every rank the gradient of the whole batch."""
        ranks = self.place.ranks
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        ranks.add_up(gradients)
        if ranks.count > 1:
            torch._foreach_div_(gradients, ranks.count)

    def _plan(self, probe: tuple[int, float] | None, now: float) -> tuple[int, float] | None:
        """Sets the number of all steps once the speed is known, from a budget in minutes; returns where the measurement began."""
        if self.total is not None:
            self.say(f"{self.job.name}: about {self.spent_s / self.step * (self.total - self.step):.0f} s to go")
            return None
        if probe is None:
            return (self.step, now) if self.step >= SETTLING_STEPS else None
        budget_s = (self.budget.minutes or 0.0) * 60
        if now - probe[1] >= min(PROBE_S, budget_s / 4):
            rate = (self.step - probe[0]) / (now - probe[1])
            left_s = max(0.0, budget_s * WORKING_SHARE - self.spent_s)
            self.total = self.step + int(rate * left_s)
            self.say(f"{self.job.name}: {rate * self.job.batch_size:.0f} images/s, so {self.total} steps in {self.budget.minutes:g} min")
        return probe

    def _show(self, logs: dict[str, Tensor]) -> None:
        """Measures, writes one line to the log and the screen, and a picture."""
        self.figures, picture = self.job.measure(self.averages)
        values = {name: float(value) for name, value in logs.items()} | self.figures
        line = {"stage": self.job.name, "step": self.step, "images": self.step * self.job.batch_size, "seconds": round(self.spent_s, 1), **values}
        with (self.place.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if picture is not None:
            write_png(self.place.folder / f"{self.job.name}.png", picture)
        left = f"about {self.spent_s / self.step * (self.total - self.step):.0f} s left" if self.total else "still measuring the speed"
        words = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"{self.job.name}: step {self.step} of {self.total or '?'}, {words}; {left}")

    def save(self) -> None:
        """Writes the whole state, or leaves the old one."""
        state = {
            "recipe": json.dumps(self.job.recipe, sort_keys=True),
            "budget": [self.budget.images, self.budget.minutes],
            "step": self.step,
            "total": self.total,
            "seconds": self.spent_s,
            "figures": self.figures,
            "networks": {name: network.state_dict() for name, network in self.job.networks.items()},
            "averages": {name: network.state_dict() for name, network in self.averages.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_with(self.state_file, lambda path: torch.save(state, path))
        write_json(self.state_file.with_suffix(".json"), summary(self))

    def _recall(self) -> None:
        """Takes up the state of an earlier run of the same recipe; a changed budget keeps the weights and plans anew."""
        self.place.folder.mkdir(parents=True, exist_ok=True)
        if not self.state_file.is_file():
            return
        state = torch.load(self.state_file, map_location=self.place.device, weights_only=True)
        if state["recipe"] != json.dumps(self.job.recipe, sort_keys=True):
            rule = "must belong to the recipe that is asked for"
            raise UserError(str(self.state_file), rule, state["recipe"], "delete it to train this stage again, or give the old settings")
        for name, network in self.job.networks.items():
            network.load_state_dict(state["networks"][name])
            self.averages[name].load_state_dict(state["averages"][name])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step, self.spent_s, self.figures = state["step"], state["seconds"], state["figures"]
        if state["budget"] == [self.budget.images, self.budget.minutes]:
            self.total = state["total"]

    def _announcement(self) -> str:
        """Returns what will be done, said before it is."""
        job, total = self.job, self.total
        parameters = sum(weight.numel() for weight in self.weights) / 1e6
        length = f"{total} steps of {job.batch_size}" if total else f"{self.budget.minutes:g} min, batches of {job.batch_size}"
        begin = "" if not self.step else "; done already" if self.step == total else f"; goes on at step {self.step}"
        return f"{job.name}: {parameters:.2f} M parameters on {self.place.device}, {length}{begin}"


def summary(course: Training) -> dict[str, Any]:
    """Returns what a model card says about a training."""
    return {
        "recipe": course.job.recipe,
        "steps": course.step,
        "planned_steps": course.total,
        "images_seen": course.step * course.job.batch_size,
        "seconds": round(course.spent_s, 1),
        "device": device_name(course.place.device),
        "figures": course.figures,
    }


def device_name(device: torch.device) -> str:
    """Returns the device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
