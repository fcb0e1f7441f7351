"""What happens around the training steps: evaluation, keeping the best weights, the state to continue from, the progress line."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers.logger import Logger
from tqdm import tqdm

from dreambooth.base.protocol import BaseModel
from dreambooth.base_images import draw_base
from dreambooth.config import Config
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item, draw_together, image_names, save_images, selection_plan
from dreambooth.files import write_png, write_with
from dreambooth.final_scores import run_reference
from dreambooth.grids import image_grid
from dreambooth.metrics_csv import MetricsFile
from dreambooth.module import DreamBoothModule
from dreambooth.ranks import ALONE, Ranks
from dreambooth.runs import RunFolder, save_weights
from dreambooth.scoring import score
from dreambooth.step_choice import Choice, EarlyStop, StepScores, choose_step, stop_early

LOSSES = "losses"  # entry of a state
SCORE_KEYS = ("identity_fidelity", "prompt_alignment", "drift", "diversity", "class_diversity")


class CsvLogger(Logger):
    """Lightning's logger shell over `metrics.csv`; a continued run first drops the rows behind the state that it continues from."""

    def __init__(self, metrics: MetricsFile) -> None:
        super().__init__()
        self.metrics = metrics

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is in run.json."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        done = step + 1 if any(key.startswith("train/") for key in metrics) else step  # Lightning counts a step's losses from 0
        self.metrics.append(done, {key: value for key, value in metrics.items() if key != "epoch"})


class SelectionScores(pl.Callback):
    """Every `eval_every` steps: the same prompts with the same noise, scored; the weights of the best step so far are kept.

    All ranks draw; the first one scores, writes and decides whether to stop. The un-tuned base is drawn by the first one: the runs of a
    sweep have its pictures in common.

    Args:
        run: where samples and weights go.
        config: resolved.
        photos: uint8 (M, H, W, 3), the prepared subject photos.
        encoders: None when their weights are not to be had: then pictures only, and the last step counts as the best.
        metrics: scores of earlier steps are read from here when a run is continued.
        ranks: this process among those that train together.
    """

    def __init__(
        self, run: RunFolder, config: Config, photos: np.ndarray, encoders: LoadedEncoders | None, metrics: MetricsFile, ranks: Ranks = ALONE
    ) -> None:
        self.run, self.config, self.encoders, self.photos, self.ranks = run, config, encoders, photos, ranks
        self.subject = run_reference(run, encoders)
        self.plan = selection_plan(config)
        self.last_step = -1
        self.seconds: list[float] = []  # that each evaluation of this process took
        self.rows = [_from_csv(row) for row in metrics.read() if row.get("score/evaluated")]

    def on_train_start(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Scores the un-tuned base, unless the run is continued; one that had stopped early stays stopped."""
        self.last_step = trainer.global_step
        if trainer.global_step == 0:
            self.evaluate(trainer, module)
        elif self.agreed_stop().stop:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: DreamBoothModule, *args: Any) -> None:
        """Evaluates after each `eval_every` optimiser steps and after the last."""
        step = trainer.global_step
        if step == self.last_step:  # a batch that only accumulated gradients
            return
        self.last_step = step
        if step % self.config.trainer.eval_every == 0 or step == self.config.trainer.max_steps:
            self.evaluate(trainer, module)

    def evaluate(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Draws, scores, logs; keeps the weights if this step is now the best."""
        started = time.perf_counter()
        with self.run.clock("evaluation while training"), module.evaluation_weights():
            images = self.drawn(module, trainer.global_step)
            values = self.record(trainer, module, images) if images is not None else {}
        self.seconds.append(time.perf_counter() - started)
        tqdm.write(_event(trainer.global_step, values, self.seconds[-1]))
        stop = self.agreed_stop()
        if stop.stop:
            tqdm.write(stop.reason)
            trainer.should_stop = True

    def drawn(self, module: DreamBoothModule, step: int) -> np.ndarray | None:
        """Returns the images of the plan on the first rank, uint8 (N, H, W, 3), and None on the others, which draw their share."""
        if step:
            return draw_together(module.base, self.plan, self.config, self.ranks)
        return self.drawn_base(module.base, self.plan, self.config) if self.ranks.is_first else None

    def record(self, trainer: pl.Trainer, module: DreamBoothModule, images: np.ndarray) -> dict[str, float]:
        """Writes the images of a step, scores and logs them, keeps the weights that shall be kept; returns the scores."""
        step = trainer.global_step
        self.run.confirm()
        save_images(self.run.path / "samples" / f"step-{step:06d}", self.plan, images, {"run": self.run.path.name, "step": step})
        values = score(images, self.plan, self.subject, self.encoders).values if self.encoders else {}
        scores = StepScores(step, *(values.get(key, float("nan")) for key in SCORE_KEYS[:4]))
        self.rows = [row for row in self.rows if row.step < step] + [scores]
        grid = step_grid(self.plan, images)
        row = {f"score/{key}": value for key, value in values.items()} | {"score/evaluated": 1.0}
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
            if hasattr(logger, "log_image"):
                logger.log_image("samples/selection", [grid], step=step)
        write_png(self.run.path / "samples" / f"step-{step:06d}.png", grid)
        write_png(self.run.path / "samples" / "steps.png", trajectory_grid(self.run, self.photos, self.plan))
        if self.choice().step == step:
            save_weights(self.run, "best", module.base, step)
        if step == self.config.trainer.max_steps or self.early_stop().stop:
            save_weights(self.run, "final", module.base, step)
        return values

    def drawn_base(self, base: BaseModel, items: list[Item], config: Config) -> np.ndarray:
        """Returns what `draw` would at step 0; the runs of a sweep share it."""
        return draw_base(self.run, base, items, config)

    def choice(self) -> Choice:
        """Returns the best step so far, by the rule that the config declares."""
        return choose_step(self.rows, self.config.evaluation.min_alignment_ratio, self.config.evaluation.max_drift_gain)

    def early_stop(self) -> EarlyStop:
        """Returns whether the same rule says to stop, by `trainer.early_stop_patience`."""
        patience, rule = self.config.trainer.early_stop_patience, self.config.evaluation
        if patience is None:
            return EarlyStop(False, "")
        return stop_early(self.rows, patience, rule.min_alignment_ratio, rule.max_drift_gain)

    def agreed_stop(self) -> EarlyStop:
        """Returns what the first rank's `early_stop` says, on every rank; all of them call it."""
        return self.ranks.from_first(self.early_stop() if self.ranks.is_first else EarlyStop(False, ""))


class ContinueState(pl.Callback):
    """Writes `checkpoints/last.ckpt` every `checkpoint_every` steps, whole or not at all. Stands after `SelectionScores` in the list."""

    def __init__(self, run: RunFolder, every: int) -> None:
        self.run, self.path, self.every, self.last_step = run, run.path / "checkpoints" / "last.ckpt", every, -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Takes up the step that the run stands at."""
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Saves when the step is due; never between the batches that one step accumulates."""
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        if step % self.every and step != trainer.max_steps:
            return
        self.run.confirm()
        write_state(trainer, self.path)
        if trainer.is_global_zero:
            self.run.update()  # the seconds that this state took: a run that is continued from it has cost them

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the losses of the step: Lightning logs them after this, and a kill in between must not lose them."""
        checkpoint[LOSSES] = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}


def write_state(trainer: pl.Trainer, path: Path) -> None:
    """Writes the state of a training, whole or not at all; all ranks call it, as Lightning has them meet there, and the first one writes."""
    if trainer.is_global_zero:
        write_with(path, trainer.save_checkpoint)
    else:
        trainer.save_checkpoint(path)


class ProgressLine(pl.Callback):
    """One bar over all steps: the loss, the newest scores, steps a second, and the time left."""

    def __init__(self, show: bool, selection: SelectionScores) -> None:
        self.show, self.selection, self.loss, self.bar, self.last_step = show, selection, None, None, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Opens the bar where the run stands."""
        self.last_step = trainer.global_step
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", disable=not self.show, dynamic_ncols=True)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        """Moves on by a step and smooths the loss."""
        if self.show:
            loss = float(outputs["loss"])
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
            newest = self.selection.rows[-1] if self.selection.rows else None
            scores = {"fidelity": newest.identity_fidelity, "alignment": newest.prompt_alignment, "drift": newest.drift} if newest else {}
            shown = {key: f"{value:.2f}" for key, value in scores.items() if math.isfinite(value)}
            self.bar.set_postfix(loss=f"{self.loss:.4f}", **shown, refresh=False)
        self.bar.update(trainer.global_step - self.last_step)
        self.last_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Closes the bar."""
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar before the error is told."""
        if self.bar is not None:
            self.bar.close()


def step_grid(items: list[Item], images: np.ndarray) -> Image.Image:
    """Returns the pictures of one evaluation: a row a prompt, the many class images folded into rows of the same width."""
    prompts = list(dict.fromkeys(item.prompt for item in items))
    width = max(2, sum(item.prompt == prompts[0] for item in items))
    rows, labels = [], []
    for prompt in prompts:
        own = [image for item, image in zip(items, images, strict=True) if item.prompt == prompt]
        for start in range(0, len(own), width):
            rows.append(own[start : start + width])
            labels.append("" if start else prompt)
    return image_grid(rows, labels)


def trajectory_grid(run: RunFolder, photos: np.ndarray, items: list[Item]) -> Image.Image:
    """Returns the course of a run: the photos on top, then a row a step; same column, same prompt and noise (the first image of each prompt)."""
    first = {name: item for item, name in zip(items, image_names(items), strict=True) if item.key[-1] == 0}
    folders = sorted(folder for folder in (run.path / "samples").glob("step-*") if folder.is_dir())
    rows = [[np.asarray(Image.open(folder / name)) for name in first] for folder in folders]
    labels = ["photos", *(f"step {int(folder.name.removeprefix('step-'))}" for folder in folders)]
    return image_grid([list(photos[: len(first)]), *rows], labels, [item.prompt for item in first.values()])


def last_state(run: RunFolder, metrics: MetricsFile, log_every: int) -> Path | None:
    """Returns the state to continue from, with `metrics.csv` brought to its step; None to start at step 0."""
    if run.resume_state is None:
        metrics.truncate(-1)
        return None
    state = torch.load(run.resume_state, map_location="cpu", weights_only=True, mmap=True)  # the step alone: the weights stay on disk
    step, losses = state["global_step"], state.get(LOSSES)
    metrics.truncate(step)
    if losses and step % log_every == 0 and not any(int(row["step"]) == step and row.get("train/loss") for row in metrics.read()):
        metrics.append(step, losses)
    return run.resume_state


def _from_csv(row: dict[str, str]) -> StepScores:
    return StepScores(int(row["step"]), *(float(row.get(f"score/{key}") or "nan") for key in SCORE_KEYS[:4]))


def _event(step: int, values: dict[str, float], seconds: float) -> str:
    known = [key for key in SCORE_KEYS[:4] if math.isfinite(values.get(key, math.nan))]
    shown = ", ".join(f"{key.replace('_', ' ')} {values[key]:.3f}" for key in known) or "samples drawn (no scores)"
    return f"step {step}: {shown} ({seconds:.0f} s)"
