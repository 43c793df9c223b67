"""SwiGLU with its activation computed twice: the same numbers, and one tensor less kept."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.examples import SEVEN, gradients, packed_model
from tests.forecast.test_memory import kept_by_autograd
from vl_dist.data.collate import Collator
from vl_dist.model import packed
from vl_dist.model.gated import SwiGlu


def test_its_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(SwiGlu.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_transformers_own_to_the_bit(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(SwiGlu.apply(gate, up), functional.silu(gate) * up)


def test_a_pack_keeps_one_tensor_of_the_mlps_width_less_a_layer(
    tiny_model: Path, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = collator.pack(SEVEN)
    width = packed_model(tiny_model).peft_model.get_base_model().config.text_config.intermediate_size
    found = []
    for keep_less in (True, False):
        if not keep_less:
            monkeypatch.setattr(packed, "keep_less_in_mlps", lambda _base: None)
        model = packed_model(tiny_model)
        kept = kept_by_autograd(model, pack)
        loss = model(pack)
        loss.backward()
        found.append((float(loss.detach()), gradients(model), kept))
    (loss, ours, kept), (theirs_loss, theirs, theirs_kept) = found
    assert theirs_kept - kept == (pack.num_tokens + pack.num_targets) * width * 4
    assert loss == theirs_loss
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)
