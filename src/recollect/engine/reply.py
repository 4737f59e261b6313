"""
One reply as text: tokens become pieces of text, stop strings end it, usage is measured.

Knows a generator and a tokenizer; not what a conversation is.
"""

import time
from collections.abc import Iterator

from recollect.engine.engine import Engine
from recollect.engine.generator import Generator
from recollect.engine.stopping import StopMatcher
from recollect.models.tokenizer import Detokenizer, Tokenizer
from recollect.types import FinishReason, Usage, tokens_per_second


class ReplyGeneration:
    """
    The reply that a generator gives to what was last appended.

    Iterate over it for pieces of text. It may be left at any time: `finish` closes it, and the
    generator's history then ends with exactly the tokens of the text that was given out.
    """

    def __init__(self, engine: Engine, generator: Generator, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._generator = generator
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(generator.params.stop)
        self._sequence = generator.sequence
        self._start = len(self._sequence)
        plan = self._sequence.plan()
        self._reused = self._start if plan is None else plan.start
        self._fed_before = self._sequence.fed_tokens
        self._computed = 0
        self._begun_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = self._begun_s
        self._generated = 0
        self._pieces: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._stopping = False

    @property
    def text(self) -> str:
        """Return the text given out so far."""
        return "".join(self._pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return why the reply ended; None while it goes on."""
        return self._finish_reason

    @property
    def generated_tokens(self) -> int:
        """Return how many tokens were generated, those of a stop string included."""
        return self._generated

    @property
    def prefilled_tokens(self) -> int:
        """Return how many tokens of the prompt have KV by now."""
        return min(self._sequence.computed, self._start)

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens the prompt has."""
        return self._start

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens of the reply in the history."""
        return self._sequence.tokens(self._start)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text, each at least one character, until the reply ends."""
        while self._finish_reason is None:
            piece = ""
            if self._stopping:
                piece = self.finish()
            elif self._engine.step([self._sequence]):
                piece = self._next_piece()
                self._pieces.append(piece)
            if piece:
                yield piece

    def stop(self) -> None:
        """Ask for the reply to end after the forward pass under way; from any thread or signal handler."""
        self._stopping = True

    def finish(self) -> str:
        """
        End the reply here, as cancelled, unless it has ended already.

        Returns:
            Text that was held back because more was to come; it belongs to the reply.
        """
        if self._finish_reason is not None:
            return ""
        self._finish_reason = "cancelled"
        piece = self._flush()
        self._pieces.append(piece)
        return piece

    def usage(self) -> Usage:
        """Return what the reply has cost so far."""
        first = self._first_token_s
        ttft_s = (self._last_token_s if first is None else first) - self._begun_s
        decode_s = 0.0 if first is None else self._last_token_s - first
        return Usage(
            prompt_tokens=self._start,
            reused_tokens=self._reused,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            ttft_s=ttft_s,
            prefill_tps=tokens_per_second(self._computed, ttft_s),
            decode_tps=tokens_per_second(self._generated - 1, decode_s),
        )

    def _next_piece(self) -> str:
        """Generate one token and return the text that became certain with it."""
        token = self._generator.generate_next_token()
        self._last_token_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
            self._computed = self._sequence.fed_tokens - self._fed_before
        if token is None:
            self._finish_reason = self._generator.finish_reason
            return self._flush()
        self._generated += 1
        piece = self._matcher.push(self._detokenizer.push(token))
        if self._matcher.matched:
            self._end_at_stop_string(piece)
        elif self._generator.is_done():
            self._finish_reason = self._generator.finish_reason
            piece = self._flush(piece)
        return piece

    def _flush(self, piece: str = "") -> str:
        """Return *piece*, which was not given out yet, and what was held back after it."""
        piece += self._matcher.push(self._detokenizer.finish())
        if self._matcher.matched:
            self._end_at_stop_string(piece)
        return piece + self._matcher.finish()

    def _end_at_stop_string(self, piece: str) -> None:
        self._finish_reason = "stop"
        self._cut_at(self.text + piece)

    def _cut_at(self, text: str) -> None:
        """
        Make the history end where *text* ends, before a stop string.

        A token that reaches across the cut is replaced by the encoding of its part before it, so
        that the history says what the reply says.
        """
        tokens = self.token_ids
        keep = len(tokens)
        while not text.startswith(kept := self._tokenizer.decode(tokens[:keep])):
            keep -= 1
        self._generator.rewind_to(self._start + keep)
        rest = self._tokenizer.encode(text[len(kept) :])
        # A token cut at the end of a full context may take more places than there are.
        if rest := rest[: self._engine.info.context_length - len(self._sequence)]:
            self._sequence.append(rest)
