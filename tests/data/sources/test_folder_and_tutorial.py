"""Folders of images with text files, and the tutorial's data_vl.json."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.data.sources.made import CAPTIONS, answers, official_coco, prepare, read_back, skipped
from vl_dist.config import load
from vl_dist.data.records import examples_of
from vl_dist.data.sources.command import closing_message
from vl_dist.data.sources.write import Prepared, choose_root
from vl_dist.errors import UserError
from vl_dist.rules import held_out_count


def test_images_with_text_files_become_records_of_one_caption_a_line(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "my photos"
    (folder / "deep").mkdir(parents=True)
    for name, texts in CAPTIONS.items():
        (folder / "deep" / f"{name}.JPG").write_bytes((photos / f"{name}.jpg").read_bytes())
        (folder / "deep" / f"{name}.txt").write_text("\n\n".join(f" {text}\r" for text in texts))
    (folder / "silent.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    (folder / "empty.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    (folder / "empty.txt").write_text(" \n")
    assert prepare("folder", folder, "--out", tmp_path / "out") == 0
    expected = {f"deep/{name}.JPG": tuple(texts) for name, texts in CAPTIONS.items()}
    assert answers(read_back(tmp_path / "out" / "records.jsonl", folder)) == expected
    assert skipped(tmp_path / "out") == {"silent.jpg": "no .txt file of the same name", "empty.jpg": "no caption"}


def test_the_next_command_that_is_said_can_be_typed_as_it_stands(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    (folder / "cat.txt").write_text("A cat.")
    assert prepare("folder", folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(said.removeprefix("Next: "))
    assert words[:4] == ["accelerate", "launch", "train.py", "recipes/coco2014_tutorial.yaml"]
    settings = dict(word.split("=", 1) for word in words[4:])
    assert settings["data.train"] == str(tmp_path / "out" / "records.jsonl")
    assert settings["data.image_root"] == str(folder)
    assert settings["data.eval"] == "null"  # the recipe holds four records out; here is only one


@pytest.mark.parametrize(
    ("num_records", "num_examples", "recipe"),
    [(82_783, 414_113, "coco2014_fast"), (414_113, 414_113, "coco2014_tutorial"), (100, 500, "coco2014_tutorial")],
)
def test_many_images_with_several_answers_each_are_for_the_fast_recipe(
    num_records: int, num_examples: int, recipe: str
) -> None:
    made = Prepared(
        file="records.jsonl",
        num_records=num_records,
        num_examples=num_examples,
        num_images=num_records,
        image_root=None,
        skipped={},
    )
    said = closing_message(made, Path("out"), was_there=False).splitlines()[-1]
    assert f" recipes/{recipe}.yaml data.train=out/records.jsonl model.path=" in said
    config = load(ROOT / "recipes" / f"{recipe}.yaml")
    assert config.data.eval is not None and 10 * held_out_count(config.data.eval) <= num_records
    assert config.data.share_prefix == (recipe == "coco2014_fast")


@pytest.mark.parametrize(("made", "said"), [(False, "There is no folder"), (True, "holds no image (.bmp, .gif")])
def test_a_folder_without_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: bool, said: str
) -> None:
    if made:
        (tmp_path / "photos").mkdir()
    assert prepare("folder", tmp_path / "photos", "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_the_tutorials_json_gives_the_same_examples_as_when_it_is_read_as_it_is(tmp_path: Path, photos: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    root = official_coco(tmp_path / "coco", photos)
    assert prepare("coco2014", "--root", root, "--as-tutorial", "--out", first) == 0
    assert prepare("tutorial-json", first / "data_vl.json", "--out", out) == 0
    as_it_is = examples_of(read_back(first / "data_vl.json"))
    converted = examples_of(read_back(out / "records.jsonl", first))
    assert [(e.id, e.answer, e.prompt[0].text) for e in converted] == [(e.id, e.answer, e.prompt[0].text) for e in as_it_is]
    assert [str(first / e.image_paths[0]) for e in converted] == [e.image_paths[0] for e in as_it_is]


def conversation(name: Any, value: str) -> dict[str, Any]:
    turns = [{"from": "user", "value": value}, {"from": "assistant", "value": "A cat."}]
    return {"id": name, "conversations": turns}


def test_conversations_that_are_not_the_tutorials_are_skipped_each_with_its_reason(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    image = "COCO Yes: <|vision_start|>{}<|vision_end|>"
    rows = [
        conversation("a", image.format("cat.jpg")),
        conversation("a", image.format("cat.jpg")),
        conversation("b", "cat.jpg"),
        conversation("c", image.format("gone.jpg")),
        "text",
        conversation("d\ud800", image.format("cat.jpg")),
        conversation("e", image.format("cat\0.jpg")),
        conversation("f", image.format("x" * 300)),
        conversation("g", image.format(".")),
    ]
    (tmp_path / "data_vl.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert prepare("tutorial-json", tmp_path / "data_vl.json", "--prompt", "What?", "--out", out) == 0
    (record,) = read_back(out / "records.jsonl", tmp_path)
    assert (record.id, record.prompt[0].text) == ("a", "What?")
    reasons = skipped(out)
    assert reasons["conversation 2"] == "its id was used before ('a' in conversation 1)"
    assert reasons["conversation 3"].startswith("the user turn must hold one image path")
    assert reasons["conversation 4"] == "there is no such file"
    assert reasons["conversation 5"].startswith("conversations must be")
    assert reasons["conversation 6"] == "its id holds what cannot be written as UTF-8"
    assert {reasons[f"conversation {n}"] for n in (7, 8, 9)} == {"there is no such file"}


@pytest.mark.parametrize(
    ("content", "said"), [(None, "There is no file"), ("{", "is not JSON"), ("{}", "must hold a list")]
)
def test_a_file_that_is_not_the_tutorials_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "data_vl.json").write_text(content)
    assert prepare("tutorial-json", tmp_path / "data_vl.json", "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_images_outside_the_files_folder_get_the_folder_that_they_are_in_as_image_root(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lists").mkdir()
    rows = [conversation("a", f"<|vision_start|>{photos / 'cat.jpg'}<|vision_end|>")]
    (tmp_path / "lists" / "data_vl.json").write_text(json.dumps(rows))
    assert prepare("tutorial-json", tmp_path / "lists" / "data_vl.json", "--out", tmp_path / "out") == 0
    assert f"Image paths are relative to {photos}: set data.image_root to it." in capsys.readouterr().out
    assert len(read_back(tmp_path / "out" / "records.jsonl", photos)) == 1


def test_images_with_no_folder_in_common_but_the_whole_disk_are_refused() -> None:
    with pytest.raises(UserError, match="have no folder in common"):
        choose_root([Path("/a/1.jpg"), Path("/b/2.jpg")], Path("/c"), Path("/d"))
