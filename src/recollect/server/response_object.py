"""
A response as OpenAI's clients read it.

Pure: values in, JSON out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from recollect.conversation.tree import to_message
from recollect.conversation.turn import Reply
from recollect.journal.records import NodeRecord
from recollect.server.response_schema import FlatChoice, ResponseRequest
from recollect.server.tool_schema import logprob_entry
from recollect.types import FinishReason, MessageToolCall, TokenLogprob

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
            tool_choice=body.tool_choice.model_dump()
            if isinstance(body.tool_choice, FlatChoice)
            else body.tool_choice or "auto",
            parallel_tool_calls=body.parallel_tool_calls is not False,
            text={"format": wanted.model_dump(by_alias=True)}
            if wanted is not None
            else {"format": {"type": "text"}},
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
    def of(cls, reply: Reply) -> Self:
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
    output = [] if said is None else output_items(head.message_id, said)
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


def output_items(message_id: str, said: Said) -> list[dict[str, Any]]:
    """Return a reply as items: what it says, unless it only calls, then its calls."""
    status = "incomplete" if said.status == "cancelled" else said.status
    items = []
    if said.content or not said.calls:
        part = output_text(said.content, said.logprobs)
        items.append(output_message(message_id, [part], status))
    calls = enumerate(said.calls)
    return items + [function_call(message_id, number, call) for number, call in calls]


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
    message_id: str, number: int, call: MessageToolCall, status: str = "completed"
) -> dict[str, Any]:
    """Return a call of a tool as an item; *number* counts the calls of one reply."""
    return {
        "id": f"fc_{message_id.removeprefix('msg_')}_{number}",
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
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
