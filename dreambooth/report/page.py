"""Run folders -> a report: one HTML page that needs nothing beside it, and Markdown with small pictures. See `data` for what is read."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth import __version__
from dreambooth.errors import UserError
from dreambooth.files import write_text, write_with
from dreambooth.report.answer import answer, cautions, how_many_steps, is_led
from dreambooth.report.course import Point, course, course_table, steps_after, steps_after_table
from dreambooth.report.data import Study, read_study
from dreambooth.report.figures import Plot, bars, heat_maps, paired_dots, trajectories
from dreambooth.report.pictures import Panel, data_uri, panels, sheet
from dreambooth.report.published import beside_the_paper
from dreambooth.report.record import cost_table, left_out_table, reproducibility
from dreambooth.report.tables import ANSWERING, Table, compare, score_tables
from dreambooth.report.truth import truth_tables
from dreambooth.report.ways import trade_off, way_maps

PICTURES = "report_figures"  # folder beside report.md
NO_COURSE = (
    "There is no course to show: all arms are drawn from the same models, at the same steps of their training, and differ in the drawing alone. "
    "How these models were trained is in the report with --own-drawing."
)


class Section(NamedTuple):
    """A part of the report, in the order: words, plots, panels, tables."""

    title: str
    plots: list[Plot]
    panels: list[Panel]
    tables: list[Table]
    words: str = ""


class Report(NamedTuple):
    """What the page and the Markdown show alike."""

    title: str
    question: str
    answer: list[str]
    steps: str | None  # how many were needed
    caution: str | None
    basis: str  # how many runs of what
    header: dict[str, str]
    sections: list[Section]
    has_lead: bool = False  # the first sentence of the answer speaks of all arms, the others of one each

    @property
    def said(self) -> list[str]:
        """The answer with what it says of steps, sentence by sentence."""
        return [*self.answer, *([self.steps] if self.steps else [])]


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    baseline: str | None = None,
    seed: int = 0,
    is_own_drawing: bool = False,
) -> list[Path]:
    """Writes report.html, report.md and the pictures of the latter; returns the paths of the first two.

    Args:
        folders: run folders, or folders that hold them.
        output: folder, made when missing; None: the run itself if there is one run, else the folder that holds them all.
        baseline: the arm to hold the others against; see `read_study`.
        seed: of the draw of the pictures that are shown.
        is_own_drawing: leave out what `evaluate.py` drew again in other ways.

    Raises:
        UserError: nothing to report on, or no place for it.
    """
    study = read_study(folders, baseline, is_own_drawing)
    place = Path(output) if output is not None else _place(study)
    report = make_report(study, seed)
    for section in report.sections:
        for plot in section.plots:
            png = plot.png
            write_with(place / PICTURES / f"{plot.name}.png", lambda temporary, png=png: temporary.write_bytes(png))
        for panel in section.panels:
            write_with(place / PICTURES / f"{panel.name}.png", lambda temporary, panel=panel: temporary.write_bytes(_png(panel)))
    return [write_text(place / name, render(report, f"{name}.jinja")) for name in ("report.html", "report.md")]


def make_report(study: Study, seed: int = 0) -> Report:
    """Returns the report of a study."""
    best, last, alone = compare(study, "best"), compare(study, "final"), study.is_of_drawing_alone
    points, after = ([], []) if alone else (course(study), steps_after(study))
    tables, by_step = score_tables(study, best, last), [steps_after_table(after), course_table(points)]
    prior = [bars(study, best, "drift", "pres"), bars(study, best, "class_diversity", "div")]
    panel_of = {panel.name: panel for panel in panels(study, seed)}
    grids = [panel for name, panel in panel_of.items() if name.startswith("steps_")]
    left_out, published = left_out_table(study), beside_the_paper(study, best, last)
    sections = [
        Section("Ways of drawing", [*_there([trade_off(study, best)]), *way_maps(study, best)], _there([panel_of.get("ways")]), []),
        Section("Scores", [], [], [*tables[:2], *([published] if published else [])]),
        Section("Over the steps of training", _course(study, points), [], by_step, NO_COURSE if alone else ""),
        Section("Pictures on the way", [], grids, []),
        Section("The prior: PRES and DIV", _there(prior), _there([panel_of.get("class_drift")]), []),
        Section("Subject by subject", _there([paired_dots(study, key) for key in ANSWERING]), [], [tables[-1]]),
        Section("Against the ground truth", [], [], truth_tables(study)),
        Section("Copies of the photos", [], _there([panel_of.get("nearest_photos")]), []),
        Section("Further tables", [], [], tables[2:-1]),
        Section("Costs", [], [], [cost_table(study)]),
        Section("Left out", [], [], [left_out] if left_out else []),
        Section("Reproducibility", [], [], [reproducibility(study)]),
    ]
    title = ", ".join(study.groups)
    sections = [one for one in sections if one.words or one.plots or one.panels or any(table.rows for table in one.tables)]
    beside = " ".join(cautions(study, best)) or None
    steps, is_of_all = how_many_steps(study, after), is_led(study, best)
    return Report(title, _question(study), answer(study, best), steps, beside, _basis(study), study.header, sections, is_of_all)


def _course(study: Study, points: Sequence[Point]) -> list[Plot]:
    return trajectories(study, points) + heat_maps(study, points)


def render(report: Report, template: str) -> str:
    """Returns a report as text, by one of the templates beside this file; all that comes from outside is escaped in HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and name.endswith(".html.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": markdown_cell, "breakable": breakable}
    context: dict[str, Any] = {"report": report, "data_uri": data_uri, "pictures": PICTURES, "version": __version__}
    return environment.get_template(template).render(context)


def breakable(text: str, is_narrow: bool = False) -> Any:
    """Returns text as HTML in which a setting may be broken behind its "=" and the commas of its list, rather than inside a word.

    Args:
        text: with settings in it, or without.
        is_narrow: there is no room for a whole name, so it may be broken between its words too.
    """
    from markupsafe import Markup

    places = r"(?<==)(?=\S)|(?<=,)(?=[A-Za-z])" + (r"|(?<=[a-z][._])(?=[a-z._]+=)" if is_narrow else "")
    return Markup("<wbr>").join(re.split(places, text))


def _question(study: Study) -> str:
    if "Question" in study.header:
        question = study.header["Question"]
        return question[0].upper() + question[1:]
    return f"What differs between {' | '.join(study.arms)}?" if study.has_arms else "What was learned, and what was lost?"


def _basis(study: Study) -> str:
    """Returns what the report rests on: arms, subjects, seeds, runs, the baseline, failures."""
    seeds, folders = {run.config.seed for run in study.runs}, {run.folder.path for run in study.runs}
    counts = [(len(study.arms), "arm"), (len(study.subjects), "subject"), (len(seeds), "training seed"), (len(folders), "scored run")]
    words = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    words += f", each drawn in {len({run.suffix for run in study.runs})} ways" if study.is_drawn_again else ""
    words += f"; {len(study.left_out)} failed or unfinished" if study.left_out else ""
    baseline = f" Baseline: {study.baseline} ({study.baseline_reason})." if study.has_arms else ""
    return f"{words}.{baseline}"


def _place(study: Study) -> Path:
    paths = {run.folder.path for run in study.runs}
    if len(paths) == 1 and not study.left_out:
        return paths.pop()
    parents = {path.parent for path in paths}
    if len(parents) > 1:
        raise UserError("--output", "must be said when the runs lie in several folders", None, "write --output runs/comparison")
    return parents.pop()


def _png(panel: Panel) -> bytes:
    data = io.BytesIO()
    sheet(panel).save(data, "PNG", optimize=True)
    return data.getvalue()


def _there(found: Sequence[Any]) -> list[Any]:
    return [one for one in found if one is not None]


def markdown_cell(text: str) -> str:
    """Returns a text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
