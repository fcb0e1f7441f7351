"""Scores that rest on the photos themselves: what a perfect model could reach, what a copy scores, and which images are copies."""

from typing import NamedTuple

import torch
from torch import Tensor

from dreambooth.metrics.cosines import cosines_of, identity_fidelity, mean_of_pairs, unit_rows


def real_photo_oracle(subject: Tensor, self_pairs: bool = False) -> Tensor:
    """Returns the fidelity of the real photos to each other: what a perfect model could reach.

    Args:
        subject: features of the subject's photos, (M, D): identity for the mark of `identity_fidelity`, image for that of `image_fidelity`.
        self_pairs: also count each photo against itself (cosine 1), which adds (1 - oracle) / M.
            Published oracles (0.774 in Ruiz et al. 2023, table 1) very probably do.

    Returns:
        A scalar in [-1, 1]; NaN if there is no pair.

    Raises:
        ValueError: the shape is not (M, D).
    """
    if self_pairs:
        return cosines_of(subject, subject, "subject", "subject").mean()
    return mean_of_pairs(unit_rows(subject, "subject"))


class NearestPhoto(NamedTuple):
    """The training photo that each generated image is most like."""

    cosine: Tensor  # (N,) in [-1, 1]; NaN if there is no photo
    index: Tensor  # (N,) of the photo; -1 if there is none


def nearest_photo(generated: Tensor, subject: Tensor) -> NearestPhoto:
    """Returns for each generated image the largest cosine to a training photo, and which photo that is (the first of equals).

    Args:
        generated: identity features of the generated images, (N, D).
        subject: identity features of the training photos, (M, D).

    Raises:
        ValueError: the shapes do not fit.
    """
    cosines = cosines_of(generated, subject, "generated", "subject")  # (N, M)
    if not cosines.shape[1]:
        return NearestPhoto(cosines.new_full((len(cosines),), float("nan")), torch.full((len(cosines),), -1, device=cosines.device))
    return NearestPhoto(*cosines.max(dim=1))


def nearest_of_real_photos(subject: Tensor, held_out: Tensor | None = None) -> Tensor:
    """Returns how near a real photo of the subject that is no copy comes to its nearest training photo: the mark of `memorisation`.

    Args:
        subject: identity features of the training photos, (M, D).
        held_out: identity features of photos of the subject that were not trained on, (K, D): then their mean largest cosine to the
            training photos. None: each training photo is held against the others in turn.

    Returns:
        A scalar in [-1, 1]; NaN with a single photo and nothing held out.

    Raises:
        ValueError: the shapes do not fit.
    """
    if held_out is not None:
        return nearest_photo(held_out, subject).cosine.mean()
    cosines = cosines_of(subject, subject, "subject", "subject")
    if len(cosines) < 2:
        return cosines.new_tensor(float("nan"))
    return cosines.fill_diagonal_(-torch.inf).amax(dim=1).mean()  # (M, M) -> scalar


def memorisation(generated: Tensor, subject: Tensor, held_out: Tensor | None = None) -> Tensor:
    """Returns how much closer each generated image is to a training photo than a real photo that is no copy.

    The largest cosine of identity features to a training photo (`nearest_photo`), minus the same of real photos
    (`nearest_of_real_photos`: held-out ones, else leave-one-out over the training photos, which then have one photo fewer to be near to).

    Args:
        generated: identity features of the generated images, (N, D).
        subject: identity features of the training photos, (M, D).
        held_out: identity features of photos that were not trained on, (K, D), or None.

    Returns:
        (N,) in [-2, 2], **lower** is better: about 0 for real photos of the subject, above it for copies, below it for images that are
        less like any photo. NaN if there is nothing to compare with.

    Raises:
        ValueError: the shapes do not fit.
    """
    return nearest_photo(generated, subject).cosine - nearest_of_real_photos(subject, held_out)


def copy_baseline(
    identity: Tensor,
    image: Tensor,
    prompts: Tensor,
    held_out: Tensor | None = None,
    known_identity: Tensor | None = None,
    known_image: Tensor | None = None,
) -> dict[str, float]:
    """Returns the scores of a model that copies: its images for every prompt are the photos that it was trained on.

    No fidelity should be higher and no alignment lower; a model that comes near it on both has learned the photos, not the subject.

    Args:
        identity: identity features of the photos, (M, D).
        image: image features of the photos, (M, E).
        prompts: text features of the prompts, (P, E).
        held_out: identity features of photos that were not trained on, (K, D), or None.
        known_identity: identity features of all photos that fidelity is measured against, (M + O, D); None: the photos alone.
        known_image: their image features, (M + O, E).

    Returns:
        identity_fidelity and image_fidelity (each copy against all these photos, so with itself), prompt_alignment (all pairs of photo and
        prompt) and memorisation, by their keys in METRICS.

    Raises:
        ValueError: the shapes do not fit.
    """
    return {
        "identity_fidelity": float(identity_fidelity(identity, identity if known_identity is None else known_identity)),
        "image_fidelity": float(identity_fidelity(image, image if known_image is None else known_image)),
        "prompt_alignment": float(cosines_of(image, prompts, "image", "prompts").mean()),
        "memorisation": float(memorisation(identity, identity, held_out).mean()),
    }
