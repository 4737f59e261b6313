"""
Values that every part shares: sampling parameters, usage, messages.

Pure: no runtime, no disk, no clock.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, NotRequired, Self, TypedDict

from recollect.errors import InvalidParameterError

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: end of sequence or a stop string. `length`: the token or context limit. `cancelled`: the caller."""

Reason = Literal[
    "new",
    "tools_changed",
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

Role = Literal["system", "user", "assistant", "tool"]
"""`tool`: what a tool gave back."""

Profile = Literal["exact", "fast", "small"]
"""How numbers are computed: f32 throughout, f16 KV, or u8 KV."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, units done, units in all or None when unknown)."""


class FunctionCall(TypedDict):
    """Which function is called, and with what."""

    name: str
    arguments: str
    """JSON text."""


class MessageToolCall(TypedDict):
    """A call of a tool in a message, as OpenAI's API has it."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """A message, as chat templates and OpenAI's API have it."""

    role: Role
    content: str | None
    """None where an assistant's message has only calls."""
    tool_calls: NotRequired[Sequence[MessageToolCall]]
    """What the assistant calls."""
    tool_call_id: NotRequired[str]
    """Which call a tool's message answers."""
    name: NotRequired[str]
    """Which tool that was."""
    reasoning_content: NotRequired[str | None]
    """What the assistant thought before; templates that show no thoughts do without."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model calls, and with what."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""

    def to_dict(self) -> MessageToolCall:
        """Return the call as a message has it."""
        function: FunctionCall = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolLinks:
    """How a message hangs together with calls of tools."""

    call_ids: tuple[str, ...] = ()
    """The ids of the calls that the message makes, in their order; its text has the rest."""
    tool_call_id: str | None = None
    """Which call the message answers."""
    name: str | None = None
    """Which tool that was."""


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """Ignore progress."""


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidParameterError(f"{name} is {value!r}; it must be {allowed}.")


@dataclass(frozen=True, slots=True)
class Grammar:
    """
    What a reply must look like, made by `json_object`, `json_schema`, `regex` or `lark`.

    Needs the extra `recollect-llm[grammar]`. Whether it is valid is found out when a reply begins.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    """A schema as JSON text, a regular expression, or a grammar."""

    @classmethod
    def json_object(cls) -> Self:
        """Return the grammar of any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """
        Return the grammar of the JSON that a schema describes, its properties in the schema's order.

        Raises:
            InvalidParameterError: The schema is no JSON value.
        """
        try:
            return cls("json_schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as cause:
            raise InvalidParameterError(
                f"The JSON schema is no JSON value ({cause}): correct it."
            ) from cause

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Return the grammar of what a regular expression matches as a whole, in Rust's syntax."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Return a context-free grammar in llguidance's dialect of Lark; it begins at `start`."""
        return cls("lark", grammar)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """
    A token and how likely the model held it.

    The logarithm is natural, and of the model's own distribution: before grammar, bias, penalties
    and temperature, as OpenAI's API has it.
    """

    token_id: int
    token_bytes: bytes
    """What the token adds to the text; a part of a character where several tokens make one."""
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()
    """The likeliest tokens at this place, the likeliest first; the chosen one need not be among them."""

    @property
    def text(self) -> str:
        """Return the bytes as text, with U+FFFD for what is none by itself."""
        return self.token_bytes.decode("utf-8", "replace")


MOST_LOGPROBS: Final = 20
"""Most alternatives to a token that can be asked for. Source: OpenAI's API."""


MOST_STOP_STRINGS: Final = 64
"""Most stop strings of a reply. OpenAI's API takes 4, and what clients send is near that."""

MOST_STOP_CHARACTERS: Final = 8192
"""Most characters in all stop strings of a reply together: what finds them takes some 400 bytes and a
microsecond for each."""


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
    """A reply ends before the first of these strings; at most 64, of 8,192 characters together."""
    ignore_eos: bool = False
    """Go on at end of sequence, for benchmarks of a fixed length."""
    end_repetition: bool = True
    """
    End a reply that only repeats itself, by the rule of `engine.repetition`; never with `ignore_eos`.

    Sessions and the server do; a `Generator` goes on, whose caller decides about each token.
    """
    grammar: Grammar | None = None
    """What the reply must look like; it ends where the grammar says that it is complete."""
    logprobs: int | None = None
    """How many alternatives to tell of each token, besides its own log probability; None: nothing."""

    def __post_init__(self) -> None:
        limit = self.max_tokens
        _require(limit is None or limit >= 1, "max_tokens", limit, "at least 1")
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
        _require(seed is None or 0 <= seed < 2**64, "seed", seed, "from 0 to 18446744073709551615")
        _require(not isinstance(self.stop, str), "stop", self.stop, "a tuple of strings")
        _require_few_enough(self.stop)
        if not all(self.stop):
            raise InvalidParameterError(
                "stop has an empty string: give strings of at least one character."
            )
        told = self.logprobs
        _require(
            told is None or 0 <= told <= MOST_LOGPROBS,
            "logprobs",
            told,
            f"from 0 to {MOST_LOGPROBS}",
        )
        if self.grammar is not None and self.ignore_eos:
            raise InvalidParameterError(
                "ignore_eos cannot go with a grammar, which says where the reply ends: leave one out."
            )


def _require_few_enough(stop: Sequence[str]) -> None:
    """Refuse stop strings by their number and length; they may be too many to be shown."""
    if len(stop) > MOST_STOP_STRINGS:
        raise InvalidParameterError(
            f"stop has {len(stop):,} strings; give at most {MOST_STOP_STRINGS}."
        )
    characters = sum(map(len, stop))
    if characters > MOST_STOP_CHARACTERS:
        raise InvalidParameterError(
            f"The strings of stop have {characters:,} characters together; "
            f"give at most {MOST_STOP_CHARACTERS:,}."
        )


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
    """Of those, the ones whose KV was there already when the turn before had ended."""
    restored_tokens: int = 0
    """Of the reused, the ones whose KV came from disk."""
    computed_tokens: int
    """Of those, the ones fed to the model for this turn, before its first new token."""
    read_ahead_tokens: int = 0
    """Of the computed, the ones fed before the call: while it was typed, or nobody waited."""
    generated_tokens: int
    ttft_s: float
    """From the call to the first new token, in seconds."""
    prefill_tps: float | None
    """
    Tokens computed per second from the call to the first new token; None where none was computed.
    """
    decode_tps: float | None
    """Generated tokens per second after the first; None for a reply of fewer than two."""
    reason: Reason = "new"
    difference: str | None = None
    """What differs from the earlier prompt, in words, where `reason` says that something does."""

    @property
    def awaited_tokens(self) -> int:
        """Return how many tokens were computed while somebody waited."""
        return self.computed_tokens - self.read_ahead_tokens

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Return the rate, or None where nothing was done."""
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def running_average(known: float | None, newest: float) -> float:
    """Return an average in which the newest measurement counts a quarter; the first counts whole."""
    return newest if known is None else known + 0.25 * (newest - known)


def common_prefix_length(first: Iterable[object], second: Iterable[object]) -> int:
    """Return how many leading items two token histories, or characters two texts, share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
