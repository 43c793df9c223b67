"""Collected on a machine with a GPU only: `python -m pytest tests/cuda`."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
