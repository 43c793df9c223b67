"""The embedded default: drawings of one coloured shape each, five captions a drawing, and a tiny model to learn them.

Every drawing has its own combination of shape, colour, place and size, and every caption names all four, so that no caption
fits two drawings and held-out drawings show combinations that were never trained.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vl_dist.errors import UserError
from vl_dist.settings import ShapesConfig
from vl_dist.tiny import make_tiny_model

CANVAS = 84  # pixels; 3 x 3 language-model tokens, one for each place
OVERSAMPLING = 4  # drawn larger and shrunk, for smooth edges
BACKGROUND = (244, 244, 238)

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 200),
    "yellow": (240, 200, 30),
    "purple": (130, 50, 160),
    "orange": (245, 130, 30),
    "black": (25, 25, 25),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
SIZES = {"small": 8.0, "large": 13.0}  # radius in pixels
PROMPT = "Describe the drawing."

TEMPLATES = (
    "A {size} {colour} {shape} at the {row} {column}.",
    "There is a {size} {colour} {shape} in the {row} {column} of the picture.",
    "The {row} {column} shows one {shape}, {size} and {colour}.",
    "One {colour} {shape}, {size}, sits at the {row} {column}.",
    "In the {row} {column}: a {shape} that is {size} and {colour}.",
)

MARKER = "made.json"  # says what was asked for; `complete` turns true last


@dataclass(frozen=True, slots=True)
class Drawing:
    """What one drawing shows."""

    shape: str
    colour: str
    row: str
    column: str
    size: str

    @property
    def name(self) -> str:
        """A file name that says what is in it."""
        return f"{self.size}-{self.colour}-{self.shape}-{self.row}-{self.column}"

    @property
    def captions(self) -> list[str]:
        """Five wordings; each names every attribute."""
        return [template.format(**asdict(self)) for template in TEMPLATES]


def all_drawings() -> list[Drawing]:
    """Every combination once."""
    return [Drawing(*values) for values in itertools.product(SHAPES, COLOURS, ROWS, COLUMNS, SIZES)]


def draw(drawing: Drawing, rng: np.random.Generator) -> Image.Image:
    """One drawing, its centre moved a little at random."""
    scale = OVERSAMPLING
    image = Image.new("RGB", (CANVAS * scale, CANVAS * scale), BACKGROUND)
    cell = CANVAS / 3
    jitter = rng.uniform(-1.0, 1.0, size=2)
    x = (COLUMNS.index(drawing.column) + 0.5) * cell + jitter[0]
    y = (ROWS.index(drawing.row) + 0.5) * cell + jitter[1]
    outline = [
        ((x + px * SIZES[drawing.size]) * scale, (y + py * SIZES[drawing.size]) * scale)
        for px, py in _outline(drawing.shape)
    ]
    ImageDraw.Draw(image).polygon(outline, fill=COLOURS[drawing.colour])
    return image.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners around a centre, for radius 1."""
    if shape == "circle":
        return _ring(48, [0.92])
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)]
    if shape == "cross":
        a, b = 0.3, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    return _ring(10, [1.0, 0.42])


def _ring(count: int, radii: list[float]) -> list[tuple[float, float]]:
    angles = [2 * np.pi * n / count - np.pi / 2 for n in range(count)]
    return [
        (radii[n % len(radii)] * float(np.cos(a)), radii[n % len(radii)] * float(np.sin(a))) for n, a in enumerate(angles)
    ]


def make_shapes(settings: ShapesConfig) -> str | None:
    """Drawings, records and the tiny model under `settings.dir`, unless these very ones are there already.

    Returns:
        What was made, and why others gave way to it; None if nothing was.

    Raises:
        UserError: more drawings are asked for than there are combinations.
    """
    wanted = {"seed": settings.seed, "num_train": settings.num_train, "num_eval": settings.num_eval, "version": 1}
    marker = settings.dir / MARKER
    before = json.loads(marker.read_text()) if marker.is_file() else {}
    if before == wanted | {"complete": True}:
        return None
    if not marker.is_file() and settings.dir.is_dir() and any(settings.dir.iterdir()):
        raise UserError(f"shapes.dir is {settings.dir}, which holds other files. Give a new or an empty directory.")
    drawings = all_drawings()
    if settings.num_train + settings.num_eval > len(drawings):
        raise UserError(
            f"shapes.num_train ({settings.num_train}) and shapes.num_eval ({settings.num_eval}) ask for more than the "
            f"{len(drawings)} different drawings there are."
        )
    settings.dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted | {"complete": False}))
    for made in ("images", "model"):
        shutil.rmtree(settings.dir / made, ignore_errors=True)
    (settings.dir / "images").mkdir(parents=True)
    rng = np.random.default_rng(settings.seed)
    order = [drawings[n] for n in rng.permutation(len(drawings))]
    train, held_out = order[: settings.num_train], order[settings.num_train :][: settings.num_eval]
    _write_records(settings.dir, "records.jsonl", train, rng)
    _write_records(settings.dir, "eval.jsonl", held_out, rng)
    make_tiny_model(settings.dir / "model", _tokenizer_texts(), seed=settings.seed)
    marker.write_text(json.dumps(wanted | {"complete": True}))
    return _what_was_made(settings, wanted, before)


def _what_was_made(settings: ShapesConfig, wanted: dict[str, int], before: dict[str, int]) -> str:
    made = f"Made {settings.num_train + settings.num_eval:,} drawings and the tiny model in {settings.dir}"
    others = [f"shapes.{name} was {before[name]}" for name in wanted if before.get(name, wanted[name]) != wanted[name]]
    if not before.get("complete") or not others:
        return f"{made}."
    return f"{made}, in place of those that were there: {', '.join(others)}."


def _write_records(directory: Path, name: str, drawings: list[Drawing], rng: np.random.Generator) -> None:
    lines = []
    for drawing in drawings:
        path = f"images/{drawing.name}.jpg"
        draw(drawing, rng).save(directory / path, quality=92)
        content = [{"type": "image", "image": path}, {"type": "text", "text": PROMPT}]
        record = {"id": drawing.name, "messages": [{"role": "user", "content": content}], "answers": drawing.captions}
        lines.append(json.dumps(record))
    (directory / name).write_text("\n".join(lines) + "\n")


def _tokenizer_texts() -> Iterator[str]:
    yield from ("system\nYou are a helpful assistant.", f"user\n{PROMPT}", "assistant\n")
    for drawing in all_drawings():
        yield from drawing.captions
