"""Requests to stop: by signal, by file, and only once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vl_dist.run.interrupt import StopRequest, TimeLimit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_loop_asks_and_before_it_interrupts(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopRequest(tmp_path, watch_file=True)
    stop.listen()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    stop = StopRequest(tmp_path, watch_file=True)
    stop.listen()
    with stop.deferred():
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == ("Ctrl-C" if number == signal.SIGINT else number.name)


def test_a_second_ctrl_c_is_left_to_the_system(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, watch_file=True)
    stop.listen()
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_the_stop_file_is_seen_by_the_rank_that_watches_and_goes_when_honoured(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    stop, other = StopRequest(tmp_path, watch_file=True), StopRequest(tmp_path, watch_file=False)
    assert stop.reason is None, "a file of an earlier run stops nothing"
    with stop.deferred():
        (tmp_path / "STOP").touch()
        assert "STOP" in str(stop.reason)
        assert other.reason is None
    assert not (tmp_path / "STOP").exists()


@pytest.mark.parametrize(
    ("written", "reason"),
    [("Ctrl-C\n", "Ctrl-C"), ("x" * 200 + "\nmore", "x" * 80), (" \n", "the file "), ("", "the file ")],
)
def test_what_stands_in_the_stop_file_is_the_reason(tmp_path: Path, written: str, reason: str) -> None:
    stop = StopRequest(tmp_path, watch_file=True)
    with stop.deferred():
        (tmp_path / "STOP").write_text(written)
        assert str(stop.reason).startswith(reason) and len(str(stop.reason)) <= max(80, len(str(tmp_path)) + 20)


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_a_time_limit_leaves_room_for_the_longest_step_and_the_longest_save() -> None:
    clock = Clock()
    limit = TimeLimit(60.0, used_s=10.0, clock=clock)  # 50 seconds are left

    def step(seconds: float) -> bool:
        clock.passes(seconds)
        return limit.reached_after_step()

    assert not step(4)  # 46 left; another step, and a save that may last as long, take 8
    with limit.saving():
        clock.passes(10)  # 36 left
    assert not step(3)  # 33 left, 14 needed: the save was no step
    assert not step(9)  # 24 left, 19 needed
    assert step(6)  # 18 left, 19 needed


def test_a_time_limit_is_a_reason_to_stop(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequest(tmp_path, watch_file=True, limit=TimeLimit(5.0, used_s=0.0, clock=clock))
    stop.after_step()
    assert stop.reason is None
    clock.passes(3)
    stop.after_step()
    assert stop.reason == "run.max_time"


def test_an_evaluation_goes_on_until_the_time_limit_leaves_a_save_only(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequest(tmp_path, watch_file=True, limit=TimeLimit(20.0, used_s=0.0, clock=clock))
    with stop.saving():
        clock.passes(3)
    assert not stop.between_batches()
    clock.passes(13)
    assert not stop.between_batches() and stop.reason is None  # 4 seconds are left
    clock.passes(2)
    assert stop.between_batches() and stop.reason == "run.max_time"


def test_a_request_ends_an_evaluation_without_any_time_limit(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, watch_file=True)
    with stop.deferred():
        assert not stop.between_batches()
        (tmp_path / "STOP").touch()
        assert stop.between_batches()
