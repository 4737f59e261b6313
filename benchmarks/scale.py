"""
What recollect costs in front of engines elsewhere, and how a fleet of them would be used.

    python benchmarks/scale.py [--streams 50] [--tokens 200] [--save]

1. The front's cost: processor time of `recollect serve` per token, while so many chats are answered at once
   over HTTP, as streams, by an engine that speaks as vLLM does and gives each 50 tokens a second. Engine and
   clients are in other processes, whose time is not counted. The first round is a warm-up.
2. A fleet, simulated (`fleet`): 10,000 conversations on 16 replicas, of which nothing is computed.
   `elsewhere.py` holds the same model against two real replicas.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Final

import psutil

import recollect
from fleet import POLICIES, Fleet, simulate
from harness import Load, parser, report, say

FLEET: Final = Fleet(conversations=10_000, replicas=16, turns=6, tokens=400, held=125_000, unit=16)

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
    fleet = {name: simulate(FLEET, policy) for name, policy in POLICIES.items()}
    for name, found in fleet.items():
        say(f"fleet, {name:16} reused {found['reused_share']:.1%}  busiest {found['busiest']:.2f}")
    result: dict[str, object] = {"front": front, "fleet": fleet}
    say(json.dumps(result, indent=1))
    report("scale", model, result, save=chosen.save)
    model.close()


if __name__ == "__main__":
    main()
