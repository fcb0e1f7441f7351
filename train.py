"""Trains DreamBooth on a few photos of a subject, and says what was learned and what was lost.

python train.py                                                             the built-in lab and subject: minutes on two cores
python train.py base=sd15 data.subject_dir=photos/ subject.class_noun=dog   your photos on Stable Diffusion 1.5
python train.py -m optim.learning_rate=1e-4,2e-4 trainer.max_steps=100,200  a sweep; the same command again skips what is done
"""

from dreambooth import cli  # first: the package sets the thread policy that torch reads when it is loaded

# isort: split
import sys
import traceback
from typing import TYPE_CHECKING, Any

import hydra
import numpy as np
from omegaconf import DictConfig

from dreambooth.base.protocol import BaseModel
from dreambooth.class_bank import ClassBank, draw_bank, manifest_digest, read_user_bank, wants_class_images
from dreambooth.config import Config, to_plain
from dreambooth.errors import UserError
from dreambooth.files import require_free
from dreambooth.generation import pick_device, save_png
from dreambooth.photos import prepare
from dreambooth.recipes import resolve
from dreambooth.runs import MetricsFile, RunFolder, open_run
from dreambooth.samplers import scheduler
from dreambooth.subject_photos import SubjectPhotos, read_subject_photos
from dreambooth.summary import summarize

if TYPE_CHECKING:
    import pytorch_lightning as pl


def train(config: Config) -> RunFolder:
    """Runs one job from config to measured model, or finds that it is done; returns its folder."""
    config.base.check()
    config = resolve(config)
    pick_device(config.trainer.accelerator)  # refuses a GPU that is not there
    photos = read_subject_photos(config)  # every photo is decoded before a model loads
    own_bank = read_user_bank(config) if wants_class_images(config) and config.prior.class_dir else None
    base_digest = config.base.digest()
    bank_digest = own_bank.digest if own_bank else manifest_digest(config, base_digest) if wants_class_images(config) else "none"
    run = open_run(config, base=base_digest, photos=photos.digest, class_images=bank_digest)
    for line in photos.warnings + (own_bank.warnings if own_bank else []):
        print(f"warning: {line}")
    if run.status == "done":
        print(f"done before: {run.path} (delete the folder to train again)")
        return run
    try:
        fit_and_score(config, run, photos, own_bank, base_digest)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        run.finish("failed", "stopped by Ctrl-C")
        raise KeyboardInterrupt from None
    except BaseException as error:
        run.finish("failed", cli.explain(error) or "".join(traceback.format_exception_only(error)).strip())
        raise
    return run


def fit_and_score(config: Config, run: RunFolder, photos: SubjectPhotos, own_bank: ClassBank | None, base_digest: str) -> None:
    """Does the work of a run that is not done yet."""
    # Lightning and the metrics take seconds to import: only here, so that bad input is answered at once.
    from dreambooth.callbacks import ContinueState, CsvLogger, ProgressLine, SelectionScores, StopAtNonFinite, last_state
    from dreambooth.data import DreamBoothData, ImageSet, describe_batch
    from dreambooth.final_scores import evaluate_run, read_photos
    from dreambooth.module import DreamBoothModule

    cli.quiet()  # once more: Lightning sets its loggers when it is imported
    print(f"run folder {run.path}")
    mirror = wandb_logger(config, run)
    save_photos(run, config, photos)
    with run.clock("loading"):
        device = pick_device(config.trainer.accelerator)
        encoders, missing = config.encoders.load_or_reason(device)
        if missing:
            print(f"warning: this run draws pictures but has no scores: {missing}")
        base = config.base.load().to(device)
    scheduler(base, config.sampling.sampler)  # refuses a sampler that cannot use what the base predicts
    base.tokenize(all_prompts(config))  # one that is too long is refused now, not when it is first drawn
    with run.clock("class images"):
        bank = own_bank or (draw_with_progress(config, base, base_digest) if wants_class_images(config) else None)
    print(describe_batch(config, len(photos.images), len(bank.images) if bank else 0))

    subject = ImageSet(photos.images, [config.subject.in_prompt(config.subject.prompt)] * len(photos.images))
    data = DreamBoothData(config, subject, ImageSet(bank.images, bank.captions) if bank else None)
    groups = config.method.attach(base, config.subject.identifier)
    module = DreamBoothModule(config, base, groups)
    weights_bytes = sum(p.numel() * p.element_size() for group in groups for p in group.parameters)
    require_free(run.path, 8 * weights_bytes, "output_dir")  # best, final, the state with two moments, and the next state beside it
    metrics = MetricsFile(run.path / "metrics.csv")
    state = last_state(run, metrics)
    if state is not None:
        print(f"continuing from {state}")
    selection = SelectionScores(run, config, read_photos(run), encoders, metrics)
    callbacks = [StopAtNonFinite(), ProgressLine(config.trainer.progress_bar), selection, ContinueState(run, config.trainer.checkpoint_every)]
    trainer = make_trainer(config, [CsvLogger(metrics), *mirror], callbacks)
    with run.clock("training"):
        trainer.fit(module, data, ckpt_path=state, weights_only=True)

    choice = selection.choice()
    with run.clock("final scores"):
        scores = evaluate_run(run, config, progress=cli.progress)
    mirror_scores(trainer, run, scores)
    run.finish("done", best_step=choice.step, best_step_reason=choice.reason, steps=trainer.global_step)
    print(summarize(run, scores, choice.reason))


def make_trainer(config: Config, loggers: list[Any], callbacks: list[Any]) -> "pl.Trainer":
    """Returns Lightning's trainer: steps are the only clock, and what it would write or print by itself is ours."""
    import pytorch_lightning as pl

    return pl.Trainer(
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        precision=config.trainer.precision,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.trainer.gradient_clip_val,
        log_every_n_steps=config.trainer.log_every_n_steps,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def all_prompts(config: Config) -> list[str]:
    """Returns every prompt that the run will give to the model."""
    from dreambooth.evaluation import final_plan, selection_plan

    drawn = {item.prompt for item in selection_plan(config) + final_plan(config)}
    captions = [config.subject.class_in_prompt(template) for template in config.prior.prompts] if wants_class_images(config) else []
    return sorted(drawn) + [config.subject.in_prompt(config.subject.prompt), *captions]


def save_photos(run: RunFolder, config: Config, photos: SubjectPhotos) -> None:
    """Writes the photos as the scores will see them: centre crop at the training resolution."""
    for k, (image, name) in enumerate(zip(photos.images, photos.names, strict=True)):
        recipe = {"photo": name, "source": photos.source}
        save_png(run.path / "photos" / f"{k:03d}.png", np.ascontiguousarray(prepare(image, config.data.resolution)), recipe)


def draw_with_progress(config: Config, base: BaseModel, base_digest: str) -> ClassBank:
    """Returns the class bank of the un-tuned base, with a bar while it is drawn."""
    with cli.progress(config.prior.num_images, "class images") as advance:
        seen = 0

        def show(done: int, total: int) -> None:
            nonlocal seen
            advance(done - seen)
            seen = done

        return draw_bank(config, base, base_digest, show)


def wandb_logger(config: Config, run: RunFolder) -> list[Any]:
    """Returns the W&B mirror of a run: one run of its own in the experiment's group, offline unless the config says online."""
    if config.wandb.mode == "disabled":
        return []
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    try:
        experiment = wandb.init(
            name=run.path.name,
            id=f"{config.group}-{run.path.name}",
            group=config.group,
            project=config.wandb.project,
            entity=config.wandb.entity,
            tags=config.wandb.tags,
            config=to_plain(config),
            mode=config.wandb.mode,
            dir=str(run.path),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except wandb.errors.Error as error:
        raise UserError(
            "wandb.mode", "must be offline unless you are logged in", config.wandb.mode, f"run wandb login, or leave it offline ({error})"
        ) from error
    return [WandbLogger(experiment=experiment)]


def mirror_scores(trainer: "pl.Trainer", run: RunFolder, scores: dict) -> None:
    """Sends the final score table and the grid to W&B."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            columns = sorted({key for row in scores["rows"] for key in row if not key.endswith("_interval")})
            logger.log_table("final/scores", columns=columns, data=[[row.get(key) for key in columns] for row in scores["rows"]])
            logger.log_image("final/grid", [str(run.path / "samples" / "final_grid.png")])


cli.register("train", Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: a typed config comes out, a run folder goes in."""
    try:
        cli.run_job(train, cfg)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # or the next job of a sweep would be logged into this one


if __name__ == "__main__":
    cli.run_script(main)
