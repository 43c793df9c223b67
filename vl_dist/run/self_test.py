"""Before the first step: does a pack compute, on the user's model and device, what its examples compute alone?

A kernel that lets documents see each other still trains, to a worse adapter, and no curve shows it. So a pack of a few
training documents is compared with its examples one by one, in loss and in LoRA's gradient, and then one document after the
other is disturbed, which may move no other document's hidden states. It runs before the model is wrapped, without dropout,
and changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vl_dist.data.collate import Batch
from vl_dist.data.groups import group_examples
from vl_dist.data.loader import LoadedData
from vl_dist.data.records import Example
from vl_dist.errors import UserError
from vl_dist.model.packed import PackedModel, out_of_memory_named

NUM_DOCUMENTS = 3
NUM_BRANCHES = 3
NUM_LOOKED_AT = 1000  # groups among which small ones are looked for


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far numbers of one precision may be apart, relative to the larger."""

    loss: float
    gradient: float  # of all LoRA gradients as one vector
    leak: float  # of hidden states; the same kernel on the same shapes mostly moves them by nothing


TOLERANCES = {
    torch.float32: Tolerance(loss=1e-4, gradient=1e-3, leak=1e-5),
    torch.bfloat16: Tolerance(loss=1e-2, gradient=1e-1, leak=1e-3),
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What the self-test measured, all relative."""

    loss: float  # of the pack against its examples alone
    gradient: float
    leak: float  # what a disturbed document, or branch, moved in those that may not see it
    num_documents: int
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"Self-test: a pack of {self.num_documents} documents ({self.num_tokens} tokens) differs from its examples "
            f"alone by {self.loss:.0e} in loss and {self.gradient:.0e} in gradient; a disturbed document moves others by "
            f"{self.leak:.0e}."
        )


def self_test(model: PackedModel, data: LoadedData, device: torch.device) -> Findings:
    """Compares a pack with its examples, and disturbs its documents.

    Args:
        model: on its device, not wrapped.
        data: what will be trained on.

    Raises:
        UserError: documents see each other, or a pack is something else than its examples; with the figures.
    """
    documents = small_documents(data)
    pack = data.collator.pack_documents(documents)
    alone = [data.collator.pack([example]) for document in documents for example in document]
    was_training = model.training
    model.eval()  # no dropout
    try:
        with out_of_memory_named(pack):
            loss, gradient = loss_and_gradient(model, [pack.to(device)])
            wanted_loss, wanted_gradient = loss_and_gradient(model, [one.to(device) for one in alone])
            leak = largest_leak(model, pack.to(device))
    finally:
        model.train(was_training)
    found = Findings(
        loss=abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-30),
        gradient=float((gradient - wanted_gradient).norm() / wanted_gradient.norm().clamp(min=1e-30)),
        leak=leak,
        num_documents=len(pack.documents),
        num_tokens=pack.num_tokens,
    )
    _refuse(found, TOLERANCES[model.base_dtype])
    return found


def _refuse(found: Findings, allowed: Tolerance) -> None:
    # Written so that figures that are not numbers are refused too.
    if found.leak <= allowed.leak and found.loss <= allowed.loss and found.gradient <= allowed.gradient:
        return
    raise UserError(
        f"{found} Allowed are {allowed.loss:.0e}, {allowed.gradient:.0e} and {allowed.leak:.0e}: this attention kernel "
        "does not keep documents apart on this device, and would train another model. Set model.attention=sdpa or eager, "
        "and report the versions of torch and transformers; run.self_test=false trains nevertheless."
    )


def small_documents(data: LoadedData) -> list[list[Example]]:
    """A few documents that are quickly computed: those with least cost that have images, and one without if there is one.

    Where there are too few, the first comes again: a pack needs neighbours.
    """
    groups = group_examples(data.lengths)
    costs = groups.costs[:NUM_LOOKED_AT]
    has_image = data.lengths.patches[groups.members[groups.starts[:-1]]][:NUM_LOOKED_AT] > 0
    order = np.argsort(costs, kind="stable")
    with_image, without = order[has_image[order]], order[~has_image[order]]
    chosen = [*without[:1], *with_image, *without[1:]][:NUM_DOCUMENTS]
    chosen += [chosen[0]] * (NUM_DOCUMENTS - len(chosen))
    members = [groups.members[groups.starts[n] : groups.starts[n + 1]][:NUM_BRANCHES] for n in chosen]
    return [[data.examples[int(n)] for n in group] for group in members]


def loss_and_gradient(model: PackedModel, packs: Sequence[Batch]) -> tuple[float, torch.Tensor]:
    """Summed over packs; the gradient as one vector, and the parameters' own are not touched."""
    parameters = list(model.lora_parameters.values())
    total, vector = 0.0, torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for pack in packs:
        loss = model(pack)
        total += float(loss.detach())
        if loss.requires_grad:  # a text alone does not, where only the tower or the merger trains
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            vector += torch.cat([gradient.flatten().float() for gradient in gradients])
    return total, vector


def largest_leak(model: PackedModel, pack: Batch) -> float:
    """How far a disturbed document or branch moves rows that may not see it, relative to the largest hidden state."""
    with torch.no_grad():
        before = model.hidden_states(pack).float()
        moved = [torch.zeros((), device=before.device)]
        for disturbed, blind in _disturbances(pack):
            ids = (pack.input_ids + 7) % 100  # any other tokens; image tokens are replaced by features anyway
            changed = replace(pack, input_ids=torch.where(disturbed, ids, pack.input_ids))
            difference = (model.hidden_states(changed).float() - before).abs().amax(dim=-1)
            moved.append(difference.masked_fill(~blind, 0.0).max())
        return float(torch.stack(moved).max() / before.abs().max())


def _disturbances(pack: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """[T] rows to change, and [T] rows that may not notice: each document, and the first branch of each."""
    for n, document in enumerate(pack.documents):
        inside = pack.document_ids == n
        yield inside, ~inside
        if len(document.branches) > 1:
            branch = inside & (pack.branch_ids == 1)
            yield branch, ~branch
