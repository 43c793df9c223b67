"""One workload on disk and in memory, and this project's step over it in the forms that the benchmark compares."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.loading import SHAPE
from benchmarks.tutorial import TutorialSettings
from benchmarks.workloads import END_TOKEN, Workload, make_model
from train import train_step
from vl_dist.data.assign import assign
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.features import FeatureReader
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.pictures import image_keys
from vl_dist.data.plan import Step
from vl_dist.model.attention import resolve_backend
from vl_dist.model.features import feature_space
from vl_dist.model.last_layer import pass_last_layer
from vl_dist.model.load import load_base, load_processor
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.checkpoint import save_adapter
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.run.features import FeatureFill
from vl_dist.run.freed_memory import keep_freed_memory
from vl_dist.settings import LoraSettings, OptimConfig

Gradient = dict[str, torch.Tensor]  # by the parameter's name in the PEFT model
Steps = Callable[[], Iterator[list[Batch]]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train on the same examples."""

    name: str
    begin: Callable[[], Callable[[], None]]  # what is not timed; gives what is: all examples once
    gradient: Callable[[], Gradient]  # of the mean loss per target over the first examples, without dropout
    examples_per_step: int
    notes: str = ""


class Task:
    """A workload's files, and this project's model, collator and engine."""

    def __init__(self, home: Path, workload: Workload, *, on_gpu: bool) -> None:
        """
        Args:
            home: has the workload's photographs; gets model and adapter.
            on_gpu: the 2B in bfloat16 with rank 64; else the workload's own model in float32 with rank 16.
        """
        keep_freed_memory()  # as training does at its start; here the other ways gain from it too
        self.home, self.workload = home, workload
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        make_model(home / "model", workload, on_gpu=on_gpu)
        self.ranks = Ranks(Accelerator())
        rank = 64 if on_gpu else 16
        backend = resolve_backend("auto", self.ranks.device.type, self.dtype, branches=True)
        base = load_base(home / "model", self.dtype, backend)
        self.model = PackedModel(attach_lora(base, LoraSettings(r=rank), seed=0), backend).to(self.ranks.device)
        with torch.no_grad():
            for parameter in self.model.lora_parameters.values():
                parameter.normal_(0.0, 0.02)
        save_adapter(self.model.peft_model, home / "start")
        self.processor = load_processor(home / "model")
        encoder = Encoder(self.processor, merge_size=SHAPE.merge_size, end_token=END_TOKEN)
        image_processor, budget = self.processor.image_processor, workload.budget
        self.collator = Collator(encoder, image_processor, roots=[home], budget=budget, shape=SHAPE)
        self.engine = PlainEngine(self.model, self.ranks, OptimConfig())
        self.lengths = measure(workload.examples, encoder, HeaderReader(home, budget, SHAPE))
        self.settings = TutorialSettings(
            model_dir=home / "model", data=home / "data_vl.json", output_dir=home / "out", dtype=self.dtype,
            num_held_out=0, lora_r=rank, start_from=home / "start", shuffle=False, num_epochs=1,
        )  # fmt: skip

    def way(self, name: str, steps: Steps, *, examples_per_step: int, all_rows: bool = False) -> Way:
        """This project's step over packs.

        Args:
            all_rows: the last layer computes rows that predict no target, too.
        """
        run: Any = SimpleNamespace(ranks=self.ranks, engine=self.engine)

        def train() -> None:
            self.model.train()
            self.engine.set_lr(1e-4)
            for packs in steps():
                losses, _ = train_step(packs, run)
            losses.sum().item()  # until the device is done

        def begin() -> Callable[[], None]:
            Accelerator()  # a Trainer's arguments empty the state that all Accelerators share
            self._choose_last_layer(all_rows=all_rows)
            return train

        def gradient() -> Gradient:
            self._choose_last_layer(all_rows=all_rows)
            return self.gradient(steps)

        return Way(name, begin, gradient, examples_per_step)

    def _choose_last_layer(self, *, all_rows: bool) -> None:
        layer = self.model.peft_model.get_base_model().model.language_model.layers[-1]

        def pass_all(hidden: torch.Tensor, *, target_rows: torch.Tensor, **others: Any) -> torch.Tensor:
            passed: torch.Tensor = type(layer).forward(layer, hidden, **others)
            return passed.index_select(1, target_rows)

        layer.forward = pass_all if all_rows else partial(pass_last_layer, layer)

    def gradient(self, steps: Steps) -> Gradient:
        """Of the mean loss over the first examples, which must be the first packs'."""
        self.model.eval()
        num_targets, found, left = 0, {}, self.workload.num_compared
        for packs in steps():
            for pack in packs:
                if left > 0:
                    self.model(pack.to(self.ranks.device)).backward()
                    num_targets, left = num_targets + pack.num_targets, left - len(pack.example_ids)
        assert left == 0, "other examples than the first"
        for key, parameter in self.model.lora_parameters.items():
            assert parameter.grad is not None
            found[key] = parameter.grad / num_targets
            parameter.grad = None
        return found

    def packs_of(self, size: int, per_step: int) -> Steps:
        """Steps of some packs, each of so many neighbouring examples."""
        examples = self.workload.examples

        def steps() -> Iterator[list[Batch]]:
            for start in range(0, len(examples), size * per_step):
                chosen = examples[start : start + size * per_step]
                yield [self.collator.pack(chosen[n : n + size]) for n in range(0, len(chosen), size)]

        return steps

    def caching(self) -> Collator:
        """A collator that reads every image's features from a cache, which is filled here, as `vl_dist cache` does."""
        space = feature_space(self.model, self.processor.image_processor)
        directory = self.home / "features" / space.key
        directory.mkdir(parents=True)
        reader = FeatureReader(directory, width=space.width, dtype=space.dtype)
        collator, warned = self.collator.reading(reader), list[str]()
        keys = dict.fromkeys(key for example in self.workload.examples for key in image_keys(example))
        with FeatureFill(directory, warned.append) as fill:
            self.model.keep_features = fill
            for key in keys:
                self.model.encode_only(collator.pack_images([key]).to(self.ranks.device))
            self.model.keep_features = None
        assert not warned and collator.pack_images(list(keys)).num_encoded_images == 0, f"not cached: {warned}"
        return collator

    def planned(self, collator: Collator | None = None) -> Steps:
        """Steps of the workload's number of examples, cut into packs as training cuts them.

        Args:
            collator: another one than the task's.
        """
        workload, examples, collator = self.workload, self.workload.examples, collator or self.collator

        def steps() -> Iterator[list[Batch]]:
            for number, start in enumerate(range(0, len(examples), workload.examples_per_step)):
                chosen = np.arange(start, min(start + workload.examples_per_step, len(examples)))
                step = Step(number, 0, chosen, ends_epoch=False)
                (packs,) = assign(step, self.lengths, world_size=1, max_tokens=workload.pack_tokens).packs
                yield [collator.pack([examples[n] for n in pack.examples]) for pack in packs]

        return steps

    def shared(self, collator: Collator | None = None) -> Steps:
        """Steps of one pack of whole groups, each encoded once; as `planned`."""
        groups, chosen = self.workload.groups, collator or self.collator
        per_step = self.workload.examples_per_step // len(groups[0])
        return lambda: (
            [chosen.pack_documents(groups[start : start + per_step])] for start in range(0, len(groups), per_step)
        )


def differences(ways: Sequence[Way]) -> list[float]:
    """Of each way's gradient from the first one's, relative to the largest entry of each tensor; the worst tensor."""
    wanted = ways[0].gradient()
    found = []
    for way in ways:
        gradient = wanted if way.gradient == ways[0].gradient else way.gradient()  # another batch of the same loop
        assert gradient.keys() == wanted.keys(), way.name
        found.append(max(float((gradient[n] - t).abs().max() / t.abs().max()) for n, t in wanted.items()))
    return found
