"""The lengths index: read back as it was measured, rebuilt when anything that decides on a length changes, built once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vl_dist.data import index, index_tables
from vl_dist.data.encode import Encoder
from vl_dist.data.examples import Examples
from vl_dist.data.images import PatchShape
from vl_dist.data.index import FOLDER, Indexer
from vl_dist.data.index_tables import IndexedFile
from vl_dist.settings import DataConfig, TrainFile


def line(name: str, image: str | None, answers: list[str], prompt: str = "COCO Yes:") -> str:
    content: list[dict[str, str]] = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    return json.dumps({"id": name, "messages": messages, "answers": answers}) + "\n"


@pytest.fixture
def records(tmp_path: Path, photos: Path) -> Path:
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "records.jsonl"
    path.write_text(
        line("cat", "photos/cat.jpg", ["A cat.", "A cat sits on a table.", "Ein “Kätzchen” 猫"])
        + "{broken\n"
        + line("text", None, ["A wave."], prompt="What is a wave?")
        + line("absent", "photos/absent.jpg", ["Nothing."])
        + line("again", "photos/cat.jpg", ["One cat."])
        + line("rocket", "photos/rocket.jpg", ["Two rockets."])
    )
    return path


def settings(records: Path, **changed: Any) -> DataConfig:
    return DataConfig(train=(TrainFile(path=records),), **({"max_pixels": 84 * 112} | changed))


class Counted(Encoder):
    """Counts what is encoded."""

    num_encoded = 0

    def encode(self, *arguments: Any) -> Any:
        self.num_encoded += 1
        return super().encode(*arguments)


def opened(records: Path, processor: Any, shape: PatchShape, data: DataConfig | None = None) -> tuple[IndexedFile, int]:
    """The index, and how many examples had to be encoded for it."""
    data = data or settings(records)
    encoder = Counted(processor, merge_size=2, end_token=data.end_token)
    return Indexer(processor, encoder, shape, data).open(records), encoder.num_encoded


def shown(file: IndexedFile) -> dict[str, Any]:
    examples = Examples([file.examples])
    return {
        "examples": list(examples),
        "ids": examples.ids(),
        "trunks": examples.trunks().tolist(),
        "columns": file.lengths.columns.tolist(),
        "rows": file.record_rows.tolist(),
        "places": list(file.places),
        "bad": file.bad,
        "num_rows": file.num_rows,
        "root": file.root,
    }


def test_what_comes_back_from_disk_is_what_was_measured_in_memory(records: Path, processor: Any, shape: PatchShape) -> None:
    in_memory, measured = opened(records, processor, shape, settings(records, lengths_cache=None))
    assert not (records.parent / FOLDER).exists() and measured == 6
    cold, encoded_cold = opened(records, processor, shape)
    warm, encoded_warm = opened(records, processor, shape)
    assert (encoded_cold, encoded_warm) == (6, 0)
    assert shown(in_memory) == shown(cold) == shown(warm)
    assert shown(warm)["ids"] == ["cat#0", "cat#1", "cat#2", "text#0", "again#0", "rocket#0"]
    assert shown(warm)["trunks"] == [0, 0, 0, 1, 0, 2]
    assert shown(warm)["places"][3] == "line 3"
    assert [row.place for row in warm.bad] == [f"{records}, line 2", f"{records}, line 4"]
    assert warm.uncached is None


def test_rows_are_small(tmp_path: Path, processor: Any, shape: PatchShape, photos: Path) -> None:
    path = tmp_path / "records.jsonl"
    captions = [f"A caption of the usual length about a cat, number {n}." for n in range(5)]
    path.write_text("".join(line(f"record-{n}", "cat.jpg", captions) for n in range(400)))
    opened(path, processor, shape, settings(path, image_root=photos))
    size = sum(file.stat().st_size for file in (tmp_path / FOLDER).rglob("*.arrow"))
    assert size / 2000 < 300


CHANGES: dict[str, dict[str, Any]] = {
    "pixels": {"max_pixels": 84 * 84},
    "end token": {"end_token": "<|endoftext|>"},
    "byte limit": {"max_image_bytes": 20_000_000},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_changed_setting_measures_anew_and_the_old_index_still_stands(
    records: Path, processor: Any, shape: PatchShape, changed: dict[str, Any]
) -> None:
    opened(records, processor, shape)
    data = settings(records, **changed)
    assert [opened(records, processor, shape, data)[1] for _ in range(2)] == [6, 0]
    assert opened(records, processor, shape)[1] == 0


def test_a_setting_that_decides_on_no_length_measures_nothing_anew(
    records: Path, processor: Any, shape: PatchShape
) -> None:
    opened(records, processor, shape)
    data = settings(records, share_prefix=True, shuffle=False, prompt="Other:", max_bad_fraction=0.5)
    assert opened(records, processor, shape, data)[1] == 0


def test_changed_records_template_or_tokenizer_measure_anew(records: Path, processor: Any, shape: PatchShape) -> None:
    opened(records, processor, shape)
    template = processor.chat_template
    try:
        processor.chat_template = template.replace("helpful", "most helpful")
        assert opened(records, processor, shape)[1] == 6
    finally:
        processor.chat_template = template
    records.write_text(records.read_text() + line("new", "photos/coffee.jpg", ["Coffee."]))
    assert opened(records, processor, shape)[1] == 7


def test_an_image_of_another_size_is_seen_and_one_that_came_or_went_too(
    records: Path, processor: Any, shape: PatchShape
) -> None:
    before, _ = opened(records, processor, shape)
    photos = records.parent / "photos"
    Image.new("RGB", (40, 400)).save(photos / "rocket.jpg")
    after, encoded = opened(records, processor, shape)
    assert encoded == 6
    assert before.lengths.tokens[5] != after.lengths.tokens[5]
    shutil.copy(photos / "coffee.jpg", photos / "absent.jpg")
    came, encoded = opened(records, processor, shape)
    assert encoded == 7 and len(came.bad) == 1
    (photos / "cat.jpg").unlink()
    gone, _ = opened(records, processor, shape)
    assert [row.id for row in gone.bad] == ["cat", None, "again"]
    assert opened(records, processor, shape)[1] == 0


@pytest.mark.parametrize("name", ["examples.arrow", "prompts.arrow", "images.arrow", "index.json"])
def test_an_index_that_was_cut_short_is_built_anew(records: Path, processor: Any, shape: PatchShape, name: str) -> None:
    whole, _ = opened(records, processor, shape)
    (path,) = (records.parent / FOLDER).rglob(name)
    path.write_bytes(path.read_bytes()[:-3])
    again, encoded = opened(records, processor, shape)
    assert encoded == 6 and shown(again) == shown(whole)


def test_text_only_files_and_files_without_a_usable_row_open_too(tmp_path: Path, processor: Any, shape: PatchShape) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line("a", None, ["A wave."]))
    assert [opened(path, processor, shape)[1] for _ in range(2)] == [1, 0]
    path.write_text("{broken\n")
    file, _ = opened(path, processor, shape)
    assert (len(file.lengths), len(file.bad), file.num_rows) == (0, 1, 1)


def test_a_folder_that_takes_no_index_leaves_it_in_memory_and_says_why(
    records: Path, processor: Any, shape: PatchShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, columns: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_tables, "_write_table", full)
    file, encoded = opened(records, processor, shape)
    assert encoded == 6 and len(file.lengths) == 6
    assert file.uncached is not None and "No space left" in file.uncached
    assert not [path for path in (records.parent / FOLDER).iterdir() if path.is_dir()]


def test_without_datasets_everything_is_in_memory(
    records: Path, processor: Any, shape: PatchShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, _ = opened(records, processor, shape)
    monkeypatch.setattr(index, "datasets_installed", lambda: False)
    file, encoded = opened(records, processor, shape)
    assert encoded == 6 and file.uncached is None
    assert shown(file) == shown(on_disk)


def test_only_the_indexes_used_last_are_kept(records: Path, processor: Any, shape: PatchShape) -> None:
    for n in range(index.NUM_KEPT + 3):
        opened(records, processor, shape, settings(records, max_pixels=84 * (84 + n)))
        for age, path in enumerate(sorted((records.parent / FOLDER).glob("*/"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    assert len(list((records.parent / FOLDER).glob("*/"))) == index.NUM_KEPT
    assert opened(records, processor, shape, settings(records, max_pixels=84 * (84 + n)))[1] == 0


WORKER = """
import sys, time
from pathlib import Path
from vl_dist.data import index, index_tables
from vl_dist.data.encode import Encoder
from vl_dist.model.load import load_processor, patch_shape
from vl_dist.settings import DataConfig, TrainFile

model, records, log = map(Path, sys.argv[1:4])
build = index.Indexer._build
def slow(self, path, on_progress):
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(3)
    return build(self, path, on_progress)
index.Indexer._build = slow
processor = load_processor(model)
data = DataConfig(train=(TrainFile(path=records),), max_pixels=84 * 112)
encoder = Encoder(processor, merge_size=2, end_token=None)
file = index.Indexer(processor, encoder, patch_shape(model, processor), data).open(records)
print(len(file.lengths), int(file.lengths.tokens.sum()))
"""


def test_four_processes_on_a_cold_cache_build_it_once(records: Path, tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", WORKER, str(tiny_model), str(records), str(log)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(printed) == 1 and printed.pop().startswith("6 ")
    assert log.read_text() == "built\n"


def test_chosen_examples_keep_their_file_and_their_smaller_bounds(records: Path, processor: Any, shape: PatchShape) -> None:
    file, _ = opened(records, processor, shape)
    both = Examples([file.examples, file.examples])
    assert len(both) == 12 and [both[n].file for n in (0, 11)] == [0, 1]
    assert both.trunks().tolist() == [0, 0, 0, 1, 0, 2, 3, 3, 3, 4, 3, 5]
    chosen = both.chosen(np.array([1, 4, 10]), {4: 3136})
    assert [(e.id, e.file, e.max_pixels) for e in chosen] == [
        ("cat#1", 0, None),
        ("again#0", 0, 3136),
        ("again#0", 1, None),
    ]
    assert chosen.trunks().tolist() == [0, 1, 2]
    assert [e.id for e in chosen[1:]] == ["again#0", "again#0"]
