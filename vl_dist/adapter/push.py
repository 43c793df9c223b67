"""Sharing: the adapter's own files, and nothing else of a run, to a hub by the hub's own client."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vl_dist.adapter.contract import read_contract
from vl_dist.errors import UserError
from vl_dist.run.files import METADATA

Hub = Literal["huggingface", "modelscope"]
NAME = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST_REASON = 400  # characters of a client's own message
MESSAGE = "Upload adapter"


def require_token(hub: Hub) -> str:
    """The token that the hub's client would use.

    Raises:
        UserError: there is none.
    """
    if hub == "huggingface":
        from huggingface_hub import get_token

        token, how = get_token(), "set HF_TOKEN, or log in with: hf auth login"
    else:
        from modelscope_hub import HubConfig

        token, how = HubConfig().token, "set MODELSCOPE_API_TOKEN, or log in with: modelscope login"
    if not token:
        raise UserError(f"There is no token for {hub}: {how}. It must be allowed to write.")
    return token


def files_to_push(adapter: Path) -> list[str]:
    """Names of the files that were exported. What else lies in the directory stays where it is.

    Raises:
        UserError: one is missing.
    """
    names = sorted({*read_contract(adapter).files, "adapter_config.json", "README.md", METADATA})
    missing = [name for name in names if not (adapter / name).is_file()]
    if missing:
        raise UserError(f"{adapter} lacks {missing[0]}. Restore the adapter's own files, or export it again.")
    return names


def refuse_bad_name(repo: str) -> None:
    """Raises `UserError` where a repository's name is not OWNER/NAME."""
    if not NAME.fullmatch(repo):
        raise UserError(f"--repo is {repo!r}; it must be OWNER/NAME.")


def push(adapter: Path, names: Sequence[str], *, hub: Hub, repo: str, private: bool, token: str) -> str:
    """Makes the repository if it is not there, and uploads these files in one commit.

    Args:
        names: files of the adapter's directory.
        repo: OWNER/NAME.
        private: make it so that only its owner sees it.

    Returns:
        Where it is now.

    Raises:
        UserError: the hub refuses, cannot be reached, or has a public repository of this name although `private`.
    """
    send = _to_huggingface if hub == "huggingface" else _to_modelscope
    return send(adapter, names, repo, private, token)


def _to_huggingface(adapter: Path, names: Sequence[str], repo: str, private: bool, token: str) -> str:
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise _is_public(repo, "huggingface")
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=adapter / name) for name in names]
        return str(api.create_commit(repo, files, commit_message=MESSAGE).repo_url)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:  # RuntimeError: its transfer extension
        raise _not_pushed(repo, "huggingface", error) from None


def _to_modelscope(adapter: Path, names: Sequence[str], repo: str, private: bool, token: str) -> str:
    from modelscope_hub import HubApi, HubConfig, Visibility
    from modelscope_hub.errors import HubError

    api = HubApi(token=token)
    try:
        if not api.repo_exists(repo, "model"):
            api.create_repo(repo, "model", visibility=Visibility.PRIVATE if private else Visibility.PUBLIC)
        elif private:
            about = api.get_repo(repo, "model")  # its two interfaces write it in three ways
            if not about.private and str(about.visibility) not in ("private", str(int(Visibility.PRIVATE))):
                raise _is_public(repo, "modelscope")
        api.upload_folder(
            repo,
            "model",
            adapter,
            commit_message=MESSAGE,
            allow_patterns=list(names),
            use_cache=False,  # it would lie in the adapter's directory
            disable_tqdm=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, HubError) as error:
        raise _not_pushed(repo, "modelscope", error) from None
    return f"{HubConfig().endpoint}/models/{repo}"


def _is_public(repo: str, hub: Hub) -> UserError:
    return UserError(
        f"{repo} is on {hub} already and everyone can see it, but --private was asked for; nothing was uploaded. Make it "
        "private there, or give another --repo."
    )


def _not_pushed(repo: str, hub: Hub, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:LONGEST_REASON]
    return UserError(
        f"The adapter could not be pushed to {repo} on {hub} ({type(error).__name__}: {reason}). Check the name, the "
        "network, and that the token may write there."
    )
