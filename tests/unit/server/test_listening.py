"""An address is taken before a model is loaded, or one sentence says why it cannot be."""

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.errors import ConfigError, FetchError
from recollect.server.access import Keyring
from recollect.server.app import serve
from recollect.server.hub import ModelHub
from recollect.server.settings import Settings, bind


def test_a_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    def load(_name: str) -> Model:
        pytest.fail("the model was loaded first")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(home=tmp_path, models=("reference",), port=port)
        with pytest.raises(ConfigError, match=f"port {port}: something else listens there"):
            serve(settings, ModelHub(load, ["reference"]), Keyring())


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_there_are_65_535_ports(tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 65535"):
        Settings(home=tmp_path, models=("reference",), port=port)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("nowhere.invalid", "no address goes by that name"),
        ("a" * 70, "no address goes by that name"),
        ("192.0.2.1", "this machine has no such address"),
    ],
)
def test_an_address_of_no_machine_or_another_is_told(host: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bind(host, 0)


def test_all_addresses_of_a_name_are_listened_on_at_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both: list[Any] = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: both)
    sockets = bind("localhost", 0)
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1", "127.0.0.2"]
    finally:
        for one in sockets:
            one.close()


@pytest.mark.slow
def test_a_server_answers_on_the_port_that_it_took_and_frees_it(tmp_path: Path) -> None:
    listening, may_fail, ports, told = threading.Event(), threading.Event(), [], []

    def load(_name: str) -> Model:
        assert may_fail.wait(60)
        raise FetchError("There is no network.")

    def on_listening(port: int) -> None:
        ports.append(port)
        listening.set()

    def run() -> None:
        settings = Settings(home=tmp_path, models=("reference",), port=0)
        hub = ModelHub(load, ["reference"])
        try:
            serve(settings, hub, Keyring(), on_listening=on_listening)
        except FetchError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert listening.wait(60)
        url = f"http://127.0.0.1:{ports[0]}/v1/models"
        assert httpx.get(url, timeout=60, trust_env=False).status_code == 200
    finally:
        may_fail.set()
        thread.join(60)
    assert len(told) == 1
    with socket.create_server(("127.0.0.1", ports[0])):
        pass  # it is free again
