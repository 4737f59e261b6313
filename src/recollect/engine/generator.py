"""
Continuous decoding: append, generate, rewind and fork in any order, on token ids.

Knows no text; replies as text are made of it in `engine/reply.py`.
"""

import secrets
from collections.abc import Sequence as Tokens

from recollect.engine.engine import Engine
from recollect.engine.sampling import choose_token
from recollect.engine.sequence import Sequence
from recollect.errors import InvalidParameterError, MisuseError
from recollect.types import FinishReason, SamplingParams


class Generator:
    """
    One sequence and how its next tokens are chosen.

    Owns its sequence; used from one thread at a time. The choice of a token depends on the
    history, the parameters and the seed alone, so a rewind takes penalties and random numbers
    back too: sampling anew at the same place gives the same token, until `params` or the seed change.

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
    ) -> None:
        self._engine = engine
        self._sequence = engine.new_sequence(namespace) if sequence is None else sequence
        # As intervals of the history: where prompts end, replies begin.
        self._prompts = [(0, len(self._sequence))]
        self._finish_reason: FinishReason | None = None
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

    def set_params(self, params: SamplingParams) -> None:
        """
        Choose tokens in another way from now on.

        Raises:
            InvalidParameterError: A biased token is outside the vocabulary. Nothing was changed.
        """
        for token in params.logit_bias:
            if not 0 <= token < self._engine.info.vocab_size:
                raise InvalidParameterError(
                    f"logit_bias names token {token}; ids go from 0 to {self._engine.info.vocab_size - 1}."
                )
        self._params = params
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
        )
        if token in self._engine.eos_token_ids and not self._params.ignore_eos:
            self._finish_reason = "stop"
            return None
        self._sequence.append([token])
        if self._is_long_enough():
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
        other = Generator(self._engine, self._params, sequence=self._sequence.fork())
        other._prompts = self._prompts[:]
        other._finish_reason = self._finish_reason
        other._seed = self._seed
        return other

    def close(self) -> None:
        """Give the blocks back."""
        self._sequence.release()

    def _is_long_enough(self) -> bool:
        limit = self._params.max_tokens
        return limit is not None and len(self._sequence) - self.reply_start >= limit
