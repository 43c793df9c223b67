"""The last layer computes target rows alone, with the numbers of the whole layer, and no other layer does."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.examples import SEVEN, assert_close, gradients, packed_model
from vl_dist.data.collate import Batch, Collator
from vl_dist.model import packed
from vl_dist.model.packed import PackedModel


def loss_and_gradients(model: PackedModel, pack: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    loss = model(pack)
    loss.backward()
    return float(loss.detach()), gradients(model)


def rows_of_mlps(model: PackedModel) -> dict[int, list[int]]:
    """Rows that each decoder layer's MLP gets from now on."""
    found: dict[int, list[int]] = defaultdict(list)
    for n, layer in enumerate(model.peft_model.get_base_model().model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda _mlp, inputs, n=n: found[n].append(inputs[0].shape[1]))
    return found


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_loss_and_gradients_are_those_of_whole_layers(
    tiny_model: Path, collator: Collator, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = collator.pack(SEVEN)
    found = loss_and_gradients(packed_model(tiny_model, recompute=recompute), pack)
    monkeypatch.setattr(packed, "shorten_last_layer", lambda _base: None)
    whole = packed_model(tiny_model, recompute=recompute)
    rows = rows_of_mlps(whole)
    of_all_rows = whole.hidden_states

    def chosen_afterwards(batch: Batch, chosen: torch.Tensor | None = None) -> torch.Tensor:
        hidden = of_all_rows(batch)
        return hidden if chosen is None else hidden.index_select(0, chosen)

    monkeypatch.setattr(whole, "hidden_states", chosen_afterwards)
    loss, wanted = loss_and_gradients(whole, pack)
    assert set(rows[1]) == {pack.num_tokens}, "the reference computes all rows"
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert_close(found[1], wanted)


def test_its_mlp_sees_target_rows_only_and_all_rows_where_all_are_asked_for(tiny_model: Path, collator: Collator) -> None:
    model, pack = packed_model(tiny_model), collator.pack(SEVEN, length=512)
    rows = rows_of_mlps(model)
    model(pack)
    assert rows == {0: [512], 1: [pack.num_targets]}
    assert 0 < pack.num_targets < 512
    everything = model.hidden_states(pack)
    assert rows[1][1:] == [512]
    torch.testing.assert_close(model.hidden_states(pack, pack.target_rows), everything[pack.target_rows])
