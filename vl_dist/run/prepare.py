"""All that stands between settings and the first step: data, model, what was trained before, and the output directory."""

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vl_dist.data.assemble import RunData
from vl_dist.data.plan import Plan
from vl_dist.data.validate import BAD_ROWS, write_bad_rows
from vl_dist.errors import UserError
from vl_dist.evaluate.scores import DocumentFrequency
from vl_dist.model.compilation import refuse_without_compiler
from vl_dist.model.flops import FlopCounter, read_shape
from vl_dist.model.load import load_processor, patch_shape
from vl_dist.model.packed import PackedModel
from vl_dist.model.targets import Targets, choose_targets, linear_layers, lora_size
from vl_dist.run import directory
from vl_dist.run.alive import Watch
from vl_dist.run.best import BestCheckpoint
from vl_dist.run.build import load_data, load_frequency, load_model, model_directory
from vl_dist.run.checkpoint import Restored, restore
from vl_dist.run.console import RunConsole
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import Engine, make_engine
from vl_dist.run.features import fill_while_training
from vl_dist.run.files import WANDB_RUN
from vl_dist.run.late import LateFaults
from vl_dist.run.launched import Launch
from vl_dist.run.metrics import Record
from vl_dist.run.nonfinite import NonFiniteSteps
from vl_dist.run.self_test import self_test
from vl_dist.run.trackers import begin_tracking
from vl_dist.run.tracking import Tracking
from vl_dist.run.wandb_tracker import Mode
from vl_dist.settings import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is there before anything of the run is read."""

    ranks: Ranks
    console: RunConsole
    launch: Launch
    watch: Watch
    wandb: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything the loop works with; built once, before the first step."""

    config: Config
    ranks: Ranks
    console: RunConsole
    processor: Any
    data: RunData
    plan: Plan
    watch: Watch
    late: LateFaults
    nonfinite: NonFiniteSteps
    frequency: DocumentFrequency | None  # for CIDEr-D, if not that of the held-out answers
    targets: Targets  # the layers that get LoRA
    model: PackedModel  # the module itself, for evaluation and checkpoints
    engine: Engine  # what steps it, on one rank or over many
    record: Record
    tracking: Tracking
    best: BestCheckpoint
    flops: FlopCounter
    features: AbstractContextManager[Any]  # fills the feature cache, if there is one
    first_step: int  # steps done before
    first_epoch: float  # passes over the training records done before


def prepare(config: Config, session: Session, start: directory.Start) -> Run:
    """Data, model and optimizer, from the cheapest check to the dearest; the output directory last (all ranks).

    Raises:
        UserError: anything that the settings name cannot be used.
    """
    ranks, console = session.ranks, session.console
    model_dir = model_directory(config, ranks, console.say)
    processor = load_processor(model_dir)
    with console.measuring() as on_progress:
        data = load_data(config, processor, patch_shape(model_dir, processor), ranks, on_progress)
    targets, flops = _what_trains(config, model_dir)
    frequency = load_frequency(config.eval, ranks)
    model, restored = _model(config, session, model_dir, data, start)
    data, features = _features(config, session, model, data)
    engine = make_engine(model, ranks, config.optim, session.launch)
    if restored is not None:
        engine.restore_moments(restored.moments, restored.state.updates)
    plan, first_step = data.plan(config), restored.state.step if restored is not None else 0
    record, late = _records(config, session, data, plan, start, first_step)
    tracking = _tracking(config, session, data, restored, start)
    return Run(
        config=config,
        ranks=ranks,
        console=console,
        processor=processor,
        data=data,
        plan=plan,
        watch=session.watch,
        late=late,
        nonfinite=NonFiniteSteps(config.optim.nonfinite, ranks, num_skipped=restored.state.skipped if restored else 0),
        frequency=frequency,
        targets=targets,
        model=model,
        engine=engine,
        record=record,
        tracking=tracking,
        best=BestCheckpoint(config.run.output_dir, config.eval.best_metric, is_main=ranks.is_main),
        flops=flops,
        features=features,
        first_step=first_step,
        first_epoch=restored.state.epoch if restored is not None else 0.0,
    )


def _features(
    config: Config, session: Session, model: PackedModel, data: RunData
) -> tuple[RunData, AbstractContextManager[Any]]:
    """The data, reading the feature cache if there is one, and what surrounds the loop to fill it (all ranks)."""
    root = config.model.feature_cache
    if root is None:
        return data, contextlib.nullcontext()
    train, fill = fill_while_training(root, model, data.train, session.ranks, session.console.say)
    return replace(data, train=train), fill


def _what_trains(config: Config, model_dir: Path) -> tuple[Targets, FlopCounter]:
    """The layers that get LoRA, and what a step costs with them; before weights are paid for."""
    shape = read_shape(model_dir)
    return choose_targets(config.lora, linear_layers(shape)), FlopCounter(shape, lora_size(shape, config.lora))


def _tracking(
    config: Config, session: Session, data: RunData, restored: Restored | None, start: directory.Start
) -> Tracking:
    """The trackers, going on with the run that they know, if there is one."""
    return begin_tracking(
        config,
        session.wandb,
        os.environ,
        held_out=data.held_out,
        first_step=restored.state.step if restored is not None else 0,
        known_run=_wandb_run(config, restored, start),
        is_main=session.ranks.is_main,
        say=session.console.say,
    )


def _wandb_run(config: Config, restored: Restored | None, start: directory.Start) -> str | None:
    """The id on W&B that the checkpoint knows; None if it is of a run that goes on having its own directory."""
    if restored is None or start.checkpoint is None:
        return None
    its_directory = start.checkpoint.absolute().parent.parent
    is_ours = its_directory.resolve() == config.run.output_dir.resolve()
    return restored.state.wandb_run if is_ours or not (its_directory / WANDB_RUN).is_file() else None


def _model(
    config: Config, session: Session, model_dir: Path, data: RunData, start: directory.Start
) -> tuple[PackedModel, Restored | None]:
    """Base and adapter as training goes on with them, and what else the checkpoint holds (all ranks)."""
    if config.run.compile:
        session.ranks.each(lambda: refuse_without_compiler(session.ranks.device))
    model = load_model(config, model_dir, session.ranks.device)
    restored = restore(start.checkpoint, model, session.ranks) if start.checkpoint is not None else None
    if restored is not None and restored.state.data != data.train.fingerprint and not config.run.allow_changes:
        raise UserError(
            f"The training examples are others than those of {start.checkpoint}: records or images changed since. Restore "
            "them, give another run.output_dir, or set run.allow_changes=true to go on with the new ones."
        )
    if config.run.self_test:
        tested = session.ranks.each(lambda: self_test(model, data.train, session.ranks.device))
        session.console.say(str(tested))
    return model, restored


def _records(
    config: Config, session: Session, data: RunData, plan: Plan, start: directory.Start, first_step: int
) -> tuple[Record, LateFaults]:
    """The output directory, ready, and what is written there while training (all ranks)."""
    ranks, output_dir = session.ranks, config.run.output_dir
    if ranks.is_main:
        directory.begin(config, start)
        write_bad_rows(output_dir / BAD_ROWS, data.bad)
        Watch.clear(output_dir)
    ranks.wait()
    record = Record(output_dir, is_main=ranks.is_main, keep_to_step=first_step, data=data.train, plan=plan)
    record.dropped(data.dropped, step=0)
    late = LateFaults(
        ranks.on_main(record.dropped_while_training),
        record=record,
        num_examples=len(data.train.examples),
        max_fraction=config.data.max_bad_fraction,
    )
    return record, late
