"""The drawings of a report: SVG that follows the page's light or dark colours, and PNG for Markdown; each with its text alternative."""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from dreambooth.arms import axes
from dreambooth.combined_scores import BASE
from dreambooth.metrics.table import TITLES, MetricInfo
from dreambooth.report.course import Point
from dreambooth.report.data import Study
from dreambooth.report.tables import ANSWERING
from dreambooth.statistics.comparison import Comparison
from dreambooth.statistics.intervals import Interval, hierarchical_interval

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")  # Okabe & Ito 2008: told apart by the colour-blind
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")  # so that colour is never the only sign
INK = "#1c1b1a"  # becomes the page's own text colour
ROW, TALLEST = 0.1, 12.0  # inches: of a row of dots, of a drawing of them
UNDER_BARS = 46  # characters that stand side by side below them; longer names go to the legend
ALL_NUMBERED_UP_TO = 12  # points that are all numbered in a drawing; of more, each arm's first and last and those on the front
X, Y = "prompt_alignment", "identity_fidelity"  # of the course
RATE = "optim.learning_rate"
STYLE = {"font.size": 10, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 11}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


class Plot(NamedTuple):
    """One drawing."""

    name: str  # of its file
    title: str
    caption: str
    alt: str  # what a reader who cannot see it needs to know, with its numbers
    svg: str  # to be put into a page
    png: bytes


def trajectories(study: Study, points: Sequence[Point]) -> list[Plot]:
    """Returns the course of every arm in prompt alignment and identity fidelity, with the Pareto front, and the same closer; [] without one.

    The second one leaves out the un-tuned base, which is far from the rest, and the intervals, which hide how close steps lie.
    """
    points = [point for point in points if {X, Y} <= set(point.values)]
    if not points:
        return []
    said = [f"{p.arm}, step {p.step}: fidelity {p.values[Y].mean:.2f}, alignment {p.values[X].mean:.2f}" for p in points]
    front = f"Pareto front: {', '.join(f'{p.arm} at step {p.step}' for p in points if p.on_front)}."
    caption = "Numbers are steps; on the selection prompts. Whiskers: 95% intervals over subjects. Ringed: nothing else is better in both."
    title = "Fidelity against alignment over steps"
    plots = [make_plot("trajectory", title, caption, f"{'; '.join(said)}. {front}", partial(_draw_trajectory, study, points, True))]
    tuned = [point for point in points if point.step]
    if tuned:
        caption, title = (
            "The same without the un-tuned base and whiskers; much finer axes: small differences look large.",
            f"{title}, closer",
        )
        draw = partial(_draw_trajectory, study, tuned, False)
        plots.append(make_plot("trajectory_closer", title, caption, f"The tuned steps alone. {front}", draw))
    return plots


def _draw_trajectory(study: Study, points: Sequence[Point], has_whiskers: bool, ax: Any) -> None:
    for k, arm in enumerate(study.arms):
        own = [point for point in points if point.arm == arm]
        if not own:
            continue
        xs, ys = [[p.values[key].mean for p in own] for key in (X, Y)]
        if has_whiskers:
            reach = [whiskers([p.values[key] for p in own]) for key in (Y, X)]
            ax.errorbar(xs, ys, *reach, fmt="none", ecolor=look(k)["color"], elinewidth=0.8, alpha=0.4)
        ax.plot(xs, ys, label=arm, **look(k))
        for p, x, y in zip(own, xs, ys, strict=True):
            if p is own[0] or p is own[-1] or (not has_whiskers and (p.on_front or len(points) <= ALL_NUMBERED_UP_TO)):
                ax.annotate(str(p.step), (x, y), (5, 5) if k % 2 else (5, -12), textcoords="offset points", fontsize=8, color=look(k)["color"])
    front = sorted((p.values[X].mean, p.values[Y].mean) for p in points if p.on_front)
    ax.plot(*zip(*front, strict=True), color=INK, lw=0.8, ls=":", marker="o", ms=11, mfc="none", label="Pareto front") if front else None
    ax.set(xlabel="prompt alignment (right is better)", ylabel="identity fidelity (up is better)")
    ax.margins(0.1)
    ax.locator_params(axis="x", nbins=5)  # narrow ranges have long numbers


def bars(study: Study, comparisons: dict[str, Comparison], key: str, name: str) -> Plot | None:
    """Returns bars of one score of every arm with its interval, and a line for the un-tuned base; None where it was not measured."""
    if key not in comparisons:
        return None
    rows, info = comparisons[key].rows, TITLES[key]
    marks = base_marks(study, info)

    fits = len(rows) * max(len(word) for row in rows for word in re.split(r"(?<=[ =,])", row.arm)) <= UNDER_BARS

    def draw(ax: Any) -> None:
        for k, row in enumerate(rows):
            error = whiskers([row.mean])
            ax.bar(
                k,
                row.mean.mean,
                0.6,
                label=None if fits else row.arm,
                color=COLORS[k % len(COLORS)],
                yerr=error,
                ecolor=INK,
                capsize=4,
                hatch=("", "//", "..", "xx")[k % 4],
                ec=INK,
                lw=0.6,
            )
        if len(marks) == 1:
            ax.axhline(marks[BASE], color=INK, ls="--", lw=1, label=BASE)
        for k, arm in enumerate(row.arm for row in rows if row.arm in marks):
            ax.hlines(marks[arm], k - 0.4, k + 0.4, color=INK, ls="--", lw=1, label=None if k else f"{BASE}, drawn the same way")
        ax.axhline(0, color=INK, lw=0.6)
        ax.set_xticks(*((range(len(rows)), [_wrapped(row.arm.replace("=", "= ")).replace("= ", "=") for row in rows]) if fits else ([],)))
        ax.set_ylabel(f"{info.title.lower()} ({info.direction} is better)")

    values = "; ".join(f"{row.arm} {_said(row.mean)}" for row in rows)
    base = f"{BASE} {marks[BASE]:.2f}" if len(marks) == 1 else f"{BASE}, drawn the same way: {'; '.join(f'{a} {m:.2f}' for a, m in marks.items())}"
    where = "At the chosen step, on prompts that chose nothing" if study.has_arms else "On prompts that chose nothing"
    return make_plot(name, f"{info.title} ({name.upper()})", f"{info.sentence} {where}.", f"{info.title}: {values}; {base}.", draw)


def base_marks(study: Study, info: MetricInfo) -> dict[str, float]:
    """Returns the un-tuned base's mean of a score: the only one, by the word for it, or that of each arm where bases were drawn in several ways."""
    base, same = study.base, study.base.label.nunique() == 1
    if not same:
        base = study.images[study.images.arm == "base"]
    groups = base[base.kind == info.kind].groupby("label", sort=False)
    return {label: hierarchical_interval(own[info.column], own.subject, own.seed.fillna(-1)).mean for label, own in groups}


def paired_dots(study: Study, key: str) -> Plot | None:
    """Returns each subject's difference to the baseline, sorted, a row of dots an arm; None for one subject or where it was not measured."""
    rows, baseline = study.compared()
    found = subject_differences(rows, TITLES[key], baseline)
    if found is None or found.subject.nunique() < 2:
        return None
    label = _wrapped(f"{TITLES[key].title.lower()}, minus {baseline}", 50)
    looks = {arm: look(study.arms.index(arm) if arm in study.arms else k) for k, arm in enumerate(dict.fromkeys(found.label), 1)}
    draw, height = partial(draw_dots, found, looks, label), min(TALLEST, ROW * found.subject.nunique() * len(looks))
    values = "; ".join(f"{row.subject}, {row.label} {row.difference:+.2f}" for row in found.itertuples())
    caption = (
        f"One dot a subject and arm, paired by prompt and noise, sorted; further {'right' if TITLES[key].direction == 'up' else 'left'} is better."
    )
    return make_plot(f"subjects_{key}", f"{TITLES[key].title} by subject", caption, f"Difference to {baseline}: {values}.", draw, height)


def draw_dots(found: pd.DataFrame, looks: Mapping[str, dict[str, Any]], label: str, ax: Any) -> None:
    """Draws a band for each subject, in which each arm has its own height, so that no dot lies in another subject's band.

    Args:
        found: of `subject_differences`.
        looks: of each arm, from the lowest dot of a band to the highest.
        label: of the axis of differences.
        ax: matplotlib axes.
    """
    order = list(found.groupby("subject").difference.mean().sort_values().index)
    apart = min(0.15, 0.8 / len(looks))
    for k, (arm, how) in enumerate(looks.items()):
        own = found[found.label == arm].set_index("subject").difference
        ys = [order.index(subject) + (k - (len(looks) - 1) / 2) * apart for subject in own.index]
        ax.plot(own.to_numpy(), ys, label=arm, **(how | {"ls": ""}))
    for between in range(len(order) - 1):
        ax.axhline(between + 0.5, color=INK, lw=0.4, alpha=0.3)
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.5, len(order) - 0.5)
    ax.set_xlabel(label)
    ax.locator_params(axis="x", nbins=5)  # small differences have long numbers


def subject_differences(rows: pd.DataFrame, info: MetricInfo, baseline: str) -> pd.DataFrame | None:
    """Returns label, subject and difference: of images of the same subject, training seed, prompt and noise, arm minus baseline."""
    rows = rows[rows.kind == info.kind]
    if info.column not in rows.columns:
        return None
    rows = rows[["label", "subject", "seed", "template", "k", info.column]].dropna(subset=info.column)
    own, other = rows[rows.label != baseline], rows[rows.label == baseline].drop(columns="label")
    keys = ["subject", "template", "k"] + (["seed"] if other.seed.notna().all() else [])
    pairs = own.merge(other.drop(columns=[] if "seed" in keys else "seed"), on=keys, suffixes=("", "_baseline"))
    if pairs.empty:
        return None
    pairs = pairs.assign(difference=pairs[info.column] - pairs[f"{info.column}_baseline"])
    runs = pairs.groupby(["label", "subject", "seed"], sort=False).difference.mean()
    return runs.groupby(["label", "subject"], sort=False).mean().reset_index()


def heat_maps(study: Study, points: Sequence[Point]) -> list[Plot]:
    """Returns learning rate x step maps of identity fidelity and prompt alignment, one for each of the other settings; [] without such an axis."""
    settings = {arm: axes(arm) for arm in study.arms}
    rest = {arm: ", ".join(f"{key}={value}" for key, value in found.items() if key != RATE) for arm, found in settings.items() if RATE in found}
    return [
        plot
        for n, other in enumerate(dict.fromkeys(rest.values()))
        for key in ANSWERING[:2]
        if (plot := _heat_map({arm: settings[arm][RATE] for arm in rest if rest[arm] == other}, other, points, key, n)) is not None
    ]


def _heat_map(rates: dict[str, str], other: str, points: Sequence[Point], key: str, number: int) -> Plot | None:
    cells = {(float(rates[p.arm]), p.step): p.values[key].mean for p in points if p.arm in rates and p.step and key in p.values}
    if len(rates) < 2 or not cells:
        return None
    frame = pd.Series(cells).unstack().sort_index(ascending=False)  # (rates, steps)

    named = frame.set_axis([f"{rate:g}" for rate in frame.index])
    title = f"{TITLES[key].title}: learning rate x steps" + (f", {other}" if other else "")
    alt = "; ".join(f"learning rate {rate:g}, step {step}: {value:.2f}" for (rate, step), value in sorted(cells.items()))
    caption, draw = "On the selection prompts; one run of a rate gives all its steps.", partial(draw_map, named, "step", "learning rate", 2)
    return make_plot(f"heat_map_{key}_{number}", title, caption, f"{alt}.", draw)


def draw_map(frame: pd.DataFrame, xlabel: str, ylabel: str, digits: int, ax: Any) -> None:
    """Draws numbers (rows, columns), named by the frame's index and columns, as coloured cells; an empty cell where there is none."""
    picture = ax.pcolormesh(frame.to_numpy(), cmap="cividis", edgecolors="face")  # vector, and even in grey and to the colour-blind
    low, high = picture.get_clim()
    for y, x in ((y, x) for y in range(frame.shape[0]) for x in range(frame.shape[1])):
        value = frame.iloc[y, x]
        color = "#ffffff" if value <= (low + high) / 2 else "#000000"
        ax.text(x + 0.5, y + 0.5, f"{value:.{digits}f}", ha="center", va="center", color=color) if value == value else None
    ax.set_xticks([x + 0.5 for x in range(frame.shape[1])], [str(name) for name in frame.columns])
    ax.set_yticks([y + 0.5 for y in range(frame.shape[0])], [str(name) for name in frame.index])
    ax.set(xlabel=xlabel, ylabel=ylabel)


def make_plot(name: str, title: str, caption: str, alt: str, draw: Callable[[Any], None], height: float = 0) -> Plot:
    """Returns a drawing in both forms; `draw` takes the axes, and `height`, in inches, is the least that they need."""
    import matplotlib
    from matplotlib.figure import Figure

    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, 3.7), layout="constrained")  # narrow, so that its letters can be read on a phone
        ax = figure.subplots()
        draw(ax)
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            texts = [_wrapped(label, 60) for label in labels]
            names = 0.18 * sum(1 + text.count("\n") for text in texts)
            figure.set_figheight(max(3.7, max(2.9, height + 0.6) + names))  # room for the names of many arms
            figure.legend(handles, texts, loc="outside lower center", fontsize=9)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return Plot(name, title, caption, alt, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """Returns an SVG as it can stand in a page among others: colours as the page's variables, its own ids, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"(font:[^;\"']*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--arm-{number})")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1).strip()


def look(k: int) -> dict[str, Any]:
    """Returns how arm number k is drawn, as keywords of `Axes.plot`: colour and marker together are no other's of the first 49."""
    turn, color = divmod(k, len(COLORS))  # each turn through the colours begins with another marker
    return {"color": COLORS[color], "marker": MARKERS[(k + turn) % len(MARKERS)], "ls": LINES[k % len(LINES)], "ms": 5, "lw": 1.4}


def whiskers(intervals: Sequence[Interval]) -> list[list[float]] | None:
    """Returns how far the intervals reach below and above their means, (2, n); None where there are none."""
    if any(interval.low is None for interval in intervals):
        return None
    low = [max(0.0, i.mean - i.low) for i in intervals]
    return [low, [max(0.0, i.high - i.mean) for i in intervals]]


def _said(interval: Interval) -> str:
    return f"{interval.mean:.2f}" + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval.low is not None else "")


def _wrapped(text: str, width: int = 18) -> str:
    return "\n".join(textwrap.wrap(text, width))
