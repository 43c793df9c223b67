"""Fused LoRA is PEFT's LoRA; on a base in bfloat16 it reads its inputs as they are, and its weights stay in float32."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import SEVEN, assert_close, gradients, packed_model
from tests.forecast.test_memory import kept_by_autograd
from vl_dist.data.collate import Collator
from vl_dist.model import lora
from vl_dist.model.dropout import SparseDropout
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora, load_adapter
from vl_dist.model.lora_linear import RoundedLinear, fuse_lora
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import LoraSettings


def rounded(model: torch.nn.Module) -> int:
    return sum(isinstance(module, RoundedLinear) for module in model.modules())


def test_no_input_of_a_lora_becomes_float32(tiny_model: Path, collator: Collator) -> None:
    widths: Counter[int] = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            if "_to_copy" in str(func) and made.dtype == torch.float32 and args[0].dtype == torch.bfloat16:
                widths[made.shape[-1]] += 1
            return made

    model = packed_model(tiny_model, dtype=torch.bfloat16, dropout=0.05)
    assert rounded(model) == 2 * 7 * 2
    with Casts():
        hidden = model.hidden_states(collator.pack(SEVEN))
    assert hidden.dtype == torch.bfloat16
    assert widths[64] == 2 * 2 + 1, "norms alone compute in float32"
    assert widths[96] == 0, "down_proj's inputs are as wide as the MLP"


def test_a_pack_keeps_a_quarter_less_than_with_pefts_casts(
    tiny_model: Path, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = collator.pack(SEVEN)
    for dropout in (0.0, 0.05):
        with monkeypatch.context() as patch:
            ours = kept_by_autograd(packed_model(tiny_model, dtype=torch.bfloat16, dropout=dropout), pack)
            patch.setattr(lora, "fuse_lora", lambda _model: None)
            theirs = kept_by_autograd(packed_model(tiny_model, dtype=torch.bfloat16, dropout=dropout), pack)
        assert ours < 0.75 * theirs


def test_weights_gradients_and_files_are_float32_under_pefts_names(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model = packed_model(tiny_model, dtype=torch.bfloat16)
    model(collator.pack(SEVEN)).backward()
    assert {p.dtype for p in model.lora_parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in model.lora_parameters.values() if p.grad is not None} == {torch.float32}
    assert model.state_dict().keys() == packed_model(tiny_model).state_dict().keys()
    save_adapter(model.peft_model, tmp_path)
    loaded = load_adapter(load_base(tiny_model, torch.bfloat16, "sdpa"), tmp_path)
    assert rounded(loaded) == 2 * 7 * 2
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.peft_model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_in_float32_is_pefts_in_outputs_and_gradients(tiny_model: Path, collator: Collator, rslora: bool) -> None:
    settings = LoraSettings(r=4, alpha=8, dropout=0.0, rslora=rslora)
    pack, found = collator.pack(SEVEN), []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(lora, "fuse_lora", lambda _model: None)
            model = packed_model(tiny_model, lora=settings)
        assert rounded(model) == (2 * 7 * 2 if fused else 0)
        loss = model(pack)
        loss.backward()
        found.append({"loss": loss.detach()} | gradients(model))
    assert_close(*found)


def test_merging_and_switching_off_are_pefts(tiny_model: Path) -> None:
    model = packed_model(tiny_model).peft_model.eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    expected = load_base(tiny_model, torch.float32, "sdpa")(input_ids=ids).logits
    torch.testing.assert_close(base, expected)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert float((merged - base).abs().max()) > 0.1


def test_dropout_is_that_of_the_adapter_and_off_in_evaluation(tiny_model: Path, collator: Collator) -> None:
    model, pack = packed_model(tiny_model, dropout=0.3), collator.pack(SEVEN)
    dropped = [module for module in model.modules() if isinstance(module, SparseDropout)]
    assert len(dropped) == 2 * 7 and {module.p for module in dropped} == {0.3}
    with torch.no_grad():
        assert not torch.equal(model(pack), model(pack))
        model.eval()
        assert torch.equal(model(pack), model(pack))


def test_rank_stabilised_scaling_is_kept_and_dora_is_left_to_peft(tiny_model: Path) -> None:
    ids = torch.arange(20)[None]
    for dora in (False, True):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True, use_dora=dora)
        torch.manual_seed(0)
        model = get_peft_model(load_base(tiny_model, torch.bfloat16, "sdpa"), config).eval()
        assert isinstance(model, PeftModel)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
            before = model(input_ids=ids).logits
            with model.disable_adapter():
                base = model(input_ids=ids).logits
            fuse_lora(model)
            after = model(input_ids=ids).logits
        assert (rounded(model) == 0) == dora
        assert float((after - before).norm() / (before - base).norm()) < (1e-6 if dora else 0.1)


def test_a_target_on_the_tower_is_rounded_too(tiny_model: Path) -> None:
    settings = LoraSettings(r=2, target_modules=("q_proj", "qkv"), tower=True)
    assert rounded(attach_lora(load_base(tiny_model, torch.bfloat16, "sdpa"), settings, seed=0)) == 2 * (2 + 2)


def test_the_update_is_written_into_what_the_base_gave_and_into_nothing_that_others_see() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = RoundedLinear(3, 5, bias=False)
    inputs = torch.randn(2, 4, 3, generator=generator, requires_grad=True)
    onto = torch.randn(2, 4, 5, generator=generator, requires_grad=True)
    wanted = onto + 0.5 * torch.nn.functional.linear(inputs, layer.weight)
    weights = torch.randn(2, 4, 5, generator=generator)
    expected = torch.autograd.grad((wanted * weights).sum(), [onto, inputs, layer.weight])
    given, viewed = onto * 1.0, (onto * 1.0).view(8, 5).view(2, 4, 5)
    for made, in_place in ((given, True), (viewed, False)):
        before = made.detach().clone()
        found = layer(inputs, onto=made, scale=0.5)
        torch.testing.assert_close(found, wanted)
        assert (found.data_ptr() == made.data_ptr()) == in_place
        assert in_place or torch.equal(made, before), "ZeRO-3 still holds what a view is a view of"
        for one, other in zip(
            torch.autograd.grad((found * weights).sum(), [onto, inputs, layer.weight]), expected, strict=True
        ):
            torch.testing.assert_close(one, other)
