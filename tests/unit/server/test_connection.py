"""What a connection may bring, and how long it may take, over a raw socket."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.server.access import BoundedProtocol
from recollect.server.settings import Limits

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode()
POST = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
QUICK = Limits(header_s=0.3, body_s=0.3, shutdown_s=5)
QUITE_QUICK = Limits(header_s=1, body_s=1, shutdown_s=5)  # for what a busy machine has to keep
PATIENT = Limits(header_s=5, body_s=5, shutdown_s=5)


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=60) as one:
        yield one


def rest(one: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    received = b""
    try:
        while piece := one.recv(65536):
            received += piece
    except ConnectionResetError:
        pass  # it did not read what we sent last
    return received


def answer(one: socket.socket) -> int:
    """Return the status of one answer, read to its end."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += one.recv(1)
    head = received.lower()
    if b"content-length: " in head:
        left = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        while left:
            left -= len(one.recv(left))
    return int(received.split()[1])


def flood(one: socket.socket, piece: bytes, most: int) -> int:
    """Send until the other side closes, and return how many bytes it took."""
    sent = 0
    try:
        while sent < most:
            one.sendall(piece)
            sent += len(piece)
    except (BrokenPipeError, ConnectionResetError):
        return sent
    pytest.fail(f"{sent:,} bytes were taken")


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of what parsers were fed with since they last understood something."""
    sizes: list[int] = []
    real = BoundedProtocol.data_received

    def noted(self: BoundedProtocol, data: bytes) -> None:
        real(self, data)
        sizes.append(self.pending_bytes)

    monkeypatch.setattr(BoundedProtocol, "data_received", noted)
    return sizes


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of what parsers were fed with."""
    sizes: list[int] = []
    real = BoundedProtocol.data_received

    def noted(self: BoundedProtocol, data: bytes) -> None:
        real(self, data)
        sizes.append(len(data))

    monkeypatch.setattr(BoundedProtocol, "data_received", noted)
    return sizes


ENDLESS = {
    "a header's value": (b"GET / HTTP/1.1\r\nX: ", b"a" * 4096),
    "a header's name": (b"GET / HTTP/1.1\r\n", b"a" * 4096),
    "headers": (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 500),
    "an address": (b"GET /", b"a" * 4096),
    "empty lines": (b"", b"\r\n" * 2048),
    "a trailer": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ",
        b"a" * 4096,
    ),
    "a chunk's extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=", b"a" * 4096),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused_after_64_kib(
    start: Callable[..., httpx.Client], fed: list[int], name: str
) -> None:
    """Before any key was looked at, and with no more than that held, however much is sent."""
    client = start(keys=["a"], limits=PATIENT)
    first, piece = ENDLESS[name]
    with connected(client) as one:
        one.sendall(first)
        sent = flood(one, piece, 64 * 2**20)
        assert sent < 8 * 2**20  # what lies in the buffers of the sockets was not read
    assert 0 < max(fed) <= PATIENT.header_bytes


def test_large_headers_are_told_so(client: httpx.Client) -> None:
    with connected(client) as one:
        one.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2**16)
        told = rest(one)
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert "65,536" in json.loads(body)["error"]["message"]
    assert client.get("/health", headers={"X": "a" * 60_000}).status_code == 200


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("sent", "drip", "status"),
    [
        (b"", b"", b"408"),
        (b"GET / HT", b"", b"408"),
        (b"GET / HTTP/1.1\r\nX: ", b"a", b"408"),
        (b"", b"\r\n", b"408"),
        (GET, b"\r\n", b"200"),  # an idle connection with a drip is no idle one
        (GET + b"GET /hea", b"", b"200"),
        (POST + b"Content-Length: 1000\r\n\r\n{", b" ", b"408"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", b"408"),
        (POST + b"Content-Length: 1000\r\n\r\n", b"", b"408"),
        # A body that nobody reads, since its request is refused.
        (POST.replace(b"127.0.0.1", b"evil") + b"Content-Length: 1000\r\n\r\n", b" ", b"403"),
    ],
)
def test_a_slow_request_ends(
    start: Callable[..., httpx.Client],
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes,
    drip: bytes,
    status: bytes,
) -> None:
    """Whether nothing comes any more, or a byte now and then."""
    monkeypatch.setattr(BoundedProtocol, "grace_s", 0.2)
    client = start(limits=QUICK)
    begun = time.monotonic()
    with connected(client) as one:
        one.sendall(sent)
        one.settimeout(0.05)
        received = b""
        while time.monotonic() - begun < 30:  # uvicorn's own time is 75 s
            try:
                piece = one.recv(65536)
            except TimeoutError:
                with suppress(BrokenPipeError, ConnectionResetError):
                    one.sendall(drip)
                continue
            except ConnectionResetError:
                break
            received += piece
            if not piece:
                break
        else:
            pytest.fail("it was not closed")
    assert received.startswith(b"HTTP/1.1 " + status), received


@pytest.mark.slow
def test_a_slow_body_is_told_so_in_the_words_of_its_api(start: Callable[..., httpx.Client]) -> None:
    client = start(limits=QUICK)
    path = b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with connected(client) as one:
        one.sendall(path + b"Content-Length: 100\r\n\r\n{")
        told = json.loads(rest(one).partition(b"\r\n\r\n")[2])
    assert told["type"] == "error"
    assert "0.3 s" in told["error"]["message"]


@pytest.mark.slow
def test_a_quick_client_has_its_time(start: Callable[..., httpx.Client]) -> None:
    """Deadlines belong to what is received: not to a reply, nor to the next request's wait for it."""
    client = start(limits=QUITE_QUICK)
    with connected(client) as one:
        one.sendall(WHOLE)
        assert answer(one) == 200
        time.sleep(1.2)  # between requests uvicorn's own time counts, which is longer
        one.sendall(WHOLE)
        assert answer(one) == 200
        one.sendall(WHOLE + WHOLE + GET)  # pipelined
        assert [answer(one) for _ in range(3)] == [200] * 3
        for start_at in range(0, len(WHOLE), 7):
            one.sendall(WHOLE[start_at : start_at + 7])
        assert answer(one) == 200


@pytest.mark.slow
def test_a_long_reply_is_not_cut_by_a_deadline(
    start: Callable[..., httpx.Client], make_model: Callable[..., Any], monkeypatch: Any
) -> None:
    model = make_model()
    forward = model.engine.runtime.forward

    def slow(rows: Any) -> Any:
        time.sleep(0.04)
        return forward(rows)

    monkeypatch.setattr(model.engine.runtime, "forward", slow)
    client = start(load=lambda _: model, limits=QUITE_QUICK)
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60}
    with connected(client) as one:
        data = json.dumps({**body, "ignore_eos": True}).encode()
        one.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        one.sendall(b"GET /hea")  # the next request begins, and waits for this one
        begun = time.monotonic()
        assert answer(one) == 200
        assert time.monotonic() - begun > 2 * QUITE_QUICK.header_s
        one.sendall(b"lth HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert answer(one) == 200


def test_a_large_body_comes_through_in_pieces(client: httpx.Client) -> None:
    """More than the headers may have, in one piece, in chunks, and as the first of two."""
    messages = [{"role": "user", "content": "é" * 200_000}]
    large = json.dumps({"messages": messages, "model": "none"}).encode()
    assert (
        client.post(CHAT, content=large, headers={"Content-Type": "application/json"}).json()[
            "error"
        ]["code"]
        == "model_not_found"
    )
    chunked = b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (large[at : at + 5000] for at in range(0, len(large), 5000))
    )
    with connected(client) as one:
        one.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n" + GET)
        assert answer(one) == 404
        assert answer(one) == 200


def test_an_upgrade_is_no_way_round(start: Callable[..., httpx.Client]) -> None:
    client = start(keys=["a"])
    with connected(client) as one:
        one.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n"
        )
        assert answer(one) == 401


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"\xff" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    ],
)
def test_what_is_no_http_is_refused(client: httpx.Client, sent: bytes) -> None:
    with connected(client) as one:
        one.sendall(sent)
        assert 400 <= answer(one) < 500
    assert client.get("/health").status_code in {200, 503}


def test_all_bodies_together_have_a_limit(
    start: Callable[..., httpx.Client], received: list[int], until: Callable[..., None]
) -> None:
    """Bytes that are held are given back when their requests are answered, or go."""
    limits = Limits(bodies_bytes=300_000, shutdown_s=5)
    client = start(limits=limits)
    part = POST + b"Content-Length: 200000\r\n\r\n" + b" " * 190_000
    with connected(client) as one, connected(client) as other:
        one.sendall(part)
        until(lambda: sum(received) == len(part))
        other.sendall(part)
        assert answer(other) == 503
        one.sendall(b" " * 10_000)
        assert answer(one) == 400
    for _ in range(5):
        received.clear()
        with connected(client) as one:
            one.sendall(part)
            until(lambda: bool(received))
    big = json.dumps({"messages": [{"role": "user", "content": "a" * 250_000}], "model": "none"})

    def told() -> str:
        answered = client.post(CHAT, content=big, headers={"Content-Type": "application/json"})
        return str(answered.json()["error"]["code"])

    until(lambda: told() == "model_not_found")  # that the last one went is noticed, sooner or later
    assert [told() for _ in range(3)] == ["model_not_found"] * 3


@pytest.fixture
def hurried(start: Callable[..., httpx.Client]) -> httpx.Client:
    return start(limits=QUICK)


@settings(max_examples=10)
@given(st.data())
def test_few_bytes_on_a_connection_do_not_make_it_fail(
    hurried: httpx.Client, data: st.DataObject
) -> None:
    send_changed(hurried, data)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.data())
def test_no_bytes_on_a_connection_make_it_fail(hurried: httpx.Client, data: st.DataObject) -> None:
    send_changed(hurried, data)


def send_changed(hurried: httpx.Client, data: st.DataObject) -> None:
    """A right request with some bytes changed is answered, and with no 5xx."""
    request = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(request)))
        without = data.draw(st.integers(0, 4))
        request = request[:at] + data.draw(st.binary(max_size=4)) + request[at + without :]
    with connected(hurried) as one:
        one.settimeout(3)  # where it is kept open all the same
        one.sendall(request)
        told = b""
        with suppress(TimeoutError, ConnectionResetError):
            while piece := one.recv(65536):
                told += piece
    assert told.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), told
    assert b"HTTP/1.1 5" not in told
