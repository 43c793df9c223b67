"""Useful floating-point operations of a training step, counted from the model's shape alone.

Counted is what the gradient of the adapter needs: for each language-model token 4 operations a frozen weight (forward, and
the gradient of its input; 2 in layers below the lowest one that trains) and 6 a LoRA weight, attention's two products where
the causal mask lets them be, the tower's forward once an image (and its backward down to the lowest block that trains), and
the head on target rows. Padding and recomputation never count, nor does the norm that DoRA takes of whole weights. The last
layer counts for all tokens, as is usual, though its MLP needs target rows only (`vl_dist.model.last_layer`): at most 3 % of
the 2B's operations.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Dense bfloat16 peaks in TFLOP/s, from the makers' data sheets; the first name found in the device's name counts.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 125.0, "L4": 121.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that operations depend on; from a model directory's `config.json`."""

    hidden: int
    layers: int
    head_dim: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int
    tower_width: int
    tower_depth: int
    tower_mlp: int
    patch_values: int  # numbers in one patch
    merged_patches: int  # patches that become one language-model token
    tied_embeddings: bool  # the head is the embedding

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear of a decoder layer, by the name that LoRA targets."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }


def read_shape(directory: Path) -> ModelShape:
    """The shape of a qwen2_vl model directory; no weights are needed."""
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    text, vision = found.get("text_config", found), found["vision_config"]
    heads = text["num_attention_heads"]
    return ModelShape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        head_dim=text["hidden_size"] // heads,
        heads=heads,
        key_value_heads=text["num_key_value_heads"],
        mlp=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tower_width=vision.get("embed_dim", 1280),
        tower_depth=vision.get("depth", 32),
        tower_mlp=int(vision.get("embed_dim", 1280) * vision.get("mlp_ratio", 4)),
        patch_values=vision.get("in_channels", 3)
        * vision.get("temporal_patch_size", 2)
        * vision.get("patch_size", 14) ** 2,
        merged_patches=vision.get("spatial_merge_size", 2) ** 2,
        tied_embeddings=text.get("tie_word_embeddings", found.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSize:
    """What operations depend on in the adapter; `targets.lora_size` makes it."""

    language: int  # trainable values in the language model's layers
    tower: int = 0
    merger: int = 0
    layers_without_gradient: int = 0  # decoder layers below everything that trains
    blocks_without_gradient: int = 0  # of the tower, below everything in it that trains

    @property
    def total(self) -> int:
        """All trainable values."""
        return self.language + self.tower + self.merger


@dataclass(frozen=True, slots=True)
class FlopCounter:
    """Counts operations for one model and one adapter."""

    shape: ModelShape
    lora: LoraSize

    @property
    def per_token(self) -> float:
        """Operations of one language-model token outside attention's products."""
        frozen = sum(inputs * outputs for inputs, outputs in self.shape.linear_sizes.values())
        return float((4 * self.shape.layers - 2 * self.lora.layers_without_gradient) * frozen + 6 * self.lora.language)

    def document(self, trunk: int, branches: Sequence[int]) -> float:
        """Operations of one document: its tokens, and attention among them (2 forward and 4 backward a causal pair).

        Args:
            trunk: tokens that all branches see.
            branches: tokens of each; with one branch, trunk and branch are the plain sequence.
        """
        squares = trunk**2 + sum(
            branch**2 + 2 * branch * trunk for branch in branches
        )  # twice the pairs that see each other
        passes = 6 * self.shape.layers - 4 * self.lora.layers_without_gradient
        attention = passes * squares * self.shape.heads * self.shape.head_dim
        return (trunk + sum(branches)) * self.per_token + attention

    def targets_head(self, num_targets: int) -> float:
        """The head on target rows: forward, and the gradient of its input."""
        return 4.0 * num_targets * self.shape.hidden * self.shape.vocabulary

    def image(self, num_patches: int) -> float:
        """One image: patch embedding, blocks with attention among all patches, merger; and the backward of what trains."""
        s, lora = self.shape, self.lora
        trained = s.tower_depth - lora.blocks_without_gradient  # blocks
        block = 4 * s.tower_width**2 + 2 * s.tower_width * s.tower_mlp
        wide = s.tower_width * s.merged_patches
        merger = (wide * wide + wide * s.hidden) / s.merged_patches
        per_patch = 2.0 * (s.patch_values * s.tower_width + (s.tower_depth + trained) * block)
        per_patch += (4 if lora.tower or lora.merger else 2) * merger
        per_patch += 6 * lora.tower + 6 * lora.merger / s.merged_patches
        attention = 4 * num_patches**2 * s.tower_width * (s.tower_depth + 2 * trained)
        return num_patches * per_patch + attention


def known_peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of a device by its name; None if it is not known."""
    found = next((peak for name, peak in PEAK_TFLOPS.items() if name in re.split(r"[ -]", device_name)), None)
    return None if found is None else found * 1e12
