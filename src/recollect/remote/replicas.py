"""
Which replica of an engine serves which conversation, and what each has computed, as far as we know.

Conversations are spread by rendezvous hashing: when a replica is lost, only its own conversations move, and
they come back with it. `Ledger` remembers what was computed where, by chained hashes of whole blocks; it
knows nothing of what an engine has evicted since, and is only used to say why tokens were computed again.
Sequences whose KV is elsewhere share it, as others share blocks.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from recollect.engine.sequence import Memory, warm_tokens
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import RuntimeFailure
from recollect.kv.record import Key, chained_keys, namespace_key
from recollect.remote.wire import Api
from recollect.runtime.base import PassResult, Row, RuntimeInfo

PAUSE_S: Final = 5.0
"""How long a replica that was lost is asked last."""
MOST_REMEMBERED: Final = 1 << 17
"""Blocks in the ledger: of 32 tokens, those of 500 conversations of 8,000; about 20 MB."""


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, and what was asked of it."""

    api: Api
    asked: int = 0
    """Requests, those that were lost among them."""
    lost: int = 0
    """Requests that it did not answer, or broke off."""
    running: int = 0
    """Requests that have not ended."""
    reused_tokens: int = 0
    """Of prompts."""
    computed_tokens: int = 0
    """Of prompts."""
    generated_tokens: int = 0
    lost_until_s: float = field(default=0.0, repr=False)

    @property
    def url(self) -> str:
        """Return where it is."""
        return self.api.url

    @property
    def is_up(self) -> bool:
        """Return whether it answered when it was last asked, or that is a while ago."""
        return time.monotonic() >= self.lost_until_s


class Replicas:
    """All replicas of one engine. Safe from any thread."""

    def __init__(self, apis: Sequence[Api]) -> None:
        assert apis, "there is an engine"
        self._all: Final = tuple(map(Replica, apis))
        self._dropped: deque[Replica] = deque()
        self._lock = threading.Lock()

    @property
    def all(self) -> tuple[Replica, ...]:
        """Return them, in the order in which they were named."""
        with self._lock:
            self._end_dropped()
        return self._all

    def begin(self, session: str, without: Collection[Replica] = ()) -> Replica:
        """
        Return the replica for a request of a conversation, which is to be ended.

        Args:
            session: Of the conversation.
            without: Those that have failed at this request; they are taken where there is no other.
        """
        with self._lock:
            self._end_dropped()
            chosen = max(
                self._all,
                key=lambda one: (one not in without, one.is_up, _weight(one.url, session)),
            )
            chosen.asked += 1
            chosen.running += 1
            return chosen

    def end(
        self,
        replica: Replica,
        *,
        reused: int = 0,
        computed: int = 0,
        generated: int = 0,
        lost: bool = False,
    ) -> None:
        """Take note of what a request came to."""
        with self._lock:
            replica.running -= 1
            replica.reused_tokens += reused
            replica.computed_tokens += computed
            replica.generated_tokens += generated
            replica.lost += lost
            replica.lost_until_s = time.monotonic() + PAUSE_S if lost else 0.0

    def drop(self, replica: Replica) -> None:
        """Take note that nobody reads a request any more. May be called by a finalizer: takes no lock."""
        self._dropped.append(replica)

    def _end_dropped(self) -> None:
        """End the requests that nobody reads any more; the lock is held."""
        while self._dropped:
            self._dropped.popleft().running -= 1


def _weight(url: str, session: str) -> bytes:
    return blake2b(f"{url}\0{session}".encode(), digest_size=16).digest()


class Ledger:
    """
    What was computed, and by which replica: the newest blocks. Safe from any thread.

    Invariant: there are at most `MOST_REMEMBERED` blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._blocks: OrderedDict[Key, str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many blocks are remembered."""
        return len(self._blocks)

    def note(self, namespace: str | None, token_ids: Sequence[int], replica: str) -> None:
        """Remember that a replica has computed these tokens."""
        if namespace is None:
            return
        names = self._names(namespace, token_ids)
        with self._lock:
            for name in names:
                self._blocks[name] = replica
                self._blocks.move_to_end(name)
            while len(self._blocks) > MOST_REMEMBERED:
                self._blocks.popitem(last=False)

    def known(self, namespace: str | None, token_ids: Sequence[int]) -> tuple[int, str | None]:
        """Return how many leading tokens were computed before, and by whom the last of them."""
        if namespace is None:
            return 0, None
        found, replica = 0, None
        names = self._names(namespace, token_ids)
        with self._lock:
            for name in names:
                if (here := self._blocks.get(name)) is None:
                    break
                found, replica = found + self._size, here
        return found, replica

    def _names(self, namespace: str, token_ids: Sequence[int]) -> list[Key]:
        whole = len(token_ids) // self._size * self._size
        return chained_keys(namespace_key("", namespace), token_ids[:whole], self._size)


class RemoteMemory(Memory):
    """What sequences share whose KV is elsewhere: no blocks, and a ledger of what was computed."""

    def __init__(self, memory: Memory, ledger: Ledger) -> None:
        super().__init__(memory.info, memory.pool, memory.cache)
        self.ledger: Final = ledger


class RemoteSequence(TokenSequence):
    """A history whose KV is elsewhere. Invariants: those of `Sequence`, and it has no blocks."""

    memory: RemoteMemory

    @property
    def kept(self) -> int:
        """Return how many leading tokens are those that a stream was last told to go on with."""
        return self._id.kept

    def go_on_from(self, length: int) -> None:
        """Take note that a stream goes on with the first *length* tokens."""
        self._id.computed_to(length)

    def is_warm(self) -> bool:
        """Return whether all of it was computed before that could be found again, as far as is known."""
        known, _ = self.memory.ledger.known(self.namespace, self.token_ids)
        return warm_tokens(len(self), self.memory.info.reuse.unit) <= known

    def computed_before(self) -> int:
        """Return how many leading tokens were computed before, as far as is remembered."""
        known, _ = self.memory.ledger.known(self.namespace, self.token_ids)
        return known


_BEGINNING: Final = 256


def session_of(token_ids: Sequence[int]) -> str:
    """Return what keeps prompts with the same beginning together, where nobody knows a conversation."""
    beginning = ",".join(map(str, token_ids[:_BEGINNING]))
    return blake2b(beginning.encode(), digest_size=16).hexdigest()


class RemoteRuntime:
    """The `PagedRuntime` of an engine elsewhere: it says what that is, and computes nothing here."""

    def __init__(self, info: RuntimeInfo) -> None:
        self._info = info

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, num_blocks: int) -> None:
        """Do nothing: there is no KV here."""

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Refuse: a pass here would be a mistake."""
        raise _not_here(f"run a forward pass of {len(rows)} rows")

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Refuse where there is anything to copy."""
        if pairs:
            raise _not_here("copy KV")

    def warm_up(self) -> None:
        """Do nothing: the engine is warm, or not, by itself."""

    def read_block(self, block: int, into: memoryview) -> None:
        """Refuse."""
        raise _not_here(f"read {into.nbytes} bytes of the KV in block {block}")

    def write_block(self, block: int, content: memoryview) -> None:
        """Refuse."""
        raise _not_here(f"write {content.nbytes} bytes of KV into block {block}")

    def close(self) -> None:
        """Do nothing: each request has its own connection."""


def _not_here(what: str) -> RuntimeFailure:
    return RuntimeFailure(f"The KV is with an engine elsewhere: recollect cannot {what} here.")
