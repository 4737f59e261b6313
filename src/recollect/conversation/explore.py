"""
Several replies from one place of a conversation, of which the best may stay.

An `Exploration` has the engine begin all replies of a level at once, so that they share each forward pass
and the KV of what leads to them, which is computed and held once. A scoring function says which of them
are gone on from (a beam, where there are several levels) and which are kept. What is not kept is in no tree
and no journal; its KV is in the cache, as that of any prompt, until it is evicted. Threads and
event loops read the same stream of what arrives.
"""

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, Final, Self

from recollect.conversation.async_reply import to_its_end
from recollect.conversation.branches import (
    Branch,
    BranchGeneration,
    Origin,
    Plan,
    Prompts,
    Score,
    wrong,
)
from recollect.conversation.conversation import Conversation
from recollect.conversation.feed import AskedBy
from recollect.conversation.tree import DETACHED, Node, detached
from recollect.conversation.turn import Asking, ModelParts, Prompting
from recollect.engine.reply import Stream
from recollect.errors import ContextFullError, ConversationError, RecollectError
from recollect.journal.records import NewNode
from recollect.types import SamplingParams, Usage, tokens_per_second

_SUMMED: Final = (
    *("prompt_tokens", "reused_tokens", "restored_tokens", "computed_tokens", "read_ahead_tokens"),
    *("generated_tokens", "reasoning_tokens", "lost_tokens"),
)
"""What of `Usage` is a sum over all branches."""


class Exploration:
    """
    Replies that are tried beside each other: iterate over it for the branches, as they finish.

    It begins when it is first read, on a thread (`for`, `read`) or an event loop (`async for`, `await`),
    and is read once. A branch that fails has its `error`, and the others go on. Leaving the loop
    early, `stop`, and cancelling the task end what the engine does for it; replies that had not come to
    their end by then are kept nowhere. The session is as before; a branch that is kept has a name, under
    which `Session.branch` goes on with it.
    """

    def __init__(self, origin: Origin, models: Sequence[ModelParts], plan: Plan) -> None:
        self._origin = origin
        self._plan = plan
        self._models = list(models)
        if not isinstance(plan.name, str):
            if len(self._models) > 1:
                raise wrong("name", "Several models have one name, to which numbers are added.")
            tips = origin.conversation.tips
            if len({*plan.name, *tips}) < len(plan.name) + len(tips):
                raise wrong("name", "There is a branch of one of these names: take others.")
        self._model: ModelParts | None = None
        self._prompting: Prompting | None = None
        self._parents: list[Branch | None] = []
        self._level = 0
        self._running: list[BranchGeneration] = []
        self._ready: list[Branch] = []  # of this level, and those that have ended earlier
        self._finalists: list[Branch] = []
        self._asked: dict[tuple[Node, str | None], Asking] = {}  # of this level
        self._real: dict[Node, Node] = {}  # of detached nodes that are kept: those in the tree
        self._messages: dict[tuple[Node, str], Node] = {}
        self._begun = False
        self._stopped = False
        self._changing = threading.RLock()  # while a level begins or ends, and a branch is kept
        self._first_s: float | None = None
        self._last_s = 0.0
        self.branches: list[Branch] = []
        """All that were begun so far, by their `index`."""
        self.kept: list[Branch] = []
        """Those that stay in the conversation's tree, the best first where there is a score."""

    @property
    def conversation(self) -> Conversation:
        """Return the conversation in whose tree branches are kept."""
        return self._origin.conversation

    @property
    def best(self) -> Branch:
        """
        Return the branch with the highest score; where there is no score, the first.

        Raises:
            ConversationError: None has come to its end.
        """
        if not (whole := [one for one in self.branches if one.is_whole]):
            raise ConversationError("No branch has come to its end: read the exploration first.")
        deepest = self._finalists or whole
        return _ranked(deepest)[0]

    @property
    def usage(self) -> Usage:
        """
        Return what all replies have cost together: each number is the sum, `ttft_s` the shortest.

        What one branch computes and others reuse is computed once and reused by each of those.
        `decode_tps` is of all tokens, from the first to the last.
        """
        replies = [one.reply for one in self.branches if one.reply is not None]
        usages = [one.usage for one in replies]
        if not usages:
            raise ConversationError("No branch has come to its end: read the exploration first.")
        generated = sum(one.generated_tokens for one in usages)
        seconds = 0.0 if self._first_s is None else self._last_s - self._first_s
        sums = {name: sum(getattr(one, name) for one in usages) for name in _SUMMED}
        return replace(
            usages[0],
            **sums,
            ttft_s=min(one.ttft_s for one in usages),
            decode_tps=tokens_per_second(generated - 1, seconds),
            sampling=None,
        )

    def read(self) -> Self:
        """
        Read to the end, and return this, whose `branches`, `best`, `kept` and `usage` are known then.

        Raises:
            RecollectError: No branch has come to its end; this is what the first one failed with.
        """
        for _ in self:
            pass
        return self._whole()

    def __iter__(self) -> Iterator[Branch]:
        """Yield each branch when it has ended, failed ones too."""
        return (one for one in self._read() if isinstance(one, Branch))

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Yield pieces of text as they come, each after the index of its branch."""
        return (one for one in self._read() if not isinstance(one, Branch))

    async def __aiter__(self) -> AsyncIterator[Branch]:
        """Do the same on an event loop; what takes long happens on threads, scores too."""
        async with aclosing(self._read_async()) as found:
            async for one in found:
                if isinstance(one, Branch):
                    yield one

    async def pieces_async(self) -> AsyncIterator[tuple[int, str]]:
        """Do what `pieces` does on an event loop."""
        async with aclosing(self._read_async()) as found:
            async for one in found:
                if not isinstance(one, Branch):
                    yield one

    def __await__(self) -> Generator[Any, None, Self]:
        """Do what `read` does on an event loop."""
        return self._all().__await__()

    def stop(self) -> None:
        """End it after the forward pass under way, from any thread; whoever reads it comes to the end."""
        self._stopped = True
        for reply in list(self._running):
            reply.stop()

    def close(self) -> None:
        """End it, and wait until the engine has nothing to do for it any more."""
        self.stop()
        with self._changing:
            left = list(self._running)  # with those that were begun meanwhile
        for reply in left:
            reply.stop()
        for reply in left:
            with suppress(Exception):  # nobody asks what came of it
                reply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self, branch: Branch, name: str | None = None) -> Node:
        """
        Keep a branch in the conversation, also one that was pruned, and return its node in the tree.

        Args:
            branch: Has ended.
            name: Of the conversation's branch; None: the exploration's name and a number.

        Raises:
            ConversationError: It has not come to its end, or there is a branch of that name.
            StoreError: The journal cannot be written. Nothing was kept.
        """
        with self._changing:
            if branch.node is not None:
                return branch.node
            if branch.leaf is None:
                raise ConversationError("This branch has not come to its end: it cannot be kept.")
            conversation = self.conversation
            if name is not None and name in conversation.tips:
                raise ConversationError(f"There is a branch {name!r} already: take another name.")
            return self._keep(branch, name or self._free_name())

    def _keep(self, branch: Branch, name: str) -> Node:
        """Keep a branch under a name, or where somebody has taken that by now, under one like it."""
        with self._changing:
            assert branch.leaf is not None, "it has come to its end"
            conversation = self.conversation
            new, node = list[Node](), branch.leaf
            while node.id == DETACHED and node not in self._real:
                new.append(node)
                assert node.parent is not None, "it hangs in the tree at last"
                node = node.parent
            leaf = self._real.get(node, node)  # shared with a branch that is kept, or in the tree
            said = [one.to_new() for one in reversed(new)]
            name, leaf = conversation.begin_branch(name, leaf, said)
            if new:
                conversation.note_tools(leaf, self._origin.tools)
                self._real |= dict(zip(new, reversed(leaf.path()), strict=False))
            branch.name, branch.node = name, leaf
            self.kept.append(branch)
            return leaf

    def begin(
        self, listen: Callable[[BranchGeneration], None] | None = None
    ) -> list[BranchGeneration]:
        """
        Prune the level before, and have the engine begin the next one; none: it is over.

        For whoever reads the replies by other means than this object; each has to be closed.

        Args:
            listen: Called on the engine's thread with a reply whenever there is more of it.

        Raises:
            RecollectError: A prompt cannot be used or does not fit; none was begun.
        """
        with self._changing:
            while not self._stopped:
                if self._model is not None and self._level:
                    self._parents = [*_ranked(self._ready)[: self._plan.width]]
                is_over = self._level == self._plan.depth or not self._parents
                if (self._model is None or is_over) and not self._next_model():
                    break
                replies = self._prepared()
                self._level += 1
                if replies:
                    self._start(replies, listen)
                    return replies
                self._level = self._plan.depth  # nothing goes on: nor will it later
            return []

    def _next_model(self) -> bool:
        """Go on with the next model from where the exploration began; after the last, keep the best."""
        if self._model is not None:
            self._finalists += [one for one in self._parents if one is not None]
        if not self._models:
            if not self._plan.keeps_at_once:
                for branch in _ranked(self._finalists)[: self._plan.kept]:
                    if branch.node is None:
                        self._keep(branch, self._free_name())
            return False
        self._model, self._parents, self._level, self._ready = self._models.pop(0), [None], 0, []
        self._prompting = self._origin.prompting(self._model)
        return True

    def _prepared(self) -> list[BranchGeneration]:
        """Return the replies of the next level, ready to begin; what does not go on stays in the race."""
        self._ready, self._asked = [], {}
        replies, known = list[BranchGeneration](), len(self.branches)
        try:
            for parent in self._parents:
                said = self._plan.said(parent)
                try:
                    for text, params in zip(said, self._plan.tries(said), strict=True):
                        replies.append(self._try(parent, text, params))
                except ContextFullError:
                    if parent is None:
                        raise
                    said = []
                if not said and parent is not None:
                    self._ready.append(parent)
        except BaseException:
            for reply in replies:
                reply.release()
            del self.branches[known:]
            raise
        return replies

    def _try(
        self, parent: Branch | None, text: str | None, params: SamplingParams
    ) -> BranchGeneration:
        """Return one reply, ready to begin."""
        origin, prompting, model = self._origin, self._prompting, self._model
        assert prompting is not None, "there is a model"
        assert model is not None, "there is a model"
        at, said = origin.place(text) if parent is None else (parent.leaf, text)
        assert at is not None, "only what has come to its end is gone on from"
        index, tools = len(self.branches), origin.tools
        if params.seed is not None and isinstance(self._plan.params, SamplingParams):
            params = replace(params, seed=(params.seed + index) % 2**64)
        asked = self._asked.get((at, said))
        if asked is None:
            asked = prompting.asking(at, said, origin.begun, tools, origin.overflow)
            self._asked[at, said] = asked
        differs = None, origin.conversation.tools_change(asked.at, tools)
        prepared = prompting.prepare(asked, said, params, tools, origin.at, differs)
        branch = Branch(
            index=index,
            level=self._level + 1,
            parent=parent,
            prompt=text,
            params=params,
            model=model,
        )
        self.branches.append(branch)
        name = self._plan.name
        is_named = self._plan.keeps_at_once and not isinstance(name, str)
        asker = AskedBy(origin.conversation, origin.namespace, name[index] if is_named else None)
        # What was read ahead counts once: the other branches reuse it.
        ahead = () if index else origin.ahead
        return BranchGeneration(branch, prepared, ahead, asker, self._ended)

    def _start(
        self,
        replies: Sequence[BranchGeneration],
        listen: Callable[[BranchGeneration], None] | None,
    ) -> None:
        """Submit replies together, so that they begin in one pass."""
        for reply in replies:
            if listen is not None:
                reply.listen(partial(listen, reply))
        with replies[0].branch.model.engine.lock:
            for number, reply in enumerate(replies):
                try:
                    reply.start()
                except BaseException:
                    for other in replies[number:]:
                        other.release()
                    raise
                self._running.append(reply)
        if self._stopped:  # meanwhile
            self.stop()

    def _read(self) -> Iterator[Branch | tuple[int, str]]:
        """Yield pieces of text as they come, and branches as they finish."""
        self._begin_reading()
        arrivals = Stream()
        try:
            while replies := self.begin(partial(_arrived, arrivals)):
                left = set(replies)
                for reply in arrivals:
                    if reply in left:
                        yield from self._pieces_of(reply)
                        if reply.has_ended:
                            left.remove(reply)
                            yield self._finished(reply)
                        if not left:
                            break
        finally:
            self.close()

    async def _read_async(self) -> AsyncGenerator[Branch | tuple[int, str]]:
        """Do the same on an event loop; what may wait for the engine or the journal is on threads."""
        self._begin_reading()
        arrivals = Stream()
        arriving = aiter(arrivals)
        left_behind = _LeftBehind(self.stop)
        try:
            while replies := await to_its_end(
                partial(self.begin, partial(_arrived, arrivals)), cancelled=self.stop
            ):
                left = set(replies)
                async for reply in arriving:
                    if reply in left:
                        for piece in self._pieces_of(reply):
                            yield piece
                        if reply.has_ended:
                            left.remove(reply)
                            yield await to_its_end(partial(self._finished, reply))
                        if not left:
                            break
        finally:
            left_behind.is_seen_to = True
            self.stop()  # at once, whatever the thread waits for
            await to_its_end(self.close)

    def _begin_reading(self) -> None:
        if self._begun:
            raise ConversationError(
                "An exploration is read once: see its `branches`, or explore again."
            )
        self._begun = True

    def _pieces_of(self, reply: BranchGeneration) -> Iterator[tuple[int, str]]:
        try:
            for piece in reply.ready():
                self._first_s = self._first_s or perf_counter()
                yield reply.branch.index, piece
        except RecollectError as error:
            reply.branch.error = error

    def _finished(self, reply: BranchGeneration) -> Branch:
        """
        Return a branch whose reply has ended.

        Raises:
            Exception: What the scoring function raised.
            StoreError: It cannot be kept.
        """
        reply.close()
        return reply.branch

    def _ended(self, reply: BranchGeneration) -> None:
        """Take over what came of a reply that is closed."""
        generated, branch = reply.reply, reply.branch
        assert generated is not None, "it is closed"
        self._last_s = perf_counter()
        with self._changing:
            if reply in self._running:
                self._running.remove(reply)
            branch.reply = generated
            if branch.error is not None or generated.finish_reason == "cancelled":
                return
            leaf, own = reply.turn.at, branch.model.weights_fingerprint
            for message in reply.turn.messages(generated, reply.token_ids, own):
                leaf = self._grown(leaf, message)
            branch.leaf = leaf
            branch.score = self._plan.scored(branch)
            self._ready.append(branch)
            if self._plan.keeps_at_once:
                name = self._plan.name
                own = self._free_name() if isinstance(name, str) else name[branch.index]
                self._keep(branch, own)

    def _grown(self, at: Node, message: NewNode) -> Node:
        """Return a message's node, which the tree does not have; one for all replies to a prompt."""
        if message.role != "user":
            return detached(at, message)
        known = self._messages.get((at, message.content))
        if known is None:
            known = self._messages[at, message.content] = detached(at, message)
        return known

    def _free_name(self) -> str:
        name, tips = self._plan.name, self._origin.conversation.tips
        prefix = name if isinstance(name, str) else "explore"
        return next(one for n in count(1) if (one := f"{prefix}-{n}") not in tips)

    async def _all(self) -> Self:
        async for _ in self:
            pass
        return self._whole()

    def _whole(self) -> Self:
        if not any(one.is_whole for one in self.branches):
            failed = (one.error for one in self.branches if one.error is not None)
            raise next(failed, ConversationError("The exploration was stopped before it began."))
        return self


class Explorer:
    """Who stands somewhere in a conversation and can try what to say there: a session."""

    def origin(self) -> Origin:
        """Return where that is, and how is asked there."""
        raise NotImplementedError

    def explore(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        depth: int = 1,
        keep: int | None = None,
        score: Score | None = None,
        name: str | Sequence[str] = "explore",
        models: Sequence[ModelParts] = (),
    ) -> Exploration:
        """
        Return replies that are tried beside each other from the tip, in one batch over one prefix.

        The session stays where it is. Iterate over what is returned for branches as they finish, or call
        `read` for all. Only what is kept is in the conversation afterwards.

        Args:
            prompts: What is said, one reply to each: the same text as often as replies are wanted. A
                number: so many replies to the message at the tip; at further levels, each reply
                that was cut goes on so many ways. A function: returns what is said after a branch, with
                None for the tip; nothing, where the branch does not go on.
            params: How the replies are sampled, or each of them; None: as the session does. With one
                seed, each branch adds its index, so that no two replies draw alike.
            depth: How many levels of replies follow each other. More than one needs a score.
            keep: How many of the best of each level go on, and in the end are kept as branches of the
                conversation; True: all, False: none. None: the best where there is a score, else all.
            score: How good a branch is, the higher the better; called when its reply has ended, on the
                thread that reads.
            name: Of the branches that are kept, to which numbers are added; or the name of each.
            models: Each explores by itself, one after the other; empty: the session's model.

        Raises:
            InvalidParameterError: These values do not go together; `params` and `prompts` would give
                the same reply twice. Reading raises what `stream` does.
        """
        origin = self.origin()
        plan = Plan(
            prompts=prompts,
            params=origin.params if params is None else params,
            depth=depth,
            keep=keep,
            score=score,
            name=name,
        )
        return Exploration(origin, models or [origin.model], plan)

    def explore_async(self, prompts: Prompts, **how: Any) -> Exploration:
        """
        Do the same on an event loop: `await` it for all branches, or `async for` branches as they finish.

        Args:
            prompts: As in `explore`.
            how: The other arguments of `explore`.
        """
        return self.explore(prompts, **how)


class _LeftBehind:
    """Ends what nobody can read on: its loop was closed, and with it whatever would end the generator."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.is_seen_to = False
        self._end = end

    def __del__(self) -> None:
        if not self.is_seen_to:
            self._end()


def _arrived(arrivals: Stream, reply: BranchGeneration) -> None:
    """Take note, on the engine's thread, that there is more of a reply."""
    arrivals.put(reply)
    arrivals.hand_over()


def _ranked(branches: Sequence[Branch]) -> list[Branch]:
    """Return branches, those with the highest scores first; without scores, in their order and last."""
    return sorted(branches, key=lambda one: (one.score is None, -(one.score or 0.0), one.index))
