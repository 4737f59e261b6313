"""
What the prefix cache took up and evicted: in numbers for people, and to say why a prompt was computed again.

The cache reports here. Nothing here decides what is reused or evicted.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from recollect.kv.blocks import CachedBlock
from recollect.kv.record import Key, Names

MOST_EVICTED_NAMES: Final = 32_768
"""Names of evicted blocks that are remembered, to say of a prompt what of it had been computed: a
million tokens in blocks of 32, in 4 MB. Those that were evicted first are forgotten first."""


@dataclass(slots=True)
class Traffic:
    """What came to the blocks of a namespace, and what went, in tokens."""

    tokens: int = 0
    """That have KV in memory now."""
    inserted_tokens: int = 0
    evicted_tokens: int = 0


class Accounts:
    """
    What a prefix cache took up and evicted.

    Owned by the cache, under the lock of `Memory`; `traffic` may be read from any thread without it.

    Invariants:
        1. Each namespace's traffic counts the tokens of its nodes.
        2. At most `MOST_EVICTED_NAMES` names are remembered.
    """

    def __init__(self, names: Names, block_size: int) -> None:
        self._names = names
        self._block_size = block_size
        self._traffic: dict[str, Traffic] = {}
        self._evicted: OrderedDict[Key, None] = OrderedDict()

    def traffic(self, namespace: str) -> Traffic:
        """Return what came to the blocks of a namespace and went."""
        return self._traffic.get(namespace) or Traffic()

    def inserted(self, cached: CachedBlock) -> None:
        """Take note of a new node."""
        traffic = self._traffic.setdefault(cached.namespace, Traffic())
        traffic.tokens += len(cached.token_ids)
        traffic.inserted_tokens += len(cached.token_ids)

    def removed(self, cached: CachedBlock) -> None:
        """Take note of a node that is gone, whatever for."""
        self._traffic[cached.namespace].tokens -= len(cached.token_ids)

    def evicted(self, cached: CachedBlock) -> None:
        """Take note of a node that made room for others."""
        self._traffic[cached.namespace].evicted_tokens += len(cached.token_ids)
        if len(cached.token_ids) == self._block_size:
            self._evicted[cached.key] = None
            self._evicted.move_to_end(cached.key)
        while len(self._evicted) > MOST_EVICTED_NAMES:
            self._evicted.popitem(last=False)

    def computed_tokens(self, root: CachedBlock, token_ids: Sequence[int]) -> int:
        """
        Return how many leading tokens had KV once, in whole blocks, as far as that is remembered.

        Counts as no use of them.

        Args:
            root: Of the namespace.
            token_ids: A prompt, shape `(n,)`.
        """
        size, tokens, key = self._block_size, 0, root.key
        node: CachedBlock | None = root
        while tokens + size <= len(token_ids):
            block = tuple(token_ids[tokens : tokens + size])
            node = None if node is None else node.children.get(block)
            if node is not None:
                key = node.key
            elif not self._evicted or (key := self._names.after(key, block)) not in self._evicted:
                break
            tokens += size
        return tokens
