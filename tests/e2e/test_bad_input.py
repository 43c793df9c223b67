"""Every mistake a user can make ends with one message, code 2, and all that was on disk as it was."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

import train
from tests.commands import read_rows, run_command
from vl_dist.config import load
from vl_dist.data.index import FOLDER
from vl_dist.model.load import resolve_dtype
from vl_dist.model.packed import PackedModel

IMAGES = ("cat.jpg", "rocket.jpg", "coffee.jpg", "china.jpg")


def record(name: str, image: str = "cat.jpg", answer: str = "A cat.") -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "COCO Yes:"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_records(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file below, byte for byte, and every folder; without `outcome.json`, which every start writes."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.name != "outcome.json"
    }


def trained_steps(run: Path) -> list[int]:
    return [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    stdout: str
    stderr: str


class Trainer:
    """train.py in this process, on four photographs and a tiny model; all its files are in `home`."""

    def __init__(self, home: Path, model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self.run = home / "run"
        self.recipe = home / "recipe.yaml"
        self._capsys = capsys
        records = write_records(home / "records.jsonl", [record(f"r{n}", image) for n, image in enumerate(IMAGES)])
        settings = {
            "model": {"path": str(model)},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
            "data": {"train": str(records), "image_root": str(photos), "max_pixels": 84 * 112, "num_workers": 0},
            "batch": {"examples_per_step": 2, "max_tokens_per_pack": 512},
            "optim": {"num_epochs": 1},
            "checkpoint": {"every_steps": 1},
            "log": {"every_steps": 1},
            "run": {"output_dir": str(self.run)},
        }
        self.recipe.write_text(yaml.safe_dump(settings))

    @property
    def outcome(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "outcome.json").read_text())
        return found

    def start(self, *words: str) -> Ended:
        return self.command(str(self.recipe), *words)

    def command(self, *words: str) -> Ended:
        AcceleratorState._reset_state(True)  # a new process would begin with none
        self._capsys.readouterr()
        code = train.main(list(words))
        return Ended(code, *self._capsys.readouterr())

    def refusal(self, *words: str, begun: bool = False) -> str:
        """The one message of a start that is refused; what was there, the output directory included, is as before.

        Args:
            begun: the mistake can show only after training began, so the output directory is not compared.
        """
        before = contents(self.home)
        ended = self.start(*words)
        assert ended.code == 2
        assert "Traceback" not in ended.stdout + ended.stderr
        message: str = self.outcome["reason"]
        assert self.outcome["code"] == 2
        assert ended.stderr.endswith(message + "\n") and ended.stderr.count(message) == 1
        assert message.strip() not in ended.stdout
        if not begun:
            assert self.outcome["step"] == 0
            after = contents(self.home)
            new = {name for name in after if name not in before and not name.startswith(FOLDER)}  # a cache of lengths
            assert new <= {"run"}  # made for outcome.json
            assert {name: after.get(name) for name in before} == before
        return message

    def settings_refusal(self, *words: str) -> str:
        """The one message about settings that cannot be read; nothing at all is written."""
        before = contents(self.home)
        ended = self.command(*words)
        assert (ended.code, ended.stdout) == (2, "")
        assert "Traceback" not in ended.stderr
        assert ended.stderr.endswith("\n") and ended.stderr.strip()
        assert contents(self.home) == before
        assert not self.run.exists()
        return ended.stderr.strip()


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> Trainer:
    return Trainer(tmp_path, tiny_model, photos, capsys)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Signal handlers and accelerate's process-wide state of other tests."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(True)


def test_the_recipe_of_these_tests_trains_when_nothing_is_wrong_with_it(trainer: Trainer) -> None:
    assert trainer.start().code == 0
    assert trainer.outcome == {"code": 0, "reason": "finished", "step": 2}


# Settings: nothing is known about the run yet, so nothing is written.


def test_a_missing_recipe_is_named(trainer: Trainer) -> None:
    path = trainer.home / "absent.yaml"
    assert str(path) in trainer.settings_refusal(str(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: [1", ["line 1", "YAML"]),
        ("optim:\n\tlr: 1\n", ["line 2", "YAML"]),
        ("optim:\n  lr: 1\n  lr: 2\n", ["lr", "YAML"]),
        ("optim:\n  lr: ${nothing.here}\n", ["nothing.here"]),
        ("- optim\n", ["sections"]),
        ("optim:\n", ["optim", "optim.KEY=value"]),
        ("optim:\n  epochs: 1\n", ["optim.epochs", "nearest", "optim.num_epochs"]),
        ("optimiser:\n  lr: 1\n", ["optimiser.lr", "nearest", "optim.lr"]),
        ("optim:\n  lr: fast\n", ["optim.lr", "fast", "number"]),
        ("data:\n  train: [a, 5]\n", ["data.train", "path"]),
        ("shapes: 5\n", ["shapes", "5"]),
    ],
)
def test_a_recipe_that_is_broken_or_has_wrong_keys_is_named_with_the_place(
    trainer: Trainer, text: str, parts: list[str]
) -> None:
    path = trainer.home / "broken.yaml"
    path.write_text(text)
    message = trainer.settings_refusal(str(path), f"run.output_dir={trainer.run}")
    assert all(part in message for part in [str(path), *parts]), message


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "command line", "nearest", "optim.lr"]),
        ("lr=1", ["lr", "nearest", "optim.lr"]),
        ("--optim.lr=1", ["--optim.lr", "nearest", "optim.lr"]),
        ("optim.lr=fast", ["optim.lr", "fast", "number"]),
        ("optim.num_epochs=1.5", ["optim.num_epochs", "1.5", "integer"]),
        ("optim.num_epochs=0", ["optim.num_epochs", "0", "1 or more"]),
        ("optim.schedule=step", ["optim.schedule", "step", "linear | cosine | constant"]),
        ("data.shuffle=maybe", ["data.shuffle", "maybe", "true | false"]),
        ("data.eval=last:0", ["data.eval", "last:0", "1 or more"]),
        ("run.output_dir=null", ["run.output_dir", "path"]),
        ("run.seed=-1", ["run.seed", "-1", "0 or more"]),
        ("optim.lr=.inf", ["optim.lr", "inf"]),
        ("optim=3", ["optim", "3", "optim.KEY=value"]),
        ("optim.lr", ["optim.lr", "section.key=value"]),
        ("=1", ["=1", "section.key=value"]),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named_with_what_it_should_be(
    trainer: Trainer, word: str, parts: list[str]
) -> None:
    message = trainer.settings_refusal(str(trainer.recipe), word)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


# Records.


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_a_missing_record_file_is_named_with_the_key_to_set(trainer: Trainer, key: str) -> None:
    path = trainer.home / "absent.jsonl"
    message = trainer.refusal(f"{key}={path}")
    assert str(path) in message and key in message


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([record("a"), "", '{"id": "b", "messages": '], ["line 3", "JSON"]),
        ([record("a"), record("b") | {"answer": ["x"]}], ["line 2", "answer", "answers"]),
        ([record("a"), {"id": "b"}], ["line 2", "messages"]),
        ([record("a"), "[1, 2]"], ["line 2", "object"]),
        ([record("a"), record("b"), record("a")], ["'a'", "line 3", "line 1"]),
        ([], ["no record", "id", "messages"]),
        (["", "  "], ["no record", "id", "messages"]),
    ],
    ids=["cut line", "unknown field", "no messages", "no object", "id twice", "empty", "blank lines"],
)
def test_a_line_that_is_no_record_is_named_by_file_and_number(
    trainer: Trainer, rows: list[dict[str, Any] | str], parts: list[str]
) -> None:
    path = write_records(trainer.home / "bad.jsonl", rows)
    message = trainer.refusal(f"data.train={path}")
    assert all(part in message for part in [str(path), *parts]), message


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("absent.jpg", ["no such file", "data.image_root"]),
        (".", ["no such file", "data.image_root"]),
        ("../records.jsonl", ["outside data.image_root"]),
        ("/etc/hostname", ["outside data.image_root"]),
        ("https://example.com/cat.jpg", ["URL", "download"]),
        ("data:image/jpeg;base64," + "QUJD" * 2000, ["give its path"]),
        ("cat\x00.jpg", ["no such file"]),
        ("notes.jpg", ["cannot be read as an image"]),
        ("empty.jpg", ["cannot be read as an image"]),
    ],
    ids=["absent", "folder", "relative outside", "absolute outside", "url", "data url", "null byte", "text", "no byte"],
)
def test_an_image_that_cannot_be_used_is_named_with_its_record_and_the_reason(
    trainer: Trainer, image: str, parts: list[str]
) -> None:
    root = trainer.home / "images"
    root.mkdir()
    (root / "notes.jpg").write_text("not an image")
    (root / "empty.jpg").touch()
    path = write_records(trainer.home / "bad.jsonl", [record("the-bad-one", image)])
    message = trainer.refusal(f"data.train={path}", f"data.image_root={root}")
    assert all(part in message for part in ["the-bad-one", image[:20], *parts]), message
    assert len(message) < 600


def test_an_image_that_a_link_leads_outside_the_root_is_refused(trainer: Trainer, photos: Path) -> None:
    root = trainer.home / "images"
    root.mkdir()
    (root / "link.jpg").symlink_to(photos / "cat.jpg")
    path = write_records(trainer.home / "bad.jsonl", [record("linked", "link.jpg")])
    assert "outside data.image_root" in trainer.refusal(f"data.train={path}", f"data.image_root={root}")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_cut_short_is_named_when_its_turn_comes(trainer: Trainer, photos: Path, num_workers: int) -> None:
    root = trainer.home / "images"
    root.mkdir()
    whole = (photos / "cat.jpg").read_bytes()
    (root / "whole.jpg").write_bytes(whole)
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    path = write_records(trainer.home / "bad.jsonl", [record("a", "whole.jpg"), record("the-bad-one", "cut.jpg")])
    words = [f"data.train={path}", f"data.image_root={root}", "batch.examples_per_step=1", "data.shuffle=false"]
    message = trainer.refusal(*words, f"data.num_workers={num_workers}", begun=True)
    assert all(part in message for part in ["the-bad-one", "cut.jpg", "cannot be decoded"]), message
    assert trainer.outcome["step"] == 1  # the whole image was trained on
    assert (trainer.run / "checkpoints" / "latest").resolve().name == "step-000001"


def test_a_text_that_is_half_a_character_is_named_with_its_record(trainer: Trainer) -> None:
    """JSON can write one half of a surrogate pair, which stands for no character: cut emoji look like this."""
    path = write_records(trainer.home / "bad.jsonl", [record("a"), record("the-bad-one", answer="A cat \ud83d")])
    message = trainer.refusal(f"data.train={path}")
    assert "line 2" in message or "the-bad-one" in message


def test_an_example_longer_than_a_pack_is_named_with_both_lengths_and_the_keys_to_set(trainer: Trainer) -> None:
    message = trainer.refusal("batch.max_tokens_per_pack=20")
    parts = ["r0", "20", "batch.max_tokens_per_pack", "data.max_pixels"]
    assert all(part in message for part in parts), message


def test_holding_out_more_records_than_there_are_is_refused_with_both_numbers(trainer: Trainer) -> None:
    message = trainer.refusal("data.eval=last:4")
    assert "last:4" in message and "4 records" in message


# Model and adapter.


@pytest.fixture
def own_model(trainer: Trainer, tiny_model: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(tiny_model, trainer.home / "model"))


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(("key", "value"), [("merge_size", 4), ("patch_size", 28), ("temporal_patch_size", 1)])
def test_a_processor_whose_image_tokens_cannot_match_the_model_is_refused_with_both_sizes(
    trainer: Trainer, own_model: Path, key: str, value: int
) -> None:
    change_json(own_model / "processor_config.json", lambda values: values["image_processor"].update({key: value}))
    message = trainer.refusal(f"model.path={own_model}")
    wanted = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    assert str(tuple(wanted.values())) in message and str(tuple((wanted | {key: value}).values())) in message
    assert str(own_model) in message and "cannot match" in message


def test_a_model_directory_that_is_not_there_is_named_with_what_to_set(trainer: Trainer) -> None:
    message = trainer.refusal(f"model.path={trainer.home / 'absent'}")
    assert "absent" in message and "model.hub=" in message


def _cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _change_weights(model: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights, next(name for name in weights if name.endswith("q_proj.weight")))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def _one_weight_less(model: Path) -> None:
    _change_weights(model, lambda weights, name: weights.pop(name))


def _one_weight_smaller(model: Path) -> None:
    _change_weights(model, lambda weights, name: weights.update({name: weights[name][:4].clone()}))


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def _broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


DAMAGES = [_no_weights, _cut_weights, _one_weight_less, _one_weight_smaller, _broken_config, _broken_tokenizer]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_model_with_a_damaged_file_is_named_and_never_trained_with_random_weights(
    trainer: Trainer, own_model: Path, damage: Callable[[Path], None]
) -> None:
    damage(own_model)
    assert str(own_model) in trainer.refusal(f"model.path={own_model}")


def test_a_gpu_without_bfloat16_is_told_which_key_to_set(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_an_old_gpu(setting: Any, device_type: str, *, bf16_supported: bool) -> torch.dtype:
        return resolve_dtype(setting, "cuda", bf16_supported=False)

    monkeypatch.setattr("vl_dist.run.build.resolve_dtype", on_an_old_gpu)
    message = trainer.refusal("model.dtype=auto")
    assert "bfloat16" in message and "model.dtype=float32" in message


@pytest.mark.parametrize(
    "targets", ["[q_projection]", "[q_proj,nonsense]", "[nonsense.q_proj]", "[q_proj,nonsense.v_proj]"]
)
def test_a_target_module_that_matches_nothing_is_named_with_the_ones_there_are(trainer: Trainer, targets: str) -> None:
    message = trainer.refusal(f"lora.target_modules={targets}")
    wrong = targets.strip("[]").split(",")[-1]
    assert all(part in message for part in ["lora.target_modules", repr(wrong), "v_proj"]), message


@pytest.fixture
def adapter(trainer: Trainer) -> Path:
    """An adapter of rank 4 on q_proj and v_proj."""
    assert trainer.start().code == 0
    found = Path(shutil.copytree(trainer.run / "adapter", trainer.home / "adapter"))
    shutil.rmtree(trainer.run)
    return found


def test_an_adapter_to_start_from_that_does_not_fit_is_refused_with_the_key_to_set(trainer: Trainer, adapter: Path) -> None:
    init = f"lora.init_from={adapter}"
    rank = trainer.refusal(init, "lora.r=8")
    assert all(part in rank for part in [str(adapter), "lora.r", "4", "8"]), rank
    for targets in ("[q_proj]", "[q_proj,v_proj,o_proj]"):
        layers = trainer.refusal(init, f"lora.target_modules={targets}")
        assert str(adapter) in layers and "lora.target_modules" in layers
    absent = trainer.refusal(f"lora.init_from={trainer.home / 'absent'}")
    assert "absent" in absent and "adapter_model.safetensors" in absent


def test_an_adapter_to_start_from_that_was_scaled_otherwise_is_refused(trainer: Trainer, adapter: Path) -> None:
    """The same weights under another alpha / r are another function."""
    message = trainer.refusal(f"lora.init_from={adapter}", "lora.alpha=16")
    assert all(part in message for part in [str(adapter), "lora.alpha", "8", "16"]), message


def test_an_adapter_to_start_from_that_is_damaged_is_named(trainer: Trainer, adapter: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = adapter / name
        path.write_bytes(path.read_bytes()[:200])
        assert str(adapter) in trainer.refusal(f"lora.init_from={adapter}"), name


# Memory.


def out_of_memory(*_args: Any, **_kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 3 bytes.")


def test_out_of_memory_in_training_names_the_pack_and_the_key_to_lower_and_the_run_goes_on_with_it_lowered(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = PackedModel.forward, []

    def fails_the_second_time(self: PackedModel, batch: Any) -> torch.Tensor:
        calls.append(batch)
        return out_of_memory() if len(calls) == 2 else forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, "forward", fails_the_second_time)
        message = trainer.refusal("run.self_test=false", begun=True)  # so that the second pack is the second step's
    pack = calls[1]
    parts = [f"{pack.num_tokens} tokens", f"{pack.num_patches} patches", "2.00 GiB", "batch.max_tokens_per_pack"]
    assert pack.num_patches > 0
    assert all(part in message for part in parts), message
    assert "GPU 0" not in message  # torch's own advice, many lines of it, stays away
    assert (trainer.run / "checkpoints" / "latest").resolve().name == "step-000001"

    longest = max(len(pack.input_ids) // 2 for pack in calls) + 40
    ended = trainer.start(f"batch.max_tokens_per_pack={longest}")
    assert ended.code == 0
    assert "Going on from" in ended.stdout and f"batch.max_tokens_per_pack: 512 -> {longest}" in ended.stdout
    assert trained_steps(trainer.run) == [1, 2]


def test_out_of_memory_in_the_first_step_is_written_down_as_no_step_done(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedModel, "forward", out_of_memory)
    trainer.refusal(begun=True)
    assert trainer.outcome["step"] == 0


def test_out_of_memory_in_the_loss_of_an_evaluation_names_the_pack_too(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With held-out records this is the first pack that a run computes at all."""
    monkeypatch.setattr(PackedModel, "forward", out_of_memory)
    message = trainer.refusal("data.eval=last:1", begun=True)
    assert all(part in message for part in ["tokens", "patches", "batch.max_tokens_per_pack"]), message


def test_out_of_memory_while_captioning_names_the_number_of_images_and_its_key(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "generate", out_of_memory)
    message = trainer.refusal("data.eval=last:1", begun=True)
    assert "eval.batch_size" in message


# The output directory.


def test_an_output_directory_that_is_a_file_is_refused_and_the_file_stays(trainer: Trainer) -> None:
    trainer.run.write_text("my thesis")
    ended = trainer.start()
    assert (ended.code, ended.stdout) == (2, "")
    assert str(trainer.run) in ended.stderr and "is a file" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert trainer.run.read_text() == "my thesis"


@pytest.mark.parametrize("below", ["records.jsonl/run", "records.jsonl/deeper/run"])
def test_an_output_directory_that_cannot_be_made_is_refused(trainer: Trainer, below: str) -> None:
    before = contents(trainer.home)
    ended = trainer.start(f"run.output_dir={trainer.home / below}")
    assert (ended.code, ended.stdout) == (2, "")
    assert "run.output_dir" in ended.stderr and "records.jsonl" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert contents(trainer.home) == before


def test_an_output_directory_that_holds_somebodys_own_files_is_refused_and_they_stay(trainer: Trainer) -> None:
    (trainer.run / "chapters").mkdir(parents=True)
    (trainer.run / "chapters" / "one.tex").write_text("It was a dark and stormy night.")
    (trainer.run / "metrics.jsonl").write_text("mine\n")
    message = trainer.refusal()
    assert str(trainer.run) in message and "chapters" in message and "new or an empty directory" in message


def test_drawings_are_never_made_over_somebodys_own_files(trainer: Trainer) -> None:
    own = trainer.home / "own"
    (own / "images").mkdir(parents=True)
    (own / "images" / "holiday.jpg").write_bytes(b"the only copy")
    message = trainer.refusal(f"shapes.dir={own}", "shapes.num_train=2", "shapes.num_eval=1")
    assert "shapes.dir" in message and str(own) in message


def test_a_run_with_other_settings_is_left_as_it_is_unless_the_change_is_allowed(trainer: Trainer) -> None:
    words = ["optim.num_epochs=2", "optim.lr=1e-3"]
    assert trainer.start("optim.lr=1e-4").code == 0
    first = contents(trainer.run)
    adapter = first["adapter/adapter_model.safetensors"]

    message = trainer.refusal(*words)  # compares every file of the earlier run
    assert str(trainer.run) in message and "run.allow_changes=true" in message
    changed = [line.strip() for line in message.splitlines() if "->" in line]
    assert changed == ["optim.lr: 0.0001 -> 0.001", "optim.num_epochs: 1 -> 2"]

    ended = trainer.start(*words, "run.allow_changes=true")
    assert ended.code == 0
    assert all(line in ended.stdout for line in changed) and "Going on from" in ended.stdout
    assert trainer.outcome == {"code": 0, "reason": "finished", "step": 4}
    assert trained_steps(trainer.run) == [1, 2, 3, 4]
    assert load(trainer.run / "config.yaml").optim.lr == 1e-3
    assert (trainer.run / "adapter" / "adapter_model.safetensors").read_bytes() != adapter


def test_the_same_settings_in_other_words_are_no_change(trainer: Trainer) -> None:
    assert trainer.start("optim.lr=1e-4").code == 0
    first = contents(trainer.run)
    ended = trainer.start("optim.lr=0.0001", "lora={alpha: 8.0}")
    assert ended.code == 0 and "is finished" in ended.stdout
    assert contents(trainer.run) == first


def test_a_mistake_in_a_later_start_leaves_an_unfinished_run_whole_and_it_goes_on_once_mended(
    trainer: Trainer, own_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["optim.num_epochs=2", f"model.path={own_model}"]
    forward, calls = PackedModel.forward, []

    def fails_the_third_time(self: PackedModel, batch: Any) -> torch.Tensor:
        calls.append(batch)
        return out_of_memory() if len(calls) == 3 else forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, "forward", fails_the_third_time)
        trainer.refusal(*words, begun=True)
    weights, away = own_model / "model.safetensors", trainer.home / "away.safetensors"
    weights.rename(away)
    trainer.refusal(*words)  # compares every file of the unfinished run
    away.rename(weights)
    assert trainer.start(*words).code == 0
    assert trained_steps(trainer.run) == [1, 2, 3, 4]


@pytest.mark.parametrize("earlier", [False, True], ids=["new directory", "earlier run"])
def test_a_checkpoint_to_resume_from_that_is_not_there_is_never_ignored(trainer: Trainer, earlier: bool) -> None:
    words = []
    if earlier:
        assert trainer.start().code == 0
        words = ["optim.num_epochs=2", "run.allow_changes=true"]  # or it would be finished
    message = trainer.refusal(f"run.resume={trainer.home / 'absent'}", *words)
    assert "absent" in message and "run.resume" in message


# As a user starts it.


def test_the_process_ends_with_code_two_and_one_message(trainer: Trainer) -> None:
    path = write_records(trainer.home / "bad.jsonl", [record("a"), "{"])
    ended = run_command(sys.executable, "train.py", trainer.recipe, f"data.train={path}")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    assert trainer.outcome["code"] == 2
    assert ended.stderr.count(trainer.outcome["reason"]) == 1 and "line 2" in trainer.outcome["reason"]
    assert contents(trainer.run) == {}


def test_the_launch_script_ends_with_code_two_and_one_message_without_the_launchers_traceback(trainer: Trainer) -> None:
    ended = run_command("launch/local.sh", trainer.recipe, f"data.train={trainer.home / 'absent.jsonl'}")
    assert ended.returncode == 2
    assert trainer.outcome["code"] == 2
    assert ended.stderr.count(trainer.outcome["reason"]) == 1 and "absent.jsonl" in trainer.outcome["reason"]
    assert contents(trainer.run) == {}
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_a_mistake_that_only_one_of_two_ranks_meets_ends_both_with_one_message(
    trainer: Trainer, photos: Path, key: str
) -> None:
    root = trainer.home / "images"
    root.mkdir()
    whole = (photos / "cat.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for image in IMAGES:
        shutil.copy(photos / image, root)
    path = write_records(trainer.home / "bad.jsonl", [record("a"), record("the-bad-one", "cut.jpg")])
    words = [f"{key}={path}", f"data.image_root={root}", "data.shuffle=false"]
    ended = run_command("launch/local.sh", "--config_file", "accelerate_configs/cpu.yaml", trainer.recipe, *words)
    assert (ended.returncode, trainer.outcome["code"]) == (2, 2), ended.stderr
    assert "the-bad-one" in trainer.outcome["reason"]
    assert ended.stderr.count(trainer.outcome["reason"]) == 1
    assert "Traceback" not in ended.stdout + ended.stderr


def test_the_launch_script_refuses_wrong_settings_before_it_launches_anything(trainer: Trainer) -> None:
    ended = run_command("launch/local.sh", trainer.recipe, "optim.lrr=1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "optim.lrr" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not trainer.run.exists()


@pytest.mark.parametrize("below", ["thesis.txt", "thesis.txt/run"])
def test_the_launch_script_too_refuses_an_output_directory_that_cannot_be_made(trainer: Trainer, below: str) -> None:
    """There is nowhere to write outcome.json, which the script takes its exit code from."""
    (trainer.home / "thesis.txt").write_text("mine")
    ended = run_command("launch/local.sh", trainer.recipe, f"run.output_dir={trainer.home / below}")
    assert ended.returncode == 2, ended.stderr
    assert "run.output_dir" in ended.stderr and str(trainer.home / below) in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert (trainer.home / "thesis.txt").read_text() == "mine"


def test_the_launch_script_never_ends_with_an_earlier_runs_code(trainer: Trainer) -> None:
    trainer.run.mkdir()
    (trainer.run / "outcome.json").write_text('{"code": 0, "reason": "finished", "step": 2}\n')
    ended = run_command("launch/local.sh", "--config_file", trainer.home / "absent.yaml", trainer.recipe)
    assert ended.returncode not in (0, 85)
