"""What libraries print between the lines of a command, switched off by their own switches."""

import contextlib
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Transformers shows a bar on every rank, and even where standard error is a file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
