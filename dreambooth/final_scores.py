"""The final scores of a run folder: every arm on the same prompts and noise, reference rows beside them, pictures to look at.

Reads the folder and nothing else, so `evaluate.py` gives the same scores at any later time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreambooth.config import Config, to_plain
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item, Scores, draw, final_plan, save_images, score
from dreambooth.files import write_json, write_png, write_with
from dreambooth.generation import pick_device
from dreambooth.grids import image_grid
from dreambooth.metrics import real_photo_oracle
from dreambooth.runs import RunFolder, load, load_weights
from dreambooth.statistics import Interval, paired_difference

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]  # (total, label) -> a context that gives "n more are done"


def silent(total: int, label: str) -> AbstractContextManager[Callable[[int], None]]:
    """Shows no progress."""
    return nullcontext(lambda done: None)


def evaluate_run(
    run: RunFolder, config: Config, arms: Sequence[str] = ("base", "best", "final"), progress: Progress = silent, suffix: str = ""
) -> dict[str, Any]:
    """Draws and scores a run's models; writes scores.json, scores.parquet, samples/final and samples/final_grid.png.

    Args:
        run: a run with weights.
        config: the run's config, perhaps with other evaluation settings.
        arms: "base" (un-tuned), "best" (the chosen step), "final" (the last step; left out when it is the best one).
        progress: shows how far the drawing is.
        suffix: put behind the names of what is written, so that other prompts do not overwrite the run's own scores.

    Returns:
        What scores.json holds: the evaluator's version, the plan, a row of scores for each arm, reference rows, paired differences.

    Raises:
        UserError: the folder lacks what is asked for.
    """
    device = pick_device(config.trainer.accelerator)
    encoders, missing = config.encoders.load_or_reason(device)
    photos, items = read_photos(run), final_plan(config)
    subject = encoders.identity(photos) if encoders else None
    trained, steps, images, scores = load(run.path, "base"), {}, {}, {}
    trained.base.to(device)
    for arm in arms:
        step = 0 if arm == "base" else load_weights(run, arm, trained.base)
        if arm == "final" and step == steps.get("best"):
            continue
        steps[arm] = step
        with progress(len(items), f"final images, {arm} (step {step})") as advance:
            images[arm] = draw(trained.base, items, config, advance)
        save_images(run.path / "samples" / f"final{suffix}" / arm, items, images[arm], {"run": run.path.name, "arm": arm, "step": step})
        if encoders:
            scores[arm] = score(images[arm], items, subject, encoders)
    result = {
        "format": 1,
        "evaluator": encoders.version if encoders else None,
        "missing": missing,
        "unit": "one subject, one training seed: intervals are over prompts (fidelity, alignment) or class images (drift), not over subjects",
        "evaluation": to_plain(config.evaluation),
        "sampling": to_plain(config.sampling),
        "rows": [_row(arm, steps[arm], scores.get(arm)) for arm in steps],
        "references": _references(config, items, encoders, subject),
        "differences": _differences(scores),
    }
    write_json(run.path / f"scores{suffix}.json", result)
    _write_per_image(run.path / f"scores{suffix}.parquet", steps, scores)
    write_png(run.path / "samples" / f"final_grid{suffix}.png", final_grid(photos, items, images, steps))
    return result


def read_photos(run: RunFolder) -> np.ndarray:
    """Returns the run's prepared subject photos, uint8 (M, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted((run.path / "photos").glob("*.png"))])


def final_grid(photos: np.ndarray, items: Sequence[Item], images: dict[str, np.ndarray], steps: dict[str, int], per_prompt: int = 2) -> Image.Image:
    """Returns the grid of a run: the photos on top, then a row an arm; same column, same prompt and noise. The first images, not chosen ones."""
    columns = [k for k, item in enumerate(items) if item.key[-1] < per_prompt]
    labels = [items[k].scored_prompt if items[k].kind == "class" else items[k].prompt for k in columns]
    rows = [list(photos[: len(columns)]) + [None] * (len(columns) - len(photos))] + [[images[arm][k] for k in columns] for arm in images]
    names = ["photos"] + [{"base": "un-tuned base", "best": f"best step {steps[arm]}", "final": f"last step {steps[arm]}"}[arm] for arm in images]
    return image_grid(rows, names, labels)


def _row(arm: str, step: int, scores: Scores | None) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "step": step}
    for key, value in (scores.values if scores else {}).items():
        row[key] = value
        if key in scores.intervals:
            row[f"{key}_interval"] = _interval(scores.intervals[key])
    return row


def _interval(interval: Interval) -> dict[str, Any]:
    return {"low": interval.low, "high": interval.high, "n": interval.n, "unit": interval.unit}


def _references(config: Config, items: Sequence[Item], encoders: LoadedEncoders | None, subject: torch.Tensor | None) -> dict[str, Any]:
    """Returns the marks to read the scores against: real photos with each other and, in the lab, true renders for the same prompts."""
    if encoders is None:
        return {}
    found: dict[str, Any] = {
        "real_photos": {"identity_fidelity": float(real_photo_oracle(subject))},
        "real_photos_with_self_pairs": {"identity_fidelity": float(real_photo_oracle(subject, self_pairs=True))},
    }
    truth = _ground_truth(config, items)
    if truth is not None:
        kept, pixels = truth
        scores = score(pixels, kept, subject, encoders)
        found["ground_truth"] = {key: scores.values[key] for key in ("identity_fidelity", "prompt_alignment", "diversity")}
    return found


def _ground_truth(config: Config, items: Sequence[Item]) -> tuple[list[Item], np.ndarray] | None:
    """Returns the lab's true renders of the built-in subject for the subject prompts that name a context; None outside the lab."""
    if config.data.subject_dir is not None or not config.base.is_lab():
        return None
    from dreambooth.lab.world import CONTEXTS, ground_truth

    contexts = {item: next((c for c in CONTEXTS if item.template.endswith(c)), None) for item in items if item.kind == "subject"}
    kept = [item for item, context in contexts.items() if context]
    if not kept:
        return None
    pixels = ground_truth(
        config.subject.class_noun, config.subject.lab_seed, [contexts[i] for i in kept], [i.key[-1] + 1000 for i in kept]
    )  # (N, 3, H, W)
    return kept, pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _differences(scores: dict[str, Scores]) -> dict[str, Any]:
    """Returns each tuned arm minus the base, paired by prompt and noise."""
    found = {}
    for arm in (set(scores) - {"base"}) if "base" in scores else ():
        both = scores[arm].per_image, scores["base"].per_image
        subject, other = both[0].kind == "subject", both[0].kind == "class"
        prompts = both[0].template[subject].to_numpy()
        found[f"{arm} - base"] = {
            key: {"mean": d.mean} | _interval(d)
            for key, d in {
                "identity_fidelity": paired_difference(
                    both[0].identity[subject].to_numpy(), both[1].identity[subject].to_numpy(), prompts, unit="prompt"
                ),
                "prompt_alignment": paired_difference(
                    both[0].alignment[subject].to_numpy(), both[1].alignment[subject].to_numpy(), prompts, unit="prompt"
                ),
                "drift": paired_difference(both[0].identity[other].to_numpy(), both[1].identity[other].to_numpy(), unit="image"),
            }.items()
        }
    return found


def _write_per_image(path: Path, steps: dict[str, int], scores: dict[str, Scores]) -> None:
    if scores:
        frames = [scores[arm].per_image.assign(arm=arm, step=steps[arm]) for arm in scores]
        write_with(path, lambda temporary: pd.concat(frames, ignore_index=True).to_parquet(temporary))
