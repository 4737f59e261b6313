"""A reply that comes back is known by what it says, and what it cost to read the rest is counted."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.kv.disk import DiskStore
from recollect.text.template import ChatTemplate
from recollect.types import Grammar, Message, SamplingParams

MESSAGE: Final = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASSISTANT: Final = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN: Final = "{% for m in messages %}" + MESSAGE + "{% endfor %}" + ASSISTANT
TEMPLATES: Final = {
    "plain": PLAIN,
    # Llama 2 and its kin.
    "trims": PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"),
    "leads_with_space": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }} {% endif %}{% endfor %}"
    ),
    # DeepSeek R1, Qwen3.5, MiniMax: the generation prompt opens thinking, and history has none of it.
    "opens": PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    # Qwen3 without thinking.
    "opens_and_closes": PLAIN.replace(
        "assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"
    ),
    # GLM 4.6, Kimi K2.
    "closes_in_history": PLAIN.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
    ),
}
GENERATED: Final = " Hello, you.\n"
SENT: Final = {
    "as it was": GENERATED,
    "trimmed": GENERATED.strip(),
    "without its newline": GENERATED.rstrip(),
    "with two": GENERATED + "\n",
}
LONG: Final = "".join(f"Rule {number}: be careful with number {number}.\n" for number in range(12))
Say = Callable[..., Reply]

pytestmark = pytest.mark.usefixtures("nothing_read_ahead")


def says(text: str) -> SamplingParams:
    return SamplingParams(max_tokens=400, grammar=Grammar.regex(re.escape(text)))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def answer(model: Model, messages: Sequence[Message], text: str, **options: Any) -> Reply:
    return model.session_from(messages, **options).respond(None, params=says(text))


def read_again(reply: Reply, *before: Reply) -> int:
    """Return how many tokens of a prompt were computed that the turns before had read or generated."""
    last = before[-1]
    known = last.usage.prompt_tokens + len(last.node.token_ids or ()) - 1  # it ends without KV
    return known - reply.usage.reused_tokens


@pytest.mark.few(8)
@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_read_again_however_a_client_sends_a_reply(
    name: str, sent: str, make_model: Callable[..., Model]
) -> None:
    model = make_model(template=TEMPLATES[name])
    messages, before = [user("One")], list[Reply]()
    for text in ("Two", "Three", "Four"):
        reply = answer(model, messages, GENERATED)
        if before:
            assert (read_again(reply, *before), reply.usage.reason) == (0, "new")
        before.append(reply)
        messages += [assistant(SENT[sent]), user(text)]


def test_what_the_template_shows_otherwise_is_read_once_and_told(
    make_model: Callable[..., Model],
) -> None:
    drops = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
    model = make_model(template=drops)
    messages, before = [user("One")], list[Reply]()
    thoughts = "<think>I think, and think again, and think.</think>"
    for text in (f"{thoughts}Yes", f"{thoughts}No", "Maybe", "So"):
        reply = answer(model, messages, text)
        before.append(reply)
        messages += [assistant(text), user("And?")]
    reasons = [reply.usage.reason for reply in before]
    assert [bool(reply.usage.lost_tokens) for reply in before] == [False, True, True, False]
    assert reasons == ["new", "template_rewrote", "template_rewrote", "new"]
    assert "reply 2" in str(before[2].usage.difference)
    for number, reply in enumerate(before[1:], 1):
        new = len("<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
        assert reply.usage.computed_tokens <= new + len("Maybe") + 1, number


def test_the_examples_of_a_client_are_its_own_words(make_model: Callable[..., Model]) -> None:
    """They are read as they are sent, once, and are no replies of another model."""
    model = make_model(template=PLAIN)
    examples = [system("S"), user("2+2"), assistant("4 "), user("3+3"), assistant(" 6")]
    first = answer(model, [*examples, user("4+4")], "8")
    second = answer(model, [*examples, user("4+4"), assistant("8"), user("5+5")], "10")
    third = answer(model, [*examples, user("6+6")], "12")
    assert [one.usage.reason for one in (first, second, third)] == ["new"] * 3
    assert read_again(second, first) == 0
    assert third.usage.computed_tokens <= len("6+6<|im_end|>\n<|im_start|>assistant\n")
    other = [*examples[:2], assistant("4"), *examples[3:]]
    fourth = answer(model, [*other, user("4+4")], "8")
    whole = ChatTemplate(PLAIN).render([*other, user("4+4")], add_generation_prompt=True)
    assert fourth.usage.prompt_tokens == len(model.tokenizer.encode(whole)), "not as sent before"
    assert fourth.usage.reason == "message_changed"
    assert fourth.usage.difference == "Message 3: ' ' became ''."
    fifth = answer(model, [*other, user("4+4"), assistant("8"), user("5+5")], "10")
    assert (fifth.usage.reason, read_again(fifth, fourth)) == ("new", 0)


def test_a_reply_that_was_edited_is_a_changed_message(make_model: Callable[..., Model]) -> None:
    model = make_model(template=PLAIN)
    first = answer(model, [user("One")], "It is blue and it is new.")
    second = answer(model, [user("One"), assistant(first.text), user("Two")], "Yes")
    rest = [user("Two"), assistant("Yes"), user("Three")]
    said = answer(model, [user("One"), assistant("It is red and it is new."), *rest], "No")
    assert second.usage.reason == "new"
    assert said.usage.reason == "message_changed"
    assert said.usage.difference is not None
    assert said.usage.difference.startswith("Message 2: 'blue")


def test_instructions_that_change_are_told_before_any_question(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(template=PLAIN)
    for day, question in (("Monday", "Hi"), ("Tuesday", "What is new?"), ("Friday", "Well?")):
        front = f"You are an agent.\nBe kind.\nIt is {day}.\n"
        said = answer(model, [system(front + LONG), user(question)], "Yes").usage
    assert said.reason == "system_changed"
    assert said.computed_tokens > len(LONG)
    assert len(LONG) - 9 <= said.lost_tokens < said.computed_tokens
    assert said.difference is not None
    assert said.difference.startswith("Message 1, line 3: 'Tuesday.")
    assert " became 'Friday." in said.difference
    other = answer(model, [system("Translate into French what is said."), user("Hm")], "Oui").usage
    assert (other.reason, other.difference) == ("new", None), "another program has lost nothing"


def test_a_summary_in_place_of_old_turns_is_told_once(make_model: Callable[..., Model]) -> None:
    """As agents compact a conversation: a summary, and the last turns as they were."""
    model = make_model(template=PLAIN)
    messages = [system(LONG), user("One")]
    for text in ("Two", "Three"):
        messages += [assistant(answer(model, messages, f"Re {text}.").text), user(text)]
    whole = answer(model, messages, "Re Four.")
    compact = [messages[0], user("Summary: one and two."), *messages[-2:]]
    first = answer(model, compact, "Yes.")
    second = answer(model, [*compact, assistant("Yes. "), user("Five")], "No.")
    assert (whole.usage.reason, first.usage.reason) == ("new", "message_changed")
    assert 0 < first.usage.lost_tokens < first.usage.computed_tokens - len("Summary: one")
    assert first.usage.reused_tokens >= len(LONG)
    assert (second.usage.reason, read_again(second, first)) == ("new", 0)


TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get",
        "parameters": {
            "type": "object",
            "properties": {"where": {"const": "a b"}, "count": {"const": 2.0}},
            "required": ["where", "count"],
        },
    },
}


def test_a_call_is_the_same_however_its_arguments_are_written(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(template=PLAIN)
    messages = [user("One")]
    offered: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    session = model.session_from(messages, **offered)
    first = session.respond(None, params=SamplingParams(max_tokens=400))
    (call,) = first.tool_calls
    for arguments in ({"where": "a b", "count": 2}, {"count": 2.0, "where": "a b"}):
        written = json.dumps(arguments, separators=(",", ":"))
        function = {"name": call.name, "arguments": written}
        sent: Any = {"role": "assistant", "content": None}
        sent["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
        result: Message = {"role": "tool", "content": "3", "tool_call_id": call.id}
        said = model.session_from([*messages, sent, result], tools=[TOOL])
        second = said.respond(None, params=SamplingParams(max_tokens=4))
        assert read_again(second, first) <= 0
        assert second.usage.reason == "new"


def test_a_trimmed_reply_is_known_after_a_restart(
    make_model: Callable[..., Model], open_store: Callable[[], DiskStore]
) -> None:
    model = make_model(template=PLAIN, store=open_store())
    first = answer(model, [user("One")], GENERATED)
    model.close()
    model = make_model(template=PLAIN, store=open_store())
    session = model.session_from([user("One"), assistant(GENERATED.strip()), user("Two")])
    second = session.respond(None, params=says("Yes"))
    assert read_again(second, first) < model.engine.block_size
    assert second.usage.reason == "new"


def test_other_options_of_a_template_are_told(make_model: Callable[..., Model]) -> None:
    shows = "{% if brief %}Be brief. {% endif %}" + PLAIN
    model = make_model(template=shows)
    first = answer(model, [user("One")], "Yes.")
    messages = [user("One"), assistant("Yes."), user("Two")]
    options = {"template_options": {"brief": True}}
    second = answer(model, messages, "No.", **options)
    third = answer(model, [*messages, assistant("No."), user("Three")], "So.", **options)
    assert second.usage.reused_tokens < first.usage.prompt_tokens
    assert (second.usage.reason, third.usage.reason) == ("template_rewrote", "new")
    assert read_again(third, second) == 0


def test_a_reply_that_was_begun_for_the_model_is_recognised(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(template=TEMPLATES["opens"])
    first = answer(model, [user("One"), assistant("Well, ")], "yes.")
    whole = [user("One"), assistant("Well, yes."), user("Two")]
    second = answer(model, whole, "No.")
    known = first.usage.prompt_tokens + len("yes.") - 1
    assert (second.usage.reused_tokens >= known, second.usage.reason) == (True, "new")
