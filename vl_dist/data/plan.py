"""The plan: which examples make which step. Pure functions of numbers; no torch here.

The steps of a run follow from seed, settings and lengths alone, so any number of ranks trains the same steps and resuming
is seeking. `vl_dist.data.assign` then cuts one step into packs.

Legend: N examples, G groups, S steps.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.groups import Groups


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    number: int  # from 0
    epoch: int  # from 0
    examples: NDArray[np.int64]  # indices of examples; those of one group are neighbours
    ends_epoch: bool
    epochs_done: float = 0.0  # passes over the training records once this step is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All steps of a run, made when they are asked for."""

    groups: Groups
    examples_per_step: int
    seed: int
    shuffle: bool
    bucket_steps: int
    steps_per_epoch: tuple[int, ...]  # of each epoch; they differ only where a file's weight is a fraction
    num_steps: int  # of the whole run

    def steps(self, first_step: int = 0) -> Iterator[Step]:
        """The steps from `first_step` on; epochs before it are not even planned."""
        start = 0
        for epoch, count in enumerate(self.steps_per_epoch):
            if start >= self.num_steps:
                return
            if first_step < start + count:
                for step in self.epoch(epoch, first=start):
                    if first_step <= step.number < self.num_steps:
                        yield step
            start += count

    def epoch(self, epoch: int, *, first: int = 0) -> list[Step]:
        """All steps of one epoch, those beyond `num_steps` included; `first` is the number of the first."""
        return plan_epoch(
            self.groups,
            self.examples_per_step,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            bucket_steps=self.bucket_steps,
            first=first,
        )

    def times(self, epoch: int) -> NDArray[np.int64]:
        """[N] how often an epoch has each example."""
        of_group = np.bincount(drawn_groups(self.groups, self.seed, epoch), minlength=len(self.groups))
        times = np.empty(len(self.groups.members), dtype=np.int64)
        times[self.groups.members] = np.repeat(of_group, self.groups.sizes)
        return times


def make_plan(
    groups: Groups,
    examples_per_step: int,
    *,
    seed: int,
    shuffle: bool,
    num_epochs: int,
    max_steps: int | None = None,
    bucket_steps: int = 1,
) -> Plan:
    """The plan of a run: `num_epochs` epochs, cut short after `max_steps`."""
    counts = tuple(num_steps_per_epoch(num_drawn(groups, seed, epoch), examples_per_step) for epoch in range(num_epochs))
    steps = sum(counts)
    return Plan(
        groups=groups,
        examples_per_step=examples_per_step,
        seed=seed,
        shuffle=shuffle,
        bucket_steps=bucket_steps,
        steps_per_epoch=counts,
        num_steps=steps if max_steps is None else min(steps, max_steps),
    )


def num_steps_per_epoch(num_examples: int, examples_per_step: int) -> int:
    """Optimizer steps that take each of so many examples once; the last may be short."""
    return -(-num_examples // examples_per_step)


def drawn_groups(groups: Groups, seed: int, epoch: int) -> NDArray[np.int64]:
    """The groups of one epoch before any shuffling, file after file.

    A file of weight 2.5 comes twice in every epoch, and half of it once more. Which half follows from one shuffle of the
    file for the whole run, so that one epoch goes on where the last one ended and no group falls behind the others.
    """
    if all(weight == 1.0 for weight in groups.weights):
        return np.arange(len(groups))
    drawn = []
    for file, weight in enumerate(groups.weights):
        own = np.flatnonzero(groups.files == file)
        drawn += [own] * math.floor(weight)
        share = Fraction(str(weight)) % 1  # exact, so that 0.3 of ten is three in every epoch
        begin, end = math.floor(epoch * share * len(own)), math.floor((epoch + 1) * share * len(own))
        if end > begin:
            shuffled = np.random.default_rng([seed, file]).permutation(own)
            drawn.append(np.sort(shuffled[np.arange(begin, end) % len(own)]))
    return np.concatenate(drawn) if drawn else np.arange(0)


def num_drawn(groups: Groups, seed: int, epoch: int) -> int:
    """Examples of one epoch, repeated ones as often as they come."""
    return int(groups.sizes[drawn_groups(groups, seed, epoch)].sum())


def plan_epoch(
    groups: Groups,
    examples_per_step: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    bucket_steps: int = 1,
    first: int = 0,
) -> list[Step]:
    """The steps of one epoch, each example as often as its file's weight says.

    Shuffled, the groups are permuted; then those of each window of `bucket_steps` steps are sorted by cost, so that a
    step's examples are alike and ranks with few examples each still get even work; then they are cut into steps, and the
    steps are permuted, so that neighbours say nothing about each other. What is left over makes a short last step.

    Args:
        epoch: from 0; another permutation each.
        shuffle: false: steps are consecutive groups, and nothing is bucketed.
        bucket_steps: steps a window; 1: no bucketing.
        first: number of the epoch's first step.
    """
    order = drawn_groups(groups, seed, epoch)
    num_examples = int(groups.sizes[order].sum())
    num_steps = num_steps_per_epoch(num_examples, examples_per_step)
    num_full = num_examples // examples_per_step
    ranking = np.arange(num_steps)
    if shuffle:
        rng = np.random.default_rng([seed, epoch])
        order = order[rng.permutation(len(order))]
        if bucket_steps > 1:
            cuts = cut(groups.sizes[order], examples_per_step)
            for start, end in itertools.pairwise([*cuts[:num_full:bucket_steps].tolist(), int(cuts[num_full])]):
                chosen = order[start:end]
                chosen[:] = chosen[np.argsort(groups.costs[chosen], kind="stable")]
            ranking[:num_full] = rng.permutation(num_full)
    examples, bounds = _examples_in(order, groups, examples_per_step)
    return [
        Step(
            number=first + n,
            epoch=epoch,
            examples=examples[bounds[k] : bounds[k + 1]],
            ends_epoch=n == num_steps - 1,
            epochs_done=epoch + (n + 1) / num_steps,
        )
        for n, k in enumerate(ranking.tolist())
    ]


def _examples_in(
    order: NDArray[np.int64], groups: Groups, examples_per_step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The examples of groups in this order, one after the other, and where they are cut into steps."""
    sizes = groups.sizes[order]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    offsets = np.repeat(groups.starts[:-1][order] - ends[:-1], sizes) + np.arange(ends[-1])
    return groups.members[offsets], ends[cut(sizes, examples_per_step)]


def cut(sizes: NDArray[np.int64], examples_per_step: int) -> NDArray[np.int64]:
    """Where consecutive groups of these sizes are cut into steps of as near to `examples_per_step` examples as they allow.

    Cuts are at the group boundaries nearest to the multiples of `examples_per_step`, so that errors do not add up; no step
    is empty.

    Args:
        sizes: [G], none above `examples_per_step`.

    Returns:
        [S + 1] groups before each step, and G.
    """
    ends = np.cumsum(sizes)
    num_steps = num_steps_per_epoch(int(ends[-1]) if len(ends) else 0, examples_per_step)
    wanted = np.arange(1, num_steps) * examples_per_step
    above = np.searchsorted(ends, wanted)  # the first group that ends there or later
    after = ends[above]
    before = after - sizes[above]
    inner = above + (after - wanted < wanted - before)
    place = np.arange(1, num_steps)
    inner = np.maximum.accumulate(np.maximum(inner, place) - place) + place  # at least one group each ...
    inner = np.minimum(inner, len(sizes) - (num_steps - place))  # ... also for those that follow
    return np.concatenate([[0], inner, [len(sizes)]]).astype(np.int64)
