"""Captions for images or records with a saved adapter, under the prompt, template and pixel budget of its training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vl_dist.adapter.load import LoadedAdapter
from vl_dist.data.encode import Encoded
from vl_dist.data.images import PixelBudget
from vl_dist.data.record_files import BadRow, read_rows
from vl_dist.data.records import Example, Message, with_images, without_images
from vl_dist.errors import UserError
from vl_dist.evaluate.decode import answer_batch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp")  # of images in a folder


@dataclass(frozen=True, slots=True)
class Asked:
    """One thing to answer, or why it cannot be asked."""

    name: str  # the image's path as it was given, or the record's id
    example: Example | None  # its own answer is not looked at; its `file` counts in the roots
    fault: str | None = None
    is_record: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A caption, or why there is none."""

    asked: Asked
    caption: str | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """All that is asked, in order."""

    asked: tuple[Asked, ...]
    roots: tuple[Path, ...]  # what image paths are relative to, by `Example.file`

    @property
    def prompts(self) -> dict[tuple[Message, ...], str]:
        """Every prompt that is asked, with placeholders for images, and the first that asks it."""
        found: dict[tuple[Message, ...], str] = {}
        for one in self.asked:
            if one.example is not None:
                found.setdefault(without_images(one.example.prompt), one.name)
        return found


def gather_questions(paths: Sequence[Path], prompt: Sequence[Message], *, image_root: Path | None) -> Questions:
    """Images as they are, folders with all images under them, and record files (`.jsonl`, or the tutorial's `.json`).

    What cannot be read is a question with a fault.

    Args:
        prompt: asked of each image; records bring their own.
        image_root: of record files; None: the folder of each.

    Raises:
        UserError: a folder without images, or a file that is no record file at all.
    """
    asked: list[Asked] = []
    roots = [Path("/")]
    for path in paths:
        if path.is_dir():
            images = sorted(found for found in path.rglob("*") if found.suffix.lower() in SUFFIXES)
            if not images:
                raise UserError(f"The folder {path} holds no image ({', '.join(SUFFIXES)}).")
            asked += [_of_image(image, prompt) for image in images]
        elif path.suffix in (".jsonl", ".json"):
            asked += _of_records(path, prompt, file=len(roots))
            roots.append(image_root if image_root is not None else path.parent)
        else:
            asked.append(_of_image(path, prompt))
    return Questions(tuple(asked), tuple(roots))


def _of_image(path: Path, prompt: Sequence[Message]) -> Asked:
    if not path.is_file():
        return Asked(str(path), None, "there is no such file")
    return Asked(str(path), Example(str(path), with_images(prompt, [str(path.resolve())]), answer=""))


def _of_records(path: Path, prompt: Sequence[Message], *, file: int) -> Iterator[Asked]:
    for row in read_rows(path, default_prompt=prompt[-1].text):
        if isinstance(row, BadRow):
            yield Asked(row.id or row.place, None, row.reason, is_record=True)
        else:
            yield Asked(row.id, Example(row.id, row.prompt, answer="", file=file), is_record=True)


def predict(
    adapter: LoadedAdapter, questions: Questions, *, budget: PixelBudget, batch_size: int
) -> Iterator[list[Answered]]:
    """Answers batch by batch, in order; a question that cannot be asked has an error in place of a caption.

    Args:
        budget: the size of every image.
        batch_size: prompts answered together.

    Raises:
        UserError: the device ran out of memory, or a text cannot be encoded.
    """
    collator = adapter.collator(questions.roots, budget)
    for start in range(0, len(questions.asked), batch_size):
        chosen = questions.asked[start : start + batch_size]
        made: list[tuple[Encoded, torch.Tensor]] = []
        faults: dict[int, str] = {}
        for n, one in enumerate(chosen):
            prompt = collator.try_prompt(one.example) if one.example is not None else str(one.fault)
            if isinstance(prompt, str):
                faults[n] = prompt
            else:
                made.append(prompt)
        ids = (
            answer_batch(
                adapter.model.get_base_model(),
                made,
                stop_ids=adapter.encoder.stop_ids,
                max_new_tokens=adapter.contract.max_new_tokens,
                pad_id=adapter.pad_id,
            )
            if made
            else []
        )
        texts = iter(adapter.processor.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids)
        yield [
            Answered(one, None, faults[n]) if n in faults else Answered(one, next(texts)) for n, one in enumerate(chosen)
        ]
