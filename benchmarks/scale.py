"""
What recollect costs in front of engines elsewhere, and how a fleet of them would be used.

    python benchmarks/scale.py [--streams 50] [--tokens 200] [--save]

1. The front's cost: processor time of `recollect serve` per token, while so many chats are answered at once
   over HTTP, as streams, by an engine that speaks as vLLM does and gives each 50 tokens a second. Engine and
   clients are in other processes, whose time is not counted. The first round is a warm-up.
2. A fleet, simulated: 10,000 conversations on 16 replicas that each hold the KV of a twelfth of what is said,
   evicting what was used longest ago. Which share of what could be reused is, and how uneven the load is, by
   policy: by conversation (rendezvous hashing, as `remote/replicas` and a sticky router do), to whoever has
   the least to do, and by turns. A replica's cache is a model; nothing is computed.
"""

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from hashlib import blake2b
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Final

import psutil

import recollect
from harness import Load, parser, report, say

CONVERSATIONS: Final = 10_000
REPLICAS: Final = 16
TURNS: Final = 6
TOKENS_OF_A_TURN: Final = 400
HELD: Final = CONVERSATIONS * TURNS * TOKENS_OF_A_TURN // 12
"""Tokens whose KV one replica holds."""

_SERVER: Final = r"""
import json, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from recollect.text.tokenizer import ByteTokenizer
encode = ByteTokenizer().encode
seen = set()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def give(self, said):
        data = json.dumps(said).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        models = {"data": [{"id": "m", "max_model_len": 8192}]}
        self.give({"version": "0.32.0"} if self.path == "/version" else models)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.give({"tokens": encode(body["prompt"])})
        count, prompt = body["max_tokens"], len(body["prompt"])
        key = body["cache_salt"], tuple(body["prompt"][:256])
        cached = (prompt - 1) // 16 * 16 if key in seen else 0
        seen.add(key)
        self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
        def write(said):
            data = b"data: " + json.dumps(said).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data)); self.wfile.flush()
        for n in range(count):
            time.sleep(0.02)
            finish = "length" if n == count - 1 else None
            write({"choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": finish,
                                "token_ids": [97 + n % 26]}]})
        write({"choices": [], "usage": {"prompt_tokens": prompt,
               "prompt_tokens_details": {"cached_tokens": cached}}})
        self.wfile.write(b"0\r\n\r\n")
class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True
server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def measure_front(streams: int, tokens: int) -> tuple[recollect.Model, dict[str, Any]]:
    """Answer so many chats at once, and return what a token cost the server."""
    with tempfile.TemporaryDirectory() as home, ExitStack() as ended:
        engine = _started([sys.executable, "-c", _SERVER], home, ended, stdout=subprocess.PIPE)
        assert engine.stdout is not None
        where = f"vllm=http://127.0.0.1:{int(engine.stdout.readline())}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "recollect", "serve", "-m", "reference", "--engine", where]
        serving = psutil.Process(_started([*command, "--port", str(port)], home, ended).pid)
        _wait_for(port)
        for _ in range(2):
            load, begun, before = Load(), perf_counter(), serving.cpu_times()
            with ThreadPoolExecutor(streams) as pool:
                counts = list(pool.map(lambda n: _chat(port, n, tokens), range(streams)))
            after, seconds, others = serving.cpu_times(), perf_counter() - begun, load.others()
        model = recollect.load("reference", engine=where, home=Path(home))
    spent, total = after.user + after.system - before.user - before.system, sum(counts)
    assert total == streams * tokens, f"{total} tokens came"
    return model, {
        "streams": streams,
        "tokens": total,
        "cpu_ms_per_token": 1000 * spent / total,
        "tokens_per_core_second": total / spent,
        "seconds": seconds,
        "other_cores_busy": others,
    }


def _started(
    command: Sequence[str], home: str, ended: ExitStack, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """Start a process that ends with *ended*."""
    environment = {**os.environ, "RECOLLECT_HOME": home}
    process = subprocess.Popen(  # noqa: S603 - our own command lines
        command, env=environment, stdout=stdout, stderr=subprocess.DEVNULL, text=True
    )
    ended.callback(process.wait)
    ended.callback(process.kill)
    return process


def _wait_for(port: int) -> None:
    end = perf_counter() + 120
    while perf_counter() < end:
        with suppress(OSError):
            link = HTTPConnection("127.0.0.1", port)
            link.request("GET", "/health")
            if link.getresponse().status == 200:
                return
        sleep(0.2)
    raise AssertionError("the server did not start")


def _chat(port: int, number: int, tokens: int) -> int:
    """Ask one question, read the reply as a stream, and return how many tokens it says it has."""
    body = {
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    link = HTTPConnection("127.0.0.1", port, timeout=300)
    link.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    last = b""
    for line in link.getresponse():
        if line.startswith(b"data: {"):
            last = line
    return int(json.loads(last[6:])["usage"]["completion_tokens"])


Policy = Callable[[int, int, Sequence[int]], int]
"""Takes a conversation, the number of the request and each replica's load; returns a replica."""


def _by_conversation(conversation: int, _number: int, _load: Sequence[int]) -> int:
    def weight(replica: int) -> bytes:
        return blake2b(f"{replica}/{conversation}".encode(), digest_size=8).digest()

    return max(range(REPLICAS), key=weight)


def _least_loaded(_conversation: int, _number: int, load: Sequence[int]) -> int:
    return min(range(REPLICAS), key=load.__getitem__)


def _in_turn(_conversation: int, number: int, _load: Sequence[int]) -> int:
    return number % REPLICAS


POLICIES: Final[dict[str, Policy]] = {
    "by conversation": _by_conversation,
    "least loaded": _least_loaded,
    "in turn": _in_turn,
}


def simulate(policy: Policy, *, seed: int = 0) -> dict[str, float]:
    """Return the share of reusable tokens that were, and the load of the busiest over the mean."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    caches: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(REPLICAS)]
    held, load = [0] * REPLICAS, [0] * REPLICAS
    turns = [n for n in range(CONVERSATIONS) for _ in range(TURNS)]
    # Conversations overlap: each of their turns is near the others, among those of a thousand more.
    turns.sort(key=lambda n: n + dice.random() * 1000)
    lengths: Counter[int] = Counter()
    reusable = reused = 0
    for number, conversation in enumerate(turns):
        replica = policy(conversation, number, load)
        cache, before = caches[replica], lengths[conversation]
        found = min(cache.pop(conversation, 0), before)
        held[replica] -= found
        reusable += before
        reused += found
        lengths[conversation] += TOKENS_OF_A_TURN
        load[replica] += lengths[conversation] - found
        cache[conversation] = lengths[conversation]
        held[replica] += lengths[conversation]
        while held[replica] > HELD // REPLICAS:
            held[replica] -= cache.popitem(last=False)[1]
    return {"reused_share": reused / reusable, "busiest": max(load) / statistics.mean(load)}


def main() -> None:
    options = parser("What recollect costs in front of engines elsewhere.", profile="fast")
    options.add_argument("--streams", type=int, default=50)
    options.add_argument("--tokens", type=int, default=200)
    chosen = options.parse_args()
    model, front = measure_front(chosen.streams, chosen.tokens)
    say(
        f"front: {front['cpu_ms_per_token']:.3f} ms of processor time a token with {chosen.streams} streams, "
        f"{front['tokens_per_core_second']:,.0f} tokens a second of one core"
    )
    fleet = {name: simulate(policy) for name, policy in POLICIES.items()}
    for name, found in fleet.items():
        say(f"fleet, {name:16} reused {found['reused_share']:.1%}  busiest {found['busiest']:.2f}")
    result: dict[str, object] = {"front": front, "fleet": fleet}
    say(json.dumps(result, indent=1))
    report("scale", model, result, save=chosen.save)
    model.close()


if __name__ == "__main__":
    main()
