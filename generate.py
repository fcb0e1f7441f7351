"""Draws images with the model of a run folder.

python generate.py run=runs/default/full-dog-1a2b3c4d 'prompt=a photo of a sks dog on the beach'
"""

from dreambooth import cli  # first: the package sets the thread policy that torch reads when it is loaded

# isort: split
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig

from dreambooth.config import GenerateConfig
from dreambooth.files import write_png
from dreambooth.generation import generate, pick_device, save_png
from dreambooth.grids import image_grid
from dreambooth.runs import load, read_run


def draw(config: GenerateConfig) -> list[Path]:
    """Draws the images and a grid of them; returns the files."""
    own = config.sampling.over(read_run(config.run).config)
    prompt = own.subject.in_prompt(config.prompt)
    for word in (own.subject.identifier, own.subject.class_noun):
        if word not in prompt.split():
            print(f"warning: the prompt does not name {word!r}; the subject is asked for as {{subject}} or {own.subject.in_prompt('{subject}')!r}")
    trained = load(config.run, config.weights)
    trained.base.to(pick_device(config.accelerator))
    resolution = config.resolution or own.data.resolution
    with cli.progress(config.images, "images") as advance:
        images = generate(trained.base, [prompt] * config.images, [(config.seed, k) for k in range(config.images)], own.sampling, resolution, advance)
    folder = Path(config.output) if config.output else Path(config.run) / "generated"
    slug = "-".join(filter(None, "".join(c if c.isalnum() else "-" for c in prompt).split("-")))[:60]
    recipe = {"run": str(config.run), "weights": config.weights, "step": trained.step, "prompt": prompt}
    files = [
        save_png(folder / f"{slug}-{config.weights}-{config.seed}-{k:02d}.png", np.ascontiguousarray(image), recipe | {"key": [config.seed, k]})
        for k, image in enumerate(images)
    ]
    rows = [list(images[start : start + 4]) for start in range(0, len(images), 4)]
    files.append(write_png(folder / f"{slug}-{config.weights}-{config.seed}-grid.png", image_grid(rows)))
    print("\n".join(f"written: {path}" for path in files))
    return files


cli.register("generate", GenerateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    cli.run_job(draw, cfg)


if __name__ == "__main__":
    cli.run_script(main)
