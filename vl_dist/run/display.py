"""The bars of a terminal, with figures beneath that keep to its width."""

import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_DRAWINGS = 0.1
GAP = "  "  # between two figures


class Figures:
    """Figures side by side, in as many lines as they need: none is cut, and none is broken in two."""

    def __init__(self, figures: Sequence[str]) -> None:
        self._figures = figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """For rich."""
        for line in in_lines(self._figures, options.max_width):
            yield Text(line, no_wrap=True)


def in_lines(figures: Iterable[str], width: int) -> Iterator[str]:
    """Lines of at most `width` characters; a figure that is wider has a line of its own."""
    line = ""
    for figure in figures:
        longer = f"{line}{GAP}{figure}" if line else figure
        if line and len(longer) > width:
            yield line
            line = figure
        else:
            line = longer
    if line:
        yield line


class TimeLeft(TimeRemainingColumn):
    """What is left, in words that say so."""

    def render(self, task: Task) -> Text:
        """For rich."""
        text = super().render(task)
        return text if task.finished or task.time_remaining is None else text.append(" left")


class Bars(Progress):
    """Bars, one for each thing that goes on, and the latest figures beneath.

    They are drawn by whoever moves them, not by rich's own thread: where that draws while a line is printed and the number
    of bars has changed meanwhile, one of the two overwrites the other.
    """

    def __init__(self, console: Console, *, shown: bool) -> None:
        self.figures: Sequence[str] = ()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeLeft(),
            console=console,
            disable=not shown,
            auto_refresh=False,
        )
        self._drawn = -SECONDS_BETWEEN_DRAWINGS

    def moved(self, task_id: TaskID, *, done: int) -> None:
        """How far something is that moves often; drawn now and then."""
        self.update(task_id, completed=done)
        now = time.monotonic()
        if now - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """For rich."""
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Figures(self.figures)

    def time_left(self, task_id: TaskID) -> str | None:
        """As hours, minutes and seconds; None as long as there is no telling."""
        seconds = next(task for task in self.tasks if task.id == task_id).time_remaining
        if seconds is None:
            return None
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
