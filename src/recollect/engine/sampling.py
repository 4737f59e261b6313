"""
Choose the next token from logits, and generate with that: append, rewind and fork in any order.

Choosing is pure: everything that it depends on is in its arguments. The random number of a position
comes from (seed, position) and penalties from the history, so a rewind takes all of it back without
any state to restore. A `Generator` does so for one sequence. Knows no text; `engine/reply.py` does.
"""

import math
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from copy import copy
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from recollect.engine.decoder import Ask, Decoder, Drawn, Likelihood
from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars, GrammarState
from recollect.engine.sequence import Sequence
from recollect.errors import (
    ConfigError,
    InvalidParameterError,
    MisuseError,
    RecollectError,
    RuntimeFailure,
)
from recollect.runtime.base import Logits
from recollect.text.reasoning import ReasoningWatch
from recollect.types import FinishReason, SamplingParams

Scores = npt.NDArray[np.float32]
TokenArray = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
LogProbs = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_BLOCK: Final = 256
"""Ids whose weights are summed, or whose scores are compared, together; then one block is searched, or
few of them. About the square root of a vocabulary, so that neither step is long."""

_FIRST_GUESS: Final = 128
"""Candidates that top_p sorts before it tries more: nearly always these hold the mass, and finding them
takes a tenth of the time that sorting more takes. Source: benchmarks/sampling.py."""

_ALL: Final = slice(None)
_LEAST_NUMBER: Final = float(np.finfo(np.float64).tiny)

_COOLEST: Final = float(np.finfo(np.float32).tiny)
_HOTTEST: Final = float(np.finfo(np.float32).max)
"""The temperatures that float32 can divide by. Beyond them a draw is greedy, or as if all logits were
equal, all the same."""


@dataclass(frozen=True, slots=True)
class Bias:
    """`SamplingParams.logit_bias` as arrays: made once for a reply, since there can be many."""

    ids: TokenArray
    values: Scores

    @classmethod
    def of(cls, params: SamplingParams) -> Self:
        """Return the biases of some parameters."""
        count = len(params.logit_bias)
        return cls(
            np.fromiter(params.logit_bias, np.int64, count),
            np.fromiter(params.logit_bias.values(), np.float32, count),
        )


def choose_token(
    logits: Scores,
    params: SamplingParams,
    *,
    history: TokenArray,
    reply_start: int,
    seed: int,
    allowed: Mask | None = None,
    bias: Bias | None = None,
) -> int:
    """
    Return the token id that follows *history*.

    Args:
        logits: Shape `(vocab_size,)`; not changed.
        params: What to do with them.
        history: All token ids so far, shape `(n,)`.
        reply_start: Where the reply begins in *history*; presence and frequency count from there.
        seed: The seed of the reply; unused when greedy.
        allowed: The tokens to choose among, shape `(vocab_size,)`; None: all. Applied before
            everything else.
        bias: Of the parameters, where the caller has it already.

    Raises:
        InvalidParameterError: All that is allowed is banned by `logit_bias`.
        RuntimeFailure: The logits hold no number to choose by.
    """
    masked = logits if allowed is None else _masked(logits, allowed)
    scores = _adjusted(masked, params, history, reply_start, bias or Bias.of(params))
    best = int(scores.argmax())
    if not math.isfinite(scores[best]):
        raise _nothing_to_choose(masked, allowed)
    if params.temperature == 0:
        return best
    ids, weights = _candidates(scores, params)
    return _drawn(ids, weights, seed, len(history))


def log_probabilities(logits: Scores, ids: TokenArray | slice = _ALL) -> LogProbs:
    """Return the natural logarithms of the model's own probabilities of some tokens, or of all."""
    best = logits.max()
    total = _block_sums(np.exp(logits - best)).sum()
    return logits[ids].astype(np.float64) - (float(best) + np.log(total))  # type: ignore[no-any-return]


def most_likely(scores: Scores, count: int) -> TokenArray:
    """Return the ids of the highest scores, the highest first; of equal ones the lower id."""
    if not count:
        return np.empty(0, np.int64)
    found = _at_least_the_highest(scores, min(count, len(scores)))
    return found[np.argsort(-scores[found], kind="stable")][:count]


def random_numbers(seed: int, position: int, group: int, count: int) -> LogProbs:
    """
    Return the first random numbers of a group at a position, exponentially distributed, above 0.

    Groups and positions have numbers of their own, and more of them begin with the same ones.

    Source: Philox, a counter-based generator (Salmon et al., SC 2011).
    """
    numbers = np.random.Generator(np.random.Philox(key=seed, counter=group << 128 | position << 64))
    return np.maximum(numbers.standard_exponential(count), _LEAST_NUMBER)


def _masked(logits: Scores, allowed: Mask) -> Scores:
    scores = logits.copy()
    np.putmask(scores, ~allowed, -np.inf)
    return scores


def _adjusted(
    logits: Scores, params: SamplingParams, history: TokenArray, reply_start: int, bias: Bias
) -> Scores:
    """Return the logits after bias and penalties; the same array where there are none."""
    repeats = params.repetition_penalty != 1 and len(history)
    presents = (params.presence_penalty or params.frequency_penalty) and len(history) > reply_start
    if not (len(bias.ids) or repeats or presents):
        return logits
    scores = logits.copy()
    scores[bias.ids] += bias.values
    if repeats:
        seen = _distinct(history, len(scores))
        # Source: CTRL (Keskar et al., 2019), which divides; transformers multiplies negative scores.
        penalty = params.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if presents:
        reply = history[reply_start:]
        seen = _distinct(reply, len(scores))
        counts = np.bincount(reply, minlength=len(scores))[seen].astype(np.float32)
        scores[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def _distinct(ids: TokenArray, vocab_size: int) -> TokenArray:
    """Return the different ones of some ids, ascending, without sorting them."""
    present = np.zeros(vocab_size, np.bool_)
    present[ids] = True
    return np.flatnonzero(present)


def _nothing_to_choose(masked: Scores, allowed: Mask | None) -> RecollectError:
    if np.isfinite(masked[masked.argmax()]):
        what = "there is" if allowed is None else "the grammar allows"
        told = f"logit_bias bans every token that {what}: lift a ban."
        return InvalidParameterError(told, param="logit_bias")
    return RuntimeFailure("The model gave no finite logits: its weights or its KV are damaged.")


def _candidates(scores: Scores, params: SamplingParams) -> tuple[TokenArray | None, Weights]:
    """
    Return which token ids may be drawn, None for all of them, and their weights.

    In the order of transformers: temperature, top_k, top_p, min_p.
    """
    ids: TokenArray | None = None
    if 0 < params.top_k < len(scores):
        ids = np.sort(most_likely(scores, params.top_k))
        scores = scores[ids]
    weights = _weights(scores, params.temperature)
    if params.top_p < 1:
        kept = _nucleus(scores, weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p:
        likely = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = likely if ids is None else ids[likely], weights[likely]
    return ids, weights


def _weights(scores: Scores, temperature: float) -> Weights:
    """Return what is proportional to the probabilities; the largest weight is 1."""
    weights: Weights = scores - scores.max()
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0, is right
        np.divide(weights, np.float32(min(max(temperature, _COOLEST), _HOTTEST)), out=weights)
    np.exp(weights, out=weights)
    return weights


def _nucleus(scores: Scores, weights: Weights, top_p: float) -> TokenArray:
    """Return the places of the fewest weights that hold the mass *top_p*, largest first."""
    total = _block_sums(weights).sum()
    # By scores, of which more differ than of the weights: so ties are rare, and fall one way.
    order = most_likely(scores, _FIRST_GUESS)
    kept = _holding(weights[order], top_p * total)
    if kept < len(order) or len(order) == len(scores):
        return order[:kept]
    # All that is below this has no more mass together than may be left out.
    found = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = found[np.argsort(-scores[found], kind="stable")]
    return order[: _holding(weights[order], top_p * total)]


def _holding(weights: Weights, mass: float) -> int:
    """Return how many of the first weights hold that mass; all of them where they hold less."""
    held = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(held, mass)) + 1, len(weights))


def _drawn(ids: TokenArray | None, weights: Weights, seed: int, position: int) -> int:
    """
    Return a token id that is drawn with its weight's share.

    Each weight is divided by an exponential number of its own, and the largest quotient wins; of a block of
    ids the quotient of its sum is distributed as the largest inside, so that blocks are drawn first and then
    one of few ids. Weights that differ in their last digits then give another token only where two quotients
    are nearly equal. A number that falls between running sums would give another one wherever rare tokens
    are many, since all that is rounded before them adds up: one token of 500 at temperature 1.

    Args:
        ids: What the weights are of; None: all ids, in order.
        weights: At least one is above 0.
        seed: Of the reply.
        position: Of the token.
    """
    sums = _block_sums(weights) if ids is None else np.bincount(ids // _BLOCK, weights)
    block = int((sums / random_numbers(seed, position, 0, len(sums))).argmax())
    numbers = random_numbers(seed, position, 1 + block, _BLOCK)
    start = block * _BLOCK
    if ids is None:
        inside = weights[start : start + _BLOCK]
    else:
        inside = np.zeros(_BLOCK, np.float32)
        places = np.flatnonzero(ids // _BLOCK == block)
        inside[ids[places] - start] = weights[places]
    return start + int((inside / numbers[: len(inside)]).argmax())


def _block_sums(weights: Weights) -> LogProbs:
    """Return the sum of each block of weights; the last may be shorter."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums: LogProbs = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    if whole == len(weights):
        return sums
    return np.append(sums, weights[whole:].sum(dtype=np.float64))


def _at_least_the_highest(scores: Scores, count: int) -> TokenArray:
    """Return the ids, ascending, of the *count* highest scores and of those equal to the last."""
    starts = np.arange(0, len(scores), _BLOCK)
    if count <= len(starts):
        # So many blocks have a score that high, so that at least as many scores are.
        maxima = np.maximum.reduceat(scores, starts)
        found = np.flatnonzero(scores >= _highest(maxima, count))
    else:
        found = np.arange(len(scores))
    return found[scores[found] >= _highest(scores[found], count)]


def _highest(scores: Scores, number: int) -> np.float32:
    """Return the score that is in that place from above, 1 for the highest."""
    place = len(scores) - number
    found: np.float32 = np.partition(scores, place)[place]
    return found


class LogitsDecoder:
    """Chooses among the logits that the engine of this process computes; a `Decoder`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bias: tuple[SamplingParams, Bias] | None = None

    def require(self, params: SamplingParams) -> None:
        """Accept all parameters, and have their biases at hand: there can be many."""
        self._bias = params, Bias.of(params)

    def next_token(self, ask: Ask) -> Drawn:
        """Have the logits after the history computed, and choose; the last token of a grammar ends it."""
        if ask.sequence.logits is None:  # on the engine's thread they are known
            self._engine.compute([ask.sequence])
        logits = ask.sequence.logits
        assert logits is not None, "compute() leaves the logits known"
        params, token = ask.params, ask.forced
        if token is None:
            token = choose_token(
                logits,
                params,
                history=ask.sequence.history,
                reply_start=ask.reply_start,
                seed=ask.seed,
                allowed=None if ask.grammar is None else ask.grammar.allowed(list(ask.reply)),
                bias=self.bias_of(params),
            )
        if token in self._engine.eos_token_ids and not params.ignore_eos:
            return Drawn(token)
        likelihood = None if params.logprobs is None else _describe(token, logits, params.logprobs)
        # End of sequence would follow: no pass is needed to know.
        is_last = ask.grammar is not None and ask.grammar.is_finished([*ask.reply, token])
        return Drawn(token, likelihood, "stop" if is_last else None)

    def bias_of(self, params: SamplingParams) -> Bias:
        """Return the biases of some parameters, made once for those that are used."""
        if self._bias is None or self._bias[0] is not params:
            self.require(params)
        assert self._bias is not None, "just made"
        return self._bias[1]


_DRAWN_BITS: Final = 53
"""Of a seed that is drawn: it is told to clients, and as many are exact in every reader of JSON."""


class Generator:
    """
    One sequence and how its next tokens are chosen.

    Owns its sequence; used from one thread at a time. The choice of a token depends on the
    history, the parameters and the seed alone, so a rewind takes penalties, grammar and random
    numbers back too: sampling anew at the same place gives the same token, until `params` or the
    seed change.

    Invariants:
        1. Prompts ascend, do not touch, and none is beyond the end of the history.
        2. End of sequence is never in the history unless the caller appended or ignores it.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams | None = None,
        *,
        sequence: Sequence | None = None,
        namespace: str | None = "",
        grammars: Grammars | None = None,
        reasoning: ReasoningWatch | None = None,
    ) -> None:
        self._engine = engine
        self._decoder: Decoder = engine if isinstance(engine, Decoder) else LogitsDecoder(engine)
        self._grammars = grammars
        self._reasoning = reasoning
        self._sequence = engine.new_sequence(namespace) if sequence is None else sequence
        # As intervals of the history: where prompts end, replies begin.
        self._prompts = [(0, len(self._sequence))]
        self._finish_reason: FinishReason | None = None
        self._likelihood: Likelihood | None = None
        self.set_params(params or SamplingParams())

    @property
    def sequence(self) -> Sequence:
        """Return the sequence, to look at."""
        return self._sequence

    @property
    def params(self) -> SamplingParams:
        """Return how tokens are chosen."""
        return self._params

    @property
    def seed(self) -> int:
        """Return the seed in use; drawn at random where `params` names none."""
        return self._seed

    @property
    def reply_start(self) -> int:
        """Return where the reply being generated begins, in tokens."""
        return self._prompts[-1][1]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return why the reply ended; None while it goes on."""
        return self._finish_reason

    @property
    def likelihood(self) -> Likelihood | None:
        """Return how likely the token generated last was; None where `params.logprobs` is."""
        return self._likelihood

    def set_params(self, params: SamplingParams) -> None:
        """
        Choose tokens in another way from now on.

        Raises:
            InvalidParameterError: A biased token is outside the vocabulary, or the grammar is not
                valid.
            ConfigError: There is a grammar, and nothing to follow it with.
                In each case nothing was changed.
        """
        for token in params.logit_bias:
            if not 0 <= token < self._engine.info.vocab_size:
                raise InvalidParameterError(
                    f"logit_bias names token {token}; ids go from 0 to {self._engine.info.vocab_size - 1}.",
                    param="logit_bias",
                )
        self._decoder.require(params)
        self._grammar = self._state_of(params)
        self._params = params
        self._seed = secrets.randbits(_DRAWN_BITS) if params.seed is None else params.seed

    def append_tokens(self, token_ids: Tokens[int]) -> None:
        """
        Add a prompt to the history; generating then starts a new reply after it.

        Raises:
            TokenIdError: There are none, or one is outside the vocabulary. Nothing was changed.
            ContextFullError: They do not fit the context. Nothing was changed.
        """
        start = len(self._sequence)
        self._sequence.append(token_ids)
        begin = self._prompts.pop()[0] if start == self.reply_start else start
        self._prompts.append((begin, len(self._sequence)))
        self._finish_reason = None

    def generate_next_token(self) -> int | None:
        """
        Choose one more token and add it to the history.

        Returns:
            The token id, or None where the reply ended instead; `finish_reason` says why.

        Raises:
            MisuseError: The reply has ended already, or nothing was ever appended.
            OutOfBlocksError: There is no KV memory for it. The history is as it was.
        """
        if self._finish_reason is not None:
            raise MisuseError("the reply has ended: append tokens or rewind first")
        room = self._room()
        if room <= 0:
            self._finish_reason = "length"
            return None
        drawn = self._decoder.next_token(self._ask(room))
        token = drawn.token_id
        if token is None or (token in self._engine.eos_token_ids and not self._params.ignore_eos):
            self._finish_reason = drawn.finish or "stop"
            return None
        if self._params.logprobs is not None:
            self._likelihood = drawn.likelihood
        self._sequence.append([token])
        if drawn.finish is not None:
            self._finish_reason = drawn.finish
        elif self._is_long_enough():
            self._finish_reason = "length"
        return token

    def forced_tokens(self) -> list[int]:
        """Return tokens that the grammar lets come next alone, as far as it says so at once."""
        if self._grammar is None:
            return []
        return self._grammar.forced(self._sequence.tokens(self.reply_start))

    def would_choose(self, logits: Logits, guessed: Tokens[int]) -> int:
        """
        Return the token that would be chosen by some logits, behind the history and what is *guessed*.

        With the random number of that position: where a smaller model's logits are like this one's, so is
        what is drawn from them. Changes nothing.

        Raises:
            InvalidParameterError: Nothing may follow there.
            RuntimeFailure: The logits hold no number to choose by.
        """
        allowed = None
        if self._grammar is not None:
            reply = [*self._sequence.tokens(self.reply_start), *guessed]
            allowed = self._grammar.copy().allowed(reply)
        return choose_token(
            logits,
            self._params,
            history=np.append(self._sequence.history, np.array(guessed, np.int64)),
            reply_start=self.reply_start,
            seed=self._seed,
            allowed=allowed,
            bias=self._decoder.bias_of(self._params)
            if isinstance(self._decoder, LogitsDecoder)
            else None,
        )

    def is_done(self) -> bool:
        """Return whether the reply has ended."""
        return self._finish_reason is not None

    def get_sequence(self) -> list[int]:
        """Return a copy of the history."""
        return self._sequence.token_ids

    def rewind_to(self, length: int) -> None:
        """
        Forget all tokens from *length* on, penalties and random numbers included.

        Inside a reply it then goes on with that; inside a prompt a reply begins there.

        Raises:
            RewindError: *length* is below 0 or beyond the end. Nothing was changed.
        """
        self._sequence.rewind_to(length)
        kept = [(begin, min(end, length)) for begin, end in self._prompts if begin < length]
        self._prompts = kept or [(0, 0)]
        self._finish_reason = None

    def fork(self) -> "Generator":
        """Return a second generator over the same history; costs no forward pass."""
        other = Generator(
            self._engine,
            sequence=self._sequence.fork(),
            grammars=self._grammars,
            reasoning=None if self._reasoning is None else self._reasoning.copy(),
        )
        if isinstance(self._decoder, LogitsDecoder):
            other._decoder = copy(self._decoder)  # with the biases that it has made
        other._params = self._params
        other._grammar = None if self._grammar is None else self._grammar.copy()
        other._likelihood = self._likelihood
        other._prompts = self._prompts[:]
        other._finish_reason = self._finish_reason
        other._seed = self._seed
        return other

    def close(self) -> None:
        """Give the blocks back."""
        self._sequence.release()

    def _ask(self, room: int) -> Ask:
        start = self.reply_start
        watched = self._grammar is not None or self._reasoning is not None
        reply = self._sequence.tokens(start) if watched else []
        return Ask(
            sequence=self._sequence,
            params=self._params,
            seed=self._seed,
            reply_start=start,
            most_tokens=room,
            reply=reply,
            grammar=self._grammar,
            forced=None if self._reasoning is None else self._reasoning.forced(reply),
        )

    def _state_of(self, params: SamplingParams) -> GrammarState | None:
        """Return where the grammar of some parameters begins; None where they have none."""
        if params.grammar is None:
            return None
        if self._grammars is None:
            raise ConfigError(
                "This generator was made without grammars: make it with `grammars=model.grammars`."
            )
        state = self._grammars.start(params.grammar)
        if self._reasoning is not None:
            state.begin_behind(self._reasoning, self._engine.eos_token_ids)
        return state

    def _room(self) -> int:
        """Return how many more tokens the reply may have."""
        length, limit = len(self._sequence), self._params.max_tokens
        room = self._engine.info.context_length - length
        return room if limit is None else min(room, self.reply_start + limit - length)

    def _is_long_enough(self) -> bool:
        limit = self._params.max_tokens
        return limit is not None and len(self._sequence) - self.reply_start >= limit


def _describe(token: int, logits: Logits, alternatives: int) -> Likelihood:
    top = most_likely(logits, alternatives)
    logprob, *others = log_probabilities(logits, np.array([token, *top])).tolist()
    return Likelihood(token, logprob, tuple(zip(top.tolist(), others, strict=True)))


def score_tokens(
    engine: Engine,
    sequence: Sequence,
    token_ids: Tokens[int],
    alternatives: int,
    *,
    goes_on: Callable[[], None] = lambda: None,
) -> list[Likelihood]:
    """
    Append tokens to an empty sequence, and return how likely the model held each but the first.

    Logits are known only where a forward pass ends, so each token takes one of its own.

    Args:
        engine: Computes.
        sequence: Has all of the tokens afterwards.
        token_ids: At least one.
        alternatives: How many of the likeliest tokens to tell at each place.
        goes_on: Called before each pass; may raise to end it.

    Raises:
        InvalidParameterError: The engine is elsewhere, and tells no logits.
        TokenIdError: One is outside the vocabulary. The sequence has those before it.
        OutOfBlocksError: There is no KV memory for them. Likewise.
    """
    if isinstance(engine, Decoder):
        raise InvalidParameterError(
            "An engine elsewhere does not tell how likely the tokens of a prompt are: leave echo or logprobs "
            "out.",
            param="logprobs",
        )
    found: list[Likelihood] = []
    for place, token in enumerate(token_ids):
        goes_on()
        if place:
            engine.compute([sequence])
            logits = sequence.logits
            assert logits is not None, "compute() leaves the logits known"
            found.append(_describe(token, logits, alternatives))
        sequence.append([token])
    return found
