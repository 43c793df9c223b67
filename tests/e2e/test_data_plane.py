"""Whole runs over shared prompts, several files, and images that go bad meanwhile."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

import train
from tests.commands import read_rows
from tests.examples import packed_model
from vl_dist.run.checkpoint import save_adapter

PHOTOS = ("cat.jpg", "rocket.jpg", "coffee.jpg", "china.jpg")
CAPTIONS = ("A cat.", "A cat sits on a wooden table.", "Two rockets stand side by side under a clear sky.")


def row(name: str, image: str, answer: str | None = None) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "COCO Yes:"}]
    messages: list[Any] = [{"role": "user", "content": content}]
    if answer is None:
        return json.dumps({"id": name, "messages": messages, "answers": CAPTIONS}) + "\n"
    return json.dumps({"id": name, "messages": [*messages, {"role": "assistant", "content": answer}]}) + "\n"


@pytest.fixture
def home(tmp_path: Path, photos: Path, tiny_model: Path) -> Iterator[Path]:
    """A folder with images, records, an adapter to start from, and a recipe."""
    shutil.copytree(photos, tmp_path / "images")
    (tmp_path / "records.jsonl").write_text("".join(row(name.split(".")[0], f"images/{name}") for name in PHOTOS))
    save_adapter(packed_model(tiny_model).peft_model, tmp_path / "adapter")
    settings = {
        "model": {"path": str(tiny_model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "init_from": str(tmp_path / "adapter")},
        "data": {"train": str(tmp_path / "records.jsonl"), "max_pixels": 84 * 112, "num_workers": 0},
        "batch": {"examples_per_step": 4, "max_tokens_per_pack": 512},
        "optim": {"num_epochs": 1, "lr": 1e-3},
        "checkpoint": {"every_steps": 1},
        "log": {"every_steps": 1},
        "run": {"output_dir": str(tmp_path / "run"), "cpu_threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    yield tmp_path
    AcceleratorState._reset_state(True)


def run(home: Path, *words: str, code: int = 0) -> Path:
    AcceleratorState._reset_state(True)
    assert train.main([str(home / "recipe.yaml"), *words]) == code
    return home / "run"


def ids_of(run_dir: Path) -> list[list[str]]:
    return [one["ids"] for one in read_rows(run_dir / "ledger.jsonl") if "ids" in one]


def test_a_shared_prompt_trains_the_same_whether_the_file_groups_its_captions_or_not(home: Path) -> None:
    """Steps are whole groups either way; only how they are encoded differs, and with it the number of tokens."""
    grouped = read_rows(run(home, "data.share_prefix=true", "batch.examples_per_step=6") / "metrics.jsonl")
    ledger = ids_of(home / "run")
    assert sorted(len(ids) for ids in ledger) == [6, 6]
    assert all(len({name.split("#")[0] for name in ids}) == 2 for ids in ledger)
    assert run(home, "data.share_prefix=true", "batch.examples_per_step=6") and ids_of(home / "run") == ledger

    # The same examples in the same steps, a row each: one file alone, in the order of the ledger.
    rows = [row(name, f"images/{name.split('#')[0]}.jpg", CAPTIONS[int(name[-1])]) for ids in ledger for name in ids]
    (home / "flat.jsonl").write_text("".join(rows))
    flat = [f"data.train={home / 'flat.jsonl'}", "data.shuffle=false", "batch.examples_per_step=6"]
    alone = read_rows(run(home, *flat, f"run.output_dir={home / 'alone'}") and home / "alone" / "metrics.jsonl")
    shared = read_rows(
        run(home, *flat, "data.share_prefix=true", f"run.output_dir={home / 'shared'}")
        and home / "shared" / "metrics.jsonl"
    )
    for one, two, three in zip(alone, shared, grouped, strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert three["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert one["train/target_tokens"] == two["train/target_tokens"] == three["train/target_tokens"]
        speed = [step["perf/tokens_per_s"] / step["perf/target_tokens_per_s"] for step in (one, two, three)]
        assert speed[0] > 2 * speed[1] == pytest.approx(2 * speed[2])
    assert ids_of(home / "alone") == ids_of(home / "shared") == ledger


def test_files_with_weights_come_as_often_as_they_say_and_find_their_own_images(home: Path) -> None:
    other = home / "elsewhere"
    other.mkdir()
    shutil.copy(home / "images" / "flower.jpg", other / "photo.jpg")
    (other / "more.jsonl").write_text(row("flower", "photo.jpg", "A flower.") + row("again", "photo.jpg", "One flower."))
    files = f"data.train=[{{path: {home / 'records.jsonl'}, weight: 0.5}}, {{path: {other / 'more.jsonl'}, weight: 2}}]"
    done = run(home, files, "optim.num_epochs=2", "data.eval=last:1")
    rows = read_rows(done / "ledger.jsonl")
    by_epoch = [[name for one in rows if one["epoch"] == epoch for name in one.get("ids", ())] for epoch in (0, 1)]
    for ids in by_epoch:
        assert (len(ids), ids.count("flower"), ids.count("again")) == (8, 2, 0)
    of_first_file = {name for ids in by_epoch for name in ids} - {"flower"}
    assert len(of_first_file) == 12, "two halves are the whole file"
    for one in (row for row in rows if "as_planned" in row):
        assert (one["as_planned"], one["missing"], one["repeated"]) == (13, [], [])
    assert read_rows(done / "samples" / "step-000000.jsonl")[0]["id"] == "again"
    assert "weight: 0.5" in (done / "config.yaml").read_text()


def test_an_id_in_two_files_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "more.jsonl").write_text(row("cat", "images/cat.jpg"))
    run(home, f"data.train=[{home / 'records.jsonl'}, {home / 'more.jsonl'}]", code=2)
    message = capsys.readouterr().err
    assert "'cat#0'" in message and "records.jsonl" in message and "more.jsonl" in message


def test_weights_that_leave_nothing_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(home, f"data.train=[{{path: {home / 'records.jsonl'}, weight: 0.01}}]", code=2)
    assert "leave no example" in capsys.readouterr().err


def tear(home: Path, name: str) -> None:
    path = home / "images" / name
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("share", ["false", "true"])
def test_an_image_that_cannot_be_decoded_leaves_its_steps_and_is_written_down_once(home: Path, share: str) -> None:
    tear(home, "cat.jpg")  # its header is whole: only decoding finds it
    words = ["data.max_bad_fraction=0.3", "optim.num_epochs=2", f"data.share_prefix={share}"]
    rows = read_rows(run(home, *words) / "ledger.jsonl")
    cats = [f"cat#{n}" for n in range(3)]
    for epoch, last in ((0, 3), (1, 6)):
        trained = [name for one in rows if one.get("epoch") == epoch for name in one.get("ids", ())]
        assert sorted(trained) == sorted(f"{name}#{n}" for name in ("rocket", "coffee", "china") for n in range(3))
        coverage = next(one for one in rows if one.get("epoch") == epoch and "as_planned" in one)
        assert (coverage["step"], coverage["as_planned"], coverage["missing"]) == (last, 9, cats)
    dropped = [one for one in rows if "dropped" in one]
    assert sorted(one["dropped"] for one in dropped) == sorted(2 * cats)
    assert all("cat.jpg: cannot be decoded" in one["reason"] for one in dropped)
    bad = read_rows(home / "run" / "bad_rows.jsonl")
    assert sorted(one["id"] for one in bad) == cats and {one["place"] for one in bad} == {"while training"}
    targets = {one["step"]: one["train/target_tokens"] for one in read_rows(home / "run" / "metrics.jsonl")}
    assert targets == {one["step"]: one["targets"] for one in rows if "ids" in one}


def test_more_late_faults_than_the_budget_end_the_run_also_when_a_resume_lies_between(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(row(f"{n}", f"images/{name}", "A cat.") for n, name in enumerate(PHOTOS))
    (home / "records.jsonl").write_text(rows)
    tear(home, "cat.jpg")
    tear(home, "china.jpg")
    words = ["data.shuffle=false", "batch.examples_per_step=1", "data.max_bad_fraction=0.25"]
    run(home, *words, code=2)
    message = capsys.readouterr().err
    assert "2 of 4 examples" in message and "0: image images/cat.jpg" in message and "3: image" in message
    assert read_rows(home / "run" / "ledger.jsonl")[-1]["step"] == 3
    run(home, *words, code=2)  # from the checkpoint after step 3: the first fault still counts
    assert "2 of 4 examples" in capsys.readouterr().err
    assert [one["id"] for one in read_rows(home / "run" / "bad_rows.jsonl")] == ["0", "3"]
    run(home, *words, "data.max_bad_fraction=0.5")
    assert [one["id"] for one in read_rows(home / "run" / "bad_rows.jsonl")] == ["0", "3"]
