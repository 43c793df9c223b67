"""What the panels at the start and at the end of a run say."""

from collections.abc import Mapping
from pathlib import Path

import torch

from vl_dist.config import keys, plain, value_at
from vl_dist.data.assign import assign
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Plan
from vl_dist.run.distributed import Ranks
from vl_dist.run.metrics import read_metrics, scores_of
from vl_dist.settings import Config

LEFT_OUT = ("bleu1", "bleu2", "bleu3")
ELSEWHERE = ("model.path", "run.output_dir", "lora.r", "lora.target_modules")  # rows of their own say them


def resolved(setting: str, value: str) -> str:
    """A setting's value, and what it was asked to be where it found out itself."""
    return f"{value} (auto)" if setting == "auto" else value


def describe_plan(config: Config, plan: Plan, lengths: Lengths, ranks: Ranks, *, first_step: int) -> str:
    """Steps, and what is in them."""
    epochs = " or ".join(f"{n:,}" for n in sorted(set(plan.steps_per_epoch)))
    text = f"{plan.num_steps:,} steps of {plan.examples_per_step:,} examples, {epochs} an epoch"
    cap = config.batch.max_tokens_per_pack
    step = next(plan.steps(first_step), None)
    if step is not None:
        packs = assign(step, lengths, world_size=ranks.world_size, max_tokens=cap).num_packs_per_rank
        each = " a rank" if ranks.world_size > 1 else ""
        text += f"; step {first_step + 1:,} has {packs} pack{'s' if packs != 1 else ''}{each} of at most {cap:,} tokens"
    return f"{text}; {first_step:,} are done" if first_step else text


def describe_devices(ranks: Ranks) -> str:
    """How many of what."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    if ranks.device.type != "cpu":
        return f"{ranks.world_size} x {name}"
    threads = torch.get_num_threads()
    return f"{ranks.world_size} x {name}, {threads} thread{'s' if threads > 1 else ''} each"


def describe_settings(config: Config) -> str:
    """Settings that differ from their defaults, a line for each section; those that other rows say are left out."""
    lines: dict[str, list[str]] = {}
    for key in keys():
        section, name = key.path.split(".")
        value = plain(value_at(config, key.path))
        if getattr(config, section) is None or key.path in ELSEWHERE or value == plain(key.default):
            continue
        lines.setdefault(section, []).append(f"{name}={'null' if value is None else value}")
    return "\n".join(f"{section}: {', '.join(items)}" for section, items in lines.items())


def in_a_line(scores: Mapping[str, float]) -> str:
    """Scores as a person reads them; those of BLEU's lower orders are in metrics.jsonl."""
    names = {column: column.removeprefix("eval/") for column in scores}
    return "  ".join(f"{names[column]} {value:.4f}" for column, value in scores.items() if names[column] not in LEFT_OUT)


def best_score(output_dir: Path, metric: str) -> str | None:
    """The best evaluated checkpoint by a metric, its value and its step; None where nothing was evaluated."""
    best = output_dir / "checkpoints" / "best"
    if not best.is_symlink():
        return None
    step = int(best.resolve().name.removeprefix("step-"))
    rows = [row for row in read_metrics(output_dir) if row["step"] == step and scores_of(row)]
    return f"{metric} {rows[-1][f'eval/{metric}']:.4f} at step {step:,}" if rows else None


def next_commands(output_dir: Path) -> list[str]:
    """What one types after a run."""
    return [
        f"python -m vl_dist predict {output_dir / 'adapter'} IMAGE",
        f"python -m vl_dist report {output_dir}",
    ]
