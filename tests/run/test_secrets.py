"""What is certainly a secret stops a run before it is written anywhere; what may be one does not reach trackers."""

import pytest

from vl_dist.config import load
from vl_dist.errors import UserError
from vl_dist.run.secrets import HIDDEN, hide, refuse_secrets, secret_values

CANARY = "canary4711canary4711"


def test_values_count_as_secret_by_the_names_of_their_variables() -> None:
    env = {"HF_TOKEN": CANARY, "PGPASSWORD": "hunter2hunter2", "HOME": "/home/someone", "TOKENIZERS_PARALLELISM": "false"}
    assert secret_values(env) == (CANARY, "hunter2hunter2")


def test_secrets_and_all_that_looks_like_a_token_are_hidden_wherever_they_stand() -> None:
    tree = {
        "path": f"/runs/{CANARY}/x",
        "tags": [f"hf_{'a1B2' * 8}", "plain"],
        "url": "https://me:pass@host/data",
        "n": 3,
        "revision": "0123456789abcdef0123456789abcdef01234567",
    }
    assert hide(tree, (CANARY,)) == {
        "path": f"/runs/{HIDDEN}/x",
        "tags": [HIDDEN, "plain"],
        "url": f"https://{HIDDEN}@host/data",
        "n": 3,
        "revision": "0123456789abcdef0123456789abcdef01234567",  # a commit is no secret
    }


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (f"log.wandb_tags=[{CANARY}]", "log.wandb_tags"),
        (f"data.train=/data/hf_{'a1B2' * 8}/x.jsonl", "data.train"),
        ("model.path=https://me:secretpass@host/model", "model.path"),
    ],
)
def test_a_setting_that_holds_a_secret_is_refused_by_name_and_not_shown(word: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        refuse_secrets(load(None, [word]), {"MY_SECRET": CANARY})
    message = str(caught.value)
    assert message.startswith(named) and word.split("=", 1)[1] not in message and CANARY not in message


def test_a_directory_that_a_variable_of_such_a_name_holds_is_not_refused() -> None:
    refuse_secrets(load(None, ["data.train=/home/me/keys/records.jsonl"]), {"KEY_DIR": "/home/me/keys/records.jsonl"})
    refuse_secrets(load(None), {"HF_TOKEN": CANARY})
