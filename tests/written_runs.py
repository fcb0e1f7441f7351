"""Run folders as train.py leaves them, written without training: for reports and dashboards."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dreambooth.config import Config, to_plain
from dreambooth.evaluation import final_plan, image_names, selection_plan

SUBJECTS = ("cat", "dog", "vase")
STEPS = (0, 10, 20)
SHOWN = {  # of the evaluation of every run
    "evaluation.selection_prompts": ["a photo of a {subject} at night"],
    "evaluation.selection_images": 2,
    "evaluation.class_images": 3,
    "evaluation.final_prompts": ["a photo of a {subject} in the snow", "a {subject} on the moon"],
    "evaluation.final_images": 2,
    "evaluation.other_images": 1,
}


def write_run(folder: Path, config: Config, gain: float = 0.5, drift: float = 0.1, status: str = "done", error: str | None = None) -> Path:
    """Writes a run as train.py leaves it: identity is the subject's own level, its noise, and `gain` once tuned."""
    plain = to_plain(config)
    level = 0.1 * SUBJECTS.index(config.subject.name)
    folder.mkdir(parents=True)
    record = {"status": status, "error": error, "fingerprint": "0" * 8, "config": plain, "digests": {"base": "b" * 64, "photos": "p" * 64}}
    record |= {
        "started": f"2026-01-01T00:{len(list(folder.parent.iterdir())):02}",
        "finished": "2026-01-02",
        "seconds": {"training": 60.0, "rest": 30.0},
    }
    record |= {"best_step": 10, "versions": {"torch": "2"}, "peak_memory_bytes": 2e9, "git_revision": "abc", "python": "3.11"}
    (folder / "run.json").write_text(json.dumps(record))
    if status != "done":
        return folder
    rows = [(step, level + gain * (step > 0) - 0.05 * (step == 20), 0.3 - 0.001 * step, drift) for step in STEPS]
    header = "step,score/identity_fidelity,score/prompt_alignment,score/drift\n"
    (folder / "metrics.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
    rng = np.random.default_rng(3)
    for k in range(2):
        write_png(folder / "photos" / f"{k:03}.png", rng)
    for step in STEPS:
        for name in image_names(selection_plan(config)):
            write_png(folder / "samples" / f"step-{step:06}" / name, rng)
    write_final_pictures(folder, config, gain, drift)
    return folder


def write_final_pictures(folder: Path, config: Config, gain: float = 0.5, drift: float = 0.1, suffix: str = "", base: float = 0.0) -> None:
    """Writes a run's final pictures with their scores, or with a suffix what evaluate.py draws again; `base` is added to all, un-tuned too."""
    level, rng = 0.1 * SUBJECTS.index(config.subject.name) + base, np.random.default_rng(4)
    items, frames = final_plan(config), []
    for arm, step in (("base", 0), ("best", 10), ("final", 20)):
        tuned = arm != "base"
        for item, name in zip(items, image_names(items), strict=True):
            write_png(folder / "samples" / f"final{suffix}" / arm / name, rng)
            identity = level + 0.03 * item.key[-1] + (0.0 if not tuned else gain + 0.2 * (arm == "final") if item.kind == "subject" else drift)
            frames.append(
                {"arm": arm, "step": step, "kind": item.kind, "prompt_kind": "", "template": item.template, "prompt": item.prompt, "k": item.key[-1]}
                | {"identity": identity, "alignment": 0.3 if item.kind == "subject" else np.nan, "diversity": 0.5 - 0.2 * tuned}
                | {"nearest_photo": 0.5, "nearest_photo_index": 1, "run": folder.name}
            )
    pd.DataFrame(frames).to_parquet(folder / f"scores{suffix}.parquet", index=False)
    scores = {"evaluator": "tiny 1", "missing": None, "unit": "", "references": {"real_photos": {"identity_fidelity": 0.9}}}
    scores |= {"evaluation": to_plain(config.evaluation), "sampling": to_plain(config.sampling), "pictures": f"final{suffix}"}
    scores["rows"] = [{"arm": arm, "step": step} for arm, step in (("base", 0), ("best", 10), ("final", 20))]
    (folder / f"scores{suffix}.json").write_text(json.dumps(scores))


def write_png(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
