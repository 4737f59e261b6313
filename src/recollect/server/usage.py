"""
What a reply cost, as clients are told: in each API's own fields, and in ours beside them.

Cached tokens are those that no forward pass was fed with: the prompt's, less the computed ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from recollect.types import Reason, Usage

Tier = Literal["memory", "disk", "memory+disk"]

_FEW_TOKENS: Final = 64
"""A prefill of fewer says little about speed: most of it is one pass's fixed cost."""


class PrefillSpeed:
    """How fast a model reads prompts, from the replies it gave. Used on the event loop alone."""

    def __init__(self) -> None:
        self._tokens_per_second: float | None = None

    def learn(self, usage: Usage) -> None:
        """Take note of a reply."""
        if usage.prefill_tps is not None and usage.awaited_tokens >= _FEW_TOKENS:
            known = self._tokens_per_second or usage.prefill_tps
            self._tokens_per_second = (known + usage.prefill_tps) / 2

    def time_saved_s(self, usage: Usage) -> float | None:
        """Return how long the reused tokens would have taken; None before anything long was read."""
        speed = self._tokens_per_second
        return None if speed is None else usage.reused_tokens / speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the replies to one request cost together; they share the prompt."""

    prompt_tokens: int
    computed_tokens: int
    """Of the prompt, in the reply that computed most of it."""
    reused_tokens: int
    restored_tokens: int
    """Of those, the ones whose KV came from disk."""
    generated_tokens: int
    ttft_s: float
    time_saved_s: float | None
    reason: Reason
    difference: str | None

    @property
    def cached_tokens(self) -> int:
        """Return the tokens of the prompt that were not computed."""
        return self.prompt_tokens - self.computed_tokens

    @property
    def tier(self) -> Tier | None:
        """Return where reused tokens came from; None where none were."""
        if not self.reused_tokens:
            return None
        if not self.restored_tokens:
            return "memory"
        return "disk" if self.restored_tokens == self.reused_tokens else "memory+disk"

    def chat(self) -> dict[str, Any]:
        """Return `usage` as chat completions and completions have it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
            "recollect": self.own(),
        }

    def responses(self) -> dict[str, Any]:
        """Return `usage` as the Responses API has it."""
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "recollect": self.own(),
        }

    def messages(self) -> dict[str, Any]:
        """Return `usage` as Anthropic has it: there, input tokens are those that were computed."""
        return {
            "input_tokens": self.computed_tokens,
            "cache_read_input_tokens": self.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.generated_tokens,
            "recollect": self.own(),
        }

    def own(self) -> dict[str, Any]:
        """Return what no other API has a field for."""
        return {
            "computed_tokens": self.computed_tokens,
            "reused_tokens": self.reused_tokens,
            "restored_tokens": self.restored_tokens,
            "tier": self.tier,
            "time_saved_s": None if self.time_saved_s is None else round(self.time_saved_s, 4),
            "ttft_s": round(self.ttft_s, 4),
            "reason": self.reason,
            "difference": self.difference,
        }

    def headers(self) -> dict[str, str]:
        """Return the same as headers; ASCII, whatever the conversation says."""
        return {
            f"x-recollect-{name.replace('_', '-')}": _header_value(value)
            for name, value in {"prompt_tokens": self.prompt_tokens, **self.own()}.items()
            if value is not None
        }


def cost(usages: Sequence[Usage], speed: PrefillSpeed, *, per_prompt: int | None = None) -> Cost:
    """
    Return what the replies to one request cost.

    Args:
        usages: Of the replies, in their order.
        speed: Of the model.
        per_prompt: How many of them in a row share a prompt; None: all do.
    """
    size = per_prompt or len(usages)
    groups = [usages[start : start + size] for start in range(0, len(usages), size)]
    # Of replies that share a prompt one computes it, and the others find what it left.
    most = [max(group, key=lambda usage: usage.computed_tokens) for group in groups]
    saved = [speed.time_saved_s(usage) for usage in most]
    return Cost(
        prompt_tokens=sum(usage.prompt_tokens for usage in most),
        computed_tokens=sum(usage.computed_tokens for usage in most),
        reused_tokens=sum(usage.reused_tokens for usage in most),
        restored_tokens=sum(usage.restored_tokens for usage in most),
        generated_tokens=sum(usage.generated_tokens for usage in usages),
        ttft_s=min(usage.ttft_s for usage in usages),
        time_saved_s=sum(seconds for seconds in saved if seconds is not None)
        if None not in saved
        else None,
        reason=most[0].reason,
        difference=most[0].difference,
    )


def recorded(values: Mapping[str, Any]) -> Usage:
    """Return the usage that the journal has of a reply; fields of other versions are left out."""
    known = {one.name for one in fields(Usage)}
    return Usage(**{name: value for name, value in values.items() if name in known})


def _header_value(value: object) -> str:
    return str(value).encode("ascii", "backslashreplace").decode().replace("\n", " ")
