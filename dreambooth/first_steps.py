"""What happens once, at the start of a training: a rehearsal of all that comes at its end, and after ten steps the time and the cost."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from tqdm import tqdm

from dreambooth.callbacks import SelectionScores, write_state
from dreambooth.config import Config
from dreambooth.evaluation import draw, final_plan, selection_plan
from dreambooth.files import write_png, write_with
from dreambooth.grids import image_grid
from dreambooth.module import DreamBoothModule
from dreambooth.preflight import FINAL_ARMS
from dreambooth.runs import RunFolder, load_weights, save_weights

REHEARSAL_STEPS = 2  # denoising steps: the memory and the shapes are those of any number, and every sampler can do two
TIMED_STEPS = 10


class Rehearsal(pl.Callback):
    """Does at step 0 what otherwise comes first at the end, under a temporary name, so that nothing new can fail there.

    The evaluation at step 0 draws, scores and logs; here are the largest batch of the final pictures, the weights written and read back,
    the state to continue from, the grid and the table of scores. Nothing of it stays, and nothing random is drawn from what the training draws from.
    Of several ranks the first one rehearses.

    Args:
        run: where the files go.
        config: resolved.
    """

    def __init__(self, run: RunFolder, config: Config) -> None:
        self.run, self.config = run, config

    def on_train_start(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Rehearses, unless the run is continued: then all of it has been done before."""
        if trainer.global_step:
            return
        checkpoints, samples = self.run.path / "checkpoints", self.run.path / "samples"
        weights, state = checkpoints / "rehearsal.safetensors", checkpoints / "rehearsal.ckpt"
        grid, table = samples / "rehearsal.png", self.run.path / "rehearsal.parquet"
        try:
            with self.run.clock("rehearsal"):
                with module.evaluation_weights():
                    if trainer.is_global_zero:
                        self._write(module, grid, table)
                self._write_state(trainer, state)
        finally:
            if trainer.is_global_zero:
                for file in (weights, state, grid, table):
                    file.unlink(missing_ok=True)

    def _write_state(self, trainer: pl.Trainer, state: Path) -> None:
        """Writes and reads the state; all ranks meet here."""
        write_state(trainer, state)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # a sharded one makes its moments to be asked for them, and counts that as a step
        if trainer.is_global_zero:
            torch.load(state, map_location="cpu", weights_only=True, mmap=True)

    def _write(self, module: DreamBoothModule, grid: Path, table: Path) -> None:
        sampling = dataclasses.replace(self.config.sampling, steps=REHEARSAL_STEPS)
        items = final_plan(self.config)[: sampling.batch_size]  # the largest batch that is to come
        if len(items) <= min(sampling.batch_size, len(selection_plan(self.config))):
            items = items[:1]  # the evaluation that follows draws as large a one
        images = draw(module.base, items, dataclasses.replace(self.config, sampling=sampling))
        write_png(grid, image_grid([list(images)], ["rehearsal"]))
        save_weights(self.run, "rehearsal", module.base, 0)
        load_weights(self.run, "rehearsal", module.base)  # the very values that are there
        write_with(table, lambda temporary: pd.DataFrame({"run": [self.run.path.name], "score": [0.0]}).to_parquet(temporary, index=False))


class TimeLeft(pl.Callback):
    """Says once, after ten steps, how long the whole run will still take, and what it will cost. Stands behind `SelectionScores` in the list.

    Args:
        run: its clocks say what was spent before the training.
        config: resolved.
        selection: its evaluations are timed.
    """

    def __init__(self, run: RunFolder, config: Config, selection: SelectionScores) -> None:
        self.run, self.config, self.selection = run, config, selection
        self.timed: tuple[float, int] | None = None  # seconds and steps at the end of the first step: that one warms up
        self.began, self.last_step, self.is_told = 0.0, 0, False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.began, self.last_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Counts steps without their evaluations."""
        step = trainer.global_step
        if step == self.last_step or self.is_told:
            return
        self.last_step = step
        now = time.perf_counter() - sum(self.selection.seconds)
        if self.timed is None:
            self.timed = now, step
        elif step - self.timed[1] >= TIMED_STEPS - 1:
            self.is_told = True
            if step < self.config.trainer.max_steps:
                tqdm.write(self._line((now - self.timed[0]) / (step - self.timed[1]), step))

    def _line(self, seconds_per_step: float, step: int) -> str:
        left = time_left(self.config, step, seconds_per_step, self.selection.seconds, len(self.selection.plan))
        spent = sum(self.run.record.get("seconds", {}).get(part, 0.0) for part in ("loading", "class images")) + time.perf_counter() - self.began
        told = f"time left: about {duration(sum(left.values()))} ({', '.join(f'{part} {duration(value)}' for part, value in left.items())})"
        told += f", at {1 / seconds_per_step:.2f} steps a second"
        if self.config.price_per_hour is None:
            return told
        cost = (spent + sum(left.values())) / 3600 * self.config.price_per_hour
        return f"{told}; the whole run costs about {cost:.2f} at {self.config.price_per_hour:g} an hour"


def time_left(config: Config, step: int, seconds_per_step: float, evaluations: list[float], images: int) -> dict[str, float]:
    """Returns the seconds that a run still needs, by parts.

    Args:
        config: resolved.
        step: optimiser steps done.
        seconds_per_step: without evaluations.
        evaluations: seconds of each evaluation so far; empty when none was made since the run was continued, and then none is counted.
        images: in each of them.
    """
    steps, every = config.trainer.max_steps, config.trainer.eval_every
    left = {"training": (steps - step) * seconds_per_step}
    if evaluations:
        one = sum(evaluations) / len(evaluations)
        to_come = steps // every - step // every + (1 if steps % every else 0)
        left["evaluations"] = to_come * one
        left["final scores"] = FINAL_ARMS * len(final_plan(config)) * one / images
    return left


def duration(seconds: float) -> str:
    """Returns a time for people: "35 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def release(trainer: pl.Trainer, module: DreamBoothModule) -> None:
    """Frees what only the training needed, before the final scores load the model anew."""
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
    module.frozen = module.averaged = None
