"""Three steps over seven ragged examples are the same on one rank or two, in one pack or three, under DDP and ZeRO 1, 2, 3."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.stepping import CLIPPINGS, Case, all_cases, cases, reference
from tests.examples import assert_close, cached_collator, packed_model
from tests.processes import run_ranks
from vl_dist.data.collate import Collator

EXACT = [case for case in cases() if case.dtype == torch.float32]
ROUNDED = [case for case in cases() if case.dtype == torch.bfloat16]


@pytest.fixture(scope="module")
def found(tiny_model: Path, photo_collator: Collator, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What each case gave, by number of ranks."""
    home = tmp_path_factory.mktemp("parity")
    cached = cached_collator(photo_collator, packed_model(tiny_model), ("rocket.jpg", "cat.jpg", "flower.jpg"), home)
    for world_size in (1, 2):
        out = home / str(world_size)
        out.mkdir()
        log = home / f"{world_size}.log"
        arguments = (str(tiny_model), photo_collator, cached, str(out))
        codes = run_ranks(all_cases, *arguments, world_size=world_size, log=log, config_file="zero1.yaml")
        assert codes == [0] * world_size, log.read_text()[-3000:]
    return {world_size: home / str(world_size) for world_size in (1, 2)}


@pytest.fixture(scope="module")
def expected(tiny_model: Path, photo_collator: Collator) -> dict[float | None, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    return {clipping: reference(tiny_model, photo_collator, clipping) for clipping in CLIPPINGS}


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert chosen
    return chosen


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_weights_and_moments_are_those_of_one_process_and_one_batch(
    found: dict[int, Path], expected: dict[float | None, dict[str, torch.Tensor]], case: Case, world_size: int
) -> None:
    tensors, wanted = load_file(found[world_size] / f"{case.name}.safetensors"), expected[case.clipping]
    assert tensors.keys() == wanted.keys()
    assert_close(part(tensors, "gradient.0."), part(wanted, "gradient.0."))  # before clipping
    for kind in ("gradient.1.", "gradient.2.", "weight.", "moment."):
        assert_close(part(tensors, kind), part(wanted, kind))
    assert_close(part(tensors, "loss"), part(wanted, "loss"))
    assert_close(part(tensors, "norm"), part(wanted, "norm"))
    assert torch.equal(tensors["rate"], wanted["rate"])
    if case.clipping is not None:
        assert (tensors["norm"] > case.clipping).all(), "nothing was clipped: the test is too easy"


@pytest.mark.parametrize("case", [case for case in ROUNDED if case.engine != "plain"], ids=lambda case: case.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_with_a_base_in_bfloat16_zero_trains_what_data_parallel_does(
    found: dict[int, Path], case: Case, world_size: int
) -> None:
    """Stage 3 has a linear layer of its own, which rounds in another place; a base that became float32 is further off."""
    tensors = load_file(found[world_size] / f"{case.name}.safetensors")
    plain = load_file(found[world_size] / f"{case.name.replace(case.engine, 'plain')}.safetensors")
    exact = load_file(found[world_size] / f"{case.name.replace(case.engine, 'plain').removesuffix('-bf16')}.safetensors")
    assert {tensor.dtype for tensor in part(tensors, "weight.").values()} == {torch.float32}
    first, wanted, unrounded = (float(one["loss"][0]) for one in (tensors, plain, exact))
    assert abs(first / wanted - 1) < 1e-5 < 1e-4 < abs(first / unrounded - 1)
    for kind in ("gradient.0.", "weight."):
        assert_close(part(tensors, kind), part(plain, kind), tolerance=2e-2)
