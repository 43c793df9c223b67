"""Bad rows: left out and written down, or too many of them; the command and training agree."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

import train
from tests.commands import read_rows
from vl_dist.cli import main
from vl_dist.data.images import PatchShape
from vl_dist.data.record_files import BadRow
from vl_dist.data.records import Record
from vl_dist.data.validate import (
    ScannedFile,
    kinds_of,
    refuse_too_many_bad,
    scan,
    training_rows,
    write_bad_rows,
)
from vl_dist.errors import UserError
from vl_dist.settings import DataConfig, TrainFile

GOOD = ("cat.jpg", "rocket.jpg", "coffee.jpg", "china.jpg")


def row(name: str, image: str = "cat.jpg", answer: str = "A cat.") -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "COCO Yes:"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def data_of(path: Path, **others: Any) -> DataConfig:
    return DataConfig(train=(TrainFile(path=path),), **others)


MIXED = [row("a"), "{broken", row("b"), row("c", "absent.jpg"), row("b"), row("d", "rocket.jpg")]


@pytest.fixture
def data(tmp_path: Path, photos: Path) -> DataConfig:
    return data_of(write(tmp_path / "records.jsonl", MIXED), image_root=photos)


def test_rows_that_cannot_be_used_are_named_by_place_id_and_reason(data: DataConfig, shape: PatchShape) -> None:
    (file,) = scan(data, shape)
    assert [type(one) for one in file.rows] == [Record, BadRow, Record, BadRow, BadRow, Record]
    broken, absent, twice = file.bad
    assert (broken.id, broken.place) == (None, f"{data.train[0].path}, line 2")
    assert (absent.id, absent.place) == ("c", f"{data.train[0].path}, line 4")
    assert (twice.id, twice.place) == ("b", f"{data.train[0].path}, line 5")
    for one, part in ((broken, "JSON"), (absent, "image absent.jpg: there is no such file"), (twice, "line 3")):
        assert part in one.reason


def refuse(file: ScannedFile, max_bad_fraction: float) -> None:
    refuse_too_many_bad(file.path, file.bad, len(file.rows), max_bad_fraction)


def test_the_budget_is_a_fraction_of_each_files_rows(data: DataConfig, shape: PatchShape) -> None:
    (file,) = scan(data, shape)
    refuse(file, 0.5)
    with pytest.raises(UserError) as refused:
        refuse(file, 0.49)
    for part in ("3 of 6 records", "data.max_bad_fraction=0.49", "line 2", "line 4", "absent.jpg", "'c'", "line 5"):
        assert part in str(refused.value)


def test_a_message_about_many_bad_rows_names_the_first_few_and_their_number(tmp_path: Path, shape: PatchShape) -> None:
    path = write(tmp_path / "records.jsonl", [row(f"r{n}", "absent.jpg") for n in range(30)])
    with pytest.raises(UserError, match=r"30 of 30 records(.|\n)*line 5 (.|\n)*and 25 more") as refused:
        refuse(scan(data_of(path), shape)[0], 0.01)
    assert "line 6 " not in str(refused.value)


def test_the_last_rows_of_all_files_together_are_held_out_usable_or_not() -> None:
    assert training_rows([5], None) == training_rows([5], "held_out.jsonl") == [5]
    assert training_rows([5], "last:2") == [3]
    assert training_rows([4, 3], "last:2") == [4, 1]
    assert training_rows([4, 3], "last:3") == [4, 0]
    assert training_rows([4, 3, 1], "last:5") == [3, 0, 0]
    for held_out in ("last:5", "last:9"):
        with pytest.raises(UserError, match="only 5 records"):
            training_rows([5], held_out)


def test_the_command_refuses_where_nothing_is_left_to_train_on(
    recipe: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "records.jsonl", [row("a", "absent.jpg")])
    held = write(tmp_path / "held_out.jsonl", [row("b"), row("c")])
    assert main(["validate", str(recipe), f"data.eval={held}", "data.max_bad_fraction=1"]) == 2
    assert "None of the 1 records of data.train" in capsys.readouterr().err


def test_the_report_reads_back_and_an_empty_one_is_there_too(data: DataConfig, shape: PatchShape, tmp_path: Path) -> None:
    (file,) = scan(data, shape)
    write_bad_rows(tmp_path / "bad.jsonl", file.bad)
    assert [BadRow(**one) for one in read_rows(tmp_path / "bad.jsonl")] == list(file.bad)
    write_bad_rows(tmp_path / "none.jsonl", [])
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_like_reasons_are_counted_together() -> None:
    reasons = ["image a.jpg: there is no such file (x)", "image b c.jpg: there is no such file (y)", "the id 'a' was used"]
    assert kinds_of([BadRow(None, "p", reason) for reason in reasons]) == {
        "image: there is no such file": 2,
        "the id '...' was used": 1,
    }


@pytest.fixture
def recipe(tmp_path: Path, photos: Path, tiny_model: Path) -> Path:
    rows = [row(f"r{n}", image) for n, image in enumerate(GOOD)]
    settings = {
        "model": {"path": str(tiny_model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": str(write(tmp_path / "records.jsonl", rows)),
            "image_root": str(photos),
            "max_pixels": 84 * 112,
            "num_workers": 0,
        },
        "batch": {"examples_per_step": 2, "max_tokens_per_pack": 512},
        "optim": {"num_epochs": 1},
        "checkpoint": {"every_steps": 1},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command_counts_reports_and_accepts(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(recipe)]) == 0
    shown = capsys.readouterr().out
    for name, number in (("rows", 4), ("records", 4), ("examples", 4), ("images", 4), ("unusable rows", 0)):
        assert f"{name} {number}" in " ".join(shown.replace("│", " ").split())
    assert (tmp_path / "bad_rows.jsonl").read_text() == ""
    assert str(tmp_path / "bad_rows.jsonl") in shown


def test_the_command_reports_before_it_refuses(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "records.jsonl", MIXED)
    out = tmp_path / "report.jsonl"
    assert main(["validate", str(recipe), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert [one["id"] for one in read_rows(out)] == [None, "c", "b"]
    assert "unusable rows" in printed.out and "image: there is no such file" in printed.out
    assert "3 of 6 records" in printed.err and "Traceback" not in printed.err
    assert main(["validate", str(recipe), "data.max_bad_fraction=0.5", "--out", str(out)]) == 0
    assert main(["validate", str(recipe), "--out", str(out), "data.max_bad_fraction=0.5"]) == 0


def test_only_decoding_finds_what_is_cut_short(recipe: Path, tmp_path: Path, photos: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "cut.jpg").write_bytes((photos / "cat.jpg").read_bytes()[:5000])
    words = ["validate", str(recipe), f"data.image_root={root}"]
    write(tmp_path / "records.jsonl", [row("a", "cut.jpg")])
    assert main(words) == 0
    assert main([*words, "--decode"]) == 2
    assert "cannot be decoded" in read_rows(tmp_path / "bad_rows.jsonl")[0]["reason"]


@pytest.mark.parametrize("out", ["absent/report.jsonl", "records.jsonl/report.jsonl"])
def test_a_report_that_cannot_be_written_is_one_message(
    recipe: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(recipe), "--out", str(tmp_path / out)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_as_it_was")
def test_training_leaves_out_what_cannot_be_used_and_writes_it_down(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One missing image within the budget, and one example longer than a pack."""
    long = row("long", answer="A man riding a wave. " * 60)
    rows = [row(f"r{n}", image) for n, image in enumerate(GOOD)]
    write(tmp_path / "records.jsonl", [*rows, long, row("gone", "absent.jpg")])
    words = ["data.max_bad_fraction=0.2", "data.overflow=drop", "batch.max_tokens_per_pack=100"]
    assert train.main([str(recipe), *words]) == 0
    run = tmp_path / "run"
    assert [one["id"] for one in read_rows(run / "bad_rows.jsonl")] == ["gone", "long"]
    ledger = read_rows(run / "ledger.jsonl")
    assert (ledger[0]["step"], ledger[0]["dropped"]) == (0, "long")
    assert "a pack holds 100" in ledger[0]["reason"]
    assert sorted(name for one in ledger for name in one.get("ids", ())) == ["r0", "r1", "r2", "r3"]
    assert "1 rows, 1 examples longer than a pack" in capsys.readouterr().out


@pytest.mark.usefixtures("_as_it_was")
def test_a_run_that_goes_on_repeats_no_dropped_row_and_refuses_to_leave_out_others(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = row("long", answer="A man riding a wave. " * 60)
    rows = [row(f"r{n}", image) for n, image in enumerate(GOOD)]
    write(tmp_path / "records.jsonl", [*rows, long])
    words = [str(recipe), "data.overflow=drop", "batch.max_tokens_per_pack=100", "data.max_bad_fraction=0.9"]
    assert train.main([*words, "optim.max_steps=1"]) == 0
    going_on = [*words, "optim.max_steps=2", "run.allow_changes=true"]
    AcceleratorState._reset_state(True)
    assert train.main(going_on) == 0
    ledger = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert [one["dropped"] for one in ledger if "dropped" in one] == ["long"]
    assert [one["step"] for one in ledger if "ids" in one] == [1, 2]

    write(tmp_path / "records.jsonl", [row("r0", "absent.jpg"), *rows[1:], long])
    (tmp_path / "run" / "adapter" / "training_metadata.json").unlink()
    AcceleratorState._reset_state(True)
    capsys.readouterr()
    assert train.main([*words, "optim.max_steps=2"]) == 2
    assert "records or images changed since" in capsys.readouterr().err
