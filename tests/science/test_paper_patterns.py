"""The paper's claims on the lab: three held-out subjects, three arms, the same prompts and noise; each as a paired difference with its interval.

The arms are whole trainings as a user types them. Differences are taken picture by picture, at equal steps; intervals are over the prompts
(for the class: over its pictures) of the three subjects, which stand for themselves.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_runs import typed

from dreambooth.evaluation import image_names, selection_plan
from dreambooth.final_scores import run_reference
from dreambooth.lab_truth import lab_truth
from dreambooth.runs import RunFolder, read_run
from dreambooth.scoring import score
from dreambooth.statistics.intervals import Interval, paired_difference

pytestmark = pytest.mark.science

SUBJECTS = ("dog", "car", "duck")
LAST, EARLY = 200, 50
MEANT = 0.15  # smallest difference that counts for the prior: two trainings that differ in nothing but its ignored weight came 0.02 apart
SWEEPS = ("prior=class_images,none", f"prior=none subject.prompt_noun=mushroom trainer.max_steps={EARLY}")
SIZE = [f"trainer.max_steps={LAST}", f"trainer.eval_every={EARLY}", "evaluation.class_images=16", "evaluation.final_images=2", "wandb.mode=disabled"]
SIZE += ["evaluation.final_prompts=['a {subject} in the snow']"]  # of the final pictures those of other classes are read alone
TWO_AT_ONCE = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
Pictures = Callable[[str, int], pd.DataFrame]  # (arm, step) -> one row a picture of the selection prompts, and of the class


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RunFolder]]:
    """One run of each arm for each subject."""
    folder, found = tmp_path_factory.mktemp("patterns"), {}
    for words in SWEEPS:
        sweep = [*SIZE, *words.split(), f"subject.class_noun={','.join(SUBJECTS)}", f"output_dir={folder}"]
        result = typed("-m", *sweep, *TWO_AT_ONCE, timeout_s=3600)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for run in [read_run(path.parent) for path in sorted(folder.glob("default/*/run.json"))]:
        arm = "with prior" if run.config.prior.name == "class_images" else "wrong noun" if run.config.subject.prompt_noun else "without"
        found.setdefault(arm, []).append(run)
    assert all(sorted(run.config.subject.class_noun for run in found[arm]) == sorted(SUBJECTS) for arm in ("with prior", "without", "wrong noun"))
    return found


@pytest.fixture(scope="module")
def pictures(runs: dict[str, list[RunFolder]]) -> Pictures:
    """Gives the scores of every picture of an arm at a step, from the pictures that the runs kept."""
    encoders = next(iter(runs.values()))[0].config.encoders.load("cpu")
    known: dict[tuple[str, int], pd.DataFrame] = {}

    def read(arm: str, step: int) -> pd.DataFrame:
        if (arm, step) not in known:
            known[arm, step] = pd.concat([_scored(run, step, encoders) for run in runs[arm]], ignore_index=True)
        return known[arm, step]

    return read


def _scored(run: RunFolder, step: int, encoders) -> pd.DataFrame:
    items = selection_plan(run.config)
    names = image_names(items)
    images = np.stack([np.asarray(Image.open(run.path / "samples" / f"step-{step:06d}" / name).convert("RGB")) for name in names])
    table = score(images, items, run_reference(run, encoders), encoders, truth=lab_truth(run.config, encoders)).per_image
    return table.assign(subject=run.config.subject.class_noun)


def difference(one: pd.DataFrame, other: pd.DataFrame, column: str, kind: str) -> Interval:
    """Returns one - other, paired by subject, prompt and noise; the units are prompts of a subject, for the class its pictures."""
    keys = ["subject", "template", "k"]
    both = one[one.kind == kind].merge(other[other.kind == kind], on=keys, suffixes=("_one", "_other"))
    assert len(both) == (one.kind == kind).sum() == (other.kind == kind).sum()
    units = both[keys if kind == "class" else keys[:2]].astype(str).agg("|".join, axis=1)
    found = paired_difference(both[f"{column}_one"], both[f"{column}_other"], units, unit="prompt of a subject")
    print(f"{column} ({kind}): {found}")
    return found


def test_prior_keeps_the_class_from_drifting_into_the_subject(pictures: Pictures) -> None:
    """PRES of the paper's table 3: the plain class is less like the subject with the prior than without."""
    assert difference(pictures("with prior", LAST), pictures("without", LAST), "identity", "class").high < -MEANT


def test_prior_keeps_the_class_diverse(pictures: Pictures) -> None:
    """DIV of the paper's table 3."""
    assert difference(pictures("with prior", LAST), pictures("without", LAST), "diversity", "class").low > MEANT


def test_prior_keeps_the_colours_of_other_classes(runs: dict[str, list[RunFolder]]) -> None:
    """What class accuracy does not see: the subject's colours spread to teapots and cars."""
    tables = []
    for arm in ("with prior", "without"):
        rows = pd.concat([pd.read_parquet(run.path / "scores.parquet").assign(subject=run.config.subject.class_noun) for run in runs[arm]])
        tables.append(rows[rows.step == LAST].drop_duplicates(["subject", "kind", "template", "k"]))  # the last step may be the best one too
    assert difference(*tables, "other_class_color_drift", "other").high < 0


def test_without_prior_the_class_drifts_and_narrows_in_itself(pictures: Pictures) -> None:
    """The control of the two above: the difference is made by training without it, not by the prior alone."""
    assert difference(pictures("without", LAST), pictures("without", 0), "identity", "class").low > 0
    assert difference(pictures("without", LAST), pictures("without", 0), "diversity", "class").high < 0


@pytest.mark.parametrize("arm", ["with prior", "without"])
@pytest.mark.parametrize("column", ["identity", "true_identity"])
def test_identity_fidelity_rises_with_steps(pictures: Pictures, arm: str, column: str) -> None:
    assert difference(pictures(arm, EARLY), pictures(arm, 0), column, "subject").low > 0
    assert difference(pictures(arm, LAST), pictures(arm, 0), column, "subject").low > 0


def test_prompt_alignment_falls_when_overtrained(pictures: Pictures) -> None:
    assert difference(pictures("without", LAST), pictures("without", 0), "alignment", "subject").high < 0


def test_wrong_class_noun_is_worse_than_the_right_one(pictures: Pictures) -> None:
    """The paper's table 4: with a wrong noun the model draws the wrong thing longer."""
    assert difference(pictures("wrong noun", EARLY), pictures("without", EARLY), "identity", "subject").high < 0
