"""The check: a table of what holds, vLLM's rules, and the command that serves the adapter."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.adapter.test_contract import change_json, change_weights, rename
from vl_dist import cli
from vl_dist.adapter import vllm
from vl_dist.adapter.check import check_adapter
from vl_dist.adapter.load import load

LANGUAGE = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
TOWER = "base_model.model.model.visual.blocks.0.attn.qkv.lora_B.weight"
MERGER = "base_model.model.model.visual.merger.mlp.0.lora_B.weight"
PLAIN: dict[str, Any] = {"r": 16, "use_dora": False, "modules_to_save": None, "bias": "none"}


def test_a_whole_adapter_is_told_how_to_be_served(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(exported)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "NO" not in out
    command = shlex.split(out.split("Serve it with:\n")[1].splitlines()[0])
    assert command[:2] == ["vllm", "serve"] and (Path(command[2]) / "config.json").is_file()
    options = dict(itertools.pairwise(command))
    assert options["--max-lora-rank"] == "8", "rank 4 fits into 8"
    assert options["--lora-modules"] == f"adapter={exported}"
    assert json.loads(options["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 9408}
    assert Path(options["--chat-template"]).is_file()
    assert "--enable-tower-connector-lora" not in command
    assert "'COCO Yes:'" in out and "stop_token_ids" in out


@pytest.mark.parametrize("command", [["check"], ["predict"], ["merge"], ["evaluate"]])
def test_a_directory_that_is_not_there_is_said_to_be_missing_and_nothing_else(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"check": [], "predict": ["x.jpg"], "merge": [str(tmp_path / "out")], "evaluate": ["x.jsonl"]}[command[0]]
    assert cli.main([*command, str(tmp_path / "nowhere"), *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"There is no directory {tmp_path / 'nowhere'}.") and len(err.splitlines()) == 1


def test_an_adapter_that_does_not_load_is_one_reason_and_what_follows_is_not_reached(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(adapter, rename)
    report = check_adapter(adapter, base_dir=None)
    assert [check.holds for check in report.checks] == [True, True, True, True, False, None, None]
    assert report.serving is None
    assert cli.main(["check", str(adapter)]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "do not meet" in err
    assert "vllm serve" not in out


def test_a_damaged_metadata_file_is_the_first_thing_that_does_not_hold(adapter: Path) -> None:
    change_json(adapter / "training_metadata.json", lambda found: found.pop("probe"))
    assert [check.holds for check in check_adapter(adapter, base_dir=None).checks] == [False, *[None] * 6]


@pytest.mark.parametrize(
    ("change", "names", "reason"),
    [
        ({"r": 513}, [LANGUAGE], "up to 512"),
        ({"use_dora": True}, [LANGUAGE, LANGUAGE.replace("lora_A.weight", "lora_magnitude_vector")], "DoRA"),
        ({"modules_to_save": ["lm_head"]}, [LANGUAGE], "lm_head"),
        ({"bias": "all"}, [LANGUAGE], "biases"),
        ({"alpha_pattern": {"q_proj": 8}}, [LANGUAGE], "alike"),
        ({}, [LANGUAGE, "base_model.model.lm_head.lora_A.weight"], "first base_model.model.lm_head"),
        ({}, [LANGUAGE.replace("lora_A.weight", "lora_magnitude_vector")], "magnitude"),
        ({}, [LANGUAGE.replace("base_model.model.", "module.")], "first module."),
    ],
)
def test_what_vllm_would_refuse_or_serve_otherwise_is_said(change: dict[str, Any], names: list[str], reason: str) -> None:
    found = vllm.obstacles(PLAIN | change, names)
    assert len(found) == 1 and reason in found[0]


def test_what_vllm_serves_has_no_obstacle_and_the_smallest_rank_that_holds_it(exported: Path) -> None:
    assert vllm.obstacles(PLAIN, [LANGUAGE, TOWER, MERGER]) == []
    assert vllm.obstacles(PLAIN | {"use_rslora": True, "r": 512}, [LANGUAGE]) == []
    assert [vllm.max_rank(rank) for rank in (1, 8, 9, 64, 257, 512)] == [8, 8, 16, 64, 320, 512]
    adapter = load(exported, base_dir=None)
    assert "--enable-tower-connector-lora" in vllm.serving_command(adapter, PLAIN, [TOWER])
    assert ["experimental" in " ".join(vllm.notes(adapter, names)) for names in ([TOWER], [LANGUAGE])] == [True, False]


def test_an_obstacle_of_vllm_ends_with_code_two_and_the_way_round_it(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "obstacles", lambda settings, names: ["its rank is 513, vLLM goes up to 512"])
    assert cli.main(["check", str(exported)]) == 2
    out, err = capsys.readouterr()
    assert "rank is 513" in err and "vl_dist merge" in err
    assert "vllm serve" not in out
