"""What caches save of a training step: CPU seconds with latents and text embeddings kept over those without, in one process, taken in turn.

python experiments/benchmarks/caches.py lab            the built-in base, 64 px, 4 + 4 images a step
python experiments/benchmarks/caches.py mid            Stable Diffusion's layout at a fifth of its width, 256 px, 1 + 1 images a step

The text encoder is frozen in both. Random photos: what a step costs does not depend on what they show.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from small_runs import composed  # noqa: E402
from tiny_pipelines import build_tiny  # noqa: E402

from dreambooth.base.protocol import BaseModel  # noqa: E402
from dreambooth.caches import make_caches  # noqa: E402
from dreambooth.data import DreamBoothData, ImageSet  # noqa: E402
from dreambooth.module import DreamBoothModule  # noqa: E402
from dreambooth.recipes import resolve  # noqa: E402

SETTINGS = {"lab": ("base=lab",), "mid": ("subject.class_noun=dog", "data.subject_dir=unused", "data.resolution=256", "data.batch_size=1")}


def main(size: str, method: str, pairs: int) -> None:
    """Prints the median step with and without caches, and their ratio."""
    words = [*SETTINGS[size], f"method={method}", "method.train_text_encoder=false", "method.train_token=false"]
    with tempfile.TemporaryDirectory() as folder:
        if size == "mid":
            words += [f"base.path={build_tiny(Path(folder) / 'mid', size='mid')}", "prior.batch_size=1"]
        config = resolve(composed(*words))
        base = config.base.load()
    rng, side = np.random.default_rng(0), config.data.resolution
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(8)]
    sets = ImageSet(images[:4], ["a photo of a sks dog"] * 4), ImageSet(images[4:], ["a photo of a dog"] * 4)
    module = DreamBoothModule(config, base, config.method.attach(base, "sks", "dog", 0))
    module.log_dict = lambda *values, **options: None
    optimizer, batches = module.configure_optimizers()["optimizer"], iter(DreamBoothData(config, *sets).train_dataloader())
    kept, plain, seconds = module.caches, make_caches(base, "off", Path(), 1), {True: [], False: []}
    module.on_train_start()
    for number in range(2 * pairs + 4):  # 4 to fill the cache, not counted
        cached = number < 4 or number % 2 == 0
        batch = next(batches)
        module.caches, start = kept if cached else plain, time.process_time()
        module.training_step(batch, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 4:
            seconds[cached].append(time.process_time() - start)
    on, off = statistics.median(seconds[True]), statistics.median(seconds[False])
    print(f"{size} {method}: {on:.3f} s with caches, {off:.3f} s without, ratio {on / off:.2f} (medians of {pairs}, {base_size(base)})")


def base_size(base: BaseModel) -> str:
    """Returns the sizes of the networks in words."""
    parts = {"UNet": base.unet, "VAE": base.vae, "text encoder": base.text_encoder}
    return ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for name, part in parts.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] if len(sys.argv) > 1 else "lab", sys.argv[2] if len(sys.argv) > 2 else "full", int(sys.argv[3]) if len(sys.argv) > 3 else 7)
