"""
A place in a conversation from which a person goes on: ask, undo, rewind, fork, regenerate, edit.

A `Place` is a node of the tree and how one moves there; a `Session` also asks, and a `ReplyStream` is
the reply while it is generated. Joins the tree (what was said) and the prompt encoder (as which token
ids). No KV is held between turns: each turn asks for the token ids that its place in the tree means,
and finds in the engine's cache what any earlier work left of them. So no operation on the tree can
leave the KV behind.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, Self

from recollect.conversation.conversation import Asked, Conversation
from recollect.conversation.matching import Change
from recollect.conversation.prompt import PromptEncoder, Prompting
from recollect.conversation.tools import NO_TOOLS, Tools
from recollect.conversation.tree import Node, Overflow, Tree
from recollect.conversation.turn import Expectation, Reply, Turn, explained
from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars
from recollect.engine.pinning import pin_on_disk
from recollect.engine.reply import GeneratedReply, IdleWork, ReadAhead, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.engine.scheduler import Task
from recollect.engine.sequence import FeedPlan
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    RewindError,
    SessionBusyError,
    TemplateError,
    UnknownNodeError,
)
from recollect.journal.checkpoints import Checkpoint, Checkpoints
from recollect.journal.records import require_name
from recollect.kv.blocks import CachedBlock
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Tokenizer
from recollect.types import Message, SamplingParams, Usage


class ModelParts(Protocol):
    """What a session needs of the model that it talks to, which is a `Model`."""

    @property
    def engine(self) -> Engine:
        """Return what computes."""

    @property
    def prompts(self) -> PromptEncoder:
        """Return what makes token ids of a path through the tree."""

    @property
    def template(self) -> ChatTemplate:
        """Return what shows a conversation as the model's text."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return what makes text of token ids."""

    @property
    def grammars(self) -> Grammars:
        """Return the compiled grammars that replies can be held to."""

    @property
    def weights_fingerprint(self) -> str:
        """Return the fingerprint that replies are saved with."""

    @property
    def places(self) -> Checkpoints:
        """
        Return what keeps checkpoints.

        Raises:
            StoreError: No KV is kept on disk here, or the journal cannot be used.
        """


ANSWERED: Final = ("user", "tool")
"""Roles whose messages a reply can follow."""


class Place:
    """
    A node of a conversation's tree that one goes on from.

    Safe from several threads in that whatever moves it, or goes on from it, is refused while
    something else does.

    Invariant: the tip is a node of the tree.
    """

    def __init__(
        self,
        conversation: Conversation,
        tip: Node,
        *,
        name: str | None = None,
        change: Change | None = None,
    ) -> None:
        self.conversation = conversation
        self._name = name
        self._tip = tip
        self._change = change
        self._busy = threading.Lock()

    @property
    def name(self) -> str | None:
        """Return the conversation's named tip that moves with this place; None: none does."""
        return None if self._name is None else self.conversation.tip_name(self._name)

    @property
    def tip(self) -> Node:
        """Return the node at which one stands."""
        return self._tip

    @property
    def tree(self) -> Tree:
        """Return all messages in all branches."""
        return self.conversation.tree

    def path(self) -> list[Node]:
        """Return the messages up to the tip."""
        return self._tip.path()

    def transcript(self) -> list[Message]:
        """Return the messages up to the tip as plain values, calls of tools beside the text."""
        return [node.message() for node in self.path()]

    def last_user(self) -> Node:
        """
        Return the message that the tip answers, a user's or a tool's, or the tip if it is one.

        Raises:
            ConversationError: Nobody has said anything yet.
        """
        for node in reversed(self.path()):
            if node.role in ANSWERED:
                return node
        raise ConversationError("Nothing has been said yet: say something first.")

    def rewind(self, node: Node) -> None:
        """
        Go to a node of the tree, in any branch; costs no forward pass.

        Raises:
            UnknownNodeError: It is not a node of this conversation. Nothing was changed.
            StoreError: The journal cannot keep it. Nothing was changed.
        """
        self.tree.require(node)
        with self._exclusively():
            if self.name is not None:
                self.conversation.set_tip(self.name, node)
            self._tip = node
            self._change = None

    def undo(self, turns: int = 1) -> Node:
        """
        Go back by that many turns and return the new tip; they stay in the tree.

        Raises:
            RewindError: There are not as many. Nothing was changed.
        """
        asked = [node for node in self.path() if node.role == "user"]
        if not 1 <= turns <= len(asked):
            raise RewindError(
                f"Cannot undo {turns} turns: the conversation has {len(asked)}."
                if asked
                else "Nothing to undo."
            )
        parent = asked[-turns].parent
        assert parent is not None, "a user's message has a parent"
        self.rewind(parent)
        return parent

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._busy.release()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(
                "A reply is being generated in this session: read it to its end or stop it first."
            )


class Session(Place):
    """
    A place in a conversation's tree.

    Safe from several threads in that a second reply, while one is being generated, is refused.
    Forks share the conversation and nothing else.

    Invariants:
        1. All of `Place`.
        2. Between turns the session holds no blocks, but for those that `pin` keeps.
    """

    def __init__(
        self,
        model: ModelParts,
        conversation: Conversation,
        tip: Node,
        params: SamplingParams,
        *,
        namespace: str = "",
        name: str | None = None,
        overflow: Overflow = "error",
        change: Change | None = None,
        tools: Tools = NO_TOOLS,
        template_options: Mapping[str, Any] | None = None,
        begun: Node | None = None,
    ) -> None:
        super().__init__(conversation, tip, name=name, change=change)
        self._model = model
        self._begun = begun  # a reply that somebody gave the beginning of
        self._namespace = namespace
        self._idle = IdleWork(model.engine)
        self._pinned: list[CachedBlock] = []
        self._template_options = dict(template_options or {})
        prompts = model.prompts
        if self._template_options:
            prompts = prompts.with_options(self._template_options)
        self._prompting = Prompting(model.engine, prompts, namespace)
        self.params = params
        self.overflow = overflow
        self.tools = tools
        """What replies may call from now on; `dataclasses.replace` gives another choice."""

    @property
    def namespace(self) -> str:
        """Return within which KV is shared."""
        return self._namespace

    def stream(self, text: str | None, *, params: SamplingParams | None = None) -> "ReplyStream":
        """
        Say something, and return the reply as it is generated.

        A conversation that is kept has the message on disk before the reply begins. Where the program
        ended before the reply did, the tip is that message: said again it is answered, and anything
        else is said in its place.

        Args:
            text: The message; None to have the tip answered, which then is a user's message or
                what a tool gave back, and may have instructions after it. A reply whose beginning was
                given goes on: the longer one takes its place in the conversation, and what is
                returned is what was added.
            params: How to sample this reply; None: as the session does.

        Raises:
            ConversationError: There is nothing to answer, or a reply is being generated already.
            ConfigError: A parameter, a grammar or a tool cannot be used; the subclass says why.
            TemplateError: The template refuses the conversation.
            ContextFullError: It does not fit the context.
            OutOfBlocksError: It does not fit the KV memory; raised by the first piece.
                In each case the conversation is as it was.
        """
        return self._stream(None, text, params)

    def respond(self, text: str | None, *, params: SamplingParams | None = None) -> Reply:
        """Say something and return the whole reply; see `stream`."""
        return self.stream(text, params=params).read()

    def add(self, message: Message) -> Node:
        """
        Add a message that something else is said after, such as what a tool gave back.

        An assistant's message is the beginning of a reply: `respond(None)` goes on with it.

        It is kept as soon as that is asked for.

        Raises:
            InvalidParameterError: It lacks something. The conversation is as it was.
        """
        with self._exclusively():
            shown = self._model.template.with_thoughts([message])
            self._tip = self.conversation.add_unkept(self._tip, *shown)
            if self._tip.role == "assistant":
                self._begun = self._tip
            return self._tip

    def regenerate(self, *, params: SamplingParams | None = None) -> Reply:
        """
        Have the last message answered again; the reply before stays in the tree.

        A greedy session gives the same reply again: pass `params` with a temperature.

        Raises:
            ConversationError: There is no reply to replace.
        """
        return self._stream(self.last_user(), None, params).read()

    def edit(self, node: Node, text: str, *, params: SamplingParams | None = None) -> Reply:
        """
        Say something else in place of a user's message, and return the reply to that.

        Raises:
            ConversationError: *node* is not a user's message.
        """
        self.tree.require(node)
        if node.role != "user" or node.parent is None:
            raise ConversationError(
                f"{node!r} is not a user's message, and only those can be edited."
            )
        return self._stream(node.parent, text, params).read()

    def fork(self, node: Node | None = None, *, name: str | None = None) -> "Session":
        """
        Return a second session at a node, or at the tip; costs no forward pass and no copy.

        With a name it is a branch: a tip that is kept with the conversation and moves with the fork.

        Raises:
            UnknownNodeError: It is not a node of this conversation.
            ConversationError: There is a tip of that name.
        """
        at = node or self._tip
        self.tree.require(at)
        if name is not None:
            self.conversation.new_tip(name, at)
        return self._beside(at, name)

    def branch(self, name: str) -> "Session":
        """
        Return a second session at a named tip of the conversation, which moves with it from now on.

        Raises:
            ConversationError: There is no such tip.
        """
        tips = self.conversation.tips
        if name not in tips:
            raise ConversationError(f"There is no branch {name!r}: there is {', '.join(tips)}.")
        return self._beside(tips[name], name)

    def prewarm(self, text: str = "") -> int:
        """
        Compute the KV of a message that is still being typed; return how many tokens that took.

        Nothing is said: if the text changes, only what changed is computed again. The next turn
        tells what of it was used as `Usage.read_ahead_tokens`.

        Raises:
            As `stream` does; the conversation is as it was.
        """
        with self._exclusively():
            sequence = self._typed(text)
            try:
                if not sequence.is_warm():
                    self._model.engine.compute([sequence])
            finally:
                sequence.release()
            fed, end = sequence.fed_tokens, len(sequence)
            if fed:
                self._idle.note(ReadAhead(sequence, [FeedPlan(max(0, end - fed), end)]))
            return fed

    def prewarm_later(self, text: str = "") -> None:
        """Do what `prewarm` does at once, when the engine is idle; using the session ends it."""
        if self._busy.acquire(blocking=False):
            try:
                self._start_idle_work(text)
            finally:
                self._busy.release()

    def typed_ids(self, node: Node | None = None) -> list[int]:
        """Return the token ids up to where a message after a node, or after the tip, begins."""
        return self._prompting.typing(node or self._tip, "", self.tools)

    def warm_tokens(self, node: Node | None = None, *, on_disk: bool = False) -> tuple[int, int]:
        """
        Return how many tokens up to a node, or to the tip, have KV, and how many there are.

        In memory, or with *on_disk* in memory or there.
        """
        ids = self.typed_ids(node)
        return self._model.engine.warm_tokens(ids, self._namespace, on_disk=on_disk), len(ids)

    def checkpoint(self, name: str) -> Checkpoint:
        """
        Keep the KV up to the tip on disk, whatever else needs room, for `return_to` to come back.

        Computes what is not there. Until `Model.drop_checkpoint`, also in other processes.

        Raises:
            NameTakenError: There is such a checkpoint, or something else is kept under that name.
            ConversationError: The conversation is not kept, or is in a namespace, or that cannot be a
                name.
            StoreError: No KV is kept on disk, or there is no room for this.
                In each case nothing is kept, and the conversation is as it was.
        """
        require_name(name, "checkpoint")
        if self._namespace:
            raise ConversationError(
                "Names of checkpoints are for all who use this home, and this conversation is in a "
                "namespace: begin one without."
            )
        with self._exclusively():
            engine, places = self._model.engine, self._model.places
            facts = places.facts(self.conversation.spot(self._tip))
            ids = self.typed_ids()
            pin_on_disk(engine, ids, self._namespace, name=name, about=facts)
            return places.find(name)

    def return_to(self, name: str) -> None:
        """
        Go to a checkpoint of this conversation, as `rewind` does.

        Raises:
            UnknownCheckpointError: There is none of that name.
            UnknownNodeError: It is of another conversation. Nothing was changed.
        """
        found = self._model.places.find(name)
        is_here = found.conversation_id == self.conversation.kept_as
        node = self.conversation.kept_node(found.node_id) if is_here else None
        if node is None:
            raise UnknownNodeError(
                f"The checkpoint {name!r} is not in this conversation: resume at it "
                f"(`recollect chat --checkpoint`, or `resume` with `checkpoint`)."
            )
        self.rewind(node)

    def pin(self) -> None:
        """
        Keep the KV of the conversation up to the tip in memory, whatever else needs room.

        Computes what is not there. Until `unpin`, or another `pin`.
        """
        self.prewarm()
        pinned = self._model.engine.pin(self.typed_ids(), self._namespace)
        self.unpin()
        self._pinned = pinned

    def unpin(self) -> None:
        """Let the KV be evicted again."""
        self._model.engine.unpin(self._pinned)
        self._pinned = []

    def close(self) -> None:
        """Stop what is done in the background and unpin. The session can still be used."""
        self._idle.stop()
        self.unpin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        super()._begin()
        try:
            self._idle.stop()
        except BaseException:  # an interrupt while waiting
            self._busy.release()
            raise

    def _beside(self, at: Node, name: str | None) -> "Session":
        return Session(
            self._model,
            self.conversation,
            at,
            self.params,
            namespace=self._namespace,
            name=name,
            overflow=self.overflow,
            tools=self.tools,
            template_options=self._template_options,
            begun=self._begun,
        )

    def prompt_tokens(self) -> int:
        """
        Return how long the prompt is that `respond(None)` computes; nothing is computed.

        Raises:
            ConversationError, TemplateError: As `stream` does.
        """
        at = self._tip
        self._check_can_be_answered(at)
        if at is self._begun:
            return len(self._prompting.continuing(at, self.tools)[0].token_ids)
        return len(self._prompting.asking(at, None, self.tools, "error")[0].token_ids)

    def _stream(
        self, at: Node | None, text: str | None, params: SamplingParams | None
    ) -> "ReplyStream":
        """Say something at a node, at the tip without one, and return the reply as it is generated."""
        self._begin()
        before = self._tip
        try:
            if at is None and text is not None and self._is_unanswered():
                # Said again it is answered; what is said instead takes its place.
                text, at = (None, before) if text == before.content else (text, before.parent)
                assert at is not None, "a message has a parent"
                self._tip = at
            return self._turn(at or self._tip, text, params or self.params, before)
        except BaseException:
            self._tip = before
            self._busy.release()
            raise

    def _is_unanswered(self) -> bool:
        """Return whether the tip is a question whose reply was cut off, with the program or before."""
        tip, is_kept = self._tip, self.conversation.kept_id(self._tip) is not None
        return tip.role == "user" and not tip.children and is_kept

    def _turn(
        self, at: Node, text: str | None, params: SamplingParams, before: Node
    ) -> "ReplyStream":
        """Have a reply begun; the tree stays as it is, and the tip is *before* again if none comes."""
        begun = at if text is None and at is self._begun else None
        if text is None:
            self._check_can_be_answered(at)
        tools, engine = self.tools, self._model.engine
        begun_ids: Sequence[int] = ()
        dropped = 0
        if begun is None:
            prompt, dropped = self._prompting.asking(at, text, tools, self.overflow)
        else:
            prompt, begun_ids = self._prompting.continuing(begun, tools)
            assert begun.parent is not None, "a reply has a parent"
            at = begun.parent
        bare_names = tools.bare_names(params.grammar) if tools.schemas else None
        generator = self._generator(self._prompting.sequence(prompt.token_ids), params)
        expected = Expectation(
            prompt,
            engine.info.reuse.unit,
            self._change if (begun or at) is self._tip else None,
            self.conversation.tools_change(at, tools),
        )
        turn = Turn(at, text, before, tools, dropped, expected, begun, begun_ids)
        stream = ReplyStream(self, turn, generator, bare_names)
        stream.start()
        return stream

    def _check_can_be_answered(self, at: Node) -> None:
        """
        Check that a reply can follow a message, or go on where that is the beginning of one.

        Raises:
            ConversationError: It cannot.
        """
        last = at
        while last.role == "system" and last.parent is not None:
            last = last.parent
        if last.role in ANSWERED:
            return
        if at is not self._begun:
            raise ConversationError(
                "There is no message to answer: the last one, instructions apart, has to be a user's "
                "or a tool's."
            )
        if at.links is not None and at.links.call_ids:
            raise ConversationError(
                "The last message calls tools: add what they gave back, as messages of the role tool."
            )

    def _generator(self, sequence: TokenSequence, params: SamplingParams) -> Generator:
        """Return what continues a sequence, which is released where nothing can."""
        model, tools = self._model, self.tools
        try:
            while True:
                how = params
                if tools.schemas:
                    how = replace(params, grammar=tools.grammar(params.grammar))
                try:
                    return Generator(model.engine, how, sequence=sequence, grammars=model.grammars)
                except InvalidParameterError as error:
                    if how.grammar is None or not tools.schemas:
                        raise
                    # A tool whose schema cannot be held to is no reason to refuse the request.
                    tools = tools.loosened(error, how.grammar)
        except BaseException:
            sequence.release()
            raise

    def _ask(self, turn: Turn) -> Asked | None:
        """Keep what a turn says before it is answered."""
        tip = self.name if turn.at is self._tip else None
        return self.conversation.ask(turn.at, turn.said, tip=tip)

    def _free(self, asked: Asked | None) -> None:
        """Let others use the session; what was asked and not answered is taken back later."""
        self.conversation.give_up(asked)
        self._busy.release()

    def _finish(
        self, turn: Turn, reply: GeneratedReply, token_ids: list[int], asked: Asked | None
    ) -> Reply | None:
        """
        Keep a reply that has ended, and go to it; an edit that was broken off is kept beside.

        Returns:
            None where nothing was said; the conversation is then as it was.
        """
        is_whole = reply.finish_reason != "cancelled"
        if not reply.text and not is_whole:
            self.conversation.take_back(asked)
            self._tip = turn.before
            return None
        goes_there = (turn.begun or turn.at) is self._tip or is_whole
        messages = turn.messages(reply, token_ids, self._model.weights_fingerprint)
        tip = self.name if goes_there else None
        node = self.conversation.add(turn.at, messages, tip=tip, asked=asked)
        self.conversation.note_tools(node, turn.tools)
        if goes_there:
            self._tip, self._change = node, None
        self._idle.forget()
        self._start_idle_work()
        return Reply.of(reply, node, turn.dropped_turns)

    def _typed(self, text: str) -> TokenSequence:
        at = self._tip.parent if self._is_unanswered() else self._tip
        assert at is not None, "a message has a parent"
        return self._prompting.sequence(self._prompting.typing(at, text, self.tools))

    def _start_idle_work(self, text: str = "") -> None:
        """Compute a message being typed, or what the template puts before it, while nobody waits."""
        try:
            sequence = self._typed(text)
        except (TemplateError, ContextFullError):
            return  # the next turn says what is wrong; here nobody asked
        self._idle.start(sequence)


class ReplyStream(ReplyGeneration):
    """
    A session's reply as it is generated: iterate over it for pieces of text.

    Leaving the loop early, `stop`, and the end of a `with` block all end the reply and keep what
    was said as a turn. A reply that had not begun leaves the conversation as it was. On an event
    loop, `async for` reads it, and `close`, which may wait for the journal, belongs on a thread.
    """

    reply: Reply | None

    def __init__(
        self,
        session: Session,
        turn: Turn,
        generator: Generator,
        bare_names: tuple[str, ...] | None,
    ) -> None:
        model = session._model
        super().__init__(
            model.engine,
            generator,
            model.tokenizer,
            ahead=session._idle.ahead,
            bare_names=bare_names,
        )
        self._session = session
        self._turn = turn
        self._asked: Asked | None = None

    def start(self) -> None:
        """Keep what is asked, and have the engine begin."""
        session = self._session
        self._asked = asked = session._ask(self._turn)
        try:
            super().start()
        except BaseException:
            session.conversation.take_back(asked)
            raise
        # Also where the stream is forgotten without ever having been read.
        self._free = weakref.finalize(self, _give_up, self._task, session, asked)

    def usage(self) -> Usage:
        """Return what the reply has cost, and why not less."""
        return explained(super().usage(), self._turn.expected)

    def __iter__(self) -> Iterator[str]:
        try:
            yield from super().__iter__()
        finally:
            self.close()

    def read(self) -> Reply:
        """
        Read to the end and return the whole reply.

        Raises:
            ConversationError: It was stopped before anything was said.
        """
        with self:
            for _ in self:
                pass
        if self.reply is None:
            raise ConversationError("The reply was stopped before it began: ask again.")
        return self.reply

    def close(self) -> None:
        """
        End the reply here and keep what was said. Calling it again does nothing.

        Raises:
            StoreError: The journal cannot keep it. The conversation is as it was.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.finish()
            self.release()
            said = self._whole(), self.token_ids
            self.reply = self._session._finish(self._turn, *said, self._asked)
        finally:
            self._free()


def _give_up(task: Task, session: Session, asked: Asked | None) -> None:
    task.cancel()
    session._free(asked)
