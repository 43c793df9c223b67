"""One run, top to bottom: settings, output directory, data, model, and the loop.

Start it with `accelerate launch train.py [RECIPE.yaml] [section.key=value ...]`.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vl_dist.config import help_text, load, split_words
from vl_dist.data.collate import Batch
from vl_dist.data.loader import StepPacks, load_steps, timed
from vl_dist.errors import SharedError, UserError
from vl_dist.model.packed import out_of_memory_named
from vl_dist.run import directory
from vl_dist.run.alive import Watch
from vl_dist.run.best import choose_final, newest_adapter
from vl_dist.run.checkpoint import TrainState, try_save
from vl_dist.run.console import RunConsole
from vl_dist.run.distributed import Ranks, launched_rank, seed_dropout
from vl_dist.run.evaluations import evaluate_now, evaluate_what_is_missing, is_due, is_evaluated
from vl_dist.run.export import export_adapter
from vl_dist.run.interrupt import StopRequest, TimeLimit
from vl_dist.run.launched import read_launch
from vl_dist.run.metrics import Meter
from vl_dist.run.optim import lr_factor, part_rates
from vl_dist.run.outcome import FINISHED, STOPPED, WRONG_INPUT, Ending, Outcome
from vl_dist.run.prepare import Run, Session, prepare
from vl_dist.run.trackers import check_trackers
from vl_dist.settings import Config


def train_step(packs: Sequence[Batch], run: Run) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One optimizer step over this rank's packs (all ranks; the same number of packs on each).

    Returns:
        losses: [packs] float64, this rank's, each summed over the pack's targets. Not read here.
        grad_norm: scalar, over all ranks, before clipping, not read; None: not everything was a number, nothing changed.
    """
    ranks, engine = run.ranks, run.engine
    own_targets = sum(pack.num_targets for pack in packs)
    targets = ranks.sum(torch.tensor(float(own_targets), device=ranks.device)).clamp(min=1.0)
    losses = []
    engine.begin_step(packs)
    for n, pack in enumerate(packs):
        with engine.gradient_sync(last=n == len(packs) - 1), out_of_memory_named(pack):
            loss = engine(pack.to(ranks.device))  # summed over the pack's targets
            engine.backward(loss * (ranks.loss_scale / targets))
        losses.append(loss.detach().double())
    if ranks.all_finite(*losses, engine.gradient_sizes()):
        return torch.stack(losses), engine.clip_and_step()
    engine.drop_gradient()
    return torch.stack(losses), None


def train(run: Run, stop: StopRequest, ending: Ending) -> Outcome:
    """Steps from where the run stands to its end, or to a request to stop (all ranks)."""
    config, ranks, num_steps = run.config, run.ranks, run.plan.num_steps
    if not evaluate_what_is_missing(run, stop):
        return save_and_stop(run, run.first_step, run.first_epoch, stop)
    peak_flops = ranks.peak_flops(config.log.peak_tflops)
    meter = Meter(ranks, run.flops, peak_flops=peak_flops, compiled=config.run.compile)
    for (share, dropped), waited_s in timed(ranks.together_noting(remaining_steps(run), lambda share: share.dropped)):
        run.late.add(dropped)
        done = share.step.number + 1
        factor = lr_factor(config.optim, share.step.number, num_steps=num_steps)
        lr = config.optim.lr * factor
        run.engine.set_lr(lr)
        seed_dropout(config.run.seed, share.step.number, ranks.rank)
        losses, grad_norm = train_step(share.packs, run)
        skipped = None if grad_norm is not None else run.nonfinite.met(done, share.packs, losses)
        if skipped is not None:
            run.tracking.alert("A step was skipped", skipped)
        ending.step = done
        meter.add(share.packs, losses, grad_norm, waited_s)
        run.record.ledger(share.step, dropped, skipped=skipped)
        run.console.train_step(done, num_steps)

        is_last = done == num_steps
        stop.after_step()
        stopping = ranks.any(stop.reason is not None) and not is_last
        row: dict[str, Any] = {"step": done, "epoch": share.step.epochs_done, "train/lr": lr} | part_rates(
            config.optim, factor
        )
        evaluated = not stopping and is_evaluated(run, done)
        logged = is_last or stopping or is_due(done, config.log.every_steps)
        if logged:
            row |= meter.row()
            run.console.row(row, num_steps)
        if evaluated:
            scores = evaluate_now(run, done, stop.between_batches)
            stopping = scores is None
            row |= scores or ({} if logged else meter.row())
        if logged or evaluated:
            write_row(run, row)
        if stopping:
            return save_and_stop(run, done, share.step.epochs_done, stop)
        is_best = evaluated and ranks.any(run.best.improves(row))
        failure = None
        if is_last or is_best or is_due(done, config.checkpoint.every_steps):
            with stop.saving():
                failure = save(run, done, share.step.epochs_done)
        if is_best and failure is None:
            run.tracking.adapter(run.best.move(row), done, ("best",))
    return Outcome(FINISHED, "finished", num_steps)


def remaining_steps(run: Run) -> Iterator[StepPacks]:
    """This rank's packs of every step that is left, in the order of the plan."""
    config = run.config
    shares = load_steps(
        run.plan.steps(run.first_step),
        run.data.train,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        max_tokens=config.batch.max_tokens_per_pack,
        num_pack_lengths=config.batch.pack_lengths,
        num_workers=config.data.num_workers,
        pin_memory=run.ranks.device.type == "cuda",
    )
    run.watch.doing("loading the first step")
    for share in shares:
        run.watch.doing(f"in step {share.step.number + 1}")
        yield share
        run.watch.doing(f"loading after step {share.step.number + 1}")


def write_row(run: Run, row: dict[str, Any]) -> None:
    """A row of metrics.jsonl, on disk when this returns; trackers get it in their own time (main process)."""
    run.record.metrics(row)
    run.tracking.log(row)


def save_and_stop(run: Run, step: int, epoch: float, stop: StopRequest) -> Outcome:
    """The end on request (all ranks).

    Raises:
        SharedError: the disk does not take the checkpoint.
    """
    failure = save(run, step, epoch)
    if failure is not None:
        raise SharedError(f"Stopped as asked, but step {step} has no checkpoint: {failure}. The last one still stands.")
    return Outcome(STOPPED, f"stopped by {stop.reason or 'another rank'}; start again to go on", step)


def save(run: Run, step: int, epoch: float) -> str | None:
    """A checkpoint of this step; None, or why the disk did not take it (all ranks; the main process writes)."""
    run.watch.doing(f"saving step {step}")
    trained = run.engine.trained()

    def write() -> str | None:
        """On the main process, which has all weights."""
        assert trained is not None
        data, skipped = run.data.train.fingerprint, run.nonfinite.num_skipped
        state = TrainState(
            step=step,
            num_steps=run.plan.num_steps,
            epoch=epoch,
            data=data,
            skipped=skipped,
            wandb_run=run.tracking.wandb_run,
        )
        root = run.config.run.output_dir / "checkpoints"
        return try_save(root, run.model, trained, state, keep=run.config.checkpoint.keep)

    failure = run.ranks.on_main(write)
    if failure is not None:
        run.console.say(f"Step {step} has no checkpoint: {failure}. Training goes on.")
    return failure


def export(run: Run, step: int) -> None:
    """The adapter for inference (all ranks; the main process writes)."""
    trained = run.engine.trained()

    def write() -> None:
        assert trained is not None, "the main process has all weights"
        final = choose_final(run.config.run.output_dir, run.config.run.final, last_step=step)
        peft_model, data = run.model.peft_model, run.data.train
        export_adapter(peft_model, trained.weights, run.processor, run.config, data=data, final=final)

    with run.engine.whole_model():  # the adapter's probe runs it
        run.ranks.on_main(write)


def run_once(config: Config, ending: Ending) -> Outcome:
    """One run from its settings to its adapter (all ranks)."""
    launch = read_launch(config, os.environ)
    stall_s = config.run.stall_timeout
    # A collective waits longer than the watch, which can name the rank that is missing.
    timeout_s = None if stall_s is None else stall_s + 120.0
    ranks = Ranks.start(launch, cpu_threads=config.run.cpu_threads, timeout_s=timeout_s)
    limit = TimeLimit.of_this_process(config.run.max_time) if ranks.is_main and config.run.max_time is not None else None
    stop = StopRequest(config.run.output_dir, watch_file=ranks.is_main, limit=limit)
    stop.listen()
    console = RunConsole(is_main=ranks.is_main, num_shown=config.eval.num_shown)
    wandb = ranks.on_main(lambda: check_trackers(config, os.environ))
    start = ranks.on_main(lambda: directory.inspect(config))
    console.start(start, config.run.output_dir)
    if start.finished:
        return Outcome(FINISHED, "was finished before", 0)
    watch = Watch(config.run.output_dir, ranks.rank, stall_s=stall_s, on_verdict=ending.lost)
    run = prepare(config, Session(ranks=ranks, console=console, launch=launch, watch=watch, wandb=wandb), start)
    console.prepared(
        run.config,
        run.data,
        run.model,
        run.targets,
        launch,
        plan=run.plan,
        first_step=run.first_step,
        ranks=ranks,
        wandb=wandb,
    )
    ending.step, ending.training, ending.watch, ending.tracking = run.first_step, True, watch, run.tracking
    with console, run.tracking, stop.deferred(), watch, run.features:
        outcome = train(run, stop, ending)
        if outcome.code == FINISHED:
            export(run, outcome.step)
        if ranks.is_main:
            run.tracking.adapter(*newest_adapter(config.run.output_dir, finished=outcome.code == FINISHED))
        run.tracking.end(outcome.code, outcome.reason)
    ranks.wait()
    if ranks.is_main:
        Watch.remove(config.run.output_dir)
    console.end(outcome.code == FINISHED, outcome.reason, config)
    ranks.close()
    return outcome


def main(words: list[str]) -> int:
    """The command: settings from words, then one run; its exit code (all ranks)."""
    if "--help" in words or "-h" in words:
        sys.stdout.write(help_text() + "\n")
        return FINISHED
    is_main = launched_rank() == 0
    try:
        config = load(*split_words(words))
    except UserError as error:
        if is_main:
            sys.stderr.write(f"{error}\n")
        return WRONG_INPUT
    ending = Ending(config.run.output_dir, is_main=is_main)
    with ending:
        ending.outcome = run_once(config, ending)
    return ending.outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
