"""Fine-tuning of Qwen2-VL with LoRA on image-text data, from one process to many machines."""

__version__ = "0.1.0"
