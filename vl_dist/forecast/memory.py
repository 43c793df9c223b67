"""Memory of one rank, predicted from the model's shape: what lies there all the time, and what one pack adds.

The activations are those that autograd keeps in this project's forward of Qwen2-VL with PEFT's LoRA, layer by layer; a test
counts them on a small model. The last layer counts as the others, though its MLP sees target rows only. Not predicted are
CUDA's own context, the allocator's waste and communication buffers.
"""

from dataclasses import dataclass

from vl_dist.model.flops import ModelShape
from vl_dist.recomputed import recomputed_layers

GIB = 2**30
FLOAT32 = 4  # bytes; LoRA, its gradient and AdamW's moments always have it
ZERO_STAGES = (0, 1, 2, 3)  # 0: plain data parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What decides on memory beside the model's shape."""

    rank: int  # of LoRA
    targets: tuple[str, ...]
    has_dropout: bool
    base_bytes: int  # of one frozen weight: 2 for bfloat16, 4 for float32
    mask_bytes: int = 1  # of one dropout mask's entry: 1 on CUDA, base_bytes on a CPU
    eager: bool = False  # attention over a dense square
    recompute: str = "none"  # model.recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSize:
    """The pack that needs the most."""

    tokens: int
    targets: int
    patches: int


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank."""

    weights: float
    lora: float  # with gradients and moments
    activations: float  # kept for the backward
    working: float  # beside them at the worst moment: logits, the widest gradients, the tower

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.lora + self.activations + self.working


def lora_parameters(shape: ModelShape, rank: int, targets: tuple[str, ...]) -> int:
    """Values of the adapter in the language model."""
    sizes = shape.linear_sizes
    return shape.layers * sum(rank * sum(sizes[name]) for name in targets if name in sizes)


def frozen_parameters(shape: ModelShape) -> int:
    """Values of the base model."""
    layer = sum(inputs * outputs for inputs, outputs in shape.linear_sizes.values())
    layer += (shape.heads + 2 * shape.key_value_heads) * shape.head_dim + 2 * shape.hidden  # biases and norms
    embedding = shape.vocabulary * shape.hidden * (1 if shape.tied_embeddings else 2)
    width, mlp = shape.tower_width, shape.tower_mlp
    block = 4 * width * width + 2 * width * mlp + 4 * width + width + mlp + 4 * width
    wide = width * shape.merged_patches
    merger = wide * wide + wide + wide * shape.hidden + shape.hidden + 2 * width
    tower = shape.patch_values * width + shape.tower_depth * block + merger
    return shape.layers * layer + shape.hidden + embedding + tower


def kept_activations(shape: ModelShape, training: Training, num_tokens: int) -> float:
    """Bytes that the decoder layers keep for the backward of one pack; those that run again there keep their input."""
    num_again = len(recomputed_layers(training.recompute, shape.layers))
    again = num_again * num_tokens * shape.hidden * training.base_bytes
    return float((shape.layers - num_again) * _kept_by_layer(shape, training, num_tokens) + again)


def _kept_by_layer(shape: ModelShape, training: Training, num_tokens: int) -> int:
    """Bytes of one layer that runs once.

    For each token: the two norms' inputs in float32; queries, keys, values and what attention gave (`_kept_by_attention`);
    the gate, its activation and the up projection; what each LoRA reads (with dropout also the mask), and what its A gives.
    Beside them LoRA's matrices, as they were rounded for a base that is not in float32.
    """
    h, a, m = shape.hidden, shape.heads * shape.head_dim, shape.mlp
    base = training.base_bytes
    targets = [name for name in shape.linear_sizes if name in training.targets]
    inputs = {"o_proj": a, "down_proj": m}
    read = {name: inputs.get(name, h) for name in targets}
    token = 2 * h * FLOAT32 + 2 * FLOAT32 + 3 * m * base + len(targets) * training.rank * base
    if training.has_dropout:
        token += sum(read.values()) * (base + training.mask_bytes)
    else:  # read as they are: one tensor for q, k and v, one for gate and up
        shared = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
        token += sum(h * base for names in shared if names & set(targets))
        token += sum(read[name] * base for name in inputs if name in targets)
    rounded = 0 if base == FLOAT32 else lora_parameters(shape, training.rank, training.targets) // shape.layers * base
    return num_tokens * token + _kept_by_attention(shape, training, num_tokens) + rounded


def _kept_by_attention(shape: ModelShape, training: Training, num_tokens: int) -> int:
    """Bytes of one layer: queries, keys and values, and what attention gave by length of document with a sum a head.

    Eager attention has keys and values of all heads, and keeps the square of weights: in float32, and rounded.
    """
    a, g, base = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim, training.base_bytes
    if not training.eager:
        return num_tokens * (2 * (a + g) * base + shape.heads * FLOAT32)
    return num_tokens * 3 * a * base + _square(shape, num_tokens) * (FLOAT32 if base == FLOAT32 else FLOAT32 + base)


def _square(shape: ModelShape, num_tokens: int) -> int:
    """Weights of eager attention in one layer."""
    return shape.heads * num_tokens**2


def predict_memory(
    shape: ModelShape, training: Training, pack: PackSize, *, world_size: int, zero_stage: int
) -> RankMemory:
    """Memory of one rank while it trains the largest pack.

    Args:
        world_size: ranks that ZeRO spreads over.
        zero_stage: 1 spreads the moments, 2 also the gradients, 3 also all weights.
    """
    assert zero_stage in ZERO_STAGES, f"ZeRO has no stage {zero_stage}"
    lora = lora_parameters(shape, training.rank, training.targets) * FLOAT32
    weights = frozen_parameters(shape) * float(training.base_bytes)
    share = [1 / world_size if zero_stage >= stage else 1.0 for stage in (3, 2, 1)]
    if zero_stage == 3:  # beside its share, the largest weight and a layer are whole while they are used
        layer = sum(inputs * outputs for inputs, outputs in shape.linear_sizes.values()) * training.base_bytes
        weights = weights / world_size + shape.vocabulary * shape.hidden * training.base_bytes + layer
    logits = pack.targets * shape.vocabulary * (training.base_bytes + 3 * FLOAT32)
    widest = 4 * pack.tokens * shape.mlp * FLOAT32
    if training.eager:  # the mask, and the gradient of the weights before and after softmax
        mask, square = pack.tokens**2 * training.base_bytes, _square(shape, pack.tokens)
        widest = mask + max(widest, square * 2 * FLOAT32)
    again = 0 if training.recompute == "none" else _kept_by_layer(shape, training, pack.tokens)  # one layer at a time
    tower = pack.patches * (shape.tower_width * 6 + shape.tower_mlp * 2) * training.base_bytes
    return RankMemory(
        weights=weights,
        lora=lora * (share[0] + share[1] + 2 * share[2]),
        activations=kept_activations(shape, training, pack.tokens),
        working=max(max(logits, again) + widest, tower) + pack.patches * shape.patch_values * FLOAT32,
    )
