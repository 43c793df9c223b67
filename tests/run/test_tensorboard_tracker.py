"""Event files, read back by TensorBoard's own reader."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vl_dist.evaluate.held_out import Sample
from vl_dist.run.tensorboard_tracker import TensorBoardTracker
from vl_dist.run.tracking import ShownSample


def start(run: Path, first_step: int, steps: range) -> None:
    tracker = TensorBoardTracker(run, settings={"optim": {"lr": 0.1}}, first_step=first_step)
    tracker.start()
    for step in steps:
        tracker.log({"step": step, "train/loss": 10.0 * first_step + step, "perf/mfu": None})
    tracker.samples(steps[-1], [ShownSample(Sample("a", (), ("ref",), "x|<b>", False, 2.0), -0.5, lambda: None)])
    tracker.alert("title", "text")
    tracker.adapter(run / "adapter", steps[-1], ("latest",))
    tracker.finish(0)


def test_every_number_is_a_curve_and_a_resumed_run_replaces_the_steps_that_were_cut(tmp_path: Path) -> None:
    start(tmp_path, 0, range(1, 6))
    start(tmp_path, 3, range(4, 7))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0),
    ]  # fmt: skip
    texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "lr: 0.1" in texts["settings/text_summary"]
    assert "| a | x&#124;&lt;b&gt; | ref | 2.00 | -0.50 |" in texts["eval/samples/text_summary"]
    assert {"alert/text_summary", "adapter/latest/text_summary"} <= texts.keys()
