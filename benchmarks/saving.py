"""How long a checkpoint holds training up: `python -m benchmarks.saving [RECIPE.yaml] [section.key=value ...]
[--quick] [--out FILE.json]`.

One process on the CPU, the adapter and base of the recipe, eight saves to `run.output_dir`'s disk, fsync included.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.common import parser_of, write_json
from vl_dist.config import load, split_words
from vl_dist.model.hub import find_model
from vl_dist.run.build import load_model
from vl_dist.run.checkpoint import TrainState, save_checkpoint
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine
from vl_dist.shapes import make_shapes

NUM_SAVES = 8


def main() -> None:
    """Prints the seconds of each save and the size of a checkpoint."""
    parser = parser_of("How long a checkpoint holds training up.", "saving")
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="as for train.py")
    given = parser.parse_args()
    config = load(*split_words(given.words))
    if config.shapes is not None:
        make_shapes(config.shapes)
    model = load_model(config, find_model(config.model), torch.device("cpu"))
    engine = PlainEngine(model, Ranks(Accelerator(cpu=True)), config.optim)
    for parameter in model.lora_parameters.values():
        parameter.grad = torch.ones_like(parameter)
    engine.clip_and_step()
    config.run.output_dir.mkdir(parents=True, exist_ok=True)
    num_saves = 2 if given.quick else NUM_SAVES
    seconds = []
    with tempfile.TemporaryDirectory(dir=config.run.output_dir) as root:
        for step in range(1, num_saves + 1):
            began = time.perf_counter()
            trained = engine.trained()
            assert trained is not None
            state = TrainState(step=step, num_steps=num_saves, epoch=0.0, data="")
            path = save_checkpoint(Path(root), model, trained, state, keep=config.checkpoint.keep)
            seconds.append(time.perf_counter() - began)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
    trainable = sum(p.numel() * p.element_size() for p in model.lora_parameters.values())
    results = {"seconds": seconds, "bytes": num_bytes, "times_trainable": num_bytes / trainable}
    write_json(given.out, "saving", results, quick=given.quick, words=given.words)
    times = " ".join(f"{one:.3f}" for one in seconds)
    sys.stdout.write(f"seconds a save: {times}\nbytes: {num_bytes:,}, {num_bytes / trainable:.2f} x trainable\n")


if __name__ == "__main__":
    main()
