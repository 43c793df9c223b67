"""Training and held-out examples out of measured record files: split, fitted into packs, grouped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.collate import Collator
from vl_dist.data.encode import Encoder
from vl_dist.data.examples import Examples
from vl_dist.data.groups import Groups, group_examples, group_numbers
from vl_dist.data.images import PatchShape
from vl_dist.data.index_tables import IndexedFile
from vl_dist.data.lengths import Dropped, HeaderReader, Lengths, fit
from vl_dist.data.loader import LoadedData
from vl_dist.data.plan import Plan, make_plan
from vl_dist.data.record_files import BadRow
from vl_dist.data.validate import first_bad, image_limits, pixel_budget, refuse_too_many_bad, training_rows
from vl_dist.errors import UserError
from vl_dist.settings import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Training and held-out examples with their sizes, and what was left out of both."""

    train: LoadedData
    groups: Groups  # of the training examples
    held_out: LoadedData | None
    bad: tuple[BadRow, ...]  # as bad_rows.jsonl has them, dropped examples of both included
    dropped: tuple[Dropped, ...]  # training examples that no pack holds
    notes: tuple[str, ...]  # what a person should know

    def plan(self, config: Config) -> Plan:
        """The steps of the whole run.

        Raises:
            UserError: there is none.
        """
        plan = make_plan(
            self.groups,
            config.batch.examples_per_step,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
            bucket_steps=config.data.bucket_steps,
            num_epochs=config.optim.num_epochs,
            max_steps=config.optim.max_steps,
        )
        if plan.num_steps == 0:
            raise UserError(
                f"The weights of data.train ({', '.join(f'{w:g}' for w in self.groups.weights)}) leave no example in "
                f"{config.optim.num_epochs} epochs. Raise them, or optim.num_epochs."
            )
        return plan


@dataclass(frozen=True, slots=True)
class Side:
    """What is trained on, or what is held out."""

    key: str  # the setting that says so
    files: Sequence[IndexedFile]
    masks: Sequence[NDArray[np.bool_]]  # which examples of each file


def assemble(
    config: Config, files: Sequence[IndexedFile], encoder: Encoder, image_processor: Any, shape: PatchShape
) -> RunData:
    """Training and held-out examples of a run.

    Args:
        files: those of `validate.record_paths`, in its order.

    Raises:
        UserError: nothing to train on or nothing held out, too many records that cannot be used, an id in two files, or an
            example longer than a pack.
    """
    data = config.data
    for file in files:
        refuse_too_many_bad(file.path, file.bad, file.num_rows, data.max_bad_fraction)
    training, own_file = files[: len(data.train)], files[len(data.train) :]
    _refuse_repeated_ids(training)
    kept = training_rows([file.num_rows for file in training], data.eval)
    in_training = [file.record_rows < bound for file, bound in zip(training, kept, strict=True)]

    def fitted(side: Side) -> tuple[LoadedData, tuple[Dropped, ...]]:
        return _fit(config, side, encoder, image_processor, shape)

    train, dropped = fitted(Side("data.train", training, in_training))
    bad = [*(row for file in files for row in file.bad), *_rows_of(dropped, training)]
    held_out = None
    if data.eval is not None:
        others = [np.ones_like(file.record_rows, dtype=np.bool_) for file in own_file] or [~mask for mask in in_training]
        side = Side(f"data.eval={data.eval}", own_file or training, others)
        held_out, also_dropped = fitted(side)
        bad += _rows_of(also_dropped, side.files)
    assert isinstance(train.examples, Examples)
    return RunData(
        train=train,
        groups=group_examples(train.lengths, train.examples.file_numbers(), [file.weight for file in data.train]),
        held_out=held_out,
        bad=tuple(bad),
        dropped=dropped,
        notes=tuple(file.uncached for file in files if file.uncached is not None),
    )


def _fit(
    config: Config, side: Side, encoder: Encoder, image_processor: Any, shape: PatchShape
) -> tuple[LoadedData, tuple[Dropped, ...]]:
    """The examples of one side that fit into a pack, and those that do not."""
    data, files = config.data, side.files
    budget, limits = pixel_budget(data), image_limits(data)
    chosen = np.flatnonzero(np.concatenate(side.masks))
    if len(chosen) == 0:
        raise UserError(f"None of the records of {side.key} can be used:\n{first_bad([r for f in files for r in f.bad])}")
    found = fit(
        Examples([file.examples for file in files]).chosen(chosen, {}),
        Lengths.of_rows(np.concatenate([file.lengths.columns for file in files])[chosen]),
        encoder,
        [HeaderReader(file.root, budget, shape, limits) for file in files],
        max_tokens=config.batch.max_tokens_per_pack,
        overflow=data.overflow,
    )
    if len(found.examples) == 0:
        raise UserError(
            f"No example of {side.key} fits into a pack; the first {found.dropped[0].reason}. Raise "
            "batch.max_tokens_per_pack or make images smaller (data.max_pixels)."
        )
    trunks = found.examples.trunks() if data.share_prefix else None
    group = group_numbers(trunks, len(found.examples), config.batch.examples_per_step)
    roots = [file.root for file in files]
    collator = Collator(encoder, image_processor, roots=roots, budget=budget, shape=shape, limits=limits)
    return LoadedData(found.examples, replace(found.lengths, group=group), collator), found.dropped


def _refuse_repeated_ids(files: Sequence[IndexedFile]) -> None:
    """Within a file, the second of two records of one id is a bad row already."""
    seen: dict[str, Path] = {}
    for file in files if len(files) > 1 else ():
        ids = file.examples.ids()
        repeated = next((name for name in ids if name in seen), None)
        if repeated is not None:
            raise UserError(
                f"The id {repeated!r} is in {seen[repeated]} and in {file.path}. Ids must differ over all files of "
                "data.train, because the ledger names examples by them."
            )
        seen |= dict.fromkeys(ids, file.path)


def _rows_of(dropped: Sequence[Dropped], files: Sequence[IndexedFile]) -> list[BadRow]:
    """Dropped examples as rows of bad_rows.jsonl, with the place of their record."""
    wanted = {one.id for one in dropped}
    places = {
        name: f"{file.path}, {file.places[row]}"
        for file in files
        if wanted
        for row, name in enumerate(file.examples.ids())
        if name in wanted
    }
    return [BadRow(one.id, places[one.id], one.reason) for one in dropped]
