"""
How likely the tokens of a reply are, in step with the text that is given out.

On its own because a reply that nobody asks this of does without it.
"""

from recollect.engine.decoder import Likelihood
from recollect.text.tokenizer import Tokenizer
from recollect.types import TokenLogprob


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
