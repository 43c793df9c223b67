"""Records: what a line of input says, before any token or pixel. `vl_dist.data.record_files` reads files of them.

Two formats are known: `records.jsonl` (one object a line: id, messages, optionally answers) and the tutorial's
`data_vl.json` (a list of two-turn conversations, the image path between vision marks). Both become `Record`s, and every
answer of a record becomes an `Example`: the unit that steps, speeds and the ledger count.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vl_dist.errors import UserError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as the author wrote it. Never parsed for special tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image by its path: relative to the image root, or absolute and under it."""

    path: str


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Record:
    """One line of input: a conversation whose last answer may come in several versions."""

    id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    single: bool  # the answer stood in the messages; then the example's id is the record's
    place: str = field(default="", compare=False)  # file and line, for messages

    @property
    def image_paths(self) -> tuple[str, ...]:
        """Paths of all images, in the order they appear."""
        return tuple(part.path for message in self.prompt for part in message.parts if isinstance(part, ImagePart))


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with one answer."""

    id: str
    prompt: tuple[Message, ...]
    answer: str
    max_pixels: int | None = None  # a smaller bound on its images than the run's, so that it fits into a pack
    file: int = 0  # the record file it is of, by number; image paths are relative to that file's root

    @property
    def image_paths(self) -> tuple[str, ...]:
        """Paths of all images, in the order they appear."""
        return tuple(part.path for message in self.prompt for part in message.parts if isinstance(part, ImagePart))


def examples_of(records: Iterable[Record]) -> list[Example]:
    """Every answer of every record, in order. The k-th of several answers has the id `record#k`."""
    return [
        Example(record.id if record.single else f"{record.id}#{k}", record.prompt, answer)
        for record in records
        for k, answer in enumerate(record.answers)
    ]


def parse_record(row: Any) -> Record:
    """One object of `records.jsonl`.

    Raises:
        UserError: a field is missing or of the wrong kind; the message names the field and the rule.
    """
    if not isinstance(row, dict):
        raise UserError(f"a record must be a JSON object, got {type(row).__name__}.")
    unknown = row.keys() - {"id", "messages", "answers"}
    if unknown:
        raise UserError(f"unknown field {sorted(unknown)[0]!r}; a record has id, messages and optionally answers.")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise UserError(f"id must be a text that is not empty, got {row.get('id')!r}.")
    if not isinstance(row.get("messages"), list) or not row["messages"]:
        raise UserError("messages must be a list with at least one message.")
    messages = parse_messages(row["messages"])
    if "answers" in row:
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise UserError("answers must be a list with at least one text.")
        if messages[-1].role == "assistant":
            raise UserError("answers stand instead of the last assistant message; leave one of the two out.")
        return Record(row["id"], messages, tuple(answers), single=False)
    if messages[-1].role != "assistant":
        raise UserError("the last message must be the assistant's, or the record must have answers.")
    if any(isinstance(part, ImagePart) for part in messages[-1].parts):
        raise UserError("the last assistant message must be text.")
    return Record(row["id"], messages[:-1], (messages[-1].text,), single=True)


def _parse_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise UserError(f"message {number} must be an object whose role is system, user or assistant.")
    content = message.get("content")
    if isinstance(content, str):
        return Message(message["role"], (TextPart(content),))
    if not isinstance(content, list) or not content:
        raise UserError(f"message {number}: content must be a text or a list of parts.")
    return Message(message["role"], tuple(_parse_part(part, number) for part in content))


def _parse_part(part: Any, number: int) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return TextPart(part["text"])
    if kind == "image" and isinstance(part.get("image"), str) and part["image"]:
        return ImagePart(part["image"])
    raise UserError(
        f'message {number}: a part is {{"type": "text", "text": "..."}} or {{"type": "image", "image": "path"}}, '
        f"got {json.dumps(part, ensure_ascii=False)[:80]}."
    )


def parse_tutorial(row: Any, prompt: str) -> Record:
    """One conversation of the tutorial's `data_vl.json`: image first, then `prompt`; the text around the path is unused.

    Raises:
        UserError: not a user turn with exactly one marked image path followed by an assistant turn.
    """
    turns = row.get("conversations") if isinstance(row, dict) else None
    if (
        not isinstance(turns, list)
        or len(turns) != 2
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        or [turn.get("from") for turn in turns] != ["user", "assistant"]
    ):
        raise UserError("conversations must be a user turn and an assistant turn, each with a value.")
    if not isinstance(row.get("id"), str):
        raise UserError(f"id must be a text, got {row.get('id')!r}.")
    start, end = "<|vision_start|>", "<|vision_end|>"
    question = turns[0]["value"]
    if question.count(start) != 1 or question.count(end) != 1 or question.index(start) > question.index(end):
        raise UserError(f"the user turn must hold one image path between {start} and {end}, got {question[:80]!r}.")
    path = question.split(start)[1].split(end)[0]
    message = Message("user", (ImagePart(path), TextPart(prompt)))
    return Record(row["id"], (message,), (turns[1]["value"],), single=True)


def usual_prompt(examples: Sequence[Example]) -> tuple[Message, ...]:
    """The conversation before the answer that most examples share, whatever their images; `predict` asks it again.

    Of many examples, some thousand evenly spaced ones are asked.
    """
    return _prompt_counts(examples).most_common(1)[0][0]


def prompt_share(examples: Sequence[Example], prompt: Sequence[Message]) -> float:
    """Which part of the examples has this prompt, whatever their images; of many, some thousand are asked."""
    counts = _prompt_counts(examples)
    return counts[without_images(prompt)] / counts.total()


def without_images(prompt: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with a placeholder in each image's place: equal for equal prompts about other images."""
    places = sum(isinstance(part, ImagePart) for message in prompt for part in message.parts)
    return with_images(prompt, ["IMAGE"] * places)


def _prompt_counts(examples: Sequence[Example]) -> Counter[tuple[Message, ...]]:
    return Counter(without_images(example.prompt) for example in examples[:: max(1, len(examples) // 2000)])


def with_images(prompt: Sequence[Message], paths: Sequence[str]) -> tuple[Message, ...]:
    """The same conversation about other images.

    Raises:
        UserError: it shows another number of images.
    """
    places = sum(isinstance(part, ImagePart) for message in prompt for part in message.parts)
    if places != len(paths):
        raise UserError(f"The prompt shows {places} images, got {len(paths)}.")
    remaining = iter(paths)
    return tuple(
        Message(m.role, tuple(ImagePart(next(remaining)) if isinstance(p, ImagePart) else p for p in m.parts))
        for m in prompt
    )


def messages_to_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as `records.jsonl` writes them; `parse_messages` reads them back."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": part.path}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def parse_messages(rows: Iterable[Any]) -> tuple[Message, ...]:
    """Messages of a record.

    Raises:
        UserError: a message is not as `records.jsonl` has it.
    """
    return tuple(_parse_message(row, number) for number, row in enumerate(rows, start=1))
