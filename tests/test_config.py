"""The page of knobs: plain form and back, what is refused and in which words, fingerprints, recipes, and every YAML file."""

import ast
import copy
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from small_runs import first_value

import train
from dreambooth import __main__ as commands
from dreambooth import cli
from dreambooth.adapters.lora import ATTENTION, WITH_CONVOLUTIONS
from dreambooth.class_images import to_draw
from dreambooth.config import (
    CHOICES,
    BaseEncoders,
    ClassImages,
    Config,
    EvaluateConfig,
    GenerateConfig,
    Sampling,
    Subject,
    choice_name,
    fingerprint,
    from_plain,
    to_plain,
)
from dreambooth.encoders import ClipDino, LabEncoders
from dreambooth.errors import ConfigError
from dreambooth.lab.world import CONTEXTS, PHOTO_CONTEXTS
from dreambooth.recipes import LAB, STABLE_DIFFUSION, resolve, settle_steps
from dreambooth.runs import RunFolder
from dreambooth.summary import summarize

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
BASES = sorted((ROOT / "conf" / "base").glob("*.yaml"))
FIRST = {group: {"name": choice_name(kinds[0])} for group, kinds in CHOICES.items()}
EVERY_CHOICE = [(group, choice_name(kind)) for group, kinds in CHOICES.items() for kind in kinds]
SCHEMAS = {"train": Config, "evaluate": EvaluateConfig, "generate": GenerateConfig}

for script, schema in SCHEMAS.items():
    cli.register(script, schema)


def plain_with(**changes: object) -> dict:
    """A plain config of first choices, with sections replaced."""
    return copy.deepcopy(FIRST) | changes


def composed(*overrides: str, script: str = "train") -> object:
    """The typed config of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cli._typed(compose(script, list(overrides)))


def said(*overrides: str, script: str = "train") -> str:
    """The sentence that a command line is answered with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever Hydra raises, `explain` must know it)
        composed(*overrides, script=script)
    sentence = cli.explain(caught.value)
    assert sentence is not None and "\n" not in sentence
    return sentence


def set_by_path(plain: dict, dotted: str, value: object) -> dict:
    changed = copy.deepcopy(plain)
    *parents, last = dotted.split(".")
    node = changed
    for key in parents:
        node = node[key]
    assert last in node
    node[last] = value
    return changed


# --- plain form -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_from_plain_gives_back_what_to_plain_wrote_for_every_choice(group: str, name: str) -> None:
    config = from_plain(plain_with(**{group: {"name": name}}))
    assert choice_name(type(getattr(config, group))) == name
    assert from_plain(to_plain(config)) == config


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_from_plain_brings_typed_choices_and_not_dicts(group: str, name: str) -> None:
    config = from_plain(plain_with(**{group: {"name": name}}))
    assert type(getattr(config, group)) in CHOICES[group]


def test_to_plain_holds_nothing_but_dicts_lists_texts_and_numbers() -> None:
    def leaves(value: object) -> list[object]:
        if isinstance(value, dict | list):
            return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
        return [value]

    plain = to_plain(resolve(from_plain(FIRST)))
    assert {type(leaf) for leaf in leaves(plain)} <= {str, int, float, bool, type(None)}


def test_from_plain_does_not_change_what_it_is_given() -> None:
    plain = plain_with()
    from_plain(plain)
    assert plain == FIRST


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sead": 1}, "sead"),
        ({"optim": {"name": "adamw", "lr": 1e-4}}, "lr"),
        ({"method": {"name": "lorra"}}, "lorra"),
        ({"method": {}}, "method.name"),
        ({"seed": "many"}, "many"),
        ({"trainer": {"max_steps": [1]}}, "ListConfig|list"),
        ({"_target_": "os.system", "cmd": "true"}, "_target_|cmd"),
        ({"method": {"name": "full", "_target_": "os.system"}}, "_target_"),
    ],
)
def test_from_plain_refuses_what_it_does_not_know_and_names_the_source(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        from_plain(plain_with(**changes), "old/run.json")
    assert str(caught.value).startswith("old/run.json")


def test_seed_zero_is_a_value() -> None:
    assert from_plain(plain_with(seed=0)).seed == 0
    assert EvaluateConfig(run="x", seed=0).applied_to(from_plain(FIRST)).evaluation.seed == 0


def test_prior_weight_zero_is_a_value() -> None:
    config = resolve(from_plain(plain_with(prior={"name": "class_images", "weight": 0.0})))
    assert config.prior.weight == 0.0


@pytest.mark.parametrize(
    ("noun", "subject", "prior"),
    [(None, "a sks dog", "a dog"), ("teapot", "a sks teapot", "a teapot"), ("", "a sks", "a dog")],
)
def test_prompt_noun_changes_what_is_trained_but_not_what_is_scored(noun: str | None, subject: str, prior: str) -> None:
    """The ablation of Ruiz et al. 2023, table 4: right, wrong and no noun; scores ask for what the subject really is."""
    config = Subject(class_noun="dog", prompt_noun=noun)
    assert (config.in_prompt("a {subject}"), config.prior_in_prompt("a {subject}")) == (subject, prior)
    assert config.class_in_prompt("a {subject}") == "a dog"


def test_subject_in_prompt_puts_identifier_and_class_in() -> None:
    subject = Subject(identifier="ohwx", class_noun="toy dog")
    assert subject.in_prompt("a photo of a {subject} at night") == "a photo of a ohwx toy dog at night"
    assert subject.class_in_prompt("a photo of a {subject} at night") == "a photo of a toy dog at night"


def test_sampling_over_replaces_only_what_is_set() -> None:
    config = resolve(from_plain(FIRST))
    before = dataclasses.replace(config.sampling)
    Sampling(steps=3).over(config)
    assert config.sampling == dataclasses.replace(before, steps=3)


def test_evaluate_config_applied_to_replaces_only_what_is_set() -> None:
    config = resolve(from_plain(FIRST))
    before = dataclasses.replace(config.evaluation)
    EvaluateConfig(run="x", prompts=["a {subject} in the sky"], images=3).applied_to(config)
    assert config.evaluation == dataclasses.replace(before, final_prompts=["a {subject} in the sky"], final_images=3)


# --- fingerprint ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab_plain() -> dict:
    return to_plain(resolve(from_plain(plain_with(prior={"name": "class_images"}))))


def test_fingerprint_is_equal_for_equal_configs(lab_plain: dict) -> None:
    reversed_keys = dict(reversed(copy.deepcopy(lab_plain).items()))
    assert fingerprint(lab_plain, base="a") == fingerprint(reversed_keys, base="a")


def test_fingerprint_is_eight_hex_digits(lab_plain: dict) -> None:
    assert re.fullmatch(r"[0-9a-f]{8}", fingerprint(lab_plain))


@pytest.mark.parametrize("dotted", ["group", "output_dir", "export", "wandb", "data.num_workers", "trainer.progress_bar", "trainer.checkpoint_every"])
def test_fingerprint_does_not_see_what_changes_no_result(lab_plain: dict, dotted: str) -> None:
    assert fingerprint(set_by_path(lab_plain, dotted, "something else")) == fingerprint(lab_plain)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("seed", 1),
        ("optim.learning_rate", 1e-5),
        ("prior.weight", 0.5),
        ("trainer.max_steps", 7),
        ("subject.identifier", "ohwx"),
        ("sampling.steps", 9),
        ("evaluation.seed", 3),
        ("data.flip", True),
    ],
)
def test_fingerprint_sees_what_changes_a_result(lab_plain: dict, dotted: str, value: object) -> None:
    assert fingerprint(set_by_path(lab_plain, dotted, value)) != fingerprint(lab_plain)


@pytest.mark.parametrize("digests", [{}, {"base": "b"}, {"base": "a", "photos": "a"}, {"photos": "a"}])
def test_fingerprint_sees_every_digest(lab_plain: dict, digests: dict) -> None:
    assert fingerprint(lab_plain, **digests) != fingerprint(lab_plain, base="a")


@pytest.mark.parametrize("dotted", ["base.path", "data.subject_dir"])
def test_fingerprint_takes_contents_for_the_places_where_they_lie(lab_plain: dict, dotted: str) -> None:
    moved = set_by_path(lab_plain, dotted, "elsewhere")
    assert fingerprint(moved, base="a") == fingerprint(lab_plain, base="a")
    assert fingerprint(moved) != fingerprint(lab_plain)


def test_fingerprint_does_not_change_what_it_is_given(lab_plain: dict) -> None:
    before = copy.deepcopy(lab_plain)
    fingerprint(lab_plain, base="a")
    assert lab_plain == before


# --- recipes ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_plain(tiny_folder: Callable[..., Path]) -> dict:
    return plain_with(
        base={"name": "stable_diffusion", "path": str(tiny_folder())},
        prior={"name": "class_images"},
        subject={"class_noun": "dog"},
        data={"subject_dir": "photos"},
    )


LAB_PLAIN = plain_with(prior={"name": "class_images"})


@pytest.mark.parametrize("recipe", [LAB, STABLE_DIFFUSION], ids=["lab", "stable_diffusion"])
def test_recipe_names_only_settings_that_exist(recipe: dict) -> None:
    sections = {field.name: field for field in dataclasses.fields(Config)}
    for dotted in recipe:
        section, key = dotted.split(".")
        kinds = CHOICES.get(section, (sections[section].type,))
        assert any(key in kind.__dataclass_fields__ for kind in kinds), dotted


@pytest.mark.parametrize("family", ["lab", "stable_diffusion"])
def test_resolve_fills_every_null_that_the_recipe_knows(family: str, sd_plain: dict) -> None:
    plain = LAB_PLAIN if family == "lab" else sd_plain
    resolved = to_plain(resolve(from_plain(plain)))
    recipe = LAB if family == "lab" else STABLE_DIFFUSION
    wrong = {}
    for dotted, value in recipe.items():
        section, key = dotted.split(".")
        if plain.get(section, {}).get(key) is None and key in resolved[section] and resolved[section][key] != value:
            wrong[dotted] = resolved[section][key]
    assert wrong == {}


@pytest.mark.parametrize(("family", "layers"), [("lab", WITH_CONVOLUTIONS), ("stable_diffusion", ATTENTION)])
def test_resolve_chooses_the_layers_of_a_lora_and_of_the_one_in_pivotal_tuning(family: str, layers: tuple[str, ...], sd_plain: dict) -> None:
    plain = LAB_PLAIN if family == "lab" else sd_plain
    alone, pivotal = (resolve(from_plain(plain | {"method": {"name": name}})).method for name in ("lora", "pivotal_tuning"))
    assert alone.target_modules == pivotal.lora.target_modules == [*layers]
    said = resolve(from_plain(plain | {"method": {"name": "pivotal_tuning", "lora": {"target_modules": ["to_q"]}}}))
    assert said.method.lora.target_modules == ["to_q"]


@pytest.mark.parametrize("family", ["lab", "stable_diffusion"])
def test_resolve_leaves_no_null_but_those_that_mean_off(family: str, sd_plain: dict) -> None:
    resolved = to_plain(resolve(from_plain(LAB_PLAIN if family == "lab" else sd_plain)))
    nulls = {f"{section}.{key}" for section, node in resolved.items() if isinstance(node, dict) for key, value in node.items() if value is None}
    off = {"base.revision", "base.variant", "base.config_path", "base.prediction_type", "prior.class_dir", "encoders.folder", "wandb.entity"}
    off |= {"encoders.lpips_backbone", "encoders.dinov2_path"}
    off |= {"subject.prompt_noun", "trainer.early_stop_patience"}
    off |= {"data.photos", "data.dreambench", "subject.name", "data.masks", "data.steps_per_image"}
    off |= {"method.text_encoder_stop_step", "optim.fused", "trainer.ema_decay"}
    off |= {"prior.weight_end", "objective.max_timestep", "objective.huber_delta"}
    assert nulls <= off | ({"data.subject_dir"} if family == "lab" else set())


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("method.train_text_encoder", False),
        ("optim.learning_rate", 0.0),
        ("trainer.max_steps", 3),
        ("prior.num_images", 5),
        ("prior.prompts", ["a {subject}"]),
        ("subject.class_noun", "teapot"),
        ("objective.weighting", "uniform"),
        ("sampling.guidance_scale", 1.0),
        ("data.resolution", 128),
        ("trainer.checkpoint_every", 2),
    ],
)
def test_resolve_leaves_what_is_set(dotted: str, value: object) -> None:
    section, key = dotted.split(".")
    config = resolve(from_plain(plain_with(**({"prior": {"name": "class_images"}} | {section: {**LAB_PLAIN.get(section, {}), key: value}}))))
    assert getattr(getattr(config, section), key) == value


def test_resolve_takes_the_resolution_of_the_base(sd_plain: dict) -> None:
    assert resolve(from_plain(sd_plain)).data.resolution == 64


def test_resolve_saves_the_state_at_every_evaluation() -> None:
    config = resolve(from_plain(plain_with(trainer={"eval_every": 7})))
    assert config.trainer.checkpoint_every == 7


def test_resolve_takes_the_encoders_of_the_base(sd_plain: dict) -> None:
    assert isinstance(from_plain(LAB_PLAIN).encoders, BaseEncoders)
    assert isinstance(resolve(from_plain(LAB_PLAIN)).encoders, LabEncoders)
    assert isinstance(resolve(from_plain(sd_plain)).encoders, ClipDino)


def test_resolve_keeps_the_encoders_that_were_chosen() -> None:
    assert isinstance(resolve(from_plain(plain_with(encoders={"name": "clip_dino"}))).encoders, ClipDino)


def test_resolve_twice_is_resolve_once() -> None:
    config = resolve(from_plain(LAB_PLAIN))
    once = to_plain(config)
    assert to_plain(resolve(config)) == once


def test_resolve_hands_out_lists_of_its_own() -> None:
    """A config that is changed must not change the recipe of the next job of a sweep."""
    before = copy.deepcopy(LAB)
    config = resolve(from_plain(LAB_PLAIN))
    config.prior.prompts.append("a {subject} on a bus")
    config.evaluation.final_prompts.clear()
    try:
        assert LAB == before
    finally:
        LAB.clear()
        LAB.update(before)


def test_resolve_works_without_a_prior() -> None:
    config = resolve(from_plain(plain_with(prior={"name": "none"})))
    assert to_plain(config)["prior"] == {"name": "none"}


def test_resolve_asks_for_the_class_noun_when_photos_are_given() -> None:
    with pytest.raises(ConfigError, match="^subject.class_noun must be set"):
        resolve(from_plain(plain_with(data={"subject_dir": "photos"})))


def test_resolve_asks_for_photos_where_there_is_no_built_in_subject(sd_plain: dict) -> None:
    with pytest.raises(ConfigError, match="^data.subject_dir must be set"):
        resolve(from_plain(sd_plain | {"data": {}}))


def context(template: str) -> str:
    return template.partition("{subject}")[2].strip()


def test_lab_recipe_draws_the_final_scores_in_contexts_seen_nowhere_before() -> None:
    """Neither a photo, nor a class caption, nor the choice of the step may have shown the model or us a final context."""
    final = {context(prompt) for prompt in LAB["evaluation.final_prompts"]}
    used = {context(prompt) for key in ("prior.prompts", "evaluation.selection_prompts") for prompt in LAB[key]} | set(PHOTO_CONTEXTS)
    assert len(final) == len(LAB["evaluation.final_prompts"]) > 0
    assert final & used == set()


def test_lab_recipe_chooses_the_step_in_contexts_of_no_photo() -> None:
    assert {context(prompt) for prompt in LAB["evaluation.selection_prompts"]} & set(PHOTO_CONTEXTS) == set()


def test_lab_recipe_asks_only_for_places_of_the_labs_world() -> None:
    prompts = [prompt for key in ("prior.prompts", "evaluation.selection_prompts", "evaluation.final_prompts") for prompt in LAB[key]]
    assert {context(prompt) for prompt in prompts} - {""} <= set(CONTEXTS)


def test_stable_diffusion_recipe_keeps_final_prompts_apart_from_selection_prompts() -> None:
    assert not set(STABLE_DIFFUSION["evaluation.final_prompts"]) & set(STABLE_DIFFUSION["evaluation.selection_prompts"])


# --- YAML files -------------------------------------------------------------------------------------------------------------------------


def test_conf_train_composes_to_a_typed_config() -> None:
    config = composed()
    assert isinstance(config, Config) and isinstance(config.prior, ClassImages)


@pytest.mark.parametrize(("script", "overrides"), [("evaluate", ["run=x"]), ("generate", ["run=x", "prompt='a {subject}'"])])
def test_conf_of_the_other_scripts_compose(script: str, overrides: list[str]) -> None:
    assert isinstance(composed(*overrides, script=script), SCHEMAS[script])


@pytest.mark.parametrize(("word", "kind"), [("base", BaseEncoders), ("lab", LabEncoders), ("clip_dino", ClipDino)])
def test_conf_of_evaluate_takes_every_choice_of_encoders(word: str, kind: type) -> None:
    """Hydra refused all but `base`, the default of the field itself: "ClipDino is not a subclass of BaseEncoders"."""
    assert type(composed("run=x", f"encoders={word}", script="evaluate").encoders) is kind


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_conf_base_files_compose(path: Path) -> None:
    assert composed(f"base={path.stem}").base.path == OmegaConf.load(path).path


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_conf_knows_every_choice(group: str, name: str) -> None:
    assert choice_name(type(getattr(composed(f"{group}={name}"), group))) == name


def test_conf_has_no_yaml_file_outside_the_tested_folders() -> None:
    groups = {path.parent.name for path in (ROOT / "conf").rglob("*.yaml")}
    assert groups <= {"conf", "base", "experiment"}


def experiment_jobs(path: Path) -> list[str]:
    """Overrides of a file that come with its sweep: the first value of each parameter is tried."""
    sweep = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}
    return [first_value(f"{key}={values}") for key, values in sweep.items()]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_conf_experiments_compose_to_a_typed_config(path: Path) -> None:
    config = composed(f"experiment={path.stem}", *experiment_jobs(path))
    assert config.group != "default", f"{path.name} must set a group of its own, which becomes the folder of its runs"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_conf_experiments_say_command_minutes_and_expected_result(path: Path) -> None:
    assert missing_in_header(path.read_text(encoding="utf-8")) == []


def missing_in_header(text: str) -> list[str]:
    """What the comment on top of an experiment does not say."""
    lines = text.splitlines()
    header = "\n".join(lines[: next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))])
    asked = {
        "the command (python train.py ... experiment=...)": r"python train\.py.*experiment=",
        "how long it takes (... minutes)": r"\bminutes?\b|\bmin\b",
        "what is expected (Expected: ...)": r"(?i)\bexpect",
    }
    return [what for what, pattern in asked.items() if not re.search(pattern, header)]


def test_conf_experiment_header_check_sees_what_is_missing() -> None:
    assert missing_in_header("# @package _global_\n# python train.py experiment=x, 3 minutes. Expected: 0.7\nseed: 0") == []
    assert len(missing_in_header("# @package _global_\nseed: 0 # python train.py experiment=x, 3 minutes, expected")) == 3


# --- the command line -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.max_steps=ten"], r"trainer\.max_steps must be a whole number, got 'ten'; write it like trainer\.max_steps=100"),
        (["seed=1.5"], r"seed must be a whole number, got '1\.5'.*"),
        (["optim.learning_rate=fast"], r"optim\.learning_rate must be a number, got 'fast'; write it like optim\.learning_rate=1e-5"),
        (["data.flip=maybe"], r".*data\.flip.*"),
        (["optim.lr=1e-4"], r"optim\.lr must be a setting that exists; did you mean optim\.learning_rate\?"),
        (["trainer.max_step=3"], r"trainer\.max_step must be a setting that exists; did you mean trainer\.max_steps\?"),
        (["prior.wieght=1"], r"prior\.wieght must be a setting that exists; did you mean prior\.weight\?"),
        (["prior=none", "prior.weight=1"], r"prior\.weight must be a setting that exists; see them all: python train\.py --cfg job"),
        (["method=lorra"], r"method must be one of .*full.*, got 'lorra'; .*"),
        (["base=sd9"], r"base must be one of lab, .*, got 'sd9'; .*"),
        (["+foo=1"], r"foo must be a setting that exists; see them all: python train\.py --cfg job"),
        (["seed=-1"], r"seed must be 0 or more, got -1; .*"),
        (["optim.learning_rate=-1e-4"], r"optim\.learning_rate must be 0 or more and finite, got -0\.0001; .*"),
        (["optim.learning_rate=nan"], r"optim\.learning_rate must be 0 or more and finite, got nan; .*"),
        (["prior.weight=-0.1"], r"prior\.weight must be 0 or more, got -0\.1; .*"),
        (["data.resolution=100"], r"data\.resolution must be a multiple of 8 px, 16 or more, got 100; .*"),
        (["data.batch_size=0"], r"data\.batch_size must be above 0, got 0; .*"),
        (["data.num_workers=-1"], r"data\.num_workers must be 0 or more, got -1; .*"),
        (["data.crop=left"], r"data\.crop must be center, random or smart, got 'left'; .*"),
        (["trainer.max_steps=0"], r"trainer\.max_steps must be above 0, got 0; .*"),
        (["trainer.gradient_clip_val=0"], r"trainer\.gradient_clip_val must be above 0 and finite, got 0\.0; 1\.0 is usual, null is off"),
        (["trainer.gradient_clip_val=inf"], r"trainer\.gradient_clip_val must be above 0 and finite, got inf; .*"),
        (["export.name=a1111"], r"export\.name must be model or joepenna, got 'a1111'; choose one"),
        (["trainer.precision=fp16"], r"trainer\.precision must be one of 32-true, .*, got 'fp16'; .*"),
        (["sampling.steps=-1"], r"sampling\.steps must be above 0, got -1; .*"),
        (["objective.weighting=snr"], r"objective\.weighting must be one of uniform, min_snr, capped_velocity, got 'snr'; .*"),
        (["objective.snr_gamma=0"], r"objective\.snr_gamma must be above 0, got 0\.0; .*"),
        (["optim.betas=[0.9]"], r"optim\.betas must be two numbers in \[0, 1\), got \[0\.9\]; .*"),
        (["optim.betas=[0.9,1.0]"], r"optim\.betas must be two numbers in \[0, 1\), .*"),
        (["optim.schedule=linear"], r"optim\.schedule must be one of constant, cosine, got 'linear'; .*"),
        (["optim.warmup_steps=-1"], r"optim\.warmup_steps must be 0 or more, got -1; .*"),
        (["subject.identifier=' '"], r"subject\.identifier must be a word, got ' '; .*"),
        (["subject.prompt=a photo"], r"subject\.prompt must name the subject as \{subject\}, got 'a photo'; .*"),
        (["prior.prompts=[a dog]"], r"prior\.prompts must name the subject as \{subject\}, got 'a dog'; .*"),
        (["wandb.mode=on"], r"wandb\.mode must be offline, online or disabled, got 'on'; .*"),
        (["nonsense"], r"the command line must be words of the form setting=value.*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_answers_a_wrong_setting_in_one_sentence(overrides: list[str], sentence: str) -> None:
    assert re.fullmatch(sentence, said(*overrides))


def test_command_line_names_a_setting_that_must_be_given() -> None:
    assert said("prompt=x", script="generate") == "run must be set; write run=..."


def advertised_commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every line that is a command; what follows two spaces is a remark."""
    found = re.findall(r"^(?:# Command:)?\s*python (train|evaluate|generate)\.py(.*)$", text, re.MULTILINE)
    return [(script, [word for word in shlex.split(re.split(r"\s{2,}", rest)[0]) if word != "-m"]) for script, rest in found]


TEXTS = [ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))) for script in SCHEMAS]
TEXTS += [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *EXPERIMENTS)]
ADVERTISED = [command for text in TEXTS for command in advertised_commands(text)]


@pytest.mark.parametrize(("script", "arguments"), ADVERTISED, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_commands_in_docstrings_readme_and_experiments_are_understood(script: str, arguments: list[str]) -> None:
    first_of_each = [word if word[-1] in "]\"'" else word.split(",")[0] for word in arguments]  # of a sweep, its first job
    assert isinstance(composed(*first_of_each, script=script), SCHEMAS[script])


def test_commands_are_found_for_every_script() -> None:
    assert {script for script, _ in ADVERTISED} == set(SCHEMAS)


def test_commands_that_a_run_prints_at_its_end_are_understood(lab_plain: dict) -> None:
    run = RunFolder(Path("runs/default/full-robot-1a2b3c4d"), {"config": lab_plain, "seconds": {}})
    text = summarize(run, {"rows": [{"arm": "best", "step": 1}], "missing": "no encoders"}, "the last")
    commands = advertised_commands(text)
    assert {script for script, _ in commands} == {"generate", "evaluate"}
    for script, arguments in commands:
        composed(*arguments, script=script)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "model.safetensors"),
        ({"weights": "final"}, "model.safetensors --weights final"),
        ({"name": "joepenna", "weights": "final"}, "--name joepenna --weights final"),
    ],
)
def test_export_command_that_a_run_prints_at_its_end_is_its_configs(
    sd_plain: dict, monkeypatch: pytest.MonkeyPatch, settings: dict, words: str
) -> None:
    plain = to_plain(resolve(from_plain(sd_plain | {"export": settings})))
    run = RunFolder(Path("runs/default/full-dog-1a2b3c4d"), {"config": plain, "seconds": {}})
    text = summarize(run, {"rows": [{"arm": "best", "step": 1}], "missing": "no encoders"}, "the last")
    command = text.splitlines()[-1].strip()
    assert command == f"python -m dreambooth export runs/default/full-dog-1a2b3c4d {words}"
    seen = []
    monkeypatch.setattr(commands, "export", seen.append)
    assert commands.main(shlex.split(command)[3:]) == 0
    assert (seen[0].name, seen[0].weights) == (settings.get("name"), settings.get("weights", "best"))


def test_export_of_the_lab_is_a_folder_whatever_its_name(lab_plain: dict) -> None:
    run = RunFolder(Path("runs/x/y"), {"config": lab_plain | {"export": {"name": "joepenna"}}, "seconds": {}})
    assert summarize(run, {"rows": [{"arm": "best", "step": 1}], "missing": "no encoders"}, "the last").endswith("export runs/x/y model/")


@pytest.mark.parametrize("value", [None, 0.5])
def test_gradient_clip_val_is_lightnings(value: float | None) -> None:
    config = resolve(from_plain(plain_with(trainer={"gradient_clip_val": value, "accelerator": "cpu"})))
    assert train.make_trainer(config, [], []).gradient_clip_val == value


def test_joepenna_preset_neither_clips_nor_mirrors_and_names_its_file() -> None:
    config = composed("experiment=joepenna")
    assert config.trainer.gradient_clip_val is None and config.data.flip is False
    assert (config.export.name, config.export.weights) == ("joepenna", "final")


def test_joepenna_preset_takes_steps_as_its_refusal_says() -> None:
    words = ["experiment=joepenna", "base=lab", "subject.class_noun=dog", "trainer.max_steps=7"]
    with pytest.raises(ConfigError, match="add data.steps_per_image=null to train for 7 steps"):
        resolve(composed(*words))
    assert resolve(composed(*words, "data.steps_per_image=null")).trainer.max_steps == 7
    assert resolve(composed(*words[:-1], "trainer.max_steps=null")).trainer.max_steps is None


def test_explain_leaves_a_defect_of_the_program_to_the_traceback() -> None:
    assert cli.explain(KeyError("x")) is None


def test_explain_names_a_full_disk() -> None:
    assert "full disk" in cli.explain(OSError(28, "No space left on device", "runs/x/metrics.csv"))


def test_explain_finds_the_sentence_under_the_errors_that_wrap_it() -> None:
    try:
        try:
            raise ConfigError("seed", "must be 0 or more", -1)
        except ConfigError as inner:
            raise RuntimeError("Hydra says so") from inner
    except RuntimeError as outer:
        assert cli.explain(outer) == "seed must be 0 or more, got -1"


def test_config_values_that_are_no_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="prior.weight"):
        ClassImages(weight=math.nan)


def run_train(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_train_script_answers_a_wrong_setting_with_one_line_and_status_2() -> None:
    answer = run_train("optim.lr=1e-4")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "error: optim.lr must be a setting that exists; did you mean optim.learning_rate?\n"


def test_config_store_holds_a_schema_for_every_script() -> None:
    names = ConfigStore.instance().list("")
    assert {f"{script}_schema.yaml" for script in SCHEMAS} <= set(names)


def test_steps_per_image_decides_the_steps_once_the_photos_are_counted() -> None:
    config = resolve(from_plain(plain_with(data={"steps_per_image": 100})))
    assert config.trainer.max_steps is None
    assert settle_steps(config, photos=7).trainer.max_steps == 700


def test_steps_per_image_is_off_by_default() -> None:
    config = resolve(from_plain(FIRST))
    steps = config.trainer.max_steps
    assert settle_steps(config, photos=7).trainer.max_steps == steps == LAB["trainer.max_steps"]


def test_steps_per_image_and_max_steps_refuse_each_other() -> None:
    rule = "data.steps_per_image must be null where trainer.max_steps is set"
    next_step = "add data.steps_per_image=null to train for 5 steps, or trainer.max_steps=null to train for 100 a photo"
    with pytest.raises(ConfigError, match=f"{rule}.*{next_step}"):
        resolve(from_plain(plain_with(data={"steps_per_image": 100}, trainer={"max_steps": 5})))


def test_steps_per_image_leaves_half_to_the_first_part_of_pivotal_tuning() -> None:
    config = resolve(from_plain(plain_with(data={"steps_per_image": 10}, method={"name": "pivotal_tuning"})))
    assert settle_steps(config, photos=4).method.inversion_steps == 20


EXTRA = {"identifier": "ohwx", "class_noun": "teapot", "lab_seed": 3}


def test_extra_subjects_survive_the_plain_form() -> None:
    config = resolve(from_plain(plain_with(extra_subjects=[EXTRA])))
    assert from_plain(to_plain(config)) == config and config.extra_subjects[0].prompt == config.subject.prompt
    assert config.identifiers == "sks ohwx" and config.prior_nouns == ["dog", "teapot"]


def test_extra_subjects_of_one_class_share_its_class_images() -> None:
    extras = [EXTRA, EXTRA | {"identifier": "zwx", "class_noun": "dog"}]
    config = resolve(from_plain(plain_with(extra_subjects=extras, prior={"name": "class_images"})))
    assert config.prior_nouns == ["dog", "teapot"]
    assert config.prior_prompts[:2] == ["a photo of a dog", "a photo of a teapot"]
    assert to_draw(config, None) == dict.fromkeys(["dog", "teapot"], LAB["prior.num_images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identifier": "SKS"}, "extra_subjects.identifier must be another one for each subject, got 'sks'"),
        ({"subject_dir": "photos"}, "extra_subjects must name either a subject_dir or a lab_seed each, got 'ohwx'"),
        ({"lab_seed": None}, "extra_subjects must name either a subject_dir or a lab_seed each, got 'ohwx'"),
        ({"repeats": 0}, "extra_subjects.repeats must be above 0, got 0"),
        ({"prompt": "a photo"}, "extra_subjects.prompt must name the subject as {subject}, got 'a photo'"),
    ],
)
def test_extra_subjects_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_plain(plain_with(extra_subjects=[EXTRA | change]))


def test_extra_subjects_are_not_for_a_method_that_learns_one_word() -> None:
    with pytest.raises(ConfigError, match="extra_subjects must be empty with method=textual_inversion"):
        resolve(from_plain(plain_with(extra_subjects=[EXTRA], method={"name": "textual_inversion"})))


def test_fingerprint_names_the_photos_of_extra_subjects_by_content() -> None:
    names = set()
    for folder in ("a", "b"):
        extra = {"identifier": "ohwx", "class_noun": "teapot", "subject_dir": folder}
        names.add(fingerprint(to_plain(resolve(from_plain(plain_with(extra_subjects=[extra])))), photos="1"))
    assert len(names) == 1
