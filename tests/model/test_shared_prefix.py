"""A group encoded once is its examples one by one: same loss, same gradient, and no branch sees another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples import SEVEN, assert_close, gradients, packed_model
from vl_dist.data.assign import assign
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.examples import in_memory
from vl_dist.data.groups import group_numbers
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.plan import Step
from vl_dist.data.records import Example
from vl_dist.model import attention
from vl_dist.model.attention import Backend
from vl_dist.model.grouped import GroupedAttention, Segment
from vl_dist.model.packed import PackedModel

ANSWERS = ("A cat.", "A cat sits on a wooden table next to a cup of coffee.", "", "Two rockets stand side by side.")


def branches_of(example: Example) -> list[Example]:
    return [replace(example, id=f"{example.id}#{n}", answer=answer) for n, answer in enumerate(ANSWERS)]


GROUPS = [branches_of(SEVEN[n]) for n in (2, 3, 4, 1)]  # one image, two images, an earlier answer, text only


def loss_and_gradients(model: PackedModel, packs: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for pack in packs:
        loss = model(pack)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("end_token", ["<|endoftext|>", None])
def test_a_shared_trunk_gives_the_loss_and_gradient_of_its_examples_alone(
    tiny_model: Path, collator: Collator, processor: Any, backend: Backend, end_token: str | None
) -> None:
    collator.encoder = Encoder(processor, merge_size=2, end_token=end_token)
    model = packed_model(tiny_model, backend)
    alone = [collator.pack([example]) for group in GROUPS for example in group]
    loss, grads = loss_and_gradients(model, alone)
    shared = collator.pack_documents(GROUPS)
    assert shared.num_tokens < 0.5 * sum(pack.num_tokens for pack in alone)
    assert shared.num_targets == sum(pack.num_targets for pack in alone)
    assert shared.num_images == 4 < sum(pack.num_images for pack in alone)
    assert shared.example_ids == tuple(example.id for group in GROUPS for example in group)
    for packs in ([shared], [collator.pack_documents(GROUPS[:2]), collator.pack_documents(GROUPS[2:], length=512)]):
        packed_loss, packed_grads = loss_and_gradients(model, packs)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert_close(packed_grads, grads)


def test_a_group_longer_than_a_pack_repeats_its_trunk_and_changes_nothing(
    tiny_model: Path, collator: Collator, photos: Path, shape: PatchShape
) -> None:
    examples = [example for group in GROUPS for example in group]
    chosen = in_memory(examples)
    lengths = measure(examples, collator.encoder, HeaderReader(photos, collator.budget, shape))
    lengths = replace(lengths, group=group_numbers(chosen.trunks(), len(examples), max_size=8))
    assert lengths.group.tolist() == [n for n in range(4) for _ in range(4)]
    step = Step(0, 0, np.arange(len(examples)), ends_epoch=True)
    model = packed_model(tiny_model)
    loss, grads = loss_and_gradients(model, [collator.pack([example]) for example in examples])
    num_documents = []
    for max_tokens in (int(lengths.tokens.max()), 400):
        assignment = assign(step, lengths, world_size=1, max_tokens=max_tokens)
        packs = [
            collator.pack_documents([[chosen[n] for n in document] for document in pack.documents])
            for pack in assignment.packs[0]
        ]
        assert [pack.num_tokens for pack in packs] == [pack.num_tokens for pack in assignment.packs[0]]
        num_documents.append(sum(len(pack.documents) for pack in packs))
        packed_loss, packed_grads = loss_and_gradients(model, packs)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert_close(packed_grads, grads)
    assert num_documents[0] > num_documents[1] == 4


def test_positions_of_a_branch_go_on_from_its_trunk(collator: Collator) -> None:
    shared, alone = collator.pack_documents(GROUPS[:1]), [collator.pack([example]) for example in GROUPS[0]]
    trunk = shared.documents[0].trunk
    start = trunk
    for n, one in enumerate(alone):
        end = start + one.num_tokens - trunk
        rows = [*range(trunk), *range(start, end)]
        assert torch.equal(shared.positions[:, rows], one.positions)
        assert torch.equal(shared.input_ids[rows], one.input_ids)
        assert shared.branch_ids[start:end].unique().tolist() == [n + 1]
        start = end
    assert start == shared.num_tokens and shared.branch_ids[:trunk].unique().tolist() == [0]


def disturbed(batch: Batch, inside: torch.Tensor) -> Batch:
    return replace(batch, input_ids=torch.where(inside, (batch.input_ids + 5) % 200, batch.input_ids))


def reach(model: PackedModel, batch: Batch, inside: torch.Tensor) -> torch.Tensor:
    """How much each row changes when the rows inside do."""
    with torch.no_grad():
        changed: torch.Tensor = model.hidden_states(disturbed(batch, inside)) - model.hidden_states(batch)
    return changed.abs().amax(dim=-1)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_branch_reaches_itself_alone_and_a_trunk_all_its_branches(
    tiny_model: Path, collator: Collator, backend: Backend
) -> None:
    model = packed_model(tiny_model, backend).eval()
    batch = collator.pack_documents([GROUPS[0], GROUPS[3]])
    branch = (batch.document_ids == 0) & (batch.branch_ids == 2)
    moved = reach(model, batch, branch)
    assert moved[branch].max() > 1e-3
    assert moved[~branch].max() == 0.0
    last_of_trunk = torch.zeros_like(branch).index_fill(0, torch.tensor([batch.documents[0].trunk - 1]), True)
    moved = reach(model, batch, last_of_trunk)
    for number in range(1, len(ANSWERS) + 1):
        assert moved[(batch.document_ids == 0) & (batch.branch_ids == number)].max() > 1e-4
    assert moved[batch.document_ids == 1].max() == 0.0


def test_the_isolation_test_sees_branches_that_leak(
    tiny_model: Path, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_branches(batch: Batch) -> GroupedAttention:
        sizes = [document.num_tokens for document in batch.documents]
        return GroupedAttention(tuple(Segment(size) for size in [*sizes, batch.num_padding] if size), causal=True)

    monkeypatch.setattr(attention, "by_document", without_branches)
    with pytest.raises(AssertionError):
        test_a_branch_reaches_itself_alone_and_a_trunk_all_its_branches(tiny_model, collator, "sdpa")
    with pytest.raises(AssertionError):
        test_a_group_longer_than_a_pack_repeats_its_trunk_and_changes_nothing(
            tiny_model, collator, collator.pictures.roots[0], collator.shape
        )


def test_a_bad_image_takes_all_examples_of_its_document_and_no_other(collator: Collator, tmp_path: Path) -> None:
    gone = [replace(example, prompt=SEVEN[0].prompt) for example in GROUPS[0]]
    collator.pictures.roots = (collator.pictures.roots[0], tmp_path)
    batch = collator.pack_documents([[replace(example, file=1) for example in gone], GROUPS[1]])
    assert [one.id for one in batch.dropped] == [example.id for example in gone]
    assert batch.example_ids == tuple(example.id for example in GROUPS[1])
    assert torch.equal(batch.input_ids, collator.pack_documents([GROUPS[1]]).input_ids)
