"""
What those who watch `/v1/events` cost: the server's share of a core, and what the engine's thread does.

    python benchmarks/events.py [--model M] [--profile P] [--watchers 50] [--tokens 256] [--rounds 3] [--save]

A server in this process generates replies of that many tokens, streamed to one client, by turns with nobody
watching and with that many streams of events, which another process reads. The server's CPU time is measured
for its event loop and the feed, thread by thread, so that the forward passes, which take all cores, are not
in it; `share` is what the streams add to it in a second of generating. The engine's thread is counted: the
calls of Python functions that it makes for each token are the same, whoever watches.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, Final

import httpx
import uvicorn

import recollect
from harness import Load, parser, report, say
from recollect.server.access import Keyring
from recollect.server.app import create_app, uvicorn_config
from recollect.server.hub import ModelHub
from recollect.server.settings import Settings, bind

MOST_SHARE: Final = 0.05
_CLOCK_TICKS: Final = 100
"""Of CPU time in a second, in /proc. Source: proc(5), and `getconf CLK_TCK` on every Linux we know."""

_READER: Final = """
import selectors, socket, sys
host, port, count = "127.0.0.1", int(sys.argv[1]), int(sys.argv[2])
ready = selectors.DefaultSelector()
for _ in range(count):
    one = socket.create_connection((host, port))
    one.sendall(b"GET /v1/events HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
    one.recv(1 << 16)
    ready.register(one, selectors.EVENT_READ)
print("watching", flush=True)
while ready.get_map():
    for key, _ in ready.select():
        if not key.fileobj.recv(1 << 16):
            ready.unregister(key.fileobj)
"""


def main() -> int:
    """Measure, and return 1 where the streams cost more than is promised."""
    options = parser(__doc__.partition("\n\n")[0], profile="fast")
    options.add_argument("--watchers", type=int, default=50)
    options.add_argument("--tokens", type=int, default=256, help="of each reply")
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    others = Load()
    with (
        tempfile.TemporaryDirectory() as home,  # with a journal of its own
        recollect.load(args.model, profile=args.profile) as model,
        _served(model, home) as port,
    ):
        calls = _CountedCalls(model)
        _reply(port, 16)  # the first passes lay out the weights
        alone, watched = [], []
        for number in range(args.rounds):
            alone.append(_measured(port, args.tokens, calls))
            with _watching(port, args.watchers):
                watched.append(_measured(port, args.tokens, calls))
            say(f"round {number + 1}: alone {alone[-1]}, watched {watched[-1]}")
        share = median(one["share"] for one in watched) - median(one["share"] for one in alone)
        result = {
            "watchers": args.watchers,
            "share_alone": median(one["share"] for one in alone),
            "share_watched": median(one["share"] for one in watched),
            "share": share,
            "engine_calls_per_token_alone": median(one["calls"] for one in alone),
            "engine_calls_per_token_watched": median(one["calls"] for one in watched),
            "tokens_per_second_alone": median(one["tokens_per_second"] for one in alone),
            "tokens_per_second_watched": median(one["tokens_per_second"] for one in watched),
            "others_busy_cores": others.others(),
        }
        say(f"{args.watchers} streams take {share:.1%} of a core (at most {MOST_SHARE:.0%})")
        report("events", model, result, save=args.save)
    return int(share > MOST_SHARE)


class _CountedCalls:
    """Counts the calls of Python functions on the engine's thread."""

    def __init__(self, model: recollect.Model) -> None:
        self.calls = 0
        threading.setprofile(self._note)  # of threads that begin from now on
        model.engine.wait_until_warm()
        sleep(2.5)  # the engine's thread ends where nothing is to be done, and begins anew

    def _note(self, _frame: Any, event: str, _: object) -> None:
        if threading.current_thread().name != "recollect":
            sys.setprofile(None)
        elif event == "call":
            self.calls += 1


@contextmanager
def _served(model: recollect.Model, home: str) -> Iterator[int]:
    hub = ModelHub(lambda _: model, [model.name])
    settings = Settings(home=Path(home), models=(model.name,))
    app = create_app(settings, hub, Keyring())
    server = uvicorn.Server(uvicorn_config(app, settings.limits))
    sockets = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=[sockets], name="server", daemon=True)
    thread.start()
    while not server.started:
        sleep(0.05)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        app.state.services.watchers.end()
        server.should_exit = True
        thread.join(30)


@contextmanager
def _watching(port: int, count: int) -> Iterator[None]:
    command = [sys.executable, "-c", _READER, str(port), str(count)]
    with subprocess.Popen(  # noqa: S603 - our own program
        command, stdout=subprocess.PIPE, text=True
    ) as readers:
        assert readers.stdout is not None
        readers.stdout.readline()
        try:
            yield
        finally:
            readers.terminate()


def _measured(port: int, tokens: int, calls: _CountedCalls) -> dict[str, float]:
    busy, counted, begun = _busy_s(), calls.calls, perf_counter()
    generated = _reply(port, tokens)
    seconds = perf_counter() - begun
    return {
        "share": (_busy_s() - busy) / seconds,
        "calls": (calls.calls - counted) / generated,
        "tokens_per_second": generated / seconds,
    }


def _reply(port: int, tokens: int) -> int:
    """Have a reply generated and streamed; return how many tokens it had."""
    body = {
        "messages": [{"role": "user", "content": "Tell a long story about a lighthouse."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage: dict[str, Any] = {}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with (
        httpx.Client(timeout=600, trust_env=False) as client,
        client.stream("POST", url, json=body) as reply,
    ):
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    return int(usage["completion_tokens"])


def _busy_s() -> float:
    """Return the CPU time of the server's event loop and of the feed so far."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent = 0.0
    for number, name in names.items():
        if name in ("server", "recollect-events"):
            fields = Path(f"/proc/self/task/{number}/stat").read_text().rpartition(")")[2].split()
            spent += (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
    return spent


if __name__ == "__main__":
    sys.exit(main())
