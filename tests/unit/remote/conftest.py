"""
A server that speaks as vLLM or as llama-server does, over a model that is a hash, and misbehaves on demand.

The next token is a hash of all ids before it, so that a lost, repeated or reordered id changes the rest. KV
is a set of prefixes: in blocks and by salt as vLLM's, or by slot as llama-server's.
"""

import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Literal

import pytest

import recollect
from recollect.conversation.model import Model
from recollect.text.tokenizer import ByteTokenizer

Kind = Literal["vllm", "llama"]
Fault = Literal[
    "refuse",
    "bad request",
    "gone",
    "cut",
    "cut after 3",
    "error after 3",
    "silent",
    "silent after 3",
    "slow",
    "buffered",
]
SILENCE_S: Final = 60
BLOCK: Final = 16
ENDS_EVERY: Final = 97
_TOKENIZER: Final = ByteTokenizer()
_END: Final = min(_TOKENIZER.eos_token_ids)


_BANNED: Final = -100.0
"""A bias that vLLM leaves nothing of a token with."""
_HALF: Final = 0xC3
"""The first byte of a character of two: by itself it is shown as U+FFFD, which is written otherwise."""


def next_token(
    ids: list[int], bias: Mapping[int, float], seed: int | None, *, halves: bool = False
) -> int:
    """Return what follows: a letter, or the end; *halves*: now and then a half of a character."""
    wanted = {token: value for token, value in bias.items() if value > 0}
    if wanted:
        return max(wanted, key=lambda token: wanted[token])
    said = f"{ids}{seed}".encode()
    number = int.from_bytes(blake2b(said, digest_size=8).digest(), "little")
    if halves and number % 16 == 1:
        return _HALF
    ends = number % ENDS_EVERY == 0 and _END not in bias
    return _END if ends else 97 + number % 26


def rendered(messages: list[Mapping[str, str]]) -> str:
    """Return messages as the template of the reference model shows them."""
    said = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return f"{said}<|im_start|>assistant\n"


def block_names(ids: list[int]) -> list[int]:
    """Return a name for each whole block of ids, in which all before it is contained."""
    names, parent = [], 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        parent = hash((parent, *ids[end - BLOCK : end]))
        names.append(parent)
    return names


@dataclass
class Stub:
    """One engine, and what was asked of it."""

    kind: Kind
    faults: deque[Fault] = field(default_factory=deque)
    """What the next requests for tokens meet; when there is none, nothing goes wrong."""
    tells_cached: bool = True
    respects_salt: bool = True
    tokenizes: bool = True
    spoils_reuse: bool = False
    """Whether what was reused changes what is generated."""
    reuses_always: bool = False
    """Whether a slot is reused where that was not asked for."""
    rounds: float = 0.0
    """How far log probabilities are off at most, by how long the pass was that computed the last token."""
    ties: bool = False
    """Whether alternatives are nearly as likely, and one comes first after a pass of one token."""
    says: deque[str] = field(default_factory=deque)
    """What the next requests generate, each to its end; when there is none, the hash says it."""
    says_halves: bool = False
    """Whether it generates tokens that no text gives again."""
    slots: int = 2
    context: int = 2048
    version: str = "0.32.0"
    asked: list[Mapping[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)
    """Whether a request was ended by the client."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Whether it serves no more, which ends its silence."""
    computed: int = 0
    """Tokens of prompts that were not reused, ever."""
    known: dict[str, set[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: dict[int, list[int]] = field(default_factory=dict)

    refusal: Any = field(default_factory=lambda: {"error": "refused"})
    key: str | None = None
    """What it asks for; None: nothing."""
    is_loading: bool = False
    """Whether it answers no question yet."""
    redirects_to: str | None = None
    """Where all questions without a body are sent on to."""

    def start(self, port: int = 0, *, tls: ssl.SSLContext | None = None) -> str:
        """Begin to serve, and return the address."""
        stub = self
        self.stopped.clear()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                """Say nothing."""

            def do_GET(self) -> None:
                if stub.has_key(self):
                    stub.get(self)

            def do_POST(self) -> None:
                if stub.has_key(self):
                    stub.post(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(
            target=self._server.serve_forever, args=[0.01], daemon=True
        ).start()  # half a second between two looks for its end would be the default
        scheme = "http" if tls is None else "https"
        return f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """End."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def has_key(self, to: BaseHTTPRequestHandler) -> bool:
        """Return whether a request has the key that is asked for; where not, it is refused."""
        if self.key is None or to.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        to.rfile.read(int(to.headers.get("Content-Length", 0)))
        _answer(to, {"error": {"message": "Invalid API Key", "code": 401}}, status=401)
        return False

    def get(self, to: BaseHTTPRequestHandler) -> None:
        if self.redirects_to is not None:
            to.send_response(307)
            to.send_header("Location", self.redirects_to + to.path)
            to.send_header("Content-Length", "0")
            to.end_headers()
            return
        if self.is_loading:
            _answer(to, {"error": {"message": "Loading model", "code": 503}}, status=503)
            return
        answers: dict[str, Any] = {
            "/version": {"version": self.version},
            "/v1/models": {"data": [{"id": "stub", "max_model_len": self.context}]},
        }
        if self.kind == "llama":
            context = {"n_ctx": self.context}
            answers = {
                "/props": {
                    "total_slots": self.slots,
                    "default_generation_settings": context,
                    "build_info": "b1",
                }
            }
        _answer(to, answers.get(to.path))

    def post(self, to: BaseHTTPRequestHandler) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        if to.path == "/tokenize":
            text = body.get("prompt", body.get("content"))
            _answer(to, {"tokens": _TOKENIZER.encode(text)} if self.tokenizes else {"tokens": [1]})
            return
        self.asked.append(body)
        self.headers.append(dict(to.headers))
        fault = self.faults.popleft() if self.faults else None
        if fault == "refuse":
            _answer(to, {"error": "out of order"}, status=500)
            return
        if fault in ("bad request", "gone"):
            _answer(to, self.refusal, status=400 if fault == "bad request" else 404)
            return
        if fault == "cut":
            to.close_connection = True
            return
        if fault == "silent":
            self.stopped.wait(SILENCE_S)
            to.close_connection = True
            return
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.send_header("Transfer-Encoding", "chunked")
        to.end_headers()
        given = 0
        events = self._chat if to.path == "/v1/chat/completions" else self._events
        try:
            told: Iterator[Mapping[str, Any]] = events(body)
            if fault == "buffered":  # as a proxy does that waits for the end
                told = iter(list(told))
            for event in told:
                if fault and given == 3 and fault.endswith("after 3"):
                    if fault == "error after 3":
                        _send(to, {"error": {"message": "out of memory"}})
                    elif fault == "silent after 3":
                        self.stopped.wait(SILENCE_S)
                    to.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(0.2)
                _send(to, event)
                given += 1
            _write(to, b"data: [DONE]\n\n")
            _write(to, b"")
        except (BrokenPipeError, ConnectionResetError):
            self.aborted.set()
            to.close_connection = True

    def _events(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        return self._vllm(body) if self.kind == "vllm" else self._llama(body)

    def _chat(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Answer messages as `_vllm` answers their ids; what is said comes in one piece."""
        asked = {"cache_salt": "", "prompt": _TOKENIZER.encode(rendered(body["messages"]))}
        ids: list[int] = []
        for event in self._vllm({**body, **asked}):
            if event["choices"]:
                ids += event["choices"][0]["token_ids"]
            else:
                text = _TOKENIZER.decode(ids)
                yield {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
                yield event

    def _vllm(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        prompt = list(body["prompt"])
        salt = body["cache_salt"] if self.respects_salt else ""
        cached = 0
        with self.lock:
            known = self.known.setdefault(salt, set())
            names = block_names(prompt)
            for name in names[: (len(prompt) - 1) // BLOCK]:  # never all of it
                if name not in known:
                    break
                cached += BLOCK
            known.update(names)  # as vLLM does when it schedules a prompt
            self.computed += len(prompt) - cached
        bias = {int(token): value for token, value in (body.get("logit_bias") or {}).items()}
        seed = body["seed"] if body["temperature"] else None
        if self.spoils_reuse and cached:
            seed = cached
        ids = list(prompt)
        said_ids = [*_TOKENIZER.encode(self.says.popleft()), _END] if self.says else []
        for number in range(1, body["max_tokens"] + 1):
            made = next_token(ids, bias, seed, halves=self.says_halves)
            token = said_ids.pop(0) if said_ids else made
            if bias.get(token, 0.0) <= _BANNED:
                token = made
            ids.append(token)
            ends = token == _END and not body["ignore_eos"]
            said = _TOKENIZER.decode(ids[len(prompt) :])
            stops = any(one in said for one in body.get("stop") or ())
            is_last = ends or stops or number == body["max_tokens"]
            choice: dict[str, Any] = {"token_ids": [token], "finish_reason": None}
            if is_last:
                choice["finish_reason"] = "stop" if ends or stops else "length"
            if "logprobs" in body:
                tops = {f"token_id:{token + n}": -0.5 - n for n in range(body["logprobs"])}
                choice["logprobs"] = {
                    "tokens": [f"token_id:{token}"],
                    "token_logprobs": [-0.5],
                    "top_logprobs": [tops or None],
                }
            if len(ids) % BLOCK == 1:  # the last token has no KV before something follows it
                with self.lock:
                    known.update(block_names(ids))
            yield {"choices": [choice]}
            if is_last:
                break
        usage: dict[str, Any] = {"prompt_tokens": len(prompt)}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        yield {"choices": [], "usage": usage}

    def _llama(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        prompt, slot = list(body["prompt"]), body["id_slot"]
        reuses = body["cache_prompt"] or self.reuses_always
        held = self.held.get(slot, []) if reuses else []
        cached = 0
        while cached < min(len(held), len(prompt) - 1) and held[cached] == prompt[cached]:
            cached += 1
        bias = {int(token): value for token, value in body.get("logit_bias") or ()}
        seed = body["seed"] if body["temperature"] else None
        if self.spoils_reuse and cached:
            seed = cached
        ids, number = list(prompt), 0
        timings = {"cache_n": cached, "prompt_n": len(prompt) - cached}
        how = "limit"
        said_ids = [*_TOKENIZER.encode(self.says.popleft()), _END] if self.says else []
        for number in range(1, body["n_predict"] + 1):
            made = next_token(ids, bias, seed)
            token = said_ids.pop(0) if said_ids else made
            if self.ties and number == 1 and cached == len(prompt) - 1:
                token = 97 + (token - 96) % 26
            if bias.get(token) is False:
                token = made
            if token == _END and body["ignore_eos"]:
                token = 97  # it is banned, as llama-server has it
            if token == _END:
                how = "eos"
                break
            ids.append(token)
            self.held[slot] = ids[:-1]
            event: dict[str, Any] = {"tokens": [token], "stop": False, "tokens_predicted": number}
            if "n_probs" in body:
                rows = len(prompt) - cached if number == 1 else 1
                step = 0.1 if self.ties else 1.0
                off = self._off(ids, rows, begun=len(prompt))
                tops = [
                    {"id": token + n, "logprob": -0.5 - n * step + off}
                    for n in range(body["n_probs"])
                ]
                event["completion_probabilities"] = [
                    {"id": token, "logprob": -0.5 + off, "top_logprobs": tops}
                ]
            yield {**event, "timings": timings}
        self.held[slot] = ids[:-1] if number else ids
        yield {
            "tokens": [],
            "stop": True,
            "stop_type": how,
            "tokens_predicted": number,
            "timings": timings,
        }

    def _off(self, ids: list[int], rows: int, begun: int) -> float:
        """Return what rounding does at a place: it depends on the passes, and on nothing else."""
        said = f"{len(ids)} {rows} {begun}".encode()
        return self.rounds * blake2b(said, digest_size=1).digest()[0] / 255


def _answer(to: BaseHTTPRequestHandler, said: Any, *, status: int = 200) -> None:
    data = json.dumps(said).encode()
    to.send_response(404 if said is None else status)
    to.send_header("Content-Length", str(len(data)))
    to.end_headers()
    with suppress(OSError):
        to.wfile.write(data)


def _send(to: BaseHTTPRequestHandler, event: Mapping[str, Any]) -> None:
    _write(to, b"data: " + json.dumps(event).encode() + b"\n\n")


def _write(to: BaseHTTPRequestHandler, data: bytes) -> None:
    to.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    to.wfile.flush()


MakeStub = Callable[..., tuple[Stub, str]]


@pytest.fixture
def make_stub() -> Iterator[MakeStub]:
    """Return a function that starts a stub of a kind, and returns it and its address."""
    started: list[Stub] = []

    def make(kind: Kind = "vllm", **how: Any) -> tuple[Stub, str]:
        stub = Stub(kind, **how)
        url = stub.start()
        started.append(stub)
        return stub, url

    yield make
    for stub in started:
        stub.stop()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Model]]:
    """Return a function that loads the reference model's tokenizer, with an engine elsewhere or none."""
    loaded: list[Model] = []

    def make(engine: str | None = None) -> Model:
        kv = None if engine else 1 << 20
        loaded.append(
            recollect.load("reference", home=tmp_path, engine=engine, kv_memory=kv, kv_disk=0)
        )
        return loaded[-1]

    yield make
    for model in loaded:
        model.close()
