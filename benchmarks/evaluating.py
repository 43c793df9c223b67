"""How long an evaluation takes: `python -m benchmarks.evaluating [--quick] [--out FILE.json]`.

500 held-out drawings of the embedded default with five references each: loss, captions and scores. The model is untrained,
so that hardly a caption ends before `eval.max_new_tokens`: the slowest case. Bound: 30 s on two cores.
"""

import contextlib
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks.common import judge, parser_of, spread, write_json
from benchmarks.running import prepared
from vl_dist.evaluate import decode, held_out
from vl_dist.run.prepare import Run

BOUND_S = 30.0
# Where the parts of an evaluation are: module, function, what it does.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (held_out, "_mean_loss", "loss: images decoded, packs, forward"),
    (decode, "answer_batch", "captions: generation"),
    (held_out, "score_captions", "scores"),
)


@contextlib.contextmanager
def timed_parts(seconds: Counter[str]) -> Iterator[None]:
    """Adds up what each part takes while inside."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] += time.perf_counter() - started  # type: ignore[assignment]

        return call

    with contextlib.ExitStack() as stack:
        for module, function, name in PARTS:
            stack.enter_context(mock.patch.object(module, function, timed(name, getattr(module, function))))
        yield


def evaluate_once(run: Run) -> tuple[float, Counter[str]]:
    """Seconds of one evaluation, and of its parts."""
    assert run.data.held_out is not None
    parts: Counter[str] = Counter()
    with timed_parts(parts):
        started = time.perf_counter()
        held_out.evaluate(
            run.model,
            run.data.held_out,
            run.ranks,
            run.config.eval,
            tokenizer=run.processor.tokenizer,
            max_tokens=run.config.batch.max_tokens_per_pack,
            on_progress=lambda _done, _total: None,
        )
        return time.perf_counter() - started, parts


def main() -> None:
    """The command."""
    given = parser_of("How long an evaluation takes.", "evaluating").parse_args()
    num_images, rounds = (48, 1) if given.quick else (500, 3)
    with tempfile.TemporaryDirectory() as directory:
        run = prepared(Path(directory), f"shapes.num_eval={num_images}", "shapes.num_train=300", "log.wandb=off")
        found = [evaluate_once(run) for _ in range(rounds)]
    total = spread([seconds for seconds, _ in found])
    split = {name: spread([parts[name] for _, parts in found]) for _, _, name in PARTS}
    write_json(given.out, "evaluating", {"seconds": total, "parts": split}, quick=given.quick, images=num_images)
    table = Table("part", "s, median", "least to most", title=f"{num_images} held-out images, five references each")
    for name, times in {**split, "all": total}.items():
        table.add_row(name, f"{times['median']:.2f}", f"{times['least']:.2f} to {times['most']:.2f}")
    console = Console()
    console.print(table)
    if not given.quick:
        console.print(judge(total["median"], BOUND_S) + " s")


if __name__ == "__main__":
    main()
