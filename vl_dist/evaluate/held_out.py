"""Evaluation on held-out records: loss over their targets, and captions with scores, each example exactly once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vl_dist.data.groups import group_examples
from vl_dist.data.loader import LoadedData, load_steps
from vl_dist.data.plan import plan_epoch
from vl_dist.data.record_files import read_records
from vl_dist.data.records import Example, examples_of
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import generate
from vl_dist.evaluate.scores import DocumentFrequency, document_frequency, score_captions, tokenize
from vl_dist.model.packed import PackedModel, out_of_memory_named
from vl_dist.run.distributed import Ranks, evaluating
from vl_dist.settings import EvalConfig


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with all its accepted answers, whichever records they came from."""

    prompt: Example  # the first of them, under its record's id; its own answer is not looked at
    references: tuple[str, ...]


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
        Question(replace(group[0], id=group[0].id.split("#")[0]), tuple(example.answer for example in group))
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
) -> Evaluation:
    """Loss and captions over all held-out examples (all ranks).

    Args:
        model: not the data-parallel wrapper, whose forward may synchronise.
        max_tokens: most tokens in a pack, for the loss.
        frequency: for CIDEr-D, read on the main process only; None: that of the held-out answers.
        on_progress: called with questions answered by this rank, and this rank's number of questions.
    """
    questions = group_questions(data.examples)
    with evaluating(model):
        loss = _mean_loss(model, data, ranks, max_tokens=max_tokens)
        mine = questions[ranks.rank :: ranks.world_size]
        own = (_answer(model, data, mine, settings, tokenizer, on_progress) for _ in range(1))
        answers = next(ranks.together(own))  # ranks answer alone and meet once all are through
    numbered = [(ranks.rank + n * ranks.world_size, text) for n, text in answers]
    predictions = [text for _, text in sorted(ranks.gather(numbered))]
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


def _mean_loss(model: PackedModel, data: LoadedData, ranks: Ranks, *, max_tokens: int) -> float:
    """Cross entropy per target (all ranks)."""
    groups = group_examples(data.lengths)
    steps = plan_epoch(groups, max(64, int(groups.sizes.max())), seed=0, epoch=0, shuffle=False)
    loaded = load_steps(steps, data, rank=ranks.rank, world_size=ranks.world_size, max_tokens=max_tokens)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for step in ranks.together(loaded):
        for pack in step.packs:
            with out_of_memory_named(pack):
                sums[0] += model(pack.to(ranks.device)).double()
            sums[1] += pack.num_targets
    loss, targets = ranks.sum(sums).tolist()
    return float(loss / max(1.0, targets))


def _answer(
    model: PackedModel,
    data: LoadedData,
    questions: Sequence[Question],
    settings: EvalConfig,
    tokenizer: Any,
    on_progress: Callable[[int, int], None],
) -> list[tuple[int, str]]:
    batches = generate(
        model.peft_model.get_base_model(),
        data.collator,
        [question.prompt for question in questions],
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        pad_id=tokenizer.pad_token_id,
    )
    answers: list[tuple[int, str]] = []
    on_progress(0, len(questions))
    for batch in batches:
        answers += [(n, tokenizer.decode(ids, skip_special_tokens=True)) for n, ids in batch]
        on_progress(len(answers), len(questions))
    return answers
