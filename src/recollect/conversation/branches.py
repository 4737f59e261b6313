"""
What is tried from one place of a conversation, and what comes of it.

A `Plan` says which replies are asked for and which of them stay. An `Origin` is the place that they go
on from. A `Branch` is one reply with the path that leads to it. All three are values, which compute and keep
nothing. A `BranchGeneration` is the reply of a branch while it is generated.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import iscoroutine, iscoroutinefunction
from math import isnan
from typing import Any, Final

from recollect.conversation.conversation import Conversation
from recollect.conversation.feed import AskedBy, ToldReply
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node, Overflow
from recollect.conversation.turn import ModelParts, Prepared, Prompting, explained, is_cut
from recollect.engine.reply import GeneratedReply, ReadAhead, ReplyGeneration
from recollect.errors import ConversationError, InvalidParameterError
from recollect.journal.records import require_name, require_text
from recollect.types import Message, SamplingParams, Usage


@dataclass(eq=False, slots=True, kw_only=True)
class Branch:
    """
    One of the replies of an exploration, and the way to it.

    Changed by its exploration alone.
    """

    index: int
    """In the order in which the replies were begun, from 0."""
    level: int
    """How many levels lead to it, itself counted: 1 for those that follow where the exploration began."""
    parent: "Branch | None"
    """What it goes on from; None: from where the exploration began."""
    prompt: str | None
    """What was said; None: the last message is answered, or a reply that was cut goes on."""
    params: SamplingParams
    model: ModelParts
    reply: GeneratedReply | None = None
    """What was generated, once it has ended; None before, and where it failed."""
    error: Exception | None = None
    """What it failed with."""
    score: float | None = None
    """What the scoring function says of it; None before, and where there is none."""
    name: str | None = None
    """The branch of the conversation that it is kept as; None: it is not kept."""
    node: Node | None = None
    """Where it is in the conversation's tree, once it is kept."""
    leaf: Node | None = None
    """Its reply as a node that the tree does not have, on a path of its own; None until it has ended."""

    @property
    def text(self) -> str:
        """
        Return what the reply says, without its reasoning; where it goes on with one, from its beginning.

        Raises:
            Exception: What it failed with.
        """
        if self.error is not None:
            raise self.error
        return "" if self.leaf is None else self.leaf.content

    @property
    def is_whole(self) -> bool:
        """Return whether it has ended, neither failed nor cancelled."""
        return self.leaf is not None

    def transcript(self) -> list[Message]:
        """Return all messages from the first to this reply, as `Session.transcript` does."""
        if self.error is not None:
            raise self.error
        return [] if self.leaf is None else [node.message() for node in self.leaf.path()]

    def __str__(self) -> str:
        return self.text


class BranchGeneration(ReplyGeneration):
    """A branch's reply while it is generated; `close` lets the exploration have what came of it."""

    def __init__(
        self,
        branch: Branch,
        prepared: Prepared,
        ahead: tuple[ReadAhead, ...],
        asker: AskedBy,
        end: Callable[["BranchGeneration"], None],
    ) -> None:
        super().__init__(
            branch.model.engine,
            prepared.generator,
            branch.model.tokenizer,
            ahead=ahead,
            rules=prepared.rules,
            begun=prepared.begun,
        )
        self.branch: Final = branch
        self.turn: Final = prepared.turn
        self._asker = asker
        self._told: ToldReply | None = None
        self._end_branch = end

    def start(self) -> None:
        """Have the engine begin, and tell so."""
        super().start()
        said = (self._begun, self._rules)
        feed, at = self.branch.model.feed, self.turn.at
        self._told = told = feed.reply(self, self._asker, at, None, said)
        weakref.finalize(self, told.end, None, None)  # where nobody closes it

    def _piece_of(self, generated: Any) -> str:
        if (piece := super()._piece_of(generated)) and self._told is not None:
            self._told.piece(piece)
        return piece

    def usage(self) -> Usage:
        """Return what the reply has cost so far, and why tokens had to be computed again."""
        return explained(super().usage(), self.turn.expected)

    def _close(self) -> None:
        """End the reply, and let the exploration have it."""
        try:
            super()._close()
            self._end_branch(self)
        finally:
            if self._told is not None:
                self._told.end(self.reply, self.branch.node)


MOST_TRIED: Final = 1_024
"""Replies of a level that follow one place; each has a sequence and its text in memory at once."""

Prompts = int | Sequence[str | None] | Callable[[Branch | None], Sequence[str | None]]
Score = Callable[[Branch], float]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an exploration begins, and how a session asks there."""

    conversation: Conversation
    at: Node
    place: Callable[[str | None], tuple[Node, str | None]]
    """Returns which node a message follows there, and what of it is new."""
    prompting: Callable[[ModelParts], Prompting]
    model: ModelParts
    """The session's."""
    params: SamplingParams
    tools: Tools
    overflow: Overflow
    begun: Node | None
    namespace: str
    ahead: tuple[ReadAhead, ...]
    """What was computed there before it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is tried, and what stays of it. Its values are those of `Session.explore`."""

    prompts: Prompts
    params: SamplingParams | Sequence[SamplingParams]
    depth: int = 1
    keep: int | None = None
    score: Score | None = None
    name: str | Sequence[str] = "explore"

    def __post_init__(self) -> None:
        count = self.prompts if isinstance(self.prompts, int) else None
        if count is not None and not 1 <= count <= MOST_TRIED:
            raise wrong(
                "prompts", f"{count:,} replies cannot be tried: ask for 1 to {MOST_TRIED:,}."
            )
        score: object = self.score
        if score is not None and (not callable(score) or iscoroutinefunction(score)):
            raise wrong("score", _SCORES)
        self._check_names()
        if not callable(self.prompts) and not self.tries(self.said(None)):
            raise wrong("prompts", "There are no prompts: give one or more.")
        if self.depth < 1:
            raise wrong("depth", f"depth is {self.depth}: give 1 or more.")
        if self.keep is not None and self.keep < 0:
            raise wrong("keep", f"keep is {self.keep}: give a number of branches, from 0 on.")
        if self.score is None and type(self.keep) is int and self.keep:
            raise wrong("keep", "Nothing says which branches are the best: give a score too.")
        if self.depth > 1 and (self.score is None or self.keep is True):
            raise wrong(
                "depth",
                "Without a limit each level would have several times the branches of the one before: give "
                "a score, and in keep how many go on.",
            )
        if self.depth > 1 and not isinstance(self.name, str):
            raise wrong("name", "Several levels have one name, to which numbers are added.")

    @property
    def kept(self) -> int | None:
        """Return how many branches stay in the tree; None: all."""
        if self.keep is None:
            return None if self.score is None else 1
        return None if self.keep is True else int(self.keep)

    @property
    def width(self) -> int | None:
        """Return how many branches of a level are gone on from; None: all."""
        return None if self.kept is None else max(1, self.kept)

    @property
    def keeps_at_once(self) -> bool:
        """Return whether each branch is kept as soon as it has ended, because none is pruned."""
        return self.kept is None

    def said(self, branch: Branch | None) -> list[str | None]:
        """Return what is said after a branch, or after where the exploration began."""
        if isinstance(self.prompts, int):
            # A reply that came to its end does not go on.
            goes_on = branch is None or (branch.reply is not None and _is_cut(branch))
            return [None] * self.prompts if goes_on else []
        return _texts(self.prompts(branch) if callable(self.prompts) else self.prompts)

    def scored(self, branch: Branch) -> float | None:
        """
        Return the score of a branch; None where nothing scores.

        Raises:
            Exception: What the scoring function raised.
            ConversationError: It is no number.
        """
        if self.score is None:
            return None
        found: object = self.score(branch)
        if iscoroutine(found):
            found.close()
        try:
            score = float(found)  # type: ignore[arg-type] # what is no number is refused here
        except (TypeError, ValueError):
            raise ConversationError(_SCORES) from None
        if isnan(score):
            raise ConversationError("The score of a branch is no number: return one.")
        return score

    def _check_names(self) -> None:
        if isinstance(self.name, str):
            require_name(f"{self.name}-1", "branch")
        elif not isinstance(self.name, list | tuple) or not all(
            isinstance(one, str) for one in self.name
        ):
            raise wrong(
                "name", "The names of branches are texts: give one text, or a list of them."
            )
        else:
            for one in self.name:
                require_name(one, "branch")

    def tries(self, said: Sequence[str | None]) -> list[SamplingParams]:
        """
        Return how the reply to each of the messages is sampled.

        Raises:
            InvalidParameterError: Two replies would be the same, or the numbers differ.
        """
        given = self.params
        if not isinstance(given, SamplingParams) and not (
            isinstance(given, list | tuple)
            and all(isinstance(one, SamplingParams) for one in given)
        ):
            raise wrong("params", "Give SamplingParams, or a list with as many of them as prompts.")
        params = [given] * len(said) if isinstance(given, SamplingParams) else list(given)
        if len(params) != len(said):
            raise wrong(
                "params", f"There are {len(said)} prompts and {len(params)} params: give as many."
            )
        if not isinstance(self.name, str) and len(self.name) != len(said):
            raise wrong(
                "name", f"There are {len(said)} prompts and {len(self.name)} names: give as many."
            )
        seen = list[tuple[str | None, SamplingParams]]()
        for text, one in zip(said, params, strict=True):
            pair = text, replace(one, seed=None)
            if not one.temperature and pair in seen:
                raise wrong(
                    "temperature",
                    "Two replies to one prompt would be the same, since they are greedy: give a temperature, "
                    "such as 0.8.",
                )
            seen.append(pair)
        return params


_SCORES: Final = (
    "A score is a function that returns a number, and not one that is awaited: it is called on a thread of "
    "its own where an event loop reads."
)


def _texts(given: object) -> list[str | None]:
    """
    Return prompts as they were given.

    Raises:
        InvalidParameterError: They are no list of texts.
        ConversationError: A text has half a character.
    """
    if isinstance(given, str):
        raise wrong("prompts", 'One text is no list of prompts: give ["…"], or ["…"] * 8.')
    if not isinstance(given, Sequence) or not all(
        one is None or isinstance(one, str) for one in given
    ):
        raise wrong(
            "prompts", "Prompts are a list of texts, a number, or a function: give one of these."
        )
    if len(given) > MOST_TRIED:
        raise wrong("prompts", f"{len(given):,} prompts are too many: give {MOST_TRIED:,} at most.")
    for one in given:
        if one is not None:
            require_text(one)
    return list(given)


def wrong(param: str, told: str) -> InvalidParameterError:
    """Return what is raised where a value cannot be used."""
    return InvalidParameterError(told, param=param)


def _is_cut(branch: Branch) -> bool:
    return branch.leaf is not None and is_cut(branch.leaf)
