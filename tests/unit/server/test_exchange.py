"""Conversations as files, names of branches, and what else goes on without a new question."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

Json = dict[str, Any]
PATH = "/v1/conversations"


@pytest.fixture
def say(post: Callable[..., Json]) -> Callable[..., Json]:
    def say(client: httpx.Client, conversation: str, text: Any, **fields: Any) -> Json:
        body = {"input": text, "conversation": conversation, "max_output_tokens": 6, **fields}
        return post(client, "/v1/responses", body)

    return say


@pytest.fixture
def told(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> tuple[str, Json]:
    """Return a conversation of two questions, and its tree."""
    conversation = post(client, PATH, {})["id"]
    say(client, conversation, "One")
    say(client, conversation, "Two")
    return conversation, tree(client, conversation)


def tree(client: httpx.Client, conversation: str) -> Json:
    found: Json = client.get(f"{PATH}/{conversation}/tree").json()
    return found


def said(found: Json) -> list[tuple[str, str | None, str]]:
    """Return of each message its role, its text, and that of what it follows."""
    texts = {node["id"]: node["items"][0]["content"][0]["text"] for node in found["nodes"]}
    return [
        (node["role"], texts[node["id"]], texts.get(node["parent_id"], ""))
        for node in found["nodes"]
    ]


def test_a_file_brings_the_whole_tree_elsewhere(
    client: httpx.Client, post: Callable[..., Json], told: tuple[str, Json]
) -> None:
    conversation, before = told
    post(client, f"{PATH}/{conversation}/fork", {"at": before["nodes"][1]["id"], "name": "other"})
    file = client.get(f"{PATH}/{conversation}/export").json()
    made = [post(client, f"{PATH}/import", {"file": file}) for _ in range(2)]
    assert len({conversation, *(one["id"] for one in made)}) == 3
    assert made[1]["name"] != made[0]["name"]
    found = tree(client, made[0]["id"])
    assert said(found) == said(before)
    assert list(found["tips"]) == ["main", "other"]
    usages = [[node["usage"] for node in one["nodes"]] for one in (found, before)]
    assert usages[0] == usages[1]


def test_a_file_that_is_no_conversation_is_refused(client: httpx.Client) -> None:
    refused = client.post(f"{PATH}/import", json={"file": {"format": "other"}})
    assert refused.status_code == 400
    assert client.get(PATH).json()["data"] == []


def test_what_a_key_imports_is_its_own(start: Callable[..., httpx.Client]) -> None:
    client = start(keys=["one", "two"])
    made = client.post(PATH, json={}).json()["id"]
    file = client.get(f"{PATH}/{made}/export").json()
    theirs = {"Authorization": "Bearer two"}
    answer = client.post(f"{PATH}/import", json={"file": file}, headers=theirs)
    assert answer.status_code == 200, answer.text
    again = answer.json()["id"]
    assert client.get(f"{PATH}/{again}").status_code == 404
    assert client.get(f"{PATH}/{again}", headers=theirs).status_code == 200
    assert client.get(f"{PATH}/{made}/export", headers=theirs).status_code == 404


@pytest.mark.slow
def test_a_branch_gets_another_name_and_goes_on(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json], told: Any
) -> None:
    conversation, before = told
    at = before["nodes"][1]["id"]
    for name in ("a", "b"):
        post(client, f"{PATH}/{conversation}/fork", {"at": at, "name": name})
    standing = post(client, f"{PATH}/{conversation}/branches/a", {"name": "c"})
    assert (standing["id"], standing["tip"]) == (f"{conversation}.c", at)
    say(client, f"{conversation}.c", "Three")
    assert set(tree(client, conversation)["tips"]) == {"main", "b", "c"}
    for taken in ("b", "main"):
        refused = client.post(f"{PATH}/{conversation}/branches/c", json={"name": taken})
        assert refused.status_code == 409


@pytest.mark.slow
def test_a_branch_that_is_forgotten_leaves_what_was_said(
    client: httpx.Client, post: Callable[..., Json], told: Any
) -> None:
    conversation, before = told
    post(client, f"{PATH}/{conversation}/fork", {"name": "a"})
    assert client.delete(f"{PATH}/{conversation}/branches/a").json() == {
        "id": conversation,
        "object": "conversation.branch.deleted",
        "branch": "a",
        "deleted": True,
    }
    assert client.delete(f"{PATH}/{conversation}/branches/a").status_code == 404
    assert client.delete(f"{PATH}/{conversation}/branches/main").status_code == 400
    assert tree(client, conversation)["nodes"] == before["nodes"]


@pytest.mark.slow
def test_a_fork_before_a_question_says_something_else_there(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json], told: Any
) -> None:
    conversation, before = told
    second = next(node for node in before["nodes"] if node["items"][0].get("role") == "user")
    branch = post(client, f"{PATH}/{conversation}/fork", {"before": second["id"], "name": "e"})
    assert branch["tip"] is None
    say(client, branch["id"], "Uno")
    roots = [node for node in tree(client, conversation)["nodes"] if node["parent_id"] is None]
    assert [node["items"][0]["content"][0]["text"] for node in roots] == ["One", "Uno"]
    both = {"at": second["id"], "before": second["id"]}
    assert client.post(f"{PATH}/{conversation}/fork", json=both).status_code == 400


@pytest.mark.slow
def test_without_input_a_question_is_answered_once_more(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json], told: Any
) -> None:
    conversation, before = told
    question = before["nodes"][2]["id"]
    branch = post(client, f"{PATH}/{conversation}/fork", {"at": question, "name": "again"})["id"]
    reply = say(client, branch, [], temperature=1.5, seed=7)
    found = tree(client, conversation)
    answers = [node for node in found["nodes"] if node["parent_id"] == question]
    assert len(answers) == 2
    assert found["tips"]["again"] == answers[1]["id"]
    assert reply["usage"]["recollect"]["computed_tokens"] < 20


@pytest.mark.slow
def test_without_input_a_reply_that_was_cut_goes_on(
    client: httpx.Client, say: Callable[..., Json], told: Any
) -> None:
    conversation, before = told
    cut = before["nodes"][-1]
    assert cut["finish_reason"] == "length"
    more = say(client, conversation, [])
    found = tree(client, conversation)
    longer = next(node for node in found["nodes"] if node["id"] == found["tips"]["main"])
    text = cut["items"][0]["content"][0]["text"]
    assert longer["items"][0]["content"][0]["text"].startswith(text)
    assert len(longer["items"][0]["content"][0]["text"]) > len(text)
    assert more["output"][0]["content"][0]["text"]


def test_without_input_there_has_to_be_something_to_answer(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    assert client.post("/v1/responses", json={"input": []}).status_code == 400
    empty = post(client, PATH, {})["id"]
    refused = client.post("/v1/responses", json={"input": [], "conversation": empty})
    assert refused.status_code == 400


@pytest.mark.slow
def test_the_tree_tells_what_each_reply_cost(told: tuple[str, Json]) -> None:
    _, found = told
    usages = [node["usage"] for node in found["nodes"] if node["role"] == "assistant"]
    assert all(
        one["reused_tokens"] + one["computed_tokens"] == one["prompt_tokens"] for one in usages
    )
    assert usages[1]["reused_tokens"] > 0
    assert [node["usage"] for node in found["nodes"] if node["role"] == "user"] == [None, None]
