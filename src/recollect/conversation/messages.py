"""
Messages as clients send them, and as they are kept.

A reply is kept as the text that the model wrote, calls of tools in it; what a client sends with the
calls beside the text becomes such a text again. Pure: values in, values out.
"""

import json
from collections.abc import Mapping
from typing import Any

from recollect.errors import InvalidParameterError
from recollect.journal.records import ROLES, NewNode
from recollect.text.tool_calls import CALL_START, ParsedReply, call_text, parse_reply
from recollect.types import Message, Role, ToolLinks


def to_node(message: Message) -> NewNode:
    """
    Return a message as it is kept.

    Raises:
        InvalidParameterError: It has a role that is none, which a template would write as it is.
            Or a call lacks something, a message that needs one has no content, or that is no text.
    """
    _check_shape(message)
    role, content = message["role"], message.get("content")
    if role == "assistant":
        calls = message.get("tool_calls") or ()
        texts = [content] if content else []
        texts += [_call_text(call) for call in calls]
        links = ToolLinks(call_ids=tuple(map(_call_id, calls))) if calls else None
        return NewNode(role=role, content="\n".join(texts), links=links)
    if content is None:
        raise InvalidParameterError(f"A message of role {role!r} has no content: give it a text.")
    links = None
    if role == "tool":
        links = ToolLinks(tool_call_id=message.get("tool_call_id"), name=message.get("name"))
    return NewNode(role=role, content=content, links=links if links != ToolLinks() else None)


def to_message(role: Role, content: str, links: ToolLinks | None) -> Message:
    """Return what is kept as a client sends and gets it, calls beside the text."""
    if links is None or not links.call_ids:
        return as_written(role, content, links)
    parsed = parse_reply(content, links.call_ids, names=None)
    return {
        "role": role,
        "content": parsed.content or None,
        "tool_calls": [call.to_dict() for call in parsed.calls],
    }


def as_written(role: Role, content: str, links: ToolLinks | None) -> Message:
    """Return what is kept as templates get it, calls in the text."""
    message: Message = {"role": role, "content": content}
    if links is not None and links.tool_call_id is not None:
        message["tool_call_id"] = links.tool_call_id
    if links is not None and links.name is not None:
        message["name"] = links.name
    return message


def canonical(role: Role, content: str, links: ToolLinks | None) -> str:
    """Return a text that is the same for the same message, however a client writes its calls."""
    if links is not None and links.call_ids:
        return _canonical_reply(parse_reply(content, names=None))
    if role == "assistant" and CALL_START in content:
        return _canonical_reply(parse_reply(content))
    if role == "tool" and links is not None:
        return json.dumps([links.tool_call_id, links.name, content])
    return content


def _canonical_reply(reply: ParsedReply) -> str:
    if not reply.calls:
        return reply.content
    calls = [[call.name, _canonical_json(call.arguments)] for call in reply.calls]
    return json.dumps([reply.content.strip(), calls])


def _canonical_json(text: str) -> Any:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _check_shape(message: Any) -> None:
    """Check what a type checker would, had it been asked: callers pass on what others sent."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise InvalidParameterError(
            f"A message has the role {role!r}: take one of {', '.join(ROLES)}."
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise InvalidParameterError(
            f"A message of role {role!r} has content of type {type(content).__name__}: give it a text."
        )


def _call_id(call: Any) -> str:
    call_id = call.get("id")
    if not isinstance(call_id, str):
        raise InvalidParameterError(
            f"A tool call has the id {call_id!r}: give it a text, and a function with name and "
            "arguments."
        )
    return call_id


def _call_text(call: Any) -> str:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    except (KeyError, TypeError) as cause:
        raise InvalidParameterError(
            f"A tool call lacks {cause}: give it an id, and a function with name and arguments."
        ) from cause
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidParameterError(
            f"A tool call has name {name!r} and arguments of type {type(arguments).__name__}: give "
            "both as texts, the arguments as JSON."
        )
    return call_text(name, arguments)
