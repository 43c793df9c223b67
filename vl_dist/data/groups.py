"""Groups: examples that share a prompt about the same pixels, encoded as one trunk with a branch for each answer.

Without sharing every example is a group of its own. Groups are what a plan orders and what an epoch repeats; a group is
never torn between steps, unless it alone has more examples than a step.

Legend: N examples, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.lengths import Lengths

# Costs of one step's parts relative to one language-model token's matmuls, from the 2B's shapes: attention grows with the
# square of a document's length, the frozen tower runs forward only over four patches for each image token.
COST_OF_SQUARED_LENGTH = 1 / 20_000
COST_OF_PATCH = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """All groups, in the order of their first example."""

    members: NDArray[np.int64]  # [N] examples, group after group
    starts: NDArray[np.int64]  # [G + 1] where each group begins in `members`
    costs: NDArray[np.float64]  # [G] estimated time, in units of one language-model token
    files: NDArray[np.int64]  # [G] the record file each is of
    weights: tuple[float, ...]  # of each file: how often an epoch has its groups

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[G] examples of each group."""
        return np.diff(self.starts)


def group_numbers(trunks: NDArray[np.int64] | None, num_examples: int, max_size: int) -> NDArray[np.int64]:
    """The group of each example, as `Lengths.group` has it.

    Args:
        trunks: [N] equal for examples that share a trunk (`Examples.trunks`); None: nothing is shared.
        num_examples: N.
        max_size: most examples in a group, so that it fits into a step; larger ones are halved until they do.

    Returns:
        [N] numbers from 0, in the order of the groups' first examples.
    """
    if trunks is None:
        return np.arange(num_examples, dtype=np.int64)
    _, number, count = np.unique(trunks, return_inverse=True, return_counts=True)
    by_trunk = np.argsort(number, kind="stable")
    rank = np.empty(num_examples, dtype=np.int64)  # of an example among those of its trunk
    rank[by_trunk] = np.arange(num_examples) - np.repeat(np.cumsum(count) - count, count)
    parts = -(-count // max_size)
    part = rank * parts[number] // count[number]  # even parts: 5 by at most 4 are 3 and 2
    return _in_order_of_appearance(number * (int(parts.max(initial=1)) + 1) + part)


def _in_order_of_appearance(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first, kind="stable")] = np.arange(len(first))
    return place[number]


def group_examples(lengths: Lengths, files: NDArray[np.int64] | None = None, weights: Sequence[float] = (1.0,)) -> Groups:
    """The groups that `lengths.group` tells apart.

    Args:
        files: [N] the record file of each example; None: all of one.
        weights: of each file.
    """
    members = np.argsort(lengths.group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(lengths.group))]).astype(np.int64)
    first = members[starts[:-1]]
    return Groups(
        members=members,
        starts=starts,
        costs=group_costs(lengths, members, starts),
        files=np.zeros(len(first), dtype=np.int64) if files is None else files[first],
        weights=tuple(weights),
    )


def cost(tokens: NDArray[np.int64], patches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated time of examples that are encoded alone, in units of one language-model token."""
    return tokens + COST_OF_SQUARED_LENGTH * tokens.astype(np.float64) ** 2 + COST_OF_PATCH * patches


def group_costs(lengths: Lengths, members: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[G] cost of each run of examples that are encoded together: the first one's trunk and images, and every branch."""
    first = members[starts[:-1]]
    trunk = lengths.trunk[first].astype(np.float64)
    branch = (lengths.tokens[members] - lengths.trunk[members]).astype(np.float64)
    # Each branch sees the trunk and itself; L * L for one branch, where L is the example's own length.
    squares = trunk**2 + np.add.reduceat(branch**2 + 2 * branch * lengths.trunk[members], starts[:-1])
    tokens = trunk + np.add.reduceat(branch, starts[:-1])
    return tokens + COST_OF_SQUARED_LENGTH * squares + COST_OF_PATCH * lengths.patches[first]
