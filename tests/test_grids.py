import numpy as np
import pytest

from dreambooth import grids


def noise(width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_image_grid_puts_pictures_side_by_side() -> None:
    a, b = noise(20, 10), noise(20, 10, seed=1)
    sheet = np.asarray(grids.image_grid([[a, b]], scale=1, gap=4))
    assert sheet.shape == (4 + 10 + 4, 4 + 20 + 4 + 20 + 4, 3)
    np.testing.assert_array_equal(sheet[4:14, 4:24], a)
    np.testing.assert_array_equal(sheet[4:14, 28:48], b)
    assert (sheet[:, 24:28] == 255).all()


def test_image_grid_enlarges_by_whole_factors_without_new_colours() -> None:
    sheet = np.asarray(grids.image_grid([[noise(64, 64)]], gap=0))
    np.testing.assert_array_equal(sheet, noise(64, 64).repeat(3, 0).repeat(3, 1))


def test_image_grid_fits_smaller_pictures_to_the_cell_of_the_largest() -> None:
    sheet = np.asarray(grids.image_grid([[noise(64, 64), np.zeros((32, 64, 3), np.uint8)]], scale=1, gap=0))
    assert sheet.shape == (64, 128, 3)
    assert (sheet[16:48, 64:] == 0).all() and (sheet[:16, 64:] == 255).all() and (sheet[48:, 64:] == 255).all()


def test_image_grid_fills_empty_cells_and_short_rows_with_a_pale_grey() -> None:
    sheet = np.asarray(grids.image_grid([[noise(16, 16), None], [noise(16, 16)]], scale=1, gap=0))
    assert (sheet[:, 16:] == grids._EMPTY).all()


def test_image_grid_labels_stay_outside_the_pictures() -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    sheet = np.asarray(grids.image_grid([[black] * 3] * 2, ["a long label for a row, wrapped", "2"], ["x" * 40, "two words", ""], 1))
    assert (sheet == 0).all(2).sum() == 6 * 64 * 64
    assert (sheet[:20] < 128).any() and (sheet[:, :40] < 128).any()


def test_image_grid_wraps_labels_to_their_width() -> None:
    font = grids.ImageFont.load_default(14)
    lines = grids._wrap("a photo of a sks dog on the beach " + "w" * 60 + "\nseed 3", font, 100)
    assert max(font.getlength(line) for line in lines) <= 100
    assert "".join(lines).replace(" ", "") == "aphotoofasksdogonthebeach" + "w" * 60 + "seed3" and lines[-1] == "seed 3"


def test_image_grid_writes_other_letters_as_readable_ascii() -> None:
    assert grids._wrap("café – 2×½ ≠ 猫", grids.ImageFont.load_default(14), 999) == ["cafe - 2x1/2 != ?"]


def test_image_grid_refuses_a_wrong_number_of_labels() -> None:
    with pytest.raises(ValueError, match=r"row_labels must be one for each row \(1\), got 2"):
        grids.image_grid([[noise()]], ["a", "b"])


def test_image_grid_refuses_to_draw_nothing() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        grids.image_grid([[None], []])
