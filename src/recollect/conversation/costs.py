"""
What going on from each message of a tree would cost: where its KV is, and how long the rest takes.

Nothing is computed, and no look-up here counts as a use of KV.

The path to each node is not rendered from its beginning. What the template puts between two messages is
learned from a few renderings, and what is known of a node is what is known of its parent, with the node's
own text and blocks added. To check that, one path is encoded as a reply would encode it. Where the two
differ, some nodes are encoded one by one, and the others are marked as estimated.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal
from weakref import ref

from recollect.conversation.prompt import ToolSchemas
from recollect.conversation.tree import Node
from recollect.conversation.turn import ANSWERED, ModelParts
from recollect.engine.engine import Engine
from recollect.engine.tier import Rates
from recollect.errors import StoreError, TemplateError
from recollect.kv.blocks import PUBLIC, CachedBlock
from recollect.kv.record import Key
from recollect.text.tokenizer import Shown
from recollect.types import Message

Warmth = Literal["memory", "disk", "none"]

MOST_RENDERED: Final = 24
"""Paths of which it is learned what the template puts between messages: there are as many as pairs of
roles at the most."""
MOST_EXACT: Final = 32
"""Nodes that are encoded one by one where the template does not show all messages alike."""
MOST_COMPARED: Final = 64
"""Messages of the path that is encoded as a whole, to see whether the template shows it as it is taken to:
for each reply on it whose opening is not remembered, the encoder renders once more."""
MOST_EXACT_PATH: Final = 400
"""Messages of a path that is encoded as a whole because it is shown otherwise."""
NEXT: Final = "user"
"""Whose message is taken to come next."""


@dataclass(frozen=True, slots=True)
class GoingOn:
    """What the next reply would have to read."""

    tokens: int
    """Of the prompt before the next message, or up to the reply where a message is not answered yet."""
    in_memory: int
    on_disk: int
    """Beyond those in memory."""
    seconds: float | None
    """For reading from disk and computing, as measured; None where nothing was measured."""
    warmth: Warmth
    """Where the KV up to the message is, as far as KV can be reused."""
    is_estimated: bool = False
    """Whether the template shows the conversation otherwise than taken for granted here."""

    @property
    def to_compute(self) -> int:
        """Return how many tokens have no KV."""
        return self.tokens - self.in_memory - self.on_disk

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, without the warmth."""
        return {
            "tokens": self.tokens,
            "in_memory": self.in_memory,
            "on_disk": self.on_disk,
            "to_compute": self.to_compute,
            "seconds": None if self.seconds is None else round(self.seconds, 4),
            **({"estimated": True} if self.is_estimated else {}),
        }


@dataclass(slots=True)
class Work:
    """How much was done to find costs; for tests, and whoever wonders."""

    rendered: int = 0
    """Paths that the template rendered."""
    blocks: int = 0
    """Blocks that were looked up in memory or on disk."""
    encoded: int = 0
    """Tokens that were looked at."""


@dataclass(frozen=True, slots=True)
class Walk:
    """How far a prefix is known in memory and on disk: the blocks up to its last whole one."""

    length: int
    """Tokens of the prefix."""
    rest: tuple[int, ...]
    """Those after the last whole block."""
    key: Key | None
    """The name of the last whole block that has KV; None: one before has none, so nothing follows."""
    own: CachedBlock | None
    """That block in memory; None: it is not there."""
    public: CachedBlock | None
    """The same among public prefixes."""
    last: CachedBlock | None = None
    """The last block of the namespace's own in memory, whether anything follows or not."""
    in_memory: int = 0
    """Tokens, of a part of the next block too where nothing follows."""
    on_disk: int = 0
    """Beyond those."""


class Walks:
    """Follows prefixes through the cache and the store of an engine; changes nothing there."""

    def __init__(self, engine: Engine, namespace: str, work: Work) -> None:
        self._engine, self._work = engine, work
        self._size = engine.block_size
        self._cache, self._tier = engine.cache, engine.tier
        with engine.lock:
            root, public = self._cache.root(namespace), self._cache.root(PUBLIC)
        self.root: Final = Walk(0, (), root.key, root, public)

    def after(self, walk: Walk, token_ids: Sequence[int]) -> Walk:
        """Return how far a prefix is known that goes on with some tokens."""
        self._work.encoded += len(token_ids)
        rest = (*walk.rest, *token_ids)
        key, own, public = walk.key, walk.own, walk.public
        last, in_memory, on_disk = walk.last, walk.in_memory, walk.on_disk
        size, start = self._size, 0
        with self._engine.lock:
            while start + size <= len(rest) and (own is not None or public is not None):
                block = rest[start : start + size]
                self._work.blocks += 1
                next_own = _child(own, block)
                next_public = _child(public, block)
                if next_public is not None and not next_public.pins:
                    next_public = None
                if next_own is None and next_public is None:
                    break
                own, public = next_own, next_public
                last = own or last
                assert key is not None, "what is in memory has a name"
                key = own.key if own is not None else self._cache.names.after(key, block)
                in_memory, start = in_memory + size, start + size
        while key is not None and start + size <= len(rest):
            self._work.blocks += 1
            after = self._cache.names.after(key, rest[start : start + size])
            if self._is_stored(after):
                key, own, public = after, None, None
                on_disk, start = on_disk + size, start + size
            else:
                memory, disk = self._part(key, (own, public), rest[start : start + size])
                in_memory, on_disk = in_memory + memory, on_disk + disk
                key = own = public = None
        start = len(rest) - len(rest) % size if key is None else start
        length = walk.length + len(token_ids)
        return Walk(length, rest[start:], key, own, public, last, in_memory, on_disk)

    def known(self, walk: Walk) -> tuple[int, int]:
        """Return how many tokens have KV in memory, and on disk beyond those; parts of blocks too."""
        if walk.key is None:
            return walk.in_memory, walk.on_disk
        memory, disk = self._part(walk.key, (walk.own, walk.public), walk.rest)
        return walk.in_memory + memory, walk.on_disk + disk

    def _part(
        self, key: Key, after: Iterable[CachedBlock | None], rest: tuple[int, ...]
    ) -> tuple[int, int]:
        """Return how many tokens of the next block are there, in memory and on disk beyond."""
        if not rest or not self._engine.info.reuse.inside_blocks:
            return 0, 0
        self._work.blocks += 1
        with self._engine.lock:
            nodes = [block for block in after if block is not None]
            memory = max((node.children.nearest(rest)[1] for node in nodes), default=0)
        if self._tier is None:
            return memory, 0
        try:
            found = self._tier.store.find(key, rest, block_size=self._size, inside_block=True)
        except StoreError:
            return memory, 0  # the next restore tells what is wrong
        return memory, max(0, found.last_tokens - memory)

    def _is_stored(self, key: Key) -> bool:
        if self._tier is None:
            return False
        try:
            return self._tier.store.has_blocks([key])
        except StoreError:
            return False  # the next restore tells what is wrong


def _child(block: CachedBlock | None, token_ids: tuple[int, ...]) -> CachedBlock | None:
    return None if block is None else block.children.get(token_ids)


_Kind = tuple[str, bool]
"""Of a message, as templates tell them apart: its role, and whether it calls tools."""
_START: Final[_Kind] = ("", False)
_REPLY: Final[_Kind] = ("reply", False)
"""What a template opens for a reply that is to come."""


@dataclass(frozen=True, slots=True)
class _State:
    """A node, as its children go on from it."""

    walk: Walk
    pending: Shown = field(default_factory=lambda: Shown(""))
    """What is shown after that, and has to be encoded together with what follows."""


class Encodings:
    """
    What the messages of one tree add to a prompt of one model with some tools; nothing of where KV is.

    Whoever asks for costs in a tree again and again keeps it as long as the tree, so that no message is
    rendered, compared or encoded twice. May be shared by threads.
    """

    def __init__(self, model: ModelParts, tools: ToolSchemas) -> None:
        self._prompts: Final = ref(model.prompts)
        self.tools: Final = list(tools)
        self.between: Final[dict[tuple[_Kind, _Kind], str]] = {}
        """What the template puts between two messages."""
        self.refused: Final[set[tuple[_Kind, _Kind]]] = set()
        """Between which it cannot be told."""
        self.added: Final[dict[Node, tuple[array[int], Shown]]] = {}
        """The ids that a message adds to those before it, and what is encoded with what follows it."""
        self.as_shown: Final[dict[Node, bool]] = {}
        """Of nodes that were compared, whether the template shows their path as it is taken to."""

    def fits(self, model: ModelParts, tools: ToolSchemas) -> bool:
        """Return whether it is of a model, as it is loaded now, and of some tools."""
        return self._prompts() is model.prompts and self.tools == list(tools)


class Costs:
    """
    The costs in one tree, for one model and one namespace. Used once, on one thread.

    Invariant: a node's state is found from its parent's, and once.
    """

    def __init__(
        self,
        model: ModelParts,
        *,
        namespace: str = "",
        tools: ToolSchemas = (),
        known: Encodings | None = None,
    ) -> None:
        """
        Args:
            model: With which model one would go on.
            namespace: Whose KV counts.
            tools: What would be offered.
            known: What is known of the tree for that model and these tools, and gets what is found here.
        """
        self.work: Final = Work()
        """What was done so far."""
        self._engine, self._prompts = model.engine, model.prompts
        self._render = model.template.render
        self._known = Encodings(model, tools) if known is None else known
        self._walks = Walks(model.engine, namespace, self.work)
        self._rates = model.engine.speed.rates
        self._states: dict[Node, _State] = {}

    def of(self, nodes: Sequence[Node], *, first: Sequence[Node] = ()) -> dict[Node, GoingOn]:
        """
        Return what going on from each of some nodes would cost.

        Args:
            nodes: Of one tree, in any order; the root may be among them.
            first: Which of them are to be exact where not all can be, such as the tips of branches.
        """
        wanted = list(dict.fromkeys(nodes))
        if not wanted:
            return {}
        for node in _with_ancestors(wanted, self._states):
            self._states[node] = self._state(node)
        found = {node: self._going_on(node) for node in wanted}
        order = dict.fromkeys([*(one for one in first if one in found), wanted[-1], *wanted])
        if self._is_as_shown(next(iter(order))):
            return found
        for count, node in enumerate(order):
            is_short = count < MOST_EXACT and len(node.path()) <= MOST_EXACT_PATH
            exact = self._exact(node) if is_short else None
            found[node] = _estimated(found[node]) if exact is None else exact
        return found

    def blocks(self, node: Node) -> list[CachedBlock]:
        """Return the namespace's own blocks in memory, up to where one goes on from a node."""
        last = self._encoded(self._states[node], self._end_of(node)).last
        return [] if last is None else last.path()

    def _state(self, node: Node) -> _State:
        if node.parent is None:
            return _State(self._walks.root)
        before = self._states[node.parent]
        if node not in self._known.added:
            self._known.added[node] = self._added(before.pending, node.parent, node)
        ids, pending = self._known.added[node]
        return _State(self._walks.after(before.walk, ids) if ids else before.walk, pending)

    def _added(self, pending: Shown, parent: Node, node: Node) -> "tuple[array[int], Shown]":
        """Return the ids that a message adds after its parent, and what is encoded with what follows."""
        prompts, lead = self._prompts, self._lead(parent, node)
        cut = next(prompts.control.begins(lead), 0)
        ids, rest = array("i", self._ids(pending, lead[:cut])), Shown(lead[cut:])
        if node.role == "assistant" and prompts.is_own(node):
            ids.extend((*self._ids(rest), *(node.token_ids or ())))
            return ids, Shown("")
        return ids, rest.followed_by_said(node.content, prompts.control)

    def _ids(self, pending: Shown, more: str = "") -> list[int]:
        shown = Shown(pending.text + more, pending.breaks)
        return self._prompts.ids(shown) if shown.text else []

    def _encoded(self, state: _State, more: str = "") -> Walk:
        """Return the walk up to the end of what is shown, and of more of it."""
        ids = self._ids(state.pending, more)
        return self._walks.after(state.walk, ids) if ids else state.walk

    def _going_on(self, node: Node) -> GoingOn:
        state, ends = self._states[node], self._end_of(node)
        return self._cost(self._encoded(state), self._encoded(state, ends))

    def _cost(self, here: Walk, there: Walk) -> GoingOn:
        in_memory, on_disk = self._walks.known(there)
        needed = self._engine.info.reuse.warm_tokens(here.length)
        if here.length == 0 or in_memory >= needed:
            warmth: Warmth = "memory" if here.length else "none"
        else:
            warmth = "disk" if in_memory + on_disk >= needed else "none"
        computed = there.length - in_memory - on_disk
        seconds = _seconds(self._rates, computed, on_disk, self._engine.block_size)
        return GoingOn(there.length, in_memory, on_disk, seconds, warmth)

    def _end_of(self, node: Node) -> str:
        """Return what the template puts after a message, before the next one or its reply."""
        pair = _kind(node), _next_kind(node)
        if pair not in self._known.between and pair not in self._known.refused:
            self._learn(node)
        return self._known.between.get(pair, "")

    def _lead(self, parent: Node, node: Node) -> str:
        pair = _kind(parent), _kind(node)
        if pair not in self._known.between and pair not in self._known.refused:
            self._learn(node)
        if pair not in self._known.between:
            self._known.refused.add(pair)
        return self._known.between.get(pair, "")

    def _learn(self, node: Node) -> None:
        """Render the path to a node, and take note of what is between its messages."""
        path = node.path()
        kinds = [_START, *map(_kind, path), _next_kind(node)]
        pairs = list(pairwise(kinds))
        if self.work.rendered >= MOST_RENDERED:
            self._known.refused.update(pair for pair in pairs if pair not in self._known.between)
            return
        self.work.rendered += 1
        prompts, answers = self._prompts, kinds[-1] == _REPLY
        messages: list[Message] = [
            {**_plain(one.written_message()), "content": prompts.mark(number)}  # type: ignore[typeddict-item] # as templates take it
            for number, one in enumerate(path)
        ]
        if not answers:
            messages.append({"role": NEXT, "content": prompts.mark(len(path))})
        try:
            text = self._render(messages, add_generation_prompt=answers, tools=self._known.tools)
        except TemplateError:
            self._known.refused.update(pair for pair in pairs if pair not in self._known.between)
            return
        for number, pair in enumerate(pairs):
            mark = prompts.mark(number)
            between, found, after = text.partition(mark)
            if not found and not (answers and number == len(path)):
                self._known.refused.add(pair)  # it is not shown, or not in its place
                continue
            self._known.between.setdefault(pair, between)
            text = after if found else text

    def _is_as_shown(self, node: Node) -> bool:
        """Return whether the ids up to a node, or to one before it, are those that a reply would read."""
        path = node.path()[:MOST_COMPARED]
        node = path[-1] if path else node
        if node not in self._known.as_shown:
            ids = self._exact_ids(node)
            taken = [token for one in path for token in self._known.added[one][0]]
            taken += self._ids(self._states[node].pending, self._end_of(node))
            self._known.as_shown[node] = ids is None or ids == taken  # None: nobody can go on there
        return self._known.as_shown[node]

    def _exact(self, node: Node) -> GoingOn | None:
        ids = self._exact_ids(node)
        if ids is None:
            return None
        here = self._encoded(self._states[node]).length
        whole = self._walks.after(self._walks.root, ids)
        before = self._walks.after(self._walks.root, ids[: min(here, len(ids))])
        return self._cost(before, whole)

    def _exact_ids(self, node: Node) -> list[int] | None:
        """Return the ids as a prompt has them; None where the template refuses the path."""
        self.work.rendered += 1
        path = node.path()
        try:
            if _next_kind(node) == _REPLY:
                return self._prompts.encode(path, tools=self._known.tools).token_ids
            return self._prompts.encode_typed(path, "", self._known.tools).token_ids
        except TemplateError:
            return None


def _kind(node: Node) -> _Kind:
    return (node.role, node.calls_tools) if node.role is not None else _START


def _next_kind(node: Node) -> _Kind:
    """Return what comes after a node: its reply where it can be answered, or a user's message."""
    return _REPLY if node.role in ANSWERED else (NEXT, False)


def _plain(message: Message) -> dict[str, Any]:
    """Return a message without what a template shows beside its text."""
    return {
        name: value
        for name, value in message.items()
        if name not in ("tool_calls", "reasoning_content")
    }


def _with_ancestors(nodes: Iterable[Node], known: Mapping[Node, object]) -> list[Node]:
    """Return nodes and what is before them, parents first, without those that are known."""
    found: dict[Node, None] = {}
    for node in nodes:
        missing, at = [], node
        while at not in known and at not in found:
            missing.append(at)
            if at.parent is None:
                break
            at = at.parent
        found |= dict.fromkeys(reversed(missing))
    return list(found)


def _seconds(rates: Rates, computed: int, on_disk: int, block_size: int) -> float | None:
    seconds = 0.0
    for count, each in (
        (computed, rates.compute_s_per_token),
        (-(-on_disk // block_size), rates.restore_s_per_block),
    ):
        if count and each is None:
            return None
        seconds += count * (each or 0.0)
    return seconds


def _estimated(cost: GoingOn) -> GoingOn:
    return GoingOn(
        cost.tokens, cost.in_memory, cost.on_disk, cost.seconds, cost.warmth, is_estimated=True
    )
