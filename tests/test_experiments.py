"""Every shipped experiment: its first job runs on the lab or a tiny model in Stable Diffusion's place; its commands parse; its arms differ."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from small_runs import ROOT, first_value, make_dreambench, make_photos, run, typed, weights

import evaluate  # noqa: F401  # registers its config
from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.class_images import bank_digest, read_user_bank, wants_class_images
from dreambooth.config import NOT_SCIENCE, Config, EvaluateConfig, fingerprint, to_plain
from dreambooth.final_scores import read_photos
from dreambooth.generation import read_recipe
from dreambooth.lab.class_renders import main as write_class_renders
from dreambooth.metrics_csv import MetricsFile
from dreambooth.recipes import resolve
from dreambooth.report.data import read_study
from dreambooth.report.pictures import panels
from dreambooth.runs import RunFolder
from dreambooth.samplers import check_sampler
from dreambooth.subject_photos import read_subject_photos

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PRESETS = ("diffusers", "dreambench", "faces", "joepenna", "lora", "paper")  # on Stable Diffusion alone
ABLATIONS = [name for name in EXPERIMENTS if name not in PRESETS]
OF_A_STUDY = ("seed", "subject.class_noun")  # go over subjects and seeds, not over arms
BRIEF = (  # two places to judge in the end, and no other classes
    *("evaluation.other_prompts=[]", "evaluation.selection_prompts=['a {subject} in a city']"),
    "evaluation.final_prompts=['a photo of a {subject} in the snow','a photo of a {subject} on the moon']",
)
SHARED = ("base_images", "class_banks", "oracle")  # beside the groups of runs, each work named by all that decides it
WAYS = [("2.0", "dpmsolver++"), ("1.0", "ddim"), ("3.0", "ddim")]  # of a small run: its own, then drawn again
TRAINS_NOTHING = ("evaluation", "encoders", "trainer.eval_every", "trainer.fixed_loss_every", "prior.class_dir", "prior.top_up")


def commands(name: str, script: str) -> list[list[str]]:
    """Returns the words behind `python <script>` of each such command in an experiment's header."""
    header = "\n".join(line.lstrip("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    return [shlex.split(line) for line in re.findall(rf"python {re.escape(script)} (.+)", header.replace("\\\n", ""))]


def jobs(words: list[str], config: str = "train") -> list[Config]:
    """Returns the typed config of every arm that a command asks for, as Hydra's sweeper would: of one key the last word counts."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(config, [word for word in words if word.startswith("experiment=")], return_hydra_config=True)
        axes = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.params or {}).items()]
        found = {override.get_key_element(): override for override in OverridesParser.create().parse_overrides([*axes, *words])}
        values = [
            [f"{key}={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [override.input_line]
            for key, override in found.items()
        ]
        arms = [own[:1] if key in OF_A_STUDY else own for key, own in zip(found, values, strict=True)]
        return [OmegaConf.to_object(compose(config, list(arm))) for arm in itertools.product(*arms)]


def trained(config: Config) -> str:
    """Returns all that decides what a resolved config trains, as text: settings that do nothing in it are left out."""
    plain = to_plain(config)
    for part in ("text_encoder", "token"):
        if plain["method"].get(f"train_{part}") is False:
            plain["optim"].pop(f"{part}_learning_rate")
    if not wants_class_images(config):
        plain.pop("sampling")
    photos, own_bank = read_subject_photos(config), read_user_bank(config)
    for dotted in (*NOT_SCIENCE, *TRAINS_NOTHING, "data.photos", "data.captions"):
        *parents, last = dotted.split(".")
        node = plain[parents[0]] if parents else plain
        node.pop(last, None)
    shown = [image.tobytes().hex() for image in photos.images]
    return json.dumps([plain, shown, photos.captions, bank_digest(config, "base", own_bank)], sort_keys=True)


def named(config: Config) -> str:
    """Returns the fingerprint of a resolved config's run."""
    bank = bank_digest(config, "base", read_user_bank(config))
    return fingerprint(to_plain(config), base="base", photos=read_subject_photos(config).digest, class_images=bank)


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the headers' commands name: captioned photos, real class images, renders of the lab."""
    home = tmp_path_factory.mktemp("home")
    for k, photo in enumerate(sorted(make_photos(home / "photos", 3).iterdir())):
        photo.with_suffix(".txt").write_text(f"a photo of a {{subject}} in place {k}")
    for count in (200, 100):
        make_photos(home / "class_photos" / str(count), count, seed=7)
    assert write_class_renders([str(home / "class_images"), "--count", "64", "32", "--classes", "robot"]) == 0
    make_dreambench(home / "dreambench", {"backpack": "backpack"})
    return home


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what runs share and any of them makes: the base's pictures, class images, the marks of the scores."""
    folder = tmp_path_factory.mktemp("shared_work")
    for name in SHARED:
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_its_first_job(name: str, tiny_folder, shared_work: Path, tmp_path: Path) -> None:
    for folder in SHARED:
        (tmp_path / folder).symlink_to(shared_work / folder)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"experiment={name}"], return_hydra_config=True)
    arms = [first_value(f"{key}={values}") for key, values in (cfg.hydra.sweeper.params or {}).items()]
    words = [f"experiment={name}", *arms, "trainer.max_steps=2", "trainer.eval_every=2", f"output_dir={tmp_path}"]
    if cfg.prior.name == "none":
        words.append("prior=none")  # said here too, so that `composed` asks for no class images
    if cfg.data.steps_per_image is not None:
        words.append("data.steps_per_image=null")  # says the same as trainer.max_steps
    if OmegaConf.is_missing(cfg.data, "dreambench"):
        words += [f"base.path={tiny_folder()}", f"data.dreambench={make_dreambench(tmp_path / 'bench', {'backpack': 'backpack'})}"]
    elif OmegaConf.select(cfg, "base.path") != "lab":
        words += [f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'photos')}", "subject.class_noun=dog"]
    else:
        words += BRIEF
    done = run(*words)
    assert done.status == "done" and done.record["steps"] == 2
    assert done.path.parent.name == name
    assert len(read_photos(done)) >= 3


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("base", ["lab", "stable_diffusion"])
def test_ablation_trains_something_else_in_each_arm(name: str, base: str, tiny_folder, at_home: Path, monkeypatch) -> None:
    monkeypatch.chdir(at_home)
    on_lab, on_stable_diffusion = commands(name, "train.py")
    words = on_lab if base == "lab" else [*on_stable_diffusion, f"base.path={tiny_folder()}"]
    assert ("base=sd15" in words) == (base != "lab")
    arms = [resolve(config) for config in jobs(words)]
    assert {config.base.is_lab() for config in arms} == {base == "lab"}
    assert len({named(config) for config in arms}) == len(arms)
    assert len({trained(config) for config in arms}) == len(arms)
    assert len(arms) == 1 if name == "guidance" else len(arms) > 1


def test_arms_of_rates_of_parts_that_do_not_learn_are_told_to_be_one_training(tiny_folder, at_home: Path, monkeypatch) -> None:
    monkeypatch.chdir(at_home)
    words = [*commands("text_rates", "train.py")[1], f"base.path={tiny_folder()}", "method.train_text_encoder=false", "method.train_token=false"]
    arms = [resolve(config) for config in jobs(words)]
    assert len(arms) == 4 and len({trained(config) for config in arms}) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_preset_command_of_the_header_parses(name: str, tiny_folder, at_home: Path, monkeypatch) -> None:
    monkeypatch.chdir(at_home)
    [words] = commands(name, "train.py")
    subject = ["subject.name=backpack"] if name == "dreambench" else []  # of the thirty the one that is there
    [config] = [resolve(config) for config in jobs([*words, *subject, f"base.path={tiny_folder()}"])]
    assert config.group == name and not config.base.is_lab()


@pytest.mark.parametrize("name", ["dreambench", "guidance"])
def test_evaluation_command_of_the_header_parses(name: str) -> None:
    for words in commands(name, "evaluate.py"):
        arms = jobs([word for word in words if word != "-m"], "evaluate")
        assert all(isinstance(arm, EvaluateConfig) and arm.runs == f"runs/{name}" for arm in arms)
        drawn = {(arm.sampling.guidance_scale, arm.sampling.sampler) for arm in arms}
        assert len(drawn) == len(arms) == len({arm.output for arm in arms}) == (12 if name == "guidance" else 1)


@pytest.mark.parametrize(("command", "base"), [(0, "lab"), (1, "stable_diffusion")])
def test_guidance_draws_by_samplers_that_can_use_what_its_base_predicts(command: int, base: str, tiny_folder) -> None:
    """Euler ancestral was among those of the lab, whose base predicts the clean latents: a third of the ways failed."""
    model = StableDiffusion(path=base if base == "lab" else str(tiny_folder())).load()
    samplers = {arm.sampling.sampler for arm in jobs(commands("guidance", "evaluate.py")[command][1:], "evaluate")}
    for sampler in samplers:
        check_sampler(sampler, model)
    assert len(samplers) == 3


@pytest.fixture(scope="module")
def drawn_again(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, bytes]]:
    """A run of guidance that is drawn again in two ways by the command of the header, and some of its files as they were before."""
    folder = tmp_path_factory.mktemp("guidance")
    done = run("experiment=guidance", "trainer.max_steps=2", "trainer.eval_every=2", f"output_dir={folder}", *BRIEF)
    before = {name: (done.path / name).read_bytes() for name in ("run.json", "scores.json", "checkpoints/best.safetensors")}
    words = commands("guidance", "evaluate.py")[0]
    own = [word.replace("runs/guidance", str(done.path.parent)) for word in words if not word.startswith("sampling.")]
    said = typed(*own, "sampling.guidance_scale=3.0,1.0", "sampling.sampler=ddim", f"hydra.sweep.dir={folder}/.sweeps", script="evaluate.py")
    assert said.returncode == 0, said.stderr
    return done, before


def test_guidance_draws_in_other_ways_from_the_models_that_are_there(drawn_again: tuple[RunFolder, dict[str, bytes]]) -> None:
    done, before = drawn_again
    group = done.path.parent
    assert {name: (done.path / name).read_bytes() for name in before} == before
    assert [path.parent for path in group.glob("*/run.json")] == [done.path]
    assert {path.parent.name for path in group.glob("*/table.md")} == {"cfg-3.0-ddim", "cfg-1.0-ddim"}
    drawn = [json.loads(path.read_text())["sampling"] for path in done.path.glob("scores-*.json")]
    assert sorted((one["guidance_scale"], one["sampler"], one["steps"]) for one in drawn) == [(1.0, "ddim", 2), (3.0, "ddim", 2)]


def test_guidance_is_reported_with_the_ways_of_drawing_as_arms(drawn_again: tuple[RunFolder, dict[str, bytes]]) -> None:
    done, _ = drawn_again
    study = read_study([done.path.parent])
    assert study.arms == [f"sampling.guidance_scale={scale}, sampling.sampler={sampler}" for scale, sampler in WAYS]
    (panel,) = [panel for panel in panels(study, 0) if panel.name == "ways"]
    drawn = [read_recipe(row.pictures[0].path)["sampling"] for row in panel.rows[1:]]
    assert [(str(one["guidance_scale"]), one["sampler"]) for one in drawn] == WAYS


def test_guidance_finds_what_does_not_depend_on_the_drawing_worked_out(drawn_again: tuple[RunFolder, dict[str, bytes]]) -> None:
    done, _ = drawn_again
    assert len(list(done.path.parents[1].glob("oracle/*/*.safetensors"))) == 2  # true renders and reference rows, of three evaluations


def _lr_steps(steps: int, folder: Path, *words: str) -> list[str]:
    return [
        "experiment=lr_steps",
        f"trainer.max_steps={steps}",
        "trainer.eval_every=2",
        "trainer.fixed_loss_every=2",
        f"output_dir={folder}",
        *BRIEF,
        *words,
    ]


def _rows(done: RunFolder, last: int) -> list[dict[str, str]]:
    return [row for row in MetricsFile(done.path / "metrics.csv").read() if int(row["step"]) <= last]


def _weights_at(step: int, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[RunFolder, dict]:
    """Trains; returns the run and the learned tensors as they were after a step."""
    from dreambooth.adapters.methods import trainable_state
    from dreambooth.callbacks import ContinueState

    save, seen = ContinueState.on_train_batch_end, {}

    def note(self, trainer, module, *args) -> None:
        if trainer.global_step == step:
            seen.update({name: tensor.clone() for name, tensor in trainable_state(module.base).items()})
        save(self, trainer, module, *args)

    monkeypatch.setattr(ContinueState, "on_train_batch_end", note)
    return run(*words), seen


def test_a_step_of_a_longer_run_is_the_run_of_so_many_steps(tmp_path: Path, monkeypatch) -> None:
    """What the axis of steps of lr_steps rests on: losses, scores and weights, to the bit."""
    short = run(*_lr_steps(2, tmp_path / "short"))
    long, there = _weights_at(2, monkeypatch, *_lr_steps(4, tmp_path / "long"))
    ours = weights(short)
    assert ours.keys() == there.keys() and [name for name in ours if not ours[name].equal(there[name])] == []
    assert _rows(long, 2) == _rows(short, 2) and any(row.get("score/identity_fidelity") for row in _rows(short, 2) if row["step"] == "2")
    assert len(_rows(long, 4)) > len(_rows(long, 2))


def test_a_step_of_a_longer_run_is_another_one_where_the_rate_follows_the_last_step(tiny_folder, tmp_path: Path, monkeypatch) -> None:
    photos = make_photos(tmp_path / "photos")
    words = ["optim.schedule=cosine", f"base.path={tiny_folder()}", f"data.subject_dir={photos}", "subject.class_noun=dog"]
    ours = weights(run(*_lr_steps(2, tmp_path / "short", *words)))
    _, there = _weights_at(2, monkeypatch, *_lr_steps(4, tmp_path / "long", *words))
    assert ours.keys() == there.keys() and not all(ours[name].equal(there[name]) for name in ours)
