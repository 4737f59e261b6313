"""
Values that all parts share: messages, sampling parameters, grammars and usage.

Pure: no runtime, no disk, no clock.
"""

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Generic, Literal, NotRequired, Self, TypedDict, TypeVar

from recollect.errors import ContextFullError, InvalidParameterError, TokenIdError

FinishReason = Literal["stop", "length", "cancelled"]
"""Why a reply ended. `stop`: at an end token or a stop string. `length`: at the limit of tokens or of the
context. `cancelled`: by the caller."""
Ended = Literal["repetition", "call"]
"""More of the end of a reply that would have gone on: it repeated itself; it was inside a call of a tool."""

Reason = Literal[
    "new",
    "tools_changed",
    "system_changed",
    "message_changed",
    "template_rewrote",
    "evicted",
    "moved",
    "other_model",
]
"""
Why the tokens that were computed were not reused.

`new`: no earlier prompt had them. `evicted`: their KV was computed, and evicted since. `moved`: another
replica has it. `other_model`: another model generated the replies. The others name the first difference
from an earlier prompt.
"""

MissReason = Literal[
    "checksum", "truncated", "format", "identity", "sealed", "key", "missing", "store"
]
"""
Why a stored block was not used.

`checksum`, `truncated`, `format`: its bytes are not what was written. `identity`: it is of another model,
runtime or precision. `sealed`: it is encrypted with another key. `key`: its tokens do not hash to its key.
`missing`: its entry exists, but the block does not. `store`: the database failed.
"""

Role = Literal["system", "user", "assistant", "tool"]
"""Who a message is from. `tool`: a tool, with the result of a call."""

Profile = Literal["exact", "fast", "small"]
"""Precision of computing and of KV: f32 throughout, f16 KV, or u8 KV; see ARCHITECTURE.md."""

Parts = Literal["cut", "whole", "none"]
"""What of a computed block can be reused besides all of a full one: the beginning of any, all of one that is
not full, or nothing."""

RuntimeChoice = Literal["auto", "openvino", "llama"]
"""What runs a GGUF file: OpenVINO, llama.cpp, or the one of the two that suits file and machine."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the units that are done, and their total; None: it is not known."""


class FunctionCall(TypedDict):
    """The name and the arguments of a call, as in OpenAI's API."""

    name: str
    arguments: str
    """A JSON object as text."""


class MessageToolCall(TypedDict):
    """A call of a tool in a message, as in OpenAI's API."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """A message, as in OpenAI's API and as chat templates get it."""

    role: Role
    content: str | None
    """The text; None in an assistant's message that has calls alone."""
    tool_calls: NotRequired[Sequence[MessageToolCall]]
    """The calls that an assistant's message makes."""
    tool_call_id: NotRequired[str]
    """Id of the call that a tool's message answers."""
    name: NotRequired[str]
    """Name of that tool."""
    reasoning_content: NotRequired[str | None]
    """What the assistant thought before it said this; the chat template decides where it is shown."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that a reply makes."""

    id: str
    name: str
    """Name of the tool."""
    arguments: str
    """The arguments as JSON text, exactly as the model wrote them."""

    def to_dict(self) -> MessageToolCall:
        """Return the call in the form that messages have."""
        function: FunctionCall = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolLinks:
    """What belongs to a message beside its text: the calls it makes or answers, and its reasoning."""

    call_ids: tuple[str, ...] = ()
    """Ids of the calls that the message makes, in their order; names and arguments are in its text."""
    tool_call_id: str | None = None
    """Id of the call that the message answers."""
    name: str | None = None
    """Name of the tool that was called."""
    reasoning: str | None = None
    """What the model thought before it said the text."""
    format: str | None = None
    """Name of the format in which the calls are in the text; None: that of Hermes."""
    arguments: tuple[str, ...] = ()
    """The arguments of the calls as JSON text, where the format does not tell texts from numbers, and the
    tools' schemas did."""


def no_progress(_what: str, _done: int, _total: int | None) -> None:
    """Do nothing: the default where a `Progress` can be given."""


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        told = f"{name} is {value!r}; it must be {allowed}."
        raise InvalidParameterError(told, param=name.partition("[")[0])


@dataclass(frozen=True, slots=True)
class Grammar:
    """
    What a reply must match, made by `json_object`, `json_schema`, `regex` or `lark`.

    Needs the extra `recollect-llm[grammar]`. A grammar is compiled, and an invalid one refused, when a reply
    begins.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    """A JSON schema as text, a regular expression, or a Lark grammar."""

    @classmethod
    def json_object(cls) -> Self:
        """Return the grammar that accepts any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """
        Return the grammar that accepts what a JSON schema describes, with properties in the schema's order.

        Raises:
            InvalidParameterError: The schema is not a JSON value.
        """
        try:
            return cls("json_schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as cause:
            raise InvalidParameterError(
                f"The JSON schema is no JSON value ({cause}): correct it.", param="grammar"
            ) from cause

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Return the grammar that accepts what a regular expression, in Rust's syntax, matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Return a context-free grammar in llguidance's dialect of Lark, whose start rule is `start`."""
        return cls("lark", grammar)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """
    A token and its log probability.

    The natural logarithm of the model's own probability, before grammar, bias, penalties and temperature, as
    in OpenAI's API.
    """

    token_id: int
    token_bytes: bytes
    """The bytes that the token adds to the text, which may be a part of a character."""
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()
    """The most likely tokens at this place in descending order; the chosen one need not be among them."""

    @property
    def text(self) -> str:
        """Return the bytes as text, with U+FFFD for incomplete characters."""
        return self.token_bytes.decode("utf-8", "replace")


MOST_LOGPROBS: Final = 20
"""Most alternatives per token that can be requested. Source: OpenAI's API."""


MOST_STOP_STRINGS: Final = 64
"""Most stop strings of a reply. OpenAI's API accepts 4, and clients send about as many."""

MOST_STOP_CHARACTERS: Final = 8192
"""Most characters of all stop strings of a reply: searching takes about 400 bytes and 1 us for each."""


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
    """Most tokens of the reply; None: as many as fit into the context."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Numbers that are added to the logits of token ids; -inf bans a token."""
    seed: int | None = None
    """Seed of the random numbers; None: a new one for each reply."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these strings. At most 64, with 8,192 characters in all."""
    ignore_eos: bool = False
    """Whether end tokens do not end the reply, for benchmarks of a fixed length."""
    end_repetition: bool = True
    """
    End a reply that only repeats itself, by the rule of `engine.repetition.Repetition`; not with
    `ignore_eos`.

    Sessions and the server do; a `Generator` goes on, whose caller decides about each token.
    """
    grammar: Grammar | None = None
    """What the reply must match. It ends when the grammar is complete."""
    reasoning_budget: int | None = None
    """
    Most tokens of reasoning, after which it is ended and the answer begins; None: as many as the model
    wants. Only where the model's template has marks of reasoning.
    """
    logprobs: int | None = None
    """Number of alternatives that are reported for each token, besides its log probability; None: neither."""

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
                "stop has an empty string: give strings of at least one character.", param="stop"
            )
        budget = self.reasoning_budget
        _require(budget is None or budget >= 0, "reasoning_budget", budget, "0 or more")
        told = self.logprobs
        _require(
            told is None or 0 <= told <= MOST_LOGPROBS,
            "logprobs",
            told,
            f"from 0 to {MOST_LOGPROBS}",
        )
        if self.grammar is not None and self.ignore_eos:
            raise InvalidParameterError(
                "ignore_eos cannot go with a grammar, which says where the reply ends: leave one out.",
                param="ignore_eos",
            )

    def with_recommended(self, makers: Mapping[str, float], named: Collection[str]) -> Self:
        """
        Return these parameters, as a model's makers recommend where somebody named none.

        Args:
            makers: As `recommended` returns it.
            named: The parameters that somebody asked for, which stay. Who asks for temperature 0 wants
                greedy replies: nothing is changed then.
        """
        if "temperature" in named and not self.temperature:
            return self
        left: dict[str, Any] = {name: x for name, x in makers.items() if name not in named}
        return replace(self, **left)

    def told(self, seed: int) -> dict[str, float] | None:
        """Return what `Usage.sampling` says of a reply with this seed."""
        plain = {one.name: one.default for one in fields(self)}
        names = (*SAMPLING, *_PENALTIES) if self.temperature else _PENALTIES
        changed = {name: getattr(self, name) for name in names}
        told = {name: x for name, x in changed.items() if x != plain[name]}
        return told | {"seed": seed} if self.temperature else told or None


def _require_few_enough(stop: Sequence[str]) -> None:
    """Check the number and the length of stop strings, without quoting them in the error."""
    if len(stop) > MOST_STOP_STRINGS:
        raise InvalidParameterError(
            f"stop has {len(stop):,} strings; give at most {MOST_STOP_STRINGS}.", param="stop"
        )
    characters = sum(map(len, stop))
    if characters > MOST_STOP_CHARACTERS:
        raise InvalidParameterError(
            f"The strings of stop have {characters:,} characters together; "
            f"give at most {MOST_STOP_CHARACTERS:,}.",
            param="stop",
        )


SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The parameters that makers of models recommend, by the names of generation_config.json."""


_PENALTIES: Final = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""The parameters that change which token is the likeliest, so that they count in greedy replies too."""


def recommended(said: Mapping[str, object]) -> dict[str, float]:
    """
    Return what a model's makers recommend of `SAMPLING`, without values that no sampling takes.

    Args:
        said: As generation_config.json has it. `do_sample: false` is greedy, whatever else it says;
            `do_sample: true` without a temperature is temperature 1, as in Hugging Face.
    """
    found: dict[str, float] = {"temperature": 1.0} if said.get("do_sample") is True else {}
    for name in SAMPLING:
        value = said.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        with suppress(InvalidParameterError, OverflowError, ValueError):
            # Rounded, as 0.7 is 0.699999988 in a file that has it as f32.
            number: Any = int(value) if name == "top_k" else float(f"{float(value):.6g}")
            SamplingParams(**{name: number})
            found[name] = number
    return {} if said.get("do_sample") is False or not found.get("temperature") else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """
    What one reply cost.

    `computed_tokens` is counted where forward passes run, `reused_tokens` where the cache is looked up. That
    they add up to `prompt_tokens` is evidence, since neither is computed from the other.
    """

    prompt_tokens: int
    """Tokens of the prompt."""
    reused_tokens: int
    """Tokens of the prompt whose KV existed when the turn before had ended."""
    restored_tokens: int = 0
    """Reused tokens whose KV was read from disk."""
    computed_tokens: int
    """Tokens of the prompt that were computed for this turn, before its first new token."""
    read_ahead_tokens: int = 0
    """Computed tokens that were computed before the call, while the message was typed or nobody waited."""
    generated_tokens: int
    drafted_tokens: int = 0
    """Guesses of what comes next that were verified, more than one in a pass."""
    accepted_tokens: int = 0
    """Guesses that were right: generated tokens that took no pass of their own."""
    reasoning_tokens: int = 0
    """Generated tokens of reasoning, its marks included."""
    ttft_s: float
    """From the call, or on a server from the request, to the first new token, in seconds: all of a wait."""
    prefill_tps: float | None
    """
    Tokens computed per second from when the engine has the prompt to the first new token; None where none
    was computed.
    """
    decode_tps: float | None
    """Generated tokens per second after the first one; None: there were fewer than two."""
    reason: Reason = "new"
    """Why computed tokens were not reused."""
    difference: str | None = None
    """A sentence about the first difference from an earlier prompt; None: `reason` names no difference."""
    lost_tokens: int = 0
    """
    Computed tokens that an earlier prompt had too, and that were computed again; 0: none.

    Counted where they were evicted, shown otherwise, or written by another model. Where a message or a
    tool has changed, in proportion to the characters that are the same as before.
    """
    sampling: Mapping[str, float] | None = None
    """
    How tokens were chosen, by the names of `SamplingParams`, with the seed that gives the reply again.
    Without a seed: greedily, under penalties; None: greedily.
    """

    @property
    def awaited_tokens(self) -> int:
        """Return the number of tokens that were computed after the call, while somebody waited."""
        return self.computed_tokens - self.read_ahead_tokens

    def evicted(self, tokens: int, *, moved: bool = False) -> "Usage":
        """
        Return the same for a prompt of which so many tokens had been computed, and are not there now.

        Args:
            tokens: How many.
            moved: Whether another replica has them, as far as is known; once told, it stays.
        """
        if tokens <= 0:
            return self
        if moved or self.reason == "moved":
            told = f"{tokens} tokens had been computed by another replica of the engine."
            return replace(self, reason="moved", difference=told, lost_tokens=tokens)
        told = f"{tokens} tokens had been computed, and are no longer in memory."
        return replace(self, reason="evicted", difference=told, lost_tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def check_append(
    token_ids: Sequence[int], length: int, vocab_size: int, context_length: int
) -> None:
    """
    Refuse tokens that cannot be appended to a history of *length* tokens.

    Raises:
        TokenIdError: There are none, or one is outside the vocabulary.
        ContextFullError: They do not fit the context.
    """
    if len(token_ids) == 0:
        raise TokenIdError("There are no tokens to append: give at least one.")
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise TokenIdError(
                f"Token id {token} is outside the vocabulary: ids go from 0 to {vocab_size - 1}."
            )
    needed = length + len(token_ids)
    if needed > context_length:
        raise ContextFullError(needed=needed, limit=context_length)


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Return the rate; None if there were no tokens or no time was measured."""
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def running_average(known: float | None, newest: float) -> float:
    """Return a moving average: a quarter of *newest* and three quarters of *known*, if there is one."""
    return newest if known is None else known + 0.25 * (newest - known)


def common_prefix_length(first: Iterable[object], second: Iterable[object]) -> int:
    """Return how many leading items two sequences, such as token ids, have in common."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


_Value = TypeVar("_Value")


class Remembered(Generic[_Value]):
    """
    Values by name that were made before, and take long to make. Safe from any thread.

    Invariant: `held_bytes` is the sum over all values, and at most `most_bytes`.
    """

    def __init__(self, size: Callable[[_Value], int], most_bytes: int) -> None:
        """
        Hold nothing.

        Args:
            size: Returns how many bytes a value takes.
            most_bytes: Of all; those used longest ago are forgotten.
        """
        self._size = size
        self.most_bytes: Final = most_bytes
        self.held_bytes = 0
        self._values: OrderedDict[bytes, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many values are remembered."""
        return len(self._values)

    def get(self, name: bytes) -> _Value | None:
        """Return the value of that name; None where it is not known."""
        with self._lock:
            value = self._values.get(name)
            if value is not None:
                self._values.move_to_end(name)
            return value

    def put(self, name: bytes, value: _Value) -> None:
        """Remember a value in place of another, and forget those that were used longest ago."""
        if self._size(value) > self.most_bytes:
            return
        with self._lock:
            if name in self._values:
                self.held_bytes -= self._size(self._values.pop(name))
            self._values[name] = value
            self.held_bytes += self._size(value)
            while self.held_bytes > self.most_bytes:
                self.held_bytes -= self._size(self._values.popitem(last=False)[1])

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        with self._lock:
            held = sum(map(self._size, self._values.values()))
            assert held == self.held_bytes <= self.most_bytes, "bytes are not counted right"
