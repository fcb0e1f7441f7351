"""Scores a run folder, or many: what was learned and what was lost, with the un-tuned base on the same prompts and noise.

python evaluate.py run=runs/default/full-dog-1a2b3c4d
python evaluate.py run=... 'prompts=["a photo of a {subject} on the beach"]' images=16
python evaluate.py runs=runs/dreambench                          every finished run of a group, and one table over subjects and seeds
python evaluate.py runs=... data.dreambench=dreambench/ images=4    on the 25 prompts of DreamBench for each run's subject

An evaluation that was cut off goes on where it stood, by the same command.
"""

from dreambooth import cli  # first: the package sets the thread policy that torch reads when it is loaded

# isort: split
from typing import Any

import hydra
from omegaconf import DictConfig

from dreambooth.combined_scores import Evaluated, combine, require_one_evaluator
from dreambooth.config import EvaluateConfig
from dreambooth.final_scores import evaluate_run
from dreambooth.rescoring import Rescoring, find_runs, output_folder, rescoring
from dreambooth.runs import read_run
from dreambooth.summary import score_table


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Scores one run or many; returns what was written."""
    if config.run is not None:
        return _score(rescoring(read_run(config.run), config), config)
    runs, left_out = find_runs(config.runs)
    for line in left_out:
        print(f"left out: {line}")
    rescorings = [rescoring(run, config) for run in runs]
    output = output_folder(rescorings, config.output)
    require_one_evaluator(one.config for one in rescorings)
    evaluated = []
    for number, one in enumerate(rescorings, 1):
        print(f"run {number} of {len(rescorings)}: {one.run.path}")
        evaluated.append(Evaluated(one, _score(one, config)))
    result, table = combine(evaluated, left_out, output)
    print(f"\n{table}\nwritten: {', '.join(str(output / name) for name in ('table.md', 'scores.json', 'scores.parquet'))}")
    return result


def _score(one: Rescoring, config: EvaluateConfig) -> dict[str, Any]:
    scores = evaluate_run(one.run, one.config, config.arms, cli.progress, one.suffix, one.pictures)
    print(score_table(scores))
    print(f"written: {one.run.path / f'scores{one.suffix}.json'}, {one.run.path / 'samples' / f'final_grid{one.suffix}.png'}")
    return scores


cli.register("evaluate", EvaluateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    cli.run_job(evaluate, cfg)


if __name__ == "__main__":
    cli.run_script(main)
