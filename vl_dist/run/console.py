"""What a person sees: a progress display on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from vl_dist.data.assemble import RunData
from vl_dist.data.plan import Plan
from vl_dist.data.validate import BAD_ROWS
from vl_dist.evaluate.held_out import Evaluation, group_questions
from vl_dist.model.packed import PackedModel
from vl_dist.model.targets import PARTS, Targets, describe_lora, describe_targets, part_of
from vl_dist.run.directory import Start, describe_changes
from vl_dist.run.display import GAP, Bars
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import num_values
from vl_dist.run.export import exported_scores
from vl_dist.run.launched import Launch
from vl_dist.run.panels import (
    best_score,
    describe_devices,
    describe_plan,
    describe_settings,
    in_a_line,
    next_commands,
    resolved,
)
from vl_dist.run.wandb_tracker import Mode
from vl_dist.settings import Config


class RunConsole:
    """The display of one run; a context manager around the loop."""

    def __init__(self, *, is_main: bool, num_shown: int, console: Console | None = None) -> None:
        """
        Args:
            is_main: others stay silent.
            num_shown: held-out captions printed at each evaluation.
            console: where it goes; None: standard output.
        """
        self._console = console if console is not None else Console(quiet=not is_main, highlight=False)
        self._num_shown = num_shown
        self._progress = Bars(self._console, shown=is_main and self._console.is_terminal)
        self._train_task: TaskID | None = None

    def __enter__(self) -> "RunConsole":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str, *, whole_lines: bool = False) -> None:
        """One message; its text is never read as markup.

        Args:
            whole_lines: never broken, so that it can be copied; else a terminal has it broken between words.
        """
        self._console.print(Text(text), soft_wrap=whole_lines or not self._console.is_terminal)

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values in a frame."""
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name), Text(value))  # long values wrap; Text is never read as markup
        self._console.print(Panel(table, title=title, expand=False))

    def start(self, start: Start, output_dir: Path) -> None:
        """What was found in the output directory."""
        if start.changed:
            self.say(f"Settings changed since the last start:\n{describe_changes(start.changed)}")
        for skipped in start.skipped:
            self.say(f"Checkpoint {skipped.path.name} is not used: {skipped.reason}.")
        if start.finished:
            self.say(f"The run in {output_dir} is finished. {in_a_line(exported_scores(output_dir))}".rstrip())
            self.say("Next:\n" + "\n".join(f"  {command}" for command in next_commands(output_dir)), whole_lines=True)
            self.say("To train anew, give another run.output_dir, or set run.resume=never to replace it.")
        elif start.checkpoint is not None:
            self.say(f"Going on from {start.checkpoint}.")

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Callable[[str, int, int], None]]:
        """Bars for what is read before training: call what it gives with what, how much is done, and how much there is."""
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = self._progress.add_task(what, total=total)
            self._progress.moved(tasks[what], done=done)

        with self:
            yield update
            for task in tasks.values():
                self._progress.remove_task(task)

    def prepared(
        self,
        config: Config,
        data: RunData,
        model: PackedModel,
        targets: Targets,
        launch: Launch,
        *,
        plan: Plan,
        first_step: int,
        ranks: Ranks,
        wandb: Mode,
    ) -> None:
        """What is about to be trained."""
        by_part = dict.fromkeys(PARTS, 0)
        for name, parameter in model.lora_parameters.items():
            by_part[part_of(name)] += num_values(parameter)
        lora = sum(by_part.values())
        total = sum(num_values(p) for p in model.parameters())
        held_out = len(group_questions(data.held_out.examples)) if data.held_out is not None else 0
        rows = [
            ("model", _describe_base(config, model, total - lora)),
            ("adapter", f"{lora:,} parameters: {describe_lora(config.lora)}"),
            ("LoRA", describe_targets(targets, by_part)),
            ("data", f"{len(data.train.examples):,} examples to train on, {held_out:,} prompts held out"),
            ("plan", describe_plan(config, plan, data.train.lengths, ranks, first_step=first_step)),
            ("devices", describe_devices(ranks)),
            ("engine", launch.describe(str(model.base_dtype).removeprefix("torch."))),
            ("recipe", describe_settings(config)),
            ("W&B", resolved(config.log.wandb, wandb)),
            ("output", str(config.run.output_dir)),
        ]
        for note in data.notes:
            self.say(f"Note: {note}.")
        if data.bad:
            unusable = len(data.bad) - len(data.dropped)
            rows.insert(
                4, ("left out", f"{unusable:,} rows, {len(data.dropped):,} examples longer than a pack: {BAD_ROWS}")
            )
        self.panel("vl_dist", rows)

    def end(self, finished: bool, reason: str, config: Config) -> None:
        """How it ended, and the next command to type."""
        output_dir = config.run.output_dir
        if not finished:
            checkpoint = (output_dir / "checkpoints" / "latest").resolve().name
            self.say(f"Not finished: {reason} from {checkpoint}, by the same command.")
            return
        if self._console.quiet:
            return  # the adapter is the main process's, and may not be there yet
        scores, best = in_a_line(exported_scores(output_dir)), best_score(output_dir, config.eval.best_metric)
        self.panel(
            "finished",
            [
                *([("scores", scores)] if scores else []),
                *([("best", best)] if best is not None else []),
                ("adapter", str(output_dir / "adapter")),
            ],
        )
        self.say("Next:\n" + "\n".join(f"  {command}" for command in next_commands(output_dir)), whole_lines=True)

    def train_step(self, done: int, num_steps: int) -> None:
        """Moves the bar; costs nothing on the device."""
        if self._train_task is None:  # after a resume the steps before took no time of this start
            self._train_task = self._progress.add_task("training", total=num_steps, completed=done - 1)
        self._progress.moved(self._train_task, done=done)

    def row(self, row: dict[str, float | None], num_steps: int) -> None:
        """One logging step: beneath the bar on a terminal, a line of its own elsewhere."""
        loss, grad_norm, mfu = row["train/loss"], row["train/grad_norm"], row["perf/mfu"]
        figures = [
            f"epoch {row['epoch']:.2f}",
            *(["loss skipped"] if loss is None or grad_norm is None else [f"loss {loss:.4f}", f"grad {grad_norm:.3f}"]),
            f"lr {row['train/lr']:.2e}",
            f"{row['perf/examples_per_s']:.1f} examples/s",
            *([f"MFU {mfu:.1%}"] if mfu is not None else []),
            f"{row['perf/peak_memory_gib']:.1f} GiB",
            *([f"{row['perf/recompiles']:.0f} graphs compiled"] if row.get("perf/recompiles") else []),
        ]
        if not self._progress.disable:
            self._progress.figures = figures
            self._progress.refresh()
            return
        if self._train_task is not None and row["step"] != num_steps:
            left = self._progress.time_left(self._train_task)
            figures += [f"{left} left"] if left is not None else []
        self.say(GAP.join([f"step {row['step']}/{num_steps}", *figures]))

    @contextlib.contextmanager
    def captioning(self) -> Iterator[Callable[[int, int], None]]:
        """A nested bar for one evaluation: call what it gives with questions done and in all."""
        task = self._progress.add_task("evaluating", total=None)
        try:
            yield lambda done, total: self._progress.update(
                task, description="captioning", completed=done, total=max(1, total), refresh=True
            )
        finally:
            self._progress.remove_task(task)
            self._progress.refresh()

    def evaluation(self, title: str, evaluation: Evaluation) -> None:
        """Scores and some captions."""
        scores = in_a_line(evaluation.scores)
        self.say(f"{title}: {scores}")
        for sample in evaluation.samples[: self._num_shown]:
            self.say(f"  {'=' if sample.exact else 'x'} {sample.prediction!r}\n    of {sample.references[0]!r}")


def _describe_base(config: Config, model: PackedModel, num_frozen: int) -> str:
    dtype = resolved(config.model.dtype, str(model.base_dtype).removeprefix("torch."))
    how = f"{dtype}, attention {resolved(config.model.attention, model.attention)}"
    if config.model.quantize is None:
        return f"{config.model.path}, {num_frozen:,} frozen parameters\n{how}"
    return f"{config.model.path}, frozen\nthe language model in 4 bits, the rest {how}"
