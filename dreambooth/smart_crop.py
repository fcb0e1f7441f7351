"""Where a picture has the most to see: the crop window with the most detail, found without a network. Pure."""

import numpy as np

CLOSE = 0.98  # windows with this share of the most detail count as equal; of those the most central one is taken


def busiest_corner(grey: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Returns (left, top) of the window that holds the most edge energy, the sum of absolute grey differences between neighbours.

    A subject before a plain or blurred background has nearly all of a photo's detail, so the window follows it; a busy background (leaves,
    a bookshelf) draws the window away. It does not know what a face is: for faces, masks are the better tool. Of windows that are
    equal within 2% the most central one is taken, so a photo without a centre of interest is cropped in its centre.

    Args:
        grey: (H, W) uint8.
        width, height: of the window, px; at most those of the picture.

    Raises:
        ValueError: the window does not fit.
    """
    if width > grey.shape[1] or height > grey.shape[0]:
        raise ValueError(f"a window of {width} x {height} px must fit the picture, got {grey.shape[1]} x {grey.shape[0]}")
    totals = _window_sums(edge_energy(grey), width, height)  # (H - height + 1, W - width + 1)
    tops, lefts = np.nonzero(totals >= CLOSE * totals.max())
    from_center = np.abs(lefts - (grey.shape[1] - width) // 2) + np.abs(tops - (grey.shape[0] - height) // 2)
    nearest = int(from_center.argmin())
    return int(lefts[nearest]), int(tops[nearest])


def edge_energy(grey: np.ndarray) -> np.ndarray:
    """Returns the absolute differences to the right and the lower neighbour, summed, (H, W) int32; 0 past the last row and column."""
    levels = grey.astype(np.int32)
    energy = np.zeros_like(levels)
    energy[:, :-1] += np.abs(np.diff(levels, axis=1))
    energy[:-1] += np.abs(np.diff(levels, axis=0))
    return energy


def _window_sums(energy: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns the sum over each window, by its top left corner, from one table of running sums."""
    running = np.pad(energy.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # (H + 1, W + 1)
    return running[height:, width:] - running[:-height, width:] - running[height:, :-width] + running[:-height, :-width]
