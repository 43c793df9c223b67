"""The examples of one or several record files, as a sequence that makes each one when it is asked for.

A file's examples lie in memory (`MemoryFile`) or in the memory-mapped lengths index (`vl_dist.data.index`); what is built
on top of them does not see which. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.records import Example


class ExampleFile(Protocol):
    """The examples of one record file."""

    prompts: NDArray[np.int64]  # [N] number of each example's prompt; equal numbers are equal prompts about equal images

    def example(self, row: int) -> Example:
        """The example of a row."""

    def ids(self) -> list[str]:
        """The ids of all rows."""


class MemoryFile:
    """Examples as they are."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        numbers: dict[object, int] = {}
        keys = [numbers.setdefault((e.file, e.max_pixels, e.prompt), len(numbers)) for e in examples]
        self.prompts = np.array(keys, dtype=np.int64)

    def example(self, row: int) -> Example:
        """The example of a row."""
        return self._examples[row]

    def ids(self) -> list[str]:
        """The ids of all rows."""
        return [example.id for example in self._examples]


class Examples(Sequence[Example]):
    """Chosen examples of files, in any order."""

    def __init__(
        self,
        files: Sequence[ExampleFile],
        rows: NDArray[np.int64] | None = None,
        shrunk: Mapping[tuple[int, int], int] | None = None,
    ) -> None:
        """
        Args:
            files: their order numbers them from 0.
            rows: [N, 2] file and row of each example; None: all of all files, in order.
            shrunk: smaller bounds on the area of some examples' images, by file and row, in pixels.
        """
        self._files = files
        self._rows = np.concatenate([_all_rows(n, file) for n, file in enumerate(files)]) if rows is None else rows
        self._shrunk = dict(shrunk or {})

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index], {})
        file, row = (int(n) for n in self._rows[index])
        found = self._files[file].example(row)
        return replace(found, file=file, max_pixels=self._shrunk.get((file, row), found.max_pixels))

    def chosen(self, indices: NDArray[np.int64], shrunk: Mapping[int, int]) -> "Examples":
        """Some of these examples.

        Args:
            indices: which, in this sequence.
            shrunk: smaller bounds on the area of some examples' images, by index in this sequence, in pixels.
        """
        places = {n: (int(self._rows[n][0]), int(self._rows[n][1])) for n in shrunk}
        return Examples(self._files, self._rows[indices], self._shrunk | {places[n]: area for n, area in shrunk.items()})

    def ids(self) -> list[str]:
        """The ids of all examples, without making the examples."""
        by_file = [file.ids() for file in self._files]
        return [by_file[file][row] for file, row in self._rows.tolist()]

    def trunks(self) -> NDArray[np.int64]:
        """[N] a number for each example; equal ones ask the same about the same pixels, so they can share it."""
        numbers: dict[tuple[int, int, int | None], int] = {}
        keys = (
            (file, int(self._files[file].prompts[row]), self._shrunk.get((file, row))) for file, row in self._rows.tolist()
        )
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def file_numbers(self) -> NDArray[np.int64]:
        """[N] the number of each example's file."""
        return self._rows[:, 0].copy()


def in_memory(examples: Sequence[Example]) -> Examples:
    """Examples of one file that need no index."""
    return Examples([MemoryFile(examples)])


def ids_of(examples: Sequence[Example]) -> list[str]:
    """The ids of all examples."""
    return examples.ids() if isinstance(examples, Examples) else [example.id for example in examples]


def _all_rows(number: int, file: ExampleFile) -> NDArray[np.int64]:
    count = len(file.prompts)
    return np.stack([np.full(count, number, dtype=np.int64), np.arange(count, dtype=np.int64)], axis=1)
