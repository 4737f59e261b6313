"""
The contract between a `Generator` and what chooses its next tokens, here or on another machine.

A decoder is asked to go on with a history, and tells one token after the other. The engine of this process
computes logits, and chooses among them (`engine.sampling.LogitsDecoder`). An engine elsewhere owns its KV
and chooses by itself (`remote.remote_engine.RemoteEngine`): ids go out, ids come in, and neither KV nor
logits cross the wire. What of the prompt was reused is told where it is told of local passes, in
`Task.fed` and `Sequence.fed_tokens`; so replies, tools, stop strings, the journal and the tree know one
kind of generator. `AlignedLogprobs` keeps how likely the tokens were in step with the text that is given out.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from recollect.engine.grammar import GrammarState
from recollect.engine.sequence import Sequence
from recollect.text.tokenizer import Tokenizer
from recollect.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model held a token and its alternatives, before anything changed the logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Ids and logarithms of the likeliest tokens, the likeliest first."""


class AlignedLogprobs:
    """
    Log probabilities in step with the text, which stop strings and unfinished characters hold back.

    Owned by the reader.

    Invariants:
        1. `given` only grows.
        2. The text of the tokens in it has been given out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.vocabulary.token_bytes
        self._tokens: list[TokenLogprob] = []
        self._ends: list[int] = []  # of the text of each token but the last few, in characters
        self._decoded = self._shown = 0  # characters
        self._given = 0

    @property
    def given(self) -> tuple[TokenLogprob, ...]:
        """Return the tokens whose text has been given out."""
        return tuple(self._tokens[: self._given])

    def add(self, likelihood: Likelihood, piece: str, *, whole: bool) -> None:
        """
        Take a token.

        Args:
            likelihood: Of the token.
            piece: The text that it completes.
            whole: Whether no character is unfinished now. Until one is, and there is text, the
                tokens wait for what completes theirs.
        """
        top = tuple(self._of(token_id, logprob) for token_id, logprob in likelihood.top)
        self._tokens.append(self._of(likelihood.token_id, likelihood.logprob, top))
        self._decoded += len(piece)
        if piece and whole:
            self._ends += [self._decoded] * (len(self._tokens) - len(self._ends))

    def give(self, characters: int) -> None:
        """Take note that more text was given out."""
        self._shown += characters
        while self._given < len(self._ends) and self._ends[self._given] <= self._shown:
            self._given += 1

    def finish(self, kept: int) -> None:
        """Give the first *kept* tokens, which are those of the history."""
        del self._tokens[kept:]
        self._given = len(self._tokens)

    def _of(
        self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        known = token_id < len(self._bytes)  # there can be logits for ids that stand for nothing
        return TokenLogprob(token_id, self._bytes[token_id] if known else b"", logprob, top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The next token of a reply that is asked for."""

    sequence: Sequence
    """The history that it follows, its namespace, and which conversation it is of."""
    params: SamplingParams
    seed: int
    """Of the reply; the random number of a position comes from both, however often the reply is begun."""
    reply_start: int
    """Where the reply begins in the history, in tokens."""
    most_tokens: int
    """That are wanted from here on, >= 1: this one, and as many as are asked for after it."""
    reply: Tokens[int] = ()
    """The tokens of the reply so far; only where there is a grammar."""
    grammar: GrammarState | None = None
    """Where the reply stands in the grammar of the parameters; None: they have none."""
    forced: int | None = None
    """The token that has to come; None: it is chosen."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a decoder tells: a token, or that the reply ends before one."""

    token_id: int | None
    """None: the reply has ended, and `finish` says why. An end token is told as any other."""
    likelihood: Likelihood | None = None
    """Where `SamplingParams.logprobs` asks for it."""
    finish: FinishReason | None = None
    """Why the reply ends here, with this token or without one; None: it goes on."""


@runtime_checkable
class Decoder(Protocol):
    """
    Chooses the tokens of replies.

    One thread at a time asks for those of one sequence; different sequences may be asked for at once.
    """

    def require(self, params: SamplingParams) -> None:
        """
        Check that parameters can be followed.

        Raises:
            InvalidParameterError: One cannot; the message says why, and what to do instead.
        """

    def next_token(self, ask: Ask) -> Drawn:
        """
        Return the token that follows a history.

        Raises:
            InvalidParameterError: Nothing may follow it.
            OutOfBlocksError: There is no KV memory for it.
            RuntimeFailure: It cannot be computed; the history is as it was.
        """
