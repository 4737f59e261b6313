"""Clients that watch events and never read: what that costs the server, and what they are told later."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

if sys.platform != "linux":
    pytest.skip("memory is read from /proc", allow_module_level=True)

WATCHERS = 50
SAID = "x" * 30_000
TIMES = 400
"""As many events of 30 kB: 12 MB for each watcher, of which the log keeps 2, and Linux up to 4."""
BURST = 10
"""Messages in one request, which come all at once: more than a connection has room for."""


@pytest.fixture
def server(environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Return the address of a server in a process of its own, and the id of that process."""
    with subprocess.Popen(
        [sys.executable, "-m", "recollect", "serve", "--model", "reference", "--port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            addresses = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
            address = next(found[0] for found in addresses if found)
            # Each request is a line: a pipe that nobody reads is full some time, and the server waits.
            reader = threading.Thread(target=process.stderr.read, daemon=True)
            reader.start()
            yield address, process.pid
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            reader.join(timeout=60)
        finally:
            process.kill()


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def watch(address: str, last: int | None = None) -> socket.socket:
    """Return a connection that has asked for events, with little room for what it does not read."""
    where = urlsplit(address)
    assert where.hostname is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((where.hostname, where.port))
    query = "" if last is None else f"?after={last}"
    connection.sendall(f"GET /v1/events{query} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
    return connection


def kinds(connection: socket.socket, *until: str) -> list[str]:
    """Return the kinds of events that come, in their order, up to the first one with one of some texts."""
    data, wanted, seen = bytearray(), [text.encode() for text in until], 0
    while all(data.find(one, max(0, seen - len(one))) < 0 for one in wanted):
        seen = len(data)
        more = connection.recv(1 << 16)
        assert more, "the server ended the stream"
        data += more
    return re.findall(r"event: ([a-z.]+)", data.decode())


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, BURST])
def test_those_who_never_read_cost_little_and_are_told_that_they_missed_something(
    server: tuple[str, int], at_once: int
) -> None:
    address, pid = server
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=f"{address}/v1", trust_env=False))
        conversation = client.post("/conversations", json={}).raise_for_status().json()["id"]
        silent = [stack.enter_context(closing(watch(address))) for _ in range(WATCHERS)]
        reader = stack.enter_context(closing(watch(address)))
        heard: list[str] = []
        reading = threading.Thread(
            target=lambda: heard.extend(kinds(reader, "the last one", "events.lost"))
        )
        reading.start()
        before = memory_mb(pid)
        said = [f"{SAID} {number}" for number in range(TIMES - 1)] + [f"{SAID} the last one"]
        for first in range(0, TIMES, at_once):
            items = [{"role": "user", "content": one} for one in said[first : first + at_once]]
            client.post(
                f"/conversations/{conversation}/items", json={"items": items}
            ).raise_for_status()
        reading.join(timeout=60)
        assert not reading.is_alive()
        assert len(heard) >= TIMES or "events.lost" in heard
        grown = memory_mb(pid) - before
        assert grown < 60, f"{grown:.0f} MB more"
        for connection in silent[:5]:
            told = kinds(connection, "events.lost")
            assert told.count("events.lost") == 1
            assert told.count("message.created") < TIMES
        late = stack.enter_context(closing(watch(address, last=1)))
        assert kinds(late, "events.lost")[:1] == ["events.lost"]
        assert json.loads(client.get("/models").text)["data"]
