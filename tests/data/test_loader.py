"""The loader gives the plan's packs, whatever the number of workers, and errors as messages."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.examples import SEVEN
from vl_dist.data.collate import Collator
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData, StepPacks, load_steps
from vl_dist.data.plan import plan_run
from vl_dist.data.records import Example, ImagePart, Message
from vl_dist.errors import UserError


@pytest.fixture
def data(collator: Collator, photos: Path, shape: PatchShape) -> LoadedData:
    headers = HeaderReader(photos, collator.budget, shape)
    return LoadedData(SEVEN, measure(SEVEN, collator.encoder, headers, max_tokens=150), collator)


def load(data: LoadedData, **changed: Any) -> list[StepPacks]:
    steps = plan_run(np.ones(7), 4, seed=1, shuffle=True, num_steps=4)
    return list(load_steps(steps, data, **({"rank": 0, "world_size": 1, "max_tokens": 150} | changed)))


def test_lengths_from_headers_are_the_lengths_of_the_decoded_batch(data: LoadedData, collator: Collator) -> None:
    for n, example in enumerate(SEVEN):
        batch = collator.pack([example])
        expected = (batch.num_tokens, batch.num_targets, batch.num_patches, batch.num_images)
        lengths = data.lengths
        assert (lengths.tokens[n], lengths.targets[n], lengths.patches[n], lengths.images[n]) == expected


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_packs(data: LoadedData, num_workers: int) -> None:
    for here, there in zip(load(data), load(data, num_workers=num_workers), strict=True):
        assert here.step.number == there.step.number
        for one, other in zip(here.packs, there.packs, strict=True):
            assert one.example_ids == other.example_ids
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.pixel_values, other.pixel_values)


def test_a_request_to_stop_that_goes_to_every_process_leaves_the_workers_at_work(data: LoadedData) -> None:
    steps = plan_run(np.ones(7), 4, seed=1, shuffle=True, num_steps=20)  # more than a worker builds ahead
    packs = load_steps(steps, data, rank=0, world_size=1, max_tokens=150, num_workers=1)
    next(packs)
    (worker,) = psutil.Process().children()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        worker.send_signal(number)
    assert len(list(packs)) == 19


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_train_each_example_of_a_step_once_in_equally_many_packs(data: LoadedData, world_size: int) -> None:
    by_rank = [load(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    for shares in zip(*by_rank, strict=True):
        assert len({len(share.packs) for share in shares}) == 1
        ids = [name for share in shares for pack in share.packs for name in pack.example_ids]
        assert sorted(ids) == sorted(SEVEN[n].id for n in shares[0].step.examples)
        assert all(pack.num_tokens <= 150 for share in shares for pack in share.packs)


def test_padded_packs_have_few_lengths_and_the_same_examples(data: LoadedData) -> None:
    plain, padded = load(data, world_size=2), load(data, world_size=2, num_pack_lengths=3)
    assert {pack.num_tokens for share in padded for pack in share.packs} <= {50, 100, 150}
    for one, other in zip(plain, padded, strict=True):
        assert [pack.example_ids for pack in one.packs] == [pack.example_ids for pack in other.packs]


def test_loading_draws_nothing_from_the_random_state_that_dropout_uses(data: LoadedData) -> None:
    before = torch.random.get_rng_state()
    load(data, num_workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_went_bad_after_the_start_is_named(
    data: LoadedData, photos: Path, num_workers: int, tmp_path: Path, processor: Any, shape: PatchShape
) -> None:
    (tmp_path / "cat.jpg").write_bytes((photos / "cat.jpg").read_bytes()[:5000])
    example = Example("torn", (Message("user", (ImagePart("cat.jpg"),)),), "A cat.")
    collator = Collator(
        data.collator.encoder, processor.image_processor, root=tmp_path, budget=data.collator.budget, shape=shape
    )
    torn = LoadedData([example] * 7, data.lengths, collator)
    with pytest.raises(UserError, match=r"Example torn: image cat\.jpg: cannot be decoded"):
        load(torn, num_workers=num_workers)


def test_an_example_longer_than_a_pack_is_refused_with_the_keys_to_change(
    collator: Collator, photos: Path, shape: PatchShape
) -> None:
    headers = HeaderReader(photos, collator.budget, shape)
    with pytest.raises(UserError) as refused:
        measure(SEVEN, collator.encoder, headers, max_tokens=40)
    for part in ("Example cat has 47 tokens", "a pack holds 40", "batch.max_tokens_per_pack", "data.max_pixels"):
        assert part in str(refused.value)
