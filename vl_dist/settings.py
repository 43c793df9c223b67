"""Every setting of a run, as one frozen tree: its type, unit, default and meaning. `vl_dist.config` reads it from files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    TargetModules = tuple[str, ...] | str
else:
    TargetModules = Any  # OmegaConf knows no "list or text"; `vl_dist.config` checks it


def key(default: Any, meaning: str, unit: str = "", *, trains: bool = True) -> Any:
    """A setting. `trains` says that another value would train something else, so that a run cannot go on with it."""
    metadata = {"meaning": meaning, "unit": unit, "trains": trains}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesConfig:
    """The embedded default's drawings and tiny model, made on the spot."""

    dir: Path = key(Path("data/shapes"), "where the drawings, records and the tiny model are made")
    seed: int = key(0, "seed of the drawings and of the tiny model's random weights")
    num_train: int = key(720, "drawings to train on, five captions each", "images")
    num_eval: int = key(144, "drawings held out", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model and how it computes."""

    path: str = key("Qwen/Qwen2-VL-2B-Instruct", "a directory, or the model's name on the hub")
    hub: Literal["local", "modelscope", "huggingface"] = key("local", "where the model comes from", trains=False)
    revision: str | None = key(None, "revision on the hub; null: the hub's default branch")
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "precision of the base weights; auto: bfloat16 on CUDA, float32 on a CPU (LoRA is always float32)"
    )
    attention: Literal["auto", "varlen", "flex", "sdpa", "eager"] = key(
        "auto",
        "attention of the language model; auto: on CUDA varlen, or flex where data.share_prefix asks for more, else sdpa, "
        "document by document; eager: one dense mask over a pack",
        trains=False,
    )
    feature_cache: Path | None = key(
        None,
        "folder that keeps what the frozen vision tower makes of each image, filled while training or ahead by "
        "`python -m vl_dist cache`; null: images go through the tower in every step",
        trains=False,
    )
    quantize: Literal["4bit"] | None = key(
        None,
        "4bit: the language model's frozen linear layers in 4 bits (NF4, by bitsandbytes; CUDA only); null: as model.dtype",
    )
    recompute: str | None = key(
        "none",
        "layers that keep their input alone and run again in the backward, to save memory for a third more time: none, "
        "all, or every_N (every_2: each second layer); null: none",
        trains=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter."""

    r: int = key(64, "rank of the update", "dimensions")
    alpha: float = key(16.0, "the update is scaled by alpha / r")
    rslora: bool = key(False, "the update is scaled by alpha / sqrt(r) instead")
    dora: bool = key(False, "DoRA: each output's magnitude is trained apart from its direction; not under ZeRO 3")
    dropout: float = key(0.05, "dropout on the input of the update", "probability")
    target_modules: TargetModules = key(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "linear layers that get an update: a list of names (a layer's last name, or the end of its path), or one text, a "
        "regular expression for the whole path (model.language_model.layers.0.self_attn.q_proj)",
    )
    tower: bool = key(
        False, "lora.target_modules reaches the vision tower too (its layers: qkv, proj, fc1, fc2); false: never"
    )
    merger: bool = key(False, "lora.target_modules reaches the merger too (its layers: mlp.0, mlp.2); false: never")
    init_lora_weights: str = key(
        "default", "fresh weights: default (A Kaiming uniform, B zero), gaussian (A normal, B zero), orthogonal (B A zero)"
    )
    init_from: Path | None = key(None, "adapter directory to start from; null: fresh weights, by lora.init_lora_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFile:
    """One file of training records."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which records, and how they become tokens and patches."""

    train: tuple[TrainFile, ...] = key(
        (TrainFile(path=Path("data_vl.json")),),
        "training records: a file (records.jsonl, or the tutorial's data_vl.json), or several; weight: how often an epoch "
        "has the file's examples, a fraction meaning so many of them, others each epoch",
    )
    eval: str | None = key(None, "held-out records: a file, or last:N of the training records; null: train on every record")
    image_root: Path | None = key(None, "image paths are relative to this folder; null: the record file's folder")
    resized_height: int | None = key(None, "every image is resized to this height", "pixels")
    resized_width: int | None = key(None, "every image is resized to this width", "pixels")
    min_pixels: int | None = key(None, "smaller images are enlarged to this area; null: 3,136", "pixels")
    max_pixels: int | None = key(None, "larger images are shrunk to this area; null: 12,845,056", "pixels")
    prompt: str = key("COCO Yes:", "prompt after the image, for data_vl.json and for predict")
    end_token: str | None = key(
        None, "token that ends the last answer; null: the chat template's own (earlier turns always keep it)"
    )
    overflow: Literal["error", "drop", "shrink_images"] = key(
        "error", "an example longer than a pack: refuse to start, leave it out, or make its images smaller until it fits"
    )
    max_bad_fraction: float = key(
        0.01, "records of a file that may be unusable; more: refuse to start", "fraction", trains=False
    )
    max_image_bytes: int = key(50 * 2**20, "larger image files are not used", "bytes")
    allow_urls: bool = key(False, "images may be http(s) URLs, each downloaded once; false: they are not used")
    url_cache: Path = key(Path("data/url_cache"), "folder that keeps downloaded images", trains=False)
    lengths_cache: str | None = key(
        "auto",
        "folder that keeps what was measured of record files; auto: .lengths beside each; null: measured at each start",
        trains=False,
    )
    share_prefix: bool = key(
        False,
        "encode an image and its prompt once for all their answers; exact without lora.dropout, which they then share",
    )
    shuffle: bool = key(True, "shuffle examples anew each epoch; false: steps are consecutive examples")
    bucket_steps: int = key(
        8, "steps whose shuffled examples are sorted by cost before they are cut into steps; 1: none", "steps"
    )
    num_workers: int = key(2, "processes that decode and encode for each rank; 0: in the training process", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What one optimizer step holds."""

    examples_per_step: int = key(4, "examples in one optimizer step, over all ranks", "examples")
    max_tokens_per_pack: int = key(8192, "most tokens in one micro-batch row", "tokens", trains=False)
    pack_lengths: int | None = key(
        None, "packs are padded up to one of so many lengths, so that shapes repeat; null: not padded", trains=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) and its schedule."""

    lr: float = key(1e-4, "highest learning rate")
    lr_tower: float | None = key(None, "highest learning rate of the vision tower's LoRA; null: optim.lr")
    lr_merger: float | None = key(None, "highest learning rate of the merger's LoRA; null: optim.lr")
    schedule: Literal["linear", "cosine", "constant"] = key("linear", "how the learning rate falls after the warm-up")
    warmup_steps: int = key(0, "the learning rate rises linearly from 0 over these steps", "steps")
    weight_decay: float = key(0.0, "decoupled weight decay")
    max_grad_norm: float | None = key(1.0, "gradients are scaled down to this norm; null: never")
    nonfinite: Literal["stop", "skip"] = key(
        "stop", "a step whose loss or gradient is no number: end the run before it, or leave the step out", trains=False
    )
    num_epochs: int = key(2, "passes over the training records", "epochs")
    max_steps: int | None = key(None, "end after this many steps; null: after num_epochs", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How often training is made safe."""

    every_steps: int = key(100, "steps between checkpoints; the last step always has one", "steps", trains=False)
    keep: int | None = key(3, "checkpoints kept; null: all; latest and best are never removed", "checkpoints", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Captions and loss on the held-out records, at the start, at the end and between."""

    every_steps: int | None = key(None, "steps between evaluations; null: start and end only", "steps", trains=False)
    batch_size: int = key(16, "images captioned together on one rank", "images", trains=False)
    max_new_tokens: int = key(64, "longest caption", "tokens", trains=False)
    num_shown: int = key(4, "held-out captions printed at each evaluation", "captions", trains=False)
    best_metric: Literal["cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "exact_match", "loss"] = key(
        "cider", "score that moves checkpoints/best; evaluations before the first step do not count", trains=False
    )
    cider_corpus: Path | None = key(
        None, "record file whose answers say how rare words are, for CIDEr-D; null: the held-out answers", trains=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = key(10, "steps between rows of metrics.jsonl", "steps", trains=False)
    peak_tflops: float | None = key(
        None, "dense peak of one device, for perf/mfu; null: by its name, and none on a CPU", "TFLOP/s", trains=False
    )
    wandb: Literal["auto", "off", "offline", "online"] = key(
        "auto",
        "Weights & Biases; auto: as WANDB_MODE says, else online where a key is set up, offline without one, off where "
        "wandb is not installed",
        trains=False,
    )
    wandb_project: str = key("vl_dist", "project of the run on W&B", trains=False)
    wandb_entity: str | None = key(None, "user or team on W&B; null: the key's own", trains=False)
    wandb_group: str | None = key(None, "group of the run on W&B", trains=False)
    wandb_tags: tuple[str, ...] = key((), "tags of the run on W&B", trains=False)
    tensorboard: bool = key(False, "also write event files for TensorBoard, to output_dir/tensorboard", trains=False)
    num_samples: int = key(
        16, "held-out captions, always the same, that W&B and TensorBoard show of each evaluation", "captions", trains=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lives and how it is repeated."""

    output_dir: Path = key(Path("runs/latest"), "what the run leaves behind", trains=False)
    seed: int = key(0, "seed of data order, LoRA weights and dropout")
    resume: str = key("auto", "auto: newest complete checkpoint; never: from step 0; or a directory", trains=False)
    stall_timeout: float | None = key(
        1800.0,
        "end the run and write stacks where no rank has moved for so long; null: never",
        "seconds",
        trains=False,
    )
    allow_changes: bool = key(False, "go on with a run although settings that shape it changed", trains=False)
    self_test: bool = key(
        True,
        "before the first step, refuse to train if the documents of a pack see each other on this model and device",
        trains=False,
    )
    final: Literal["last", "best"] = key("last", "adapter/ is that of the last step, or of checkpoints/best", trains=False)
    max_time: str | None = key(
        None,
        "stop with a checkpoint and code 85 within this time of the start: seconds, or [[D-]HH:]MM:SS; null: no limit",
        "seconds or [[D-]HH:]MM:SS",
        trains=False,
    )
    compile: bool = key(
        False,
        "compile decoder layers and the tower's blocks for training, without DeepSpeed; the first steps take longer, and "
        "with batch.pack_lengths each length is compiled for itself",
        trains=False,
    )
    cpu_threads: int | None = key(None, "threads of each rank on a CPU; null: its share of cores", "threads", trains=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one run."""

    shapes: ShapesConfig | None = key(None, "the embedded default's data and model; null: none are made")
    model: ModelConfig = key(ModelConfig, "")
    lora: LoraSettings = key(LoraSettings, "")
    data: DataConfig = key(DataConfig, "")
    batch: BatchConfig = key(BatchConfig, "")
    optim: OptimConfig = key(OptimConfig, "")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "")
    eval: EvalConfig = key(EvalConfig, "")
    log: LogConfig = key(LogConfig, "")
    run: RunConfig = key(RunConfig, "")
