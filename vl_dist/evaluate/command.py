"""`python -m vl_dist predict` and `evaluate`: results on standard output, what went wrong on standard error."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from vl_dist.adapter.options import add_adapter, add_inference, asked_budget, refuse_bad_batch_size, say_difference
from vl_dist.errors import UserError

if TYPE_CHECKING:
    from vl_dist.evaluate.held_out import Evaluation
    from vl_dist.evaluate.predict import Answered
    from vl_dist.run.distributed import Ranks


def add_commands(commands: Any) -> None:
    """Adds `predict` and `evaluate` to the commands of an argparse parser."""
    parser = commands.add_parser("predict", help="caption images as the adapter was trained to")
    add_adapter(parser)
    what = "image files, folders of images, record files (.jsonl)"
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help=what)
    parser.add_argument("--prompt", help="ask this text of each image instead of what training asked")
    parser.add_argument("--json", action="store_true", help="one JSON object an image instead of text")
    add_inference(parser)
    parser.set_defaults(run=_predict)

    parser = commands.add_parser("evaluate", help="caption metrics on a record file, on one process or launched on many")
    add_adapter(parser)
    parser.add_argument("records", type=Path, metavar="RECORDS", help="record file with the accepted answers")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write every prediction with its references here")
    add_inference(parser)
    parser.set_defaults(run=_evaluate)


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
        say_difference(contract)
        adapter = load(arguments.adapter, base_dir=arguments.base)
        batches = predict(adapter, questions, budget=budget, batch_size=arguments.batch_size)
    else:
        batches = iter([[Answered(one, None, one.fault) for one in questions.asked]])
    with progress("captioning", total) as bar:
        for batch in batches:
            for answer in batch:
                _write(answer, as_json=arguments.json)
                failed += [answer] if answer.error is not None else []
            sys.stdout.flush()
            bar.advance(len(batch))
    if failed:
        raise UserError(f"{len(failed)} of {total} have no caption, first {failed[0].asked.name}: {failed[0].error}.")


def _evaluate(arguments: argparse.Namespace) -> None:
    """The same on every rank; the main process speaks."""
    from vl_dist.evaluate.records import plain_launch
    from vl_dist.run.distributed import Ranks, said_once

    refuse_bad_batch_size(arguments)
    ranks = Ranks.start(plain_launch(os.environ), cpu_threads=None)
    with said_once(ranks):
        _evaluate_on(ranks, arguments)
    ranks.close()


def _evaluate_on(ranks: "Ranks", arguments: argparse.Namespace) -> None:
    from vl_dist.adapter.contract import read_contract
    from vl_dist.adapter.load import choose_budget
    from vl_dist.evaluate.records import Job, evaluate_records, write_samples

    def read() -> Job:
        """What is asked for, as far as it can be checked without a model."""
        contract = read_contract(arguments.adapter)
        if arguments.samples is not None and not arguments.samples.absolute().parent.is_dir():
            raise UserError(f"There is no folder for the samples {arguments.samples}; give another --samples.")
        return Job(
            adapter=arguments.adapter,
            contract=contract,
            base_dir=arguments.base,
            records=arguments.records,
            image_root=arguments.image_root,
            budget=choose_budget(contract, asked_budget(arguments), allow_other=arguments.allow_other_pixels),
            batch_size=arguments.batch_size,
            allow_other_prompt=arguments.allow_other_prompt,
        )

    asked = ranks.each(read)
    with progress("captioning", 0, shown=ranks.is_main) as bar:
        found = evaluate_records(asked, ranks, bar.of_total)
    if arguments.samples is not None:
        ranks.on_main(lambda: write_samples(arguments.samples, found.samples))
    if ranks.is_main:
        say_difference(asked.contract)
        _write_scores(found, as_json=arguments.json)


def _write_scores(found: "Evaluation", *, as_json: bool) -> None:
    scores = {column.removeprefix("eval/"): value for column, value in found.scores.items()}
    num_prompts, num_references = len(found.samples), sum(len(sample.references) for sample in found.samples)
    if as_json:
        row = {"scores": scores, "prompts": num_prompts, "references": num_references}
        sys.stdout.write(json.dumps(row) + "\n")
        return
    table = Table("score", "value")
    table.columns[1].justify = "right"
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    Console(highlight=False).print(table)
    sys.stdout.write(f"{num_prompts:,} prompts, {num_references:,} references\n")


def _write(answer: "Answered", *, as_json: bool) -> None:
    result = {"caption": answer.caption} if answer.error is None else {"error": answer.error}
    if as_json:
        row = {"id" if answer.asked.is_record else "image": answer.asked.name} | result
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif answer.error is None:
        sys.stdout.write(f"{answer.asked.name}: {answer.caption}\n")
    else:
        sys.stderr.write(f"{answer.asked.name}: error: {answer.error}\n")


class Bar:
    """How far a command is."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._bar.advance(self._task, count)

    def of_total(self, done: int, total: int) -> None:
        """So many are done, and so many there are."""
        self._bar.update(self._task, completed=done, total=total)


@contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Bar]:
    """A bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Captions that go into a file must not be drawn above the bar instead.
    to_terminal = sys.stdout.isatty()
    drawn = shown and console.is_terminal
    with Progress(*columns, console=console, disable=not drawn, transient=True, redirect_stdout=to_terminal) as bar:
        yield Bar(bar, bar.add_task(what, total=total))
