"""What keeping a record costs a step: `python -m benchmarks.tracking [--quick] [--out FILE.json]`.

The embedded default's own loop (`train.train`) runs in short stretches that take turns: twice without any record, which
shows what chance does; with metrics.jsonl and ledger.jsonl; with W&B (offline) and TensorBoard too; and the same with a row
after every step. Beside the times stands the CPU time of the trackers' threads and W&B's own processes: if it all were
taken from training, it could cost no more than its share of the cores. Bound: 1 % of the step's time.
"""

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common import judge, parser_of, spread, write_json
from benchmarks.running import prepared
from train import train
from vl_dist.run.interrupt import StopRequest
from vl_dist.run.metrics import Record
from vl_dist.run.outcome import Ending
from vl_dist.run.prepare import Run
from vl_dist.run.tracking import Tracking

BOUND = 0.01  # of the step's time
ROW_EVERY = 10  # steps: log.every_steps where nothing is set
SECONDS_TO_START = 15.0  # at most, until the trackers have taken what they were told at the start


@dataclass
class Stretches:
    """What was measured of one way to keep a record."""

    name: str
    run: Run
    step_ms: list[float] = field(default_factory=list)  # of each stretch, its mean
    tracker_cpu_ms: list[float] = field(default_factory=list)  # a step, threads and processes of trackers together


def stretches_of(run: Run, num_steps: int) -> list[Stretches]:
    """The ways that are compared; every stretch trains the plan's first steps."""
    silent = Record(
        run.config.run.output_dir, is_main=False, keep_to_step=0, data=run.data.train, plan=run.plan
    )  # as on ranks other than 0
    short = dataclasses.replace(run, plan=dataclasses.replace(run.plan, num_steps=num_steps))

    def way(name: str, *, every_steps: int = ROW_EVERY, recorded: bool = True, tracked: bool = True) -> Stretches:
        config = dataclasses.replace(run.config, log=dataclasses.replace(run.config.log, every_steps=every_steps))
        record = run.record if recorded else silent
        tracking = run.tracking if tracked else Tracking()
        return Stretches(name, dataclasses.replace(short, config=config, record=record, tracking=tracking))

    return [
        way("nothing written", recorded=False, tracked=False),
        way("the same again: how far chance alone goes", recorded=False, tracked=False),
        way(f"metrics.jsonl every {ROW_EVERY} steps, ledger.jsonl every step", tracked=False),
        way(f"and W&B offline and TensorBoard, every {ROW_EVERY} steps"),
        way("and W&B offline and TensorBoard, every step", every_steps=1),
    ]


def measure(ways: Sequence[Stretches], num_steps: int, rounds: int, home: Path) -> None:
    """All ways in turn, each round beginning with another; the first round does not count."""
    for n in range(rounds + 1):
        for k in range(len(ways)):
            way = ways[(n + k) % len(ways)]
            before, started = tracker_cpu_s(), time.perf_counter()
            train(way.run, StopRequest(home, watch_file=False), Ending(home, is_main=False))
            seconds = time.perf_counter() - started
            if n:
                way.step_ms.append(1000 * seconds / num_steps)
                way.tracker_cpu_ms.append(1000 * (tracker_cpu_s() - before) / num_steps)


def tracker_cpu_s() -> float:
    """CPU seconds so far of the trackers' threads, and of processes that this one started."""
    process = psutil.Process()
    own = {thread.native_id for thread in threading.enumerate() if thread.name.startswith(("tracker ", "wandb"))}
    threads = sum(times.user_time + times.system_time for times in process.threads() if times.id in own)
    children = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    return float(threads + children)


def wait_until(settled: Callable[[], bool], within_s: float) -> None:
    """Looks every half second."""
    until = time.monotonic() + within_s
    while not settled() and time.monotonic() < until:
        time.sleep(0.5)


def main() -> None:
    """The command."""
    given = parser_of("What keeping a record costs a step.", "tracking").parse_args()
    num_steps, rounds = (10, 1) if given.quick else (40, 5)
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        run = prepared(
            home, "data.eval=null", "data.num_workers=0", "log.wandb=offline", "log.tensorboard=true",
            "checkpoint.every_steps=100000",
        )  # fmt: skip
        wait_until(
            lambda: (home / "run" / "wandb").is_dir() and bool(list((home / "run").rglob("*.wandb"))), SECONDS_TO_START
        )
        ways = stretches_of(run, num_steps)
        with run.tracking:
            measure(ways, num_steps, rounds, home)
            run.tracking.end(0, "finished")
    results, base, cores = [], ways[0].step_ms, len(os.sched_getaffinity(0))
    table = Table(
        "record",
        "ms a step, median",
        "least to most",
        "more than nothing written",
        "trackers' CPU ms a step",
        "of all cores",
    )
    for way in ways:
        time_of = spread(way.step_ms)
        more = spread([own / least - 1 for own, least in zip(way.step_ms, base, strict=True)])
        cpu = sum(way.tracker_cpu_ms) / rounds  # a mean: the clock ticks ten milliseconds at a time
        share = cpu / time_of["median"] / cores
        figures = {"step_ms": time_of, "more": more, "tracker_cpu_ms": cpu, "tracker_cpu_share": share}
        results.append({"name": way.name, **figures})
        table.add_row(
            way.name,
            f"{time_of['median']:.2f}",
            f"{time_of['least']:.2f} to {time_of['most']:.2f}",
            "" if way is ways[0] else f"{100 * more['median']:+.2f} % ({judge(100 * more['median'], 100 * BOUND)} %)",
            f"{cpu:.2f}",
            f"{100 * share:.2f} %",
        )
    write_json(given.out, "tracking", results, quick=given.quick, steps=num_steps, rounds=rounds, bound=BOUND)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
