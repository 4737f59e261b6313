"""
A response as OpenAI's clients read it.

Pure: values in, JSON out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from recollect.conversation.records import NodeRecord
from recollect.server.response_schema import ResponseRequest
from recollect.types import FinishReason

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

    @classmethod
    def of(cls, body: ResponseRequest, response_id: str, created_at: int, model: str) -> Self:
        """Return the head of the response to a request."""
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


def response_object(
    head: ResponseHead,
    text: str | None,
    finish_reason: FinishReason | None,
    usage: Mapping[str, Any] | None,
    instructions: str | None = None,
) -> dict[str, Any]:
    """
    Return a response.

    Args:
        head: What is known of it.
        text: What was said; None: it is being generated.
        finish_reason: Why it ended.
        usage: As `Cost.responses` gives it.
        instructions: Of the request.
    """
    status = "in_progress" if text is None else _STATUS[finish_reason]
    output = [] if text is None else [output_message(head.message_id, text, status)]
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
        "parallel_tool_calls": True,
        "previous_response_id": head.previous_response_id,
        "conversation": None if head.conversation is None else {"id": head.conversation},
        "reasoning": {"effort": None, "summary": None},
        "store": head.store,
        "temperature": head.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": head.top_p,
        "truncation": head.truncation,
        "usage": usage,
    }


def output_message(message_id: str, text: str, status: str) -> dict[str, Any]:
    """Return a reply as an item of a response's output."""
    return {
        "id": message_id,
        "type": "message",
        "status": "incomplete" if status == "cancelled" else status,
        "role": "assistant",
        "content": [output_text(text)],
    }


def output_text(text: str) -> dict[str, Any]:
    """Return a text as a part of an output message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def input_item(item_id: str, node: NodeRecord) -> dict[str, Any]:
    """Return a message of a conversation as an item."""
    if node.role == "assistant":
        status = _STATUS[node.finish_reason]
        return output_message(item_id, node.content, status)
    return {
        "id": item_id,
        "type": "message",
        "status": "completed",
        "role": node.role,
        "content": [{"type": "input_text", "text": node.content}],
    }
