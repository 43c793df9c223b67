"""From rows of any source to records.jsonl, or to the tutorial's two files. What marks all as there is written last."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vl_dist.data.records import ImagePart, Message, TextPart, messages_to_json
from vl_dist.data.sources.files import claimed, mark, settle, write_file
from vl_dist.data.sources.rows import ImageFile, Row, Skipped, Source, UnusableError, check_image
from vl_dist.errors import UserError

RECORDS = "records.jsonl"
SKIPPED = "prepare_skipped.jsonl"
TUTORIAL_CSV = "coco-2024-dataset.csv"  # named so by the tutorial
TUTORIAL_JSON = "data_vl.json"

OnRow = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be written, and where."""

    out: Path
    source: Mapping[str, Any]  # all that decides what is written, as JSON
    image_folder: str | None = None  # where images without a file of their own go, under `out`
    prompt: str = "COCO Yes:"
    max_examples: int | None = None
    as_tutorial: bool = False

    @property
    def made(self) -> tuple[str, ...]:
        """Names under `out`; the last one says that all is there."""
        images = (self.image_folder,) if self.image_folder is not None else ()
        return (*images, TUTORIAL_CSV, TUTORIAL_JSON) if self.as_tutorial else (*images, RECORDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What was written."""

    file: str  # records.jsonl or data_vl.json, under the output folder
    num_records: int
    num_examples: int
    num_images: int
    image_root: str | None  # to be set as data.image_root; None: the output folder itself
    skipped: dict[str, int]  # rows for each reason


@dataclass(frozen=True, slots=True)
class _Placed:
    """A row whose image is on this disk and was decoded to its end."""

    id: str | None
    image: Path
    captions: tuple[str, ...]


def prepare(job: Job, open_source: Callable[[], Source], on_row: Callable[[int | None], OnRow]) -> tuple[Prepared, bool]:
    """Writes everything, unless it is there already.

    Args:
        open_source: called only if there is something to do.
        on_row: given the number of rows, if it is known, returns what is called with the rows done.

    Returns:
        What is there now, and whether it was there before.

    Raises:
        UserError: the source or the output folder cannot be used, or no row can.
    """
    with claimed(job.out, job.source, job.made) as result:
        if result is not None:
            return Prepared(**result), True
        source = open_source()  # before the mark: what cannot be opened leaves none
        mark(job.out, job.source, job.made)
        skipped: list[Skipped] = []
        placed = list(_limited(_place(source.rows, job.out, skipped, on_row(source.num_rows)), job.max_examples))
        _write_skipped(job.out, skipped)
        if not placed:
            first = f" The first: {skipped[0].place}: {skipped[0].reason}." if skipped else ""
            raise UserError(f"The source gives no example that can be used; {len(skipped)} rows were skipped.{first}")
        reasons = dict(Counter(re.split(r" \(|, got ", skip.reason)[0] for skip in skipped))
        write = _write_tutorial if job.as_tutorial else _write_records
        return write(job, placed, source.image_root, reasons), False


def _place(rows: Iterator[Row | Skipped], out: Path, skipped: list[Skipped], on_row: OnRow) -> Iterator[_Placed]:
    checked: dict[Path, None] = {}  # files are often named by several rows
    for number, row in enumerate(rows, start=1):
        on_row(number)
        if isinstance(row, Skipped):
            skipped.append(row)
        elif not row.captions:
            skipped.append(Skipped(row.place, "no caption"))
        else:
            try:
                placed = _Placed(row.id, _place_image(row, out, checked), row.captions)
                _require_utf8(placed)
                yield placed
            except UnusableError as error:
                skipped.append(Skipped(row.place, str(error)))


def _place_image(row: Row, out: Path, checked: dict[Path, None]) -> Path:
    if isinstance(row.image, ImageFile):
        path = _existing(row.image.path)
        if path not in checked:
            check_image(path)
            checked[path] = None
        return path
    path = out / (row.image.stem + check_image(row.image.data))
    if not path.is_file():
        write_file(path, row.image.data)
    return path


def _existing(path: Path) -> Path:
    try:
        found = path.resolve()  # links are followed now, so that no path leads out of the image root
        exists = found.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a null byte, a circle of links
        exists = False
    if not exists:
        raise UnusableError("there is no such file")
    return found


def _require_utf8(placed: _Placed) -> None:
    for what, text in (("id", placed.id or ""), ("path", str(placed.image)), *(("caption", c) for c in placed.captions)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UnusableError(f"its {what} holds what cannot be written as UTF-8") from None


def _limited(rows: Iterator[_Placed], max_examples: int | None) -> Iterator[_Placed]:
    left = max_examples
    for row in rows:
        if left is None:
            yield row
            continue
        captions = row.captions[:left]
        left -= len(captions)
        yield _Placed(row.id, row.image, captions)
        if left == 0:  # before another row is read: reading one may mean fetching it
            return


def _write_skipped(out: Path, skipped: list[Skipped]) -> None:
    if skipped:
        lines = [json.dumps({"row": skip.place, "reason": skip.reason}, ensure_ascii=False) for skip in skipped]
        write_file(out / SKIPPED, ("\n".join(lines) + "\n").encode(errors="backslashreplace"))
    else:
        (out / SKIPPED).unlink(missing_ok=True)


def _write_records(job: Job, placed: list[_Placed], image_root: Path | None, reasons: dict[str, int]) -> Prepared:
    root = choose_root([row.image for row in placed], job.out, image_root)
    captions: dict[str, list[str]] = {}
    images: dict[str, str] = {}
    for row in placed:
        path = row.image.resolve().relative_to(root).as_posix()
        name = row.id if row.id is not None else path
        images.setdefault(name, path)
        captions.setdefault(name, []).extend(row.captions)
    lines = [
        json.dumps(to_record(name, images[name], texts, job.prompt), ensure_ascii=False) for name, texts in captions.items()
    ]
    prepared = Prepared(
        file=RECORDS,
        num_records=len(lines),
        num_examples=sum(map(len, captions.values())),
        num_images=len(set(images.values())),
        image_root=None if root == job.out.resolve() else str(root),
        skipped=reasons,
    )
    _finish(job, prepared, {RECORDS: ("\n".join(lines) + "\n").encode()})
    return prepared


def to_record(name: str, image: str, captions: list[str], prompt: str) -> dict[str, Any]:
    """One object of records.jsonl: image, then prompt; several captions become `answers`."""
    user = Message("user", (ImagePart(image), TextPart(prompt)))
    if len(captions) > 1:
        return {"id": name, "messages": messages_to_json([user]), "answers": captions}
    return {"id": name, "messages": [*messages_to_json([user]), {"role": "assistant", "content": captions[0]}]}


def choose_root(images: list[Path], out: Path, image_root: Path | None) -> Path:
    """The folder that image paths are relative to: the output folder, the source's own, or one that they have in common.

    Raises:
        UserError: they have no folder in common but the whole disk.
    """
    folders = {image.resolve().parent for image in images}
    for root in (out, image_root):
        if root is not None and all(folder.is_relative_to(root.resolve()) for folder in folders):
            return root.resolve()
    common = Path(os.path.commonpath(folders))
    if common == Path(common.anchor):
        raise UserError(
            f"The images have no folder in common ({', '.join(str(f) for f in sorted(folders)[:2])}), but image paths are "
            "relative to one folder. Bring them under one."
        )
    return common


def _write_tutorial(job: Job, placed: list[_Placed], _: Path | None, reasons: dict[str, int]) -> Prepared:
    # Absolute paths, as the tutorial writes them.
    pairs = [(os.path.abspath(row.image), caption) for row in placed for caption in row.captions]  # noqa: PTH100
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("image_path", "caption"), *pairs])
    conversations = [
        {
            "id": f"identity_{number}",
            "conversations": [
                {"from": "user", "value": f"COCO Yes: <|vision_start|>{image}<|vision_end|>"},
                {"from": "assistant", "value": caption},
            ],
        }
        for number, (image, caption) in enumerate(pairs, start=1)
    ]
    prepared = Prepared(
        file=TUTORIAL_JSON,
        num_records=len(pairs),
        num_examples=len(pairs),
        num_images=len({image for image, _ in pairs}),
        image_root=None,
        skipped=reasons,
    )
    text = json.dumps(conversations, ensure_ascii=False, indent=2)
    _finish(job, prepared, {TUTORIAL_CSV: table.getvalue().encode(), TUTORIAL_JSON: text.encode()})
    return prepared


def _finish(job: Job, prepared: Prepared, files: Mapping[str, bytes]) -> None:
    """Writes the files, the last one only when all else is on the disk."""
    if job.image_folder is not None:
        settle(job.out / job.image_folder)
    mark(job.out, job.source, job.made, asdict(prepared))
    for name, data in files.items():
        settle(job.out)
        write_file(job.out / name, data)
    settle(job.out)
