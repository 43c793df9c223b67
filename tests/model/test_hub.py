"""Fetching a model with the hubs' real clients, from stand-in servers on a loopback port."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.hub_servers import Hub, serving
from vl_dist.errors import UserError
from vl_dist.model.hub import find_model
from vl_dist.settings import ModelConfig

FILES = {
    "config.json": json.dumps({"model_type": "qwen2_vl"}).encode(),
    "model.safetensors": bytes(range(256)) * 45_000,  # above the 10 MiB that the clients write at a time
    "sub/notes.txt": "Ein Modell für Versuche.".encode(),
}
CUT_AFTER = 11_000_000  # bytes
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens
FETCH = """
import sys
from vl_dist.errors import UserError
from vl_dist.model.hub import find_model
from vl_dist.settings import ModelConfig
name, hub, revision, weights = sys.argv[1:]
try:
    model = ModelConfig(path=name, hub=hub, revision=revision or None)
    sys.stdout.write(f"\\nfound {find_model(model, weights=weights == 'True')}")
except UserError as error:
    sys.stdout.write(f"\\nrefused {error}")
"""


@dataclass(frozen=True)
class Client:
    """A hub's real client in a process of its own, for it reads its environment when it is imported."""

    hub: str
    home: Path

    def fetch(self, endpoint: str, name: str = "org/model", revision: str = "", *, weights: bool = True) -> str:
        """`found DIRECTORY` or `refused MESSAGE`."""
        environment = os.environ | {
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": endpoint,
            "MODELSCOPE_CACHE": str(self.home / "ms"),
            "MODELSCOPE_ENDPOINT": endpoint,
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
            "MODELSCOPE_API_MAX_RETRIES": "1",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", FETCH, name, self.hub, revision, str(weights)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]


@pytest.fixture(params=["huggingface", "modelscope"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Client:
    return Client(request.param, tmp_path)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub("org/model", FILES)) as running:
        yield running


def found(answer: str) -> Path:
    assert answer.startswith("found "), answer
    return Path(answer.removeprefix("found "))


def assert_is_the_model(directory: Path) -> None:
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES


def test_a_model_is_fetched_once_byte_for_byte_and_then_taken_from_this_disk(client: Client, hub: Hub) -> None:
    assert_is_the_model(found(client.fetch(hub.endpoint)))
    assert sorted(name for name, _ in hub.sent) == sorted(FILES)
    assert_is_the_model(found(client.fetch(hub.endpoint)))
    assert len(hub.sent) == len(FILES)


def test_a_forecast_fetches_no_weights_and_training_then_fetches_only_them(client: Client, hub: Hub) -> None:
    directory = found(client.fetch(hub.endpoint, weights=False))
    assert (directory / "config.json").read_bytes() == FILES["config.json"]
    assert sorted(name for name, _ in hub.sent) == ["config.json", "sub/notes.txt"]
    assert_is_the_model(found(client.fetch(hub.endpoint)))
    assert sorted(name for name, _ in hub.sent) == sorted(FILES)


def test_a_connection_that_is_cut_is_taken_up_where_it_stopped(client: Client, hub: Hub) -> None:
    hub.cut["model.safetensors"] = CUT_AFTER
    assert_is_the_model(found(client.fetch(hub.endpoint)))
    started, resumed = (first for name, first in hub.sent if name == "model.safetensors")
    assert started == 0
    assert 0 < resumed <= CUT_AFTER


def test_half_a_model_is_never_taken_for_one_and_starting_again_ends_with_all_of_it(client: Client, hub: Hub) -> None:
    hub.cut["model.safetensors"] = CUT_AFTER
    hub.down_after_cut = True
    refused = client.fetch(hub.endpoint)
    assert refused.startswith("refused org/model could not be fetched")
    assert "start again: what was fetched is kept" in refused
    assert client.fetch(CLOSED).startswith("refused org/model could not be fetched")
    hub.mend()
    assert_is_the_model(found(client.fetch(hub.endpoint)))


@pytest.mark.parametrize(
    ("name", "revision", "check"),
    [("org/absent", "", "model.path (OWNER/NAME),"), ("org/model", "v9", "model.path (OWNER/NAME) and model.revision,")],
)
def test_a_name_or_revision_that_the_hub_does_not_have_is_one_message(
    client: Client, hub: Hub, name: str, revision: str, check: str
) -> None:
    refused = client.fetch(hub.endpoint, name, revision)
    named = f"{name} at revision {revision}" if revision else name
    assert refused.startswith(f"refused {named} could not be fetched from {client.hub}: the hub says")
    assert f"Check {check}" in refused
    assert "model.hub=local model.path=DIRECTORY" in refused


def test_without_a_network_the_message_says_what_else_can_be_done(client: Client) -> None:
    refused = client.fetch(CLOSED)
    assert refused.startswith(f"refused org/model could not be fetched from {client.hub} (")
    assert "Check the network" in refused
    assert "model.hub=local model.path=DIRECTORY" in refused


def test_a_repository_without_a_config_is_not_a_model(client: Client) -> None:
    with serving(Hub("org/model", {"README.md": b"nothing"})) as empty:
        assert "holds no config.json" in client.fetch(empty.endpoint)


def test_a_directory_without_a_config_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist.*model\.hub=modelscope"):
        find_model(ModelConfig(path=str(tmp_path)))
