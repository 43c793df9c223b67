"""The commands beside training. Each returns an exit code: 0 done, 2 the input is wrong."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vl_dist.adapter.command import add_commands as add_adapter_commands
from vl_dist.config import dump, keys, load, plain, split_words, value_at
from vl_dist.data.sources.command import add_command as add_prepare
from vl_dist.errors import UserError
from vl_dist.evaluate.command import add_commands as add_inference_commands
from vl_dist.forecast.command import add_command as add_plan
from vl_dist.report.command import add_command as add_report
from vl_dist.run.cache_command import add_command as add_cache


def main(words: Sequence[str]) -> int:
    """Runs one command; a user's error is one message on standard error and code 2."""
    arguments = _parse(words)
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; settings may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vl_dist", description="What goes with train.py.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("validate", help="read every record and image header, and report what cannot be used")
    check.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="as for train.py")
    check.add_argument("--out", type=Path, help="the report (default: bad_rows.jsonl in the training records' folder)")
    check.add_argument("--decode", action="store_true", help="decode every image too, to find those that are cut short")
    check.set_defaults(run=_validate)

    show = commands.add_parser("settings", help="print the resolved settings of a recipe, or one of them")
    show.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="as for train.py")
    show.add_argument("--key", help="print only the value of this key")
    show.set_defaults(run=_settings)
    add_inference_commands(commands)
    add_adapter_commands(commands)
    add_prepare(commands)
    add_plan(commands)
    add_cache(commands)
    add_report(commands)
    return parser


def _validate(arguments: argparse.Namespace) -> None:
    from vl_dist.data.validate_command import validate

    recipe, words = split_words(arguments.words)
    validate(load(recipe, words), out=arguments.out, decode=arguments.decode)


def _settings(arguments: argparse.Namespace) -> None:
    recipe, words = split_words(arguments.words)
    config = load(recipe, words)
    if arguments.key is None:
        sys.stdout.write(dump(config))
        return
    if arguments.key not in {key.path for key in keys()}:
        raise UserError(f"There is no key {arguments.key}. All keys: python train.py --help")
    sys.stdout.write(f"{plain(value_at(config, arguments.key))}\n")
