"""A SLURM of two nodes on this one machine, in one directory: its own key, sockets, ports and processes.

The nodes' names are two addresses of the loopback interface, so that nothing outside the directory, a hosts file say, needs
to know them. Every daemon stays a child of this process; jobs are found by the configuration file in their environment.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.commands import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = ("127.0.0.11", "127.0.0.12")
SECONDS_TO_START = 60.0
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=10
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire is also how long a requeued job is held back, two minutes by default; after that it waits for sched_interval.


def missing_programs() -> list[str]:
    """What is not installed of what a cluster needs."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"  # where Debian puts daemons


class Cluster:
    """A running cluster."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = os.environ | {"SLURM_CONF": str(home / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Returns when both nodes take jobs.

        Raises:
            AssertionError: a daemon ended, or the nodes did not come up in time; with the logs.
        """
        (self.home / "state").mkdir()
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        text = CONFIGURATION.format(
            home=self.home,
            host=socket.gethostname().split(".")[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            ports=_free_ports(3),
            nodes=NODES,
        )
        (self.home / "slurm.conf").write_text(text)
        # --force: the directories of a test are not owned as munge wants those of a system
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={self.home}/munge.{name.split('-')[0]}" for name in
                     ("socket", "key-file", "pid-file", "log-file", "seed-file")))  # fmt: skip
        self.until(lambda: (self.home / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            (self.home / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self.command("sinfo", "-h", "-o", "%T %D") == "idle 2", "two idle nodes")

    def _daemon(self, name: str, *words: str) -> None:
        with (self.home / f"{name}{''.join(words[-1:])}.log".replace("/", "_")).open("wb") as log:
            self._daemons.append(
                subprocess.Popen([name, *words], env=self.environment, stdout=log, stderr=log, cwd=self.home)
            )

    def until(self, happened: Callable[[], bool], what: str, within_s: float = SECONDS_TO_START) -> None:
        """Waits; every daemon must go on meanwhile."""
        give_up = time.monotonic() + within_s
        while not happened():
            assert all(daemon.poll() is None for daemon in self._daemons), f"a daemon ended:\n{self.logs()}"
            assert time.monotonic() < give_up, f"waited in vain for {what}:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.home.glob("*.log")))

    def command(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """What a SLURM command prints; empty where it fails."""
        done = subprocess.run(
            words, cwd=ROOT, env=environment or self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def stop(self) -> None:
        """Ends all jobs, then the daemons, then whatever is left of either."""
        self.command("scancel", "--state=PENDING,RUNNING,SUSPENDED", "--signal=KILL", "--full", "--me")
        self.command("scancel", "--me")
        for daemon in reversed(self._daemons):  # munged last: the others talk through it to the end
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._left():
            with suppress(psutil.Error):
                process.kill()

    def _left(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid():
                    yield process


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextmanager
def running_cluster(home: Path) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = Cluster(home)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
