"""Figures of the data plane: planning, how full packs are, how evenly ranks are busy, measuring records, loading images.

    python -m benchmarks.data [--quick] [--out FILE.json]

Lengths are drawn from two distributions: COCO-like captions, and a mix from 100 to 8,192 tokens of which half have images.
Beside our plan stand the usual ways: plain padding to the longest of a batch, and packs filled with tokens in the order of
a shuffled sampler and dealt out in turn.
"""

import resource
import statistics
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.common import parser_of, table_rows, write_json
from benchmarks.loading import images_per_s, index_times
from vl_dist.data.assign import Assignment, Pack, assign, pack_lengths, padded_length
from vl_dist.data.groups import cost, group_examples
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Step, plan_epoch

MAX_TOKENS = 8192
NUM_PACK_LENGTHS = 16
EXAMPLES_PER_RANK = 16


@dataclass(frozen=True, slots=True)
class Balance:
    """One step: how busy the ranks are and how much of the packs is padding."""

    busy: float  # mean over max of the ranks' costs
    num_padding: int  # pad tokens
    num_tokens: int  # tokens of all packs, padding included
    dominated: bool  # the largest example alone exceeds a rank's mean cost


def coco_like(count: int, rng: np.random.Generator) -> Lengths:
    """One 280x280 image and a caption of 8 to 30 tokens each."""
    targets = np.clip(rng.normal(13, 3, count), 8, 30).astype(np.int64)
    ones = np.ones(count, dtype=np.int64)
    return Lengths.of_rows(np.stack([115 + targets, targets, 400 * ones, ones, 114 * ones], axis=1))


def mixed(count: int, rng: np.random.Generator, *, large_images: bool = False) -> Lengths:
    """Log-normal lengths; half have images of at most 1,280 tokens; optionally one in 500 is a single 4,096-token image."""
    tokens = np.clip(rng.lognormal(6.6, 0.9, count), 100, MAX_TOKENS).astype(np.int64)
    image_tokens = np.where(rng.random(count) < 0.5, np.minimum(tokens * rng.random(count), 1280), 0).astype(np.int64)
    if large_images:
        large = rng.random(count) < 1 / 500
        tokens, image_tokens = np.where(large, 4096 + 100, tokens), np.where(large, 4096, image_tokens)
    targets = np.maximum(1, tokens // 10)
    columns = [tokens, targets, 4 * image_tokens, (image_tokens > 0).astype(np.int64), tokens - targets - 1]
    return Lengths.of_rows(np.stack(columns, axis=1))


def measure_ours(step: Step, lengths: Lengths, world_size: int) -> Balance:
    """Our assignment of one step."""
    return _balance(assign(step, lengths, world_size=world_size, max_tokens=MAX_TOKENS), lengths)


def measure_token_full(step: Step, lengths: Lengths, world_size: int) -> Balance:
    """Packs filled in the sampler's order until no example fits, dealt to ranks in turn."""
    packs: list[list[int]] = [[]]
    used = 0
    for n in step.examples.tolist():
        if used + lengths.tokens[n] > MAX_TOKENS:
            packs.append([])
            used = 0
        packs[-1].append(n)
        used += int(lengths.tokens[n])
    while len(packs) % world_size:
        packs.append([])
    filled = [Pack(tuple((n,) for n in pack), int(lengths.tokens[pack].sum())) for pack in packs]
    return _balance(Assignment(tuple(tuple(filled[rank::world_size]) for rank in range(world_size))), lengths)


def measure_padded(step: Step, lengths: Lengths, world_size: int) -> Balance:
    """A shuffled sampler: each rank gets its examples in turn, in micro-batches of four padded to their longest."""
    costs = cost(lengths.tokens, lengths.patches)
    loads, real, all_tokens = [], 0, 0
    for rank in range(world_size):
        mine = step.examples[rank::world_size]
        load = 0.0
        for start in range(0, len(mine), 4):
            batch = mine[start : start + 4]
            longest = int(lengths.tokens[batch].max())
            all_tokens += longest * len(batch)
            real += int(lengths.tokens[batch].sum())
            load += float(cost(np.full(len(batch), longest), lengths.patches[batch]).sum())
        loads.append(load)
    return Balance(
        statistics.mean(loads) / max(loads), all_tokens - real, all_tokens, _dominated(step.examples, costs, world_size)
    )


def _balance(assignment: Assignment, lengths: Lengths) -> Balance:
    costs = cost(lengths.tokens, lengths.patches)
    allowed = pack_lengths(MAX_TOKENS, NUM_PACK_LENGTHS)
    loads = [sum(float(costs[list(pack.examples)].sum()) for pack in rank) for rank in assignment.packs]
    sizes = [pack.num_tokens for rank in assignment.packs for pack in rank]
    padded = sum(padded_length(size, allowed) for size in sizes)
    examples = np.array([n for rank in assignment.packs for pack in rank for n in pack.examples])
    return Balance(
        statistics.mean(loads) / max(loads),
        padded - sum(sizes),
        padded,
        _dominated(examples, costs, len(assignment.packs)),
    )


def _dominated(examples: NDArray[np.int64], costs: NDArray[np.float64], world_size: int) -> bool:
    return bool(costs[examples].max() > costs[examples].sum() / world_size)


def planning_time(count: int, lengths: Lengths, examples_per_step: int) -> tuple[float, int]:
    """Seconds to plan one epoch, and its steps."""
    started = time.perf_counter()
    groups = group_examples(lengths)
    steps = plan_epoch(groups, examples_per_step, seed=0, epoch=0, shuffle=True, bucket_steps=8)
    return time.perf_counter() - started, len(steps)


def plan_table(share: int, rng: np.random.Generator) -> Table:
    """How long planning takes."""
    table = Table("plan of one epoch", "examples", "steps", "seconds", "process peak GiB")
    for name, make, count in (("COCO-like", coco_like, 414_113 // share), ("mix", mixed, 10_000_000 // share)):
        lengths = make(count, rng)
        seconds, steps = planning_time(count, lengths, 128)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row(name, f"{count:,}", f"{steps:,}", f"{seconds:.2f}", f"{peak:.2f}")
    return table


def balance_table(rng: np.random.Generator) -> Table:
    """How busy ranks are and how full packs, in our way and in the usual ones."""
    table = Table(
        "lengths", "ranks", "examples a step", "way", "busy, mean", "busy, worst", "dominated", "padding", "assign ms"
    )
    ways = (("ours", measure_ours), ("token-full packs", measure_token_full), ("plain padding", measure_padded))
    for name, lengths, world_size, per_rank in (
        ("COCO-like", coco_like(40_000, rng), 8, 256),
        ("mix", mixed(40_000, rng), 8, EXAMPLES_PER_RANK),
        ("mix", mixed(40_000, rng), 64, EXAMPLES_PER_RANK),
        ("mix, 1 in 500 large", mixed(40_000, rng, large_images=True), 8, EXAMPLES_PER_RANK),
        ("mix, 1 in 500 large", mixed(40_000, rng, large_images=True), 64, EXAMPLES_PER_RANK),
    ):
        groups = group_examples(lengths)
        plan = plan_epoch(groups, per_rank * world_size, seed=0, epoch=0, shuffle=True, bucket_steps=8)
        steps_shown = [step for step in plan if len(step.examples) == per_rank * world_size][:100]
        started = time.perf_counter()
        for step in steps_shown:
            assign(step, lengths, world_size=world_size, max_tokens=MAX_TOKENS)
        assign_ms = 1000 * (time.perf_counter() - started) / len(steps_shown)
        for way, measure in ways:
            found = [measure(step, lengths, world_size) for step in steps_shown]
            fair = [balance.busy for balance in found if not balance.dominated] or [float("nan")]
            table.add_row(
                name,
                str(world_size),
                str(per_rank * world_size),
                way,
                f"{statistics.mean(fair):.3f}",
                f"{min(fair):.3f}",
                f"{sum(balance.dominated for balance in found)}/{len(found)}",
                f"{sum(b.num_padding for b in found) / sum(b.num_tokens for b in found):.3f}",
                f"{assign_ms:.1f}" if way == "ours" else "",
            )
    return table


def index_table(share: int) -> Table:
    """The lengths index, cold and warm."""
    cold_s, warm_s, megabytes = index_times(num_images=8_000 // share, captions=5)
    index = Table("lengths index", "records", "images", "cold s", "warm s", "MB")
    index.add_row(
        "one caption each",
        f"{40_000 // share:,}",
        f"{8_000 // share:,}",
        f"{cold_s:.1f}",
        f"{warm_s:.2f}",
        f"{megabytes:.1f}",
    )
    return index


def loading_table(share: int) -> Table:
    """Images through the collator, beside a bare loop."""
    bare, ours = images_per_s(num_images=600 // share, rounds=5)
    loading = Table("one core, 640x480 photographs to 280x280", "images/s")
    loading.add_row("bare decode + resize + processor", f"{bare:.1f}")
    loading.add_row("collator: with tokens, positions and masks of each example", f"{ours:.1f}")
    return loading


def main() -> None:
    """The command."""
    given = parser_of("Figures of the data plane.", "data").parse_args()
    share = 100 if given.quick else 1  # of the examples
    rng = np.random.default_rng(0)
    tables = [plan_table(share, rng), balance_table(rng), index_table(share), loading_table(share)]
    write_json(given.out, "data", [table_rows(table) for table in tables], quick=given.quick)
    console = Console(width=120)
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    main()
