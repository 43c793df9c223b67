"""TensorBoard: event files in the output directory, for `tensorboard --logdir`."""

import html
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vl_dist.errors import UserError
from vl_dist.run.files import TENSORBOARD
from vl_dist.run.tracking import ShownSample


def refuse_missing_tensorboard() -> None:
    """Makes sure that TensorBoard's package is there.

    Raises:
        UserError: it is not.
    """
    if find_spec("tensorboard") is None:
        raise UserError("log.tensorboard is true, but tensorboard is not installed: pip install tensorboard, or set false.")


class TensorBoardTracker:
    """Scalars of every row, and a table of captions as text."""

    name = "TensorBoard"

    def __init__(self, output_dir: Path, *, settings: dict[str, Any], first_step: int) -> None:
        """
        Args:
            settings: of the whole run, plain and without secrets.
            first_step: steps done before; what an earlier start wrote of later ones is hidden.
        """
        self._directory = output_dir / TENSORBOARD
        self._settings = settings
        self._first_step = first_step
        self._step = first_step
        self._writer: Any = None

    def start(self) -> None:
        """Opens a new event file."""
        from torch.utils.tensorboard import SummaryWriter

        purge = self._first_step + 1 if self._first_step else None
        self._writer = SummaryWriter(str(self._directory), purge_step=purge)
        self._text("settings", f"```\n{yaml.safe_dump(self._settings, sort_keys=False)}\n```")

    def log(self, row: dict[str, Any]) -> None:
        """A point of every curve."""
        self._step = row["step"]
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, self._step)
        self._writer.flush()

    def samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """A table; the images are in the run's report."""
        self._step = step
        lines = ["| id | prediction | reference | score | change |", "|---|---|---|---|---|"]
        for shown in samples:
            one = shown.sample
            change = "" if shown.change is None else f"{shown.change:+.2f}"
            texts = [html.escape(text).replace("|", "&#124;") for text in (one.id, one.prediction, one.references[0])]
            lines.append(f"| {' | '.join(texts)} | {one.score:.2f} | {change} |")
        self._text("eval/samples", "\n".join(lines))

    def adapter(self, directory: Path, step: int, aliases: Sequence[str]) -> None:
        """Where it is."""
        self._text(f"adapter/{'-'.join(aliases)}", f"step {step}: {directory}")

    def alert(self, title: str, text: str) -> None:
        """A text beside the curves."""
        self._text("alert", f"{title}: {text}")

    def finish(self, code: int) -> None:
        """Closes the event file."""
        self._writer.close()

    def abandon(self) -> None:
        """Nothing here outlives the process."""

    def _text(self, tag: str, text: str) -> None:
        self._writer.add_text(tag, text, self._step)
        self._writer.flush()
