"""A step reads no device value on the host, the tower included: a read makes the CPU wait for all work that it queued.

A CPU has no queue to wait for, so the reads are counted: what torch dispatches, and what Python calls on tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import SEVEN, cached_collator, packed_model
from tests.model.test_shared_prefix import GROUPS
from train import train_step
from vl_dist.data.collate import Batch, Collator
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.run.features import FeatureFill
from vl_dist.settings import LoraSettings, OptimConfig

ALLOWED = ["item", "aten._local_scalar_dense.default"]  # one read, seen from both sides: is everything a number?
READING_OPERATIONS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "aten.equal.",
    "repeat_interleave.Tensor",
)
READING_METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class Reads(TorchDispatchMode):
    """Operations whose result, or its size, has to come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        # Indexing with booleans looks up how many are true.
        masked = name.startswith("aten.index") and any(
            isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8)
            for given in args[1:]
            if isinstance(given, list | tuple)
            for one in given
        )
        if masked or any(part in name for part in READING_OPERATIONS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Python's own ways to read a tensor, some of which torch does not dispatch for one on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and any(str(one) == "cpu" for one in args[1:]) and not self._is_batch_move(args)
        if name in READING_METHODS or to_host:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_batch_move(args: Any) -> bool:
        return not args[0].requires_grad and args[0].grad_fn is None  # the pack on its way to the device, here the CPU


def reads_of(action: Callable[[], Any]) -> list[str]:
    with Calls() as calls, Reads() as reads:
        action()
    return calls.found + reads.found


@pytest.fixture(params=["none", "every_2"])
def run(tiny_model: Path, request: pytest.FixtureRequest) -> Any:
    settings = LoraSettings(r=4, dropout=0.05, target_modules=("q_proj", "down_proj", "qkv", "fc1"), tower=True)
    adapted = attach_lora(load_base(tiny_model, torch.float32, "sdpa"), settings, seed=0)
    model = PackedModel(adapted, "sdpa", recompute=request.param).train()
    ranks = Ranks(Accelerator(cpu=True))
    engine = PlainEngine(model, ranks, OptimConfig(max_grad_norm=0.5))
    engine.set_lr(1e-3)
    return SimpleNamespace(ranks=ranks, engine=engine)


def some_packs(collator: Collator) -> list[Batch]:
    again = [SEVEN[0], SEVEN[0]]
    return [collator.pack([*SEVEN, *again]), collator.pack_documents(GROUPS, length=512), collator.pack([])]


def test_a_step_reads_no_more_than_it_must(run: Any, collator: Collator) -> None:
    packs = some_packs(collator)
    train_step(packs, run)  # the optimizer makes its state in the first one
    assert reads_of(lambda: train_step(packs, run)) == ALLOWED


def test_a_step_that_reads_and_fills_the_feature_cache_reads_the_device_no_more(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model = packed_model(tiny_model, dropout=0.05)
    cached = cached_collator(collator, model, ("rocket.jpg", "cat.jpg"), tmp_path)
    engine = PlainEngine(model, Ranks(Accelerator(cpu=True)), OptimConfig(max_grad_norm=0.5))
    run: Any = SimpleNamespace(ranks=Ranks(Accelerator(cpu=True)), engine=engine)
    packs = some_packs(cached)
    assert packs[0].num_cached_images == 2 and packs[0].num_encoded_images > 0
    (tmp_path / "new").mkdir()
    with FeatureFill(tmp_path / "new", lambda text: pytest.fail(text)) as fill:
        train_step(packs, run)
        model.keep_features = fill
        assert reads_of(lambda: train_step(packs, run)) == ALLOWED
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: (x * torch.ones(3, requires_grad=True)).to("cpu"),
    ],
)
def test_the_counter_sees_every_kind_of_read(read: Callable[[torch.Tensor], Any]) -> None:
    assert reads_of(lambda: read(torch.arange(3.0)))
