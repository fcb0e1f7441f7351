"""Contact sheets and labelled grids of pictures of any size."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _EMPTY = (255, 255, 255), (45, 45, 48), (241, 241, 243)
_ASCII_FOR = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "≠": "!=", "±": "+-", "→": "->", "’": "'", "“": '"', "”": '"', "µ": "u"}
)


def image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: float | None = None,
    gap: int = 8,
) -> Image.Image:
    """Returns a contact sheet: pictures in rows and columns on white, with wrapped labels to the left and above.

    Every picture fills its cell as far as its proportions allow. Enlarging by a whole factor repeats pixels (nearest), so that small
    pictures stay as they are; any other change of size is Lanczos.

    Args:
        rows: uint8 (H, W, 3) of any sizes; None is a pale empty cell, and so is what a short row lacks.
        row_labels, column_labels: one for each row and column, or none; "\n" breaks a line. PIL's own font is ASCII: accents fall off.
        scale: cell size relative to the largest picture; None chooses cells of about 192 px.
        gap: space between cells, in px.

    Raises:
        ValueError: no picture at all, or a wrong number of labels.
    """
    columns = max((len(row) for row in rows), default=0)
    cell = _cell_size([picture for row in rows for picture in row if picture is not None], scale)
    for kind, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"{kind}_labels must be one for each {kind} ({count}), got {len(labels)}")
    font = ImageFont.load_default(min(24, max(11, cell[0] // 12)))
    line = sum(font.getmetrics()) + 1
    above = [_wrap(label, font, max(cell[0], 64)) for label in column_labels]
    beside = [_wrap(label, font, max(cell[0] * 0.8, 110)) for label in row_labels]
    left = gap + (round(max(font.getlength(text) for lines in beside for text in lines)) + gap if beside else 0)
    top = gap + (max(map(len, above)) * line + gap // 2 if above else 0)
    width, height = max(cell[0], 64 if above else 0), max([cell[1], *(len(lines) * line for lines in beside)])  # room, with labels
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, lines in enumerate(above):  # centred, standing on the pictures
        _write(draw, lines, font, (left + x * (width + gap) + width / 2, top - gap // 2 - len(lines) * line), "ma")
    for y, row in enumerate(rows):
        y0 = top + y * (height + gap)
        if beside:  # flush right, half way down the row
            _write(draw, beside[y], font, (left - gap, y0 + (height - len(beside[y]) * line) / 2), "ra")
        for x in range(columns):
            corner = (left + x * (width + gap) + (width - cell[0]) // 2, y0 + (height - cell[1]) // 2)
            _paste(sheet, row[x] if x < len(row) else None, corner, cell)
    return sheet


def _cell_size(pictures: list[np.ndarray], scale: float | None) -> tuple[int, int]:
    """Returns the (width, height) of a cell in px, see `image_grid`; ValueError without pictures."""
    if not pictures:
        raise ValueError("rows must hold at least one picture, got none")
    tall, wide = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    if scale is None:
        scale = 192 / max(tall, wide)
        scale = max(1, round(scale)) if scale > 1 else scale
    return max(1, round(wide * scale)), max(1, round(tall * scale))


def _paste(sheet: Image.Image, picture: np.ndarray | None, corner: tuple[int, int], cell: tuple[int, int]) -> None:
    """Draws one picture, as large as the cell allows and centred in it; or the pale rectangle of an empty cell."""
    if picture is None:
        sheet.paste(_EMPTY, (*corner, corner[0] + cell[0], corner[1] + cell[1]))
        return
    image = Image.fromarray(picture)
    factor = min(cell[0] / image.width, cell[1] / image.height)
    if factor != 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        whole = factor > 1 and size == (image.width * round(factor), image.height * round(factor))
        image = image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
    sheet.paste(image, (corner[0] + (cell[0] - image.width) // 2, corner[1] + (cell[1] - image.height) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Returns the lines of a text in ASCII, none wider than `width` px: broken at spaces, and inside a word only where one is too long."""
    plain = unicodedata.normalize("NFKD", text.translate(_ASCII_FOR)).replace("\u2044", "/")  # the bar of a fraction sign
    text = "".join(letter if letter.isascii() else "?" for letter in plain if not unicodedata.combining(letter))
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line) > width:
                fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: list[str], font: ImageFont.FreeTypeFont, at: tuple[float, float], anchor: str) -> None:
    """Draws lines of text below each other; `at` is the top of the first, `anchor` PIL's two letters for what `at` means."""
    step = sum(font.getmetrics()) + 1
    for number, text in enumerate(lines):
        draw.text((at[0], at[1] + number * step), text, _INK, font, anchor)
