"""What is compiled, when, and how often; that it computes the same is `test_switches`."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.examples import SEVEN, packed_model
from tests.model.test_shared_prefix import GROUPS
from vl_dist.data.collate import Batch, Collator
from vl_dist.errors import UserError
from vl_dist.model import compilation
from vl_dist.model.compilation import num_compilations, refuse_without_compiler


@pytest.fixture
def _graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made and counted as ever, and run without making kernels of them."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def compilations(model: torch.nn.Module, *packs: Batch) -> int:
    before = num_compilations()
    for pack in packs:
        loss = model(pack)
        if loss.requires_grad:
            loss.backward()
    return num_compilations() - before


@pytest.mark.usefixtures("_graphs_only")
def test_packs_of_any_lengths_and_documents_share_what_was_compiled(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model, compiled=True)
    first = [collator.pack(SEVEN), collator.pack_documents(GROUPS), collator.pack([SEVEN[0], SEVEN[0]])]
    assert compilations(model, *first) > 4
    others = [collator.pack(SEVEN[2:6]), collator.pack(SEVEN, length=700), collator.pack_documents(GROUPS[:2])]
    assert compilations(model, *first, *others) == 0


@pytest.mark.usefixtures("_graphs_only")
def test_each_length_of_padded_packs_is_compiled_once(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model, compiled=True, num_lengths=2)
    one, other = ([collator.pack(members, length=length) for members in (SEVEN[:3], SEVEN[2:5])] for length in (256, 384))
    assert compilations(model, *one) > 4
    assert compilations(model, *one) == 0
    assert compilations(model, *other) > 2
    assert compilations(model, *one, *other) == 0


@pytest.mark.usefixtures("_graphs_only")
def test_evaluation_and_fillers_are_not_compiled(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model, compiled=True)
    assert compilations(model, collator.pack([])) == 0
    assert compilations(model.eval(), collator.pack(SEVEN)) == 0
    assert compilations(model.train(), collator.pack(SEVEN)) > 4


@pytest.mark.usefixtures("_graphs_only")
def test_names_of_weights_stay(tiny_model: Path) -> None:
    assert packed_model(tiny_model, compiled=True).state_dict().keys() == packed_model(tiny_model).state_dict().keys()


def test_a_machine_that_cannot_compile_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}),
        pytest.raises(UserError, match=r"cannot compile on this machine: .*It needs a C\+\+ compiler.*run\.compile=false"),
    ):
        refuse_without_compiler(torch.device("cpu"))
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "_add_one", lambda values: values)
    refuse_without_compiler(torch.device("cpu"))
