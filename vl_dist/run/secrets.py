"""Secrets among the settings: what is certainly one is refused, what may be one is hidden from trackers.

Settings are written to config.yaml, shown on the console and sent to trackers; a token has no business there.
"""

import re
from collections.abc import Mapping
from typing import Any

from vl_dist.config import keys, plain, value_at
from vl_dist.errors import UserError
from vl_dist.settings import Config

HIDDEN = "(hidden)"
TELLING_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD")
# A shorter value would be found in words that have nothing to do with it: TOKENIZERS_PARALLELISM=false.
MIN_LENGTH = 8
SURE_LENGTH = 16  # a value this long that is no path does not stand in a setting by chance
TOKENS = re.compile(
    r"""
    hf_[A-Za-z0-9]{16,}                                     # Hugging Face
    | ms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}        # ModelScope
    | wandb_v1_\w{16,}                                      # W&B
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
    | sk-[\w-]{20,} | xox[abeprs]-[\w-]{10,}
    | AKIA[0-9A-Z]{16}
    | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+                  # a JSON web token
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                       # user:password@host
    """,
    re.VERBOSE,
)


def secret_values(env: Mapping[str, str]) -> tuple[str, ...]:
    """Values of environment variables whose names say that they are secret, the longest first."""
    found = {
        value
        for name, value in env.items()
        if len(value) >= MIN_LENGTH and any(word in name.upper() for word in TELLING_NAMES)
    }
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def hide(value: Any, secrets: tuple[str, ...]) -> Any:
    """The same tree of plain values, with these secrets and all that looks like a token replaced in its texts.

    Args:
        value: a text, a number, None, or lists and mappings of them.
        secrets: as `secret_values` gives them.
    """
    if isinstance(value, dict):
        return {name: hide(item, secrets) for name, item in value.items()}
    if isinstance(value, list):
        return [hide(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return TOKENS.sub(HIDDEN, value)


def refuse_secrets(config: Config, env: Mapping[str, str]) -> None:
    """Makes sure that no setting holds what is certainly a secret.

    Args:
        env: the environment of this process.

    Raises:
        UserError: one does. The message names the setting and not its value.
    """
    sure = tuple(value for value in secret_values(env) if len(value) >= SURE_LENGTH and "/" not in value)
    for found in keys():
        value = plain(value_at(config, found.path))
        if hide(value, sure) != value:
            raise UserError(
                f"{found.path} holds what looks like a secret: a token, a password in a URL, or the value of an "
                "environment variable with such a name. Settings are written to files, shown and sent to trackers: take it "
                "out. Hubs and trackers read theirs from the environment (HF_TOKEN, MODELSCOPE_API_TOKEN, WANDB_API_KEY)."
            )
