"""The main job as a user runs it: what it leaves, that it repeats, and that stopping it costs nothing."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from peft import PeftModel
from safetensors import safe_open
from transformers import Qwen2VLForConditionalGeneration

from tests.commands import ROOT, read_rows, run_command
from vl_dist import cli
from vl_dist.config import keys, load, plain

RECIPE = ROOT / "recipes" / "shapes.yaml"
NUM_STEPS, STEPS_PER_EPOCH = 45, 15  # 12 drawings of five captions in steps of four examples, three epochs
STOPPED = 85
SECONDS_TO_STOP = 25.0
SECONDS_TO_START = 180.0  # imports, the first evaluation and one step, on a machine with other work

TRAIN_COLUMNS = {
    "step", "epoch", "train/loss", "train/lr", "train/grad_norm", "train/target_tokens", "perf/examples_per_s",
    "perf/images_per_s", "perf/target_tokens_per_s", "perf/tokens_per_s", "perf/padding", "perf/data_wait_s",
    "perf/peak_memory_gib",
}  # fmt: skip
EVAL_COLUMNS = {
    "eval/loss", "eval/exact_match", "eval/cider", "eval/bleu1", "eval/bleu2", "eval/bleu3", "eval/bleu4", "eval/rouge_l",
}  # fmt: skip


def words(home: Path, output_dir: str, *more: str) -> list[str]:
    data = home / "data"
    return [
        f"shapes.dir={data}",
        "shapes.num_train=12",
        "shapes.num_eval=6",
        f"model.path={data}/model",
        f"data.train={data}/records.jsonl",
        f"data.eval={data}/eval.jsonl",
        "lora.dropout=0.1",  # drawn anew each step, and the same after a stop
        "batch.examples_per_step=4",
        f"optim.max_steps={NUM_STEPS}",
        "checkpoint.every_steps=6",
        "log.every_steps=1",
        f"run.output_dir={home / output_dir}",
        *more,
    ]


def contents(directory: Path) -> dict[str, bytes | str]:
    """Every file below, byte for byte, and where links point; without `outcome.json`, which every start writes."""
    return {
        str(path.relative_to(directory)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != "outcome.json"
    }


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    return found


def trained_rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # a row that is being written has no line end
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def repeatable(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without speeds and memory."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def whole_checkpoint(run: Path) -> int:
    """The step of the latest checkpoint, every file of which is as its manifest says."""
    latest = (run / "checkpoints" / "latest").resolve(strict=True)
    manifest = json.loads((latest / "manifest.json").read_text())["files"]
    assert {path.name for path in latest.iterdir()} == {*manifest, "manifest.json"}
    for name, expected in manifest.items():
        written = (latest / name).read_bytes()
        assert (len(written), hashlib.sha256(written).hexdigest()) == (expected["bytes"], expected["sha256"])
    step: int = json.loads((latest / "state.json").read_text())["step"]
    assert latest.name == f"step-{step:06d}"
    return step


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that nobody disturbed, as it was when its command returned."""

    home: Path
    run: Path
    stdout: str
    outcome: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Where sums are taken in the same order each time, so that runs can be compared bit by bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("main-job")
    ended = run_command("launch/local.sh", *words(home, "run"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Finished(home, home / "run", ended.stdout, outcome(home / "run"))


class Job:
    """launch/local.sh in the background."""

    def __init__(self, command_words: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                ["launch/local.sh", *command_words],
                cwd=ROOT,
                env=os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Waits; the command must still be running when it happens."""
        give_up = time.monotonic() + SECONDS_TO_START
        while not happened():
            assert self._process.poll() is None, f"ended before {what}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < give_up, f"waited in vain for {what}: {self.log.read_text()[-3000:]}"
            time.sleep(0.03)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def trainers(self) -> list[psutil.Process]:
        """Processes that run train.py; they take seconds more to be ready for anything."""
        return [process for process in self.processes() if _runs_train_py(process)]

    def send(self, number: signal.Signals) -> None:
        """To the whole foreground of the terminal, as Ctrl-C goes."""
        os.killpg(self._process.pid, number)

    def code(self, within_s: float) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        return self._process.wait(timeout=within_s)

    def end(self) -> None:
        """Ends what is left of it."""
        if self._process.poll() is None:
            for process in [*self.processes(), psutil.Process(self._process.pid)]:
                process.kill()
            self._process.wait()


def _runs_train_py(process: psutil.Process) -> bool:
    try:
        command = [word for word in process.cmdline()[1:] if word != "-u"]
    except psutil.Error:  # it ended meanwhile
        return False
    return command[:1] == ["train.py"]


@contextmanager
def started(command_words: list[str], log: Path) -> Iterator[Job]:
    job = Job(command_words, log)
    try:
        yield job
    finally:
        job.end()


@dataclass(frozen=True, slots=True)
class Stop:
    """How one start of the disturbed run ended."""

    by: str
    code: int
    outcome: dict[str, Any] | None
    checkpoint: int  # step of the latest whole checkpoint
    stop_file_left: bool


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A run that was stopped again and again, then left to finish."""

    run: Path
    stops: list[Stop]
    code: int
    log: str


@pytest.fixture(scope="module")
def disturbed(finished: Finished) -> Disturbed:
    run = finished.home / "disturbed"
    command_words = words(finished.home, run.name)
    log = finished.home / "disturbed.log"

    def training() -> bool:
        return bool(trained_rows(run)) and trained_rows(run)[-1]["step"] > done

    def stopped(by: str, ready: Callable[[Job], bool], ask: Callable[[Job], None], within_s: float) -> Stop:
        with started(command_words, log) as job:
            job.until(lambda: ready(job), f"the moment for {by}")
            ask(job)
            code = job.code(within_s)
        written = outcome(run) if (run / "outcome.json").is_file() else None
        return Stop(by, code, written, whole_checkpoint(run), (run / "STOP").exists())

    stops = []
    done = 0
    for by, ready, ask, within_s in (
        (
            "SIGTERM while starting",
            lambda job: bool(job.trainers()),
            lambda job: job.send(signal.SIGTERM),
            SECONDS_TO_START,
        ),
        ("Ctrl-C", lambda _: training(), lambda job: job.send(signal.SIGINT), SECONDS_TO_STOP),
        ("the file STOP", lambda _: training(), lambda _: (run / "STOP").touch(), SECONDS_TO_STOP),
        ("SIGKILL of the trainer", lambda _: training(), lambda job: job.trainers()[0].kill(), SECONDS_TO_STOP),
    ):
        stops.append(stopped(by, ready, ask, within_s))
        done = stops[-1].checkpoint
    last = run_command("launch/local.sh", *command_words)
    return Disturbed(run, stops, last.returncode, last.stdout + last.stderr)


def test_an_undisturbed_run_ends_with_code_zero_and_says_where_its_adapter_is(finished: Finished) -> None:
    assert finished.outcome == {"code": 0, "reason": "finished", "step": NUM_STEPS}
    assert f"held-out captions after step {NUM_STEPS}" in finished.stdout
    assert "python -m vl_dist predict" in finished.stdout


def test_config_yaml_is_a_recipe_of_the_settings_that_were_used(finished: Finished) -> None:
    path = finished.run / "config.yaml"
    assert load(path) == load(RECIPE, words(finished.home, "run"))
    assert "!!python" not in path.read_text(), "another YAML reader must be able to read it too"


def test_metrics_have_a_row_with_every_column_for_each_logged_step(finished: Finished) -> None:
    rows = read_rows(finished.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[0].keys() == {"step", "epoch"} | EVAL_COLUMNS
    assert all(row.keys() >= TRAIN_COLUMNS for row in rows[1:])
    assert [row["step"] for row in rows if row.keys() >= EVAL_COLUMNS] == [0, NUM_STEPS]
    assert [row["epoch"] for row in rows] == pytest.approx([n / STEPS_PER_EPOCH for n in range(NUM_STEPS + 1)])
    values = [(name, value) for row in rows for name, value in row.items()]
    assert all(value is None if name == "perf/mfu" else isinstance(value, int | float) for name, value in values)
    rates = [row["train/lr"] for row in rows[1:]]
    assert rates == pytest.approx([2e-3 * (1 - n / NUM_STEPS) for n in range(NUM_STEPS)])
    assert rows[-1]["eval/loss"] < 0.8 * rows[0]["eval/loss"]


def test_the_ledger_has_every_example_once_an_epoch_in_steps_of_the_asked_size(finished: Finished) -> None:
    rows = [row for row in read_rows(finished.run / "ledger.jsonl") if "ids" in row]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert {len(row["ids"]) for row in rows} == {4}
    records = read_rows(finished.home / "data" / "records.jsonl")
    examples = Counter(f"{record['id']}#{k}" for record in records for k in range(5))
    epochs = [
        [name for row in rows[start : start + STEPS_PER_EPOCH] for name in row["ids"]]
        for start in range(0, NUM_STEPS, STEPS_PER_EPOCH)
    ]
    assert [Counter(epoch) for epoch in epochs] == [examples] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3  # shuffled anew
    targets = [row["train/target_tokens"] for row in trained_rows(finished.run)]
    assert [row["targets"] for row in rows] == targets


def test_the_newest_checkpoints_are_whole_and_load_with_peft(finished: Finished) -> None:
    checkpoints = finished.run / "checkpoints"
    wanted = {"latest", "best", "step-000036", "step-000042", "step-000045"}
    assert {path.name for path in checkpoints.iterdir()} == wanted
    assert (checkpoints / "best").resolve() == (checkpoints / "latest").resolve()  # the only one that was evaluated
    assert whole_checkpoint(finished.run) == NUM_STEPS
    names = {path.name for path in (checkpoints / "latest").iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "manifest.json"}
    assert names == wanted
    for directory in (checkpoints / "latest", finished.run / "adapter"):
        base = Qwen2VLForConditionalGeneration.from_pretrained(finished.home / "data" / "model")
        model = PeftModel.from_pretrained(base, directory)
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        loaded = {name.replace(".default.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        assert loaded.keys() == stored.keys()
        assert all(bool((loaded[name] == tensor).all()) for name, tensor in stored.items())


def test_the_adapter_is_the_last_checkpoints_with_all_that_inference_needs(finished: Finished) -> None:
    adapter = finished.run / "adapter"
    assert weights(adapter) == weights(finished.run / "checkpoints" / "latest")
    names = {path.name for path in adapter.iterdir()}
    wanted = {"adapter_config.json", "README.md", "training_metadata.json", "tokenizer.json", "chat_template.jinja"}
    assert names >= wanted
    metadata = json.loads((adapter / "training_metadata.json").read_text())
    assert metadata["step"] == NUM_STEPS and metadata["end_token"] == "<|im_end|>"
    assert metadata["scores"] == {name: trained_rows(finished.run)[-1][name] for name in EVAL_COLUMNS}
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\n") and "vl_dist predict" in card and "exact_match" in card


def test_the_samples_hold_image_references_prediction_and_score_of_every_held_out_record(finished: Finished) -> None:
    samples = finished.run / "samples"
    assert {path.name for path in samples.iterdir()} == {"step-000000.jsonl", f"step-{NUM_STEPS:06d}.jsonl"}
    records = {record["id"]: record["answers"] for record in read_rows(finished.home / "data" / "eval.jsonl")}
    for path in samples.iterdir():
        rows = read_rows(path)
        assert {row["id"]: row["references"] for row in rows} == records
        assert all((finished.home / "data" / row["images"][0]).is_file() for row in rows)
        assert all(row["exact"] == (row["prediction"] in row["references"]) for row in rows)
    last, rows = trained_rows(finished.run)[-1], read_rows(samples / f"step-{NUM_STEPS:06d}.jsonl")
    assert last["eval/exact_match"] == sum(row["exact"] for row in rows) / len(records)
    assert last["eval/cider"] == pytest.approx(sum(row["score"] for row in rows) / len(records))


def test_the_same_command_again_says_that_the_run_is_finished_and_changes_nothing(finished: Finished) -> None:
    before = contents(finished.run)
    again = run_command("launch/local.sh", *words(finished.home, "run"))
    assert again.returncode == 0 and outcome(finished.run)["code"] == 0
    assert "is finished" in again.stdout and "step 1/" not in again.stdout
    assert contents(finished.run) == before


def test_two_fresh_runs_with_one_seed_are_equal_whatever_starts_them(finished: Finished) -> None:
    ended = run_command(sys.executable, "train.py", *words(finished.home, "fresh"))
    assert ended.returncode == 0, ended.stderr
    fresh = finished.home / "fresh"
    assert repeatable(fresh) == repeatable(finished.run)
    assert weights(fresh / "adapter") == weights(finished.run / "adapter")
    for name in ("ledger.jsonl", f"samples/step-{NUM_STEPS:06d}.jsonl"):
        assert (fresh / name).read_bytes() == (finished.run / name).read_bytes()


def test_every_request_to_stop_ends_with_code_85_and_a_whole_checkpoint_in_time(disturbed: Disturbed) -> None:
    """The fixture waits no longer than the bound."""
    asked = [stop for stop in disturbed.stops if "SIGKILL" not in stop.by]
    assert len(asked) == 3
    for stop in asked:
        assert (stop.by, stop.code, stop.stop_file_left) == (stop.by, STOPPED, False)
        assert stop.outcome is not None
        assert (stop.outcome["code"], stop.outcome["step"]) == (STOPPED, stop.checkpoint), stop
        reason = "SIGTERM" if "SIGTERM" in stop.by else "Ctrl-C" if "Ctrl-C" in stop.by else "STOP"
        assert reason in stop.outcome["reason"]
        assert 0 <= stop.checkpoint < NUM_STEPS  # 0: while held-out records were captioned before the first step


def test_a_killed_trainer_is_no_orderly_end(disturbed: Disturbed) -> None:
    killed = disturbed.stops[-1]
    assert killed.code not in (0, 2, STOPPED)
    assert killed.outcome is None


def test_a_run_stopped_four_times_goes_on_each_time_and_ends_as_if_it_had_never_stopped(
    disturbed: Disturbed, finished: Finished
) -> None:
    assert disturbed.code == 0 and outcome(disturbed.run) == finished.outcome
    steps = [stop.checkpoint for stop in disturbed.stops]
    assert steps[0] < steps[1] < steps[2] <= steps[3]
    assert f"step-{steps[3]:06d}" in disturbed.log  # where the last start went on from
    assert repeatable(disturbed.run) == repeatable(finished.run)
    assert (disturbed.run / "ledger.jsonl").read_bytes() == (finished.run / "ledger.jsonl").read_bytes()
    assert weights(disturbed.run / "adapter") == weights(finished.run / "adapter")
    moments = "checkpoints/latest/optimizer.safetensors"
    assert (disturbed.run / moments).read_bytes() == (finished.run / moments).read_bytes()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_signal_ends_everything_at_once(finished: Finished, num_processes: int) -> None:
    launcher = ["--config_file", "accelerate_configs/cpu.yaml"] if num_processes == 2 else []
    run = finished.home / f"killed-{num_processes}"
    log = run.with_suffix(".log")
    with started([*launcher, *words(finished.home, run.name)], log) as job:
        job.until(lambda: len(job.trainers()) == num_processes, "the trainers")
        job.send(signal.SIGTERM)
        job.until(lambda: "Once more ends at once" in log.read_text(), "the first request")
        processes = job.processes()
        assert len(job.trainers()) == num_processes
        job.send(signal.SIGTERM)
        code = job.code(within_s=10)
        survivors = psutil.wait_procs(processes, timeout=10)[1]
        for process in survivors:
            process.kill()
    assert code not in (0, 2, STOPPED)
    assert survivors == []
    assert not (run / "outcome.json").exists()


def test_no_file_of_a_run_can_execute_code_when_it_is_read(finished: Finished, disturbed: Disturbed) -> None:
    for run in (finished.run, disturbed.run):
        files = [path for path in run.rglob("*") if path.is_file()]
        assert len(files) > 20
        assert {path.suffix for path in files} <= {".json", ".jsonl", ".yaml", ".md", ".safetensors", ".jinja"}
        for path in files:
            start = path.read_bytes()[:2]
            assert start != b"PK" and start[:1] != b"\x80", f"{path} looks like a pickle"


def test_predict_gives_the_captions_of_the_last_evaluation(finished: Finished) -> None:
    samples = read_rows(finished.run / "samples" / f"step-{NUM_STEPS:06d}.jsonl")
    images = [finished.home / "data" / sample["images"][0] for sample in samples]
    ended = run_command(sys.executable, "-m", "vl_dist", "predict", finished.run / "adapter", *images, "--json")
    assert ended.returncode == 0, ended.stderr
    predicted = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [row["image"] for row in predicted] == [str(image) for image in images]
    assert [row["caption"] for row in predicted] == [sample["prediction"] for sample in samples]


def test_predict_refuses_what_is_no_adapter_or_no_image_in_one_message(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "empty").mkdir()
    adapter, image = str(finished.run / "adapter"), str(finished.home / "data" / "images")
    for arguments, part in (
        ([str(tmp_path), image], "training_metadata.json"),
        ([str(tmp_path / "absent"), image], "absent"),
        ([adapter, str(tmp_path / "absent.jpg")], "absent.jpg"),
        ([adapter, str(tmp_path / "empty")], "holds no image"),
        ([adapter, str(tmp_path / "notes.jpg")], "cannot be"),
    ):
        capsys.readouterr()
        assert cli.main(["predict", *arguments]) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        message = stderr.splitlines()[-1]
        assert part in message and "Traceback" not in stderr


def test_help_lists_every_key_with_type_unit_default_and_meaning() -> None:
    ended = run_command(sys.executable, "train.py", "--help")
    assert ended.returncode == 0
    listed = dict(re.findall(r"^(\S+)  \((.+)\)\n    \S", ended.stdout, flags=re.MULTILINE))
    assert listed.keys() == {key.path for key in keys()}
    for key in keys():
        default = "null" if key.default is None else str(plain(key.default))
        unit = f" in {key.unit}" if key.unit else ""
        assert listed[key.path] == f"{key.type}{unit}; default {default}"
        assert f"\n    {key.meaning}\n" in ended.stdout + "\n" and len(key.meaning) > 3
    assert listed["optim.max_steps"] == "integer | null in steps; default null"
    assert listed["data.max_pixels"] == "integer | null in pixels; default null"
    assert listed["optim.lr"] == "number; default 0.0001"
