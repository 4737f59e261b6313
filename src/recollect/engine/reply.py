"""
One reply, from the engine's tokens to text, calls of tools and what it has cost.

`ReplyGeneration` is the one object that holds a reply: threads read it as an iterator and coroutines
as an asynchronous one. `Stream` brings the tokens from the engine's thread to either. `IdleWork` computes
what a reply will need before it is asked for, and the reply tells what of it was used. Knows a generator
and a tokenizer; not what a conversation is, nor where a reply is kept.
"""

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from queue import SimpleQueue
from typing import Any, Final, Self

from recollect.engine.decoder import AlignedLogprobs, Likelihood, Task
from recollect.engine.drafts import Drafts
from recollect.engine.engine import Engine
from recollect.engine.repetition import Repetition
from recollect.engine.sampling import Generator
from recollect.engine.sequence import FeedPlan
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import MisuseError, RuntimeFailure
from recollect.runtime.sequences import common_length
from recollect.text.detokenizer import Detokenizer
from recollect.text.reasoning import NO_REASONING, Begun, Event, ReplyReader
from recollect.text.tokenizer import StopMatcher, Tokenizer, text_of
from recollect.text.tool_calls import CallRules
from recollect.types import Ended, FinishReason, TokenLogprob, ToolCall, Usage, tokens_per_second

_END: Final = object()


class Stream:
    """
    Results of a task on their way to one reader, which is a thread (`for`) or a coroutine (`async for`).

    The engine's thread puts results in, and hands them over right before a forward pass: see
    `Task.hand_over`. An engine elsewhere has a thread for each task, and several may do so at once. A
    reader that stopped can go on later, with the next result. After the last one every loop ends at once,
    also one that begins then.
    """

    def __init__(self) -> None:
        self._fresh: deque[Any] = deque()  # not handed over yet
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._has_begun = False

    def listen(self, wake: Callable[[], object]) -> None:
        """Have *wake* called on the engine's thread, whenever something is handed over."""
        self._wake = wake

    def put(self, result: object) -> None:
        """Take a result; the reader gets it when it is next handed over."""
        self._fresh.append(result)

    def hand_over(self) -> bool:
        """Give the reader what is new; return whether the first result is among it."""
        if not self._fresh:
            return False
        try:
            while self._fresh:
                self._queue.put(self._fresh.popleft())
            self._wake()
        except (IndexError, RuntimeError):
            pass  # another thread hands over the rest and wakes, or the reader's loop was closed
        is_first, self._has_begun = not self._has_begun, True
        return is_first

    def close(self) -> None:
        """Hand over what is new, and let the reader know that nothing more comes."""
        self._fresh.append(_END)
        self.hand_over()

    def __iter__(self) -> Iterator[Any]:
        """Yield results, and wait for those that are to come."""
        while (result := self._queue.get()) is not _END:
            yield result
        self._queue.put(_END)  # for whoever reads later, or at the same time

    def ready(self) -> Iterator[Any]:
        """Yield the results that nobody has to wait for, and then None if no others come."""
        while not self._queue.empty():
            if (result := self._queue.get()) is _END:
                self._queue.put(_END)
                yield None
                return
            yield result

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield results on the running event loop, without a thread that waits for them."""
        import asyncio  # noqa: PLC0415 - takes 30 ms, which a program without a loop does not need

        more = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.listen(lambda: loop.call_soon_threadsafe(more.set))
        while True:
            more.clear()
            for result in self.ready():
                if result is None:
                    return
                yield result
            await more.wait()


_Generated = tuple[int, Likelihood | None]
"""A token, and how likely it was where somebody asked."""


class _Generation:
    """
    The engine's half of a reply: a task that puts its tokens into a stream.

    Does not know its reader, so that a reply that nobody holds any more is noticed and ends.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, drafts: Drafts | None) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self.stream = Stream()
        on_logits, on_end = self._generate, self._end
        if drafts is not None:
            on_logits, on_end = drafts.following(generator, on_logits, on_end)
        self.task = Task(
            generator.sequence, on_logits, hand_over=self.stream.hand_over, on_end=on_end
        )
        self.begun_s = self.last_token_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.tokens = 0
        """Generated so far, those of a stop string included."""
        self._watches = generator.params.end_repetition and not generator.params.ignore_eos
        """Whether repetition ends it; whoever wants a fixed length is measuring."""
        self._repetition: Repetition | None = None
        self.ran_away = False
        """Whether it ended because it only repeated itself."""

    def _generate(self) -> bool:
        """Generate one token, on the engine's thread; return whether to go on."""
        token = self._generator.generate_next_token()
        self.last_token_s = time.perf_counter()
        self.first_token_s = self.first_token_s or self.last_token_s
        if token is not None:
            self.tokens += 1
            self.stream.put((token, self._generator.likelihood))
            if self._watches:
                self._repetition = self._repetition or Repetition()
                self.ran_away = self._repetition.push(token, text_of(token, self._tokenizer))
        return not self.ran_away and not self._generator.is_done()

    def _end(self) -> None:
        """Let others have the blocks, however late the reader is, and tell the reader the end."""
        try:
            self._generator.sequence.park()
        finally:
            self.stream.close()


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """What was computed of a prompt before it was asked for; both may still grow."""

    sequence: TokenSequence
    """What the prompt looked like then; it may be released."""
    fed: Sequence[FeedPlan]
    """What of it forward passes were fed with."""
    task: Task | None = None
    """What computes it, and knows how much of it came from disk; None: nothing did."""


_MOST_REMEMBERED: Final = 32
"""
Drafts of one message whose cost is known apart. Each holds its token ids, 8 bytes a token; whoever
pauses more often finds what the first drafts had computed among the reused.
"""


class IdleWork:
    """
    A sequence that the engine computes when it has nothing else to do; at most one.

    Remembers what was computed since the last turn, so that the next can tell it from what it reuses.
    Safe from several threads where only one of them starts work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: Task | None = None
        self._ahead: deque[ReadAhead] = deque(maxlen=_MOST_REMEMBERED)

    @property
    def ahead(self) -> tuple[ReadAhead, ...]:
        """Return what was computed ahead since the last turn."""
        return tuple(self._ahead)

    def note(self, ahead: ReadAhead) -> None:
        """Remember something else that was computed ahead."""
        self._ahead.append(ahead)

    def forget(self) -> None:
        """Let what was computed so far be of a turn that is over."""
        self._ahead.clear()

    def start(self, sequence: TokenSequence) -> None:
        """
        Have a sequence computed instead of the one before, and return at once.

        The sequence is released when that is done, or given up; what was computed stays findable.
        """
        if self._task is not None:
            self._task.cancel()  # not waited for: a forward pass may be under way
            self._task = None
        if sequence.is_warm():
            sequence.release()
            return
        task = Task(sequence, lambda: False, idle=True, spare=True, on_end=sequence.release)
        try:
            self._engine.submit(task)
        except (MisuseError, RuntimeFailure):
            sequence.release()  # the engine is gone: whoever asks it for something is told
        else:
            self._task = task
            self.note(ReadAhead(sequence, task.fed, task))

    def stop(self) -> None:
        """Give it up, and wait for the end of a forward pass that is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedReply:
    """A reply that has ended."""

    text: str
    """All that the model wrote, its reasoning with the marks around it included."""
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    """How likely each token was; None where `SamplingParams.logprobs` is."""
    tool_calls: tuple[ToolCall, ...] = ()
    """
    What the model calls, where tools are offered. Where the reply was cut (`finish_reason` is then
    `length` or `cancelled`, or there is a stop string), the last call may be, too.
    """
    content: str = ""
    """What is said beside the calls and the reasoning."""
    reasoning: str = ""
    """What the model thought before."""
    said: str = ""
    """The text behind the reasoning, as the model wrote it, calls included."""
    stop_string: str | None = None
    """The stop string that has ended it; None where none has."""
    ended: Ended | None = None
    """
    What there is to say, beside `finish_reason`, of an end that the model did not choose; None: nothing.

    Where it was cut in a call before that had its name, `content` and `tool_calls` have nothing of it; `text`
    has.
    """

    def __str__(self) -> str:
        return self.text


class ReplyGeneration:
    """
    The reply that a generator gives to what was last appended: iterate over it for pieces of text.

    The engine's thread generates tokens, from `start` on; whoever iterates turns them into text, so
    that one reader's text never delays another's tokens. Read by one thread, or on one event loop;
    `stop` may be called from anywhere. `finish` ends it, at any time: the generator's history then
    ends with exactly the tokens of the text that was given out. `close`, and the end of a `with`
    block, also give the blocks back and make it a whole reply.
    """

    def __init__(
        self,
        engine: Engine,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        ahead: Sequence[ReadAhead] = (),
        rules: CallRules | None = None,
        begun: Begun = NO_REASONING,
    ) -> None:
        """
        Have it ready to begin.

        Args:
            engine: Generates it.
            generator: Its history is the prompt.
            tokenizer: Of the model.
            ahead: What was computed of the prompt before.
            rules: What its calls of tools look like; None: it is text, and calls nothing.
            begun: How reasoning stands where it begins.
        """
        self._engine = engine
        self._ahead = tuple(ahead)
        self._generator = generator
        self._tokenizer = tokenizer
        self._begun, self._rules = begun, rules
        self._matcher = StopMatcher(generator.params.stop)
        self._sequence = generator.sequence
        self._start = len(self._sequence)
        self._computed_before = self._sequence.computed_before()
        self._generation = _Generation(generator, tokenizer, engine.drafts)
        self._task = self._generation.task
        self._since_s = self._generation.begun_s
        self._read = self._decoded_characters = 0
        self._boundaries = [(0, 0)]
        """Where the text can be cut between two tokens: after how many characters, and tokens."""
        self._pieces: list[str] = []
        self._logprobs = None if generator.params.logprobs is None else AlignedLogprobs(tokenizer)
        self._finish_reason: FinishReason | None = None
        self._read_to_end = False  # there is nothing more to wait for
        self._is_whole = False
        self._closed = False
        self._closing = threading.RLock()  # so that a second caller of `close` waits for the first
        self.reply: GeneratedReply | None = None
        """The whole reply, once it is closed; None before, and where nothing came of it."""

    @cached_property
    def _reader(self) -> ReplyReader:
        return ReplyReader(self._begun, self._rules)

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return self._begun.detokenizer(self._tokenizer, self._rules)

    @property
    def text(self) -> str:
        """Return the text given out so far."""
        return "".join(self._pieces)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """
        Return how likely the tokens of the text given out so far were; None where nobody asked.

        It only grows. A token is among them once all of its text was given out; once the reply has
        ended, all tokens of the history that were generated are.
        """
        return None if self._logprobs is None else self._logprobs.given

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return why the reply ended; None while it goes on."""
        return self._finish_reason

    @property
    def has_ended(self) -> bool:
        """Return whether all of its text has been read: nothing more comes."""
        return self._read_to_end

    @property
    def stop_string(self) -> str | None:
        """Return the stop string that has ended the reply; None where none has."""
        return self._matcher.matched

    @property
    def ran_away(self) -> bool:
        """Return whether the reply was ended because it only repeated itself."""
        return self._finish_reason == "length" and self._generation.ran_away

    @property
    def generated_tokens(self) -> int:
        """Return how many tokens were generated, those of a stop string included."""
        return self._generation.tokens

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV by now, and how many there are."""
        return min(self._sequence.computed, self._start), self._start

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens of the reply in the history."""
        return self._sequence.tokens(self._start)

    def count_from(self, since_s: float) -> Self:
        """Let `Usage.ttft_s` begin at a time of `time.perf_counter`: when somebody began to wait."""
        self._since_s = since_s
        return self

    def start(self) -> None:
        """Have the engine begin."""
        self._engine.submit(self._task)

    def __iter__(self) -> Iterator[str]:
        """
        Yield pieces of text, each at least one character, until the reply ends.

        Raises:
            RecollectError: What the engine failed with; the pieces before it are part of the reply.
        """
        tokens = iter(self._generation.stream)
        while not self._read_to_end:
            generated = next(tokens, None)
            if piece := self._piece_of(generated):
                yield piece
            if generated is None:
                self._task.wait()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Do the same on an event loop. What `finish` and `close` do may take long: not there."""
        tokens = aiter(self._generation.stream)
        while not self._read_to_end:
            generated = await anext(tokens, None)
            if piece := self._piece_of(generated):
                yield piece
            if generated is None:
                self._task.wait()  # it has ended by now

    def listen(self, wake: Callable[[], object]) -> None:
        """Have *wake* called on the engine's thread whenever there is more for `ready`; before `start`."""
        self._generation.stream.listen(wake)

    def ready(self) -> Iterator[str]:
        """
        Yield the pieces of text that nobody has to wait for; `has_ended` says whether more can come.

        Raises:
            RecollectError: As iterating does.
        """
        for generated in self._generation.stream.ready():
            if self._read_to_end:
                return
            if piece := self._piece_of(generated):
                yield piece
            if generated is None:
                self._task.wait()  # it has ended by now

    def events(self) -> Iterator[Event]:
        """
        Read the reply as text, reasoning and calls of tools, as they are generated.

        The ids of the calls are those in the reply. Without tools there are none.
        """
        for piece in self:
            yield from self._reader.push(piece)
        yield from self._reader.finish(is_cut=self._is_cut())

    async def async_events(self) -> AsyncIterator[Event]:
        """Do the same on an event loop."""
        async for piece in self:
            for event in self._reader.push(piece):
                yield event
        for event in self._reader.finish(is_cut=self._is_cut()):
            yield event

    def stop(self) -> None:
        """End the reply after the forward pass under way; from any thread or signal handler."""
        self._task.cancel()

    def finish(self) -> None:
        """
        End the reply here, as cancelled, unless it has ended already. May be called again.

        Waits for a forward pass that is under way. What was generated but not given out is taken back.
        """
        self._read_to_end = True
        self._task.cancel()
        self._task.join()
        if self._finish_reason is None:
            self._finish_reason = "cancelled"
        kept = self._generation.tokens
        if not self._is_whole:
            self._is_whole = True
            kept = self._cut_at(self.text)
        if self._logprobs is not None:
            for unread in self._generation.stream:  # without text, they stay in the history
                self._decoded(*unread)
            self._logprobs.finish(kept)

    def release(self) -> None:
        """Give the blocks back; the cache keeps them findable."""
        self._generator.close()

    def close(self) -> None:
        """
        End the reply here, and make it a whole one; a reply of a conversation is saved there.

        Calling it again does nothing, but waits while another thread is closing the reply.

        Raises:
            StoreError: The journal cannot save it. The conversation is as it was.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._close()

    def _close(self) -> None:
        """Do what `close` does, once; a subclass adds where the reply is saved."""
        self.finish()
        self.release()
        self.reply = self._whole()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def usage_so_far(self) -> Usage | None:
        """
        Return what the reply has cost by now; None before its first token.

        From then on the numbers of the prompt stay as they are.
        """
        return None if self._generation.first_token_s is None else self.usage()

    def usage(self) -> Usage:
        """
        Return what the reply has cost.

        Reused are the tokens of the prompt that no forward pass was planned to feed for this turn;
        computed are all that one was fed with, so a token fed twice would show.
        """
        generation = self._generation
        fed = [plan for plan in self._task.fed if plan.start < self._start]
        positions = {n for plan in fed for n in range(plan.start, min(plan.end, self._start))}
        computed = sum(min(plan.end, self._start) - plan.start for plan in fed)
        read_ahead = len(self._positions_read_ahead() - positions)
        reused = self._start - len(positions) - read_ahead
        whole = self._engine.info.reuse.warm_tokens(self._computed_before)
        first = generation.first_token_s
        first_s = generation.last_token_s if first is None else first
        decode_s = 0.0 if first is None else generation.last_token_s - first
        usage = Usage(
            prompt_tokens=self._start,
            reused_tokens=reused,
            restored_tokens=min(self._restored_tokens(), reused),
            computed_tokens=computed + read_ahead,
            read_ahead_tokens=read_ahead,
            generated_tokens=generation.tokens,
            drafted_tokens=self._sequence.drafted_tokens,
            accepted_tokens=self._sequence.accepted_tokens,
            reasoning_tokens=self._reader.reasoning_tokens,
            ttft_s=first_s - self._since_s,
            prefill_tps=tokens_per_second(computed, first_s - generation.begun_s),
            decode_tps=tokens_per_second(generation.tokens - 1, decode_s),
            sampling=self._generator.params.told(self._generator.seed),
        )
        return usage.evicted(whole - reused - read_ahead, moved=self._sequence.moved)

    def _whole(self) -> GeneratedReply:
        """Return the reply, which has ended."""
        assert self._finish_reason is not None, "it has ended"
        text = self.text
        parts, parsed = self._reader.whole(text, is_cut=self._is_cut())
        return GeneratedReply(
            text=text,
            reasoning=parts.reasoning,
            said=parts.said,
            finish_reason=self._finish_reason,
            usage=self.usage(),
            logprobs=self.logprobs,
            tool_calls=parsed.calls,
            content=parsed.content,
            stop_string=self.stop_string,
            ended="repetition" if self.ran_away else parsed.ended,
        )

    def _restored_tokens(self) -> int:
        """Return how many tokens of the prompt came from disk, for this turn or ahead of it."""
        return self._task.restored_tokens + sum(
            min(
                one.task.restored_tokens,
                common_length(one.sequence.history, self._sequence.history),
            )
            for one in self._ahead
            if one.task is not None and one.task.restored_tokens
        )

    def _positions_read_ahead(self) -> set[int]:
        """Return which tokens of the prompt were fed before it was asked for."""
        positions = set[int]()
        for ahead in self._ahead:
            if ahead.fed:
                same = min(
                    self._start, common_length(ahead.sequence.history, self._sequence.history)
                )
                for plan in ahead.fed:
                    positions.update(range(plan.start, min(plan.end, same)))
        return positions

    def _piece_of(self, generated: _Generated | None) -> str:
        """Return the text that can be given out now: with a token, or what was held back, at the end."""
        if generated is not None:
            piece = self._matcher.push(self._decoded(*generated))
        else:
            cut: FinishReason = "length" if self._generation.ran_away else "cancelled"
            self._finish_reason = self._generator.finish_reason or cut
            piece = self._matcher.finish(self._detokenizer.finish(is_cut=self._is_cut()))
            self._read_to_end = self._is_whole = True
        if self.stop_string is not None:
            self._read_to_end, self._is_whole, self._finish_reason = True, False, "stop"
            self._task.cancel()
        if piece:
            self._pieces.append(piece)
            if self._logprobs is not None:
                self._logprobs.give(len(piece))
        return piece

    def _is_cut(self) -> bool:
        """Return whether the reply ended where the model would have gone on."""
        return self._finish_reason != "stop" or self.stop_string is not None

    def _decoded(self, token_id: int, likelihood: Likelihood | None) -> str:
        """Return the text that a token completes."""
        piece = self._detokenizer.push(token_id)
        self._reader.count(piece)
        self._read += 1
        self._decoded_characters += len(piece)
        if self._detokenizer.ends_whole:
            self._boundaries.append((self._decoded_characters, self._read))
        if self._logprobs is not None and likelihood is not None:
            self._logprobs.add(likelihood, piece, whole=not self._detokenizer.holds_back)
        return piece

    def _cut_at(self, text: str) -> int:
        """
        Make the history end where *text* ends; return how many of the generated tokens stay.

        A token that reaches across the cut is replaced by the encoding of its part before it, so
        that the history says what the reply says; as far as it fits, because that may take more places
        than there are at the end of a full context.
        """
        place = bisect_right(self._boundaries, len(text), key=itemgetter(0)) - 1
        if text and not place and self._detokenizer.begins_inside:
            place = (
                1  # no ids are the rest of a character alone, so the token that ends it stays whole
            )
        characters, keep = self._boundaries[place]
        self._generator.rewind_to(self._start + keep)
        rest = self._tokenizer.encode(text[characters:])
        if rest := rest[: self._engine.info.context_length - len(self._sequence)]:
            self._sequence.append(rest)
        return keep
