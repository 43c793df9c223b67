"""Steps whose loss or gradient is no number: all ranks stop, or skip the step, before the optimizer changes anything."""

from collections.abc import Sequence
from typing import Literal

import torch

from vl_dist.data.collate import Batch
from vl_dist.errors import SharedError
from vl_dist.run.distributed import Ranks

MOST_IN_A_ROW = 10  # skipped steps; after them it is not the data
NUM_SHOWN = 8  # examples in a message


class NonFiniteSteps:
    """What happens with them; the same on every rank."""

    def __init__(self, policy: Literal["stop", "skip"], ranks: Ranks, *, num_skipped: int) -> None:
        """
        Args:
            policy: `optim.nonfinite`.
            num_skipped: steps skipped before this start.
        """
        self._policy = policy
        self._ranks = ranks
        self._last = 0
        self._in_a_row = 0
        self.num_skipped = num_skipped

    def met(self, step: int, packs: Sequence[Batch], losses: torch.Tensor) -> str:
        """Why this step is skipped (all ranks).

        Args:
            step: its number, from 1.
            packs: this rank's.
            losses: [packs] of this rank, on the device.

        Raises:
            SharedError: `optim.nonfinite` is stop, or too many were skipped in a row.
        """
        rank = self._ranks.rank
        blamed = [
            f"rank {rank} has loss {loss:g} in a pack of {_named(pack.example_ids)}"
            for pack, loss in zip(packs, losses.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(loss))
        ]
        found = self._ranks.gather(blamed)
        what = "; ".join(found) if found else "every loss is a number, but the gradient is not"
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self._last = step
        self.num_skipped += 1
        if self._policy == "skip" and self._in_a_row < MOST_IN_A_ROW:
            return f"step {step} was skipped: {what}"
        rest = (
            f"{self._in_a_row} steps in a row were skipped; the weights may be beyond repair. "
            if self._policy == "skip"
            else "Set optim.nonfinite=skip to leave such steps out. "
        )
        raise SharedError(
            f"Step {step} cannot be taken: {what}. Nothing was changed by it. Look at these examples, or lower optim.lr "
            f"and start again from the last checkpoint. {rest}".rstrip()
        )


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:NUM_SHOWN])
    return shown if len(ids) <= NUM_SHOWN else f"{shown} and {len(ids) - NUM_SHOWN} more"
