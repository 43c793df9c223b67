"""Sharing: the real clients upload the adapter's own files to a stand-in, and nothing else of the run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub_servers import Hub, serving
from tests.processes import run_ranks
from vl_dist import cli
from vl_dist.adapter.contract import read_contract

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


@dataclass(frozen=True, slots=True)
class Done:
    code: int | None
    output: str


Push = Callable[..., Done]


def push_to(endpoint: str, token: str, home: str, words: list[str]) -> int:
    """The command against this endpoint, in a process of its own, for the clients keep what they read when imported."""
    for name in [name for name in os.environ if "TOKEN" in name and "TOKENIZERS" not in name]:
        del os.environ[name]
    os.environ |= {
        "HOME": home,
        "MODELSCOPE_CACHE": f"{home}/ms",
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "MODELSCOPE_UPLOAD_BLOB_MAX_ATTEMPTS": "1",
        "MODELSCOPE_UPLOAD_COMMIT_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    if token:
        os.environ |= {"HF_TOKEN": token, "MODELSCOPE_API_TOKEN": token}
    from huggingface_hub import constants  # was imported before these processes were forked

    constants.ENDPOINT = endpoint
    constants.HF_TOKEN_PATH = f"{home}/none"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True  # as HF_HUB_DISABLE_XET=1
    return cli.main(["push", *words])


@pytest.fixture(params=["huggingface", "modelscope"])
def push(request: pytest.FixtureRequest, tmp_path: Path) -> Push:
    """`python -m vl_dist push` with this hub's client."""

    def run(adapter: Path, endpoint: str, *words: str, token: str = "secret-token") -> Done:
        asked = [str(adapter), "--hub", request.param, "--repo", "org/model", *words]
        log = tmp_path / "log"
        codes = run_ranks(push_to, endpoint, token, str(tmp_path / "home"), asked, world_size=1, log=log)
        return Done(codes[0], log.read_text())

    return run


def test_a_new_private_repository_gets_the_exported_files_and_nothing_else(push: Push, adapter: Path) -> None:
    for name in ("optimizer.safetensors", "state.json", ".env"):
        (adapter / name).write_text("not to be shared")
    with serving(Hub("org/model", {}, exists=False)) as hub:
        done = push(adapter, hub.endpoint, "--private")
    assert done.code == 0, done.output
    assert hub.endpoint in done.output and f"org/model: {len(hub.committed)} files" in done.output
    assert hub.private
    names = {*read_contract(adapter).files, "adapter_config.json", "README.md", "training_metadata.json"}
    assert hub.committed.keys() == names
    assert all(data == (adapter / name).read_bytes() for name, data in hub.committed.items())
    assert "secret-token" not in done.output


def test_what_is_public_already_gets_nothing_that_should_be_private(push: Push, adapter: Path) -> None:
    with serving(Hub("org/model", {}, private=False)) as hub:
        done = push(adapter, hub.endpoint, "--private")
    assert done.code == 2, done.output
    assert "everyone can see it" in done.output and "Traceback" not in done.output
    assert hub.committed == {}


@pytest.mark.parametrize("reason", ["no token", "wrong token", "no network"])
def test_what_stops_a_push_is_one_message(push: Push, adapter: Path, reason: str) -> None:
    with serving(Hub("org/model", {}, exists=False)) as hub:
        token = {"no token": "", "wrong token": "other"}.get(reason, "secret-token")
        done = push(adapter, CLOSED if reason == "no network" else hub.endpoint, token=token)
    assert done.code == 2, done.output
    message = done.output.splitlines()[-1]
    assert ("There is no token" if reason == "no token" else "could not be pushed to org/model") in message
    assert "Traceback" not in done.output and "files" not in done.output
    assert hub.committed == {}


def test_an_adapter_that_does_not_hold_its_contract_or_a_bad_name_never_reaches_a_hub(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vl_dist.adapter.push.require_token", lambda hub: "token")
    monkeypatch.setattr("vl_dist.adapter.push.push", lambda *_, **__: pytest.fail("it was pushed"))
    assert cli.main(["push", str(adapter), "--hub", "huggingface", "--repo", "model"]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cli.main(["push", str(adapter), "--hub", "huggingface", "--repo", "org/model"]) == 2
    assert "is not the file that was exported" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["push", str(adapter), "--hub", "modelscope", "--repo", "org/model"]) == 2
    assert "lacks adapter_model.safetensors" in capsys.readouterr().err
