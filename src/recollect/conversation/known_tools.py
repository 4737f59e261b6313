"""
Which tools replies could call, by a short name, up to a bound.

Clients send the same descriptions with every request, so each set of them is kept once, as JSON.
Pure bookkeeping.
"""

import json
from collections import OrderedDict
from hashlib import blake2b
from typing import Final

from recollect.conversation.tools import NO_TOOLS, Tools

MOST_BYTES: Final = 8 << 20
"""Of descriptions that are kept, for a whole model: 800 sets of twenty tools of 500 bytes."""


class KnownTools:
    """
    Sets of tools. Owned by what knows the replies, under whose lock it is used.

    Invariant: `held_bytes` is the sum over all sets, and at most `MOST_BYTES`.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._sets: OrderedDict[bytes, bytes] = OrderedDict()

    def note(self, tools: Tools) -> bytes:
        """Return the name of a set, which is known from now on unless it is larger than the bound."""
        if not tools.schemas:
            return b""
        text = json.dumps(tools.schemas).encode()
        name = blake2b(text, digest_size=16).digest()
        if name not in self._sets and len(text) <= MOST_BYTES:
            self._sets[name] = text
            self.held_bytes += len(text)
        if name in self._sets:
            self._sets.move_to_end(name)
        while self.held_bytes > MOST_BYTES:
            self.held_bytes -= len(self._sets.popitem(last=False)[1])
        return name

    def get(self, name: bytes) -> Tools | None:
        """Return a set; None where it was forgotten."""
        if not name:
            return NO_TOOLS
        text = self._sets.get(name)
        return None if text is None else Tools(tuple(json.loads(text)))

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        held = sum(map(len, self._sets.values()))
        assert held == self.held_bytes <= MOST_BYTES, "bytes are not counted right"
