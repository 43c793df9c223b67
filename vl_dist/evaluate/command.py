"""`python -m vl_dist predict`: captions on standard output, what has none on standard error."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vl_dist.adapter.options import add_adapter, add_inference, asked_budget, refuse_bad_batch_size
from vl_dist.errors import UserError

if TYPE_CHECKING:
    from vl_dist.evaluate.predict import Answered


def add_predict(commands: Any) -> None:
    """Adds `predict` to the commands of an argparse parser."""
    parser = commands.add_parser("predict", help="caption images as the adapter was trained to")
    add_adapter(parser)
    what = "image files, folders of images, record files (.jsonl)"
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help=what)
    parser.add_argument("--prompt", help="ask this text of each image instead of what training asked")
    parser.add_argument("--json", action="store_true", help="one JSON object an image instead of text")
    add_inference(parser)
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    """What cannot be captioned is a line of its own; the others are captioned, and the command ends with code 2."""
    # torch is slow to import; other commands do without
    from vl_dist.adapter.contract import read_contract
    from vl_dist.adapter.load import choose_budget, choose_prompt, load, refuse_other_prompt
    from vl_dist.evaluate.predict import Answered, gather_questions, predict

    refuse_bad_batch_size(arguments)
    contract = read_contract(arguments.adapter)
    budget = choose_budget(contract, asked_budget(arguments), allow_other=arguments.allow_other_pixels)
    prompt = choose_prompt(contract, arguments.prompt, allow_other=arguments.allow_other_prompt)
    questions = gather_questions(arguments.images, prompt, image_root=arguments.image_root)
    for asked, name in questions.prompts.items():
        refuse_other_prompt(contract, asked, name, allow_other=arguments.allow_other_prompt)
    total = len(questions.asked)
    failed: list[Answered] = []
    if any(one.example is not None for one in questions.asked):
        adapter = load(arguments.adapter, base_dir=arguments.base)
        batches = predict(adapter, questions, budget=budget, batch_size=arguments.batch_size)
    else:
        batches = iter([[Answered(one, None, one.fault) for one in questions.asked]])
    with progress("captioning", total) as advance:
        for batch in batches:
            for answer in batch:
                _write(answer, as_json=arguments.json)
                failed += [answer] if answer.error is not None else []
            sys.stdout.flush()
            advance(len(batch))
    if failed:
        raise UserError(f"{len(failed)} of {total} have no caption, first {failed[0].asked.name}: {failed[0].error}.")


def _write(answer: "Answered", *, as_json: bool) -> None:
    result = {"caption": answer.caption} if answer.error is None else {"error": answer.error}
    if as_json:
        row = {"id" if answer.asked.is_record else "image": answer.asked.name} | result
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif answer.error is None:
        sys.stdout.write(f"{answer.asked.name}: {answer.caption}\n")
    else:
        sys.stderr.write(f"{answer.asked.name}: error: {answer.error}\n")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal; call what it gives with how many more are done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Captions that go into a file must not be drawn above the bar instead.
    to_terminal = sys.stdout.isatty()
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True, redirect_stdout=to_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
