"""Preparing that is interrupted anywhere and started again ends with the same bytes; what is there is left alone."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.sources.made import csv_file, official_coco, parquet_file, prepare, read_back, tree
from vl_dist.data.sources.files import claimed


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


def kill_at(n: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ends the n-th time that something is written, or about to be renamed, or just was."""
    calls = [0]

    def counted(step: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == n and not after:
                raise KilledError
            result = step(*args, **kwargs)
            if calls[0] == n:
                raise KilledError
            return result

        return run

    monkeypatch.setattr(os, "fsync", counted(os.fsync, after=False))
    monkeypatch.setattr(Path, "replace", counted(Path.replace, after=True))
    return calls


def hf_words(data: Path, photos: Path) -> tuple[Sequence[str | Path], str]:
    return ("hf", parquet_file(data / "captions.parquet", photos)), "records.jsonl"


def tutorial_words(data: Path, photos: Path) -> tuple[Sequence[str | Path], str]:
    return ("coco2014", "--root", official_coco(data, photos), "--as-tutorial"), "data_vl.json"


def csv_words(data: Path, photos: Path) -> tuple[Sequence[str | Path], str]:
    file = csv_file(data, photos)
    with file.open("a") as rows:
        rows.write("gone.jpg,A.\n")
    return ("csv", file), "records.jsonl"


@pytest.mark.parametrize("make", [hf_words, tutorial_words, csv_words])
def test_killed_at_any_write_and_started_again_it_ends_with_the_bytes_of_an_undisturbed_run(
    make: Callable[[Path, Path], tuple[Sequence[str | Path], str]], tmp_path: Path, photos: Path
) -> None:
    words, last = make(tmp_path / "data", photos)
    out = tmp_path / "out"
    assert prepare(*words, "--out", out) == 0
    undisturbed = tree(out)
    n, completed = 0, False
    while not completed:
        n += 1
        shutil.rmtree(out)
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(n, patch)
            try:
                prepare(*words, "--out", out)
                completed = calls[0] < n
            except KilledError:
                pass
        if (out / last).exists():  # it is only there with all else
            assert tree(out) == undisturbed
        for name, data in tree(out).items():
            assert name.endswith(".part") or name == "prepare.json" or data == undisturbed[name]
        assert prepare(*words, "--out", out) == 0
        assert tree(out) == undisturbed
    assert n > 5


def test_a_second_start_writes_nothing_and_says_so(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    assert prepare(*words, "--out", tmp_path / "out") == 0
    first = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(*words, "--out", tmp_path / "out") == 0
    second = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert "was complete already; nothing was written" in second
    assert second.splitlines()[1:] == first.splitlines()[1:]


def test_images_that_an_interrupted_run_saved_are_not_written_again(tmp_path: Path, photos: Path) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    out = tmp_path / "out"
    assert prepare(*words, "--out", out) == 0
    (out / "records.jsonl").unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert prepare(*words, "--out", out) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == times
    assert len(read_back(out / "records.jsonl")) == 3


def test_a_folder_that_holds_another_preparation_is_refused_with_what_differs(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    out = tmp_path / "out"
    assert prepare(*words, "--out", out) == 0
    before = tree(out)
    assert prepare(*words, "--max-examples", "6", "--out", out) == 2
    assert "max_examples: None -> 6" in capsys.readouterr().err
    assert tree(out) == before


def test_a_source_that_changed_since_is_not_taken_for_the_one_that_was_prepared(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = csv_words(tmp_path / "data", photos)
    assert prepare(*words, "--out", tmp_path / "out") == 0
    with (tmp_path / "data" / "table.csv").open("a") as rows:
        rows.write("pictures/cat.jpg,Another caption.\n")
    assert prepare(*words, "--out", tmp_path / "out") == 2
    assert "remove records.jsonl from it" in capsys.readouterr().err
    (tmp_path / "out" / "records.jsonl").unlink()
    assert prepare(*words, "--out", tmp_path / "out") == 0
    assert "Another caption." in (tmp_path / "out" / "records.jsonl").read_text()


def test_files_that_prepare_did_not_write_are_never_overwritten(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = csv_file(tmp_path / "data", photos)
    (tmp_path / "data" / "records.jsonl").write_text("mine")
    assert prepare("csv", table, "--out", tmp_path / "data") == 2
    assert "was not written by prepare" in capsys.readouterr().err
    assert (tmp_path / "data" / "records.jsonl").read_text() == "mine"
    words, _ = hf_words(tmp_path / "more", photos)
    (tmp_path / "data" / "records.jsonl").unlink()
    (tmp_path / "data" / "images").mkdir()
    assert prepare(*words, "--out", tmp_path / "data") == 2
    assert "images is there already" in capsys.readouterr().err


def test_a_wrong_option_that_is_mended_is_not_held_against_the_folder(tmp_path: Path, photos: Path) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    assert prepare(*words, "--image-column", "picture", "--out", tmp_path / "out") == 2
    assert prepare(*words, "--out", tmp_path / "out") == 0


def test_two_preparations_do_not_write_into_one_folder_at_once(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = csv_words(tmp_path / "data", photos)
    with claimed(tmp_path / "out", {}, ("records.jsonl",)):
        assert prepare(*words, "--out", tmp_path / "out") == 2
    assert "Another prepare is writing to" in capsys.readouterr().err
    assert prepare(*words, "--out", tmp_path / "out") == 0


def test_a_disk_without_space_is_one_message_and_starting_again_goes_on(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        assert prepare(*words, "--out", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert prepare(*words, "--out", tmp_path / "out") == 0
    assert len(read_back(tmp_path / "out" / "records.jsonl")) == 3


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"source": {}})])
def test_a_marker_that_prepare_did_not_write_is_refused(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    table = csv_file(tmp_path / "data", photos)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.json").write_text(content)
    assert prepare("csv", table, "--out", tmp_path / "out") == 2
    assert "prepare.json was not written by prepare" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = csv_file(tmp_path / "data", photos)
    assert prepare("csv", table, "--out", table) == 2
    assert "which is a file" in capsys.readouterr().err
    assert prepare("csv", table, "--max-examples", "0", "--out", tmp_path / "out") == 2
    assert "--max-examples is 0; it must be 1 or more" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_the_code_of_what_can_go_on(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = hf_words(tmp_path / "data", photos)
    with monkeypatch.context() as patch:

        def pressed(_: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "fsync", pressed)
        with pytest.raises(SystemExit) as ended:
            prepare(*words, "--out", tmp_path / "out")
    assert ended.value.code == 85
    assert capsys.readouterr().out == "Stopped. The same command goes on from here.\n"
    assert prepare(*words, "--out", tmp_path / "out") == 0
