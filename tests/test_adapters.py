"""Methods: identity when attached, gradients exactly where declared, plain modules again when merged, learned tensors there and back."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreambooth.adapters.lora import Lora
from dreambooth.adapters.methods import (
    CrossAttentionKV,
    Full,
    Method,
    ParamGroup,
    describe_learning,
    let_learn,
    load_trainable_state,
    trainable_state,
)
from dreambooth.adapters.peft_layers import adapter_layers
from dreambooth.adapters.textual_inversion import PivotalTuning, TextualInversion
from dreambooth.adapters.token_rows import TokenRows
from dreambooth.base.stable_diffusion import StableDiffusion, StableDiffusionModel
from dreambooth.config import Config, from_plain, to_plain
from dreambooth.errors import ConfigError, UserError
from dreambooth.recipes import LAB_METHODS, STABLE_DIFFUSION_METHODS

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]
T = torch.tensor([10, 700])
NOISY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def output(base: StableDiffusionModel) -> Tensor:
    return base.predict(NOISY, T, base.encode_prompts(PROMPTS))


def attached(base: StableDiffusionModel, text: bool = True, token: bool = True) -> StableDiffusionModel:
    Full(train_text_encoder=text, train_token=token).attach(base, "sks")
    return base


def train_a_little(base: StableDiffusionModel, steps: int = 3) -> None:
    """Moves all that learns, by AdamW with weight decay, which would also move a row that gets no gradient."""
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        base.predict(NOISY, T, base.encode_prompts(PROMPTS)).pow(2).mean().backward()
        optimizer.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_attach_changes_no_output(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    before = output(fresh_base)
    assert torch.equal(output(attached(fresh_base, text, token)), before)


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_attach_opens_exactly_what_it_declares(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    groups = Full(train_text_encoder=text, train_token=token).attach(fresh_base, "sks")
    declared = {id(p) for group in groups for p in group.parameters}
    assert {id(p) for p in fresh_base.parameters() if p.requires_grad} == declared
    assert [group.part for group in groups] == ["unet"] + ["text_encoder"] * text + ["token"] * token
    assert len(declared) == sum(len(group.parameters) for group in groups)  # none in two groups


def test_full_attach_opens_every_weight_of_the_unet(fresh_base: StableDiffusionModel) -> None:
    attached(fresh_base, False, False)
    assert all(p.requires_grad for p in fresh_base.unet.parameters())
    assert not any(p.requires_grad for part in (fresh_base.vae, fresh_base.text_encoder) for p in part.parameters())


def test_full_attach_keeps_the_vocabulary_frozen(fresh_base: StableDiffusionModel) -> None:
    attached(fresh_base, True, False)
    assert not fresh_base.text_encoder.get_input_embeddings().weight.requires_grad


def test_full_attach_freezes_what_an_earlier_method_left_open(fresh_base: StableDiffusionModel) -> None:
    fresh_base.requires_grad_(True)
    attached(fresh_base, False, False)
    assert not any(p.requires_grad for p in fresh_base.vae.parameters())


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_every_declared_parameter_gets_a_gradient_that_can_move_it(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    before = snapshot(base)
    train_a_little(base, steps=2)
    still = {name for name, p in base.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert still == set()


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_training_moves_nothing_that_is_frozen(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    before = snapshot(base)
    train_a_little(base)
    assert {name for name, p in base.named_parameters() if not p.requires_grad and not torch.equal(p, before[name])} == set()


def test_token_rows_learn_the_identifier_and_leave_every_other_word_bit_for_bit(fresh_base: StableDiffusionModel) -> None:
    before = fresh_base.text_encoder.get_input_embeddings().weight.detach().clone()
    base = attached(fresh_base, False, True)
    token_ids = base.token_id("sks")
    train_a_little(base)
    Full().merge(base)
    after = base.text_encoder.get_input_embeddings().weight
    changed = [row for row in range(len(before)) if not torch.equal(after[row], before[row])]
    assert changed == token_ids


def test_token_rows_of_a_word_of_several_tokens_learn_them_all(fresh_base: StableDiffusionModel) -> None:
    ids = fresh_base.token_id("qyx")
    assert len(ids) == 3
    before = fresh_base.text_encoder.get_input_embeddings().weight.detach().clone()
    Full(train_text_encoder=False, train_token=True).attach(fresh_base, "qyx")
    optimizer = torch.optim.SGD([p for p in fresh_base.parameters() if p.requires_grad], lr=10.0)
    fresh_base.predict(NOISY, T, fresh_base.encode_prompts(["a qyx dog"] * 2)).pow(2).mean().backward()
    optimizer.step()
    Full().merge(fresh_base)
    after = fresh_base.text_encoder.get_input_embeddings().weight
    assert sorted(row for row in range(len(before)) if not torch.equal(after[row], before[row])) == sorted(set(ids))


@pytest.mark.parametrize("token_ids", [[2], [4, 2], [2, 2]], ids=["one", "two", "the same twice"])
def test_token_rows_forward_is_that_of_the_embedding_they_merge_to(token_ids: list[int]) -> None:
    torch.manual_seed(0)
    rows = TokenRows(nn.Embedding(6, 3).requires_grad_(False), token_ids)
    with torch.no_grad():
        rows.rows += torch.randn_like(rows.rows)
    ids = torch.tensor([[0, 1, 2], [4, 2, 5]])
    attached_output = rows(ids).detach()
    merged = rows.merged()
    assert type(merged) is nn.Embedding and torch.equal(merged(ids), attached_output)


def test_token_rows_gradient_is_that_of_the_whole_embedding_at_its_row() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3)
    ids, pull = torch.tensor([[0, 2, 2], [4, 2, 5]]), torch.randn(2, 3, 3)
    (table(ids) * pull).sum().backward()
    rows = TokenRows(nn.Embedding.from_pretrained(table.weight.detach().clone()), [2])
    (rows(ids) * pull).sum().backward()
    torch.testing.assert_close(rows.rows.grad[0], table.weight.grad[2])


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_full_merge_keeps_the_output_of_what_was_learned(fresh_base: StableDiffusionModel, text: bool, token: bool) -> None:
    base = attached(fresh_base, text, token)
    start = output(base)
    train_a_little(base)
    learned = output(base)
    Full(train_text_encoder=text, train_token=token).merge(base)
    assert torch.equal(output(base), learned) and not torch.equal(learned, start)


def test_full_merge_leaves_plain_modules_that_save_and_load(fresh_base: StableDiffusionModel, tmp_path: Path) -> None:
    base = attached(fresh_base)
    train_a_little(base)
    learned = output(base)
    Full().merge(base)
    assert type(base.text_encoder.get_input_embeddings()) is nn.Embedding
    assert not any(isinstance(module, TokenRows) for module in base.modules())
    reloaded = StableDiffusion(path=str(base.save(tmp_path / "tuned"))).load()
    torch.testing.assert_close(output(reloaded), learned, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("text", "token"), VARIANTS)
def test_trainable_state_brings_what_was_learned_to_a_fresh_base(tiny_folder: Callable[..., Path], text: bool, token: bool) -> None:
    trained, other = (attached(StableDiffusion(path=str(tiny_folder())).load(), text, token) for _ in range(2))
    train_a_little(trained)
    assert not torch.equal(output(other), output(trained))
    load_trainable_state(other, trainable_state(trained), "best.safetensors")
    assert torch.equal(output(other), output(trained))


def test_trainable_state_is_what_learns_and_carries_no_gradient(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base)
    state = trainable_state(base)
    assert state.keys() == {name for name, p in base.named_parameters() if p.requires_grad}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_load_trainable_state_does_not_tie_the_model_to_the_tensors_given(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    state = {name: tensor.clone() for name, tensor in trainable_state(base).items()}
    load_trainable_state(base, state, "x")
    next(iter(state.values())).add_(1.0)
    assert not torch.equal(next(iter(trainable_state(base).values())), next(iter(state.values())))


def test_load_trainable_state_refuses_a_missing_tensor_by_name(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    state = trainable_state(base)
    lost = "unet.conv_in.weight"
    del state[lost]
    with pytest.raises(UserError, match=f"^runs/x/best.safetensors must hold exactly .* the first {lost}"):
        load_trainable_state(base, state, "runs/x/best.safetensors")


def test_load_trainable_state_refuses_a_tensor_that_it_does_not_know(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    with pytest.raises(UserError, match="1 that differ, the first unet.odd"):
        load_trainable_state(base, trainable_state(base) | {"unet.odd": torch.zeros(1)}, "x")


def test_load_trainable_state_refuses_another_shape_by_name_and_changes_nothing(fresh_base: StableDiffusionModel) -> None:
    base = attached(fresh_base, False, False)
    before = snapshot(base)
    state = {name: tensor + 1 for name, tensor in trainable_state(base).items()}
    state["unet.conv_in.bias"] = state["unet.conv_in.bias"][:1]  # broadcasting would let it through
    with pytest.raises(UserError, match="1 that differ, the first unet.conv_in.bias"):
        load_trainable_state(base, state, "x")
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_load_trainable_state_refuses_the_tensors_of_another_variant(fresh_base: StableDiffusionModel, tiny_folder: Callable[..., Path]) -> None:
    other = attached(StableDiffusion(path=str(tiny_folder())).load(), False, True)
    with pytest.raises(UserError, match="must hold exactly the tensors"):
        load_trainable_state(attached(fresh_base, False, False), trainable_state(other), "x")


def test_full_trains_a_base_of_the_second_family(tiny_folder: Callable[..., Path]) -> None:
    base = StableDiffusion(path=str(tiny_folder("sd2", "v_prediction"))).load()
    before = output(base)
    assert torch.equal(output(attached(base)), before)
    train_a_little(base, 1)
    assert not torch.equal(output(base), before)


# LoRA


def test_lora_update_is_alpha_over_rank_times_the_product_of_its_matrices(fresh_base: StableDiffusionModel) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = fresh_base.unet.get_submodule(name).weight.clone()
    method = Lora(rank=2, alpha=6.0, train_text_encoder=False, train_token=False)
    method.attach(fresh_base, "sks")
    layer = fresh_base.unet.get_submodule(name)
    a, b = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    method.merge(fresh_base)
    torch.testing.assert_close(fresh_base.unet.get_submodule(name).weight, before + 6.0 / 2 * b @ a, atol=1e-5, rtol=1e-5)


def test_lora_without_an_alpha_has_scale_one(fresh_base: StableDiffusionModel) -> None:
    Lora(rank=8).attach(fresh_base, "sks")
    assert {place.layer.scaling["default"] for place in adapter_layers(fresh_base.unet)} == {1.0}


def test_lora_dropout_hides_its_share_of_the_input_in_training_and_none_after(fresh_base: StableDiffusionModel) -> None:
    Lora(rank=2, dropout=0.25).attach(fresh_base, "sks")
    dropouts = [place.layer.lora_dropout["default"] for place in adapter_layers(fresh_base.unet)]
    torch.manual_seed(0)
    assert (dropouts[0].train()(torch.ones(20000)) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (dropouts[0].eval()(torch.ones(100)) == 1).all()
    assert {dropout.p for dropout in dropouts} == {0.25}


def test_lora_gaussian_start_has_the_deviation_that_is_said(fresh_base: StableDiffusionModel) -> None:
    Lora(rank=8, init="gaussian").attach(fresh_base, "sks")
    start = torch.cat([place.layer.lora_A["default"].weight.flatten() for place in adapter_layers(fresh_base.unet)])
    assert start.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_lora_start_depends_on_the_seed_alone(tiny_folder: Callable[..., Path]) -> None:
    starts = []
    for seed in (3, 3, 4):
        base = StableDiffusion(path=str(tiny_folder())).load()
        torch.rand(len(starts) + 1)  # another state of torch's own generator each time
        Lora(rank=2, train_text_encoder=True).attach(base, "sks", seed=seed)
        starts.append({name: tensor.clone() for name, tensor in trainable_state(base).items()})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    different = {name for name in starts[0] if not torch.equal(starts[0][name], starts[2][name])}
    assert different == {name for name in starts[0] if ".lora_A." in name}


def test_lora_attach_leaves_torchs_generator_alone(fresh_base: StableDiffusionModel) -> None:
    before = torch.get_rng_state()
    Lora(rank=2, train_text_encoder=True).attach(fresh_base, "sks")
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_names_a_target_that_the_base_has_not(fresh_base: StableDiffusionModel) -> None:
    """peft passes over it in silence as long as another one fits."""
    with pytest.raises(ConfigError, match=r"method\.target_modules must be ends of layer names of the base, got 'to_qq'"):
        Lora(target_modules=["to_k", "to_qq"]).attach(fresh_base, "sks")


def test_lora_refuses_a_layer_of_a_kind_without_adapters(fresh_base: StableDiffusionModel) -> None:
    with pytest.raises(ConfigError, match=r"method\.target_modules must be linear layers or convolutions"):
        Lora(target_modules=["to_q", "norm1"]).attach(fresh_base, "sks")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Lora, {"rank": 0}),
        (Lora, {"alpha": 0.0}),
        (Lora, {"alpha": float("nan")}),
        (Lora, {"dropout": 1.0}),
        (Lora, {"init": "zeros"}),
        (Lora, {"target_modules": []}),
        (Lora, {"text_encoder_stop_step": 0}),
        (Full, {"text_encoder_stop_step": 0}),
        (TextualInversion, {"num_vectors": 0}),
        (TextualInversion, {"num_vectors": 2, "new_token": False}),
        (TextualInversion, {"init_word": " "}),
        (PivotalTuning, {"inversion_steps": 0}),
        (PivotalTuning, {"then": "lokr"}),
        (PivotalTuning, {"lora": Lora(train_token=True)}),
    ],
)
def test_method_refuses_a_setting_that_cannot_work(kind: type[Method], settings: dict) -> None:
    with pytest.raises(ConfigError, match="^method\\."):
        kind(**settings)


# Words


def test_textual_inversion_starts_from_the_class_noun(fresh_base: StableDiffusionModel) -> None:
    (dog,) = fresh_base.token_id("dog")
    expected = fresh_base.text_encoder.get_input_embeddings().weight[dog].clone()
    TextualInversion(num_vectors=2).attach(fresh_base, "sks", "dog")
    rows = fresh_base.text_encoder.get_input_embeddings().rows
    assert torch.equal(rows, torch.stack([expected, expected]))


def test_textual_inversion_starts_from_the_mean_of_a_word_of_several_tokens(fresh_base: StableDiffusionModel) -> None:
    ids = fresh_base.token_id("qyx")
    table = fresh_base.text_encoder.get_input_embeddings().weight
    expected = (table[ids[0]] + table[ids[1]] + table[ids[2]]) / 3
    TextualInversion(init_word="qyx").attach(fresh_base, "sks", "dog")
    torch.testing.assert_close(fresh_base.text_encoder.get_input_embeddings().rows[0], expected)


@pytest.mark.parametrize(
    ("identifier", "vectors", "asked", "is_new"), [("sks", 1, None, False), ("sks", 2, None, True), ("qyx", 1, None, True), ("qyx", 1, False, False)]
)
def test_textual_inversion_adds_a_token_where_one_is_needed(
    fresh_base: StableDiffusionModel, identifier: str, vectors: int, asked: bool | None, is_new: bool
) -> None:
    before = len(fresh_base.tokenizer)
    TextualInversion(num_vectors=vectors, new_token=asked).attach(fresh_base, identifier, "dog")
    assert len(fresh_base.tokenizer) - before == (vectors if is_new else 0)
    assert len(fresh_base.text_encoder.get_input_embeddings().weight) == len(fresh_base.tokenizer)


def test_textual_inversion_puts_all_vectors_where_the_prompt_says_the_word(fresh_base: StableDiffusionModel) -> None:
    plain = fresh_base.tokenize(["a photo of a dog"])[0].tolist()
    TextualInversion(num_vectors=3).attach(fresh_base, "<toto>", "dog")
    first = len(fresh_base.tokenizer) - 3
    found = fresh_base.tokenize(["a photo of a <toto> dog"])[0].tolist()
    assert found[:9] == plain[:5] + [first, first + 1, first + 2] + plain[5:6]


def test_textual_inversion_does_not_find_the_word_inside_another(fresh_base: StableDiffusionModel) -> None:
    before = fresh_base.tokenize(["a dog with masks"])
    TextualInversion(new_token=True).attach(fresh_base, "sks", "dog")
    assert torch.equal(fresh_base.tokenize(["a dog with masks"]), before)


def test_textual_inversion_refuses_a_name_that_is_an_entry_of_the_tokenizer(fresh_base: StableDiffusionModel) -> None:
    with pytest.raises(ConfigError, match="subject.identifier must be a name that the tokenizer does not know.*got 's'; choose another, as <s>"):
        TextualInversion(new_token=True).attach(fresh_base, "s", "dog")


def test_textual_inversion_without_a_word_to_start_from_says_so(fresh_base: StableDiffusionModel) -> None:
    with pytest.raises(ConfigError, match="method.init_word must be set"):
        TextualInversion().attach(fresh_base, "sks")


def test_textual_inversion_leaves_every_prompt_without_the_word_alone(fresh_base: StableDiffusionModel) -> None:
    with torch.no_grad():
        before = fresh_base.encode_prompts(["a photo of a dog", "a red hat"])
        TextualInversion(num_vectors=2).attach(fresh_base, "sks", "dog")
        fresh_base.text_encoder.get_input_embeddings().rows += 1.0
        assert torch.equal(fresh_base.encode_prompts(["a photo of a dog", "a red hat"]), before)


# What all share


def test_keys_and_values_are_those_of_the_attention_to_the_text(fresh_base: StableDiffusionModel) -> None:
    """A layer that sees the text has as many inputs as the text is wide; of each there are one for the keys and one for the values."""
    groups = CrossAttentionKV(train_token=False).attach(fresh_base, "sks")
    width, layers = fresh_base.unet.config.cross_attention_dim, [m for n, m in fresh_base.unet.named_modules() if n.endswith("attn2")]
    assert len(groups[0].parameters) == 2 * len(layers) and {p.shape[1] for p in groups[0].parameters} == {width}


def test_let_learn_opens_and_closes_groups_by_the_step() -> None:
    always, early, late = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [ParamGroup("unet", [always]), ParamGroup("token", [early], stop=2), ParamGroup("text_encoder", [late], start=2)]
    early.grad = torch.ones(1)
    for step, expected in ((1, [True, True, False]), (2, [True, False, True]), (3, [True, False, True])):
        let_learn(groups, step)
        assert [p.requires_grad for p in (always, early, late)] == expected
    assert early.grad is None


def test_describe_learning_says_parts_sizes_and_steps() -> None:
    groups = [ParamGroup("unet", [nn.Parameter(torch.ones(1200))], start=5), ParamGroup("token", [nn.Parameter(torch.ones(3))], stop=5)]
    assert describe_learning(Lora(), groups) == "method lora: parameters that learn: unet 1,200 from step 5, token 3 until step 5"


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_training_option_that_saves_memory_or_time_changes_no_name_and_no_gradient(make_config: Callable[..., Config], option: str) -> None:
    from dreambooth.module import DreamBoothModule

    found = []
    for on in (False, True):
        config = make_config(
            {"method.name": "lora", "method.train_text_encoder": True, "method.rank": 2, f"trainer.{option}": on, "prior.name": "none"}
        )
        base = config.base.load()
        groups = config.method.attach(base, "sks", "dog", 0)
        with torch.no_grad():
            for tensor in trainable_state(base).values():
                tensor += 0.1
        module = DreamBoothModule(config, base, groups)
        module.on_train_start()
        with torch.compiler.set_stance("force_eager"):  # compiling itself takes a minute
            base.predict(NOISY, T, base.encode_prompts(PROMPTS)).pow(2).mean().backward()
        found.append((module, {name: p.grad for name, p in base.named_parameters() if p.requires_grad}))
    (plain, expected), (other, gradients) = found
    assert list(plain.state_dict()) == list(other.state_dict())
    assert gradients.keys() == expected.keys() and all(torch.allclose(gradients[n], expected[n], atol=1e-6) for n in expected)
    unet, text = other.base.unet, other.base.text_encoder
    assert unet.is_gradient_checkpointing == text.is_activation_checkpointing == (option == "gradient_checkpointing")
    assert (unet._compiled_call_impl is not None) == (option == "compile")


# Recipes


@pytest.mark.parametrize("name", ["lora", "cross_attention_kv", "textual_inversion", "pivotal_tuning"])
def test_recipe_of_a_method_stands_above_that_of_the_base_and_below_the_user(make_config: Callable[..., Config], name: str) -> None:
    config = make_config({"method.name": name})
    for dotted, value in STABLE_DIFFUSION_METHODS[config.method.recipe_name].items():
        assert attrgetter(dotted)(config) == value
    assert make_config({"method.name": name, "optim.learning_rate": 0.125, "trainer.max_steps": 12}).optim.learning_rate == 0.125


def test_recipes_of_methods_name_settings_that_exist(make_config: Callable[..., Config]) -> None:
    for name, recipe in [*LAB_METHODS.items(), *STABLE_DIFFUSION_METHODS.items()]:
        config = make_config({"method.name": name.removesuffix("_lora").removesuffix("_full")})
        for dotted in recipe:
            attrgetter(dotted)(config)  # AttributeError: no such setting


def test_pivotal_tuning_gives_the_word_half_of_the_steps(make_config: Callable[..., Config]) -> None:
    assert make_config({"method.name": "pivotal_tuning", "trainer.max_steps": 30}).method.inversion_steps == 15


def test_pivotal_tuning_refuses_an_inversion_that_leaves_no_step(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"method.inversion_steps must be below trainer.max_steps \(30\), so that lora learns too, got 30"):
        make_config({"method.name": "pivotal_tuning", "trainer.max_steps": 30, "method.inversion_steps": 30})


def test_pivotal_tuning_full_keeps_the_rate_of_full_tuning(make_config: Callable[..., Config]) -> None:
    full, pivotal = make_config({"method.name": "full"}), make_config({"method.name": "pivotal_tuning", "method.then": "full"})
    assert pivotal.optim.learning_rate == full.optim.learning_rate


def test_method_with_methods_inside_goes_through_the_plain_form(make_config: Callable[..., Config]) -> None:
    settings = {"method.name": "pivotal_tuning", "method.lora.rank": 7, "method.inversion.num_vectors": 2}
    config = make_config(settings)
    again = from_plain(to_plain(config))
    assert again.method == config.method and (again.method.lora.rank, again.method.inversion.num_vectors) == (7, 2)
