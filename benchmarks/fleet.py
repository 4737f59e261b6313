"""
Conversations on a fleet of replicas, simulated: what is found again, and how uneven the load is.

A replica holds the KV of so many tokens, in whole blocks, and evicts what was used longest ago, of a
conversation its end first: as vLLM does. Nothing is computed, and replies take no time.
"""

import random
import statistics
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Replicas, and what is asked of them."""

    conversations: int
    replicas: int
    turns: int
    """Of each conversation."""
    tokens: int
    """That each turn adds, its reply among them."""
    held: int
    """Tokens whose KV one replica has room for."""
    unit: int
    """Tokens in a block."""
    begun: int = 0
    """Tokens before the first turn."""
    at_once: int = 1000
    """Conversations that go on side by side."""


Policy = Callable[[int, int, Sequence[int]], int]
"""Takes a conversation, the number of the request and each replica's load; returns a replica."""


def _by_conversation(conversation: int, _number: int, load: Sequence[int]) -> int:
    def weight(replica: int) -> bytes:
        return blake2b(f"{replica}/{conversation}".encode(), digest_size=8).digest()

    return max(range(len(load)), key=weight)


def _least_loaded(_conversation: int, _number: int, load: Sequence[int]) -> int:
    return min(range(len(load)), key=load.__getitem__)


def _in_turn(_conversation: int, number: int, load: Sequence[int]) -> int:
    return number % len(load)


POLICIES: Final[dict[str, Policy]] = {
    "by conversation": _by_conversation,
    "least loaded": _least_loaded,
    "in turn": _in_turn,
}


def order_of(fleet: Fleet, *, seed: int = 0) -> list[int]:
    """Return which conversation each request is of: their turns are among those of others."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    turns = [number for number in range(fleet.conversations) for _ in range(fleet.turns)]
    return sorted(turns, key=lambda number: number + dice.random() * fleet.at_once)


def simulate(fleet: Fleet, policy: Policy, *, seed: int = 0) -> dict[str, float]:
    """Return the share of reusable tokens that were reused, and the load of the busiest over the mean."""
    caches: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(fleet.replicas)]
    held, load = [0] * fleet.replicas, [0] * fleet.replicas
    lengths: Counter[int] = Counter()
    reusable = reused = 0
    for number, conversation in enumerate(order_of(fleet, seed=seed)):
        replica = policy(conversation, number, load)
        cache, before = caches[replica], lengths[conversation] or fleet.begun
        could = lengths[conversation] // fleet.unit * fleet.unit
        found = min(cache.pop(conversation, 0), could)
        held[replica] -= found
        reusable += could
        reused += found
        lengths[conversation] = before + fleet.tokens
        load[replica] += lengths[conversation] - found
        cache[conversation] = lengths[conversation] // fleet.unit * fleet.unit
        held[replica] += cache[conversation]
        while (excess := held[replica] - fleet.held) > 0:
            oldest = next(iter(cache))
            gone = min(cache[oldest], -(-excess // fleet.unit) * fleet.unit)
            held[replica] -= gone
            cache[oldest] -= gone
            if not cache[oldest]:
                del cache[oldest]
    return {"reused_share": reused / reusable, "busiest": max(load) / statistics.mean(load)}
