"""COCO 2014 captions: from ModelScope, as the tutorial takes them, or from the official files on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vl_dist.data.sources.rows import ImageData, ImageFile, Row, Skipped, Source, UnusableError, cleaned, encode, safe_stem
from vl_dist.data.sources.tables import encoded_image
from vl_dist.errors import UserError

Split = Literal["train", "val"]

IMAGE_FOLDER = "coco_2014_caption"  # named so by the tutorial
HUB_NAME = "modelscope/coco_2014_caption"
OTHER_WAYS = """Other ways to the same captions:
  the official files (train2014/, val2014/, annotations/captions_*2014.json):  prepare coco2014 --root DIRECTORY --out OUT
  a Hugging Face dataset:  prepare hf NAME --image-column image --caption-column caption --out OUT
  images and captions of your own:  prepare csv FILE --out OUT, or prepare tutorial-json data_vl.json --out OUT"""


def from_modelscope(split: Split, *, verbatim: bool) -> Source:
    """The hub's rows in their order: an image and one caption each.

    Args:
        verbatim: captions as they stand there; else without white space around them.

    Raises:
        UserError: the hub does not give the data; the message names the other ways to it.
    """
    errors = _hub_errors()
    from modelscope.msdatasets import MsDataset

    name = {"train": "train", "val": "validation"}[split]
    try:
        table = MsDataset.load(HUB_NAME, subset_name="coco_2014_caption", split=name)
    except errors as error:
        raise _not_given(error) from None

    def items() -> Iterator[Any]:
        try:
            for number in range(len(table)):
                yield table[number]
        except errors as error:  # an image may be fetched only when it is asked for
            raise _not_given(error) from None

    return Source(_hub_rows(items(), verbatim=verbatim), len(table))


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: what is missing or out of date there surfaces wherever it first stumbles on it.

    Raises:
        UserError: it is not installed.
    """
    try:
        from datasets.exceptions import DatasetsError
        from modelscope.msdatasets import MsDataset  # noqa: F401
        from modelscope_hub.errors import HubError
    except ImportError as error:
        raise UserError(
            f"ModelScope's data sets need packages that are not installed ({error}): pip install 'modelscope[datasets]'. "
            f"{OTHER_WAYS}"
        ) from None
    return (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, HubError, DatasetsError)


def _not_given(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"{HUB_NAME} could not be fetched from ModelScope ({type(error).__name__}: {reason}). Its files are known to be "
        f"missing there at times; check the network too. {OTHER_WAYS}"
    )


def _hub_rows(items: Iterator[Any], *, verbatim: bool) -> Iterator[Row | Skipped]:
    for number, item in enumerate(items, start=1):
        place = f"row {number}"
        try:
            name, caption, image = str(item["image_id"]), str(item["caption"]), item["image"]
        except KeyError as error:
            raise UserError(f"{HUB_NAME} has no column {error} any more, but {sorted(item)}. {OTHER_WAYS}") from None
        try:
            data = encode(image, "JPEG") if isinstance(image, Image.Image) else encoded_image(image, None)
            stem = safe_stem(IMAGE_FOLDER, name)
        except UnusableError as error:
            yield Skipped(place, str(error))
        else:
            yield Row(place, ImageData(stem, data), (caption,) if verbatim else cleaned([caption]), id=name)


def from_official(root: Path, split: Split, *, as_tutorial: bool) -> Source:
    """The official files: `annotations/captions_{split}2014.json` and the images in `{split}2014/`.

    Args:
        as_tutorial: one row a caption, in the file's order and as it stands there, the images to be copied; else one row an
            image with all its captions, the images left where they are.

    Raises:
        UserError: the files are not there, or are not COCO's.
    """
    annotations = root / "annotations" / f"captions_{split}2014.json"
    folder = root / f"{split}2014"
    for path in (annotations, folder):
        if not path.exists():
            raise UserError(
                f"{path} does not exist. --root must hold annotations/captions_{split}2014.json and {split}2014/ as "
                "COCO's own archives (annotations_trainval2014.zip, train2014.zip, val2014.zip) unpack."
            )
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions = [(int(note["image_id"]), str(note["caption"])) for note in content["annotations"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{annotations} is not COCO's ({type(error).__name__}: {error}): it must be a JSON object with images "
            "(id, file_name) and annotations (image_id, caption). Unpack annotations_trainval2014.zip again."
        ) from None
    if as_tutorial:
        return Source(_rows_as_tutorial(folder, names, captions), len(captions))
    by_image: dict[int, list[str]] = {}
    for image_id, caption in captions:
        by_image.setdefault(image_id, []).append(caption)
    return Source(_rows_by_image(folder, names, by_image), len(by_image), image_root=root)


def _rows_as_tutorial(folder: Path, names: dict[int, str], captions: list[tuple[int, str]]) -> Iterator[Row | Skipped]:
    for image_id, caption in captions:
        place = f"image {image_id}"
        try:
            data = _official_image(folder, names, image_id).read_bytes()
        except UnusableError as error:
            yield Skipped(place, str(error))
        except OSError:
            yield Skipped(place, "there is no such file")
        else:
            yield Row(place, ImageData(f"{IMAGE_FOLDER}/{image_id}", data), (caption,))


def _rows_by_image(folder: Path, names: dict[int, str], by_image: dict[int, list[str]]) -> Iterator[Row | Skipped]:
    for image_id, captions in by_image.items():
        place = f"image {image_id}"
        try:
            path = _official_image(folder, names, image_id)
        except UnusableError as error:
            yield Skipped(place, str(error))
        else:
            yield Row(place, ImageFile(path), cleaned(captions), id=str(image_id))


def _official_image(folder: Path, names: dict[int, str], image_id: int) -> Path:
    name = names.get(image_id)
    if name is None:
        raise UnusableError("captions of an image that the file does not list")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnusableError("its path leads outside the image folder")
    return folder / name
