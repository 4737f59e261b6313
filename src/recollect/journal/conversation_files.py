"""
Conversations as Markdown, for people, and as JSON, which can be imported into another journal.

An imported file may come from a stranger, so each field is checked. Pure: no file is read or written here.
"""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from recollect.errors import ConversationError, ConversationFileError
from recollect.journal.records import (
    DEFAULT_TIP,
    FINISH_REASONS,
    MAX_TOKEN_ID,
    ROLES,
    ConversationRecord,
    NewNode,
    NodeRecord,
    briefly,
    links_to_dict,
    require_name,
    require_text,
)
from recollect.types import Role, ToolLinks

FORMAT_NAME: Final = "recollect-conversation"
FORMAT_VERSION: Final = 2
"""
Incremented with each change that older versions of recollect would misread.

Version 2 added tool calls. A conversation without them is written as version 1, which all versions read.
"""

_SPEAKERS: Final[dict[Role, str]] = {
    "system": "Instructions",
    "user": "You",
    "assistant": "Assistant",
    "tool": "Tool",
}
_ENDINGS: Final = {"length": "cut at the token limit", "cancelled": "stopped"}
_PREVIEW: Final = 60
"""Most characters that are shown of the first message of a branch."""


def to_json(conversation: ConversationRecord) -> str:
    """Return a whole conversation as JSON text: its nodes with token ids and usage, and its branches."""
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
    # One node per line: with indentation, the token ids of a reply would take hundreds of lines.
    nodes = [json.dumps(_node(node), ensure_ascii=False) for node in conversation.nodes]
    lines = ",\n    ".join(nodes)
    body = f"[\n    {lines}\n  ]" if nodes else "[]"
    return f'{head[:-2]},\n  "nodes": {body}\n}}\n'


def path_to_json(path: Sequence[NewNode], *, name: str, model: str, fingerprint: str) -> str:
    """
    Return messages that follow each other as a conversation of one branch, in the form of `to_json`.

    Args:
        path: From the first message on.
        name: Of the conversation.
        model: Name of the model that it goes on with.
        fingerprint: Of that model.
    """
    now = datetime.now(UTC)
    nodes = tuple(
        NodeRecord(
            id=number,
            parent_id=number - 1 or None,
            role=node.role,
            content=node.content,
            token_ids=None if node.token_ids is None else tuple(node.token_ids),
            finish_reason=node.finish_reason,
            usage=None if node.usage is None else dict(node.usage),
            created_at=now,
            fingerprint=node.fingerprint,
            links=node.links,
        )
        for number, node in enumerate(path, 1)
    )
    return to_json(
        ConversationRecord(
            name=name,
            created_at=now,
            updated_at=now,
            model=model,
            fingerprint=fingerprint,
            nodes=nodes,
            tips={DEFAULT_TIP: len(nodes) or None},
        )
    )


def path_from_json(text: str, fingerprint: str, vocab_size: int) -> list[NewNode]:
    """
    Return the messages of the branch `main` in what `to_json` returned.

    Args:
        text: The JSON.
        fingerprint: Of the model that is to go on with it.
        vocab_size: How many token ids that model has.

    Raises:
        ConversationFileError: It is not such a text, or a reply of that model has other token ids.
    """
    record = from_json(text)
    path = record.path(record.default_tip())
    for node in path:
        is_own = node.fingerprint == fingerprint
        if is_own and max(node.token_ids or (), default=0) >= vocab_size:
            _refuse(f"node {node.id} has a token id that its model does not have")
    return [
        NewNode(
            role=node.role,
            content=node.content,
            token_ids=node.token_ids,
            finish_reason=node.finish_reason,
            usage=node.usage,
            fingerprint=node.fingerprint,
            links=node.links,
        )
        for node in path
    ]


def to_markdown(conversation: ConversationRecord, *, tip: str | None = None) -> str:
    """
    Return one path through a conversation as Markdown, and a list of the other branches.

    Args:
        tip: Name of the branch whose path is shown; None: `main`, or the path of the newest node if there is
            no `main`.

    Raises:
        ConversationError: There is no such branch.
    """
    if tip is not None and tip not in conversation.tips:
        known = ", ".join(sorted(conversation.tips)) or "none"
        raise ConversationError(
            f"{conversation.name!r} has no branch {tip!r}: its branches are {known}."
        )
    end = conversation.default_tip() if tip is None else conversation.tips[tip]
    path = conversation.path(end)
    created = conversation.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
    parts = [f"# {conversation.name}", f"*{conversation.model}, begun {created}*"]
    for node in path:
        thought = None if node.links is None else node.links.reasoning
        quoted = "" if thought is None else "> " + thought.replace("\n", "\n> ")
        parts += [f"## {_SPEAKERS[node.role]}", quoted, node.content.strip("\n")]
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
    """Return a list item for each branch, named or not, that does not end at a node in *shown*."""
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
    """Return the beginning of a message on one line, with the signs of Markdown escaped."""
    line = " ".join(node.content.split())
    short = line if len(line) <= _PREVIEW else line[: _PREVIEW - 1].rstrip() + "…"
    escaped = "".join(f"\\{sign}" if sign in "\\`*_[]<>#|~" else sign for sign in short)
    return f"“{escaped}”"


_REMEDY: Final = "export the conversation again with `recollect conversations export --format json`"
_KINDS: Final[dict[type, str]] = {str: "text", list: "a list", dict: "an object"}
MOST_JSON_BYTES: Final = 128 << 20
"""Most bytes of a conversation as JSON, about ten million tokens; reading it takes ten times the memory."""
_USAGE_DEPTH: Final = 8
"""Most nested levels of `usage`, which has one or two."""


def from_json(text: str) -> ConversationRecord:
    """
    Return the conversation in a JSON text that `to_json` wrote.

    Raises:
        ConversationFileError: The text is not such a conversation; the message says what is wrong where.
    """
    try:
        fields = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConversationFileError(f"This is no JSON ({error}): {_REMEDY}.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT_NAME:
        _refuse("there is no conversation in it")
    version = fields.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ConversationFileError(
            f"This file has version {briefly(version)} and 1 to {FORMAT_VERSION} are known: update "
            "recollect, or export the conversation again with the one installed here."
        )
    nodes = _nodes(_field(fields, "nodes", list, "the file"))
    return ConversationRecord(
        name=_name(_field(fields, "name", str, "the file"), "conversation"),
        created_at=_moment(fields, "created_at", "the file"),
        updated_at=_moment(fields, "updated_at", "the file"),
        model=_text(fields, "model", "the file"),
        fingerprint=_text(fields, "fingerprint", "the file"),
        nodes=nodes,
        tips=_tips(_field(fields, "tips", dict, "the file"), {node.id for node in nodes}),
    )


def _nodes(values: list[Any]) -> tuple[NodeRecord, ...]:
    nodes: dict[int, NodeRecord] = {}
    ids = {value.get("id") for value in values if _has_plain_id(value)}
    for place, value in enumerate(values):
        where = f"node {place + 1} of {len(values)}"
        if not isinstance(value, dict):
            _refuse(f"{where} is no object")
        node = _node_of(value, where)
        if node.id in nodes:
            _refuse(f"{where} has the id {briefly(node.id)}, which another one has")
        if node.parent_id is not None and node.parent_id not in nodes:
            known = (
                "comes after it or is part of a circle" if node.parent_id in ids else "is missing"
            )
            _refuse(f"the parent {briefly(node.parent_id)} of {where} {known}")
        if node.parent_id is not None and node.parent_id > node.id:
            _refuse(f"{where} has a smaller id than its parent")
        nodes[node.id] = node
    return tuple(nodes.values())


def _has_plain_id(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id"), int)


def _node_of(value: dict[str, Any], where: str) -> NodeRecord:
    role = _field(value, "role", str, where)
    finish_reason = _optional(value, "finish_reason", str, where)
    if role not in ROLES:
        _refuse(f"{where} has the role {briefly(role)}, which is none of {', '.join(ROLES)}")
    if finish_reason is not None and finish_reason not in FINISH_REASONS:
        _refuse(f"{where} has the finish reason {briefly(finish_reason)}")
    fingerprint = value.get("fingerprint")
    return NodeRecord(
        id=_id(value.get("id"), f"the id of {where}"),
        parent_id=None
        if value.get("parent") is None
        else _id(value["parent"], f"the parent of {where}"),
        role=role,
        content=_text(value, "content", where),
        token_ids=_token_ids(value, where, is_reply=role == "assistant"),
        finish_reason=finish_reason,
        usage=_usage(value, where),
        created_at=_moment(value, "created_at", where),
        fingerprint=None if fingerprint is None else _text(value, "fingerprint", where),
        links=_links(value, where),
    )


def _links(value: dict[str, Any], where: str) -> ToolLinks | None:
    fields = _optional(value, "links", dict, where)
    if fields is None:
        return None
    return ToolLinks(
        call_ids=_texts(fields, "call_ids", where),
        tool_call_id=_text(fields, "tool_call_id", where) if "tool_call_id" in fields else None,
        name=_text(fields, "name", where) if "name" in fields else None,
        reasoning=_text(fields, "reasoning", where) if "reasoning" in fields else None,
        format=_text(fields, "format", where) if "format" in fields else None,
        arguments=_texts(fields, "arguments", where),
    )


def _token_ids(value: dict[str, Any], where: str, *, is_reply: bool) -> tuple[int, ...] | None:
    ids = _optional(value, "token_ids", list, where)
    if ids is None:
        return None
    if not is_reply:
        _refuse(f"{where} has token ids and is no reply")
    # By type and not by isinstance, for which true and false are integers.
    if not all(type(token_id) is int and 0 <= token_id <= MAX_TOKEN_ID for token_id in ids):
        _refuse(f"{where} has a token id that is none")
    return tuple(ids)


def _tips(values: dict[str, Any], node_ids: set[int]) -> dict[str, int | None]:
    tips: dict[str, int | None] = {}
    for name, node_id in values.items():
        if node_id is not None and (type(node_id) is not int or node_id not in node_ids):
            _refuse(f"the branch {briefly(name)} stands at a node that is missing")
        tips[_name(name, "branch")] = node_id
    return tips


def _id(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        _refuse(f"{where} is {briefly(value)} and not a whole number above 0")
    return value


def _name(name: str, what: str) -> str:
    try:
        return require_name(name, what)
    except ConversationError as error:
        raise ConversationFileError(str(error)) from None


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    text: str = _field(fields, key, str, where)
    try:
        require_text(text)
    except ConversationError:
        _refuse(f"{key!r} of {where} holds half a character")
    return text


def _texts(fields: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    texts = _optional(fields, key, list, where) or []
    numbered = {str(number): text for number, text in enumerate(texts)}
    return tuple(_text(numbered, number, where) for number in numbered)


def _moment(fields: dict[str, Any], key: str, where: str) -> datetime:
    text = _field(fields, key, str, where)
    try:
        moment = datetime.fromisoformat(text)
        moment_utc = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        _refuse(f"{key!r} of {where} is {briefly(text)} and no time")
    if moment.tzinfo is None:
        _refuse(f"{key!r} of {where} is {briefly(text)}, without an offset from UTC")
    return moment_utc


def _usage(value: dict[str, Any], where: str) -> dict[str, Any] | None:
    usage: dict[str, Any] | None = _optional(value, "usage", dict, where)
    if not _is_shallow(usage, _USAGE_DEPTH):
        _refuse(f"'usage' of {where} is nested more than {_USAGE_DEPTH} deep")
    try:
        require_text(json.dumps(usage, ensure_ascii=False))
    except ConversationError:
        _refuse(f"'usage' of {where} holds half a character")
    return usage


def _is_shallow(value: object, depth: int) -> bool:
    """Return whether a JSON value is nested at most *depth* deep."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _optional(fields: dict[str, Any], key: str, kind: type, where: str) -> Any:
    return None if fields.get(key) is None else _field(fields, key, kind, where)


def _field(fields: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = fields.get(key)
    if not isinstance(value, kind):
        _refuse(f"{key!r} of {where} is not {_KINDS[kind]}")
    return value


def _finite(text: str) -> float:
    """Return a finite number; raises ValueError for NaN, infinities and numbers too large for a float."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _refuse(what: str) -> NoReturn:
    raise ConversationFileError(f"This file cannot be imported, {what}: {_REMEDY}.")
