"""Structured output, log probabilities and calls of tools, in each API's own words."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.kv.disk import DiskStore

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look_up", "description": "Look something up.", "parameters": SCHEMA}
USER = [{"role": "user", "content": "Hello"}]
ASK: Json = {"messages": USER, "max_tokens": 120, "temperature": 0.7, "seed": 5}
TOOLS: Json = {
    **ASK,
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}


def is_right(arguments: str) -> bool:
    value = json.loads(arguments)
    return set(value) == {"n"} and 0 <= value["n"] <= 99


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, TOOLS),
        ("/v1/responses", {"input": "Hello", "tools": [{"type": "function", **FUNCTION}]}),
        (
            "/v1/messages",
            {
                "model": "reference",
                "max_tokens": 9,
                "messages": USER,
                "tools": [{"name": "look_up", "input_schema": SCHEMA}],
            },
        ),
    ],
)
def test_without_llguidance_the_client_is_told_what_to_install(
    path: str, body: Json, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = client.post(path, json=body)
    assert answer.status_code == 400, "agents ask again for minutes where it is 500"
    assert "recollect-llm[grammar]" in answer.json()["error"]["message"]


def test_a_reply_has_the_form_that_is_asked_for(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
    answer = post(client, CHAT, {**ASK, "response_format": form})
    assert is_right(answer["choices"][0]["message"]["content"])
    assert answer["choices"][0]["finish_reason"] == "stop"
    flat = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    body = {"input": "Hello", "text": flat, "max_output_tokens": 120}
    response = post(client, "/v1/responses", body)
    assert is_right(response["output"][0]["content"][0]["text"])
    assert response["text"]["format"]["name"] == "a"


def test_a_wrong_schema_is_refused(client: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    assert client.post(CHAT, json={**ASK, "response_format": form}).status_code == 400
    for more in (
        {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
        {"top_logprobs": 2},
    ):
        assert client.post(CHAT, json={**ASK, **more}).status_code == 400, more


def test_log_probabilities_are_those_of_the_text(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    body = {**ASK, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    choice = post(client, CHAT, body)["choices"][0]
    tokens = choice["logprobs"]["content"]
    said = bytes(byte for token in tokens for byte in token["bytes"])
    whole, told = said.decode("utf-8", "replace"), choice["message"]["content"]
    assert told == whole[:-3] + whole[-3:].rstrip(
        "\ufffd"
    )  # it is cut, perhaps inside of a character
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
    chunks = events(client, CHAT, {**body, "stream": True})[:-1]
    streamed = [
        token
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == tokens


def test_a_call_is_told_whole_and_as_it_is_written(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    choice = post(client, CHAT, TOOLS)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["function"]["name"] == "look_up"
    assert is_right(call["function"]["arguments"])
    chunks = events(client, CHAT, {**TOOLS, "stream": True})[:-1]
    deltas = [
        delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert deltas[0]["function"]["name"] == "look_up"
    assert deltas[0]["id"]
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert arguments == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.slow
def test_a_call_that_is_sent_back_is_not_read_again(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    said = post(client, CHAT, TOOLS)["choices"][0]["message"]
    said.pop("refusal")
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Nothing."}
    again = post(client, CHAT, {**TOOLS, "messages": [*USER, said, result]})
    assert again["usage"]["recollect"]["computed_tokens"] < 80
    other = {**TOOLS, "tools": [{"type": "function", "function": {**FUNCTION, "name": "find"}}]}
    own = post(client, CHAT, other)["usage"]["recollect"]
    assert own["reason"] == "tools_changed"
    assert "look_up" in own["difference"]


@pytest.mark.slow
def test_responses_call_and_go_on_with_what_came_back(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    body: Json = {
        "input": "Hello",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "look_up"},
        "max_output_tokens": 120,
        "temperature": 0.7,
        "seed": 5,
    }
    first = post(client, "/v1/responses", body)
    (call,) = first["output"]
    assert call["type"] == "function_call"
    assert is_right(call["arguments"])
    assert client.get(f"/v1/responses/{first['id']}").json()["output"] == first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Nothing."}
    later = post(
        client, "/v1/responses", {**body, "input": [result], "previous_response_id": first["id"]}
    )
    assert later["usage"]["recollect"]["computed_tokens"] < 80
    history = [{"role": "user", "content": "Hello"}, call, result]
    same = post(client, "/v1/responses", {**body, "input": history})
    assert same["usage"]["input_tokens"] == later["usage"]["input_tokens"]
    assert same["usage"]["recollect"]["computed_tokens"] < 80
    items = client.get(f"/v1/responses/{same['id']}/input_items").json()["data"]
    assert [item["type"] for item in items] == ["function_call_output", "function_call", "message"]
    found = events(client, "/v1/responses", {**body, "stream": True})
    added = next(event for event in found if event["type"] == "response.output_item.added")
    deltas = [event["delta"] for event in found if event["type"].endswith("arguments.delta")]
    last = found[-1]["response"]["output"]
    assert added["item"]["name"] == "look_up"
    assert "".join(deltas) == last[0]["arguments"] == call["arguments"]
    assert added["item"]["id"] == last[0]["id"]


@pytest.mark.slow
def test_anthropics_clients_call_too(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    tool = {"name": "look_up", "description": "Look it up.", "input_schema": SCHEMA}
    body: Json = {
        "messages": USER,
        "max_tokens": 120,
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    answer = post(client, "/v1/messages", body)
    (block,) = answer["content"]
    assert answer["stop_reason"] == "tool_use"
    assert is_right(json.dumps(block["input"]))
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "Nothing."}
    history = [
        *USER,
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    later = post(client, "/v1/messages", {**body, "messages": history})
    assert later["usage"]["input_tokens"] < 100 < later["usage"]["cache_read_input_tokens"]
    found = events(client, "/v1/messages", {**body, "stream": True})
    begun = next(event for event in found if event["type"] == "content_block_start")
    assert begun["content_block"]["type"] == "tool_use"
    parts = [
        event["delta"]["partial_json"] for event in found if event["type"] == "content_block_delta"
    ]
    assert json.loads("".join(parts)) == block["input"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    body["tool_choice"] = {"type": "none"}
    assert post(client, "/v1/messages", body)["content"][0]["type"] == "text"


@pytest.mark.parametrize("logprobs", [0, 3])
def test_completions_tell_log_probabilities(
    client: httpx.Client, post: Callable[..., Json], logprobs: int
) -> None:
    body = {"prompt": "Hello", "max_tokens": 6, "logprobs": logprobs}
    choice = post(client, "/v1/completions", body)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 6
    tops = choice["logprobs"]["top_logprobs"]
    # By their texts, of which bytes that are no character have the same.
    assert all(len(top) <= logprobs and bool(top) == bool(logprobs) for top in tops)


@pytest.mark.slow
def test_after_a_restart_a_client_with_tools_waits_for_no_more_than_one_without(
    start: Callable[..., httpx.Client],
    servers: ExitStack,
    make_model: Callable[..., Model],
    open_store: Callable[[], DiskStore],
    post: Callable[..., Json],
) -> None:
    """No table and no grammar is made for its request, and no token computed but its new ones."""
    models: list[Model] = []

    def load(_: str) -> Model:
        models.append(make_model(store=open_store(), context_length=16_384, num_blocks=4_096))
        return models[-1]

    def tool(number: int) -> Json:
        fields = {"path": {"type": "string"}, "count": {"type": "integer"}}
        parameters = {"type": "object", "properties": fields, "required": ["path"]}
        return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}

    def ask(client: httpx.Client, text: str, **offered: Any) -> Json:
        said = [{"role": "user", "content": f"With {[*offered]}: {text}"}]
        answer = post(client, CHAT, {"messages": said, "max_tokens": 8, **offered})
        own: Json = answer["usage"]["recollect"]
        return own

    offered = {"tools": [tool(number) for number in range(10)]}
    client = start(load=load)
    for fields in (offered, {}):
        ask(client, "Hello", **fields)
    servers.close()
    client = start(load=load)
    grammars = models[-1].grammars
    grammars.join()
    made = grammars.made
    assert made == 2, "the table, and the grammar of the tools"
    with_tools, without = ask(client, "Hi", **offered), ask(client, "Hi")
    assert grammars.made == made
    assert with_tools["computed_tokens"] <= without["computed_tokens"] + 8, "but for a block"
    assert (with_tools["reason"], without["reason"]) == ("new", "new")


@pytest.mark.few(1)
@pytest.mark.parametrize("tokens", [8, 20, 50])
def test_a_reply_that_is_cut_in_a_call_says_so_where_its_text_is_empty(
    tokens: int, client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    """Before a call has its name there is nothing to tell of it, and an empty text alone puzzles."""
    answer = post(client, CHAT, {**TOOLS, "max_tokens": tokens})
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["content"]
    assert answer["usage"]["recollect"]["ended"] == "call"
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = events(client, CHAT, {**TOOLS, "max_tokens": tokens, **streaming})[:-1]
    assert last["usage"]["recollect"]["ended"] == "call"
    body: Json = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
    body |= {"input": "Hello", "max_output_tokens": tokens, "temperature": 0.7, "seed": 5}
    response = post(client, "/v1/responses", body)
    assert response["usage"]["recollect"]["ended"] == "call"
    kept = client.get(f"/v1/responses/{response['id']}").json()
    assert kept["usage"]["recollect"]["ended"] == "call"
    whole = post(client, CHAT, {**TOOLS, "max_tokens": 500})
    assert whole["usage"]["recollect"]["ended"] is None
