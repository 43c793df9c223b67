"""Every way to attend is the rule of who sees whom, and none makes a mask of a whole pack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import SEVEN, packed_model
from tests.model.test_shared_prefix import GROUPS
from vl_dist.data.collate import Batch, Collator
from vl_dist.errors import UserError
from vl_dist.model.attention import by_document, resolve_backend, sees
from vl_dist.model.flex import visible
from vl_dist.model.varlen import varlen_options


def packs(collator: Collator) -> list[Batch]:
    return [
        collator.pack([*SEVEN, SEVEN[0], SEVEN[1]], length=512),
        collator.pack_documents([*GROUPS, GROUPS[0]], length=700),
        collator.pack([SEVEN[0], SEVEN[0]]),
        collator.pack([]),
    ]


def heads(num_rows: int, num_heads: int) -> torch.Tensor:
    return torch.randn(1, num_rows, num_heads, 16).transpose(1, 2).detach().requires_grad_()


def test_attention_by_document_is_dense_attention_under_the_rule(collator: Collator) -> None:
    torch.manual_seed(0)
    for pack in packs(collator):
        rows = [heads(pack.num_tokens, num) for num in (4, 2, 2)]
        wanted = functional.scaled_dot_product_attention(
            *rows, attn_mask=sees(pack.document_ids, pack.branch_ids), scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        found = by_document(pack)(*rows, 0.3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(wanted)
        for own, expected in zip(
            torch.autograd.grad((found * weights).sum(), rows),
            torch.autograd.grad((wanted * weights).sum(), rows),
            strict=True,
        ):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_the_rule_that_flex_attention_compiles_is_the_same(collator: Collator) -> None:
    for pack in packs(collator):
        rule, length = visible(pack.document_ids, pack.branch_ids), pack.num_tokens
        dense = create_mask(rule, None, None, length, length, device="cpu")[0, 0]
        assert torch.equal(dense, sees(pack.document_ids, pack.branch_ids))


def test_sequences_for_varlen_are_the_documents_with_padding_and_the_images(collator: Collator) -> None:
    pack = packs(collator)[0]
    sizes = torch.bincount(pack.document_ids)
    assert torch.equal(pack.document_ends.diff().long(), sizes)
    assert pack.longest_document == int(sizes.max())
    assert pack.image_ends.diff().tolist() == list(pack.image_patches)
    assert (pack.document_ends.dtype, pack.image_ends.dtype) == (torch.int32, torch.int32)


def test_varlen_is_told_of_causality_as_each_version_of_torch_wants_it() -> None:
    def of_2_11(query: Any, *, is_causal: bool = False, scale: float | None = None) -> None: ...
    def of_2_14(query: Any, *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> None: ...

    assert varlen_options(of_2_11, causal=True) == {"is_causal": True}
    assert varlen_options(of_2_14, causal=True) == {"enable_gqa": True, "window_size": (-1, 0)}
    assert varlen_options(of_2_14, causal=False) == {"enable_gqa": True, "window_size": (-1, -1)}


@pytest.mark.parametrize("documents", [SEVEN * 8, GROUPS * 4], ids=["alone", "shared"])
def test_no_tensor_of_a_long_pack_grows_with_its_square(tiny_model: Path, collator: Collator, documents: list[Any]) -> None:
    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            found = made if isinstance(made, tuple | list) else [made]
            largest[0] = max([largest[0], *(one.numel() for one in found if isinstance(one, torch.Tensor))])
            return made

    model = packed_model(tiny_model)
    pack = collator.pack_documents([one if isinstance(one, list) else [one] for one in documents])
    with Sizes():
        model.hidden_states(pack).sum().backward()
    widest = 4 * 96  # numbers of one token that a layer holds at most, and room for the keys of branches
    assert largest[0] < 2 * widest * pack.num_tokens < pack.num_tokens**2


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "branches", "expected"),
    [
        ("auto", "cpu", torch.float32, True, "sdpa"),
        ("auto", "cuda", torch.bfloat16, False, "varlen"),
        ("auto", "cuda", torch.bfloat16, True, "flex"),
        ("auto", "cuda", torch.float32, False, "flex"),
        ("eager", "cpu", torch.float32, True, "eager"),
        ("sdpa", "cuda", torch.bfloat16, True, "sdpa"),
    ],
)
def test_auto_is_the_kernel_that_can_do_what_the_run_needs(
    setting: Any, device: str, dtype: torch.dtype, branches: bool, expected: str
) -> None:
    assert resolve_backend(setting, device, dtype, branches=branches) == expected


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "branches", "reason"),
    [
        ("varlen", "cpu", torch.bfloat16, False, "CUDA only"),
        ("varlen", "cuda", torch.float32, False, "takes bfloat16, and model.dtype is float32"),
        ("varlen", "cuda", torch.bfloat16, True, "data.share_prefix"),
        ("flex", "cpu", torch.float32, True, "no backward on a CPU"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(
    setting: Any, device: str, dtype: torch.dtype, branches: bool, reason: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.attention={setting} .*{reason}.*model\.attention=auto"):
        resolve_backend(setting, device, dtype, branches=branches)
