"""LoRA on tower and merger, with learning rates of their own, and DoRA: two ranks train what one does.

In the first two steps one rank has text alone, in the last one nothing at all: its tower runs an idle image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from tests.dist.stepping import ALL, ENGINES, LAST, RATES, SHARES, Case, Recorded, take_steps
from tests.examples import SEVEN, assert_close, packed_model
from tests.processes import launcher_variables, run_ranks
from vl_dist.data.collate import Collator
from vl_dist.model.packed import PackedModel
from vl_dist.model.targets import part_of
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import make_engine
from vl_dist.run.launched import read_launch
from vl_dist.settings import Config, LoraSettings, ModelConfig, OptimConfig

LORA = LoraSettings(
    r=4, alpha=8, dropout=0.0, tower=True, merger=True,
    target_modules=("q_proj", "down_proj", "qkv", "proj", "fc1", "fc2", "mlp.0", "mlp.2"),
)  # fmt: skip
OPTIM = OptimConfig(
    lr=RATES[0], lr_tower=3 * RATES[0], lr_merger=RATES[0] / 4, max_grad_norm=None, weight_decay=0.1
)
RATIOS = {"language model": 1.0, "tower": 3.0, "merger": 0.25}
KINDS = {"lora": LORA, "dora": replace(LORA, dora=True)}
CASES = [(kind, engine) for kind in KINDS for engine in ENGINES if (kind, engine) != ("dora", "zero3")]


def all_cases(tiny_model: str, collator: Collator, home: str) -> None:
    """Every case in turn in this process group (all ranks); rank 0 writes what each found."""
    for kind, name in CASES:
        AcceleratorState._reset_state(reset_partial_state=True)
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS"):
            os.environ.pop(variable, None)
        os.environ.update(launcher_variables(ENGINES[name]))
        config = Config(model=ModelConfig(dtype="float32"), lora=KINDS[kind], optim=OPTIM)
        launch = read_launch(config, os.environ)
        ranks = Ranks.start(launch, cpu_threads=1)
        model = packed_model(Path(tiny_model), lora=config.lora)
        engine = Recorded(make_engine(model, ranks, OPTIM, launch), model)
        take_steps(Case(name, 1, None), ranks, engine, collator)
        trained = engine.trained()
        again = make_engine(packed_model(Path(tiny_model), lora=config.lora), ranks, OPTIM, launch)
        moments = load_file(Path(home) / f"{kind}.safetensors")
        again.restore_moments({key.removeprefix("moment."): t for key, t in moments.items() if key.startswith("moment.")}, 3)
        restored = again.trained()
        if trained is not None and restored is not None:
            found = engine.found | {f"weight.{key}": tensor for key, tensor in trained.weights.items()}
            found |= {f"moment.{key}": tensor for key, tensor in trained.moments.items()}
            found |= {f"restored.{key}": tensor for key, tensor in restored.moments.items()}
            save_file({key: t.contiguous() for key, t in found.items()}, Path(home) / f"{kind}-{name}.safetensors")
    ranks.close()


def reference(model: PackedModel, collator: Collator) -> Iterator[tuple[str, torch.Tensor]]:
    """The three steps in plain torch, one process, one batch a step; a group of its own for each parameter."""
    parameters = model.lora_parameters
    groups = [{"params": [p], "ratio": RATIOS[part_of(name)]} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for n, rate in enumerate(RATES):
        pack = collator.pack([SEVEN[k] for k in ((2,) if n == 2 else ALL)])
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.zero_grad()
        (model(pack) / pack.num_targets).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            yield f"gradient.{n}.{name}", parameter.grad.clone()
        optimizer.step()
    for name, parameter in parameters.items():
        yield f"weight.{name}", parameter.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"moment.{name}.{moment}", optimizer.state[parameter][moment]


@pytest.fixture(scope="module")
def home(tiny_model: Path, photo_collator: Collator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("parts")
    for kind, lora in KINDS.items():
        save_file(dict(reference(packed_model(tiny_model, lora=lora), photo_collator)), home / f"{kind}.safetensors")
    log = home / "log"
    arguments = (str(tiny_model), photo_collator, str(home))
    codes = run_ranks(all_cases, *arguments, world_size=2, log=log, config_file="zero1.yaml")
    assert codes == [0, 0], log.read_text()[-3000:]
    return home


def test_one_rank_has_text_alone_and_then_nothing() -> None:
    assert all(not any(hasattr(part, "image") for m in SEVEN[n].prompt for part in m.parts) for n in SHARES[2, 1][1][0])
    assert LAST[2, 1][1] == ((),)


@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_gradients_weights_and_moments_of_every_part_are_those_of_one_process(home: Path, kind: str, engine: str) -> None:
    found, wanted = load_file(home / f"{kind}-{engine}.safetensors"), load_file(home / f"{kind}.safetensors")
    for begin in ("gradient.0.", "gradient.1.", "gradient.2.", "weight.", "moment."):
        own, theirs = ({name: t for name, t in one.items() if name.startswith(begin)} for one in (found, wanted))
        assert {part_of(name) for name in theirs} == set(RATIOS)
        assert_close(own, theirs)
    restored = {name.replace("restored.", "moment."): t for name, t in found.items() if name.startswith("restored.")}
    assert restored and all(torch.equal(tensor, wanted[name]) for name, tensor in restored.items())
