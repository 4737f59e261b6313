"""With `--keep-chats` the chats of clients that send all of it each time are conversations."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from recollect.errors import StoreError
from recollect.journal.journal import Journal
from recollect.server import kept_chats

Json = dict[str, Any]
Chat = Callable[..., list[Json]]
SYSTEM = {"role": "system", "content": "You are careful. " * 10}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


@pytest.fixture
def go_on(post: Callable[..., Json]) -> Callable[..., list[Json]]:
    """Return what sends messages and returns them with the reply, as a client has them then."""

    def go_on(client: httpx.Client, *messages: Json, **more: Any) -> list[Json]:
        body = {"messages": messages, "max_tokens": 6, **more}
        reply = post(client, "/v1/chat/completions", body)["choices"][0]["message"]
        return [*messages, {"role": "assistant", "content": reply["content"]}]

    return go_on


def conversations(client: httpx.Client, **options: Any) -> list[Json]:
    found: list[Json] = client.get("/v1/conversations", **options).json()["data"]
    return found


def said(client: httpx.Client, conversation: str) -> list[str]:
    items = client.get(f"/v1/conversations/{conversation}/items?order=asc").json()["data"]
    return [item["content"][0]["text"] for item in items]


def test_a_chat_that_goes_on_is_one_conversation(
    start: Callable[..., httpx.Client], go_on: Chat, post: Callable[..., Json]
) -> None:
    client = start(keeps_chats=True)
    messages = go_on(client, SYSTEM, user("One"))
    messages = go_on(client, *messages, user("Two"))
    (made,) = conversations(client)
    assert made["turns"] == 2
    assert said(client, made["id"]) == [one["content"] for one in messages]
    # It is gone back to, and what is said there is warm.
    post(client, f"/v1/conversations/{made['id']}/rewind", {"turns": 1})
    body = {"conversation": made["id"], "input": "Another", "max_output_tokens": 4}
    usage = post(client, "/v1/responses", body)["usage"]
    assert usage["recollect"]["computed_tokens"] < 50 < usage["input_tokens"]


def test_without_it_nothing_is_kept(client: httpx.Client, go_on: Chat) -> None:
    go_on(client, user("One"))
    assert conversations(client) == []


def test_edits_and_retries_are_branches(start: Callable[..., httpx.Client], go_on: Chat) -> None:
    client = start(keeps_chats=True)
    messages = go_on(client, SYSTEM, user("One"))
    longer = go_on(client, *messages, user("Two"))
    other = go_on(client, *messages, user("Two, edited"))
    go_on(client, *messages, user("Two"))  # the same again: nothing is new
    go_on(client, *other, user("Three"))
    go_on(client, *longer, user("Three"))
    (made,) = conversations(client)
    tree = client.get(f"/v1/conversations/{made['id']}/tree").json()
    assert len(tree["nodes"]) == 3 + 2 + 2 + 2 + 2
    assert sorted(tree["tips"]) == ["main", "main-2"]
    assert said(client, made["id"])[-2] == "Three"
    assert said(client, f"{made['id']}.main-2")[3] == "Two, edited"


def test_a_checkpoint_stays_where_it_is_when_the_chat_goes_on(
    start: Callable[..., httpx.Client], go_on: Chat, post: Callable[..., Json]
) -> None:
    client = start(keeps_chats=True)
    messages = go_on(client, user("One"))
    (made,) = conversations(client)
    post(client, f"/v1/conversations/{made['id']}/checkpoint", {"name": "a"})
    go_on(client, *messages, user("Two"))
    assert len(said(client, made["id"])) == 4
    post(client, f"/v1/conversations/{made['id']}/rewind", {"checkpoint": "a"})
    assert len(said(client, made["id"])) == 2


def test_chats_that_only_share_instructions_are_two(
    start: Callable[..., httpx.Client], go_on: Chat
) -> None:
    client = start(keeps_chats=True)
    go_on(client, SYSTEM, user("One"))
    go_on(client, SYSTEM, user("Two"))
    assert len(conversations(client)) == 2


def test_several_choices_are_branches(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keeps_chats=True)
    body = {"messages": [user("One")], "max_tokens": 6, "n": 3, "temperature": 1, "seed": 5}
    post(client, "/v1/chat/completions", body)
    (made,) = conversations(client)
    tree = client.get(f"/v1/conversations/{made['id']}/tree").json()
    assert len(tree["nodes"]) == 1 + 3
    assert len(tree["tips"]) == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [user("One")], "max_tokens": 4, "model": "reference"}),
        ("/api/chat", {"messages": [user("One")], "model": "reference", "stream": False}),
    ],
)
def test_every_api_for_chats_is_kept(
    start: Callable[..., httpx.Client], post: Callable[..., Json], path: str, body: Json
) -> None:
    client = start(keeps_chats=True)
    post(client, path, {"options": {"num_predict": 4}, **body} if "api" in path else body)
    (made,) = conversations(client)
    assert said(client, made["id"])[0] == "One"


def test_streams_are_kept_too(start: Callable[..., httpx.Client]) -> None:
    client = start(keeps_chats=True)
    body = {"messages": [user("One")], "max_tokens": 4, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        assert "[DONE]" in "".join(stream.iter_text())
    assert len(conversations(client)) == 1


def test_what_keeps_nothing_by_its_own_word_is_not_kept(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keeps_chats=True)
    post(client, "/v1/responses", {"input": "One", "store": False, "max_output_tokens": 4})
    post(client, "/v1/completions", {"prompt": "One", "max_tokens": 4})
    assert conversations(client) == []


def test_each_key_has_its_own(start: Callable[..., httpx.Client], go_on: Chat) -> None:
    client = start(keeps_chats=True, keys=["one", "two"])
    other = {"Authorization": "Bearer two"}
    messages = go_on(client, user("One"))
    assert conversations(client, headers=other) == []
    client.headers["Authorization"] = other["Authorization"]
    go_on(client, *messages, user("Two"))
    (made,) = conversations(client)
    assert said(client, made["id"])[:3:2] == ["One", "Two"]
    client.headers["Authorization"] = "Bearer one"
    assert [one["turns"] for one in conversations(client)] == [1]


def test_a_chat_goes_on_after_a_restart_and_after_it_was_deleted(
    start: Callable[..., httpx.Client], go_on: Chat, servers: ExitStack
) -> None:
    messages = go_on(start(keeps_chats=True), user("One"))
    servers.close()
    client = start(keeps_chats=True)
    messages = go_on(client, *messages, user("Two"))
    (made,) = conversations(client)
    assert made["turns"] == 2
    client.delete(f"/v1/conversations/{made['id']}")
    messages = go_on(client, *messages, user("Three"))
    (again,) = conversations(client)
    assert again["id"] != made["id"]
    assert said(client, again["id"]) == [one["content"] for one in messages]


def test_the_same_chat_is_kept_again_after_it_was_deleted(
    start: Callable[..., httpx.Client], go_on: Chat
) -> None:
    client = start(keeps_chats=True)
    messages = go_on(client, user("One"))
    (made,) = conversations(client)
    client.delete(f"/v1/conversations/{made['id']}")
    for _ in range(2):
        assert go_on(client, user("One")) == messages
        (again,) = conversations(client)
        assert again["id"] != made["id"]
        assert said(client, again["id"]) == [one["content"] for one in messages]


def test_where_the_journal_cannot_be_written_the_client_has_its_reply(
    start: Callable[..., httpx.Client],
    go_on: Chat,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = start(keeps_chats=True)

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("The disk is full.")

    with monkeypatch.context() as broken:
        broken.setattr(Journal, "begin", fail)
        messages = go_on(client, user("One"))
        assert messages[-1]["content"]
        assert "a chat is not kept: The disk is full." in caplog.text
        assert conversations(client) == []
    messages = go_on(client, *messages, user("Two"))
    (made,) = conversations(client)
    assert said(client, made["id"]) == [one["content"] for one in messages]


def test_what_is_known_has_a_bound(
    start: Callable[..., httpx.Client], go_on: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_chats, "MOST_MESSAGES", 8)
    monkeypatch.setattr(kept_chats, "MOST_BRANCHES", 2)
    client = start(keeps_chats=True)
    first = go_on(client, user("One"))
    for number in range(4):
        go_on(client, user(f"Chat {number}"))
    go_on(client, *first, user("Two"))  # forgotten, so it begins again
    assert len(conversations(client)) == 6
    for number in range(3):
        go_on(client, *first, user(f"Way {number}"))
    trees = [
        client.get(f"/v1/conversations/{one['id']}/tree").json() for one in conversations(client)
    ]
    assert max(len(tree["tips"]) for tree in trees) == 2
    assert len(trees) == 7
