"""`python -m vl_dist report`: one HTML file that shows some runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vl_dist.errors import UserError
from vl_dist.report.page import page
from vl_dist.report.read import read_runs

NUM_IMAGES = 24


def add_command(commands: Any) -> None:
    """Adds `report` to the commands of an argparse parser."""
    parser = commands.add_parser("report", help="one HTML page of one or several runs: curves, captions, settings")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output directory of a run")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first RUN)")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help=f"held-out images shown (default {NUM_IMAGES})")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    if arguments.images < 0:
        raise UserError(f"--images is {arguments.images}; it must be 0 or more.")
    runs = read_runs(arguments.runs)
    out = arguments.out if arguments.out is not None else arguments.runs[0] / "report.html"
    data = page(runs, num_images=arguments.images).encode("utf-8", "replace")
    try:
        out.write_bytes(data)
    except OSError as error:
        raise UserError(f"The report {out} cannot be written ({error.strerror}); give another --out.") from None
    sys.stdout.write(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(data) / 1e6:.1f} MB\n")
