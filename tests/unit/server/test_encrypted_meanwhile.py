"""A folder that is encrypted while a server has it open: what is kept is refused, in words."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect import encryption
from recollect.journal.home import encrypt

SAID: dict[str, Any] = {"input": "Hello", "max_output_tokens": 2}


@pytest.fixture(params=["the server has read", "the server has not read yet"])
def encrypted(
    request: pytest.FixtureRequest,
    start: Callable[..., httpx.Client],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[httpx.Client, str]:
    """Return a client of a server whose folder was encrypted meanwhile, and the id of a response."""
    monkeypatch.setattr(encryption, "Scrypt", partial(encryption.Scrypt, n=2))
    client = first = start()
    response = first.post("/v1/responses", json=SAID)
    assert response.status_code == 200
    if request.param == "the server has not read yet":
        client = start()
    encrypt(tmp_path / "home", passphrase="open sesame")
    return client, response.json()["id"]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/responses", SAID),
        ("POST", "/v1/responses", {**SAID, "stream": True}),
        ("POST", "/v1/responses", {**SAID, "previous_response_id": "{id}"}),
        ("GET", "/v1/responses/{id}", None),
        ("GET", "/v1/responses/{id}/input_items", None),
        ("DELETE", "/v1/responses/{id}", None),
        ("POST", "/v1/conversations", {}),
        ("GET", "/v1/conversations", None),
    ],
)
def test_what_is_kept_is_unavailable_and_the_answer_says_to_start_anew(
    encrypted: tuple[httpx.Client, str],
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    body: dict[str, Any] | None,
) -> None:
    client, response_id = encrypted
    if body is not None:
        body = {name: response_id if value == "{id}" else value for name, value in body.items()}
    answer = client.request(method, path.format(id=response_id), json=body)
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "store_unavailable"
    assert "restart" in error["message"]
    assert "Traceback" not in caplog.text


@pytest.mark.few(1)
def test_what_is_not_kept_is_answered(encrypted: tuple[httpx.Client, str]) -> None:
    client, _ = encrypted
    said = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=said).status_code == 200
