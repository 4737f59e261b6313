"""
Bodies of requests: from bytes to fields, and what the fields that APIs share mean to the engine.

Everything that comes in passes here once: that it is JSON, how much and how deep it is, that its
numbers are finite and its texts are whole characters. Nothing behind it needs to look again. What is
done for a body is bounded by `Limits`, and large ones are read on a thread.

A field that would change the reply and is not supported is refused; one that would not is taken and
ignored; one that nobody knows is refused, as OpenAI does. Generates nothing.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, ClassVar, Final, Literal, TypedDict, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from recollect.errors import InvalidParameterError
from recollect.server.refusals import ApiError, Place, name_of, wrong_body
from recollect.server.settings import Limits
from recollect.types import Grammar, SamplingParams, TokenLogprob

_TEXT_FIELDS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
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
_METADATA_BYTES: Final = 64 * 2**10
"""Of metadata as JSON, which is kept and shown in lists. What OpenAI allows is a tenth of that."""

_Item = TypeVar("_Item")

Items = Annotated[list[_Item], Field(fail_fast=True)]
"""A list that is looked at up to the first mistake: nobody reads a thousand, and each costs memory."""


class Body(BaseModel):
    """
    A request's body, or a part of one: a field that is not named is an error.

    The first such field is the only one that is told.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    _names: ClassVar[frozenset[str]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Note the names of the fields as clients write them."""
        cls._names = frozenset(one.alias or name for name, one in cls.model_fields.items())

    def prepare(self) -> None:
        """Work out what an endpoint will ask for, and keep it: a large body has a thread now."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            unknown = next((name for name in fields if name not in cls._names), None)
            if unknown is not None:
                raise PydanticCustomError(
                    "unknown_parameter", "There is no such field", {"name": unknown}
                )
        return fields


def _text_parts(content: Any) -> Any:
    """Return content as one text; what is no text is refused in words."""
    if not isinstance(content, list):
        return content
    return "".join(_text_of(part) for part in content)


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    name = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise ValueError(f"content of type {kind!r} cannot be read by these models, only text")
    text = part.get(name)
    if not isinstance(text, str):
        raise ValueError(f"content of type {kind!r} has no text")  # noqa: TRY004 - pydantic's
    return text


Text = Annotated[str, BeforeValidator(_text_parts)]
"""A text, or a list of parts that are texts."""

PlaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""Of a branch or a checkpoint: a part of ids and addresses, so nothing that those give a meaning."""

Ignored = Annotated[Any, Field(description="Accepted, and without effect.")]
"""A field that would not change what is generated here."""

OnlyOff = Annotated[
    Literal[False] | None, Field(description="Not supported: may be left out or false.")
]


def _small(metadata: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(metadata))
    if size > _METADATA_BYTES:
        raise ValueError(f"metadata of {size:,} bytes is too large: {_METADATA_BYTES:,} are kept")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
"""What a client notes about something, and gets back as it is."""

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
        self, *, max_tokens: int | None, temperature: float, choice: int = 0, **more: Any
    ) -> SamplingParams:
        """
        Return how one reply is sampled.

        Args:
            max_tokens: None: what the context holds.
            temperature: Where the request names none.
            choice: Which of several replies to the request; each has a seed of its own.
            more: Further fields of `SamplingParams`.

        Raises:
            InvalidParameterError: A value is out of its range.
        """
        given: dict[str, Any] = {
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            logit_bias=_biases(self.logit_bias or {}),
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            stop=_stops(self.stop),
            ignore_eos=self.ignore_eos,
            **{name: value for name, value in given.items() if value is not None},
            **more,
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = [stop]
    return tuple(text for text in stop or () if text)


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    ids: dict[int, float] = {}
    for token, bias in biases.items():
        # Python also reads underscores, signs and other scripts' digits as numbers.
        if not (token.isascii() and token.isdecimal()):
            raise InvalidParameterError(
                f"logit_bias names {token!r}, which is no token id: give ids as numbers."
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


def unsupported(param: str, why: str) -> ApiError:
    """Return what a client is told of a field that would change the reply, and cannot."""
    return ApiError(f"{param}: {why}", code="unsupported_parameter", param=param)


LogprobCount = Annotated[int, Field(ge=0, le=20)]


class Offer(TypedDict):
    """What a reply may call, as arguments of `Model.session_from`."""

    tools: Sequence[dict[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool


def tool_schema(
    name: str, description: str | None, parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a tool as the engine has it."""
    function = {"name": name, "description": description, "parameters": parameters}
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class FunctionTool(Body):
    """A tool, described as chat completions do."""

    type: Literal["function"]
    function: dict[str, Any]


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def offer(schemas: Sequence[dict[str, Any]], choice: str | None, parallel: bool | None) -> Offer:
    """Return what a request offers; what it does not say is as OpenAI has it."""
    return Offer(
        tools=schemas, tool_choice=choice or "auto", parallel_tool_calls=parallel is not False
    )


class TextFormat(Body):
    """Text as it comes."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema, with a name that nothing depends on."""

    name: Ignored = None
    description: Ignored = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Ignored = None


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """The same as the Responses API has it."""

    type: Literal["json_schema"]


Format = TextFormat | JsonObjectFormat | JsonSchemaFormat | FlatSchemaFormat
ChatFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]
ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | FlatSchemaFormat, Field(discriminator="type")
]


def grammar_of(wanted: Format | None) -> Grammar | None:
    """
    Return what a format means for the reply; None: anything goes.

    Raises:
        InvalidParameterError: The schema is none.
    """
    match wanted:
        case JsonObjectFormat():
            return Grammar.json_object()
        case JsonSchemaFormat():
            return Grammar.json_schema(wanted.json_schema.schema_ or {})
        case FlatSchemaFormat():
            return Grammar.json_schema(wanted.schema_ or {})
        case _:
            return None


def logprob_entry(token: TokenLogprob, *, with_top: bool = True) -> dict[str, Any]:
    """Return how likely a token was, as OpenAI's clients read it."""
    entry = {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.token_bytes),
    }
    if with_top:
        entry["top_logprobs"] = [logprob_entry(other, with_top=False) for other in token.top]
    return entry


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

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="recollect-body")

    async def read(self, data: bytes, kind: type[Body]) -> Body:
        """
        Return a body as a model.

        Raises:
            ApiError: It is none; the message names the place.
        """
        if len(data) <= _SMALL_BYTES and _most_values(data) <= _FEW_VALUES:
            return read_body(data, kind, self._limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, read_body, data, kind, self._limits)

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
            return await answer(_ReadRequest(request, kind))

        return handle


class _ReadRequest(Request):
    """A request whose JSON is a model already, which FastAPI then takes as it is."""

    def __init__(self, request: Request, kind: type[Body]) -> None:
        super().__init__(request.scope, request.receive)
        self._kind = kind

    async def json(self) -> Body:
        """Return the body as a model."""
        bodies = self.app.state.bodies
        assert isinstance(bodies, Bodies)
        return await bodies.read(await self.body(), self._kind)


def read_body(data: bytes, kind: type[Body], limits: Limits) -> Body:
    """
    Return a body as a model.

    Raises:
        ApiError: It is none; the message names the place.
    """
    value = read_json(data, limits)
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise wrong_body(found, value) from None  # the cause holds the whole body
    body.prepare()
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
