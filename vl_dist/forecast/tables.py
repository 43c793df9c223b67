"""A forecast as tables for a terminal."""

from collections.abc import Iterator

import numpy as np
from rich.table import Table
from rich.text import Text

from vl_dist.data.examples import Examples
from vl_dist.forecast.forecast import Forecast
from vl_dist.forecast.memory import GIB
from vl_dist.forecast.steps import histogram
from vl_dist.settings import Config
from vl_dist.sizes import in_bytes

SMALL = 0.1  # GiB; below it all memory is in MiB
NUM_BINS, BAR_WIDTH = 16, 40
NAMES = {0: "data parallel", 1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3"}


def tables(found: Forecast) -> Iterator[Table | Text]:
    """All tables, with what their numbers mean."""
    if found.made is not None:
        yield Text(found.made)
    yield _steps(found)
    yield Text(
        f"Means over {found.figures.num_measured:,} steps of the first epoch. A useful operation is one that the adapter's "
        "gradient needs: padding and recomputation do not count.\n"
    )
    yield _lengths(found)
    yield _memory(found)
    largest, recompute = found.figures.largest, found.config.model.recompute or "none"
    yield Text(
        f"For the largest packs measured: {largest.tokens:,} tokens, {largest.targets:,} targets, {largest.patches:,} "
        "patches. The adapter is with its gradients and moments; activations are those that "
        f"model.recompute={recompute} keeps; working are logits and the widest gradients. CUDA's own "
        "context, the allocator's waste and communication buffers come on top.\n"
    )
    if found.memory[3].total > found.memory[0].total:
        yield Text(
            f"ZeRO 3 needs more than data parallel here: beside its share on {found.world_size} GPU"
            f"{'s' if found.world_size > 1 else ''}, the largest weight and a layer are whole while they are used.\n"
        )
    yield _disk(found)
    yield from (Text(f"Note: {note}.") for note in (*found.data.notes, *found.notes))


def _steps(found: Forecast) -> Table:
    config, figures, plan = found.config, found.figures, found.plan
    epochs = " or ".join(f"{n:,}" for n in sorted(set(plan.steps_per_epoch)))
    per_step, cap = figures.flops / 1e12, config.batch.max_tokens_per_pack
    rows = {
        "examples": f"{len(found.data.train.examples):,} in {len(found.data.groups):,} groups; "
        f"{len(found.data.bad):,} rows left out",
        **_weights(found),
        "steps": f"{plan.num_steps:,} of {plan.examples_per_step} examples; {epochs} an epoch",
        "tokens a step": f"{figures.tokens:,.0f}, of them {figures.targets:,.0f} targets; {figures.images:,.1f} images",
        "packs": f"{figures.packs_per_rank:,.2f} a rank and step, {figures.fillers:,.2f} fillers a step",
        "pack fill": f"{figures.fill:.1%} of {cap:,} tokens; padding {figures.padding:.2%}",
        "rank skew": f"largest over mean cost {figures.skew:.3f}, worst step {figures.worst_skew:.3f}",
        "useful operations": f"{per_step:,.4g} TFLOP a step, {per_step * plan.num_steps / 1e3:,.4g} PFLOP in all",
        "of them the tower": f"{figures.tower_flops / max(1.0, figures.flops):.0%}, {_when_the_tower_runs(config)}",
    }
    return _table(f"plan on {found.world_size} GPU{'s' if found.world_size > 1 else ''}", rows)


def _when_the_tower_runs(config: Config) -> str:
    if config.model.feature_cache is None:
        return "in every epoch; model.feature_cache would do it once"
    return "until model.feature_cache has all images"


def _weights(found: Forecast) -> dict[str, str]:
    """How often an epoch has each file's examples, where that is not once."""
    files, examples = found.config.data.train, found.data.train.examples
    if all(file.weight == 1 for file in files):
        return {}
    assert isinstance(examples, Examples)
    counts = np.bincount(examples.file_numbers(), minlength=len(files))
    each = [f"{file.path}: {count:,} x {file.weight:g}" for file, count in zip(files, counts.tolist(), strict=True)]
    return {"an epoch has": "\n".join(each)}


def _lengths(found: Forecast) -> Table:
    bins = histogram(found.data.train.lengths.tokens, NUM_BINS)
    most = max(count for _, _, count in bins)
    rows = {
        f"{low:,} to {high:,}" if low < high else f"{low:,}": f"{'█' * round(BAR_WIDTH * count / most)} {count:,}"
        for low, high, count in bins
    }
    return _table("tokens of an example", rows)


def _memory(found: Forecast) -> Table:
    largest = max(memory.total for memory in found.memory.values())
    unit, size = ("GiB", GIB) if largest >= SMALL * GIB else ("MiB", GIB / 1024)
    table = Table(f"{unit} on one GPU", "weights", "adapter", "activations", "working", "total")
    for stage, memory in found.memory.items():
        parts = (memory.weights, memory.lora, memory.activations, memory.working, memory.total)
        table.add_row(NAMES[stage], *(f"{part / size:.3g}" for part in parts))
    return table


def _disk(found: Forecast) -> Table:
    keep, cache = found.config.checkpoint.keep, found.config.model.feature_cache
    all_of_them = "all kept" if keep is None else f"{keep} kept, {in_bytes(keep * found.checkpoint_bytes)}"
    rows = {
        "one checkpoint": f"{in_bytes(found.checkpoint_bytes)}; {all_of_them}",
        f"image features, {'if they are cached' if cache is None else 'in ' + str(cache)}": in_bytes(found.feature_bytes),
    }
    return _table("disk", rows)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title, "")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table
