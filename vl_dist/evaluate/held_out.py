"""Evaluation on held-out records: loss over their targets, and captions with scores, each example exactly once."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vl_dist.data.examples import ids_of
from vl_dist.data.groups import group_examples
from vl_dist.data.loader import LoadedData, load_steps
from vl_dist.data.plan import plan_epoch
from vl_dist.data.record_files import read_records
from vl_dist.data.records import Example, examples_of
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import generate, length_batches
from vl_dist.evaluate.scores import DocumentFrequency, document_frequency, score_captions, tokenize
from vl_dist.model.packed import PackedModel, out_of_memory_named
from vl_dist.run.distributed import Ranks, evaluating
from vl_dist.settings import EvalConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with all its accepted answers, whichever records they came from."""

    prompt: Example  # the first of them, under its record's id; its own answer is not looked at
    references: tuple[str, ...]
    first_id: str  # of that example


@dataclass(frozen=True, slots=True)
class Sample:
    """One prediction, as `samples/` keeps it."""

    id: str
    images: tuple[str, ...]
    references: tuple[str, ...]
    prediction: str
    exact: bool
    score: float  # CIDEr-D, from 0 to 10


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by their column of metrics.jsonl, and every sample."""

    scores: dict[str, float]
    samples: tuple[Sample, ...]


def group_questions(examples: Sequence[Example]) -> list[Question]:
    """Examples of the same images and prompt as one question; its id is the first example's without `#k`.

    An answer that comes twice is a reference twice, as in the COCO caption tools: what most people say counts more.
    """
    groups: dict[object, list[Example]] = {}
    for example in examples:
        groups.setdefault((example.file, example.max_pixels, example.prompt), []).append(example)
    return [
        Question(replace(group[0], id=group[0].id.split("#")[0]), tuple(example.answer for example in group), group[0].id)
        for group in groups.values()
    ]


def read_frequency(path: Path) -> DocumentFrequency:
    """In how many questions of a record file each n-gram occurs among the answers; no image is read.

    Raises:
        UserError: no such file, or a row of it is no record.
    """
    if not path.is_file():
        raise UserError(f"There is no record file {path}. Set eval.cider_corpus to an existing file, or to null.")
    questions = group_questions(examples_of(read_records(path, default_prompt="")))
    return document_frequency([tokenize(text) for text in question.references] for question in questions)


def evaluate(
    model: PackedModel,
    data: LoadedData,
    ranks: Ranks,
    settings: EvalConfig,
    *,
    tokenizer: Any,
    max_tokens: int,
    frequency: DocumentFrequency | None = None,
    on_progress: Callable[[int, int], None],
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss and captions over all held-out examples; None, on every rank, if one was to stop meanwhile (all ranks).

    Args:
        model: not the data-parallel wrapper, whose forward may synchronise.
        max_tokens: most tokens in a pack, for the loss.
        frequency: for CIDEr-D, read on the main process only; None: that of the held-out answers.
        on_progress: called with questions answered by this rank, and this rank's number of questions.
        stopping: whether this rank is to stop; asked before each batch of captions and each step of the loss.
    """
    questions = group_questions(data.examples)
    with evaluating(model):
        try:
            loss = _mean_loss(model, data, ranks, stopping, max_tokens=max_tokens)
            own = _answer(model, data, ranks, questions, settings, tokenizer, on_progress)
            answers = [pair for batch in _until_stopped(own, ranks, stopping) for pair in batch]
        except _StoppedError:
            return None
    predictions = [text for _, text in sorted(ranks.gather(answers))]
    references = [question.references for question in questions]
    scores = ranks.on_main(lambda: score_captions(predictions, references, frequency))
    samples = tuple(
        Sample(q.prompt.id, q.prompt.image_paths, q.references, text, text in q.references, score)
        for q, text, score in zip(questions, predictions, scores.each, strict=True)
    )
    return Evaluation({"eval/loss": loss} | scores.columns, samples)


def write_samples(directory: Path, step: int, samples: Sequence[Sample]) -> None:
    """All samples of one evaluation, one JSON object a line. Main process only."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
    (directory / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


def last_scores(directory: Path, before_step: int) -> dict[str, float]:
    """By sample, the scores that `write_samples` wrote of the last evaluation up to this step; none if there is none."""
    written = {int(path.stem.removeprefix("step-")): path for path in directory.glob("step-*.jsonl")}
    steps = [step for step in written if step <= before_step]
    if not steps:
        return {}
    rows = map(json.loads, written[max(steps)].read_text().splitlines())
    return {row["id"]: row["score"] for row in rows}


class _StoppedError(Exception):
    """A rank is to stop; raised on all of them together."""


def _until_stopped(items: Iterable[T], ranks: Ranks, stopping: Callable[[], bool]) -> Iterator[T]:
    """The items, of which each rank has as many (all ranks).

    Raises:
        _StoppedError: a rank is to stop; every rank raises it, so that none waits for the others.
    """
    for item, stops in ranks.together_noting(items, lambda _: (True,) if stopping() else ()):
        if stops:
            raise _StoppedError
        yield item


def _mean_loss(
    model: PackedModel, data: LoadedData, ranks: Ranks, stopping: Callable[[], bool], *, max_tokens: int
) -> float:
    """Cross entropy per target (all ranks)."""
    groups = group_examples(data.lengths)
    steps = plan_epoch(groups, max(64, int(groups.sizes.max())), seed=0, epoch=0, shuffle=False)
    loaded = load_steps(steps, data, rank=ranks.rank, world_size=ranks.world_size, max_tokens=max_tokens)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for step in _until_stopped(loaded, ranks, stopping):
        for pack in step.packs:
            with out_of_memory_named(pack):
                sums[0] += model(pack.to(ranks.device)).double()
            sums[1] += pack.num_targets
    loss, targets = ranks.sum(sums).tolist()
    return float(loss / max(1.0, targets))


def _answer(
    model: PackedModel,
    data: LoadedData,
    ranks: Ranks,
    questions: Sequence[Question],
    settings: EvalConfig,
    tokenizer: Any,
    on_progress: Callable[[int, int], None],
) -> Iterator[list[tuple[int, str]]]:
    """This rank's answers, batch by batch, with the numbers of their questions; every rank has as many batches."""
    trunks = dict(zip(ids_of(data.examples), data.lengths.trunk.tolist(), strict=True))
    batches = length_batches([trunks[question.first_id] for question in questions], settings.batch_size)
    batches += [[]] * (-len(batches) % ranks.world_size)
    mine = batches[ranks.rank :: ranks.world_size]
    found = generate(
        model.peft_model.get_base_model(),
        data.collator,
        [question.prompt for question in questions],
        mine,
        max_new_tokens=settings.max_new_tokens,
        pad_id=tokenizer.pad_token_id,
    )
    done, total = 0, sum(map(len, mine))
    on_progress(done, total)
    for batch in found:
        done += len(batch)
        on_progress(done, total)
        yield [(n, tokenizer.decode(ids, skip_special_tokens=True)) for n, ids in batch]
