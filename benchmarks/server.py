"""
The server against llama-server: the same weights, the same requests over HTTP, in turns.

    python benchmarks/server.py [--rival FILE.gguf] [--rounds 2] [--save]
    python benchmarks/server.py --runtime llama --model FILE.gguf --rival FILE.gguf
        [--no-draft] [--only-speed]

Traces are those of `benchmarks/workloads.py`, each conversation sent whole each time, as chat
clients do; and one that goes on after a restart of both. First-token time is measured by the client,
from the request to the first piece of text. Computed tokens are each server's own count. llama-server
runs from the `xllamacpp` package, its prompt cache on, with as many slots as there are clients; without
that package, or a file for it, ours alone is measured. On llama.cpp both compute with the same library
and the same file, so that what we add is seen; the script then returns 1 where that is too much. Guesses,
which llama-server does not take, are left out with `--no-draft`, and the traces with `--only-speed`.
"""

import argparse
import asyncio
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import Any, Final

import aiohttp
import httpx

import recollect
from harness import Load, parser, report, say
from recollect import config
from recollect.models.fetch import sources_folder
from recollect.models.prepare import models_folder
from traces import text_of

REPLY_TOKENS: Final = 24
OVERHEAD_SAMPLES: Final = 150
CLIENTS: Final = 4
SPEED_REPEATS: Final = 10
SPEED_TOKENS: Final = 64
"""
Of each reply whose tokens per second are measured. Many short replies in turns: what else the machine's host
does changes from one half minute to the next, and by more than what is to be seen.
"""
AFTER_RESTART: Final = "after a restart"

LEAST_DECODE: Final = 0.95
LEAST_CLIENTS: Final = 1.0
"""Of llama-server's tokens per second, for one client and for several, with the same file and library."""
MOST_BEYOND_NEW: Final = 32
"""Tokens computed after a restart besides those that are new."""

OURS: Final = "recollect"
THEIRS: Final = "llama-server"

Message = dict[str, str]

_LLAMA_SERVER: Final = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.cpuparams.n_threads = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
server = x.Server(p)
while True:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Asked:
    """What one request cost."""

    text: str
    ttft_s: float
    prompt_tokens: int
    computed_tokens: int
    decode_s: float
    """From the first piece of text to the last."""


class Running:
    """A server in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], url: str, home: Path) -> None:
        self.name, self.url = name, url
        self._command, self._home = list(command), home
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "RECOLLECT_HOME": str(self._home)}
        self._process = subprocess.Popen(  # noqa: S603 - our own command lines
            self._command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = monotonic() + 120
        while True:
            assert self._process.poll() is None, f"{self.name} ended"
            assert monotonic() < end, f"{self.name} does not answer"
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            sleep(0.25)
        for _ in range(2):  # the first passes of a process are slow
            asyncio.run(ask(self.url, [{"role": "user", "content": "Hello"}]))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()


async def ask(url: str, messages: Sequence[Message], *, max_tokens: int = REPLY_TOKENS) -> Asked:
    """Ask for a reply and read it as a stream."""
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = ""
    first: float | None = None
    last = 0.0
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    async with aiohttp.ClientSession() as client:
        begun = perf_counter()
        response = await client.post(f"{url}/v1/chat/completions", json=body)
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            usage, timings = chunk.get("usage") or usage, chunk.get("timings") or timings
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    last = perf_counter()
                    first = first or last
                    text += piece
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", 0)
    computed = timings.get("prompt_n", usage["prompt_tokens"] - cached)
    first = first or perf_counter()
    return Asked(text, first - begun, usage["prompt_tokens"], computed, max(0.0, last - first))


@dataclass
class Conversation:
    """A conversation as a chat client holds it: text, sent whole each time."""

    url: str
    messages: list[Message]

    async def say(self, text: str) -> Asked:
        self.messages.append({"role": "user", "content": text})
        return await self.answer()

    async def answer(self) -> Asked:
        asked = await ask(self.url, self.messages)
        self.messages.append({"role": "assistant", "content": asked.text})
        return asked

    async def regenerate(self) -> Asked:
        self.messages.pop()
        return await self.answer()

    async def edit(self, turn: int, text: str) -> Asked:
        """Say something else in place of a turn's question; what came after it is gone."""
        del self.messages[1 + 2 * turn :]
        return await self.say(text)

    def undo(self) -> None:
        del self.messages[-2:]

    @property
    def turns(self) -> int:
        return len(self.messages) // 2

    def question(self, turn: int) -> str:
        return self.messages[1 + 2 * turn]["content"]

    def fork(self) -> "Conversation":
        return Conversation(self.url, [*self.messages])


def new(url: str, system: str) -> Conversation:
    return Conversation(url, [{"role": "system", "content": system}])


async def at_once(chats: Sequence[Conversation], texts: Sequence[str]) -> list[Asked]:
    return await asyncio.gather(*(chat.say(text) for chat, text in zip(chats, texts, strict=True)))


async def long_chat(url: str, dice: random.Random) -> list[Asked]:
    chat = new(url, text_of(dice, 60))
    return [await chat.say(text_of(dice, dice.randint(5, 60))) for _ in range(20)]


async def regenerate_and_edit(url: str, dice: random.Random) -> list[Asked]:
    chat, asked = new(url, text_of(dice, 60)), []
    for _ in range(12):
        asked.append(await chat.say(text_of(dice, 30)))
        what = dice.choice(["regenerate", "edit last", "edit earlier", "undo"])
        if what == "regenerate":
            asked.append(await chat.regenerate())
        elif what == "undo":
            chat.undo()
        else:
            turn = chat.turns - 1 if what == "edit last" else dice.randrange(chat.turns)
            words = chat.question(turn).split()
            kept = words[: dice.randint(0, len(words) - 1)]
            asked.append(await chat.edit(turn, " ".join([*kept, text_of(dice, 8)])))
    return asked


async def interleaved(url: str, dice: random.Random) -> list[Asked]:
    order = [new(url, text_of(dice, 20)) for _ in range(12)] * 4
    dice.shuffle(order)
    return [await chat.say(text_of(dice, dice.randint(5, 40))) for chat in order]


async def one_system_prompt(url: str, dice: random.Random) -> list[Asked]:
    system, asked = text_of(dice, 1350), []  # about 1,500 tokens
    chats = [new(url, system) for _ in range(8)]
    for _ in range(2):
        asked += await at_once(chats, [text_of(dice, 20) for _ in chats])
    return asked


async def agent(url: str, dice: random.Random) -> list[Asked]:
    trunk = new(url, text_of(dice, 200))
    asked = [await trunk.say(text_of(dice, 60)) for _ in range(3)]
    forks = [trunk.fork() for _ in range(16)]
    for _ in range(2):
        asked += await at_once(forks, [text_of(dice, 15) for _ in forks])
    return [*asked, await trunk.say(text_of(dice, 15))]


TRACES: Final = {
    "long chat": long_chat,
    "regenerate and edit": regenerate_and_edit,
    "12 interleaved": interleaved,
    "8 on one system prompt": one_system_prompt,
    "agent, 16 forks": agent,
}


def run_trace(server: Running, name: str, seed: str) -> dict[str, Any]:
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    asked = asyncio.run(TRACES[name](server.url, dice))
    return {
        "server": server.name,
        "trace": name,
        "requests": len(asked),
        "prompt_tokens": sum(one.prompt_tokens for one in asked),
        "computed_tokens": sum(one.computed_tokens for one in asked),
        "ttft_s": sum(one.ttft_s for one in asked),
    }


def after_restart(servers: Sequence[Running], seed: str) -> Iterator[dict[str, Any]]:
    """A conversation goes on after each server was stopped and started."""
    for server in servers:
        dice = random.Random(seed)  # noqa: S311 - not for secrets
        chat = new(server.url, text_of(dice, 300))
        before = [asyncio.run(chat.say(text_of(dice, 60))) for _ in range(4)][-1]
        server.restart()
        asked = asyncio.run(chat.say(text_of(dice, 10)))
        fresh = asked.prompt_tokens - before.prompt_tokens - REPLY_TOKENS
        yield {
            "server": server.name,
            "trace": AFTER_RESTART,
            "requests": 1,
            "new_tokens": fresh,
        } | {name: value for name, value in asdict(asked).items() if name != "text"}


def decode_rate(server: Running, seed: str) -> float:
    """Return the tokens per second of one client, from its first piece of text to its last."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    message = {"role": "user", "content": text_of(dice, 200)}
    asked = asyncio.run(ask(server.url, [message], max_tokens=SPEED_TOKENS))
    return (SPEED_TOKENS - 1) / asked.decode_s


def throughput(server: Running, seed: str) -> float:
    """Return the tokens per second of several clients at once."""

    async def run() -> float:
        dice = random.Random(seed)  # noqa: S311 - not for secrets
        asked = [[{"role": "user", "content": text_of(dice, 40)}] for _ in range(CLIENTS)]
        begun = perf_counter()
        await asyncio.gather(*(ask(server.url, one, max_tokens=SPEED_TOKENS) for one in asked))
        return CLIENTS * SPEED_TOKENS / (perf_counter() - begun)

    return asyncio.run(run())


def overhead(url: str, model: recollect.Model) -> dict[str, float]:
    """
    Return the median times to the first text, in seconds: over HTTP, of the library, and what HTTP adds.

    In turns, short messages of the same length, each a first one; the connection is open, and the
    client is the standard library's, so that what is measured is the server. The pauses let either
    finish what it does after a reply. Passes vary by more than HTTP adds, so that is the median of
    the differences.
    """
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    over_http, direct = [], []
    for number in range(OVERHEAD_SAMPLES):
        for is_http in (number % 2 == 0, number % 2 == 1):
            sleep(0.25)
            if is_http:
                over_http.append(http_first_text(connection, f"Number {100 + number}"))
            else:
                direct.append(library_first_text(model, f"Number {500 + number}"))
    connection.close()
    added = [one - other for one, other in zip(over_http, direct, strict=True)]
    return {"http": median(over_http), "library": median(direct), "added": median(added)}


def http_first_text(connection: http.client.HTTPConnection, said: str) -> float:
    messages = [{"role": "user", "content": said}]
    body = json.dumps({"messages": messages, "max_tokens": 2, "stream": True, "temperature": 0})
    headers = {"Content-Type": "application/json"}
    begun = perf_counter()
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    first = None
    for line in response:
        if first is None and b'"content":' in line and b'"content":""' not in line:
            first = perf_counter() - begun
    assert first is not None, response.status
    return first


def library_first_text(model: recollect.Model, said: str) -> float:
    params = recollect.SamplingParams(max_tokens=2)
    begun = perf_counter()
    message: recollect.types.Message = {"role": "user", "content": said}
    with model.session_from([message], params=params) as session, session.stream(None) as stream:
        pieces = iter(stream)  # once it is forgotten, the reply ends
        next(pieces)
        return perf_counter() - begun


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def start_servers(args: argparse.Namespace, home: Path) -> list[Running]:
    port = free_port()
    ours = [sys.executable, "-m", "recollect", "serve", "--model", args.model]
    ours += ["--profile", args.profile, "--runtime", args.runtime, "--port", str(port)]
    ours += ["--no-draft"] if args.no_draft else []
    servers = [Running(OURS, ours, f"http://127.0.0.1:{port}", home)]
    if args.rival is not None:
        port = free_port()
        affinity = getattr(os, "sched_getaffinity", None)
        threads = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
        # Its context is divided among its slots.
        theirs = [sys.executable, "-c", _LLAMA_SERVER, str(args.rival), str(port)]
        theirs += [str(8192 * CLIENTS), str(CLIENTS), str(threads)]
        servers.append(Running(THEIRS, theirs, f"http://127.0.0.1:{port}", home))
    return servers


def measure(servers: Sequence[Running], rounds: int, names: Iterable[str]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    speeds: dict[str, list[float]] = {server.name: [] for server in servers}
    decodes: dict[str, list[float]] = {server.name: [] for server in servers}
    for number in range(rounds):
        order = servers if number % 2 == 0 else servers[::-1]
        for name in names:
            for server in order:
                traces.append(run_trace(server, name, f"{name} {number}"))
                say(
                    "{server:14} {trace:22} {computed_tokens:7} {ttft_s:8.2f} s".format(
                        **traces[-1]
                    )
                )
        for repeat in range(SPEED_REPEATS):
            for server in order if repeat % 2 == 0 else order[::-1]:
                speeds[server.name].append(throughput(server, f"speed {number} {repeat}"))
                say(f"{server.name:14} {CLIENTS} clients {speeds[server.name][-1]:11.1f} tokens/s")
                decodes[server.name].append(decode_rate(server, f"one {number} {repeat}"))
                say(f"{server.name:14} 1 client {decodes[server.name][-1]:12.1f} tokens/s")
        for result in after_restart(order, f"restart {number}"):
            traces.append(result)
            say("{server:14} {trace:22} {computed_tokens:7} {ttft_s:8.2f} s".format(**result))
    return {
        "traces": traces,
        "tokens_per_second": {name: median(values) for name, values in speeds.items() if values},
        "decode_per_second": {name: median(values) for name, values in decodes.items() if values},
    }


def holds(result: dict[str, Any]) -> bool:
    """Return whether we add no more to llama.cpp than we may, and compute little after a restart."""
    checks = [
        one["computed_tokens"] <= one["new_tokens"] + MOST_BEYOND_NEW
        for one in result["traces"]
        if one["trace"] == AFTER_RESTART and one["server"] == OURS
    ]
    for name, least in (("tokens_per_second", LEAST_CLIENTS), ("decode_per_second", LEAST_DECODE)):
        if THEIRS in result[name]:
            ratio = result[name][OURS] / result[name][THEIRS]
            say(f"{name}: {ratio:.3f} of llama-server's")
            checks.append(ratio >= least)
    return all(checks)


def main() -> int:
    """Run and print; return 1 where, on llama.cpp, something is slower than it may be."""
    options = parser("The server against llama-server, over HTTP.", profile="fast", runtimes=True)
    options.add_argument(
        "--rival", type=Path, help="a GGUF file for llama-server, Q8_0 for its fast path"
    )
    options.add_argument("--rounds", type=int, default=2, help="0: only what HTTP adds")
    options.add_argument("--no-draft", action="store_true", help="guess no tokens")
    options.add_argument("--only-speed", action="store_true", help="none of the traces")
    args = options.parse_args()
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        home, beside = Path(folder, "served"), Path(folder, "beside")
        for one in (home, beside):
            one.mkdir()
            models_folder(one).symlink_to(models_folder(config.home()))
            sources_folder(one).symlink_to(sources_folder(config.home()))
        servers = start_servers(args, home)
        try:
            result: dict[str, Any] = measure(
                servers, args.rounds, () if args.only_speed else TRACES
            )
            with recollect.load(
                args.model, profile=args.profile, runtime=args.runtime, home=beside
            ) as model:
                first = overhead(servers[0].url, model)
                result |= {"first_text_s": first, "others_load": load.others()}
                say(f"HTTP adds {first['added'] * 1000:.1f} ms to the first text")
                name = "server-llama" if args.runtime == "llama" else "server"
                name += "-no-draft" if args.no_draft else ""
                report(name, model, result, save=args.save)
        finally:
            for server in servers:
                server.stop()
    return 0 if args.runtime != "llama" or not args.rounds or holds(result) else 1


if __name__ == "__main__":
    sys.exit(main())
