"""Image files of every size, mode and format: used as a person sees them, or refused with a reason."""

import io
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vl_dist.data.image_files import ImageLimits, load_image, read_size, resolve_path
from vl_dist.data.images import ImageError, PatchShape, PixelBudget, grid_of, patches_of, resize_image

SIZES = [(1, 1), (1, 200), (200, 1), (27, 29), (28, 28), (100, 999), (57, 56), (640, 480), (1000, 100)]  # width, height
SAVED = {  # format: modes it can hold
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"],
    "BMP": ["1", "L", "P", "RGB"],
}
ORIENTATION = 0x0112


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65_536, (height, width), dtype=np.uint16))
    alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    "budget", [PixelBudget(max_pixels=84 * 112), PixelBudget(min_pixels=1, max_pixels=20_000)], ids=str
)
@pytest.mark.parametrize(("format_", "mode"), [(f, mode) for f, modes in SAVED.items() for mode in modes])
def test_the_grid_from_the_header_is_the_processors_grid_of_the_decoded_image(
    tmp_path: Path, format_: str, mode: str, budget: PixelBudget, shape: PatchShape, processor: Any
) -> None:
    path = tmp_path / "image"
    for size in SIZES:
        noise(mode, size).save(path, format_)
        assert read_size(path) == (size[1], size[0])
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", size)
        grid = grid_of(*read_size(path), budget, shape)
        pixels = patches_of([resize_image(image, budget, shape)], shape, processor.image_processor)
        assert len(pixels) == grid.num_patches


@pytest.mark.parametrize(
    ("size", "budget", "reason"),
    [
        ((13, 999), PixelBudget(max_pixels=20_000), "too narrow for data.max_pixels"),
        ((1, 201), PixelBudget(), "200 times"),
        ((201, 1), PixelBudget(resized_height=280, resized_width=280), "200 times"),
    ],
)
def test_a_shape_that_no_grid_keeps_is_refused_by_header_and_image_alike(
    tmp_path: Path, size: tuple[int, int], budget: PixelBudget, reason: str, shape: PatchShape
) -> None:
    noise("RGB", size).save(tmp_path / "image.png")
    with pytest.raises(ImageError, match=reason):
        grid_of(*read_size(tmp_path / "image.png"), budget, shape)
    with pytest.raises(ImageError, match=reason):
        resize_image(load_image(tmp_path / "image.png"), budget, shape)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_upright_in_header_and_pixels_alike(tmp_path: Path, format_: str, orientation: int) -> None:
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if format_ == "WEBP" else {}
    noise("RGB", (40, 16)).save(plain, format_, **lossless)
    noise("RGB", (40, 16)).save(turned, format_, exif=exif, **lossless)
    stored = Image.open(plain).convert("RGB")
    stored.getexif()[ORIENTATION] = orientation
    expected = ImageOps.exif_transpose(stored)
    assert np.array_equal(np.asarray(load_image(turned)), np.asarray(expected))
    assert read_size(turned) == (expected.height, expected.width)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_an_orientation_behind_the_pixels_of_a_png_is_found_without_decoding_others(tmp_path: Path) -> None:
    image = noise("RGB", (40, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = io.BytesIO()
    image.save(data, "PNG")
    head, end = data.getvalue()[:-12], data.getvalue()[-12:]
    path = tmp_path / "late.png"
    path.write_bytes(head + chunk(b"eXIf", exif.tobytes()[6:]) + end)
    assert read_size(path) == (40, 16)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_damaged_exif_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    noise("RGB", (40, 16)).save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read_size(path) == (16, 40)
    assert load_image(path).size == (40, 16)


def saved(image: Image.Image, format_: str = "PNG", **options: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path, format_, **options)


def pixel_of(path: Path) -> tuple[int, ...]:
    return tuple(np.asarray(load_image(path))[0, 0].tolist())


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (saved(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), (255, 255, 255)),
        (saved(Image.new("RGBA", (9, 9), (255, 0, 0, 51))), (255, 204, 204)),
        (saved(Image.new("LA", (9, 9), (0, 0))), (255, 255, 255)),
        (saved(Image.new("P", (9, 9), 0), transparency=0), (255, 255, 255)),
        (saved(Image.new("P", (9, 9), 0), "GIF", transparency=0), (255, 255, 255)),
        (saved(Image.new("RGB", (9, 9), (10, 20, 30)), transparency=(10, 20, 30)), (255, 255, 255)),
        (saved(Image.new("RGB", (9, 9), (10, 20, 30)).quantize(2)), (10, 20, 30)),
        (saved(Image.new("L", (9, 9), 77)), (77, 77, 77)),
        (saved(Image.new("1", (9, 9), 1)), (255, 255, 255)),
        (saved(Image.fromarray(np.full((9, 9), 257 * 77, np.uint16))), (77, 77, 77)),
        (saved(Image.fromarray(np.full((9, 9), 257 * 77, np.uint16)), "TIFF"), (77, 77, 77)),
        (saved(Image.fromarray(np.full((9, 9), 65_535, np.int32)), "TIFF"), (255, 255, 255)),
        (saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    ],
    ids=[
        "RGBA clear", "RGBA half clear", "LA clear", "P clear", "GIF clear", "RGB key clear", "P", "L", "1", "16 bits",
        "16 bits TIFF", "32 bits that hold 16", "CMYK", "CMYK JPEG",
    ],
)  # fmt: skip
def test_every_mode_shows_the_colours_that_a_viewer_shows(
    tmp_path: Path, save: Callable[[Path], None], expected: tuple[int, ...]
) -> None:
    save(tmp_path / "image")
    assert pixel_of(tmp_path / "image") == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (9, 9), 0.5), "floating-point"),
        (Image.fromarray(np.full((9, 9), 70_000, np.int32)), "more than 16 bits"),
    ],
)
def test_pixels_without_a_known_white_are_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    image.save(tmp_path / "image", "TIFF")
    with pytest.raises(ImageError, match=reason):
        load_image(tmp_path / "image")


def png_header(width: int, height: int) -> bytes:
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def gif_header(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "GIF")
    return b"GIF89a" + struct.pack("<HH", width, height) + data.getvalue()[10:]


BOMBS = {
    "60000x60000 PNG": png_header(60_000, 60_000),
    "PNG that Pillow only warns of": png_header(10_000, 9_500),
    "60000x60000 GIF": gif_header(60_000, 60_000),
    "60000x60000 BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("read", [read_size, load_image])
def test_a_header_that_promises_too_many_pixels_is_refused_at_once_without_allocating_them(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ImageError, match="pixels"):
        read(path)
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


@pytest.mark.parametrize("format_", SAVED)
def test_a_file_that_is_cut_short_is_refused_when_it_is_decoded(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "cut"
    noise("RGB", (300, 200)).save(path, format_)
    data = path.read_bytes()
    for part in (len(data) // 3, len(data) * 9 // 10):
        path.write_bytes(data[:part])
        with pytest.raises(ImageError):
            load_image(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"not an image", "not one of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of"),  # Pillow would start Ghostscript
        (b"\x89PNG\r\n\x1a\n", "cannot be read as an image"),
        (b"\xff\xd8\xff", "cannot be read as an image"),
    ],
    ids=["zero-byte", "text", "PostScript", "PNG magic only", "JPEG magic only"],
)
def test_what_is_no_image_is_refused_by_its_header(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(data)
    for read in (read_size, load_image):
        with pytest.raises(ImageError, match=reason):
            read(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jpg", "no such file"),
        ("folder", "no such file"),
        ("pipe", "no such file"),  # opening it would wait for ever
        ("a\x00b.jpg", "no such file"),
        ("half \ud83d.jpg", "no such file"),
        ("x" * 300, "no such file"),
        ("loop", "no such file"),
        ("large.jpg", r"20 bytes.*data\.max_image_bytes allows 10"),
        ("../outside.jpg", "outside data.image_root"),
        ("/etc/hostname", "outside data.image_root"),
        ("link", "outside data.image_root"),
        ("linked-folder/outside.jpg", "outside data.image_root"),
        ("data:image/png;base64,AAAA", "give its path"),
        ("https://example.org/a.jpg", r"URLs are not fetched.*download.*data\.allow_urls"),
        ("file:///etc/hostname", "URLs are not fetched"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    os.mkfifo(root / "pipe")
    (root / "large.jpg").write_bytes(bytes(20))
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "outside.jpg")
    (root / "linked-folder").symlink_to(tmp_path)
    with pytest.raises(ImageError, match=reason):
        resolve_path(name, root, ImageLimits(max_bytes=10))


def test_paths_under_the_root_are_found_however_they_are_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "in.jpg").write_bytes(b"x")
    (root / "sub" / "link.jpg").symlink_to(root / "in.jpg")
    (tmp_path / "other-name").symlink_to(root)
    for name in ("in.jpg", str(root / "in.jpg"), "sub/../in.jpg", "sub/link.jpg"):
        assert resolve_path(name, root) == resolve_path(name, tmp_path / "other-name") == (root / "in.jpg").resolve()
