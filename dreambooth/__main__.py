"""`python -m dreambooth`: what is done with run folders and base models, without Hydra or Lightning."""

import argparse
import sys
from pathlib import Path

from dreambooth.errors import UserError


def export(arguments: argparse.Namespace) -> None:
    """Writes a run's model for other tools, whole or as an adapter; each file is checked by reading it back."""
    import torch

    from dreambooth.interop.export import export as write
    from dreambooth.interop.names import joepenna_name
    from dreambooth.runs import load, read_run

    if arguments.output is None and arguments.name is None:
        raise UserError("output", "must be said", None, "name model.safetensors, or model/ for a diffusers folder; or take --name joepenna")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    trained = load(arguments.run, arguments.weights)
    output = Path(arguments.output or "trained_models")
    if arguments.name is not None:
        output = output / joepenna_name(read_run(arguments.run), trained.step)
    for line in write(trained, output, arguments.layout, dtype, Path(arguments.run).resolve().name):
        print(line)
    print(f"step {trained.step}, {arguments.dtype}")


def tokens(arguments: argparse.Namespace) -> None:
    """Lists rare single tokens of a base's tokenizer, or says what words split into."""
    from dreambooth.base.stable_diffusion import StableDiffusion
    from dreambooth.lab.splits import RARE_TOKENS
    from dreambooth.tokens import judge, rare_tokens

    base = StableDiffusion(path=arguments.base)
    base.check()
    tokenizer, is_lab = base.load_tokenizer(), base.is_lab()
    free = RARE_TOKENS if is_lab else ()
    for word in arguments.word:
        print(judge(tokenizer, word, free).sentence)
    if arguments.word:
        return
    if is_lab:  # its tokens do not follow frequency: these five are kept out of every caption
        listed = [judge(tokenizer, word, free) for word in free]
        rare = [(verdict.word, verdict.ids[0]) for verdict in listed if verdict.kind == "rare"]
    else:
        rare = rare_tokens(tokenizer, arguments.count, arguments.seed, arguments.longest)
    print(f"rare words of {arguments.base}, each a single one of its {len(tokenizer)} tokens:")
    print("\n".join(f"  {word:<{arguments.longest + 2}} {token_id:>6}" for word, token_id in rare) or "  none")


def report(arguments: argparse.Namespace) -> None:
    """Writes the report of run folders: one HTML page, and Markdown with small pictures."""
    from dreambooth.report.page import write_report

    for path in write_report(arguments.runs, arguments.output, arguments.baseline, arguments.seed, arguments.own_drawing):
        print(path)


def dashboard(arguments: argparse.Namespace) -> None:
    """Sends the report of run folders to Weights & Biases, and online builds the experiment's dashboard there."""
    from dreambooth.config import Tracking
    from dreambooth.dashboard import publish
    from dreambooth.report.data import read_study

    study = read_study(arguments.runs, arguments.baseline)
    own = study.runs[0].config.wandb
    mode = "online" if arguments.online else "offline"
    tracking = Tracking(mode, arguments.project or own.project, arguments.entity or own.entity, own.tags)
    for line in publish(study, tracking, study.runs[0].folder.path.parent, arguments.seed):
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dreambooth", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    one = commands.add_parser("export", help="write the tuned model for other tools: a diffusers folder, a single file, a LoRA, an embedding")
    one.add_argument("run", help="run folder")
    one.add_argument("output", nargs="?", help="a folder, or a file that ends in .safetensors; with --name the folder that the file goes into")
    one.add_argument("--name", choices=("joepenna",), help="a file whose name says when, steps, photos, token and class, as that notebook wrote it")
    layouts = "model: all merged; lora: in diffusers' layout, a folder gets every form of it; kohya: a LoRA for web UIs; embedding: the learned word"
    one.add_argument("--layout", default="model", choices=("model", "lora", "kohya", "embedding"), help=layouts)
    one.add_argument("--weights", default="best", choices=("best", "final", "base"))
    one.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"))
    one.set_defaults(call=export)
    two = commands.add_parser("tokens", help="list rare words that can mean a subject, or judge the words that you think of")
    two.add_argument("--base", default="lab", help="lab, a diffusers folder, a hub id or a single file: whose tokenizer (default: %(default)s)")
    two.add_argument("--word", nargs="+", default=[], help="words to judge: what they split into, and whether they are rare")
    two.add_argument("--count", type=int, default=20, help="rare words to list (default: %(default)s)")
    two.add_argument("--seed", type=int, default=0, help="of the draw among all rare words (default: %(default)s)")
    two.add_argument("--longest", type=int, default=3, help="letters, at most (default: %(default)s)")
    two.set_defaults(call=tokens)
    three = commands.add_parser("report", help="what runs, or the arms of a sweep, learned and lost: one HTML page and Markdown")
    three.add_argument("runs", nargs="+", help="run folders, or folders that hold them (runs/prior)")
    three.add_argument("--output", help="folder for report.html, report.md and its pictures (default: the run, or the folder of the runs)")
    three.add_argument("--baseline", help="arm that the others are held against, or a part of its name (default: the recipe's, else the first)")
    three.add_argument("--seed", type=int, default=0, help="of the random draw of the pictures that are shown (default: %(default)s)")
    three.add_argument("--own-drawing", action="store_true", help="leave out what evaluate.py drew again of the runs in other ways (sampling.*)")
    three.set_defaults(call=report)
    four = commands.add_parser("dashboard", help="the report of runs as a run on Weights & Biases; online also a dashboard and a report page there")
    four.add_argument("runs", nargs="+", help="run folders, or folders that hold them (runs/prior)")
    four.add_argument("--online", action="store_true", help="send at once, build the dashboard; needs wandb login (default: offline, for wandb sync)")
    four.add_argument("--project", help="on W&B (default: that of the runs)")
    four.add_argument("--entity", help="your user or team on W&B (default: that of the runs)")
    four.add_argument("--baseline", help="as for report")
    four.add_argument("--seed", type=int, default=0, help="of the random draw of the pictures that are shown (default: %(default)s)")
    four.set_defaults(call=dashboard)
    arguments = parser.parse_args(argv)
    try:
        arguments.call(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
