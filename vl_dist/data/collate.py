"""From a pack's examples to the tensors of one forward pass.

Every index that the model needs is computed here, from Python integers on the CPU, so that the step on the device computes
none and reads nothing back.

A document is a trunk (the prompt with its images, without its last token) and a branch for each answer: the prompt's last
token, which predicts the answer's first, and the answer. Branches see the trunk and not each other, and each counts
positions on from the trunk's end, so that loss and gradient are those of the examples one by one. With one branch this is
the plain sequence.

An image that several documents show is decoded and encoded once, and its features go to several places.

Legend: T tokens of the pack, D documents, N targets, V image tokens, I distinct images, P patches of theirs, C values
of a patch.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vl_dist.data.documents import Document, DocumentSize, make_document, padding
from vl_dist.data.encode import Encoded, Encoder
from vl_dist.data.features import FeatureReader
from vl_dist.data.image_files import DEFAULT_LIMITS, ImageLimits
from vl_dist.data.images import PatchShape, PixelBudget
from vl_dist.data.lengths import Dropped
from vl_dist.data.pictures import ImageKey, ImageTensors, Picture, PictureLoader, features_first, image_keys
from vl_dist.data.records import Example
from vl_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Batch(ImageTensors):
    """One pack: its distinct images, and a row of documents that do not see each other, the last of which may be padding.

    A filler is all padding: no example, no target, no image.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [3, T] int64, M-RoPE ids, restarting with each document
    document_ids: torch.Tensor  # [T] int64, which document a token belongs to
    branch_ids: torch.Tensor  # [T] int64, 0 in a trunk, from 1 in its branches; all 0 where there is one branch
    target_rows: torch.Tensor  # [N] int64, the row whose output predicts target n (the row before it)
    target_ids: torch.Tensor  # [N] int64
    document_ends: torch.Tensor  # [D + 1] int32: 0, then where each document ends, padding included
    image_rows: torch.Tensor  # [V] int64, rows that image features replace
    feature_rows: torch.Tensor  # [V] int64, which feature each of them gets: those of the cache come before the tower's
    example_ids: tuple[str, ...]
    num_padding: int  # tokens at the end that belong to no example
    documents: tuple[DocumentSize, ...]  # without padding
    dropped: tuple[Dropped, ...] = ()  # examples that are not in it because an image went bad since it was planned

    @property
    def num_tokens(self) -> int:
        """T; known on the host."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """N; known on the host."""
        return len(self.target_ids)

    @property
    def num_patches(self) -> int:
        """P; known on the host."""
        return len(self.pixel_values)

    @property
    def num_images(self) -> int:
        """Distinct images, cached ones included; known on the host."""
        return self.num_cached_images + self.num_encoded_images

    @property
    def num_encoded_images(self) -> int:
        """I: those that need the tower; known on the host."""
        return len(self.image_grids)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, padding included; known on the host."""
        return max([self.num_padding, *(document.num_tokens for document in self.documents)])

    def to(self, device: torch.device) -> "Batch":
        """The same pack on a device; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same pack in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> "Batch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return Batch(**{n: change(value) if isinstance(value, torch.Tensor) else value for n, value in values.items()})


class Collator:
    """Decodes, encodes and packs examples. One copy lives in every loader worker."""

    def __init__(
        self,
        encoder: Encoder,
        image_processor: Any,
        *,
        roots: Sequence[Path],
        budget: PixelBudget,
        shape: PatchShape,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        """
        Args:
            encoder: text to tokens.
            image_processor: normalises and cuts images; its patch and merge sizes are `shape`'s.
            roots: of each record file, what its image paths are relative to.
            budget: the size of every image, but of those whose example has a smaller one of its own.
            limits: which files are accepted.
        """
        self.encoder = encoder
        self.budget = budget
        self.shape = shape
        self.pictures = PictureLoader(image_processor, roots=roots, budget=budget, shape=shape, limits=limits)

    def reading(self, reader: FeatureReader) -> "Collator":
        """The same, but images whose features are there are not decoded."""
        own = self.pictures
        changed = copy.copy(self)
        changed.pictures = PictureLoader(
            own.image_processor, roots=own.roots, budget=own.budget, shape=own.shape, limits=own.limits, reader=reader
        )
        return changed

    def pack(self, examples: Sequence[Example], *, length: int | None = None) -> Batch:
        """One pack of these examples, each a document of its own; as `pack_documents`."""
        return self.pack_documents([[example] for example in examples], length=length)

    def pack_documents(self, documents: Sequence[Sequence[Example]], *, length: int | None = None) -> Batch:
        """One pack of these documents, in order; none of them makes a filler.

        An example whose image cannot be used leaves the pack, and nothing takes its place.

        Args:
            documents: of each its examples, which have the same trunk.
            length: tokens to pad up to; None: no padding, but one token for a filler.

        Raises:
            UserError: a text that cannot be encoded.
        """
        made: list[Document] = []
        loaded: dict[ImageKey, Picture | str] = {}
        shown: list[ImageKey] = []
        ids: list[str] = []
        dropped: list[Dropped] = []
        for examples in documents:
            pictures = self.pictures.of_example(examples[0], loaded)
            if isinstance(pictures, str):
                dropped += [Dropped(example.id, pictures) for example in examples]
                continue
            grids = [picture.grid for picture in pictures]
            encoded = [self.encoder.encode(example, grids) for example in examples]
            made.append(make_document(encoded, self.shape.merge_size))
            shown += image_keys(examples[0])
            ids += [example.id for example in examples]
        distinct = features_first({key: picture for key in shown if isinstance(picture := loaded[key], Picture)})
        return self._join(made, distinct, shown, tuple(ids), length, tuple(dropped))

    def pack_images(self, images: Sequence[ImageKey]) -> Batch:
        """A pack of no example, with images that stand nowhere in it: for the tower alone.

        An image that cannot be used is left out, and named in `dropped` by its path.
        """
        loaded = {key: self.pictures.load(key) for key in images}
        distinct = {key: picture for key, picture in loaded.items() if isinstance(picture, Picture)}
        dropped = tuple(Dropped(key[1], why) for key, why in loaded.items() if isinstance(why, str))
        return self._join([], features_first(distinct), [], (), None, dropped)

    def prompt(self, example: Example) -> tuple[Encoded, torch.Tensor]:
        """An example's prompt ready for generation, and its patches [P, C].

        Raises:
            UserError: an image cannot be used; the message names the example.
        """
        made = self.try_prompt(example)
        if isinstance(made, str):
            raise UserError(f"Example {example.id}: {made}. Mend or remove the record.")
        return made

    def try_prompt(self, example: Example) -> tuple[Encoded, torch.Tensor] | str:
        """As `prompt`, or why one of its images cannot be used."""
        pictures = self.pictures.of_example(example, {})
        if isinstance(pictures, str):
            return pictures
        return self.encoder.encode_prompt(example.prompt, [p.grid for p in pictures]), self.pictures.patches(pictures)

    def open_image(self, path: str, file: int) -> Image.Image:
        """An image in its own size, upright and RGB, by its path in the record file of this number.

        Raises:
            ImageError: it cannot be used.
        """
        return self.pictures.open_image(path, file)

    def _join(
        self,
        documents: list[Document],
        pictures: dict[ImageKey, Picture],
        shown: Sequence[ImageKey],
        ids: tuple[str, ...],
        length: int | None,
        dropped: tuple[Dropped, ...],
    ) -> Batch:
        num_tokens = sum(document.size.num_tokens for document in documents)
        # A filler keeps ranks in step: it runs the same layers and adds exactly nothing to loss and gradient.
        num_padding = max(1 if num_tokens == 0 else 0, (length or 0) - num_tokens)
        rows = [*documents, padding(num_padding)] if num_padding else documents
        starts = np.cumsum([0, *(document.size.num_tokens for document in rows)])
        input_ids = np.concatenate([document.input_ids for document in rows])
        target_at = np.concatenate([d.target_at + start for d, start in zip(rows, starts[:-1], strict=True)])
        feature_ends = np.cumsum([0, *(picture.grid.num_tokens(self.shape.merge_size) for picture in pictures.values())])
        place = {key: n for n, key in enumerate(pictures)}
        images = self.pictures.tensors(list(pictures.values()))
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(np.concatenate([document.positions for document in rows], axis=1)),
            document_ids=torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(starts))),
            branch_ids=torch.from_numpy(np.concatenate([document.branch_ids for document in rows])),
            target_rows=torch.from_numpy(target_at - 1),
            target_ids=torch.from_numpy(input_ids[target_at]),
            document_ends=torch.from_numpy(starts.astype(np.int32)),
            image_rows=torch.from_numpy(np.flatnonzero(np.concatenate([document.is_image for document in rows]))),
            feature_rows=torch.from_numpy(_feature_rows([place[key] for key in shown], feature_ends)),
            example_ids=ids,
            num_padding=num_padding,
            documents=tuple(document.size for document in documents),
            dropped=dropped,
            **{item.name: getattr(images, item.name) for item in fields(images)},
        )


def _feature_rows(places: Sequence[int], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """[V] which features the image of each place has; those of image n lie from `ends[n]` on."""
    rows = [np.arange(ends[n], ends[n + 1], dtype=np.int64) for n in places]
    return np.concatenate([np.empty(0, dtype=np.int64), *rows])
