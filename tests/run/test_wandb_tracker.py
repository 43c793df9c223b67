"""What W&B gets: one offline run, started twice, read back from its files."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.run.wandb_files import WandbFile, read_starts
from vl_dist.errors import UserError
from vl_dist.evaluate.held_out import Sample
from vl_dist.run.tracking import ShownSample
from vl_dist.run.wandb_tracker import COLUMNS, WandbTracker, read_run_id, run_id, wandb_mode
from vl_dist.settings import LogConfig


def test_auto_is_online_with_a_key_and_offline_without_one(tmp_path: Path) -> None:
    nowhere = {"NETRC": str(tmp_path / "none")}
    assert wandb_mode("auto", nowhere) == "offline"
    assert wandb_mode("auto", nowhere | {"WANDB_API_KEY": "x" * 40}) == "online"
    assert wandb_mode("auto", nowhere | {"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode("auto", nowhere | {"WANDB_MODE": "disabled"}) == "off"
    assert wandb_mode("off", {"WANDB_API_KEY": "x" * 40}) == "off"
    assert wandb_mode("offline", {"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "disabled"}) == "offline"


def test_a_key_that_a_login_left_counts_for_its_own_server(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "x" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    env = {"NETRC": str(tmp_path / "netrc")}
    assert wandb_mode("auto", env) == wandb_mode("online", env) == "online"
    assert wandb_mode("auto", env | {"WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"


def test_what_is_asked_for_and_not_there_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="wandb login"):
        wandb_mode("online", {"NETRC": str(tmp_path / "none")})
    monkeypatch.setattr("vl_dist.run.wandb_tracker.find_spec", lambda name: None)
    assert wandb_mode("auto", {"WANDB_API_KEY": "x" * 40}) == "off"
    with pytest.raises(UserError, match="pip install wandb"):
        wandb_mode("offline", {})
    assert importlib.util.find_spec("wandb") is not None


def test_the_id_is_kept_until_another_run_takes_the_place(tmp_path: Path) -> None:
    first = run_id(tmp_path, known=None, anew=False)
    assert run_id(tmp_path, known="other", anew=False) == first == read_run_id(tmp_path)
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": first}
    second = run_id(tmp_path, known=None, anew=True)
    assert second != first and read_run_id(tmp_path) == second


def test_where_only_a_checkpoint_is_left_its_id_is_the_runs(tmp_path: Path) -> None:
    assert read_run_id(tmp_path) is None
    assert run_id(tmp_path, known="4f00ba12", anew=False) == "4f00ba12" == read_run_id(tmp_path)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[WandbFile]:
    """Two starts of one run; the second repeats a step."""
    run = tmp_path_factory.mktemp("wandb")
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"):
        (checkpoint / name).write_text(name)
    picture = Image.new("RGB", (300, 200), "red")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_SERVICE"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")  # seconds; 15 unless told
        for steps, change in (((1, 2), None), ((2, 3), 0.5)):
            log = LogConfig(wandb_project="shapes", wandb_group="night", wandb_tags=("a", "b"))
            settings = {"optim": {"lr": 0.1}, "run": {"output_dir": str(run)}}
            tracker = WandbTracker(run, log, mode="offline", settings=settings, run_id="4f00ba12", say=print)
            tracker.start()
            for step in steps:
                tracker.log({"step": step, "train/loss": 1.0 / step, "perf/mfu": None})
            shown = ShownSample(Sample("s", ("s.jpg",), ("r1", "r2"), "p", False, 2.0), change, lambda: picture)
            tracker.samples(steps[-1], [shown])
            tracker.adapter(checkpoint, steps[-1], ("best",))
            tracker.alert("title", "text")
            time.sleep(1.2)  # for the machine to be measured
            tracker.finish(85)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            assert Path(os.environ.pop(name)).is_relative_to(run)
    return read_starts(run)


def test_both_starts_are_one_run_with_its_settings_group_and_tags(starts: list[WandbFile]) -> None:
    assert len(starts) == 2 and starts[0].run.run_id == starts[1].run.run_id == "4f00ba12"
    run = starts[0].run
    assert (run.project, run.run_group, list(run.tags)) == ("shapes", "night", ["a", "b"])
    assert starts[0].config["optim"] == {"lr": 0.1}
    assert [end.exit_code for start in starts for end in start.of("exit")] == [85, 85]


def test_alerts_are_there(starts: list[WandbFile]) -> None:
    assert [[(one.title, one.text) for one in start.of("alert")] for start in starts] == [[("title", "text")]] * 2


def test_memory_and_processor_are_measured_all_the_time(starts: list[WandbFile]) -> None:
    for start in starts:
        measured = {item.key for stats in start.of("stats") for item in stats.item}
        assert {"memory_percent", "cpu", "proc.memory.rssMB"} <= measured


def test_curves_go_by_our_own_steps(starts: list[WandbFile]) -> None:
    for start in starts:
        metrics = {metric.name or metric.glob_name: metric.step_metric for metric in start.of("metric")}
        assert metrics == {"step": "", "*": "step"}
    assert [start.rows("train/loss") for start in starts] == [
        [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}],
        [{"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": pytest.approx(1 / 3)}],
    ]


def test_each_evaluation_has_a_table_with_image_references_prediction_score_and_change(starts: list[WandbFile]) -> None:
    for start, step, change in ((starts[0], 2, None), (starts[1], 3, 0.5)):
        row = start.rows("eval/samples._type")[0]
        assert (row["step"], row["eval/samples.nrows"]) == (step, 1)
        files = start.files_of("run_table")
        table = json.loads(files["eval/samples.table.json"].read_text())
        assert tuple(table["columns"]) == COLUMNS
        image = table["data"][0].pop(2)
        assert table["data"] == [[step, "s", "r1\nr2", "p", 2.0, change]]
        assert (image["format"], image["width"], image["height"]) == ("jpg", 300, 200)
        assert Image.open(files[image["path"]]).size == (300, 200)


def test_an_adapter_is_an_artifact_without_the_optimizer_that_outlives_its_checkpoint(starts: list[WandbFile]) -> None:
    for start in starts:
        found = next(one for one in start.of("artifact") if one.type == "model")
        assert found.name == f"adapter-{start.run.run_id}" and "best" in found.aliases
        files = start.files_of("model")
        assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
        assert all("checkpoints" not in str(path) and path.read_text() == name for name, path in files.items())


def test_nothing_of_the_machine_is_told_but_what_is_measured(starts: list[WandbFile]) -> None:
    for start in starts:
        kinds = {record.WhichOneof("record_type") for record in start.records}
        assert not kinds & {"environment", "output", "output_raw"}
        names = {path.name for path in (start.directory / "files").rglob("*") if path.is_file()}
        assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "conda-environment.yaml", "diff.patch"}
        assert not start.run.git.commit and not start.run.git.remote_url
