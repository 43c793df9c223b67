"""From the command to the first step: `python -m benchmarks.starting [--quick] [--out FILE.json]`.

`accelerate launch train.py recipes/shapes.yaml` in a new process, from its start to the first row of ledger.jsonl; data and
model were made before. What imports take is Python's own account (`-X importtime`) of both processes, launcher and
trainer, in launches of their own: without W&B, which is imported in a thread beside other work. Bounds: 20 s beyond
imports, and 10 s for the self-test, which is also timed alone.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, child_environment, judge, parser_of, spread, write_json
from benchmarks.running import embedded, prepared
from vl_dist.run.files import LEDGER
from vl_dist.run.self_test import self_test

BOUND_S, SELF_TEST_BOUND_S = 20.0, 10.0
PATIENCE_S = 300.0
IMPORT_LINE = re.compile(r"^import time:\s+(\d+) \|")  # microseconds of the module itself


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch up to its first step."""

    seconds: float
    imports_s: float  # 0 where it was not asked for
    stages: tuple[tuple[float, str], ...]  # what it printed first after each pause, and when


def launch(home: Path, *, account_imports: bool) -> Launched:
    """Starts the run anew, waits for its first step and for its end.

    Raises:
        RuntimeError: it made no step.
    """
    words = ["run.resume=never", "optim.max_steps=1", *(["log.wandb=off"] if account_imports else [])]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", *embedded(home, *words)]
    environment = child_environment() | ({"PYTHONPROFILEIMPORTTIME": "1"} if account_imports else {})
    ledger, printed, errors = home / "run" / LEDGER, home / "printed", home / "errors"
    shutil.rmtree(home / "run", ignore_errors=True)
    with printed.open("w") as out, errors.open("w") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True)
        seen: dict[str, float] = {}
        while not (ledger.is_file() and ledger.stat().st_size):
            now = time.perf_counter() - started
            if process.poll() is not None or now > PATIENCE_S:
                process.kill()
                raise RuntimeError(f"no first step after {now:.0f} s:\n{errors.read_text()[-2000:]}")
            for line in printed.read_text().splitlines():
                seen.setdefault(line.strip().replace(str(home), "."), now)
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        account = errors.read_text()  # imports up to here; what comes after the first step does not count
        process.wait(PATIENCE_S)
    microseconds = sum(int(found[1]) for found in map(IMPORT_LINE.match, account.splitlines()) if found)
    return Launched(seconds, microseconds / 1e6, _stages(seen))


def _stages(seen: dict[str, float]) -> tuple[tuple[float, str], ...]:
    """The first line after each pause of a fifth of a second or more."""
    found, last = [], 0.0
    for line, when in seen.items():
        if line and when - last > 0.2:
            found.append((round(when, 2), line[:100]))
        last = when
    return tuple(found)


def self_test_s(home: Path) -> float:
    """Seconds of the self-test alone, in this process."""
    run = prepared(home, "run.resume=never", "log.wandb=off")
    started = time.perf_counter()
    self_test(run.model, run.data.train, run.ranks.device)
    return time.perf_counter() - started


def main() -> None:
    """The command."""
    given = parser_of("From the command to the first step.", "starting").parse_args()
    rounds = 1 if given.quick else 3
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        tested = [self_test_s(home) for _ in range(rounds)]  # makes data and model too
        launches, accounts = [], []
        for _ in range(rounds):
            launches.append(launch(home, account_imports=False))
            accounts.append(launch(home, account_imports=True))
    total, imports = spread([one.seconds for one in launches]), spread([one.imports_s for one in accounts])
    beyond = total["median"] - imports["median"]
    results = {
        "to_first_step_s": total,
        "imports_s": imports,
        "beyond_imports_s": beyond,
        "self_test_s": spread(tested),
        "stages": launches[-1].stages,
    }
    write_json(given.out, "starting", results, quick=given.quick, rounds=rounds, bounds=[BOUND_S, SELF_TEST_BOUND_S])
    table = Table("from the command to the first step", "s, median", "bound")
    table.add_row("all", f"{total['median']:.1f}", "")
    table.add_row("imports, launcher and trainer", f"{imports['median']:.1f}", "")
    table.add_row("beyond imports", f"{beyond:.1f}", judge(beyond, BOUND_S))
    self_tests = spread(tested)["median"]
    table.add_row("self-test alone", f"{self_tests:.2f}", judge(self_tests, SELF_TEST_BOUND_S))
    console = Console(width=120)
    console.print(table)
    for when, line in launches[-1].stages:
        console.print(f"{when:6.2f} s  {line}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
