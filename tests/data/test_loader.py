"""The loader gives the plan's packs, whatever the number of workers, and errors as messages."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.examples import SEVEN
from vl_dist.data.collate import Collator
from vl_dist.data.examples import in_memory
from vl_dist.data.groups import group_examples
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import HeaderReader, fit, measure
from vl_dist.data.loader import LoadedData, StepPacks, load_steps
from vl_dist.data.plan import make_plan
from vl_dist.errors import UserError


@pytest.fixture
def data(collator: Collator, photos: Path, shape: PatchShape) -> LoadedData:
    headers = HeaderReader(photos, collator.budget, shape)
    return LoadedData(SEVEN, measure(SEVEN, collator.encoder, headers), collator)


def load(data: LoadedData, **changed: Any) -> list[StepPacks]:
    steps = make_plan(group_examples(data.lengths), 4, seed=1, shuffle=True, num_epochs=2).steps()
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
    plan = make_plan(group_examples(data.lengths), 4, seed=1, shuffle=True, num_epochs=10)
    assert plan.num_steps == 20, "more than a worker builds ahead"
    before = psutil.Process().children()
    packs = load_steps(plan.steps(), data, rank=0, world_size=1, max_tokens=150, num_workers=1)
    next(packs)
    (worker,) = set(psutil.Process().children()) - set(before)
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
def test_an_example_whose_image_went_bad_after_the_start_leaves_its_pack_and_nothing_replaces_it(
    data: LoadedData, photos: Path, num_workers: int, tmp_path: Path, processor: Any, shape: PatchShape
) -> None:
    for photo in photos.iterdir():
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "cat.jpg").write_bytes((photos / "cat.jpg").read_bytes()[:5000])
    encoder, budget = data.collator.encoder, data.collator.budget
    collator = Collator(encoder, processor.image_processor, roots=[tmp_path], budget=budget, shape=shape)
    torn = load(LoadedData(SEVEN, data.lengths, collator), num_workers=num_workers)
    for whole, share in zip(load(data), torn, strict=True):
        had = [name for pack in whole.packs for name in pack.example_ids]
        has = [name for pack in share.packs for name in pack.example_ids]
        assert has == [name for name in had if name != "cat"]
        assert [one.id for one in share.dropped] == ["cat"] * ("cat" in had)
        assert all("image cat.jpg: cannot be decoded" in one.reason for one in share.dropped)
        assert whole.dropped == ()
    assert any(share.dropped for share in torn)


def test_an_example_longer_than_a_pack_is_refused_with_the_keys_to_change(
    collator: Collator, photos: Path, shape: PatchShape, data: LoadedData
) -> None:
    headers = HeaderReader(photos, collator.budget, shape)
    with pytest.raises(UserError) as refused:
        fit(in_memory(SEVEN), data.lengths, collator.encoder, [headers], max_tokens=40, overflow="error")
    for part in ("Example cat has 47 tokens", "a pack holds 40", "batch.max_tokens_per_pack", "data.max_pixels"):
        assert part in str(refused.value)
