"""The same seven examples through every engine: what each process of the parity test does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from tests.examples import SEVEN, packed_model
from tests.processes import launcher_variables
from train import train_step
from vl_dist.data.collate import Batch, Collator
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import Engine, make_engine
from vl_dist.run.launched import read_launch
from vl_dist.settings import Config, ModelConfig, OptimConfig

ENGINES: dict[str, str | None] = {"plain": None, "zero1": "zero1.yaml", "zero2": "zero2.yaml", "zero3": "zero3.yaml"}
RATES = (1e-3, 7e-4, 3e-4)
CLIPPINGS = (None, 0.5)
# Which of the seven a rank's packs hold, in three steps of which the last has one example only: by (world size, packs a
# step). With two ranks there are packs of text only on one of them while the other's have images, and packs without targets.
ALL = tuple(range(7))
SHARES: dict[tuple[int, int], tuple[tuple[tuple[int, ...], ...], ...]] = {
    (1, 1): ((ALL,),),
    (1, 3): (((0, 1, 2, 3), (), (4, 5, 6)),),
    (2, 1): (((0, 2, 3, 4, 5),), ((1, 6),)),
    (2, 3): (((0, 2), (3,), (1,)), ((4, 5), (6,), ())),
}
LAST: dict[tuple[int, int], tuple[tuple[tuple[int, ...], ...], ...]] = {
    (1, 1): (((2,),),),
    (1, 3): (((), (2,), ()),),
    (2, 1): (((2,),), ((),)),
    (2, 3): (((), (2,), ()), ((), (), ())),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One way to take the three steps."""

    engine: str
    num_packs: int
    clipping: float | None
    dtype: torch.dtype = torch.float32
    cached: bool = False  # some images' features come from the cache

    @property
    def name(self) -> str:
        clipped = "" if self.clipping is None else "-clipped"
        rounded = "" if self.dtype == torch.float32 else "-bf16"
        return f"{self.engine}-{self.num_packs}{clipped}{rounded}{'-cached' if self.cached else ''}"


def cases() -> Iterator[Case]:
    for engine, num_packs, clipping in product(ENGINES, (1, 3), CLIPPINGS):
        yield Case(engine, num_packs, clipping)
    for engine in ENGINES:
        yield Case(engine, 3, 0.5, torch.bfloat16)
    for engine in ("plain", "zero3"):
        yield Case(engine, 3, None, cached=True)


@dataclass
class Recorded:
    """An engine that notes each gradient before it is used up."""

    engine: Engine
    model: PackedModel
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, pack: Batch) -> torch.Tensor:
        return self.engine(pack)

    def clip_and_step(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.lora_parameters.items():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, name
            self.found[f"gradient.{self.num_steps}.{name}"] = gradient.detach().clone()
        self.num_steps += 1
        return self.engine.clip_and_step()


def take_steps(case: Case, ranks: Ranks, engine: Recorded, collator: Collator) -> None:
    """Three steps; everything that can be compared is in `engine.found` afterwards."""
    losses, norms, rates = [], [], []
    for n, rate in enumerate(RATES):
        share = (LAST if n == 2 else SHARES)[ranks.world_size, case.num_packs][ranks.rank]
        packs = [collator.pack([SEVEN[k] for k in members]) for members in share]
        engine.set_lr(rate)
        own, norm = train_step(packs, SimpleNamespace(ranks=ranks, engine=engine))  # type: ignore[arg-type]
        assert norm is not None
        losses.append(ranks.sum(own.sum()))
        norms.append(norm.detach().clone().float().reshape(()))
        inner = getattr(engine.engine, "_optimizer", None) or engine.engine._engine.optimizer
        rates.append(inner.param_groups[0]["lr"])
    engine.found |= {"loss": torch.stack(losses), "norm": torch.stack(norms), "rate": torch.tensor(rates)}


def all_cases(tiny_model: str, collator: Collator, cached: Collator, out: str) -> None:
    """Every engine in turn in this process group (all ranks); rank 0 writes what each found.

    Args:
        cached: finds the features of some images, so that in a step one rank needs the tower and the other does not, and
            in the last step none does.
    """
    for case in cases():
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS"):
            os.environ.pop(name, None)
        os.environ.update(launcher_variables(ENGINES[case.engine]))
        config = Config(
            model=ModelConfig(dtype="bfloat16" if case.dtype == torch.bfloat16 else "float32"),
            optim=OptimConfig(lr=RATES[0], max_grad_norm=case.clipping, weight_decay=0.1),
        )
        launch = read_launch(config, os.environ)
        ranks = Ranks.start(launch, cpu_threads=1)
        model = packed_model(Path(tiny_model), dtype=case.dtype)
        engine = Recorded(make_engine(model, ranks, config.optim, launch), model)
        take_steps(case, ranks, engine, cached if case.cached else collator)
        trained = engine.trained()
        if trained is not None:
            engine.found |= {f"weight.{name}": tensor for name, tensor in trained.weights.items()}
            engine.found |= {f"moment.{name}": tensor for name, tensor in trained.moments.items()}
            save_file({name: t.contiguous() for name, t in engine.found.items()}, Path(out) / f"{case.name}.safetensors")
    ranks.close()


def reference(tiny_model: Path, collator: Collator, clipping: float | None) -> dict[str, torch.Tensor]:
    """The three steps in plain torch: one process, one batch a step, nothing of ours but the model."""
    model = packed_model(tiny_model)
    parameters = model.lora_parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATES[0], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    found: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    for n, rate in enumerate(RATES):
        examples: Sequence[int] = (2,) if n == 2 else ALL
        pack = collator.pack([SEVEN[k] for k in examples])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model(pack)
        (loss / pack.num_targets).backward()
        losses.append(loss.detach().double())
        gradients = [parameter.grad for parameter in parameters.values()]
        assert all(gradient is not None for gradient in gradients)
        found |= {f"gradient.{n}.{name}": g.clone() for name, g in zip(parameters, gradients, strict=True) if g is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), clipping or float("inf")))
        optimizer.step()
    found |= {f"weight.{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"moment.{name}.{moment}"] = optimizer.state[parameter][moment]
    return found | {"loss": torch.stack(losses), "norm": torch.stack(norms), "rate": torch.tensor(RATES)}
