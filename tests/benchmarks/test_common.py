"""What all benchmarks share: what is written beside figures, and how memory is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table

from benchmarks.common import PeakMemory, judge, spread, table_rows, write_json
from tests.commands import ROOT, run_command


def test_figures_are_written_with_machine_versions_commit_and_date(tmp_path: Path) -> None:
    write_json(tmp_path / "made" / "some.json", "some", {"speed": 2.5}, quick=True)
    found = json.loads((tmp_path / "made" / "some.json").read_text())
    assert found["results"] == {"speed": 2.5} and found["settings"] == {"quick": True} and found["benchmark"] == "some"
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_gib"] > 0 and found["hardware"]["cpu"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "accelerate", "peft", "trl"} <= found["versions"].keys()
    assert found["date"].endswith("+00:00")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (found["commit"] or "").removesuffix("-changed") == head
    assert str(ROOT) not in json.dumps(found), "no path of a machine"


def test_peak_memory_is_what_was_added_inside_and_not_an_earlier_peak() -> None:
    device = torch.device("cpu")
    np.ones(60 * 2**20)  # 480 MiB that come and go
    with PeakMemory(device) as nothing:
        pass
    with PeakMemory(device) as some:
        np.ones(30 * 2**20)  # 240 MiB that come and go inside
    if some.gib is None or nothing.gib is None:
        pytest.skip("this kernel keeps a process's peak for good")
    assert nothing.gib < 0.1 and 0.2 < some.gib < 0.4


def test_median_and_ends_are_those_of_the_values() -> None:
    assert spread([3.0, 1.0, 10.0]) == {"median": 3.0, "least": 1.0, "most": 10.0}
    assert spread([4.0, 1.0, 2.0, 3.0])["median"] == 2.5
    assert judge(1.0, 1.0) == "within 1" and judge(1.1, 1.0) == "ABOVE 1"


def test_a_tables_rows_are_what_it_shows() -> None:
    table = Table("way", "s")
    table.add_row("one", "1.5")
    table.add_row("two", "2.5")
    assert table_rows(table) == [{"way": "one", "s": "1.5"}, {"way": "two", "s": "2.5"}]


def test_the_command_for_reports_writes_figures(tmp_path: Path) -> None:
    done = run_command(sys.executable, "-m", "benchmarks.report", "--quick", "--out", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert 0 < found["results"]["megabytes"] < 5 and found["results"]["seconds"]["median"] > 0
