"""On a real model replies keep to grammars, and calls of tools come back token-exact."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import recollect
from recollect.conversation.model import Model
from recollect.text.tool_calls import ArgumentsDelta
from recollect.types import Grammar, SamplingParams

pytestmark = pytest.mark.model

PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "hobbies": {
                "type": "array",
                "items": {"type": "string", "maxLength": 20},
                "maxItems": 3,
            },
        },
        "required": ["name", "age", "hobbies"],
        "additionalProperties": False,
    }
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    name = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")
    with recollect.load(name, profile="exact", kv_memory=512 * 2**20) as loaded:
        yield loaded
        loaded.engine.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_schema_is_kept_to_at_temperature_1(model: Model, seed: int) -> None:
    params = SamplingParams(temperature=1, seed=seed, max_tokens=200, grammar=PERSON)
    reply = model.session("Answer in JSON.").respond(f"Invent person {seed}.", params=params)
    person: dict[str, Any] = json.loads(reply.text)
    assert list(person) == ["name", "age", "hobbies"]
    assert 0 <= person["age"] <= 120
    assert all(len(hobby) <= 20 for hobby in person["hobbies"])
    assert reply.finish_reason == "stop"


def test_log_probabilities_are_of_the_text(model: Model) -> None:
    params = SamplingParams(max_tokens=20, logprobs=3)
    reply = model.session().respond("Name three rivers in Europe.", params=params)
    assert reply.logprobs is not None
    assert b"".join(one.token_bytes for one in reply.logprobs).decode() == reply.text
    for one in reply.logprobs:
        assert one.top[0].token_id == one.token_id  # greedy
        assert one.top[0].logprob == one.logprob <= 0
        assert [top.logprob for top in one.top] == sorted(
            (top.logprob for top in one.top), reverse=True
        )


def test_a_call_is_streamed_answered_and_found_again(model: Model) -> None:
    chat = model.session(tools=[WEATHER], tool_choice="get_weather", params=SamplingParams())
    stream = chat.stream("What is the weather in Paris, in celsius?")
    arguments = "".join(e.text for e in stream.events() if isinstance(e, ArgumentsDelta))
    assert stream.reply is not None
    (call,) = stream.reply.tool_calls
    assert arguments == call.arguments
    assert set(json.loads(arguments)) == {"city", "unit"}
    chat.add({"role": "tool", "content": '{"sky": "sunny"}', "tool_call_id": call.id})
    chat.tools = replace(chat.tools, choice="none")
    short = SamplingParams(max_tokens=12)
    answer = chat.respond(None, params=short)
    assert answer.usage.reason == "new"
    assert answer.usage.reused_tokens >= stream.reply.usage.prompt_tokens
    sent = [*chat.transcript(), {"role": "user", "content": "Thanks."}]
    again = model.session_from(sent, tools=[WEATHER], params=short)  # type: ignore[arg-type]
    assert [node.token_ids for node in again.path()][:-1] == [n.token_ids for n in chat.path()]
    thanks = again.respond(None)
    assert thanks.usage.reason == "new"
    assert thanks.usage.reused_tokens > answer.usage.prompt_tokens


def test_marks_of_calls_are_text(model: Model) -> None:
    text = 'So:\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    special = model.tokenizer.vocabulary.special_token_ids
    assert special.isdisjoint(model.tokenizer.encode(text))
    assert model.tokenizer.eos_token_ids <= special
    pieces = [model.tokenizer.vocabulary.token_bytes[id_] for id_ in model.tokenizer.encode(text)]
    assert b"".join(pieces).decode() == text
