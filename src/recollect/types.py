"""
Values that every part shares: sampling parameters, usage, messages.

Pure: no runtime, no disk, no clock.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, TypedDict

from recollect.errors import InvalidParameterError

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: end of sequence or a stop string. `length`: the token or context limit. `cancelled`: the caller."""

Reason = Literal[
    "new",
    "system_changed",
    "message_changed",
    "template_rewrote",
    "evicted",
    "other_model",
]
"""
Why the tokens that were computed were not reused.

`new`: nothing earlier had them. `evicted`: they were computed once, and their KV is gone since.
`other_model`: the conversation was written with another model. The others: the prompt parts from an
earlier one there.
"""

MissReason = Literal[
    "checksum", "truncated", "format", "identity", "sealed", "key", "missing", "store"
]
"""
Why a stored block was not used.

`checksum`, `truncated`, `format`: it is not what was written. `identity`: of another model, runtime
or precision. `sealed`: encrypted with another key. `key`: its tokens do not give its name.
`missing`: noted, and not there. `store`: the database failed.
"""

Role = Literal["system", "user", "assistant"]

Profile = Literal["exact", "fast", "small"]
"""How numbers are computed: f32 throughout, f16 KV, or u8 KV."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, units done, units in all or None when unknown)."""


class Message(TypedDict):
    """A message as chat templates expect it."""

    role: Role
    content: str


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """Ignore progress."""


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidParameterError(f"{name} is {value!r}; it must be {allowed}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """
    How the next token is chosen, and when a reply ends.

    The defaults are greedy. `repetition_penalty` looks at the whole history, as in Hugging Face;
    `presence_penalty` and `frequency_penalty` at the reply alone, as in OpenAI's API.

    Raises:
        InvalidParameterError: A value is out of its range; the message names the range.
    """

    max_tokens: int | None = None
    """Most tokens in one reply; None: as many as the context holds."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to a number added to its logit; -inf bans it."""
    seed: int | None = None
    """None draws a new one for each reply."""
    stop: tuple[str, ...] = ()
    """A reply ends before the first of these strings."""
    ignore_eos: bool = False
    """Go on at end of sequence, for benchmarks of a fixed length."""

    def __post_init__(self) -> None:
        limit = self.max_tokens
        _require(limit is None or limit >= 1, "max_tokens", limit, "at least 1, or None")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty", penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), name, value, "a finite number")
        for token, bias in self.logit_bias.items():
            _require(
                bias < math.inf,
                f"logit_bias[{token}]",
                bias,
                "a finite number, or -inf to ban the token",
            )
        seed = self.seed
        _require(
            seed is None or 0 <= seed < 2**64, "seed", seed, "between 0 and 2**64 - 1, or None"
        )
        _require(not isinstance(self.stop, str), "stop", self.stop, "a tuple of strings")
        _require(all(self.stop), "stop", self.stop, "strings of at least one character")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """
    What one reply cost.

    `computed_tokens` is counted where the forward pass runs, `reused_tokens` where the plan is made;
    that they add up to `prompt_tokens` is therefore evidence and not a definition.
    """

    prompt_tokens: int
    """Tokens of the conversation before the reply."""
    reused_tokens: int
    """Of those, the ones whose KV was there already."""
    restored_tokens: int = 0
    """Of the reused, the ones whose KV came from disk."""
    computed_tokens: int
    """Of those, the ones fed to the model before the first new token."""
    generated_tokens: int
    ttft_s: float
    """From the call to the first new token, in seconds."""
    prefill_tps: float | None
    """Computed tokens per second before the first new token; None where none was computed."""
    decode_tps: float | None
    """Generated tokens per second after the first; None for a reply of fewer than two."""
    reason: Reason = "new"
    difference: str | None = None
    """What differs from the earlier prompt, in words, where `reason` says that something does."""

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Return the rate, or None where nothing was done."""
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def common_prefix_length(first: Iterable[object], second: Iterable[object]) -> int:
    """Return how many leading items two token histories, or characters two texts, share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
