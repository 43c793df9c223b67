"""`python -m vl_dist plan`: what a run will do and need, before a GPU is paid for."""

import argparse
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vl_dist.config import load, split_words
from vl_dist.errors import UserError


def add_command(commands: Any) -> None:
    """Adds `plan` to the commands of an argparse parser."""
    parser = commands.add_parser("plan", help="steps, balance, operations, memory and disk of a run, without a GPU")
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="as for train.py")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one for each GPU (default 1)")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from vl_dist.forecast.forecast import make_forecast  # torch is slow to import; other commands do without
    from vl_dist.forecast.tables import tables

    if arguments.gpus < 1:
        raise UserError(f"--gpus is {arguments.gpus}; it must be 1 or more.")
    recipe, words = split_words(arguments.words)
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        found = make_forecast(load(recipe, words), world_size=arguments.gpus, on_progress=show)
    for table in tables(found):
        console.print(table)
