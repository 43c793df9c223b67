"""The tutorial's data_vl.json: an image's path between vision marks, and one caption."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vl_dist.data.records import parse_tutorial
from vl_dist.data.sources.rows import ImageFile, Row, Skipped, Source
from vl_dist.errors import UserError


def from_tutorial_json(path: Path) -> Source:
    """One row a conversation, its id kept. Relative image paths are relative to the file's folder.

    Raises:
        UserError: no such file, or it is not a list as the tutorial writes it.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give the tutorial's data_vl.json.")
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}). Give the tutorial's data_vl.json.") from None
    if not isinstance(conversations, list):
        raise UserError(f"{path} must hold a list of conversations. Records (.jsonl) need no preparing.")
    return Source(_rows(conversations, path.parent), len(conversations), image_root=path.parent)


def _rows(conversations: list[Any], folder: Path) -> Iterator[Row | Skipped]:
    places: dict[str, str] = {}
    for number, conversation in enumerate(conversations, start=1):
        place = f"conversation {number}"
        try:
            record = parse_tutorial(conversation, "")
        except UserError as error:
            yield Skipped(place, str(error).rstrip("."))
            continue
        if record.id in places:
            yield Skipped(place, f"its id was used before ({record.id!r} in {places[record.id]})")
            continue
        places[record.id] = place
        yield Row(place, ImageFile(folder / record.image_paths[0]), record.answers, id=record.id)
