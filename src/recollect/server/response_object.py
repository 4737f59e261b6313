"""
The Responses API's JSON: the body of a request, a response, and its items.

Pure: parses and translates, values in and JSON out; generates nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from recollect.conversation.tools import Chosen
from recollect.conversation.tree import to_message
from recollect.engine.reply import GeneratedReply
from recollect.journal.records import NodeRecord
from recollect.server.fields import (
    MOST_TOOLS,
    NOT_SUPPORTED,
    Body,
    Echoed,
    Ignored,
    Items,
    LogprobCount,
    Metadata,
    Offer,
    OnlyOff,
    OtherChoice,
    OtherTool,
    ResponseFormat,
    SamplingFields,
    Text,
    Thinking,
    ToolMode,
    grammar_of,
    kind_among,
    logprob_entry,
    offer,
    others_among,
    some_of,
    split_thoughts,
    tool_schema,
    unsupported,
)
from recollect.server.refusals import quoted
from recollect.server.settings import Settings
from recollect.types import (
    FinishReason,
    Grammar,
    Message,
    MessageToolCall,
    Role,
    SamplingParams,
    TokenLogprob,
    ToolCall,
)

NO_NAMESPACES: Final[Mapping[str, Any]] = {}
_LOGPROBS: Final = "message.output_text.logprobs"
"""What a client includes to be told how likely tokens were."""


class InputMessage(Body):
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


def kept_schemas(head: "ResponseHead | None") -> list[dict[str, Any]]:
    """Return the tools of a kept response as the engine has them."""
    return schemas_of(_TOOLS.validate_python([] if head is None else head.tools))


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


class TextOptions(Body):
    """What the text of a reply is like."""

    format: ResponseFormat | None = None
    verbosity: Ignored = None


class ConversationId(Body):
    """Names a conversation."""

    id: str


class ResponseStreamOptions(Body):
    """What a stream tells besides text."""

    include_obfuscation: Ignored = None


class ResponseRequest(SamplingFields):
    """The body of `POST /v1/responses`."""

    refused: ClassVar = {
        "prompt": "prompts are not kept here: send their text as instructions.",
        "context_management": "history is not shortened here: send less, or truncation.",
        **NOT_SUPPORTED,
    }

    model: str | None = None
    input: str | Annotated[Items[InputOrReference], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    text: TextOptions | None = None
    tools: Annotated[Items[AnyTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: AnyChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: LogprobCount | None = None
    include: Items[str] | None = None

    reasoning: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    background: OnlyOff = None

    max_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    user: Ignored = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseRequest":
        if self.previous_response_id is not None and self.conversation is not None:
            raise unsupported("previous_response_id", "not together with conversation.")
        return self

    @property
    def conversation_id(self) -> str | None:
        """Return the conversation that the reply is added to."""
        named = self.conversation
        return named.id if isinstance(named, ConversationId) else named

    @property
    def keeps(self) -> bool:
        """Return whether the response can be asked for, and gone on from, later."""
        return self.store is not False

    def messages(self, resolve: Resolve) -> list[Message]:
        """
        Return the input as the engine has it, without the instructions.

        Args:
            resolve: Called for each reference in it.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return merged(self.input, resolve)

    def offer(self) -> Offer:
        """Return what the reply may call."""
        choice = self.tool_choice
        thinking = {} if self.reasoning is None else self.reasoning.options()
        return offer(
            schemas_of(self.tools or ()),
            choice.chosen() if isinstance(choice, FlatChoice | FlatAllowed) else choice,
            self.parallel_tool_calls,
            thinking | (self.chat_template_kwargs or {}),
        )

    def left_out(self) -> Iterable[str]:
        """Return the tools that are no functions."""
        return others_among(self.tools)

    @property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Return the namespace of each tool that has one, and its name there, by its flat name."""
        return {
            flat_name(one.name, tool.name): (one.name, tool.name)
            for one in self.tools or ()
            if isinstance(one, NamespaceTool)
            for tool in one.tools
            if isinstance(tool, FlatTool)
        }

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        return None if self.text is None else grammar_of(self.text.format)

    def prepare(self) -> None:
        """Work out `grammar`."""
        _ = self.grammar

    def sampling(self, settings: Settings) -> SamplingParams:
        """Return how the reply is sampled; see `SamplingFields.params`."""
        wants_logprobs = self.top_logprobs or _LOGPROBS in (self.include or ())
        return self.params(
            settings,
            max_tokens=self.max_output_tokens or settings.max_tokens,
            grammar=self.grammar,
            logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
        )


_STATUS: Mapping[FinishReason | None, str] = {
    "stop": "completed",
    "length": "incomplete",
    "cancelled": "cancelled",
    None: "completed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What is known of a response before it is there, and kept with it; without any text."""

    id: str
    created_at: int
    model: str
    max_output_tokens: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    previous_response_id: str | None = None
    conversation: str | None = None
    store: bool = True
    temperature: float | None = None
    top_p: float | None = None
    truncation: str = "disabled"
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = field(default_factory=lambda: {"format": {"type": "text"}})
    namespaces: dict[str, Any] = field(default_factory=dict)
    """As `ResponseRequest.namespaces`."""

    @classmethod
    def of(cls, body: ResponseRequest, response_id: str, created_at: int, model: str) -> Self:
        """Return the head of the response to a request."""
        wanted = None if body.text is None else body.text.format
        return cls(
            id=response_id,
            created_at=created_at,
            model=model,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            previous_response_id=body.previous_response_id,
            conversation=body.conversation_id,
            store=body.keeps,
            temperature=body.temperature,
            top_p=body.top_p,
            truncation=body.truncation or "disabled",
            tools=[{"strict": None, **tool.model_dump()} for tool in body.tools or ()],
            tool_choice=body.tool_choice.model_dump(exclude_none=True)
            if isinstance(body.tool_choice, Body)
            else body.tool_choice or "auto",
            parallel_tool_calls=body.parallel_tool_calls is not False,
            text={"format": wanted.model_dump(by_alias=True)}
            if wanted is not None
            else {"format": {"type": "text"}},
            namespaces=body.namespaces,
        )

    def kept(self) -> dict[str, Any]:
        """Return what is kept of it."""
        values = asdict(self)
        del values["id"]
        return values

    @classmethod
    def from_kept(cls, response_id: str, values: Mapping[str, Any]) -> Self:
        """Return the head that `kept` was made of."""
        return cls(id=response_id, **values)

    @property
    def message_id(self) -> str:
        """Return the id of the message that the reply is."""
        return f"msg_{self.id.removeprefix('resp_')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A reply that has ended, by whatever way it came here."""

    content: str
    """What is said beside the calls."""
    calls: Sequence[MessageToolCall] = ()
    finish_reason: FinishReason | None = None
    logprobs: Sequence[TokenLogprob] = ()

    @classmethod
    def of(cls, reply: GeneratedReply) -> Self:
        """Return a reply that was generated just now."""
        return cls(
            content=reply.content,
            calls=[call.to_dict() for call in reply.tool_calls],
            finish_reason=reply.finish_reason,
            logprobs=reply.logprobs or (),
        )

    @classmethod
    def kept(cls, node: NodeRecord) -> Self:
        """Return a reply from the journal."""
        message = to_message(node.role, node.content, node.links)
        return cls(
            content=message["content"] or "",
            calls=message.get("tool_calls", ()),
            finish_reason=node.finish_reason,
        )

    @property
    def status(self) -> str:
        """Return whether it is whole, in OpenAI's words."""
        return _STATUS[self.finish_reason]


def response_object(
    head: ResponseHead,
    said: Said | None,
    usage: Mapping[str, Any] | None,
    instructions: str | None = None,
) -> dict[str, Any]:
    """
    Return a response.

    Args:
        head: What is known of it.
        said: The reply; None: it is being generated.
        usage: As `Cost.responses` gives it.
        instructions: Of the request.
    """
    status = "in_progress" if said is None else said.status
    output = [] if said is None else output_items(head.message_id, said, head.namespaces)
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created_at,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": instructions,
        "max_output_tokens": head.max_output_tokens,
        "metadata": head.metadata,
        "model": head.model,
        "output": output,
        "parallel_tool_calls": head.parallel_tool_calls,
        "previous_response_id": head.previous_response_id,
        "conversation": None if head.conversation is None else {"id": head.conversation},
        "reasoning": {"effort": None, "summary": None},
        "store": head.store,
        "temperature": head.temperature,
        "text": head.text,
        "tool_choice": head.tool_choice,
        "tools": head.tools,
        "top_p": head.top_p,
        "truncation": head.truncation,
        "usage": usage,
    }


def output_items(
    message_id: str, said: Said, namespaces: Mapping[str, Any] = NO_NAMESPACES
) -> list[dict[str, Any]]:
    """Return a reply as items: what it says, unless it only calls, then its calls."""
    status = "incomplete" if said.status == "cancelled" else said.status
    items = []
    if said.content or not said.calls:
        part = output_text(said.content, said.logprobs)
        items.append(output_message(message_id, [part], status))
    calls = enumerate(said.calls)
    return items + [
        function_call(message_id, number, call, namespaces=namespaces) for number, call in calls
    ]


def output_message(message_id: str, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """Return what a reply says as an item."""
    return {
        "id": message_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def output_text(text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    """Return a text as a part of an output message."""
    likely = [logprob_entry(token) for token in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": likely}


def function_call(
    message_id: str,
    number: int,
    call: MessageToolCall,
    status: str = "completed",
    *,
    namespaces: Mapping[str, Any] = NO_NAMESPACES,
) -> dict[str, Any]:
    """Return a call of a tool as an item; *number* counts the calls of one reply."""
    flat = call["function"]["name"]
    namespace, name = namespaces.get(flat, (None, flat))
    return {
        "id": f"fc_{message_id.removeprefix('msg_')}_{number}",
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        "name": name,
        **({} if namespace is None else {"namespace": namespace}),
        "arguments": call["function"]["arguments"],
    }


def item_list(items: Sequence[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    """Return a page of a list."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def items_of(item_id: str, node: NodeRecord) -> list[dict[str, Any]]:
    """Return a message of a conversation as items: a reply that calls is several."""
    if node.role == "assistant":
        return output_items(item_id, Said.kept(node))
    if node.role == "tool":
        call_id = None if node.links is None else node.links.tool_call_id
        return [
            {
                "id": item_id,
                "type": "function_call_output",
                "status": "completed",
                "call_id": call_id or "",
                "output": node.content,
            }
        ]
    return [
        {
            "id": item_id,
            "type": "message",
            "status": "completed",
            "role": node.role,
            "content": [{"type": "input_text", "text": node.content}],
        }
    ]
