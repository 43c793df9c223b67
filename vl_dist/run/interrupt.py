"""Requests to stop: signals where they reach this process, and the file `output_dir/STOP` always."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"


class StopRequest:
    """Set by a signal or by the STOP file; read once a step. A second Ctrl-C ends the process at once."""

    def __init__(self, output_dir: Path, *, watch_file: bool) -> None:
        """
        Args:
            output_dir: where the STOP file appears; one that is there already belongs to an earlier run and goes.
            watch_file: on rank 0, which tells the others.
        """
        self._file = output_dir / STOP_FILE
        self._watch_file = watch_file
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

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None as long as it does not."""
        if self._reason is None and self._watch_file and self._file.exists():
            self._reason = f"the file {self._file}"
        return self._reason

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        if not self._in_loop:
            raise KeyboardInterrupt(self._reason)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
