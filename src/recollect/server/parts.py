"""
Parts of requests in the words of each API: tools, thinking, items, metadata, and the form of a reply.

Each becomes what the engine takes: descriptions of tools as OpenAI has them, a choice among them, options
of chat templates, messages, a grammar. Tools that are no functions are taken and not offered. Values only.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypedDict

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from recollect.conversation.tools import Chosen
from recollect.server.fields import MOST_TOOLS, Body, Echoed, Ignored, Instructing, Items, Text
from recollect.server.refusals import quoted
from recollect.types import Grammar, Message, MessageToolCall, Role, TokenLogprob, ToolCall

_THOUGHTS: Final = {
    "thinking": "thinking",
    "redacted_thinking": "",
    "reasoning": "text",
    "reasoning_text": "text",
    "summary_text": "text",
}
"""Where the text is in each kind of content that is a thought; nobody else can read an encrypted one."""


def split_thoughts(content: Any) -> tuple[Any, str]:
    """Return the parts of a content that are no thoughts, and the thoughts as one text."""
    if not isinstance(content, list):
        return content, ""
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    said = [part for part, kind in zip(content, kinds, strict=True) if kind not in _THOUGHTS]
    thoughts = [
        part.get(_THOUGHTS[kind])
        for part, kind in zip(content, kinds, strict=True)
        if kind in _THOUGHTS
    ]
    return said, "\n".join(text for text in thoughts if isinstance(text, str))


def kind_among(*known: str, usual: str | None = None) -> Callable[[Any], str | None]:
    """
    Return what tells of which kind a part of a body is, by its `type`.

    Args:
        known: The kinds that have a model of their own; all others are `other`.
        usual: The kind of what does not say it.
    """

    def kind(value: Any) -> str | None:
        if isinstance(value, dict):
            given = value.get("type") or usual
        elif isinstance(value, Body):
            given = getattr(value, "type", None) or usual
        else:
            return None
        return given if isinstance(given, str) and given in known else "other"

    return kind


def logprob_entry(token: TokenLogprob, *, with_top: bool = True) -> dict[str, Any]:
    """Return how likely a token was, as OpenAI's clients read it."""
    entry = {"token": token.text, "logprob": token.logprob, "bytes": list(token.token_bytes)}
    if with_top:
        entry["top_logprobs"] = [logprob_entry(other, with_top=False) for other in token.top]
    return entry


_METADATA_BYTES: Final = 64 * 2**10
"""Of metadata as JSON, which is kept and shown in lists. What OpenAI allows is a tenth of that."""


def _small(metadata: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(metadata))
    if size > _METADATA_BYTES:
        raise ValueError(f"metadata of {size:,} bytes is too large: {_METADATA_BYTES:,} are kept")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
"""What a client notes about something, and gets back as it is."""


class Thinking(Body):
    """Whether the model thinks before it answers, and how much; for templates that can be told."""

    type: str | None = None
    enabled: bool | None = None
    effort: str | None = None
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def budget(self) -> int | None:
        """Return how many tokens it may take; None: as many as the model wants."""
        return self.max_tokens if self.budget_tokens is None else self.budget_tokens

    def options(self) -> dict[str, Any]:
        """Return it as options of chat templates, by the names that these use."""
        found: dict[str, Any] = {}
        is_on = self.type != "disabled" if self.type is not None else self.enabled
        effort = self.effort
        if effort == "none":
            is_on, effort = False, None
        if is_on is not None:
            found |= {"enable_thinking": is_on, "thinking": is_on}
        if effort is not None:
            found["reasoning_effort"] = _EFFORTS.get(effort, effort)
        return found


_EFFORTS: Final = {"minimal": "low", "xhigh": "high", "max": "high"}
"""What APIs have beside the three efforts that models were trained with. Source: gpt-oss's template."""


class Offer(TypedDict):
    """What a reply may call, and what the template is told, as arguments of `Model.session_from`."""

    tools: Sequence[dict[str, Any]]
    tool_choice: str | Chosen
    parallel_tool_calls: bool
    template_options: Mapping[str, Any]


def tool_schema(
    name: str, description: str | None, parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a tool as the engine has it."""
    function = {"name": name, "description": description, "parameters": parameters}
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


class OtherTool(Body):
    """A tool that is no function: this server has none, so it is not offered to the model."""

    is_foreign: ClassVar[bool] = True

    type: str


def others_among(tools: Sequence[Body] | None) -> Iterator[str]:
    """Yield the names of the tools that are left out, as they are told to a client."""
    return (f"tools[{tool.type}]" for tool in tools or () if isinstance(tool, OtherTool))


def _refuse_choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    raise ValueError(f"a tool of type {quoted(kind)} cannot be called here, only functions")


OtherChoice = Annotated[Any, BeforeValidator(_refuse_choice)]
"""A tool that has to be called and is no function; it is refused."""


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction

    def chosen(self) -> Chosen:
        """Return what may be called."""
        return Chosen((self.function.name,))


class _AllowedFunctions(Body):
    mode: Literal["auto", "required"]
    tools: Items[NamedTool]


class AllowedTools(Body):
    """Tools of which alone the reply may call some."""

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedFunctions

    def chosen(self) -> Chosen:
        """Return what may be called."""
        allowed = self.allowed_tools
        return some_of([tool.function.name for tool in allowed.tools], allowed.mode)


def some_of(names: Iterable[str], mode: str) -> Chosen:
    """Return the choice among several tools."""
    return Chosen(tuple(names), is_required=mode == "required", is_single=False)


class FunctionTool(Body):
    """A tool, described as chat completions do."""

    type: Literal["function"]
    function: dict[str, Any]

    def schema_of(self) -> dict[str, Any]:
        """Return it as the engine has it."""
        return {"type": "function", "function": self.function}


ChatTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
    Discriminator(kind_among("function", usual="function")),
]
ToolMode = Literal["none", "auto", "required"]
ChatChoice = (
    ToolMode
    | Annotated[
        Annotated[NamedTool, Tag("function")]
        | Annotated[AllowedTools, Tag("allowed_tools")]
        | Annotated[OtherChoice, Tag("other")],
        Discriminator(kind_among("function", "allowed_tools")),
    ]
)


def offer(
    schemas: Sequence[dict[str, Any]],
    choice: str | Chosen | None,
    parallel: bool | None,
    options: Mapping[str, Any],
) -> Offer:
    """Return what a request offers; what it does not say is as OpenAI has it."""
    return Offer(
        tools=schemas,
        tool_choice=choice or "auto",
        parallel_tool_calls=parallel is not False,
        template_options=options,
    )


# --- tools of the Responses API


class FlatTool(Body):
    """A tool, described as the Responses API does."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Echoed = None

    def schemas_of(self) -> list[dict[str, Any]]:
        """Return it as the engine has it."""
        return [tool_schema(self.name, self.description, self.parameters)]


class NamespaceTool(Body):
    """Several tools, whose names begin with that of their namespace for the model."""

    type: Literal["namespace"]
    name: str
    description: Echoed = None
    tools: Annotated[
        Items[
            Annotated[
                Annotated[FlatTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
                Discriminator(kind_among("function")),
            ]
        ],
        Field(max_length=MOST_TOOLS),
    ]

    def schemas_of(self) -> list[dict[str, Any]]:
        """Return them as the engine has them."""
        return [
            tool_schema(flat_name(self.name, tool.name), tool.description, tool.parameters)
            for tool in self.tools
            if isinstance(tool, FlatTool)
        ]

    def left_out(self) -> Iterable[str]:
        """Return the tools that are no functions."""
        return others_among(self.tools)


def flat_name(namespace: str | None, name: str) -> str:
    """Return the one name that a model calls a tool of a namespace by."""
    if namespace is None:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


AnyTool = Annotated[
    Annotated[FlatTool, Tag("function")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(kind_among("function", "namespace")),
]


_TOOLS: Final[TypeAdapter[list[AnyTool]]] = TypeAdapter(list[AnyTool])


def kept_schemas(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the tools of a kept response as the engine has them."""
    return schemas_of(_TOOLS.validate_python(tools))


def schemas_of(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the functions among tools as the engine has them."""
    functions = [tool for tool in tools if not isinstance(tool, OtherTool)]
    return [schema for tool in functions for schema in tool.schemas_of()]


class FlatChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    name: str
    namespace: str | None = None

    def chosen(self) -> Chosen:
        """Return what may be called."""
        return Chosen((flat_name(self.namespace, self.name),))


class FlatAllowed(Body):
    """Tools of which alone the reply may call some."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FlatChoice]

    def chosen(self) -> Chosen:
        """Return what may be called."""
        return some_of([flat_name(tool.namespace, tool.name) for tool in self.tools], self.mode)


AnyChoice = (
    ToolMode
    | Annotated[
        Annotated[FlatChoice, Tag("function")]
        | Annotated[FlatAllowed, Tag("allowed_tools")]
        | Annotated[OtherChoice, Tag("other")],
        Discriminator(kind_among("function", "allowed_tools")),
    ]
)


class MessagesTool(Body):
    """A tool, described as Anthropic's clients do."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    cache_control: Ignored = None
    strict: Echoed = None
    eager_input_streaming: Ignored = None

    def schema_of(self) -> dict[str, Any]:
        """Return it as the engine has it."""
        return tool_schema(self.name, self.description, self.input_schema)


AnyMessagesTool = Annotated[
    Annotated[MessagesTool, Tag("custom")] | Annotated[OtherTool, Tag("other")],
    Discriminator(kind_among("custom", usual="custom")),
]


class MessagesChoice(Body):
    """Whether a tool has to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check(self) -> "MessagesChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("A tool is called by its name: give one")
        return self

    def chosen(self) -> str | Chosen:
        """Return what may be called."""
        if self.type == "tool":
            return Chosen((self.name or "",))
        return "required" if self.type == "any" else self.type


class InputMessage(Instructing):
    """A message of the input, or of a conversation's items."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    id: Echoed = None
    status: Echoed = None
    phase: Echoed = None

    def message(self) -> Message:
        """Return it as the engine has it."""
        role: Role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class FunctionCallItem(Body):
    """A call of a tool, as an earlier response had it."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    id: Echoed = None
    status: Echoed = None

    def call(self) -> MessageToolCall:
        """Return it as the engine has it."""
        return ToolCall(
            self.call_id, flat_name(self.namespace, self.name), self.arguments
        ).to_dict()


class CustomCallItem(Body):
    """A call of a tool that takes a text; an earlier response of another server had it."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None
    id: Echoed = None
    status: Echoed = None

    def call(self) -> MessageToolCall:
        """Return it as the engine has it: as a function with one argument."""
        arguments = json.dumps({"input": self.input}, ensure_ascii=False)
        return ToolCall(self.call_id, flat_name(self.namespace, self.name), arguments).to_dict()


class FunctionOutputItem(Body):
    """What a tool gave back."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Text
    id: Echoed = None
    status: Echoed = None
    name: Echoed = None

    def message(self) -> Message:
        """Return it as the engine has it."""
        return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}


class ReasoningItem(Body):
    """What was thought before a reply; encrypted, it can be read by its own server alone."""

    type: Literal["reasoning"]
    content: list[Any] | None = None
    summary: list[Any] | None = None
    id: Echoed = None
    status: Echoed = None
    encrypted_content: Echoed = None

    def thoughts(self) -> str:
        """Return it as one text."""
        return split_thoughts(self.content)[1] or split_thoughts(self.summary)[1]


class ItemReference(Body):
    """Stands for an item that this server gave out."""

    type: Literal["item_reference"] = "item_reference"
    id: str


_REFERENCE: Final = "item_reference"
_ITEM_KINDS: Final = {
    "message": "message",
    "function_call": "function_call",
    "function_call_output": "output",
    "custom_tool_call": "custom_tool_call",
    "custom_tool_call_output": "output",
    "reasoning": "reasoning",
    _REFERENCE: _REFERENCE,
}


def _kind_of(item: Any) -> Any:
    """Return which kind of item something claims to be; a message need not say so."""
    if isinstance(item, dict):
        # A reference need not either, where it is nothing else.
        given = {name for name, value in item.items() if value is not None}
        kind = item.get("type") or (_REFERENCE if given == {"id"} else "message")
    elif isinstance(item, Body):
        kind = getattr(item, "type", None)
    else:
        return None
    return _ITEM_KINDS.get(kind, "other") if isinstance(kind, str) else "other"


def _refuse_item(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, Mapping) else None
    raise ValueError(f"an item of type {quoted(kind)} cannot be read here: leave it out")


_Said = (
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[FunctionOutputItem, Tag("output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[Annotated[Any, BeforeValidator(_refuse_item)], Tag("other")]
)
InputItem = Annotated[_Said, Discriminator(_kind_of)]
"""What is said, as an item."""
InputOrReference = Annotated[
    _Said | Annotated[ItemReference, Tag(_REFERENCE)], Discriminator(_kind_of)
]

Resolve = Callable[[str], dict[str, Any]]
"""Returns the item that an id stands for; raises `ApiError` where there is none."""


def merged(items: Sequence[Any], resolve: Resolve | None = None) -> list[Message]:
    """Return items as messages: what an assistant thinks, says and then calls is one message."""
    messages: list[Message] = []
    calls: list[MessageToolCall] = []  # of the last message
    thoughts: list[str] = []  # before the next message
    for item in items:
        if isinstance(item, ItemReference):
            assert resolve is not None, "only an input has references"
            item = _ITEM.validate_python(resolve(item.id))  # noqa: PLW2901 - what it stands for
        if isinstance(item, Instructing) and item.is_left_out:
            continue
        if isinstance(item, ReasoningItem):
            thoughts += filter(None, [item.thoughts()])
            continue
        if not isinstance(item, FunctionCallItem | CustomCallItem):
            message = item.message()
            if message["role"] == "assistant" and thoughts:
                message["reasoning_content"] = "\n".join(thoughts)
            messages.append(message)
            calls, thoughts = [], []
            continue
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
            if thoughts:
                messages[-1]["reasoning_content"] = "\n".join(thoughts)
        thoughts = []
        if not calls:
            messages[-1]["tool_calls"] = calls
        calls.append(item.call())
    return messages


_ITEM: Final[TypeAdapter[Any]] = TypeAdapter(InputItem)


class TextFormat(Body):
    """Text as it comes."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema, with a name that nothing depends on."""

    name: Echoed = None
    description: Echoed = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Whether a schema is refused that cannot be held to as a whole; else formats that are not known
    are annotations."""

    def grammar(self) -> Grammar:
        """
        Return what it means for the reply.

        Raises:
            InvalidParameterError: The schema is none.
        """
        schema = self.schema_ or {}
        if not self.strict:
            schema = {**schema, "x-guidance": {"lenient": True}}
        return Grammar.json_schema(schema)


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
    if isinstance(wanted, JsonObjectFormat):
        return Grammar.json_object()
    schema = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else wanted
    return schema.grammar() if isinstance(schema, NamedSchema) else None
