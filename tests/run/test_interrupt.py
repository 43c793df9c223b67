"""Requests to stop: by signal, by file, and only once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vl_dist.run.interrupt import StopRequest

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
        assert stop.reason == number.name


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
