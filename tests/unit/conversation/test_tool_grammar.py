# ruff: noqa: RUF001 - marks of calls have letters that look like others
"""For each family: what the grammar lets a model write is found again as the same call."""

import json
import string
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recollect.conversation.tools import Tools
from recollect.engine.grammar import Grammars
from recollect.text.tokenizer import ByteTokenizer, Tokenizer
from recollect.text.tool_calls import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    TextDelta,
    ToolCallParser,
    parse_reply,
)
from recollect.text.tool_formats import FORMATS, HARMONY, ToolFormat, control_marks, named
from recollect.types import ToolCall

pytest.importorskip("tokenizers")
pytest.importorskip("llguidance")

ALL: Final = pytest.mark.parametrize("name", FORMATS)
CONTROL: Final = [
    "<|end_of_text|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|tool_call_start|>", "<|tool_call_end|>", "<|python_tag|>", "<|python_start|>",
    "<|python_end|>", "<|tool_call|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|channel|>",
    "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "｜DSML｜",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_call>", "<tool_call|>", '<|"|>',
]  # fmt: skip
SCHEMA: Final = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Final[list[dict[str, Any]]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
PARIS: Final = {"city": "Paris", "days": 2, "exact": True, "tags": ["a", "b"]}
LETTERS: Final = string.printable.replace("\x0b", "").replace("\x0c", "") + "éß漢🎉"
TEXTS: Final = st.text(LETTERS, max_size=12)
ARGUMENTS: Final = st.fixed_dictionaries(
    {"city": TEXTS},
    optional={
        "days": st.integers(-(10**9), 10**9),
        "unit": st.sampled_from(["celsius", "fahrenheit"]),
        "exact": st.booleans(),
        "tags": st.lists(TEXTS, max_size=3),
        "where": st.fixed_dictionaries({}, optional={"lat": st.integers(-90, 90)}),
    },
)


@pytest.fixture(scope="module")
def with_marks(make_byte_tokenizer: Callable[[Sequence[str]], Tokenizer]) -> Tokenizer:
    """Return a tokenizer of bytes in which the marks of all families are control tokens."""
    return make_byte_tokenizer(CONTROL)


@pytest.fixture(scope="module", params=["control tokens", "text"])
def tokenizer(request: pytest.FixtureRequest, with_marks: Tokenizer) -> Tokenizer:
    """Return a tokenizer; marks are of two kinds."""
    return with_marks if request.param == "control tokens" else ByteTokenizer()


@pytest.fixture(scope="module")
def fits(tokenizer: Tokenizer) -> Callable[[Tools, ToolFormat, str], bool]:
    """Return what tells whether a grammar lets a reply be written, and end."""
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size)

    def fit(tools: Tools, form: ToolFormat, text: str) -> bool:
        grammar = tools.grammar(None, form, tokenizer.control_tokens)
        assert grammar is not None
        state, ids = grammars.start(grammar), tokenizer.encode(text)
        for length, token in enumerate(ids):
            if not state.allowed(ids[:length])[token]:
                return False
        return bool(state.allowed(ids)[min(tokenizer.eos_token_ids)])

    return fit


def written(form: ToolFormat, *given: Mapping[str, Any], name: str = "weather") -> str:
    return form.text_of([(name, json.dumps(one, ensure_ascii=False)) for one in given])


def read(form: ToolFormat, text: str, *, is_cut: bool = False) -> tuple[str, list[Any]]:
    """Return what is said and what is called in a reply."""
    reply = parse_reply(text, "", Tools.of(TOOLS).rules(None, form), is_cut=is_cut)
    return reply.content, [(call.name, call.arguments) for call in reply.calls]


def called(form: ToolFormat, text: str) -> list[Any]:
    return [json.loads(arguments) for _, arguments in read(form, text)[1]]


def can_be_written(form: ToolFormat, given: Mapping[str, Any]) -> bool:
    """Return whether a format can hold these texts: elements end where their mark is, whatever is meant."""
    if form.kind != "elements":
        return True
    return not any("</" in text for text in (str(given.get("city")), json.dumps(given)))


@pytest.mark.few(4)
@ALL
@given(given_=ARGUMENTS)
@settings(max_examples=min(25, settings().max_examples))
def test_what_the_grammar_lets_be_written_is_found_as_the_same_call(
    name: str,
    given_: dict[str, Any],
    tokenizer: Tokenizer,
    fits: Callable[[Tools, ToolFormat, str], bool],
) -> None:
    form = FORMATS[name]
    ordered = {key: given_[key] for key in SCHEMA["properties"] if key in given_}  # type: ignore[attr-defined]
    # A model writes these within an argument as letters; encoded here, they would be control tokens.
    assume(not tokenizer.control_tokens.count(json.dumps(ordered, ensure_ascii=False)))
    if not can_be_written(form, ordered):
        return
    text = written(form, ordered)
    assert fits(Tools.of(TOOLS), form, text), text
    assert fits(Tools.of(TOOLS, "required"), form, text), text
    assert read(form, text)[0] == ""
    assert called(form, text) == [ordered]


@pytest.mark.few(10)
@ALL
def test_what_does_not_follow_the_schema_cannot_be_written(
    name: str, fits: Callable[[Tools, ToolFormat, str], bool]
) -> None:
    form = FORMATS[name]
    for wrong in ({"days": 2}, {"city": "Paris", "days": [2]}, {"city": "Paris", "unit": "kelvin"}):
        assert not fits(Tools.of(TOOLS, "required"), form, written(form, wrong))
    assert not fits(Tools.of(TOOLS, "required"), form, written(form, PARIS, name="other"))
    whole = written(form, PARIS)
    assert not fits(Tools.of(TOOLS, "required"), form, whole[: len(whole) // 2])
    if form is not HARMONY:  # where text has marks of its own
        assert not fits(Tools.of(TOOLS, "required"), form, "Hello.")
        assert fits(Tools.of(TOOLS), form, "Hello.")
        assert fits(Tools.of(TOOLS, "none"), form, "Hello.")


@pytest.mark.few(10)
@ALL
def test_several_calls_come_after_text(
    name: str, fits: Callable[[Tools, ToolFormat, str], bool]
) -> None:
    form = FORMATS[name]
    two = written(form, PARIS) if form.is_single else written(form, PARIS, {"city": "Rome"})
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" * (form is HARMONY)
    text = f"{said or 'I look.'}{chr(10) * (form is not HARMONY)}{two}"
    assert fits(Tools.of(TOOLS), form, text), text
    assert read(form, text)[0] == "I look."
    assert called(form, text) == ([PARIS] if form.is_single else [PARIS, {"city": "Rome"}])
    if not form.is_single:
        assert not fits(Tools.of(TOOLS, "required", parallel=False), form, two)


@pytest.mark.few(10)
@ALL
def test_a_call_without_arguments_is_one(
    name: str, fits: Callable[[Tools, ToolFormat, str], bool]
) -> None:
    form = FORMATS[name]
    text = written(form, {}, name="clock")
    assert fits(Tools.of(TOOLS, "required"), form, text), text
    assert read(form, text) == ("", [("clock", "{}")])


@pytest.mark.few(3)
@ALL
def test_wherever_a_reply_is_cut_its_call_is_no_text_and_stream_and_whole_agree(name: str) -> None:
    form = FORMATS[name]
    call = written(form, PARIS)
    said = "<|channel|>final<|message|>" if form is HARMONY else "Well.\n"
    text = said + call if form is not HARMONY else call
    rules = Tools.of(TOOLS).rules(None, form)
    for length in range(len(text) + 1):
        parser = ToolCallParser("id_", rules)
        told = [event for letter in text[:length] for event in parser.push(letter)]
        told += parser.finish(is_cut=True)
        shown = "".join(one.text for one in told if isinstance(one, TextDelta))
        assert shown.strip() in ("", *(said.strip()[:n] for n in range(1, 9))) or (
            len(shown) - len(said.strip()) <= 7  # letters that may begin a table, too
        ), shown
        parsed = parse_reply(text[:length], "id_", rules, is_cut=True)
        assert parsed.content == shown
        started = [one for one in told if isinstance(one, CallStarted)]
        given_ = "".join(one.text for one in told if isinstance(one, ArgumentsDelta))
        assert parsed.calls == tuple(ToolCall(one.id, one.name, given_) for one in started)
        if length < len(text) - len(form.closing + form.tail) - 1:
            assert not any(isinstance(one, CallEnded) for one in told), text[:length]


@pytest.mark.few(5)
@ALL
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_the_pieces_do_not_matter(name: str, cuts: Sequence[int]) -> None:
    form = FORMATS[name]
    text = f"Hm.\n{written(form, PARIS)}\n"
    places = sorted({min(cut, len(text)) for cut in cuts})
    parser = ToolCallParser("id_", Tools.of(TOOLS).rules(None, form))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    told = [event for piece in pieces for event in parser.push(piece)] + [*parser.finish()]
    given_ = "".join(one.text for one in told if isinstance(one, ArgumentsDelta))
    said = "".join(one.text for one in told if isinstance(one, TextDelta))
    assert (said.strip(), json.loads(given_)) == ("Hm.", PARIS)


@pytest.mark.few(21)
@ALL
@pytest.mark.parametrize(
    "text", ["", "Hi. ", "a < b [x](y)", "{}", "[1, 2]", "So `<tool` and [TOOL are text.\n\n{\n"]
)
def test_what_is_no_call_is_text_and_all_of_it(name: str, text: str) -> None:
    assert read(FORMATS[name], text) == (text, [])
    parser = ToolCallParser("", Tools.of(TOOLS).rules(None, FORMATS[name]))
    told = [event for letter in text for event in parser.push(letter)] + [*parser.finish()]
    assert "".join(one.text for one in told if isinstance(one, TextDelta)) == text


def seconds(form: ToolFormat, text: str, letters: int) -> float:
    """Return how long it takes to find the calls in a text that comes in pieces of some letters."""
    rules, best = Tools.of(TOOLS).rules(None, form), 1e9
    for _ in range(3):
        parser, begun = ToolCallParser("", rules), time.thread_time()
        for place in range(0, len(text), letters):
            for _event in parser.push(text[place : place + letters]):
                pass
        best = min(best, time.thread_time() - begun)
    return best


@pytest.mark.slow
@ALL
def test_finding_a_long_call_takes_time_in_line_with_its_length(name: str) -> None:
    form = FORMATS[name]
    short, long = (
        seconds(form, written(form, {"city": "x y\n" * (count // 4)}), 3)
        for count in (20_000, 160_000)
    )
    assert long < 8 * short * 3, (short, long)


@pytest.mark.slow
@ALL
def test_many_calls_in_one_piece_are_found_as_fast_as_in_many(name: str) -> None:
    form = FORMATS[name]
    text = written(form, *[{"city": "x y\n" * 250}] * 1_000)
    whole, pieces = seconds(form, text, len(text)), seconds(form, text, 2_000)
    assert whole < 3 * pieces, (whole, pieces)


@pytest.mark.parametrize(
    ("name", "text", "given_"),
    [
        ("llama-3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', 1),
        ("llama-3", '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', 1),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "a1"}]', 1),
        ("mistral", '[TOOL_CALLS][{"arguments": {"city": "Paris"}, "name": "weather"}]', 1),
        ("mistral-v11", '[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{"city": "Paris"}', 1),
        ("qwen3-coder", "<tool_call><function=weather><parameter=city>Paris</parameter>"
         "</function></tool_call>", 1),
        ("glm-4.5", "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
         "</tool_call>", 1),
        ("pythonic", "[weather(city='Paris')]", 1),
        ("pythonic", "<|python_start|>[weather(city='Paris'), weather(city='Paris')]", 2),
        ("lfm2", "<|tool_call_start|>[ weather( city = 'Paris' ) ]<|tool_call_end|>", 1),
        ("harmony", " to=functions.weather<|channel|>commentary json<|message|>"
         '{"city": "Paris"}', 1),
        ("harmony", "<|channel|>commentary to=functions.weather<|constrain|>json<|message|>"
         '{"city": "Paris"}', 1),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
         '```json\n{\n "city": "Paris"\n}\n```<｜tool▁call▁end｜>', 1),
    ],
)  # fmt: skip
def test_other_spellings_are_found_too(name: str, text: str, given_: int) -> None:
    assert read(FORMATS[name], text)[0] == ""
    assert called(FORMATS[name], text) == [{"city": "Paris"}] * given_


def test_marks_of_messages_in_channels_are_no_text() -> None:
    text = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final"
    assert read(HARMONY, f"{text}<|message|>Hello.") == ("I look.Hello.", [])


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    form = FORMATS["qwen3-coder"]
    assert called(form, written(form, {"city": "75001", "days": 3})) == [
        {"city": "75001", "days": 3}
    ]


def test_control_tokens_in_which_calls_are_written_are_known(with_marks: Tokenizer) -> None:
    found = control_marks(FORMATS["mistral-v11"], with_marks.control_tokens)
    assert set(found.values()) == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}
    assert named("mistral-v11") is FORMATS["mistral-v11"]
    assert named(None) is None
