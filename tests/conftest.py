"""What tests share: a tiny Qwen2-VL, real photographs, and packs of them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"  # log.wandb=auto obeys; tests of trackers say log.wandb=offline
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; spinning threads starve shared cores

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.real_shape import config_2b
from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.model.flops import ModelShape, read_shape
from vl_dist.model.load import load_processor, patch_shape
from vl_dist.tiny import TinySize, make_tiny_model

TEXTS = (
    "system\nYou are a helpful assistant.",
    "user\nCOCO Yes:",
    "assistant\n",
    "A man riding a wave on top of a surfboard.",
    "A cat sits on a wooden table next to a cup of coffee.",
    "Two rockets stand side by side under a clear sky.",
    "What is in the picture? Describe both images.",
)
SMALL = TinySize(hidden=64, layers=2, heads=4, key_value_heads=2, mlp=96, tower_hidden=32, tower_layers=2, num_merges=150)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two threads that wait for each other on shared cores take many times as long as one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random Qwen2-VL and its processor files."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(directory, TEXTS, seed=7, size=SMALL)
    return directory


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Any:
    return load_processor(tiny_model)


@pytest.fixture(scope="session")
def shape(tiny_model: Path, processor: Any) -> PatchShape:
    return patch_shape(tiny_model, processor)


@pytest.fixture(scope="session")
def encoder(processor: Any) -> Encoder:
    return Encoder(processor, merge_size=2, end_token="<|endoftext|>")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs of several sizes, as JPEG."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    directory = tmp_path_factory.mktemp("photos")
    china, flower = load_sample_images().images
    found = {"china": china, "flower": flower, "astronaut": data.astronaut(), "cat": data.cat(), "rocket": data.rocket(),
             "coffee": data.coffee()}  # fmt: skip
    for name, pixels in found.items():
        Image.fromarray(np.asarray(pixels)).save(directory / f"{name}.jpg", quality=90)
    return directory


@pytest.fixture
def collator(photo_collator: Collator) -> Collator:
    return photo_collator


@pytest.fixture(scope="session")
def photo_collator(encoder: Encoder, processor: Any, photos: Path, shape: PatchShape) -> Collator:
    budget = PixelBudget(min_pixels=56 * 56, max_pixels=84 * 112)
    return Collator(encoder, processor.image_processor, roots=[photos], budget=budget, shape=shape)


@pytest.fixture(scope="session")
def shape_2b(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    directory: Path = tmp_path_factory.mktemp("2b")
    config_2b().save_pretrained(directory)
    return read_shape(directory)
