"""The Weights & Biases mirror of a run: what the run folder holds, shown there as well. Never a source: nothing is read back from it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dreambooth.config import Config, Tracking, to_plain
from dreambooth.errors import UserError
from dreambooth.metrics.table import METRICS
from dreambooth.metrics_csv import MetricsFile
from dreambooth.runs import RunFolder


def wandb_run(tracking: Tracking, folder: Path, **identity: Any) -> Any:
    """Starts a W&B run, without W&B's own capture of output and system figures; the same id goes on with the same run.

    Args:
        tracking: project, entity, tags, mode.
        folder: where its files go.
        identity: name, id, group, config, job_type, as `wandb.init` takes them.

    Raises:
        UserError: online without a login.
    """
    import wandb

    try:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            tags=tracking.tags,
            mode=tracking.mode,
            dir=str(folder),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            **identity,
        )
    except wandb.errors.Error as error:
        rule = "must be offline unless you are logged in"
        raise UserError("wandb.mode", rule, tracking.mode, f"run wandb login, or leave it offline ({error})") from error


def wandb_logger(config: Config, run: RunFolder) -> list[Any]:
    """Returns Lightning's logger of the mirror: one W&B run of its own in the experiment's group; none where it is disabled."""
    if config.wandb.mode == "disabled":
        return []
    from pytorch_lightning.loggers import WandbLogger

    name = run.path.name
    started = wandb_run(config.wandb, run.path, name=name, id=f"{config.group}-{name}", group=config.group, config=to_plain(config))
    return [WandbLogger(experiment=started)]


def mirror_taken(config: Config, run: RunFolder) -> None:
    """Shows a run that was trained in another group in this one's too, from what its folder holds; nothing if it is shown already.

    Args:
        config: resolved, of this group.
        run: done, and taken over.
    """
    if (run.path / "wandb").exists():
        return
    for logger in wandb_logger(config, run):
        for row in MetricsFile(run.path / "metrics.csv").read():
            step, values = int(row.pop("step")), {key: float(text) for key, text in row.items() if text}
            logger.log_metrics(values, step - any(key.startswith("train/") for key in values))  # Lightning counts a step's losses from 0
            grid = run.path / "samples" / f"step-{step:06d}.png"
            if "score/evaluated" in values and grid.is_file():
                logger.log_image("samples/selection", [str(grid)], step=step)
        mirror_scores([logger], run, json.loads((run.path / "scores.json").read_text(encoding="utf-8")))


def mirror_scores(loggers: Iterable[Any], run: RunFolder, scores: dict[str, Any]) -> None:
    """Sends the final scores, as a table and as scalars for charts and filters, and the grid."""
    for logger in loggers:
        if hasattr(logger, "log_table"):
            columns = sorted({key for row in scores["rows"] for key in row if not key.endswith("_interval")})
            logger.log_table("final/scores", columns=columns, data=[[row.get(key) for key in columns] for row in scores["rows"]])
            logger.log_image("final/grid", [str(run.path / "samples" / "final_grid.png")])
            logger.experiment.summary.update(final_summary(scores))


def final_summary(scores: dict[str, Any]) -> dict[str, float]:
    """Returns the final scores as scalars: final/<arm>/<score>.

    Args:
        scores: what scores.json holds.
    """
    found = {f"final/{row['arm']}/{info.key}": row.get(info.key) for row in scores["rows"] for info in METRICS}
    return {name: value for name, value in found.items() if value is not None}
