"""A pack is its examples: same loss, same gradient, and no document sees another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from tests.examples import SEVEN, assert_close, gradients, packed_model
from vl_dist.data.collate import Batch, Collator
from vl_dist.errors import UserError
from vl_dist.model import attention
from vl_dist.model.attention import Backend
from vl_dist.model.packed import PackedModel, out_of_memory_named

BACKENDS: list[Backend] = ["sdpa", "eager"]


def summed_loss(model: PackedModel, *packs: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for pack in packs:
        loss = model(pack)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.fixture
def one_by_one(collator: Collator) -> list[Batch]:
    return [collator.pack([example]) for example in SEVEN]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pack_gives_the_same_gradient_as_its_examples_alone(
    tiny_model: Path, collator: Collator, one_by_one: list[Batch], backend: Backend
) -> None:
    model = packed_model(tiny_model, backend)
    loss, grads = summed_loss(model, *one_by_one)
    packed_loss, packed_grads = summed_loss(model, collator.pack(SEVEN))
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert_close(packed_grads, grads)
    split_loss, split_grads = summed_loss(model, collator.pack(SEVEN[:3]), collator.pack(SEVEN[3:]))
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert_close(split_grads, grads)


def test_examples_alone_are_the_whole_models_own_forward(tiny_model: Path, one_by_one: list[Batch]) -> None:
    model = packed_model(tiny_model)
    whole = model.peft_model.get_base_model()
    for batch in one_by_one:
        kinds = torch.zeros_like(batch.input_ids).index_fill(0, batch.image_rows, 1)
        output = whole(
            input_ids=batch.input_ids[None],
            attention_mask=torch.ones_like(batch.input_ids)[None],
            mm_token_type_ids=kinds[None],
            **({"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grids} if batch.num_images else {}),
        )
        expected = output.logits[0, batch.target_rows]
        torch.testing.assert_close(model.target_logits(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_one_document_changes_no_other_documents_logits_at_all(
    tiny_model: Path, collator: Collator, backend: Backend
) -> None:
    model = packed_model(tiny_model, backend).eval()
    batch = collator.pack(SEVEN)
    changed_document = 3
    inside = batch.document_ids == changed_document
    text_rows = inside & ~torch.zeros_like(inside).index_fill(0, batch.image_rows, True)
    other_text = replace(batch, input_ids=torch.where(text_rows, (batch.input_ids + 5) % 200, batch.input_ids))
    image_patches = batch.image_grids.prod(-1)
    first = int(image_patches[:2].sum())  # documents before it hold two images
    pixels = batch.pixel_values.clone()
    pixels[first : first + int(image_patches[2])] *= -1.0
    other_pixels = replace(batch, pixel_values=pixels)
    with torch.no_grad():
        before = model.hidden_states(batch)
        for changed in (other_text, other_pixels):
            difference = (model.hidden_states(changed) - before).abs().amax(dim=-1)
            assert difference[inside].max() > 1e-3, "the disturbance did not reach its own document"
            assert difference[~inside].max() == 0.0


def test_the_isolation_test_sees_a_leak(tiny_model: Path, collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "by_document", lambda batch: None)  # and SDPA sees that it is causal
    with pytest.raises(AssertionError):
        test_changing_one_document_changes_no_other_documents_logits_at_all(tiny_model, collator, "sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_neither_loss_nor_gradient(tiny_model: Path, collator: Collator, backend: Backend) -> None:
    model = packed_model(tiny_model, backend)
    loss, grads = summed_loss(model, collator.pack(SEVEN))
    padded = collator.pack(SEVEN, length=512)
    assert (padded.num_tokens, padded.num_padding) == (512, 512 - collator.pack(SEVEN).num_tokens)
    padded_loss, padded_grads = summed_loss(model, padded)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert_close(padded_grads, grads)


def test_a_pack_without_targets_adds_nothing_and_leaves_no_gradient_unset(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model)
    filler = collator.pack([])
    assert (filler.num_tokens, filler.num_targets, filler.num_images, filler.example_ids) == (1, 0, 0, ())
    loss, grads = summed_loss(model, filler)
    assert loss == 0.0
    assert all(bool((grad == 0).all()) for grad in grads.values())


def test_the_frozen_tower_leaves_no_graph_and_a_trained_one_gets_gradients(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model)
    batch = collator.pack(SEVEN[:1])
    assert not model.image_features(batch).requires_grad
    tower = model.peft_model.get_base_model().model.visual
    tower.blocks[0].attn.qkv.weight.requires_grad_(True)
    again = PackedModel(model.peft_model, "sdpa")
    again(batch).backward()
    assert tower.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_logits_are_made_for_target_rows_only(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model)
    batch = collator.pack(SEVEN)
    seen: list[tuple[int, ...]] = []
    head = model.peft_model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model(batch)
    assert seen == [(batch.num_targets, head.out_features)]


def test_out_of_memory_names_the_pack_and_the_key_to_lower(collator: Collator) -> None:
    pack = collator.pack(SEVEN[:1])
    with pytest.raises(UserError) as refused, out_of_memory_named(pack):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for part in (f"{pack.num_tokens} tokens", f"{pack.num_patches} patches", "batch.max_tokens_per_pack", "2.00 GiB"):
        assert part in str(refused.value)


def test_a_base_loaded_through_auto_classes_is_the_same_model(tiny_model: Path) -> None:
    assert isinstance(packed_model(tiny_model).peft_model.get_base_model(), Qwen2VLForConditionalGeneration)
