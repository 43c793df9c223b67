"""Operations counted from shapes agree with figures worked out elsewhere for the 2B."""

from pathlib import Path

import pytest

from benchmarks.real_shape import config_2b
from vl_dist.model.flops import FlopCounter, known_peak_flops, read_shape
from vl_dist.model.targets import lora_size
from vl_dist.settings import LoraSettings


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> FlopCounter:
    directory: Path = tmp_path_factory.mktemp("2b")
    config_2b().save_pretrained(directory)
    shape = read_shape(directory)
    return FlopCounter(shape, lora_size(shape, LoraSettings(r=64)))


def test_a_token_of_the_2b_with_the_tutorials_lora_costs_5_68_gflop(counter: FlopCounter) -> None:
    assert counter.per_token == pytest.approx(5.68e9, rel=0.002)


def test_a_caption_of_the_tutorial_costs_the_known_floor(counter: FlopCounter) -> None:
    language = counter.document(0, [130]) + counter.targets_head(15)
    assert language == pytest.approx(758e9, rel=0.01)
    assert language + counter.image(400) == pytest.approx(1296e9, rel=0.01)


def test_sharing_a_prompt_among_five_captions_costs_the_known_floor(counter: FlopCounter) -> None:
    shared = counter.document(114, [16] * 5) + counter.targets_head(5 * 15)
    assert shared / 5 == pytest.approx(232e9, rel=0.02)  # which leaves out that each branch repeats a token
    assert counter.document(100, [30]) == pytest.approx(counter.document(0, [130]), rel=1e-12)


def test_lora_on_fewer_layers_costs_less_and_a_larger_rank_more(counter: FlopCounter) -> None:
    fewer = FlopCounter(counter.shape, lora_size(counter.shape, LoraSettings(r=64, target_modules=("q_proj",))))
    larger = FlopCounter(counter.shape, lora_size(counter.shape, LoraSettings(r=128)))
    assert fewer.per_token < counter.per_token < larger.per_token


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_known_device_has_its_peak_and_an_unknown_one_none(name: str, expected: float | None) -> None:
    assert known_peak_flops(name) == expected
