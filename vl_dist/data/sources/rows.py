"""What every source yields: captioned images, and what it had to leave out. Nothing is written here."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vl_dist.data.image_files import FORMATS, MAX_DECODED_PIXELS, PILLOW_ERRORS

ENDINGS = {"JPEG": ".jpg", "TIFF": ".tif"}  # others: the format's own name


class UnusableError(ValueError):
    """This row cannot be used; the message says why, without naming the row."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is on this disk and stays where it is."""

    path: Path


@dataclass(frozen=True, slots=True)
class ImageData:
    """An encoded image without a file of its own yet; `stem` is the file's path under the output folder, but its ending."""

    stem: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One image with its captions. Rows of one id, or of one image file where the id is None, become one record."""

    place: str  # where it stands in the source, for messages
    image: ImageFile | ImageData
    captions: tuple[str, ...]
    id: str | None = None  # None: the image's path


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be used."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """All rows of a source, in its order; read once."""

    rows: Iterator[Row | Skipped]
    num_rows: int | None  # None: not known before they are read
    image_root: Path | None = None  # the folder that the source's own image files are kept in


def cleaned(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without white space around them; empty ones are left out."""
    return tuple(text for text in (caption.strip() for caption in captions) if text)


def safe_stem(folder: str, name: str) -> str:
    """A file's path without its ending, from a name that stands in the data.

    Raises:
        UnusableError: the name could lead out of the folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UnusableError(f"its name {name!r} cannot be a file's name")
    return f"{folder}/{name}"


def check_image(image: Path | bytes) -> str:
    """Decodes an image to its end and returns the ending that its file should have.

    Raises:
        UnusableError: not an image of a format that training reads, too large for it, or cut short or damaged.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image), formats=FORMATS) as opened:
            kind = str(opened.format)
            if opened.width * opened.height > MAX_DECODED_PIXELS:
                raise UnusableError(f"it has more than {MAX_DECODED_PIXELS:,} pixels")
            opened.draft(None, (1, 1))  # every byte of a JPEG is still read, but only its smallest size is made
            opened.load()
    except UnidentifiedImageError:
        raise UnusableError(f"not an image ({', '.join(FORMATS)})") from None
    except FileNotFoundError:
        raise UnusableError("there is no such file") from None
    except PILLOW_ERRORS as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"cannot be decoded ({error})") from None
    return ENDINGS.get(kind, f".{kind.lower()}")


def encode(image: Image.Image, kind: str) -> bytes:
    """A decoded image as JPEG or PNG, with Pillow's own settings."""
    if kind == "JPEG" and image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()
