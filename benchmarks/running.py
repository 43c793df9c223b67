"""A run of the embedded default, prepared in this process as train.py prepares it, without its loop."""

import os
from pathlib import Path

from vl_dist.config import load
from vl_dist.run import directory
from vl_dist.run.alive import Watch
from vl_dist.run.console import RunConsole
from vl_dist.run.distributed import Ranks
from vl_dist.run.launched import read_launch
from vl_dist.run.prepare import Run, Session, prepare
from vl_dist.run.trackers import check_trackers

RECIPE = Path("recipes/shapes.yaml")


def embedded(home: Path, *words: str) -> list[str]:
    """Words for train.py: the embedded default with data, model and output under `home`."""
    where = [f"shapes.dir={home}/shapes", f"model.path={home}/shapes/model", f"run.output_dir={home}/run"]
    data = [f"data.train={home}/shapes/records.jsonl", f"data.eval={home}/shapes/eval.jsonl"]
    return [str(RECIPE), *where, *data, *words]


def prepared(home: Path, *words: str) -> Run:
    """Ready for its first step; one process. The self-test is left to those who ask for it."""
    recipe, *rest = embedded(home, "run.self_test=false", *words)
    config = load(Path(recipe), rest)
    launch = read_launch(config, os.environ)
    ranks = Ranks.start(launch, cpu_threads=config.run.cpu_threads)
    console = RunConsole(is_main=False, num_shown=0)
    wandb = check_trackers(config, os.environ)
    watch = Watch(config.run.output_dir, 0, stall_s=None, on_verdict=lambda _reason, _first: None)
    session = Session(ranks=ranks, console=console, launch=launch, watch=watch, wandb=wandb)
    return prepare(config, session, directory.inspect(config))
