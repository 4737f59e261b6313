"""
A conversation that a person holds: ask, undo, rewind, fork, regenerate, edit.

Joins the tree (what was said), the prompt encoder (as which token ids) and a sequence (what has
KV). The history wanted is worked out anew for each turn and compared with what is there, so no
operation on the tree can leave the KV behind.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from recollect.conversation.tree import Node, Tree
from recollect.engine.generator import Generator
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sequence import Sequence
from recollect.errors import ContextFullError, ConversationError, RewindError, SessionBusyError
from recollect.types import FinishReason, Message, SamplingParams, Usage, common_prefix_length

if TYPE_CHECKING:  # a model makes sessions, so the import would be a circle
    from recollect.conversation.model import Model


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one message."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    node: Node
    rewritten_reply: int | None = None
    """The first earlier reply that the template shows otherwise than it was generated, if any."""

    def __str__(self) -> str:
        return self.text


class Session:
    """
    A place in a conversation's tree, and a sequence with the KV of what led there.

    Used from one thread at a time; a second reply while one is being generated is refused. Forks
    share the tree and the blocks, and nothing else.

    Invariants:
        1. The tip is a node of the tree.
        2. The sequence's history is a prefix of some path's token ids; where it leaves the tip's
           path, the next turn rewinds it.
    """

    def __init__(
        self, model: "Model", tree: Tree, tip: Node, sequence: Sequence, params: SamplingParams
    ) -> None:
        self._model = model
        self._tip = tip
        self._sequence = sequence
        self._busy = threading.Lock()
        self.tree = tree
        self.params = params

    @property
    def tip(self) -> Node:
        """Return the node at which the conversation stands."""
        return self._tip

    @property
    def sequence(self) -> Sequence:
        """Return the token history and its KV, to look at."""
        return self._sequence

    def path(self) -> list[Node]:
        """Return the messages up to the tip."""
        return self._tip.path()

    def transcript(self) -> list[Message]:
        """Return the messages up to the tip as plain values."""
        return [node.message() for node in self.path()]

    def stream(self, text: str | None, *, params: SamplingParams | None = None) -> "ReplyStream":
        """
        Say something, and return the reply as it is generated.

        Args:
            text: The message; None to have the tip answered, which then is a user's message.
            params: How to sample this reply; None: as the session does.

        Raises:
            ConversationError: There is nothing to answer, or a reply is being generated already.
            TemplateError: The template refuses the conversation.
            ContextFullError: It does not fit the context.
            OutOfBlocksError: It does not fit the KV memory; raised by the first piece.
                In each case the conversation is as it was.
        """
        self._begin()
        try:
            return self._turn(text, params or self.params)
        except BaseException:
            self._busy.release()
            raise

    def respond(self, text: str | None, *, params: SamplingParams | None = None) -> Reply:
        """Say something and return the whole reply; see `stream`."""
        with self.stream(text, params=params) as stream:
            for _ in stream:
                pass
        assert stream.reply is not None, "a stream that was read to its end has a reply"
        return stream.reply

    def regenerate(self, *, params: SamplingParams | None = None) -> Reply:
        """
        Have the last message answered again; the reply before stays in the tree.

        A greedy session gives the same reply again: pass `params` with a temperature.

        Raises:
            ConversationError: There is no reply to replace.
        """
        before = self._tip
        self.rewind(self.last_user())
        try:
            return self.respond(None, params=params)
        except BaseException:
            self._tip = before
            raise

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
        before = self._tip
        self.rewind(node.parent)
        try:
            return self.respond(text, params=params)
        except BaseException:
            self._tip = before
            raise

    def last_user(self) -> Node:
        """
        Return the user's message that the tip answers, or the tip if it is one.

        Raises:
            ConversationError: Nobody has said anything yet.
        """
        for node in reversed(self.path()):
            if node.role == "user":
                return node
        raise ConversationError("Nothing has been said yet: say something first.")

    def rewind(self, node: Node) -> None:
        """
        Go to a node of the tree, in any branch; costs no forward pass.

        Raises:
            UnknownNodeError: It is not a node of this conversation. Nothing was changed.
        """
        self.tree.require(node)
        self._begin()
        self._tip = node
        self._busy.release()

    def undo(self, turns: int = 1) -> Node:
        """
        Go back by that many turns and return the new tip; they stay in the tree.

        Raises:
            RewindError: There are not as many. Nothing was changed.
        """
        asked = [node for node in self.path() if node.role == "user"]
        if not 1 <= turns <= len(asked):
            raise RewindError(
                f"Cannot undo {turns} turns: the conversation has {len(asked)}; "
                "give a number between 1 and that."
            )
        parent = asked[-turns].parent
        assert parent is not None, "a user's message has a parent"
        self.rewind(parent)
        return parent

    def fork(self, node: Node | None = None) -> "Session":
        """
        Return a second session at a node, or at the tip; costs no forward pass and no copy.

        Raises:
            UnknownNodeError: It is not a node of this conversation.
        """
        at = self._tip if node is None else node
        self.tree.require(at)
        return Session(self._model, self.tree, at, self._sequence.fork(), self.params)

    def prewarm(self, text: str = "") -> int:
        """
        Compute the KV of a message that is still being typed; return how many tokens that took.

        Nothing is said: if the text changes, only what changed is computed again.

        Raises:
            As `stream` does; the conversation is as it was.
        """
        self._begin()
        try:
            ids = self._model.prompts.encode_typed(self.path(), text).token_ids
            fed_before = self._sequence.fed_tokens
            self._adopt(ids)
            if self._sequence.computed < len(ids):
                self._model.engine.compute([self._sequence])
            return self._sequence.fed_tokens - fed_before
        finally:
            self._busy.release()

    def close(self) -> None:
        """Give the blocks back. The tree can still be read."""
        self._sequence.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(
                "A reply is being generated in this session: read it to its end or stop it first."
            )

    def _turn(self, text: str | None, params: SamplingParams) -> "ReplyStream":
        """Make the sequence ready for a reply; the tree and the tip stay as they are."""
        if text is None and self._tip.role != "user":
            raise ConversationError("There is no message to answer: say something.")
        prompt = self._model.prompts.encode(self.path(), text)
        self._adopt(prompt.token_ids)
        engine = self._model.engine
        generator = Generator(engine, params, sequence=self._sequence)
        generation = ReplyGeneration(engine, generator, self._model.tokenizer)
        return ReplyStream(
            self,
            generation,
            said=text,
            rewritten_reply=prompt.rewritten_reply,
            free_session=self._busy.release,
        )

    def finish_turn(self, said: str | None, reply: ReplyGeneration) -> Node | None:
        """
        Put a reply that has ended into the tree and go there. For `ReplyStream`.

        Returns:
            Its node; None where nothing was generated, and the conversation is then as it was.
        """
        node = None
        if reply.generated_tokens or reply.finish_reason != "cancelled":
            user = self._tip if said is None else self.tree.add(self._tip, "user", said)
            node = self._tip = self.tree.add(
                user,
                "assistant",
                reply.text,
                token_ids=tuple(reply.token_ids),
                finish_reason=reply.finish_reason,
                usage=reply.usage(),
            )
        return node

    def _adopt(self, token_ids: list[int]) -> int:
        """
        Make these ids the sequence's history; return how many of them it had.

        Raises:
            ContextFullError: They do not fit. Nothing was changed.
        """
        limit = self._model.context_length
        needed = len(token_ids) + 1  # one place for the reply
        if needed > limit:
            raise ContextFullError(needed=needed, limit=limit)
        shared = common_prefix_length(self._sequence.token_ids, token_ids)
        self._sequence.rewind_to(shared)
        if shared < len(token_ids):
            self._sequence.append(token_ids[shared:])
        return shared


class ReplyStream:
    """
    A reply as it is generated: iterate over it for pieces of text.

    Leaving the loop early, `stop`, and the end of a `with` block all end the reply and keep what
    was said as a turn. A reply that had not begun leaves the conversation as it was.
    """

    def __init__(
        self,
        session: Session,
        generation: ReplyGeneration,
        *,
        said: str | None,
        rewritten_reply: int | None,
        free_session: Callable[[], None],
    ) -> None:
        self._session = session
        self._generation = generation
        self._said = said
        self._rewritten_reply = rewritten_reply
        self._closed = False
        # Also where the stream is forgotten without ever having been read.
        self._free_session = weakref.finalize(self, free_session)
        self.reply: Reply | None = None
        """The whole reply, once it has ended; None before, and where nothing was said."""

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV, and how many there are."""
        return self._generation.prefilled_tokens, self._generation.prompt_tokens

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._generation
        finally:
            self.close()

    def stop(self) -> None:
        """End the reply after the forward pass under way; from any thread or signal handler."""
        self._generation.stop()

    def close(self) -> None:
        """End the reply here and keep what was said. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._generation.finish()
            node = self._session.finish_turn(self._said, self._generation)
        finally:
            self._free_session()
        if node is not None:
            assert node.finish_reason is not None, "a reply that has ended has a reason"
            assert node.usage is not None, "and a usage"
            self.reply = Reply(
                node.content, node.finish_reason, node.usage, node, self._rewritten_reply
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
