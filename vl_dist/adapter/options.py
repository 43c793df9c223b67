"""Options that the commands on adapters share. No torch here: a command's help must not wait for it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vl_dist.data.images import PixelBudget
from vl_dist.errors import UserError

if TYPE_CHECKING:
    from vl_dist.adapter.contract import AdapterContract


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The adapter and its base."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory that a run left in adapter/")
    parser.add_argument("--base", type=Path, help="directory of the base model, if it is not where it was in training")


def add_inference(parser: argparse.ArgumentParser) -> None:
    """How the adapter is used: as in training, unless said otherwise."""
    parser.add_argument("--batch-size", type=int, default=16, help="prompts answered together (default 16)")
    for name in ("min-pixels", "max-pixels", "resized-height", "resized-width"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"as data.{name.replace('-', '_')}")
    parser.add_argument("--allow-other-pixels", action="store_true", help="use sizes other than those of training")
    parser.add_argument("--allow-other-prompt", action="store_true", help="ask what was not asked in training")
    parser.add_argument("--image-root", type=Path, help="records' image paths are relative to it (default: their folder)")


def asked_budget(arguments: argparse.Namespace) -> PixelBudget:
    """The sizes on the command line; none of them: those of training."""
    return PixelBudget(
        resized_height=arguments.resized_height,
        resized_width=arguments.resized_width,
        min_pixels=arguments.min_pixels,
        max_pixels=arguments.max_pixels,
    )


def refuse_bad_batch_size(arguments: argparse.Namespace) -> None:
    """Raises `UserError` where no prompt would be answered."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be 1 or more.")


def say_difference(contract: "AdapterContract") -> None:
    """Says on standard error what inference has otherwise than training had, if anything."""
    if contract.difference is not None:
        sys.stderr.write(f"Note: {contract.difference}.\n")
