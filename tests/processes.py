"""Processes as `accelerate launch` starts them, but forked from one that has imported everything: one second, not twenty.

That the launcher itself does the same is what the tests that use `tests.commands.launch` prove.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from tests.commands import ROOT

SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Started:
    """Ranks that run in the background."""

    processes: list[ForkServerProcess]
    log: Path

    def codes(self, within_s: float = SECONDS) -> list[int | None]:
        """Exit codes, in rank order; what is still there after so many seconds is killed and has none."""
        for process in self.processes:
            process.join(within_s)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """Ends what is left at once, as SIGKILL does."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def launcher_variables(config_file: str | None) -> dict[str, str]:
    """The environment variables that accelerate's launcher makes of one of our configurations."""
    variables = {"ACCELERATE_MIXED_PRECISION": "no"}
    if config_file is not None:
        config = yaml.safe_load((ROOT / "accelerate_configs" / config_file).read_text())
        fields = config.get("deepspeed_config")
        if fields is not None:
            variables["ACCELERATE_USE_DEEPSPEED"] = "true"
            variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = fields["deepspeed_config_file"]
            variables["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(fields)
    return variables


def start_ranks(
    action: Callable[..., Any], *arguments: Any, world_size: int, log: Path, config_file: str | None = None
) -> Started:
    """Runs `action(*arguments)` in `world_size` processes on the CPU; what they print goes to `log`.

    An integer that it returns is the process's exit code.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    variables = launcher_variables(config_file)
    processes = []
    for rank in range(world_size):
        own = dict(variables)
        if world_size > 1 or "ACCELERATE_USE_DEEPSPEED" in variables:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            own |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        processes.append(context.Process(target=_child, args=(own, str(log), action, arguments)))
    with _free_port() as port:
        for process in processes:
            process._args[0]["MASTER_PORT"] = str(port)
    for process in processes:
        process.start()
    return Started(processes, log)


def run_ranks(
    action: Callable[..., Any], *arguments: Any, world_size: int, log: Path, config_file: str | None = None
) -> list[int | None]:
    """As `start_ranks`, but waits for the end: exit codes in rank order."""
    return start_ranks(action, *arguments, world_size=world_size, log=log, config_file=config_file).codes()


def train_main(words: list[str]) -> int:
    """train.py with these words, in a process of ours."""
    import train

    return train.main(words)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def _child(variables: dict[str, str], log: str, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(variables, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code: Any = 1
    try:
        code = action(*arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - whatever it was, it goes to the log and the exit code says so
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
