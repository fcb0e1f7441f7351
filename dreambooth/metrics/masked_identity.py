"""The subject without its surroundings: patch tokens pooled inside the subject's mask, which generated images do not have and photos may."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Foreground(NamedTuple):
    """What the photos and their masks say about which patches are the subject."""

    inside: Tensor  # (C,) of length 1: the mean direction of patches inside the masks
    outside: Tensor  # (C,) of length 1: the mean direction of patches outside
    subject_gap: float  # mean of cos(patch, inside) - cos(patch, outside) over patches inside the masks
    surroundings_gap: float  # the same over patches outside
    photos: Tensor  # (M', C) of length 1: each photo's patches pooled inside its mask; photos whose mask is empty are left out


def foreground(tokens: Tensor, shares: Tensor) -> Foreground | None:
    """Returns what masked photos say about the subject; None if no patch is inside the masks, or none outside.

    Args:
        tokens: patch tokens of the photos, (M, P, C), of any length.
        shares: how much of each patch is inside the photo's mask, (M, P) in [0, 1].

    Raises:
        ValueError: the shapes do not fit.
    """
    units = _unit(tokens)
    if shares.shape != units.shape[:2]:
        raise ValueError(f"shares must hold one number for each patch, {tuple(units.shape[:2])}, got {tuple(shares.shape)}")
    inner, outer = shares.sum(), (1 - shares).sum()
    if inner <= 0 or outer <= 0:
        return None
    mean_inside = (units * shares[..., None]).sum((0, 1)) / inner  # (M, P, C) -> (C,)
    mean_outside = (units * (1 - shares)[..., None]).sum((0, 1)) / outer
    inside, outside = F.normalize(mean_inside, dim=0), F.normalize(mean_outside, dim=0)
    gaps = float(mean_inside @ (inside - outside)), float(mean_outside @ (inside - outside))
    return Foreground(inside, outside, *gaps, pool(tokens, shares)[shares.sum(dim=1) > 0])


def found_shares(tokens: Tensor, known: Foreground) -> Tensor:
    """Returns how much each patch of images without masks is taken for the subject, (N, P) in [0, 1].

    A patch is compared with the two prototypes, the mean directions of the photos' patches inside and outside their masks, by the gap
    cos(patch, inside) - cos(patch, outside). Its share is 1 where the gap is what patches inside the photos' masks have on the mean, 0
    where it is what patches outside have, and linear between. Such a ramp was chosen over taking the nearer prototype (0 or 1) because it
    finds the subject better in surroundings that are in no photo: on the lab, over 12 subjects in 18 places, its overlap with the true
    masks is 0.52 against 0.44, and the pooled features tell the subject from another of its class with an AUC of 0.968 against 0.951
    (true masks: 0.979). What it cannot know is a surrounding that looks like the subject.

    Args:
        tokens: patch tokens, (N, P, C), of any length, from the network that gave the photos'.
        known: from `foreground`.
    """
    gap = _unit(tokens) @ (known.inside - known.outside)  # (N, P, C) -> (N, P)
    width = known.subject_gap - known.surroundings_gap
    return ((gap - known.surroundings_gap) / width).clamp(0, 1) if width > 0 else torch.zeros_like(gap)


def pool(tokens: Tensor, shares: Tensor) -> Tensor:
    """Returns each image's mean patch direction, weighted by share: (N, P, C) and (N, P) -> (N, C) of length 1, or of 0 where no patch counts.

    Patches are scaled to length 1 first: the few tokens of huge norm that large vision transformers grow in plain areas (Darcet et al.
    2024) would otherwise outvote the rest.
    """
    return F.normalize((_unit(tokens) * shares[..., None]).sum(dim=1), dim=-1)


def masked_features(tokens: Tensor, known: Foreground) -> Tensor:
    """Returns the features of the subject that is found in images without masks, (N, P, C) -> (N, C); zeros where it is not found.

    The score is then `metrics.per_image_fidelity(masked_features(...), known.photos)`: the mean cosine over all pairs (generated, photo), in
    [-1, 1], higher is better; 0 where no patch is taken for the subject. Patch tokens: DINO's (or DINOv2's) after the final layer norm
    without the class token, of the same forward pass as the identity features; in the lab the identity scorer's last map.
    """
    return pool(tokens, found_shares(tokens, known))


def _unit(tokens: Tensor) -> Tensor:
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be of shape (images, patches, dimensions), got {tuple(tokens.shape)}")
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
