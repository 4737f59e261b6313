"""
What a client is told where a request is refused or fails.

One table maps recollect's errors to a status and OpenAI's JSON; Anthropic's clients get the same in
their own shape. What pydantic found wrong with a body becomes one sentence: where, what it should
be, and what it is. Values only, but for the log: an error of ours is logged where it is translated.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from recollect import errors, types
from recollect.errors import RecollectError

_log = logging.getLogger(__name__)

INVALID: Final = "invalid_request_error"
_MESSAGES_PATH: Final = "/v1/messages"
_OLLAMA_PATH: Final = "/api/"


_MOST_TOLD: Final = 1000
"""Characters of an error's message: it quotes what clients send, which may be megabytes."""


def shortened(text: str, most: int) -> str:
    """Return a text, or its beginning where it is longer than *most* characters."""
    return text if len(text) <= most else f"{text[:most]}…"


class ApiError(HTTPException):
    """
    A request is refused; the sentence is for the client.

    One of FastAPI's own, which it lets through where it turns others into a 400.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        about: str | None = None,
        anthropics: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Refuse.

        Args:
            message: For the client.
            status, kind, code, headers: Of the answer.
            param: The place in the body.
            about: Where nobody knows the body: the parameter, by its name in Python.
            anthropics: What Anthropic's clients are told before it, because they look for these words.
        """
        message = shortened(message, _MOST_TOLD)
        self.sent_headers = dict(headers or {})
        super().__init__(status, message, self.sent_headers)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.about = about
        self.anthropics = anthropics


class ClientGone(Exception):  # noqa: N818 - not an error: nobody is left to be told
    """The client went away before there was anything to answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an error of recollect's is told to a client."""

    status: int
    kind: str = INVALID
    code: str | None = None
    message: str | None = None
    """In place of the error's own, where that speaks of this machine; None: the error's own."""
    retry_after_s: int | None = None
    has_trace: bool = True
    """Whether the log shows where it came from: not where the error's own sentence says all."""
    about: str | None = None
    """Which parameter it is about, by its name in Python; None: the error knows, or nobody does."""


_MESSAGES: Final = "messages"
_ALIKE: Final = {
    name: name
    for name in (
        *("model", "messages", "tools", "tool_choice", "stop", "seed", "logit_bias", "ignore_eos"),
        *(*types.SAMPLING, "presence_penalty", "frequency_penalty", "logprobs", "max_tokens"),
    )
}
_PLACES: Final[Mapping[str, Mapping[str, str]]] = {
    "/v1/chat/completions": {
        **_ALIKE,
        "grammar": "response_format",
        "template_options": "chat_template_kwargs",
    },
    "/v1/completions": {**_ALIKE, "messages": "prompt"},
    "/v1/responses": {
        **_ALIKE,
        "grammar": "text.format",
        "template_options": "chat_template_kwargs",
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "logprobs": "top_logprobs",
    },
    "/explore": {**_ALIKE, "max_tokens": "max_output_tokens"},
    "/search": {"query": "query"},
}
"""Where the parameters of the engine are in the bodies of each API, by its path or the end of that."""
_BUSY: Final = "rate_limit_error"
_OURS: Final = "server_error"
_NO_ROOM: Final = "The server's disk is full: nothing was kept. What was kept before can be read."
_ENCRYPTED: Final = (
    "What this server keeps was encrypted while it ran: restart the server, with the passphrase."
)
_DELETED: Final = "This conversation has been deleted meanwhile: begin a new one."
"""What is not there when a request comes is refused by its id; this is of what was there then."""
_NO_ENGINE: Final = "No engine answers at the moment; what was said is kept. Ask again."
_SEE_LOG: Final = "The server could not do this; its log says why."

TABLE: Final[tuple[tuple[type[Exception], Answer], ...]] = (
    (errors.ContextFullError, Answer(400, code="context_length_exceeded", about=_MESSAGES)),
    (errors.OutOfBlocksError, Answer(503, _OURS, "out_of_memory", retry_after_s=5)),
    (errors.MemoryLimitError, Answer(400, code="memory_limit")),
    (errors.InvalidParameterError, Answer(400, code="invalid_value")),
    # Not a 500: agents would ask again, and it stays so until somebody installs it.
    (errors.MissingPackageError, Answer(400, code="not_installed")),
    (errors.TokenIdError, Answer(400, code="invalid_value", about=_MESSAGES)),
    (errors.TooShortError, Answer(400, code="too_short")),
    (errors.TemplateError, Answer(400, code="invalid_messages", about=_MESSAGES)),
    (errors.UnknownModelError, Answer(404, code="model_not_found", about="model")),
    (errors.UnknownConversationError, Answer(404, code="not_found", message=_DELETED)),
    (errors.UnknownNodeError, Answer(404, code="not_found")),
    (errors.SessionBusyError, Answer(409, code="conversation_busy")),
    (errors.NameTakenError, Answer(409, code="name_taken")),
    (errors.ConversationError, Answer(400, code="invalid_messages", about=_MESSAGES)),
    (errors.StoreBusyError, Answer(503, _OURS, "store_busy", _SEE_LOG, retry_after_s=2)),
    (
        errors.StoreEncryptedError,
        Answer(503, _OURS, "store_unavailable", _ENCRYPTED, has_trace=False),
    ),
    (errors.StoreFullError, Answer(507, _OURS, "insufficient_storage", _NO_ROOM)),
    (errors.StoreError, Answer(503, _OURS, "store_unavailable", _SEE_LOG, retry_after_s=10)),
    (
        errors.EngineUnavailableError,
        Answer(503, _OURS, "engine_unavailable", _NO_ENGINE, retry_after_s=5, has_trace=False),
    ),
    (errors.ModelError, Answer(503, _OURS, "model_unavailable", _SEE_LOG)),
    (RecollectError, Answer(500, _OURS, "internal_error", _SEE_LOG)),
)
"""The first that fits an error counts, so what is special comes before what is general."""


def api_error(error: Exception) -> ApiError:
    """Return how an error is told to a client; what is not in the table is a bug, and says nothing."""
    if isinstance(error, ApiError):
        return error
    fitting = (answer for kind, answer in TABLE if isinstance(error, kind))
    answer = next(fitting, Answer(500, _OURS, "internal_error", _SEE_LOG))
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        trace = error if answer.has_trace else None
        _log.error("%s: %s", type(error).__name__, error, exc_info=trace)
    headers = {} if answer.retry_after_s is None else {"Retry-After": str(answer.retry_after_s)}
    message, anthropics = answer.message or str(error), ""
    if isinstance(error, errors.ContextFullError):
        # The words that clients look for, to shorten their history and ask again.
        message = f"This model's maximum context length is {error.limit} tokens. {message}"
        anthropics = f"prompt is too long: {error.needed} tokens > {error.limit} maximum. "
    about = error.param if isinstance(error, errors.InvalidParameterError) else answer.about
    return ApiError(
        message,
        status=answer.status,
        kind=answer.kind,
        code=answer.code,
        about=about,
        anthropics=anthropics,
        headers=headers,
    )


def too_busy(retry_after_s: float) -> ApiError:
    """Return what a client is told when too much waits already."""
    seconds = max(1, math.ceil(retry_after_s))
    return ApiError(
        f"Too many requests wait already: ask again in {seconds} s.",
        status=429,
        kind=_BUSY,
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def stopping() -> ApiError:
    """Return what a client is told whose reply the server's end has cut short."""
    return ApiError(
        "The server is stopping, so this reply is not complete: ask again when it runs.",
        status=503,
        kind=_OURS,
        code="server_stopping",
    )


def not_found(what: str) -> ApiError:
    """Return what a client is told of an id that is nobody's, or another client's."""
    return ApiError(f"There is no {what}.", status=404, code="not_found")


def name_taken(message: str, *, param: str = "name") -> ApiError:
    """Return what a client is told that gives a name which something else has; *message* says what."""
    return ApiError(message, status=409, code="name_taken", param=param)


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Have what is refused in it name a parameter, where an id came from."""
    try:
        yield
    except ApiError as error:
        error.param = param
        raise


_ABSENT: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("embed", "embeddings", "rerank", "reranking"),
        "these models write text and make no embeddings; let the client take those from another server",
    ),
    (
        ("audio", "images", "videos", "realtime"),
        "these models read and write text alone; take another server for the rest",
    ),
    (
        ("api/pull", "api/push", "api/create", "api/copy", "api/delete", "api/blobs"),
        "models are fetched on the server's own machine, by `recollect pull NAME`; /v1/models and "
        "/api/tags list those that are there",
    ),
    (
        ("batches", "files", "uploads", "assistants", "threads", "vector_stores", "moderations"),
        "of OpenAI's and Anthropic's APIs there are chat completions, completions, responses, "
        "conversations, messages and models",
    ),
)
"""What clients look for and is not here: parts of the path, and what they are told."""
_STEMS: Final = {
    "/v1": ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/models"),
    "/api": ("/api/chat", "/api/generate", "/api/tags", "/api/show"),
}
"""What the paths of each API begin with, and the calls that are asked for most."""


def nothing_at(path: str, calls: Iterable[str]) -> str:
    """
    Return what a client is told that has called a path where there is nothing.

    Args:
        path: The path.
        calls: The paths where there is something.
    """
    bare = path.rstrip("/")
    meant = [
        one for one in calls if bare and one != "/" and (bare.endswith(one) or one.endswith(bare))
    ]
    absent = (told for parts, told in _ABSENT if any(f"/{part}/" in f"{bare}/" for part in parts))
    stem = next((one for one in _STEMS if bare.endswith(one)), None)
    if meant:
        told = (
            f"the call is {min(meant, key=len)} here, so correct the client's base URL (it ends in /v1 "
            "for OpenAI's clients, and has no path for Anthropic's and Ollama's)"
        )
    elif stem is not None:
        told = f"the calls below it are {', '.join(_STEMS[stem])} and others"
    else:
        usual = (one for calls_below in _STEMS.values() for one in calls_below[:3])
        told = next(absent, f"the usual calls are {', '.join(usual)}")
    return f"There is nothing at {quoted(path)}: {told}; /openapi.json describes all calls."


def operators_only(param: str) -> ApiError:
    """Return what a client is told that asks for what an operator alone may have done."""
    return ApiError(
        f"{param!r} is for operators: leave it out, or use a key that was made by `recollect keys "
        "add NAME --operator`.",
        status=403,
        code="operator_only",
        param=param,
    )


def openai_body(error: ApiError, path: str = "") -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it, of a request to a path."""
    places = _PLACES.get(path) or _PLACES.get(path[path.rfind("/") :], {})
    there = places.get(error.about or "")
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param or there,
            "code": error.code,
        }
    }


_ANTHROPIC_KINDS: Final = {
    400: INVALID,
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: _BUSY,
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Return an error as Anthropic's clients expect it."""
    kind = _ANTHROPIC_KINDS.get(error.status, INVALID if error.status < 500 else "api_error")
    message = error.anthropics + error.message
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """Return the response to a request that is refused, in the shape of the API it was made to."""
    if path.startswith(_MESSAGES_PATH):
        body = anthropic_body(error)
    elif path.startswith(_OLLAMA_PATH):
        body = {"error": error.message}
    else:
        body = openai_body(error, path)
    return JSONResponse(body, error.status, error.sent_headers)


_MOST_QUOTED: Final = 40
"""Characters of a client's own text that are quoted to it: enough to know it again."""
_SHOULD_BE: Final = "Input should be "
_OBJECT: Final = {"model_type", "model_attributes_type", "dict_type", "union_tag_not_found"}
"""pydantic's names of an error where an object was expected; its words name our classes."""

_OF_A_FIELD: Final = {"unknown_parameter", "unsupported_parameter"}
"""Errors about a field's name, which their context has."""

Place = tuple[str | int, ...]
"""Names and numbers that lead to a value of a body."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """
    Return the known name that was likely meant by *name*; None where no name is that close.

    A name is close within two edits; one of three or four letters within one edit, because two edits
    make any short word of any other.
    """
    close = {one: _edits(name, one) for one in known if abs(len(one) - len(name)) <= _MOST_EDITS}
    close = {
        one: edits for one, edits in close.items() if edits <= min(_MOST_EDITS, (len(one) - 1) // 2)
    }
    return min(close, key=lambda one: (close[one], one), default=None)


_MOST_EDITS: Final = 2


def _edits(name: str, other: str) -> int:
    """
    Return how many letters have to be put in, taken out, changed or swapped with the next.

    Source: the optimal string alignment distance of Damerau, Communications of the ACM 7(3), 1964.
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for place, letter in enumerate(name, 1):
        before, above, row = row, before, [place]
        for at, wanted in enumerate(other, 1):
            edits = min(before[at] + 1, row[at - 1] + 1, before[at - 1] + (letter != wanted))
            if place > 1 and at > 1 and letter == other[at - 2] and name[place - 2] == wanted:
                edits = min(edits, above[at - 2] + 1)
            row.append(edits)
    return row[-1]


def wrong_request(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what a client is told of a path or a query that cannot be used, or of a missing body."""
    first = found[0]
    # The first part is where the value is: "body", "query" or "path".
    where, *place = first["loc"]
    if first["type"] == "missing" and where == "body" and not place:
        return ApiError(
            "The body is missing: send a JSON object.",
            code="missing_required_parameter",
            param="body",
        )
    return _told(tuple(place), [first], quoted(first["input"]))


def wrong_body(found: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """
    Return what a client is told of a body that cannot be used.

    Of a value that may be one of several things each of them says why it is none. Those that came
    farthest into the body know best.
    """
    places = [_place_of(error, body) for error in found]
    deepest = max(places, key=len)
    there = [error for error, at in zip(found, places, strict=True) if at == deepest]
    return _told(deepest, there, _kind(_value(body, deepest)))


def name_of(place: Place) -> str | None:
    """Return a place as clients write it, such as `messages.0.content`; None for the whole."""
    return ".".join(shortened(str(part), _MOST_QUOTED) for part in place) or None


def quoted(value: Any) -> str:
    """Return a value of a client's as it is quoted to it."""
    return shortened(repr(value) if isinstance(value, str) else str(value), _MOST_QUOTED)


def _told(place: Place, errors: Sequence[Mapping[str, Any]], is_now: str) -> ApiError:
    first = errors[0]
    if first["type"] in _OF_A_FIELD:
        return _of_a_field(name_of((*place, first["ctx"]["name"])), first)
    param = name_of(place)
    where = "" if param is None else f"{param}: "
    if first["type"] == "missing":
        return ApiError(f"{where}Field required.", code="missing_required_parameter", param=param)
    words = list(dict.fromkeys(_words(error) for error in errors))
    if all(text.startswith(_SHOULD_BE) for text in words):
        rest = " or ".join(text.removeprefix(_SHOULD_BE) for text in words)
        told = f"{_SHOULD_BE}{rest}; it is {is_now}."
    else:
        # What kind of value it should be is said by each thing that it might have been; what is
        # wrong with the value by the one that it is.
        told = f"{next(text for text in words if not text.startswith(_SHOULD_BE))}."
    return ApiError(f"{where}{told}", code="invalid_value", param=param or "body")


def _of_a_field(param: str | None, error: Mapping[str, Any]) -> ApiError:
    """Return what is told of a field that is refused whatever its value."""
    if error["type"] == "unsupported_parameter":
        told = f"{param}: {error['ctx']['why']}"
    elif meant := error["ctx"]["meant"]:
        told = (
            f"Unknown parameter: {param!r}. There is {meant!r}: correct the name, or leave it out."
        )
    else:
        told = f"Unknown parameter: {param!r}. There is none of that name here: leave it out."
    return ApiError(told, code=error["type"], param=param)


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] in _OBJECT:
        return f"{_SHOULD_BE}an object"
    text: str = error["msg"]
    return text.removeprefix("Value error, ")


def _place_of(error: Mapping[str, Any], body: Any) -> Place:
    """Return which place of a body an error is about."""
    parts, kind = error["loc"], error["type"]
    name = parts[-1] if kind == "missing" else error.get("ctx", {}).get("name")
    if kind == "missing":
        return (*(_farthest(parts[:-1], body, lambda at: _lacks(at, name)) or ()), name)
    if kind in _OF_A_FIELD:
        return _farthest(parts, body, lambda at: isinstance(at, Mapping) and name in at) or ()
    return _farthest(parts, body, lambda _: True) or ()


def _lacks(value: Any, name: str | int) -> bool:
    return isinstance(value, Mapping) and value.get(name) is None  # null is "not given"


def _farthest(parts: Sequence[str | int], body: Any, fits: Callable[[Any], bool]) -> Place | None:
    """
    Return the place that leads farthest into a body to a value that fits; None where none does.

    Among the parts that pydantic gives are names of types that were tried, which lead nowhere. Such
    a name may be one in the body too, so that several readings are possible.
    """
    if not parts:
        return () if fits(body) else None
    first, *rest = parts
    found = [_farthest(rest, body, fits)]
    is_there = (isinstance(body, Mapping) and first in body) or (
        isinstance(body, list) and isinstance(first, int) and first < len(body)
    )
    if is_there:
        behind = _farthest(rest, body[first], fits)
        found.append(None if behind is None else (first, *behind))
    return max((place for place in found if place is not None), key=len, default=None)


def _value(body: Any, place: Place) -> Any:
    for part in place:
        if isinstance(body, Mapping) and part not in body:
            return None  # it is missing
        body = body[part]
    return body


def _kind(value: Any) -> str:
    """Return what a value is, in the words of JSON; a number or a short text as itself."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float() | str():
            return quoted(value)
        case list():
            return "a list"
        case _:
            return "an object"
