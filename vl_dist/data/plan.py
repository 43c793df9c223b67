"""The plan: which examples make which step, and who computes them. Pure functions of numbers; no torch here.

The steps of an epoch follow from (seed, epoch, lengths) alone, so any number of ranks trains the same steps and resuming is
seeking. `assign` then cuts one step into packs, the same number on every rank, with even work.

Legend: N examples of an epoch.
"""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.lengths import Lengths

# Costs of one step's parts relative to one language-model token's matmuls, from the 2B's shapes: attention grows with the
# square of a document's length, the frozen tower runs forward only over four patches for each image token.
COST_OF_SQUARED_LENGTH = 1 / 20_000
COST_OF_PATCH = 0.25


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: its number from 0, its epoch, and its examples."""

    number: int
    epoch: int
    examples: NDArray[np.int64]  # indices of examples
    ends_epoch: bool


@dataclass(frozen=True, slots=True)
class Assignment:
    """One step's packs: `packs[rank][k]` are the examples of that rank's k-th pack; empty packs are fillers."""

    packs: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_packs_per_rank(self) -> int:
        """The same for every rank."""
        return len(self.packs[0])


def num_steps_per_epoch(num_examples: int, examples_per_step: int) -> int:
    """Steps of one epoch; the last may be short."""
    return -(-num_examples // examples_per_step)


def total_steps(num_examples: int, examples_per_step: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the whole run."""
    steps = num_steps_per_epoch(num_examples, examples_per_step) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)


def plan_epoch(
    costs: NDArray[np.float64], examples_per_step: int, *, seed: int, epoch: int, shuffle: bool, bucket_steps: int = 1
) -> list[Step]:
    """The steps of one epoch, each example once.

    Shuffled, the examples are permuted; then those of each window of `bucket_steps` steps are sorted by cost and cut into
    steps, so that a step's examples are alike and ranks with few examples each still get even work; then the steps are
    permuted, so that neighbours say nothing about each other. What is left over makes a short last step.

    Args:
        costs: [N], from `cost`.
        epoch: from 0; another permutation each.
        shuffle: false: steps are consecutive examples, and nothing is bucketed.
        bucket_steps: steps a window; 1: no bucketing.
    """
    num_examples = len(costs)
    num_full = num_examples // examples_per_step
    order = np.arange(num_examples)
    ranking = np.arange(num_full)
    if shuffle:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(num_examples)
        window = bucket_steps * examples_per_step
        for start in range(0, num_full * examples_per_step, window) if bucket_steps > 1 else ():
            chosen = order[start : min(start + window, num_full * examples_per_step)]
            chosen[:] = chosen[np.argsort(costs[chosen], kind="stable")]
        ranking = rng.permutation(num_full) if bucket_steps > 1 else ranking
    groups = [order[n * examples_per_step : (n + 1) * examples_per_step] for n in ranking]
    if num_full * examples_per_step < num_examples:
        groups.append(order[num_full * examples_per_step :])
    first = epoch * len(groups)
    return [Step(first + n, epoch, group, n == len(groups) - 1) for n, group in enumerate(groups)]


def plan_run(
    costs: NDArray[np.float64],
    examples_per_step: int,
    *,
    seed: int,
    shuffle: bool,
    num_steps: int,
    first_step: int = 0,
    bucket_steps: int = 1,
) -> Iterator[Step]:
    """The steps `first_step` to `num_steps - 1` of a run, epoch after epoch; epochs before them are not even planned."""
    per_epoch = num_steps_per_epoch(len(costs), examples_per_step)
    for epoch in range(first_step // per_epoch, -(-num_steps // per_epoch)):
        for step in plan_epoch(
            costs, examples_per_step, seed=seed, epoch=epoch, shuffle=shuffle, bucket_steps=bucket_steps
        ):
            if first_step <= step.number < num_steps:
                yield step


def assign(step: Step, lengths: Lengths, *, world_size: int, max_tokens: int) -> Assignment:
    """Cuts a step into packs of at most `max_tokens`, the same number on each rank, and evens the ranks' costs.

    Examples go, costliest first, to the rank with the least work so far (Graham's longest processing time rule, 1969); each
    rank's examples then fill packs, longest first, into the pack that they leave the least room in. Ranks that need fewer
    packs than others split theirs or, with too few examples for that, get fillers.

    Args:
        lengths: of all examples; each must fit into a pack (`lengths.measure` refuses those that do not).
    """
    tokens = lengths.tokens[step.examples]
    assert len(tokens) == 0 or int(tokens.max()) <= max_tokens, "an example is longer than a pack"
    costs = cost(tokens, lengths.patches[step.examples])
    by_rank = [_pack_rank(members, tokens, max_tokens) for members in _deal(costs, world_size)]
    num_packs = max(1, max(len(packs) for packs in by_rank))
    return Assignment(
        tuple(
            tuple(tuple(int(step.examples[n]) for n in pack) for pack in _in_order(_spread(packs, costs, num_packs)))
            for packs in by_rank
        )
    )


def cost(tokens: NDArray[np.int64], patches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated time of each example, in units of one language-model token."""
    return tokens + COST_OF_SQUARED_LENGTH * tokens.astype(np.float64) ** 2 + COST_OF_PATCH * patches


def pack_lengths(max_tokens: int, count: int) -> list[int]:
    """The lengths that packs are padded up to, known before any example is: multiples of `max_tokens / count`.

    Even spacing, because most packs are nearly full: what matters is the last one of a rank, which wastes half a multiple.
    """
    return sorted({-(-max_tokens * n // count) for n in range(1, count + 1)})


def padded_length(num_tokens: int, lengths: Sequence[int]) -> int:
    """The shortest pack length that holds so many tokens."""
    return lengths[bisect.bisect_left(lengths, num_tokens)]


def _deal(costs: NDArray[np.float64], world_size: int) -> list[list[int]]:
    """Examples to ranks."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for n in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[rank].append(n)
        heapq.heapreplace(loads, (load + float(costs[n]), rank))
    return ranks


def _pack_rank(members: Sequence[int], tokens: NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """One rank's examples in as few packs as best fit finds."""
    packs: list[list[int]] = []
    room: list[int] = []
    for n in sorted(members, key=lambda n: (-int(tokens[n]), n)):
        size = int(tokens[n])
        fitting = [(left - size, k) for k, left in enumerate(room) if left >= size]
        if fitting:
            _, k = min(fitting)
            packs[k].append(n)
            room[k] -= size
        else:
            packs.append([n])
            room.append(max_tokens - size)
    return packs


def _spread(packs: list[list[int]], costs: NDArray[np.float64], num_packs: int) -> list[list[int]]:
    """The same examples in exactly `num_packs` packs: the costliest one is halved until they are so many."""
    spread = [list(pack) for pack in packs]
    while len(spread) < num_packs:
        largest = max(spread, key=lambda pack: float(costs[pack].sum()) if len(pack) > 1 else -1.0, default=[])
        if len(largest) < 2:
            spread.append([])
            continue
        half = len(largest) // 2
        spread.append(largest[half:])
        del largest[half:]
    return spread


def _in_order(packs: list[list[int]]) -> list[list[int]]:
    """Examples in the order of their step, packs in the order of their first example; fillers last."""
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0] if pack else len(pack) + 2**62)
