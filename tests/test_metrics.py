"""The scores, against hand-worked cases, plain loops and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from dreambooth.metrics import cosines, real_photos
from dreambooth.metrics.table import METRICS

E1, E2, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
ROOT_HALF = 0.5**0.5


def features(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def test_identity_fidelity_is_the_mean_over_all_pairs() -> None:
    generated, subject = torch.tensor([E1, E2]), torch.tensor([E1, DIAGONAL])
    # pairs: e1.e1 = 1, e1.d = sqrt(1/2), e2.e1 = 0, e2.d = sqrt(1/2); one-to-one pairs would give (1 + 0.71) / 2
    assert cosines.identity_fidelity(generated, subject).item() == pytest.approx((1 + 2 * ROOT_HALF) / 4)


def test_identity_fidelity_agrees_with_scipy() -> None:
    generated, subject = features(7), features(4, seed=1)
    expected = (1 - cdist(generated.numpy(), subject.numpy(), "cosine")).mean()
    assert cosines.identity_fidelity(generated, subject).item() == pytest.approx(expected, abs=1e-6)


def test_identity_fidelity_ignores_lengths_of_vectors() -> None:
    generated, subject = features(5), features(3, seed=1)
    scaled = cosines.identity_fidelity(generated * torch.tensor([[1.0], [2.0], [9.0], [0.1], [4.0]]), subject * 7)
    assert scaled.item() == pytest.approx(cosines.identity_fidelity(generated, subject).item(), abs=1e-6)


def test_identity_fidelity_does_not_depend_on_order() -> None:
    generated, subject = features(6), features(5, seed=1)
    shuffled = cosines.identity_fidelity(generated[[3, 1, 5, 0, 2, 4]], subject[[4, 2, 0, 1, 3]])
    assert shuffled.item() == pytest.approx(cosines.identity_fidelity(generated, subject).item(), abs=1e-6)


def test_identity_fidelity_of_half_precision_is_computed_in_float32() -> None:
    generated, subject = features(5).to(torch.bfloat16), features(3, seed=1).to(torch.bfloat16)
    assert cosines.identity_fidelity(generated, subject) == cosines.identity_fidelity(generated.float(), subject.float())


def test_per_image_fidelity_gives_one_mean_for_each_generated_image() -> None:
    scores = cosines.per_image_fidelity(torch.tensor([E1, E2]), torch.tensor([E1, DIAGONAL]))
    assert scores.tolist() == pytest.approx([(1 + ROOT_HALF) / 2, ROOT_HALF / 2])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_identity_fidelity_reaches_its_bounds(sign: float) -> None:
    subject = features(1).expand(3, -1)
    assert cosines.identity_fidelity(sign * 2 * subject, subject).item() == pytest.approx(sign, abs=1e-6)


def test_prompt_alignment_pairs_each_image_with_its_own_prompt() -> None:
    images, prompts = torch.tensor([E1, E2, E1]), torch.tensor([E1, E1, DIAGONAL])
    assert cosines.prompt_alignment(images, prompts).item() == pytest.approx((1 + 0 + ROOT_HALF) / 3)


def test_prompt_alignment_is_neither_scaled_nor_clamped() -> None:
    assert cosines.prompt_alignment(torch.tensor([E1]), torch.tensor([[-2.0, 0.0]])).item() == pytest.approx(-1)


def test_prompt_alignment_agrees_with_a_numpy_loop() -> None:
    images, prompts = features(6).numpy(), features(6, seed=1).numpy()
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(images, prompts, strict=True)]
    assert cosines.per_image_alignment(torch.tensor(images), torch.tensor(prompts)).tolist() == pytest.approx(expected, abs=1e-6)


def test_drift_is_the_mean_over_all_pairs() -> None:
    class_images, subject = torch.tensor([E1, E2, DIAGONAL]), torch.tensor([E1, E2])
    assert cosines.drift(class_images, subject).item() == pytest.approx((1 + 0 + 0 + 1 + 2 * ROOT_HALF) / 6)


def test_diversity_of_a_hand_worked_case() -> None:
    images = torch.tensor([E1, E2, E1, E1, E1, DIAGONAL])
    groups = torch.tensor([4, 4, 9, 9, 9, 7])
    # prompt 4: one pair at distance 1; prompt 9: three equal images; prompt 7: a single image, ignored
    assert cosines.identity_diversity(images, groups).item() == pytest.approx((1 + 0) / 2)


def test_diversity_weighs_prompts_equally_not_pairs() -> None:
    images = torch.tensor([E1, E2] + [E1] * 10)
    groups = torch.tensor([0, 0] + [1] * 10)
    assert cosines.identity_diversity(images, groups).item() == pytest.approx(0.5)


def test_diversity_agrees_with_scipy_pdist() -> None:
    images, groups = features(12), torch.tensor([0, 1, 2] * 4)
    expected = np.mean([pdist(images[groups == g].numpy(), "cosine").mean() for g in range(3)])
    assert cosines.identity_diversity(images, groups).item() == pytest.approx(expected, abs=1e-6)


def test_diversity_does_not_depend_on_order() -> None:
    images, groups = features(9), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert cosines.identity_diversity(images[order], groups[order]).item() == pytest.approx(
        cosines.identity_diversity(images, groups).item(), abs=1e-6
    )


def test_diversity_reaches_its_upper_bound() -> None:
    assert cosines.identity_diversity(torch.tensor([E1, [-1.0, 0.0]]), torch.tensor([0, 0])).item() == pytest.approx(2)


def test_diversity_without_pairs_is_nan() -> None:
    assert cosines.identity_diversity(features(3), torch.tensor([0, 1, 2])).isnan()


def test_diversity_of_a_broken_feature_is_nan_not_hidden() -> None:
    images = features(4)
    images[0] = math.nan
    assert cosines.identity_diversity(images[:2], torch.tensor([0, 0])).isnan()


def test_real_photo_oracle_leaves_out_self_pairs() -> None:
    # pairs: e1.e2 = 0, e1.d = e2.d = sqrt(1/2)
    assert real_photos.real_photo_oracle(torch.tensor([E1, E2, DIAGONAL])).item() == pytest.approx(2 * ROOT_HALF / 3)


def test_real_photo_oracle_with_self_pairs_is_higher_by_its_share() -> None:
    subject = features(5)
    without = real_photos.real_photo_oracle(subject).item()
    assert real_photos.real_photo_oracle(subject, self_pairs=True).item() == pytest.approx(without + (1 - without) / 5, abs=1e-6)


def test_real_photo_oracle_of_one_photo_is_nan() -> None:
    assert real_photos.real_photo_oracle(features(1)).isnan()


def test_nearest_photo_is_the_largest_cosine_and_whose_it_is() -> None:
    nearest = real_photos.nearest_photo(torch.tensor([E1, [1.0, -1.0], [2.0, 2.0], [0.1, 1.0]]), torch.tensor([E2, DIAGONAL]))
    assert nearest.cosine.tolist() == pytest.approx([ROOT_HALF, 0, 1, 1 / 1.01**0.5], abs=1e-6)
    assert nearest.index.tolist() == [1, 1, 1, 0]


def test_nearest_of_real_photos_leaves_each_photo_out_in_turn() -> None:
    # nearest other photo: of e1 the diagonal (0.71), of e2 the diagonal (0.71), of the diagonal either (0.71); of -e1: e2 (0)
    photos = torch.tensor([E1, E2, DIAGONAL, [-1.0, 0.0]])
    assert real_photos.nearest_of_real_photos(photos).item() == pytest.approx(3 * ROOT_HALF / 4)


def test_nearest_of_real_photos_uses_held_out_ones_when_there_are_some() -> None:
    assert real_photos.nearest_of_real_photos(torch.tensor([E1, E2]), torch.tensor([E1, DIAGONAL])).item() == pytest.approx((1 + ROOT_HALF) / 2)


def test_memorisation_of_a_hand_worked_case() -> None:
    # the photos are e1 and the diagonal, 0.71 from each other: a copy is 1 - 0.71 above that, e2 exactly on it, -e1 at -0.71 - 0.71
    scores = real_photos.memorisation(torch.tensor([E1, E2, [-1.0, 0.0]]), torch.tensor([E1, DIAGONAL]))
    assert scores.tolist() == pytest.approx([1 - ROOT_HALF, 0, -2 * ROOT_HALF], abs=1e-6)


def test_memorisation_of_held_out_photos_is_zero_on_the_mean() -> None:
    held_out, subject = features(5), features(4, seed=1)
    assert real_photos.memorisation(held_out, subject, held_out).mean().item() == pytest.approx(0, abs=1e-6)


def test_memorisation_of_a_copy_is_above_zero_and_largest() -> None:
    subject = features(4, seed=1)
    copies, others = real_photos.memorisation(subject, subject), real_photos.memorisation(features(9), subject)
    assert copies.min() > max(0, others.max())


def test_memorisation_with_a_single_photo_cannot_be_measured() -> None:
    assert real_photos.memorisation(features(2), features(1, seed=1)).isnan().all()


def test_paired_drift_compares_one_to_one() -> None:
    tuned, base = torch.tensor([E1, E2, E1]), torch.tensor([E1, E1, DIAGONAL])
    assert cosines.paired_drift(tuned, base).tolist() == pytest.approx([0, 1, 1 - ROOT_HALF])


def test_paired_drift_agrees_with_scipy() -> None:
    tuned, base = features(5), features(5, seed=1)
    assert cosines.paired_drift(tuned, base).tolist() == pytest.approx(cdist(tuned, base, "cosine").diagonal().tolist(), abs=1e-6)


def test_macro_mean_counts_each_group_once() -> None:
    assert cosines.macro_mean(torch.tensor([1.0, 1, 1, 5]), torch.tensor([7, 7, 7, 2])).item() == pytest.approx(3)  # micro would be 2


def test_macro_mean_of_a_broken_value_is_nan_not_hidden() -> None:
    assert cosines.macro_mean(torch.tensor([1.0, math.nan]), torch.tensor([0, 1])).isnan()


def test_per_image_diversity_is_the_mean_distance_to_the_others_of_the_prompt() -> None:
    distances = torch.tensor([[9.0, 1, 2, 3], [1, 9, 4, 5], [2, 4, 9, 6], [3, 5, 6, 9]])
    assert cosines.per_image_diversity(distances, torch.tensor([0, 0, 0, 0])).tolist() == pytest.approx([2, 10 / 3, 4, 14 / 3])
    alone = cosines.per_image_diversity(distances, torch.tensor([0, 0, 0, 1]))
    assert alone[:3].tolist() == pytest.approx([1.5, 2.5, 3]) and alone[3].isnan()


def test_copy_baseline_of_a_hand_worked_case() -> None:
    identity, image, prompts = torch.tensor([E1, E2]), torch.tensor([E1, DIAGONAL]), torch.tensor([E1, E2, [-1.0, 0.0]])
    assert real_photos.copy_baseline(identity, image, prompts) == pytest.approx(
        {
            "identity_fidelity": 0.5,  # each copy: 1 to itself, 0 to the other
            "image_fidelity": (1 + ROOT_HALF) / 2,
            "prompt_alignment": (1 + 0 - 1 + ROOT_HALF + ROOT_HALF - ROOT_HALF) / 6,
            "memorisation": 1.0,  # cosine 1 to a photo, where real photos have 0
        }
    )


@pytest.mark.parametrize("score", [cosines.identity_fidelity, cosines.prompt_alignment, cosines.drift])
def test_scores_of_no_images_are_nan(score) -> None:
    assert score(torch.empty(0, 4), torch.empty(0, 4)).isnan()


def test_memorisation_without_photos_is_nan() -> None:
    assert real_photos.memorisation(features(2), torch.empty(0, 8)).isnan().tolist() == [True, True]
    assert real_photos.nearest_photo(features(2), torch.empty(0, 8)).index.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cosines.identity_fidelity(torch.ones(3), torch.ones(2, 3)), "generated must be features of shape"),
        (lambda: cosines.identity_fidelity(torch.ones(2, 3), torch.ones(2, 4)), "one encoder, got 3 and 4 dimensions"),
        (lambda: cosines.prompt_alignment(torch.ones(3, 4), torch.ones(1, 4)), "one row for each image"),
        (lambda: cosines.identity_diversity(torch.ones(3, 4), torch.zeros(2, dtype=torch.long)), "one integer for each image"),
        (lambda: cosines.identity_diversity(torch.ones(3, 4), torch.zeros(3)), "must be integers, got torch.float32"),
        (lambda: cosines.paired_drift(torch.ones(3, 4), torch.ones(1, 4)), "one row for each tuned image"),
        (lambda: cosines.per_image_diversity(torch.ones(3, 2), torch.zeros(3, dtype=torch.long)), "of all pairs"),
    ],
)
def test_scores_of_wrong_shapes_say_what_is_wrong(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_table_has_one_row_for_each_key() -> None:
    assert len({row.key for row in METRICS}) == len(METRICS)
    assert {row.direction for row in METRICS} == {"up", "down"} and {row.kind for row in METRICS} == {"subject", "class", "other"}
