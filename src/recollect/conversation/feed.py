"""
What happens, told as events to whoever watches: conversations, replies, KV.

`Feed` owns the events of one process. Replies are told by whoever reads them; changes of conversations
are read from the journal, which notes them for all processes (`journal/changes`); what became warm or was
evicted is read from counters of the prefix cache. All of that is done by the feed's own thread, and only
while somebody watches, so the engine's thread does the same whether anybody does or not.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, time_ns
from typing import Any, Final

from recollect.conversation.conversation import Asked, Conversation
from recollect.conversation.event_log import Event, EventLog, Watch
from recollect.conversation.tree import DETACHED, Node
from recollect.encryption import Cipher
from recollect.engine.engine import Engine
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.errors import RecollectError
from recollect.journal.changes import Change, NamesOf
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.kv.accounts import Traffic
from recollect.text.reasoning import Begun, ReasoningDelta, ReplyReader
from recollect.text.tool_calls import CallRules, TextDelta

_log: Final = logging.getLogger(__name__)

MOST_TOLD: Final = 8_192
"""Events on their way to the feed's thread; where it is held up for longer, readers are told so."""
MOST_CONTENT: Final = 32_768
"""Characters of a message that are in its event; a longer one is to be read."""
LINGER_S: Final = 60.0
"""How long events are kept after the last reader of a namespace has gone: a browser that reloads comes
back within seconds."""
PAUSE_S: Final = 0.05
"""Between two looks at what has happened: pieces of a reply that come meanwhile are told as one."""
PAUSE_PER_WATCH_S: Final = 0.002
"""The pause grows with the readers, so that what they cost together has a bound. Source: to send one
chunk takes about 0.05 ms, so that readers take at most about 3 % of a core."""
SAMPLE_S: Final = 0.25
"""Between two looks at counters: prefill, and KV."""
_RETRY_S: Final = 5.0
"""After which a journal that could not be read is tried again."""


@dataclass(frozen=True, slots=True)
class AskedBy:
    """Who asked for a reply."""

    conversation: Conversation
    namespace: str
    """Within which alone it is told."""
    name: str | None
    """The branch that moves; None: none does."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What was told on some thread; the feed's thread makes an event of it."""

    namespace: str
    kind: str
    conversation_id: int | None
    """In the journal."""
    data: dict[str, Any]
    """Values of `item` and `parent` may be ids in the journal."""


class ToldReply:
    """Tells of one reply. Belongs to whoever reads it, on whose thread all of this is called."""

    def __init__(
        self,
        feed: "Feed",
        namespace: str,
        conversation: Conversation,
        read: ReplyGeneration,
        reader: Callable[[], ReplyReader],
    ) -> None:
        self.id: Final = f"reply_{time_ns():x}_{id(self):x}"
        self._feed = feed
        self._namespace = namespace
        self._conversation = conversation
        self._read = weakref.ref(read)
        self._make_reader = reader
        self._reader: ReplyReader | None = None
        self._progress = (0, 0)
        self._ended = False

    def tell(self, kind: str, **data: Any) -> None:
        """Tell something of the reply, if anybody watches."""
        told = {"reply": self.id, **data}
        conversation_id = self._conversation.journal_id
        self._feed.tell(self._namespace, kind, told, conversation_id=conversation_id)

    def piece(self, piece: str) -> None:
        """Tell a piece of text that was just given out."""
        if not self._feed.is_watched(self._namespace):
            self._reader = None  # whoever comes later is told all of it
            return
        if self._reader is None:
            read, self._reader = self._read(), self._make_reader()
            piece = piece if read is None else read.text
        for event in self._reader.push(piece):
            if isinstance(event, TextDelta):
                self.tell("reply.delta", text=event.text)
            elif isinstance(event, ReasoningDelta):
                self.tell("reply.delta", reasoning=event.text)

    def end(self, reply: GeneratedReply | None, node: Node | None) -> None:
        """Tell that it is over, once, and as which node it is kept; None: nothing came of it."""
        if self._ended:
            return
        self._ended = True
        self._feed.forget_reply(self)
        node_id = None if node is None else self._conversation.saved_id(node)
        usage = None if reply is None else reply.usage.to_dict()
        reason = "cancelled" if reply is None else reply.finish_reason
        self.tell("reply.completed", item=node_id, usage=usage, finish_reason=reason)

    def progress(self) -> tuple[int, int] | None:
        """Return how much of the prompt has KV, of how much; None where that is not new. For the feed."""
        read = self._read()
        now = self._progress if read is None or self._ended else read.prefill_progress
        if now == self._progress:
            return None
        self._progress = now
        return now


Hook = Callable[[Event], object]
"""Called on the feed's thread with each event of a namespace; returns soon."""


class Feed:
    """
    The events of one process.

    Any thread tells and watches. The logs grow on the feed's own thread, which runs while somebody
    watches, and for `LINGER_S` after. Nothing is told of a namespace that nobody watches.

    Invariants:
        1. There is a log for each namespace that is watched, and for no other for longer than `LINGER_S`.
        2. At most `MOST_TOLD` events are on their way to the thread.
    """

    def __init__(self, home: Path, cipher: Cipher | None) -> None:
        """
        Watch nothing yet.

        Args:
            home: The data folder, which has the journal.
            cipher: Of that folder, if it is encrypted.
        """
        self._home, self._cipher = home, cipher
        self._lock = threading.Lock()
        self._logs: dict[str, EventLog] = {}
        self._left_s: dict[str, float] = {}  # by namespace without a reader: since when
        self._watches: list[Watch] = []
        self._told: deque[_Told] = deque()
        self._overflown = False
        self._replies: dict[int, ToldReply] = {}
        self._engines: dict[str, weakref.ref[Engine]] = {}
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}  # of the traffic of KV
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._journal: Journal | None = None
        self._version: int | None = None
        self._last_change: int | None = None  # None: to be asked for
        self._unreadable_until_s = 0.0

    @property
    def watches(self) -> int:
        """Return how many readers there are."""
        return len(self._watches)

    def is_watched(self, namespace: str) -> bool:
        """Return whether what happens in a namespace is told."""
        return namespace in self._logs

    def attach(self, name: str, engine: Engine) -> None:
        """Tell from now on what an engine's cache holds and evicts."""
        self._engines[name] = weakref.ref(engine)

    def watch(
        self,
        namespace: str = "",
        *,
        after: int | None = None,
        wake: Callable[[Watch], object] = lambda _: None,
    ) -> Watch:
        """
        Begin to watch a namespace; waits for the journal to be readable where nobody watched before.

        Args:
            namespace: Nothing of any other is told.
            after: The id of the last event that the reader knows; None: it begins now.
            wake: See `Watch.wake`.
        """
        with self._lock:
            log = self._logs.get(namespace)
            if log is None:
                if self._thread is None:
                    self._find_end()
                log = self._logs[namespace] = EventLog()
                self._look_at_kv({namespace}, is_first=True)
            watch = Watch(log, namespace, after=after, wake=wake, leave=self.leave)
            self._left_s.pop(namespace, None)
            self._watches.append(watch)
            if self._thread is None:
                self._stopping.clear()
                self._thread = threading.Thread(
                    target=self._run, name="recollect-events", daemon=True
                )
                self._thread.start()
        return watch

    def leave(self, watch: Watch) -> None:
        """Let a reader go; its namespace is told of for a while longer."""
        with self._lock:
            if watch in self._watches:
                self._watches.remove(watch)
                if all(other.namespace != watch.namespace for other in self._watches):
                    self._left_s[watch.namespace] = monotonic()

    def on_event(self, hook: Hook, namespace: str = "") -> Callable[[], None]:
        """
        Have a function called with each event of a namespace; return what ends that.

        It is called on the feed's thread. What it raises is logged, and harms nothing else; while it
        works, other readers wait, and the engine does not. Once that is ended, at most the call under way
        goes on.
        """

        def call(watch: Watch) -> None:
            for event in watch.rest():
                try:
                    hook(event)
                except Exception:  # noqa: BLE001 - a bug of the caller's, which others need not suffer from
                    _log.exception("what was to be called with %s has failed", event.kind)

        return self.watch(namespace, wake=call).close

    def tell(
        self,
        namespace: str,
        kind: str,
        data: Mapping[str, Any],
        *,
        conversation_id: int | None = None,
    ) -> None:
        """Tell that something happened; forgotten at once where nobody watches. Returns at once."""
        if namespace not in self._logs:
            return
        if len(self._told) >= MOST_TOLD:
            self._overflown = True
            return
        self._told.append(_Told(namespace, kind, conversation_id, dict(data)))

    def reply(
        self,
        read: ReplyGeneration,
        asker: AskedBy,
        at: Node,
        asked: Asked | None,
        begun: tuple[Begun, CallRules | None],
    ) -> ToldReply:
        """
        Tell that a reply has begun, and return what tells the rest.

        Args:
            read: The reply.
            asker: Whose it is.
            at: What it follows, or what its question follows.
            asked: Its question, where that is saved and not in the tree yet; None: there is none.
            begun: How reasoning stands where it begins, and what its calls look like.
        """
        conversation = asker.conversation
        make = partial(ReplyReader, *begun)
        told = ToldReply(self, asker.namespace, conversation, read, make)
        self._replies[id(told)] = told
        place = next((one for one in reversed(at.path()) if one.id != DETACHED), at)
        parent = conversation.saved_id(place) if asked is None else asked.ids[-1]
        told.tell("reply.started", parent=parent, branch=asker.name)
        return told

    def job(self, namespace: str, kind: str, model: str) -> Callable[[], None]:
        """Tell that a job of a model has begun, and return what tells its end."""
        begun_s, told = monotonic(), {"job": f"job_{time_ns():x}", "kind": kind, "model": model}
        self.tell(namespace, "job.started", told)

        def ended() -> None:
            self.tell(namespace, "job.ended", {**told, "seconds": round(monotonic() - begun_s, 3)})

        return ended

    def forget_reply(self, told: ToldReply) -> None:
        """Look no more at the progress of a reply. May be called while anything else here runs."""
        self._replies.pop(id(told), None)

    def close(self) -> None:
        """End the thread. May be called again; whoever watches later begins anew."""
        self._stopping.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        sampled_s = 0.0
        while not self._stopping.wait(max(PAUSE_S, PAUSE_PER_WATCH_S * len(self._watches))):
            if self._ends():
                return
            before = [log.next_id for log in list(self._logs.values())]
            if is_due := monotonic() - sampled_s >= SAMPLE_S:
                sampled_s = monotonic()
            self._take_all(samples=is_due)
            if before != [log.next_id for log in list(self._logs.values())]:
                for wake, watch in {one.wake: one for one in list(self._watches)}.items():
                    wake(watch)
        with self._lock:
            self._end()

    def _ends(self) -> bool:
        """Forget the namespaces that nobody has watched for a while; return whether none is left."""
        with self._lock:
            now = monotonic()
            for namespace, since_s in list(self._left_s.items()):
                if now - since_s >= LINGER_S:
                    del self._left_s[namespace], self._logs[namespace]
                    for name in list(self._engines):  # another may be attached meanwhile
                        self._seen.pop((name, namespace), None)
            if self._logs:
                return False
            self._end()
            return True

    def _end(self) -> None:
        self._thread = None
        self._logs.clear()
        self._left_s.clear()
        self._watches.clear()
        self._told.clear()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _take_all(self, *, samples: bool) -> None:
        """Bring what happened since the last time into the logs, in the order in which it did."""
        told = [self._told.popleft() for _ in range(len(self._told))]
        if self._overflown:
            self._overflown = False
            for log in list(self._logs.values()):
                log.forget()
        # A reply is in the journal before it is told to be complete, and what it answers before it begins.
        changes = self._changes()
        for one in _merged(told):
            if one.kind in ("reply.started", "reply.completed"):
                self._add_changes(changes)
            self._add(one)
        self._add_changes(changes)
        if samples:
            for reply in list(self._replies.values()):
                if (progress := reply.progress()) is not None:
                    reply.tell("reply.progress", computed=progress[0], tokens=progress[1])
            self._look_at_kv(list(self._logs), is_first=False)

    def _add(self, told: _Told) -> None:
        log = self._logs.get(told.namespace)
        if log is None:
            return
        label, names = None, dict[int, str]()
        ids = [value for value in _ids(told.data).values() if value is not None]
        if told.conversation_id is not None:
            label, names = self._names(told.conversation_id, ids)
        data = dict(told.data)
        for key, value in _ids(data).items():
            data[key] = None if value is None else names.get(value)
        log.add(told.kind, label, data)

    def _add_changes(self, changes: Iterator[Change]) -> None:
        for change in changes:
            if (log := self._logs.get(change.namespace)) is not None:
                kind, data = as_told(change)
                log.add(kind, change.conversation, data)

    def _names(self, conversation_id: int, node_ids: list[int]) -> NamesOf:
        try:
            if (journal := self._opened()) is not None:
                return journal.names(conversation_id, node_ids)
        except RecollectError as error:
            self._give_up(error)
        return None, {}

    def _changes(self) -> Iterator[Change]:
        """Yield what has changed in the journal, of which a part is in memory at a time."""
        try:
            journal = self._opened()
            if journal is None or (version := journal.version()) == self._version:
                return
            if self._last_change is None:
                self._last_change = journal.last_change()
                for log in list(self._logs.values()):
                    log.forget()
            is_all = False
            while not is_all:
                watched = list(self._logs)
                new = journal.changes(self._last_change, watched)
                if watched != list(self._logs):
                    continue  # a namespace that is watched since may have changed before they were read
                self._last_change, is_all = new.last, new.is_all
                yield from new.changes
                if not new.is_whole:
                    for log in list(self._logs.values()):
                        log.forget()
            self._version = version
        except RecollectError as error:
            self._give_up(error)

    def _opened(self) -> Journal | None:
        """Return the journal by a connection of its own; None: there is none, or it cannot be read."""
        if self._journal is None and monotonic() >= self._unreadable_until_s:
            path = self._home / JOURNAL_NAME
            if path.exists():  # a journal is not made by being watched
                self._journal = Journal.open(path, cipher=self._cipher)
                self._version = None
        return self._journal

    def _find_end(self) -> None:
        """Begin after what is in the journal now."""
        try:
            journal = self._opened()
            self._last_change = 0 if journal is None else journal.last_change()
        except RecollectError as error:
            self._last_change = None
            self._give_up(error)

    def _give_up(self, error: RecollectError) -> None:
        """Read nothing of the journal for a while; what happens there meanwhile is told afterwards."""
        _log.warning("changes of conversations are not told for now. %s", error)
        self._unreadable_until_s = monotonic() + _RETRY_S
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _look_at_kv(self, namespaces: Collection[str], *, is_first: bool) -> None:
        """Tell what became warm and what was evicted since the last look at some namespaces."""
        for name, ref in list(self._engines.items()):
            if (engine := ref()) is None:
                self._engines.pop(name, None)
                continue
            for namespace in namespaces:
                traffic = engine.cache.accounts.traffic(namespace)
                now = traffic.inserted_tokens, traffic.evicted_tokens
                before = self._seen.get((name, namespace), (0, 0))
                self._seen[name, namespace] = now
                if not is_first and (log := self._logs.get(namespace)) is not None:
                    _tell_kv(log, name, traffic, now[0] - before[0], now[1] - before[1])


def _tell_kv(log: EventLog, model: str, traffic: Traffic, warm: int, evicted: int) -> None:
    about = {"model": model, "in_memory": traffic.tokens}
    if warm > 0:
        log.add("kv.warm", None, {**about, "tokens": warm})
    if evicted > 0:
        log.add("kv.evicted", None, {**about, "tokens": evicted})


def _ids(data: Mapping[str, Any]) -> dict[str, int | None]:
    """Return those values that are ids in the journal."""
    return {key: data[key] for key in ("item", "parent") if key in data}


def _merged(told: list[_Told]) -> Iterator[_Told]:
    """Yield what was told, with pieces of the same kind of one reply that follow each other as one."""
    last: _Told | None = None
    for one in told:
        if (
            last is not None
            and last.kind == one.kind == "reply.delta"
            and last.data.keys() == one.data.keys()
            and last.data["reply"] == one.data["reply"]
        ):
            (key,) = one.data.keys() - {"reply"}
            last.data[key] += one.data[key]
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


CHECKPOINT: Final = "checkpoint:"
"""What the branches that a server's checkpoints are begin with."""


def as_told(change: Change) -> tuple[str, dict[str, Any]]:
    """Return a change of the journal as the kind and the data of an event."""
    if change.branch is not None and change.branch.startswith(CHECKPOINT):
        kind = "checkpoint.created" if change.kind == "branch.moved" else "checkpoint.deleted"
        return kind, {"checkpoint": change.branch.removeprefix(CHECKPOINT), "item": change.item}
    data: dict[str, Any] = {}
    if change.kind in ("conversation.created", "conversation.updated"):
        data = {"name": change.name}
    elif change.kind in ("branch.moved", "branch.deleted"):
        data = {"branch": change.branch, "item": change.item}
    elif change.kind == "message.renamed":
        data = {"item": change.item, "was": change.was}
    elif change.kind == "message.deleted":
        data = {"item": change.item}
    elif change.node is not None:
        node = change.node
        data = {
            "item": change.item,
            "parent": change.parent,
            "branch": change.branch,
            "role": node.role,
            "content": node.content if len(node.content) <= MOST_CONTENT else None,
            "created_at": int(node.created_at.timestamp()),
        }
    return change.kind, data
