"""From an example to token ids, targets and image slots, by the model's own chat template.

The template is rendered once for each *structure* (roles and kinds of parts) with marks in place of the texts. Cutting the
rendering at the marks tells, without looking for any token, which text came from the template and which from whom: template
text may hold special tokens, the author's text never does, and the answers are the targets.

Legend: T tokens of one example.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vl_dist.data.images import Grid
from vl_dist.data.records import Example, ImagePart, Message, TextPart
from vl_dist.errors import UserError

LONGEST_REMEMBERED, MOST_REMEMBERED = 200, 2000  # characters of a text, and texts, whose token ids are kept
MARK_START, MARK_END = "\ue000", "\ue001"  # private-use characters; they never meet the tokenizer


@dataclass(frozen=True, slots=True)
class Special:
    """A special token that the template wrote."""

    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Literal:
    """Plain text that the template wrote."""

    text: str


@dataclass(frozen=True, slots=True)
class TextSlot:
    """Where the `index`-th text part goes."""

    index: int
    is_answer: bool


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """Where the `index`-th image's tokens go."""

    index: int


Piece = Special | Literal | TextSlot | ImageSlot


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as numbers; a token at row t is predicted from row t - 1."""

    input_ids: NDArray[np.int64]  # [T]
    is_target: NDArray[np.bool_]  # [T]
    is_image: NDArray[np.bool_]  # [T]
    grids: tuple[Grid, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens with a loss."""
        return int(self.is_target.sum())

    @property
    def num_trunk(self) -> int:
        """Tokens that examples of the same prompt can share: all before the prompt's last token.

        That token belongs to the branch, because it predicts the answer's first one.
        """
        return int(np.flatnonzero(~self.is_target)[-1])

    @property
    def num_patches(self) -> int:
        """Vision-tower tokens of all images."""
        return sum(grid.num_patches for grid in self.grids)


class Encoder:
    """Encodes examples with one processor; holds no state but caches of template structures and of short texts."""

    def __init__(self, processor: Any, *, merge_size: int, end_token: str | None) -> None:
        """
        Args:
            processor: a Qwen2-VL processor: tokenizer, image token and chat template.
            merge_size: patches merged along each side into one language-model token.
            end_token: ends the last answer; None: what the template writes there.

        Raises:
            UserError: `end_token` is not one token of this tokenizer.
        """
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._merge_size = merge_size
        added = {token.content: token_id for token_id, token in self._tokenizer.added_tokens_decoder.items()}
        self._added_ids = frozenset(added.values())
        self._added = added
        self._specials = re.compile("(" + "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) + ")")
        self._image_token: str = processor.image_token
        self._image_token_id = added[self._image_token]
        self._end_id = None if end_token is None else self._single_token(end_token)
        self._structures: dict[tuple[Any, ...], tuple[Piece, ...]] = {}
        self._plain: dict[str, list[int]] = {}  # ids of texts that come again and again: the template's, and prompts

    def encode(self, example: Example, grids: Sequence[Grid]) -> Encoded:
        """Prompt, answer and end token; the assistant's turns are targets.

        Args:
            example: any number of turns and images.
            grids: one for each image, in order; from headers alone (`images.grid_of`).

        Raises:
            UserError: the chat template does not keep texts or images as they are.
        """
        answer = Message("assistant", (TextPart(example.answer),))
        pieces = self._structure((*example.prompt, answer))
        return self._fill(pieces, _texts((*example.prompt, answer)), grids)

    def encode_prompt(self, prompt: Sequence[Message], grids: Sequence[Grid]) -> Encoded:
        """The same rows as `encode` up to where the last answer begins; none is a target.

        Raises:
            UserError: as `encode`.
        """
        answer = Message("assistant", (TextPart(""),))
        pieces = self._structure((*prompt, answer))
        last_answer = max(n for n, piece in enumerate(pieces) if isinstance(piece, TextSlot))
        encoded = self._fill(pieces[:last_answer], _texts(prompt), grids)
        return Encoded(encoded.input_ids, np.zeros_like(encoded.is_target), encoded.is_image, encoded.grids)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generated answer: the trained end, and the template's own."""
        template_end = self._structure((Message("user", (TextPart("?"),)), Message("assistant", (TextPart("!"),))))[-1]
        assert isinstance(template_end, Special)
        return tuple(dict.fromkeys([template_end.token_id, *self._tokenizer_end_ids()]))

    def _tokenizer_end_ids(self) -> list[int]:
        ids = [self._end_id, self._tokenizer.eos_token_id]
        return [token_id for token_id in ids if token_id is not None]

    def _single_token(self, token: str) -> int:
        if token in self._added:
            return int(self._added[token])
        ids = self._tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"data.end_token is {token!r}, which is {len(ids)} tokens here; it must be one, such as <|im_end|>."
            )
        return int(ids[0])

    def _structure(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        shape = tuple((message.role, tuple(type(part) for part in message.parts)) for message in messages)
        if shape not in self._structures:
            self._structures[shape] = self._cut_template(messages)
        return self._structures[shape]

    def _cut_template(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """Pieces of the rendering up to the end of the last answer, its end token included."""
        count = len(_texts(messages))
        rendered = self._render(messages, [f"{MARK_START}{n}{MARK_END}" for n in range(count)])
        cuts = re.split(f"{MARK_START}(\\d+){MARK_END}", rendered)
        if [int(n) for n in cuts[1::2]] != list(range(count)):
            raise UserError("The chat template drops, repeats or reorders texts; it cannot be used to build targets.")
        answers = _answer_indices(messages)
        pieces: list[Piece] = []
        images = itertools.count()
        for n, text in enumerate(cuts[0::2]):
            pieces += [self._fixed_piece(part, images) for part in self._specials.split(text) if part]
            if n < count:
                pieces.append(TextSlot(n, n in answers))
        self._check_template(messages, pieces, next(images))
        last = max(n for n, piece in enumerate(pieces) if isinstance(piece, TextSlot))
        end = next((n for n in range(last + 1, len(pieces)) if isinstance(pieces[n], Special)), None)
        if end is None:
            raise UserError("The chat template ends an assistant turn without a special token; set another template.")
        return tuple(pieces[: end + 1])

    def _fixed_piece(self, part: str, images: Iterator[int]) -> Piece:
        """What the template itself writes: the place of the next image, a special token, or text."""
        if part == self._image_token:
            return ImageSlot(next(images))
        return Special(self._added[part], part) if part in self._added else Literal(part)

    def _check_template(self, messages: Sequence[Message], pieces: list[Piece], num_images: int) -> None:
        wanted = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        if num_images != wanted:
            raise UserError(
                f"The chat template writes {num_images} image places ({self._image_token}) for {wanted} images; "
                "a Qwen2-VL template writes one for each."
            )
        texts = _texts(messages)
        filled = "".join(self._written(piece, texts) for piece in pieces)
        if filled != self._render(messages, texts):
            raise UserError("The chat template changes the texts it is given; it cannot be used to build targets.")
        prompt = self._render(messages[:-1], texts[: len(_texts(messages[:-1]))], generate=True)
        if not filled.startswith(prompt):
            raise UserError(
                "The chat template starts a generated answer otherwise than a given one; predictions would be off."
            )

    def _written(self, piece: Piece, texts: Sequence[str]) -> str:
        if isinstance(piece, TextSlot):
            return texts[piece.index]
        return self._image_token if isinstance(piece, ImageSlot) else piece.text

    def _render(self, messages: Sequence[Message], texts: Sequence[str], *, generate: bool = False) -> str:
        remaining = iter(texts)
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": next(remaining)}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        return str(self._processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generate))

    def _fill(self, pieces: Sequence[Piece], texts: Sequence[str], grids: Sequence[Grid]) -> Encoded:
        ids: list[int] = []
        runs: list[tuple[int, bool, bool]] = []  # of tokens: how many, whether they are targets, and an image's
        for run, is_target in _runs(pieces, texts):
            if isinstance(run, ImageSlot):
                new = [self._image_token_id] * grids[run.index].num_tokens(self._merge_size)
            else:
                new = [run.token_id] if isinstance(run, Special) else self._plain_ids(run, remember=not is_target)
            ids += new
            runs.append((len(new), is_target, isinstance(run, ImageSlot)))
        if runs[-1][1] and self._end_id is not None:
            ids[-1] = self._end_id
        lengths, targets, image = zip(*runs, strict=True)
        return Encoded(np.array(ids, dtype=np.int64), np.repeat(targets, lengths), np.repeat(image, lengths), tuple(grids))

    def _plain_ids(self, text: str, *, remember: bool) -> list[int]:
        found = self._plain.get(text)
        if found is None:
            found = self._tokenize_plain(text)
            if remember and len(text) <= LONGEST_REMEMBERED and len(self._plain) < MOST_REMEMBERED:
                self._plain[text] = found
        return found

    def _tokenize_plain(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a special token."""
        # The tokenizer's own core: its wrapper takes as long again. It sets this flag before each call of its own.
        self._tokenizer.backend_tokenizer.encode_special_tokens = True
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if not self._added_ids.isdisjoint(ids):
            raise UserError(f"The text {text[:80]!r} holds a token that this tokenizer cannot escape; remove it.")
        return ids


def template_hash(processor: Any) -> str:
    """Hash of the chat template; another one makes other tokens of the same record."""
    return hashlib.sha256(str(processor.chat_template).encode()).hexdigest()[:16]


def _runs(pieces: Sequence[Piece], texts: Sequence[str]) -> Iterator[tuple[str | Special | ImageSlot, bool]]:
    """What is tokenised together, and whether it is a target.

    Neighbouring plain text is one run whoever wrote it, as in the whole rendering; only where an answer begins a new run
    starts, because in generation the prompt's tokens end there. An answer reaches up to and with the next special token.
    """
    plain, in_answer = "", False
    for piece in pieces:
        if isinstance(piece, TextSlot | Literal):
            begins_answer = isinstance(piece, TextSlot) and piece.is_answer and not in_answer
            if begins_answer and plain:
                yield plain, False
                plain = ""
            in_answer = in_answer or begins_answer
            plain += texts[piece.index] if isinstance(piece, TextSlot) else piece.text
            continue
        if plain:
            yield plain, in_answer
        yield piece, in_answer and isinstance(piece, Special)
        plain, in_answer = "", False
    if plain:
        yield plain, in_answer


def _texts(messages: Sequence[Message]) -> list[str]:
    return [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]


def _answer_indices(messages: Sequence[Message]) -> set[int]:
    roles = [message.role for message in messages for part in message.parts if isinstance(part, TextPart)]
    return {n for n, role in enumerate(roles) if role == "assistant"}
