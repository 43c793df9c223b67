"""Image files: from the path in a record to upright RGB pixels, refusing what cannot be trusted. No torch here.

Size and orientation come from one function for header and pixels alike, so that lengths computed from headers hold.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vl_dist.data.images import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")  # others run programs (EPS) or change size when decoded (ICO)
MAX_DECODED_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: a quarter GiB as RGB
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)

# What Pillow's readers raise on damaged files, beside OSError (which holds UnidentifiedImageError and truncation).
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where a warnings filter makes it an error
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Which image files are accepted."""

    max_bytes: int = 50 * 2**20
    url_cache: Path | None = None  # where http(s) images are kept; None: URLs are refused


DEFAULT_LIMITS = ImageLimits()


def resolve_path(path: str, root: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Path:
    """The file a record names; a URL is downloaded if the limits allow it.

    Raises:
        ImageError: a path that leaves the image root (links are followed), no regular file there, too many bytes, or a URL
            that is not allowed or cannot be fetched.
    """
    if path.startswith("data:"):
        raise ImageError("it is written into the record; save it as a file and give its path")
    if "://" in path:
        return _from_url(path, limits)
    try:
        found = (root / path).resolve()
        if not found.is_relative_to(root.resolve()):
            raise ImageError(f"the path leads outside data.image_root ({root})")
        size = found.stat().st_size if found.is_file() else None
    except ImageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no permission, a loop of links, a null byte
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ImageError(f"there is no such file under data.image_root ({why}; {root})") from None
    if size is None:
        raise ImageError(f"there is no such file under data.image_root ({root})")
    if size > limits.max_bytes:
        raise ImageError(f"the file has {size:,} bytes, but data.max_image_bytes allows {limits.max_bytes:,}")
    return found


def read_size(path: Path) -> tuple[int, int]:
    """Upright height and width in pixels, from the header alone.

    Raises:
        ImageError: not an image of a known format, or one with too many pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _upright(image, path)[0]
    except PILLOW_ERRORS as error:
        raise _refusal(error, path, "cannot be read as an image") from None


def load_image(path: Path) -> Image.Image:
    """The upright image, decoded, as RGB; transparent parts are white.

    Raises:
        ImageError: cut short, damaged, with too many pixels, or not an image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, turn = _upright(image, path)
            image.load()
            pixels = to_rgb(image)
            pixels = pixels if turn is None else pixels.transpose(turn)
    except PILLOW_ERRORS as error:
        raise _refusal(error, path, "cannot be decoded") from None
    if (pixels.height, pixels.width) != size:
        raise ImageError(f"its header says {size[1]}x{size[0]} pixels, but it holds {pixels.width}x{pixels.height}")
    return pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16 bits scaled to 8; RGB and RGBA as qwen_vl_utils has them.

    Raises:
        ImageError: the mode does not say which value is white.
    """
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # as convert would give it, but not copied
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(transparent, mask=transparent.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:  # Pillow's own conversion would clip at 255
        raise ImageError("its pixels have more than 16 bits; save it with 8 or 16")
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))


def _upright(image: Image.Image, path: Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Height and width once turned, and how to turn the decoded pixels."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{width}x{height} pixels hold nothing")
    if width * height > MAX_DECODED_PIXELS:
        raise ImageError(f"{width}x{height} pixels are more than {MAX_DECODED_PIXELS:,}; make the image smaller")
    if image.format == "TIFF":  # Pillow turns these itself, and gives the turned size before decoding
        return (height, width), None
    orientation = _orientation(image, path)
    size = (width, height) if orientation in SIDEWAYS else (height, width)
    return size, TURNS.get(orientation)


def _orientation(image: Image.Image, path: Path) -> int:
    """From EXIF or XMP; 1, upright, where they are absent or damaged."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and not _metadata_follows_pixels(path):
            found = Image.Image.getexif(image)  # a PNG's own getexif decodes all pixels to look behind them
        else:
            found = image.getexif()
        return int(found.get(EXIF_ORIENTATION, 1))
    except PILLOW_ERRORS:
        return 1


def _metadata_follows_pixels(path: Path) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels; reads the chunks' heads only."""
    seen_pixels, offset = False, 8
    with path.open("rb", buffering=0) as file:
        while file.seek(offset) == offset and len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            seen_pixels = seen_pixels or kind == b"IDAT"
            is_text = kind in (b"tEXt", b"zTXt", b"iTXt")
            keyword = file.read(min(length, 24)) if seen_pixels and is_text else b""
            if seen_pixels and (kind == b"eXIf" or keyword.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp"))):
                return True
            offset += length + 12
    return False


def _refusal(error: BaseException, path: Path, what: str) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, UnidentifiedImageError):  # its own message is the whole path
        empty = path.stat().st_size == 0
        return ImageError(f"cannot be read as an image ({'it is empty' if empty else 'not one of ' + ', '.join(FORMATS)})")
    return ImageError(f"{what} ({error})")


def _from_url(url: str, limits: ImageLimits) -> Path:
    if limits.url_cache is None:
        raise ImageError("URLs are not fetched; download the image and give its path, or set data.allow_urls=true")
    from vl_dist.data.urls import DownloadError, download  # TLS is slow to import, and seldom needed

    try:
        return download(url, limits.url_cache, max_bytes=limits.max_bytes)
    except DownloadError as error:
        raise ImageError(f"the URL cannot be fetched ({error})") from None
