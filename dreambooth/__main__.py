"""`python -m dreambooth`: what is done with run folders, without Hydra or Lightning."""

import argparse
import sys
from pathlib import Path

from dreambooth.errors import UserError


def export(arguments: argparse.Namespace) -> None:
    """Writes a run's model for other tools: a diffusers folder, or a single file in the layout that web UIs read, checked by reading it back."""
    import torch

    from dreambooth.interop.ldm import max_difference_after_reload, save_single_file
    from dreambooth.runs import load

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    trained = load(arguments.run, arguments.weights)
    trained.config.method.merge(trained.base)
    output = Path(arguments.output)
    if output.suffix == ".safetensors":
        subject = trained.config.subject
        metadata = {
            "dreambooth.run": Path(arguments.run).name,
            "dreambooth.step": str(trained.step),
            "dreambooth.prompt": subject.in_prompt("{subject}"),
        }
        save_single_file(trained.base, output, dtype, metadata)
        difference = max_difference_after_reload(trained.base.to(dtype), output)
        if difference != 0.0:
            raise UserError(str(output), "must read back as it was written", f"a difference of {difference:g}", "do not use the file; report this")
        if trained.base.latent_channels != 4:
            print(f"note: its autoencoder has {trained.base.latent_channels} channels; Stable Diffusion tools need a diffusers folder")
    elif output.suffix:
        raise UserError(
            "output", "must be a folder or a .safetensors file", str(output), "name it model.safetensors, or model/ for a diffusers folder"
        )
    else:
        trained.base.to(dtype).save(output)
    print(f"written: {output} (step {trained.step}, {arguments.dtype})")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dreambooth", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    one = commands.add_parser("export", help="write the tuned model as a diffusers folder or a single .safetensors file")
    one.add_argument("run", help="run folder")
    one.add_argument("output", help="a folder, or a file that ends in .safetensors")
    one.add_argument("--weights", default="best", choices=("best", "final", "base"))
    one.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "fp32"))
    one.set_defaults(call=export)
    arguments = parser.parse_args(argv)
    try:
        arguments.call(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
