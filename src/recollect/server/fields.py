"""
Bodies of requests: from bytes to fields, and what the fields that APIs share mean to the engine.

Everything that comes in passes here once: that it is JSON, how much and how deep it is, that its
numbers are finite and its texts are whole characters. Nothing behind it needs to look again. What is
done for a body is bounded by `Limits`, and large ones are read on a thread.

`Body` is the one place that decides about fields. `null` means that a field was not given. One that
would change the reply and cannot be done is refused, at its place; one that changes nothing here is
ignored, and told in the header `x-recollect-ignored` and in the log; one that looks like a mistyped name
is refused, naming the one that was meant. A strict server refuses every field that it does not know.
`Instructing` leaves out what of instructions changes with every request. Generates nothing.
"""

import asyncio
import logging
import math
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from recollect.errors import InvalidParameterError
from recollect.server.refusals import (
    ApiError,
    Place,
    name_of,
    nearest,
    quoted,
    shortened,
    wrong_body,
)
from recollect.server.settings import Limits, Settings
from recollect.types import SAMPLING, Message, SamplingParams

_TEXT_FIELDS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "tool_reference": "tool_name",
}
"""Where the text is in each kind of content that is text."""
_BANNED: Final = -100
"""OpenAI: at -100 a token is banned."""


MOST_TOOLS: Final = 512
"""
In one request. Their grammar is made in a millisecond each, once, and has at most 65,536 symbols; and
all of them stand in the prompt. OpenAI takes 128.
"""
MOST_CALLS: Final = 512
"""Of tools, in one message: each of the most tools once."""
_MOST_BIASES: Final = 4096
"""Tokens with a bias: each is added for each token of the reply, a fifth of a millisecond for so many."""

_Item = TypeVar("_Item")

Items = Annotated[list[_Item], Field(fail_fast=True)]
"""A list that is looked at up to the first mistake: nobody reads a thousand, and each costs memory."""


_log = logging.getLogger(__name__)

IGNORED_HEADER: Final = "x-recollect-ignored"
"""Names what a request says and what changes nothing here, with a star for the items of lists."""
_MOST_IGNORED: Final = 20
"""Names in that header: clients send a few, and a header has to stay small."""
_MOST_UNKNOWN: Final = 500
"""Different unknown names in a body: each is compared with all known ones, in a tenth of a millisecond."""
_MOST_LOGGED: Final = 1000
"""Ignored fields that are logged, each once: clients send the same ones with every request."""

_Ignored: Final = "ignored"
"""Marks fields that change nothing; in their metadata."""


@dataclass(slots=True)
class _Reading:
    """What is decided about the names in one body."""

    is_strict: bool = False
    meant: dict[tuple[type, str], str | None] = field(default_factory=dict)
    """The known field that each unknown one comes close to."""


def _or_null(schema: dict[str, Any], _kind: type[BaseModel]) -> None:
    """Let a schema say that `null` stands for a field that is not given."""
    required = schema.get("required", ())
    for name, about in schema.get("properties", {}).items():
        if name not in required and {"type": "null"} not in about.get("anyOf", ({"type": "null"},)):
            about["anyOf"].append({"type": "null"})
        elif name not in required and ("type" in about or "$ref" in about):
            told = {key: about.pop(key) for key in ("title", "default") if key in about}
            schema["properties"][name] = {"anyOf": [about, {"type": "null"}], **told}


class Body(BaseModel):
    """
    A request's body, or a part of one; decides about every field of it.

    The first field that is refused is the only one that is told.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), json_schema_extra=_or_null)
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields that would change the reply and cannot be done, and what to do instead."""
    is_foreign: ClassVar[bool] = False
    """Whether the whole part is ignored, whatever is in it."""
    _names: ClassVar[frozenset[str]]
    _without_effect: ClassVar[frozenset[str]]
    _ignored: dict[str, None] = PrivateAttr(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Note the names of the fields as clients write them."""
        fields = cls.model_fields.items()
        cls._names = frozenset(one.alias or name for name, one in fields)
        cls._without_effect = frozenset(name for name, one in fields if _Ignored in one.metadata)

    @property
    def ignored(self) -> list[str]:
        """Return the names of what the body says and what changes nothing, the first few."""
        return list(self._ignored)[:_MOST_IGNORED]

    def left_out(self) -> Iterable[str]:
        """Return the names of what is ignored besides fields, such as tools that are no functions."""
        return ()

    def prepare(self) -> None:
        """Work out what an endpoint will ask for, and keep it: a large body has a thread now."""

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, fields: Any, info: ValidationInfo) -> Any:
        if not isinstance(fields, dict):
            return fields
        reading = info.context if isinstance(info.context, _Reading) else _Reading()
        if cls.is_foreign:
            if reading.is_strict:
                raise PydanticCustomError("unsupported", "This server cannot do that")
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given.keys() - cls._names:
            if name in cls.refused:
                if _asks_for_something(name, given[name]):
                    how = {"name": name, "why": cls.refused[name]}
                    raise PydanticCustomError("unsupported_parameter", "It cannot be done", how)
                continue
            meant = cls._meant(name, reading)
            if reading.is_strict or meant is not None:
                how = {"name": name, "meant": meant or ""}
                raise PydanticCustomError("unknown_parameter", "There is no such field", how)
        return given

    @classmethod
    def _meant(cls, name: str, reading: _Reading) -> str | None:
        if (cls, name) not in reading.meant:
            if len(reading.meant) == _MOST_UNKNOWN:
                raise PydanticCustomError(
                    "unknown_parameters",
                    "There are more than {most} fields that are not known here",
                    {"most": _MOST_UNKNOWN},
                )
            reading.meant[cls, name] = nearest(name, cls._names)
        return reading.meant[cls, name]


def _asks_for_something(name: str, value: Any) -> bool:
    return bool(value) and not (name in _ONE_IS_NOTHING and value == 1)


def _ignored_in(value: Any, place: str = "") -> Iterator[str]:
    """Yield the names of what a body has and what changes nothing."""
    if isinstance(value, list):
        # What is no object has no fields; lists of one kind of thing begin with one.
        if value and isinstance(value[0], Body):
            for item in value:
                yield from _ignored_in(item, f"{place}*.")
    elif isinstance(value, Body) and not value.is_foreign:
        for name in value.model_extra or ():
            yield f"{place}{_plain(name)}"
        for name in type(value).model_fields:
            if name not in value.model_fields_set:
                continue
            if name in value._without_effect:
                yield f"{place}{name}"
            else:
                yield from _ignored_in(getattr(value, name), f"{place}{name}.")
        yield from (f"{place}{_plain(name)}" for name in value.left_out())


def _plain(name: str) -> str:
    """Return a client's text as it may stand in a header and a log."""
    return re.sub(r"[^!-+\--~]", "?", shortened(name, 40).replace("…", "..."))


def _text_parts(content: Any) -> Any:
    """Return content as one text; what is no text is refused in words."""
    if not isinstance(content, list):
        return content
    return "".join(_text_of(number, part) for number, part in enumerate(content))


def _text_of(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    name = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise ValueError(
            f"part {number + 1} is content of type {quoted(kind)}, which these models cannot read, "
            "only text"
        )
    text = part.get(name)
    if not isinstance(text, str):
        raise ValueError(f"part {number + 1} is content of type {quoted(kind)} and has no text")  # noqa: TRY004 - pydantic's
    return text


Text = Annotated[str, BeforeValidator(_text_parts)]
"""A text, or a list of parts that are texts."""

PlaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""Of a branch or a checkpoint: a part of ids and addresses, so nothing that those give a meaning."""

Ignored = Annotated[Any, Field(description="Accepted, and without effect."), _Ignored]
"""A field that would not change what is generated here; where a request has it, that is told."""

Echoed = Annotated[Any, Field(description="Accepted as it was given out, and not needed.")]
"""A field that clients send back as they got it: nothing is asked by it, and nothing told of it."""

_Bias = Annotated[float, Field(ge=-100, le=100)]
_BIAS: Final = TypeAdapter[float](_Bias)


def _checked_biases(biases: Any) -> Any:
    """Look at biases up to the first mistake, as `Items` does with lists."""
    if not isinstance(biases, dict):
        return biases
    if len(biases) > _MOST_BIASES:
        raise ValueError(f"{len(biases):,} biases are too many: {_MOST_BIASES:,} are taken")
    for token, bias in biases.items():
        try:
            _BIAS.validate_python(bias)
        except ValidationError as error:
            raise ValueError(f"token {token[:12]}: {error.errors()[0]['msg']}") from None
    return biases


_OTHER_ENGINE: Final = "is another engine's, and would change the reply: leave it out."
NOT_SUPPORTED: Final = {
    **dict.fromkeys(
        ("best_of", "min_tokens", "use_beam_search", "bad_words", "typical_p", "top_a"),
        "would change the reply, and cannot be done: leave it out.",
    ),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        _OTHER_ENGINE + " response_format holds replies to a schema.",
    ),
    **dict.fromkeys(("grammar", "json_schema", "mirostat", "lora"), _OTHER_ENGINE),
}
"""Fields of other servers that would change the reply, and what to do instead."""
_ONE_IS_NOTHING: Final = {"best_of", "min_tokens", "typical_p", "tfs_z"}
"""Those of them that are sent as 1 by who does not want them; the others as zero, false or empty."""


VOLATILE: Final = "x-anthropic-billing-header:"
"""
What a block of instructions begins with that says how a request is paid for. It differs from request
to request, and what comes after it could never be reused. Programs that turn Anthropic's requests into
OpenAI's take it along.
"""


def _is_volatile(part: Any) -> bool:
    text = part.get("text") if isinstance(part, Mapping) else part
    return isinstance(text, str) and text.lstrip()[: len(VOLATILE)].lower() == VOLATILE


def lasting(content: Any) -> Any:
    """Return instructions without their volatile blocks, or a text without such a first line."""
    if isinstance(content, str):
        return content.lstrip().partition("\n")[2].lstrip() if _is_volatile(content) else content
    if isinstance(content, list):
        return [part for part in content if not _is_volatile(part)]
    return content


def volatile_in(place: str, content: Any) -> list[str]:
    """Return as what volatile instructions are told to a client that are left out; none where none are."""
    is_there = any(map(_is_volatile, content if isinstance(content, list) else [content]))
    return [f"{place}[{VOLATILE.removesuffix(':')}]"] if is_there else []


class Instructing(Body):
    """A message, which may be instructions; what of those is volatile is left out."""

    _volatile: list[str] = PrivateAttr(default_factory=list)
    _is_left_out: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _leave_out(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(fields, dict) or fields.get("role") not in ("system", "developer"):
            return handler(fields)
        content = fields.get("content")
        volatile = volatile_in("content", content)
        if not volatile:
            return handler(fields)
        rest = lasting(content)
        message = handler({**fields, "content": rest})
        message._volatile, message._is_left_out = volatile, not rest
        return message

    @property
    def is_left_out(self) -> bool:
        """Return whether nothing of the message is left."""
        return self._is_left_out

    def left_out(self) -> Iterable[str]:
        """Return what of the instructions is left out."""
        return self._volatile


class SamplingFields(Body):
    """How replies are sampled, by the names that OpenAI's APIs and the usual servers use."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, _Bias], BeforeValidator(_checked_biases)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Items[str] | None = None
    ignore_eos: bool = False

    def params(
        self, settings: Settings, *, max_tokens: int | None, choice: int = 0, **more: Any
    ) -> SamplingParams:
        """
        Return how one reply is sampled.

        Args:
            settings: Have the temperature of requests that name none, if there is one.
            max_tokens: None: what the context holds.
            choice: Which of several replies to the request; each has a seed of its own.
            more: Further fields of `SamplingParams`.

        Raises:
            InvalidParameterError: A value is out of its range.
        """
        return sampled(
            settings,
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop,
            logit_bias=_biases(self.logit_bias or {}),
            max_tokens=max_tokens,
            **{name: getattr(self, name) for name in _AS_NAMED},
            **more,
        )


_AS_NAMED: Final = (*SAMPLING, "presence_penalty", "frequency_penalty", "ignore_eos")
"""Fields of `SamplingFields` that are the engine's parameters of these names."""


def sampled(
    settings: Settings, *, seed: int | None, stop: str | list[str] | None, **given: Any
) -> SamplingParams:
    """
    Return how a reply is sampled, from what a request says of it; None: it does not say.

    Args:
        settings: Have the temperature of requests that name none, if there is one.
        seed: May be negative.
        stop: Stop strings, or one; empty ones are left out.
        given: Further fields of `SamplingParams`.

    Raises:
        InvalidParameterError: A value is out of its range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if settings.temperature is not None:
        values.setdefault("temperature", settings.temperature)
    stops = [stop] if isinstance(stop, str) else stop or ()
    return SamplingParams(
        seed=None if seed is None else seed % 2**64,
        stop=tuple(text for text in stops if text),
        **values,
    )


def named_sampling(body: Body, settings: Settings) -> frozenset[str]:
    """Return the parameters of sampling that a request, or else the server's settings, ask for."""
    named = {name for name in SAMPLING if getattr(body, name, None) is not None}
    return frozenset(named if settings.temperature is None else {*named, "temperature"})


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    ids: dict[int, float] = {}
    for token, bias in biases.items():
        # Python also reads underscores, signs and other scripts' digits as numbers.
        if not (token.isascii() and token.isdecimal()):
            raise InvalidParameterError(
                f"logit_bias names {token!r}, which is no token id: give ids as numbers.",
                param="logit_bias",
            )
        ids[int(token[:12])] = -math.inf if bias <= _BANNED else bias
    return ids


def check_count(param: str, count: int, most: int) -> None:
    """
    Check that a field asks for no more than one request may.

    Raises:
        ApiError: It does.
    """
    if count > most:
        raise ApiError(
            f"{param}: {count:,} are too many; this server takes {most:,}.",
            code="invalid_value",
            param=param,
        )


def check_last(messages: Sequence[Message], param: str) -> None:
    """
    Check that the last message is one that can be answered; instructions after it belong to it.

    Raises:
        ApiError: It is an assistant's, or there are instructions alone.
    """
    last = next((one["role"] for one in reversed(messages) if one["role"] != "system"), None)
    if last not in ("user", "tool"):
        raise ApiError(
            f"{param}: the last one, instructions apart, has to be a user's or what a tool gave back. "
            "The beginning of a reply is continued by chat completions and messages.",
            code="invalid_messages",
            param=param,
        )


def unsupported(param: str, why: str) -> ApiError:
    """Return what a client is told of a field that would change the reply, and cannot."""
    return ApiError(f"{param}: {why}", code="unsupported_parameter", param=param)


LogprobCount = Annotated[int, Field(ge=0, le=20)]


_SMALL_BYTES: Final = 64 * 2**10
_FEW_VALUES: Final = 1000
"""
A body of so many bytes and so few values is read on the event loop, in a millisecond or two; a switch of
threads and back takes a tenth of one, which each ordinary request would pay.
"""
_READERS: Final = 2
"""Threads that read bodies: one large body does not keep the others waiting."""
TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{,]', re.DOTALL)
"""A string of JSON, or a bracket or comma, before which or after which a value begins."""
_TOKENS_A_VALUE: Final = 3
"""Matches of `TOKEN` for one value at most: its comma or bracket, its name and its text."""


class Bodies:
    """Reads bodies. Safe from any thread; `close` it."""

    def __init__(self, limits: Limits, *, is_strict: bool = False) -> None:
        """
        Start no thread yet.

        Args:
            limits: How large a body may be.
            is_strict: Whether a field that is not known is refused.
        """
        self._limits = limits
        self._is_strict = is_strict
        self._logged: set[tuple[str, str]] = set()  # of the event loop
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="recollect-body")

    async def read(self, data: bytes, kind: type[Body]) -> Body:
        """
        Return a body as a model.

        Raises:
            ApiError: It is none; the message names the place.
        """
        if len(data) <= _SMALL_BYTES and _most_values(data) <= _FEW_VALUES:
            return read_body(data, kind, self._limits, is_strict=self._is_strict)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads,
            lambda: read_body(data, kind, self._limits, is_strict=self._is_strict),
        )

    def log_ignored(self, path: str, names: Iterable[str]) -> None:
        """Log what was ignored in requests to a path, each name once."""
        new = [name for name in names if (path, name) not in self._logged]
        if new and len(self._logged) + len(new) <= _MOST_LOGGED:
            self._logged.update((path, name) for name in new)
            _log.info("Ignored in requests to %s: %s", path, ", ".join(new))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class BodyRoute(APIRoute):
    """A route whose body is read by the app's `Bodies`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        kind = self.body_field.field_info.annotation
        assert isinstance(kind, type), "a body is one model"
        assert issubclass(kind, Body), "a body is one model"

        async def handle(request: Request) -> Response:
            reading = _ReadRequest(request, kind, self.path)
            response = await answer(reading)
            if reading.ignored:
                response.headers[IGNORED_HEADER] = ", ".join(reading.ignored)
            return response

        return handle


class _ReadRequest(Request):
    """A request whose JSON is a model already, which FastAPI then takes as it is."""

    def __init__(self, request: Request, kind: type[Body], path: str) -> None:
        super().__init__(request.scope, request.receive)
        self._kind = kind
        self._path = path
        self.ignored: list[str] = []

    async def json(self) -> Body:
        """Return the body as a model."""
        bodies = self.app.state.bodies
        assert isinstance(bodies, Bodies)
        body = await bodies.read(await self.body(), self._kind)
        self.ignored = body.ignored
        bodies.log_ignored(self._path, self.ignored)
        return body


def read_body(data: bytes, kind: type[Body], limits: Limits, *, is_strict: bool = False) -> Body:
    """
    Return a body as a model.

    Raises:
        ApiError: It is none; the message names the place.
    """
    value = read_json(data, limits)
    try:
        body = kind.model_validate(value, context=_Reading(is_strict))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise wrong_body(found, value) from None  # the cause holds the whole body
    body.prepare()
    body._ignored.update(dict.fromkeys(_ignored_in(body)))
    return body


def read_json(data: bytes, limits: Limits) -> Any:
    """
    Return a JSON value that can be written again: whole characters, finite numbers.

    Raises:
        ApiError: It is no JSON, or larger or deeper than `limits` allow.
    """
    if _has_more_values(data, limits.values):
        raise _refused(
            f"The body has more than {limits.values:,} values: send less in one request."
        )
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as cause:
        why = str(cause)
        if "hex escape" in why:
            why += r"; half a character, such as \ud800 without its other half, is none"
        raise _refused(f"The body is not JSON: {why}.") from None
    _check(value, limits.depth)
    return value


def _most_values(data: bytes) -> int:
    """Return how many values there are at most: what is in texts is counted too."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _has_more_values(data: bytes, most: int) -> bool:
    """Return whether there are more values than this; reads no farther than that shows."""
    if _most_values(data) < most:
        return False  # nearly always: only long texts have so many commas
    values = 0
    for seen, token in enumerate(TOKEN.finditer(data)):
        values += data[token.start()] != ord('"')
        if values >= most or seen > _TOKENS_A_VALUE * most:
            return True
    return False


def _check(value: Any, most_deep: int) -> None:
    """Check each number, and how deep lists and objects are."""
    pending: list[tuple[Any, Place]] = [(value, ())]
    while pending:
        item, place = pending.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise _refused("The number is larger than JSON's readers can hold.", place)
        if not isinstance(item, dict | list):
            continue
        if len(place) >= most_deep:
            raise _refused(
                f"Lists and objects are more than {most_deep} deep in each other: make it flatter.",
                place[:3],
            )
        inside = item.items() if isinstance(item, dict) else enumerate(item)
        pending += [
            (part, (*place, name)) for name, part in inside if isinstance(part, dict | list | float)
        ]


def _refused(why: str, place: Place = ()) -> ApiError:
    param = name_of(place)
    where = "" if param is None else f"{param}: "
    return ApiError(f"{where}{why}", code="invalid_json", param=param or "body")
