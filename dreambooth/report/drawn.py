"""The scored pictures that run folders hold: each run's own, and those that `evaluate.py` drew again in other ways, which are arms of a study too."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.arms import as_typed
from dreambooth.config import Config, Evaluation, Sampling, to_plain
from dreambooth.errors import UserError
from dreambooth.final_scores import ARMS, subject_label
from dreambooth.runs import RunFolder

IN_PART = "drawn again in part"


class Drawn(NamedTuple):
    """One set of final pictures of a run, with its scores."""

    run: RunFolder
    config: Config  # the run's, with the sampling that these pictures were drawn by
    subject: str
    scores: dict[str, Any] | None  # what its scores.json holds; None: there is none
    suffix: str = ""  # of its files' names; "" is the run's own

    @property
    def is_scored(self) -> bool:
        """Tells whether the run is finished and has scores."""
        return self.run.status == "done" and self.scores is not None and not self.scores["missing"]


class LeftOut(NamedTuple):
    """One run, or one way of drawing, that is not in the tables, and why."""

    name: str
    arm: str
    subject: str
    seed: int | None  # None: of several runs
    status: str  # "failed", "running" (at work, or cut off), "done" (without scores) or IN_PART
    reason: str


def own_pictures(run: RunFolder) -> Drawn:
    """Returns a run's own final pictures, whether it has come so far or not."""
    config, path = run.config, run.path / "scores.json"
    return Drawn(run, config, _subject(run, config), json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)


def drawn_again(own: Sequence[Drawn]) -> tuple[list[Drawn], list[LeftOut]]:
    """Returns what `evaluate.py` drew again of each of some runs in other ways, and the ways in which it drew some of them only.

    It counts if it can be compared picture by picture: the run's own prompts, numbers of pictures, noise and evaluator, all three of
    un-tuned base, chosen and last step, and nothing else than `sampling` changed. What was drawn of some runs alone, out of curiosity or
    because it was cut off, would compare other subjects and seeds. Runs that were trained with several samplings have none.

    Args:
        own: of each run.
    """
    scored = [one for one in own if one.is_scored]
    if len({_way(one.config) for one in scored}) != 1:
        return [], []
    ways: dict[str, list[Drawn]] = {}
    for one in scored:
        for again in _others(one):
            ways.setdefault(_way(again.config), []).append(again)
    found, left_out = [], []
    for drawn in sorted(ways.values(), key=lambda drawn: _order(drawn[0].config.sampling)):
        if len(drawn) == len(scored):
            found += drawn
        else:
            reason = "a way of drawing counts when all runs were drawn in it; its evaluate.py command again draws what is missing"
            name = f"{len(drawn)} of {len(scored)} runs"
            left_out.append(LeftOut(name, _in_words(drawn[0].config, scored[0].config), "", None, IN_PART, reason))
    return found, left_out


def _others(own: Drawn) -> Iterator[Drawn]:
    """Yields what was drawn again of a run and can be held against its own pictures, each way once."""
    seen = {_way(own.config)}
    for path in sorted(own.run.path.glob("scores-*.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        if scores["missing"] or scores["evaluator"] != own.scores["evaluator"] or not {*ARMS} <= {row["arm"] for row in scores["rows"]}:
            continue
        sampling, evaluation = _settings(scores, path)
        config = dataclasses.replace(own.config, sampling=sampling)
        if evaluation == own.config.evaluation and _way(config) not in seen:
            seen.add(_way(config))
            yield own._replace(config=config, scores=scores, suffix=path.stem.removeprefix("scores"))


def _settings(scores: dict[str, Any], path: Path) -> tuple[Sampling, Evaluation]:
    try:
        return Sampling(**scores["sampling"]), Evaluation(**scores["evaluation"])
    except TypeError as error:
        raise UserError(str(path), f"must fit the config of this version: {error}", None, "use the version that wrote it, or remove it") from None


def _way(config: Config) -> str:
    return json.dumps(to_plain(config.sampling), sort_keys=True)


def _order(sampling: Sampling) -> tuple[float, str, int, float, int]:
    return sampling.guidance_scale, sampling.sampler, sampling.steps, sampling.guidance_rescale or 0.0, sampling.batch_size


def _in_words(config: Config, own: Config) -> str:
    """Returns in what a way of drawing differs from the runs' own: "sampling.steps=50"."""
    ours, theirs = to_plain(config.sampling), to_plain(own.sampling)
    return ", ".join(f"sampling.{key}={as_typed(value)}" for key, value in sorted(ours.items()) if value != theirs[key])


def _subject(run: RunFolder, config: Config) -> str:
    """Returns the subject's word; a run that failed before it had read its photos is named by its folder of photos."""
    try:
        return subject_label(run, config)
    except KeyError:
        return f"{config.subject.class_noun}-{Path(str(config.data.subject_dir)).name}"
