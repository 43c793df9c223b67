"""How a run ends: an exit code, and the same in `outcome.json`, because `accelerate launch` turns every code into 1."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from vl_dist.errors import SharedError, UserError
from vl_dist.run.alive import Watch
from vl_dist.run.directory import obstacle
from vl_dist.run.files import OUTCOME
from vl_dist.run.tracking import STOP_S, Tracking

FINISHED, BUG, WRONG_INPUT, STOPPED = 0, 1, 2, 85
SECONDS_TO_LOOK = 5.0  # for a rank whose end made this one fail


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run."""

    code: int
    reason: str
    step: int  # optimizer steps done


class Ending:
    """Surrounds a run and turns however it ends into an outcome. Only unforeseen exceptions go on, with their traceback."""

    def __init__(self, output_dir: Path, *, is_main: bool) -> None:
        """
        Args:
            output_dir: where `outcome.json` goes; an earlier run's is removed on entering.
            is_main: rank 0 writes; another rank only when it alone met the user's error in the middle of training.
        """
        self._file = output_dir / OUTCOME
        self._is_main = is_main
        self.step = 0  # kept up to date by the loop
        self.watch: Watch | None = None  # set by the loop
        self.tracking: Tracking | None = None  # set by the loop
        self.training = False  # set by the loop
        self.outcome = Outcome(BUG, "ended without saying why", 0)

    def __enter__(self) -> "Ending":
        if self._is_main and self._file.is_file():
            self._file.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        speaks = self._is_main
        if isinstance(error, UserError):
            speaks = speaks or (self.training and not isinstance(error, SharedError))
            self.outcome = Outcome(WRONG_INPUT, str(error), self.step)
            if speaks:
                sys.stderr.write(f"{error}\n")
        elif isinstance(error, KeyboardInterrupt):
            self.outcome = Outcome(STOPPED, f"stopped before training ({error or 'Ctrl-C'}); start again", self.step)
        elif error is not None:
            gone = self.watch.others_gone(SECONDS_TO_LOOK) if self.watch is not None else None
            if self.watch is not None and gone is not None:  # then this error is only how this rank learnt of it
                self.lost(f"{gone} (stacks: {self.watch.write_stacks(error)})")
                return True
            self.outcome = Outcome(BUG, f"{type(error).__name__}: {error}", self.step)
        if speaks:
            self._write()
        return isinstance(error, UserError | KeyboardInterrupt)

    def lost(self, gone: str, first: bool = True) -> None:
        """Another rank is gone, or stands still: whichever rank finds it first says so, and trackers are told."""
        self.outcome = Outcome(BUG, f"{gone}; start again to go on from the last checkpoint", self.step)
        if first and not self._file.is_file():
            sys.stderr.write(f"{self.outcome.reason}\n")
            self._write()
        if self.tracking is not None:
            self.tracking.alert("The run ended: a rank is lost", self.outcome.reason)
            self.tracking.close(BUG, limit_s=STOP_S)

    def _write(self) -> None:
        if obstacle(self._file.parent) is not None:
            return  # that was the error
        if self.outcome.code == BUG and self._file.is_file():
            return  # another rank ended first and said why; this one only lost the connection
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f".{OUTCOME}")
        temporary.write_text(json.dumps(asdict(self.outcome), ensure_ascii=False) + "\n")
        temporary.replace(self._file)
