"""Calls are found in what a model writes, however it falls into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.text.tool_calls import (
    ArgumentsDelta,
    CallEnded,
    CallRules,
    CallStarted,
    Event,
    TextDelta,
    ToolCallParser,
    call_text,
    parse_reply,
)
from recollect.types import ToolCall

PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
BARE = '{"name": "f", "arguments": {"a": 1}}'
FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "\n", " ", "Hi", "<", "<tool", '{"name": "f", "arguments": ',
        "{", "}", '"', "\\", '{"a": "}<tool_call>"}', '{"arguments": {}, "name": "g"}', PARIS,
        '{"name": 5}', "é", "```json", "```", '{"name": "f", "arguments": {"a": "}"}}',
    ]
)  # fmt: skip


def events(text: str, cuts: list[int] | None = None, names: tuple[str, ...] = ()) -> list[Event]:
    parser = ToolCallParser("id_", CallRules(names=names))
    told: list[Event] = []
    places = sorted({min(cut, len(text)) for cut in cuts or []})
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        told += parser.push(text[start:end])
    return [*told, *parser.finish()]


def joined(told: list[Event]) -> list[object]:
    """Return the events with neighbouring deltas as one: what they say, without how it was cut."""
    plain: list[object] = []
    for event in told:
        last = plain[-1] if plain else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            plain[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            plain[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            plain.append(event)
    return plain


def test_a_call_begins_gets_its_arguments_and_ends() -> None:
    assert events(PARIS) == [
        CallStarted(0, "id_0", "weather"),
        ArgumentsDelta(0, '{"city": "Paris"}'),
        CallEnded(0),
    ]


def test_arguments_are_told_as_they_come() -> None:
    told = events(PARIS, list(range(len(PARIS))))
    assert sum(isinstance(event, ArgumentsDelta) for event in told) == len('{"city": "Paris"}')


def test_several_calls_and_the_text_around_them_are_told_apart() -> None:
    told = joined(events(f"Let me see.\n{PARIS}\n{PARIS}\nDone."))
    assert [type(event).__name__ for event in told] == [
        "TextDelta", "CallStarted", "ArgumentsDelta", "CallEnded",
        "CallStarted", "ArgumentsDelta", "CallEnded", "TextDelta",
    ]  # fmt: skip
    assert [event.text for event in told if isinstance(event, TextDelta)] == [
        "Let me see.",
        "\nDone.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hi there. ",
        "a < b <tool",
        "<tool_call>",
        "So <tool_call> is a mark.",
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 7}</tool_call>',
        "</tool_call> \n",
    ],
)
def test_what_is_no_call_is_text_and_all_of_it(text: str) -> None:
    assert "".join(event.text for event in events(text) if isinstance(event, TextDelta)) == text
    assert parse_reply(text).calls == ()
    assert parse_reply(text).content == text


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{ "name":"f" , "arguments":{"a":[{"b":"}"}]} }', '{"a":[{"b":"}"}]}'),
        ('{"name": "f", "arguments": {"a": "</tool_call>"}}', '{"a": "</tool_call>"}'),
    ],
)
def test_unusual_calls_are_calls(written: str, arguments: str) -> None:
    call = ToolCall("0", "f", arguments)
    assert parse_reply(f"<tool_call>{written}</tool_call>").calls == (call,)


def test_a_call_that_is_cut_does_not_end_and_is_none_of_the_replys() -> None:
    cut = PARIS[: PARIS.index("Paris")]
    assert not any(isinstance(event, CallEnded) for event in events(cut))
    assert parse_reply(f"Well. {cut}").calls == ()
    assert parse_reply(f"Well. {cut}").content == "Well."


def test_wherever_a_reply_is_cut_its_call_is_no_text() -> None:
    """And the whole says what the events say, part of a call included."""
    for length in range(len(PARIS)):
        cut = f"Well. {PARIS[:length]}"
        parser = ToolCallParser("id_")
        told = [*parser.push(cut), *parser.finish(is_cut=True)]
        text = "".join(event.text for event in told if isinstance(event, TextDelta))
        begun = min(length, len("<tool"))
        assert text in ("Well.", "Well. ", f"Well. {PARIS[:begun]}")
        assert "<tool" not in text
        parsed = parse_reply(cut, "id_", is_cut=True)
        assert parsed.content == text
        arguments = "".join(event.text for event in told if isinstance(event, ArgumentsDelta))
        started = [event for event in told if isinstance(event, CallStarted)]
        assert parsed.calls == tuple(ToolCall(one.id, one.name, arguments) for one in started)
        is_inside = len("<tool") <= length < PARIS.index("}\n</tool_call>")
        assert parsed.ended == ("call" if is_inside else None)
        assert parse_reply(cut, "id_").ended is None, "it has ended by itself"


def test_the_same_for_a_call_without_marks() -> None:
    for length in range(len(BARE)):
        rules = CallRules(names=("f",))
        parser = ToolCallParser("id_", rules)
        told = [*parser.push(BARE[:length]), *parser.finish(is_cut=True)]
        text = "".join(event.text for event in told if isinstance(event, TextDelta))
        assert '"name"' not in text
        parsed = parse_reply(BARE[:length], "id_", rules, is_cut=True)
        assert parsed.content == text
        assert len(parsed.calls) == sum(isinstance(event, CallStarted) for event in told)
        is_inside = length < len(BARE) - 1 and text != BARE[:length].rstrip()
        assert parsed.ended == ("call" if is_inside else None)


@given(st.lists(FRAGMENTS, max_size=8).map("".join))
def test_a_cut_reply_is_told_alike_in_pieces_and_as_a_whole(text: str) -> None:
    parser = ToolCallParser("id_")
    told = [*parser.push(text), *parser.finish(is_cut=True)]
    parsed = parse_reply(text, "id_", is_cut=True)
    assert parsed.content == "".join(one.text for one in told if isinstance(one, TextDelta))
    given_arguments = [
        "".join(
            one.text
            for one in told
            if isinstance(one, ArgumentsDelta) and one.index == started.index
        )
        for started in told
        if isinstance(started, CallStarted)
    ]
    assert [call.arguments for call in parsed.calls] == given_arguments


def test_only_the_closing_mark_may_be_missing() -> None:
    assert len(parse_reply(PARIS.removesuffix("</tool_call>")).calls) == 1


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (BARE, 1),
        (f"\n```json\n{BARE}\n```\n", 1),
        (f"```json\n{BARE}\n{BARE}\n```", 2),
        (f"```json\n{BARE}\n```\n```json\n{BARE}\n```", 2),
        ('{\n  "name": "f",\n  "arguments": {\n    "a": 1\n  }\n}', 1),
        (f"{{{BARE}}}", 1),
    ],
)
def test_a_reply_that_is_nothing_but_a_call_needs_no_marks(text: str, calls: int) -> None:
    for cuts in ([], list(range(len(text)))):
        told = events(text, cuts, names=("e", "f"))
        assert sum(isinstance(event, CallEnded) for event in told) == calls
        assert not any(isinstance(event, TextDelta) for event in told)
    assert [
        json.loads(call.arguments) for call in parse_reply(text, rules=CallRules(names=None)).calls
    ] == [{"a": 1}] * calls


@pytest.mark.parametrize(
    "text",
    [
        f"So: {BARE}",
        BARE.replace('"f"', '"other"'),
        '{"name": "f"}',
        "```python\nprint()\n```",
        "  {",
        "",
    ],
)
def test_what_is_no_call_of_a_tool_that_is_offered_is_text(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        told = events(text, cuts, names=("f",))
        assert "".join(event.text for event in told if isinstance(event, TextDelta)) == text
        assert not any(isinstance(event, CallStarted) for event in told)


def test_marks_are_found_where_calls_without_them_might_have_been() -> None:
    assert sum(isinstance(event, CallEnded) for event in events(PARIS, names=("weather",))) == 1


@given(parts=st.lists(FRAGMENTS, max_size=12), cuts=st.lists(st.integers(0, 80), max_size=8),
       names=st.sampled_from([(), ("f", "g")]))  # fmt: skip
def test_the_pieces_do_not_matter(
    parts: list[str], cuts: list[int], names: tuple[str, ...]
) -> None:
    text = "".join(parts)
    told = events(text, cuts, names)
    assert joined(told) == joined(events(text, names=names))
    if not any(isinstance(event, CallStarted) for event in told):
        assert "".join(event.text for event in told if isinstance(event, TextDelta)) == text


@given(
    name=st.text(min_size=1, max_size=8),
    arguments=st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers(), max_size=3),
    before=st.sampled_from(["", "Hm.", "Hm.\n"]),
)
def test_what_is_written_as_a_call_is_read_as_that_call(
    name: str, arguments: dict[str, object], before: str
) -> None:
    reply = parse_reply(before + call_text(name, json.dumps(arguments)), ["one"])
    assert reply.calls == (ToolCall("one", name, json.dumps(arguments)),)
    assert reply.content == before.strip()
