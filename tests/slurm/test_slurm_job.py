"""launch/slurm.sbatch on a real SLURM of two nodes: it trains, stops, goes back into the queue, and says how it ended."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, read_rows
from tests.slurm.cluster import Cluster, missing_programs, running_cluster

CONFIG = "accelerate_configs/zero2.yaml"
NUM_STEPS = 60
STOPPED, WRONG_INPUT = 85, 2
SECONDS_FOR_A_JOB = 240.0  # a minute at most is usual; more on a machine with other work
SECRET = "canary-d41f8cd9"


def words(home: Path, output_dir: str, *more: str) -> list[str]:
    data = home / "data"
    return [
        f"shapes.dir={data}",
        "shapes.num_train=12",
        "shapes.num_eval=2",
        f"model.path={data}/model",
        f"data.train={data}/records.jsonl",
        f"data.eval={data}/eval.jsonl",
        "data.num_workers=1",
        "run.cpu_threads=1",
        "lora.dropout=0.1",
        "batch.examples_per_step=4",
        f"optim.max_steps={NUM_STEPS}",
        "optim.num_epochs=4",
        "eval.max_new_tokens=8",
        "log.every_steps=1",
        f"run.output_dir={home / output_dir}",
        *more,
    ]


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is no longer in the queue."""

    state: str
    code: int
    restarts: int
    log: str


class Jobs:
    """Jobs of launch/slurm.sbatch on one cluster, a directory for their logs and runs."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.home = home
        self._cluster = cluster
        self._environment = {
            **cluster.environment,
            "PYTHON": sys.executable,
            "PROCESSES_PER_NODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "WANDB_API_KEY": SECRET,
        }

    def submit(self, *command_words: str) -> str:
        """The job's number."""
        return self._cluster.command(
            "sbatch", "--parsable", "--nodes=2", "--time=60", f"--output={self.home}/job-%j.log", "launch/slurm.sbatch",
            *command_words, environment=self._environment,
        )  # fmt: skip

    def scancel(self, job: str, *options: str) -> None:
        self._cluster.command("scancel", *options, job)

    def until(self, job: str, happened: Callable[[], bool], what: str) -> None:
        self._cluster.until(happened, f"{what}; the job's log:\n{self._log(job)}\n", SECONDS_FOR_A_JOB)

    def ended(self, job: str) -> Ended:
        """Waits for a job to end for good."""
        self.until(job, lambda: self._cluster.command("squeue", "-h", "-j", job) == "", f"the end of job {job}")
        shown = self._cluster.command("scontrol", "show", "job", job)
        found = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        code = int(found["ExitCode"].split(":")[0])
        return Ended(found["JobState"], code, int(found["Restarts"]), self._log(job))

    def _log(self, job: str) -> str:
        path = self.home / f"job-{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    missing = missing_programs()
    if missing:
        reason = f"no SLURM here: {', '.join(missing)} not installed (Debian: slurm-wlm and munge)"
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Jobs(cluster, tmp_path_factory.mktemp("jobs"))


def trained_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train/loss"') if path.is_file() else 0


def repeatable(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without speeds and memory."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> Ended:
    return jobs.ended(jobs.submit("--config_file", CONFIG, *words(jobs.home, "undisturbed")))


@dataclass(frozen=True, slots=True)
class Stops:
    """One run that was stopped by scancel, went on in a second job, was stopped by SIGUSR1 there, and then finished."""

    cancelled: Ended
    cancelled_at: dict[str, Any]  # outcome.json then
    requeued: Ended
    after_usr1: int  # steps done when SIGUSR1 was sent


@pytest.fixture(scope="module")
def stops(jobs: Jobs, undisturbed: Ended) -> Stops:
    run = jobs.home / "stopped"
    command = ("--config_file", CONFIG, *words(jobs.home, run.name))
    job = jobs.submit(*command)
    jobs.until(job, lambda: trained_steps(run) >= 3, "three steps")
    jobs.scancel(job)
    cancelled = jobs.ended(job)
    cancelled_at = outcome(run)
    steps = trained_steps(run)
    job = jobs.submit(*command)
    jobs.until(job, lambda: trained_steps(run) >= steps + 3, "three more steps")
    steps = trained_steps(run)
    jobs.scancel(job, "--signal=USR1")
    return Stops(cancelled, cancelled_at, jobs.ended(job), steps)


def test_two_nodes_train_to_the_end(jobs: Jobs, undisturbed: Ended) -> None:
    assert (undisturbed.state, undisturbed.code, undisturbed.restarts) == ("COMPLETED", 0, 0), undisturbed.log
    assert outcome(jobs.home / "undisturbed") == {"code": 0, "reason": "finished", "step": NUM_STEPS}
    assert "devices  2 x cpu" in undisturbed.log
    assert len(repeatable(jobs.home / "undisturbed")) == NUM_STEPS + 1


def test_scancel_leaves_a_checkpoint_and_no_job(stops: Stops) -> None:
    assert (stops.cancelled.state, stops.cancelled.restarts) == ("CANCELLED", 0), stops.cancelled.log
    assert stops.cancelled_at["code"] == STOPPED
    assert 3 <= stops.cancelled_at["step"] < NUM_STEPS
    assert f"Ended with code {STOPPED} at step {stops.cancelled_at['step']}" in stops.cancelled.log


def test_after_sigusr1_the_job_is_requeued_and_ends_as_if_it_had_never_stopped(jobs: Jobs, stops: Stops) -> None:
    assert (stops.requeued.state, stops.requeued.code, stops.requeued.restarts) == ("COMPLETED", 0, 1), stops.requeued.log
    assert stops.after_usr1 < NUM_STEPS
    assert f"Ended with code {STOPPED}" in stops.requeued.log and "Ended with code 0" in stops.requeued.log
    run, undisturbed = jobs.home / "stopped", jobs.home / "undisturbed"
    assert repeatable(run) == repeatable(undisturbed)
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (undisturbed / adapter).read_bytes()
    assert not (run / "STOP").exists()


def test_wrong_settings_end_the_job_with_code_2_and_one_message(jobs: Jobs) -> None:
    ended = jobs.ended(jobs.submit("--config_file", CONFIG, "optim.lrr=1"))
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", WRONG_INPUT, 0), ended.log
    assert "optim.lrr" in ended.log and "srun" not in ended.log and len(ended.log.splitlines()) < 5


def test_no_secret_of_the_environment_is_in_a_log_or_a_file_of_a_run(jobs: Jobs, stops: Stops) -> None:
    files = [path for path in jobs.home.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert not (ROOT / ".deepspeed_env").exists()
