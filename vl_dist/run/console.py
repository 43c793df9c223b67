"""What a person sees: a progress display on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vl_dist.data.assemble import RunData
from vl_dist.data.validate import BAD_ROWS
from vl_dist.evaluate.held_out import Evaluation, group_questions
from vl_dist.model.packed import PackedModel
from vl_dist.model.targets import PARTS, Targets, describe_lora, describe_targets, part_of
from vl_dist.run.directory import Start, describe_changes
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import num_values
from vl_dist.run.export import exported_scores
from vl_dist.run.launched import Launch
from vl_dist.settings import Config

LEFT_OUT = ("bleu1", "bleu2", "bleu3")


class RunConsole:
    """The display of one run; a context manager around the loop."""

    def __init__(self, *, is_main: bool, num_shown: int) -> None:
        """
        Args:
            is_main: others stay silent.
            num_shown: held-out captions printed at each evaluation.
        """
        self._console = Console(quiet=not is_main, highlight=False)
        self._num_shown = num_shown
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (is_main and self._console.is_terminal),
        )
        self._train_task: TaskID | None = None

    def __enter__(self) -> "RunConsole":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One message; its text is never read as markup."""
        self._console.print(Text(text), soft_wrap=True)

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
            scores = _in_a_line(exported_scores(output_dir))
            self.say(f"The run in {output_dir} is finished. {scores}\nIts adapter: {output_dir / 'adapter'}")
            self.say("To train anew, give another run.output_dir, or set run.resume=never to replace it.")
        elif start.checkpoint is not None:
            self.say(f"Going on from {start.checkpoint}.")

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Callable[[str, int, int], None]]:
        """Bars for what is read before training: call what it gives with what, how much is done, and how much there is."""
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = self._progress.add_task(what, total=total, numbers="")
            self._progress.update(tasks[what], completed=done)

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
        num_steps: int,
        first_step: int,
        ranks: Ranks,
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
            ("plan", f"{num_steps:,} steps of {config.batch.examples_per_step} examples, from step {first_step}"),
            ("devices", f"{ranks.world_size} x {ranks.device.type}"),
            ("engine", launch.describe(str(model.base_dtype).removeprefix("torch."))),
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

    def end(self, finished: bool, reason: str, output_dir: Path) -> None:
        """How it ended, and the next command to type."""
        if not finished:
            self.say(f"Not finished: {reason}.")
            return
        if self._console.quiet:
            return  # the adapter is the main process's, and may not be there yet
        scores = _in_a_line(exported_scores(output_dir))
        adapter = output_dir / "adapter"
        self.panel(
            "finished",
            [
                *([("scores", scores)] if scores else []),
                ("adapter", str(adapter)),
                ("next", f"python -m vl_dist predict {adapter} IMAGE"),
            ],
        )

    def train_step(self, done: int, num_steps: int) -> None:
        """Moves the bar; costs nothing on the device."""
        if self._train_task is None:
            self._train_task = self._progress.add_task("training", total=num_steps, numbers="")
        self._progress.update(self._train_task, completed=done)

    def row(self, row: dict[str, float | None], num_steps: int) -> None:
        """One logging step: beside the bar on a terminal, a line of its own elsewhere."""
        loss, grad_norm, mfu = row["train/loss"], row["train/grad_norm"], row["perf/mfu"]
        numbers = "  ".join(
            [
                "loss skipped" if loss is None or grad_norm is None else f"loss {loss:.4f}  grad {grad_norm:.3f}",
                f"lr {row['train/lr']:.2e}",
                f"{row['perf/examples_per_s']:.1f} examples/s",
                *([f"MFU {mfu:.1%}"] if mfu is not None else []),
                f"{row['perf/peak_memory_gib']:.1f} GiB",
                *([f"{row['perf/recompiles']:.0f} graphs compiled"] if row.get("perf/recompiles") else []),
            ]
        )
        if self._progress.disable:
            self.say(f"step {row['step']}/{num_steps}  epoch {row['epoch']:.2f}  {numbers}")
        elif self._train_task is not None:
            self._progress.update(self._train_task, numbers=numbers)

    def evaluation_progress(self) -> Callable[[int, int], None]:
        """A nested bar for one evaluation: call it with questions done and in all."""
        task = self._progress.add_task("captioning", total=None, numbers="")

        def update(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)
            if done == total:
                self._progress.remove_task(task)

        return update

    def evaluation(self, title: str, evaluation: Evaluation) -> None:
        """Scores and some captions."""
        scores = _in_a_line(evaluation.scores)
        self.say(f"{title}: {scores}")
        for sample in evaluation.samples[: self._num_shown]:
            self.say(f"  {'=' if sample.exact else 'x'} {sample.prediction!r}\n    of {sample.references[0]!r}")


def _describe_base(config: Config, model: PackedModel, num_frozen: int) -> str:
    if config.model.quantize is None:
        return f"{config.model.path}, {num_frozen:,} frozen parameters in {model.base_dtype}"
    return f"{config.model.path}, frozen, the language model in 4 bits, the rest in {model.base_dtype}"


def _in_a_line(scores: dict[str, float]) -> str:
    """Scores as a person reads them; those of BLEU's lower orders are in metrics.jsonl."""
    names = {column: column.removeprefix("eval/") for column in scores}
    return "  ".join(f"{names[column]} {value:.4f}" for column, value in scores.items() if names[column] not in LEFT_OUT)
