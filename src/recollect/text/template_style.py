"""
What chat templates take: where instructions may stand, and how calls of tools and their results come.

Templates do not say whether they take arguments as objects or as text, which ids they refuse, and
whether a message may have several calls. So a short conversation with a call is rendered in one style
after another until all of it is shown. Pure but for the rendering, which is the caller's.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from recollect.types import Message

Show = Callable[[Sequence[Message]], str | None]
"""Returns what a template shows of messages; None: it refuses them."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template takes the calls of tools that replies make, and their results."""

    takes_calls: bool = False
    """Whether it takes calls beside the text; else they are in it, as the model writes them."""
    has_results: bool = False
    """Whether it shows messages of tools; else their results are what the user says."""
    as_texts: bool = False
    """Whether it takes arguments as JSON text; else as objects."""
    empty: str | None = None
    """The content of a message with calls alone."""
    has_short_ids: bool = False
    """Whether ids have to have nine letters and digits, as those of Mistral."""
    takes_several: bool = True
    """Whether a message may have several calls."""

    def applied(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages, whose calls have objects as arguments, as the template takes them."""
        if not self.takes_calls:
            return list(messages)
        shown: list[Any] = []
        for message in messages:
            one: Any = message
            if self.has_short_ids and "tool_call_id" in one:
                one = {**one, "tool_call_id": _short_id(one["tool_call_id"])}
            calls = one.get("tool_calls")
            if not calls:
                shown.append(one)
                continue
            styled = [self._call(call) for call in calls]
            one = {**one, "content": one["content"] or self.empty, "tool_calls": styled}
            if self.takes_several or len(styled) == 1:
                shown.append(one)
            else:
                shown += [{**one, "tool_calls": [call]} for call in styled]
        return shown if self.takes_several else _each_with_its_result(shown)

    def _call(self, call: Any) -> Any:
        function = call["function"]
        if self.as_texts:
            text = json.dumps(function["arguments"], ensure_ascii=False)
            function = {**function, "arguments": text}
        id_ = _short_id(call["id"]) if self.has_short_ids else call["id"]
        return {**call, "id": id_, "function": function}


def _short_id(id_: str) -> str:
    """Return an id of nine letters and digits: the same, or one made of it."""
    if len(id_) == 9 and id_.isascii() and id_.isalnum():
        return id_
    digest = hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=9).digest()
    return base64.b32encode(digest).decode().lower()[:9]


def _each_with_its_result(messages: Sequence[Any]) -> list[Any]:
    """Return messages with each result after its call, where several calls follow each other."""
    results = {one.get("tool_call_id"): one for one in messages if one["role"] == "tool"}
    shown, placed = list[Any](), set[int]()
    for message in messages:
        if id(message) in placed:
            continue
        shown.append(message)
        for call in message.get("tool_calls") or ():
            result = results.get(call["id"])
            if result is not None and id(result) not in placed:
                placed.add(id(result))
                shown.append(result)
    return shown


_CALLED: Final = ("recollect0tool", "recollect0key", "recollect0value")
_RESULT: Final = ("recollect0result",)
_CALLING: Final[Any] = (
    {"role": "user", "content": "recollect0question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "recollect0call",
                "type": "function",
                "function": {"name": _CALLED[0], "arguments": {_CALLED[1]: _CALLED[2]}},
            }
        ],
    },
    {
        "role": "tool",
        "tool_call_id": "recollect0call",
        "name": _CALLED[0],
        "content": _RESULT[0],
    },
)
"""A trial conversation with a call and its result."""
_STYLES: Final = tuple(
    CallStyle(takes_calls=True, has_results=True, as_texts=texts, empty=empty, has_short_ids=short)
    for texts in (False, True)
    for short in (False, True)
    for empty in (None, "")
)
TRIED_TOOLS: Final[Any] = (
    {
        "type": "function",
        "function": {
            "name": _CALLED[0],
            "description": "recollect0description",
            "parameters": {
                "type": "object",
                "properties": {_CALLED[1]: {"type": "string", "description": "recollect0text"}},
                "required": [_CALLED[1]],
            },
        },
    },
)
"""The tool that is called there."""
_SECOND: Final = ("recollect0key2", "recollect0value2")


def tried_style(show: Show) -> CallStyle:
    """Return how a template takes calls and results."""
    bare = show(_CALLING[:1])
    for style in _STYLES:
        text = show(style.applied(_CALLING))
        if text is None or not all(one in text for one in (*_CALLED, *_RESULT)):
            continue
        if text.count("None") == (bare or "").count("None"):
            return replace(style, takes_several=_takes_two_calls(style, show))
    asked, _, result = _CALLING
    text = show([asked, {"role": "assistant", "content": "recollect0said"}, result])
    return CallStyle(has_results=text is not None and _RESULT[0] in text)


def _takes_two_calls(style: CallStyle, show: Show) -> bool:
    asked, calling, result = _CALLING
    first = calling["tool_calls"][0]
    function = {**first["function"], "arguments": dict([_SECOND])}
    second = {**first, "id": "recollect0call2", "function": function}
    answers = [result, {**result, "tool_call_id": second["id"]}]
    both: list[Any] = [asked, {**calling, "tool_calls": [first, second]}, *answers]
    text = show(style.applied(both))
    return text is not None and _SECOND[0] in text


def folded(
    messages: Sequence[Message], *, takes_one: bool, takes_two: bool, takes_later: bool
) -> list[Message]:
    """
    Return messages whose instructions stand where a template shows them, as other engines have it.

    Args:
        messages: From the first on.
        takes_one: Whether instructions may come first; else they begin the first message after them.
        takes_two: Whether several may come first; else they become one.
        takes_later: Whether some may come later; else they end the message before them.
    """
    shown: list[Message] = []
    pending: list[str] = []  # for the next message
    for message in messages:
        before = shown[-1] if shown else None
        text = message["content"] or ""
        if message["role"] != "system":
            if pending and message["role"] in ("user", "tool"):
                message = Message({**message, "content": _joined(*pending, text)})  # noqa: PLW2901 - as it is shown
                pending = []
            shown.append(message)
        elif all(one["role"] == "system" for one in shown):
            if not takes_one:
                pending.append(text)
            elif before is None or takes_two:
                shown.append(message)
            else:
                shown[-1] = {**before, "content": _joined(before["content"] or "", text)}
        elif takes_later:
            shown.append(message)
        elif before is not None and before["role"] in ("user", "tool"):
            shown[-1] = {**before, "content": _joined(before["content"] or "", text)}
        else:
            pending.append(text)
    if pending:
        shown.append({"role": "user", "content": _joined(*pending)})
    return shown


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
