"""
A conversation as a tree of messages: messages are added, and never changed or deleted.

The module also converts messages between the form that clients send and the form in the tree, where
a reply is the text that the model wrote with its tool calls in it. And it has the window, which
decides which turns are left out when the context is full; the caller measures prompts.
Pure: no runtime, no encoding, no journal.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from recollect.errors import InvalidParameterError, UnknownNodeError
from recollect.journal.records import ROLES, NewNode, NodeRecord
from recollect.text.tool_calls import CALL_START, CallRules, ParsedReply, call_text, parse_reply
from recollect.text.tool_formats import FORMATS, HERMES, ToolFormat
from recollect.types import FinishReason, Message, Role, ToolCall, ToolLinks


def to_node(message: Message) -> NewNode:
    """
    Return a client's message in the form of the tree.

    Raises:
        InvalidParameterError: The role is none of `ROLES`; a template would write it as it is. Or a
            tool call lacks a part, or content is missing where it is needed, or is not a text.
    """
    _check_shape(message)
    role, content = message["role"], message.get("content")
    if role == "assistant":
        calls = message.get("tool_calls") or ()
        texts = [content] if content else []
        texts += [_call_text(call) for call in calls]
        thought = (message.get("reasoning_content") or "").strip() or None
        beside = ToolLinks(call_ids=tuple(map(_call_id, calls)), reasoning=thought)
        text = "\n".join(texts)
        return NewNode(role=role, content=text, links=beside if beside != ToolLinks() else None)
    if content is None:
        told = f"A message of role {role!r} has no content: give it a text."
        raise InvalidParameterError(told, param="messages")
    links = None
    if role == "tool":
        links = ToolLinks(tool_call_id=message.get("tool_call_id"), name=message.get("name"))
    return NewNode(role=role, content=content, links=links if links != ToolLinks() else None)


def to_message(role: Role, content: str, links: ToolLinks | None) -> Message:
    """Return a message of the tree as clients send and get it, with tool calls beside the text."""
    if links is None or not links.call_ids:
        return as_written(role, content, links)
    parsed = parsed_reply(content, links, is_cut=True)
    message: Message = {
        "role": role,
        "content": parsed.content or None,
        "tool_calls": [call.to_dict() for call in parsed.calls],
    }
    if links.reasoning is not None:
        message["reasoning_content"] = links.reasoning
    return message


def as_written(role: Role, content: str, links: ToolLinks | None) -> Message:
    """Return a message of the tree as templates get it, with tool calls in the text."""
    message: Message = {"role": role, "content": content}
    if links is not None and links.tool_call_id is not None:
        message["tool_call_id"] = links.tool_call_id
    if links is not None and links.name is not None:
        message["name"] = links.name
    if links is not None and links.reasoning is not None:
        message["reasoning_content"] = links.reasoning
    return message


def canonical(role: Role, content: str, links: ToolLinks | None) -> str:
    """
    Return a text that is equal for two messages which say the same.

    Of a reply, space at its ends says nothing, nor how the JSON of its calls is written, nor what was
    thought before: clients trim the first, write the second anew, and leave out the third.
    """
    if links is not None and links.call_ids:
        return canonical_reply(parsed_reply(content, links))
    if role == "assistant" and CALL_START in content:
        return canonical_reply(parse_reply(content))
    if role == "tool" and links is not None:
        return json.dumps([links.tool_call_id, links.name, content])
    return content.strip() if role == "assistant" else content


def parsed_reply(content: str, links: ToolLinks, *, is_cut: bool = False) -> ParsedReply:
    """
    Return a reply with calls, taken apart.

    Args:
        content: As the model wrote it.
        links: The ids of its calls, and the format that they are in.
        is_cut: As in `parse_reply`.
    """
    rules = CallRules(FORMATS.get(links.format or "", HERMES), None)
    reply = parse_reply(content, links.call_ids, rules, is_cut=is_cut)
    if not links.arguments:
        return reply
    given = zip(reply.calls, links.arguments, strict=False)
    calls = tuple(ToolCall(call.id, call.name, arguments) for call, arguments in given)
    return ParsedReply(reply.content, calls)


def links_of(text: str, calls: Sequence[ToolCall], format_: ToolFormat) -> ToolLinks | None:
    """
    Return what is kept of the calls of a reply beside its text; None: it has none.

    Args:
        text: As the model wrote it.
        calls: Those that were found in it, with the schemas of their tools known.
        format_: How the model writes calls.
    """
    if not calls:
        return None
    name = None if format_ is HERMES else format_.name
    links = ToolLinks(call_ids=tuple(call.id for call in calls), format=name)
    if parsed_reply(text, links, is_cut=True).calls == tuple(calls):
        return links
    return replace(links, arguments=tuple(call.arguments for call in calls))


def relinked(text: str, message: NewNode, format_: ToolFormat) -> ToolLinks:
    """
    Return what is kept beside a reply that a client sent and that a model wrote, which says the same.

    Args:
        text: As the model wrote it.
        message: As the client sent it.
        format_: How the model writes calls.
    """
    links = message.links or ToolLinks()
    if not links.call_ids or format_ is HERMES:
        return links
    said = parsed_reply(message.content, links)
    as_written = replace(links, format=format_.name)
    if canonical_reply(parsed_reply(text, as_written)) == canonical_reply(said):
        return as_written
    return replace(as_written, arguments=tuple(call.arguments for call in said.calls))


def canonical_reply(reply: ParsedReply) -> str:
    """Return a text that is equal for two replies which say and call the same."""
    if not reply.calls:
        return reply.content.strip()
    calls = [[call.name, _canonical_json(call.arguments)] for call in reply.calls]
    return json.dumps([reply.content.strip(), calls])


def _canonical_json(text: str) -> Any:
    if not text.strip():
        return "{}"  # what takes no arguments is called without any, or with an empty object
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> float | int:
    """Return a number as JavaScript writes it back: without a fraction where that is zero."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


def _check_shape(message: Any) -> None:
    """Check the types of role and content: callers pass on what clients sent, unchecked."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise InvalidParameterError(
            f"A message has the role {role!r}: take one of {', '.join(ROLES)}.", param="messages"
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise InvalidParameterError(
            f"A message of role {role!r} has content of type {type(content).__name__}: give it a text.",
            param="messages",
        )
    thought = message.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise InvalidParameterError(
            f"The reasoning_content of a message is {type(thought).__name__}: give it a text.",
            param="messages",
        )


def _call_id(call: Any) -> str:
    call_id = call.get("id")
    if not isinstance(call_id, str):
        raise InvalidParameterError(
            f"A tool call has the id {call_id!r}: give it a text, and a function with name and "
            "arguments.",
            param="messages",
        )
    return call_id


def _call_text(call: Any) -> str:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    except (KeyError, TypeError) as cause:
        raise InvalidParameterError(
            f"A tool call lacks {cause}: give it an id, and a function with name and arguments.",
            param="messages",
        ) from cause
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidParameterError(
            f"A tool call has name {name!r} and arguments of type {type(arguments).__name__}: give "
            "both as texts, the arguments as JSON.",
            param="messages",
        )
    return call_text(name, arguments)


ROOT_KEY: Final = b""


def message_key(parent: bytes, role: Role, content: str, links: ToolLinks | None = None) -> bytes:
    """Return the key of a message: a hash of its parent's key, its role and its canonical text."""
    text = canonical(role, content, links)
    head = f"{role}:{len(text)}:".encode()
    return hashlib.blake2b(
        parent + head + text.encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


@dataclass(eq=False, slots=True, frozen=True)
class Node:
    """
    A message in a tree of messages.

    The root has no message: its role is None. Nodes are compared by identity.
    """

    id: int
    parent: "Node | None"
    role: Role | None
    content: str
    key: bytes = ROOT_KEY
    """Equal for equal messages after equal messages, in any tree; see `message_key`."""
    token_ids: tuple[int, ...] | None = None
    """The token ids that the model generated; None for a message that it did not generate."""
    fingerprint: str | None = None
    """Of the model that generated the token ids."""
    finish_reason: FinishReason | None = None
    usage: Mapping[str, Any] | None = None
    """As `Usage.to_dict` gives it."""
    links: ToolLinks | None = None
    """The ids of the tool calls in it, or of the call that it answers, and reasoning; None: nothing."""
    children: list["Node"] = field(default_factory=list)

    def path(self) -> list["Node"]:
        """Return the nodes from the first message to this one, without the root."""
        path, node = [], self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    @property
    def turns(self) -> int:
        """Return how many replies the path to this node has."""
        return sum(node.role == "assistant" for node in self.path())

    def message(self) -> Message:
        """Return the message as clients send it, with calls of tools beside the text."""
        assert self.role is not None, "the root is no message"
        return to_message(self.role, self.content, self.links)

    @property
    def calls_tools(self) -> bool:
        """Return whether the message is a reply with calls."""
        return self.links is not None and bool(self.links.call_ids)

    def written_message(self) -> Message:
        """Return the message as templates get it, with calls of tools as the model wrote them."""
        assert self.role is not None, "the root is no message"
        return as_written(self.role, self.content, self.links)

    def to_new(self) -> NewNode:
        """Return the message as a value, to be saved or added to another tree."""
        assert self.role is not None, "the root is no message"
        return NewNode(
            role=self.role,
            content=self.content,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            usage=self.usage,
            fingerprint=self.fingerprint,
            links=self.links,
        )

    def __repr__(self) -> str:
        return f"Node({self.id}, {self.role}, {self.content[:30]!r})"


def numbered(
    node_ids: Iterable[int], saved: Mapping[int, int], journal_ids: Iterable[int]
) -> dict[int, int]:
    """
    Return the number by which people name each node of a tree, by the node's id.

    Args:
        node_ids: The ids of the tree's nodes, in the order of the tree.
        saved: The ids in the journal of the nodes that are saved, by node id.
        journal_ids: The ids of all messages that the journal has of the conversation, in any order.
            Another process may have saved some of them; those of *saved* are added if they are missing.
    """
    order = sorted({*journal_ids, *saved.values()})
    by_id = {journal_id: number for number, journal_id in enumerate(order, start=1)}
    numbers, last = dict[int, int](), len(order)
    for node_id in node_ids:
        if node_id in saved:
            numbers[node_id] = by_id[saved[node_id]]
        else:  # it will be saved after all others
            last += 1
            numbers[node_id] = last
    return numbers


DETACHED: Final = -1
"""The id of all nodes that no tree has."""


def detached(parent: Node, message: NewNode) -> Node:
    """Return a node after *parent* that leads to it and that no tree has, so that nothing leads there."""
    return Node(
        id=DETACHED,
        parent=parent,
        role=message.role,
        content=message.content,
        key=message_key(parent.key, message.role, message.content, message.links),
        token_ids=None if message.token_ids is None else tuple(message.token_ids),
        fingerprint=message.fingerprint,
        finish_reason=message.finish_reason,
        usage=message.usage,
        links=message.links,
    )


def grown(records: Iterable[NodeRecord]) -> "tuple[Tree, dict[int | None, Node]]":
    """
    Return the tree of saved messages, given parents first, and its nodes by their ids in the journal.

    The root is under None. Node ids count from 1 in the order in which the messages were saved, as
    `Conversation.numbers` does for people.
    """
    tree = Tree()
    nodes: dict[int | None, Node] = {None: tree.root}
    for record in records:
        nodes[record.id] = tree.add(
            nodes[record.parent_id],
            record.role,
            record.content,
            token_ids=record.token_ids,
            fingerprint=record.fingerprint,
            finish_reason=record.finish_reason,
            usage=record.usage,
            links=record.links,
        )
    return tree, nodes


class Tree:
    """
    All messages of a conversation, in all its branches.

    Invariants:
        1. Every node but the root is among the children of its parent, once.
        2. Ids are unique and grow from parent to child.
        3. Only replies have token ids, and those name the model that generated them.
        4. A node's key is `message_key` of its parent's key and its message.
    """

    def __init__(self) -> None:
        self.root = Node(id=0, parent=None, role=None, content="")
        self._nodes = {0: self.root}
        self._ids = itertools.count(1)  # atomic: forks in several threads may add at once

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self._nodes) - 1

    def nodes(self) -> Iterator[Node]:
        """Iterate over all messages, parents first."""
        return (node for node in list(self._nodes.values()) if node.parent is not None)

    def node(self, node_id: int) -> Node:
        """
        Return the node with that id.

        Raises:
            UnknownNodeError: There is none.
        """
        try:
            return self._nodes[node_id]
        except KeyError:
            raise UnknownNodeError(
                f"This conversation has no node {node_id}: see its tree for those that it has."
            ) from None

    def require(self, node: Node) -> None:
        """
        Check that the node is of this tree.

        Raises:
            UnknownNodeError: It is of another conversation.
        """
        if self._nodes.get(node.id) is not node:
            raise UnknownNodeError(f"{node!r} is not a node of this conversation.")

    def add(
        self,
        parent: Node,
        role: Role,
        content: str,
        *,
        token_ids: tuple[int, ...] | None = None,
        fingerprint: str | None = None,
        finish_reason: FinishReason | None = None,
        usage: Mapping[str, Any] | None = None,
        links: ToolLinks | None = None,
        key: bytes | None = None,
    ) -> Node:
        """
        Add a message after *parent* and return its node.

        Args:
            key: What `message_key` returns, if the caller has it; None computes it.
            parent, role, content, token_ids, fingerprint, finish_reason, usage, links: As in `Node`.
        """
        self.require(parent)
        node = Node(
            id=next(self._ids),
            parent=parent,
            role=role,
            content=content,
            key=message_key(parent.key, role, content, links) if key is None else key,
            token_ids=token_ids,
            fingerprint=fingerprint,
            finish_reason=finish_reason,
            usage=usage,
            links=links,
        )
        self._nodes[node.id] = node
        parent.children.append(node)
        return node

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        reached, pending = {self.root.id}, [self.root]
        while pending:
            node = pending.pop()
            for child in node.children:
                assert child.parent is node, f"{child!r} hangs under a node that is not its parent"
                assert child.id not in reached, f"{child!r} is reached twice"
                assert child.id > node.id, f"{child!r} is older than its parent"
                assert child.token_ids is None or child.role == "assistant", f"{child!r} has tokens"
                assert (child.token_ids is None) == (child.fingerprint is None), (
                    f"{child!r} by whom"
                )
                assert child.role is not None, f"{child!r} is a second root"
                key = message_key(node.key, child.role, child.content, child.links)
                assert child.key == key, f"{child!r} has the key of another"
                reached.add(child.id)
                pending.append(child)
        assert reached == set(self._nodes), "a node cannot be reached from the root"


Overflow = Literal["error", "drop_oldest"]
"""What happens when the context is full: an error, or the prompt leaves out the oldest turns."""


def turn_starts(path: Sequence[Node]) -> list[int]:
    """Return the indices at which turns begin: of a user's message that follows no other of a user."""
    return [
        index
        for index, node in enumerate(path)
        if node.role == "user" and (index == 0 or path[index - 1].role != "user")
    ]


class Window:
    """
    The turns of a session's path that are in its prompts.

    Owned by the session. A turn that was left out stays out, so that later prompts share a prefix.
    """

    def __init__(self) -> None:
        self._first: Node | None = None  # the oldest turn that is shown; None: all are

    def shown(self, path: Sequence[Node]) -> list[Node]:
        """Return the path without the turns that earlier prompts left out."""
        if self._first is None or self._first not in path:
            return list(path)
        return [*path[: turn_starts(path)[0]], *path[path.index(self._first) :]]

    def fitting(
        self,
        path: Sequence[Node],
        limit: int,
        measure: Callable[[Sequence[Node]], int],
        overflow: Overflow,
        *,
        has_more: bool = False,
    ) -> list[Node]:
        """
        Return the nodes of a path for a prompt; leaves turns out if it has *limit* tokens or more.

        The last turn of the path stays, unless a message follows it that is no node yet (*has_more*) and
        only fits without it.
        """
        shown = self.shown(path)
        if overflow == "drop_oldest" and measure(shown) >= limit:
            shown = self.leave_out(shown, limit // 2, measure)
            if has_more and measure(shown) >= limit and (starts := turn_starts(shown)):
                return shown[: starts[0]]
        return shown

    def leave_out(
        self, path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
    ) -> list[Node]:
        """Leave out the oldest turns of a path, in this prompt and in later ones."""
        shown = without_oldest(path, limit, measure)
        starts = turn_starts(shown)
        self._first = shown[starts[0]] if starts else None
        return shown


def without_oldest(
    path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
) -> list[Node]:
    """
    Return the path without its oldest turns, so that the prompt has at most *limit* tokens.

    The instructions before the first turn stay, and so does the last turn, even if it is too long.

    Args:
        path: Messages from the first on.
        limit: Most tokens of the prompt.
        measure: Returns the number of tokens of a prompt of these messages.
    """
    starts = turn_starts(path)
    instructions = path[: starts[0]] if starts else path
    for start in starts[:-1]:
        shortened = [*instructions, *path[start:]]
        if start > len(instructions) and measure(shortened) <= limit:
            return shortened
    return [*instructions, *path[starts[-1] :]] if starts else list(path)
