"""
What requests share: the models that are loaded, turns to use them, and conversations open on them.

A model is loaded when it is first asked for and unloaded when others need its memory; system
prompts that every key may reuse are read again on each. Hub and admission belong to the event loop,
and long work happens on threads of its own. Knows no request and no API.
"""

import asyncio
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

from recollect.conversation.conversation import Conversation
from recollect.conversation.feed import Feed
from recollect.conversation.model import Model, beginning
from recollect.errors import MisuseError, RecollectError, UnknownModelError
from recollect.server.refusals import ApiError, stopping, too_busy

_T = TypeVar("_T")


def on_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """
    Begin some work on a thread of its own, which ends it whether anybody waits or not.

    The threads of `asyncio.to_thread` are few, so that one client's long work could hold all of
    them, and the loop does not close before they end. Here admission bounds how many there are, and
    the loop waits for none.
    """
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            result.set_exception(error)

    try:
        threading.Thread(target=run, name="recollect-request", daemon=True).start()
    except RuntimeError:  # told as any failure, so that whoever waits gives its turn back
        refused = ApiError(
            "The system has no thread left for this request: ask again later.",
            status=503,
            kind="server_error",
            code="out_of_threads",
            headers={"Retry-After": "10"},
        )
        result.set_exception(refused)
    return asyncio.wrap_future(result)


_log = logging.getLogger(__name__)

Loader = Callable[[str], Model]
"""Loads a model by the name that `recollect.load` takes; called on a thread."""


@dataclass(slots=True, eq=False)
class _Loaded:
    model: Model
    memory_bytes: int
    leases: int = 0
    last_used_s: float = field(default_factory=monotonic)


class Lease:
    """A model that stays loaded until the lease is given back."""

    def __init__(self, hub: "ModelHub", name: str, loaded: _Loaded) -> None:
        self._hub: ModelHub | None = hub
        self._loaded = loaded
        self.name: Final = name
        self.model: Final = loaded.model
        loaded.leases += 1
        loaded.last_used_s = monotonic()

    def release(self) -> None:
        """Allow the model to be unloaded again; calling it again does nothing."""
        hub, self._hub = self._hub, None
        if hub is not None:
            self._loaded.leases -= 1
            self._loaded.last_used_s = monotonic()


class ModelHub:
    """
    Models by name.

    What a client says chooses among the names that the operator gave; it is never a path, and
    never starts a download of anything else.

    Invariants:
        1. A model with a lease is loaded.
        2. The models loaded take at most the memory budget, or there is only one.
    """

    def __init__(
        self,
        load: Loader,
        names: Sequence[str],
        *,
        aliases: Mapping[str, str] | None = None,
        memory_bytes: int | None = None,
        weight_bytes: Callable[[str], int] = lambda _: 0,
        draft_bytes: int = 0,
        context_length: Callable[[str], int | None] = lambda _: None,
        on_load: Callable[[Model], object] = lambda _: None,
    ) -> None:
        """
        Args:
            load: See `Loader`.
            names: What may be loaded; the first is the default.
            aliases: Other names for those.
            memory_bytes: For weights and KV of all models together; None: no limit.
            weight_bytes: Returns what a model takes on disk, which is about what its weights take.
            draft_bytes: The same of the model that guesses for each, where one does.
            context_length: Returns how long the context of a model is that is not loaded; None: nobody
                knows.
            on_load: Called on the event loop with each model that was loaded; returns at once.
        """
        assert names, "a server has a model"
        self._load = load
        self.names: Final = tuple(dict.fromkeys(names))
        self.aliases: Final[Mapping[str, str]] = dict(aliases or {})
        """Other names, and which of `names` each stands for."""
        self._memory_bytes = memory_bytes
        self.weight_bytes: Final = weight_bytes
        self._draft_bytes = draft_bytes
        self.context_length: Final = context_length
        self._on_load = on_load
        self.feed: Feed | None = None
        """What tells of the replies of its models; None: each one's own."""
        self._loaded: Mapping[str, _Loaded] = {}  # replaced and never changed: threads look at it
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._given_up = asyncio.Event()
        self._threads_loading = 0
        self.failure: Exception | None = None
        """Why the default model could not be loaded."""

    @property
    def default(self) -> str:
        """Return the model of requests that name none."""
        return self.names[0]

    @property
    def is_loading(self) -> bool:
        """Return whether a thread is loading a model; it may go on after `close`."""
        return self._threads_loading > 0

    @property
    def is_ready(self) -> bool:
        """Return whether some model can answer now."""
        return bool(self._loaded)

    def loaded(self) -> dict[str, Model]:
        """Return what is loaded now; may be called on any thread."""
        return {name: one.model for name, one in self._loaded.items()}

    def lease(self, name: str) -> Lease | None:
        """Return a model that is loaded now; None where it is not. Give the lease back."""
        loaded = self._loaded.get(name)
        return None if loaded is None else Lease(self, name, loaded)

    def resolve(self, name: str | None) -> str:
        """
        Return which model a client means.

        Raises:
            UnknownModelError: None of those that it may ask for.
        """
        wanted = self.aliases.get(name or self.default, name or self.default)
        if wanted not in self.names:
            known = ", ".join(self.names)
            raise UnknownModelError(f"There is no model {name!r} here: choose one of {known}.")
        return wanted

    async def acquire(self, name: str | None) -> Lease:
        """
        Return a model, loaded if it was not; give the lease back.

        Raises:
            UnknownModelError: There is none of that name.
            ModelError: It cannot be loaded.
            ApiError: The models in use leave no memory for it, or the server stops.
        """
        wanted = self.resolve(name)
        if self._given_up.is_set():  # requests before this one have ended, so it was admitted
            raise stopping()
        while (loaded := self._loaded.get(wanted)) is None:
            task = self._loading.get(wanted)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._bring(wanted))
                self._loading[wanted] = task
                task.add_done_callback(lambda _: self._loading.pop(wanted, None))
            await self._unless_given_up(task)
            if self._given_up.is_set():
                raise stopping()
            # A client that goes away does not take the model from the others who wait, and each of
            # them is told what it failed with.
            await asyncio.shield(task)
        return Lease(self, wanted, loaded)

    def give_up(self) -> None:
        """Stop waiting for models that are loading, and refuse whoever asks for one from now on."""
        self._given_up.set()

    async def close(self) -> None:
        """Unload all models; replies that are still generated end as cancelled."""
        for task in list(self._loading.values()):
            await self._unless_given_up(task)
        for name in list(self._loaded):
            await self._unload(name)

    async def _unless_given_up(self, task: asyncio.Task[None]) -> None:
        """Wait for a task or for `give_up`; the task goes on where this is cancelled."""
        given_up = asyncio.ensure_future(self._given_up.wait())
        try:
            await asyncio.wait({task, given_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            given_up.cancel()

    async def _bring(self, name: str) -> None:
        async with self._one_at_a_time:
            await self._make_room(name)
            begun = monotonic()
            model = await on_thread(lambda: self._load_counted(name))
            drafting = 0 if model.draft_model is None else self._draft_bytes
            taken = self.weight_bytes(name) + drafting + model.kv_bytes
            self._loaded = {**self._loaded, name: _Loaded(model, taken)}
            if self.feed is not None:
                model.feed = self.feed
                self.feed.attach(name, model.engine)
            self._on_load(model)
            model.grammars.prepare_later()
            guessed = "" if model.draft_model is None else f", guessed by {model.draft_model},"
            _log.info("loaded %s%s in %.1f s", name, guessed, monotonic() - begun)
            if self._memory_bytes is not None and taken > self._memory_bytes:
                _log.warning(
                    "%s takes about %s bytes with its KV, and --memory allows %s: it "
                    "stays loaded alone; give less --kv-memory, or more --memory.",
                    name,
                    *(f"{size:,}" for size in (taken, self._memory_bytes)),
                )
            await self._unload_idle(keep=name)

    def _load_counted(self, name: str) -> Model:
        self._threads_loading += 1  # one at a time
        try:
            return self._load(name)
        finally:
            self._threads_loading -= 1

    async def _make_room(self, name: str) -> None:
        """Unload idle models, the least recently used first, until the weights of another fit."""
        if self._memory_bytes is None:
            return
        room = self._memory_bytes - self.weight_bytes(name) - self._draft_bytes
        while self._loaded and self._taken_bytes() > room:
            idle = self._idle()
            if not idle:
                raise ApiError(
                    f"The models in use leave no memory for {name}: ask again when they are done.",
                    status=503,
                    kind="server_error",
                    code="out_of_memory",
                    headers={"Retry-After": "10"},
                )
            await self._unload(idle[0])

    async def _unload_idle(self, *, keep: str) -> None:
        """Unload idle models while all exceed the budget: the KV memory of the new one is known now."""
        while self._memory_bytes is not None and self._taken_bytes() > self._memory_bytes:
            idle = [name for name in self._idle() if name != keep]
            if not idle:
                break
            await self._unload(idle[0])

    def _taken_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._loaded.values())

    def _idle(self) -> list[str]:
        """Return the models that nobody uses, the least recently used first."""
        idle = [(one.last_used_s, name) for name, one in self._loaded.items() if not one.leases]
        return [name for _, name in sorted(idle)]

    async def _unload(self, name: str) -> None:
        loaded = self._loaded[name]
        self._loaded = {other: one for other, one in self._loaded.items() if other != name}
        await asyncio.to_thread(loaded.model.close)
        _log.info("unloaded %s", name)


_WEIGHT_OF_THE_LAST: Final = 0.2
"""How much the newest request's duration counts in the mean: a handful of requests is remembered."""

_FIRST_GUESS_S: Final = 1.0
"""How long a request is taken to last before one of its key has ended."""


class Ticket:
    """A turn, until it is given back."""

    def __init__(self, admission: "Admission", key: str, weight: int) -> None:
        self._admission: Admission | None = admission
        self._key = key
        self._weight = weight
        self._begun_s = monotonic()

    def release(self) -> None:
        """Give the turn to whoever waits; calling it again does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back(self._key, self._weight, monotonic() - self._begun_s)


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request in line."""

    key: str
    weight: int
    number: int
    """In the order of arrival."""
    turn: asyncio.Future[None]


class Admission:
    """
    Turns, shared among keys: first come, first served within one, and the key with the fewest first.

    A key with nothing running does not wait for others' replies to end: it gets a turn beside
    them, and the engine parks the newest reply of the key with the most.

    Invariants:
        1. running <= concurrent, but for the first request of each key.
        2. At most `concurrent` keys have turns.
        3. Nobody waits while there is a turn for the first who does.
        4. At most `queue` wait. Of a full line, the key with the most gives up its newest place to one
           that has fewer even then.
    """

    def __init__(self, *, concurrent: int, queue: int) -> None:
        self._concurrent = concurrent
        self._queue = queue
        self._lines: dict[str, deque[_Waiting]] = {}
        self._numbers = count()
        self._turns: Counter[str] = Counter()
        # By key, so that nobody is told how long the replies of others are.
        self._mean_s: dict[str, float] = {}

    @property
    def running(self) -> int:
        """Return how many turns are taken."""
        return self._turns.total()

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a turn."""
        return sum(map(len, self._lines.values()))

    async def enter(self, weight: int = 1, *, key: str = "") -> Ticket:
        """
        Wait for a turn.

        Args:
            weight: How many replies are generated in it.
            key: Whose they are.

        Raises:
            ApiError: Too many wait already; with the seconds after which it is worth another try.
        """
        waiting = _Waiting(
            key, weight, next(self._numbers), asyncio.get_running_loop().create_future()
        )
        if key not in self._lines and self._may_begin(waiting):
            self._begin(waiting)
        else:
            self._stand_in_line(waiting)
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting in self._lines.get(key, ()):
                self._leave(waiting)
                self._call_next()  # the one behind may need less room
            elif not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self._give_back(key, weight)  # the turn came in the same moment
            raise
        return Ticket(self, key, weight)

    def check(self) -> None:
        """
        Verify the invariants, but for the first, which does not show in what there is.

        Raises:
            AssertionError: One does not hold.
        """
        assert all(turns > 0 for turns in self._turns.values()), "a turn was given back twice"
        assert len(self._turns) <= self._concurrent, "too many keys have turns"
        assert all(self._lines.values()), "an empty line is kept"
        heads = [line[0] for line in self._lines.values()]
        assert not heads or not self._may_begin(min(heads, key=self._place)), "a turn is left"
        assert self.waiting <= self._queue, "too many wait"

    def _may_begin(self, waiting: _Waiting) -> bool:
        """Return whether there is a turn for the first request in line of a key."""
        if not self._turns[waiting.key]:
            return len(self._turns) < self._concurrent
        return self.running + waiting.weight <= self._concurrent and not any(
            self._place(line[0]) < self._place(waiting) for line in self._lines.values()
        )

    def _place(self, waiting: _Waiting) -> tuple[int, int]:
        return self._turns[waiting.key], waiting.number

    def _stand_in_line(self, waiting: _Waiting) -> None:
        if self.waiting >= self._queue:
            fullest = max(self._lines.values(), key=len, default=deque[_Waiting]())
            if len(fullest) <= len(self._lines.get(waiting.key, ())) + 1:
                raise too_busy(self._retry_after_s(waiting.key))
            refused = fullest[-1]
            self._leave(refused)
            refused.turn.set_exception(too_busy(self._retry_after_s(refused.key)))
        self._lines.setdefault(waiting.key, deque()).append(waiting)

    def _retry_after_s(self, key: str) -> float:
        mean_s = self._mean_s.get(key, _FIRST_GUESS_S)
        return min(60.0, mean_s * (1 + self.waiting / self._concurrent))

    def _leave(self, waiting: _Waiting) -> None:
        line = self._lines[waiting.key]
        line.remove(waiting)
        if not line:
            del self._lines[waiting.key]

    def _begin(self, waiting: _Waiting) -> None:
        self._turns[waiting.key] += waiting.weight
        waiting.turn.set_result(None)

    def _give_back(self, key: str, weight: int, took_s: float | None = None) -> None:
        self._turns[key] -= weight
        if not self._turns[key]:
            del self._turns[key]
        if took_s is not None:
            known = self._mean_s.get(key, _FIRST_GUESS_S)
            self._mean_s[key] = known + _WEIGHT_OF_THE_LAST * (took_s - known)
        self._call_next()

    def _call_next(self) -> None:
        while self._lines:
            first = min((line[0] for line in self._lines.values()), key=self._place)
            if not self._may_begin(first):
                return
            self._leave(first)
            if not first.turn.done():
                self._begin(first)


_MOST_OPEN: Final = 256
"""Conversations of one model that stay open; an open one is its texts and token ids in memory."""


class OpenConversations:
    """Conversations by model and id; those used longest ago are closed first."""

    def __init__(self) -> None:
        self._open: WeakKeyDictionary[Model, OrderedDict[int, Conversation]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def conversation(
        self, model: Model, journal_id: int, *, namespace: str, node_id: int | None = None
    ) -> Conversation:
        """
        Return a conversation of the journal, open on a model.

        Args:
            model: Goes on with it.
            journal_id: Its id in the journal.
            namespace: Whose it is.
            node_id: In the journal, of a node that it must have; another process may have added it.

        Raises:
            UnknownConversationError: There is none in that namespace.
        """
        while True:
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                known = conversations.get(journal_id)
                if known is not None and _has(known, node_id):
                    self._remember(conversations, journal_id, known)
                    return known
            # Not under the lock: the journal may be held by others, and those who ask for what is
            # open need not wait for it.
            loaded = model.conversation(journal_id, namespace=namespace)
            loaded.shares_tips = True
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                if conversations.get(journal_id) is known:  # else another request was faster
                    self._remember(conversations, journal_id, loaded)
                    return loaded

    def add(self, model: Model, conversation: Conversation) -> None:
        """Take over a new conversation, which is in the journal by now."""
        assert conversation.journal_id is not None, "it is kept"
        conversation.shares_tips = True
        with self._lock:
            conversations = self._open.setdefault(model, OrderedDict())
            self._remember(conversations, conversation.journal_id, conversation)

    def forget(self, journal_id: int) -> None:
        """Close a conversation that was deleted."""
        with self._lock:
            for conversations in self._open.values():
                conversations.pop(journal_id, None)

    def _remember(
        self, conversations: OrderedDict[int, Conversation], journal_id: int, known: Conversation
    ) -> None:
        conversations[journal_id] = known
        conversations.move_to_end(journal_id)
        while len(conversations) > _MOST_OPEN:
            conversations.popitem(last=False)


def _has(conversation: Conversation, node_id: int | None) -> bool:
    return node_id is None or conversation.saved_node(node_id) is not None


def publish_later(model: Model, prompts: Sequence[str]) -> threading.Thread:
    """
    Begin to publish system prompts, and return the thread that does.

    It ends with the model. What cannot be published is told in the log, and the others are.
    """
    thread = threading.Thread(
        target=_publish, args=[model, prompts], name="recollect-public", daemon=True
    )
    thread.start()
    return thread


def _publish(model: Model, prompts: Sequence[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = beginning(model.prompts, "", system=prompt)
            made = model.public.publish(ids, idle=True)
        except MisuseError:
            return  # the model was unloaded meanwhile
        except RecollectError as error:
            _log.warning("public prompt %d is not shared on %s: %s", number, model.name, error)
        else:
            _log.info(
                "public prompt %d: %d tokens, %d of them read in %.1f s",
                number,
                made.tokens,
                made.computed_tokens,
                made.seconds,
            )
