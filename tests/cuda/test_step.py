"""What only a GPU can show: the kernels that exist nowhere else, and what a step waits for."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.examples import SEVEN, packed_model
from tests.model.test_shared_prefix import GROUPS
from train import train_step
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.records import Example
from vl_dist.model.attention import Backend
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.run.self_test import TOLERANCES, largest_leak, loss_and_gradient
from vl_dist.settings import OptimConfig

KERNELS: list[tuple[Backend, torch.dtype]] = [
    ("varlen", torch.bfloat16),
    ("flex", torch.bfloat16),
    ("flex", torch.float32),
    ("sdpa", torch.bfloat16),
    ("sdpa", torch.float32),
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def pack_and_alone(collator: Collator, backend: Backend) -> tuple[Batch, list[Batch]]:
    """With several branches to a document where the kernel can keep them apart."""
    documents: list[list[Example]] = [[one] for one in SEVEN] if backend == "varlen" else [list(group) for group in GROUPS]
    return collator.pack_documents(documents), [collator.pack([one]) for document in documents for one in document]


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
def test_a_pack_computes_what_its_examples_compute_alone_and_nothing_leaks(
    tiny_model: Path, collator: Collator, device: torch.device, backend: Backend, dtype: torch.dtype
) -> None:
    model = packed_model(tiny_model, backend, dtype=dtype).to(device).eval()
    pack, alone = pack_and_alone(collator, backend)
    allowed = TOLERANCES[dtype]
    assert largest_leak(model, pack.to(device)) <= allowed.leak
    loss, gradient = loss_and_gradient(model, [pack.to(device)])
    wanted_loss, wanted = loss_and_gradient(model, [one.to(device) for one in alone])
    assert loss == pytest.approx(wanted_loss, rel=allowed.loss)
    assert float((gradient - wanted).norm() / wanted.norm()) <= allowed.gradient


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
def test_a_step_waits_for_the_device_once(
    tiny_model: Path, collator: Collator, device: torch.device, backend: Backend, dtype: torch.dtype
) -> None:
    """To learn whether everything is a number; torch itself says where the host waits."""
    model = packed_model(tiny_model, backend, dtype=dtype, dropout=0.05).to(device)
    ranks = Ranks(Accelerator())
    engine = PlainEngine(model, ranks, OptimConfig(max_grad_norm=0.5))
    run: Any = SimpleNamespace(ranks=ranks, engine=engine)
    packs = [pack_and_alone(collator, backend)[0].pin_memory(), collator.pack([]).pin_memory()]
    for _ in range(2):  # kernels are made, and the optimizer's state
        train_step(packs, run)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(packs, run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]
    assert len(waits) == 1, waits
