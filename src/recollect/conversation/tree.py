"""
A conversation as a tree of messages: nothing is ever changed or deleted, only added.

Beside the tree: messages as clients send them and as they are kept (a reply is kept as the text that
the model wrote, calls of tools included, and a client's calls become such a text again), and the
window, which decides which turns a full context leaves out. The caller measures prompts. Pure
bookkeeping: no runtime, no encoding.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from recollect.errors import InvalidParameterError, UnknownNodeError
from recollect.journal.records import ROLES, NewNode, NodeRecord
from recollect.text.tool_calls import CALL_START, ParsedReply, call_text, parse_reply
from recollect.types import FinishReason, Message, Role, ToolLinks


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
    parsed = parse_reply(content, links.call_ids, names=None, is_cut=True)
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


ROOT_KEY: Final = b""


def message_key(parent: bytes, role: Role, content: str, links: ToolLinks | None = None) -> bytes:
    """Return the name of a message in its place: a hash of what came before and what it says."""
    text = canonical(role, content, links)
    head = f"{role}:{len(text)}:".encode()
    return hashlib.blake2b(
        parent + head + text.encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


@dataclass(eq=False, slots=True, frozen=True)
class Node:
    """
    A message in its place.

    The root has no message: its role is None. Two nodes are equal only where they are the same.
    """

    id: int
    parent: "Node | None"
    role: Role | None
    content: str
    key: bytes = ROOT_KEY
    """The same for the same text after the same messages, in whatever tree."""
    token_ids: tuple[int, ...] | None = None
    """What the model generated; None for what it did not write."""
    fingerprint: str | None = None
    """The model that generated the tokens."""
    finish_reason: FinishReason | None = None
    usage: Mapping[str, Any] | None = None
    """As `Usage.to_dict` gives it."""
    links: ToolLinks | None = None
    """How the message hangs together with calls of tools; None where it does not."""
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

    def written_message(self) -> Message:
        """Return the message as templates get it, with calls of tools as the model wrote them."""
        assert self.role is not None, "the root is no message"
        return as_written(self.role, self.content, self.links)

    def to_new(self) -> NewNode:
        """Return the message as it is to be kept, or added, somewhere else too."""
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


def grown(records: Iterable[NodeRecord]) -> "tuple[Tree, dict[int | None, Node]]":
    """
    Return the tree of kept messages, parents first, and its nodes by their ids in the journal.

    The root is under None. The tree numbers messages from 1 in the order in which they were kept, which
    is also how they are numbered for people; see `Conversation.numbers`.
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
        4. A key is that of the parent, the role, the text and, of what a tool gave back, its call.
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
            key: As `message_key` gives it; None: it is not known yet.
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
"""What happens when the context is full: an error, or whole oldest turns are left out."""


def turn_starts(path: Sequence[Node]) -> list[int]:
    """Return where the turns of a path begin: the user's messages that follow something else."""
    return [
        index
        for index, node in enumerate(path)
        if node.role == "user" and (index == 0 or path[index - 1].role != "user")
    ]


class Window:
    """
    The turns of a session's path that its prompts are made of.

    Owned by the session. What is left out once stays out, so that the prompts after it begin alike.
    """

    def __init__(self) -> None:
        self._first: Node | None = None  # the oldest turn that is shown; None: all are

    def shown(self, path: Sequence[Node]) -> list[Node]:
        """Return the path without the turns that were left out before."""
        if self._first is None or self._first not in path:
            return list(path)
        return [*path[: turn_starts(path)[0]], *path[path.index(self._first) :]]

    def fitting(
        self,
        path: Sequence[Node],
        limit: int,
        measure: Callable[[Sequence[Node]], int],
        overflow: Overflow,
    ) -> list[Node]:
        """Return what is shown of a path, fewer turns of it where *limit* tokens are too many."""
        shown = self.shown(path)
        if overflow == "drop_oldest" and measure(shown) >= limit:
            return self.leave_out(shown, limit // 2, measure)
        return shown

    def leave_out(
        self, path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
    ) -> list[Node]:
        """Leave out the oldest turns of a path, as `without_oldest` does, from now on."""
        shown = without_oldest(path, limit, measure)
        starts = turn_starts(shown)
        self._first = shown[starts[0]] if starts else None
        return shown


def without_oldest(
    path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
) -> list[Node]:
    """
    Return the path without its oldest turns, so that at most *limit* tokens are left.

    The instructions before the first turn stay. So does the last turn, though it may be too long.

    Args:
        path: Messages from the first on.
        limit: Tokens that the prompt may have.
        measure: Returns the tokens of a prompt of these messages.
    """
    starts = turn_starts(path)
    instructions = path[: starts[0]] if starts else path
    for start in starts[:-1]:
        shortened = [*instructions, *path[start:]]
        if start > len(instructions) and measure(shortened) <= limit:
            return shortened
    return [*instructions, *path[starts[-1] :]] if starts else list(path)
