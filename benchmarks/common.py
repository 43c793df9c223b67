"""What every benchmark writes beside its figures: the machine, the versions, the commit and the date."""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.table import Table

PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "peft", "trl", "deepspeed", "datasets", "qwen-vl-utils", "wandb",
    "tensorboard",
)  # fmt: skip
ROOT = Path(__file__).parent.parent


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """A command line with `--quick` and `--out`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a look whether it works: few examples, rough figures")
    default = Path(f"runs/benchmark/{name}.json")
    parser.add_argument("--out", type=Path, default=default, help=f"file that gets the figures ({default})")
    return parser


def write_json(path: Path, benchmark: str, results: Any, **settings: Any) -> None:
    """Figures with all that one must know to take them again.

    Args:
        path: its folder is made if it is not there.
        benchmark: the module's name.
        settings: what the command was told, and what was found out before measuring.
    """
    made = {"benchmark": benchmark, **provenance(), "settings": settings, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    sys.stdout.write(f"written to {path}\n")


def provenance() -> dict[str, Any]:
    """Date, commit, hardware and versions; no name of the machine and no path on it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GiB and the names of visible GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "busy_before": round(os.getloadavg()[0], 2),  # a minute's mean of processes that wanted a core, this one's included
    }


def versions() -> dict[str, str | None]:
    """Of Python and of what the figures depend on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with `-changed` where tracked files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-changed" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and both ends."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "least": ordered[0], "most": ordered[-1]}


def table_rows(table: Table) -> list[dict[str, str]]:
    """What a table shows, for JSON."""
    cells = [list(column.cells) for column in table.columns]
    names = [str(column.header) for column in table.columns]
    return [dict(zip(names, map(str, row), strict=True)) for row in zip(*cells, strict=True)]


def judge(found: float, bound: float) -> str:
    """What to print beside a figure that has an upper bound."""
    return f"{'within' if found <= bound else 'ABOVE'} {bound:g}"


class PeakMemory:
    """Most memory, in GiB, that was added inside: allocated on a CUDA device, or resident in this process.

    `gib` stays None where the kernel does not let a process forget its earlier peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.gib: float | None = None
        self._device = device

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _forget_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is None:
            return
        on_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else _status_bytes()["VmHWM"]
        self.gib = max(0, peak - self._before) / 2**30


def child_environment() -> dict[str, str]:
    """For processes of this project that a benchmark starts: on the CPU, and nothing reaches for a hub."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _forget_peak() -> int | None:
    """Makes the present resident memory the peak; its bytes, or None where that cannot be done."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that earlier ways freed would count as there before
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes()["VmRSS"]
    except (OSError, AttributeError, KeyError):
        return None


def _status_bytes() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
