"""The lab's judges and its packaged weights: they tell subjects apart, they find the right prompt, and any diffusers can load the base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.lab.paths import BASE_FOLDER, SCORERS_FOLDER, WEIGHTS_FOLDER
from dreambooth.lab.scorers import LabScorers
from dreambooth.lab.world import CLASSES, CONTEXTS, WORLD_VERSION, caption, ground_truth, identity, render, subject_photos

MARK = json.loads((BASE_FOLDER / "lab.json").read_text())
SCORED, KNOWN_CONTEXTS = MARK["scorer_classes"], MARK["contexts"]
SUBJECTS = [identity(noun, 60_000 + index) for noun in SCORED for index in range(8)]
VIEWS = 3


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def scorers() -> LabScorers:
    return LabScorers.load()


@pytest.fixture(scope="module")
def contexts() -> list[str]:
    return [KNOWN_CONTEXTS[(5 * index + 4 * view) % len(KNOWN_CONTEXTS)] for index in range(len(SUBJECTS)) for view in range(VIEWS)]


@pytest.fixture(scope="module")
def held_out(contexts: list[str]) -> Tensor:
    subjects = [subject for subject in SUBJECTS for _ in range(VIEWS)]
    return to_float(render(subjects, contexts, [300 + index for index in range(len(subjects))]))


def test_identity_features_have_length_one(scorers: LabScorers, held_out: Tensor) -> None:
    features = scorers.identity(held_out[:4])
    assert features.shape == (4, 128) and torch.allclose(features.norm(dim=1), torch.ones(4))


def test_image_features_have_length_one(scorers: LabScorers, held_out: Tensor) -> None:
    features = scorers.image(held_out[:4])
    assert features.shape == (4, 128) and torch.allclose(features.norm(dim=1), torch.ones(4))


def test_text_features_have_length_one(scorers: LabScorers) -> None:
    features = scorers.text(["a photo of a robot", "a photo of a red car at night"])
    assert features.shape == (2, 128) and torch.allclose(features.norm(dim=1), torch.ones(2))


def test_identity_tells_the_same_subject_from_others_of_its_class(scorers: LabScorers, held_out: Tensor) -> None:
    features = scorers.identity(held_out)
    subject = torch.arange(len(SUBJECTS)).repeat_interleave(VIEWS)
    noun = subject // 8
    similarity = features @ features.T
    is_same = (subject[:, None] == subject) & ~torch.eye(len(subject), dtype=torch.bool)
    is_rival = (noun[:, None] == noun) & (subject[:, None] != subject)
    auc = (similarity[is_same][:, None] > similarity[is_rival]).float().mean()
    assert auc > 0.97  # 0.991 on 168 subjects


def test_identity_of_the_built_in_subject_holds_in_new_places(scorers: LabScorers) -> None:
    photos = scorers.identity(to_float(subject_photos("robot", 913)[0]))
    new = ["in the snow", "in the jungle", "in the desert", "on the moon"]
    truth = scorers.identity(to_float(ground_truth("robot", 913, new * 2, range(8))))
    others = scorers.identity(to_float(render([identity("robot", seed) for seed in range(8)], ["on the moon"] * 8, range(8))))
    assert (truth @ photos.T).mean() > 0.8
    assert (others @ photos.T).mean() < 0.3


def test_text_finds_the_right_class_and_context(scorers: LabScorers, held_out: Tensor, contexts: list[str]) -> None:
    prompts = scorers.text([caption(identity(noun, 0), context) for noun in SCORED for context in KNOWN_CONTEXTS])
    best = (scorers.image(held_out) @ prompts.T).argmax(1)
    nouns = torch.arange(len(SCORED)).repeat_interleave(8 * VIEWS)
    places = torch.tensor([KNOWN_CONTEXTS.index(context) for context in contexts])
    assert (best // len(KNOWN_CONTEXTS) == nouns).float().mean() > 0.9
    assert (best % len(KNOWN_CONTEXTS) == places).float().mean() > 0.97


def test_text_tells_a_hat_from_none(scorers: LabScorers) -> None:
    wearers = [identity(noun, 70_000 + index, accessory=None if index % 2 else "hat") for noun in SCORED for index in range(4)]
    images = scorers.image(to_float(render(wearers, ["on the grass"] * len(wearers), range(len(wearers)))))
    bare, hatted = (scorers.text([f"a photo of a {wearer.class_noun}{hat} on the grass" for wearer in wearers]) for hat in ("", " wearing a hat"))
    says_hat = (images * hatted).sum(1) > (images * bare).sum(1)
    assert (says_hat == torch.tensor([wearer.accessory == "hat" for wearer in wearers])).float().mean() > 0.8


def test_text_refuses_a_prompt_longer_than_it_reads(scorers: LabScorers) -> None:
    with pytest.raises(UserError, match="must have at most 24 tokens for the lab's text encoder, got 2.; use fewer words"):
        scorers.text(["a photo of a robot", "a photo of a red robot" + " in the snow" * 6])


def test_scorers_see_the_mean_of_what_falls_into_one_of_their_pixels(scorers: LabScorers, held_out: Tensor) -> None:
    larger = held_out[:3].repeat_interleave(2, 2).repeat_interleave(2, 3)  # four equal pixels for one
    assert torch.allclose(scorers.identity(held_out[:3]), scorers.identity(larger), atol=1e-5)
    speckled = larger + 0.2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(64, 64)  # each four have the mean that they had
    assert torch.allclose(scorers.identity(held_out[:3]), scorers.identity(speckled), atol=1e-4)


@pytest.mark.parametrize("resolution", [96, 100, 128])
def test_scorers_accept_any_resolution(scorers: LabScorers, resolution: int) -> None:
    subject = SUBJECTS[0]
    usual, other = render([subject], [CONTEXTS[0]], [1]), render([subject], [CONTEXTS[0]], [1], resolution=resolution)
    assert (scorers.identity(to_float(usual)) * scorers.identity(to_float(other))).sum() > 0.95


def test_scorers_refuse_bytes(scorers: LabScorers) -> None:
    with pytest.raises(ValueError, match=r"must be float \(N, 3, H, W\) in \[-1, 1\], got torch.uint8"):
        scorers.identity(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_scorers_of_no_images_are_no_features(scorers: LabScorers) -> None:
    assert scorers.image(torch.zeros(0, 3, 64, 64)).shape == (0, 128)


def test_scorers_stay_frozen_inside_a_module_that_trains(scorers: LabScorers) -> None:
    torch.nn.ModuleList([scorers]).train()
    assert not any(module.training for module in scorers.modules())
    assert not any(parameter.requires_grad for parameter in scorers.parameters())


def test_scorers_do_not_round_under_autocast(scorers: LabScorers, held_out: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        features = scorers.identity(held_out[:2])
    assert torch.equal(features, scorers.identity(held_out[:2]))


def test_scorers_name_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json must be there"):
        LabScorers.load(tmp_path)
    shutil.copytree(SCORERS_FOLDER, tmp_path / "scorers", ignore=shutil.ignore_patterns("identity.safetensors"))
    with pytest.raises(UserError, match="identity.safetensors must be there"):
        LabScorers.load(tmp_path / "scorers")


def test_packaged_weights_are_safetensors_and_text_only() -> None:
    suffixes = {file.suffix for file in WEIGHTS_FOLDER.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ".md", ".txt"}  # .txt: the merges of a tokenizer


def test_lab_mark_agrees_with_the_world() -> None:
    assert MARK["world"] == WORLD_VERSION
    assert set(KNOWN_CONTEXTS) <= set(CONTEXTS)
    assert set(MARK["classes"]) <= set(SCORED) <= set(CLASSES)
    assert (BASE_FOLDER / MARK["scorers"]).resolve() == SCORERS_FOLDER.resolve()


def test_base_loads_offline_as_a_stock_pipeline_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain call once gave a float16 text encoder beside a float32 UNet, and the first step crashed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a sks robot in the snow", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("word", ["sks", "zwx", "ohwx", "vtk", "qrn"])
def test_base_tokenizer_reads_a_rare_word_as_one_token(scorers: LabScorers, word: str) -> None:
    assert len(scorers.tokenizer(word, add_special_tokens=False).input_ids) == 1
