"""Which trackers a run has, from its settings and the environment."""

from collections.abc import Callable, Mapping

from PIL import Image

from vl_dist.config import plain
from vl_dist.data.images import ImageError
from vl_dist.data.loader import LoadedData
from vl_dist.evaluate.held_out import Sample, last_scores
from vl_dist.run.secrets import hide, refuse_secrets, secret_values
from vl_dist.run.tensorboard_tracker import TensorBoardTracker, refuse_missing_tensorboard
from vl_dist.run.tracking import Background, Tracker, Tracking
from vl_dist.run.wandb_tracker import Mode, WandbTracker, read_run_id, run_id, wandb_mode
from vl_dist.settings import Config

THUMBNAIL = 256  # pixels of the longer side


def check_trackers(config: Config, env: Mapping[str, str]) -> Mode:
    """Where W&B's record goes, once it is sure that every tracker can be had. Main process only.

    Raises:
        UserError: one cannot, or a setting holds a secret.
    """
    refuse_secrets(config, env)
    if config.log.tensorboard:
        refuse_missing_tensorboard()
    return wandb_mode(config.log.wandb, env)


def begin_tracking(
    config: Config,
    mode: Mode,
    env: Mapping[str, str],
    *,
    held_out: LoadedData | None,
    first_step: int,
    known_run: str | None,
    is_main: bool,
    say: Callable[[str], None],
) -> Tracking:
    """The trackers, which begin to start in their own threads; none on other ranks than 0.

    Args:
        mode: of W&B, as `check_trackers` gave it.
        held_out: where samples have their images from.
        first_step: steps done before.
        known_run: the run's id on W&B, as the checkpoint that training goes on from has it.
        say: tells the person.
    """
    if not is_main:
        return Tracking()
    secrets = secret_values(env)
    settings, directory = hide(plain(config), secrets), config.run.output_dir
    found: list[Tracker] = []
    number = known_run or read_run_id(directory)
    if mode != "off":
        number = run_id(directory, known=known_run, anew=config.run.resume == "never")
        found.append(WandbTracker(directory, config.log, mode=mode, settings=settings, run_id=number, say=say))
    if config.log.tensorboard:
        found.append(TensorBoardTracker(directory, settings=settings, first_step=first_step))
    return Tracking(
        trackers=[Background(tracker, say) for tracker in found],
        num_samples=config.log.num_samples,
        picture=lambda sample: None if held_out is None else thumbnail(held_out, sample),
        last_scores=last_scores(directory / "samples", first_step),
        hide=lambda text: str(hide(text, secrets)),
        wandb_run=number,
    )


def thumbnail(held_out: LoadedData, sample: Sample) -> Image.Image | None:
    """The first image of a sample, made small; None if it has none, or it cannot be used any more."""
    if not sample.images:
        return None
    file = next(one.file for one in held_out.examples if one.id.split("#")[0] == sample.id)
    try:
        image = held_out.collator.open_image(sample.images[0], file)
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
