"""Drawings of what other ways of drawing from the same models bring: fidelity against alignment over the guidance scale, and maps of the scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from dreambooth.arms import axes
from dreambooth.report.data import Study
from dreambooth.report.figures import INK, TITLES, Plot, X, Y, draw_map, look, make_plot, whiskers
from dreambooth.report.tables import ANSWERING
from dreambooth.statistics.comparison import ArmRow, Comparison
from dreambooth.statistics.intervals import Interval

SCALE = "sampling.guidance_scale"


class Place(NamedTuple):
    """Where an arm lies beside the baseline, which is at 0, 0."""

    arm: str
    rest: str  # its settings but the guidance scale
    scale: str  # the guidance scale; "" where that is the same for all
    x: Interval  # difference of prompt alignment
    y: Interval  # difference of identity fidelity


def trade_off(study: Study, comparisons: dict[str, Comparison]) -> Plot | None:
    """Returns each arm's paired differences to the baseline in prompt alignment and identity fidelity; None where nothing was drawn again.

    Args:
        study: the runs.
        comparisons: at the chosen step.
    """
    if not study.is_drawn_again or not {X, Y} <= comparisons.keys():
        return None
    of = {key: {row.arm: _difference(row) for row in comparisons[key].rows} for key in (X, Y)}
    places = [Place(arm, *_parts(arm), of[X][arm], of[Y][arm]) for arm in study.arms if arm in of[X] and arm in of[Y]]
    front = [place for place in places if not any(_beats(other, place) for other in places)]
    said = "; ".join(f"{p.arm}: alignment {_said(p.x)}, fidelity {_said(p.y)}" for p in places if p.arm != study.baseline)
    numbers = " Numbers are guidance scales." if any(p.scale for p in places) else ""
    caption = (
        f"Minus {study.baseline}, which is at 0, 0; at the chosen step, on prompts that chose nothing.{numbers} Whiskers: 95% intervals of the "
        f"differences, paired by prompt and noise. Ringed: nothing else is better in both."
    )
    alt = f"Minus {study.baseline}: {said}. Pareto front: {', '.join(p.arm for p in front)}."
    return make_plot("trade_off", "Fidelity against alignment by way of drawing", caption, alt, partial(_draw_trade_off, places, front))


def way_maps(study: Study, comparisons: dict[str, Comparison]) -> list[Plot]:
    """Returns maps of the leading scores over the guidance scale and what else varies; [] without two values of each.

    Args:
        study: the runs.
        comparisons: at the chosen step.
    """
    parts = {arm: _parts(arm) for arm in study.arms} if study.is_drawn_again else {}
    rests, scales = list(dict.fromkeys(rest for rest, _ in parts.values())), sorted({scale for _, scale in parts.values() if scale}, key=float)
    if len(rests) < 2 or len(scales) < 2:
        return []
    keys = {key for rest in rests for key in axes(rest)}
    name = keys.pop() if len(keys) == 1 else ""
    words = {rest: axes(rest)[name] if name else rest.replace(", ", ",\n") for rest in sorted(rests, reverse=True)}  # the first on top
    plots = []
    for key in ANSWERING:
        cells = {parts[row.arm]: row.mean.mean for row in comparisons[key].rows if row.arm in parts} if key in comparisons else {}
        if cells:
            frame = pd.DataFrame([[cells.get((rest, scale), float("nan")) for scale in scales] for rest in words], list(words.values()), scales)
            better = "higher" if TITLES[key].direction == "up" else "lower"
            caption = f"Means at the chosen step, on prompts that chose nothing; {better} is better. The intervals are in the tables."
            alt = "; ".join(f"{rest}, guidance scale {scale}: {value:.3f}" for (rest, scale), value in cells.items())
            draw = partial(draw_map, frame, "guidance scale", name.removeprefix("sampling."), 3)
            plots.append(make_plot(f"way_map_{key}", f"{TITLES[key].title} by way of drawing", caption, f"{alt}.", draw))
    return plots


def _draw_trade_off(places: Sequence[Place], front: Sequence[Place], ax: Any) -> None:
    for k, rest in enumerate(dict.fromkeys(p.rest for p in places)):
        own = sorted((p for p in places if p.rest == rest), key=lambda p: float(p.scale or 0))
        reached = [p for p in own if p.x.low is not None and p.y.low is not None]
        if reached:
            reach = [whiskers([getattr(p, axis) for p in reached]) for axis in ("y", "x")]
            means = [[getattr(p, axis).mean for p in reached] for axis in ("x", "y")]
            ax.errorbar(*means, *reach, fmt="none", ecolor=look(k)["color"], elinewidth=0.8, alpha=0.5)
        ax.plot([p.x.mean for p in own], [p.y.mean for p in own], label=rest or SCALE, **look(k))
        for p in own:
            ax.annotate(p.scale, (p.x.mean, p.y.mean), (5, 5) if k % 2 else (5, -12), textcoords="offset points", fontsize=8, color=look(k)["color"])
    ax.plot([p.x.mean for p in front], [p.y.mean for p in front], color=INK, ls="", marker="o", ms=11, mfc="none", label="Pareto front")
    ax.axhline(0, color=INK, lw=0.4, alpha=0.4)
    ax.axvline(0, color=INK, lw=0.4, alpha=0.4)
    ax.set(xlabel="prompt alignment, gain (right is better)", ylabel="identity fidelity, gain (up is better)")
    ax.margins(0.1)
    ax.locator_params(axis="x", nbins=5)  # narrow ranges have long numbers


def _parts(arm: str) -> tuple[str, str]:
    """Returns an arm's settings but the guidance scale, and that."""
    found = axes(arm)
    return ", ".join(f"{key}={value}" for key, value in found.items() if key != SCALE), found.get(SCALE, "")


def _beats(a: Place, b: Place) -> bool:
    """Tells whether a place is better than another in one of fidelity and alignment and not worse in the other."""
    (ax, ay), (bx, by) = ((place.x.mean, place.y.mean) for place in (a, b))
    return ax >= bx and ay >= by and (ax, ay) != (bx, by)


def _difference(row: ArmRow) -> Interval:
    return row.difference or Interval(0.0, None, None, row.mean.n, row.mean.unit)


def _said(d: Interval) -> str:
    return f"{d.mean:+.3f}" + (f" ({d.low:+.3f} to {d.high:+.3f})" if d.low is not None else "")
