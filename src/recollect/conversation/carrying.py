"""
The KV of a branch out of a model into a portable file, and back into another's store.

Knows models and files; what of a file can be trusted is for `portable` to say.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.pinning import in_memory, require_tier
from recollect.errors import StoreError
from recollect.journal.portable import Branch, BranchHead, CarriedBlock, PortableFile
from recollect.kv import pins
from recollect.kv.blocks import Key, chained_key
from recollect.kv.disk import NewBlock
from recollect.types import Progress, no_progress

_PADDING: Final = 0
"""A token id that every vocabulary has."""
_BATCH_BYTES: Final = 16 << 20


def collect(model: Model, session: Session, *, progress: Progress = no_progress) -> Branch | None:
    """
    Return the KV up to where a session stands, after computing what is not there.

    The last block is filled up with tokens that mean nothing: its free slots would otherwise hold
    what was computed there before, of whatever conversation.

    Args:
        model: Whose session it is; it keeps KV on disk.
        session: At a named tip.
        progress: Called while something is computed.

    Returns:
        None where there is less than can be carried.

    Raises:
        StoreError: The model keeps no KV on disk.
        ContextFullError: The conversation does not fit the context.
    """
    engine = model.engine
    tier, size = require_tier(engine), engine.block_size
    ids = session.typed_ids()
    padded = [*ids, *[_PADDING] * (-len(ids) % size)]
    if engine.info.whole_blocks_only or len(padded) > engine.info.context_length:
        ids = padded = ids[: len(ids) // size * size]
    if not ids:
        return None
    blocks = np.empty((len(padded) // size, engine.info.bytes_per_block), np.uint8)
    with in_memory(engine, padded, session.namespace, progress=progress) as held:
        for number, cached in enumerate(held.blocks):
            tier.read_block(cached, memoryview(blocks[number]))
    head = BranchHead(session.name or "", tier.identity, model.profile, size)
    return Branch(head, ids, blocks)


def why_not(model: Model, file: PortableFile) -> str | None:
    """Return why a model here cannot use the KV in a file; None: it can."""
    if file.head is None:
        return "the file has none"
    if not model.engine.info.has_block_bytes:
        return "this model's runtime keeps its KV to itself"
    if model.engine.tier is None:
        return "no KV is kept on disk here (--kv-disk)"
    here, there, info = model.engine.tier.identity, file.head.identity, model.engine.info
    reasons = {
        f"it is of another model than {model.name}": there.fingerprint != here.fingerprint,
        f"{there.runtime} computed it, and here is {here.runtime}": there.runtime != here.runtime,
        "it is in another precision than here": there.kv_format != here.kv_format,
        "its blocks have another size than here": (file.head.block_size, file.bytes_per_block)
        != (info.block_size, info.bytes_per_block),
        "it has tokens that the model does not know": max(file.token_ids) >= info.vocab_size,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def bring_in(model: Model, file: PortableFile) -> int:
    """
    Put the KV of a file on disk, for `model` to restore; return how many tokens it is of.

    What is there already stays as it is. `why_not` was None.

    Raises:
        StoreError: It cannot be written, or there is no room for all of it.
        ConversationFileError: The file has changed meanwhile.
    """
    tier = require_tier(model.engine)
    with model.engine.lock:
        root = model.engine.cache.root().key
    keys: list[Key] = []
    batch: list[NewBlock] = []
    batch_bytes = 0
    for block in _named(root, file.blocks(), tier.store.chain_secret):
        keys.append(block.key)
        batch.append(block)
        batch_bytes += file.bytes_per_block
        if batch_bytes >= _BATCH_BYTES:
            tier.store.write(tier.identity, batch)
            batch, batch_bytes = [], 0
    tier.store.write(tier.identity, batch)
    if not pins.are_stored(tier.store, keys):
        raise StoreError("There is no room for all of it on disk: give it more (--kv-disk).")
    return len(file.token_ids)


def _named(root: Key, blocks: Iterable[CarriedBlock], secret: bytes) -> Iterator[NewBlock]:
    """Yield blocks under the names that they have in a store with this root and secret."""
    parent = root
    for block in blocks:
        key = chained_key(parent, block.token_ids, secret)
        yield NewBlock(key, parent, parent == root, tuple(block.token_ids), block.payload.data)
        parent = key
