"""Held-out images with their references, and what each run said about them as it trained."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vl_dist.data.image_files import load_image, resolve_path
from vl_dist.data.images import ImageError
from vl_dist.report.html import Html, element
from vl_dist.report.read import Row, RunRecord

THUMBNAIL = 320  # pixels, longer side
QUALITY = 80  # of JPEG
MAX_EVALUATIONS = 6  # shown of each run: the first, the last, and some between
NUM_REFERENCES = 3  # shown at once; the others unfold
MAX_TEXT = 600  # characters of a prediction or reference
FULL_SCORE = 10.0  # of CIDEr-D


@dataclass(slots=True)
class _Question:
    """One held-out prompt, with the samples of every run that answered it."""

    first: Row
    source: RunRecord
    answers: dict[int, list[tuple[int, Row]]] = field(default_factory=dict)  # by number of the run: (step, sample)

    @property
    def last_score(self) -> float:
        """Of the first run's last evaluation."""
        return _score(next(iter(self.answers.values()))[-1][1])


def gallery(runs: Sequence[RunRecord], num_images: int) -> Html | None:
    """Cards of some held-out prompts, from the lowest score at the end to the highest; None if there are no samples."""
    questions = _questions(runs)
    chosen = spread(sorted(questions, key=lambda question: question.last_score), num_images)
    if not chosen:
        return None
    note = (
        f"{len(chosen)} of {len(questions)} held-out prompts, spread evenly from the lowest CIDEr-D at the last evaluation "
        "to the highest: the references of each, then the captions as training went on. The number beside a caption is its "
        "CIDEr-D, from 0 to 10; a tick says that it equals a reference."
    )
    cards = [_card(question, runs) for question in chosen]
    return element(
        "section",
        element("h2", "Held-out captions"),
        element("p", note, class_="note"),
        element("div", *cards, class_="cards"),
        id="captions",
    )


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


def _questions(runs: Sequence[RunRecord]) -> list[_Question]:
    """Samples of the same id and images are of one question, whichever run they are from."""
    found: dict[tuple[str, str], _Question] = {}
    for number, run in enumerate(runs):
        for step, samples in run.samples.items():
            for sample in samples:
                key = (str(sample.get("id")), str(sample.get("images")))
                question = found.setdefault(key, _Question(sample, run))
                question.answers.setdefault(number, []).append((step, sample))
    return list(found.values())


def _card(question: _Question, runs: Sequence[RunRecord]) -> Html:
    references = [str(text) for text in question.first["references"]]
    more = references[NUM_REFERENCES:]
    unfolding = element("details", element("summary", f"{len(more)} more"), *map(_reference, more)) if more else None
    images = [_image(str(path), question.source) for path in question.first["images"]]
    return element(
        "article",
        element("div", *images, class_="images") if images else None,
        element(
            "div",
            element("p", str(question.first.get("id")), class_="id"),
            element("div", *map(_reference, references[:NUM_REFERENCES]), unfolding, class_="references"),
            *(_answers(number, said, runs) for number, said in question.answers.items()),
            class_="said",
        ),
        class_="card",
    )


def _reference(text: str) -> Html:
    return element("p", _cut(text), class_="reference")


def _answers(number: int, said: list[tuple[int, Row]], runs: Sequence[RunRecord]) -> Html:
    name = element("p", element("i", class_="key"), runs[number].name, class_="of") if len(runs) > 1 else None
    rows = [_answer(step, sample) for step, sample in spread(said, MAX_EVALUATIONS)]
    return element("div", name, element("ol", *rows), class_=f"answers run{number % 8}")


def _answer(step: int, sample: Row) -> Html:
    score = _score(sample)
    text = _cut(sample["prediction"]) or "(nothing)"
    return element(
        "li",
        element("span", f"step {step:,}", class_="step"),
        element("span", text, class_="prediction" if sample["prediction"] else "prediction nothing"),
        element(
            "span",
            element("span", "\u2713", class_="exact", title="equals a reference") if sample.get("exact") is True else None,
            f"{score:.1f}" if isinstance(sample.get("score"), int | float) else "",
            class_="score",
            style=f"--part:{100 * min(1.0, score / FULL_SCORE):.0f}%",
        ),
    )


def _score(sample: Row) -> float:
    value = sample.get("score")
    return float(value) if isinstance(value, int | float) and value == value else 0.0


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\u2026"


def _image(path: str, run: RunRecord) -> Html:
    """A small JPEG inside the page, or why there is none."""
    if run.image_root is None:
        return element("p", "where the images are is not known", class_="absent")
    try:
        image = load_image(resolve_path(path, run.image_root))
    except ImageError as error:
        return element("p", f"{path}: {error}", class_="absent")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return element(
        "img",
        src=f"data:image/jpeg;base64,{data}",
        alt=f"held-out image {path}",
        width=image.width,
        height=image.height,
    )
