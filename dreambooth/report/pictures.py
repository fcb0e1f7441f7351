"""The picture panels of a report: drawn at random from what the runs keep, the same subject, prompts and noise for every arm."""

import base64
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from dreambooth.evaluation import Item, final_plan, image_names, selection_plan
from dreambooth.grids import image_grid
from dreambooth.report.data import ScoredRun, Study

LARGEST_PX = 256  # in the page; larger pictures are made smaller, small ones stay as they are
MOST_STEPS, MOST_COLUMNS = 8, 6


class Picture(NamedTuple):
    """One picture and its text alternative."""

    path: Path
    alt: str


class Row(NamedTuple):
    """A row of pictures; None is an empty cell."""

    label: str
    pictures: list[Picture | None]


class Panel(NamedTuple):
    """A grid of pictures."""

    name: str  # of its file
    title: str
    caption: str  # with how the pictures were drawn
    columns: list[str]
    rows: list[Row]


def panels(study: Study, seed: int) -> list[Panel]:
    """Returns the panels of a study: steps x prompts for every trained arm, ways of drawing x prompts, the class before and after, nearest photos.

    Args:
        study: the runs.
        seed: of the draws of subject, training seed, prompts and noise; never of a score.
    """
    subject, training_seed = _drawn_run(study, seed)
    shown = [
        next((r for r in study.of_arm(arm) if (r.subject, r.config.seed) == (subject, training_seed)), study.of_arm(arm)[0]) for arm in study.arms
    ]
    said = f"Drawn at random (seed {seed}), not chosen: subject {subject}, training seed {training_seed}"
    found = [] if study.is_of_drawing_alone else [_steps(run, k, seed, said) for k, run in enumerate(shown) if not run.suffix]
    found += [_ways(shown, seed, said)] if study.is_drawn_again else []
    return [panel for panel in (*found, _class_strip(shown, seed, said), _nearest(study, shown, seed, said)) if panel is not None]


def data_uri(path: Path) -> str:
    """Returns a picture as text that an <img> can hold: PNG as it is, larger ones as JPEG of at most 256 px."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    data, kind = io.BytesIO(), "png"
    if max(picture.size) > LARGEST_PX:
        picture.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
        picture.save(data, "JPEG", quality=88)
        kind = "jpeg"
    else:
        picture.save(data, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def sheet(panel: Panel) -> Image.Image:
    """Returns a panel as one picture, for Markdown: cells of about 96 px."""
    pixels = [[np.asarray(Image.open(p.path).convert("RGB")) if p else None for p in row.pictures] for row in panel.rows]
    largest = max(max(cell.shape[:2]) for row in pixels for cell in row if cell is not None)
    scale = max(1, round(96 / largest)) if largest <= 96 else 96 / largest
    return image_grid(pixels, [row.label for row in panel.rows], panel.columns, scale).quantize(128, dither=Image.Dither.NONE)


def _drawn_run(study: Study, seed: int) -> tuple[str, int]:
    """Returns a subject and training seed, at random among those that every arm has; else among all."""
    kept = [{(run.subject, run.config.seed) for run in study.of_arm(arm)} for arm in study.arms]
    pairs = sorted(set.intersection(*kept) or set.union(*kept))
    return pairs[int(_rng(seed, "run").integers(len(pairs)))]


def _steps(run: ScoredRun, number: int, seed: int, said: str) -> Panel | None:
    """Returns the pictures of one run's evaluations: a row a step, a column a prompt, down a column the same noise."""
    items = selection_plan(run.config)
    names = dict(zip(items, image_names(items), strict=True))
    folders = sorted(path for path in (run.folder.path / "samples").glob("step-*") if path.is_dir())
    drawn = _draw_columns([item for item in items if item.kind == "subject"], seed)
    folders = (
        [folders[k] for k in dict.fromkeys(np.linspace(0, len(folders) - 1, min(MOST_STEPS, len(folders))).round().astype(int))] if folders else []
    )
    rows = [_photos(run, len(drawn))]
    for folder in folders:
        step = int(folder.name.removeprefix("step-"))
        label = f"step {step}" if step else "un-tuned"
        rows.append(Row(label, [_picture(folder / names[item], f"{run.arm}, {label}: {item.prompt}") for item in drawn]))
    if len(rows) == 1 or not any(cell for row in rows[1:] for cell in row.pictures):
        return None
    caption = f"{said}; prompts and noise. Down a column the prompt and the noise stay the same, and so they do between the arms."
    return Panel(f"steps_{number}", f"Steps x prompts: {run.arm}", caption, [_prompt(item) for item in drawn], rows)


def _ways(shown: Sequence[ScoredRun], seed: int, said: str) -> Panel:
    """Returns the final pictures of every way of drawing: a row a way, a column a prompt, down a column the same noise."""
    drawn = _draw_columns([item for item in final_plan(shown[0].config) if item.kind == "subject"], seed)
    rows = [_photos(shown[0], len(drawn))]
    for run in shown:
        plan = final_plan(run.config)
        names = dict(zip(plan, image_names(plan), strict=True))
        cells = [_picture(run.pictures / "best" / names[item], f"{run.arm}: {item.prompt}") for item in drawn]
        rows.append(Row(run.arm.replace("sampling.", ""), cells))
    caption = f"{said}; prompts and noise. At the chosen step, on prompts that chose nothing. Down a column the prompt and the noise stay the same."
    return Panel("ways", "Ways of drawing x prompts", caption, [_prompt(item) for item in drawn], rows)


def _photos(run: ScoredRun, count: int) -> Row:
    paths = sorted((run.folder.path / "photos").glob("*.png"))[:count]
    return Row("photos", _padded([Picture(path, f"photo {k + 1} of {run.subject}") for k, path in enumerate(paths)], count))


def _class_strip(shown: Sequence[ScoredRun], seed: int, said: str) -> Panel | None:
    """Returns what the class alone looks like before and after: the same noise for the un-tuned base and every arm."""
    first = shown[0]
    items = [item for item in final_plan(first.config) if item.kind == "class"]
    drawn = sorted(_rng(seed, "class").permutation(len(items))[:MOST_COLUMNS].tolist())
    rows = []
    base = f"un-tuned base, {first.arm}" if any(run.suffix for run in shown) else "un-tuned base"
    for run, arm, label in [(first, "base", base), *((run, "best", _step_label(run)) for run in shown)]:
        plan = final_plan(run.config)
        names = [name for item, name in zip(plan, image_names(plan), strict=True) if item.kind == "class"]
        folder = run.pictures / arm
        cells = [_picture(folder / names[k], f"{label}: {items[k].prompt}, noise {k}") if k < len(names) else None for k in drawn]
        rows.append(Row(label, cells))
    if not any(cell for row in rows for cell in row.pictures):
        return None
    prompt = f'"{items[0].prompt}", without the identifier: a class that drifts comes to look like the subject.'
    caption = f"{said}; {len(drawn)} of {len(items)} noises. {prompt}"
    return Panel("class_drift", "The class before and after", caption, [f"noise {k}" for k in drawn], rows)


def _nearest(study: Study, shown: Sequence[ScoredRun], seed: int, said: str) -> Panel | None:
    """Returns pictures of each arm over the training photo that is nearest to each of them, as a check for copies."""
    rows = []
    for run in shown:
        own = study.images[(study.images.run == run.folder.path.name) & (study.images.label == run.arm)]
        images = own[(own.arm == "best") & (own.kind == "subject")]
        drawn = images.iloc[sorted(_rng(seed, "nearest").permutation(len(images))[:MOST_COLUMNS])]
        plan = final_plan(run.config)
        names = {(item.template, item.key[-1]): name for item, name in zip(plan, image_names(plan), strict=True) if item.kind == "subject"}
        photos = sorted((run.folder.path / "photos").glob("*.png"))
        made, near = [], []
        for row in drawn.itertuples():
            path = run.pictures / "best" / names.get((row.template, row.k), "missing")
            made.append(_picture(path, f"{run.arm}, chosen step: {row.prompt}"))
            near.append(_near(photos, row.nearest_photo_index, row.nearest_photo, run.subject))
        rows += [Row(_step_label(run), made), Row("nearest photo", near)]
    if not any(cell for row in rows for cell in row.pictures):
        return None
    columns = max(len(row.pictures) for row in rows)
    caption = (
        f"{said}; images of the final prompts. Below each the training photo that identity features hold nearest; the same view is a sign of copying."
    )
    return Panel(
        "nearest_photos", "Nearest training photos", caption, [""] * columns, [Row(row.label, _padded(row.pictures, columns)) for row in rows]
    )


def _near(photos: Sequence[Path], index: float, similarity: float, subject: str) -> Picture | None:
    if pd.isna(index) or not 0 <= int(index) < len(photos):
        return None
    return _picture(photos[int(index)], f"photo {int(index) + 1} of {subject}, similarity {similarity:.2f}")


def _draw_columns(items: Sequence[Item], seed: int) -> list[Item]:
    """Returns up to six items, of different prompts as far as there are, each with a noise at random."""
    rng = _rng(seed, "prompts")
    templates = list(dict.fromkeys(item.template for item in items))
    kept = sorted(rng.permutation(len(templates))[:MOST_COLUMNS])
    of = {template: [item for item in items if item.template == template] for template in templates}
    return [of[templates[k]][int(rng.integers(len(of[templates[k]])))] for k in kept]


def _rng(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(what.encode())])


def _picture(path: Path, alt: str) -> Picture | None:
    return Picture(path, alt) if path.is_file() else None


def _step_label(run: ScoredRun) -> str:
    step = next((row["step"] for row in run.scores["rows"] if row["arm"] == "best"), "?")
    return f"{run.arm}, step {step}"


def _prompt(item: Item) -> str:
    return item.template.replace("{subject}", "...")


def _padded(pictures: Sequence[Picture | None], count: int) -> list[Picture | None]:
    return [*pictures, *([None] * (count - len(pictures)))]
