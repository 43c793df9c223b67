"""From settings to the objects that the loop uses: data, then model, each checked before the next is paid for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape
from vl_dist.data.lengths import Dropped, HeaderReader, fit
from vl_dist.data.loader import LoadedData
from vl_dist.data.record_files import BadRow
from vl_dist.data.records import examples_of
from vl_dist.data.validate import ScannedFile, Split, image_limits, pixel_budget, refuse_too_many_bad, scan, splits
from vl_dist.errors import UserError
from vl_dist.evaluate.held_out import read_frequency
from vl_dist.evaluate.scores import DocumentFrequency
from vl_dist.model.attention import resolve_backend
from vl_dist.model.load import attach_lora, load_base, resolve_dtype
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.settings import Config, EvalConfig


@dataclass(frozen=True, slots=True)
class RunData:
    """Training and held-out examples with their sizes, and what was left out of both."""

    train: LoadedData
    held_out: LoadedData | None
    bad: tuple[BadRow, ...]  # as bad_rows.jsonl has them, dropped examples of both included
    dropped: tuple[Dropped, ...]  # training examples that no pack holds


def load_data(config: Config, processor: Any, shape: PatchShape, ranks: Ranks) -> RunData:
    """Reads and measures all records; no image is decoded (all ranks; the main process reads for all).

    Raises:
        UserError: nothing to train on, too many records that cannot be used, or an example longer than a pack.
    """
    data = config.data

    def scanned() -> tuple[ScannedFile, ...]:
        files = scan(data, shape)
        refuse_too_many_bad(files, data.max_bad_fraction)
        return files

    files = ranks.on_main(scanned)  # so that ranks cannot disagree about a file that comes or goes meanwhile
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=data.end_token)
    train_split, held_out_split = splits(files, data.eval)
    train, dropped = _loaded(train_split, config, encoder, processor.image_processor, shape)
    bad = [*(row for file in files for row in file.bad), *_rows_of(dropped, train_split)]
    held_out = None
    if held_out_split is not None:
        held_out, also_dropped = _loaded(held_out_split, config, encoder, processor.image_processor, shape)
        bad += _rows_of(also_dropped, held_out_split)
    return RunData(train, held_out, tuple(bad), dropped)


def _loaded(
    split: Split, config: Config, encoder: Encoder, image_processor: Any, shape: PatchShape
) -> tuple[LoadedData, tuple[Dropped, ...]]:
    budget, limits, root = pixel_budget(config.data), image_limits(config.data), split.file.root
    headers = HeaderReader(root, budget, shape, limits, sizes=split.file.sizes)
    fitted = fit(
        examples_of(split.records),
        encoder,
        headers,
        max_tokens=config.batch.max_tokens_per_pack,
        overflow=config.data.overflow,
    )
    if not fitted.examples:
        raise UserError(
            f"No example of {split.file.path} fits into a pack; the first {fitted.dropped[0].reason}. Raise "
            "batch.max_tokens_per_pack or make images smaller (data.max_pixels)."
        )
    collator = Collator(encoder, image_processor, root=root, budget=budget, shape=shape, limits=limits)
    return LoadedData(fitted.examples, fitted.lengths, collator), fitted.dropped


def _rows_of(dropped: Sequence[Dropped], split: Split) -> list[BadRow]:
    """Dropped examples as rows of bad_rows.jsonl, with the place of their record."""
    places = {example.id: record.place for record in split.records for example in examples_of([record])} if dropped else {}
    return [BadRow(one.id, places[one.id], one.reason) for one in dropped]


def load_frequency(settings: EvalConfig, ranks: Ranks) -> DocumentFrequency | None:
    """How rare n-grams are in `eval.cider_corpus`, on the main process, which scores; None elsewhere and without one.

    Raises:
        UserError: the file is not there, or not a record file (all ranks).
    """
    found: list[DocumentFrequency] = []
    path = settings.cider_corpus
    if path is not None:
        ranks.on_main(lambda: found.append(read_frequency(path)))
    return found[0] if found else None


def load_model(config: Config, directory: Path, device: torch.device) -> PackedModel:
    """Base and adapter on their device, ready to be wrapped.

    Raises:
        UserError: weights, targets or precision that cannot be used.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = resolve_dtype(config.model.dtype, device.type, bf16_supported=bf16)
    backend = resolve_backend(config.model.attention)
    base = load_base(directory, dtype, backend)
    return PackedModel(attach_lora(base, config.lora, seed=config.run.seed), backend).to(device)
