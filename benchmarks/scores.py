"""How long scoring takes: 5,000 images with five references each, as in COCO's usual test split.

    python -m benchmarks.scores [--images N] [--references N] [--quick] [--out FILE.json]

Captions are drawn from a vocabulary with Zipf's frequencies, 8 to 20 words each; a prediction shares part of a reference.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import parser_of, write_json
from vl_dist.evaluate.scores import bleu, cider_d, document_frequency, rouge_l, score_captions, tokenize

VOCABULARY = 10_000  # words; COCO's captions have about as many that come five times or more
REPEATS = 3


def captions(num_images: int, num_references: int, *, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """A prediction and the references of each image."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    frequency /= frequency.sum()

    def draw(length: int) -> str:
        return " ".join(f"w{n}" for n in rng.choice(VOCABULARY, size=length, p=frequency))

    references = [[f"{draw(int(rng.integers(8, 20)))}." for _ in range(num_references)] for _ in range(num_images)]
    predictions = [f"{several[0].rsplit(' ', 4)[0]} {draw(3)}." for several in references]
    return predictions, references


def seconds(action: Callable[[], object]) -> float:
    """Median over a few repeats."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Prints the table."""
    parser = parser_of("How long scoring takes.", "scores")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--references", type=int, default=5)
    arguments = parser.parse_args()
    num_images = min(200, arguments.images) if arguments.quick else arguments.images
    predictions, references = captions(num_images, arguments.references)
    predicted = [tokenize(text) for text in predictions]
    accepted = [[tokenize(text) for text in several] for several in references]
    rows: list[tuple[str, Callable[[], object]]] = [
        ("tokens", lambda: [tokenize(text) for several in references for text in several]),
        ("document frequency", lambda: document_frequency(accepted)),
        ("CIDEr-D, with document frequency", lambda: cider_d(predicted, accepted)),
        ("BLEU-1 to BLEU-4", lambda: bleu(predicted, accepted)),
        ("ROUGE-L", lambda: [rouge_l(one, several) for one, several in zip(predicted, accepted, strict=True)]),
        ("all of it", lambda: score_captions(predictions, references)),
    ]
    found = {name: seconds(action) for name, action in rows}
    table = Table("scoring", "s", title=f"{num_images:,} images, {arguments.references} references each")
    for name, taken in found.items():
        table.add_row(name, f"{taken:.2f}")
    settings = {"images": num_images, "references": arguments.references}
    write_json(arguments.out, "scores", found, quick=arguments.quick, **settings)
    Console().print(table)


if __name__ == "__main__":
    main()
