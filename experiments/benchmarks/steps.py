"""What the axis of steps costs: one run that is scored at 200, 400, 800 and 1200 steps, against a run of its own for each of them.

python experiments/benchmarks/steps.py                       the built-in subject; about 20 minutes on two cores
python experiments/benchmarks/steps.py 20,40 optim.learning_rate=1e-4      other steps, any further settings of train.py

The runs draw and score alike at each of the steps, so what differs is the training that one trajectory shares and the others repeat.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seconds(group: str, last: int, every: int, folder: Path, words: list[str]) -> tuple[float, float]:
    """Returns the seconds of a run from its start to its end, without its class images, which runs share, and those that it trained."""
    given = [f"group={group}", f"trainer.max_steps={last}", f"trainer.eval_every={every}", f"output_dir={folder}", "wandb.mode=disabled", *words]
    started = time.monotonic()
    subprocess.run([sys.executable, "train.py", *given], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = json.loads(next((folder / group).glob("*/run.json")).read_text(encoding="utf-8"))
    return time.monotonic() - started - record["seconds"].get("class images", 0.0), record["seconds"]["training"]


def main(words: list[str]) -> None:
    """Runs both ways and prints their seconds."""
    steps = sorted(int(step) for step in words[0].split(",")) if words and "=" not in words[0] else [200, 400, 800, 1200]
    settings = [word for word in words if "=" in word]
    every = steps[0]
    if any(step % every for step in steps):
        sys.exit(f"steps must be multiples of the smallest, {every}, where they are all evaluated; got {steps}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole, trained = seconds("together", steps[-1], every, folder, settings)
        print(f"one run to {steps[-1]}, scored at every {every}: {whole:.0f} s, of them {trained:.0f} s of training", flush=True)
        apart = []
        for step in steps:
            apart.append(seconds(f"to-{step}", step, step, folder, settings)[0])
            print(f"a run to {step}: {apart[-1]:.0f} s", flush=True)
    print(f"together {whole:.0f} s, apart {sum(apart):.0f} s: {whole / sum(apart):.2f} of it; the longest alone {apart[-1]:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
