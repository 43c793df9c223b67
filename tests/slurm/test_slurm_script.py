"""What launch/slurm.sbatch decides, with `srun` and `scontrol` that only write down what they are asked. Needs no SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$NOTES/srun"
for signal in $SIGNALS; do kill "-$signal" "$PPID"; sleep 0.2; done
cp "$NOTES/outcome.json" "$OUTPUT_DIR" 2>/dev/null
exit 1
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo first; echo second; else echo "$@" > "$NOTES/$1"; fi
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder for what the two commands write down; they stand in `bin`, the output directory is `run`."""
    for name in ("bin", "run"):
        (tmp_path / name).mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(notes: Path) -> dict[str, str]:
    """That of a job of two nodes with four GPUs each."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    outside.pop("PROCESSES_PER_NODE", None)
    return outside | {
        "PATH": f"{notes / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "NOTES": str(notes),
        "OUTPUT_DIR": str(notes / "run"),
        "SIGNALS": "",
        "SLURM_JOB_ID": "20007",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }


def batch(notes: Path, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script."""
    command = ["launch/slurm.sbatch", *words, f"run.output_dir={notes / 'run'}"]
    return run(command, environment(notes) | changed)


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("signals", "restarts", "code", "step", "requeued"),
    [
        ("USR1", 0, 85, 3, True),
        ("USR1", 1, 85, 4, True),
        ("USR1", 1, 85, 3, False),  # no step since it was requeued at 3: it would go on like that for ever
        ("USR1 USR1 TERM", 0, 85, 9, False),  # a person had enough
        ("TERM", 0, 85, 9, False),
        ("", 0, 85, 9, False),  # a STOP file that a person made
        ("USR1", 0, 0, 9, False),  # finished just then
        ("USR1", 0, None, 9, False),  # an earlier run's 85 does not count
    ],
)
def test_a_job_is_requeued_only_when_the_scheduler_stopped_it_in_order_and_it_goes_forward(
    notes: Path, signals: str, restarts: int, code: int | None, step: int, requeued: bool
) -> None:
    earlier = {"code": 85, "reason": "stopped by SIGUSR1", "step": 3}
    (notes / "run" / "outcome.json").write_text(json.dumps(earlier))
    if code is not None:
        (notes / "outcome.json").write_text(json.dumps({"code": code, "reason": "why it ended", "step": step}))
    ended = batch(notes, SIGNALS=signals, SLURM_RESTART_COUNT=str(restarts))
    assert ended.returncode == (1 if code is None else code), ended.stderr
    assert (notes / "requeue").exists() == requeued
    assert not (notes / "run" / "STOP").exists()
    assert ("why it ended" in ended.stdout) == (code is not None)
    assert ("Stopping after this step" in ended.stderr) == (signals != "")


@pytest.mark.parametrize("distributed_type", ["MULTI_GPU", "'DEEPSPEED'"])
def test_nodes_processes_and_rendezvous_come_from_the_job(notes: Path, distributed_type: str) -> None:
    config = notes / "config.yaml"
    config.write_text(f"num_machines: 1\ndistributed_type: {distributed_type} # how\n")
    batch(notes, "--num_machines", "7", "--config_file", str(config), "recipes/shapes.yaml", "optim.lr=1e-3")
    words = (notes / "srun").read_text().split("\n")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words)
    given = {
        name: words[len(words) - words[::-1].index(name)] for name in words if name.startswith("--") and "=" not in name
    }
    assert given["--num_machines"] == "2" and given["--num_processes"] == "8"
    assert given["--main_process_ip"] == "first" and given["--main_process_port"] == "10007"
    assert given["--config_file"] == str(config)
    # the other launchers of DeepSpeed write the environment into a file, or need ssh
    assert given.get("--deepspeed_multinode_launcher") == ("standard" if "DEEPSPEED" in distributed_type else None)
    train = words.index("train.py")
    assert words[train + 1 : train + 3] == ["recipes/shapes.yaml", "optim.lr=1e-3"]


@pytest.mark.parametrize(("node", "is_host"), [("0", "1"), ("1", "0")])
def test_the_first_node_alone_opens_the_port(notes: Path, node: str, is_host: str) -> None:
    command = ["launch/slurm_node.sh", str(notes / "run"), "train.py"]
    ended = run(command, environment(notes) | {"PYTHON": "echo", "SLURM_NODEID": node})
    assert ended.stdout.split()[1:] == [
        "--machine_rank", node, "--rdzv_backend", "c10d", "--rdzv_conf", f"is_host={is_host},read_timeout=600", "train.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "changed", "message"),
    [
        (["absent.yaml"], {}, "absent.yaml"),
        (["--config_file"], {}, "--config_file needs a value"),
        (["--config_file", "absent.yaml"], {}, "There is no absent.yaml"),
        (["--config_file", "accelerate_configs/one_gpu.yaml"], {}, "is for one process; this job has 8"),
        ([], {"SLURM_GPUS_ON_NODE": ""}, "no GPUs"),
        ([], {"PROCESSES_PER_NODE": "two"}, "PROCESSES_PER_NODE=N"),
        (
            [],
            {"SLURM_JOB_ID": ""},
            "SLURM_JOB_ID is not set: this is no SLURM job. Start it with sbatch launch/slurm.sbatch",
        ),
    ],
)
def test_what_cannot_work_ends_with_code_2_and_one_message_before_anything_is_launched(
    notes: Path, words: list[str], changed: dict[str, str], message: str
) -> None:
    ended = run(["launch/slurm.sbatch", *words], environment(notes) | changed)
    assert ended.returncode == 2
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (notes / "srun").exists()
