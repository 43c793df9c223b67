"""Who computes what: one step cut into packs, the same number on every rank, with even work. Pure functions; no torch here.

Legend: D documents of a step or a pack.
"""

import bisect
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.groups import group_costs
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Step

Document = tuple[int, ...]  # examples that are encoded together: a group, or a part of one


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch row; a filler has no document."""

    documents: tuple[Document, ...]
    num_tokens: int  # without padding

    @property
    def examples(self) -> tuple[int, ...]:
        """All examples, document after document."""
        return tuple(n for document in self.documents for n in document)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One step's packs: `packs[rank][k]` is that rank's k-th."""

    packs: tuple[tuple[Pack, ...], ...]

    @property
    def num_packs_per_rank(self) -> int:
        """The same for every rank."""
        return len(self.packs[0])


def assign(step: Step, lengths: Lengths, *, world_size: int, max_tokens: int) -> Assignment:
    """Cuts a step into packs of at most `max_tokens`, the same number on each rank, and evens the ranks' costs.

    Documents go, costliest first, to the rank with the least work so far (Graham's longest processing time rule, 1969);
    each rank's documents then fill packs, longest first, into the pack that they leave the least room in. Ranks that need
    fewer packs than others split theirs or, with too few documents for that, get fillers. A document is a group, or a part
    of one that is longer than a pack, which repeats its trunk.

    Args:
        lengths: of all examples; each must fit into a pack (`lengths.fit` deals with those that do not).
    """
    starts = document_starts(step.examples, lengths, max_tokens)
    tokens = document_tokens(step.examples, starts, lengths)
    costs = group_costs(lengths, step.examples, starts)
    by_rank = [_pack_rank(members, tokens, max_tokens) for members in _deal(costs, world_size)]
    num_packs = max(1, max(len(packs) for packs in by_rank))
    bounds = starts.tolist()
    documents = [tuple(step.examples[a:b].tolist()) for a, b in itertools.pairwise(bounds)]

    def pack_of(members: Sequence[int]) -> Pack:
        return Pack(tuple(documents[n] for n in members), int(tokens[list(members)].sum()))

    return Assignment(
        tuple(tuple(pack_of(pack) for pack in _in_order(_spread(packs, costs, num_packs))) for packs in by_rank)
    )


def document_starts(examples: NDArray[np.int64], lengths: Lengths, max_tokens: int) -> NDArray[np.int64]:
    """Where each document of a step begins: neighbours of one group are one document, as long as it fits into a pack.

    An example that follows itself (its file's weight is above 1) begins a document of its own.

    Returns:
        [D + 1] positions in `examples`, the last one their number.
    """
    group, trunk = lengths.group[examples].tolist(), lengths.trunk[examples].tolist()
    branch = (lengths.tokens[examples] - lengths.trunk[examples]).tolist()
    same = [False, *(examples[1:] == examples[:-1]).tolist()]
    starts: list[int] = []
    used, current = 0, -1
    for n in range(len(examples)):
        assert trunk[n] + branch[n] <= max_tokens, "an example is longer than a pack"
        if group[n] != current or same[n] or used + branch[n] > max_tokens:
            starts.append(n)
            used, current = trunk[n], group[n]
        used += branch[n]
    return np.array([*starts, len(examples)], dtype=np.int64)


def document_tokens(examples: NDArray[np.int64], starts: NDArray[np.int64], lengths: Lengths) -> NDArray[np.int64]:
    """[D] tokens of each document: its trunk once, and every branch."""
    branch = lengths.tokens[examples] - lengths.trunk[examples]
    tokens: NDArray[np.int64] = lengths.trunk[examples[starts[:-1]]] + np.add.reduceat(branch, starts[:-1])
    return tokens


def pack_lengths(max_tokens: int, count: int) -> list[int]:
    """The lengths that packs are padded up to, known before any example is: multiples of `max_tokens / count`.

    Even spacing, because most packs are nearly full: what matters is the last one of a rank, which wastes half a multiple.
    """
    return sorted({-(-max_tokens * n // count) for n in range(1, count + 1)})


def padded_length(num_tokens: int, lengths: Sequence[int]) -> int:
    """The shortest pack length that holds so many tokens."""
    return lengths[bisect.bisect_left(lengths, num_tokens)]


def _deal(costs: NDArray[np.float64], world_size: int) -> list[list[int]]:
    """Documents to ranks."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for n in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[rank].append(n)
        heapq.heapreplace(loads, (load + float(costs[n]), rank))
    return ranks


def _pack_rank(members: Sequence[int], tokens: NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """One rank's documents in as few packs as best fit finds."""
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
    """The same documents in exactly `num_packs` packs: the costliest one is halved until they are so many."""
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
    """Documents in the order of their step, packs in the order of their first document; fillers last."""
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0] if pack else len(pack) + 2**62)
