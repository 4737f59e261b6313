"""
A conversation as a file for people (Markdown) or for another journal (JSON).

Pure: values in, text out. What reads the JSON again is in `importing.py`.
"""

import json
from typing import Any, Final

from recollect.conversation.records import ConversationRecord, NodeRecord, links_to_dict
from recollect.errors import ConversationError
from recollect.types import Role

FORMAT_NAME: Final = "recollect-conversation"
FORMAT_VERSION: Final = 2
"""Grows with every change that an older recollect would misread. Version 2 can have calls of tools;
a conversation without them is written as version 1, which every recollect reads."""

_SPEAKERS: Final[dict[Role, str]] = {
    "system": "Instructions",
    "user": "You",
    "assistant": "Assistant",
    "tool": "Tool",
}
_ENDINGS: Final = {"length": "cut at the token limit", "cancelled": "stopped"}
_PREVIEW: Final = 60
"""Characters of a message that stands for a branch."""


def to_json(conversation: ConversationRecord) -> str:
    """Return all of a conversation as JSON text: its tree, token ids, usage and tips."""
    fields = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION if _has_tools(conversation) else 1,
        "name": conversation.name,
        "created_at": conversation.created_at.isoformat(),
        "updated_at": conversation.updated_at.isoformat(),
        "model": conversation.model,
        "fingerprint": conversation.fingerprint,
        "tips": conversation.tips,
    }
    head = json.dumps(fields, ensure_ascii=False, indent=2, allow_nan=False)
    # A node a line: indented, a reply's token ids would take hundreds of them.
    nodes = [json.dumps(_node(node), ensure_ascii=False) for node in conversation.nodes]
    lines = ",\n    ".join(nodes)
    body = f"[\n    {lines}\n  ]" if nodes else "[]"
    return f'{head[:-2]},\n  "nodes": {body}\n}}\n'


def to_markdown(conversation: ConversationRecord, *, tip: str | None = None) -> str:
    """
    Return one path through a conversation as Markdown, and a list of where others part from it.

    Args:
        tip: Where the path ends; None: at the main tip, or at the newest node if there is none.

    Raises:
        ConversationError: There is no such tip.
    """
    if tip is not None and tip not in conversation.tips:
        known = ", ".join(sorted(conversation.tips)) or "none"
        raise ConversationError(f"{conversation.name!r} has no tip {tip!r}: its tips are {known}.")
    end = conversation.default_tip() if tip is None else conversation.tips[tip]
    path = conversation.path(end)
    created = conversation.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
    parts = [f"# {conversation.name}", f"*{conversation.model}, begun {created}*"]
    for node in path:
        parts += [f"## {_SPEAKERS[node.role]}", node.content.strip("\n")]
        if node.finish_reason in _ENDINGS:
            parts.append(f"*({_ENDINGS[node.finish_reason]})*")
    branches = _other_branches(conversation, {node.id for node in path})
    if branches:
        parts += ["---", "## Other branches", "\n".join(branches)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _has_tools(conversation: ConversationRecord) -> bool:
    return any(node.role == "tool" or node.links is not None for node in conversation.nodes)


def _node(node: NodeRecord) -> dict[str, Any]:
    links = {} if node.links is None else {"links": links_to_dict(node.links)}
    return {
        "id": node.id,
        "parent": node.parent_id,
        "role": node.role,
        "content": node.content,
        "token_ids": node.token_ids,
        "finish_reason": node.finish_reason,
        "usage": node.usage,
        "created_at": node.created_at.isoformat(),
        "fingerprint": node.fingerprint,
        **links,
    }


def _other_branches(conversation: ConversationRecord, shown: set[int]) -> list[str]:
    """Return a list item for each branch of which not all is shown."""
    nodes = {node.id: node for node in conversation.nodes}
    ends = {node.id: "" for node in conversation.leaves() if node.id not in shown}
    for name, node_id in sorted(conversation.tips.items()):
        if node_id is not None and node_id not in shown:
            ends[node_id] = ", ".join(filter(None, [ends.get(node_id), f"`{name}`"]))
    items = []
    for node_id, names in sorted(ends.items()):
        first, turns = nodes[node_id], 0
        while True:
            turns += first.role == "assistant"
            if first.parent_id is None or first.parent_id in shown:
                break
            first = nodes[first.parent_id]
        after = (
            "at the start"
            if first.parent_id is None
            else "after " + _quoted(nodes[first.parent_id])
        )
        count = "1 turn" if turns == 1 else f"{turns} turns"
        label = f"{names}: " if names else ""
        items.append(f"- {label}{count} {after}: {_quoted(first)}")
    return items


def _quoted(node: NodeRecord) -> str:
    """Return the beginning of a message on one line, with nothing in it that is Markdown."""
    line = " ".join(node.content.split())
    short = line if len(line) <= _PREVIEW else line[: _PREVIEW - 1].rstrip() + "…"
    escaped = "".join(f"\\{sign}" if sign in "\\`*_[]<>#|~" else sign for sign in short)
    return f"“{escaped}”"
