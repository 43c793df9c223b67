"""`python -m vl_dist evaluate`: the scores of a record file, whatever the number of processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapter.made import NAMES, PROMPT, export
from tests.commands import read_rows
from tests.processes import run_ranks
from vl_dist import cli

WRONG_INPUT = 2
ANSWERS = ["A man riding a wave.", "A cat sits on a table."]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        return export(tiny_model, photos, tmp_path_factory.mktemp("evaluate"))[0]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Five images; the first comes in two records of one answer, the others have two answers each."""

    def row(name: str, image: str, answers: list[str], prompt: str = PROMPT) -> dict[str, Any]:
        content = [{"type": "image", "image": f"{image}.jpg"}, {"type": "text", "text": prompt}]
        return {"id": name, "messages": [{"role": "user", "content": content}], "answers": answers}

    rows = [row("again", NAMES[0], ANSWERS[:1]), row("once more", NAMES[0], ANSWERS[1:])]
    rows += [row(name, name, ANSWERS) for name in NAMES[1:5]]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def run_evaluate(words: list[str]) -> int:
    return cli.main(["evaluate", *words])


def test_scores_and_samples_are_the_same_on_one_process_and_on_two(
    adapter: Path, records: Path, photos: Path, tmp_path: Path
) -> None:
    found: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for world_size in (1, 2):
        log, samples = tmp_path / f"{world_size}.log", tmp_path / f"{world_size}.jsonl"
        words = [str(adapter), str(records), "--image-root", str(photos), "--json", "--samples", str(samples)]
        codes = run_ranks(run_evaluate, words, world_size=world_size, log=log)
        assert codes == [0] * world_size, log.read_text()
        printed = [line for line in log.read_text().splitlines() if line.startswith("{")]
        assert len(printed) == 1, "the main process alone speaks"
        found[world_size] = json.loads(printed[0]), read_rows(samples)
    (one, samples_of_one), (two, samples_of_two) = found[1], found[2]
    assert (one["prompts"], one["references"]) == (5, 10)
    assert [sample["id"] for sample in samples_of_one] == ["again", *NAMES[1:5]]
    assert [sample["prediction"] for sample in samples_of_one] == [sample["prediction"] for sample in samples_of_two]
    assert len({sample["prediction"] for sample in samples_of_one}) > 1
    assert one["scores"].pop("loss") == pytest.approx(two["scores"].pop("loss"), rel=1e-5)
    assert one["scores"] == two["scores"]


def test_a_mistake_is_one_message_of_one_of_two_processes(adapter: Path, records: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    codes = run_ranks(run_evaluate, [str(adapter), str(records)], world_size=2, log=log)
    assert codes == [WRONG_INPUT] * 2, log.read_text()
    text = log.read_text()
    assert text.count("6 of 6 records") == 1 and "--image-root" in text and "Traceback" not in text


def test_what_an_evaluation_refuses(
    adapter: Path,
    records: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    other = tmp_path / "other.jsonl"
    other.write_text(records.read_text().replace(PROMPT, "What is a wave?"))
    root = ["--image-root", str(photos)]
    for words, part in (
        ([str(tmp_path), str(records)], "training_metadata.json"),
        ([str(adapter), str(tmp_path / "absent.jsonl")], "no record file"),
        ([str(adapter), str(other), *root], "--allow-other-prompt"),
        ([str(adapter), str(records), *root, "--max-pixels", "3136"], "--allow-other-pixels"),
        ([str(adapter), str(records), *root, "--samples", str(tmp_path / "no" / "s.jsonl")], "give another --samples"),
    ):
        capsys.readouterr()
        assert run_evaluate(words) == WRONG_INPUT
        out, err = capsys.readouterr()
        assert out == "" and part in err and len(err.splitlines()) == 1
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert run_evaluate([str(adapter), str(records), *root]) == WRONG_INPUT
    assert "needs no DeepSpeed" in capsys.readouterr().err
