"""How long an evaluation takes: `python -m benchmarks.evaluation [--images N] [RECIPE.yaml] [section.key=value ...]`.

One process on the CPU, the embedded default's model with its fresh adapter, N of its drawings held out, five captions each:
the loss over all captions, one caption decoded for each drawing, and the scores.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from vl_dist.config import load, split_words
from vl_dist.data.validate import Progress
from vl_dist.errors import UserError
from vl_dist.evaluate.held_out import evaluate
from vl_dist.model.load import load_processor, patch_shape
from vl_dist.run.build import load_data, load_model
from vl_dist.run.distributed import Ranks
from vl_dist.settings import Config
from vl_dist.shapes import make_shapes


def held_out(config: Config, directory: Path, num_images: int) -> Config:
    """The embedded default with so many drawings held out, made in a directory."""
    if config.shapes is None:
        raise UserError("This benchmark is of a recipe with shapes.")
    shapes = replace(config.shapes, dir=directory, num_train=100, num_eval=num_images)
    make_shapes(shapes)
    words = [f"model.path={directory}/model", f"data.train={directory}/records.jsonl", f"data.eval={directory}/eval.jsonl"]
    made = load(None, words)
    data = replace(config.data, train=made.data.train, eval=made.data.eval)
    return replace(config, shapes=shapes, model=made.model, data=data)


def main(words: list[str]) -> None:
    """Prints the seconds of wall and of CPU that one evaluation takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args(words)
    silent: Progress = lambda what, done, total: None  # noqa: E731
    with tempfile.TemporaryDirectory() as directory:
        config = held_out(load(*split_words(arguments.words)), Path(directory), arguments.images)
        model_dir = Path(config.model.path)
        processor, ranks = load_processor(model_dir), Ranks(Accelerator(cpu=True))
        data = load_data(config, processor, patch_shape(model_dir, processor), ranks, silent).held_out
        assert data is not None, "the recipe holds drawings out"
        model = load_model(config, model_dir, torch.device("cpu"))
        wall, cpu = time.perf_counter(), time.process_time()
        evaluate(
            model,
            data,
            ranks,
            config.eval,
            tokenizer=processor.tokenizer,
            max_tokens=config.batch.max_tokens_per_pack,
            on_progress=lambda done, total: None,
        )
        took, used = time.perf_counter() - wall, time.process_time() - cpu
    sys.stdout.write(f"{arguments.images} images: {took:.1f} s, {used:.1f} s of CPU, {torch.get_num_threads()} threads\n")


if __name__ == "__main__":
    main(sys.argv[1:])
