"""The loader: one rank's packs, in plan order, built by worker processes.

Workers get lists of indices and return `Batch`es. They draw nothing at random and the order is the plan's, so any number of
workers gives the same packs.
"""

import hashlib
import itertools
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vl_dist.data.assign import Document, assign, pack_lengths, padded_length
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.examples import ids_of
from vl_dist.data.lengths import Dropped, Lengths
from vl_dist.data.pictures import ImageKey
from vl_dist.data.plan import Step
from vl_dist.data.records import Example
from vl_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Examples with their sizes, and what turns them into tensors."""

    examples: Sequence[Example]
    lengths: Lengths
    collator: Collator

    @property
    def fingerprint(self) -> str:
        """Hash of ids and sizes: what the plan of a run follows from, beside its settings."""
        found = hashlib.sha256("\n".join(ids_of(self.examples)).encode())
        for column in (self.lengths.tokens, self.lengths.targets, self.lengths.patches, self.lengths.group):
            found.update(column.tobytes())
        return found.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class StepPacks:
    """One rank's share of a step."""

    step: Step
    packs: tuple[Batch, ...]

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """Examples that this rank should have had, but whose image went bad since the start."""
        return tuple(one for pack in self.packs for one in pack.dropped)


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What a worker is asked for."""

    documents: tuple[Document, ...]  # indices of examples
    length: int | None  # tokens to pad up to


class _Packs(Dataset["Batch | UserError"]):
    def __init__(self, examples: Sequence[Example], collator: Collator) -> None:
        self._examples = examples
        self._collator = collator

    def __getitem__(self, request: PackRequest) -> Batch | UserError:
        # An error goes back as a value: torch would wrap an exception in the worker's traceback.
        try:
            documents = [[self._examples[n] for n in document] for document in request.documents]
            return self._collator.pack_documents(documents, length=request.length)
        except UserError as error:
            return error


class _Portions(Dataset[Batch]):
    def __init__(self, portions: Sequence[Sequence[ImageKey]], collator: Collator) -> None:
        self._portions = portions
        self._collator = collator

    def __len__(self) -> int:
        return len(self._portions)

    def __getitem__(self, number: int) -> Batch:
        return self._collator.pack_images(self._portions[number])


class _PlanOrder(Sampler[PackRequest]):
    def __init__(self, requests: Iterator[PackRequest]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[PackRequest]:
        return self._requests


def load_steps(
    steps: Iterable[Step],
    data: LoadedData,
    *,
    rank: int,
    world_size: int,
    max_tokens: int,
    num_pack_lengths: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[StepPacks]:
    """One rank's packs of these steps, step by step.

    Args:
        steps: what is left of the plan; drawn only as far ahead as the workers are.
        max_tokens: most tokens in a pack.
        num_pack_lengths: packs are padded up to one of so many lengths; None: not padded.
        num_workers: processes; 0 builds packs in this one.
        pin_memory: for faster copies to a CUDA device.

    Raises:
        UserError: a text cannot be encoded. An image that cannot be used is no error: its examples leave the pack.
    """
    planned = ((step, assign(step, data.lengths, world_size=world_size, max_tokens=max_tokens)) for step in steps)
    ahead, here = itertools.tee(planned)
    allowed = pack_lengths(max_tokens, num_pack_lengths) if num_pack_lengths is not None else None
    requests = (
        PackRequest(pack.documents, padded_length(pack.num_tokens, allowed) if allowed else None)
        for _, assignment in ahead
        for pack in assignment.packs[rank]
    )
    loader = DataLoader(
        _Packs(data.examples, data.collator),
        sampler=_PlanOrder(requests),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # of its own: torch's default one belongs to dropout
    )
    packs = iter(loader)
    for step, assignment in here:
        yield StepPacks(step, tuple(_raise_error(next(packs)) for _ in range(assignment.num_packs_per_rank)))


def load_images(portions: Sequence[Sequence[ImageKey]], collator: Collator, *, num_workers: int) -> Iterator[Batch]:
    """Packs of images alone, one for each portion, in order; nothing is drawn further ahead than workers are.

    Args:
        num_workers: processes; 0 decodes in this one.
    """
    packs: Iterable[Batch] = DataLoader(
        _Portions(portions, collator),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_one_thread if num_workers else None,
        generator=torch.Generator(),
    )
    return iter(packs)


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds that waiting for it took."""
    started = time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - started
        started = time.perf_counter()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # workers share the cores with the training process
    # A request to stop often goes to every process of a job. The step in progress still needs its packs; workers end with
    # the process that they work for.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _raise_error(loaded: Batch | UserError) -> Batch:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded
