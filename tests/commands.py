"""The real commands, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_command(*words: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a command of this project from its root and waits for it."""
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def launch(config_file: str | None, *words: str, num_processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """`accelerate launch [--config_file accelerate_configs/X.yaml] [--num_processes N] train.py ...`."""
    chosen = ["--config_file", f"accelerate_configs/{config_file}"] if config_file else []
    if num_processes is not None:
        chosen += ["--num_processes", str(num_processes)]
    return run_command(sys.executable, "-m", "accelerate.commands.launch", *chosen, "train.py", *words)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]
