"""Scores of a saved adapter on a record file, by any number of processes: each question once, and the same scores."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vl_dist.adapter.contract import AdapterContract
from vl_dist.adapter.load import LoadedAdapter, load, refuse_other_prompt
from vl_dist.data.image_files import DEFAULT_LIMITS
from vl_dist.data.images import PixelBudget
from vl_dist.data.lengths import HeaderReader, measure, read_sizes
from vl_dist.data.loader import LoadedData
from vl_dist.data.record_files import BadRow, Row, read_rows
from vl_dist.data.records import Record, examples_of
from vl_dist.data.validate import first_bad
from vl_dist.errors import UserError
from vl_dist.evaluate.held_out import Evaluation, Sample, evaluate
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.launched import Launch
from vl_dist.settings import EvalConfig

TOKENS_PER_PACK = 8192  # for the loss; a longer example has a pack of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is evaluated, and how."""

    adapter: Path
    contract: AdapterContract
    base_dir: Path | None  # None: where it was in training
    records: Path
    image_root: Path | None  # None: the records' folder
    budget: PixelBudget
    batch_size: int  # prompts answered together on one rank
    allow_other_prompt: bool


def plain_launch(env: Mapping[str, str], command: str = "evaluate") -> Launch:
    """How the launcher started this process.

    Args:
        command: who asks.

    Raises:
        UserError: with DeepSpeed, which inference has no use for.
    """
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            f"{command} needs no DeepSpeed: each process holds the whole model. Launch it with accelerate_configs/ddp.yaml."
        )
    return Launch(int(env.get("WORLD_SIZE", "1")), None, "", ())


def evaluate_records(job: Job, ranks: Ranks, on_progress: Callable[[int, int], None]) -> Evaluation:
    """Loss, captions and scores (all ranks).

    Args:
        on_progress: called with questions answered by this rank, and this rank's number of questions.

    Raises:
        UserError: the adapter does not hold its contract, or a record cannot be used.
    """

    def prepare() -> tuple[LoadedAdapter, LoadedData]:
        rows = _usable_rows(job)  # before the model, which takes longer
        adapter = load(job.adapter, base_dir=job.base_dir, device=ranks.device)
        return adapter, _measured(rows, adapter, job)

    adapter, data = ranks.each(prepare)
    return evaluate(
        PackedModel(adapter.model, "sdpa"),
        data,
        ranks,
        EvalConfig(batch_size=job.batch_size, max_new_tokens=job.contract.max_new_tokens),
        tokenizer=adapter.processor.tokenizer,
        max_tokens=max(TOKENS_PER_PACK, int(data.lengths.tokens.max())),
        on_progress=on_progress,
    )


def write_samples(path: Path, samples: tuple[Sample, ...]) -> None:
    """Every question with its references, prediction and CIDEr-D, one JSON object a line.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text("".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))
    except OSError as error:
        raise UserError(f"The samples {path} cannot be written ({error.strerror}); give another --samples.") from None


def _usable_rows(job: Job) -> list[Record]:
    """All records, none of which may be left out: a score is of a whole file."""
    rows: list[Row] = read_rows(job.records, default_prompt=job.contract.prompt[-1].text)
    _refuse_bad(job, [row for row in rows if isinstance(row, BadRow)], len(rows))
    records = [row for row in rows if isinstance(row, Record)]
    for record in records:
        refuse_other_prompt(job.contract, record.prompt, f"record {record.id}", allow_other=job.allow_other_prompt)
    return records


def _measured(records: list[Record], adapter: LoadedAdapter, job: Job) -> LoadedData:
    root = job.image_root if job.image_root is not None else job.records.parent
    names = [name for record in records for name in record.image_paths]
    sizes = read_sizes(names, root, DEFAULT_LIMITS)
    headers = HeaderReader(root, job.budget, adapter.shape, sizes=sizes)
    faults = [(record, headers.fault(record)) for record in records]
    _refuse_bad(job, [BadRow(record.id, record.place, why) for record, why in faults if why is not None], len(records))
    examples = examples_of(records)
    return LoadedData(examples, measure(examples, adapter.encoder, headers), adapter.collator([root], job.budget))


def _refuse_bad(job: Job, bad: list[BadRow], num_rows: int) -> None:
    if bad:
        raise UserError(
            f"{len(bad)} of {num_rows} records of {job.records} cannot be used, so there is no score of it. Mend or remove "
            f"them, or give --image-root.\n{first_bad(bad)}"
        )
