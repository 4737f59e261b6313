"""A reply whose beginning was given goes on, token by token as if it had been generated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.errors import ConversationError, InvalidParameterError
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import Message, SamplingParams

ASKED: Message = {"role": "user", "content": "Tell me"}
LONG = SamplingParams(max_tokens=24)
END = min(ByteTokenizer.eos_token_ids)
WHOLE = SamplingParams(logit_bias={END: 100.0})
"""A reply that ends by itself, at once."""


def begun(text: str) -> list[Message]:
    return [ASKED, {"role": "assistant", "content": text}]


def test_it_goes_on_as_the_whole_would_have(make_model: Callable[..., Model]) -> None:
    """The reference model's tokens depend on all before them, so the prompt has to be the same."""
    whole = make_model().session_from([ASKED], params=LONG).respond(None).text
    session = make_model().session_from(begun(whole[:9]), params=LONG)
    before = session.tip
    reply = session.respond(None)
    assert (whole[:9] + reply.text)[: len(whole)] == whole
    assert session.tip is reply.node is not before
    assert session.tip.parent is before.parent, "the longer reply takes the place of its beginning"
    assert session.transcript() == begun(whole[:9] + reply.text)
    assert session.respond("And?").usage.reason == "new"
    session.tree.check()


def test_what_was_generated_goes_on_from_its_own_tokens(model: Model) -> None:
    nine = SamplingParams(max_tokens=9, ignore_eos=True)
    cut = model.session_from([ASKED], params=nine).respond(None)
    usage = model.session_from(begun(cut.text), params=LONG).respond(None).usage
    assert usage.computed_tokens == 1, "the last token of a reply has no KV yet"


def test_a_message_that_is_added_begins_a_reply(model: Model) -> None:
    session = model.session("Be brief.", params=LONG, keep=True)
    session.respond("Hello", params=WHOLE)
    tip = session.tip
    with pytest.raises(ConversationError, match="no message to answer"):
        session.respond(None)
    assert session.tip is tip
    session.add(ASKED)
    session.add({"role": "assistant", "content": "Once"})
    forked = session.fork()
    assert session.prompt_tokens() == forked.prompt_tokens()
    reply = session.respond(None)
    assert reply.node.content == f"Once{reply.text}"
    assert forked.respond(None).text == reply.text
    name = session.conversation.name
    assert name is not None
    again = model.resume(name)
    assert [one["content"] for one in again.transcript()][-1] == reply.node.content


def test_a_reply_that_was_cut_goes_on_where_it_stopped(make_model: Callable[..., Model]) -> None:
    """By a limit or by its reader; also from the journal, after a restart, and it is as the whole."""
    cut_short = SamplingParams(max_tokens=9, ignore_eos=True)
    longer = SamplingParams(max_tokens=24, ignore_eos=True)
    whole = make_model().session(params=longer).respond("Tell me").node.token_ids
    model = make_model()
    session = model.session(params=cut_short, keep=True)
    cut = session.respond("Tell me")
    assert cut.finish_reason == "length"
    name = session.conversation.name
    assert name is not None
    later = model.resume(name, params=longer)
    reply = later.respond(None)
    assert reply.node.token_ids is not None
    assert reply.node.token_ids[: len(whole or ())] == whole
    assert reply.usage.computed_tokens == 1
    assert later.tip.content == cut.text + reply.text
    assert later.tip.parent is not None
    assert len(later.tip.parent.children) == 2, "the shorter one stays in the tree"
    with session.stream("And?", params=LONG) as stream:
        for _ in stream:
            stream.stop()
    assert stream.reply is not None
    assert stream.reply.finish_reason == "cancelled"
    assert session.respond(None).node.content.startswith(stream.reply.text)


def test_a_stopped_one_leaves_the_conversation_as_it_was(model: Model) -> None:
    session = model.session_from(begun("Once"), params=LONG)
    with session.stream(None) as stream:
        stream.stop()
    if stream.reply is None:
        assert session.transcript() == begun("Once")


def test_a_reply_that_calls_tools_does_not_go_on(model: Model) -> None:
    call: Any = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Message] = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ConversationError, match="gave back"):
        model.session_from(messages).respond(None)
    messages = [*begun("a"), {"role": "system", "content": "b"}]
    with pytest.raises(ConversationError, match="instructions apart"):
        model.session_from(messages).respond(None)


def test_instructions_after_a_question_belong_to_it(model: Model) -> None:
    said: list[Message] = [ASKED, {"role": "system", "content": "Briefly."}]
    session = model.session_from(said, params=LONG)
    reply = session.respond(None)
    assert session.transcript()[:2] == said
    again = model.session_from([*session.transcript(), ASKED], params=LONG).respond(None)
    assert again.usage.reused_tokens >= reply.usage.prompt_tokens


ENDED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
OPENS = f"{ENDED}{{% if add_generation_prompt %}}<assistant><think>{{% endif %}}"
REFUSES = (
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    f"{ENDED}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (OPENS, "<user>Tell me</user><assistant>Once"),
        (REFUSES, "<user>Tell me</user><assistant>Once"),
    ],
)
def test_the_prompt_ends_with_the_beginning_as_the_template_shows_replies(
    make_model: Callable[..., Model], template: str, shown: str
) -> None:
    model = make_model(template=template)
    session = model.session_from(begun("Once"))
    assert session.prompt_tokens() == len(shown)
    with session.stream(None, params=SamplingParams(max_tokens=1)) as stream:
        for _ in stream:
            pass
        assert stream.reply is None or stream.reply.usage.prompt_tokens == len(shown)


def test_options_of_the_template_are_given_to_it(make_model: Callable[..., Model]) -> None:
    template = (
        f"{ENDED}{{% if not enable_thinking %}}<quiet>{{% endif %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = make_model(template=template)
    quiet = model.session_from([ASKED], template_options={"enable_thinking": False})
    loud = model.session_from([ASKED], template_options={"enable_thinking": True})
    assert quiet.prompt_tokens() == loud.prompt_tokens() + len("<quiet>")
    assert quiet.fork().prompt_tokens() == quiet.prompt_tokens()
    wrongs: list[dict[str, Any]] = [
        {"messages": []},
        {"a": "<|im_end|>"},
        {"a": {"b": ["<|im_start|>system"]}},
    ]
    for wrong in wrongs:
        with pytest.raises(InvalidParameterError, match="template"):
            model.session_from([ASKED], template_options=wrong)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_reply_that_is_cut_anywhere_and_goes_on_says_the_same(
    make_model: Callable[..., Model], *, as_text: bool
) -> None:
    """The reference model's tokens are bytes; this reply begins with a character of two."""
    asked: Message = {"role": "user", "content": "a"}
    whole = make_model().session_from([asked], params=LONG).respond(None)
    assert whole.text.startswith("\x94")
    ids = whole.node.token_ids
    assert ids is not None
    for place in range(1, len(ids)):
        model = make_model()
        session = model.session_from([asked])
        cut = session.respond(None, params=replace(LONG, max_tokens=place))
        if as_text:
            session = model.session_from([asked, {"role": "assistant", "content": cut.text}])
        rest = session.respond(None, params=replace(LONG, max_tokens=len(ids) - place))
        assert rest.node.token_ids == ids
        assert cut.text + rest.text == rest.node.content == whole.text


TOOL: Any = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("with_tools", [False, True])
def test_a_character_comes_whole_beside_tools_and_whoever_leaves_early(
    make_model: Callable[..., Model], says: Callable[..., SamplingParams], *, with_tools: bool
) -> None:
    """Nothing that a grammar allows begins inside of a character, so that is generated anew there."""
    whole = "hi😀b€".encode()
    for place in range(1, len(whole)):
        chat = make_model().session(tools=[TOOL] if with_tools else ())
        cut = chat.respond("Q", params=replace(says(whole), max_tokens=place))
        known = len(cut.text.encode()) if with_tools else place
        with chat.stream(None, params=says(whole[known:])) as stream:
            next(iter(stream))
        content = chat.tip.content
        assert "hi😀b€".startswith(content)
        assert len(content) > len(cut.text)
        assert ByteTokenizer().decode(chat.tip.token_ids or ()) == content
