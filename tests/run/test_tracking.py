"""The boundary: whatever a tracker does, calls return at once and the end comes in time."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vl_dist.evaluate.held_out import Sample
from vl_dist.run.tracking import MAX_FAILURES, Background, ShownSample, Tracking


@dataclass
class Stub:
    """Does something at each call, and writes down what it was told."""

    act: Callable[[str], None] = lambda _call: None
    name: str = "Stub"
    told: list[tuple[str, Any]] = field(default_factory=list)
    abandoned: bool = False

    def _tell(self, call: str, what: Any = None) -> None:
        self.act(call)
        self.told.append((call, what))

    def start(self) -> None:
        self._tell("start")

    def log(self, row: dict[str, Any]) -> None:
        self._tell("log", row)

    def samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        self._tell("samples", (step, list(samples)))

    def adapter(self, directory: Path, step: int, aliases: Sequence[str]) -> None:
        self._tell("adapter", (directory, step, tuple(aliases)))

    def alert(self, title: str, text: str) -> None:
        self._tell("alert", (title, text))

    def finish(self, code: int) -> None:
        self._tell("finish", code)

    def abandon(self) -> None:
        self.abandoned = True


class Failing:
    """Raises at some calls."""

    def __init__(self, *calls: str) -> None:
        self.calls = calls

    def __call__(self, call: str) -> None:
        if call in self.calls:
            raise ConnectionError("no route\nto the host")


def run(stub: Stub, *, num_rows: int = 5, limit_s: float = 5.0, capacity: int = 256) -> tuple[list[str], float]:
    """What a person was told, and the seconds that the calls before the end took."""
    said: list[str] = []
    tracking = Tracking([Background(stub, said.append, capacity=capacity)])
    began = time.monotonic()
    for step in range(num_rows):
        tracking.log({"step": step})
    took = time.monotonic() - began
    tracking.close(0, limit_s=limit_s)
    return said, took


def sample(name: str, score: float) -> Sample:
    return Sample(name, (), ("a",), "b", False, score)


def test_everything_arrives_once_in_order_and_the_code_last() -> None:
    stub = Stub()
    said, _ = run(stub)
    assert stub.told == [("start", None), *(("log", {"step": step}) for step in range(5)), ("finish", 0)]
    assert said == [] and not stub.abandoned


def test_a_tracker_that_cannot_start_is_switched_off_with_one_line() -> None:
    stub = Stub(Failing("start"))
    said, _ = run(stub)
    assert stub.told == [] and stub.abandoned
    assert said == ["Stub is switched off (ConnectionError: no route). Training goes on; metrics.jsonl has everything."]


def test_a_tracker_that_fails_again_and_again_is_switched_off_once() -> None:
    stub, calls = Stub(Failing("log")), []
    stub.act = lambda call, fail=stub.act: (calls.append(call), fail(call))[0]
    said, _ = run(stub, num_rows=20)
    assert calls == ["start"] + ["log"] * MAX_FAILURES
    assert len(said) == 1 and "switched off" in said[0]


def test_a_failure_now_and_then_costs_only_that_call() -> None:
    count = iter(range(100))

    def every_other(call: str) -> None:
        if call == "log" and next(count) % 2:
            raise ValueError

    stub = Stub(every_other)
    said, _ = run(stub, num_rows=10)
    assert [what["step"] for call, what in stub.told if call == "log"] == [0, 2, 4, 6, 8]
    assert stub.told[-1] == ("finish", 0) and said == []


@pytest.mark.parametrize("blocks_at", ["start", "log", "finish"])
def test_a_tracker_that_blocks_for_30_s_holds_up_neither_the_loop_nor_the_end(blocks_at: str) -> None:
    released = threading.Event()
    stub = Stub(lambda call: (call == blocks_at and released.wait(30), None)[1])
    began = time.monotonic()
    said, took = run(stub, num_rows=50, limit_s=0.3, capacity=8)
    whole = time.monotonic() - began
    released.set()
    assert took < 5 and whole < 10  # not 30
    assert stub.abandoned and len(said) == 1 and "did not finish in time" in said[0]


def test_a_slow_tracker_loses_what_its_queue_does_not_hold_and_says_so() -> None:
    go_on = threading.Event()
    stub = Stub(lambda call: (call == "start" and go_on.wait(30), None)[1])
    said: list[str] = []
    tracking = Tracking([Background(stub, said.append, capacity=4)])
    for step in range(10):
        tracking.log({"step": step})
    go_on.set()
    tracking.close(0, limit_s=10)
    assert [what["step"] for call, what in stub.told if call == "log"] == [0, 1, 2, 3]
    assert stub.told[-1] == ("finish", 0)
    assert len(said) == 1 and "6 calls" in said[0]


def test_one_tracker_in_trouble_leaves_the_others_alone() -> None:
    bad, good = Stub(Failing("start")), Stub()
    with Tracking([Background(bad, lambda _: None), Background(good, lambda _: None)]) as tracking:
        tracking.log({"step": 1})
        tracking.end(0, "finished")
    assert good.told == [("start", None), ("log", {"step": 1}), ("finish", 0)]


def test_the_same_few_samples_are_shown_with_the_change_of_their_scores() -> None:
    stub = Stub()
    tracking = Tracking([Background(stub, lambda _: None)], num_samples=3, last_scores={"s0": 1.0})
    for step, gain in ((4, 0.5), (8, 1.0)):
        tracking.samples(step, [sample(f"s{n}", n + gain) for n in range(10)])
    tracking.close(0, limit_s=5)
    shown = [(step, [(one.sample.id, one.change) for one in rows]) for call, (step, rows) in stub.told[1:3]]
    assert shown == [(4, [("s0", -0.5), ("s3", None), ("s6", None)]), (8, [("s0", 0.5), ("s3", 0.5), ("s6", 0.5)])]


def test_a_stop_and_an_error_are_alerts_without_secrets() -> None:
    stopped, failed = Stub(), Stub()
    with Tracking([Background(stopped, lambda _: None)]) as tracking:
        tracking.end(85, "stopped by SIGTERM")
    with (
        pytest.raises(ValueError, match="not finite"),
        Tracking([Background(failed, lambda _: None)], hide=lambda text: text.replace("s3cret", "*")) as tracking,
    ):
        raise ValueError("loss is not finite s3cret")
    assert stopped.told[1:] == [("alert", ("The run was stopped", "It is stopped by SIGTERM.")), ("finish", 85)]
    assert failed.told[1:] == [("alert", ("The run failed", "loss is not finite *")), ("finish", 1)]


def test_without_trackers_nothing_happens() -> None:
    with Tracking() as tracking:
        tracking.log({"step": 1})
        tracking.samples(1, [sample("s", 1.0)])
        tracking.end(0, "finished")
    assert tracking.last_scores == {}
