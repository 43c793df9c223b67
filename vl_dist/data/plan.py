"""The plan: which examples make which step, and who computes them. Pure functions of numbers; no torch here.

The steps of an epoch follow from (seed, epoch, number of examples) alone, so any number of ranks trains the same steps and
resuming is seeking. `assign` then cuts one step into packs, the same number on every rank.
"""

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


def plan_epoch(num_examples: int, examples_per_step: int, *, seed: int, epoch: int, shuffle: bool) -> list[Step]:
    """The steps of one epoch, each example once.

    Args:
        epoch: from 0; a new permutation each when `shuffle` is set.
    """
    order = np.arange(num_examples)
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    first = epoch * num_steps_per_epoch(num_examples, examples_per_step)
    starts = range(0, num_examples, examples_per_step)
    return [Step(first + n, epoch, order[start : start + examples_per_step]) for n, start in enumerate(starts)]


def plan_run(
    num_examples: int, examples_per_step: int, *, seed: int, shuffle: bool, num_steps: int, first_step: int = 0
) -> Iterator[Step]:
    """The steps `first_step` to `num_steps - 1` of a run, epoch after epoch; what comes before is not even planned."""
    per_epoch = num_steps_per_epoch(num_examples, examples_per_step)
    for epoch in range(first_step // per_epoch, -(-num_steps // per_epoch)):
        for step in plan_epoch(num_examples, examples_per_step, seed=seed, epoch=epoch, shuffle=shuffle):
            if first_step <= step.number < num_steps:
                yield step


def assign(step: Step, lengths: Lengths, *, world_size: int, max_tokens: int) -> Assignment:
    """Cuts a step into packs of at most `max_tokens`, the same number on each rank, with costs as even as possible.

    Examples go, costliest first, to the cheapest pack that has room. The number of packs grows by one a rank until all fit.

    Args:
        lengths: of all examples; each must fit into a pack (`lengths.measure` refuses those that do not).
    """
    tokens = lengths.tokens[step.examples]
    costs = cost(tokens, lengths.patches[step.examples])
    assert len(tokens) == 0 or int(tokens.max()) <= max_tokens, "an example is longer than a pack"
    num_packs = world_size * max(1, -(-int(tokens.sum()) // (max_tokens * world_size)))
    packs = None
    while packs is None:
        packs = _fill_packs(tokens, costs, num_packs, max_tokens)
        num_packs += world_size
    # Within a pack, and among packs, examples keep the order of the step: float sums then do not depend on costs.
    ordered = sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0] if pack else len(tokens))
    by_rank = _deal(ordered, costs, world_size)
    return Assignment(
        tuple(tuple(tuple(int(step.examples[n]) for n in pack) for pack in rank_packs) for rank_packs in by_rank)
    )


def cost(tokens: NDArray[np.int64], patches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated time of each example, in units of one language-model token."""
    return tokens + COST_OF_SQUARED_LENGTH * tokens.astype(np.float64) ** 2 + COST_OF_PATCH * patches


def _fill_packs(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], num_packs: int, max_tokens: int
) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = np.full(num_packs, max_tokens)
    load = np.zeros(num_packs)
    for n in np.argsort(-costs, kind="stable"):
        fits = room >= tokens[n]
        if not fits.any():
            return None
        pack = int(np.argmin(np.where(fits, load, np.inf)))
        packs[pack].append(int(n))
        room[pack] -= tokens[n]
        load[pack] += costs[n]
    return packs


def _deal(packs: Sequence[list[int]], costs: NDArray[np.float64], world_size: int) -> list[list[list[int]]]:
    """Packs to ranks, equal counts, costliest first to the rank with the least so far."""
    per_rank = len(packs) // world_size
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    pack_costs = [float(costs[pack].sum()) if pack else 0.0 for pack in packs]
    for n in sorted(range(len(packs)), key=lambda n: -pack_costs[n]):
        rank = min((r for r in range(world_size) if len(ranks[r]) < per_rank), key=lambda r: load[r])
        ranks[rank].append(n)
        load[rank] += pack_costs[n]
    return [[packs[n] for n in sorted(rank)] for rank in ranks]
