"""Dropout by places is dropout: the same distribution, gradient and modes."""

from __future__ import annotations

import math

import pytest
import torch

from vl_dist.model.dropout import SparseDropout, dropped_places


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("num_values", [1, 2, 50, 200_000])
def test_each_value_is_dropped_with_its_probability_and_neighbours_are_independent(num_values: int, p: float) -> None:
    torch.manual_seed(0)
    rounds = max(1, 10_000 // num_values)
    kept = torch.ones(rounds, num_values + 1)
    for row in kept:
        row[dropped_places(num_values, p)] = 0.0
    dropped = 1.0 - kept[:, :num_values]
    deviation = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(float(dropped.mean()) - p) < 5 * deviation
    for place in (0, num_values - 1):  # neither the first nor the last is special
        assert rounds < 200 or abs(float(dropped[:, place].mean()) - p) < 5 * math.sqrt(p * (1 - p) / rounds)
    if num_values > 1:
        both = float((dropped[:, 1:] * dropped[:, :-1]).mean())
        assert abs(both - p * p) < 12 * deviation


@pytest.mark.parametrize("p", [0.001, 0.05, 0.99])
def test_enough_places_are_drawn_for_the_last_value_to_have_its_chance(p: float) -> None:
    torch.manual_seed(1)
    for num_values in (1, 7, 1_000, 100_000):
        for _ in range(20):
            assert int(dropped_places(num_values, p)[-1]) == num_values


def test_values_and_gradients_are_those_of_a_mask() -> None:
    torch.manual_seed(2)
    values = torch.randn(3, 40, 50).transpose(1, 2).requires_grad_(True)  # not contiguous
    dropout = SparseDropout(0.3)
    result = dropout(values)
    mask = (result != 0).float() / 0.7
    torch.testing.assert_close(result, values * mask)
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, mask * weights)
    assert 0.2 < float((mask == 0).float().mean()) < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_shape_stay_and_evaluation_changes_nothing(dtype: torch.dtype) -> None:
    values = torch.randn(5, 6, dtype=dtype)
    dropout = SparseDropout(0.5)
    assert (dropout(values).dtype, dropout(values).shape) == (dtype, values.shape)
    assert torch.equal(dropout.eval()(values), values)
    assert torch.equal(SparseDropout(0.0)(values), values)
    assert torch.equal(SparseDropout(1.0)(values), torch.zeros_like(values))
    assert len(SparseDropout(0.5)(values[:0])) == 0


def test_the_same_seed_drops_the_same_places() -> None:
    values, dropout = torch.ones(1000), SparseDropout(0.1)
    torch.manual_seed(3)
    first = dropout(values)
    assert not torch.equal(dropout(values), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(values), first)
