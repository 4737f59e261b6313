"""A server on the reference model, listening on a port of its own, in a thread."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from recollect.conversation.model import Model
from recollect.engine.reply import IdleWork
from recollect.server.access import Keyring, StoredKey, hash_key
from recollect.server.app import create_app, uvicorn_config
from recollect.server.hub import ModelHub
from recollect.server.settings import Limits, Settings, bind

Json = dict[str, Any]


UNUSED_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that speak plain HTTP: by itself each one reads all certificates, which takes 20 ms."""


class QuickServer(uvicorn.Server):
    """uvicorn's server, which looks every 5 ms whether it is to end, and not only ten times a second."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for one in (*self.servers, *(sockets or ())):
            one.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self.config.app.state.services.watchers.end()  # type: ignore[union-attr] # it is ours
        # What hangs fails; on a busy machine the last requests may take more than a moment.
        async with asyncio.timeout(60):
            while self.server_state.connections or self.server_state.tasks:
                await asyncio.sleep(0.005)
            for server in self.servers:
                await server.wait_closed()
        await self.lifespan.shutdown()


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Return what all servers of a test end with; close it to stop them earlier."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(
    make_model: Callable[..., Model], tmp_path: Path, servers: ExitStack
) -> Callable[..., httpx.Client]:
    """Return what starts a server and returns a client of it, with the first of its keys."""

    def start(
        *,
        load: Callable[[str], Model] | None = None,
        names: Sequence[str] = ("reference",),
        keys: Sequence[str] = (),
        operators: Sequence[str] = (),
        memory_bytes: int | None = None,
        limits: Limits | None = None,
        aliases: dict[str, str] | None = None,
        on_load: Callable[[Model], object] = lambda _: None,
        context_length: Callable[[str], int | None] = lambda _: None,
        **settings: Any,
    ) -> httpx.Client:
        hub = ModelHub(
            load or (lambda _: make_model()),
            names,
            aliases=aliases,
            memory_bytes=memory_bytes,
            on_load=on_load,
            context_length=context_length,
        )
        chosen = Settings(
            home=tmp_path / "home",
            models=tuple(names),
            has_keys=bool(keys),
            limits=limits or Limits(shutdown_s=5),
            **settings,
        )
        stored = [
            StoredKey(f"client {number}", hash_key(key), key in operators)
            for number, key in enumerate(keys)
        ]
        app = create_app(chosen, hub, Keyring(stored))
        server = QuickServer(uvicorn_config(app, chosen.limits))
        thread = threading.Thread(
            target=server.run, args=[bind("127.0.0.1", 0)], name="server", daemon=True
        )
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.005)

        def stop() -> None:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive(), "the server did not stop"

        servers.callback(stop)
        port = server.servers[0].sockets[0].getsockname()[1]
        return servers.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {keys[0]}"} if keys else {},
                timeout=60,
                trust_env=False,
                verify=UNUSED_TLS,
            )
        )

    return start


@pytest.fixture
def client(start: Callable[..., httpx.Client]) -> httpx.Client:
    """Return a client of a server without keys."""
    return start()


@pytest.fixture
def post() -> Callable[..., Json]:
    """Return what posts and returns the body of a success."""

    def post(client: httpx.Client, path: str, body: Json, **options: Any) -> Json:
        response = client.post(path, json=body, **options)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    return post


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Return what waits until something holds; what takes milliseconds has a minute on a busy machine."""

    def until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.005)

    return until


@pytest.fixture
def post_and_leave(until: Callable[..., None]) -> Callable[..., None]:
    """Return what posts, and goes away without an answer as soon as something holds."""

    def leave(client: httpx.Client, path: str, body: Json, once: Callable[[], bool]) -> None:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        address = ("127.0.0.1", client.base_url.port or 0)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            until(once)

    return leave


@pytest.fixture
def chat(post: Callable[..., Json]) -> Callable[..., Json]:
    """Return what asks for a chat completion of (role, content) pairs."""

    def chat(client: httpx.Client, *messages: tuple[str, str], **fields: Any) -> Json:
        said = [{"role": role, "content": content} for role, content in messages]
        return post(client, "/v1/chat/completions", {"messages": said, "max_tokens": 8, **fields})

    return chat


@pytest.fixture
def events() -> Callable[..., list[Any]]:
    """Return what posts and returns the events: JSON as values, everything else as lines."""

    def events(client: httpx.Client, path: str, body: Json) -> list[Any]:
        with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                pytest.fail(response.read().decode())
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line.startswith(("data: ", ":"))]
        return [
            json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else line
            for line in lines
        ]

    return events


@pytest.fixture
def openais(client: httpx.Client) -> Iterator[Any]:
    """Return OpenAI's own client of the server."""
    import openai  # takes most of a second, which only its tests should pay

    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{client.base_url}/v1", api_key="none", http_client=http
    ) as official:
        yield official


@pytest.fixture
def anthropics(client: httpx.Client) -> Iterator[Any]:
    """Return Anthropic's own client of the server."""
    import anthropic

    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(
        base_url=str(client.base_url), api_key="none", http_client=http
    ) as official:
        yield official


_THINKS = (
    "{% for m in messages %}<|im_start|>"
    "{% if m.reasoning_content %}assistant\n<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{{ m.content }}<|im_end|>\n"
    "{% else %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A chat template that keeps what was thought, and can be told that nothing is to be."""


@pytest.fixture
def choosing(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., httpx.Client]:
    """
    Return what starts a server whose template knows reasoning, and whose tokens a function chooses.

    It is given the reply's tokens so far, and where in the conversation the reply begins. Nothing is
    read while nobody waits, so that this does not hide what a request reads.
    """

    def begin(next_token: Callable[[list[int], int], int]) -> httpx.Client:
        def choose(_: object, __: object, *, history: Any, reply_start: int, **___: Any) -> int:
            return next_token(history[reply_start:].tolist(), reply_start)

        monkeypatch.setattr(IdleWork, "start", lambda _, sequence: sequence.release())
        monkeypatch.setattr("recollect.engine.sampling.choose_token", choose)
        return start(load=lambda _: make_model(template=_THINKS, context_length=4096))

    return begin
