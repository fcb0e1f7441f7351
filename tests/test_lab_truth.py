"""The lab's ground truth as columns of the table of images."""

import numpy as np
import pytest
from small_runs import composed

from dreambooth.evaluation import Item
from dreambooth.lab.identities import identity
from dreambooth.lab.world import render
from dreambooth.lab_truth import LabTruth, lab_truth
from dreambooth.recipes import resolve

PLACES = ["in the snow", "in the desert"] * 4
ITEMS = [Item("subject", f"a photo of a {{subject}} {place}", "", "", (0, 0, k)) for k, place in enumerate(PLACES)]
BESIDE = [
    Item("class", "a photo of a {subject}", "", "", (0, 0, 0)),
    Item("subject", "a red {subject}", "", "", (0, 0, 0)),
    Item("other", "a photo of a car in the snow", "", "", (0, 0, 0)),
]


@pytest.fixture(scope="module")
def truth() -> LabTruth:
    config = resolve(composed("encoders=lab"))
    return lab_truth(config, config.encoders.load())


def pictures(seed: int, places: list[str]) -> np.ndarray:
    pixels = render([identity("dog", seed)] * len(places), places, list(range(700, 700 + len(places))))
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def test_truth_knows_the_subject_and_the_place(truth: LabTruth) -> None:
    columns = truth(pictures(913, PLACES), ITEMS)
    assert columns["true_identity"].mean() > 0.95 and columns["true_identity_margin"].min() > 0
    assert columns["true_context"].mean() > 0.8


def test_truth_of_another_subject_is_chance_and_of_another_place_none(truth: LabTruth) -> None:
    swapped = [*PLACES[1:], PLACES[0]]
    columns = truth(pictures(941, swapped), ITEMS)
    assert 0.2 < columns["true_identity"].mean() < 0.8
    assert columns["true_context"].mean() < 0.2


def test_truth_says_nothing_of_items_whose_place_is_not_known(truth: LabTruth) -> None:
    images = np.concatenate([pictures(913, PLACES[:2]), np.zeros((3, 64, 64, 3), np.uint8)])
    columns = truth(images, [*ITEMS[:2], *BESIDE])
    assert all(np.isnan(values[2:]).all() and not np.isnan(values[:2]).any() for values in columns.values())


def test_truth_depends_on_each_image_alone(truth: LabTruth) -> None:
    images = pictures(913, PLACES)
    whole, part = truth(images, ITEMS), truth(images[3:5], ITEMS[3:5])
    assert all(np.allclose(whole[name][3:5], part[name]) for name in whole)


def test_truth_is_for_the_built_in_subject_alone(tmp_path) -> None:
    config = resolve(composed("encoders=lab", f"data.subject_dir={tmp_path}", "subject.class_noun=robot"))
    assert lab_truth(config, object()) is None and lab_truth(resolve(composed()), None) is None
