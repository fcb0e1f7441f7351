"""Pretraining at a toy size: the whole chain makes a folder that stock tools load, and a killed stage continues bit for bit."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dreambooth.base.stable_diffusion import StableDiffusion
from dreambooth.errors import UserError
from dreambooth.lab import measures, quality
from dreambooth.lab.pretrain import Pretraining, main
from dreambooth.lab.pretraining import card, training
from dreambooth.lab.pretraining.autoencoder import AutoencoderJob, new_autoencoder, standardize_latents
from dreambooth.lab.pretraining.data import BLOCK, Renders, draw_picture, held_out, render_stream
from dreambooth.lab.pretraining.optimizers import Muon, average_into, learning_rate_factor, make_optimizers, orthogonalize
from dreambooth.lab.pretraining.recipes import parse_changes
from dreambooth.lab.pretraining.scoring import swap_word
from dreambooth.lab.pretraining.tokenizer import MAX_TOKENS, build_tokenizer, merge_rules
from dreambooth.lab.pretraining.training import Budget, Training
from dreambooth.lab.scorers import LabScorers, Layout
from dreambooth.lab.splits import RARE_TOKENS, TRAINED_CLASSES, TRAINED_CONTEXTS, draw_training_item, vocabulary
from dreambooth.metrics.pixels import blur

TOY_LAYOUT = Layout(image_side=64, features=16, stem=8, blocks=((8, 2), (16, 2), (16, 2)), text_width=32, text_layers=1, text_heads=2)
TOY = {
    "vae": {"batch_size": 4, "widths": [8, 8, 16]},
    "decoder": {"batch_size": 4, "widths": [8, 8, 16]},
    "identity": {"batch_size": 8},
    "captions": {"batch_size": 8},
    "base": {"batch_size": 4, "widths": [32, 32, 32]},
}
CPU = torch.device("cpu")


def toy(output: Path, images: int = 24) -> Pretraining:
    return Pretraining(
        output, CPU, renders=64, images=images, subjects=2, shard=32, layout=TOY_LAYOUT, changes=TOY, quality_seeds=1, is_one_stage=True
    )


@pytest.fixture(scope="module")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 64 renders of the stream and the tokenizer, made once."""
    folder = tmp_path_factory.mktemp("pretrain")
    toy(folder).run("data")
    toy(folder).run("tokenizer")
    return folder


@pytest.fixture(scope="module")
def small_world() -> pytest.MonkeyPatch:
    """Three classes in three places, where a test draws or renders every one in every other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("dreambooth.lab.pretrain", "dreambooth.lab.pretraining.card"):
            patch.setattr(f"{module}.TRAINED_CLASSES", ("robot", "teapot", "car"))
            patch.setattr(f"{module}.TRAINED_CONTEXTS", TRAINED_CONTEXTS[:3])
        yield patch


@pytest.fixture(scope="module")
def finished(renders: Path, small_world: pytest.MonkeyPatch) -> Path:
    """The toy folder after all stages."""
    for stage in ("vae", "scorers", "base", "card"):
        toy(renders).run(stage)
    return renders


def test_pretrain_makes_a_folder_that_a_stock_pipeline_loads(finished: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "base", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a sks robot in the snow", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def test_decoder_stage_changes_the_pictures_and_keeps_the_latents(finished: Path) -> None:
    """The base and its latents rest on the encoding half: it stays what it is to the bit, and so does its digest."""
    from diffusers import AutoencoderKL

    run = toy(finished)
    before, digest = AutoencoderKL.from_pretrained(finished / "work" / "vae"), run.vae_digest
    run.run("decoder")
    after = AutoencoderKL.from_pretrained(finished / "work" / "vae")
    pictures = run.judged.pixels
    assert torch.equal(before.encode(pictures).latent_dist.parameters, after.encode(pictures).latent_dist.parameters)
    latents = before.encode(pictures).latent_dist.mean
    assert not torch.equal(before.decode(latents).sample, after.decode(latents).sample)
    assert toy(finished).vae_digest == digest


def test_pretrain_makes_a_base_of_the_lab(finished: Path) -> None:
    choice = StableDiffusion(path=str(finished / "base"))
    assert choice.is_lab() and choice.load().prediction_type == "sample"


def test_pretrain_makes_scorers_that_load_with_their_own_layout(finished: Path) -> None:
    scorers = LabScorers.load(finished / "scorers")
    assert scorers.layout == TOY_LAYOUT
    assert scorers.image(torch.zeros(2, 3, 64, 64)).shape == scorers.text(["a robot", "a sks car"]).shape == (2, 16)


def test_scorers_refuse_a_config_that_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_side": 64}')
    with pytest.raises(UserError, match="config.json must hold the layout of the lab's scorers"):
        LabScorers.load(tmp_path)


def test_pretrain_writes_a_card_with_the_figures(finished: Path) -> None:
    text = (finished / "README.md").read_text(encoding="utf-8")
    measured = json.loads((finished / "work" / "quality" / "quality.json").read_text(encoding="utf-8"))
    assert f"{measured['figures']['codec_psnr_db']['mean']:.3f}" in text
    assert all(title in text for title in quality.TITLES.values())
    assert "| base | 24 | 6 |" in text and "not finished" not in text


def test_quality_gives_every_figure_and_the_blurred_control_fails(finished: Path) -> None:
    figures = json.loads((finished / "work" / "quality" / "quality.json").read_text(encoding="utf-8"))["figures"]
    assert set(figures) == set(quality.TITLES)
    assert all(math.isfinite(figure["mean"]) for figure in figures.values())
    assert figures["sharpness_ratio_blurred"]["mean"] < 0.7 < figures["sharpness_ratio_real"]["mean"]
    assert figures["detail_distance_blurred"]["mean"] > 5 * abs(figures["detail_distance_real"]["mean"])
    assert (finished / "work" / "quality" / "quality.png").is_file()


def test_pretrain_continues_a_killed_stage_bit_for_bit(renders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two saves loses the steps since the last one and nothing else."""
    whole, torn = trainer(renders, tmp_path / "whole"), trainer(renders, tmp_path / "torn")
    whole.run()
    steps = 0

    def die(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal steps
        steps += 1
        if steps > 4:
            raise KeyboardInterrupt
        torn.save()
        return AutoencoderJob.loss(torn.job, step)

    monkeypatch.setattr(torn.job, "loss", die)
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    again = trainer(renders, tmp_path / "torn")
    assert again.step == 3
    again.run()
    for name in ("networks", "averages"):
        one, other = (torch.load(part.state_file, weights_only=True)[name]["vae"] for part in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def trainer(renders: Path, work: Path, steps: int = 6) -> Training:
    run = toy(renders)
    job = AutoencoderJob(run.recipe("vae"), run.stream, held_out(["robot"], TRAINED_CONTEXTS, 1, 2), replace_folder(run, work))
    return Training(job, Budget(images=4 * steps), job.place, lambda line: None)


def replace_folder(run: Pretraining, work: Path) -> training.Place:
    return run.place._replace(folder=work)


def test_pretrain_says_that_a_finished_stage_is_done(renders: Path, tmp_path: Path) -> None:
    trainer(renders, tmp_path, steps=2).run()
    said: list[str] = []
    again = trainer(renders, tmp_path, steps=2)
    again.say = said.append
    again.run()
    assert len(said) == 1 and said[0].endswith("done already")


def test_pretrain_leaves_a_finished_autoencoder_to_the_byte(finished: Path) -> None:
    """Writing it again would make the states of base and scorers those of another autoencoder."""
    file = finished / "work" / "vae" / "diffusion_pytorch_model.safetensors"
    before = file.stat().st_mtime_ns
    toy(finished).run("vae")
    assert file.stat().st_mtime_ns == before


def test_pretrain_refuses_a_state_of_another_recipe(renders: Path, tmp_path: Path) -> None:
    trainer(renders, tmp_path, steps=1).run()
    other = replace(toy(renders), seed=1)
    with pytest.raises(UserError, match="vae.state must belong to the recipe that is asked for"):
        Training(
            AutoencoderJob(other.recipe("vae"), other.stream, None, replace_folder(other, tmp_path)),
            Budget(images=4),
            replace_folder(other, tmp_path),
            print,
        )


def test_pretrain_plans_a_budget_in_minutes_from_the_speed(renders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SETTLING_STEPS", 2)
    part = trainer(renders, tmp_path)
    part.budget, part.total = Budget(minutes=2 / 60), None
    part.run()
    assert part.step == part.total and 0.5 < part.spent_s < 6


@pytest.mark.parametrize("stage", ["vae", "identity", "captions", "base"])
def test_pretrain_losses_fall_on_a_few_pictures(finished: Path, stage: str) -> None:
    run = toy(finished)
    run.renders = 32
    part = Training(job(run, stage, finished), Budget(images=10**6), run.place._replace(folder=finished / "overfit"), print)
    part.total = 40
    losses = [float(part._advance()["loss"]) for _ in range(24)]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:4])


def job(run: Pretraining, stage: str, folder: Path) -> training.Job:
    from dreambooth.lab.pretraining.denoiser import DenoiserJob, Latents
    from dreambooth.lab.pretraining.scoring import CaptionJob, IdentityJob

    if stage == "vae":
        return AutoencoderJob(run.recipe("vae"), run.stream, run.judged, run.place)
    if stage == "identity":
        return IdentityJob(run.recipe("identity"), run.layout, run.stream, run.judged, run.vae, run.place)
    if stage == "captions":
        return CaptionJob(run.recipe("captions"), run.layout, run.tokenizer, run.stream, run.judged, run.vae, run.place)
    latents = Latents(folder / "work" / "few_latents.npy", run.vae, run.stream, torch.arange(len(run.stream)), print)
    return DenoiserJob(run.recipe("base"), run.tokenizer, run.text_encoder, run.vae, run.stream, latents, ["a robot"], run.place)


def test_rendering_continues_where_it_stopped(tmp_path: Path) -> None:
    said: list[str] = []
    render_stream(tmp_path, 8, 2, said.append, shard=4)
    (tmp_path / "00001.npy").unlink()
    before = (tmp_path / "00000.npy").stat().st_mtime_ns
    render_stream(tmp_path, 8, 1, said.append, shard=4)
    assert (tmp_path / "00000.npy").stat().st_mtime_ns == before
    assert len(Renders(tmp_path, CPU)) == 8 and said[-2].startswith("data: 4 pictures to render")


def test_rendering_refuses_a_folder_of_another_world(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"world": 0}')
    with pytest.raises(UserError, match="plan.json must belong to world"):
        render_stream(tmp_path, 4, 1, print, shard=4)


def test_second_views_show_the_same_subject_elsewhere_without_accessory() -> None:
    for block in range(40):
        first, second = draw_picture(BLOCK * block), draw_picture(BLOCK * block + BLOCK - 1)
        assert replace(first.subject, accessory=None) == second.subject
        assert first.context != second.context and first.seed != second.seed
        assert first.context not in second.caption and (first.context in first.caption) == (second.context in second.caption)


def test_tokenizer_gives_one_token_to_every_word() -> None:
    tokenizer = build_tokenizer(vocabulary())
    assert [word for word in (*vocabulary(), *RARE_TOKENS) if len(tokenizer(word, add_special_tokens=False).input_ids) != 1] == []


def test_tokenizer_survives_the_disk_with_stock_names(renders: Path) -> None:
    from transformers import AutoTokenizer, CLIPTokenizer

    words = "a photo of a sks robot wearing a hat, in the snow: ünicorn 7"
    ids = build_tokenizer(vocabulary())(words, padding="max_length").input_ids
    folder = renders / "work" / "tokenizer"
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    for kind in (AutoTokenizer, CLIPTokenizer):
        loaded = kind.from_pretrained(folder)
        assert loaded(words, padding="max_length").input_ids == ids and loaded.model_max_length == MAX_TOKENS


def test_no_caption_holds_a_rare_token_or_is_cut() -> None:
    tokenizer = build_tokenizer(vocabulary())
    captions = {draw_training_item(index).caption for index in range(1500)}
    assert not {word for words in captions for word in words.split()} & set(RARE_TOKENS)
    assert max(len(tokenizer(words).input_ids) for words in captions) < MAX_TOKENS


def test_merge_rules_by_hand() -> None:
    assert merge_rules(["at", "hat"]) == [("a", "t</w>"), ("h", "at</w>")]


def test_standardized_latents_have_mean_zero_and_decode_the_same(renders: Path) -> None:
    torch.manual_seed(0)
    vae = new_autoencoder((8, 16, 16), 4, 8)
    stream = Renders(renders / "work" / "data", CPU)
    pictures = stream.pixels(torch.arange(len(stream)))
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        standardize_latents(vae, stream)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
    mean, variance = (values.transpose(0, 1).flatten(1) for values in (after.mean, after.var))
    assert torch.allclose(mean.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(mean.var(1) + variance.mean(1), torch.ones(4), atol=1e-3)
    assert torch.allclose(after.std / before.std, (after.std / before.std)[:1, :, :1, :1].expand_as(after.std), rtol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_muon_agrees_with_torch_on_a_matrix(decay: float) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 40), torch.randn(3, 24, 40)
    own, stock = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [Muon([own], lr=0.02, weight_decay=decay), torch.optim.Muon([stock], lr=0.02, weight_decay=decay)]
    for gradient in gradients:
        for weight, optimizer in zip((own, stock), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(own, stock, atol=2e-3) and not torch.allclose(own, start, atol=2e-2)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))))
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("shape", [(2, 24, 216), (1, 16, 32), (1, 216, 24)])
def test_orthogonalize_by_the_gram_matrix_is_the_iteration_itself(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, shape[1])[:, None]
    x = (matrix / matrix.norm(dim=(1, 2), keepdim=True)).double()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
    assert torch.allclose(orthogonalize(matrix).double(), x, atol=2e-5)


def test_base_learns_from_its_own_classes_and_places_alone(finished: Path, tmp_path: Path) -> None:
    """Latents and captions of a choice of pictures are those of the pictures themselves."""
    from dreambooth.lab.pretraining.denoiser import DenoiserJob, Latents
    from dreambooth.lab.pretraining.tokenizer import token_ids

    run = toy(finished)
    numbers = run.stream.showing(TRAINED_CLASSES[:5], TRAINED_CONTEXTS[:6])
    rows = [run.stream.rows[number] for number in numbers.tolist()]
    assert 0 < len(rows) < len(run.stream)
    assert {row.class_noun for row in rows} <= set(TRAINED_CLASSES[:5]) and {row.context for row in rows} <= set(TRAINED_CONTEXTS[:6])
    latents = Latents(tmp_path / "latents.npy", run.vae, run.stream, numbers, print)
    job = DenoiserJob(run.recipe("base"), run.tokenizer, run.text_encoder, run.vae, run.stream, latents, ["a robot"], run.place)
    one = torch.tensor([len(rows) - 1])
    picture = run.stream.pixels(numbers[one])
    expected = run.vae.encode(picture).latent_dist.mean
    assert torch.allclose(latents.sample(one, torch.zeros_like(expected)), expected, atol=5e-3)
    assert torch.equal(job.tokens[-1], token_ids(run.tokenizer, [rows[-1].caption])[0])


def test_shut_gates_are_seen(finished: Path) -> None:
    """A feed-forward layer whose gates let nothing through is told apart from one that works, by its name."""
    from dreambooth.lab.pretraining.denoiser import watched_gates

    model = StableDiffusion(path=str(finished / "base")).load()
    layers = {name: layer for name, layer in model.unet.named_modules() if name.endswith("ff.net.0")}
    shut, open_ = list(layers)[0], list(layers)[1]
    with torch.no_grad():
        layers[shut].proj.bias[len(layers[shut].proj.bias) // 2 :] = -100.0
        with watched_gates(model.unet) as shares:
            model.unet(torch.randn(1, *model.latent_shape()), torch.tensor([500]), torch.randn(1, 4, model.unet.config.cross_attention_dim))
    assert shares[f"{shut[:-1]}2"] == [0.0] and shares[f"{open_[:-1]}2"][0] > 0.5 and len(shares) == len(layers)
    assert not any(layer._forward_hooks for layer in model.unet.modules())


def test_base_goes_on_from_another_as_it_draws_and_with_open_gates(finished: Path, tmp_path: Path) -> None:
    """A dead feed-forward layer begins anew and lets its gradient through; until then the network answers what it answered."""
    from dreambooth.lab.pretraining.denoiser import new_unet, take_up, watched_gates

    trained = StableDiffusion(path=str(finished / "base")).load().unet
    dead, alive = [layer for name, layer in trained.named_modules() if name.endswith(".ff")][:2]
    with torch.no_grad():
        dead.net[0].proj.weight.zero_()
        dead.net[0].proj.bias[len(dead.net[0].proj.bias) // 2 :] = -100.0
    trained.save_pretrained(tmp_path)
    torch.manual_seed(0)
    unet = new_unet(tuple(trained.config.block_out_channels), trained.config.in_channels, trained.config.cross_attention_dim, 8, 16)
    take_up(unet, tmp_path)
    inputs = torch.randn(2, trained.config.in_channels, 16, 16), torch.tensor([500, 20]), torch.randn(2, 4, trained.config.cross_attention_dim)
    with watched_gates(unet) as shares:
        drawn = unet(*inputs).sample
    assert torch.allclose(drawn, trained(*inputs).sample, atol=1e-5)
    assert min(share for (share,) in shares.values()) > 0.5
    drawn.pow(2).mean().backward()
    revived, kept = [layer for name, layer in unet.named_modules() if name.endswith(".ff")][:2]
    assert revived.net[2].weight.grad.abs().max() > 0
    assert torch.equal(kept.net[0].proj.weight, alive.net[0].proj.weight) and torch.equal(kept.net[2].weight, alive.net[2].weight)


def test_base_goes_on_from_another_of_its_own_shape_alone(finished: Path, tmp_path: Path) -> None:
    from dreambooth.lab.pretraining.denoiser import new_unet, take_up

    with pytest.raises(UserError, match="--start must hold a UNet of the recipe's widths"):
        take_up(new_unet((32, 32, 64), 8, 32, 8, 16), finished / "base" / "unet")
    with pytest.raises(UserError, match="--start must be a finished folder"):
        replace(toy(tmp_path / "new"), start=tmp_path).run("base")


def test_further_training_takes_up_the_rest_of_the_folder_to_the_byte(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    shutil.copytree(finished / "work" / "data", tmp_path / "work" / "data")
    further = replace(toy(tmp_path), start=finished)
    further.run("base")
    for file in ("base/vae/diffusion_pytorch_model.safetensors", "base/tokenizer/vocab.json", "scorers/identity.safetensors", "scorers/config.json"):
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes(), file
    assert (tmp_path / "base" / "unet").is_dir() and "start" in json.loads((tmp_path / "work" / "base.json").read_text())["recipe"]
    assert card.read_stages(tmp_path)["base 1"] == card.read_stages(finished)["base"]  # what it began from stays known
    with pytest.raises(UserError, match="must belong to the recipe"):
        replace(further, start=None).run("base")


def test_rendering_can_begin_further_on(tmp_path: Path) -> None:
    render_stream(tmp_path / "all", 12, 1, print, shard=4)
    render_stream(tmp_path / "rest", 8, 1, print, shard=4, first=4)
    everything, rest = Renders(tmp_path / "all", CPU), Renders(tmp_path / "rest", CPU)
    assert rest.rows == everything.rows[4:]
    assert torch.equal(rest.pixels(torch.arange(8)), everything.pixels(torch.arange(4, 12)))
    with pytest.raises(UserError, match="from number 0 on"):
        render_stream(tmp_path / "rest", 8, 1, print, shard=4)


def test_base_has_the_text_encoder_of_the_scorers_to_the_bit(finished: Path) -> None:
    own = StableDiffusion(path=str(finished / "base")).load().text_encoder.state_dict()
    theirs = LabScorers.load(finished / "scorers").text_encoder.text_model.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("goes_on", [False, True])
def test_two_processes_train_the_base_as_one_does(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    """The same draws, shared out; gradients added up; updates of the matrices made by turns; from nothing and from a finished base."""
    monkeypatch.setattr("dreambooth.lab.pretrain.TRAINED_CLASSES", TRAINED_CLASSES)  # as the other process has them
    monkeypatch.setattr("dreambooth.lab.pretrain.TRAINED_CONTEXTS", TRAINED_CONTEXTS)
    states = []
    for processes in (1, 2):
        work = tmp_path / str(processes) / "work"
        for part in ("data",) if goes_on else ("data", "tokenizer", "vae"):
            shutil.copytree(finished / "work" / part, work / part)
        if not goes_on:
            shutil.copytree(finished / "scorers", work.parent / "scorers")
        replace(toy(work.parent, images=12), processes=processes, start=finished if goes_on else None).run("base")
        states.append(torch.load(work / "base.state", weights_only=True))
    one, two = (state["networks"]["unet"] for state in states)
    assert states[0]["step"] == states[1]["step"] == 3
    start = StableDiffusion(path=str(finished / "base")).load().unet.state_dict() if goes_on else untrained_unet(finished)
    moved = max(float((one[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3 and all(torch.allclose(one[name], two[name], atol=0.02 * moved) for name in one)


def untrained_unet(folder: Path) -> dict[str, Tensor]:
    """The base's weights before the first step."""
    return dict(job(toy(folder), "base", folder).networks["unet"].state_dict())


def test_processes_must_share_a_batch_evenly(finished: Path) -> None:
    with pytest.raises(UserError, match="--processes must divide the batch of 4, got 3"):
        replace(toy(finished), processes=3).run("base")


def test_muon_gets_hidden_matrices_only() -> None:
    network = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(16, 16, 3), "hidden": torch.nn.Conv2d(16, 16, 3), "norm": torch.nn.GroupNorm(4, 16)})
    network["ff"] = torch.nn.ModuleDict({"net": torch.nn.ModuleList([torch.nn.Linear(16, 64)])})  # gated layers are AdamW's
    adamw, muon = make_optimizers([network], 0.02, 1e-3, matrix_decay=0.1)
    assert muon.param_groups[0]["weight_decay"] == 0.1 and adamw.param_groups[0]["weight_decay"] == 0.0
    assert [weight.shape for weight in muon.param_groups[0]["params"]] == [(16, 16, 3, 3)]
    assert len(adamw.param_groups[0]["params"]) == 7


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 1000) for step in (0, 49, 99, 500, 750, 999)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.002])
    assert learning_rate_factor(9, None) == 0.1


def test_class_is_named_where_its_caption_beats_those_of_all_other_classes(finished: Path) -> None:
    run = toy(finished)
    captions = job(run, "captions", finished)
    own = torch.tensor([TRAINED_CLASSES.index(subject.class_noun) for subject in run.judged.subjects])
    axes = torch.eye(len(TRAINED_CLASSES))

    def text(tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(text_embeds=axes[(tokens[..., None] == captions.nouns).any(1).long().argmax(1)])

    assert captions._names_class(axes[own], text).tolist() == [1.0] * len(own)
    assert captions._names_class(axes[(own + 1) % len(axes)], text).tolist() == [0.0] * len(own)


def test_average_begins_as_a_copy() -> None:
    average = [torch.zeros(2)]
    average_into(average, [torch.ones(2)], 0)
    assert torch.equal(average[0], torch.ones(2))
    average_into(average, [torch.zeros(2)], 20)
    assert torch.allclose(average[0], torch.full((2,), 0.5))


def test_swapped_words_are_others_of_their_kind_and_nothing_else_changes() -> None:
    tokens, colors = torch.tensor([[1, 50, 3, 9], [1, 2, 3, 9], [51, 52, 3, 9]]), torch.tensor([50, 51, 52])
    swapped, has_color = swap_word(tokens, colors, torch.Generator().manual_seed(0))
    assert has_color.tolist() == [True, False, True]
    assert (swapped != tokens).sum(1).tolist() == [1, 0, 1]
    assert set(swapped[swapped != tokens].tolist()) <= set(colors.tolist())


def test_psnr_by_hand() -> None:
    pictures = torch.zeros(2, 3, 4, 4)
    decoded = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), -0.02)])
    assert measures.psnr(decoded, pictures).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)  # 10 log10(4 / 0.04), 10 log10(4 / 0.0004)


def test_kernel_distance_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert float(measures.kernel_distance(x, y)) == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 27) / 4)


def test_auc_by_hand() -> None:
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert measures.same_subject_auc(features, "aabb", "xxxx").tolist() == [1.0, 1.0]
    assert measures.same_subject_auc(features[[0, 2, 1, 3]], "aabb", "xxxx").tolist() == [0.0, 0.5]  # cosines 0 and 0.198 against 0.995, 0.0995
    assert torch.isnan(measures.same_subject_auc(features, "aabb", "xxyy")).all()


def test_retrieval_counts_equal_captions_as_right() -> None:
    images = torch.eye(2)
    assert measures.caption_retrieval(images, images.flip(0), ["p", "q"], 2).tolist() == [0.0, 0.0]
    assert measures.caption_retrieval(images, images.flip(0), ["p", "p"], 2).tolist() == [1.0, 1.0]


def test_noise_does_not_pass_for_sharpness() -> None:
    """A blurred picture with noise has the strength of the finest octave back, but not its sparseness."""
    real = held_out(["robot", "car"], TRAINED_CONTEXTS[:4], 4, 3).pixels
    noisy = blur(real, 1.0) + 0.08 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    reference = measures.detail(real)
    middle, scale = reference.mean(0), reference.std(0)
    distance = measures.kernel_distance((measures.detail(noisy) - middle) / scale, (reference - middle) / scale)
    assert float(distance) > 1.0


def test_weights_above_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.safetensors").write_bytes(b"0" * 100)
    monkeypatch.setattr(card, "LIMIT_BYTES", 99)
    with pytest.raises(UserError, match="must hold at most 0 MB of weights"):
        card.check_size(tmp_path)


def test_full_size_weights_stay_below_the_limit() -> None:
    from dreambooth.lab.pretraining.denoiser import new_unet
    from dreambooth.lab.pretraining.recipes import RECIPES, SCORER_LAYOUT
    from dreambooth.lab.scorers import ImageEncoder, new_text_encoder

    tokenizer, base, vae = build_tokenizer(vocabulary()), RECIPES["base"], RECIPES["vae"]
    with torch.device("meta"):
        networks = [new_autoencoder(tuple(vae["widths"]), vae["channels"], vae["groups"]), ImageEncoder(SCORER_LAYOUT), ImageEncoder(SCORER_LAYOUT)]
        networks += [new_text_encoder(SCORER_LAYOUT, tokenizer)] * 2  # the base has a copy
        networks += [new_unet(tuple(base["widths"]), vae["channels"], SCORER_LAYOUT.text_width, base["groups"], 16)]
    parameters = sum(weight.numel() for network in networks for weight in network.parameters())
    assert 2 * parameters < 0.99 * card.LIMIT_BYTES


def test_changes_of_the_recipe_are_parsed_and_checked() -> None:
    assert parse_changes(["base.batch_size=256", "vae.widths=[8,8]"]) == {"base": {"batch_size": 256}, "vae": {"widths": [8, 8]}}
    with pytest.raises(UserError, match="--set must name a setting of vae, decoder, identity, captions or base, got 'base.batch=1'"):
        parse_changes(["base.batch=1"])


def test_a_stage_before_its_turn_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--stage", "vae", "--device", "cpu", "--images", "4"]) == 1
    assert "must hold 79 files of renders, got 0; run the stage data first, or ask for fewer --renders" in capsys.readouterr().err


def test_quality_of_a_folder_that_is_not_the_labs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main([str(tmp_path)]) == 1
    assert "must hold base/lab.json, as dreambooth/lab/weights does" in capsys.readouterr().err
