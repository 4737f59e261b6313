"""Deleting an item moves a branch to a path without it, and takes nothing from anybody else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect.journal.journal import JOURNAL_NAME, Journal

Json = dict[str, Any]
Post = Callable[..., Json]
PATH = "/v1/conversations"


@pytest.fixture
def conversation(client: httpx.Client, post: Post) -> str:
    """Return a conversation in which One, Two and Three were said and answered."""
    made: str = post(client, PATH, {"metadata": {"topic": "boats"}})["id"]
    for text in ("One", "Two", "Three"):
        say(post, client, made, text)
    return made


def say(post: Post, client: httpx.Client, conversation: str, text: str, **fields: Any) -> Json:
    body = {"input": text, "conversation": conversation, "max_output_tokens": 6, **fields}
    return post(client, "/v1/responses", body)


def items(client: httpx.Client, conversation: str) -> list[Json]:
    found = client.get(f"{PATH}/{conversation}/items", params={"order": "asc", "limit": 100})
    data: list[Json] = found.json()["data"]
    return data


def delete(client: httpx.Client, conversation: str, item: str) -> httpx.Response:
    return client.delete(f"{PATH}/{conversation}/items/{item}")


def texts(found: list[Json]) -> list[str]:
    return [one["content"][0]["text"] for one in found]


@pytest.mark.few(1)
@pytest.mark.parametrize("which", range(6))
def test_the_others_stay_with_their_ids(
    client: httpx.Client, conversation: str, which: int
) -> None:
    before = items(client, conversation)
    gone = delete(client, conversation, before[which]["id"])
    assert gone.status_code == 200
    assert gone.json() == client.get(f"{PATH}/{conversation}").json()
    assert gone.json()["metadata"] == {"topic": "boats"}
    assert items(client, conversation) == before[:which] + before[which + 1 :]
    assert delete(client, conversation, before[which]["id"]).status_code == 404


@pytest.mark.slow
def test_the_official_client_deletes_one_after_the_other(
    client: httpx.Client, conversation: str
) -> None:
    """By the ids of one list, as whoever trims a conversation does."""
    import openai  # takes most of a second, which no other test should pay

    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official:
        listed = list(official.conversations.items.list(conversation, order="asc"))
        for item in listed[:4]:
            assert item.id is not None
            left = official.conversations.items.delete(item.id, conversation_id=conversation)
            assert (left.id, left.object) == (conversation, "conversation")
        kept = list(official.conversations.items.list(conversation, order="asc"))
        assert kept == listed[4:]
        with pytest.raises(openai.NotFoundError):
            official.conversations.items.delete("msg_other", conversation_id=conversation)


@pytest.mark.slow
def test_replies_keep_the_tokens_that_they_were_generated_as(
    client: httpx.Client, conversation: str, post: Post, tmp_path: Path
) -> None:
    def replies() -> list[Any]:
        with Journal.open(tmp_path / "home" / JOURNAL_NAME) as journal:
            stored = journal.load(journal.conversations()[0].name)
        path = stored.path(stored.tips["main"])
        return [(one.content, one.token_ids, one.fingerprint) for one in path[1::2]]

    before, (question, *_) = replies(), items(client, conversation)
    assert all(ids for _, ids, _ in before)
    delete(client, conversation, items(client, conversation)[1]["id"])
    delete(client, conversation, question["id"])
    assert replies() == before[1:]
    first, second = (
        say(post, client, conversation, text)["usage"]["recollect"] for text in ("Go on", "And on")
    )
    assert (first["reason"], second["reason"]) == ("message_changed", "new")
    assert first["difference"].startswith("Message 1: 'One' became 'Two'")
    assert second["computed_tokens"] < 20
    post(client, f"{PATH}/{conversation}/rewind", {"turns": 2})
    third = say(post, client, conversation, "Or so")["usage"]["recollect"]
    assert (third["reason"], third["computed_tokens"] < 20) == ("new", True), "it was read by now"
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert len({node["id"] for node in tree["nodes"]}) == len(tree["nodes"]) == 6 + 4 + 4 + 4 + 2


@pytest.mark.slow
def test_branches_checkpoints_and_responses_have_what_they_had(
    client: httpx.Client, conversation: str, post: Post
) -> None:
    before = items(client, conversation)
    last = say(post, client, conversation, "Four")
    fork = post(client, f"{PATH}/{conversation}/fork", {"name": "idea"})["id"]
    post(client, f"{PATH}/{conversation}/checkpoint", {"name": "safe"})
    whole, asked = items(client, fork), client.get(f"/v1/responses/{last['id']}/input_items").json()
    delete(client, conversation, before[2]["id"])
    assert items(client, fork) == whole
    assert client.get(f"/v1/responses/{last['id']}/input_items").json() == asked
    delete(client, fork, before[0]["id"])
    assert items(client, fork) == whole[1:]
    assert items(client, conversation) == whole[:2] + whole[3:]
    post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
    assert items(client, conversation) == whole


@pytest.mark.slow
def test_an_item_is_found_by_its_id_on_whatever_path_it_is(
    client: httpx.Client, conversation: str, post: Post
) -> None:
    before = items(client, conversation)
    delete(client, conversation, before[0]["id"])
    address = f"{PATH}/{conversation}"
    assert client.get(f"{address}/items/{before[3]['id']}").json() == before[3]
    assert client.get(f"{address}/items/{before[0]['id']}").json() == before[0]
    back = post(client, f"{address}/rewind", {"to": before[3]["id"]})
    assert back["tip"] == before[3]["id"]
    assert items(client, conversation) == before[1:4], "not the path where the first still is"
    tree = client.get(f"{address}/tree").json()
    post(client, f"{address}/rewind", {"to": tree["tips"]["main"]})
    assert items(client, conversation) == before[1:4]


@pytest.mark.slow
def test_what_is_on_another_branch_or_in_another_conversation_is_not_found(
    client: httpx.Client, conversation: str, post: Post
) -> None:
    before = items(client, conversation)
    post(client, f"{PATH}/{conversation}/rewind", {"turns": 1})
    assert delete(client, conversation, before[-1]["id"]).status_code == 404
    other = post(client, PATH, {})["id"]
    for item in (before[0]["id"], "msg_1", "resp_1"):
        assert delete(client, other, item).status_code == 404
    assert delete(client, "conv_other", before[0]["id"]).status_code == 404
    assert items(client, conversation) == before[:4]


@pytest.mark.slow
def test_instructions_are_an_item_and_their_request_still_replaces_them(
    client: httpx.Client, post: Post
) -> None:
    conversation = post(client, PATH, {})["id"]
    for text in ("One", "Two"):
        say(post, client, conversation, text, instructions="Be brief.")
    first = items(client, conversation)
    assert texts(first)[0] == "Be brief."
    delete(client, conversation, first[1]["id"])
    say(post, client, conversation, "Three")
    assert "Be brief." not in texts(items(client, conversation)), "they are not inherited"
    say(post, client, conversation, "Four", instructions="Be kind.")
    kind = items(client, conversation)
    assert texts(kind)[0] == "Be kind."
    delete(client, conversation, kind[0]["id"])
    assert items(client, conversation) == kind[1:]
    say(post, client, conversation, "Five")
    assert texts(items(client, conversation))[:-2] == texts(kind)[1:], "no message went with them"


@pytest.mark.slow
def test_a_call_is_deleted_with_its_reply_where_it_is_all_of_it(
    client: httpx.Client, post: Post
) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "tide", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "low"}
    said = {"role": "assistant", "content": "Let me see."}
    question = {"role": "user", "content": "How is the tide?"}
    several = post(client, PATH, {"items": [question, said, call, output]})["id"]
    shown = items(client, several)
    assert [item["type"] for item in shown[1:]] == [
        "message",
        "function_call",
        "function_call_output",
    ]
    for item in shown[1:3]:
        refused = delete(client, several, item["id"])
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "item_not_separable"
    delete(client, several, shown[3]["id"])
    assert items(client, several) == shown[:3]
    alone = post(client, PATH, {"items": [question, call, output]})["id"]
    shown = items(client, alone)
    delete(client, alone, shown[1]["id"])
    assert items(client, alone) == [shown[0], shown[2]]
    body = {"input": "Go on", "conversation": alone, "max_output_tokens": 4}
    assert client.post("/v1/responses", json=body).status_code < 500
