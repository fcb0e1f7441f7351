"""Settings that do not go together: what is refused, what is told, and what goes through."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import composed

from dreambooth.adapters.textual_inversion import TextualInversion
from dreambooth.base.stable_diffusion import StableDiffusionModel
from dreambooth.config import Config
from dreambooth.cross_checks import odd_settings
from dreambooth.errors import ConfigError
from dreambooth.preflight import before_loading
from dreambooth.priors import ClassImages, NoPrior, RecipePrior
from dreambooth.recipes import resolve

MakeConfig = Callable[..., Config]
WORD_ALONE = {"method.name": "textual_inversion"}
STOPPED = "method.text_encoder_stop_step"


def test_recipe_prior_is_the_default_of_the_command_line() -> None:
    assert composed("prior.num_images=7").prior == RecipePrior(num_images=7)


@pytest.mark.parametrize("method", ["full", "lora", "cross_attention_kv", "pivotal_tuning"])
def test_recipe_prior_is_class_images_where_the_model_learns(make_config: MakeConfig, method: str) -> None:
    settings = {"prior.name": "recipe", "prior.num_images": 7, "prior.weight": 0.5, "method.name": method}
    prior = make_config(settings).prior
    assert type(prior) is ClassImages and prior.name == "class_images"
    assert (prior.num_images, prior.weight, prior.batch_size) == (7, 0.5, 1)


def test_recipe_prior_is_none_where_a_word_alone_learns(make_config: MakeConfig) -> None:
    config = make_config(WORD_ALONE | {"prior.name": "recipe", "prior.num_images": None})
    assert type(config.prior) is NoPrior and odd_settings(config) == []


def test_recipe_prior_is_kept_and_told_where_a_setting_of_it_was_asked_for(make_config: MakeConfig) -> None:
    config = make_config(WORD_ALONE | {"prior.name": "recipe", "prior.num_images": None, "prior.weight": 0.5})
    assert type(config.prior) is ClassImages and config.prior.weight == 0.5
    assert len(odd_settings(config)) == 1


def test_recipe_prior_of_the_lab_is_none_where_a_word_alone_learns() -> None:
    config = composed("base=lab", "method=textual_inversion")
    config.prior = RecipePrior()  # as on a command line without the tests' few class images
    assert type(resolve(config).prior) is NoPrior


@pytest.mark.parametrize("prior", ["class_images", "self_distilled"])
def test_odd_settings_tell_of_a_prior_that_teaches_a_word_nothing(make_config: MakeConfig, prior: str) -> None:
    (sentence,) = odd_settings(make_config(WORD_ALONE | {"prior.name": prior}))
    assert sentence.startswith(f"prior={prior} changes nothing with method=textual_inversion") and sentence.endswith("add prior=none")


@pytest.mark.parametrize(("prompt", "moves"), [("a photo of a dog", False), ("a photo of a sks dog", True)])
def test_a_class_prompt_has_no_gradient_in_a_word_that_learns_alone(fresh_base: StableDiffusionModel, prompt: str, moves: bool) -> None:
    """Why the prior is left out there."""
    (group,) = TextualInversion().attach(fresh_base, "sks", "dog")
    noisy = torch.randn(1, *fresh_base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    fresh_base.predict(noisy, torch.tensor([500]), fresh_base.encode_prompts([prompt])).square().mean().backward()
    (gradient,) = (parameter.grad for parameter in group.parameters)
    assert bool(gradient.abs().max() > 0) is moves


def test_odd_settings_have_nothing_to_say_of_class_prompts_with_the_word(make_config: MakeConfig) -> None:
    assert odd_settings(make_config(WORD_ALONE | {"prior.prompts": ["a {subject} like sks"]})) == []
    assert len(odd_settings(make_config(WORD_ALONE | {"subject.identifier": "do"}))) == 1  # a dog has it inside, not as a word


@pytest.mark.parametrize("name", ["full", "lora", "cross_attention_kv", "pivotal_tuning"])
def test_odd_settings_have_nothing_to_say_of_a_prior_beside_another_method(make_config: MakeConfig, name: str) -> None:
    assert odd_settings(make_config({"method.name": name})) == []


@pytest.mark.parametrize("noun", ["person", "man", "young woman", "Face", "girl", "boy", "baby"])
def test_odd_settings_tell_of_mirrored_faces(make_config: MakeConfig, noun: str) -> None:
    (sentence,) = odd_settings(make_config({"data.flip": True, "subject.class_noun": noun}))
    assert sentence.startswith(f"data.flip=true mirrors the photos of a {noun}:") and sentence.endswith("add data.flip=false")
    assert odd_settings(make_config({"subject.class_noun": noun})) == []


@pytest.mark.parametrize("noun", ["dog", "baby elephant", "woman statue", "backpack"])
def test_odd_settings_let_things_be_mirrored(make_config: MakeConfig, noun: str) -> None:
    assert odd_settings(make_config({"data.flip": True, "subject.class_noun": noun})) == []


def test_odd_settings_see_the_face_of_a_further_subject(make_config: MakeConfig) -> None:
    extra = {"identifier": "ohwx", "class_noun": "woman", "subject_dir": "photos"}
    assert "a woman" in odd_settings(make_config({"data.flip": True, "extra_subjects": [extra]}))[0]


@pytest.mark.parametrize("name", ["full", "cross_attention_kv"])
def test_odd_settings_tell_of_updates_that_bfloat16_rounds_away(make_config: MakeConfig, name: str) -> None:
    settings = {"method.name": name, "trainer.precision": "bf16-true", "optim.learning_rate": 5e-6}
    (sentence,) = odd_settings(make_config(settings))
    assert sentence.startswith("trainer.precision=bf16-true rounds steps of optim.learning_rate=5e-06 away in every weight above 0.0013")
    assert odd_settings(make_config(settings | {"optim.learning_rate": 4e-4})) == []
    assert odd_settings(make_config(settings | {"trainer.precision": "bf16-mixed"})) == []


def test_odd_settings_have_nothing_to_say_of_bfloat16_where_steps_have_a_size_of_their_own(make_config: MakeConfig) -> None:
    small = {"trainer.precision": "bf16-true", "optim.learning_rate": 5e-6}
    assert odd_settings(make_config(small | {"method.name": "lora"})) == []
    assert odd_settings(make_config({"trainer.precision": "bf16-true", "optim.name": "prodigy", "optim.learning_rate": 1.0})) == []


@pytest.mark.parametrize(("weight", "moves"), [(0.00125, True), (0.003, False)])
def test_bfloat16_loses_an_update_where_it_is_said(weight: float, moves: bool) -> None:
    parameter = torch.nn.Parameter(torch.tensor([weight], dtype=torch.bfloat16))
    before, optimizer = parameter.detach().clone(), torch.optim.AdamW([parameter], lr=5e-6, weight_decay=0.0)
    parameter.square().sum().backward()
    optimizer.step()
    assert bool(parameter != before) is moves


def test_odd_settings_tell_that_a_cpu_has_no_half_precision(make_config: MakeConfig) -> None:
    (sentence,) = odd_settings(make_config({"trainer.precision": "16-mixed", "trainer.accelerator": "cpu"}))
    assert sentence.startswith("trainer.precision=16-mixed is bf16-mixed on a CPU") and "add trainer.precision=bf16-mixed" in sentence


def test_odd_settings_have_nothing_to_say_of_half_precision_on_a_gpu(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert odd_settings(make_config({"trainer.precision": "16-mixed", "trainer.accelerator": "auto"})) == []
    assert len(odd_settings(make_config({"trainer.precision": "16-mixed", "trainer.accelerator": "cpu"}))) == 1


def test_odd_settings_are_among_what_a_run_says_at_its_start(make_config: MakeConfig) -> None:
    found = before_loading(make_config({"data.flip": True, "subject.class_noun": "person", "subject.identifier": "purple"}), ["a purple person"])
    assert found[0].startswith("data.flip=true")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({STOPPED: 5}, "method"),
        ({STOPPED: 5, "method.train_text_encoder": False}, "method"),
        ({STOPPED: 5, "method.name": "lora"}, "method"),
        ({"method.name": "pivotal_tuning", "method.lora.text_encoder_stop_step": 5}, "method.lora"),
    ],
)
def test_stop_step_without_a_text_encoder_that_learns_is_refused(make_config: MakeConfig, settings: dict, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(settings)
    assert str(caught.value).startswith(f"{where}.text_encoder_stop_step must be null where neither {where}.train_text_encoder nor")
    assert str(caught.value).endswith(f"got 5; add {where}.train_text_encoder=true, or leave it out")


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("part", ["train_text_encoder", "train_token"])
def test_stop_step_of_a_part_that_learns_goes_through(make_config: MakeConfig, name: str, part: str) -> None:
    assert make_config({"method.name": name, f"method.{part}": True, STOPPED: 5}).method.text_encoder_stop_step == 5


def test_stop_step_goes_through_where_the_recipe_lets_the_text_encoder_learn() -> None:
    assert resolve(composed("base=lab", "method.text_encoder_stop_step=5")).method.train_text_encoder is True


@pytest.mark.parametrize("weighting", [None, "uniform"])  # null is uniform for Stable Diffusion
def test_snr_gamma_that_no_weighting_reads_is_refused(make_config: MakeConfig, weighting: str | None) -> None:
    with pytest.raises(
        ConfigError, match=r"^objective.snr_gamma must be left at 5 with objective.weighting=uniform.*add objective.weighting=min_snr"
    ):
        make_config({"objective.snr_gamma": 1.0, "objective.weighting": weighting})


@pytest.mark.parametrize("weighting", ["min_snr", "capped_velocity"])
def test_snr_gamma_of_a_weighting_that_reads_it_goes_through(make_config: MakeConfig, weighting: str) -> None:
    assert make_config({"objective.snr_gamma": 1.0, "objective.weighting": weighting}).objective.snr_gamma == 1.0


def test_no_shipped_preset_has_a_setting_that_is_refused(tmp_path: Path) -> None:
    for name in ("joepenna", "faces", "paper", "diffusers"):
        config = composed(f"experiment={name}", "base=lab", f"data.subject_dir={tmp_path}", "subject.class_noun=person")
        assert odd_settings(resolve(config)) == [], name
