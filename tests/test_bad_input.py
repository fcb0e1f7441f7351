"""Bad input gets one clear sentence (config path or file, rule, value, next step), before any model loads."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import make_photos, run, typed

from dreambooth import cli
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import UserError

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model a failure of the test."""

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(StableDiffusion, "load", load)


def _sentence(*words: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the sentence is what is looked at
        run(*words)
    sentence = cli.explain(caught.value)
    assert sentence is not None and "\n" not in sentence, sentence
    return sentence


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["data.subject_dir=nowhere", "subject.class_noun=dog"], ["data.subject_dir", "nowhere"]),
        (["data.subject_dir={empty}", "subject.class_noun=dog"], ["data.subject_dir"]),
        (["data.subject_dir={stray}", "subject.class_noun=dog"], ["data.subject_dir"]),
        (["data.subject_dir={photos}"], ["subject.class_noun", "subject.class_noun=dog"]),
        (["data.subject_dir={broken}", "subject.class_noun=dog", "data.on_bad_photo=refuse"], ["broken", "data.on_bad_photo=skip"]),
        (["data.subject_dir={photos}", "subject.class_noun=dog", "prior.class_dir={empty}"], ["prior.class_dir"]),
        (["base.path=nowhere"], ["base.path", "nowhere"]),
        (["base.path={empty}"], ["base.path"]),
        (["base.path={tiny}"], ["data.subject_dir"]),
        (["base.path={headless}", "data.subject_dir={photos}", "subject.class_noun=dog"], ["base.path", "vae"]),
        (["subject.class_noun=unicorn"], ["unicorn", "robot"]),
        (["subject.prompt=a photo"], ["subject.prompt", "{subject}"]),
        (["prior.weight=-1"], ["prior.weight", "-1"]),
        (["data.resolution=100"], ["data.resolution", "100"]),
        (["trainer.max_steps=0"], ["trainer.max_steps"]),
        (["trainer.devices=0"], ["trainer.devices"]),
        pytest.param(["trainer.accelerator=gpu"], ["trainer.accelerator", "auto"], marks=NEEDS_NO_GPU),
        (["sampling.steps=-2"], ["sampling.steps"]),
        (["wandb.mode=somewhere"], ["wandb.mode", "offline"]),
        (["optim.learning_rate=fast"], ["optim.learning_rate", "'fast'", "a number"]),
        (["optim.lr=1e-4"], ["optim.lr", "did you mean optim.learning_rate?"]),
        (["method=lroa"], ["method", "full"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps", "a whole number"]),
    ],
)
def test_bad_input_is_one_sentence_before_any_model_loads(no_model: None, tiny_folder, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    photos, stray, broken = make_photos(tmp_path / "photos"), tmp_path / "stray", make_photos(tmp_path / "broken")
    stray.mkdir()
    (stray / ".DS_Store").write_bytes(b"x")
    (stray / "notes.txt").write_text("no photo")
    (broken / "IMG_2.jpg").write_bytes((broken / "IMG_2.jpg").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    headless = shutil.copytree(tiny_folder(), tmp_path / "headless")
    shutil.rmtree(headless / "vae")
    places = {"photos": photos, "stray": stray, "broken": broken, "empty": tmp_path / "empty", "tiny": tiny_folder(), "headless": headless}
    for name, place in places.items():
        words = [word.replace("{" + name + "}", str(place)) for word in words]
    sentence = _sentence(*words, f"output_dir={tmp_path / 'runs'}")
    assert [part for part in parts if part not in sentence] == [], sentence
    assert not (tmp_path / "runs").exists()


def test_unreadable_photo_among_good_ones_is_named_and_skipped(tiny_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_photos(tmp_path / "photos", 5)
    (photos / "IMG_3.jpg").write_bytes((photos / "IMG_3.jpg").read_bytes()[:200])
    (photos / ".ipynb_checkpoints").mkdir()
    shutil.copy(photos / "IMG_1.jpg", photos / ".ipynb_checkpoints" / "IMG_1-checkpoint.jpg")
    words = [f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog", "prior=none", "trainer.max_steps=1"]
    done = run(*words, f"output_dir={tmp_path / 'runs'}")
    assert done.status == "done" and len(list((done.path / "photos").glob("*.png"))) == 4
    assert "IMG_3.jpg" in capsys.readouterr().out


def test_too_long_prompt_is_refused_before_training(tiny_folder, tmp_path: Path) -> None:
    long = "a photo of a {subject} " + "in the snow " * 40
    with pytest.raises(UserError, match="must be at most 77 tokens"):
        run(f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'p')}", "subject.class_noun=dog",
            f"evaluation.final_prompts=['{long}']", f"output_dir={tmp_path / 'runs'}")  # fmt: skip
    assert not list((tmp_path / "runs").glob("**/metrics.csv")) and not list((tmp_path / "runs").glob("class_banks/*"))


def test_odd_images_are_trained_on(tiny_folder, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    source = Image.open(photos / "IMG_1.jpg")
    source.transpose(Image.FLIP_LEFT_RIGHT).convert("L").save(photos / "grey.png")
    source.rotate(90, expand=True).convert("CMYK").save(photos / "cmyk.jpg")
    source.transpose(Image.FLIP_TOP_BOTTOM).convert("P").save(photos / "palette.png")
    source.rotate(180).convert("RGBA").save(photos / "alpha.png")
    words = [f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog", "prior=none", "trainer.max_steps=1"]
    done = run(*words, f"output_dir={tmp_path / 'runs'}")
    assert done.status == "done" and len(list((done.path / "photos").glob("*.png"))) == 5


def test_error_on_the_terminal_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    result = typed("data.subject_dir=nowhere", "subject.class_noun=dog", f"output_dir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0 and result.stderr.startswith("error: data.subject_dir must")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data.flip=maybe", "data.flip must be true or false, got 'maybe'; write it like data.flip=true"),
        ("seed=null", "seed must have a value, got null; leave it out for the default"),
        ("prior.prompts=hello", 'prior.prompts must be a list; write it like \'prior.prompts=["first","second"]\''),
        ("subject.prompt=a, b", "subject.prompt must be quoted when it holds a comma"),
        ("subject.prompt=a {subject}", "text with braces, brackets, quotes or = must be quoted twice"),
        ("+trainer.foo=1", "trainer.foo must be a setting that exists"),
        ("+foo=1", "foo must be a setting that exists"),
    ],
)
def test_words_that_hydra_cannot_take_are_answered_in_ours(word: str, sentence: str) -> None:
    assert typed(word).stderr.startswith(f"error: {sentence}")


def test_lab_class_that_the_base_never_saw_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("subject.class_noun=penguin", "prior=none", "trainer.max_steps=1", f"output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert "the lab's base was not trained on this class" in printed and "do not report its scores" in printed
