"""Signs of life: each rank says that it lives and what it does, and a run ends where a rank is gone or stands still.

A rank whose process died leaves the others waiting in a collective, and so does one that never comes back from reading a
file. Every rank therefore writes a small file every few seconds, from a thread of its own, and reads those of the others.
What it finds ends its process at once, with the rank named and its stacks written; nothing collective is tried any more.

Files, in `output_dir/.alive/`: `rank-00000.json` of each rank; `verdict` by the first that finds something.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

FOLDER, VERDICT, STACKS = ".alive", "verdict", "stacks"
SECONDS_BETWEEN_SIGNS = 3.0
SIGNS_MISSED = 10  # in a row, before a rank on another machine counts as gone


@dataclass(frozen=True, slots=True)
class Sign:
    """What one rank last said of itself."""

    rank: int
    host: str
    pid: int
    number: int = 0  # of signs so far
    progress: int = 0  # things it came to do so far
    doing: str = "starting"
    ended: bool = False  # it came to its orderly end

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}, {self.doing})"

    @property
    def process_is_gone(self) -> bool:
        """Whether its process, on this machine, is no more."""
        if self.host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


@dataclass(slots=True)
class Seen:
    """The last sign of a rank, and since when it has not changed, by this process's clock."""

    sign: Sign
    number_since: float
    progress_since: float

    def update(self, sign: Sign, now: float) -> None:
        """Takes a newer sign."""
        if sign.number != self.sign.number:
            self.number_since = now
        if sign.progress != self.sign.progress:
            self.progress_since = now
        self.sign = sign


def verdict(seen: Sequence[Seen], now: float, *, gone_s: float, stall_s: float | None) -> str | None:
    """Why the run must end, naming ranks; None: it need not.

    Args:
        seen: of every rank that ever gave a sign, this one included.
        gone_s: without a sign for longer, a rank is gone.
        stall_s: without progress of any rank for longer, the run stands still; None: it may stand as long as it likes.
    """
    present = [one for one in seen if not one.sign.ended]
    gone = [one.sign for one in present if one.sign.process_is_gone or now - one.number_since > gone_s]
    if gone:
        return f"{_named(gone)} {'is' if len(gone) == 1 else 'are'} gone"
    if not present or stall_s is None or any(now - one.progress_since <= stall_s for one in present):
        return None
    # The others wait for those that came least far.
    least = min(one.sign.progress for one in present)
    behind = [one.sign for one in present if one.sign.progress == least]
    stands = "stands" if len(behind) == 1 else "stand"
    return f"{_named(behind)} {stands} still for more than run.stall_timeout={stall_s:g} seconds"


def _named(signs: Sequence[Sign]) -> str:
    return " and ".join(str(sign) for sign in signs[:4]) + (f" and {len(signs) - 4} more" if len(signs) > 4 else "")


class Watch:
    """This rank's sign of life, and its eye on the others. A context manager around training."""

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        *,
        stall_s: float | None,
        on_verdict: Callable[[str, bool], None],
        between_s: float = SECONDS_BETWEEN_SIGNS,
    ) -> None:
        """
        Args:
            output_dir: shared by all ranks, and ready.
            stall_s: as for `verdict`.
            on_verdict: called when the run must end, with the reason and whether this rank found it first; the process ends
                after it.
            between_s: seconds between two signs.
        """
        self._folder = output_dir / FOLDER
        self._stacks = output_dir / STACKS
        self._sign = Sign(rank, socket.gethostname(), os.getpid())
        self._stall_s = stall_s
        self._on_verdict = on_verdict
        self._between_s = between_s
        self._seen: dict[int, Seen] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    @staticmethod
    def clear(output_dir: Path) -> None:
        """Removes an earlier start's files. Main process only, before any rank begins to watch."""
        folder = output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.iterdir(), *(output_dir / STACKS).glob("rank-*.txt")]:
            path.unlink(missing_ok=True)

    @staticmethod
    def remove(output_dir: Path) -> None:
        """Removes all signs. Main process only, once every rank came to its orderly end."""
        shutil.rmtree(output_dir / FOLDER, ignore_errors=True)

    def __enter__(self) -> "Watch":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None) -> None:
        # After an exception the sign stays as it is: the others must not take this end for an orderly one.
        self._over.set()
        self._thread.join(2 * self._between_s)
        if error is None:
            self._sign = replace(self._sign, ended=True)
            self._write()

    def doing(self, what: str) -> None:
        """This rank comes to do something else, so it does not stand still."""
        self._sign = replace(self._sign, progress=self._sign.progress + 1, doing=what)

    def others_gone(self, patience_s: float) -> str | None:
        """Which other ranks are gone, looking for up to so many seconds; None: none is."""
        end = time.monotonic() + patience_s
        while True:
            others = [one for one in self._read(time.monotonic()) if one.sign.rank != self._sign.rank]
            found = verdict(others, time.monotonic(), gone_s=self._gone_s, stall_s=None)
            if found is not None or time.monotonic() >= end:
                return found
            time.sleep(0.2)

    @property
    def _gone_s(self) -> float:
        return SIGNS_MISSED * self._between_s

    def _run(self) -> None:
        suspected = None
        while not self._over.wait(self._between_s):
            self._sign = replace(self._sign, number=self._sign.number + 1)
            self._write()
            if (self._folder / VERDICT).exists():
                self._end(None)
            now = time.monotonic()
            found = verdict(self._read(now), now, gone_s=self._gone_s, stall_s=self._stall_s)
            # Twice, for the main thread often learns of a lost rank by itself, and can say more.
            if found is not None and suspected is not None:
                self._end(found)
            suspected = found

    def _end(self, found: str | None) -> None:
        """Ends this process: as the first to find something, or because another did."""
        self.write_stacks()
        path, first = self._folder / VERDICT, False
        if found is not None:
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(found)
                first = True
        self._on_verdict(f"{path.read_text() or found} (stacks: {self._stacks})", first)
        time.sleep(3 * self._between_s)  # for the others to see the verdict and write their stacks too
        os._exit(1)

    def write_stacks(self, error: BaseException | None = None) -> Path:
        """What every thread of this process is doing, and what led to an error; the folder that holds it."""
        self._stacks.mkdir(exist_ok=True)
        with (self._stacks / f"rank-{self._sign.rank:05d}.txt").open("w") as file:
            file.write(f"{self._sign}\n\n")
            file.writelines(traceback.format_exception(error) if error is not None else ())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return self._stacks

    def _write(self) -> None:
        path = self._folder / f"rank-{self._sign.rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk alone is no reason to end
            temporary.write_text(json.dumps(asdict(self._sign)))
            temporary.replace(path)

    def _read(self, now: float) -> list[Seen]:
        for sign in self._signs():
            if sign.rank in self._seen:
                self._seen[sign.rank].update(sign, now)
            else:
                self._seen[sign.rank] = Seen(sign, now, now)
        return list(self._seen.values())

    def _signs(self) -> Iterator[Sign]:
        for path in self._folder.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                yield Sign(**json.loads(path.read_text()))
