"""Scores a run folder: identity fidelity, prompt alignment, drift and diversity, with the un-tuned base on the same prompts and noise.

python evaluate.py run=runs/default/full-robot-1a2b3c4d
python evaluate.py run=... 'prompts=["a photo of a {subject} on the beach"]' images=16
"""

from dreambooth import cli  # first: the package sets the thread policy that torch reads when it is loaded

# isort: split
import hashlib
import json

import hydra
from omegaconf import DictConfig

from dreambooth.config import EvaluateConfig, to_plain
from dreambooth.final_scores import evaluate_run
from dreambooth.runs import read_run
from dreambooth.summary import score_table


def evaluate(config: EvaluateConfig) -> dict:
    """Scores one run; returns what was written."""
    run = read_run(config.run)
    own = run.config
    changed = config.applied_to(run.config)
    changed.trainer.accelerator, own.trainer.accelerator = config.accelerator, config.accelerator
    plan = json.dumps([to_plain(changed.evaluation), to_plain(changed.sampling)], sort_keys=True)
    suffix = "" if to_plain(changed) == to_plain(own) else "-" + hashlib.sha256(plan.encode()).hexdigest()[:8]
    scores = evaluate_run(run, changed, config.arms, cli.progress, suffix)
    print(score_table(scores))
    print(f"written: {run.path / f'scores{suffix}.json'}, {run.path / 'samples' / f'final_grid{suffix}.png'}")
    return scores


cli.register("evaluate", EvaluateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    cli.run_job(evaluate, cfg)


if __name__ == "__main__":
    cli.run_script(main)
