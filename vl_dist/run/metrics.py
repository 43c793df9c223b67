"""The record of a run: metrics.jsonl and ledger.jsonl, and the sums that a row is made of."""

import json
import resource
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vl_dist.data.collate import Batch
from vl_dist.data.examples import ids_of
from vl_dist.data.lengths import Dropped
from vl_dist.data.loader import LoadedData
from vl_dist.data.plan import Plan, Step
from vl_dist.data.record_files import BadRow
from vl_dist.data.validate import BAD_ROWS
from vl_dist.model.compilation import num_compilations
from vl_dist.model.flops import FlopCounter
from vl_dist.run.distributed import Ranks
from vl_dist.run.files import LEDGER, METRICS


class JsonLines:
    """A file of one JSON object a line, written at once so that a kill loses no row."""

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        """
        Args:
            path: made if it is not there.
            keep_to_step: rows of later steps are cut: training repeats them.
        """
        kept = [line for line in _complete_lines(path) if json.loads(line).get("step", 0) <= keep_to_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._path = path

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in _complete_lines(self._path)]

    def replace_last(self, row: dict[str, Any]) -> None:
        """Another row in place of the last one."""
        lines = [*list(_complete_lines(self._path))[:-1], json.dumps(row, ensure_ascii=False)]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(self._path)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        with self._path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _complete_lines(path: Path) -> Iterable[str]:
    if not path.is_file():
        return []
    # A kill can cut the last row; what has no line end is not a row.
    return [line for line in path.read_text().split("\n")[:-1] if line]


class Record:
    """metrics.jsonl, ledger.jsonl and bad_rows.jsonl of one run. Does nothing on ranks other than 0."""

    def __init__(self, directory: Path, *, is_main: bool, keep_to_step: int, data: LoadedData, plan: Plan) -> None:
        """
        Args:
            directory: the run's output directory, made already, with bad_rows.jsonl in it.
            keep_to_step: the step that training goes on from.
            data: the training examples, for their ids and targets.
            plan: how often an epoch should have each of them.
        """
        self._is_main = is_main
        self._data = data
        self._plan = plan
        self._directory = directory
        if is_main:
            self._metrics = JsonLines(directory / METRICS, keep_to_step=keep_to_step)
            self._ledger = JsonLines(directory / LEDGER, keep_to_step=keep_to_step)

    def dropped(self, examples: Sequence[Dropped], *, step: int) -> None:
        """Examples that a step, or where it is 0 any step, will not have; those written before are not repeated."""
        if self._is_main and examples:
            # Rows of later steps than the one that training goes on from were cut: only those of step 0 can be there.
            written = {row.get("dropped") for row in self._ledger.rows() if row["step"] == 0} if step == 0 else set()
            for one in examples:
                if one.id not in written:
                    self._ledger.write({"step": step, "dropped": one.id, "reason": one.reason})

    def dropped_while_training(self) -> list[Dropped]:
        """What the ledger says of steps up to where training goes on. Main process only."""
        rows = [row for row in self._ledger.rows() if row["step"] > 0 and "dropped" in row]
        return [Dropped(row["dropped"], row["reason"]) for row in rows]

    def bad(self, examples: Iterable[Dropped]) -> None:
        """Examples found unusable while training, once each in bad_rows.jsonl."""
        if self._is_main:
            with (self._directory / BAD_ROWS).open("a", encoding="utf-8") as file:
                for one in examples:
                    row = BadRow(one.id, "while training", one.reason)
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        if self._is_main:
            self._metrics.write(row)

    def row(self, step: int) -> dict[str, Any] | None:
        """The row of metrics.jsonl of the step that training goes on from; None if it has none. Main process only."""
        rows = self._metrics.rows()
        return rows[-1] if rows and rows[-1]["step"] == step else None

    def complete(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl, in place of the one of the same step if there is one."""
        if not self._is_main:
            return
        if self.row(row["step"]) is not None:
            self._metrics.replace_last(row)
        else:
            self._metrics.write(row)

    def ledger(self, step: Step, dropped: Sequence[Dropped], *, skipped: str | None = None) -> None:
        """Which examples made a step, over all ranks; after an epoch's last one, whether each example was where planned.

        Args:
            dropped: examples of the step that it went without.
            skipped: why the step was not taken at all.
        """
        if not self._is_main:
            return
        self.dropped(dropped, step=step.number + 1)
        gone = {one.id for one in dropped}
        chosen = [(self._data.examples[n].id, n) for n in step.examples.tolist()]
        kept = [(name, n) for name, n in chosen if name not in gone]
        targets = int(self._data.lengths.targets[[n for _, n in kept]].sum())
        ids = [name for name, _ in kept]
        trained = {"ids": ids, "targets": targets} if skipped is None else {"ids": [], "targets": 0}
        left_out = {} if skipped is None else {"skipped": ids, "reason": skipped}
        self._ledger.write({"step": step.number + 1, "epoch": step.epoch, **trained, **left_out})
        if step.ends_epoch:
            self._ledger.write({"step": step.number + 1, "epoch": step.epoch, **self._coverage(step.epoch)})

    def _coverage(self, epoch: int) -> dict[str, Any]:
        """What the ledger on disk says of an epoch: examples, those in as many steps as planned, the ids of the others."""
        times: Counter[str] = Counter()
        for row in self._ledger.rows():
            times.update(row.get("ids", ()) if row.get("epoch") == epoch else ())
        names, wanted = ids_of(self._data.examples), self._plan.times(epoch).tolist()
        as_planned = sum(times[name] == count for name, count in zip(names, wanted, strict=True))
        missing = [name for name, count in zip(names, wanted, strict=True) if times[name] < count]
        repeated = [name for name, count in zip(names, wanted, strict=True) if times[name] > count]
        return {"examples": len(names), "as_planned": as_planned, "missing": missing, "repeated": repeated}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All complete rows of a run's metrics.jsonl; none if there is no such file."""
    return [json.loads(line) for line in _complete_lines(directory / METRICS)]


def scores_of(row: dict[str, Any]) -> dict[str, float]:
    """The columns `eval/...` of a row of metrics.jsonl."""
    return {name: value for name, value in row.items() if name.startswith("eval/")}


class Meter:
    """Sums since the last row. Device values stay on the device until a row is due."""

    def __init__(self, ranks: Ranks, flops: FlopCounter, *, peak_flops: float | None, compiled: bool = False) -> None:
        """
        Args:
            flops: counts the useful operations of a pack.
            peak_flops: operations a second of one device at best; None: not known, or a CPU.
            compiled: rows say how many graphs were compiled on this rank (`run.compile`).
        """
        self._compiled = compiled
        self._ranks = ranks
        self._flops = flops
        self._peak_flops = peak_flops
        self.start()

    def start(self) -> None:
        """Begins a row now."""
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        self._grad_norm: torch.Tensor | None = None
        self._skipped = 0
        self._examples = self._images = self._tokens = self._padding = self._targets = self._patches = 0
        self._useful_flops = 0.0
        self._data_wait_s = 0.0
        self._compilations = num_compilations() if self._compiled else 0
        self._started = time.perf_counter()

    def add(self, packs: Sequence[Batch], losses: torch.Tensor, grad_norm: torch.Tensor | None, data_wait_s: float) -> None:
        """One step of this rank.

        Args:
            packs: this rank's.
            losses: [packs] on the device, each summed over its pack's targets.
            grad_norm: scalar on the device, before clipping; None: the step was skipped, and counts for nothing but time.
            data_wait_s: seconds the step waited for the loader.
        """
        self._data_wait_s += data_wait_s
        if grad_norm is None:
            self._skipped += 1
            return
        self._loss_sum = self._loss_sum + losses.sum()
        self._grad_norm = grad_norm
        for pack in packs:
            self._examples += len(pack.example_ids)
            self._images += pack.num_images
            self._tokens += pack.num_tokens
            self._padding += pack.num_padding
            self._targets += pack.num_targets
            self._patches += pack.num_patches
            self._useful_flops += sum(self._flops.document(d.trunk, d.branches) for d in pack.documents)
            self._useful_flops += sum(self._flops.image(patches) for patches in pack.image_patches)
            self._useful_flops += self._flops.targets_head(pack.num_targets)

    def row(self) -> dict[str, Any]:
        """The columns of metrics.jsonl since the last row, over all ranks; starts the next one (all ranks)."""
        counts = [
            self._examples,
            self._images,
            self._tokens,
            self._padding,
            self._targets,
            self._patches,
            self._useful_flops,
        ]
        sums = torch.tensor([*counts, 0.0], dtype=torch.float64, device=self._ranks.device)
        sums[-1] = self._loss_sum
        examples, images, tokens, padding, targets, patches, flops, loss = self._ranks.sum(sums).tolist()
        seconds = time.perf_counter() - self._started
        trained = self._grad_norm is not None  # false: every step was skipped
        row = {
            "train/loss": loss / max(1.0, targets) if trained else None,
            "train/grad_norm": float(self._grad_norm) if self._grad_norm is not None else None,
            "train/target_tokens": int(targets),
            "train/skipped_steps": self._skipped,
            "perf/examples_per_s": examples / seconds,
            "perf/images_per_s": images / seconds,
            "perf/target_tokens_per_s": targets / seconds,
            "perf/tokens_per_s": (tokens - padding) / seconds,
            "perf/patches_per_s": patches / seconds,
            "perf/mfu": None if self._peak_flops is None else flops / seconds / (self._peak_flops * self._ranks.world_size),
            "perf/padding": padding / max(1.0, tokens),
            "perf/data_wait_s": self._data_wait_s,
            "perf/peak_memory_gib": peak_memory_gib(self._ranks.device),
        }
        if self._compiled:
            row["perf/recompiles"] = num_compilations() - self._compilations
        self.start()
        return row


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on a CUDA device, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
