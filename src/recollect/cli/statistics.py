"""
What `/stats` shows: work done, work saved, and memory.

Reads counters; counts nothing itself.
"""

import psutil

from recollect.cli.models import format_bytes
from recollect.cli.state import LONG_PROMPT_TOKENS, Chat, format_duration
from recollect.cli.terminal import printable
from recollect.engine.engine import Engine


def statistics(chat: Chat) -> list[tuple[str, str]]:
    """Return names and values, in the order in which they are shown."""
    engine, totals = chat.model.engine, chat.totals
    with engine.lock:  # one moment for all counters
        computed, passes = engine.computed_tokens, engine.forward_passes
        memory, pressure = _memory(engine), _pressure(engine)
    turns = sum(node.role == "assistant" for node in chat.session.tree.nodes())
    usage = chat.session.tip.usage
    history = 0 if usage is None else usage["prompt_tokens"] + usage["generated_tokens"]
    return [
        ("model", f"{chat.model.name}, profile {chat.model.profile}"),
        ("runtime", engine.info.name),
        ("kept as", _kept_as(chat)),
        ("conversation", f"{turns} turns in all branches, {len(chat.sessions)} sessions"),
        ("context", f"{history:,} of {chat.model.context_length:,} tokens in {chat.current}"),
        ("computed", f"{computed:,} tokens in {passes:,} passes"),
        ("reused", f"{totals.reused_tokens:,} tokens in {totals.replies:,} replies"),
        ("saved", _saved(chat)),
        ("KV memory", memory),
        ("KV pressure", pressure),
        *_disk(engine),
        ("process memory", format_bytes(psutil.Process().memory_info().rss)),
    ]


def _kept_as(chat: Chat) -> str:
    conversation = chat.session.conversation
    if not conversation.is_kept:
        return "not kept"
    return printable(conversation.name or "the date, from the first turn on")


def _memory(engine: Engine) -> str:
    """Return how the blocks are used: by sequences and pins, only by the cache, or not at all."""
    pool, block_bytes = engine.pool, engine.info.bytes_per_block
    with engine.lock:
        cached, used, free = engine.cache.evictable_blocks, pool.used_blocks, pool.free_blocks
    return (
        f"{used - cached:,} blocks in use, {cached:,} cached, {free:,} "
        f"free ({format_bytes(used * block_bytes)} of "
        f"{format_bytes(pool.num_blocks * block_bytes)} filled)"
    )


def _pressure(engine: Engine) -> str:
    with engine.lock:
        pinned = sum(cached.pins > 0 for cached in engine.cache.blocks())
    return (
        f"{engine.cache.evicted_blocks:,} blocks evicted, {engine.preemptions:,} preemptions, "
        f"{pinned:,} blocks pinned"
    )


def _disk(engine: Engine) -> list[tuple[str, str]]:
    """Return what the tier below memory has done, and why it does nothing where that is so."""
    if engine.tier is None:
        why = "--kv-disk 0" if engine.info.has_block_bytes else "this runtime keeps KV to itself"
        return [("KV on disk", f"none ({why})")]
    tier = engine.tier.statistics()
    work = (
        f"{tier.restored_tokens:,} tokens restored in {format_duration(tier.restore_s)}, "
        f"{tier.written_blocks:,} blocks written ({format_bytes(tier.written_bytes)}), "
        f"{tier.evicted_blocks:,} evicted"
    )
    misses = ", ".join(f"{count:,} {reason}" for reason, count in tier.misses.items())
    return [
        ("KV on disk", work if tier.error is None else f"off. {printable(tier.error)}"),
        *([("KV refused", f"{misses}: computed anew instead")] if misses else []),
    ]


def _saved(chat: Chat) -> str:
    saved_s, rate = chat.totals.saved_s, chat.totals.best_prefill_tps
    if saved_s is None or rate is None:
        return (
            f"unknown until a prompt of {LONG_PROMPT_TOKENS} new tokens shows how fast prefill is"
        )
    return (
        f"about {format_duration(saved_s)}: the reused tokens at {rate:,.0f} tok/s, the fastest "
        "long prompt of this chat"
    )
