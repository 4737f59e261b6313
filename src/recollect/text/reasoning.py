"""
Find what a model thinks before it answers in what it writes, by the marks of its chat template.

`ReasoningSplitter` takes a reply apart as it comes; what it calls said is where calls of tools are looked
for. `ReasoningWatch` does the same with tokens, and ends reasoning where its budget is spent.
Pure: what the marks are is found out in `reasoning_marks`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from recollect.text.call_parts import before_mark, held
from recollect.text.detokenizer import Detokenizer
from recollect.text.reasoning_marks import ReasoningMarks
from recollect.text.tokenizer import ControlTokens, Tokenizer, decode_with_marks
from recollect.text.tool_calls import (
    CallRules,
    ParsedReply,
    TextDelta,
    ToolCallParser,
    new_call_prefix,
    parse_reply,
)
from recollect.text.tool_calls import Event as SaidEvent
from recollect.text.tool_formats import ToolFormat, control_marks


@dataclass(frozen=True, slots=True)
class Parted:
    """A reply, taken apart."""

    reasoning: str
    """What was thought, without space at its ends."""
    said: str
    """All that follows, calls of tools included."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks."""

    text: str


_State = Literal["start", "inside", "after", "said"]


class ReasoningSplitter:
    """
    Tells what is thought from what is said, in text that comes in pieces.

    Owned by whoever reads the reply. Reasoning stands at the beginning of a reply; marks in what is
    said are text, but for those that begin another message, as in harmony.

    A call of a tool ends reasoning too, where models are known not to close it first: a call that stands
    at the beginning of a line, or whose mark is a control token. What closes reasoning behind it is no text.

    Invariants:
        1. What is given out does not depend on how the text falls into pieces, but for how it is cut.
        2. Without a mark, what is said is the text as it came.
        3. What is said ends as the text ends.
    """

    def __init__(
        self,
        marks: ReasoningMarks,
        *,
        is_inside: bool = False,
        call: str = "",
        is_token: bool = False,
    ) -> None:
        """
        Have read nothing.

        Args:
            marks: Of reasoning.
            is_inside: Whether the text begins within it.
            call: The mark of a call that ends it, too; empty: none does.
            is_token: Whether that is a control token.
        """
        self._marks = marks
        self._call, self._is_token = call, is_token
        self.ended_by_call = False
        """Whether a call has ended reasoning that nothing has closed."""
        self._state: _State = "inside" if is_inside else "start"
        self._rest = ""
        self._apart = ""
        """What comes before the next thought: a stretch of reasoning begins apart from the one before."""
        self._has_begun = False  # some of this stretch of reasoning was given out

    @property
    def state(self) -> _State:
        """Return where the text is now."""
        return self._state

    @property
    def is_over(self) -> bool:
        """Return whether all that comes is said."""
        is_last = not (self._marks.may_come_again or self.ended_by_call)
        return self._state == "said" and is_last

    @property
    def may_close(self) -> bool:
        """Return whether the text ends with what may become the mark that closes reasoning."""
        return held(self._rest, self._marks.close) > 0

    def push(self, piece: str) -> Iterator[ReasoningDelta | str]:
        """Take more text; yield what is thought, and as plain texts what is said."""
        self._rest += piece
        while self._rest:
            state, length = self._state, len(self._rest)
            if state == "said":
                yield from self._in_said()
            elif state == "inside":
                yield from self._in_reasoning()
            else:
                self._at_mark()
            if (self._state, len(self._rest)) == (state, length):
                return

    def finish(self) -> Iterator[ReasoningDelta | str]:
        """Yield what was held back, now that no more comes."""
        rest, self._rest = self._rest, ""
        if self._state == "inside":
            yield from self._thought(_without_beginning_of(rest, self._marks.close).rstrip())
        elif rest and (self._state in ("start", "said") or rest.strip()):
            yield rest

    def _in_said(self) -> Iterator[str]:
        marks = [self._marks.again] if self._marks.may_come_again else []
        marks += [self._marks.close] if self.ended_by_call else []
        length, mark = before_mark(self._rest, marks)
        said = self._rest[:length]
        self._rest = self._rest[length + len(mark) :]
        if said:
            yield said
        if mark == self._marks.again and mark:
            self._state = "inside"
        elif mark:
            self._state, self.ended_by_call = "after", False

    def _ending(self) -> tuple[int, str]:
        """Return where reasoning ends in what is there, and by which mark; an empty one: it goes on."""
        close, call = self._rest.find(self._marks.close), -1
        if self._call:
            call = self._rest.find(self._call)
            while call >= 0 and not self._may_call(self._rest[:call]):
                call = self._rest.find(self._call, call + 1)
        if call >= 0 and not 0 <= close < call:
            return call, self._call
        return close, self._marks.close if close >= 0 else ""

    def _may_call(self, before: str) -> bool:
        line = before.rstrip(" \t")
        return self._is_token or line.endswith("\n") or not (line or self._has_begun)

    def _in_reasoning(self) -> Iterator[ReasoningDelta]:
        place, mark = self._ending()
        if not mark:
            kept = max(held(self._rest, self._marks.close), held(self._rest, self._call))
            place = len(self._rest) - kept
        thought, is_call = self._rest[:place].rstrip(), bool(mark) and mark == self._call
        self._rest = self._rest[place + len(mark) * (not is_call) if mark else len(thought) :]
        yield from self._thought(thought)
        if mark:
            self._state, self.ended_by_call = "said" if is_call else "after", is_call
            self._apart, self._has_begun = "\n\n" if self._has_begun else self._apart, False

    def _thought(self, text: str) -> Iterator[ReasoningDelta]:
        if not self._has_begun:
            text = self._apart + text.lstrip() if text.strip() else ""
        if text:
            self._has_begun = True
            yield ReasoningDelta(text)

    def _at_mark(self) -> None:
        """Go on behind a mark that opens what follows, or leave a part of one until more comes."""
        marks, text = self._marks, self._rest.lstrip()
        if self._state == "start":
            opening, lead = marks.open, marks.first
        else:
            opening, lead = marks.again, marks.lead
        if lead and text.startswith(lead):
            self._rest, self._state = text[len(lead) :], "said"
        elif lead.startswith(text):
            return
        elif text.startswith(opening):
            self._rest, self._state = text[len(opening) :], "inside"
        elif not opening.startswith(text):
            self._rest = self._rest if self._state == "start" else text
            self._state = "said"


def _without_beginning_of(text: str, mark: str) -> str:
    """Return a text without what may become the mark at its end."""
    return text[: len(text) - held(text, mark)]


def parted(text: str, marks: ReasoningMarks, *, is_inside: bool = False) -> Parted:
    """Return a whole reply as what was thought and what was said."""
    return _parted(text, ReasoningSplitter(marks, is_inside=is_inside))


def _parted(text: str, splitter: ReasoningSplitter) -> Parted:
    parts = [*splitter.push(text), *splitter.finish()]
    thought = "".join(one.text for one in parts if isinstance(one, ReasoningDelta))
    return Parted(thought.strip(), "".join(one for one in parts if isinstance(one, str)))


Event = ReasoningDelta | SaidEvent
"""What is read of a reply: reasoning, text, and calls of tools."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How reasoning stands where a reply begins, and what it goes on with."""

    marks: ReasoningMarks | None = None
    """None: the model's template knows none."""
    is_inside: bool = False
    """Whether the prompt has opened it."""
    is_closed: bool = False
    """Whether the prompt has closed it, so that the answer begins at once."""

    calls: ToolFormat | None = None
    """How calls are written that end reasoning, too; None: only its own mark does."""
    has_token: bool = False
    """Whether the mark of such calls is a control token."""
    ids: Sequence[int] = ()
    """Of the reply that it is the rest of; none where a new one begins."""
    text: str = ""
    """What was told of those, which lacks a character in which it was cut."""

    @classmethod
    def of(cls, marks: ReasoningMarks | None, prompt: str) -> Self:
        """Return how reasoning stands where the reply to a prompt begins."""
        if marks is None:
            return cls()
        return cls(marks, marks.are_opened_by(prompt), marks.are_closed_by(prompt))

    def with_calls(self, format_: ToolFormat, tokenizer: Tokenizer) -> Self:
        """Return the same where tools may be called; a call ends reasoning if its mark is one token."""
        mark = format_.mark
        if not mark or len(tokenizer.encode(mark)) != 1 or format_.kind == "channels":
            return self
        return replace(self, calls=format_, has_token=mark in tokenizer.control_tokens.ids)

    def detokenizer(self, tokenizer: Tokenizer, rules: CallRules | None) -> Detokenizer:
        """Return what turns the reply's ids into text, marks of reasoning and of calls included."""
        detokenizer = Detokenizer(ShowingTokenizer(tokenizer, self.marks, rules))
        detokenizer.follow(self.ids, self.text)
        return detokenizer

    def splitter(self) -> ReasoningSplitter | None:
        """Return what takes the reply apart; None where all of it is said."""
        if self.marks is None:
            return None
        call = "" if self.calls is None else self.calls.mark
        return ReasoningSplitter(
            self.marks, is_inside=self.is_inside, call=call, is_token=self.has_token
        )

    def parted(self, text: str) -> Parted:
        """Return the whole reply as what was thought and what was said."""
        splitter = self.splitter()
        return Parted("", text) if splitter is None else _parted(text, splitter)


NO_REASONING: Final = Begun()


class ReplyReader:
    """
    Turns pieces of a reply into events: reasoning, text, and calls of tools in what is said.

    Owned by whoever reads the reply.
    """

    def __init__(self, begun: Begun, rules: CallRules | None) -> None:
        """
        Have read nothing.

        Args:
            begun: How reasoning stands.
            rules: What its calls of tools look like; None: it is text, and calls nothing.
        """
        self._begun = begun
        self._rules = rules
        self._call_prefix = "" if rules is None else new_call_prefix()
        """What the ids of its calls begin with."""
        self._calls = None if rules is None else ToolCallParser(self._call_prefix, rules)
        self._splitter, self._counter = begun.splitter(), begun.splitter()
        self._undecided = 0
        self.reasoning_tokens = 0
        """Tokens of reasoning and of its marks, of those that were counted."""

    def push(self, piece: str) -> Iterator[Event]:
        """Take more text; yield what it tells."""
        parts = (piece,) if self._splitter is None else self._splitter.push(piece)
        yield from self._events(parts)

    def finish(self, *, is_cut: bool) -> Iterator[Event]:
        """Yield what was held back; *is_cut*: whether the reply would have gone on."""
        if self._splitter is not None:
            yield from self._events(self._splitter.finish())
        if self._calls is not None:
            yield from self._calls.finish(is_cut=is_cut)

    def whole(self, text: str, *, is_cut: bool) -> tuple[Parted, ParsedReply]:
        """Return the whole reply, taken apart: its reasoning and the rest, and the calls in that."""
        parts = self._begun.parted(text)
        if self._rules is None:
            return parts, ParsedReply(parts.said, ())
        return parts, parse_reply(parts.said, self._call_prefix, self._rules, is_cut=is_cut)

    def count(self, piece: str) -> None:
        """Count a token that completes a piece of text, unless what is said has begun."""
        counter = self._counter
        if counter is None or counter.is_over:
            return
        was = counter.state
        has_said = any(isinstance(part, str) for part in counter.push(piece))
        if has_said and (was != "inside" or counter.ended_by_call):
            self._undecided = 0
            return
        self._undecided += 1
        if {was, counter.state} & {"inside", "after"}:
            self.reasoning_tokens += self._undecided
            self._undecided = 0

    def _events(self, parts: Iterable[ReasoningDelta | str]) -> Iterator[Event]:
        for part in parts:
            if isinstance(part, ReasoningDelta):
                yield part
            elif self._calls is not None:
                yield from self._calls.push(part)
            elif part:
                yield TextDelta(part)


class ReasoningWatch:
    """
    Follows the tokens of one reply, and says where its answer begins and what ends its reasoning.

    Derived from the reply's tokens, which are given anew with each question, as for a grammar. Used
    from one thread at a time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        begun: Begun,
        *,
        budget: int | None = None,
        leads: bool = False,
        is_within: bool = False,
    ) -> None:
        """
        Have seen nothing.

        Args:
            tokenizer: Of the model.
            begun: How reasoning stands where the reply begins; it has marks.
            budget: Most tokens of reasoning; None: as many as the model wants.
            leads: Whether what stands between reasoning and answer is not left to the model, because
                a grammar begins behind it.
            is_within: Whether a grammar is about the reasoning too, so that the answer begins with the
                reply, and what follows reasoning is the model's choice.
        """
        assert begun.marks is not None, "without marks there is nothing to follow"
        self._given = tokenizer, begun, budget, leads, is_within
        marks = begun.marks
        rules = None if begun.calls is None else CallRules(begun.calls)
        self._decoder = ShowingTokenizer(tokenizer, marks, rules)
        lead = marks.again.removesuffix(marks.open) if is_within else marks.lead or marks.space
        self._lead = tokenizer.encode(lead)
        self._end = [*tokenizer.encode(marks.close), *self._lead]
        opening = tokenizer.encode(marks.open)
        is_one = len(opening) == 1 and not begun.is_inside and not is_within
        self.opening: Final = opening[0] if is_one else None
        """The one token that opens reasoning at the beginning; None: it is open, or takes several."""
        self._forget()

    def copy(self) -> "ReasoningWatch":
        """Return another that has seen nothing."""
        tokenizer, begun, budget, leads, is_within = self._given
        return ReasoningWatch(tokenizer, begun, budget=budget, leads=leads, is_within=is_within)

    def forced(self, reply: Sequence[int]) -> int | None:
        """Return the token that has to come next; None: the model chooses."""
        self._follow(reply)
        place = len(reply) - self._forced_from
        return self._forced[place] if 0 <= place < len(self._forced) else None

    def answer_start(self, reply: Sequence[int]) -> int | None:
        """Return how many tokens come before the answer; None while it has not begun."""
        self._follow(reply)
        return self._answer_start

    def _forget(self) -> None:
        _, begun, _, _, is_within = self._given
        assert begun.marks is not None, "see above"
        splitter = begun.splitter()
        assert splitter is not None, "it has marks"
        self._splitter = splitter
        self._detokenizer = Detokenizer(self._decoder)
        self._seen: list[int] = []
        self._thought = 0
        self._forced: list[int] = []
        self._forced_from = 0
        waits = begun.is_inside or bool(begun.marks.first)
        self._answer_start: int | None = None if waits and not is_within else 0
        self._look()

    def _follow(self, reply: Sequence[int]) -> None:
        if list(reply[: len(self._seen)]) != self._seen:
            self._forget()
        for token in reply[len(self._seen) :]:
            if not self._seen and token == self.opening:
                self._answer_start = None
            self._seen.append(token)
            self._thought += self._splitter.state == "inside"
            for _ in self._splitter.push(self._detokenizer.push(token)):
                pass  # only where it stands counts
            self._look()

    def _look(self) -> None:
        """Decide what comes next, now that all that is there was seen."""
        state, here = self._splitter.state, len(self._seen)
        _, _, budget, leads, _ = self._given
        if here < self._forced_from + len(self._forced):
            return
        is_spent = budget is not None and self._thought >= budget
        if state == "inside" and is_spent and not self._splitter.may_close:
            self._forced, self._forced_from = self._end, here
        elif self._answer_start is not None or state not in ("after", "said"):
            return
        elif state == "after" and leads and self._lead and not self._forced:
            self._forced, self._forced_from = self._lead, here
        else:
            # The mark of a call that ends reasoning is the first token of the answer.
            self._answer_start = here - self._splitter.ended_by_call


class ShowingTokenizer:
    """Decodes replies with the control tokens that are marks of reasoning, which others leave out."""

    def __init__(
        self, tokenizer: Tokenizer, marks: ReasoningMarks | None, rules: CallRules | None
    ) -> None:
        """
        Have what is shown found out.

        Args:
            tokenizer: Of the model.
            marks: Of reasoning; None: it knows none.
            rules: What its calls of tools look like; None: it is not to call any.
        """
        written = "" if marks is None else marks.open + marks.close + marks.lead + marks.first
        self._tokenizer = tokenizer
        control = tokenizer.control_tokens
        calls = {} if rules is None else control_marks(rules.format, control)
        self._marks = {**_written_in(written, control), **calls}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids*, shape `(n,)`."""
        return decode_with_marks(ids, self._marks, self._tokenizer.decode)

    def added_text(self, token_id: int) -> str | None:
        """Return what an id adds to a text; see `Tokenizer.added_text`."""
        return self._marks.get(token_id) or self._tokenizer.added_text(token_id)


def _written_in(text: str, control: ControlTokens) -> dict[int, str]:
    return (
        {token_id: name for name, token_id in control.ids.items() if name in text} if text else {}
    )
