"""
Texts that are read once and kept on disk, so that whatever begins with them starts warm.

A system prompt, or the beginning of a first message. No text is in what is kept of it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.tree import Tree
from recollect.engine.engine import Engine
from recollect.engine.pinning import pin_on_disk, require_tier
from recollect.errors import ConversationError
from recollect.journal.records import require_name
from recollect.kv import maintenance, pins
from recollect.kv.accounts import Pin
from recollect.kv.blocks import chained_keys
from recollect.types import Progress, no_progress

KIND: Final = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """A text whose KV is kept on disk."""

    name: str
    tokens: int
    """With what the template puts before it."""
    computed_tokens: int
    """Of these, the ones that had to be read; 0: it was warm before."""
    seconds: float
    """That it took."""
    stored_bytes: int
    since: datetime


def warm(
    engine: Engine,
    prompts: PromptEncoder,
    text: str,
    *,
    system: str | None,
    name: str,
    progress: Progress = no_progress,
) -> Warmed:
    """
    Read a text and keep its KV on disk until the name is dropped; see `Model.warm`.

    Raises:
        NameTakenError: Something else is kept under that name. Nothing was changed.
    """
    ids = beginning(prompts, text, system=system)
    require_name(name, "warm text")
    store = require_tier(engine).store
    with engine.lock:
        root = engine.cache.root().key
    prefix = chained_keys(root, ids, engine.block_size, store.chain_secret)[-1].hex()
    for pin in maintenance.pins(store):
        stored = pins.stored(store, pin)
        if pin.about.get("prefix") == prefix and stored.tokens >= pin.tokens:
            return _warmed(pin, pin.tokens, stored.stored_bytes)
    former = pins.find(store, name)
    is_older = former is not None and _is_older(former, engine)
    if is_older:
        pins.drop(store, name)
    try:
        made = pin_on_disk(
            engine, ids, "", name=name, about={"kind": KIND, "prefix": prefix}, progress=progress
        )
    except BaseException:
        if former is not None and is_older:
            pins.add(store, former)
        raise
    return _warmed(
        made.pin,
        len(ids),
        made.stored_bytes,
        computed_tokens=made.computed_tokens,
        seconds=made.seconds,
    )


def beginning(prompts: PromptEncoder, text: str, *, system: str | None) -> list[int]:
    """
    Return the token ids that a conversation begins with: its instructions, then a message's text.

    Raises:
        ConversationError: There is neither.
    """
    if not text and system is None:
        raise ConversationError("There is nothing to read: give a text or instructions.")
    tree = Tree()
    path = [] if system is None else [tree.add(tree.root, "system", system)]
    return prompts.encode_typed(path, text).token_ids


def _is_older(pin: Pin, engine: Engine) -> bool:
    """Return whether a pin is an earlier state of a text: of this model, under the same name."""
    identity = require_tier(engine).identity.digest().hex()
    return pin.about.get("kind") == KIND and pin.identity == identity


def _warmed(
    pin: Pin, tokens: int, stored_bytes: int, *, computed_tokens: int = 0, seconds: float = 0.0
) -> Warmed:
    return Warmed(
        name=pin.name,
        tokens=tokens,
        computed_tokens=computed_tokens,
        seconds=seconds,
        stored_bytes=stored_bytes,
        since=datetime.fromtimestamp(pin.created, UTC),
    )
