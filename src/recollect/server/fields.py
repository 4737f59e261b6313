"""
Fields that the requests of several APIs share, and what they mean to the engine.

A field that would change the reply and is not supported is refused; one that would not is taken
and ignored; one that nobody knows is refused, as OpenAI does.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

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
from pydantic_core import PydanticCustomError

from recollect.errors import InvalidParameterError
from recollect.server.errors import ApiError
from recollect.types import SamplingParams

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


def unsupported(param: str, why: str) -> ApiError:
    """Return what a client is told of a field that would change the reply, and cannot."""
    return ApiError(f"{param}: {why}", code="unsupported_parameter", param=param)
