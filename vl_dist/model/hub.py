"""The base model's directory: on this disk, or fetched from a hub.

The hubs' own clients do the fetching: files that they fetched before are not fetched again, a connection that is cut is
taken up where it stopped, and a directory of which a part is missing is never taken for a whole one.
"""

from pathlib import Path

from vl_dist.errors import UserError
from vl_dist.settings import ModelConfig

LONGEST_REASON = 400  # characters of a client's own message; some quote whole pages


WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


def find_model(model: ModelConfig, *, weights: bool = True) -> Path:
    """The directory with the model's files, fetched from the hub if that is where it comes from.

    Args:
        weights: false: the other files are enough, and fetched in seconds.

    Raises:
        UserError: no such directory, or the hub did not give the files.
    """
    if model.hub == "huggingface":
        return _with_config(_from_huggingface(model, weights), model)
    if model.hub == "modelscope":
        return _with_config(_from_modelscope(model, weights), model)
    directory = Path(model.path)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"model.path is {model.path}, but {directory / 'config.json'} does not exist. Give the directory of a "
            "downloaded model, or set model.hub=modelscope or model.hub=huggingface to fetch it."
        )
    return directory


def _with_config(directory: Path, model: ModelConfig) -> Path:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{_named(model)} was fetched to {directory}, but holds no config.json: it is not a model of "
            "transformers. Give the name of a Qwen2-VL model."
        )
    return directory


def _from_huggingface(model: ModelConfig, weights: bool) -> Path:
    import httpx  # here, not above: where the model is local, its client need not be installed
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        left_out = None if weights else list(WEIGHTS)
        return Path(snapshot_download(model.path, revision=model.revision, ignore_patterns=left_out))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_there(model, error) from None
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:  # RuntimeError: its transfer extension
        raise _not_fetched(model, error) from None


def _from_modelscope(model: ModelConfig, weights: bool) -> Path:
    from modelscope import snapshot_download
    from modelscope_hub.errors import AuthenticationError, HubError, NotExistError, PermissionDeniedError

    try:
        left_out = None if weights else list(WEIGHTS)
        return Path(snapshot_download(model.path, revision=model.revision, ignore_patterns=left_out))
    except (OSError, ValueError, HubError) as error:
        # The client wraps what the hub answered into its transport library's error.
        if isinstance(error.__cause__ or error, (NotExistError, AuthenticationError, PermissionDeniedError)):
            raise _not_there(model, error) from None
        raise _not_fetched(model, error) from None


def _named(model: ModelConfig) -> str:
    return f"{model.path} at revision {model.revision}" if model.revision else model.path


def _reason(error: Exception) -> str:
    """The client's own words in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}"


def _not_there(model: ModelConfig, error: Exception) -> UserError:
    wrong = "model.path (OWNER/NAME) and model.revision" if model.revision else "model.path (OWNER/NAME)"
    return UserError(
        f"{_named(model)} could not be fetched from {model.hub}: the hub says that it is not there, or that it is "
        f"private ({_reason(error)}). Check {wrong}, log in to the hub if it is private, or download the model elsewhere "
        "and set model.hub=local model.path=DIRECTORY."
    )


def _not_fetched(model: ModelConfig, error: Exception) -> UserError:
    return UserError(
        f"{_named(model)} could not be fetched from {model.hub} ({_reason(error)}). Check the network and start again: "
        "what was fetched is kept. Or download the model elsewhere and set model.hub=local model.path=DIRECTORY."
    )
