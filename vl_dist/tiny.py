"""A tiny Qwen2-VL with the real classes and files: random weights by seed, a tokenizer trained on the spot.

It is loaded like any other model, so what is proved on it holds for the path that the 2B takes. LoRA on a random base can
learn because the base is made with large enough weights (0.1): at the usual 0.02 its outputs stay too flat to be confident.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from vl_dist.file_modes import give_usual_mode

# Qwen2-VL's special tokens, in the order of its ids from 151643 on.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Writes what Qwen2-VL-2B-Instruct's own template writes for text and images.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySize:
    """Shape of the tiny model."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    mlp: int = 256
    tower_hidden: int = 64
    tower_layers: int = 2
    tower_heads: int = 2
    num_merges: int = 400  # of the tokenizer
    weight_scale: float = 0.1  # standard deviation of the random weights


def make_tiny_model(directory: Path, texts: Iterable[str], *, seed: int, size: TinySize | None = None) -> None:
    """Writes model, tokenizer and processor files that `from_pretrained` loads.

    Args:
        directory: made if it is not there.
        texts: what the tokenizer is trained on.
        seed: of the weights; the same seed makes the same files.
        size: shape of the model.
    """
    size = size or TinySize()
    tokenizer = make_tokenizer(texts, num_merges=size.num_merges)
    config = tiny_config(tokenizer, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    give_usual_mode(*directory.glob("*.safetensors"))
    make_processor(tokenizer).save_pretrained(directory)


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Tokenizer, Qwen2-VL's image and video processors as they are by default, and its chat template."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_tokenizer(texts: Iterable[str], *, num_merges: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's splitting rule and special tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_merges, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    trained.train_from_iterator(texts, trainer)
    vocabulary = trained.get_vocab()
    merges = _merges(trained)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def _merges(trained: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]


def tiny_config(tokenizer: Qwen2Tokenizer, size: TinySize) -> Qwen2VLConfig:
    """A configuration of this size for this tokenizer."""
    head_dim = size.hidden // size.heads
    rotary = head_dim // 2
    sections = [rotary - 2 * (rotary * 3 // 8), rotary * 3 // 8, rotary * 3 // 8]  # they add up to head_dim / 2
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
            "intermediate_size": size.mlp,
            "max_position_embeddings": 8192,
            "initializer_range": size.weight_scale,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": size.tower_layers,
            "embed_dim": size.tower_hidden,
            "num_heads": size.tower_heads,
            "hidden_size": size.hidden,
            "mlp_ratio": 2,
            "initializer_range": size.weight_scale,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=size.weight_scale,
    )
