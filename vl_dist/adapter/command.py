"""`python -m vl_dist merge`, `check` and `push`: what is done with an adapter beside captioning."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vl_dist.adapter.options import add_adapter, say_difference
from vl_dist.errors import UserError

MARKS = {True: "yes", False: "NO", None: "-"}


def add_commands(commands: Any) -> None:
    """Adds `merge`, `check` and `push` to the commands of an argparse parser."""
    merge = commands.add_parser("merge", help="write base and adapter as one model that transformers and vLLM load")
    add_adapter(merge)
    merge.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    merge.add_argument("--shard-size", default="4GB", help="largest weight file (default 4GB)")
    merge.set_defaults(run=_merge)

    check = commands.add_parser("check", help="whether the adapter loads and computes what it did, and vLLM can serve it")
    add_adapter(check)
    check.set_defaults(run=_check)

    push = commands.add_parser("push", help="upload the adapter to a hub, after checking it")
    add_adapter(push)
    push.add_argument("--hub", choices=("huggingface", "modelscope"), required=True, help="where to")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    push.add_argument("--private", action="store_true", help="only its owner sees it")
    push.set_defaults(run=_push)


def _merge(arguments: argparse.Namespace) -> None:
    from vl_dist.adapter.contract import read_contract
    from vl_dist.adapter.merge import merge  # torch is slow to import; other commands do without

    say_difference(read_contract(arguments.adapter))
    found = merge(arguments.adapter, arguments.out, base_dir=arguments.base, shard_size=arguments.shard_size)
    sys.stdout.write(f"{arguments.out}: the merged model, {found}\n")


def _check(arguments: argparse.Namespace) -> None:
    from vl_dist.adapter.check import check_adapter

    report = check_adapter(arguments.adapter, base_dir=arguments.base)
    table = Table("check", "holds", "found")
    for one in report.checks:
        # A fault is said once, in full, at the end.
        table.add_row(one.name, MARKS[one.holds], Text("see below" if one.holds is False else one.found))
    Console(highlight=False).print(table)
    if report.faults:
        raise UserError("\n".join(report.faults))
    assert report.serving is not None, "all checks hold"
    sys.stdout.write(f"Serve it with:\n{report.serving}\n")
    sys.stdout.write("".join(f"  {note}\n" for note in report.notes))


def _push(arguments: argparse.Namespace) -> None:
    """From the cheapest check to the dearest; the hub is asked last."""
    from vl_dist.adapter.push import files_to_push, push, refuse_bad_name, require_token

    refuse_bad_name(arguments.repo)
    names = files_to_push(arguments.adapter)
    token = require_token(arguments.hub)
    from vl_dist.adapter.load import load

    base = load(arguments.adapter, base_dir=arguments.base).contract.base_model
    place = push(arguments.adapter, names, hub=arguments.hub, repo=arguments.repo, private=arguments.private, token=token)
    sys.stdout.write(f"{place}: {len(names)} files\n")
    if base.hub == "local":
        sys.stdout.write(f"Its files name the base model {base.path!r}: say in the card where others get it.\n")
