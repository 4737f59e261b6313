"""The SDKs of OpenAI and Anthropic read streams and whole replies alike, also those that were cut."""

from typing import Any

import pytest

ASKED: Any = [{"role": "user", "content": "Hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.few(1)
@pytest.mark.parametrize("length", [8, 30, 50, 200])
def test_a_message_is_the_same_streamed_and_whole(anthropics: Any, length: int) -> None:
    asked = {
        "model": "reference",
        "max_tokens": length,
        "messages": ASKED,
        "tools": [{"name": "weather", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
    }
    whole = anthropics.messages.create(**asked)
    with anthropics.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        for block in message.content:
            if block.type == "tool_use":
                block.id = "any"
    shown = [
        [block.model_dump(exclude_none=True) for block in one.content] for one in (whole, streamed)
    ]
    for blocks in shown:
        for block in blocks:
            block.pop("parsed_output", None)
    assert shown[0] == shown[1]
    assert whole.stop_reason == streamed.stop_reason


@pytest.mark.few(1)
@pytest.mark.parametrize("length", [8, 30, 50, 200])
def test_a_completion_is_the_same_streamed_and_whole(openais: Any, length: int) -> None:
    function = {"name": "weather", "parameters": PARAMETERS}
    asked = {
        "model": "reference",
        "max_tokens": length,
        "messages": ASKED,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "unheard_of": 1},
    }
    raw = openais.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["x-recollect-ignored"] == "unheard_of"
    (whole,) = raw.parse().choices
    content, arguments, reason = "", "", None
    for chunk in openais.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            arguments += call.function.arguments
        reason = choice.finish_reason or reason
    calls = whole.message.tool_calls or []
    assert content == (whole.message.content or "")
    assert arguments == "".join(call.function.arguments for call in calls)
    assert reason == whole.finish_reason


@pytest.mark.slow
def test_a_stored_history_is_sent_by_reference(openais: Any) -> None:
    import openai

    """As the AI SDK does from its second turn on."""
    first = openais.responses.create(model="reference", input="Hello", max_output_tokens=8)
    items: Any = [
        {"role": "user", "content": "Hello"},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "Go on"},
    ]
    second = openais.responses.create(model="reference", input=items, max_output_tokens=8)
    spelled = [items[0], {"role": "assistant", "content": first.output_text}, items[2]]
    same = openais.responses.create(model="reference", input=spelled, max_output_tokens=8)
    assert second.output_text == same.output_text
    details = second.usage.input_tokens_details
    assert details.cached_tokens > first.usage.total_tokens - 2
    missing: Any = [{"type": "item_reference", "id": "msg_other"}, items[2]]
    with pytest.raises(openai.NotFoundError, match="msg_other"):
        openais.responses.create(model="reference", input=missing)


@pytest.mark.slow
def test_mistakes_are_errors_of_the_sdks(openais: Any, anthropics: Any) -> None:
    import anthropic
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        openais.chat.completions.create(
            model="reference", messages=ASKED, extra_body={"temprature": 1}
        )
    assert wrong.value.param == "temprature"
    image = {"type": "image", "source": {"type": "url", "url": "http://localhost/a.png"}}
    shown: Any = [{"role": "user", "content": [image]}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        anthropics.messages.create(model="reference", max_tokens=4, messages=shown)
