"""DINOv2 beside DINO: its score against plain transformers and a loop over all pairs, its marks, its name in the version, what is refused."""

import hashlib
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_encoders import build_tiny_dinov2, build_tiny_encoders

from dreambooth import clip_dino
from dreambooth.encoders import ClipDino, LoadedEncoders
from dreambooth.errors import ConfigError
from dreambooth.evaluation import Item
from dreambooth.report.tables import clipped
from dreambooth.scoring import Reference, Scores, reference, references, score
from dreambooth.statistics.intervals import Interval

KEY = "identity_fidelity_dinov2"
PROMPTS = {"a red {subject}": 3, "a {subject} at home": 2, "a {subject} in the snow": 1}  # images of each


class Folders(NamedTuple):
    clip: str
    dino: str
    dinov2: str


class Case(NamedTuple):
    """Pictures, what they were drawn for, and the subject's photos."""

    images: NDArray[np.uint8]  # (8, H, W, 3)
    items: list[Item]
    photos: NDArray[np.uint8]  # (3, H, W, 3): trained on
    others: NDArray[np.uint8]  # (2, H, W, 3): not trained on


def picture(seed: int) -> NDArray[np.uint8]:
    """Returns a smooth random picture, wider than it is high, so that the crop counts."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("encoders")
    build_tiny_encoders(root)
    return Folders(str(root / "clip"), str(root / "dino"), str(build_tiny_dinov2(root / "dinov2")))


@pytest.fixture(scope="module")
def without(folders: Folders) -> LoadedEncoders:
    return ClipDino(clip_path=folders.clip, dino_path=folders.dino).load()


@pytest.fixture(scope="module")
def loaded(folders: Folders) -> LoadedEncoders:
    return ClipDino(clip_path=folders.clip, dino_path=folders.dino, dinov2_path=folders.dinov2).load()


@pytest.fixture(scope="module")
def case() -> Case:
    own = [("subject", template, k) for template, count in PROMPTS.items() for k in range(count)]
    what = [own[0], ("class", "a {subject}", 0), *own[1:], ("class", "a {subject}", 1)]
    items = [Item(kind, template, template.format(subject="sks dog"), template.format(subject="dog"), (0, 0, 1, k)) for kind, template, k in what]
    seeds = iter(range(100))
    return Case(*(np.stack([picture(next(seeds)) for _ in items]), items), *(np.stack([picture(next(seeds)) for _ in range(n)]) for n in (3, 2)))


@pytest.fixture(scope="module")
def known(case: Case, loaded: LoadedEncoders) -> Reference:
    return reference(case.photos, loaded, others=case.others)


@pytest.fixture(scope="module")
def scores(case: Case, known: Reference, loaded: LoadedEncoders) -> Scores:
    return score(case.images, case.items, known, loaded)


@pytest.fixture(scope="module")
def features(folders: Folders, case: Case) -> dict[bytes, NDArray[np.float64]]:
    """The class token of every picture, by its bytes: one plain forward pass each, short side 32, crop 28, ImageNet mean and spread."""
    from transformers import Dinov2Model

    model, found = Dinov2Model.from_pretrained(folders.dinov2).eval(), {}
    for image in (*case.images, *case.photos, *case.others):
        resized = np.asarray(Image.fromarray(image).resize((40, 32), Image.Resampling.BICUBIC))  # width x height of 60 x 48
        x = (resized[2:30, 6:34] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tokens = model(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]).last_hidden_state  # (1, 1 + 4, 24)
        found[image.tobytes()] = tokens[0, 0].double().numpy()
    return found


def mean_cosine(some: NDArray[np.uint8], others: NDArray[np.uint8], features: dict, self_pairs: bool = True) -> float:
    """Returns the mean over all pairs, by a loop."""
    total, count = 0.0, 0
    for i, a in enumerate(features[image.tobytes()] for image in some):
        for j, b in enumerate(features[image.tobytes()] for image in others):
            if self_pairs or i != j:
                total, count = total + a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5, count + 1
    return total / count


def test_dinov2_score_is_the_mean_cosine_over_all_pairs_of_its_class_tokens(case: Case, scores: Scores, features: dict) -> None:
    photos = np.concatenate([case.photos, case.others])
    by_prompt = [case.images[[item.kind == "subject" and item.template == template for item in case.items]] for template in PROMPTS]
    expected = mean(mean_cosine(images, photos, features) for images in by_prompt)
    assert scores.values[KEY] == pytest.approx(expected, abs=1e-5)


def test_dinov2_features_are_of_length_1_whatever_the_batch(case: Case, loaded: LoadedEncoders) -> None:
    features = loaded.identity_dinov2(case.images, batch_size=3)
    assert features.shape == (8, 24) and torch.allclose(features.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose(features, loaded.identity_dinov2(case.images), atol=1e-5)


def test_dinov2_score_of_these_pictures_is_no_score_of_dino(scores: Scores) -> None:
    assert abs(scores.values[KEY] - scores.values["identity_fidelity"]) > 0.05


def test_dinov2_column_is_each_images_mean_cosine_to_all_photos(case: Case, scores: Scores, features: dict) -> None:
    photos = np.concatenate([case.photos, case.others])
    for image, item, value in zip(case.images, case.items, scores.per_image.identity_dinov2, strict=True):
        expected = mean_cosine(image[None], photos, features) if item.kind == "subject" else np.nan
        assert value == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_dinov2_score_has_an_interval_over_prompts(scores: Scores) -> None:
    interval = scores.intervals[KEY]
    assert (interval.n, interval.unit) == (3, "prompt") and interval.low < scores.values[KEY] < interval.high


def test_dinov2_oracle_leaves_self_pairs_out_and_the_other_row_counts_them(
    case: Case, known: Reference, loaded: LoadedEncoders, features: dict
) -> None:
    photos, found = np.concatenate([case.photos, case.others]), references(known, ["a red dog"], loaded)
    apart, all_ = (mean_cosine(photos, photos, features, self_pairs) for self_pairs in (False, True))
    assert all_ - apart > 0.02  # (1 - oracle) / 5
    assert found["real_photos"][KEY] == pytest.approx(apart, abs=1e-5)
    assert found["real_photos_with_self_pairs"][KEY] == pytest.approx(all_, abs=1e-5)


def test_dinov2_copy_baseline_is_the_training_photos_against_all(case: Case, known: Reference, loaded: LoadedEncoders, features: dict) -> None:
    expected = mean_cosine(case.photos, np.concatenate([case.photos, case.others]), features)
    assert references(known, ["a red dog"], loaded)["copy_baseline"][KEY] == pytest.approx(expected, abs=1e-5)


def test_dinov2_changes_no_other_score(case: Case, scores: Scores, without: LoadedEncoders) -> None:
    plain = score(case.images, case.items, reference(case.photos, without, others=case.others), without)
    assert {key: value for key, value in scores.values.items() if key != KEY} == plain.values
    assert scores.per_image.drop(columns="identity_dinov2").equals(plain.per_image)


def test_dinov2_that_is_not_asked_for_leaves_no_trace_in_the_references(case: Case, without: LoadedEncoders) -> None:
    found = references(reference(case.photos, without, others=case.others), ["a red dog"], without)
    assert not any(KEY in row for row in found.values())


def test_version_names_dinov2_with_layer_preprocessing_and_hash(folders: Folders, loaded: LoadedEncoders, without: LoadedEncoders) -> None:
    digest = hashlib.sha256((Path(folders.dinov2) / "model.safetensors").read_bytes()).hexdigest()[:12]
    added = (
        "; identity by DINOv2 = dinov2 patch 14, class token after the final norm, 24-d, resize 32 bicubic, crop 28, ImageNet mean and std, "
        f"sha256 {digest}"
    )
    assert added in loaded.version and loaded.version.replace(added, "") == without.version
    assert without.dinov2 is None and "DINOv2" not in without.version


def test_interval_of_the_dinov2_score_ends_at_1() -> None:
    assert clipped(Interval(0.99, 0.95, 1.02, 5, "subject"), KEY).high == 1.0


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_dinov2_names_a_file_that_is_not_there(folders: Folders, tmp_path: Path, lost: str) -> None:
    (build_tiny_dinov2(tmp_path / "dinov2") / lost).unlink()
    sentence = ClipDino(clip_path=folders.clip, dino_path=folders.dino, dinov2_path=str(tmp_path / "dinov2")).missing()
    assert sentence is not None and sentence.startswith("encoders.dinov2_path must be a folder with ") and lost in sentence


def test_dinov2_that_is_not_there_is_said_before_anything_is_loaded(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_dino, "LoadedClipDino", lambda *_arguments: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="encoders.dinov2_path must be a model on this machine.*got '/nowhere/dinov2'; set it to a folder"):
        ClipDino(clip_path=folders.clip, dino_path=folders.dino, dinov2_path="/nowhere/dinov2").load()


def test_dinov2_refuses_the_first_dino(folders: Folders) -> None:
    with pytest.raises(ConfigError, match="encoders.dinov2_path must be a model of type dinov2, got 'vit in "):
        ClipDino(clip_path=folders.clip, dino_path=folders.dino, dinov2_path=folders.dino).load()


def test_dinov2_is_downloaded_where_it_is_not_here(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty Hugging Face cache, as a download would leave it."""
    root = tmp_path / "models--facebook--dinov2-small"

    def download(repo: str, allow_patterns: list[str]) -> None:
        assert repo == "facebook/dinov2-small"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        build_tiny_dinov2(root / "snapshots" / ("0" * 40))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    choice = ClipDino(clip_path=folders.clip, dino_path=folders.dino, dinov2_path="facebook/dinov2-small")
    assert "hf download facebook/dinov2-small" in (choice.missing() or "")
    assert choice.load().dinov2 is not None and choice.missing() is None
