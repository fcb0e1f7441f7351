"""What is known of a subject before anything is drawn: worked out once for the runs of a sweep, and never another's or a damaged one."""

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import composed

from dreambooth import lab_truth, reference_rows
from dreambooth.config import Config
from dreambooth.encoders import LoadedEncoders
from dreambooth.evaluation import Item
from dreambooth.lab_truth import LabTruth
from dreambooth.recipes import resolve
from dreambooth.runs import RunFolder
from dreambooth.scoring import Reference, reference
from dreambooth.worked_out import code_digest, once, shared_folder

PLACE = "in the snow"
ITEMS = [
    Item("subject", f"a photo of a {{subject}} {PLACE}", f"a photo of a sks dog {PLACE}", f"a photo of a dog {PLACE}", (0, 0, 0, k)) for k in (0, 1)
]


class Counted:
    """Works out the next number each time."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.times, self.wait_s = 0, wait_s

    def __call__(self) -> dict[str, torch.Tensor]:
        self.times += 1
        time.sleep(self.wait_s)
        return {"number": torch.tensor([float(self.times)])}


def test_once_works_out_the_first_time_and_reads_the_second(tmp_path: Path) -> None:
    compute = Counted()
    assert [once(tmp_path, "n", {"a": 1}, compute)["number"].item() for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(("kind", "about"), [("n", {"a": 2}), ("m", {"a": 1})])
def test_once_keeps_what_depends_on_other_things_apart(tmp_path: Path, kind: str, about: dict) -> None:
    compute = Counted()
    once(tmp_path, "n", {"a": 1}, compute)
    assert once(tmp_path, kind, about, compute)["number"].item() == 2


def test_once_without_a_shared_folder_keeps_nothing() -> None:
    compute = Counted()
    assert [once(None, "n", {}, compute)["number"].item() for _ in range(2)] == [1, 2]


def test_once_works_out_again_what_is_damaged(tmp_path: Path) -> None:
    compute = Counted()
    once(tmp_path, "n", {}, compute)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")  # the last byte is of the number
    assert once(tmp_path, "n", {}, compute)["number"].item() == 2


def test_once_has_a_second_one_that_asks_meanwhile_wait_for_the_first(tmp_path: Path) -> None:
    compute, found = Counted(wait_s=0.5), []
    threads = [threading.Thread(target=lambda: found.append(once(tmp_path, "n", {}, compute)["number"].item())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (compute.times, found) == (1, [1, 1])


def test_code_digest_changes_with_any_source_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("one")
    before = code_digest(tmp_path, "**/*.py")
    (tmp_path / "inner" / "a.py").write_text("two")
    assert code_digest(tmp_path, "**/*.py") != before


def test_runs_share_in_their_output_folder_and_one_that_was_moved_away_does_not(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config({"group": "prior"})
    assert shared_folder(RunFolder(tmp_path / "runs" / "prior" / "a", {}), config) == tmp_path / "runs" / "oracle"
    assert shared_folder(RunFolder(tmp_path / "desk" / "a", {}), config) is None


@pytest.fixture(scope="module")
def encoders() -> LoadedEncoders:
    return resolve(composed("encoders=lab")).encoders.load()


@pytest.fixture
def photos(encoders: LoadedEncoders) -> Reference:
    return reference(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), encoders)


def test_reference_rows_are_the_same_in_a_run_that_reads_them(
    make_config: Callable[..., Config], encoders: LoadedEncoders, photos: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    alone = reference_rows.reference_rows(config, ITEMS, encoders, photos)
    reference_rows.reference_rows(config, ITEMS, encoders, photos, tmp_path)
    monkeypatch.setattr(reference_rows, "references", None)  # not to be called
    assert repr(reference_rows.reference_rows(config, ITEMS, encoders, photos, tmp_path)) == repr(alone)  # their order and NaN too


def test_reference_rows_of_other_photos_prompts_or_evaluators_are_others(
    make_config: Callable[..., Config], encoders: LoadedEncoders, photos: Reference, tmp_path: Path
) -> None:
    other = copy.copy(encoders)
    other.version = "another"
    asked = [
        (ITEMS, encoders, photos),
        (ITEMS, encoders, photos._replace(photos=photos.photos + 1)),
        (ITEMS, encoders, photos._replace(held_out=photos.photos)),
        (ITEMS[:1], encoders, photos),
        (ITEMS, other, photos),
    ]
    for items, own, subject in asked:
        reference_rows.reference_rows(make_config(), items, own, subject, tmp_path)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(asked)


def test_true_renders_are_made_by_the_first_run_and_judge_alike_in_the_second(
    encoders: LoadedEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_truth, "RIVALS", 1)
    monkeypatch.setattr(lab_truth, "POSES", 1)
    config, images = resolve(composed("encoders=lab")), np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    def judged(shared: Path | None) -> dict[str, list[float]]:
        lab_truth._gallery.cache_clear()  # as another process
        return {name: column.tolist() for name, column in LabTruth(config, encoders, shared)(images, ITEMS).items()}

    alone, first = judged(None), judged(tmp_path)
    monkeypatch.setattr(lab_truth, "Gallery", None)  # not to be made
    assert alone == first == judged(tmp_path)
    lab_truth._gallery.cache_clear()
