"""All that concerns more than one process: who we are, and every collective of the project.

Data and model code takes `rank` and `world_size` as arguments; only this module and train.py know accelerate.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, broadcast_object_list, gather_object
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vl_dist.errors import SharedError, UserError
from vl_dist.model.flops import known_peak_flops
from vl_dist.run.freed_memory import keep_freed_memory
from vl_dist.run.launched import Launch, refuse_lost_ranks

T = TypeVar("T")
N = TypeVar("N")


class Ranks:
    """The processes of this run, seen from one of them. Methods marked *all ranks* must be called by every rank."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        # What processes agree on between steps goes over the hosts: over the devices it would wait for all queued work.
        self._hosts: Any = None
        if self.world_size > 1 and self.device.type != "cpu":
            self._hosts = torch.distributed.new_group(backend="gloo")

    @classmethod
    def start(cls, launch: Launch, *, cpu_threads: int | None, timeout_s: float | None = None) -> "Ranks":
        """Joins the process group that the launcher announced, if it announced one (all ranks).

        Args:
            launch: what the launcher asks for.
            cpu_threads: of this process, on a CPU; None: its share of the cores.
            timeout_s: how long a collective waits for a rank; None: as torch has it.

        Raises:
            UserError: it announced one, and this process is alone nevertheless.
        """
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when accelerate imports deepspeed
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        ranks = cls(
            Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
            if launch.deepspeed is None
            else _with_deepspeed(launch.deepspeed, timeout, on_cpu=on_cpu)
        )
        refuse_lost_ranks(os.environ, ranks.world_size)
        if ranks.device.type == "cpu":
            torch.set_num_threads(cpu_threads or ranks._share_of_cores())
            keep_freed_memory()
        return ranks

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes files and talks to the person."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """The lowest rank of its machine."""
        return bool(self.accelerator.is_local_main_process)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, still on the device; nothing is read back (all ranks)."""
        if self.world_size == 1:
            return value
        total = self.accelerator.reduce(value, reduction="sum")
        assert isinstance(total, torch.Tensor)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; as `counts` (all ranks)."""
        if self.world_size == 1:
            return flag
        return self.counts(int(flag))[0] > 0

    def counts(self, *own: int) -> list[int]:
        """Each count summed over ranks, host to host; no device is waited for (all ranks)."""
        if self.world_size == 1:
            return list(own)
        total = torch.tensor(own)
        torch.distributed.all_reduce(total, group=self._hosts)
        return [int(n) for n in total.tolist()]

    def all_finite(self, *values: torch.Tensor) -> bool:
        """Whether all these numbers on all ranks are numbers; the one read of a device in a step (all ranks)."""
        strange = sum((~torch.isfinite(value)).sum().to(self.device) for value in values)
        return bool(self.sum(torch.as_tensor(strange, device=self.device)).item() == 0)

    def gather(self, rows: list[T]) -> list[T]:
        """The rows of all ranks, in rank order, on every rank (all ranks)."""
        gathered: list[T] = rows if self.world_size == 1 else gather_object(rows)
        return gathered

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 acts, and all ranks get what it returned (all ranks).

        Raises:
            UserError: rank 0 met one; every rank raises it, so that none waits for the others.
        """
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = action()
            except UserError as error:
                result[1] = str(error)
        if self.world_size > 1:
            broadcast_object_list(result)
        if result[1] is not None:
            raise SharedError(result[1])
        value: T = result[0]
        return value

    def each(self, action: Callable[[], T]) -> T:
        """What this rank's own action returned, once it went well on every rank (all ranks).

        It may take longer than a collective would wait, as long as it takes the ranks about the same time.

        Raises:
            UserError: a rank met one; every rank raises it.
        """
        return next(self.together(action() for _ in range(1)))

    def together(self, items: Iterable[T]) -> Iterator[T]:
        """The items, of which each rank has as many; none goes on before all have theirs (all ranks).

        Raises:
            UserError: a rank met one making its item; every rank raises it, so that none waits for the others.
        """
        return (item for item, _ in self.together_noting(items, lambda item: ()))

    def together_noting(self, items: Iterable[T], notes: Callable[[T], Sequence[N]]) -> Iterator[tuple[T, list[N]]]:
        """As `together`; with each item what all ranks note about theirs, in rank order.

        Args:
            notes: of one item; most have none, and then nothing is gathered.
        """
        own = iter(items)
        while True:
            item: list[T] = []
            error: UserError | None = None
            try:
                item.append(next(own))
            except StopIteration:
                return
            except UserError as met:
                error = met
            noted = list(notes(item[0])) if item else []
            num_errors, num_noted = self.counts(int(error is not None), len(noted))
            if num_errors:
                raise SharedError(next(text for text in self.gather([error and str(error)]) if text is not None))
            yield item[0], self.gather(noted) if num_noted else []

    def wait(self) -> None:
        """Until every rank is here (all ranks)."""
        self.accelerator.wait_for_everyone()

    @property
    def loss_scale(self) -> float:
        """Undoes the mean over ranks that data parallel and ZeRO take: the loss is over all ranks' targets already."""
        return float(self.world_size)

    def peak_flops(self, given_tflops: float | None) -> float | None:
        """Operations a second that one device can do at best: as given, else by its name; None on a CPU."""
        if given_tflops is not None:
            return given_tflops * 1e12
        return known_peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def close(self) -> None:
        """Leaves the process group (all ranks, at the orderly end only)."""
        self.accelerator.end_training()

    def _share_of_cores(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cores // here)


def _with_deepspeed(settings: dict[str, Any], timeout: timedelta | None, *, on_cpu: bool) -> Accelerator:
    if find_spec("deepspeed") is None:
        raise UserError("The launcher asks for DeepSpeed, which is not installed: pip install deepspeed, or use ddp.yaml.")
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    except ValueError as error:
        raise UserError(f"accelerate does not take this DeepSpeed configuration: {error}") from None
    # DeepSpeed calls collectives by names that torch has replaced, and would say so for every layer.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if on_cpu:
        import deepspeed

        # A collective that training never calls, and that the first start would spend a minute compiling.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Not cpu=True, with which accelerate forgets DeepSpeed; without the name of the backend it would believe it is alone.
    group = InitProcessGroupKwargs(backend="gloo", timeout=timeout) if on_cpu else InitProcessGroupKwargs(timeout=timeout)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])
    # accelerate tells transformers of stage 3, whatever zero3_init_flag says: it would load every weight in float32, and
    # make ranks take each step of a caption together, however many captions each has.
    unset_hf_deepspeed_config()
    return accelerator


@contextlib.contextmanager
def said_once(ranks: Ranks) -> Iterator[None]:
    """Around a command that every rank runs: of an error that all of them meet, the main process alone speaks.

    Raises:
        SystemExit: on the other ranks, with the same code.
    """
    try:
        yield
    except SharedError:
        if ranks.is_main:
            raise
        raise SystemExit(2) from None


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seeds all of torch's generators for one step of one rank.

    Random state is thereby a function of three numbers: a resumed run draws what the undisturbed one would have drawn, and
    nothing random has to be stored.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, dtype=np.uint64)
    torch.manual_seed(int(state[0]))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no graph inside; as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
