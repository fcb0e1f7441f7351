"""Weights & Biases as a second place to look at an experiment: its report as a run there, and the project's dashboard, built by code.

Everything that is sent is read from run folders; nothing is read back from W&B. Sending works offline (`wandb sync` does the rest later); the
dashboard is a page of the server, so it needs a login.
"""

import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.arms import axes
from dreambooth.config import CHOICES, Tracking
from dreambooth.errors import UserError
from dreambooth.mirror import wandb_run
from dreambooth.report.data import Study
from dreambooth.report.figures import TITLES
from dreambooth.report.page import Report, make_report, markdown_cell, render
from dreambooth.report.pictures import sheet
from dreambooth.report.tables import ANSWERING

JOB_TYPE = "report"  # of the run that holds a report, beside the runs that trained
LOSSES = ("train/loss", "train/subject_loss", "train/prior_loss")
EXTRA = "pip install dreambooth[dashboard]"


def send_report(study: Study, report: Report, tracking: Tracking, folder: Path) -> str:
    """Logs a report's tables, plots and picture grids as a W&B run in the experiment's group; returns in words where it is.

    Args:
        study: what the report was made from.
        report: of `make_report`.
        tracking: project and entity; mode "offline" writes below `folder`, for `wandb sync`.
        folder: where W&B keeps its files.

    Raises:
        UserError: online without a login.
    """
    import wandb

    group = study.groups[0]
    started = wandb_run(tracking, folder, name=f"report of {report.title}", id=f"report-{_slug(report.title)}", group=group, job_type=JOB_TYPE)
    logged: dict[str, Any] = {"report/words": wandb.Html(render(report, "report.html.jinja"), inject=False)}
    for section in report.sections:
        for table in section.tables:
            logged[f"report/{_slug(table.title)}"] = wandb.Table(columns=_distinct(table.header), data=table.rows)
        for plot in section.plots:
            logged[f"report/{plot.name}"] = wandb.Image(Image.open(io.BytesIO(plot.png)), caption=plot.alt)
        for panel in section.panels:
            logged[f"report/{panel.name}"] = wandb.Image(sheet(panel).convert("RGB"), caption=panel.caption)
    started.summary["answer"] = " ".join(report.said)
    started.log(logged)
    place = started.url or f"wandb sync {started.dir.removesuffix('/files')}"
    started.finish()
    return place


def workspace(study: Study, tracking: Tracking) -> Any:
    """Returns the dashboard of an experiment, a `wandb_workspaces.workspaces.Workspace`: its runs, grouped by arm, on the same axes as the report.

    Args:
        study: of which the arms' settings are read; subjects and seeds are what a group averages over.
        tracking: project and entity.

    Raises:
        UserError: the library is not installed, or no entity is said.
    """
    ws, wr = _library()
    pictures = [
        wr.MediaBrowser(title="The same prompts and noise, step by step", media_keys=["samples/selection"], gallery_axis="step", mode="gallery"),
        wr.MediaBrowser(title="Photos, un-tuned base, chosen and last step", media_keys=["final/grid"], num_columns=1),
    ]
    sections = [
        ws.Section(name="What was learned, and what was lost", panels=_courses(wr), is_open=True),
        ws.Section(name="Fidelity against alignment", panels=_trade_offs(wr), is_open=True),
        ws.Section(name="Scores of the chosen step", panels=[_bar(wr, key) for key in ANSWERING], is_open=True),
        ws.Section(name="Pictures", panels=pictures, is_open=True),
        ws.Section(name="Settings", panels=_settings(wr, study)),
        ws.Section(name="Training", panels=[wr.LinePlot(title=key, x="Step", y=[key]) for key in LOSSES]),
    ]
    return ws.Workspace(
        entity=_entity(tracking),
        project=tracking.project,
        name=f"DreamBooth: {', '.join(study.groups)}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="Step", max_runs=100),
        runset_settings=ws.RunsetSettings(filters=_filters(ws, study), groupby=[ws.Config(key) for key in _varied(study)]),
    )


def online_report(study: Study, report: Report, tracking: Tracking) -> Any:
    """Returns a W&B report, a `wandb_workspaces.reports.v2.Report`: the words and tables of ours over live panels of the runs.

    Args:
        study, tracking: as for `workspace`.
        report: of `make_report`.
    """
    ws, wr = _library()
    runs = wr.Runset(entity=_entity(tracking), project=tracking.project, name=report.title, filters=_filters(ws, study))
    blocks = [wr.MarkdownBlock(text="\n\n".join([f"**{report.question}**", *report.said, report.caution or "", report.basis]))]
    blocks.append(wr.PanelGrid(runsets=[runs], panels=[*_courses(wr), *_trade_offs(wr)]))
    for section in report.sections:
        texts = [_markdown(table.header, table.rows) + (f"\n\n{table.note}" if table.note else "") for table in section.tables if table.rows]
        blocks += [wr.H2(text=section.title), *(wr.MarkdownBlock(text=text) for text in texts)] if texts else []
    return wr.Report(
        entity=_entity(tracking), project=tracking.project, title=f"DreamBooth: {report.title}", description=report.question, blocks=blocks
    )


def publish(study: Study, tracking: Tracking, folder: Path, seed: int = 0) -> list[str]:
    """Sends a study to W&B: always its report as a run; online also the dashboard and a report page. Returns a line for each.

    Args:
        study: the runs.
        tracking: where to, and whether at once.
        folder: where W&B keeps its files.
        seed: of the draw of the pictures that are shown.
    """
    report = make_report(study, seed)
    if tracking.mode == "online":
        page, dashboard = online_report(study, report, tracking), workspace(study, tracking)  # refused before anything is sent
    lines = [f"report as a W&B run: {send_report(study, report, tracking, folder)}"]
    if tracking.mode == "online":
        return [*lines, f"dashboard: {dashboard.save().url}", f"report page: {page.save().url}"]
    return [*lines, "the dashboard is a page of the W&B server: after wandb login and wandb sync, this command with --online builds it"]


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise UserError("the dashboard", "needs the package wandb-workspaces", next_step=EXTRA) from error
    return workspaces, reports


def _entity(tracking: Tracking) -> str:
    if not tracking.entity:
        raise UserError("--entity", "must name your user or team on W&B", None, "write --entity <name>, or set wandb.entity when you train")
    return tracking.entity


def _varied(study: Study) -> list[str]:
    """Returns the config paths in which the arms differ; that of a choice (prior, method, ...) is its name."""
    return list(dict.fromkeys(f"{key}.name" if key in CHOICES else key for arm in study.arms for key in axes(arm)))


def _filters(ws: Any, study: Study) -> Any:
    return ws.And(ws.Metric("Group").isin(study.groups), ws.Metric("JobType") != JOB_TYPE)


def _courses(wr: Any) -> list[Any]:
    """Returns a line over the steps for each answering score, a group's mean with its standard error."""
    return [
        wr.LinePlot(
            title=TITLES[key].title, x="Step", y=[f"score/{key}"], title_x="training step", groupby_aggfunc="mean", groupby_rangefunc="stderr"
        )
        for key in ANSWERING
    ]


def _trade_offs(wr: Any) -> list[Any]:
    fidelity = wr.SummaryMetric("final/best/identity_fidelity")
    others = ("prompt_alignment", "drift")
    return [
        wr.ScatterPlot(title=f"Identity fidelity against {TITLES[key].title.lower()}", x=wr.SummaryMetric(f"final/best/{key}"), y=fidelity)
        for key in others
    ]


def _bar(wr: Any, key: str) -> Any:
    return wr.BarPlot(
        title=f"{TITLES[key].title}, chosen step", metrics=[wr.SummaryMetric(f"final/best/{key}")], orientation="v", groupby_aggfunc="mean"
    )


def _settings(wr: Any, study: Study) -> list[Any]:
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key) for key in _varied(study)]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(f"final/best/{key}"), display_name=TITLES[key].title) for key in ANSWERING]
    return [wr.ParallelCoordinatesPlot(title="Settings and scores", columns=columns), wr.RunComparer(diff_only="split")]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)


def _distinct(header: list[str]) -> list[str]:
    """Returns column names without repetition, which W&B's tables do not take."""
    return [name if header.index(name) == k else f"{name} ({k + 1})" for k, name in enumerate(header)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60]
