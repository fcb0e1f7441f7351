"""What only pretraining knows of a picture, and the two aids that use it; neither is shipped.

- The parts: which part of the subject each cell of the latents shows. A head on the UNet's inner features learns to tell them from the noisy
  picture. Denoising alone teaches what belongs together only through colours; told outright, the UNet draws whole parts sooner
  (aligning inner features with known ones speeds up diffusion models: Yu et al. 2024, "Representation Alignment for Generation").
- The hints: colours of the four kinds of part, and the pattern, as five vectors beside the caption's, in a share of the steps. They say what
  no caption can say, and are no words: after pretraining nothing can ask for them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.files import write_with
from dreambooth.lab.identities import COLORS, PATTERNS, SURFACES
from dreambooth.lab.pretraining.data import draw_picture
from dreambooth.lab.splits import TRAINED_CLASSES
from dreambooth.lab.world import PARTS, render_parts

COLOR_HINTS = 4  # of the five hints; the fifth is the pattern
KINDS = 1 + len(TRAINED_CLASSES) * (PARTS - 1)  # what the head tells apart: no subject, or a part of a subject of one class
CHUNK = 256


class Known:
    """Parts and hints of the first `count` pictures of the stream, computed once and kept in one file.

    Args:
        file: where to.
        count: pictures.
        cells: along each side of the latents.
        device: where they are wanted.
        say: gets a line.
    """

    def __init__(self, file: Path, count: int, cells: int, device: torch.device, say: Any) -> None:
        width = cells * cells + COLOR_HINTS + 1
        if not file.is_file() or np.load(file, mmap_mode="r").shape != (count, width):
            say(f"base: which cell shows which part, for {count} pictures (about 150 a second)")
            write_with(file, lambda path: _save(path, describe(count, cells)))
        table = torch.from_numpy(np.load(file)).to(device)
        self.parts = table[:, : cells * cells].view(count, cells, cells)  # (N, c, c) uint8, in [0, KINDS)
        self.hints = table[:, cells * cells :].long()  # (N, 5)


def describe(count: int, cells: int) -> np.ndarray:
    """Returns parts and hints of the first pictures of the stream, uint8 (count, cells * cells + 5)."""
    rows = []
    for first in range(0, count, CHUNK):
        items = [draw_picture(index) for index in range(first, min(count, first + CHUNK))]
        parts = render_parts([item.subject for item in items], [(item.seed,) for item in items], cells)
        kind = torch.tensor([TRAINED_CLASSES.index(item.subject.class_noun) for item in items]).view(-1, 1, 1)
        parts = torch.where(parts > 0, parts + kind * (PARTS - 1), parts)
        names = list(COLORS)
        hints = [
            [
                *(names.index(name) for name in item.subject.color_names),
                PATTERNS.index(SURFACES.get(item.subject.surface or "", item.subject.pattern)),
            ]
            for item in items
        ]
        rows.append(np.concatenate([parts.flatten(1).numpy().astype(np.uint8), np.array(hints, np.uint8)], 1))
    return np.concatenate(rows)


def _save(path: Path, table: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, table)


class Aids(nn.Module):
    """The head that tells parts, and the table of hints.

    Args:
        features: channels of the UNet's inner features.
        text_width: of the caption's vectors, and so of the hints'.
    """

    def __init__(self, features: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, features)
        self.head = nn.Conv2d(features, KINDS, 1)
        self.hint_embedding = nn.Embedding(COLOR_HINTS * len(COLORS) + len(PATTERNS), text_width)
        nn.init.normal_(self.hint_embedding.weight, std=0.5)

    def hint_vectors(self, hints: Tensor) -> Tensor:
        """Returns the vectors (B, 5, D) of hints (B, 5): colour numbers of the four kinds of part, and the pattern's."""
        offsets = torch.arange(COLOR_HINTS + 1, device=hints.device) * len(COLORS)
        return self.hint_embedding(hints + offsets)

    def parts_loss(self, features: Tensor, parts: Tensor) -> Tensor:
        """Returns the cross entropy of naming the part of each cell, a scalar.

        Args:
            features: (B, F, c, c) of the UNet.
            parts: (B, c, c) integers in [0, KINDS).
        """
        logits = self.head(F.silu(self.norm(features.float())))  # (B, KINDS, c, c)
        return F.cross_entropy(logits, parts.long())


class InnerFeatures:
    """Catches what a UNet's second-last level gives in a forward pass: (B, F, c, c) at the size of the latents.

    Args:
        unet: with three levels or more.
    """

    def __init__(self, unet: Any) -> None:
        self.channels = unet.config.block_out_channels[1]
        caught: list[Tensor] = []
        self._caught = caught

        def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            caught[:] = [output]

        unet.up_blocks[-2].register_forward_hook(catch)

    def take(self) -> Tensor:
        """Returns the features of the last pass, and lets go of them."""
        return self._caught.pop()
