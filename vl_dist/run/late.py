"""Examples whose image went bad after the start: they leave their step, are written down, and must stay few."""

from collections.abc import Sequence

from vl_dist.data.lengths import Dropped
from vl_dist.errors import SharedError
from vl_dist.run.metrics import Record

NUM_SHOWN = 5


class LateFaults:
    """The budget of a run for them; the same on every rank."""

    def __init__(self, before: Sequence[Dropped], *, record: Record, num_examples: int, max_fraction: float) -> None:
        """
        Args:
            before: those that the steps before this start met.
            record: writes them down.
            num_examples: that the run trains on.
            max_fraction: of them, `data.max_bad_fraction`.
        """
        self._met = {one.id: one for one in before}
        self._record = record
        self._num_examples = num_examples
        self._max_fraction = max_fraction
        record.bad(self._met.values())

    def add(self, dropped: Sequence[Dropped]) -> None:
        """Those of one step, over all ranks (all ranks).

        Raises:
            SharedError: by now there are more than the budget allows.
        """
        new = {one.id: one for one in dropped if one.id not in self._met}
        self._met |= new
        self._record.bad(new.values())
        if new and len(self._met) > self._max_fraction * self._num_examples:
            first = "\n".join(f"  {one.id}: {one.reason}" for one in list(self._met.values())[:NUM_SHOWN])
            raise SharedError(
                f"{len(self._met)} of {self._num_examples} examples have an image that can no longer be used, more than "
                f"data.max_bad_fraction={self._max_fraction:g} allows. Restore the images, or raise it to train without "
                f"them; bad_rows.jsonl lists all. First:\n{first}"
            )
