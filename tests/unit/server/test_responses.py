"""A response is a node of a kept tree: any earlier one can be gone on from, also after a restart."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.kv.disk import DiskStore

Json = dict[str, Any]
PATH = "/v1/responses"
LONG = "You are careful. " * 10


@pytest.fixture
def respond(post: Callable[..., Json]) -> Callable[..., Json]:
    def respond(client: httpx.Client, text: str | list[Json], **fields: Any) -> Json:
        return post(client, PATH, {"input": text, "max_output_tokens": 8, **fields})

    return respond


def text_of(response: Json) -> str:
    (message,) = response["output"]
    text: str = message["content"][0]["text"]
    return text


def computed(response: Json) -> int:
    tokens: int = response["usage"]["recollect"]["computed_tokens"]
    return tokens


def cached(response: Json) -> int:
    tokens: int = response["usage"]["input_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.slow
def test_a_response_goes_on_from_any_earlier_one(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    first = respond(client, LONG)
    second = respond(client, "Go on", previous_response_id=first["id"])
    branch = respond(client, "Or not", previous_response_id=first["id"])
    third = respond(client, "And now?", previous_response_id=second["id"])
    assert len({one["id"] for one in (first, second, branch, third)}) == 4
    for later in (second, branch, third):
        assert computed(later) < 60 < cached(later)
        assert cached(later) + computed(later) == later["usage"]["input_tokens"]
    assert third["previous_response_id"] == second["id"]


@pytest.mark.slow
def test_it_says_what_a_chat_with_the_same_messages_says(
    client: httpx.Client, respond: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    first = respond(client, "Hello", instructions=LONG)
    second = respond(client, "Go on", instructions=LONG, previous_response_id=first["id"])
    same = chat(
        client,
        ("system", LONG),
        ("user", "Hello"),
        ("assistant", text_of(first)),
        ("user", "Go on"),
    )
    assert text_of(second) == same["choices"][0]["message"]["content"]
    assert second["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_instructions_are_not_inherited(
    client: httpx.Client, respond: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    first = respond(client, "Hello", instructions=LONG)
    second = respond(client, "Go on", previous_response_id=first["id"])
    other = respond(
        client, "Go on", previous_response_id=second["id"], instructions="Be quick. " * 9
    )
    history = [("user", "Hello"), ("assistant", text_of(first)), ("user", "Go on")]
    assert text_of(second) == chat(client, *history)["choices"][0]["message"]["content"]
    history += [("assistant", text_of(second)), ("user", "Go on")]
    same = chat(client, ("system", "Be quick. " * 9), *history)
    assert text_of(other) == same["choices"][0]["message"]["content"]
    assert other["instructions"] == "Be quick. " * 9


@pytest.mark.slow
def test_it_goes_on_after_a_restart(
    start: Callable[..., httpx.Client], servers: ExitStack, respond: Callable[..., Json]
) -> None:
    before = start()
    first = respond(before, LONG)
    second = respond(before, "Go on", previous_response_id=first["id"])
    expected = respond(before, "And?", previous_response_id=second["id"], store=False)
    servers.close()
    after = start()
    again = respond(after, "And?", previous_response_id=second["id"])
    assert text_of(again) == text_of(expected)
    assert after.get(f"{PATH}/{first['id']}").json()["output"] == first["output"]


def test_a_kept_response_is_what_was_answered(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    made = respond(client, "Hello", instructions="Be brief", metadata={"topic": "a"})
    kept = client.get(f"{PATH}/{made['id']}").json()
    for answer in (made, kept):  # an estimate that grows with what was measured
        answer["usage"]["recollect"].pop("time_saved_s")
    assert kept == made
    assert kept["metadata"] == {"topic": "a"}
    items = client.get(f"{PATH}/{made['id']}/input_items").json()["data"]
    assert [item["content"][0]["text"] for item in items] == ["Hello"]


def test_what_is_not_stored_is_not_there(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    first = respond(client, LONG)
    gone = respond(client, "Go on", previous_response_id=first["id"], store=False)
    assert computed(gone) < 60
    assert client.get(f"{PATH}/{gone['id']}").status_code == 404
    lost = client.post(PATH, json={"input": "a", "previous_response_id": gone["id"]})
    assert lost.status_code == 404
    assert lost.json()["error"]["code"] == "previous_response_not_found"


@pytest.mark.slow
def test_a_deleted_response_is_gone_and_the_others_are_not(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    first = respond(client, "Hello")
    second = respond(client, "Go on", previous_response_id=first["id"])
    assert client.delete(f"{PATH}/{first['id']}").json()["deleted"] is True
    assert client.get(f"{PATH}/{first['id']}").status_code == 404
    assert client.delete(f"{PATH}/{first['id']}").status_code == 404
    respond(client, "And?", previous_response_id=second["id"])


@pytest.mark.slow
def test_with_its_last_response_a_conversation_is_deleted(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    first = respond(client, "Hello")
    second = respond(client, "Go on", previous_response_id=first["id"])
    for one in (first, second):
        client.delete(f"{PATH}/{one['id']}")
    assert client.get("/v1/conversations").json()["data"] == []


@pytest.mark.slow
def test_a_history_sent_as_items_is_taken_over_as_it_was_generated(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    first = respond(client, LONG, store=False)
    history = [
        {"role": "user", "content": LONG},
        {
            "type": "message",
            "role": "assistant",
            "id": first["output"][0]["id"],
            "status": "completed",
            "content": first["output"][0]["content"],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "Go on"}]},
    ]
    second = respond(client, history)
    assert computed(second) < 60
    third = respond(client, "And?", previous_response_id=second["id"])
    assert computed(third) < 60


@pytest.mark.slow
def test_a_chat_takes_over_what_a_response_said_and_is_not_kept_with_it(
    client: httpx.Client, respond: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    first = respond(client, LONG)
    history = [("user", LONG), ("assistant", text_of(first)), ("user", "Go on")]
    answer = chat(client, *history)
    assert answer["usage"]["recollect"]["computed_tokens"] < 60
    kept = client.get("/v1/conversations").json()["data"]
    assert [one["turns"] for one in kept] == [1]
    client.delete(f"/v1/conversations/{kept[0]['id']}")
    again = chat(
        client,
        *history,
        ("assistant", answer["choices"][0]["message"]["content"]),
        ("user", "And?"),
    )
    assert again["usage"]["recollect"]["computed_tokens"] < 60
    assert chat(client, *history[:1])["choices"]


def test_a_stream_has_the_events_that_clients_wait_for(
    client: httpx.Client, respond: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    body = {"input": "Hello", "max_output_tokens": 8, "stream": True, "instructions": "Be brief"}
    found = [event for event in events(client, PATH, body) if not str(event).startswith(":")]
    kinds = list(dict.fromkeys(event["type"] for event in found))
    assert kinds[:-1] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    last = found[-1]
    assert last["type"] in {"response.completed", "response.incomplete"}
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    deltas = [event["delta"] for event in found if event["type"].endswith("text.delta")]
    assert "".join(deltas) == text_of(last["response"])
    assert (
        client.get(f"{PATH}/{last['response']['id']}").json()["output"]
        == (last["response"]["output"])
    )
    respond(client, "Go on", previous_response_id=last["response"]["id"])


@pytest.mark.slow
def test_a_full_context_drops_the_oldest_turns_where_that_is_wanted(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    last = respond(client, "x" * 900)
    last = respond(client, "y" * 900, previous_response_id=last["id"])
    body = {"input": "z" * 900, "previous_response_id": last["id"], "max_output_tokens": 8}
    refused = client.post(PATH, json=body)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert respond(client, "z" * 900, previous_response_id=last["id"], truncation="auto")


@pytest.mark.parametrize(
    "fields",
    [
        {"background": True},
        {"previous_response_id": "resp_1", "conversation": "conv_1"},
        {"input": [{"type": "reasoning", "summary": []}]},
        {"input": [{"role": "assistant", "content": "a"}]},
        {"prompt": {"id": "pmpt_1"}},
    ],
)
def test_what_cannot_be_done_is_refused(client: httpx.Client, fields: Json) -> None:
    response = client.post(PATH, json={"input": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def said(role: str, text: str) -> Json:
    return {"role": role, "content": text}


@pytest.mark.slow
def test_a_client_that_sends_the_whole_history_with_instructions_is_recognised(
    start: Callable[..., httpx.Client], respond: Callable[..., Json], post: Callable[..., Json]
) -> None:
    client = start()
    for stored in (True, False):
        fields = {"instructions": f"{LONG}{stored}", "store": stored}
        history = [said("user", "One")]
        first = respond(client, history, **fields)
        read = first["usage"]["input_tokens"] + 8
        for text in ("Two", "Three", "Four"):
            history += [said("assistant", f"{text_of(first)}\n"), said("user", text)]
            first = respond(client, history, **fields)
            assert first["usage"]["input_tokens"] - computed(first) >= read - 1
            assert first["usage"]["recollect"]["reason"] == "new"
            read = first["usage"]["input_tokens"] + 8


def test_instructions_that_changed_are_told(
    client: httpx.Client, respond: Callable[..., Json]
) -> None:
    for day in ("Monday", "Tuesday"):
        first = respond(client, f"What is on {day}?", instructions=f"It is {day}.\n{LONG}")
    own = first["usage"]["recollect"]
    assert own["reason"] == "system_changed"
    assert own["difference"].startswith("Message 1: 'Monday.")


@pytest.mark.slow
def test_the_whole_history_is_recognised_after_a_restart(
    start: Callable[..., httpx.Client],
    servers: ExitStack,
    make_model: Callable[..., Model],
    open_store: Callable[[], DiskStore],
    respond: Callable[..., Json],
) -> None:
    def load(_: str) -> Model:
        return make_model(store=open_store())

    client = start(load=load)
    history = [said("user", "One")]
    first = respond(client, history, instructions=LONG)
    servers.close()
    client = start(load=load)
    history += [said("assistant", text_of(first)), said("user", "Two")]
    second = respond(client, history, instructions=LONG)
    known = first["usage"]["input_tokens"] + 8
    assert second["usage"]["input_tokens"] - computed(second) >= known - 1 - 8, "a block of eight"
    assert second["usage"]["recollect"]["reason"] == "new"
