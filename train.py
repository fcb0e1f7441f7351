"""Trains DreamBooth on a few photos of a subject, and says what was learned and what was lost.

python train.py                                                             the built-in lab and subject: minutes on two cores
python train.py base=sd15 data.subject_dir=photos/ subject.class_noun=dog   your photos on Stable Diffusion 1.5
python train.py -m optim.learning_rate=1e-4,2e-4 trainer.max_steps=100,200  a sweep; the same command again skips what is done
"""

from dreambooth import cli, ranks, sharding, sweeps  # first: the package sets the thread policy that torch reads when it is loaded

# isort: split
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from dreambooth.adapters.methods import ParamGroup, describe_learning
from dreambooth.base.protocol import BaseModel
from dreambooth.claims import ClaimLost
from dreambooth.class_bank import ClassBank
from dreambooth.class_images import bank_digest, complete_bank, read_user_bank, still_to_draw, to_draw
from dreambooth.config import Config, from_plain, to_plain
from dreambooth.dreambench import read_dreambench
from dreambooth.encoders import LoadedEncoders
from dreambooth.generation import pick_device
from dreambooth.metrics_csv import MetricsFile
from dreambooth.mirror import mirror_scores, mirror_taken, wandb_logger
from dreambooth.preflight import before_loading, cache_needed, check_disk, check_memory, require_writable
from dreambooth.ranks import ALONE, Ranks
from dreambooth.recipes import resolve, settle_steps
from dreambooth.runs import RunFolder, claimed_run, read_run
from dreambooth.samplers import check_sampler
from dreambooth.subject_photos import SubjectPhotos, prepared, read_subject_photos, save_photos
from dreambooth.summary import summarize
from dreambooth.taken_over import take_over

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from dreambooth.callbacks import SelectionScores


def train(config: Config) -> RunFolder:
    """Runs one job from config to measured model, or finds that it is done; returns its folder."""
    config.base.check()
    config = resolve(config)
    if config.data.dreambench is not None:
        print(read_dreambench(config.data.dreambench).describe(config.subject.name))
    device = pick_device(config.trainer.accelerator)  # refuses a GPU that is not there
    ranks.check(config.trainer.devices, device)
    sharding.check(config)
    config.optim.check(device, config.trainer.precision)
    photos = read_subject_photos(config)  # every photo is decoded before a model loads
    config = settle_steps(config, photos.weighted_count)
    own_bank = read_user_bank(config)
    require_writable(config.output_dir)
    base_digest = config.base.digest()
    digests = {"base": base_digest, "photos": photos.digest, "class_images": bank_digest(config, base_digest, own_bank)}
    taken = take_over(config, **digests)  # from another experiment that has trained the very same
    with claimed_run(config, **digests) as run:
        sweeps.working_in(run.path, done_before=run.status == "done")
        for line in photos.warnings + (own_bank.warnings if own_bank else []):
            print(f"warning: {line}")
        if run.status == "done":
            print(f"done before: {run.path} ({f'taken from {taken}' if taken else 'delete the folder to train again'})")
            if "taken_from" in run.record:
                mirror_taken(config, run)
            return run
        try:
            task = {"config": to_plain(config), "run": str(run.path), "base_digest": base_digest}
            with ranks.together(config.trainer.devices, device, [__file__], task) as first:
                fit_and_score(config, run, photos, own_bank, base_digest, first)
        except ClaimLost:  # the record is another process's now
            raise
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the first into the second
            run.finish("failed", cli.stopped_by(stop))
            raise stop if isinstance(stop, SystemExit) and stop.code == cli.TERMINATED else KeyboardInterrupt from None
        except BaseException as error:
            run.finish("failed", cli.explain(error) or "".join(traceback.format_exception_only(error)).strip())
            raise
        return run


def follow() -> None:
    """Does the share of a further rank of a run, in a process that the first rank started; ends it with a status that tells what happened."""
    cli.quiet()
    with ranks.following() as (own, task):
        config = from_plain(task["config"], "the first rank's config")
        try:
            fit_and_score(config, read_run(task["run"]), read_subject_photos(config), read_user_bank(config), task["base_digest"], own)
        except Exception as error:  # the process's boundary
            if (sentence := cli.explain(error)) is None:
                raise
            sys.exit(ranks.refuse(sentence))


def fit_and_score(config: Config, run: RunFolder, photos: SubjectPhotos, own_bank: ClassBank | None, base_digest: str, own: Ranks = ALONE) -> None:
    """Does the work of a run that is not done yet, or this rank's share of it: the first one alone writes."""
    # Lightning and the metrics take seconds to import: only here, so that bad input is answered at once.
    from dreambooth.callbacks import last_state
    from dreambooth.data import DreamBoothData, ImageSet, class_set, describe_batch, describe_photos, subject_set
    from dreambooth.final_scores import draw_final_share, evaluate_run
    from dreambooth.first_steps import release
    from dreambooth.module import DreamBoothModule

    cli.quiet()  # once more: Lightning sets its loggers when it is imported
    print(f"run folder {run.path}")
    findings = before_loading(config, all_prompts(config, photos, own_bank))  # a prompt that is too long is refused now, not when it is first drawn
    for line in findings:
        print(f"warning: {line}")
    mirror = wandb_logger(config, run) if own.is_first else []
    if own.is_first:
        save_photos(run.path, photos, config.data.resolution, config.data.crop)
    with run.clock("loading"):
        device = pick_device(config.trainer.accelerator)
        encoders, missing = config.encoders.load_or_reason(device) if own.is_first else (None, None)
        if missing and not any(missing in line for line in findings):
            print(f"warning: this run draws pictures but has no scores: {missing}")
        base = config.base.load().to(device)
    config.objective.check(base)
    check_sampler(config.sampling.sampler, base, config.objective.zero_terminal_snr)  # one that cannot use what the base predicts is refused
    if own.is_first:
        with run.clock("memory estimate"):
            memory, lines = check_memory(config, base, device)
        class_images = sum(to_draw(config, own_bank).values()) + (len(own_bank.images) if own_bank else 0)
        cache = cache_needed(config, base, photos, class_images, all_prompts(config, photos, own_bank))
        print("\n".join([*lines, check_disk(config, run.path, memory, still_to_draw(config, base_digest, own_bank), cache)]))
    with run.clock("class images"):
        bank = bank_with_progress(config, base, base_digest, own_bank, own)
    config.objective.prepare(base)  # after the class images: those are the un-tuned base's own
    shown = [own.subject for own in photos.everyone for _ in own.images]
    pictures, names = [image for own in photos.everyone for image in own.images], [name for own in photos.everyone for name in own.names]
    class_images = class_set(config, pictures, ImageSet(bank.images, bank.captions, names=bank.names) if bank else None, shown, names)
    subject = subject_set(photos, config.data.masks is not None)
    print(describe_batch(config, photos, len(class_images.images) if class_images else 0))
    print("\n".join([*describe_photos(config, photos), config.objective.describe(base)]))

    data = DreamBoothData(config, subject, class_images, own)
    groups = config.method.attach(base, config.identifiers, config.subject.class_noun, config.seed)
    base.tokenize(all_prompts(config, photos, own_bank))  # again: an identifier of several vectors makes prompts longer
    module = DreamBoothModule(config, base, groups)
    if module.frozen is not None:
        print(f"the un-tuned model is kept for the prior: {module.frozen.nbytes / 1e6:.0f} MB beside the weights that learn")
    print(describe_learning(config.method, groups) + average_note(config))
    if config.trainer.sharding:
        print(f"shared out: each of {own.count} devices keeps 1/{own.count} of that, of its gradients and of its moments")
    metrics = MetricsFile(run.path / "metrics.csv", run.claim)
    state = own.from_first(last_state(run, metrics, config.trainer.log_every_n_steps) if own.is_first else None)
    if state is not None:
        print(f"continuing from {state}")
    loggers, callbacks, selection = watchers(config, run, photos, encoders, metrics, own)
    trainer = make_trainer(config, [*loggers, *mirror], callbacks, groups)
    with run.clock("training"):
        trainer.fit(module, data, ckpt_path=state, weights_only=True)
    release(trainer, module)

    with run.clock("final scores"):
        if own.count > 1:
            draw_final_share(run, config, own, cli.progress)
        if not own.is_first:
            return
        scores = evaluate_run(run, config, progress=cli.progress)
    choice = selection.choice()
    mirror_scores(trainer.loggers, run, scores)
    run.finish("done", best_step=choice.step, best_step_reason=choice.reason, steps=trainer.global_step)
    print(summarize(run, scores, choice.reason, selection.rows))


def watchers(
    config: Config, run: RunFolder, photos: SubjectPhotos, encoders: LoadedEncoders | None, metrics: MetricsFile, own: Ranks
) -> "tuple[list[Any], list[Any], SelectionScores]":
    """Returns the loggers and callbacks of a training, and of them the one that chooses the step; on a further rank those where all ranks meet."""
    from dreambooth.callbacks import ContinueState, CsvLogger, ProgressLine, SelectionScores
    from dreambooth.final_scores import read_photos
    from dreambooth.finite_loss import StopAtNonFinite
    from dreambooth.first_steps import Rehearsal, TimeLeft
    from dreambooth.fixed_loss import FixedBatchLoss

    selection = SelectionScores(run, config, read_photos(run), encoders, metrics, own)
    rehearsal, finite, state_keeper = Rehearsal(run, config), StopAtNonFinite(config, own), ContinueState(run, config.trainer.checkpoint_every)
    fixed = FixedBatchLoss(run, config, prepared(photos.held_out or photos.images, config.data.resolution, config.data.crop), metrics, own)
    if not own.is_first:
        return [], [rehearsal, finite, fixed, selection, state_keeper], selection
    progress = ProgressLine(config.trainer.progress_bar, selection)
    return [CsvLogger(metrics)], [rehearsal, finite, progress, fixed, selection, state_keeper, TimeLeft(run, config, selection)], selection


def average_note(config: Config) -> str:
    """Returns what is evaluated and kept, where it is not the last weights themselves."""
    if config.trainer.ema_decay is None:
        return ""
    return f"; evaluated and kept: their moving average (EMA, decay {config.trainer.ema_decay:g})"


def make_trainer(config: Config, loggers: list[Any], callbacks: list[Any], groups: Sequence[ParamGroup] = ()) -> "pl.Trainer":
    """Returns Lightning's trainer: steps are the only clock, and what it would write or print by itself is ours.

    Args:
        config: resolved.
        loggers, callbacks: in order.
        groups: what learns. Where some of it begins or stops at a step, several ranks ask at each step what has a gradient.
    """
    import pytorch_lightning as pl

    if config.trainer.devices > 1:
        from pytorch_lightning.plugins.environments import LightningEnvironment
        from pytorch_lightning.strategies import DDPStrategy

        from dreambooth.sharded_strategy import ShardedStrategy

        changes = any(group.start or group.stop is not None for group in groups)
        together = DDPStrategy(find_unused_parameters=changes, gradient_as_bucket_view=True)
        strategy = ShardedStrategy(config.trainer.devices) if config.trainer.sharding else together
        several = {"strategy": strategy, "plugins": [LightningEnvironment()]}  # named, so that no cluster's variables are taken for ours
    else:
        several = {}

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
        **several,
    )


def all_prompts(config: Config, photos: SubjectPhotos, own_bank: ClassBank | None) -> list[str]:
    """Returns every prompt that the run will give to the model, captions included, each once."""
    from dreambooth.evaluation import final_plan, selection_plan

    drawn = {item.prompt for item in selection_plan(config) + final_plan(config)}
    captions = {caption for own in photos.everyone for caption in own.captions} | set(own_bank.captions if own_bank else [])
    common = [subject.in_prompt(subject.prompt) for subject in config.subjects]
    return list(dict.fromkeys([*sorted(drawn | captions), *common, *config.prior_prompts]))


def bank_with_progress(config: Config, base: BaseModel, base_digest: str, own: ClassBank | None, ranks: Ranks) -> ClassBank | None:
    """Returns the class images of the run, with a bar while the un-tuned base draws; None where the prior wants none."""
    count = sum(to_draw(config, own).values())
    if not count:
        return own
    with cli.progress(count, "class images") as advance:
        seen = 0

        def show(done: int, total: int) -> None:
            nonlocal seen
            advance(done - seen)
            seen = done

        return complete_bank(config, base, base_digest, own, show, ranks)


cli.register("train", Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Hydra's entry: a typed config goes in, a run folder comes out; returns what a search shall maximise, None if that is not known."""
    try:
        return cli.run_job(lambda config: sweeps.selection_score(train(config)), cfg, failed=sweeps.WORST_SCORE)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # or the next job of a sweep would be logged into this one


if __name__ == "__main__":
    follow() if ranks.is_follower() else cli.run_script(main)
