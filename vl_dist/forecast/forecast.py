"""All that can be said of a run from its settings, its records and the model's small files."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vl_dist.data.assemble import RunData, assemble
from vl_dist.data.encode import Encoder
from vl_dist.data.examples import Examples
from vl_dist.data.index import Indexer
from vl_dist.data.plan import Plan
from vl_dist.data.validate import Progress, record_paths
from vl_dist.forecast.memory import FLOAT32, ZERO_STAGES, PackSize, RankMemory, Training, lora_parameters, predict_memory
from vl_dist.forecast.steps import StepFigures, measure_steps
from vl_dist.model.flops import FlopCounter, LoraSize, ModelShape, read_shape
from vl_dist.model.hub import find_model
from vl_dist.model.load import load_processor, patch_shape
from vl_dist.model.targets import Targets, choose_targets, linear_layers, lora_size
from vl_dist.settings import Config
from vl_dist.shapes import make_shapes

BASE_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}  # of a frozen weight; `auto` as on CUDA


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run before it is started."""

    config: Config
    world_size: int
    made: str | None  # of the embedded default's data, if any was
    data: RunData
    plan: Plan
    figures: StepFigures
    memory: dict[int, RankMemory]  # by ZeRO stage; 0: plain data parallel
    checkpoint_bytes: int  # of one checkpoint
    feature_bytes: int  # of all image features, once for each distinct prompt about the same images
    notes: tuple[str, ...]  # what the figures leave out


def make_forecast(config: Config, *, world_size: int, on_progress: Progress) -> Forecast:
    """Reads and measures the records as training does, and predicts the rest.

    Args:
        world_size: processes, one for each GPU.
        on_progress: called while records are measured.

    Raises:
        UserError: as training would, but for what only the weights can show.
    """
    made = make_shapes(config.shapes) if config.shapes is not None else None
    model_dir = find_model(config.model, weights=False)
    processor = load_processor(model_dir)
    shape = patch_shape(model_dir, processor)
    encoder = Encoder(processor, merge_size=shape.merge_size, end_token=config.data.end_token)
    indexer = Indexer(processor, encoder, shape, config.data)
    files = [indexer.open(path, on_progress=on_progress) for path in record_paths(config.data)]
    data = assemble(config, files, encoder, processor.image_processor, shape)
    plan, model = data.plan(config), read_shape(model_dir)
    adapter, targets = lora_size(model, config.lora), choose_targets(config.lora, linear_layers(model))
    figures = measure_steps(
        plan,
        data.train.lengths,
        FlopCounter(model, adapter),
        world_size=world_size,
        max_tokens=config.batch.max_tokens_per_pack,
        num_pack_lengths=config.batch.pack_lengths,
    )
    training = _training(config, targets)
    return Forecast(
        config=config,
        world_size=world_size,
        made=made,
        data=data,
        plan=plan,
        figures=figures,
        memory={
            stage: _memory(model, training, adapter, figures.largest, world_size=world_size, zero_stage=stage)
            for stage in ZERO_STAGES
        },
        checkpoint_bytes=3 * FLOAT32 * adapter.total,
        feature_bytes=_distinct_image_tokens(data, model) * model.hidden * training.base_bytes,
        notes=tuple(_notes(config)),
    )


def _training(config: Config, targets: Targets) -> Training:
    """What of the settings decides on memory."""
    return Training(
        rank=config.lora.r,
        targets=tuple({name.rsplit(".", 1)[-1]: None for name in targets.layers["language model"]}),
        has_dropout=config.lora.dropout > 0,
        base_bytes=BASE_BYTES[config.model.dtype],
        eager=config.model.attention == "eager",
        recompute=config.model.recompute or "none",
    )


def _memory(
    model: ModelShape, training: Training, adapter: LoraSize, pack: PackSize, *, world_size: int, zero_stage: int
) -> RankMemory:
    """As `predict_memory`, with the adapter's true size: it may be on some layers only, and in the tower."""
    found = predict_memory(model, training, pack, world_size=world_size, zero_stage=zero_stage)
    everywhere = replace(training, targets=tuple(model.linear_sizes))
    whole = predict_memory(model, everywhere, pack, world_size=world_size, zero_stage=zero_stage)
    return replace(found, lora=whole.lora * adapter.total / lora_parameters(model, training.rank, everywhere.targets))


def _notes(config: Config) -> Iterator[str]:
    if config.lora.tower or config.lora.merger:
        yield "memory of activations in the tower and the merger, which train, is not predicted"
    if config.model.quantize is not None:
        yield "weights are predicted as if they were not in 4 bits"


def _distinct_image_tokens(data: RunData, model: ModelShape) -> int:
    examples = data.train.examples
    assert isinstance(examples, Examples)
    _, first = np.unique(examples.trunks(), return_index=True)
    return int(data.train.lengths.patches[first].sum()) // model.merged_patches
