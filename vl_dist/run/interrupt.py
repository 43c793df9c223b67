"""Requests to stop: signals where they reach this process, the file `output_dir/STOP` always, and a limit of time."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import psutil

from vl_dist.durations import duration_s

STOP_FILE = "STOP"
LONGEST_REASON = 80  # characters of it
NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C"}  # of signals, as a person calls them; others have their own


class TimeLimit:
    """Says at the end of a step whether another one, and then a save, would still be in time."""

    def __init__(self, limit_s: float, *, used_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            limit_s: seconds from the start of the process.
            used_s: of which so many are gone.
            clock: seconds since any moment.
        """
        self._clock = clock
        self._end = clock() + limit_s - used_s
        self._step_began = clock()
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0

    @classmethod
    def of_this_process(cls, text: str) -> "TimeLimit":
        """As `run.max_time` asks for; the time that starting Python and importing took counts."""
        return cls(duration_s(text), used_s=time.time() - psutil.Process().create_time())

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Surrounds a save, which is no part of a step."""
        began = self._clock()
        yield
        took = self._clock() - began
        self._longest_save_s = max(self._longest_save_s, took)
        self._step_began += took

    def reached_after_step(self) -> bool:
        """Whether the longest step so far, and the longest save after it, are more than is left; the next step begins now.

        What happens between two calls is a step: waiting for data, evaluation and logging are in it. As long as no save
        was seen, one is taken to last as long as a step.
        """
        now = self._clock()
        self._longest_step_s = max(self._longest_step_s, now - self._step_began)
        self._step_began = now
        return now + self._longest_step_s + self._save_s >= self._end

    def reached_between_batches(self) -> bool:
        """Whether no more than a save is left, while held-out records are evaluated."""
        return self._clock() + self._save_s >= self._end

    @property
    def _save_s(self) -> float:
        return self._longest_save_s or self._longest_step_s


class StopRequest:
    """Set by a signal or by the STOP file; read once a step, and between batches of an evaluation.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self, output_dir: Path, *, watch_file: bool, limit: TimeLimit | None = None) -> None:
        """
        Args:
            output_dir: where the STOP file appears; one that is there already belongs to an earlier run and goes.
            watch_file: on rank 0, which tells the others.
            limit: on rank 0, too.
        """
        self._file = output_dir / STOP_FILE
        self._watch_file = watch_file
        self._limit = limit
        self._reason: str | None = None
        self._in_loop = False
        if watch_file and self._file.is_file():
            self._file.unlink()

    def listen(self) -> None:
        """From here on SIGTERM, SIGUSR1 and Ctrl-C ask for a stop: KeyboardInterrupt before the loop, a flag inside."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a request only sets the flag; at the end the request is done with and the STOP file goes.

        An end by an exception leaves the file: nothing was saved for it.
        """
        self._in_loop = True
        yield
        if self._watch_file:
            self._file.unlink(missing_ok=True)

    def after_step(self) -> None:
        """Asks for a stop if the time limit leaves no room for another step; called once a step, when it is done."""
        if self._limit is not None and self._limit.reached_after_step() and self._reason is None:
            self._reason = "run.max_time"

    def between_batches(self) -> bool:
        """Whether an evaluation is to be cut short: this rank wants to stop, or its limit leaves time for a save only."""
        if self._limit is not None and self.reason is None and self._limit.reached_between_batches():
            self._reason = "run.max_time"
        return self.reason is not None

    def saving(self) -> AbstractContextManager[None]:
        """Surrounds a save, for the time limit to know how long one takes."""
        return self._limit.saving() if self._limit is not None else contextlib.nullcontext()

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None as long as it does not."""
        if self._reason is None and self._watch_file and self._file.exists():
            self._reason = self._asked_by()
        return self._reason

    def _asked_by(self) -> str:
        """What stands in the file, as launch/ writes it; else the file itself."""
        try:
            text = self._file.read_text(errors="replace").strip()
        except OSError:  # gone again, or a directory
            text = ""
        return text.splitlines()[0][:LONGEST_REASON] if text else f"the file {self._file}"

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = NAMES.get(number, signal.Signals(number).name)
        if not self._in_loop:
            raise KeyboardInterrupt(self._reason)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
