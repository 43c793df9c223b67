"""A model directory with the shape of Qwen2-VL-2B-Instruct, its real vocabulary, and random weights.

For trying the real recipe's memory and time where the real weights cannot be had:

    python -m benchmarks.real_shape DIRECTORY
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from vl_dist.tiny import SPECIAL_TOKENS, make_processor


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's vocabulary as the package dashscope ships it, with the special tokens in the order of the 2B's ids."""
    import dashscope  # a development requirement; nothing in training needs it

    vocabulary = Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"
    converter = TikTokenConverter(
        vocab_file=str(vocabulary), pattern=PRETOKENIZE_REGEX, extra_special_tokens=list(SPECIAL_TOKENS)
    )
    return Qwen2Tokenizer(tokenizer_object=converter.converted(), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config_2b() -> Qwen2VLConfig:
    """The published configuration of Qwen2-VL-2B-Instruct."""
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "pad_token_id": 151643,
        },
        vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )


def make_real_shape(directory: Path, *, seed: int = 0) -> int:
    """Writes the directory in bfloat16; the number of parameters."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2VLForConditionalGeneration(config_2b())
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory)
    make_processor(qwen_tokenizer()).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Makes a random model with the shape of Qwen2-VL-2B-Instruct.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    started = time.perf_counter()
    parameters = make_real_shape(directory)
    sys.stdout.write(f"{parameters:,} parameters in {directory}, {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
