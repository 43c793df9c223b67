"""A folder of images, each with its captions in a .txt file of the same name: one caption a line."""

from collections.abc import Iterator
from pathlib import Path

from vl_dist.data.sources.rows import ImageFile, Row, Skipped, Source, cleaned
from vl_dist.errors import UserError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def from_folder(folder: Path) -> Source:
    """All images of a folder and of the folders in it, in the order of their paths.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give a folder of images with .txt files of the same names.")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    if not images:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(IMAGE_ENDINGS))}).")
    return Source(_rows(images, folder), len(images), image_root=folder)


def _rows(images: list[Path], folder: Path) -> Iterator[Row | Skipped]:
    for image in images:
        place = image.relative_to(folder).as_posix()
        text = image.with_suffix(".txt")
        try:
            captions = cleaned(text.read_text(encoding="utf-8-sig").splitlines())
        except FileNotFoundError:
            yield Skipped(place, "no .txt file of the same name")
        except (UnicodeDecodeError, OSError):
            yield Skipped(place, "its .txt file cannot be read as UTF-8")
        else:
            yield Row(place, ImageFile(image), captions)
