"""Aspect-ratio buckets: their sizes, which photo goes where, and whose turn it is."""

import itertools
from collections import Counter

import pytest

from dreambooth.buckets import Turn, bucket_sizes, bucket_step, lost_share, nearest_bucket, turn


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (128, 16), (256, 32), (512, 64), (768, 64), (1024, 64)])
def test_bucket_step_is_64_px_from_512_on(resolution: int, step: int) -> None:
    assert bucket_step(resolution) == step


def test_bucket_sizes_at_512_are_these() -> None:
    wide = [(512, 512), (576, 448), (640, 384), (704, 384), (768, 320), (832, 320), (896, 320), (960, 256), (1024, 256)]
    assert bucket_sizes(512) == sorted({*wide, *((height, width) for width, height in wide)})


@pytest.mark.parametrize("resolution", [64, 72, 256, 512, 640, 768])
def test_bucket_sizes_have_about_the_area_of_the_square(resolution: int) -> None:
    assert all(0.85 < width * height / resolution**2 < 1.15 for width, height in bucket_sizes(resolution))


@pytest.mark.parametrize(
    ("size", "bucket"), [((4000, 3000), (576, 448)), ((3000, 4000), (448, 576)), ((1000, 1000), (512, 512)), ((160, 90), (704, 384))]
)
def test_nearest_bucket_has_the_nearest_shape(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    sizes = bucket_sizes(512)
    assert sizes[nearest_bucket(*size, sizes)] == bucket


def test_nearest_bucket_crops_less_than_the_square_would() -> None:
    sizes = bucket_sizes(512)
    for width, height in itertools.product(range(500, 2000, 300), repeat=2):
        bucket = sizes[nearest_bucket(width, height, sizes)]
        assert lost_share(width, height, bucket) <= lost_share(width, height, (512, 512)) + 1e-9
        assert lost_share(width, height, bucket) < 0.13


def test_lost_share_of_a_square_crop_of_two_to_one_is_a_half() -> None:
    assert lost_share(1000, 500, (512, 512)) == pytest.approx(0.5)


def test_turns_are_in_exact_proportion_to_the_photos_in_every_round() -> None:
    for start in range(0, 100, 10):
        assert Counter(turn(step, (2, 7, 1), 3).bucket for step in range(start, start + 10)) == {0: 2, 1: 7, 2: 1}


def test_turns_count_the_earlier_batches_of_their_bucket() -> None:
    seen = Counter()
    for step in range(60):
        found = turn(step, (2, 3), 5)
        assert found.earlier == seen[found.bucket]
        seen[found.bucket] += 1


def test_turns_depend_on_the_seed_and_differ_between_rounds() -> None:
    def stream(seed: int) -> list[Turn]:
        return [turn(step, (4, 4), seed) for step in range(64)]

    assert stream(0) != stream(1) and stream(0) == stream(0)
    assert len({tuple(found.bucket for found in stream(0)[start : start + 8]) for start in range(0, 64, 8)}) > 1
