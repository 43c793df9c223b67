"""What the steps of a plan look like, from lengths alone: tokens, padding, how even the ranks' work is, operations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.assign import Pack, assign, pack_lengths, padded_length
from vl_dist.data.groups import group_costs
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Plan, Step
from vl_dist.forecast.memory import PackSize
from vl_dist.model.flops import FlopCounter

NUM_MEASURED = 400  # steps of the first epoch, evenly spaced; fewer are all measured


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Means over the measured steps, unless said otherwise."""

    num_measured: int
    tokens: float  # of all packs, without padding
    targets: float
    images: float
    packs_per_rank: float
    fillers: float  # packs without an example
    padding: float  # pad tokens over all tokens
    fill: float  # tokens over what the packs could hold
    skew: float  # largest over mean cost of a rank
    worst_skew: float
    flops: float  # useful operations
    tower_flops: float  # of them, those that make features of images
    largest: PackSize  # the most that any measured pack has of each


def measure_steps(
    plan: Plan,
    lengths: Lengths,
    flops: FlopCounter,
    *,
    world_size: int,
    max_tokens: int,
    num_pack_lengths: int | None,
    num_measured: int = NUM_MEASURED,
) -> StepFigures:
    """Assigns steps of the first epoch to ranks, as training would, and adds up what they hold."""
    steps = plan.epoch(0)[: plan.num_steps]
    chosen = [steps[n] for n in np.linspace(0, len(steps) - 1, min(num_measured, len(steps))).astype(int)]
    allowed = pack_lengths(max_tokens, num_pack_lengths) if num_pack_lengths is not None else None
    rows = [_measure(step, lengths, flops, world_size, max_tokens, allowed) for step in chosen]
    means = np.array([row[:-1] for row in rows], dtype=np.float64).mean(axis=0)
    tokens, targets, images, packs, fillers, padded, skew, operations, tower = means.tolist()
    largest = np.array([row[-1] for row in rows]).max(axis=0)
    return StepFigures(
        num_measured=len(chosen),
        tokens=tokens,
        targets=targets,
        images=images,
        packs_per_rank=packs / world_size,
        fillers=fillers,
        padding=1 - tokens / padded,
        fill=tokens / (packs * max_tokens),
        skew=skew,
        worst_skew=max(row[6] for row in rows),
        flops=operations + tower,
        tower_flops=tower,
        largest=PackSize(tokens=int(largest[0]), targets=int(largest[1]), patches=int(largest[2])),
    )


def _measure(
    step: Step, lengths: Lengths, flops: FlopCounter, world_size: int, max_tokens: int, allowed: Sequence[int] | None
) -> tuple[float, float, float, float, float, float, float, float, float, tuple[int, int, int]]:
    """Tokens, targets, images, packs, fillers, padded tokens, skew, operations, the tower's; and the largest pack."""
    assignment = assign(step, lengths, world_size=world_size, max_tokens=max_tokens)
    packs = [pack for rank in assignment.packs for pack in rank]
    padded = [max(1, pack.num_tokens if allowed is None else padded_length(pack.num_tokens, allowed)) for pack in packs]
    costs = [sum(_cost(pack, lengths) for pack in rank) for rank in assignment.packs]
    targets = [int(lengths.targets[list(pack.examples)].sum()) for pack in packs]
    patches = [int(lengths.patches[_firsts(pack)].sum()) for pack in packs]
    return (
        sum(pack.num_tokens for pack in packs),
        sum(targets),
        sum(int(lengths.images[_firsts(pack)].sum()) for pack in packs),
        len(packs),
        sum(not pack.documents for pack in packs),
        sum(padded),
        max(costs) / (sum(costs) / len(costs)),
        sum(_flops(pack, lengths, flops) for pack in packs),
        sum(_tower_flops(pack, lengths, flops) for pack in packs),
        (max(padded), max(targets), max(patches)),
    )


def _firsts(pack: Pack) -> list[int]:
    """One example of each document, for what its examples share."""
    return [document[0] for document in pack.documents]


def _cost(pack: Pack, lengths: Lengths) -> float:
    if not pack.documents:
        return 0.0
    starts = np.cumsum([0, *(len(document) for document in pack.documents)])
    return float(group_costs(lengths, np.array(pack.examples), starts).sum())


def _flops(pack: Pack, lengths: Lengths, flops: FlopCounter) -> float:
    total = 0.0
    for document in pack.documents:
        members = list(document)
        trunk = int(lengths.trunk[members[0]])
        total += flops.document(trunk, (lengths.tokens[members] - trunk).tolist())
        total += flops.targets_head(int(lengths.targets[members].sum()))
    return total


def _tower_flops(pack: Pack, lengths: Lengths, flops: FlopCounter) -> float:
    """Several images of one example count as one of their patches together, for the grids of each are not kept."""
    return sum(flops.image(int(lengths.patches[n])) for n in _firsts(pack) if lengths.patches[n])


def histogram(values: NDArray[np.int64], num_bins: int) -> list[tuple[int, int, int]]:
    """Counts of values in bins of a round width, from the lowest value's on: from, to (both included), how many."""
    low, high = int(values.min()), int(values.max())
    width = _round_up(max(1, -(-(high - low + 1) // num_bins)))
    first = low // width
    counts = np.bincount(values // width - first)
    return [((first + n) * width, (first + n + 1) * width - 1, int(count)) for n, count in enumerate(counts)]


def _round_up(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = int(10 ** (len(str(width)) - 1))
    return next(rounded for rounded in (power, 2 * power, 5 * power, 10 * power) if rounded >= width)
