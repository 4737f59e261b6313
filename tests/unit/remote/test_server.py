"""A server whose model an engine elsewhere computes: what clients and operators are told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from recollect.conversation.model import Model
from recollect.server.access import Keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Limits, Settings

ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


@pytest.fixture
def stub_and_client(
    make_stub: Callable[..., tuple[Any, str]], load: Callable[..., Model], tmp_path: Path
) -> Iterator[tuple[Any, TestClient]]:
    stub, url = make_stub()
    hub = ModelHub(lambda _: load(f"vllm={url}"), ["reference"])
    settings = Settings(
        home=tmp_path, models=("reference",), has_keys=False, limits=Limits(shutdown_s=5)
    )
    app = create_app(settings, hub, Keyring([]))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.post("/v1/chat/completions", json=ASKED)
        yield stub, client


def test_where_no_engine_answers_a_client_is_told_to_ask_again(
    stub_and_client: tuple[Any, TestClient],
) -> None:
    stub, client = stub_and_client
    stub.faults.extend(["refuse"] * 20)
    answer = client.post("/v1/chat/completions", json=ASKED)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert "127.0.0.1" not in answer.text, "clients are not told where the engines are"
    health = client.get("/health")
    assert health.status_code == 503
    assert health.json()["engines"] == {"up": 0, "all": 1}
    stub.faults.clear()
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_profile_is_not_claimed_of_an_engine_elsewhere(
    stub_and_client: tuple[Any, TestClient],
) -> None:
    _, client = stub_and_client
    (model,) = client.get("/v1/models").json()["data"]
    assert model["recollect"] == {"loaded": True, "context_length": 2048, "profile": None}


def test_replicas_are_counted(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    text = client.get("/metrics").text
    assert "recollect_replica_up{" in text
    assert 'kind="generated"' in text
    assert 'outcome="done"' in text


def test_completions_and_a_new_key_of_reuse(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"prompt": "once upon a time " * 20, "max_tokens": 4}
    reused = [
        client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]
    assert reused[0]["cached_tokens"] == 0
    assert reused[1]["cached_tokens"] > 0


def test_prompts_are_read_ahead_elsewhere(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"messages": [{"role": "system", "content": "Be careful. " * 20}]}
    first, again = (client.post("/v1/prewarm", json=body).json() for _ in range(2))
    assert first["computed_tokens"] == first["prompt_tokens"]
    assert again["computed_tokens"] == 0


def test_public_prefixes_are_refused(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"messages": [{"role": "system", "content": "Be careful."}], "public": True}
    assert client.post("/v1/prewarm", json=body).status_code >= 400
