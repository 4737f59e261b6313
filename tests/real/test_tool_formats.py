"""Real templates show calls of tools as Hugging Face's code has them, and as the finder finds them."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

import pytest

from recollect.conversation.showing import message_of
from recollect.conversation.tree import Node, Tree, to_node
from recollect.errors import TemplateError
from recollect.text.template import ChatTemplate
from recollect.text.tool_calls import shown_calls
from recollect.types import Message, ToolCall

pytestmark = [pytest.mark.model, pytest.mark.slow]

TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "clock")
]
ASKED: Final = {"role": "user", "content": "How is Paris?"}


def calling(
    content: str, *calls: tuple[str, str, Mapping[str, Any]], **more: str
) -> dict[str, Any]:
    each = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for id_, name, given in calls
    ]
    return {"role": "assistant", "content": content or None, "tool_calls": each, **more}


def result(id_: str, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "name": name, "content": content}


WEATHER: Final = ("call00001", "weather", {"city": "Paris", "days": 2})
CLOCK: Final = ("call00002", "clock", {"city": "Paris"})
FIRST: Final = [ASKED, calling("", WEATHER), result("call00001", "weather", '{"sky": "sunny"}')]
SYSTEM: Final = {"role": "system", "content": "Be brief."}
THOUGHT: Final = "They want the weather."
ANSWER: Final = {"role": "assistant", "content": "Sunny."}
MORE: Final = {"role": "user", "content": "And the time?"}
CONVERSATIONS: Final[dict[str, tuple[list[dict[str, Any]], bool]]] = {
    "system": ([SYSTEM, ASKED], False),
    "tools": ([SYSTEM, ASKED], True),
    "a result": ([SYSTEM, *FIRST], True),
    "two calls with two results": (
        [ASKED, calling("", WEATHER, CLOCK), FIRST[2], result("call00002", "clock", "noon")],
        True,
    ),
    "text before a call": ([ASKED, calling("I look.", WEATHER), FIRST[2]], True),
    "reasoning": (
        [ASKED, calling("", WEATHER, reasoning_content=THOUGHT), FIRST[2]],
        True,
    ),
    "several turns": ([*FIRST, ANSWER, MORE, calling("", CLOCK), result("call00002", "clock", "noon")], True),
    "several turns without tools": ([SYSTEM, ASKED, ANSWER, MORE], False),
}  # fmt: skip


WITHOUT_TOOLS: Final = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1",
}
"""They do not look at tools, so the instructions describe them here; elsewhere nothing does."""
WITHOUT_CALLS: Final = {
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
}
"""They show no calls beside the text, so calls are in it here; elsewhere they are lost."""
REFUSING: Final = {"Kimi-K2-Instruct", "Kimi-K2-Thinking"}
"""They note the ids of calls in a list, which the sandbox refuses here and elsewhere; so calls are in the
text here, and elsewhere nothing is shown."""
WITH_ONE_CALL: Final = {
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b",
}
"""They refuse a message with two calls, or drop the second. Here it is two messages, each with its result."""
WITH_THOUGHTS: Final = {
    "Qwen-QwQ-32B",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "unsloth-Apriel-1.5",
}
"""They do not look at `reasoning_content`, so thoughts are where they look; elsewhere they are lost."""
EXPECTED: Final[Mapping[str, set[str]]] = {
    "system": set(),
    "tools": WITHOUT_TOOLS,
    "a result": WITHOUT_TOOLS | WITHOUT_CALLS | REFUSING,
    "two calls with two results": WITHOUT_TOOLS | WITHOUT_CALLS | REFUSING | WITH_ONE_CALL,
    "text before a call": WITHOUT_TOOLS | WITHOUT_CALLS | REFUSING,
    "reasoning": WITHOUT_TOOLS | WITHOUT_CALLS | REFUSING | WITH_THOUGHTS,
    "several turns": WITHOUT_TOOLS | WITHOUT_CALLS | REFUSING,
    "several turns without tools": set(),
}
"""The templates that show a conversation otherwise than elsewhere, each for its reason."""


def templates(sources: Mapping[str, str]) -> dict[str, ChatTemplate]:
    """Return those that show a format of calls that is known."""
    made = {
        name: ChatTemplate(
            source, bos_token="<s>", eos_token="</s>", now=datetime.now().astimezone()
        )
        for name, source in sources.items()
    }
    return {name: one for name, one in made.items() if one.call_style.has_results}


def nodes(messages: Sequence[Mapping[str, Any]]) -> list[Node]:
    tree, at = Tree(), None
    for message in messages:
        new = to_node(cast("Message", message))
        at = tree.add(at or tree.root, new.role, new.content, links=new.links)
    return [] if at is None else at.path()


def shown(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Any) -> str | None:
    """Return what is shown of messages that came from a client."""
    path = [
        message_of(node, template) if node.calls_tools else node.written_message()
        for node in nodes(messages)
    ]
    try:
        return template.render(path, add_generation_prompt=True, tools=tools)
    except TemplateError:
        return None


def as_objects(messages: Sequence[Mapping[str, Any]], *, empty: str | None) -> list[Any]:
    """Return messages as Hugging Face's documentation has them: arguments are objects."""
    plain: list[Any] = copy.deepcopy(list(messages))
    for message in plain:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if message["content"] is None:
            message["content"] = empty
    return plain


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_templates_are_rendered_as_elsewhere(
    kind: str,
    sources: Mapping[str, str],
    rendered_elsewhere: Callable[[list[dict[str, Any]]], list[str | None]],
) -> None:
    messages, has_tools = CONVERSATIONS[kind]
    known = templates(sources)
    tools = TOOLS if has_tools else None
    asked = [
        {"template": sources[name], "tools": tools, "messages": as_objects(messages, empty=empty)}
        for name in known
        for empty in (None, "")
    ]
    elsewhere = rendered_elsewhere(asked)
    different = {}
    for place, (name, template) in enumerate(known.items()):
        theirs = elsewhere[2 * place : 2 * place + 2]
        ours = shown(template, messages, tools)
        if ours not in theirs:
            different[name] = (ours, theirs)
    assert set(different) == EXPECTED[kind], different


def test_calls_that_a_template_shows_are_found_in_them(sources: Mapping[str, str]) -> None:
    found = {}
    for name, template in templates(sources).items():
        text = shown(template, CONVERSATIONS["a result"][0], TOOLS)
        if text is None or not template.call_style.takes_calls:
            continue
        place = text.rindex("Paris")
        start = text.rfind(template.tool_format.beginning, 0, place)
        call = ToolCall(WEATHER[0], WEATHER[1], json.dumps(WEATHER[2]))
        calls = shown_calls(text, start, [call], template.tool_format, most=4096)
        found[name] = None if calls is None else json.loads(calls.reply.calls[0].arguments)
    assert [name for name, given in found.items() if given != WEATHER[2]] == []
    assert len(found) >= 30, sorted(found)


def test_instructions_in_two_messages_are_shown_wherever_they_stand(
    sources: Mapping[str, str],
) -> None:
    """Folded where a template has no place for them; see `folded`."""
    lost = {}
    for name, template in templates(sources).items():
        for place in (0, 2):
            messages = [SYSTEM, ASKED, ANSWER, MORE]
            messages.insert(1 + place, {"role": "system", "content": "Be kind."})
            text = shown(template, messages, TOOLS)
            if text is None or "Be brief." not in text or "Be kind." not in text:
                lost[name, place] = text
    assert lost == {}
