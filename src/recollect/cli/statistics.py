"""
What `/stats` shows: work done, work saved, and memory.

Reads counters; counts nothing itself.
"""

import psutil

from recollect.cli.models import format_bytes
from recollect.cli.state import LONG_PROMPT_TOKENS, Chat, format_duration


def statistics(chat: Chat) -> list[tuple[str, str]]:
    """Return names and values, in the order in which they are shown."""
    engine, totals = chat.model.engine, chat.totals
    pool, block_bytes = engine.pool, engine.info.bytes_per_block
    turns = sum(node.role == "assistant" for node in chat.session.tree.nodes())
    usage = chat.session.tip.usage
    history = 0 if usage is None else usage.prompt_tokens + usage.generated_tokens
    return [
        ("model", f"{chat.model.name}, profile {chat.model.profile}"),
        ("runtime", engine.info.name),
        ("conversation", f"{turns} turns in all branches, {len(chat.sessions)} sessions"),
        ("context", f"{history:,} of {chat.model.context_length:,} tokens in {chat.current}"),
        ("computed", f"{engine.computed_tokens:,} tokens in {engine.forward_passes:,} passes"),
        ("reused", f"{totals.reused_tokens:,} tokens in {totals.replies:,} replies"),
        ("saved", _saved(chat)),
        (
            "KV memory",
            f"{pool.used_blocks:,} of {pool.num_blocks:,} blocks used, {pool.free_blocks:,} free "
            f"({format_bytes(pool.used_blocks * block_bytes)} of "
            f"{format_bytes(pool.num_blocks * block_bytes)})",
        ),
        ("process memory", format_bytes(psutil.Process().memory_info().rss)),
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
