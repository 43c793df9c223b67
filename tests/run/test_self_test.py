"""The self-test passes every kernel that keeps documents apart, and refuses those that do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples import SEVEN, packed_model
from tests.model.test_shared_prefix import GROUPS
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.groups import group_numbers
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Example
from vl_dist.errors import UserError
from vl_dist.model import attention
from vl_dist.model.grouped import GroupedAttention, Segment
from vl_dist.run.self_test import self_test, small_documents
from vl_dist.settings import LoraSettings

CPU = torch.device("cpu")


def loaded(examples: list[Example], collator: Collator, photos: Path, shape: PatchShape, *, share: bool) -> LoadedData:
    lengths = measure(examples, collator.encoder, HeaderReader(photos, collator.budget, shape))
    trunks = np.repeat(np.arange(len(GROUPS)), len(examples) // len(GROUPS)) if share else None
    return LoadedData(examples, replace(lengths, group=group_numbers(trunks, len(examples), max_size=8)), collator)


@pytest.fixture
def seven(collator: Collator, photos: Path, shape: PatchShape) -> LoadedData:
    return loaded(SEVEN, collator, photos, shape, share=False)


@pytest.fixture
def groups(collator: Collator, photos: Path, shape: PatchShape) -> LoadedData:
    return loaded([example for group in GROUPS for example in group], collator, photos, shape, share=True)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_keep_documents_apart_pass_and_nothing_has_changed(
    tiny_model: Path, seven: LoadedData, groups: LoadedData, backend: Any, dtype: torch.dtype
) -> None:
    model = packed_model(tiny_model, backend, dtype=dtype, dropout=0.1)
    random = torch.random.get_rng_state()
    for data in (seven, groups):
        found = self_test(model, data, CPU)
        assert found.num_documents == 3
        assert found.leak == 0.0
    assert model.training
    assert all(parameter.grad is None for parameter in model.lora_parameters.values())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_merger_that_trains_alone_is_tested_beside_a_text_that_does_not_reach_it(
    tiny_model: Path, seven: LoadedData
) -> None:
    lora = LoraSettings(r=4, dropout=0.0, merger=True, target_modules=("mlp.0",))
    found = self_test(packed_model(tiny_model, lora=lora), seven, CPU)
    assert 0.0 <= found.gradient < 1e-5


def leaks_backwards(batch: Batch) -> GroupedAttention:
    return GroupedAttention((Segment(batch.num_tokens),), causal=False)


def leaks_between_branches(batch: Batch) -> GroupedAttention:
    return GroupedAttention(tuple(Segment(document.num_tokens) for document in batch.documents), causal=True)


def leaks_a_little(batch: Batch) -> Any:
    own, whole = kept(batch), GroupedAttention((Segment(batch.num_tokens),), causal=True)
    return lambda *tensors: 0.999 * own(*tensors) + 0.001 * whole(*tensors)


kept = attention.by_document


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "broken",
    [lambda batch: None, leaks_backwards, leaks_a_little, leaks_between_branches],
    ids=["drops the mask", "leaks backwards", "leaks a little", "leaks between branches"],
)
def test_a_kernel_that_leaks_is_refused_with_the_figures(
    tiny_model: Path, groups: LoadedData, monkeypatch: pytest.MonkeyPatch, broken: Any, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "by_document", broken)
    model = packed_model(tiny_model, dtype=dtype)
    with pytest.raises(UserError, match=r"differs from its examples alone by .* moves others by .*model\.attention=sdpa"):
        self_test(model, groups, CPU)
    assert model.training


def test_a_kernel_that_gives_no_numbers_is_refused(
    tiny_model: Path, seven: LoadedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "by_document", lambda batch: lambda *tensors: kept(batch)(*tensors) * torch.nan)
    with pytest.raises(UserError, match="nan"):
        self_test(packed_model(tiny_model), seven, CPU)


def test_the_pack_has_text_and_images_and_neighbours_even_where_there_is_one_example(
    collator: Collator, photos: Path, shape: PatchShape, seven: LoadedData
) -> None:
    chosen = small_documents(seven)
    assert chosen[0][0].id == "text"
    assert all(example.image_paths for (example,) in chosen[1:])
    single = loaded(SEVEN[:1], collator, photos, shape, share=False)
    assert [[example.id for example in document] for document in small_documents(single)] == [["rocket"]] * 3
