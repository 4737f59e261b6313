"""
Continuous decoding: append, generate, rewind and fork in any order, on token ids.

Knows no text; replies as text are made of it in `engine/reply.py`.
"""

import secrets
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np

from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars, GrammarState
from recollect.engine.sampling import Bias, choose_token, log_probabilities, most_likely
from recollect.engine.sequence import Sequence
from recollect.errors import ConfigError, InvalidParameterError, MisuseError
from recollect.runtime.base import Logits
from recollect.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model held a token and its alternatives, before anything changed the logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Ids and logarithms of the likeliest tokens, the likeliest first."""


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
    ) -> None:
        self._engine = engine
        self._grammars = grammars
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
                    f"logit_bias names token {token}; ids go from 0 to {self._engine.info.vocab_size - 1}."
                )
        self._grammar = self._state_of(params)
        self._params = params
        self._bias = Bias.of(params)
        self._seed = secrets.randbits(64) if params.seed is None else params.seed

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
        if len(self._sequence) == self._engine.info.context_length or self._is_long_enough():
            self._finish_reason = "length"
            return None
        self._engine.compute([self._sequence])
        logits = self._sequence.logits
        assert logits is not None, "compute() leaves the logits known"
        token = choose_token(
            logits,
            self._params,
            history=self._sequence.history,
            reply_start=self.reply_start,
            seed=self._seed,
            allowed=None if self._grammar is None else self._grammar.allowed(self._reply()),
            bias=self._bias,
        )
        if token in self._engine.eos_token_ids and not self._params.ignore_eos:
            self._finish_reason = "stop"
            return None
        if self._params.logprobs is not None:
            self._likelihood = _describe(token, logits, self._params.logprobs)
        self._sequence.append([token])
        if self._grammar is not None and self._grammar.is_finished(self._reply()):
            self._finish_reason = "stop"  # end of sequence would follow: no pass is needed to know
        elif self._is_long_enough():
            self._finish_reason = "length"
        return token

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
        other = Generator(self._engine, sequence=self._sequence.fork(), grammars=self._grammars)
        other._params = self._params
        other._bias = self._bias
        other._grammar = None if self._grammar is None else self._grammar.copy()
        other._likelihood = self._likelihood
        other._prompts = self._prompts[:]
        other._finish_reason = self._finish_reason
        other._seed = self._seed
        return other

    def close(self) -> None:
        """Give the blocks back."""
        self._sequence.release()

    def _reply(self) -> list[int]:
        return self._sequence.tokens(self.reply_start)

    def _state_of(self, params: SamplingParams) -> GrammarState | None:
        """Return where the grammar of some parameters begins; None where they have none."""
        if params.grammar is None:
            return None
        if self._grammars is None:
            raise ConfigError(
                "This generator was made without grammars: make it with `grammars=model.grammars`."
            )
        return self._grammars.start(params.grammar)

    def _is_long_enough(self) -> bool:
        limit = self._params.max_tokens
        return limit is not None and len(self._sequence) - self.reply_start >= limit


def _describe(token: int, logits: Logits, alternatives: int) -> Likelihood:
    top = most_likely(logits, alternatives)
    logprob, *others = log_probabilities(logits, np.array([token, *top])).tolist()
    return Likelihood(token, logprob, tuple(zip(top.tolist(), others, strict=True)))
