"""Who is gone and who stands still, from signs alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from vl_dist.run.alive import FOLDER, Seen, Sign, Watch, verdict

HERE = socket.gethostname()


def seen(rank: int, *, signs_ago: float, progress_ago: float, **sign: Any) -> Seen:
    fields = {"host": "elsewhere", "pid": 1, "progress": 5, "doing": "in step 5"} | sign
    return Seen(Sign(rank=rank, **fields), 100.0 - signs_ago, 100.0 - progress_ago)


def found(*ranks: Seen, stall_s: float | None = 50.0) -> str | None:
    return verdict(ranks, 100.0, gone_s=30.0, stall_s=stall_s)


def test_as_long_as_one_rank_moves_and_all_give_signs_the_run_goes_on() -> None:
    assert found(seen(0, signs_ago=1, progress_ago=80), seen(1, signs_ago=2, progress_ago=49)) is None
    assert found(seen(0, signs_ago=1, progress_ago=1e6), stall_s=None) is None


def test_where_none_moves_the_one_that_came_least_far_is_named_with_what_it_does() -> None:
    waiting = seen(0, signs_ago=1, progress_ago=60, progress=8)
    stuck = seen(1, signs_ago=1, progress_ago=61, progress=7, doing="loading after step 3")
    text = found(waiting, stuck)
    assert text is not None and "rank 1" in text and "loading after step 3" in text and "rank 0" not in text
    assert "stands still" in text and "run.stall_timeout=50" in text
    both = found(waiting, seen(1, signs_ago=1, progress_ago=60, progress=8))
    assert both is not None and "rank 0" in both and "rank 1" in both and "stand still" in both


def test_a_rank_without_signs_is_gone_and_one_that_ended_is_not() -> None:
    text = found(seen(0, signs_ago=1, progress_ago=1), seen(1, signs_ago=31, progress_ago=31))
    assert text is not None and "rank 1" in text and "is gone" in text
    assert found(seen(0, signs_ago=1, progress_ago=1), seen(1, signs_ago=99, progress_ago=99, ended=True)) is None
    assert found(seen(0, signs_ago=99, progress_ago=99, ended=True)) is None


def test_a_process_of_this_machine_that_died_is_gone_at_once_reaped_or_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert found(seen(1, signs_ago=0, progress_ago=0, host=HERE, pid=child.pid)) is not None
    child.wait()
    assert found(seen(1, signs_ago=0, progress_ago=0, host=HERE, pid=child.pid)) is not None
    assert found(seen(1, signs_ago=0, progress_ago=0, host=HERE, pid=os.getpid())) is None


def test_watching_writes_signs_and_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    Watch.clear(tmp_path)
    (tmp_path / FOLDER / "rank-00009.json").write_text("{torn")
    with Watch(tmp_path, 0, stall_s=None, on_verdict=lambda reason, first: None, between_s=0.02) as watch:
        watch.doing("in step 1")
        assert watch.others_gone(0.0) is None
    assert '"ended": true' in (tmp_path / FOLDER / "rank-00000.json").read_text()
    Watch.clear(tmp_path)
    assert list((tmp_path / FOLDER).iterdir()) == []
    Watch.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []
