"""`python -m dreambooth.lab.pretrain --output DIR`: the lab's weights from nothing, in stages; the same command continues after a kill.

What is shipped lies in DIR itself (base, scorers, README.md), everything else in DIR/work: renders, states, latents, the log and pictures.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dreambooth.errors import UserError
from dreambooth.files import sha256_of
from dreambooth.lab.pretraining.data import SHARD, HeldOut, Renders, held_out, render_stream
from dreambooth.lab.pretraining.recipes import (
    MINUTES,
    MINUTES_CPU,
    ON_CPU,
    RECIPES,
    RENDERS,
    RENDERS_CPU,
    SCORER_LAYOUT,
    SHARES,
    parse_changes,
)
from dreambooth.lab.pretraining.training import Budget, Place, Training
from dreambooth.lab.scorers import LabScorers, Layout
from dreambooth.lab.splits import TRAINED_CLASSES, TRAINED_CONTEXTS, vocabulary
from dreambooth.ranks import ALONE, Ranks, following, is_follower, together

STAGES = ("data", "tokenizer", "vae", "decoder", "scorers", "base", "card")
STAGES_AFTER_START = ("data", "base", "card")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
ENCODING = ("encoder.", "quant_conv.")  # names of the autoencoder's weights that decide what the latents are


@dataclass
class Pretraining:
    """One run of the command: where, how large, how long, and the stages as methods.

    Attributes:
        output: the folder of the weights.
        device: of the training.
        renders: pictures to render, and to draw from.
        images: how many pictures the training sees (see `budget`); None: as many as `minutes` allow.
        minutes: of all training stages together, or of the one that is asked for.
        workers: processes that render.
        seed: of weights and all draws.
        compiled: use torch.compile for autoencoder and UNet.
        is_one_stage: whether the budget belongs to one stage alone.
        quality_seeds, subjects: size of the measurement (see `quality`).
        shard: pictures in a file of renders.
        layout: shape of the scorers.
        changes: settings in place of RECIPES', by network.
        save_every_s: seconds that a kill may cost.
        say: gets each line for the user.
        start: a finished folder of these: its autoencoder, scorers and tokenizer stand in for those stages, and the base begins with its UNet.
        first_render: number of the first picture in the stream of renders: a base that is trained further learns more from pictures it has not seen.
        processes: that train the base together, each on its share of every batch: on a CPU several use its cores better than threads do.
        ranks: this process among them.
    """

    output: Path
    device: torch.device
    renders: int
    images: int | None = None
    minutes: float | None = None
    workers: int = 1
    seed: int = 0
    compiled: bool = False
    is_one_stage: bool = False
    quality_seeds: int = 8
    subjects: int = 12
    shard: int = SHARD
    layout: Layout = SCORER_LAYOUT
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    save_every_s: float = 45.0
    say: Callable[[str], None] = print
    processes: int = 1
    ranks: Ranks = ALONE
    start: Path | None = None
    first_render: int = 0

    @property
    def work(self) -> Path:
        """Where everything lies that is not shipped."""
        return self.output / "work"

    def recipe(self, name: str) -> dict[str, Any]:
        """Returns the settings of a network on this device, with the changes that were asked for and the size of the data."""
        on_cpu = {} if self.device.type == "cuda" else ON_CPU[name]
        rests_on = {} if name == "vae" else {"vae": self.vae_digest}
        if name == "base":
            rests_on["text_encoder"] = self.text_digest
        if name == "base" and self.start is not None:
            rests_on |= {"start": sha256_of([self.start / "base" / UNET_FILE]), "first_render": self.first_render}
        return {**RECIPES[name], **on_cpu, **self.changes.get(name, {}), "renders": len(self.stream), "seed": self.seed, **rests_on}

    def budget(self, name: str) -> Budget:
        """Returns how long a network is trained: its share of the budget, or all of it; the scorers' two share their stage's."""
        share = SHARES[name]
        if self.is_one_stage or self.start is not None:
            share = {"identity": 0.5, "captions": 0.5}.get(name, 1.0)
        if self.images is not None:
            return Budget(images=max(1, int(self.images * share)))
        return Budget(minutes=(self.minutes or MINUTES) * share)

    @property
    def place(self) -> Place:
        """Where the states lie, and on which device the training runs."""
        return Place(self.work, self.device, self.seed, self.save_every_s, compiled=self.compiled, ranks=self.ranks)

    @cached_property
    def stream(self) -> Renders:
        """The renders, as many as were asked for."""
        return Renders(self.work / "data", self.device, -(-self.renders // self.shard))

    @cached_property
    def judged(self) -> HeldOut:
        """A few held-out renders for the figures on the way."""
        return held_out(TRAINED_CLASSES, TRAINED_CONTEXTS, subjects=max(2, self.subjects // 3), views=2)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the stage of that name made."""
        from transformers import CLIPTokenizer

        folder = self.work / "tokenizer"
        if not folder.is_dir():
            raise UserError(str(folder), "must hold the tokenizer", next_step="run the stage tokenizer first")
        return CLIPTokenizer.from_pretrained(folder)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder that the stage of that name made, frozen."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(self.work / "vae", local_files_only=True)
        return vae.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @cached_property
    def vae_digest(self) -> str:
        """The first digits of the hash of the autoencoder's encoding half: latents and states of another one are of no use."""
        from safetensors import safe_open

        file = self.work / "vae" / "diffusion_pytorch_model.safetensors"
        if not file.is_file():
            raise UserError(str(file.parent), "must hold the autoencoder", next_step="run the stage vae to its end first")
        digest = hashlib.sha256()
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                if name.startswith(ENCODING):
                    digest.update(opened.get_tensor(name).numpy().tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def text_encoder(self) -> Any:
        """The text encoder of the text-image scorer that the stage of that name made, frozen."""
        return LabScorers.load(self.output / "scorers").to(self.device).text_encoder.text_model

    @cached_property
    def text_digest(self) -> str:
        """The first digits of the hash of the text encoder's file: states of a UNet for another one are of no use."""
        file = self.output / "scorers" / "text.safetensors"
        if not file.is_file():
            raise UserError(str(file.parent), "must hold the scorers", next_step="run the stage scorers to its end first")
        return sha256_of([file])

    def run(self, stage: str) -> None:
        """Does one stage, or all of them in order."""
        self.adopt()
        stages = STAGES if self.start is None else STAGES_AFTER_START
        for name in stages if stage == "all" else [stage]:
            getattr(self, f"stage_{name}")()

    def adopt(self) -> None:
        """Takes tokenizer, autoencoder and scorers from the folder to start from, each where there is none yet, and how they were trained."""
        from dreambooth.lab.pretraining.card import adopt_stages

        if self.start is None:
            return
        if not (self.start / "base" / UNET_FILE).is_file():
            raise UserError("--start", f"must be a finished folder with base/{UNET_FILE}", str(self.start), "name one that this command made")
        for taken, place in (("base/tokenizer", self.work), ("base/vae", self.work), ("scorers", self.output)):
            target = place / Path(taken).name
            if not target.is_dir():
                unfinished = target.with_name(f".{target.name}.tmp")
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(self.start / taken, unfinished)
                unfinished.rename(target)
        adopt_stages(self.output, self.start)

    def stage_data(self) -> None:
        """Renders the training stream."""
        render_stream(self.work / "data", self.renders, self.workers, self.say, self.shard, self.first_render)

    def stage_tokenizer(self) -> None:
        """Builds the tokenizer from the world's words."""
        from dreambooth.lab.pretraining.tokenizer import build_tokenizer, save_tokenizer

        tokenizer = build_tokenizer(vocabulary())
        save_tokenizer(tokenizer, self.work / "tokenizer")
        self.say(f"tokenizer: {len(vocabulary())} words, {len(tokenizer)} tokens, at most {tokenizer.model_max_length} a prompt")

    def stage_vae(self) -> None:
        """Trains the autoencoder and brings its latents to mean 0 and deviation 1."""
        from dreambooth.lab.pretraining.autoencoder import AutoencoderJob, standardize_latents

        job = AutoencoderJob(self.recipe("vae"), self.stream, self.judged, self.place)
        training, folder = Training(job, self.budget("vae"), self.place, self.say), self.work / "vae"
        if not training.is_done:
            shutil.rmtree(folder, ignore_errors=True)
        vae = training.run()["vae"]
        if not folder.is_dir():  # one that is there stays as it is, to the byte: what comes after rests on it
            standardize_latents(vae, self.stream)
            self._write_vae(vae)

    def stage_decoder(self) -> None:
        """Trains the decoding half of the autoencoder further; its latents stay as they are."""
        from dreambooth.lab.pretraining.autoencoder import DecoderJob

        job = DecoderJob(self.recipe("decoder"), self.vae, self.stream, self.judged, self.place)
        self._write_vae(Training(job, self.budget("decoder"), self.place, self.say).run()["vae"])
        self.__dict__.pop("vae", None)  # whoever asks for it next gets the new one

    def _write_vae(self, vae: Any) -> None:
        """Writes the autoencoder in place of the one that is there."""
        unfinished = self.work / ".vae.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        vae.save_pretrained(unfinished)
        shutil.rmtree(self.work / "vae", ignore_errors=True)
        unfinished.rename(self.work / "vae")

    def stage_scorers(self) -> None:
        """Trains the identity encoder, then the image and text encoders, and writes them."""
        from dreambooth.lab.pretraining.card import write_scorers
        from dreambooth.lab.pretraining.scoring import CaptionJob, IdentityJob

        identity = IdentityJob(self.recipe("identity"), self.layout, self.stream, self.judged, self.vae, self.place)
        networks = Training(identity, self.budget("identity"), self.place, self.say).run()
        captions = CaptionJob(self.recipe("captions"), self.layout, self.tokenizer, self.stream, self.judged, self.vae, self.place)
        networks |= Training(captions, self.budget("captions"), self.place, self.say).run()
        write_scorers(self.output / "scorers", networks, self.layout, self.tokenizer)
        self.say(f"scorers: wrote {self.output / 'scorers'}")

    def stage_base(self) -> None:
        """Trains the UNet, and writes the diffusers folder."""
        from dreambooth.lab.pretraining.card import check_size, write_base
        from dreambooth.lab.pretraining.denoiser import DenoiserJob, Latents

        recipe = self.recipe("base")
        classes, contexts = TRAINED_CLASSES[: recipe["classes"]], TRAINED_CONTEXTS[: recipe["contexts"]]
        numbers = self.stream.showing(classes, contexts)
        self.say(f"base: latents of {len(numbers)} pictures of {len(classes)} classes in {len(contexts)} places")
        latents = Latents(self.work / f"latents-{self.vae_digest}.npy", self.vae, self.stream, numbers, self.say)
        unet = None if self.start is None else self.start / "base" / "unet"
        shown = [f"a photo of a {noun} {context}" for noun in classes[:6] for context in contexts[:6]]
        if recipe["batch_size"] % self.processes:
            raise UserError("--processes", f"must divide the batch of {recipe['batch_size']}", self.processes, "choose 2 or 4")

        def train(place: Place) -> dict[str, Any]:
            job = DenoiserJob(recipe, self.tokenizer, self.text_encoder, self.vae, self.stream, latents, shown, place, unet)
            return Training(job, self.budget("base"), place, self.say).run()

        if not self.ranks.is_first:
            train(self.place)
            return
        with together(self.processes, self.device.type, ["-m", "dreambooth.lab.pretrain"], self._task()) as own:
            networks = train(self.place._replace(ranks=own))
        write_base(self.output / "base", networks["unet"], self.text_encoder, self.vae, self.tokenizer, classes, contexts)
        self.say(f"base: wrote {self.output / 'base'}; {check_size(self.output) / 1e6:.1f} MB of weights in all")

    def _task(self) -> dict[str, Any]:
        """Returns what a further process needs to know to train the base with this one, as plain values."""
        own = {"renders": self.renders, "images": self.images, "minutes": self.minutes, "seed": self.seed, "shard": self.shard}
        own |= {"first_render": self.first_render}
        own |= {"is_one_stage": self.is_one_stage, "changes": self.changes, "processes": self.processes, "compiled": self.compiled}
        return {"pretraining": own, "output": str(self.output.resolve()), "start": self.start and str(self.start.resolve())}

    def stage_card(self) -> None:
        """Measures the folder and writes the model card."""
        from dreambooth.lab.pretraining.card import write_card
        from dreambooth.lab.quality import TITLES, report

        found = report(self.output, self.quality_seeds, str(self.device), self.work / "quality" / "quality.json", self.subjects)
        self.say(f"card: wrote {write_card(self.output, self.work, found, TITLES)}")


def follow() -> None:
    """Trains the base in a process that another one of this command started."""
    with following() as (own, task):
        device = torch.device(task["device"])
        start = task["start"] and Path(task["start"])
        Pretraining(Path(task["output"]), device, **task["pretraining"], ranks=own, start=start, say=lambda line: None).stage_base()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m dreambooth.lab.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights; the same folder continues")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--images", type=int, help="stage data: pictures to render; training stages: pictures to train on, instead of --minutes")
    parser.add_argument("--renders", type=int, help=f"pictures to render and to draw from; {RENDERS} on a GPU, {RENDERS_CPU} without")
    parser.add_argument("--minutes", type=float, help=f"of the training stage, or of all of them; {MINUTES:g} on a GPU, {MINUTES_CPU:g} without")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="stage card: pictures of each class in each place")
    parser.add_argument("--compile", action="store_true", help="torch.compile for vae and base: a minute at the start, faster steps")
    parser.add_argument("--processes", type=int, default=1, help="stage base: processes that train it together; on a CPU as many as cores")
    parser.add_argument("--start", type=Path, help="a finished folder: its base is trained further, its other parts stay as they are")
    parser.add_argument("--first-render", type=int, default=0, help="number of the first render: fresh ones for a further training")
    parser.add_argument("--set", action="append", default=[], metavar="NETWORK.KEY=VALUE", help="another value of a recipe, as base.batch_size=256")
    given = parser.parse_args(arguments)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device)
    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    minutes = given.minutes or (MINUTES if on_gpu else MINUTES_CPU)
    renders = given.renders or (given.images if given.stage == "data" else None) or (RENDERS if on_gpu else RENDERS_CPU)
    try:
        run = Pretraining(
            given.output, device, renders, given.images, minutes, given.workers, given.seed, given.compile, given.stage != "all", given.seeds,
            changes=parse_changes(given.set), say=lambda line: print(line, flush=True), processes=given.processes,
            start=given.start, first_render=given.first_render,
        )  # fmt: skip
        length = f"{given.images} images" if given.images else f"{minutes:g} minutes of training"
        run.say(f"stage {given.stage} on {device}: {renders} renders, {length}, beside rendering and measuring; the same command continues")
        run.run(given.stage)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    follow() if is_follower() else sys.exit(main())
