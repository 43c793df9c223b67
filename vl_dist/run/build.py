"""From settings to the objects that the loop uses: data, then model, each checked before the next is paid for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vl_dist.data.assemble import RunData, assemble
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape
from vl_dist.data.index import Indexer
from vl_dist.data.validate import Progress, record_paths
from vl_dist.errors import SharedError
from vl_dist.evaluate.held_out import read_frequency
from vl_dist.evaluate.scores import DocumentFrequency
from vl_dist.model.attention import resolve_backend
from vl_dist.model.hub import find_model
from vl_dist.model.load import load_base, refuse_quantize, resolve_dtype
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.settings import Config, EvalConfig
from vl_dist.shapes import make_shapes

SECONDS_TO_LET_MAIN_BEGIN = 2.0  # so that the process with a console is the one that shows how measuring goes


def model_directory(config: Config, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """Where the model's files are; the embedded default's are made if need be (all ranks)."""
    if config.shapes is not None:
        shapes = config.shapes
        made = ranks.on_main(lambda: make_shapes(shapes))
        if made is not None:
            say(made)
    return ranks.on_main(lambda: find_model(config.model))


def load_data(config: Config, processor: Any, shape: PatchShape, ranks: Ranks, on_progress: Progress) -> RunData:
    """Reads and measures all records; no image is decoded (all ranks; one builds what is not cached yet, for all).

    Args:
        on_progress: called where something is built, on any rank.

    Raises:
        UserError: as `assemble`, or ranks found different records.
    """
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=config.data.end_token)
    indexer = Indexer(processor, encoder, shape, config.data)
    yield_s = 0.0 if ranks.is_main else SECONDS_TO_LET_MAIN_BEGIN

    def load() -> RunData:
        paths = record_paths(config.data)
        files = [indexer.open(path, on_progress=on_progress, yield_s=yield_s) for path in paths]
        return assemble(config, files, encoder, processor.image_processor, shape)

    found = ranks.each(load)
    if len(set(ranks.gather([found.train.fingerprint]))) > 1:
        raise SharedError(
            "Ranks found different training examples: their record files or images differ, or changed while they were "
            "read. Put data.train and its images on a file system that all nodes share, and start again."
        )
    return found


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
        UserError: weights, targets, precision or attention that cannot be used.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.model.quantize is not None:
        refuse_quantize(device)
    dtype = resolve_dtype(config.model.dtype, device.type, bf16_supported=bf16)
    backend = resolve_backend(config.model.attention, device.type, dtype, branches=config.data.share_prefix)
    base = load_base(directory, dtype, backend, four_bits_on=None if config.model.quantize is None else device)
    model = PackedModel(
        attach_lora(base, config.lora, seed=config.run.seed),
        backend,
        recompute=config.model.recompute or "none",
        compiled=config.run.compile,
        num_lengths=config.batch.pack_lengths,
    )
    return model.to(device)
