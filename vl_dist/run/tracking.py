"""Trackers beside metrics.jsonl: what they are told, and the boundary that keeps their troubles away from training.

Each tracker works in a thread of its own behind a bounded queue. It may raise, block or be slow: training never waits for
it before the end, and then only so long. The rows of metrics.jsonl do not go this way; the loop writes them itself.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from PIL import Image

from vl_dist.evaluate.held_out import Sample

CAPACITY = 256  # calls that wait for a tracker; with rows every few seconds, minutes of it
MAX_FAILURES = 3  # in a row, after which a tracker is switched off
FINISH_S = 60.0  # at most, for what a finished run still has to hand over
STOP_S = 8.0  # at most, when a scheduler wants the machine back, or after an error


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One held-out caption, as trackers show it."""

    sample: Sample
    change: float | None  # of its score since the last evaluation; None: there was none
    picture: Callable[[], Image.Image | None]  # a thumbnail of its first image, made in the tracker's thread


class Tracker(Protocol):
    """Where a run is shown. Every method may raise and may take its time."""

    name: str  # as a person calls it

    def start(self) -> None:
        """Called first."""

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """Held-out captions after a step."""

    def adapter(self, directory: Path, step: int, aliases: Sequence[str]) -> None:
        """An adapter's files; the aliases leave the version that had them before."""

    def alert(self, title: str, text: str) -> None:
        """Something that the owner of the run should see now."""

    def finish(self, code: int) -> None:
        """Called last, with the exit code of the run."""

    def abandon(self) -> None:
        """Called from another thread when `finish` is out of time: ends what would keep the process from ending."""


class Background:
    """One tracker behind its boundary: calls return at once, and nothing that it does comes through."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None], *, capacity: int = CAPACITY) -> None:
        """
        Args:
            say: tells the person, at most once that the tracker is switched off and once that something was lost.
            capacity: calls that wait; what comes when so many do is lost.
        """
        self._tracker = tracker
        self._say = say
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(capacity)  # None: there are no more
        self._num_lost = 0
        self._num_failures = 0
        self._off = threading.Event()
        self._closed = False
        self._code = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def call(self, action: Callable[[Tracker], None]) -> None:
        """Something that the tracker shall do, after all before it."""
        if self._off.is_set() or self._closed:
            return
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._num_lost += 1

    def close(self, code: int, *, until: float) -> None:
        """Lets the tracker do what is left, and finish.

        Args:
            code: exit code of the run.
            until: moment of `time.monotonic` from which on it is abandoned.
        """
        self._code = code
        self._closed = True
        while self._thread.is_alive() and time.monotonic() < until:
            try:
                self._calls.put(None, timeout=0.1)
            except queue.Full:
                continue
            self._thread.join(max(0.0, until - time.monotonic()))
        late = self._thread.is_alive()
        if late or self._off.is_set():
            self._off.set()
            self._abandon()
        if late:
            self._say(
                f"{self._tracker.name} did not finish in time: what it had not taken is in metrics.jsonl and samples/."
            )
        elif self._num_lost:
            self._say(
                f"{self._tracker.name} was too slow for {self._num_lost} calls: it lacks them; metrics.jsonl has all."
            )

    def _abandon(self) -> None:
        try:
            self._tracker.abandon()
        except Exception as error:  # noqa: BLE001 - the boundary, as below
            self._say(f"{self._tracker.name} cannot be ended: {error}")

    def _work(self) -> None:
        if not self._attempt(lambda tracker: tracker.start(), allowed=1):
            return
        while (action := self._calls.get()) is not None:
            if not self._attempt(action, allowed=MAX_FAILURES):
                return
        self._attempt(lambda tracker: tracker.finish(self._code), allowed=1)

    def _attempt(self, action: Callable[[Tracker], None], *, allowed: int) -> bool:
        """Whether the tracker is still on afterwards."""
        try:
            action(self._tracker)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a tracker raises, training goes on
            self._num_failures += 1
            if self._num_failures >= allowed and not self._off.is_set():  # set: abandoned meanwhile
                self._off.set()
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._say(
                    f"{self._tracker.name} is switched off ({reason}). Training goes on; metrics.jsonl has everything."
                )
        else:
            self._num_failures = 0
        return not self._off.is_set()


@dataclass(slots=True)
class Tracking:
    """All trackers of a run; surrounds the loop. Without any, as on ranks other than 0, it does nothing."""

    trackers: Sequence[Background] = ()
    num_samples: int = 0  # held-out captions shown, `log.num_samples`
    picture: Callable[[Sample], Image.Image | None] = lambda sample: None
    last_scores: dict[str, float] = field(default_factory=dict)  # by sample, of the evaluation before; fills itself
    hide: Callable[[str], str] = lambda text: text  # takes secrets out of a message
    wandb_run: str | None = None  # the run's id on W&B, for its checkpoints
    code: int | None = None  # of the run's end; set by `end`

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.alert("The run was interrupted" if isinstance(error, KeyboardInterrupt) else "The run failed", str(error))
        self.close(1 if self.code is None else self.code, limit_s=FINISH_S if self.code == 0 else STOP_S)

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        row = dict(row)
        self._tell(lambda tracker: tracker.log(row))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The same few of all held-out captions each time, with the change of their scores."""
        if not self.trackers or not self.num_samples:
            return
        shown = [self._shown(sample) for sample in samples[:: max(1, len(samples) // self.num_samples)][: self.num_samples]]
        self.last_scores = {sample.id: sample.score for sample in samples}
        self._tell(lambda tracker: tracker.samples(step, shown))

    def adapter(self, directory: Path, step: int, aliases: Sequence[str]) -> None:
        """An adapter's files after a step; a checkpoint's are those of PEFT in it."""
        self._tell(lambda tracker: tracker.adapter(directory, step, aliases))

    def alert(self, title: str, text: str) -> None:
        """Something that the owner of the run should see now."""
        text = self.hide(text)
        self._tell(lambda tracker: tracker.alert(title, text))

    def end(self, code: int, reason: str) -> None:
        """How the loop ended, unless by an exception; what stopped before its end is an alert."""
        self.code = code
        if code != 0:
            self.alert("The run was stopped", f"It is {reason}.")

    def close(self, code: int, *, limit_s: float) -> None:
        """Hands over what is left, within so many seconds for all trackers together; later calls do nothing."""
        until = time.monotonic() + limit_s
        for tracker in self.trackers:
            tracker.close(code, until=until)
        self.trackers = ()

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            tracker.call(action)

    def _shown(self, sample: Sample) -> ShownSample:
        before = self.last_scores.get(sample.id)
        change = None if before is None else sample.score - before
        return ShownSample(sample, change, lambda: self.picture(sample))
