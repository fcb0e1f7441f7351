"""The marks to read a run's scores against: real photos with each other, copies of the photos and, in the lab, true renders of the subject."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dreambooth.config import Config
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item
from dreambooth.lab_truth import lab_truth
from dreambooth.metrics.table import METRICS
from dreambooth.scoring import Reference, references, score
from dreambooth.worked_out import code_digest, once

CODE = code_digest(Path(__file__).resolve().parent, "**/*.py")  # as it is loaded: what is edited later is not what runs here

Rows = dict[str, dict[str, float]]


def reference_rows(config: Config, items: Sequence[Item], encoders: LoadedEncoders, subject: Reference, shared: Path | None = None) -> Rows:
    """Returns a row of scores for each mark, by the keys of METRICS: those of `scoring.references`, in the lab "ground_truth" too.

    They do not depend on what was learned, so runs on the same photos, with the same prompts and evaluator, share them.

    Args:
        config: resolved.
        items: the plan of the final pictures.
        encoders: the feature extractors.
        subject: of the subject's photos.
        shared: folder in which runs share them; None: they are worked out anew.
    """
    own = [item for item in items if item.kind == "subject"]
    truth = lab_truth(config, encoders, shared)
    about = {
        "evaluator": encoders.version,
        "device": encoders.device.type,
        "photos": _digest(subject),
        "items": [(item.template, item.prompt, item.scored_prompt, item.key[-1]) for item in own],
        "lab": [config.subject.class_noun, config.subject.lab_seed, truth.contexts] if truth else None,
        "code": CODE,
    }

    def compute() -> dict[str, torch.Tensor]:
        found: Rows = references(subject, [item.scored_prompt for item in own], encoders)
        renders = _true_renders(config, own)
        if renders is not None:
            kept, pixels = renders
            values = score(pixels, kept, subject, encoders, truth=truth).values
            found["ground_truth"] = {info.key: values[info.key] for info in METRICS if info.kind == "subject" and info.key in values}
        return {"json": torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)}

    return json.loads(once(shared, "reference rows", about, compute)["json"].numpy().tobytes())


def _digest(subject: Reference) -> str:
    """Returns a hex digest of the photos and masks that images are held against."""
    digest = hashlib.sha256()
    for name in ("photos", "others", "masks", "held_out"):
        for array in () if (arrays := getattr(subject, name)) is None else arrays:
            digest.update(f"{name} {None if array is None else (array.dtype.str, array.shape)}".encode())
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _true_renders(config: Config, own: Sequence[Item]) -> tuple[list[Item], np.ndarray] | None:
    """Returns the lab's true renders of the built-in subject, for those of its items that name a context; None outside the lab."""
    if config.data.subject_dir is not None or not config.base.is_lab():
        return None
    from dreambooth.lab.world import CONTEXTS, ground_truth

    contexts = {item: next((c for c in CONTEXTS if item.template.endswith(c)), None) for item in own}
    kept = [item for item, context in contexts.items() if context]
    if not kept:
        return None
    pixels = ground_truth(
        config.subject.class_noun, config.subject.lab_seed, [contexts[i] for i in kept], [i.key[-1] + 1000 for i in kept]
    )  # (N, 3, H, W)
    return kept, pixels.permute(0, 2, 3, 1).contiguous().numpy()
