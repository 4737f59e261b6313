"""Anthropic's API: the same replies and the same reuse, in its own words."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Json = dict[str, Any]
PATH = "/v1/messages"
SYSTEM = "You are careful. " * 10


def body_of(*messages: tuple[str, Any], **fields: Any) -> Json:
    said = [{"role": role, "content": content} for role, content in messages]
    return {"messages": said, "max_tokens": 8, "system": SYSTEM, **fields}


def test_a_reply_is_that_of_a_chat_completion_and_shares_its_kv(
    client: httpx.Client, post: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    same = chat(client, ("system", SYSTEM), ("user", "Hello"))
    blocks = [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]
    answer = post(client, PATH, body_of(("user", blocks)))
    assert answer["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
    usage = answer["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert total == same["usage"]["prompt_tokens"]
    assert usage["input_tokens"] == 0
    assert answer["stop_reason"] in {"end_turn", "max_tokens"}


def test_a_stream_says_the_same(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    found = events(client, PATH, body_of(("user", "Hello"), stream=True))
    whole = post(client, PATH, body_of(("user", "Hello")))
    kinds = list(dict.fromkeys(event["type"] for event in found))
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    deltas = [event["delta"]["text"] for event in found if event["type"].endswith("block_delta")]
    assert "".join(deltas) == whole["content"][0]["text"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    first, last = found[0]["message"]["usage"], found[-2]["usage"]
    assert first["input_tokens"] == last["input_tokens"] > whole["usage"]["input_tokens"]
    assert first["cache_read_input_tokens"] == last["cache_read_input_tokens"]


def test_the_stop_sequence_that_ended_a_reply_is_named(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    text = post(client, PATH, body_of(("user", "Hello"), max_tokens=24))["content"][0]["text"]
    stops = {"stop_sequences": ["never said", text[3:5]], "max_tokens": 24}
    whole = post(client, PATH, body_of(("user", "Hello"), **stops))
    assert whole["content"][0]["text"] == text.split(text[3:5])[0]
    last = events(client, PATH, body_of(("user", "Hello"), stream=True, **stops))[-2]["delta"]
    for told in (whole, last):
        assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", text[3:5])


def test_tokens_can_be_counted(client: httpx.Client, post: Callable[..., Json]) -> None:
    body = body_of(("user", "Hello"))
    del body["max_tokens"]
    counted = post(client, f"{PATH}/count_tokens", body)["input_tokens"]
    usage = post(client, PATH, body_of(("user", "Hello")))["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_errors_have_its_shape(client: httpx.Client) -> None:
    wrong: list[Json] = [
        body_of(("user", "x" * 3000)),
        {"messages": []},
        body_of(("user", "a"), temprature=1),
    ]
    for body in wrong:
        response = client.post(PATH, json=body)
        assert response.status_code == 400
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_told_in_the_words_that_claude_code_looks_for(
    client: httpx.Client, stream: bool
) -> None:
    """The expression is Claude Code's own, of 2.1.197: with another answer it cannot compact."""
    said = [{"role": "user", "content": "x" * 3000}]
    body = {"messages": said, "max_tokens": 8, "stream": stream}
    refused = client.post("/v1/messages", json=body)
    message = refused.json()["error"]["message"]
    found = re.search(
        r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", message, re.IGNORECASE
    )
    assert refused.status_code == 400
    assert found is not None
    assert int(found[1]) > 3000
    assert int(found[2]) == 2048
    assert "begin a new conversation" in message, "the remedy"
