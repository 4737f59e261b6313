"""
What engines have in common, here and on other machines: their tasks, and how they choose the next token.

A `Task` is work on one sequence: bring it to its next logits, again and again. What is done with them is
its callback's business.

A `Decoder` is what a `Generator` asks for its next token. The engine of this process computes logits, and
chooses among them (`engine.sampling.LogitsDecoder`). An engine elsewhere owns its KV and chooses by itself
(`remote.remote_engine.RemoteEngine`): ids go out, ids come in, and neither KV nor logits cross the wire.
What of the prompt was reused is told where it is told of local passes, in `Task.fed` and
`Sequence.fed_tokens`; so replies, tools, stop strings, the journal and the tree know one kind of generator.
`AlignedLogprobs` keeps how likely the tokens were in step with the text that is given out.
"""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol, runtime_checkable

from recollect.engine.grammar import GrammarState
from recollect.engine.sequence import FeedPlan, Sequence
from recollect.text.tokenizer import Tokenizer
from recollect.types import FinishReason, SamplingParams, TokenLogprob

TaskState = Literal["new", "submitted", "done", "cancelled", "failed"]


@dataclass(eq=False)
class Task:
    """
    Work on one sequence, which belongs to the engine's thread until the task has ended.

    Any thread may wait for the end, or cancel the task. The three callbacks are called on the engine's
    thread.
    """

    sequence: Sequence
    """What to compute."""
    on_logits: Callable[[], bool]
    """Called whenever the logits after the sequence are known. May append to it; returns whether to go on."""
    _: KW_ONLY
    idle: bool = False
    """Whether it runs only while there is nothing else to do."""
    spare: bool = False
    """Whether it is idle and nobody waits for it; where there are many, the scheduler cancels it."""
    hand_over: Callable[[], bool] = lambda: False
    """Called right before each pass, so that a reader works while the runtime does. Gives the reader what
    is new; returns whether the first result is among it."""
    on_end: Callable[[], None] = lambda: None
    """Called when it is over, however it ended, before those who wait are told."""
    state: TaskState = field(default="new", init=False)
    error: Exception | None = field(default=None, init=False)
    """What it failed with."""
    cancelled: bool = field(default=False, init=False)
    """Whether the caller wants no more of it."""
    restoring: bool = field(default=False, init=False)
    """Whether the disk may have more of it; it is not fed meanwhile."""
    restored_tokens: int = field(default=0, init=False)
    """Tokens whose KV came from disk for it."""
    fed: list[FeedPlan] = field(default_factory=list, init=False)
    """What forward passes were fed with for it, in order."""
    _ended: threading.Event = field(default_factory=threading.Event, init=False)

    @property
    def namespace(self) -> str:
        """Return whose work it is; of all who share with nobody the same."""
        return self.sequence.namespace or ""

    def cancel(self) -> None:
        """Ask for the end, after the forward pass under way; from any thread or signal handler."""
        self.cancelled = True

    def wait(self) -> None:
        """
        Wait for the end.

        Raises:
            Exception: What the task failed with.
        """
        self.join()
        if self.error is not None:
            raise self.error

    def join(self, timeout_s: float | None = None) -> bool:
        """
        Wait for the end, whatever it is, or for some seconds; return whether it has come.

        A task that was never submitted has nothing to wait for.
        """
        return self.state == "new" or self._ended.wait(timeout_s)

    def end(self, state: TaskState, error: Exception | None = None) -> None:
        """Give the sequence back to the caller. For the scheduler."""
        self.state, self.error = state, error
        try:
            self.on_end()
        except Exception as bug:  # noqa: BLE001 - handed to whoever waits
            self.state, self.error = "failed", error or bug
        finally:
            self._ended.set()


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
