"""Masked identity: constructed patches with known answers, plain loops, and the lab's renders with their true masks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dreambooth.encoders import LabEncoders
from dreambooth.lab.world import CONTEXTS, ground_truth, identity, render_masks, subject_photos
from dreambooth.metrics import cosines
from dreambooth.metrics.masked_identity import Foreground, foreground, found_shares, masked_features, pool

SUBJECT, GRASS, SAND, RIVAL = torch.eye(4)  # one direction for each thing that a patch can show


def patches(*rows: Tensor) -> Tensor:
    return torch.stack(rows)[None]  # (1, P, 4)


@pytest.fixture
def known() -> Foreground:
    """One photo: two patches of the subject on two of grass."""
    found = foreground(patches(SUBJECT, SUBJECT, GRASS, GRASS), torch.tensor([[1.0, 1, 0, 0]]))
    assert found is not None
    return found


def test_foreground_finds_the_two_directions(known: Foreground) -> None:
    assert torch.equal(known.inside, SUBJECT) and torch.equal(known.outside, GRASS)
    assert torch.equal(known.photos, SUBJECT[None])
    assert (known.subject_gap, known.surroundings_gap) == (1, -1)


def test_found_shares_of_a_hand_worked_case(known: Foreground) -> None:
    between = SUBJECT + GRASS  # as near to one as to the other
    leaning = torch.tensor([4.0, 3, 0, 0])  # cosines 0.8 and 0.6: a gap of 0.2 between -1 and 1
    shares = found_shares(patches(SUBJECT, GRASS, between, leaning, 7 * SUBJECT), known)
    assert shares[0].tolist() == pytest.approx([1, 0, 0.5, 0.6, 1])


def test_masked_features_do_not_see_known_surroundings(known: Foreground) -> None:
    few, many = patches(SUBJECT, GRASS, GRASS, GRASS), patches(SUBJECT, SUBJECT, SUBJECT, GRASS)
    assert torch.allclose(masked_features(few, known), SUBJECT[None]) and torch.allclose(masked_features(many, known), SUBJECT[None])


def test_masked_features_see_another_subject(known: Foreground) -> None:
    score = cosines.per_image_fidelity(masked_features(patches(SUBJECT + 3 * RIVAL, GRASS), known), known.photos)
    assert score.item() == pytest.approx(1 / 10**0.5)  # the patch that leans to the subject, and not the grass


def test_masked_features_of_an_image_without_the_subject_score_zero(known: Foreground) -> None:
    lost = masked_features(patches(GRASS, GRASS), known)
    assert lost.abs().max() == 0 and cosines.per_image_fidelity(lost, known.photos).item() == 0


def test_foreground_agrees_with_a_numpy_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, shares = torch.randn(3, 5, 4, generator=generator) + 1, torch.rand(3, 5, generator=generator)
    inside, outside, pooled = np.zeros(4), np.zeros(4), []
    for image, weights in zip(tokens.numpy(), shares.numpy(), strict=True):
        own = np.zeros(4)
        for token, weight in zip(image, weights, strict=True):
            unit = token / np.linalg.norm(token)
            own, inside, outside = own + weight * unit, inside + weight * unit, outside + (1 - weight) * unit
        pooled.append(own / np.linalg.norm(own))
    found = foreground(tokens, shares)
    assert found is not None
    assert found.inside.tolist() == pytest.approx(inside / np.linalg.norm(inside), abs=1e-6)
    assert found.outside.tolist() == pytest.approx(outside / np.linalg.norm(outside), abs=1e-6)
    assert np.abs(found.photos.numpy() - np.array(pooled)).max() < 1e-6


def test_pool_gives_a_token_of_huge_norm_one_vote() -> None:
    assert torch.allclose(pool(patches(SUBJECT, 1000 * RIVAL), torch.ones(1, 2)), (SUBJECT + RIVAL)[None] / 2**0.5)


def test_foreground_leaves_out_a_photo_whose_mask_is_empty() -> None:
    tokens = torch.cat([patches(SUBJECT, GRASS), patches(SAND, GRASS)])
    found = foreground(tokens, torch.tensor([[1.0, 0], [0, 0]]))
    assert found is not None and torch.equal(found.photos, SUBJECT[None])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_foreground_of_masks_that_tell_nothing_is_none(share: float) -> None:
    assert foreground(patches(SUBJECT, GRASS), torch.full((1, 2), share)) is None


def test_foreground_refuses_shares_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"one number for each patch, \(1, 2\), got \(1, 3\)"):
        foreground(patches(SUBJECT, GRASS), torch.ones(1, 3))


def test_found_shares_overlap_with_the_true_masks_of_the_lab() -> None:
    encoders, subject = LabEncoders().load(), identity("teapot", 3)
    photos = subject_photos("teapot", 3)[0].permute(0, 2, 3, 1)
    known = foreground(encoders.patches(photos).tokens, encoders.patch_shares(render_masks([subject] * 5, [(3, k, 9) for k in range(5)]).numpy()))
    images = ground_truth("teapot", 3, list(CONTEXTS), list(range(len(CONTEXTS)))).permute(0, 2, 3, 1)
    truth = encoders.patch_shares(render_masks([subject] * len(CONTEXTS), [(k,) for k in range(len(CONTEXTS))]).numpy())
    assert known is not None
    found = found_shares(encoders.patches(images).tokens, known)
    overlap = torch.minimum(found, truth).sum(dim=1) / torch.maximum(found, truth).sum(dim=1)
    everywhere = truth.mean(dim=1)  # the overlap of a mask that is 1 everywhere
    assert overlap.mean() > 0.5 > everywhere.mean() + 0.1
