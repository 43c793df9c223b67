"""LoRA on a base in bfloat16 reads its inputs as they are, and is still PEFT's LoRA in float32."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import SEVEN, packed_model
from tests.forecast.test_memory import kept_by_autograd
from vl_dist.data.collate import Collator
from vl_dist.model import load
from vl_dist.model.load import attach_lora, load_adapter, load_base
from vl_dist.model.lora_linear import RoundedLinear, round_lora
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
            patch.setattr(load, "round_lora", lambda _model: None)
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


def test_a_base_in_float32_is_left_to_peft(tiny_model: Path) -> None:
    assert rounded(packed_model(tiny_model)) == 0


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
            round_lora(model)
            after = model(input_ids=ids).logits
        assert (rounded(model) == 0) == dora
        assert float((after - before).norm() / (before - base).norm()) < (1e-6 if dora else 0.1)


def test_a_target_on_the_tower_is_rounded_too(tiny_model: Path) -> None:
    settings = LoraSettings(r=2, target_modules=("q_proj", "qkv"))
    assert rounded(attach_lora(load_base(tiny_model, torch.bfloat16, "sdpa"), settings, seed=0)) == 2 * (2 + 2)
