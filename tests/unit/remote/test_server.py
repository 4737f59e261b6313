"""A server whose model an engine elsewhere computes: what clients and operators are told."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from recollect.conversation.model import Model
from recollect.server.access import Keyring, StoredKey, hash_key
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


@pytest.mark.slow
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


def test_a_key_without_a_slot_is_told_so(
    make_stub: Callable[..., tuple[Any, str]], load: Callable[..., Model], tmp_path: Path
) -> None:
    """It stays so until somebody gives llama-server more slots: no fault of the server's, and no retry."""
    _, url = make_stub("llama", slots=1)
    hub = ModelHub(lambda _: load(f"llama={url}"), ["reference"])
    settings = Settings(
        home=tmp_path, models=("reference",), has_keys=True, limits=Limits(shutdown_s=5)
    )
    keyring = Keyring([StoredKey(key, hash_key(key * 40)) for key in "ab"])
    with TestClient(create_app(settings, hub, keyring), base_url="http://127.0.0.1") as client:
        answers = [
            client.post(
                "/v1/chat/completions", json=ASKED, headers={"Authorization": f"Bearer {key * 40}"}
            )
            for key in "ab"
        ]
    assert [answer.status_code for answer in answers] == [200, 400]
    error = answers[1].json()["error"]
    assert error["code"] == "memory_limit"
    assert "--parallel" in error["message"]


@pytest.mark.slow
def test_a_profile_is_not_claimed_of_an_engine_elsewhere(
    stub_and_client: tuple[Any, TestClient],
) -> None:
    _, client = stub_and_client
    (model,) = client.get("/v1/models").json()["data"]
    assert model["recollect"] == {"loaded": True, "context_length": 2048, "profile": None}


@pytest.mark.slow
def test_replicas_are_counted(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    text = client.get("/metrics").text
    assert "recollect_replica_up{" in text
    assert 'kind="generated"' in text
    assert 'outcome="done"' in text


@pytest.mark.slow
def test_completions_and_a_new_key_of_reuse(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"prompt": "once upon a time " * 20, "max_tokens": 4}
    reused = [
        client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]
    assert reused[0]["cached_tokens"] == 0
    assert reused[1]["cached_tokens"] > 0


@pytest.mark.slow
def test_prompts_are_read_ahead_elsewhere(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"messages": [{"role": "system", "content": "Be careful. " * 20}]}
    first, again = (client.post("/v1/prewarm", json=body).json() for _ in range(2))
    assert first["computed_tokens"] == first["prompt_tokens"]
    assert again["computed_tokens"] == 0


@pytest.mark.slow
def test_public_prefixes_are_refused(stub_and_client: tuple[Any, TestClient]) -> None:
    _, client = stub_and_client
    body = {"messages": [{"role": "system", "content": "Be careful."}], "public": True}
    assert client.post("/v1/prewarm", json=body).status_code >= 400


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple["subprocess.Popen[str]", str]]]:
    """Return a function that starts `recollect serve` on an engine, and returns it and its address."""
    started: list[subprocess.Popen[str]] = []

    def serve(engine: str) -> tuple[subprocess.Popen[str], str]:
        said = ["serve", "-m", "reference", "--engine", engine, "--port", "0"]
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
            [sys.executable, "-m", "recollect", *said],
            env={**os.environ, "RECOLLECT_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+(?=/v1)", line):
                return process, found[0]
        raise AssertionError(f"it ended with {process.wait()}")

    yield serve
    for process in started:
        process.kill()
        process.communicate()


def _until(client: httpx.Client, status: int) -> httpx.Response:
    end = time.monotonic() + 60
    while (answer := client.get("/health")).status_code != status or "loading" in answer.text:
        assert time.monotonic() < end, answer.text
        time.sleep(0.1)
    return answer


@pytest.mark.slow
def test_a_server_that_begins_before_its_engine_waits_for_it(
    make_stub: Callable[..., tuple[Any, str]],
    start: Callable[..., tuple["subprocess.Popen[str]", str]],
) -> None:
    stub, engine = make_stub("llama", is_loading=True)
    stub.stop()
    process, url = start(f"llama={engine}")
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert _until(client, 503).json()["status"] == "no engine"
        answer = client.post("/v1/chat/completions", json=ASKED)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert client.get("/v1/conversations").status_code == 200, "what was said can be read"
        stub.start(int(engine.rpartition(":")[2]))
        time.sleep(1)
        answer = client.post("/v1/chat/completions", json=ASKED)
        assert answer.status_code == 503, "it loads its model"
        stub.is_loading = False
        _until(client, 200)  # without a request, for whoever asks first how it is
        assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert told.count(f"No engine answers at {engine}") >= 1
    assert "start it, or see whether the address is right" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_server_whose_engine_cannot_be_used_ends_with_what_to_change(
    make_stub: Callable[..., tuple[Any, str]],
    start: Callable[..., tuple["subprocess.Popen[str]", str]],
) -> None:
    _, engine = make_stub(tells_cached=False)
    process, _ = start(f"vllm={engine}")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--enable-prompt-tokens-details" in told
