"""
One request to an engine elsewhere: what is ordered, what is told, and the HTTP between.

`Api` is what each kind of engine has to be able to do; `vllm` and `llama_server` write and read the fields
of theirs. `events` posts a request and yields what is streamed back. It uses `http.client`, because closing
its socket from another thread is what ends a request that waits for an engine: a cancelled reply stops the
engine within a moment, also while it reads a long prompt.
"""

import json
import os
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
)
from socket import SHUT_RDWR
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, urlsplit

from recollect.engine.decoder import Likelihood
from recollect.errors import ConfigError, EngineUnavailableError
from recollect.types import FinishReason, Grammar, SamplingParams

KEY_VARIABLE: Final = "RECOLLECT_ENGINE_KEY"
"""The environment variable with the key that the engines ask for."""

FIRST_S: Final = 600.0
"""How long an engine may be silent before the first token: it may read a long prompt, or have others wait."""
NEXT_S: Final = 60.0
"""The same between two tokens."""
CONNECT_S: Final = 5.0
_ANSWER_S: Final = 30.0
_PIECE_BYTES: Final = 1 << 16
_MOST_LINE_BYTES: Final = 4 << 20
"""Of one event: 20 alternatives for each of the tokens that came since the last are a few kilobytes."""
_MOST_QUOTED: Final = 300
"""Characters of what an engine answers, in an error."""


class RefusedError(EngineUnavailableError):
    """An engine refuses a request, and would again: it may be another one than was tried out."""


class Lost(Exception):  # noqa: N818 - always caught, and told as `EngineUnavailableError`
    """An engine did not answer, or broke off; another may do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an engine is to do, in one request."""

    token_ids: list[int]
    """The whole history, shape `(n,)`, n >= 1."""
    params: SamplingParams
    seed: int
    most_tokens: int
    """Tokens to generate, >= 1; 0: only have the KV of the history computed."""
    namespace: str | None
    """Within which KV is reused; None: nothing is, and nothing is left behind that another could reuse."""
    session: str
    """Equal for the branches of a conversation."""
    grammar: Grammar | None = None
    """What is generated has to match it, from the first token on."""
    allowed: tuple[int, ...] | None = None
    """What is generated is among these; None: any token may be."""
    banned: tuple[int, ...] = ()
    """What is generated is none of these, whatever its bias."""
    is_idle: bool = False
    """Whether it may wait until the engine has nothing else to do."""


@dataclass(slots=True)
class Told:
    """What an engine said of a request beside its tokens; filled while it streams."""

    prompt_tokens: int | None = None
    reused_tokens: int | None = None
    """Of the prompt, not computed; None: it has not said so, or not yet."""
    finish: FinishReason | None = None
    """None: it was cut off."""


Token = tuple[int, Likelihood | None]
"""An id, and how likely it was where the order asks for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a probe has found out about an engine."""

    version: str
    context_length: int
    """Most tokens of a prompt with its reply."""
    unit: int
    """Tokens that can only be reused together; 1: any number."""


class Link:
    """A connection, which another thread may cut."""

    def __init__(self, url: str) -> None:
        at = checked_url(url)
        port = at.port
        assert at.hostname is not None, "it was checked"
        self._connection: HTTPConnection
        if at.scheme == "https":
            context = ssl.create_default_context()
            self._connection = HTTPSConnection(
                at.hostname, port, timeout=CONNECT_S, context=context
            )
        else:
            self._connection = HTTPConnection(at.hostname, port, timeout=CONNECT_S)
        self._path = at.path.rstrip("/")
        self.was_cut = False

    def send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], wait_s: float
    ) -> HTTPResponse:
        """Send a request, and return the response when its head has come."""
        self._connection.connect()
        if self.was_cut:
            raise OSError("the request was cut off")
        self.wait_at_most(wait_s)
        key = os.environ.get(KEY_VARIABLE)
        sent = {"Content-Type": "application/json", **headers}
        if key:
            sent["Authorization"] = f"Bearer {key}"
        self._connection.request(method, self._path + path, body, sent)
        return self._connection.getresponse()

    def wait_at_most(self, seconds: float) -> None:
        """Let reads fail after so long without a byte."""
        if self._connection.sock is not None:
            self._connection.sock.settimeout(seconds)

    def cut(self) -> None:
        """End it, from any thread: a read that waits returns."""
        self.was_cut = True
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self._connection.close()


class Api(Protocol):
    """A kind of engine, at one address."""

    @property
    def url(self) -> str:
        """Return where it is."""

    def probe(self, token_ids: list[int]) -> EngineFacts:
        """
        Find out whether it can be used.

        Args:
            token_ids: Some that its model knows, 512 of them.

        Raises:
            ConfigError: It cannot; the message says what to change.
            EngineUnavailableError: It does not answer.
        """

    def require(self, params: SamplingParams) -> None:
        """Check that parameters can be followed; raises as `Decoder.require`."""

    def stream(self, order: Order, told: Told, link: Link) -> Generator[Token, None, None]:
        """
        Have an order carried out, and yield what is generated, an end token at the end among it.

        When the last tokens are yielded, all of *told* is known.

        Raises:
            Lost: It does not answer, broke off, or said nothing for too long.
            RefusedError: It does not take the order.
        """


def checked_url(url: str) -> SplitResult:
    """
    Return an address taken apart.

    Raises:
        ConfigError: It is none of an HTTP server.
    """
    at = urlsplit(url)
    try:
        is_sound = at.scheme in ("http", "https") and bool(at.hostname) and (at.port or 1) > 0
    except ValueError:  # a port that is no number
        is_sound = False
    if not is_sound or at.query or at.fragment or at.username:
        raise ConfigError(
            f"{url!r} is no address of an engine: give one such as http://127.0.0.1:8000; a key goes into "
            f"{KEY_VARIABLE}."
        )
    return at


def events(
    link: Link, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Iterator[Mapping[str, Any]]:
    """
    Post a request and yield the events that are streamed back, until `[DONE]` or the end.

    Raises:
        Lost: As `Api.stream`.
        RefusedError: As there.
    """
    with _failures_as_lost(link):
        response = _posted(link, path, body, headers or {})
        for line in _lines(response):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = _object(data)
            link.wait_at_most(NEXT_S)
            yield event


def whole(link: Link, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Post a request that is not streamed, and return its answer; raises as `events`."""
    with _failures_as_lost(link):
        return _object(_posted(link, path, body, {}).read(_MOST_LINE_BYTES))


@contextmanager
def _failures_as_lost(link: Link) -> Iterator[None]:
    try:
        yield
    except TimeoutError as cause:
        raise Lost("it said nothing for too long") from cause
    except IncompleteRead as cause:
        raise Lost("it broke off") from cause
    except (OSError, HTTPException, ValueError) as cause:
        raise Lost(f"the connection failed ({_why(cause)})") from cause
    finally:
        link.close()


def _posted(
    link: Link, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> HTTPResponse:
    response = link.send("POST", path, json.dumps(body).encode(), headers, FIRST_S)
    if response.status != 200:
        said = response.read(_PIECE_BYTES).decode("utf-8", "replace")
        raise _refusal(response.status, said)
    return response


def _object(data: bytes) -> Mapping[str, Any]:
    said = json.loads(data)
    if not isinstance(said, dict):
        raise Lost("it sent something that is no JSON object")
    if (error := said.get("error")) is not None:
        raise Lost(f"it broke off: {_reason_in(error)}")
    return said


def get_json(url: str, path: str) -> Any:
    """
    Return what an engine answers to a question without a body; None: it does not know the path.

    Raises:
        ConfigError: It asks for a key.
        EngineUnavailableError: It does not answer.
    """
    return _answer(url, "GET", path, None)


def post_json(url: str, path: str, body: Mapping[str, Any]) -> Any:
    """Do the same with a body."""
    return _answer(url, "POST", path, json.dumps(body).encode())


def _answer(url: str, method: str, path: str, body: bytes | None) -> Any:
    link = Link(url)
    try:
        response = link.send(method, path, body, {}, _ANSWER_S)
        text = response.read(_MOST_LINE_BYTES)
    except (OSError, HTTPException) as cause:
        raise unavailable(url, _why(cause)) from cause
    finally:
        link.close()
    if 300 <= response.status < 400:
        to = _quoted(response.headers.get("Location") or "another address")
        raise ConfigError(
            f"{url} sends requests on to {to}: give the address of the engine itself."
        )
    if response.status in (401, 403):
        if os.environ.get(KEY_VARIABLE):
            raise ConfigError(
                f"{url} does not take the key in {KEY_VARIABLE}: set it to the engine's."
            )
        raise ConfigError(f"{url} asks for a key: set {KEY_VARIABLE} to it.")
    if response.status >= 500:
        raise EngineUnavailableError(
            f"The engine at {url} is not ready (it answered {response.status}): wait until it has loaded its "
            "model, or see its log."
        )
    try:
        return json.loads(text) if response.status == 200 else None
    except ValueError:
        return None


def unavailable(url: str, reason: str) -> EngineUnavailableError:
    """Return the error for an engine that does not answer."""
    return EngineUnavailableError(
        f"No engine answers at {url} ({reason}): start it, or see whether the address is right."
    )


def read_all(api: Api, order: Order) -> tuple[list[Token], Told]:
    """
    Carry an order out to its end. For probes.

    Raises:
        EngineUnavailableError: The engine broke off.
    """
    told = Told()
    try:
        return list(api.stream(order, told, Link(api.url))), told
    except Lost as lost:
        raise unavailable(api.url, str(lost)) from lost


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    rest = b""
    while piece := response.read1(_PIECE_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MOST_LINE_BYTES:
            raise Lost("it sent an event that is too long")
        yield from lines


def _refusal(status: int, said: str) -> Exception:
    with suppress(ValueError):
        said = _reason_in(json.loads(said))
    reason = _quoted(said).rstrip(".")
    if status >= 500 or status in (408, 429):
        return Lost(f"it answered {status}: {reason}")
    return RefusedError(f"The engine refused the request with {status}: {reason}.")


def _reason_in(said: object) -> str:
    """Return the words in a JSON value that tells of an error, without the names of classes beside them."""
    for name in ("error", "message", "detail"):
        if isinstance(said, Mapping) and said.get(name):
            said = said[name]
    return _quoted(str(said)).rstrip(".")


def _why(cause: Exception) -> str:
    """Return what a failed connection says of itself, without the system's number for it."""
    said = cause.strerror if isinstance(cause, OSError) else None
    return _quoted(said or str(cause) or type(cause).__name__)


def _quoted(text: str) -> str:
    return " ".join(text.split())[:_MOST_QUOTED]
