"""The built-in world: pictures are functions of (identity, context, seed), and identities stay what they were."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dreambooth.errors import ConfigError, UserError
from dreambooth.lab.identities import ACCESSORIES, SURFACES
from dreambooth.lab.primitives import ball, tube
from dreambooth.lab.raytrace import FAR, gather_solids, hit_ball, hit_box, hit_frustum, trace
from dreambooth.lab.shapes import build
from dreambooth.lab.views import draw_view, ray_directions, stack_views
from dreambooth.lab.world import CLASSES, CONTEXTS, caption, ground_truth, identity, render, render_keyed, render_masks, subject_photos

PAIRS = [(class_noun, context) for class_noun in CLASSES for context in CONTEXTS]
FIRST_CLASSES = ("robot", "teapot", "car", "duck", "dog", "house", "boat", "mushroom", "rocket", "backpack")
FIRST_CONTEXTS = (
    "on the beach", "in the snow", "in the jungle", "on a wooden table", "in a city", "at night",
    "in the desert", "on the moon", "on the grass", "at sunset", "on a checkered floor", "on a red carpet",
)  # fmt: skip
# Mean brightness of subject 50 of each of the first classes (rows) in the first contexts (columns), seed 9.
FIRST_BRIGHTNESS = (
    (151.32, 165.24, 57.20, 108.27, 107.48, 36.56, 143.25, 76.45, 120.04, 90.31, 111.26, 75.16),
    (164.08, 173.48, 70.77, 125.66, 114.47, 46.53, 156.57, 78.86, 133.84, 102.92, 123.26, 88.55),
    (152.31, 162.49, 59.79, 120.83, 102.33, 41.69, 146.36, 64.25, 126.65, 93.09, 109.50, 82.70),
    (156.27, 172.48, 64.37, 119.92, 112.76, 46.00, 153.06, 78.24, 130.43, 95.91, 116.85, 86.40),
    (165.01, 179.78, 58.35, 120.55, 113.53, 41.29, 155.63, 80.73, 131.93, 96.92, 120.09, 83.91),
    (109.33, 113.76, 45.28, 82.92, 76.52, 30.06, 105.50, 43.87, 92.23, 69.06, 84.18, 55.09),
    (170.09, 186.91, 54.76, 119.58, 118.93, 37.97, 158.60, 85.75, 133.15, 95.70, 120.51, 84.10),
    (135.43, 153.22, 79.99, 116.81, 102.99, 52.50, 142.19, 74.16, 128.03, 94.94, 112.97, 88.44),
    (161.10, 176.73, 45.15, 108.56, 109.26, 30.58, 147.68, 79.53, 121.52, 89.19, 112.34, 73.20),
    (115.28, 119.46, 47.67, 87.45, 79.42, 31.86, 111.32, 46.90, 95.41, 73.23, 86.20, 56.29),
)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers).view(-1, 1)


def test_world_has_sixteen_classes_and_eighteen_contexts() -> None:
    assert (len(set(CLASSES)), len(set(CONTEXTS))) == (16, 18)


def test_new_classes_and_contexts_are_appended() -> None:
    """The index of a class is part of its subjects, and the shipped weights know the first ones."""
    assert (CLASSES[:10], CONTEXTS[:12]) == (FIRST_CLASSES, FIRST_CONTEXTS)


def test_identities_of_the_first_classes_are_what_the_shipped_weights_saw() -> None:
    digest = hashlib.sha256()
    for noun in FIRST_CLASSES:
        for seed in range(40):
            me = identity(noun, seed)
            colors, proportions = [[round(v, 9) for v in color] for color in me.colors], [round(v, 9) for v in me.proportions]
            digest.update(json.dumps([me.color_names, colors, me.pattern, me.frequency, proportions]).encode())
    assert digest.hexdigest() == "6fc180a8155e16acc57b0061f4585b1bd86bd6e2594fe015c77af9327aeafc7e"


def test_render_of_the_first_classes_in_the_first_contexts_is_what_the_shipped_weights_saw(gallery: Tensor) -> None:
    brightness = gallery.float().mean((1, 2, 3)).view(len(CLASSES), len(CONTEXTS))[:10, :12]
    assert torch.allclose(brightness, torch.tensor(FIRST_BRIGHTNESS), atol=0.05)


def test_identity_913_is_the_known_robot() -> None:
    robot = identity("robot", 913)
    assert robot.color_names == ("yellow", "brown", "brown", "brown")
    assert (robot.pattern, robot.frequency) == ("dots", 2)
    assert robot.colors[0] == pytest.approx((0.9456324, 0.8036250, 0.1631984), abs=1e-6)
    assert robot.proportions[:3] == pytest.approx((0.98501530, 0.08932565, 0.44926202), abs=1e-7)


def test_identity_wears_two_colours_in_every_way() -> None:
    """Body and pattern differ; head and limbs each repeat one of the two, in the very same shade."""
    subjects = [identity(noun, seed) for noun in CLASSES for seed in range(20)]
    worn = {tuple(me.color_names.index(name) for name in me.color_names) for me in subjects}
    assert worn == {(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 1, 1)}
    assert all(len(set(me.colors)) == 2 for me in subjects)


@pytest.mark.parametrize("extra", [{"accessory": "hat"}, {"accessory": "flag"}, {"surface": "spotted"}])
def test_identity_with_an_accessory_or_a_surface_is_the_same_subject(extra: dict[str, str]) -> None:
    assert identity("duck", 5, **extra) == replace(identity("duck", 5), **extra)


def test_identity_main_color_sets_the_body_alone_first() -> None:
    names = identity("car", 3, main_color="pink").color_names
    assert names[0] == "pink" and len(set(names)) == 2


def test_identity_of_an_unknown_class_names_the_classes() -> None:
    with pytest.raises(ConfigError, match="class_noun must be a class of the lab's world, got 'cat'; choose one of robot, teapot, car"):
        identity("cat", 1)


def test_identity_of_an_unknown_color_names_the_colors() -> None:
    with pytest.raises(ConfigError, match="got 'mauve'; choose one of red, orange"):
        identity("car", 1, main_color="mauve")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"accessory": "cape"}, "accessory must be an accessory of the lab's world, got 'cape'; choose one of hat, scarf, balloon, flag"),
        ({"surface": "wet"}, "surface must be a surface of the lab's world, got 'wet'; choose one of striped, spotted, checkered"),
    ],
)
def test_identity_refuses_what_the_world_cannot_show(extra: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        identity("car", 1, **extra)


@pytest.mark.parametrize(
    ("arguments", "context", "color", "sentence"),
    [
        ({"main_color": "red", "accessory": "hat"}, "in the snow", True, "a photo of a red robot wearing a hat in the snow"),
        ({"accessory": "balloon"}, "under water", False, "a photo of a robot with a balloon under water"),
        ({"main_color": "orange", "surface": "striped"}, None, True, "a photo of a striped orange robot"),
        ({"main_color": "orange"}, None, True, "a photo of an orange robot"),
        ({}, "at night", False, "a photo of a robot at night"),
    ],
)
def test_caption_says_what_is_there(arguments: dict[str, object], context: str | None, color: bool, sentence: str) -> None:
    assert caption(identity("robot", 1, **arguments), context, color) == sentence


def test_render_is_a_function_of_the_seed() -> None:
    subject = identity("teapot", 2)
    first, again, other = render([subject] * 3, ["at sunset"] * 3, [7, 7, 8])
    assert torch.equal(first, again)
    assert psnr(first, other) < 25


def test_render_of_an_item_does_not_depend_on_its_batch() -> None:
    subjects = [identity(CLASSES[index % 16], index) for index in range(36)]
    contexts = [CONTEXTS[(index * 5) % 18] for index in range(36)]
    together = render(subjects, contexts, range(36))
    alone = [render([subject], [context], [seed])[0] for subject, context, seed in zip(subjects, contexts, range(36), strict=True)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("context", ["in the snow", "at night", "in a city", "on the moon", "under water", "in the rain"])
def test_render_shows_the_same_scene_at_every_resolution(context: str) -> None:
    subject = identity("rocket", 4)
    fine, coarse = render([subject], [context], [3], resolution=128), render([subject], [context], [3], resolution=64)
    assert psnr(avg_pool2d(fine.float(), 2), coarse) > 26


@pytest.fixture(scope="module")
def gallery() -> Tensor:
    return render([identity(noun, 50) for noun, _ in PAIRS], [place for _, place in PAIRS], [9] * len(PAIRS))


def test_render_gives_bytes_with_contrast_in_every_class_and_context(gallery: Tensor) -> None:
    assert gallery.dtype == torch.uint8 and gallery.shape == (288, 3, 64, 64)
    assert gallery.float().flatten(1).std(1).min() > 8


def test_render_shows_the_subject_in_every_class_and_context(gallery: Tensor) -> None:
    subjects = [identity(noun, 50) for noun, _ in PAIRS]
    repainted = [replace(subject, colors=tuple((1 - r, 1 - g, 1 - b) for r, g, b in subject.colors)) for subject in subjects]
    other = render(repainted, [place for _, place in PAIRS], [9] * len(PAIRS))
    painted = (gallery.int() - other.int()).abs().amax(1) > 8
    assert painted.float().mean((1, 2)).min() > 0.04  # share of the picture that is subject


@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_render_shows_the_accessory_on_every_class(accessory: str) -> None:
    for noun in CLASSES:
        for seed in range(3):
            wearer, bare = build(identity(noun, seed, accessory=accessory)), build(identity(noun, seed))
            view = draw_view(noun, wearer, np.random.default_rng(seed))
            views = stack_views([view], "cpu")
            hits = trace(gather_solids([wearer], [view.yaw], "cpu"), views, ray_directions(views.pitch, 64))
            assert (hits.solid >= len(bare)).sum() > 40, f"{noun} {seed}"  # pixels of 4096


@pytest.mark.parametrize("surface", SURFACES)
def test_render_shows_the_surface_on_every_class(surface: str) -> None:
    painted = [identity(noun, 3, surface=surface) for noun in CLASSES]
    plain = [replace(subject, surface=None, pattern="none") for subject in painted]
    shown, bare = (render(subjects, ["on the grass"] * 16, range(16)) for subjects in (painted, plain))
    assert ((shown.int() - bare.int()).abs().amax(1) > 16).float().mean((1, 2)).min() > 0.01


def test_render_refuses_an_unknown_context_and_names_the_contexts() -> None:
    with pytest.raises(UserError, match="context must be a place of the lab's world, got 'in space'; choose one of on the beach"):
        render([identity("car", 1)], ["in space"], [0])


def test_render_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(UserError, match=r"must have the same length, got \(1, 1, 2\)"):
        render([identity("car", 1)], ["at night"], [0, 1])


def test_render_refuses_a_negative_seed() -> None:
    with pytest.raises(UserError, match="seeds must not be negative, got -1"):
        render([identity("car", 1)], ["at night"], [-1])


def test_render_of_nothing_is_empty() -> None:
    assert render([], [], []).shape == (0, 3, 64, 64)


def test_subject_photos_are_the_pictures_that_the_shipped_scores_were_measured_on() -> None:
    photos, contexts = subject_photos("robot", 913)
    assert contexts == ["on the grass", "on a wooden table", "on the beach", "on the grass", "on a wooden table"]
    means = [[144.9, 166.3, 87.5], [159.9, 126.0, 75.9], [183.0, 179.3, 143.0], [130.8, 160.2, 88.8], [163.4, 119.5, 72.3]]
    assert torch.allclose(photos.float().mean((2, 3)), torch.tensor(means), atol=0.5)


def test_subject_photos_do_not_change_with_their_count() -> None:
    assert torch.equal(subject_photos("duck", 921, count=2)[0], subject_photos("duck", 921, count=7)[0][:2])


def test_ground_truth_is_the_subject_itself() -> None:
    assert torch.equal(ground_truth("car", 12, ["on the moon"], [4]), render([identity("car", 12)], ["on the moon"], [4]))


def test_hit_ball_from_three_away_is_at_two() -> None:
    assert hit_ball(column(0, 0, 3), column(0, 0, -1), column(1)[0], column(1)[0]) == pytest.approx(2.0)


def test_hit_box_from_three_away_is_at_two() -> None:
    assert hit_box(column(0.5, 0.5, 3), column(0, 0, -1), column(1)[0], column(1)[0]) == pytest.approx(2.0)


def test_hit_frustum_wall_is_where_the_radius_says() -> None:
    distance = hit_frustum(column(0, 0, 3), column(0, 0, -1), column(1.0)[0], column(0.5)[0])  # radius 0.75 at half height
    assert distance == pytest.approx(2.25)


def test_hit_frustum_cap_is_flat() -> None:
    assert hit_frustum(column(0.3, 4, 0), column(0, -1, 0), column(1.0)[0], column(0.5)[0]) == pytest.approx(3.0)


def test_hit_ball_beside_is_missed() -> None:
    assert hit_ball(column(1.01, 0, 3), column(0, 0, -1), column(1)[0], column(1)[0]) == FAR


def test_trace_normals_have_length_one_and_face_the_camera() -> None:
    parts = [build(identity(noun, 8)) for noun in CLASSES]
    views = [draw_view(noun, solids, np.random.default_rng(1)) for noun, solids in zip(CLASSES, parts, strict=True)]
    stacked = stack_views(views, "cpu")
    hits = trace(gather_solids(parts, [view.yaw for view in views], "cpu"), stacked, ray_directions(stacked.pitch, 64))
    assert torch.allclose(hits.normal.square().sum(0), torch.ones(hits.normal.shape[1]), atol=1e-4)
    assert ((hits.normal * hits.direction).sum(0) < 1e-3).float().mean() > 0.999


def test_trace_shows_the_solid_in_front() -> None:
    near, far = ball((0, 1, 1), 0.3, (1, 0, 0)), tube((0, 1, -1), 0.3, 0.3, (0, 1, 0))
    view = draw_view("robot", [far, near], np.random.default_rng(0))
    stacked = stack_views([view._replace(yaw=0.0, camera=np.array([0.0, 1.0, 4.0]), pitch=0.0)], "cpu")
    hits = trace(gather_solids([[far, near]], [0.0], "cpu"), stacked, ray_directions(stacked.pitch, 64))
    centre = (hits.ray == 32 * 64 + 32).nonzero().item()
    assert hits.solid[centre] == 1 and hits.distance[centre] == pytest.approx(2.7, abs=0.02)


@pytest.mark.parametrize("class_noun", ["robot", "fish", "train"])
def test_masks_hold_all_that_belongs_to_the_subject(class_noun: str) -> None:
    """Other colours change pixels of the subject alone, and the subject covers about what they change."""
    key, red = (31, 7), identity(class_noun, 905)
    inverted = tuple(tuple(1 - value for value in color) for color in red.colors)
    pictures = render_keyed([red, replace(red, colors=inverted)], ["on the grass"] * 2, [key, key])
    changed = (pictures[0].float() - pictures[1].float()).abs().amax(0) > 8
    mask = render_masks([red], [key])[0]
    assert mask.min() == 0 and mask.max() == 1
    assert not (changed & (mask == 0)).any()
    assert (changed & (mask > 0)).sum() > 0.5 * (mask > 0).sum()


def test_masks_depend_on_their_own_key_alone() -> None:
    subjects, keys = [identity("car", 905), identity("duck", 906), identity("car", 907)], [(1,), (2, 3), (4,)]
    masks = render_masks(subjects, keys)
    assert torch.equal(masks[2], render_masks(subjects[2:], keys[2:])[0])
    assert not torch.equal(masks[2], render_masks(subjects[2:], [(5,)])[0])
