"""
Tools and formats of replies, as OpenAI's clients describe them, and what they mean to the engine.

Pure: parses and translates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from recollect.server.fields import Body, Ignored
from recollect.types import Grammar, TokenLogprob

LogprobCount = Annotated[int, Field(ge=0, le=20)]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a reply may call, as `Model.session_from` takes it."""

    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)
    choice: str = "auto"
    parallel: bool = True


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


def offer(
    tools: Sequence[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None
) -> Offer:
    """Return what a request offers."""
    name = choice.function.name if isinstance(choice, NamedTool) else choice
    return Offer(
        [tool.model_dump(exclude_none=True) for tool in tools or ()],
        name or "auto",
        parallel is not False,
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
