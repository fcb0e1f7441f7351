"""What each stage of pretraining depends on: sizes, rates and budgets, for a GPU and for a CPU."""

import json
from collections.abc import Sequence
from typing import Any

from dreambooth.errors import UserError
from dreambooth.lab.scorers import Layout
from dreambooth.lab.splits import TRAINED_CLASSES, TRAINED_CONTEXTS

SHARES = {"vae": 0.15, "decoder": 0.05, "identity": 0.12, "captions": 0.13, "base": 0.55}  # of a budget for all stages
RENDERS = 200_000  # on a GPU, where the training of the base sees each some thirty times; fewer on a CPU
RENDERS_CPU = 20_000
MINUTES, MINUTES_CPU = 20.0, 180.0
SCORER_LAYOUT = Layout()

# Per network: what its result depends on. The UNet has 12.3 M parameters (widths are multiples of 32); all networks together 37 MB in float16.
# These are for a GPU; a CPU takes ON_CPU's in their place: narrower networks and smaller batches, so that it gets through enough steps.
RECIPES: dict[str, dict[str, Any]] = {
    "vae": {"batch_size": 128, "crop": 64, "matrix_lr": 0.02, "other_lr": 1e-3, "widths": [32, 64, 128], "channels": 8, "groups": 8},
    "decoder": {"batch_size": 128, "crop": 64, "matrix_lr": 0.01, "other_lr": 5e-4, "widths": [32, 64, 128], "channels": 8, "groups": 8},
    "identity": {"batch_size": 512, "matrix_lr": 0.02, "other_lr": 1e-3},
    "captions": {"batch_size": 512, "matrix_lr": 0.02, "other_lr": 1e-3},
    "base": {
        "classes": len(TRAINED_CLASSES),  # the first so many of those that are trained on
        "contexts": len(TRAINED_CONTEXTS),
        "batch_size": 512,
        "matrix_lr": 0.02,
        "matrix_decay": 0.1,  # Liu et al. 2025 (Moonlight)
        "other_lr": 1.2e-3,
        "widths": [64, 160, 192],
        "groups": 8,
        "caption_dropout": 0.1,
        "weight_cap": 5.0,
    },
}
ON_CPU: dict[str, dict[str, Any]] = {
    "vae": {"batch_size": 32, "crop": 32, "widths": [16, 48, 128]},
    "decoder": {"batch_size": 32, "crop": 32, "widths": [16, 48, 128]},
    "identity": {"batch_size": 96},
    "captions": {"batch_size": 64},
    "base": {"classes": 10, "contexts": 12, "batch_size": 32, "widths": [64, 96, 128]},  # what can be learned in hours
}


def parse_changes(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns settings by network from words like base.batch_size=256 (the value is JSON); UserError for an unknown name."""
    changes: dict[str, dict[str, Any]] = {}
    for word in given:
        path, _, value = word.partition("=")
        network, _, key = path.partition(".")
        if key not in RECIPES.get(network, {}):
            raise UserError("--set", "must name a setting of vae, decoder, identity, captions or base", word, "write it like base.batch_size=256")
        changes.setdefault(network, {})[key] = json.loads(value)
    return changes
