"""
An engine whose forward passes happen elsewhere: sequences have histories here, and KV there.

`RemoteEngine` is used as any `Engine`: it makes sequences, takes tasks and ends them. It is a `Decoder`, too:
a generator on it asks for tokens, which come from a stream that is opened when the first is asked for, and
again wherever the history is not the one that the stream goes on with: after a rewind, another parameter, a
forced token, or where a grammar begins behind reasoning. A task runs on a thread of its own, which waits for
its engine; one more thread looks for tasks that were cancelled, and cuts their connections.
"""

import threading
import weakref
from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from time import sleep
from typing import Final

from recollect.engine.decoder import Ask, Drawn, Task, TaskState
from recollect.engine.engine import Engine
from recollect.engine.grammar import GrammarState
from recollect.engine.scheduler import MOST_SPARE
from recollect.engine.sequence import FeedPlan, plan_feed
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import EngineUnavailableError, MisuseError
from recollect.remote.replicas import (
    Ledger,
    RemoteMemory,
    RemoteRuntime,
    RemoteSequence,
    Replica,
    Replicas,
    session_of,
)
from recollect.remote.wire import Api, EngineFacts, Link, Lost, Order, RefusedError, Token, Told
from recollect.runtime.base import Reuse, RuntimeInfo
from recollect.types import Grammar, SamplingParams

LEDGER_BLOCK: Final = 32
"""Tokens in a block of the ledger, where the engine itself reuses any number."""
MOST_ALLOWED: Final = 4096
"""Ids in a request for a first token: JSON begins with some dozens, free text with nearly all."""
MOST_MOVES: Final = 3
"""How often a reply goes on at another replica before it is given up."""
_WATCH_S: Final = 0.05
"""How long a cancelled reply may go on."""
_LINGER: Final = 40
"""Looks without a task after which the thread that looks ends."""


class RemoteEngine(Engine):
    """
    Replicas of an engine elsewhere. Safe from any thread, as `Engine`.

    Invariants:
        1. Each task that runs has a thread, and each stream a sequence that is alive.
        2. A stream is asked by one thread at a time: whoever has the sequence.
    """

    def __init__(
        self,
        apis: Sequence[Api],
        facts: EngineFacts,
        *,
        name: str,
        vocab_size: int,
        context_length: int,
        eos_token_ids: Collection[int] = (),
        fingerprint: str = "",
    ) -> None:
        """
        Use engines that were probed.

        Args:
            apis: The replicas, at least one, all of the same kind.
            facts: What a probe has found out; of several replicas, what holds for all.
            name: Of the kind, with its version.
            vocab_size: Of the tokenizer.
            context_length: Of the model, as its files say.
            eos_token_ids: The tokens that end a reply.
            fingerprint: Of the model.
        """
        info = RuntimeInfo(
            name=name,
            block_size=facts.unit if facts.unit > 1 else LEDGER_BLOCK,
            bytes_per_block=1,
            vocab_size=vocab_size,
            context_length=min(context_length, facts.context_length),
            device="elsewhere",
            reuse=Reuse(unit=facts.unit, as_bytes=False),
        )
        super().__init__(
            RemoteRuntime(info), num_blocks=1, eos_token_ids=eos_token_ids, fingerprint=fingerprint
        )
        self.memory: RemoteMemory = RemoteMemory(self.memory, Ledger(info.block_size))
        self.replicas: Final = Replicas(apis)
        self._api = apis[0]
        self._live: dict[Task, None] = {}
        self._spare: deque[Task] = deque()
        self._streams: weakref.WeakKeyDictionary[TokenSequence, _Stream] = (
            weakref.WeakKeyDictionary()
        )
        self._streams_lock = threading.Lock()
        self._counting = threading.Lock()
        self._watches = False
        self._is_closed = False

    def new_sequence(self, namespace: str | None = "") -> RemoteSequence:
        """Return an empty sequence; see `Engine.new_sequence`."""
        return RemoteSequence(self.memory, namespace)

    def tasks(self) -> list[Task]:
        """Return the tasks that run."""
        with self._streams_lock:
            return list(self._live)

    def warm_tokens(
        self,
        token_ids: Sequence[int],  # noqa: ARG002 - as `Engine` has it
        namespace: str | None = "",  # noqa: ARG002 - likewise
        *,
        on_disk: bool = False,  # noqa: ARG002 - likewise
    ) -> int:
        """Return 0: nobody here knows what an engine elsewhere still has."""
        return 0

    def forget(self) -> int:
        """Return 0: nothing is here to be evicted."""
        return 0

    def start(self) -> None:
        """Do nothing: there is nothing to warm up."""

    def wait_until_warm(self) -> None:
        """Return at once."""

    def note_computed(self, tokens: int) -> None:
        """Count tokens of prompts that were computed; called by each task on its own thread."""
        with self._counting:
            self.computed_tokens += tokens

    def require(self, params: SamplingParams) -> None:
        """Check that parameters can be followed elsewhere; see `Decoder.require`."""
        self._api.require(params)

    def next_token(self, ask: Ask) -> Drawn:
        """Return the next token of a stream, which is opened where none goes on with this history."""
        if ask.forced is not None:
            return Drawn(ask.forced)
        if ask.grammar is not None and (first := self._opening(ask, ask.grammar)) is not None:
            return first
        with self._streams_lock:
            stream = self._streams.get(ask.sequence)
            if stream is None or not stream.goes_on_with(ask):
                stream = self._begin(ask)
        return stream.next_token(ask)

    def _opening(self, ask: Ask, grammar: GrammarState) -> Drawn | None:
        """
        Return the token that opens reasoning, where the model chooses that over an answer; else None.

        The choice is among what the grammar allows first and that token, as here; where that is too much to
        say, among all tokens. An answer is then begun anew, under the grammar.
        """
        reply = list(ask.reply)
        opening = grammar.opening(reply)
        if opening is None:
            return None
        allowed = tuple(grammar.allowed(reply).nonzero()[0].tolist())
        with self._streams_lock:
            stream = self._begin(
                replace(ask, grammar=None, most_tokens=1),
                allowed if len(allowed) <= MOST_ALLOWED else None,
            )
        drawn = stream.next_token(ask)
        return drawn if drawn.token_id == opening else None

    def _begin(self, ask: Ask, allowed: tuple[int, ...] | None = None) -> "_Stream":
        """Open a stream in the place of the one that the sequence has; `_streams_lock` is held."""
        if (before := self._streams.get(ask.sequence)) is not None:
            before.close()
        task = next((one for one in self._live if one.sequence is ask.sequence), None)
        stream = self._streams[ask.sequence] = _Stream(self, ask, task, allowed=allowed)
        return stream

    def submit(self, task: Task) -> None:
        """
        Have a task run, on a thread of its own; its sequence belongs to that until it has ended.

        Of tasks that nobody waits for, the oldest is cancelled where there are many.

        Raises:
            MisuseError: As `Engine.submit`.
        """
        task.sequence.plan()  # raises where there is nothing to compute
        with self._streams_lock:
            if self._is_closed:
                raise MisuseError("this engine was closed and cannot be used any more")
            if task.sequence.memory is not self.memory:
                raise MisuseError(
                    "a sequence is computed by the engine that made it, and by no other"
                )
            if any(other.sequence is task.sequence for other in self._live):
                raise MisuseError("this sequence is being worked on already")
            self._live[task] = None
            task.state = "submitted"
            if task.spare:
                self._spare.append(task)
                while len(self._spare) > MOST_SPARE:
                    self._spare.popleft().cancel()
            if not self._watches:
                self._watches = True
                threading.Thread(target=self._watch, name="recollect-watch", daemon=True).start()
        threading.Thread(
            target=self._run_task, args=[task], name="recollect-remote", daemon=True
        ).start()

    def compute(self, sequences: Collection[TokenSequence]) -> None:
        """
        Have the KV of sequences computed elsewhere, where it is not known to be there.

        Raises:
            EngineUnavailableError: No engine answers.
        """
        for sequence in dict.fromkeys(sequences):
            if sequence.plan().tokens:
                self._prefill(sequence, None)

    def close(self) -> None:
        """Cancel all tasks; histories stay readable. May be called again."""
        with self._streams_lock:
            self._is_closed = True
            live, streams = list(self._live), list(self._streams.values())
        for task in live:
            task.cancel()
        for stream in streams:
            stream.cut()
        for task in live:
            task.join()
        super().close()

    def _run_task(self, task: Task) -> None:
        try:
            goes_on = True
            while goes_on and not task.cancelled:
                goes_on = task.on_logits()
                task.hand_over()
            if not task.cancelled and task.sequence not in self._streams:
                self._prefill(task.sequence, task)  # it asked for no token: it wants the KV alone
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the task
            self._end(task, None if task.cancelled else error)
        else:
            self._end(task, None)

    def _end(self, task: Task, error: Exception | None) -> None:
        with self._streams_lock:
            stream = self._streams.pop(task.sequence, None)
            if task in self._spare:
                self._spare.remove(task)
        if stream is not None:
            stream.close()
        ended: TaskState = "cancelled" if task.cancelled else "done"
        task.end(ended if error is None else "failed", error)
        with self._streams_lock:
            self._live.pop(task, None)

    def _prefill(self, sequence: TokenSequence, task: Task | None) -> None:
        """
        Have the KV of a history computed, at a priority below that of replies where nobody waits.

        Where nobody waits, that is of the part alone that can be found again: the rest of a block would be
        computed twice.
        """
        if len(sequence) >= self.info.context_length:
            return  # a reply that has no room asks for nothing
        length = len(sequence)
        if task is not None and task.idle and not self.info.reuse.inside_blocks:
            length = self.info.reuse.warm_tokens(length)
        ask = Ask(
            sequence=sequence,
            params=SamplingParams(),
            seed=0,
            reply_start=length,
            most_tokens=0,
        )
        stream = _Stream(self, ask, task, length)
        with self._streams_lock:
            self._streams[sequence] = stream
        try:
            stream.read_to_end()
        finally:
            stream.close()

    def _watch(self) -> None:
        """Cut the connections of tasks that were cancelled, until there are none for a while."""
        idle = 0
        while idle < _LINGER:
            sleep(_WATCH_S)
            with self._streams_lock:
                gone = [self._streams.get(task.sequence) for task in self._live if task.cancelled]
                idle = 0 if self._live else idle + 1
                if idle == _LINGER:
                    self._watches = False
            for stream in gone:
                if stream is not None:
                    stream.cut()


class _Stream:
    """
    The tokens that follow one history, from as many requests as it takes. Owned by the engine.

    One request more is made where none has given a token; where some have, it goes on at another replica
    with what there is, unless a grammar forbids it, which would begin anew, or penalties that count a
    reply's own tokens.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        ask: Ask,
        task: Task | None,
        length: int | None = None,
        *,
        allowed: tuple[int, ...] | None = None,
    ) -> None:
        """
        Have a request made.

        Args:
            engine: Owns it.
            ask: What is asked for first.
            task: Whose tokens they are; None: nobody's, and nobody can cancel it.
            length: How many tokens of the history count; None: all.
            allowed: What may be generated; None: anything.
        """
        self._engine = engine
        self._ids = ask.sequence.token_ids[:length]
        self._namespace = ask.sequence.namespace
        # One that has no conversation stays where it began, however long it grows.
        ask.sequence.session = ask.sequence.session or session_of(self._ids)
        self._session = ask.sequence.session
        self._sequence = weakref.ref(ask.sequence)  # of which the engine holds this stream
        _remote(ask.sequence).go_on_from(len(self._ids))
        self._params, self._seed = ask.params, ask.seed
        self._most = ask.most_tokens
        self._task = task
        self._begun = len(self._ids)
        self._grammar, self._allowed = _grammar_of(ask), allowed
        # As here: no reply ends while the model thinks before a grammar begins.
        thinks = ask.grammar is not None and self._grammar is None
        self._banned = tuple(sorted(engine.eos_token_ids)) if thinks else ()
        self._known, self._had = engine.memory.ledger.known(self._namespace, self._ids)
        self._failed: list[Replica] = []
        self._moves = 0
        self._is_done = False
        self._open()

    def goes_on_with(self, ask: Ask) -> bool:
        """Return whether its next token is the one that is asked for."""
        length, known = len(ask.sequence), len(self._ids)
        return (
            length == known
            and _remote(ask.sequence).kept == (known if known == self._begun else known - 1)
            and ask.sequence.tokens(length - 1) == self._ids[-1:]
            and ask.params is self._params
            and ask.seed == self._seed
            and (self._grammar is not None) == (_grammar_of(ask) is not None)
            and known - self._begun < self._most
        )

    def next_token(self, ask: Ask) -> Drawn:
        """
        Return the next token, or that the reply has ended.

        Raises:
            EngineUnavailableError: No replica goes on with it, or one refuses it.
        """
        _remote(ask.sequence).go_on_from(len(self._ids))
        while True:
            token = self._next()
            if token is not None:
                self._ids.append(token[0])
                ends = token[0] in self._engine.eos_token_ids and not self._params.ignore_eos
                if ends or len(self._ids) - self._begun >= self._most:
                    self._finish()  # what is told comes with the last token
                return Drawn(*token)
            if self._is_done:
                return Drawn(None, finish=self._told.finish)

    def read_to_end(self) -> None:
        """Take all that comes, and forget it."""
        while not self._is_done:
            self._next()

    def cut(self) -> None:
        """End the request under way, from any thread."""
        self._link.cut()

    def close(self) -> None:
        """End the request, and take note of what it came to. May be called again."""
        self._link.cut()
        self._tokens.close()
        self._finish()
        self._link.close()

    def _open(self) -> None:
        self._told, self._given = Told(), 0
        self._replica = self._engine.replicas.begin(self._session, self._failed)
        self._dropped = weakref.finalize(self, self._engine.replicas.drop, self._replica)
        self._dropped.atexit = False
        self._link = Link(self._replica.url)
        self._is_open = True
        params, prefix = self._params, len(self._ids)
        order = Order(
            token_ids=list(self._ids),
            params=params,
            seed=_seed_at(self._seed, prefix),
            most_tokens=self._most - (prefix - self._begun) if self._most else 0,
            namespace=self._namespace,
            session=self._session,
            grammar=self._grammar,
            allowed=self._allowed,
            banned=self._banned,
            is_idle=self._task is not None and self._task.idle,
        )
        # Until it is told, all counts as computed: reuse is never claimed without evidence.
        self._fed = FeedPlan(0, prefix)
        if self._task is not None:
            self._task.fed.append(self._fed)
        self._tokens: Generator[Token, None, None] = self._replica.api.stream(
            order, self._told, self._link
        )

    def _next(self) -> Token | None:
        """Return a token; None: there is none yet, or no more."""
        try:
            token = next(self._tokens, None)
        except Lost as lost:
            self._finish(lost=not self._link.was_cut)
            self._move(lost)
            return None
        except RefusedError as refusal:
            self._finish()
            raise EngineUnavailableError(
                f"{refusal} Restart recollect if the engine has another model or a shorter context now."
            ) from refusal
        except BaseException:
            self._finish()
            raise
        self._take_note()
        if token is None:
            self._finish()
            self._is_done = True
            return None
        self._given += 1
        return token

    def _move(self, lost: Lost) -> None:
        """
        Go on with another request.

        Raises:
            EngineUnavailableError: There were enough, or there can be none.
        """
        replica = self._replica
        self._failed.append(replica)
        self._moves += 1
        if self._link.was_cut:
            raise EngineUnavailableError("The request was cut off.")
        counts_reply = self._params.presence_penalty or self._params.frequency_penalty
        has_begun = len(self._ids) > self._begun
        is_bound = has_begun and bool(self._grammar is not None or counts_reply)
        most = MOST_MOVES if has_begun else 1
        if is_bound or self._moves > most:
            raise EngineUnavailableError(
                f"The engine at {replica.url} did not finish: {lost}. Ask again."
            ) from lost
        self._open()

    def _take_note(self) -> None:
        """Replace what was assumed of the prompt by what the engine has told, once it has."""
        reused, prompt = self._told.reused_tokens, self._fed.end
        if reused is None or self._fed.start or not reused:
            return
        # An engine may count all of a prompt as reused, and has fed its last token anyway.
        known = FeedPlan(
            min(reused, plan_feed(prompt, prompt, self._engine.info.reuse).start), prompt
        )
        if self._task is not None:
            self._task.fed[self._task.fed.index(self._fed)] = known
        self._fed = known

    def _finish(self, *, lost: bool = False) -> None:
        """Take note of what the request came to."""
        if not self._is_open:
            return
        self._is_open = False
        self._dropped.detach()
        if not lost and not self._link.was_cut:
            self._drain()
        self._take_note()
        fed = self._fed.end - self._fed.start
        if self._told.reused_tokens is None and not self._given:
            fed = 0  # it was ended before anything is known of it
            if self._task is not None:
                self._task.fed.remove(self._fed)
        self._engine.replicas.end(
            self._replica,
            reused=self._fed.start,
            computed=0 if lost else fed,
            generated=self._given,
            lost=lost,
        )
        self._engine.note_computed(0 if lost else fed)
        sequence = self._sequence()
        if sequence is not None:
            sequence.fed_tokens += 0 if lost else fed
            has_less = self._fed.start < self._engine.info.reuse.warm_tokens(self._known)
            sequence.moved = has_less and self._had not in (None, self._replica.url)
        if not lost and (self._given or self._told.finish is not None):
            # All of a prompt has KV, and of a reply all but the last token.
            computed = self._ids[: max(self._begun, len(self._ids) - 1)]
            self._engine.memory.ledger.note(self._namespace, computed, self._replica.url)

    def _drain(self) -> None:
        """Read what comes behind an end token: what is told of the request."""
        with suppress(Lost):  # the reply is whole; only its cost is not known
            for _ in self._tokens:
                pass


def _grammar_of(ask: Ask) -> Grammar | None:
    """Return the grammar that the next token has to follow; None: there is none, or it begins later."""
    if ask.grammar is None or ask.grammar.start_in(list(ask.reply)) is None:
        return None
    return ask.params.grammar


def _seed_at(seed: int, position: int) -> int:
    """Return the seed of a request: the same prompt with the same seed gives the same reply."""
    return (seed * 0x9E3779B97F4A7C15 + position) % 2**63


def _remote(sequence: TokenSequence) -> RemoteSequence:
    assert isinstance(sequence, RemoteSequence), "the engine makes no other"
    return sequence
