"""Conversations against a list of messages and a prefill of everything, in any order of operations."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from recollect.conversation.matching import KnownMessages, MessageIndex
from recollect.conversation.model import Model
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import Session
from recollect.conversation.showing import Prompt
from recollect.conversation.tree import Node
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import (
    ContextFullError,
    ConversationError,
    OutOfBlocksError,
    RewindError,
    RuntimeFailure,
)
from recollect.kv.blocks import CachedBlock
from recollect.kv.prefix import Match, PrefixCache
from recollect.models.catalog import reference_model
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import SamplingParams, common_prefix_length

CONTEXT: Final = 260
SIZE: Final = 8
NUM_BLOCKS: Final = 60
TOKENIZER: Final = ByteTokenizer()
TEXTS = st.sampled_from(["", "a", "b", "ab", "abc", "a longer message", "é€"])
LIMITS = st.integers(1, 7)
Replay = Callable[[type[RuleBasedStateMachine], str], None]


class FailingRuntime(ReferenceRuntime):
    """Fails at the pass that it is told to, after it has written the wrong tokens."""

    fail_in: int | None = None

    def forward(self, rows: Sequence[Row]) -> PassResult:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                super().forward([replace(row, token_ids=[7] * len(row.token_ids)) for row in rows])
                raise RuntimeFailure("injected")
        return super().forward(rows)


@lru_cache(5000)
def fresh_reply(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Return the greedy reply: one prefill of everything on a runtime of its own, then token by token."""
    runtime = ReferenceRuntime(vocab_size=TOKENIZER.vocab_size, block_size=512)
    runtime.allocate(1)
    reply: list[int] = []
    logits = runtime.forward([Row(prompt, 0, [0])]).logits[0]
    while len(reply) < min(limit, CONTEXT - len(prompt)):
        token = int(logits.argmax())
        if token in TOKENIZER.eos_token_ids:
            break
        reply.append(token)
        logits = runtime.forward([Row([token], len(prompt) + len(reply) - 1, [0])]).logits[0]
    return tuple(reply)


@dataclass(frozen=True)
class Said:
    """A message in the dumb model; the conversation is the chain of those before it."""

    before: "Said | None"
    role: str
    content: str
    ids: tuple[int, ...] | None = None

    def chain(self) -> list["Said"]:
        return [*(self.before.chain() if self.before else []), self]


def prompt_of(chain: list[Said]) -> list[int]:
    ids: list[int] = []
    for said in chain:
        ids += TOKENIZER.encode(f"<|im_start|>{said.role}\n")
        ids += TOKENIZER.encode(said.content) if said.ids is None else said.ids
        ids += TOKENIZER.encode("<|im_end|>\n")
    return ids + TOKENIZER.encode("<|im_start|>assistant\n")


def text_of(ids: Sequence[int], *, is_cut: bool) -> str:
    """Return what a reply says; where it was cut, without the signs for a character's first bytes."""
    text = TOKENIZER.decode(ids)
    unfinished = len(text) - len(text.rstrip("\ufffd"))
    return text[: len(text) - min(unfinished, 3)] if is_cut else text


class SessionMachine(RuleBasedStateMachine):
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.runtime = FailingRuntime(
            vocab_size=TOKENIZER.vocab_size,
            context_length=CONTEXT,
            block_size=SIZE,
            pace=Pace(prefill_chunk=16, shared_chunk=8),
        )
        self.model = Model(
            replace(reference_model(), context_length=CONTEXT),
            self.runtime,
            profile="exact",
            home=Path(),  # nothing is kept
            kv_memory=NUM_BLOCKS * self.runtime.info.bytes_per_block,
        )
        self.tips: dict[Session, Said | None] = {}
        self.known: dict[Node, Said | None] = {}
        self.done: set[tuple[int, ...]] = set()

    def teardown(self) -> None:
        for session in self.tips:
            session.close()
        engine = self.model.engine
        engine.check()
        assert engine.pool.used_blocks == engine.cache.evictable_blocks == len(engine.cache)
        self.model.close()

    @initialize(target=sessions)
    def begin(self) -> Session:
        return self._new("S")

    @rule(target=sessions, system=st.sampled_from([None, "S", "T"]))
    def new(self, system: str | None) -> Session:
        return self._new(system)

    def _new(self, system: str | None) -> Session:
        session = self.model.session(system)
        said = None if system is None else Said(None, "system", system)
        self.known[session.tree.root] = None
        self._at(session, said)
        return session

    @rule(session=sessions, text=TEXTS, limit=LIMITS, stop_after=st.none() | st.integers(0, 4))
    def say(self, session: Session, text: str, limit: int, stop_after: int | None) -> None:
        self._turn(session, Said(self.tips[session], "user", text), text, limit, stop_after)

    @rule(session=sessions, limit=LIMITS, stop_after=st.none() | st.integers(0, 4))
    def answer(self, session: Session, limit: int, stop_after: int | None) -> None:
        tip = self.tips[session]
        is_cut = session.tip.finish_reason in ("length", "cancelled")
        if tip is not None and tip.role == "assistant" and is_cut:
            assert tip.before is not None, "a reply follows something"
            self._turn(session, tip.before, None, limit, stop_after, begun=tip)
        elif tip is None or tip.role != "user":
            with pytest.raises(ConversationError):
                session.stream(None)
        else:
            self._turn(session, tip, None, limit, stop_after)

    @rule(session=sessions, turns=st.integers(0, 3))
    def undo(self, session: Session, turns: int) -> None:
        tip = self.tips[session]
        asked = [said for said in (tip.chain() if tip else []) if said.role == "user"]
        if not 1 <= turns <= len(asked):
            with pytest.raises(RewindError):
                session.undo(turns)
        else:
            session.undo(turns)
            self._at(session, asked[-turns].before)

    @rule(session=sessions, number=st.integers(0, 30))
    def rewind(self, session: Session, number: int) -> None:
        node = session.tree.node(number % (len(session.tree) + 1))
        self._settle()
        fed = self.model.engine.computed_tokens
        session.rewind(node)
        assert self.model.engine.computed_tokens == fed
        self._at(session, self.known[node])

    @rule(target=sessions, session=sessions, number=st.none() | st.integers(0, 30))
    def fork(self, session: Session, number: int | None) -> Session:
        self._settle()
        used, fed = self.model.engine.pool.used_blocks, self.model.engine.computed_tokens
        node = None if number is None else session.tree.node(number % (len(session.tree) + 1))
        other = session.fork(node)
        assert (self.model.engine.pool.used_blocks, self.model.engine.computed_tokens) == (
            used,
            fed,
        )
        self._at(other, self.tips[session] if node is None else self.known[node])
        return other

    @rule(session=sessions, limit=LIMITS)
    def regenerate(self, session: Session, limit: int) -> None:
        before = self.tips[session]
        asked = [said for said in (before.chain() if before else []) if said.role == "user"]
        if not asked:
            with pytest.raises(ConversationError):
                session.regenerate()
            return
        self._replied(session, before, asked[-1], lambda p: session.regenerate(params=p), limit)

    @rule(session=sessions, number=st.integers(0, 30), text=TEXTS, limit=LIMITS)
    def edit(self, session: Session, number: int, text: str, limit: int) -> None:
        node = session.tree.node(number % (len(session.tree) + 1))
        said, before = self.known[node], self.tips[session]
        if said is None or said.role != "user":
            with pytest.raises(ConversationError):
                session.edit(node, text)
            return
        user = Said(said.before, "user", text)
        self._replied(session, before, user, lambda p: session.edit(node, text, params=p), limit)

    @rule(session=sessions, text=TEXTS)
    def prewarm(self, session: Session, text: str) -> None:
        self._settle()
        fed = self.model.engine.computed_tokens
        try:
            computed = session.prewarm(text)
        except (ContextFullError, OutOfBlocksError, RuntimeFailure):
            return
        assert self.model.engine.computed_tokens - fed == computed
        assert session.prewarm(text) == 0

    @rule(session=sessions, pins=st.booleans())
    def pin(self, session: Session, pins: bool) -> None:
        if not pins:
            session.unpin()
            return
        try:
            session.pin()
        except (ContextFullError, OutOfBlocksError, RuntimeFailure):
            return
        warm, tokens = session.warm_tokens()
        assert warm == tokens
        for other in list(self.tips)[:-2]:  # so that others find room
            other.unpin()

    @rule(session=sessions, namespace=st.sampled_from(["", "other"]))
    def match(self, session: Session, namespace: str) -> None:
        """A client that sends everything as text gets back what was generated, and only its own."""
        messages = session.transcript()
        if not messages:
            return
        found = self.model.session_from(messages, namespace=namespace)
        assert found.transcript() == messages
        own = [node.token_ids for node in found.path()]
        if namespace:
            assert own == [None] * len(own)
        elif session.tip.token_ids is not None:
            assert own[-1] in {  # not `decode(own[-1])`: it may have been cut inside of a character
                said.ids
                for said in self.known.values()
                if said is not None and said.content == session.tip.content
            }

    @rule(session=sessions, text=TEXTS)
    def forget_a_stream(self, session: Session, text: str) -> None:
        try:
            session.stream(text)
        except ContextFullError:
            return
        gc.collect(0)

    @rule(passes=st.integers(0, 5))
    def fail_soon(self, passes: int) -> None:
        self.runtime.fail_in = passes

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        session.close()
        del self.tips[session]

    @invariant()
    def the_bookkeeping_is_right(self) -> None:
        self._settle()
        self.model.engine.check()
        for session in self.tips:
            session.conversation.check()

    @invariant()
    def transcripts_are_the_lists(self) -> None:
        for session, tip in self.tips.items():
            chain = tip.chain() if tip else []
            assert [(m["role"], m["content"]) for m in session.transcript()] == [
                (said.role, said.content) for said in chain
            ]
            assert [node.token_ids for node in session.path()] == [said.ids for said in chain]

    def _at(self, session: Session, said: Said | None) -> None:
        """Note where the dumb model says that a session stands now."""
        self.tips[session] = said
        node: Node | None = session.tip
        while node is not None and node.parent is not None and said is not None:
            assert self.known.setdefault(node, said) is said or self.known[node] == said
            node, said = node.parent, said.before

    def _turn(
        self,
        session: Session,
        user: Said,
        text: str | None,
        limit: int,
        stop_after: int | None,
        *,
        begun: Said | None = None,
    ) -> None:
        """Say something, or have the tip answered; *begun* is a reply that goes on."""
        before, nodes = self.tips[session], len(session.tree)
        self._settle()
        fails = self.runtime.fail_in is not None
        begun_ids = () if begun is None else begun.ids or ()
        prompt = [*prompt_of(user.chain()), *begun_ids]
        known = self.model.engine.warm_tokens(prompt)
        lost = self.model.engine.cache.evicted_blocks
        pieces: list[str] = []
        try:
            stream = session.stream(text, params=SamplingParams(max_tokens=limit))
        except ContextFullError:
            assert len(prompt) + 1 > CONTEXT
            assert (session.tip, len(session.tree)) == (session.tip, nodes)
            return
        assert len(prompt) < CONTEXT
        failed = False
        try:
            if stop_after == 0:
                stream.stop()
            for number, piece in enumerate(stream, 1):
                pieces.append(piece)
                if number == stop_after:
                    stream.stop()
        except (OutOfBlocksError, RuntimeFailure):
            failed = True
        reply = stream.reply
        if reply is None:
            assert failed or stop_after == 0
            assert len(session.tree) == nodes
            self._at(session, before)
            return
        assert reply.node.token_ids is not None
        assert reply.node.token_ids[: len(begun_ids)] == begun_ids
        ids = reply.node.token_ids[len(begun_ids) :]
        full = fresh_reply(tuple(prompt), limit)
        assert ids == full[: len(ids)]
        assert failed or stop_after is not None or ids == full
        assert reply.text.startswith("".join(pieces)) if failed else reply.text == "".join(pieces)
        content = text_of((*begun_ids, *ids), is_cut=reply.finish_reason != "stop")
        assert ("" if begun is None else begun.content) + reply.text == content
        usage = reply.usage
        assert usage.prompt_tokens == len(prompt) == usage.reused_tokens + usage.computed_tokens
        lost = self.model.engine.cache.evicted_blocks - lost
        # The logits after a prompt that was read lately are known, too.
        lacking = {len(prompt) - known, max(1, len(prompt) - known)}
        assert fails or lost or usage.awaited_tokens in lacking
        self._never_twice(prompt, len(prompt) - usage.awaited_tokens, fails)
        self._said(prompt, ids)
        self._at(session, Said(user, "assistant", content, (*begun_ids, *ids)))

    def _settle(self) -> None:
        """Wait until all work that nobody waits for is done."""
        engine = self.model.engine
        while tasks := engine.tasks():
            for task in tasks:
                task.join()
        engine.check()  # which waits for the pass under way

    def _never_twice(self, prompt: list[int], reused: int, fails: bool) -> None:
        """What was once said is never computed again, but for the last token, while it is in memory."""
        done = max((common_prefix_length(prompt, one) for one in self.done), default=0)
        if self.model.engine.cache.evicted_blocks == 0 and not fails:
            assert reused >= min(done, len(prompt) - 1)

    def _said(self, prompt: list[int], ids: tuple[int, ...]) -> None:
        self.done.add((*prompt, *ids[:-1]))

    def _replied(
        self,
        session: Session,
        before: Said | None,
        user: Said,
        operation: Callable[[SamplingParams], object],
        limit: int,
    ) -> None:
        prompt = prompt_of(user.chain())
        fails = self.runtime.fail_in is not None
        try:
            operation(SamplingParams(max_tokens=limit))
        except (ContextFullError, OutOfBlocksError, RuntimeFailure) as refused:
            assert fails or not isinstance(refused, RuntimeFailure)  # noqa: PT017
            assert (len(prompt) >= CONTEXT) == isinstance(refused, ContextFullError)  # noqa: PT017
            self._learn(session)
            self._at(session, self._broken_off(session, before, user, limit))
            return
        ids = session.tip.token_ids
        assert ids == fresh_reply(tuple(prompt), limit)
        text = text_of(ids, is_cut=session.tip.finish_reason != "stop")
        self._at(session, Said(user, "assistant", text, ids))

    def _broken_off(
        self, session: Session, before: Said | None, user: Said, limit: int
    ) -> Said | None:
        """Return where a session stands after a reply failed: with what was said, if it went on."""
        stands = self.known[session.tip]
        if stands is None or stands == before:
            return before
        assert before in (user, user.before), "what was broken off elsewhere is kept beside"
        assert (stands.before, stands.role) == (user, "assistant")
        ids = stands.ids or ()
        assert ids == fresh_reply(tuple(prompt_of(user.chain())), limit)[: len(ids)]
        return stands

    def _learn(self, session: Session) -> None:
        """Take note of a reply that failed midway: it stays in the tree, and nobody stands there."""
        for node in session.tree.nodes():
            if node not in self.known:
                assert node.parent is not None
                assert node.role is not None
                self.known[node] = Said(
                    self.known[node.parent], node.role, node.content, node.token_ids
                )


TestSession = SessionMachine.TestCase


def _skip_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FailingRuntime, "copy_blocks", lambda _self, _pairs: None)


def _match_a_token_too_many(patch: pytest.MonkeyPatch) -> None:
    """Other ids over old KV, as where text is undone and the cache is not."""
    match = PrefixCache.match

    def greedy(self: PrefixCache, after: CachedBlock, ids: Sequence[int]) -> Match:
        found = match(self, after, ids)
        if found.tokens >= len(ids) or found.tokens % SIZE == 0:
            return found
        return replace(found, tokens=found.tokens + 1)

    patch.setattr(PrefixCache, "match", greedy)


def _find_messages_of_anybody(patch: pytest.MonkeyPatch) -> None:
    init = MessageIndex.__init__

    def everywhere(
        self: MessageIndex, known: KnownMessages | None = None, namespace: str = ""
    ) -> None:
        init(self, known)

    patch.setattr(MessageIndex, "__init__", everywhere)


def _encode_replies_again(patch: pytest.MonkeyPatch) -> None:
    """The reply's text, decoded and encoded, in place of the ids: not the same for bytes that are no text."""
    encode = PromptEncoder.encode

    def anew(self: PromptEncoder, path: Sequence[Node], *rest: Any) -> Prompt:
        as_text = [
            node
            if node.token_ids is None
            else replace(node, token_ids=tuple(TOKENIZER.encode(node.content)))
            for node in path
        ]
        return encode(self, as_text, *rest)

    patch.setattr(PromptEncoder, "encode", anew)


def _compute_everything_each_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "reuse", lambda _self: None)


def _forget_the_reply(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "leave_tail", lambda _self: None)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "skipping the copy": _skip_the_copy,
    "matching a token too many": _match_a_token_too_many,
    "messages found across namespaces": _find_messages_of_anybody,
    "replies encoded again": _encode_replies_again,
    "everything computed each time": _compute_everything_each_time,
    "the end of a reply forgotten": _forget_the_reply,
}


EXPECTED = (AssertionError,)


def test_a_character_in_which_a_reply_was_cut_comes_with_the_rest() -> None:
    machine = SessionMachine()
    machine.begin()
    session = machine.model.session()
    machine.tips[session] = None
    machine.say(session, "a", 1, None)
    assert (session.tip.token_ids, session.tip.content) == ((0xC2,), "")
    machine.match(session, "")
    machine.answer(session, 1, None)
    assert (session.tip.token_ids, session.tip.content) == ((0xC2, 0x94), "\x94")
    machine.match(session, "")
    machine.teardown()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_example(
    fault: str, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    replay(SessionMachine, fault)
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        replay(SessionMachine, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(SessionMachine, settings=fault_search(1500))
