"""
Between which marks a model thinks, found out from its chat template.

`find_marks` tries out where a template shows what an assistant thought, and how: the text around it is
the marks, whatever they look like, `<think>`, `[THINK]` or the channels of harmony. `reasoning` takes
replies apart by them. Pure: renders by a function that it is given, and knows no tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

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
    def may_come_again(self) -> bool:
        """Return whether reasoning may follow what was said: what opens it then is nothing else."""
        return self.again != self.open

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
