"""What the lab alone can say in a report: how far the subject was learned of what can be had, whether the step was chosen well, and which
scores tell the truth. Identity rests on true renders of the subject (`lab_truth`), which no score and no choice has seen; the place is named by
the text-image encoder, whose cosines are also prompt alignment."""

import math

import pandas as pd

from dreambooth.metrics.table import METRICS
from dreambooth.report.data import Study
from dreambooth.report.tables import Table, clipped, short, signed
from dreambooth.statistics.correlation import correlation
from dreambooth.statistics.intervals import Interval, hierarchical_interval

ORACLE = "ground_truth"  # reference row: true renders of the subject in the prompted places
LEARNED, PLACE = "true_identity_margin", "true_context"  # what scores are held against
HARDLY = 0.95  # share of pictures with one and the same truth from which on a rank correlation with it says nothing
TITLES = {info.column: info.title for info in METRICS}


def truth_tables(study: Study) -> list[Table]:
    """Returns the tables of a study whose ground truth is known, [] for every other one."""
    if LEARNED not in study.images.columns or not study.images[LEARNED].notna().any():
        return []
    return [_way(study), _choice(study), _agreement(study)]


def way_closed(study: Study, arm: str, step: str = "best") -> Interval:
    """Returns the share of the way from the un-tuned base to true renders that identity fidelity went, over subjects and their seeds.

    Args:
        study: of the lab.
        arm: one of its arms.
        step: "best" or "final".
    """
    shares = []
    for run in study.of_arm(arm):
        rows = {row["arm"]: row["identity_fidelity"] for row in run.scores["rows"]}
        low, high = rows["base"], run.scores["references"].get(ORACLE, {}).get("identity_fidelity", math.nan)
        shares.append((run.subject, run.config.seed, (rows.get(step, rows["best"]) - low) / (high - low)))
    subjects, seeds, values = zip(*shares, strict=True)
    return hierarchical_interval(values, subjects, seeds)


def chosen_minus_last(study: Study, arm: str, column: str, kind: str = "subject") -> Interval:
    """Returns the score of the chosen step minus that of the last one, picture by picture, over subjects and their seeds.

    Args:
        study: of the lab.
        arm: one of its arms.
        column: of the table of images.
        kind: of the pictures: "subject" or "class".
    """
    rows = study.images[(study.images.label == arm) & (study.images.kind == kind)]
    keys = ["subject", "seed", "template", "k"]
    both = rows[rows.arm == "best"].merge(rows[rows.arm == "final"], on=keys, suffixes=("_best", "_final"))
    return hierarchical_interval(both[f"{column}_best"] - both[f"{column}_final"], both.subject, both.seed)


def agreement(images: pd.DataFrame, column: str, truth: str) -> Interval:
    """Returns the rank correlation of a score with the truth among the pictures of a subject, over subjects.

    Args:
        images: of the subject, of all arms and steps.
        column: of the score.
        truth: of the truth.
    """
    return correlation(images[column], images[truth], images.subject, within=True, unit="subject")


def alike(images: pd.DataFrame, truth: str) -> float:
    """Returns the share of pictures that have the commonest value of a truth: 1 if it does not vary at all; 0 where it was not measured.

    Args:
        images: of the subject.
        truth: of the truth.
    """
    shares = images[truth].value_counts(normalize=True)
    return float(shares.iloc[0]) if len(shares) else 0.0


def _agreement_words(images: pd.DataFrame, column: str, truth: str) -> str:
    share = alike(images, truth)
    return f"truth hardly varies ({share:.0%} alike)" if share >= HARDLY else short(agreement(images, column, truth))


def each_once(images: pd.DataFrame) -> pd.DataFrame:
    """Returns the images without those that stand in the table twice: a chosen step that is the last one, an un-tuned base that runs share."""
    tuned = images[images.step > 0].drop_duplicates(["run", "label", "step", "template", "k"])
    base = images[images.step == 0].drop_duplicates(["subject", "template", "k", "identity"])  # other ones where the drawing differs
    return pd.concat([base, tuned], ignore_index=True)


def _way(study: Study) -> Table:
    rows = []
    for arm in study.arms:
        best = study.images[(study.images.label == arm) & (study.images.arm == "best") & (study.images.kind == "subject")]
        truth = [clipped(hierarchical_interval(best[column], best.subject, best.seed), column) for column in ("true_identity", PLACE)]
        seconds = [sum(run.folder.record.get("seconds", {}).values()) for run in study.of_arm(arm) if not run.suffix]
        share = way_closed(study, arm)
        rows.append([arm, short(share), *map(short, truth), f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "drawn again"])
    note = (
        "At the chosen step, on prompts whose places are in no photo. The way: from the un-tuned base's identity fidelity (0) to that of true renders"
        " of the subject in these places (1). True identity: the share of other subjects of the class that a picture resembles less (0.5 by chance)."
    )
    return Table("How much was learned", note, ["", "way closed", TITLES["true_identity"], "right place", "minutes a run"], rows)


def _choice(study: Study) -> Table:
    columns = ("true_identity", LEARNED, PLACE)
    of_class = [info for info in METRICS if info.key in ("drift", "class_diversity")]
    rows = []
    for arm in study.arms:
        truths = [chosen_minus_last(study, arm, column) for column in columns]
        bought = [chosen_minus_last(study, arm, info.column, info.kind) for info in of_class]
        rows.append([arm, *map(signed, truths + bought), _steps(study, arm)])
    note = (
        "The chosen step minus the last one, picture by picture, on prompts that the choice did not see. Identity is judged by true renders,"
        " which it did not see either, the place by the text-image encoder; the last two it may give identity for (drift down, diversity up)."
    )
    titles = [*(TITLES[column] for column in columns), *(info.title for info in of_class)]
    return Table("Was the step chosen well?", note, ["", *titles, "chosen of"], rows)


def _steps(study: Study, arm: str) -> str:
    """Returns the chosen steps of an arm's runs with how often each was chosen, and the last step."""
    runs = study.of_arm(arm)
    chosen = pd.Series([run.folder.record["best_step"] for run in runs]).value_counts().sort_index()
    last = max(run.config.trainer.max_steps for run in runs)
    return ", ".join(f"{step} ({count}x)" for step, count in chosen.items()) + f" of {last}"


def _agreement(study: Study) -> Table:
    images = each_once(study.images[study.images.kind == "subject"])
    tuned = images[images.step > 0]
    measured = {column for column in images if images[column].notna().any()}
    known = [info for info in METRICS if info.kind == "subject" and info.column in measured and not info.column.startswith("true_")]
    rows = [[info.title, *(_agreement_words(own, info.column, truth) for own in (tuned, images) for truth in (LEARNED, PLACE))] for info in known]
    note = (
        "Spearman's rank correlation over the pictures of a subject, of both steps of all arms, each picture once; 1 is full agreement. A score of"
        " identity should follow the subject, one of alignment the place. With the un-tuned base's pictures in it a score also agrees that is only"
        f" able to tell trained from not trained. Where {HARDLY:.0%} of the pictures or more have the same truth, there is nothing to agree with."
    )
    return Table(
        "Which scores tell the truth?",
        note,
        ["", *(f"{truth}{which}" for which in ("", ", base's in it") for truth in (TITLES[LEARNED].lower(), "right place"))],
        rows,
    )
