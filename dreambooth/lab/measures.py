"""How good the lab's own models are, as pure functions of pictures and features: fidelity of the codec, sharpness, telling apart."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dreambooth.metrics.pixels import LUMA, octaves

BANDS = 3  # octaves of detail that sharpness looks at: 1, 2 and 4 pixels


def to_bytes(pictures: Tensor) -> list[np.ndarray]:
    """Returns pictures (N, 3, H, W) in [-1, 1] as uint8 arrays (H, W, 3)."""
    return list(((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def psnr(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each picture in dB, (N,): 10 log10(range^2 / mean squared error), range 2.

    Args:
        decoded, pictures: (N, 3, H, W) in [-1, 1].
    """
    error = (decoded.float() - pictures.float()).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def detail(pictures: Tensor) -> Tensor:
    """Returns how much detail of each size pictures have, (N, 2 * BANDS): strength and sparseness of each octave of brightness.

    The octaves are differences of successive Gaussian blurs (a Laplacian stack). Strength is the logarithm of the root mean square:
    blur lowers it in the finest octaves. Sparseness is the logarithm of mean magnitude over root mean square: edges are rare and strong,
    noise is everywhere, so noise that makes up for lost strength is seen as well. No network takes part that could have learnt to forgive.

    Args:
        pictures: (N, 3, H, W) in [-1, 1].
    """
    grey = (pictures.float() * torch.tensor(LUMA, device=pictures.device).view(1, 3, 1, 1)).sum(1, keepdim=True)  # (N, 1, H, W)
    features = []
    for octave in octaves(grey, BANDS):
        band = octave.flatten(1)
        strength = band.pow(2).mean(1).sqrt().clamp(min=1e-5)
        features += [strength.log(), (band.abs().mean(1) / strength).clamp(min=1e-5).log()]
    return torch.stack(features, 1)


def sharpness(pictures: Tensor) -> Tensor:
    """Returns the strength of the finest detail of each picture, (N,): the root mean square of its finest octave."""
    return detail(pictures)[:, 0].exp()


def kernel_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Returns the unbiased squared maximum mean discrepancy of two sets of features, a scalar; 0 for samples of one distribution.

    The kernel is the cubic polynomial of KID, (x . y / D + 1)^3 (Binkowski et al. 2018, sec. 4); the caller brings the features to
    a common scale.

    Args:
        features: (N, D), N at least 2.
        reference: (M, D), M at least 2.
    """
    x, y = features.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_self(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.diagonal().sum()) / (len(a) * (len(a) - 1))

    return without_self(x) + without_self(y) - 2 * kernel(x, y).mean()


def same_subject_auc(features: Tensor, subjects: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Returns for each subject how well its pictures are told from others of its class, (S,) in the order of first appearance.

    It is the area under the ROC curve: the odds that two pictures of the subject are more alike than one of it and one of another
    subject of the same class; ties count half. NaN for a subject with one picture or without rivals.

    Args:
        features: (N, D) of length 1.
        subjects, classes: whose picture each is, and of which class; N each.
    """
    order = {name: number for number, name in enumerate(dict.fromkeys(subjects))}
    own = torch.tensor([order[name] for name in subjects], device=features.device)
    kinds = {name: number for number, name in enumerate(dict.fromkeys(classes))}
    kind = torch.tensor([kinds[name] for name in classes], device=features.device)
    alike = features @ features.T
    areas = []
    for subject in range(len(order)):
        mine = (own == subject).nonzero()[:, 0]
        rivals = ((kind == kind[mine[0]]) & (own != subject)).nonzero()[:, 0]
        upper = torch.triu_indices(len(mine), len(mine), 1, device=features.device)
        same = alike[mine][:, mine][upper[0], upper[1]]  # (pairs,)
        other = alike[mine][:, rivals].flatten()
        wins = (same[:, None] > other).double() + 0.5 * (same[:, None] == other).double()
        areas.append(wins.mean() if wins.numel() else torch.tensor(float("nan")))
    return torch.stack([area.double().cpu() for area in areas])


def caption_retrieval(images: Tensor, texts: Tensor, captions: Sequence[str], choices: int = 32) -> Tensor:
    """Returns for each picture whether its own caption is the best of `choices`, (n,) of 0 and 1; n = N rounded down to whole groups.

    Args:
        images, texts: (N, D) of length 1; row i of both belongs together.
        captions: N; equal captions in one group are both right.
        choices: size of the groups, which are taken in the given order.
    """
    right = []
    for first in range(0, len(captions) - choices + 1, choices):
        group = slice(first, first + choices)
        best = (images[group] @ texts[group].T).argmax(1).tolist()
        own = captions[group]
        right += [float(own[choice] == words) for choice, words in zip(best, own, strict=True)]
    return torch.tensor(right)
