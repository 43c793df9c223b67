"""COCO 2014: the official files, the tutorial's two files, and a hub that does not give the data."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.commands import ROOT, run_command
from tests.data.sources.made import CAPTIONS, IDS, answers, official_coco, prepare, read_back, skipped
from vl_dist.config import load


@pytest.fixture
def root(tmp_path: Path, photos: Path) -> Path:
    return official_coco(tmp_path / "coco", photos)


def expected_answers() -> dict[str, tuple[str, ...]]:
    return {str(IDS[name]): tuple(texts) for name, texts in CAPTIONS.items()}


def test_five_captions_of_an_image_become_one_record_and_no_image_is_copied(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare("coco2014", "--root", root, "--out", out) == 0
    records = read_back(out / "records.jsonl", root)
    assert answers(records) == expected_answers()
    assert {record.prompt[0].text for record in records} == {"COCO Yes:"}
    assert sorted(path.name for path in out.iterdir()) == ["prepare.json", "records.jsonl"]
    said = capsys.readouterr().out
    assert "3 records, 15 examples, 3 images." in said
    assert f"data.image_root={root}" in said
    assert f"data.train={out / 'records.jsonl'}" in said


def test_records_written_beside_the_images_need_no_image_root(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("coco2014", "--root", root, "--out", root) == 0
    assert answers(read_back(root / "records.jsonl")) == expected_answers()
    assert "image_root" not in capsys.readouterr().out


def test_images_that_are_links_to_another_disk_still_resolve_under_the_image_root_that_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "big-disk"
    (root / "train2014").rename(elsewhere)
    (root / "train2014").symlink_to(elsewhere)
    assert prepare("coco2014", "--root", root, "--out", tmp_path / "out") == 0
    assert f"data.image_root={elsewhere}" in capsys.readouterr().out
    assert len(read_back(tmp_path / "out" / "records.jsonl", elsewhere)) == 3


def test_max_examples_counts_captions_and_the_split_and_prompt_are_the_ones_given(tmp_path: Path, photos: Path) -> None:
    root = official_coco(tmp_path / "coco", photos, split="val")
    words = ("--split", "val", "--max-examples", "7", "--prompt", "Describe.")
    assert prepare("coco2014", "--root", root, "--out", tmp_path / "out", *words) == 0
    records = read_back(tmp_path / "out" / "records.jsonl", root)
    assert [len(record.answers) for record in records] == [5, 2]
    assert records[0].prompt[0].text == "Describe."


def test_images_that_are_missing_cut_short_or_unlisted_are_skipped_with_their_reasons(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((root / "train2014").iterdir())
    images[0].unlink()  # by id: rocket, coffee, cat
    images[1].write_bytes(images[1].read_bytes()[:5000])
    file = root / "annotations" / "captions_train2014.json"
    content = json.loads(file.read_text())
    content["annotations"].append({"image_id": 77, "id": 99, "caption": "Nothing."})
    file.write_text(json.dumps(content))
    out = tmp_path / "out"
    assert prepare("coco2014", "--root", root, "--out", out) == 0
    assert list(answers(read_back(out / "records.jsonl", root))) == [str(IDS["cat"])]
    reasons = skipped(out)
    assert reasons["image 9"] == "there is no such file"
    assert reasons["image 116100"].startswith("cannot be decoded (")
    assert reasons["image 77"] == "captions of an image that the file does not list"
    said = capsys.readouterr().out
    assert "3 rows were skipped (" in said
    assert "there is no such file: 1; cannot be decoded: 1" in said or "cannot be decoded: 1; there is no such" in said


def test_the_tutorials_files_are_byte_for_byte_what_its_own_code_writes(root: Path, tmp_path: Path) -> None:
    import pandas as pd

    out = tmp_path / "out"
    notes = json.loads((root / "annotations" / "captions_train2014.json").read_text())
    notes["annotations"][1]["caption"] = 'A "big" café, \n or a table. '
    (root / "annotations" / "captions_train2014.json").write_text(json.dumps(notes))
    assert prepare("coco2014", "--root", root, "--as-tutorial", "--max-examples", "7", "--out", out) == 0

    rows = notes["annotations"][:7]
    paths = [os.path.abspath(out / "coco_2014_caption" / f"{row['image_id']}.jpg") for row in rows]  # noqa: PTH100
    table = pd.DataFrame({"image_path": paths, "caption": [row["caption"] for row in rows]})
    table.to_csv(tmp_path / "expected.csv", index=False)
    assert (out / "coco-2024-dataset.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    conversations = [
        {
            "id": f"identity_{i + 1}",
            "conversations": [
                {"from": "user", "value": f"COCO Yes: <|vision_start|>{table.iloc[i]['image_path']}<|vision_end|>"},
                {"from": "assistant", "value": table.iloc[i]["caption"]},
            ],
        }
        for i in range(len(table))
    ]
    with (tmp_path / "expected.json").open("w", encoding="utf-8") as file:
        json.dump(conversations, file, ensure_ascii=False, indent=2)
    assert (out / "data_vl.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert not (out / "records.jsonl").exists()


def test_the_tutorials_recipe_finds_everything_when_started_in_the_output_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert prepare("coco2014", "--root", root, "--as-tutorial", "--out", out) == 0
    config = load(ROOT / "recipes" / "coco2014_tutorial.yaml")
    assert config.data.image_root is None
    monkeypatch.chdir(out)
    records = read_back(config.data.train[0].path)
    assert [record.id for record in records] == [f"identity_{n}" for n in range(1, 16)]
    assert records[0].image_paths == (str(out / "coco_2014_caption" / f"{IDS['cat']}.jpg"),)


def hub_table(photos: Path) -> Any:
    import datasets

    names = ["cat", "coffee", "cat"]
    columns = {
        "image_id": [str(IDS[name]) for name in names],
        "caption": ["A cat.", " A cup.", "Again the cat."],
        "image": [Image.open(photos / f"{name}.jpg") for name in names],
    }
    return datasets.Dataset.from_dict(columns)


def test_rows_of_the_hub_are_saved_as_the_tutorial_saves_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelscope.msdatasets import MsDataset

    asked: list[Any] = []

    def give(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return hub_table(photos)

    monkeypatch.setattr(MsDataset, "load", staticmethod(give))
    out = tmp_path / "out"
    assert prepare("coco2014", "--out", out) == 0
    assert asked == [("modelscope/coco_2014_caption", {"subset_name": "coco_2014_caption", "split": "train"})]
    assert answers(read_back(out / "records.jsonl")) == {"318556": ("A cat.", "Again the cat."), "116100": ("A cup.",)}
    Image.open(photos / "cat.jpg").save(tmp_path / "expected.jpg")
    assert (out / "coco_2014_caption" / "318556.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()

    assert prepare("coco2014", "--out", out) == 0  # all there: the hub is not asked again
    assert len(asked) == 1


def test_a_hub_whose_files_are_gone_is_one_message_that_names_the_other_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelscope.msdatasets import MsDataset

    def gone(name: str, **options: Any) -> Any:
        raise FileNotFoundError("train_images.zip")

    monkeypatch.setattr(MsDataset, "load", staticmethod(gone))
    assert prepare("coco2014", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    for words in ("FileNotFoundError", "prepare coco2014 --root", "prepare hf", "prepare csv", "prepare tutorial-json"):
        assert words in said
    assert list((tmp_path / "out").iterdir()) == []


def test_an_image_that_the_hub_loses_halfway_is_the_same_message_and_no_records(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelscope.msdatasets import MsDataset

    class Losing:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> Any:
            if number == 2:
                raise FileNotFoundError("COCO_train2014_000000000009.jpg")
            return hub_table(photos)[number]

    monkeypatch.setattr(MsDataset, "load", staticmethod(lambda name, **options: Losing()))
    out = tmp_path / "out"
    assert prepare("coco2014", "--out", out) == 2
    assert "prepare coco2014 --root" in capsys.readouterr().err
    assert not (out / "records.jsonl").exists()
    monkeypatch.setattr(MsDataset, "load", staticmethod(lambda name, **options: hub_table(photos)))
    assert prepare("coco2014", "--out", out) == 0
    assert len(read_back(out / "records.jsonl")) == 2


def test_the_real_client_without_a_network_ends_with_code_2_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_API_MAX_RETRIES", "1")
    done = run_command(sys.executable, "-m", "vl_dist", "prepare", "coco2014", "--out", tmp_path / "out", timeout_s=120)
    assert done.returncode == 2
    assert done.stderr.startswith("modelscope/coco_2014_caption could not be fetched")
    assert "prepare coco2014 --root" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda root: (root / "annotations" / "captions_train2014.json").unlink(),
            "captions_train2014.json does not exist",
        ),
        (lambda root: (root / "annotations" / "captions_train2014.json").write_text("{}"), "is not COCO's"),
        (lambda root: (root / "annotations" / "captions_train2014.json").write_text("{"), "is not COCO's"),
        (lambda root: (root / "train2014").rename(root / "images"), "train2014 does not exist"),
    ],
)
def test_a_layout_that_is_not_the_official_one_is_refused_and_nothing_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    spoil(root)
    assert prepare("coco2014", "--root", root, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_another_prompt_for_the_tutorials_own_format_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--as-tutorial", "--prompt", "Describe.", "--out", tmp_path / "out")
    assert prepare("coco2014", "--root", root, *words) == 2
    assert "set data.prompt in training" in capsys.readouterr().err
