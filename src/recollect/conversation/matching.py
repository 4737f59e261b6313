"""
Find what is known of messages that a client sends as text.

A client that sends the whole conversation each time gets its replies back as the token ids that were
generated. `KnownMessages` holds each message once, as a value, whoever said it and however many chats
continue from it; conversations and sessions come and go without it. `MessageIndex` finds a
conversation's messages in it while the program runs. `RememberedReplies` finds the ids of replies on disk
after a restart, for conversations that are not in the journal. Knows no runtime and encodes nothing.
"""

import heapq
import re
import threading
from array import array
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from sys import getsizeof
from typing import Final

from recollect.conversation.tools import NO_TOOLS, KnownTools, Tools
from recollect.conversation.tree import ROOT_KEY, Node, canonical, message_key, relinked, to_node
from recollect.engine.tier import DiskTier
from recollect.journal.records import NewNode
from recollect.kv.record import StoredReply
from recollect.text.tool_formats import ToolFormat
from recollect.types import Message, Role, ToolLinks

MOST_MESSAGES: Final = 20_000
"""
Messages of a model that are known, in all namespaces together.

Those found or added longest ago are forgotten first; replies are still known on disk, where KV is
kept there. Source: benchmarks/soak.py, where fourteen clients of the reference model say 4,000 in a
minute; a model with weights takes longer, and a chat that goes on comes back sooner.
"""

MOST_BYTES: Final = 64 << 20
"""Of these messages: their texts and token ids, and what holds them. Long texts are fewer then."""

_ENTRY_BYTES: Final = 750
"""What a message takes beside its text and its ids: the objects that hold it, its places in the
tables and among its siblings. Source: tracemalloc over 20,000 short chats, rounded up."""

_USAGE_BYTES: Final = 600
"""What the figures of a reply take. Source: tracemalloc, as above."""

_MOST_ANSWERS: Final = 8
"""Different sets of tools that are remembered with which one message was answered."""

_SHOWN_CHARACTERS: Final = 60

_MOST_LINES: Final = 8
"""The longest lines of a message, by which it is found when its beginning has changed."""
_LINE_BYTES: Final = 130
"""What each of these takes. Source: tracemalloc, as above."""
_FEW_CHARACTERS: Final = 16
"""Shorter texts are in many messages, and cost a few tokens to read again."""
_LINE: Final = re.compile(r"\n+|(?<=[.!?]) +")
"""What ends a line: for a text that is all in one, a sentence is."""
_MOST_FOLLOWING: Final = 256
"""Messages after a changed one that are looked at to tell what of them is said again."""


@dataclass(eq=False, slots=True)
class Known:
    """A message that was said, after those that were said before it. Owned by its index."""

    namespace: str
    key: bytes
    """As `Node.key`."""
    parent: "Known | None"
    """None: this is the beginning of all that is said in its namespace, and no message."""
    message: NewNode
    """Without its token ids, which take less memory as an array."""
    ids: "array[int] | None" = None
    tools: bytes | None = None
    """Which tools a reply could call; a name that `KnownTools` gave."""
    answers: list[bytes] = field(default_factory=list)
    """The same of the replies to this message, each once, the newest last."""
    next: dict[Role, list["Known"]] = field(default_factory=dict)
    """What was said after this, by who said it, sorted by text."""
    size: int = 0
    """The bytes that it is counted with."""
    after_system: bytes | None = None
    """Under which name it is known as a first question, for its instructions to be found."""
    lines: tuple[bytes, ...] = ()
    """Under which names its longest lines are known."""

    @property
    def text(self) -> str:
        """Return what the message says."""
        return self.message.content

    def path(self) -> list["Known"]:
        """Return the messages from the first to this one."""
        path, one = [], self
        while one.parent is not None:
            path.append(one)
            one = one.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Found:
    """The longest beginning of a list of messages that is known, as it was at that time."""

    path: tuple[tuple[bytes, NewNode], ...]
    """The messages with their keys, replies with the ids that were generated."""
    tools: Tools | None = None
    """Which the last of these replies could call; None: nobody knows, or there is none."""
    answers: tuple[Tools, ...] = ()
    """Which the replies to the last message could call that are known, the different ones."""
    spaced: tuple[int, str] | None = None
    """The first reply that nobody generated and that had other space at its ends, with its text then."""

    @property
    def messages(self) -> int:
        """Return how many messages these are."""
        return len(self.path)


@dataclass(frozen=True, slots=True)
class Change:
    """Where messages leave the conversation that they come closest to."""

    message: int
    """Which message, counted from 0."""
    role: str
    was: str
    """The known text from the first difference on, shortened."""
    is_now: str
    """The same of the new text."""
    line: int = 1
    """Of the message, where the first difference is; counted from 1."""
    again: int = 0
    """Characters after the difference that the earlier conversation had too, and that are read again."""
    after: int = 0
    """Characters after the difference, up to the last message that was compared."""

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line > 1 else ""
        return f"Message {self.message + 1}{line}: {self.was!r} became {self.is_now!r}."


class KnownMessages:
    """
    What was said in all namespaces of a model, up to a bound.

    Owned by a model; `MessageIndex` is how it is used. Safe from any thread.

    Invariants:
        1. Every message but the first of a namespace is among those after its parent, once, and
           these are sorted.
        2. A message was used no later than the one before it. So what is forgotten first is the
           end of a conversation, and what is left can be found.
        3. `held_bytes` is the sum over all messages. After each call it is at most `MOST_BYTES`,
           and there are at most `MOST_MESSAGES`.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.Lock()
        self.held_bytes = 0
        self.tools: Final = KnownTools()
        self._all: OrderedDict[tuple[str, bytes], Known] = OrderedDict()
        self._roots: dict[str, Known] = {}
        self._questions: dict[tuple[str, bytes], Known] = {}  # first questions after instructions
        self._lines: dict[bytes, Known] = {}  # which message had a long line last

    def __len__(self) -> int:
        """Return how many messages are known."""
        return len(self._all)

    def get(self, namespace: str, key: bytes) -> Known | None:
        """Return a message, or the root of its namespace; None where it is not known."""
        if key == ROOT_KEY:
            return self._roots.get(namespace)
        return self._all.get((namespace, key))

    def put(self, namespace: str, parent: Known | None, node: Node, *, is_new: bool) -> Known:
        """
        Return the message that a node has, which is known from now on; bounds are not looked at.

        Args:
            namespace: Whose it is.
            parent: What it follows; None: nothing.
            node: The message.
            is_new: Whether it was said just now, and not only found above what was.
        """
        known = self._all.get((namespace, node.key))
        if known is not None:
            if is_new and (known.ids is None or node.token_ids is not None):
                self._take(known, node.to_new())
            return known
        if parent is None:
            parent = self._roots.setdefault(namespace, _root(namespace))
        known = Known(namespace, node.key, parent, replace(node.to_new(), token_ids=None))
        self._all[namespace, node.key] = known
        known.lines = _line_names(namespace, parent.key, known.message)
        self._lines |= dict.fromkeys(known.lines, known)
        self._take(known, node.to_new(), is_new=True)
        if parent.parent is not None and parent.message.role == "system":
            known.after_system = _digest(node.content)
            self._questions[namespace, known.after_system] = known
        return known

    def tools_named(self, name: bytes) -> Tools | None:
        """Return a set of tools; None where it was forgotten."""
        return self.tools.get(name) if name else NO_TOOLS

    def touch(self, known: Known) -> None:
        """Note that a message was used; what comes before it is to be touched after it."""
        self._all.move_to_end((known.namespace, known.key))

    def respell(self, known: Known, text: str) -> str | None:
        """Let a message that nobody generated have another spelling; return the one before if it differs."""
        was = known.text
        if was == text:
            return None
        self._take(known, replace(known.message, content=text))
        return was

    def question(self, namespace: str, text: str) -> Known | None:
        """Return a message that says this after instructions; None where none is known."""
        return self._questions.get((namespace, _digest(text)))

    def with_lines_of(self, namespace: str, parent: bytes, message: NewNode) -> list[Known]:
        """Return messages in the same place that have long lines in common, those with most first."""
        names = _line_names(namespace, parent, message)
        found = Counter(self._lines[name] for name in names if name in self._lines)
        return [known for known, _ in found.most_common(2)]

    def forget(self) -> None:
        """Forget what was used longest ago, until the bounds are kept to."""
        while self._all and (len(self._all) > MOST_MESSAGES or self.held_bytes > MOST_BYTES):
            _, known = self._all.popitem(last=False)
            self.held_bytes -= known.size
            parent = known.parent
            assert parent is not None, "a root is not in the table"
            assert not known.next, "what follows is forgotten before it"
            siblings = parent.next[known.message.role]
            del siblings[bisect_left(siblings, _order(known), key=_order)]
            if not siblings:
                del parent.next[known.message.role]
            if parent.parent is None and not parent.next:
                del self._roots[known.namespace]
            place = (known.namespace, known.after_system or b"")
            if self._questions.get(place) is known:
                del self._questions[place]
            for name in known.lines:
                if self._lines.get(name) is known:
                    del self._lines[name]

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        with self.lock:
            ages = {place: age for age, place in enumerate(self._all)}
            for (namespace, key), known in self._all.items():
                parent = known.parent
                assert (known.namespace, known.key) == (namespace, key), "known under another name"
                assert parent is not None, "a root is not in the table"
                assert self.get(namespace, parent.key) is parent, "what comes before is forgotten"
                assert parent.next[known.message.role].count(known) == 1, "not after its parent"
                if parent.parent is not None:
                    assert ages[namespace, key] < ages[namespace, parent.key], (
                        "used after its parent"
                    )
            for one in (*self._all.values(), *self._roots.values()):
                for siblings in one.next.values():
                    assert siblings == sorted(siblings, key=_order), "not sorted"
                    assert all(self._all[one.namespace, s.key] is s for s in siblings), "forgotten"
            assert set(self._roots) == {namespace for namespace, _ in self._all}, (
                "an empty namespace"
            )
            for (namespace, name), known in self._questions.items():
                assert self._all[namespace, known.key] is known, "a question that is forgotten"
                assert known.after_system == name, "another question"
            for line, known in self._lines.items():
                assert self.get(known.namespace, known.key) is known, "a line of what is forgotten"
                assert line in known.lines, "another line"
            self.tools.check()
            held = sum(known.size for known in self._all.values())
            assert held == self.held_bytes <= MOST_BYTES, "bytes are not counted right"
            assert len(self._all) <= MOST_MESSAGES, "too many messages"

    def _take(self, known: Known, message: NewNode, *, is_new: bool = False) -> None:
        """Let a message be as it was said now, in its place among those that follow the same."""
        assert known.parent is not None, "a root says nothing"
        siblings = known.parent.next.setdefault(message.role, [])
        if not is_new:
            self.held_bytes -= known.size
            del siblings[bisect_left(siblings, _order(known), key=_order)]
        known.message = replace(message, token_ids=None)
        known.ids = None if message.token_ids is None else array("i", message.token_ids)
        insort(siblings, known, key=_order)
        known.size = _size(known.message, known.ids) + _LINE_BYTES * len(known.lines)
        self.held_bytes += known.size


class MessageIndex:
    """What is known of one namespace. Holds no state but where to look; safe from any thread."""

    def __init__(self, known: KnownMessages | None = None, namespace: str = "") -> None:
        self._known = KnownMessages() if known is None else known
        self._namespace = namespace

    def __len__(self) -> int:
        """Return how many messages are known, in all namespaces."""
        return len(self._known)

    def add(self, nodes: Sequence[Node]) -> None:
        """
        Let nodes be found, and what comes before them.

        Of several with the same messages, the last that was generated is found: its KV is the warmest.

        Args:
            nodes: Parents before their children; the first one's parent is above all of them.
        """
        if not nodes:
            return
        above = nodes[0].path()[:-1]
        with self._known.lock:
            known: dict[bytes, Known] = {}
            for place, node in enumerate((*above, *nodes)):
                parent = None if node.parent is None else known.get(node.parent.key)
                is_new = place >= len(above)
                known[node.key] = self._known.put(self._namespace, parent, node, is_new=is_new)
            for node in (*reversed(nodes), *reversed(above)):
                self._known.touch(known[node.key])
            self._known.forget()

    def note_tools(self, reply: Node, tools: Tools) -> None:
        """Remember with which tools a reply was generated, as long as it is known."""
        with self._known.lock:
            known = self._known.get(self._namespace, reply.key)
            if known is None or known.parent is None:
                return
            known.tools = self._known.tools.note(tools)
            answers = known.parent.answers
            if known.tools in answers:
                answers.remove(known.tools)
            answers.append(known.tools)
            del answers[:-_MOST_ANSWERS]

    def find(self, messages: Sequence[Message]) -> Found | None:
        """Return the longest known beginning of *messages*; None where not even the first is known."""
        keys = _keys(messages)
        with self._known.lock:
            path: list[Known] = []
            for key, message in zip(keys, messages, strict=True):
                known = self._known.get(self._namespace, key)
                if known is None or _thinks_otherwise(message, known.message):
                    break
                path.append(known)
            if not path:
                return None
            for one in reversed(path):
                self._known.touch(one)
            tools = next((one.tools for one in reversed(path) if one.tools is not None), None)
            answers = map(self._known.tools_named, path[-1].answers)
            found = Found(
                path=(),
                tools=None if tools is None else self._known.tools_named(tools),
                answers=tuple(one for one in answers if one is not None),
            )
            # What nobody generated here is as the client says it, to the last space.
            said = [
                (number, self._known.respell(one, to_node(messages[number]).content))
                for number, one in enumerate(path)
                if one.ids is None and one.message.role == "assistant"
            ]
            taken = [(one.key, one.message, one.ids) for one in path]
        spaced = next(((number, was) for number, was in said if was is not None), None)
        return replace(found, path=tuple(_with_ids(*one) for one in taken), spaced=spaced)

    def change(self, messages: Sequence[Message], found: Found | None) -> Change | None:
        """
        Return where *messages* leave what is known; None where they go on from its end.

        Args:
            messages: From the first on.
            found: What `find` said of them.
        """
        index = 0 if found is None else found.messages
        spaced = None if found is None else found.spaced
        if spaced is not None:
            index = spaced[0]
        if index == len(messages):
            return None
        new = [to_node(message) for message in messages[index : index + _MOST_FOLLOWING]]
        key = ROOT_KEY if found is None or not index else found.path[index - 1][0]
        with self._known.lock:
            if found is not None and spaced is not None:
                known = self._known.get(self._namespace, found.path[index][0])
                origins = [] if known is None else [(spaced[1], known)]
            else:
                origins = [(origin.text, origin) for origin in self._origins(key, new)]
            changes = [_change(index, was, new, _following(origin)) for was, origin in origins]
        likeliest = max(changes, key=lambda one: one[0], default=None)
        return None if likeliest is None else likeliest[1]

    def _origins(self, parent: bytes, new: Sequence[NewNode]) -> list[Known]:
        """Return the messages that the first of *new* is likeliest to have been, after *parent*."""
        message = new[0]
        origins = self._known.with_lines_of(self._namespace, parent, message)
        if parent == ROOT_KEY:
            # Other instructions before the same question.
            if message.role == "system" and len(new) > 1:
                known = self._known.question(self._namespace, new[1].content)
                if known is not None and known.parent is not None:
                    origins.append(known.parent)
        else:
            before = self._known.get(self._namespace, parent)
            siblings = [] if before is None else before.next.get(message.role, [])
            # An edit rarely changes the start, so the likeliest origin begins like the message. Where
            # texts are sorted, it is one of the two that the message would come between.
            place = bisect_left(siblings, message.content, key=lambda one: one.text)
            origins += siblings[max(0, place - 1) : place + 1]
        return origins

    def check(self) -> None:
        """
        Verify the invariants of what is known.

        Raises:
            AssertionError: One does not hold.
        """
        self._known.check()


def described(index: int, known: Node, new: Sequence[NewNode]) -> Change:
    """Return what differs between a known message and the first of those in its place."""
    following, pending = set[tuple[Role, str]](), [*known.children]
    while pending and len(following) < _MOST_FOLLOWING:
        node = pending.pop()
        following.add(_says(node.to_new()))
        pending += node.children
    return _change(index, known.content, new, following)[1]


def _change(
    index: int, was: str, new: Sequence[NewNode], following: "set[tuple[Role, str]]"
) -> tuple[int, Change]:
    """Return how many characters are the same, and where the first difference is."""
    message, text = new[0], new[0].content
    start = shared_characters(was, text)
    end = shared_characters(was[start:][::-1], text[start:][::-1])
    lines = set(_lines_of(was[start:])) & set(_lines_of(text[start:]))
    again = max(end if end >= _FEW_CHARACTERS else 0, sum(map(len, lines)))
    again += sum(max(1, len(one.content)) for one in new if _says(one) in following)
    return start + again, Change(
        message=index,
        role=message.role,
        was=was[start : start + _SHOWN_CHARACTERS],
        is_now=text[start : start + _SHOWN_CHARACTERS],
        line=text.count("\n", 0, start) + 1,
        again=again,
        after=sum(max(1, len(one.content)) for one in new) - start,
    )


def _following(known: Known) -> "set[tuple[Role, str]]":
    """Return what was said after a message, up to a number of messages."""
    following, pending = set[tuple[Role, str]](), [known]
    while pending and len(following) < _MOST_FOLLOWING:
        after = [one for siblings in pending.pop().next.values() for one in siblings]
        following |= {_says(one.message) for one in after[-_MOST_FOLLOWING:]}
        pending += after[-_MOST_FOLLOWING:]
    return following


def _says(message: NewNode) -> tuple[Role, str]:
    return message.role, canonical(message.role, message.content, message.links)


def _lines_of(text: str) -> list[str]:
    """Return the lines of a text that are long enough to tell it from others."""
    return [line for line in _LINE.split(text) if len(line) >= _FEW_CHARACTERS]


def _line_names(namespace: str, parent: bytes, message: NewNode) -> tuple[bytes, ...]:
    """Return the names of a message's longest lines in its place; a reply's are not looked for."""
    if message.role == "assistant":
        return ()
    place = f"{namespace}:{message.role}:".encode() + parent
    lines = heapq.nlargest(
        _MOST_LINES, {*_lines_of(message.content)}, key=lambda line: (len(line), line)
    )
    return tuple(_digest(line, place) for line in lines)


def _root(namespace: str) -> Known:
    return Known(namespace, ROOT_KEY, None, NewNode(role="system", content=""))


def _keys(messages: Sequence[Message]) -> list[bytes]:
    """Return the name of each message in its place."""
    keys, key = [], ROOT_KEY
    for message in map(to_node, messages):
        key = message_key(key, message.role, message.content, message.links)
        keys.append(key)
    return keys


def _thinks_otherwise(message: Message, known: NewNode) -> bool:
    """Return whether a client has changed what was thought before a reply; it may leave that out."""
    given = message.get("reasoning_content")
    thought = None if known.links is None else known.links.reasoning
    return bool(given) and str(given).strip() != (thought or "")


def _size(message: NewNode, token_ids: "array[int] | None") -> int:
    ids = 0 if token_ids is None else token_ids.itemsize * len(token_ids)
    usage = 0 if message.usage is None else _USAGE_BYTES
    links = message.links
    beside = () if links is None else (links.tool_call_id, links.name, links.reasoning)
    names = () if links is None else (*links.call_ids, *filter(None, beside))
    return _ENTRY_BYTES + getsizeof(message.content) + ids + usage + sum(map(getsizeof, names))


def _order(known: Known) -> tuple[str, bytes]:
    return known.message.content, known.key


def _digest(text: str, place: bytes = b"") -> bytes:
    digest = blake2b(place, digest_size=16)
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _with_ids(key: bytes, message: NewNode, ids: "array[int] | None") -> tuple[bytes, NewNode]:
    return key, message if ids is None else replace(message, token_ids=tuple(ids))


def shared_characters(first: str, second: str) -> int:
    """Return how many characters two texts begin with alike; long ones are compared in large steps."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_MARK: Final = "\ufdd1"
"""Stands before what was thought, and between that and what was said: a noncharacter, which no text needs."""


class RememberedReplies:
    """
    Replies of one model in one namespace, on disk beside the KV.

    Holds no state but where to look; safe from any thread.
    """

    def __init__(self, tier: DiskTier, fingerprint: str, namespace: str, form: ToolFormat) -> None:
        self._tier = tier
        self._fingerprint = fingerprint
        self._namespace = namespace
        self._format = form

    def note(self, reply: Node) -> None:
        """Remember a reply that was generated; nothing where it was not, or by another model."""
        if reply.token_ids is not None and reply.fingerprint == self._fingerprint:
            thought = None if reply.links is None else reply.links.reasoning
            text = reply.content if thought is None else _MARK.join(("", thought, reply.content))
            self._tier.writer.note_reply(self._name(reply.key), StoredReply(text, reply.token_ids))

    def recalled(self, parent: Node, message: NewNode) -> NewNode:
        """Return a message as it was generated after *parent*, or as it is."""
        if message.role != "assistant" or message.token_ids is not None:
            return message
        key = message_key(parent.key, message.role, message.content, message.links)
        found = self._tier.find_reply(self._name(key))
        if found is None:
            return message
        text, links = found.text, message.links or ToolLinks()
        parts = text.split(_MARK, 2)
        if len(parts) == 3 and not parts[0]:
            _, thought, text = parts
            if links.reasoning not in (None, thought):
                return message  # the client has changed it
            links = replace(links, reasoning=thought)
        elif links.reasoning is not None:
            return message
        links = relinked(text, replace(message, links=links), self._format)
        return replace(
            message,
            content=text,
            token_ids=found.token_ids,
            fingerprint=self._fingerprint,
            links=links if links != ToolLinks() else None,
        )

    def _name(self, key: bytes) -> bytes:
        return self._tier.store.reply_name(self._fingerprint, self._namespace, key)
