"""Who is let in, what a key keeps apart, and what a web page cannot do."""

import hashlib
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.errors import ConfigError, StoreCorruptError
from recollect.journal.journal import JOURNAL_NAME
from recollect.server.access import (
    ANYBODY,
    KeyFile,
    Keyring,
    StoredKey,
    hash_key,
    keyring,
    namespace_of,
)
from recollect.server.settings import Limits, Settings

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys


@pytest.mark.slow
def test_without_the_key_nothing_answers_but_health(start: Callable[..., httpx.Client]) -> None:
    client = start(keys=["right"])
    assert client.post(CHAT, json=HELLO).status_code == 200
    assert client.post(CHAT, json=HELLO, headers={"x-api-key": "right"}).status_code == 200
    wrongs: list[dict[str, str]] = [{}, bearer("wrong"), bearer("a b"), {"x-api-key": ""}]
    with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as stranger:
        for wrong in wrongs:
            for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"):
                refused = stranger.get(path, headers=wrong)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
            health = stranger.get("/health", headers=wrong)
            assert health.status_code in {200, 503}


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_read_ahead")
def test_what_one_key_said_is_computed_again_for_another(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], monkeypatch: Any
) -> None:
    """Neither the numbers nor the clock tell a client what others asked; what it shows are forward passes."""
    model = make_model(num_blocks=512)
    forward, fed = model.engine.runtime.forward, list[int]()

    def counted(rows: Any) -> Any:
        fed.append(sum(len(row.token_ids) for row in rows))
        return forward(rows)

    monkeypatch.setattr(model.engine.runtime, "forward", counted)
    client = start(load=lambda _: model, keys=["a", "b", "c"])

    def ask(key: str) -> tuple[int, list[int]]:
        said = [{"role": "user", "content": "secret " * 100}]
        fed.clear()
        answer = client.post(
            CHAT, json={"messages": said, "max_tokens": 1}, headers=bearer(key)
        ).json()
        return answer["usage"]["recollect"]["computed_tokens"], list(fed)

    first, again = ask("a"), [ask("a") for _ in range(3)]
    assert [ask("b"), ask("c")] == [first] * 2
    assert first[0] == sum(first[1]) > 700
    assert again == [(0, [])] * 3, "the logits after a prompt are its key's own, too"


@pytest.mark.slow
def test_ids_of_one_key_are_not_found_by_another(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keys=["a", "b"])
    response = post(client, "/v1/responses", {"input": "Hello", "max_output_tokens": 4})["id"]
    conversation = post(client, "/v1/conversations", {"metadata": {"of": "a"}})["id"]
    item = {"items": [{"role": "user", "content": "a"}]}
    tries: list[tuple[str, str, Json | None]] = [
        ("GET", f"/v1/responses/{response}", None),
        ("GET", f"/v1/responses/{response}/input_items", None),
        ("DELETE", f"/v1/responses/{response}", None),
        ("POST", "/v1/responses", {"input": "a", "previous_response_id": response}),
        ("POST", "/v1/responses", {"input": "a", "conversation": conversation}),
        ("GET", f"/v1/conversations/{conversation}", None),
        ("GET", f"/v1/conversations/{conversation}/tree", None),
        ("GET", f"/v1/conversations/{conversation}/items", None),
        ("POST", f"/v1/conversations/{conversation}/items", item),
        ("POST", f"/v1/conversations/{conversation}/fork", {}),
        ("DELETE", f"/v1/conversations/{conversation}", None),
    ]
    for method, path, body in tries:
        theirs = client.request(method, path, json=body, headers=bearer("b"))
        nobodys = client.request(
            method,
            path.replace(response, "resp_0").replace(conversation, "conv_0"),
            json=None
            if body is None
            else {
                name: {response: "resp_0", conversation: "conv_0"}.get(str(value), value)
                for name, value in body.items()
            },
            headers=bearer("b"),
        )
        assert theirs.status_code == nobodys.status_code == 404, (method, path)
        assert theirs.json()["error"]["code"] == nobodys.json()["error"]["code"]
    assert client.get("/v1/conversations", headers=bearer("b")).json()["data"] == []
    assert client.get(f"/v1/responses/{response}").status_code == 200


def test_metrics_are_for_operators(start: Callable[..., httpx.Client]) -> None:
    client = start(keys=["a", "b"], operators=["b"])
    assert client.get("/metrics").status_code == 404
    assert client.get("/metrics", headers=bearer("b")).status_code == 200


def test_keys_are_neither_logged_nor_written_down(
    start: Callable[..., httpx.Client],
    post: Callable[..., Json],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = "rk-very-secret"
    with caplog.at_level(logging.DEBUG):
        client = start(keys=[key])
        post(client, "/v1/responses", {"input": "Hello", "max_output_tokens": 2})
        client.post(CHAT, json={"messages": key}, params={"api_key": key})
    logged = [one.getMessage() for one in caplog.records if one.name.startswith("recollect")]
    assert any("/v1/responses 200" in line for line in logged)
    assert any("client 0" in line for line in logged)
    assert not any(key in line for line in logged)
    for file in (tmp_path / "home").iterdir():
        assert key.encode() not in file.read_bytes()
    assert (
        namespace_of(key).encode()
        in (tmp_path / "home" / JOURNAL_NAME).read_bytes()
        + (tmp_path / "home" / f"{JOURNAL_NAME}-wal").read_bytes()
    )


def test_a_namespace_says_nothing_of_the_key_or_its_hash() -> None:
    key = "rk-1"
    hashes = {namespace_of(key), hash_key(key), hashlib.sha256(key.encode()).hexdigest()}
    assert len(hashes) == 3
    assert namespace_of(key) == namespace_of(key) != namespace_of("rk-2")


def test_a_key_file_holds_hashes_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    file = KeyFile.in_home(tmp_path / "home")
    assert file.read() == []
    key = file.add("laptop")
    other = file.add("boss", is_operator=True)
    assert key.startswith("rk-")
    assert len(key) > 40
    assert key not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    ring = keyring(file, ["by hand"])
    found = [ring.client(one) for one in (key, other, "by hand", "rk-wrong", "", None)]
    assert [one and (one.name, one.is_operator) for one in found] == [
        ("laptop", False),
        ("boss", True),
        ("key 1", True),
        None,
        None,
        None,
    ]
    file.remove("laptop")
    assert keyring(file, ()).client(key) is None
    for wrong in (lambda: file.add("boss"), lambda: file.add(" "), lambda: file.remove("nobody")):
        with pytest.raises(ConfigError):
            wrong()
    file.path.write_text("{}")
    with pytest.raises(StoreCorruptError):
        file.read()


@pytest.mark.parametrize("key", ["", " ", "\t\n", "a\x07b", "schlüssel", " q7", "q7\n"])
def test_a_key_that_no_request_can_carry_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="RECOLLECT_API_KEY") as refused:
        keyring(KeyFile.in_home(tmp_path), ["good", key])
    assert not key.strip() or key.strip() not in str(refused.value)


def test_without_keys_everybody_is_the_user_of_the_machine() -> None:
    assert Keyring().client(None) is ANYBODY
    assert Keyring([StoredKey("a", hash_key("a"))]).client(None) is None


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104 - what must be refused
        ("192.168.1.2", False),
        ("box.example", False),
    ],
)
def test_other_machines_need_a_key(tmp_path: Path, host: str, is_local: bool) -> None:
    assert Settings(home=tmp_path, models=("m",), host=host, has_keys=True).is_local == is_local
    if is_local:
        Settings(home=tmp_path, models=("m",), host=host)
    else:
        with pytest.raises(ConfigError, match="--api-key"):
            Settings(home=tmp_path, models=("m",), host=host)


# --- web pages


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost:1", "Host": "localhost:1"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_requests_that_a_web_page_makes_are_refused(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    response = client.post(CHAT, json=HELLO, headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_a_page_that_was_named_may_call(start: Callable[..., httpx.Client]) -> None:
    client = start(cors_origins=("https://chat.example",))
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    allowed = client.options(CHAT, headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    answer = client.post(CHAT, json=HELLO, headers={"Origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert client.post(CHAT, json=HELLO, headers={"Origin": "https://e.example"}).status_code == 403


def test_a_page_that_was_named_may_call_where_there_are_keys(
    start: Callable[..., httpx.Client],
) -> None:
    """A browser asks without the key whether the page may call, and reads why it may not."""
    client = start(cors_origins=("https://chat.example",), keys=["a"])
    page = {"Origin": "https://chat.example"}
    asked = {
        **page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
        "Access-Control-Request-Private-Network": "true",
        "Authorization": "",
    }
    allowed = client.options(CHAT, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert allowed.headers["access-control-allow-private-network"] == "true"
    assert client.post(CHAT, json=HELLO, headers=page).status_code == 200
    refused = client.post(CHAT, json=HELLO, headers={**page, **bearer("wrong")})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    other = client.options(CHAT, headers={**asked, "Origin": "https://e.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    # What is no question of a browser's needs the key as ever.
    assert client.options(CHAT, headers=bearer("wrong")).status_code == 401


def test_cors_cannot_be_open_to_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Settings(home=tmp_path, models=("m",), cors_origins=("*",))


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTPS://Chat.Example", "https://chat.example"),
        ("https://chat.example:443", "https://chat.example"),
        ("http://[::1]:08080", "http://[::1]:8080"),
        ("app://obsidian.md", "app://obsidian.md"),
    ],
)
def test_an_origin_is_kept_as_a_browser_sends_it(tmp_path: Path, typed: str, sent: str) -> None:
    assert Settings(home=tmp_path, models=("m",), cors_origins=(typed,)).cors_origins == (sent,)


@pytest.mark.parametrize(
    "wrong",
    ["foo", "", "localhost:3000", "http://a/path", "http://a:99999", "null", "http://*.a", "a b"],
)
def test_what_is_no_origin_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="--cors"):
        Settings(home=tmp_path, models=("m",), cors_origins=(wrong,))


def test_a_name_of_the_machine_can_be_allowed(start: Callable[..., httpx.Client]) -> None:
    client = start(allowed_hosts=("Box.local",))
    assert client.get("/v1/models", headers={"Host": "box.local:80"}).status_code == 200


@pytest.mark.parametrize("wrong", ["", "http://box.local", "box.local:80", "box.local/"])
def test_what_is_no_name_of_a_machine_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="--allow-host"):
        Settings(home=tmp_path, models=("m",), allowed_hosts=(wrong,))


# --- size


def test_a_body_over_the_limit_is_refused_said_or_unsaid(
    start: Callable[..., httpx.Client],
) -> None:
    client = start(limits=Limits(body_bytes=1000, messages=3))
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * 1000 + b'"}]}'
    headers = {"Content-Type": "application/json"}
    assert client.post(CHAT, content=large, headers=headers).status_code == 413
    chunked = client.post(CHAT, content=iter([large[:600], large[600:]]), headers=headers)
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"
    many = {"messages": [{"role": "user", "content": "a"}] * 4, "max_tokens": 2}
    refused = client.post(CHAT, json=many)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


@pytest.mark.few(3)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff", b"{}"])
def test_what_is_no_request_is_a_400(client: httpx.Client, body: bytes) -> None:
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_address_that_is_not_there_is_a_404_in_json(client: httpx.Client) -> None:
    assert client.get("/v1/nowhere").json()["error"]["message"]
    assert client.get(CHAT).status_code == 405


def test_what_the_server_runs_on_reports_to_nobody(
    start: Callable[..., httpx.Client],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """FastAPI does, where variables say so that somebody set for another program."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert start().get("/v1/models").status_code == 200
    # Without the exporter's package it says that it would have.
    assert [record.message for record in caplog.records if record.name == "fastapi"] == []
