"""
A session: a person or a program in a conversation, who asks, undoes, rewinds, forks and edits.

A `Cursor` stands at a node of the tree and moves through it; a `Session` is a cursor that also asks
the model, and a `ReplyStream` is a reply while it is generated. The session joins the tree (what was
said) and the prompt encoder (its token ids). It holds no KV between turns: each turn encodes the path
to its node, and the engine finds in its cache whatever KV any earlier work left for those token ids.
So an operation on the tree cannot bring tree and KV out of step.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Final, Self

from recollect.conversation.async_reply import AsyncSpeaker
from recollect.conversation.branches import Origin
from recollect.conversation.conversation import Asked, Conversation
from recollect.conversation.explore import Explorer
from recollect.conversation.feed import AskedBy, ToldReply
from recollect.conversation.matching import Change
from recollect.conversation.tools import NO_TOOLS, Tools
from recollect.conversation.tree import Node, Overflow, Tree
from recollect.conversation.turn import (
    ANSWERED,
    ModelParts,
    Prepared,
    Prompting,
    Reply,
    Turn,
    explained,
    is_unanswered,
    place_of,
)
from recollect.engine.decoder import Task
from recollect.engine.pinning import pin, pin_on_disk, unpin
from recollect.engine.reply import GeneratedReply, IdleWork, ReadAhead, ReplyGeneration
from recollect.engine.sequence import FeedPlan
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import (
    ContextFullError,
    ConversationError,
    EngineUnavailableError,
    RewindError,
    SessionBusyError,
    TemplateError,
    UnknownNodeError,
)
from recollect.journal.home import Checkpoint
from recollect.journal.records import NewNode, require_name
from recollect.kv.blocks import CachedBlock
from recollect.types import Message, SamplingParams, Usage


class Cursor:
    """
    A node of a conversation's tree, the tip, which moves to other nodes.

    May be used from several threads: while one call moves the tip or adds to it, every other such
    call raises `SessionBusyError`.

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
        """Return the name of the branch whose tip moves with this one; None: none does."""
        return None if self._name is None else self.conversation.tip_name(self._name)

    @property
    def tip(self) -> Node:
        """Return the node at which one stands."""
        return self._tip

    @property
    def change(self) -> Change | None:
        """Return where the messages up to the tip leave an earlier conversation; None: they do not."""
        return self._change

    @property
    def tree(self) -> Tree:
        """Return all messages in all branches."""
        return self.conversation.tree

    def path(self) -> list[Node]:
        """Return the messages up to the tip."""
        return self._tip.path()

    def transcript(self) -> list[Message]:
        """Return the messages up to the tip, as clients send them: tool calls beside the text."""
        return [node.message() for node in self.path()]

    def to_json(self) -> str:
        """
        Return the messages up to the tip as JSON: token ids, calls, reasoning and usage included.

        `Model.session_from_json` makes a session of it that goes on warm, and `recollect conversations
        import` a saved conversation.
        """
        return self.conversation.path_json(self._tip)

    def last_user(self) -> Node:
        """
        Return the last message on the path that is a user's or a tool's.

        Raises:
            ConversationError: Nobody has said anything yet.
        """
        for node in reversed(self.path()):
            if node.role in ANSWERED:
                return node
        raise ConversationError("Nothing has been said yet: say something first.")

    def rewind(self, node: Node) -> None:
        """
        Move the tip, and the branch with it, to any node of the tree. Costs no forward pass.

        Raises:
            UnknownNodeError: It is not a node of this conversation. Nothing was changed.
            StoreError: The journal cannot save the new tip. Nothing was changed.
        """
        self.tree.require(node)
        with self._exclusively():
            if self.name is not None:
                self.conversation.set_tip(self.name, node)
            self._tip = node
            self._change = None

    def undo(self, turns: int = 1) -> Node:
        """
        Go back by that many turns and return the new tip. The turns stay in the tree.

        Raises:
            RewindError: The path has fewer turns. Nothing was changed.
        """
        asked = [node for node in self.path() if node.role == "user"]
        if not 1 <= turns <= len(asked):
            if not asked:
                raise RewindError("There is nothing to undo: this branch has no turn yet.")
            remedy = "undo that one" if len(asked) == 1 else f"undo between 1 and {len(asked)}"
            has = "1 turn" if len(asked) == 1 else f"{len(asked)} turns"
            raise RewindError(f"This branch has {has}, so {turns} cannot be undone: {remedy}.")
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


class Session(Cursor, Explorer, AsyncSpeaker):
    """
    A person or a program in a conversation, who asks the model and moves through the tree.

    May be used from several threads: while a reply is generated, a second one raises
    `SessionBusyError`. A fork shares the conversation with its origin, and nothing else.

    Invariants:
        1. All of `Cursor`.
        2. Between turns the session holds no blocks, except those that `pin` holds.
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
        self.model: Final = model
        """What it talks to."""
        self._begun = begun  # a reply that somebody gave the beginning of
        self.namespace: Final = namespace
        """KV is shared within it."""
        self._idle = IdleWork(model.engine)
        self._beginning = threading.Lock()
        self._pinned: list[CachedBlock] = []
        options = self._template_options = dict(template_options or {})
        self._prompting = Prompting(model, namespace, options)
        self.params = params
        self.overflow = overflow
        self.tools = tools
        """What the next replies may call; `dataclasses.replace` makes a copy with another choice."""

    def stream(self, text: str | None, *, params: SamplingParams | None = None) -> "ReplyStream":
        """
        Add a user's message, and return the reply while it is generated.

        In a saved conversation the message is in the journal before the reply begins. If the program
        ended during an earlier reply, the tip is a message without a reply: the same text answers that
        message, and another text replaces it.

        Args:
            text: The message; None to have the tip answered, which then is a user's message or
                what a tool gave back, and may have instructions after it. A reply whose beginning was
                given, or that was cut (by a limit, because it repeated itself, or by `stop`), goes on:
                the longer one takes its place in the conversation, and what is returned is what was
                added.
            params: How to sample this reply; None: as the session does.

        Raises:
            ConversationError: There is no message to answer, or a reply is being generated.
            ConfigError: A parameter, a grammar or a tool cannot be used; the subclass says why.
            TemplateError: The template refuses the conversation.
            ContextFullError: The prompt does not fit the context.
            OutOfBlocksError: The prompt does not fit the KV memory; the first piece raises it.
                In each case the conversation is as it was.
        """
        return self._stream(None, text, params)

    def respond(self, text: str | None, *, params: SamplingParams | None = None) -> Reply:
        """Add a user's message and return the whole reply; see `stream`."""
        return self.stream(text, params=params).read()

    def add(self, message: Message) -> Node:
        """
        Add a message without asking for a reply, such as the result of a tool.

        An assistant's message is the beginning of a reply: `respond(None)` goes on with it.

        It is kept as soon as that is asked for.

        Raises:
            InvalidParameterError: The message lacks a part. The conversation is as it was.
        """
        with self._exclusively():
            shown = self.model.template.with_thoughts([message])
            self._tip = self.conversation.add_unsaved(self._tip, *shown)
            if self._tip.role == "assistant":
                self._begun = self._tip
            return self._tip

    def origin(self) -> Origin:
        """Return the tip as a place to explore from; it stays that where the session goes on."""
        tip, options, prompting = self._tip, self._template_options, self._prompting
        asking = self.params, self.tools, self.overflow, self._begun
        return Origin(
            self.conversation,
            tip,
            lambda text: place_of(tip, text, self.conversation),
            lambda model: prompting.beside(model, options),
            self.model,
            *asking,
            self.namespace,
            self._idle.ahead,
        )

    def regenerate(self, *, params: SamplingParams | None = None) -> Reply:
        """
        Answer the last message again; the earlier reply stays in the tree.

        A greedy session generates the same reply again: pass `params` with a temperature.

        Raises:
            ConversationError: There is no message to answer.
        """
        return self._stream(self.last_user(), None, params).read()

    def edit(self, node: Node, text: str, *, params: SamplingParams | None = None) -> Reply:
        """
        Add another text beside a user's message, and return the reply to it.

        Raises:
            ConversationError: *node* is not a user's message.
        """
        self.tree.require(node)
        if node.role != "user" or node.parent is None:
            raise ConversationError(
                f"{node!r} is not a user's message: give one of those, since no other can be edited."
            )
        return self._stream(node.parent, text, params).read()

    def fork(self, node: Node | None = None, *, name: str | None = None) -> "Session":
        """
        Return a second session at a node, or at the tip. Costs no forward pass and copies no KV.

        With a name, a branch of that name begins at the node, is saved with the conversation, and moves
        with the fork.

        Raises:
            UnknownNodeError: It is not a node of this conversation.
            ConversationError: There is a branch of that name.
        """
        at = node or self._tip
        self.tree.require(at)
        if name is not None:
            self.conversation.new_tip(name, at)
        return self._beside(at, name)

    def branch(self, name: str) -> "Session":
        """
        Return a second session at the tip of a branch, which moves with it from now on.

        Raises:
            ConversationError: There is no branch of that name.
        """
        tips = self.conversation.tips
        if name not in tips:
            raise ConversationError(f"There is no branch {name!r}: give one of {', '.join(tips)}.")
        return self._beside(tips[name], name)

    def prewarm(self, text: str = "") -> int:
        """
        Compute the KV of a message that is still being typed; return the number of tokens computed.

        The message is not added. If its text changes, only the tokens behind the change are computed
        again. `Usage.read_ahead_tokens` of the next turn counts the tokens that it could use.

        Raises:
            As `stream` does. The conversation is as it was.
        """
        with self._exclusively():
            sequence = self._typed(text)
            try:
                if not sequence.is_warm():
                    self.model.engine.compute([sequence])
            finally:
                sequence.release()
            fed, end = sequence.fed_tokens, len(sequence)
            if fed:
                self._idle.note(ReadAhead(sequence, [FeedPlan(max(0, end - fed), end)]))
            return fed

    def prewarm_later(self, text: str = "") -> None:
        """Have `prewarm` done when the engine is idle; the next use of the session cancels it."""
        with self._beginning:
            if self._busy.acquire(blocking=False):
                try:
                    self._start_idle_work(text)
                finally:
                    self._busy.release()

    def typed_ids(self, node: Node | None = None) -> list[int]:
        """Return the token ids that precede the next message after a node, or after the tip."""
        return self._prompting.typing(node or self._tip, "", self.tools)

    def warm_tokens(self, node: Node | None = None, *, on_disk: bool = False) -> tuple[int, int]:
        """
        Return how many of the tokens up to a node, or to the tip, have KV, and how many there are.

        Counts KV in memory; with *on_disk*, KV on disk too.
        """
        ids = self.typed_ids(node)
        return self.model.engine.warm_tokens(ids, self.namespace, on_disk=on_disk), len(ids)

    def checkpoint(self, name: str) -> Checkpoint:
        """
        Save a checkpoint: a name for the tip, whose KV is pinned on disk; `return_to` comes back.

        Computes KV that is missing. The pin lasts until `Model.drop_checkpoint`, in every process.

        Raises:
            NameTakenError: A checkpoint or another pin has that name.
            ConversationError: The conversation is not saved, or is in a namespace, or the name cannot
                be one.
            StoreError: There is no KV store on disk, or it has no room for this.
                In each case nothing is pinned, and the conversation is as it was.
        """
        require_name(name, "checkpoint")
        if self.namespace:
            raise ConversationError(
                "Everybody who uses this data folder sees the names of checkpoints, and this "
                "conversation is in a namespace: begin one without a namespace."
            )
        with self._exclusively():
            engine, checkpoints = self.model.engine, self.model.checkpoint_store
            facts = checkpoints.facts(self.conversation.spot(self._tip))
            ids = self.typed_ids()
            pin_on_disk(engine, ids, self.namespace, name=name, about=facts)
            return checkpoints.find(name)

    def return_to(self, name: str) -> None:
        """
        Go to a checkpoint of this conversation, as `rewind` does.

        Raises:
            UnknownCheckpointError: There is no checkpoint of that name.
            UnknownNodeError: The checkpoint is in another conversation. Nothing was changed.
        """
        found = self.model.checkpoint_store.find(name)
        is_here = found.conversation_id == self.conversation.journal_id
        node = self.conversation.saved_node(found.node_id) if is_here else None
        if node is None:
            raise UnknownNodeError(
                f"The checkpoint {name!r} is in another conversation: resume that one there "
                f"(`recollect chat --checkpoint {name!r}`, or `resume` with `checkpoint`)."
            )
        self.rewind(node)

    def pin(self) -> None:
        """
        Pin the KV up to the tip in memory: it is not evicted until `unpin`, or another `pin`.

        Computes KV that is missing.
        """
        self.prewarm()
        pinned = pin(self.model.engine, self.typed_ids(), self.namespace)
        self.unpin()
        self._pinned = pinned

    def unpin(self) -> None:
        """Unpin the KV, so that it can be evicted."""
        unpin(self.model.engine, self._pinned)
        self._pinned = []

    def close(self) -> None:
        """Stop computing ahead, and unpin. The session can still be used."""
        self._idle.stop()
        self.unpin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        if self._ending is not None:
            self._ending.join()
        with self._beginning:  # a text that is being encoded on another thread is no reply
            super()._begin()
        try:
            self._idle.stop()
        except BaseException:  # an interrupt while waiting
            self._busy.release()
            raise

    def _beside(self, at: Node, name: str | None) -> "Session":
        return Session(
            self.model,
            self.conversation,
            at,
            self.params,
            namespace=self.namespace,
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
        asked = self._prompting.asking(self._tip, None, self._begun, self.tools, "error")
        return len(asked.prompt.token_ids)

    def _stream(
        self, at: Node | None, text: str | None, params: SamplingParams | None
    ) -> "ReplyStream":
        """Begin a turn after a node, or after the tip, and return its reply while it is generated."""
        since_s = perf_counter()
        self._begin()
        before = self._tip
        try:
            if at is None:
                at, text = place_of(before, text, self.conversation)
                self._tip = at
            stream = self._turn(at, text, params or self.params, before)
            return stream.count_from(since_s)
        except BaseException:
            self._tip = before
            self._busy.release()
            raise

    def _turn(
        self, at: Node, text: str | None, params: SamplingParams, before: Node
    ) -> "ReplyStream":
        """Have a reply begun; the tree stays as it is, and the tip is *before* again if none comes."""
        asked = self._prompting.asking(at, text, self._begun, self.tools, self.overflow)
        change = self._change if at is self._tip else None
        tools_change = self.conversation.tools_change(asked.at, self.tools)
        differs = change, tools_change
        prepared = self._prompting.prepare(asked, text, params, self.tools, before, differs)
        stream = ReplyStream(self, prepared)
        stream.start()
        return stream

    def _ask(self, turn: Turn) -> Asked | None:
        """Save the message of a turn before it is answered."""
        tip = self.name if turn.at is self._tip else None
        return self.conversation.ask(turn.at, turn.said, tip=tip)

    def _free(self, asked: Asked | None) -> None:
        """Release the session; a message without a reply is taken back with the next write."""
        self.conversation.give_up(asked)
        self._busy.release()

    def _finish(
        self,
        turn: Turn,
        reply: GeneratedReply,
        token_ids: list[int],
        asked: Asked | None,
        is_lost: bool,
    ) -> Reply | None:
        """
        Save a reply that has ended, and move the tip to it.

        The tip stays where it is if the reply to an edit was cancelled.

        Returns:
            None if the reply is empty and was cancelled; the conversation is then as it was, but for a saved
            message that no engine elsewhere was there to answer: it stays, as after a crash.
        """
        is_whole = reply.finish_reason != "cancelled"
        if not reply.text and not is_whole:
            self._tip = turn.before
            if is_lost and asked is not None and turn.said is not None:
                said = [NewNode(role="user", content=turn.said)]
                self._tip = self.conversation.add(turn.at, said, tip=self.name, asked=asked)
            else:
                self.conversation.take_back(asked)
            return None
        goes_there = (turn.asked.begun or turn.at) is self._tip or is_whole
        messages = turn.messages(reply, token_ids, self.model.weights_fingerprint)
        tip = self.name if goes_there else None
        node = self.conversation.add(turn.at, messages, tip=tip, asked=asked)
        self.conversation.note_tools(node, turn.tools)
        if goes_there:
            self._tip, self._change = node, None
        self._idle.forget()
        self._start_idle_work()
        return Reply.of(reply, node, turn.asked.dropped_turns, turn.expected.change)

    def _typed(self, text: str) -> TokenSequence:
        at = self._tip.parent if is_unanswered(self._tip, self.conversation) else self._tip
        assert at is not None, "a message has a parent"
        return self._prompting.sequence(self._prompting.typing(at, text, self.tools), at)

    def _start_idle_work(self, text: str = "") -> None:
        """Have a message being typed, or what precedes it, computed while the engine is idle."""
        # The next turn raises what is wrong to its caller; this work has no caller.
        with suppress(TemplateError, ContextFullError):
            self._idle.start(self._typed(text))


class ReplyStream(ReplyGeneration):
    """
    A session's reply while it is generated: iterate over it for pieces of text.

    Leaving the loop early, `stop`, and the end of a `with` block all end the reply and save its text
    so far as a turn. A reply that had not begun leaves the conversation as it was. On an event loop,
    read it with `async for`, and call `close` on a thread, because it may wait for the journal.
    """

    reply: Reply | None

    def __init__(self, session: Session, prepared: Prepared) -> None:
        model = session.model
        super().__init__(
            model.engine,
            prepared.generator,
            model.tokenizer,
            ahead=session._idle.ahead,
            rules=prepared.rules,
            begun=prepared.begun,
        )
        self._session = session
        self._turn = prepared.turn
        self._asked: Asked | None = None

    def start(self) -> None:
        """Save the message, and submit the reply to the engine."""
        session = self._session
        self._asked = asked = session._ask(self._turn)
        try:
            super().start()
        except BaseException:
            session.conversation.take_back(asked)
            raise
        asker = AskedBy(session.conversation, session.namespace, session.name)
        told = self._told = session.model.feed.reply(
            self, asker, self._turn.at, asked, (self._begun, self._rules)
        )
        # Runs too if the stream is garbage-collected without having been read.
        self._free = weakref.finalize(self, _give_up, self._task, session, asked, told)

    def usage(self) -> Usage:
        """Return what the reply has cost so far, and why tokens had to be computed again."""
        return explained(super().usage(), self._turn.expected)

    def _piece_of(self, generated: Any) -> str:
        if piece := super()._piece_of(generated):
            self._told.piece(piece)
        return piece

    def __iter__(self) -> Iterator[str]:
        try:
            yield from super().__iter__()
        finally:
            self.close()

    def read(self) -> Reply:
        """
        Read to the end and return the whole reply.

        Raises:
            ConversationError: The reply was stopped before it began.
        """
        with self:
            for _ in self:
                pass
        if self.reply is None:
            raise ConversationError("The reply was stopped before it began: ask again.")
        return self.reply

    def _close(self) -> None:
        """End the reply and save its text so far; where that fails, the conversation is as it was."""
        try:
            self.finish()
            self.release()
            said = self._whole(), self.token_ids, self._asked
            is_lost = isinstance(self._task.error, EngineUnavailableError)
            self.reply = self._session._finish(self._turn, *said, is_lost)
        finally:
            self._told.end(self.reply, None if self.reply is None else self.reply.node)
            self._free()


def _give_up(task: Task, session: Session, asked: Asked | None, told: ToldReply) -> None:
    told.end(None, None)
    task.cancel()
    session._free(asked)
