"""
Find what a model thinks before it answers in what it writes, by the marks of its chat template.

`find_marks` tries out where a template shows what an assistant thought, and how: the text around it is
the marks, whatever they look like, `<think>`, `[THINK]` or the channels of harmony. `ReasoningSplitter`
takes a reply apart as it comes; what it calls said is where calls of tools are looked for.
Pure: renders by a function that it is given, and knows no tokens.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from recollect.text.call_parts import held
from recollect.text.tokenizer import ControlTokens, Detokenizer, Tokenizer, decode_with_marks
from recollect.text.tool_calls import (
    CallRules,
    ParsedReply,
    TextDelta,
    ToolCallParser,
    new_call_prefix,
    parse_reply,
)
from recollect.text.tool_calls import Event as SaidEvent
from recollect.text.tool_formats import control_marks
from recollect.types import common_prefix_length

Way = Literal["reasoning_content", "reasoning", "thinking", "parts", "text", "nowhere"]
"""Where a template looks for what was thought: in a field of the message by that name, in a part of its
content, in its text between the marks; or it shows none."""

Try = Callable[[Sequence[Mapping[str, Any]], bool, Mapping[str, Any]], str | None]
"""Renders messages, with the opening of a reply or without, and with options; None: they are refused."""

_WORD: Final = r"(?:\w+:)?(?:think|thinking|thought|reasoning)(?::\w+)?"
_OPEN: Final = re.compile(
    rf"<\|?{_WORD}\|?>|<\|START_THINKING\|>|\[THINK\]|<\|channel>thought", re.IGNORECASE
)
_OPEN_AT_END: Final = re.compile(rf"(?:{_OPEN.pattern})\s*\Z", re.IGNORECASE)
_CLOSE: Final = re.compile(rf"</({_WORD})>")
_TAG: Final = re.compile(r"<[^<>\s]+>|\[[^\[\]\n]+\]")
"""Marks by their looks. Source: the chat templates that llama.cpp keeps."""
_HINT: Final = re.compile("think|thought|reason", re.IGNORECASE)
_ON: Final = {"enable_thinking": True, "thinking": True}
_OFF: Final = {"enable_thinking": False, "thinking": False}
_ASKED, _THOUGHT, _SAID = "recollect0asked", "recollect0thought", "recollect0said"
_QUOTES: Final = ("'", '"')


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """Between which marks a model writes what it thinks, and how its template is told of it."""

    open: str
    close: str
    lead: str = ""
    """What stands between the end of the reasoning and what is said, such as the name of a channel."""
    first: str = ""
    """What leads to what is said where nothing was thought; known of templates with a `lead`."""
    space: str = "\n\n"
    """The space that the template has around `lead`."""
    way: Way = "text"

    @property
    def again(self) -> str:
        """Return what opens further reasoning after some that was closed."""
        is_known = bool(self.first) and self.lead.endswith(self.first)
        return (self.lead.removesuffix(self.first) if is_known else "") + self.open

    def are_opened_by(self, prompt: str) -> bool:
        """Return whether a prompt ends with the opened mark, so that the reply begins inside."""
        return prompt.rstrip().endswith(self.open)

    def are_closed_by(self, prompt: str) -> bool:
        """Return whether a prompt ends with the closed mark, so that the reply thinks nothing."""
        return prompt.rstrip().endswith(self.close)

    def begun(self, prompt: str) -> "Begun":
        """Return how reasoning stands where the reply to a prompt begins."""
        return Begun(self, self.are_opened_by(prompt), self.are_closed_by(prompt))

    def told(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message in which what was thought stands where the template looks for it."""
        plain = dict(message)
        thought = plain.pop("reasoning_content", None)
        if not thought or self.way == "nowhere":
            return plain
        said = plain.get("content") or ""
        if self.way == "text":
            return plain | {"content": f"{self.open}\n{thought}\n{self.close}\n\n{said}"}
        if self.way == "parts":
            parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": said}]
            return plain | {"content": parts if said else parts[:1]}
        return plain | {self.way: thought}


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
    said are text.

    Invariants:
        1. What is given out does not depend on how the text falls into pieces, but for how it is cut.
        2. Without a mark, what is said is the text as it came.
        3. What is said ends as the text ends.
    """

    def __init__(self, marks: ReasoningMarks, *, is_inside: bool = False) -> None:
        self._marks = marks
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
    def may_close(self) -> bool:
        """Return whether the text ends with what may become the mark that closes reasoning."""
        return held(self._rest, self._marks.close) > 0

    def push(self, piece: str) -> Iterator[ReasoningDelta | str]:
        """Take more text; yield what is thought, and as plain texts what is said."""
        self._rest += piece
        while self._rest:
            state, length = self._state, len(self._rest)
            if state == "said":
                said, self._rest = self._rest, ""
                yield said
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
        elif self._state == "start" or rest.strip():
            yield rest

    def _in_reasoning(self) -> Iterator[ReasoningDelta]:
        thought, mark, after = self._rest.partition(self._marks.close)
        if not mark:
            thought = _without_beginning_of(self._rest, self._marks.close)
        thought = thought.rstrip()
        self._rest = after if mark else self._rest[len(thought) :]
        yield from self._thought(thought)
        if mark:
            self._state = "after"
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
    splitter = ReasoningSplitter(marks, is_inside=is_inside)
    parts = [*splitter.push(text), *splitter.finish()]
    thought = "".join(one.text for one in parts if isinstance(one, ReasoningDelta))
    return Parted(thought.strip(), "".join(one for one in parts if isinstance(one, str)))


Event = ReasoningDelta | SaidEvent
"""What is read of a reply: reasoning, text, and calls of tools."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How reasoning stands where a reply begins."""

    marks: ReasoningMarks | None = None
    """None: the model's template knows none."""
    is_inside: bool = False
    """Whether the prompt has opened it."""
    is_closed: bool = False
    """Whether the prompt has closed it, so that the answer begins at once."""

    def splitter(self) -> ReasoningSplitter | None:
        """Return what takes the reply apart; None where all of it is said."""
        if self.marks is None:
            return None
        return ReasoningSplitter(self.marks, is_inside=self.is_inside)

    def parted(self, text: str) -> Parted:
        """Return the whole reply as what was thought and what was said."""
        if self.marks is None:
            return Parted("", text)
        return parted(text, self.marks, is_inside=self.is_inside)


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
        if counter is None or counter.state == "said":
            return
        was = counter.state
        has_said = any(isinstance(part, str) for part in counter.push(piece))
        if has_said and was != "inside":
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
        self, tokenizer: Tokenizer, begun: Begun, *, budget: int | None = None, leads: bool = False
    ) -> None:
        """
        Have seen nothing.

        Args:
            tokenizer: Of the model.
            begun: How reasoning stands where the reply begins; it has marks.
            budget: Most tokens of reasoning; None: as many as the model wants.
            leads: Whether what stands between reasoning and answer is not left to the model, because
                a grammar begins behind it.
        """
        assert begun.marks is not None, "without marks there is nothing to follow"
        self._given = tokenizer, begun, budget, leads
        marks = begun.marks
        self._decoder = ShowingTokenizer(tokenizer, marks, None)
        self._lead = tokenizer.encode(marks.lead or marks.space)
        self._end = [*tokenizer.encode(marks.close), *self._lead]
        opening = tokenizer.encode(marks.open)
        self.opening: Final = opening[0] if len(opening) == 1 and not begun.is_inside else None
        """The one token that opens reasoning at the beginning; None: it is open, or takes several."""
        self._forget()

    def copy(self) -> "ReasoningWatch":
        """Return another that has seen nothing."""
        tokenizer, begun, budget, leads = self._given
        return ReasoningWatch(tokenizer, begun, budget=budget, leads=leads)

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
        _, begun, _, _ = self._given
        assert begun.marks is not None, "see above"
        self._splitter = ReasoningSplitter(begun.marks, is_inside=begun.is_inside)
        self._detokenizer = Detokenizer(self._decoder)
        self._seen: list[int] = []
        self._thought = 0
        self._forced: list[int] = []
        self._forced_from = 0
        waits = begun.is_inside or bool(begun.marks.first)
        self._answer_start: int | None = None if waits else 0
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
        _, _, budget, leads = self._given
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
            self._answer_start = here


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


def find_marks(source: str, render: Try) -> ReasoningMarks | None:
    """
    Return the marks of a template; None where it knows none.

    Args:
        source: Of the template.
        render: Of the template, without anything added.
    """
    if not _HINT.search(source):
        return None
    ways: tuple[Way, ...] = ("reasoning_content", "reasoning", "thinking", "parts")
    for way in ways:
        for options in ({}, _ON):
            for replied in _replies(way):
                shown = render([_said("user", _ASKED), *replied], False, options)
                if shown is None or shown.count(_THOUGHT) != 1:
                    continue
                found = _around(shown, way, options, render, is_plain=len(replied) == 1)
                if found is not None:
                    return found
    return _in_source(source, render)


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _replies(way: Way) -> Iterator[list[dict[str, Any]]]:
    """Yield what may follow a question: a reply that thinks, says, and perhaps calls a tool."""
    plain = ReasoningMarks("", "", way=way).told(
        _said("assistant", _SAID) | {"reasoning_content": _THOUGHT}
    )
    yield [plain]
    for arguments in ({"a": 1}, '{"a": 1}'):
        function = {"name": "get", "arguments": arguments}
        call = {"id": "123456789", "type": "function", "function": function}
        result = _said("tool", "2") | {"tool_call_id": "123456789", "name": "get"}
        yield [plain | {"tool_calls": [call]}, result]


def _around(
    shown: str, way: Way, options: Mapping[str, Any], render: Try, *, is_plain: bool
) -> ReasoningMarks | None:
    """
    Return the marks around a thought that is shown; None where these are none.

    Args:
        shown: A question, and a reply that thinks.
        way: How the template was told what was thought.
        options: It was told besides.
        render: Of the template.
        is_plain: Whether nothing but the text of the reply follows the thought.
    """
    before, _, after = shown.rpartition(_ASKED)[2].partition(_THOUGHT)
    between, has_said, _ = after.partition(_SAID)
    if before.endswith(_QUOTES) or between.startswith(_QUOTES):
        return None  # the message is shown as JSON
    asked = [_said("user", _ASKED)]
    prompts = [(render(asked, True, how) or "").rpartition(_ASKED)[2] for how in (options, _OFF)]
    opening = _opening(before, prompts)
    closing = _TAG.match(between.lstrip())
    close = closing.group() if closing else between.strip()
    if not opening or not close:
        return None
    if not (is_plain and has_said):
        return ReasoningMarks(opening, close, way=way)
    follows = between.lstrip()[len(close) :]
    if not (lead := follows.strip()):
        return ReasoningMarks(opening, close, space=follows, way=way)
    plain = render([*asked, _said("assistant", _SAID)], False, options) or ""
    plain = plain.rpartition(_ASKED)[2].partition(_SAID)[0]
    first = plain.removeprefix(prompts[0]).strip() if plain.startswith(prompts[0]) else ""
    return ReasoningMarks(opening, close, lead, first, "", way)


def _opening(before: str, prompts: Sequence[str]) -> str:
    """Return the mark at the end of what is before a thought; prompts lead to replies, with it or without."""
    if tag := _OPEN_AT_END.search(before):
        return tag.group().strip()
    if prompts[0].startswith(before) and (more := prompts[0][len(before) :].strip()):
        return more  # the prompt alone opens it, in words
    for prompt in prompts:
        if opening := before[common_prefix_length(prompt, before) :].strip():
            return opening
    return ""


def _in_source(source: str, render: Try) -> ReasoningMarks | None:
    """Return marks that a template names, and that it shows nothing between, or what a text has there."""
    closes = {f"<{word}>": f"</{word}>" for word in _CLOSE.findall(source)}
    closes |= {"[THINK]": "[/THINK]", "<|channel>thought": "<channel|>"}
    closes["<|START_THINKING|>"] = "<|END_THINKING|>"
    for opening, close in closes.items():
        if close not in source:
            continue
        if "reasoning_content" in source:  # it decides where it shows that
            return ReasoningMarks(opening, close, way="reasoning_content")
        marks = ReasoningMarks(opening, close)
        said = marks.told(_said("assistant", _SAID) | {"reasoning_content": _THOUGHT})
        shown = render([_said("user", _ASKED), said], False, {})
        is_shown = shown is not None and _THOUGHT in shown
        return ReasoningMarks(opening, close, way="text" if is_shown else "nowhere")
    return None


_NOTHING: Final = re.compile(
    rf"\s*(?:(?:<\|?{_WORD}\|?>|\[THINK\]|<\|channel>thought)\s*"
    rf"(?:(?:<\|?/{_WORD}\|?>|\[/THINK\]|<channel\|>)\s*)?)?"
)
"""Space, a mark that opens thinking, or one that is closed around nothing: it says nothing. Source: the
chat templates that llama.cpp keeps."""


def says_nothing(text: str, start: int) -> bool:
    """Return whether a text from *start* on is space, or marks around no thought."""
    return _NOTHING.fullmatch(text, start) is not None


def says_the_same(first: str, second: str) -> bool:
    """Return whether two leads to what is said differ only in space, or in marks around no thought."""
    one, other = "".join(first.split()), "".join(second.split())
    if one == other:
        return True
    same = common_prefix_length(one, other)
    return says_nothing(one, same) and says_nothing(other, same)
