"""CSV files, and Hugging Face datasets on disk and by name."""

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from tests.commands import run_command
from tests.data.sources.made import CAPTIONS, answers, csv_file, parquet_file, prepare, read_back, skipped


def test_csv_rows_of_one_image_become_one_record(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = csv_file(tmp_path / "data", photos), tmp_path / "out"
    assert prepare("csv", table, "--out", out) == 0
    records = read_back(out / "records.jsonl", tmp_path / "data")
    assert answers(records) == {f"pictures/{name}.jpg": tuple(texts) for name, texts in CAPTIONS.items()}
    assert f"data.image_root={tmp_path / 'data'}" in capsys.readouterr().out


def test_csv_with_absolute_paths_gets_the_folder_that_its_images_share(tmp_path: Path, photos: Path) -> None:
    table = tmp_path / "lists" / "table.csv"
    table.parent.mkdir()
    table.write_text(f"\ufefffile,text\n{photos / 'cat.jpg'},A cat.\n{photos / 'rocket.jpg'},A rocket.\n", encoding="utf-8")
    words = ("--image-column", "file", "--caption-column", "text")
    assert prepare("csv", table, *words, "--out", tmp_path / "out") == 0
    records = read_back(tmp_path / "out" / "records.jsonl", photos)
    assert answers(records) == {"cat.jpg": ("A cat.",), "rocket.jpg": ("A rocket.",)}
    assert all(record.single for record in records)


def test_csv_rows_that_cannot_be_used_are_skipped_each_with_its_reason(tmp_path: Path, photos: Path) -> None:
    table, out = csv_file(tmp_path / "data", photos), tmp_path / "out"
    rows = ["gone.jpg,A.", ",B.", "http://127.0.0.1/x.jpg,C.", "pictures/cat.jpg,  ", "table.csv,D."]
    with table.open("a") as file:
        file.write("\n".join(rows) + "\n")
    assert prepare("csv", table, "--out", out) == 0
    reasons = list(skipped(out).values())
    assert reasons[:4] == ["there is no such file", "no image path", "URLs are not fetched", "no caption"]
    assert reasons[4].startswith("not an image (JPEG, PNG")
    assert len(read_back(out / "records.jsonl", tmp_path / "data")) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,caption\na.jpg,A.\n", "has no column 'image_path'. Set --image-column to one of: path, caption."),
        ("", "has no column 'image_path'"),
        ('image_path,caption\n"a.jpg,A.\n', "cannot be read as CSV in UTF-8"),
        ("image_path,caption\ngone.jpg,A.\n", "gives no example that can be used; 1 rows were skipped. The first: row 1"),
        ("image_path,caption\n", "gives no example that can be used; 0 rows were skipped"),
        (None, "There is no file"),
    ],
)
def test_a_csv_that_cannot_be_used_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "table.csv").write_text(content)
    assert prepare("csv", tmp_path / "table.csv", "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_encoded_images_of_a_parquet_file_are_kept_byte_for_byte(tmp_path: Path, photos: Path) -> None:
    file, out = parquet_file(tmp_path / "captions.parquet", photos), tmp_path / "out"
    assert prepare("hf", file, "--out", out) == 0
    records = read_back(out / "records.jsonl")
    assert [record.answers for record in records] == [tuple(texts) for texts in CAPTIONS.values()]
    assert [record.image_paths[0] for record in records] == [f"images/train-000000{n}.jpg" for n in range(3)]
    kept = [(out / record.image_paths[0]).read_bytes() for record in records]
    assert kept == [(photos / f"{name}.jpg").read_bytes() for name in CAPTIONS]


def test_a_folder_of_parquet_files_has_the_splits_that_their_names_say(tmp_path: Path, photos: Path) -> None:
    for split in ("train", "test"):
        parquet_file(tmp_path / "data" / f"{split}-00000-of-00001.parquet", photos)
    words = ("--split", "test", "--max-examples", "6")
    assert prepare("hf", tmp_path / "data", *words, "--out", tmp_path / "out") == 0
    records = read_back(tmp_path / "out" / "records.jsonl")
    assert [(record.id, len(record.answers)) for record in records] == [("test-0000000", 5), ("test-0000001", 1)]


def test_a_dataset_saved_to_disk_with_other_columns_and_single_captions_is_read(tmp_path: Path, photos: Path) -> None:
    columns = {"picture": [str(photos / "cat.jpg"), str(photos / "coffee.jpg")], "text": ["A cat.", "Coffee."]}
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    words = ("--image-column", "picture", "--caption-column", "text")
    assert prepare("hf", tmp_path / "saved", *words, "--out", tmp_path / "out") == 0
    records = read_back(tmp_path / "out" / "records.jsonl")
    assert answers(records) == {"train-0000000": ("A cat.",), "train-0000001": ("Coffee.",)}


def test_parquet_rows_that_cannot_be_used_are_skipped_each_with_its_reason(tmp_path: Path, photos: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = (photos / "cat.jpg").read_bytes()
    png = io.BytesIO()
    Image.new("RGBA", (40, 30), (9, 9, 9, 0)).save(png, format="PNG")
    cells = [whole, whole[:5000], b"not an image", None, whole, png.getvalue()]
    table = pa.table({"image": pa.array(cells, pa.binary()), "caption": ["A.", "B.", "C.", "D.", None, "E."]})
    pq.write_table(table, tmp_path / "plain.parquet")
    out = tmp_path / "out"
    assert prepare("hf", tmp_path / "plain.parquet", "--out", out) == 0
    assert answers(read_back(out / "records.jsonl")) == {"train-0000000": ("A.",), "train-0000005": ("E.",)}
    assert (out / "images" / "train-0000005.png").read_bytes() == png.getvalue()
    reasons = skipped(out)
    assert list(reasons) == ["row 2", "row 3", "row 4", "row 5"]
    assert reasons["row 2"].startswith("cannot be decoded (")
    assert reasons["row 3"].startswith("not an image (")
    assert (reasons["row 4"], reasons["row 5"]) == ("no image", "no caption")


def test_a_missing_column_split_or_part_of_a_dataset_is_one_message(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = parquet_file(tmp_path / "data" / "train.parquet", photos)
    out = tmp_path / "out"
    assert prepare("hf", file, "--caption-column", "text", "--out", out) == 2
    assert "has no column 'text'. Set --caption-column to one of: image, caption." in capsys.readouterr().err
    assert prepare("hf", file.parent, "--split", "absent", "--out", out) == 2
    assert "(split absent) cannot be read as a dataset" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:4000])
    assert prepare("hf", file, "--out", out) == 2
    assert "cannot be read as a dataset" in capsys.readouterr().err
    (tmp_path / "table.xlsx").write_bytes(b"x")
    assert prepare("hf", tmp_path / "table.xlsx", "--out", out) == 2
    assert "must end in .parquet or .arrow" in capsys.readouterr().err
    assert not (out / "records.jsonl").exists()


def test_damage_in_the_middle_of_a_parquet_file_is_one_message_and_no_records(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [(photos / f"{name}.jpg").read_bytes() for name in ("cat", "coffee", "rocket", "china")]
    table = pa.table({"image": pa.array(cells, pa.binary()), "caption": ["A.", "B.", "C.", "D."]})
    file, out = tmp_path / "damaged.parquet", tmp_path / "out"
    pq.write_table(table, file, row_group_size=1, use_dictionary=False)
    start = pq.ParquetFile(file).metadata.row_group(2).column(0).data_page_offset
    data = file.read_bytes()
    file.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    assert prepare("hf", file, "--out", out) == 2
    assert "damaged.parquet (split train) cannot be read as a dataset" in capsys.readouterr().err
    assert not (out / "records.jsonl").exists()


def test_a_dataset_by_name_is_asked_for_by_name_and_its_cells_name_no_files_of_this_disk(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    plain = datasets.Dataset.from_dict({"image": [str(photos / "cat.jpg")], "caption": ["A cat."]})
    columns = {"image": [{"bytes": (photos / "cat.jpg").read_bytes(), "path": "cat.jpg"}], "caption": [["A cat.", "One."]]}
    encoded = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    def give(table: datasets.Dataset) -> None:
        def load(*words: Any, **options: Any) -> datasets.Dataset:
            asked.append((words, options))
            return table

        monkeypatch.setattr(datasets, "load_dataset", load)

    give(encoded)
    assert prepare("hf", "org/data", "--subset", "en", "--out", tmp_path / "out") == 0
    assert asked == [(("org/data", "en"), {"split": "train"})]
    assert answers(read_back(tmp_path / "out" / "records.jsonl")) == {"train-0000000": ("A cat.", "One.")}
    give(plain)
    assert prepare("hf", "org/data", "--out", tmp_path / "more") == 2
    assert skipped(tmp_path / "more") == {"row 1": "there is no such file"}


def test_a_dataset_on_a_hub_that_cannot_be_reached_ends_with_code_2_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = run_command(sys.executable, "-m", "vl_dist", "prepare", "hf", "org/absent", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "org/absent (split train) cannot be read as a dataset" in done.stderr
    assert "Check the name, the split and the network" in done.stderr
    assert "Traceback" not in done.stderr
