"""A batch's indices point at what they should."""

import torch

from tests.examples import SEVEN
from vl_dist.data.collate import Collator


def test_targets_are_predicted_from_the_row_before_them_in_their_own_document(collator: Collator) -> None:
    batch = collator.pack(SEVEN)
    assert torch.equal(batch.input_ids[batch.target_rows + 1], batch.target_ids)
    assert torch.equal(batch.document_ids[batch.target_rows + 1], batch.document_ids[batch.target_rows])
    assert batch.num_targets == sum(collator.pack([example]).num_targets for example in SEVEN)


def test_a_pack_is_its_examples_one_after_the_other(collator: Collator) -> None:
    batch = collator.pack(SEVEN)
    alone = [collator.pack([example]) for example in SEVEN]
    assert torch.equal(batch.input_ids, torch.cat([one.input_ids for one in alone]))
    assert torch.equal(batch.positions, torch.cat([one.positions for one in alone], dim=1))
    assert torch.equal(batch.pixel_values, torch.cat([one.pixel_values for one in alone]))
    assert torch.equal(batch.image_grids, torch.cat([one.image_grids for one in alone]))
    assert batch.document_ids.tolist() == [n for n, one in enumerate(alone) for _ in range(one.num_tokens)]
    assert batch.example_ids == tuple(example.id for example in SEVEN)


def test_image_rows_hold_the_image_token_and_are_as_many_as_the_merged_patches(collator: Collator) -> None:
    batch = collator.pack(SEVEN)
    image_token = batch.input_ids[batch.image_rows].unique()
    assert len(image_token) == 1
    assert bool((batch.input_ids == image_token).sum() == len(batch.image_rows))
    assert len(batch.image_rows) == int(batch.image_grids.prod(-1).sum()) // 4 == batch.num_patches // 4


def test_moving_a_batch_keeps_everything(collator: Collator) -> None:
    batch = collator.pack(SEVEN)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.pixel_values.device.type == "meta"
    assert (moved.num_tokens, moved.num_patches, moved.example_ids) == (
        batch.num_tokens,
        batch.num_patches,
        batch.example_ids,
    )
