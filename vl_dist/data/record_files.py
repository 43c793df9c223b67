"""Rows of record files: each a record, or the reason why it cannot be used."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vl_dist.data.records import Record, parse_record, parse_tutorial
from vl_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class BadRow:
    """What stands in place of a record that cannot be used, and is left out."""

    id: str | None  # None: the row gives none that can be read
    place: str
    reason: str

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {self.id!r})"
        return f"{self.place}{name}: {self.reason}"


Row = Record | BadRow


def read_rows(path: Path, *, default_prompt: str) -> list[Row]:
    """Every row of a file, in its order; rows that are no record, or that repeat an id, as `BadRow`s.

    Args:
        path: `*.json` is read as the tutorial's `data_vl.json`, everything else as one JSON object a line.
        default_prompt: prompt after the image for `data_vl.json`, whose own text is not used (as in the tutorial).

    Raises:
        UserError: no such file, no row in it, or a `*.json` that is no list at all.
    """
    if not path.is_file():
        raise UserError(f"There is no record file {path}. Set data.train (or data.eval) to an existing file.")
    parsed = _read_tutorial(path, default_prompt) if path.suffix == ".json" else _read_lines(path)
    rows: list[Row] = []
    places: dict[str, str] = {}
    for place, row in parsed:
        if isinstance(row, Record) and row.id in places:
            row = BadRow(row.id, f"{path}, {place}", f"the id {row.id!r} was used before, in {places[row.id]}")
        if isinstance(row, Record):
            places[row.id] = place
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no record. Each line must be one JSON object with id and messages.")
    return rows


def read_records(path: Path, *, default_prompt: str) -> list[Record]:
    """All records of a file in which every row must be one.

    Raises:
        UserError: as `read_rows`, or a row is not a record or repeats an id; the message names its place.
    """
    rows = read_rows(path, default_prompt=default_prompt)
    bad = next((row for row in rows if isinstance(row, BadRow)), None)
    if bad is not None:
        raise UserError(f"{bad}.")
    return [row for row in rows if isinstance(row, Record)]


def _read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # as bytes: text mode would end lines at characters that JSON allows inside a text
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"line {number}"
                yield place, _checked(line, f"{path}, {place}", parse_record)


def _read_tutorial(path: Path, prompt: str) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    if not isinstance(found, list):
        raise UserError(f"{path} must be a list of conversations; files of one object a line must end in .jsonl.")
    for number, row in enumerate(found, start=1):
        place = f"conversation {number}"
        yield place, _checked(row, f"{path}, {place}", lambda value: parse_tutorial(value, prompt))


def _checked(source: Any, place: str, parse: Callable[[Any], Record]) -> Row:
    """The record that a line (as bytes) or an object gives, or why it gives none."""
    row = None
    try:
        row = json.loads(source) if isinstance(source, bytes) else source
        json.dumps(row, ensure_ascii=False).encode()  # refuses halves of surrogate pairs, which stand for no character
        return replace(parse(row), place=place)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, column {error.colno})"
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start : error.end]
        row, reason = None, f"holds {half!r}, half of a surrogate pair, which stands for no character"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start + 1})"
    except UserError as error:
        reason = str(error).rstrip(".")
    except (RecursionError, ValueError):
        reason = "cannot be read as JSON (nested too deeply, or a number with thousands of digits)"
    name = row.get("id") if isinstance(row, dict) else None
    return BadRow(name if isinstance(name, str) and name else None, place, reason)
