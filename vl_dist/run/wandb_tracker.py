"""Weights & Biases. One run there for one output directory, however often training is stopped and started again."""

import contextlib
import json
import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from vl_dist.errors import UserError
from vl_dist.run.files import WANDB_RUN
from vl_dist.run.tracking import ShownSample
from vl_dist.settings import LogConfig

Mode = Literal["off", "offline", "online"]
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # W&B's own server, by its present and its former name
INIT_S = 30.0  # for the server to answer
COLUMNS = ("step", "id", "image", "references", "prediction", "score", "change")
MODES: dict[str, Mode] = {"disabled": "off", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online"}


def wandb_mode(setting: str, env: Mapping[str, str]) -> Mode:
    """Where W&B's record of a run goes.

    Args:
        setting: `log.wandb`.
        env: the environment of this process.

    Raises:
        UserError: the setting asks for what is not there: the package, or a key.
    """
    if setting == "off":
        return "off"
    if find_spec("wandb") is None:
        if setting == "auto":
            return "off"
        raise UserError(f"log.wandb is {setting}, but wandb is not installed: pip install wandb, or set log.wandb=off.")
    has_key = bool(env.get("WANDB_API_KEY")) or _key_in_netrc(env)
    if setting == "online":
        if not has_key:
            raise UserError("log.wandb is online, but no key is set up: run `wandb login`, or set log.wandb=offline.")
        return "online"
    if setting == "offline":
        return "offline"
    return MODES.get(env.get("WANDB_MODE", ""), "online" if has_key else "offline")


def _key_in_netrc(env: Mapping[str, str]) -> bool:
    """Whether `wandb login` left a key."""
    path = Path(env.get("NETRC", "~/.netrc")).expanduser()
    own = urlsplit(env.get("WANDB_BASE_URL", "")).netloc
    try:
        known = netrc.netrc(path)
        return any(known.authenticators(host) is not None for host in ((own,) if own else HOSTS))
    except (OSError, netrc.NetrcParseError):
        return False


def read_run_id(output_dir: Path) -> str | None:
    """The run's id on W&B that an output directory keeps; None if it keeps none."""
    path = output_dir / WANDB_RUN
    return str(json.loads(path.read_text())["id"]) if path.is_file() else None


def run_id(output_dir: Path, *, known: str | None, anew: bool) -> str:
    """The run's id on W&B: the one in the output directory, else a known or a new one, kept there before W&B hears of it.

    Args:
        output_dir: made already.
        known: of the checkpoint that the run goes on from.
        anew: forget the one that is there: another run takes the directory's place.
    """
    kept = read_run_id(output_dir)
    if kept is not None and not anew:
        return kept
    made = known or secrets.token_hex(4)
    path = output_dir / WANDB_RUN
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps({"id": made}) + "\n")
    temporary.replace(path)
    return made


class WandbTracker:
    """A run on W&B, or on disk for `wandb sync`."""

    name = "W&B"

    def __init__(
        self,
        output_dir: Path,
        log: LogConfig,
        *,
        mode: Literal["offline", "online"],
        settings: dict[str, Any],
        run_id: str,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            output_dir: W&B's files go to the folder `wandb` in it.
            settings: of the whole run, plain and without secrets.
            run_id: of the run there; one that is known goes on.
            say: tells the person.
        """
        self._output_dir = output_dir
        self._log = log
        self._mode = mode
        self._settings = settings
        self._run_id = run_id
        self._say = say
        self._images: dict[str, Any] = {}
        self._wandb: Any = None  # the package, imported in the tracker's thread
        self._run: Any = None

    def start(self) -> None:
        """Begins the run, or goes on with it."""
        # Its logs and copies go to the home directory otherwise.
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._output_dir / "wandb" / "cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(self._output_dir / "wandb" / "data"))
        import wandb

        self._wandb = wandb
        number = self._run_id
        try:
            self._run = self._begin(self._mode, number)
        except wandb.errors.Error as error:
            if self._mode == "offline":
                raise
            self._say(f"W&B cannot be reached ({str(error).splitlines()[0]}): its record is kept for `wandb sync`.")
            self._teardown()  # its process still holds the id
            self._run = self._begin("offline", number)
        # Steps that a kill cut off are logged again after it: W&B's own counter only grows, so curves go by our steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _begin(self, mode: Literal["offline", "online"], number: str) -> Any:
        return self._wandb.init(
            settings=self._wandb.Settings(
                mode=mode,
                run_id=number,
                resume="allow",
                root_dir=str(self._output_dir),
                run_name=Path(self._settings["run"]["output_dir"]).name,
                project=self._log.wandb_project,
                entity=self._log.wandb_entity,
                run_group=self._log.wandb_group,
                run_tags=self._log.wandb_tags,
                allow_val_change=True,
                init_timeout=INIT_S,
                silent=True,  # the console is this program's
                console="off",
                # Nothing of the machine and of the code but what is measured while training: paths, arguments, user names,
                # git remotes and installed packages can hold what is nobody's business. Not x_disable_machine_info: it
                # also switches off what is measured.
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
            config=self._settings,
        )

    def log(self, row: dict[str, Any]) -> None:
        """A point of every curve."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        """A table of images and captions; one for each evaluation, since a logged table never changes."""
        table = self._wandb.Table(columns=list(COLUMNS))
        for shown in samples:
            one = shown.sample
            if one.id not in self._images:
                picture = shown.picture()
                self._images[one.id] = None if picture is None else self._wandb.Image(picture, file_type="jpg")
            references = "\n".join(one.references)
            table.add_data(step, one.id, self._images[one.id], references, one.prediction, one.score, shown.change)
        self._run.log({"step": step, "eval/samples": table})

    def adapter(self, directory: Path, step: int, aliases: Sequence[str]) -> None:
        """A version of the run's adapter."""
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata={"step": step})
        kept = self._output_dir / "wandb" / "adapters" / f"{directory.name}-{'-'.join(aliases)}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for path in sorted(directory.iterdir()):
            if path.name.startswith("optimizer"):
                continue
            # Links outlive the checkpoint, which may be pruned before W&B has read it, and take no room while it lives.
            try:
                (kept / path.name).hardlink_to(path)
            except OSError:
                shutil.copy(path, kept / path.name)
            artifact.add_file(str(kept / path.name), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=list(aliases))

    def alert(self, title: str, text: str) -> None:
        """Sent by mail or Slack, as the owner's account says."""
        self._run.alert(title=title, text=text)

    def finish(self, code: int) -> None:
        """Waits until W&B has everything."""
        self._run.finish(exit_code=code)
        self._teardown()

    def abandon(self) -> None:
        """Ends W&B's own process, which Python would wait for at its end."""
        for child in psutil.Process().children():
            try:
                if child.name() == "wandb-core":
                    child.kill()
            except psutil.Error:  # gone already
                continue
        if self._wandb is not None:
            # That it is dead is known; this keeps Python from asking it at the end, and from a traceback about it.
            with contextlib.suppress(ConnectionError):
                self._teardown()

    def _teardown(self) -> None:
        try:
            self._wandb.teardown()
        except SystemExit as ended:  # that is how it passes on how its own process ended
            raise ConnectionError(f"its process ended with code {ended.code}") from None
