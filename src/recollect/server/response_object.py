"""
The Responses API's JSON: the body of a request, a response, and its items.

Pure: parses and translates, values in and JSON out; generates nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from fastapi import Query
from pydantic import (
    Field,
    PrivateAttr,
    model_validator,
)

from recollect.conversation.tree import to_message
from recollect.engine.reply import GeneratedReply
from recollect.journal.records import NodeRecord
from recollect.server.fields import (
    MOST_TOOLS,
    NOT_SUPPORTED,
    Body,
    Ignored,
    Items,
    LogprobCount,
    SamplingFields,
    lasting,
    unsupported,
    volatile_in,
)
from recollect.server.parts import (
    AnyChoice,
    AnyTool,
    FlatAllowed,
    FlatChoice,
    FlatTool,
    InputOrReference,
    Metadata,
    NamespaceTool,
    Offer,
    Resolve,
    ResponseFormat,
    Thinking,
    flat_name,
    grammar_of,
    logprob_entry,
    merged,
    offer,
    others_among,
    schemas_of,
)
from recollect.server.settings import Settings
from recollect.text.tool_calls import is_whole
from recollect.types import (
    FinishReason,
    Grammar,
    Message,
    MessageToolCall,
    SamplingParams,
    TokenLogprob,
)

NO_NAMESPACES: Final[Mapping[str, Any]] = {}
_LOGPROBS: Final = "message.output_text.logprobs"
"""What a client includes to be told how likely tokens were."""


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
        "background": "replies are generated while the client waits, and none is begun to be asked for "
        "later: leave it out, and stream the reply where it takes long.",
        "prompt": "prompts are not kept here: send their text as instructions.",
        "context_management": "history is not shortened here: send less, or truncation.",
        **NOT_SUPPORTED,
    }

    model: str | None = None
    input: str | Items[InputOrReference]
    """An empty list: what stands last is answered, or a reply that was cut goes on."""
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

    max_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    user: Ignored = None

    _volatile: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "ResponseRequest":
        self._volatile = volatile_in("instructions", self.instructions)
        if self._volatile:
            self.instructions = lasting(self.instructions) or None
        if self.previous_response_id is not None and self.conversation is not None:
            raise unsupported("previous_response_id", "not together with conversation.")
        if self.input == [] and self.previous_response_id is None and self.conversation is None:
            raise ValueError(
                "input: an empty list goes on with what there is: name a conversation or a response"
            )
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
        """Return the tools that are no functions, and what of the instructions is volatile."""
        return [*self._volatile, *others_among(self.tools)]

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
            reasoning_budget=None if self.reasoning is None else self.reasoning.budget,
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
    reasoning: str = ""
    calls: Sequence[MessageToolCall] = ()
    finish_reason: FinishReason | None = None
    logprobs: Sequence[TokenLogprob] = ()

    @classmethod
    def of(cls, reply: GeneratedReply) -> Self:
        """Return a reply that was generated just now."""
        return cls(
            content=reply.content,
            reasoning=reply.reasoning,
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
            reasoning=message.get("reasoning_content") or "",
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
    """Return a reply as items: what was thought, what it says, unless it only calls, then its calls."""
    status = "incomplete" if said.status == "cancelled" else said.status
    items = []
    if said.reasoning:
        items.append(reasoning_item(message_id, [reasoning_text(said.reasoning)], status))
    if said.content or not said.calls:
        part = output_text(said.content, said.logprobs)
        items.append(output_message(message_id, [part], status))
    for number, call in enumerate(said.calls):
        is_cut = number + 1 == len(said.calls) and not is_whole(call["function"]["arguments"])
        whole = "incomplete" if is_cut else "completed"
        items.append(function_call(message_id, number, call, whole, namespaces=namespaces))
    return items


def reasoning_item(message_id: str, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """Return what was thought before a message as an item."""
    return {
        "id": f"rs_{message_id.removeprefix('msg_')}",
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": content,
    }


def reasoning_text(text: str) -> dict[str, Any]:
    """Return a text as a part of a reasoning item."""
    return {"type": "reasoning_text", "text": text}


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


PAGE: Final = 20
PageLimit = Annotated[int, Query(ge=1, le=100)]
"""How many entries of a list a request wants, `PAGE` where it does not say."""


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
