"""Whether an adapter loads and computes what it did when it was made, and whether vLLM can serve it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from vl_dist.adapter import vllm
from vl_dist.adapter.contract import read_contract
from vl_dist.adapter.load import STEPS, LoadedAdapter, load
from vl_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    holds: bool | None  # None: not reached, because one before does not hold
    found: str


@dataclass(frozen=True, slots=True)
class Report:
    """All checks, and how to serve the adapter if all hold."""

    checks: tuple[Check, ...]
    serving: str | None
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> list[str]:
        """What does not hold."""
        return [check.found for check in self.checks if check.holds is False]


def check_adapter(directory: Path, *, base_dir: Path | None, device: torch.device | None = None) -> Report:
    """Every check, from the cheapest to the dearest; after one of the adapter itself that fails, no other is reached.

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        read_contract(directory)  # says so; there is nothing to make a table of
    checks: list[Check] = []
    try:
        adapter = load(
            directory,
            base_dir=base_dir,
            device=device,
            on_step=lambda name, found: checks.append(Check(name, True, found)),
        )
    except UserError as error:
        failed, *unreached = [*STEPS, "vLLM"][len(checks) :]
        checks.append(Check(failed, False, str(error)))
        checks += [Check(name, None, "not reached") for name in unreached]
        return Report(tuple(checks), None)
    return _with_vllm(adapter, checks)


def _with_vllm(adapter: LoadedAdapter, checks: list[Check]) -> Report:
    settings = json.loads((adapter.directory / "adapter_config.json").read_text())
    with safe_open(adapter.directory / "adapter_model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    obstacles = vllm.obstacles(settings, names)
    if obstacles:
        advice = "python -m vl_dist merge makes a model that it serves without LoRA."
        fault = f"vLLM cannot serve this adapter: {'; '.join(obstacles)}. {advice}"
        return Report((*checks, Check("vLLM", False, fault)), None)
    found = f"rank {settings['r']} needs --max-lora-rank {vllm.max_rank(settings['r'])}; every layer can be served"
    checks.append(Check("vLLM", True, found))
    return Report(tuple(checks), vllm.serving_command(adapter, settings, names), tuple(vllm.notes(adapter, names)))
