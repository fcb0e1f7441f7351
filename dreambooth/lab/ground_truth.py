"""Whether pictures show the right subject, judged by the world itself: against true renders, without any network.

A picture is compared with renders of the subject, and with renders of other subjects of its class in the same poses, place and light.
Two figures: the share of the others that it resembles less than the subject (1 for the subject itself, one half for a subject drawn at
random), and by how much (which still rises when the share is 1). No network takes part that training could have pleased, or that
forgives what it did not learn to see; blur is for the sharpness figures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from dreambooth.lab.identities import identity
from dreambooth.lab.splits import TRAINED_SEEDS
from dreambooth.lab.world import render, render_masks

RIVALS, POSES = 12, 16  # other subjects of the class; renders of each subject in each place
FIRST_RIVAL, RIVAL_STRIDE = TRAINED_SEEDS.start + 77, 101  # their seeds: no subject of an experiment is among them
FIRST_POSE = 7_000_000  # seeds of the renders: no photo and no picture of an evaluation shares a pose with them
CELL = 4  # px: pictures are compared as averages of such squares, which forgives a shift of a pixel or two
SHIFT = 1  # cells by which a picture may stand elsewhere in both directions


class Verdict(NamedTuple):
    """How much each picture is of the subject."""

    rank: Tensor  # (N,) in [0, 1]: share of the rivals that it resembles less than the subject; 0.5 by chance
    margin: Tensor  # (N,) natural logarithm of (distance to the middle rival / distance to the subject); 0 by chance, above 0 is right


class Gallery:
    """True renders of one subject and its rivals in some places.

    Args:
        class_noun, seed: the subject.
        contexts: places that will be asked for.
        rivals: other subjects of the class, at least 1.
        poses: renders of each subject in each place.
    """

    def __init__(self, class_noun: str, seed: int, contexts: Sequence[str], rivals: int = RIVALS, poses: int = POSES) -> None:
        seeds = [seed, *(FIRST_RIVAL + RIVAL_STRIDE * rival for rival in range(rivals))]
        self.contexts = list(dict.fromkeys(contexts))
        subjects = [identity(class_noun, own) for own in seeds for _ in range(poses)]
        shots = [FIRST_POSE + pose for _ in seeds for pose in range(poses)]
        masks = avg_pool2d(render_masks(subjects, [(shot,) for shot in shots])[:, None], CELL)  # (S * P, 1, c, c): the same in every place
        self.masks = masks.view(len(seeds), poses, *masks.shape[2:])  # (S, P, c, c)
        self.cells = {
            context: cells(render(subjects, [context] * len(subjects), shots)).view(len(seeds), poses, 3, *masks.shape[2:])
            for context in self.contexts
        }

    def judge(self, pictures: Tensor, contexts: Sequence[str]) -> Verdict:
        """Returns how much each picture is of the subject rather than of a rival.

        A distance to a subject is the smallest over its poses and over shifts of a cell; one distance is the mean squared difference of
        cells inside that render's mask, so neither the place nor the size of the subject counts.

        Args:
            pictures: uint8 (N, 3, 64, 64).
            contexts: N places, each one of the gallery's.
        """
        none = torch.zeros(0, len(self.masks))
        found = [self._distances(picture, self.cells[context]) for picture, context in zip(cells(pictures), contexts, strict=True)]
        distances = torch.stack(found) if found else none  # (N, S)
        own, rivals = distances[:, :1], distances[:, 1:]
        rank = (rivals > own).double().mean(1) + 0.5 * (rivals == own).double().mean(1)
        return Verdict(rank, (rivals.median(1).values / own[:, 0].clamp(min=1e-8)).log().double())

    def _distances(self, picture: Tensor, renders: Tensor) -> Tensor:
        """Returns the smallest distance of a picture (3, c, c) to the renders (S, P, 3, c, c) of each subject, (S,)."""
        side = picture.shape[-1]
        padded = pad(picture[None], (SHIFT,) * 4, mode="replicate")[0]
        steps = range(2 * SHIFT + 1)
        shifted = torch.stack([padded[:, down : down + side, right : right + side] for down in steps for right in steps])  # (k, 3, c, c)
        weights = self.masks / self.masks.sum((-2, -1), keepdim=True)  # (S, P, c, c)
        distances = [((renders - one).pow(2).mean(2) * weights).sum((-2, -1)) for one in shifted]  # k times (S, P)
        return torch.stack(distances).amin(0).amin(1)


def cells(pictures: Tensor) -> Tensor:
    """Returns pictures uint8 (N, 3, H, W) as averages of squares of CELL pixels, float (N, 3, H / CELL, W / CELL) in [0, 1]."""
    return avg_pool2d(pictures.float() / 255, CELL)
