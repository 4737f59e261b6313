"""
The names of prefixes: a hash of all token ids up to a block's end, and of who may see them.

Pure: one prefix has one name, in memory, on disk and in files that are carried elsewhere.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np

Key = bytes

PUBLIC: Final = "*"
"""The namespace of what is marked public, which is no client's: what is pinned in it, all others find."""

DIGEST_BYTES: Final = 4
"""Of the digest of one token in its place: two that differ have the same one in 4 billion cases."""
MOST_DIGESTS: Final = 96
"""With a name after them they are a value of LMDB that can be sorted, of at most 511 bytes."""


def chained_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """
    Return the name of a prefix: a hash of the prefix before its last block, and that block's tokens.

    The first parent is the name of a namespace, so nothing is shared across namespaces.
    """
    return hashlib.blake2b(parent + _token_bytes(token_ids), digest_size=32).digest()


def chained_keys(root: Key, token_ids: Sequence[int], block_size: int) -> list[Key]:
    """Return the names of a prefix's blocks in order; the last may hold a part of one."""
    keys = [root]
    for start in range(0, len(token_ids), block_size):
        keys.append(chained_key(keys[-1], token_ids[start : start + block_size]))
    return keys[1:]


def branch_digests(parent: Key, token_ids: Sequence[int], secret: bytes = b"") -> bytes:
    """
    Return a short digest for each leading part of a block, one after the other: its place in order.

    Two blocks after the same one share as many leading digests as they share leading tokens. So the
    block that has the most in common with some tokens lies next to these in the order of digests.

    Args:
        parent: The name of what the block follows.
        token_ids: Its tokens, shape `(n,)`; those after the first `MOST_DIGESTS` do not count.
        secret: At most 64 bytes; with it, digests tell nobody else which tokens they are of, only
            how many tokens blocks have in common.
    """
    state = hashlib.blake2b(
        parent, digest_size=DIGEST_BYTES, key=secret, person=b"recollect branch"
    )
    digests = bytearray()
    for token in np.asarray(token_ids[:MOST_DIGESTS], np.int64):
        state.update(token.tobytes())
        digests += state.copy().digest()
    return bytes(digests)


def namespace_key(fingerprint: str, namespace: str = "", secret: bytes = b"") -> Key:
    """
    Return the first parent of a chain: what KV depends on besides tokens, and who may see it.

    Args:
        fingerprint: Of model, runtime and precision.
        namespace: Who shares.
        secret: At most 64 bytes; with it, the names of prefixes tell nobody else which text they are of.
    """
    content = f"{len(fingerprint)}:{fingerprint}:{namespace}".encode()
    return hashlib.blake2b(content, digest_size=32, key=secret).digest()


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, np.int64).tobytes()
