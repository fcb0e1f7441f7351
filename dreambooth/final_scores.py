"""The final scores of a run folder: every arm on the same prompts and noise, reference rows beside them, pictures to look at.

Reads the folder and nothing else, so `evaluate.py` gives the same scores at any later time, and goes on where it was cut off.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from dreambooth.base_images import draw_base, keep
from dreambooth.config import Config, to_plain
from dreambooth.dreambench import prompt_kind
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item, draw_missing, final_plan, find_kept
from dreambooth.files import write_json, write_png, write_with
from dreambooth.generation import pick_device
from dreambooth.grids import image_grid
from dreambooth.lab_truth import lab_truth
from dreambooth.metrics.table import METRICS, PAIRWISE, MetricInfo
from dreambooth.ranks import Ranks
from dreambooth.reference_rows import reference_rows
from dreambooth.runs import RunFolder, load, load_weights
from dreambooth.scoring import Reference, Scores, pair_mean_pseudovalues, reference, score
from dreambooth.statistics.intervals import Interval, paired_difference
from dreambooth.worked_out import shared_folder

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]  # (total, label) -> a context that gives "n more are done"
ARMS = ("base", "best", "final")  # un-tuned base, chosen step, last step; in the order in which they are drawn
MANY_COLUMNS = 12  # of a grid; with more prompts they become its rows


def silent(total: int, label: str) -> AbstractContextManager[Callable[[int], None]]:
    """Shows no progress."""
    return nullcontext(lambda done: None)


def evaluate_run(
    run: RunFolder,
    config: Config,
    arms: Sequence[str] = ARMS,
    progress: Progress = silent,
    suffix: str = "",
    pictures: str | None = None,
) -> dict[str, Any]:
    """Draws and scores a run's models; writes scores.json, scores.parquet, samples/final and samples/final_grid.png.

    What is already drawn by the same recipe is taken as it is, so an evaluation that was cut off goes on, with the same result.

    Args:
        run: a run with weights.
        config: the run's config, perhaps with other evaluation settings.
        arms: "best" (the chosen step), "final" (the last step; not drawn again when it is the best one); "base" (un-tuned) is always scored.
        progress: shows how far the drawing is.
        suffix: put behind the names of what is written, so that other prompts do not overwrite the run's own scores.
        pictures: the same for the folder of the pictures; None: as `suffix`.

    Returns:
        What scores.json holds: the evaluator's version, the plan, a row of scores for each arm, reference rows, paired differences.

    Raises:
        UserError: the folder lacks what is asked for.
    """
    device = pick_device(config.trainer.accelerator)
    encoders, missing = config.encoders.load_or_reason(device)
    items = final_plan(config)
    folder = run.path / "samples" / f"final{suffix if pictures is None else pictures}"
    images, steps = _draw_arms(run, config, items, [arm for arm in ARMS if arm in arms or arm == "base"], folder, device, progress)
    shared = shared_folder(run, config)
    photos, subject, truth = read_photos(run), run_reference(run, encoders), lab_truth(config, encoders, shared)
    scores = {arm: score(images[arm], items, subject, encoders, images["base"], truth) for arm in images} if encoders else {}
    if "final" in steps and "best" in scores:  # both steps have a row in every table of many runs, where they are one as well
        scores.setdefault("final", scores["best"])
    result = {
        "format": 2,
        "evaluator": encoders.version if encoders else None,
        "missing": missing,
        "unit": "one subject, one training seed: intervals are over prompts (class images for the class), not over subjects",
        "evaluation": to_plain(config.evaluation),
        "sampling": to_plain(config.sampling),
        "pictures": folder.name,
        "rows": [_row(arm, steps[arm], scores.get(arm)) for arm in steps],
        "references": reference_rows(config, items, encoders, subject, shared) if encoders else {},
        "differences": _differences(scores),
    }
    run.confirm()
    if scores:
        table = per_image_table(run, config, steps, scores)
        write_with(run.path / f"scores{suffix}.parquet", lambda temporary: table.to_parquet(temporary, index=False))
    write_png(run.path / "samples" / f"final_grid{suffix}.png", final_grid(photos, items, images, steps))
    write_json(run.path / f"scores{suffix}.json", result)
    return result


def draw_final_share(run: RunFolder, config: Config, ranks: Ranks, progress: Progress = silent) -> None:
    """Draws this rank's share of the final pictures of the tuned arms into the run folder, where `evaluate_run` finds them.

    All ranks call it, each has every so many-th batch, and the first one goes on when all are drawn. The un-tuned base's pictures are not
    shared out: the runs of a sweep have them in common, so the first rank sees to them.

    Args:
        run: with the weights of "best" and "final".
        config: the run's.
        ranks: this process among them.
        progress: shows how far the share is.
    """
    device, items = pick_device(config.trainer.accelerator), final_plan(config)
    base, drawn = load(run.path, "base").base.to(device), set()
    for arm in ARMS[1:]:
        step = load_weights(run, arm, base)
        if step in drawn:
            continue
        drawn.add(step)
        kept = find_kept(run.path / "samples" / "final" / arm, items, config, _arm_recipe(run, arm, step, device))
        own = kept._replace(batches=list(ranks.share(kept.batches)))
        if own.batches:
            total = sum(part.stop - part.start for part, _ in own.batches)
            with progress(total, f"final images, {arm} (step {step}), the share of one of {ranks.count} devices") as advance:
                draw_missing(base, items, config, own, advance)
    ranks.at_first(None)  # the first one waits for the others here


def _arm_recipe(run: RunFolder, arm: str, step: int, device: str) -> dict[str, Any]:
    """Returns what the pictures of an arm depend on beside prompts, noise and sampling."""
    return {"run": run.path.name, "arm": arm, "step": step, "model": _model_digest(run, arm), "device": device}


def per_image_table(run: RunFolder, config: Config, steps: dict[str, int], scores: dict[str, Scores]) -> pd.DataFrame:
    """Returns one row an image and arm: run, group, subject, seed, arm, step, what was drawn (prompt_kind for the subject's), all scores."""
    frames = []
    for arm, found in scores.items():
        rows = found.per_image
        kinds = [prompt_kind(template) if kind == "subject" else "" for kind, template in zip(rows.kind, rows.template, strict=True)]
        about = {"run": run.path.name, "group": config.group, "subject": subject_label(run, config), "seed": config.seed, "arm": arm}
        frames.append(rows.assign(**about, step=steps[arm], prompt_kind=kinds)[[*about, "step", "kind", "prompt_kind", *rows.columns.drop("kind")]])
    return pd.concat(frames, ignore_index=True)


def subject_label(run: RunFolder, config: Config) -> str:
    """Returns the word for a run's subject in tables: its name; else the class with the lab's individual or the photos' digest."""
    subject = config.subject
    if subject.name is not None:
        return subject.name
    return f"{subject.class_noun}-{subject.lab_seed if config.data.subject_dir is None else run.record['digests']['photos'][:6]}"


def read_photos(run: RunFolder, folder: str = "photos") -> np.ndarray:
    """Returns the run's prepared subject photos, uint8 (M, H, W, 3); (0,) where a run has none in that folder."""
    paths = sorted((run.path / folder).glob("*.png"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]) if paths else np.empty(0, np.uint8)


def run_reference(run: RunFolder, encoders: LoadedEncoders | None) -> Reference | None:
    """Returns what a run's images are held against: its photos with their masks, those left out, and those set aside; None without encoders."""
    if encoders is None:
        return None
    held_out, others = (read_photos(run, f"photos/{part}") for part in ("held_out", "others"))
    masks = {path.name: path for path in (run.path / "photos" / "masks").glob("*.png")}
    names = [path.name for path in sorted((run.path / "photos").glob("*.png"))]
    known = [np.asarray(Image.open(masks[name]).convert("L"), np.float32) / 255 if name in masks else None for name in names]
    return reference(read_photos(run), encoders, known if masks else None, held_out, others)


def final_grid(photos: np.ndarray, items: Sequence[Item], images: dict[str, np.ndarray], steps: dict[str, int], per_prompt: int = 2) -> Image.Image:
    """Returns the grid of a run: the photos, then each arm; side by side the same prompt and noise. The first images, not chosen ones.

    A row an arm, or with many prompts a column an arm and one image a prompt.
    """
    columns = [k for k, item in enumerate(items) if item.key[-1] < per_prompt]
    if len(columns) > MANY_COLUMNS:
        columns = [k for k, item in enumerate(items) if item.key[-1] == 0]
    labels = [items[k].scored_prompt if items[k].kind == "class" else items[k].prompt for k in columns]
    rows = [list(photos[: len(columns)]) + [None] * (len(columns) - len(photos))] + [[images[arm][k] for k in columns] for arm in images]
    names = ["photos"] + [{"base": "un-tuned base", "best": f"best step {steps[arm]}", "final": f"last step {steps[arm]}"}[arm] for arm in images]
    if len(columns) > MANY_COLUMNS:
        return image_grid([list(row) for row in zip(*rows, strict=True)], labels, names)
    return image_grid(rows, names, labels)


def _draw_arms(
    run: RunFolder, config: Config, items: Sequence[Item], arms: Sequence[str], folder: Path, device: str, progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns the images and the step of each arm; draws what is not yet in the folder. A last step that is the best one has no images of its own."""
    base = load(run.path, "base").base.to(device)
    images: dict[str, np.ndarray] = {}
    steps: dict[str, int] = {}
    for arm in arms:
        steps[arm] = step = 0 if arm == "base" else load_weights(run, arm, base)
        if arm == "final" and step == steps.get("best"):
            continue
        kept = find_kept(folder / arm, items, config, _arm_recipe(run, arm, step, device))
        there = f", {kept.there} of {len(items)} there already" if kept.there else ""
        with progress(len(items), f"final images, {arm} (step {step}{there})") as advance:
            shared = arm == "base" and kept.there < len(items) and run.path.parent.name == config.group  # among the runs of a sweep
            images[arm] = keep(kept, draw_base(run, base, items, config, advance)) if shared else draw_missing(base, items, config, kept, advance)
    return images, steps


def _model_digest(run: RunFolder, arm: str) -> str:
    """Returns 12 hex digits for the model that draws an arm: of the base's content, and of the file of the learned weights."""
    digest = hashlib.sha256(run.record["digests"]["base"].encode())
    if arm != "base":
        with (run.path / "checkpoints" / f"{arm}.safetensors").open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:12]


def _row(arm: str, step: int, scores: Scores | None) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "step": step}
    for key, value in (scores.values if scores else {}).items():
        row[key] = value
        if key in scores.intervals:
            row[f"{key}_interval"] = _interval(scores.intervals[key])
    return row


def _interval(interval: Interval) -> dict[str, Any]:
    return {"low": interval.low, "high": interval.high, "n": interval.n, "unit": interval.unit}


def _differences(scores: dict[str, Scores]) -> dict[str, Any]:
    """Returns each tuned arm minus the base, paired by prompt and noise, for every score that is a mean of its images."""
    found: dict[str, Any] = {}
    for arm in scores:
        if arm == "base":
            continue
        pairs = {info.key: _paired(scores[arm].per_image, scores["base"].per_image, info) for info in METRICS}
        found[f"{arm} - base"] = {key: {"mean": d.mean} | _interval(d) for key, d in pairs.items() if d is not None}
    return found


def _paired(tuned: pd.DataFrame, base: pd.DataFrame, info: MetricInfo) -> Interval | None:
    """Returns the difference of one score; None where it is not measured image by image."""
    rows = tuned.kind == info.kind
    if info.column not in tuned.columns or not (tuned[info.column][rows].notna() & base[info.column][rows].notna()).any():
        return None
    a, b = tuned[info.column][rows].to_numpy(float), base[info.column][rows].to_numpy(float)
    if info.kind != "class":
        return paired_difference(a, b, tuned.template[rows].to_numpy(), unit="prompt")
    if info.column in PAIRWISE:
        a, b = pair_mean_pseudovalues(a), pair_mean_pseudovalues(b)
    return paired_difference(a, b, unit="image")  # all class images share one prompt
