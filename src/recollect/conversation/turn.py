"""
One turn of a session: its prompt, its reply, and the reason why tokens were computed again.

`Prompting` makes the prompts of one session, and remembers which turns a full context has left out. The
rest are values: the session carries a turn out, and owns all other state.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any, Final, Protocol, Self

from recollect.conversation.conversation import Conversation
from recollect.conversation.feed import Feed
from recollect.conversation.matching import Change
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.showing import Prompt
from recollect.conversation.tools import Tools
from recollect.conversation.tree import (
    Node,
    Overflow,
    Tree,
    Window,
    links_of,
    message_key,
    turn_starts,
)
from recollect.engine.engine import Engine
from recollect.engine.grammar import Grammars
from recollect.engine.reply import GeneratedReply
from recollect.engine.sampling import Generator
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    TemplateError,
)
from recollect.journal.home import Checkpoints
from recollect.journal.records import NewNode
from recollect.runtime.base import Reuse
from recollect.text.detokenizer import whole_ids
from recollect.text.reasoning import NO_REASONING, Begun, ReasoningWatch, ShowingTokenizer
from recollect.text.reasoning_marks import ReasoningMarks
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Tokenizer
from recollect.text.tool_calls import CallRules
from recollect.text.tool_formats import HERMES, ToolFormat
from recollect.types import (
    Reason,
    Role,
    SamplingParams,
    ToolLinks,
    Usage,
    common_prefix_length,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(GeneratedReply):
    """A whole reply, and its node in the conversation's tree."""

    node: Node
    """The reply's node in the tree."""
    change: Change | None = None
    """Where the messages leave an earlier conversation; None: they do not, or nobody knows."""
    dropped_turns: int = 0
    """Number of the oldest turns that the prompt leaves out, because the context is full."""

    @classmethod
    def of(
        cls, generated: GeneratedReply, node: Node, dropped_turns: int, change: Change | None = None
    ) -> Self:
        """Return a generated reply with the node that it has become."""
        values = {one.name: getattr(generated, one.name) for one in fields(GeneratedReply)}
        return cls(**values, node=node, dropped_turns=dropped_turns, change=change)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is known before a turn runs about the KV that it should reuse."""

    prompt: Prompt
    reuse: Reuse
    """What of it the runtime can reuse at all."""
    change: Change | None = None
    """The first message that differs from an earlier conversation; None: none does."""
    tools_change: str | None = None
    """How the tools differ from those of an earlier reply, in words; None: they do not."""


def explained(usage: Usage, expected: Expectation) -> Usage:
    """Return the usage with why tokens were computed again, in words too, and how many."""
    reason, difference, lost = _reason(usage, expected)
    lost = min(max(0, lost), usage.computed_tokens)
    return replace(usage, reason=reason, difference=difference, lost_tokens=lost)


def _reason(usage: Usage, expected: Expectation) -> tuple[Reason, str | None, int]:
    """
    Say what happened where reuse ended, and how many tokens were lost there.

    A reason is given only for tokens that were lost.
    """
    prompt, change = expected.prompt, expected.change

    warm = expected.reuse.warm_tokens
    there = usage.reused_tokens + usage.read_ahead_tokens
    later = [shown.start for shown in prompt.rewritten if shown.start > usage.reused_tokens]
    known = warm(min([prompt.generated_length, *later]))
    rewritten = next(
        (
            shown.reply
            for shown in prompt.rewritten
            if warm(shown.start) <= usage.reused_tokens < shown.end
        ),
        None,
    )
    is_all_there = there >= warm(usage.prompt_tokens) or (
        bool(prompt.generated_length) and there >= known and rewritten is None
    )
    read = warm(prompt.generated_length) - there
    if expected.tools_change is not None and not is_all_there:
        # Before the first reply nobody knows how much of the prompt was there under the other tools.
        return "tools_changed", expected.tools_change, read if read > 0 else usage.computed_tokens
    if rewritten is not None:
        return "template_rewrote", f"The template shows reply {rewritten + 1} otherwise.", read
    if usage.reused_tokens < prompt.reencoded_length and (
        prompt.generated_length < prompt.reencoded_length  # no reply since then has read them
    ):
        count = prompt.reencoded_replies
        replies = "1 reply was" if count == 1 else f"{count} replies were"
        told = f"{replies} not generated by this model."
        return "other_model", told, prompt.reencoded_length - usage.reused_tokens
    if change is not None and change.again:
        reason: Reason = "system_changed" if change.role == "system" else "message_changed"
        share = change.again / max(change.again, change.after)
        return reason, str(change), round(usage.computed_tokens * share)
    found = usage.evicted(max(known - there, usage.lost_tokens))
    return found.reason, found.difference, found.lost_tokens


@dataclass(frozen=True, slots=True)
class Asking:
    """What a reply is to follow, as token ids."""

    at: Node
    """The last message before it."""
    prompt: Prompt
    dropped_turns: int = 0
    """Oldest turns that were left out because the context was full."""
    begun: Node | None = None
    """The reply that goes on, in whose place the longer one comes; None: a new one begins."""
    begun_ids: Sequence[int] = ()
    """What it was read as: the end of the prompt."""

    def reasoning(self, marks: ReasoningMarks | None, tokenizer: Tokenizer) -> Begun:
        """Return how reasoning stands where the reply begins, and what it goes on with."""
        if marks is None and self.begun is None:
            return NO_REASONING
        begun = Begun.of(marks, self.prompt.ending)
        if self.begun is None:
            return begun
        thought = None if self.begun.links is None else self.begun.links.reasoning
        goes_on = replace(begun, ids=self.begun_ids, text=self.begun.content or thought or "")
        if marks is None:
            return goes_on
        is_inside = not self.begun.content and (begun.is_inside or thought is not None)
        if not self.begun.content:  # it may have been cut before anything was told behind a mark
            text = ShowingTokenizer(tokenizer, marks, None).decode(self.begun_ids)
            is_inside = is_inside or marks.open.strip() in text
            is_inside = is_inside and (marks.lead or marks.close).strip() not in text
        return replace(goes_on, is_inside=is_inside, is_closed=not is_inside)

    def in_whole_characters(self, tokenizer: Tokenizer) -> "Asking":
        """Return the same without the ids of a character's part, for what cannot begin inside of one."""
        if self.begun is None:
            return self
        begun_ids = whole_ids(self.begun_ids, self.begun.content, tokenizer)
        ids = self.prompt.token_ids
        ids = ids[: len(ids) - len(self.begun_ids) + len(begun_ids)]
        generated = min(self.prompt.generated_length, len(ids))
        prompt = replace(self.prompt, token_ids=ids, generated_length=generated)
        return replace(self, prompt=prompt, begun_ids=begun_ids)


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said where, what the reply may call, and what it was expected to reuse."""

    asked: Asking
    said: str | None
    """None: the last message is answered."""
    before: Node
    """The tip that the session goes back to where no reply comes."""
    tools: Tools
    expected: Expectation
    format: ToolFormat = HERMES
    """How the model writes calls."""

    @property
    def at(self) -> Node:
        """Return what the turn follows."""
        return self.asked.at

    def messages(
        self, reply: GeneratedReply, token_ids: Sequence[int], fingerprint: str
    ) -> list[NewNode]:
        """Return what is saved of the turn: its message, and the reply as the model wrote it."""
        asked = [] if self.said is None else [NewNode(role="user", content=self.said)]
        begun = self.asked.begun
        before = "" if begun is None or begun.links is None else begun.links.reasoning or ""
        calls = links_of(reply.said, reply.tool_calls, self.format) or ToolLinks()
        links = replace(calls, reasoning=before + reply.reasoning or None)
        said = NewNode(
            role="assistant",
            content=("" if begun is None else begun.content) + reply.said,
            token_ids=[*self.asked.begun_ids, *token_ids],
            fingerprint=fingerprint,
            finish_reason=reply.finish_reason,
            usage=reply.usage.to_dict(),
            links=links if links != ToolLinks() else None,
        )
        return [*asked, said]


class ModelParts(Protocol):
    """What a session needs of its model; `Model` has all of it."""

    @property
    def engine(self) -> Engine:
        """Return the engine that computes replies."""

    @property
    def prompts(self) -> PromptEncoder:
        """Return the encoder from a path through the tree to token ids."""

    @property
    def template(self) -> ChatTemplate:
        """Return what shows a conversation as the model's text."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, which decodes replies."""

    @property
    def grammars(self) -> Grammars:
        """Return the compiled grammars, which constrain replies."""

    @property
    def weights_fingerprint(self) -> str:
        """Return the fingerprint of the model, which is saved with each reply."""

    @property
    def feed(self) -> Feed:
        """Return what tells of its replies."""

    @property
    def checkpoint_store(self) -> Checkpoints:
        """
        Return the checkpoints of this data folder, to find, add and drop.

        Raises:
            StoreError: There is no KV store on disk, or the journal cannot be used.
        """


@dataclass(frozen=True, slots=True)
class Prepared:
    """A turn that the engine can begin, and what reads its reply."""

    turn: Turn
    generator: Generator
    """Has the prompt; nothing of it is computed yet."""
    rules: CallRules | None
    """What calls of tools look like; None: there are none."""
    begun: Begun
    """How reasoning stands where the reply begins."""


class Prompting:
    """Prompts in one namespace. Owned by a session, or by an exploration."""

    def __init__(
        self, model: ModelParts, namespace: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self._model = model
        self._engine = model.engine
        self._encoder = model.prompts.with_options(options) if options else model.prompts
        self._namespace = namespace
        self._window = Window()

    def beside(self, model: ModelParts, options: Mapping[str, Any]) -> "Prompting":
        """Return one for another model, or for the same, that leaves out the turns that this one does."""
        other = Prompting(model, self._namespace, options)
        other._window = copy(self._window)
        return other

    def prepare(
        self,
        asked: Asking,
        said: str | None,
        params: SamplingParams,
        tools: Tools,
        before: Node,
        differs: tuple[Change | None, str | None],
    ) -> Prepared:
        """
        Return a turn that is ready to begin; nothing of it is computed or kept.

        Args:
            asked: As `asking` returns it.
            said, tools, before: As in `Turn`.
            params: How the reply is sampled.
            differs: `change` and `tools_change`, as in `Expectation`.

        Raises:
            ConfigError: A parameter, a grammar or a tool cannot be used.
            ContextFullError: The prompt does not fit the context.
        """
        model, form = self._model, self._model.template.tool_format
        rules = tools.rules(params.grammar, form) if tools.schemas else None
        if rules is not None or params.grammar is not None:
            asked = asked.in_whole_characters(model.tokenizer)
        branch_point = 0
        if self._engine.info.reuse.whole_tails and asked.begun is None:
            branch_point = self._branch_point(asked, said, tools)
        sequence = self.sequence(asked.prompt.token_ids, asked.at, said)
        sequence.branch_point = branch_point
        begun = asked.reasoning(model.template.reasoning, model.tokenizer)
        if rules is not None and tools.choice != "none":
            begun = begun.with_calls(form, model.tokenizer)
        reasoning = model.tokenizer, begun
        generator = generator_of(
            self._engine, sequence, params, tools, model.grammars, reasoning, form
        )
        expected = Expectation(asked.prompt, self._engine.info.reuse, *differs)
        return Prepared(Turn(asked, said, before, tools, expected, form), generator, rules, begun)

    def _branch_point(self, asked: Asking, said: str | None, tools: Tools) -> int:
        """
        Return up to which length the next question's prompt has the ids of this one.

        Fewer than all where the template opens reasoning that it does not show later.
        """
        tree = Tree()
        texts: list[tuple[Role, str]] = [] if said is None else [("user", said)]
        later = [tree.add(tree.root, role, text) for role, text in (*texts, ("assistant", "A"))]
        path = [*self._window.shown(asked.at.path()), *later]
        ids = asked.prompt.token_ids
        try:
            then = self._encoder.encode(path, "Q", tools.schemas).token_ids
        except TemplateError:
            return len(ids)
        return common_prefix_length(ids, then)

    def asking(
        self, at: Node, said: str | None, begun: Node | None, tools: Tools, overflow: Overflow
    ) -> Asking:
        """
        Return the prompt for a reply, or for the rest of one.

        Args:
            at: The messages up to here, all or those that still fit.
            said: A user's message after those; None: the last of them is answered.
            begun: A reply that goes on if it is the last message, because the client gave its beginning or
                because it was cut; None: there is no such reply.
            tools: What the reply may call.
            overflow: What happens when not all fit.

        Raises:
            ConversationError: The last message cannot be answered.
            TemplateError: The template refuses the conversation.
        """
        if said is None:
            begun = at if is_cut(at) else begun
            _check_can_be_answered(at, begun)
        return (
            self._going_on(at, tools)
            if said is None and at is begun
            else self._new(at, said, tools, overflow)
        )

    def _new(self, at: Node, said: str | None, tools: Tools, overflow: Overflow) -> Asking:
        last: list[tuple[Sequence[Node], Prompt]] = []

        def encode(messages: Sequence[Node]) -> Prompt:
            """Return the prompt; what was measured just before is not encoded again."""
            if not last or last[0][0] is not messages:
                last[:] = [(messages, self._encoder.encode(messages, said, tools.schemas))]
            return last[0][1]

        def measure(messages: Sequence[Node]) -> int:
            return len(encode(messages).token_ids)

        path = at.path()
        limit, has_more = self._engine.info.context_length, said is not None
        shown = self._window.fitting(path, limit, measure, overflow, has_more=has_more)
        return Asking(at, encode(shown), len(turn_starts(path)) - len(turn_starts(shown)))

    def _going_on(self, begun: Node, tools: Tools) -> Asking:
        assert begun.parent is not None, "a reply has a parent"
        path, encoder = self._window.shown(begun.parent.path()), self._encoder
        is_own = encoder.is_own(begun)
        begun_ids = encoder.said_ids(begun)
        if is_own and self._began_in_thought(begun):
            prompt = encoder.encode(path, tools=tools.schemas)
        else:
            try:
                prompt = encoder.encode_typed(path, "", tools.schemas, role="assistant")
            except TemplateError:  # it refuses to end with a reply, or does not show one there
                prompt = encoder.encode(path, tools=tools.schemas)
        ids = prompt.token_ids + begun_ids
        known = len(ids) if is_own else prompt.generated_length
        prompt = replace(prompt, token_ids=ids, generated_length=known)
        return Asking(begun.parent, prompt, begun=begun, begun_ids=begun_ids)

    def _began_in_thought(self, reply: Node) -> bool:
        """Return whether a reply of this model may have begun behind a mark that its prompt had opened."""
        marks = self._model.template.reasoning
        if marks is None or not reply.token_ids:
            return False
        text = ShowingTokenizer(self._model.tokenizer, marks, None).decode(reply.token_ids)
        is_open = not reply.content or marks.close.strip() in text
        return is_open and marks.open.strip() not in text

    def typing(self, at: Node, text: str, tools: Tools) -> list[int]:
        """Return the ids of what is shown up to a node, and of a message that is being typed."""
        shown = self._window.shown(at.path())
        return self._encoder.encode_typed(shown, text, tools.schemas).token_ids

    def sequence(self, token_ids: list[int], at: Node, said: str | None = None) -> TokenSequence:
        """
        Return a sequence with this history.

        Args:
            token_ids: The history.
            at: The last message in it that is in the tree.
            said: A user's message after that; None: there is none.

        Raises:
            ContextFullError: It leaves no place for a reply.
        """
        limit = self._engine.info.context_length
        needed = len(token_ids) + 1
        if needed > limit:
            raise ContextFullError(needed=needed, limit=limit)
        sequence = self._engine.new_sequence(self._namespace)
        sequence.session = branches_key(self._namespace, at, said)
        sequence.append(token_ids)
        return sequence


def branches_key(namespace: str, at: Node, said: str | None = None) -> str:
    """
    Return what is equal for all branches of a conversation, whoever sends it and however often: a hash of
    what is said up to the first message of a user.
    """
    first = next((node for node in at.path() if node.role == "user"), None)
    is_new = first is None and said is not None
    key = message_key(at.key, "user", said or "") if is_new else (first or at).key
    return blake2b(namespace.encode() + key, digest_size=16).hexdigest()


def is_unanswered(tip: Node, conversation: Conversation) -> bool:
    """Return whether a node is a user's message that is saved and has no reply."""
    return tip.role == "user" and not tip.children and conversation.saved_id(tip) is not None


def place_of(tip: Node, text: str | None, conversation: Conversation) -> tuple[Node, str | None]:
    """
    Return where a message is said at *tip*, and what of it is new.

    The same text answers a message that has no reply; another text replaces it.
    """
    if text is None or not is_unanswered(tip, conversation):
        return tip, text
    assert tip.parent is not None, "a message has a parent"
    return (tip, None) if text == tip.content else (tip.parent, text)


def is_cut(node: Node) -> bool:
    """Return whether a node is a reply that did not end by itself: `respond(None)` goes on with it."""
    return node.role == "assistant" and node.finish_reason in ("length", "cancelled")


ANSWERED: Final = ("user", "tool")
"""Roles whose messages a reply can follow."""


def _check_can_be_answered(at: Node, begun: Node | None) -> None:
    """
    Check that a reply can follow a message, or go on where that is the beginning of one.

    Args:
        at: The message.
        begun: The reply whose beginning was given; None: there is none.

    Raises:
        ConversationError: It cannot.
    """
    last = at
    while last.role == "system" and last.parent is not None:
        last = last.parent
    if last.role in ANSWERED:
        return
    if at is not begun and at.role == "assistant":
        raise ConversationError(
            "There is no message to answer: the last reply has come to its end. Say something, or have "
            "another reply in its place (`regenerate`)."
        )
    if at is not begun:
        raise ConversationError(
            "There is no message to answer: the last one, instructions apart, has to be a user's or a "
            "tool's."
        )
    if at.links is not None and at.links.call_ids:
        raise ConversationError(
            "The last message calls tools: add what they gave back, as messages of the role tool."
        )


def watch_of(
    tokenizer: Tokenizer, begun: Begun, params: SamplingParams, *, has_channels: bool = False
) -> ReasoningWatch | None:
    """
    Return what follows the reasoning of a reply; None where nothing depends on it.

    Args:
        tokenizer: Of the model.
        begun: How reasoning stands where the reply begins.
        params: How tokens are chosen.
        has_channels: Whether the grammar is about the reasoning too.
    """
    has_grammar = params.grammar is not None and not has_channels
    if begun.marks is None or not (has_grammar or params.reasoning_budget is not None):
        return None
    if begun.is_closed:
        return None
    return ReasoningWatch(
        tokenizer,
        begun,
        budget=params.reasoning_budget,
        leads=has_grammar,
        is_within=has_channels,
    )


def generator_of(
    engine: Engine,
    sequence: TokenSequence,
    params: SamplingParams,
    tools: Tools,
    grammars: Grammars,
    reasoning: tuple[Tokenizer, Begun],
    format_: ToolFormat = HERMES,
) -> Generator:
    """
    Return what continues a sequence with a reply that may call tools.

    A tool whose schema cannot be held to is no reason to refuse the request: its calls are not held to it.
    A grammar is about what is said: the model may think before. Where calls have channels of their own, as
    in harmony, the grammar of tools is about the whole reply, since it names these; a budget then leaves
    one stretch of reasoning.

    Raises:
        ConfigError: A parameter or a grammar cannot be used; the sequence is released.
    """
    try:
        while True:
            how = params
            if tools.schemas:
                control = reasoning[0].control_tokens
                budget = params.reasoning_budget
                grammar = tools.grammar(params.grammar, format_, control, budget)
                how = replace(params, grammar=grammar)
            has_channels = bool(tools.schemas) and format_.kind == "channels"
            watch = watch_of(*reasoning, how, has_channels=has_channels)
            try:
                return Generator(engine, how, sequence=sequence, grammars=grammars, reasoning=watch)
            except InvalidParameterError as error:
                if how.grammar is None or not tools.schemas:
                    raise
                tools = tools.loosened(error, how.grammar)
    except BaseException:
        sequence.release()
        raise
