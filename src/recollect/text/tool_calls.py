"""
Replies with calls of tools taken apart as a whole, and tools written as text.

`call_parser` finds calls while they are written. Templates and tokens are others' business. Pure: text
in, replies out; messages in, messages out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from recollect.text.call_parser import ToolCallParser
from recollect.text.call_parts import (
    HERMES_CALLS,
    LOOKED_AT,
    ArgumentsDelta,
    CallEnded,
    CallRules,
    CallStarted,
    Event,
    TextDelta,
    new_call_prefix,
    object_of,
)
from recollect.text.tool_formats import HERMES, ToolFormat
from recollect.types import Ended, Message, ToolCall

__all__ = [
    "CALL_START",
    "ArgumentsDelta",
    "CallEnded",
    "CallRules",
    "CallStarted",
    "Event",
    "ParsedReply",
    "ShownCalls",
    "TextDelta",
    "ToolCallParser",
    "call_text",
    "is_whole",
    "new_call_prefix",
    "parse_reply",
    "shown_calls",
    "texts_in",
    "with_results_spelled",
    "with_tools_spelled",
]

CALL_START: Final = HERMES.mark


def call_text(name: str, arguments: str) -> str:
    """Return a call, its arguments JSON text, in the format that messages are kept in."""
    return HERMES.text_of([(name, arguments)])


def with_results_spelled(messages: Sequence[Message]) -> list[Message]:
    """Return messages for a template that knows no results: they are what the user says."""
    spelled: list[Message] = []
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            spelled.append(message)
            continue
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if place and messages[place - 1]["role"] == "tool":
            spelled[-1] = {"role": "user", "content": f"{spelled[-1]['content']}\n{result}"}
        else:
            spelled.append({"role": "user", "content": result})
    return spelled


def with_tools_spelled(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], format_: ToolFormat
) -> list[Message]:
    """Return messages for a template that knows no tools: the instructions describe them."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    preamble = format_.offering(lines)
    if messages and messages[0]["role"] == "system":
        instructions = f"{messages[0]['content']}\n\n{preamble}"
        return [{"role": "system", "content": instructions}, *messages[1:]]
    return [{"role": "system", "content": preamble}, *messages]


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply, taken apart."""

    content: str
    """What is said beside the calls."""
    calls: tuple[ToolCall, ...]
    """Those that are whole; where the reply was cut, the last may have only a part of its arguments."""
    ended: Ended | None = None
    """`call`: it was cut inside a call; of one without a whole name nothing is told beside this."""


def parse_reply(
    text: str,
    ids: str | Iterable[str] = "",
    rules: CallRules = HERMES_CALLS,
    *,
    is_cut: bool = False,
) -> ParsedReply:
    """
    Take a whole reply apart.

    Args:
        text: As the model wrote it.
        ids: Of its calls, or what `ToolCallParser` was told that they begin with.
        rules: As `ToolCallParser` was told.
        is_cut: As in `ToolCallParser.finish`.
    """
    rules = rules.with_names_in(text)
    mark = rules.format.mark
    if not (mark and mark in text) and not rules.names and not is_cut:
        return ParsedReply(text, ())
    parser = ToolCallParser(ids if isinstance(ids, str) else "", rules)
    known = () if isinstance(ids, str) else tuple(ids)
    content: list[str] = []
    started: list[CallStarted] = []
    arguments: list[list[str]] = []
    whole = 0
    for event in [*parser.push(text), *parser.finish(is_cut=is_cut)]:
        match event:
            case TextDelta(said):
                content.append(said)
            case CallStarted():
                started.append(event)
                arguments.append([])
            case ArgumentsDelta(index, more):
                arguments[index].append(more)
            case CallEnded():
                whole += 1
    calls = [
        ToolCall(
            known[call.index] if call.index < len(known) else call.id, call.name, "".join(given)
        )
        for call, given in zip(started, arguments, strict=True)
    ][: None if is_cut else whole]
    is_inside = is_cut and (whole < len(started) or parser.has_lost_an_opening)
    return ParsedReply("".join(content), tuple(calls), "call" if is_inside else None)


def is_whole(arguments: str) -> bool:
    """Return whether the arguments of a call are all there; none at all are, too."""
    return not arguments.strip() or object_of(arguments) is not None


@dataclass(frozen=True, slots=True)
class ShownCalls:
    """What a template shows of a reply with calls."""

    reply: ParsedReply
    end: int
    """Where it ends in the text."""


def shown_calls(
    text: str, start: int, calls: Sequence[ToolCall], format_: ToolFormat, *, most: int
) -> ShownCalls | None:
    """
    Return the calls that stand in a text from a place on, and where they end; None: they do not.

    Args:
        text: What a template shows.
        start: Where the reply begins in it.
        calls: Those that are looked for.
        format_: Of the calls in the text.
        most: How many characters they may take.
    """
    names = {call.name for call in calls}
    parser = ToolCallParser("", CallRules(format_, tuple(names), texts_in(calls)))
    said, found = list[str](), list[list[str]]()
    started, ended = list[str](), 0
    for place in range(start, min(len(text), start + most), LOOKED_AT):
        for event in parser.push(text[place : place + LOOKED_AT]):
            match event:
                case TextDelta(more):
                    if ended == len(calls):
                        break
                    said.append(more)
                case CallStarted(_, _, name):
                    started.append(name)
                    found.append([])
                case ArgumentsDelta(index, more):
                    found[index].append(more)
                case CallEnded():
                    ended += 1
        if ended >= len(calls) and parser.is_in_text:
            break
    if ended < len(calls):
        return None
    both = zip(calls, started, found, strict=False)
    as_found = tuple(ToolCall(call.id, name, "".join(given)) for call, name, given in both)
    return ShownCalls(ParsedReply("".join(said), as_found), start + parser.end_of_calls)


def texts_in(calls: Sequence[ToolCall]) -> Mapping[str, frozenset[str]]:
    """Return which arguments of calls are texts, as `CallRules.texts` has it."""
    texts: dict[str, set[str]] = {}
    for call in calls:
        given = object_of(call.arguments) or {}
        here = texts.setdefault(call.name, set())
        here |= {key for key, value in given.items() if isinstance(value, str)}
    return {name: frozenset(keys) for name, keys in texts.items()}
