"""`python -m vl_dist predict`: what may be asked, and what becomes of an image that cannot be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.adapter.made import NAMES, PROMPT, export
from vl_dist import cli


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        return export(tiny_model, photos, tmp_path_factory.mktemp("predict"))[0]


@pytest.fixture
def ask(adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs predict and gives its code, its lines and its messages."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*words: str | Path, adapter: Path = adapter) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        code = cli.main(["predict", str(adapter), *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.split("\n")[:-1], err.splitlines()  # captions may hold other ends of lines

    return run


def records(path: Path, prompt: str = PROMPT) -> Path:
    def row(name: str, image: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return json.dumps({"id": name, "messages": [{"role": "user", "content": content}], "answers": ["?"]})

    path.write_text("\n".join([row("first", "rocket.jpg"), row("second", "cat.jpg")]) + "\n")
    return path


def test_images_a_folder_and_records_give_the_same_captions_whatever_the_batch(
    ask: Any, photos: Path, tmp_path: Path
) -> None:
    images = [photos / f"{name}.jpg" for name in sorted(NAMES)]
    code, lines, _ = ask(*images, "--json", "--batch-size", "2")
    assert code == 0
    rows = [json.loads(line) for line in lines]
    assert [row["image"] for row in rows] == [str(image) for image in images]
    captions = {Path(row["image"]).stem: row["caption"] for row in rows}
    assert len(set(captions.values())) > 1, "every caption is the same: nothing is compared"
    shutil.copytree(photos, tmp_path / "deep" / "photos")
    code, lines, _ = ask(tmp_path / "deep", "--batch-size", "5")
    assert code == 0
    assert lines == [f"{tmp_path}/deep/photos/{name}.jpg: {captions[name]}" for name in sorted(NAMES)]
    code, lines, _ = ask(records(tmp_path / "r.jsonl"), "--image-root", photos, "--json")
    assert code == 0
    assert [json.loads(line) for line in lines] == [
        {"id": "first", "caption": captions["rocket"]},
        {"id": "second", "caption": captions["cat"]},
    ]


def test_one_bad_image_is_one_line_and_the_others_are_captioned(ask: Any, photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((photos / "cat.jpg").read_bytes()[:500])
    rocket, cat, absent = photos / "rocket.jpg", photos / "cat.jpg", tmp_path / "absent.jpg"
    code, lines, errors = ask(rocket, bad, absent, cat, "--batch-size", "2")
    assert code == 2
    assert [line.split(": ")[0] for line in lines] == [str(rocket), str(cat)]
    assert errors[0].startswith(f"{bad}: error: image {bad}: ") and errors[1] == f"{absent}: error: there is no such file"
    assert errors[2].startswith(f"2 of 4 have no caption, first {bad}: ")
    code, lines, errors = ask(rocket, bad, "--json")
    assert code == 2 and len(errors) == 1
    assert [sorted(json.loads(line)) for line in lines] == [["caption", "image"], ["error", "image"]]


def test_other_pixels_and_prompts_need_their_flag_and_then_change_the_input(ask: Any, photos: Path, tmp_path: Path) -> None:
    rocket = photos / "rocket.jpg"
    other = records(tmp_path / "other.jsonl", "What is a wave?")
    for words, flag in (
        ((rocket, "--max-pixels", "3136"), "--allow-other-pixels"),
        ((rocket, "--prompt", "What is a wave?"), "--allow-other-prompt"),
        ((other, "--image-root", photos), "--allow-other-prompt"),
    ):
        code, lines, errors = ask(*words)
        assert (code, lines) == (2, [])
        assert len(errors) == 1 and flag in errors[0]
        code, lines, _ = ask(*words, flag)
        assert code == 0 and lines
    usual = ask(rocket)[1]
    assert ask(rocket, "--max-pixels", "9408")[1] == usual, "what training had needs no flag"
    assert ask(rocket, "--prompt", "What is a wave?", "--allow-other-prompt")[1] != usual


def test_what_is_wrong_with_the_words_is_one_message(ask: Any, photos: Path, tmp_path: Path) -> None:
    for words, part in (
        ((photos / "cat.jpg", "--batch-size", "0"), "--batch-size is 0"),
        ((tmp_path,), "holds no image"),
        ((tmp_path / "absent.jsonl",), "no record file"),
        ((photos / "cat.jpg", "--base", tmp_path), "There is no base model"),
    ):
        code, lines, errors = ask(*words)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert part in errors[0]
