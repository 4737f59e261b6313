"""What a model thinks is told from what it says, by marks that are found in its template."""

from collections.abc import Iterable, Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.text.reasoning import Begun, ReasoningDelta, ReasoningSplitter, ReplyReader
from recollect.text.reasoning_marks import ReasoningMarks, says_the_same
from recollect.text.template import ChatTemplate
from recollect.text.tool_calls import ArgumentsDelta, CallRules, CallStarted, TextDelta
from recollect.text.tool_formats import HERMES
from recollect.types import Message

ASSISTANT: Final = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(reply: str, opening: str = ASSISTANT) -> str:
    """Return a template that shows a reply in some way."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        + reply
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + opening
    )


QWEN: Final = template(
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}"
)
OPENED: Final = template(
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}",
    ASSISTANT.replace("assistant\n{%", "assistant\n<think>\n{%"),
)
PARTS: Final = template(
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'thinking' %}[THINK]{{ c.thinking }}[/THINK]{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}"
)
HARMONY: Final = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DROPS: Final = template("{{ m.content.split('</think>')[-1] }}")
HARMONY_MARKS: Final = ReasoningMarks(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>",
    "",
    "thinking",
)
FOUND: Final = {
    "a field": (QWEN, ReasoningMarks("<think>", "</think>", way="reasoning_content")),
    "opened by the prompt": (
        OPENED,
        ReasoningMarks("<think>", "</think>", way="reasoning_content"),
    ),
    "another mark": (
        QWEN.replace("<think>", "<seed:think>").replace("</think>", "</seed:think>"),
        ReasoningMarks("<seed:think>", "</seed:think>", way="reasoning_content"),
    ),
    "a part": (PARTS, ReasoningMarks("[THINK]", "[/THINK]", space="", way="parts")),
    "channels": (HARMONY, HARMONY_MARKS),
    "dropped": (DROPS, ReasoningMarks("<think>", "</think>", way="nowhere")),
    "text": (
        template("{{ m.content.lstrip('<think>').rstrip('</think>') }}"),
        ReasoningMarks("<think>", "</think>", way="text"),
    ),
    "no mark": (template("{{ m.content }}"), None),
    "a word": (template("{# We thought of reasons. #}{{ m.content }}"), None),
    "JSON": (template("{# think #}{{ m | tojson }}"), None),
}


@pytest.mark.parametrize("name", FOUND)
def test_marks_are_found_in_a_template(name: str) -> None:
    source, marks = FOUND[name]
    assert ChatTemplate(source).reasoning == marks


def deltas(
    marks: ReasoningMarks, pieces: Iterable[str], *, is_inside: bool = False
) -> tuple[str, str]:
    splitter = ReasoningSplitter(marks, is_inside=is_inside)
    parts = [part for piece in pieces for part in splitter.push(piece)] + [*splitter.finish()]
    thought = "".join(part.text for part in parts if isinstance(part, ReasoningDelta))
    return thought, "".join(part for part in parts if isinstance(part, str))


THINK: Final = ReasoningMarks("<think>", "</think>")
SPLIT: Final[list[tuple[ReasoningMarks, bool, str, str, str]]] = [
    (THINK, False, "<think>\nWhy?\n</think>\n\nSo.", "Why?", "So."),
    (THINK, False, "\n<think>Why?</think>So. \n", "Why?", "So. \n"),
    (THINK, False, "  So.", "", "  So."),
    (THINK, False, "So: <think>no</think>", "", "So: <think>no</think>"),
    (THINK, False, "<think>\n\n</think>\n\nSo.", "", "So."),
    (THINK, False, "<think>One</think>\n<think>Two</think>So.", "One\n\nTwo", "So."),
    (THINK, False, "<think>cut </thi", "cut", ""),
    (THINK, False, "<thi", "", "<thi"),
    (THINK, True, "Why?\n</think>\nSo.", "Why?", "So."),
    (THINK, True, "a </b> c\n\nd</think>So.", "a </b> c\n\nd", "So."),
    (
        HARMONY_MARKS,
        False,
        "<|channel|>analysis<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|> So.",
        "Why?",
        " So.",
    ),
    (HARMONY_MARKS, False, "<|channel|>final<|message|>So.", "", "So."),
    (
        HARMONY_MARKS,
        False,
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B"
        "<|end|><|start|>assistant<|channel|>commentary to=f<|message|>{}",
        "A\n\nB",
        "<|start|>assistant<|channel|>commentary to=f<|message|>{}",
    ),
    (
        HARMONY_MARKS,
        False,
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>analysis<|message|>B<|end|><|start|>assistant<|channel|>final"
        "<|message|>So.",
        "A\n\nB",
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>So.",
    ),
    (HARMONY_MARKS, False, "<|channel|>final<|message|>So <|start|>a", "", "So <|start|>a"),
]


@pytest.mark.parametrize(("marks", "is_inside", "text", "thought", "said"), SPLIT)
def test_a_reply_is_taken_apart(
    marks: ReasoningMarks, is_inside: bool, text: str, thought: str, said: str
) -> None:
    assert deltas(marks, [text], is_inside=is_inside) == (thought, said)
    assert deltas(marks, text, is_inside=is_inside) == (thought, said)


PIECES: Final = ["<think>", "</think>", "<th", "ink>", "</", "think>", "\n", " ", "a", "<", "b c"]


@given(st.lists(st.sampled_from(PIECES)), st.booleans())
def test_what_is_told_does_not_depend_on_the_pieces(pieces: Sequence[str], is_inside: bool) -> None:
    text = "".join(pieces)
    thought, said = deltas(THINK, pieces, is_inside=is_inside)
    assert (thought, said) == deltas(THINK, [text], is_inside=is_inside)
    assert text.endswith(said)
    if "<think>" not in text and not is_inside:
        assert (thought, said) == ("", text)
    marks = thought.count("<think>") + said.count("<think>") + said.count("</think>")
    assert marks <= text.count("<think>") + text.count("</think>")


def test_calls_are_looked_for_in_what_is_said() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    reader = ReplyReader(Begun(THINK), CallRules(names=("f",)))
    text = f"<think>Shall I {call}?</think>\n\nI look.\n{call}"
    told = [event for letter in text for event in reader.push(letter)]
    told += reader.finish(is_cut=False)
    thought = "".join(event.text for event in told if isinstance(event, ReasoningDelta))
    said = "".join(event.text for event in told if isinstance(event, TextDelta))
    arguments = "".join(event.text for event in told if isinstance(event, ArgumentsDelta))
    assert (thought, said, arguments) == (f"Shall I {call}?", "I look.", '{"a": 1}')
    assert [event.name for event in told if isinstance(event, CallStarted)] == ["f"]
    parts, parsed = reader.whole(text, is_cut=False)
    assert (parts.reasoning, parsed.content, len(parsed.calls)) == (thought, said, 1)


CALL: Final = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "has_token", "thought", "said"),
    [
        (f"<think>Look.\n{CALL}", False, "Look.", ""),
        (f"<think>\n{CALL}", False, "", ""),
        (f"<think>Look.\n{CALL}\n</think>\n\nSo.", False, "Look.", "So."),
        (f"<think>Look.\n{CALL}\n</think>\n<think>Hm.</think>", False, "Look.\n\nHm.", ""),
        (f"<think>A {CALL}? No.</think>{CALL}", False, f"A {CALL}? No.", ""),
        (f"<think>Look.{CALL}", True, "Look.", ""),
        (f"So: </think>{CALL}", True, "", "So: </think>"),
    ],
)
def test_a_call_ends_reasoning_that_nothing_closes(
    text: str, has_token: bool, thought: str, said: str
) -> None:
    """Models that call while they think; a call in the middle of a line is only thought of."""
    for pieces in ([text], [*text]):
        reader = ReplyReader(
            Begun(THINK, calls=HERMES, has_token=has_token), CallRules(names=("f",))
        )
        told = [event for piece in pieces for event in reader.push(piece)]
        told += reader.finish(is_cut=False)
        parts = [event.text for event in told if isinstance(event, ReasoningDelta)]
        assert "".join(parts) == thought
        texts = [event.text for event in told if isinstance(event, TextDelta)]
        assert "".join(texts).strip() == said
        given_ = [event.text for event in told if isinstance(event, ArgumentsDelta)]
        assert "".join(given_) == '{"a": 1}'
        whole, parsed = reader.whole(text, is_cut=False)
        assert (whole.reasoning, parsed.content.strip(), len(parsed.calls)) == (thought, said, 1)


def test_tokens_before_a_call_that_ends_reasoning_are_counted() -> None:
    reader = ReplyReader(Begun(THINK, True, calls=HERMES), CallRules(names=("f",)))
    for piece in ("Look", ".", "\n", "<tool_call>", "\n{", '"name"', ": "):
        reader.count(piece)
    assert reader.reasoning_tokens == 3


def test_tokens_of_each_stretch_of_reasoning_are_counted() -> None:
    reader = ReplyReader(Begun(HARMONY_MARKS), None)
    again = ["<|start|>", "assistant", "<|channel|>"]
    thought = ["<|channel|>", "analysis", "<|message|>", "A", "<|end|>"]
    said = [*again, "commentary", "<|message|>", "I", " look", "<|end|>"]
    for piece in (*thought, *said, *again, *thought[1:], *again, "final", "<|message|>", "So"):
        reader.count(piece)
    # With the marks; what leads to the next message counts with what it belongs to.
    assert len(thought) + len(again) + len(thought[1:]) <= reader.reasoning_tokens
    assert reader.reasoning_tokens <= len(thought) + 2 * len(again) + len(thought) + len(again) + 2


def test_tokens_of_reasoning_are_counted_with_its_marks() -> None:
    reader = ReplyReader(Begun(THINK), None)
    for piece in ("<th", "ink>", "\n", "Why", "?", "</think>", "\n\n", "So", "."):
        reader.count(piece)
    assert reader.reasoning_tokens == 7
    plain = ReplyReader(Begun(THINK), None)
    for piece in ("<th", "ree"):
        plain.count(piece)
    assert plain.reasoning_tokens == 0


def test_messages_have_their_reasoning_where_the_template_looks_for_it() -> None:
    asked: Message = {"role": "user", "content": "Why?"}
    said: Message = {"role": "assistant", "content": "So.", "reasoning_content": "Because"}
    for source, shown in (
        (QWEN, "<think>\nBecause\n</think>\n\nSo."),
        (PARTS, "[THINK]Because[/THINK]So."),
        (HARMONY, "analysis<|message|>Because<|end|>"),
        (template("{{ m.content }}"), "<|im_start|>assistant\nSo."),
    ):
        made = ChatTemplate(source)
        text = made.render([asked, said], add_generation_prompt=False)
        assert shown in text, source
        assert ("Because" in text) == (made.reasoning is not None)


def test_what_a_client_left_in_the_text_is_reasoning_all_the_same() -> None:
    asked: Message = {"role": "user", "content": "<think>no</think>Why?"}
    inline: Message = {"role": "assistant", "content": "<think>\nBecause\n</think>\n\nSo."}
    known = ChatTemplate(QWEN).with_thoughts([asked, inline])
    assert known == [
        asked,
        {"role": "assistant", "content": "So.", "reasoning_content": "Because"},
    ]
    apart: Message = {"role": "assistant", "content": "So.", "reasoning_content": "Because"}
    assert ChatTemplate(template("{{ m.content }}")).with_thoughts([inline, apart]) == [
        inline,
        {"role": "assistant", "content": "So."},
    ]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a\n<think>\nx</think>", "a<think>x\n</think>\n\n", True),
        ("a<think>\n\n</think>\n", "a", True),
        ("a<think>x</think>", "a", False),
        ("a<think>x</think>", "a<think>y</think>", False),
    ],
)
def test_leads_are_the_same_but_for_space_and_marks_around_nothing(
    first: str, second: str, same: bool
) -> None:
    assert says_the_same(first, second) is same


def test_a_template_that_is_slow_is_not_tried_out_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = iter(range(0, 10_000, 20))  # each look at the clock is 20 s later
    slow = ChatTemplate(template("{{ m.content }}{# think #}"), is_own=True)
    monkeypatch.setattr("recollect.text.template.time.monotonic", lambda: next(moments))
    assert slow.reasoning is None
    assert next(moments) > 30
