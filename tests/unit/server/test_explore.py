"""Several replies from one place of a kept conversation, over HTTP."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.engine.sampling import Generator

Json = dict[str, Any]
PATH = "/v1/conversations"
LONG = "You are careful. " * 20
HOT: Json = {"temperature": 1.5, "max_output_tokens": 6, "seed": 3}


@pytest.fixture
def conversation(client: httpx.Client, post: Callable[..., Json]) -> str:
    """Return the id of a conversation with one turn."""
    made: str = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    post(
        client,
        "/v1/responses",
        {"input": "Hello", "conversation": made, "max_output_tokens": 6},
    )
    return made


def kinds(told: list[Any]) -> list[str]:
    return [event["type"].removeprefix("explore.") for event in told if isinstance(event, dict)]


def of_kind(told: list[Any], kind: str) -> list[Json]:
    return [one for one in told if isinstance(one, dict) and one["type"] == f"explore.{kind}"]


def shape(client: httpx.Client, conversation: str) -> Json:
    """Return which messages and branches a conversation has; what is warm of it changes by itself."""
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    return {"nodes": [one["id"] for one in tree["nodes"]], "tips": tree["tips"]}


def tips(client: httpx.Client, conversation: str) -> set[str]:
    return set(client.get(f"{PATH}/{conversation}/tree").json()["tips"])


def test_a_stream_says_which_branch_each_piece_is_of(
    client: httpx.Client, conversation: str, events: Callable[..., list[Any]]
) -> None:
    before = client.get(f"{PATH}/{conversation}/items").json()["data"]
    body = {"prompts": ["A?", "B?", "C?"], "stream": True, **HOT}
    told = events(client, f"{PATH}/{conversation}/explore", body)
    assert kinds(told)[0] == "started"
    assert kinds(told)[-1] == "completed"
    begun = of_kind(told, "started")[0]["branches"]
    assert [one["index"] for one in begun] == [0, 1, 2]
    assert [one["prompt"] for one in begun] == ["A?", "B?", "C?"]
    ended = {one["index"]: one for one in of_kind(told, "branch_completed")}
    for one in begun:
        index = one["index"]
        text = "".join(e["text"] for e in of_kind(told, "delta") if e["index"] == index)
        assert text == ended[index]["text"]
        assert one["branch"] == ended[index]["branch"]
        there = client.get(f"{PATH}/{ended[index]['conversation']}/items").json()["data"]
        assert there[0]["id"] == ended[index]["item"]
        assert there[0]["content"][0]["text"] == text
        assert there[1]["content"][0]["text"] == one["prompt"]
    usage = of_kind(told, "completed")[0]["usage"]
    assert usage["output_tokens"] == 18
    # All that was said before was there, and what the prompts have in common was computed once.
    assert usage["recollect"]["computed_tokens"] < 3 * len("UA?E\nSassistant\n") + 8
    assert client.get(f"{PATH}/{conversation}/items").json()["data"] == before


@pytest.mark.slow
def test_all_at_once_is_the_same(
    client: httpx.Client, conversation: str, post: Callable[..., Json]
) -> None:
    found = post(client, f"{PATH}/{conversation}/explore", {"prompts": ["A?"] * 3, **HOT})
    texts = [one["text"] for one in found["branches"]]
    assert len(set(texts)) == 3
    again = post(client, f"{PATH}/{conversation}/explore", {"prompts": ["A?"] * 3, **HOT})
    assert [one["text"] for one in again["branches"]] == texts
    assert len(tips(client, conversation)) == 1 + 6
    assert found["usage"]["output_tokens"] == 18


@pytest.mark.slow
def test_branches_say_for_themselves_how_they_are_sampled(
    client: httpx.Client, conversation: str, post: Callable[..., Json]
) -> None:
    branches = [
        {"prompt": "A?", "name": "calm", "temperature": 0, "max_output_tokens": 2},
        {"prompt": "A?", "name": "wild", "seed": 3},
    ]
    body = {"branches": branches, "ignore_eos": True, **HOT}
    found = post(client, f"{PATH}/{conversation}/explore", body)
    calm, wild = found["branches"]
    assert [one["usage"]["output_tokens"] for one in (calm, wild)] == [2, 6]
    assert calm["usage"]["recollect"]["sampling"] is None
    assert wild["usage"]["recollect"]["sampling"] == {"temperature": 1.5, "seed": 3}
    assert tips(client, conversation) == {"main", "calm", "wild"}


@pytest.mark.slow
def test_a_message_is_answered_so_often_as_is_said(
    client: httpx.Client, conversation: str, post: Callable[..., Json]
) -> None:
    items = client.get(f"{PATH}/{conversation}/items").json()["data"]
    asked = next(item["id"] for item in items if item["role"] == "user")
    found = post(client, f"{PATH}/{conversation}/explore", {"n": 4, "item": asked, **HOT})
    assert found["item"] == asked
    nodes = client.get(f"{PATH}/{conversation}/tree").json()["nodes"]
    (parent,) = [one["id"] for one in nodes if one["role"] == "user"]
    assert sum(one["parent_id"] == parent for one in nodes) == 5
    # Not even the last token: the logits after the message are known.
    assert found["usage"]["recollect"]["computed_tokens"] == 0


def test_nothing_is_kept_that_is_not_to_be(
    client: httpx.Client, conversation: str, post: Callable[..., Json]
) -> None:
    before = shape(client, conversation)
    body = {"prompts": ["A?", "B?"], "keep": False, **HOT}
    found = post(client, f"{PATH}/{conversation}/explore", body)
    assert [(one["branch"], one["item"]) for one in found["branches"]] == [(None, None)] * 2
    assert shape(client, conversation) == before


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 400, "Give exactly one of n, prompts and branches"),
        ({"n": 2, "prompts": ["a"]}, 400, "Give exactly one of n, prompts and branches"),
        ({"n": 0}, 400, "n"),
        ({"n": 9}, 400, "n: 9 are too many"),
        # Counted before anything is made: as a list it would be more memory than there is.
        ({"n": 10**15}, 400, "n: 1,000,000,000,000,000 are too many"),
        ({"prompts": ["a"] * 9}, 400, "prompts: 9 are too many"),
        ({"prompts": []}, 400, "prompts"),
        ({"prompts": ["a", "a"], "temperature": 0}, 400, "greedy"),
        ({"prompts": ["a"], "item": "msg_no"}, 404, "msg_no"),
        ({"branches": [{"prompt": "a", "name": "main"}]}, 409, "'main'"),
        ({"branches": [{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x"}]}, 409, "'x'"),
        ({"branches": [{"prompt": "a", "name": "x.y"}]}, 400, "name"),
        ({"prompts": ["a", "b" * 4000]}, 400, "context"),
    ],
)
def test_what_cannot_be_is_refused_whole(
    client: httpx.Client, conversation: str, body: Json, status: int, told: str
) -> None:
    before = shape(client, conversation)
    for stream in (False, True):
        answer = client.post(
            f"{PATH}/{conversation}/explore", json={**HOT, **body, "stream": stream}
        )
        assert answer.status_code == status, answer.text
        assert told in answer.json()["error"]["message"]
    assert shape(client, conversation) == before


@pytest.mark.slow
def test_an_answer_needs_a_message(client: httpx.Client, post: Callable[..., Json]) -> None:
    made = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    answer = client.post(f"{PATH}/{made}/explore", json={"n": 2, **HOT})
    assert answer.status_code == 400
    assert "no message to answer" in answer.json()["error"]["message"]


def test_another_keys_conversation_is_not_there(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keys=["one", "two"])
    made = post(client, PATH, {})["id"]
    other = {"Authorization": "Bearer two"}
    answer = client.post(f"{PATH}/{made}/explore", json={"prompts": ["a"]}, headers=other)
    assert answer.status_code == 404


@pytest.mark.slow
def test_a_client_that_goes_away_ends_all_branches(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., Json],
    post_and_leave: Callable[..., None],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    made: list[Model] = []

    def load(_: str) -> Model:
        made.append(make_model(context_length=100_000, num_blocks=20_000))
        return made[0]

    client = start(load=load)
    conversation = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    body = {"prompts": ["A?", "B?", "C?"], "stream": True, "temperature": 1.0, "ignore_eos": True}
    path = f"{PATH}/{conversation}/explore"
    post_and_leave(client, path, body, lambda: bool(made) and len(made[0].engine.tasks()) == 3)
    until(lambda: not [task for task in made[0].engine.tasks() if not task.idle])
    assert tips(client, conversation) == {"main"}
    assert len(client.get(f"{PATH}/{conversation}/tree").json()["nodes"]) == 1


def test_what_was_completed_when_the_client_goes_away_is_kept(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., Json],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    model = make_model(context_length=100_000, num_blocks=20_000)
    client = start(load=lambda _: model)
    conversation = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    tried = [{"prompt": "A?", "name": "short", "max_output_tokens": 4}, {"prompt": "B?"}]
    body = {"branches": tried, "stream": True, "temperature": 1.0, "ignore_eos": True}
    with client.stream("POST", f"{PATH}/{conversation}/explore", json=body) as response:
        for line in response.iter_lines():
            if line == "event: explore.branch_completed":
                break
    until(lambda: not [task for task in model.engine.tasks() if not task.idle])
    assert tips(client, conversation) == {"main", "short"}
    assert client.get(f"{PATH}/{conversation}.short/items").json()["data"]


def test_the_tools_of_the_last_response_are_offered_again(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    """They are a part of the prompt, which would be read again without them."""
    conversation = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    tool: Json = {"type": "function", "name": "light", "description": "Turns a light on."}
    tool |= {"parameters": {"type": "object", "properties": {}}}
    said: Json = {
        "conversation": conversation,
        "input": "Hello",
        "tools": [tool],
        "tool_choice": "none",
    }
    post(client, "/v1/responses", {**said, "max_output_tokens": 6})
    found = post(client, f"{PATH}/{conversation}/explore", {**HOT, "prompts": ["Why?"]})
    usage = found["usage"]
    assert usage["recollect"]["reason"] == "new"
    assert usage["recollect"]["computed_tokens"] < 40 < usage["input_tokens"]


@pytest.mark.slow
def test_one_branch_that_fails_is_told_and_the_others_go_on(
    client: httpx.Client,
    conversation: str,
    events: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = Generator.generate_next_token

    def fails(self: Generator) -> int | None:
        if self.params.max_tokens == 3:
            raise RuntimeError("injected")
        return choose(self)

    monkeypatch.setattr(Generator, "generate_next_token", fails)
    branches = [{"prompt": "A?"}, {"prompt": "B?", "max_output_tokens": 3}, {"prompt": "C?"}]
    path = f"{PATH}/{conversation}/explore"
    told = events(client, path, {"branches": branches, "stream": True, **HOT})
    (failed,) = of_kind(told, "failed")
    assert failed["index"] == 1
    assert set(failed["error"]) == {"code", "message"}
    assert {one["index"] for one in of_kind(told, "branch_completed")} == {0, 2}
    assert kinds(told)[-1] == "completed"
    assert len(tips(client, conversation)) == 3
    whole = client.post(path, json={"branches": branches, **HOT}).json()
    assert ["error" in one for one in whole["branches"]] == [False, True, False]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "temperature"),
        ({"prompts": ["a", "a"], "temperature": 0}, "temperature"),
        ({"prompts": ["a"], "item": "msg_x"}, "item"),
        ({"prompts": ["a"], "model": "no"}, "model"),
        ({"branches": [{"prompt": "a"}, {"prompt": "b", "name": "main"}]}, "branches.1.name"),
        ({"branches": [{"prompt": "a", "max_output_tokens": 0}]}, "branches.0.max_output_tokens"),
    ],
)
def test_what_is_refused_is_named(
    client: httpx.Client, conversation: str, body: Json, param: str
) -> None:
    answer = client.post(f"{PATH}/{conversation}/explore", json=body)
    assert answer.status_code in (400, 404, 409)
    assert answer.json()["error"]["param"] == param


def test_a_search_for_nothing_is_refused_by_name(client: httpx.Client) -> None:
    answer = client.get("/v1/search", params={"query": '""'})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "query"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/search?query=Hello&after=msg_x", None, "after"),
        (f"{PATH}?after=conv_x", None, "after"),
        ("/v1/kv?after=conv_x", None, "after"),
        (PATH + "/{}/items?after=msg_x", None, "after"),
        (PATH + "/{}/tree?after=msg_x", None, "after"),
        (PATH + "/{}/fork", {"at": "msg_x"}, "at"),
        (PATH + "/{}/fork", {"before": "msg_x"}, "before"),
        (PATH + "/{}/rewind", {"to": "msg_x"}, "to"),
        (PATH + "/{}/rewind", {"checkpoint": "x"}, "checkpoint"),
    ],
)
def test_an_id_that_is_nowhere_is_refused_by_the_name_of_its_parameter(
    client: httpx.Client, conversation: str, path: str, body: Json | None, param: str
) -> None:
    method = "GET" if body is None else "POST"
    answer = client.request(method, path.format(conversation), json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == param


@pytest.mark.slow
def test_a_conversation_that_is_deleted_meanwhile_is_told_to_be(
    client: httpx.Client, conversation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be kept of it, and each branch says why."""
    choose, deleted = Generator.generate_next_token, threading.Event()

    def after_a_while(self: Generator) -> int | None:
        deleted.wait(0.05)  # each token takes so long until then
        return choose(self)

    monkeypatch.setattr(Generator, "generate_next_token", after_a_while)
    body = {"prompts": ["A?", "B?"], **HOT, "max_output_tokens": 200, "ignore_eos": True}
    told = list[Json]()
    path = f"{PATH}/{conversation}/explore"
    with client.stream("POST", path, json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                told.append(json.loads(line.removeprefix("data: ")))
                if told[-1]["type"] == "explore.started":
                    assert client.delete(f"{PATH}/{conversation}").status_code == 200
                    deleted.set()
    failed = of_kind(told, "failed")
    assert {one["index"] for one in failed} == {0, 1}
    for one in failed:
        assert one["error"]["code"] == "not_found"
        assert "has been deleted meanwhile" in one["error"]["message"]


@pytest.mark.slow
def test_two_that_want_one_name_both_keep_their_replies(
    client: httpx.Client, conversation: str
) -> None:
    """Neither request sees the other's branch before its own replies have ended."""
    body = {"branches": [{"prompt": "A?", "name": "same"}], **HOT, "max_output_tokens": 200}
    path = f"{PATH}/{conversation}/explore"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post(path, json=body).json(), range(4)))
    told = [each["branches"][0] for each in answers if "branches" in each]
    names = [one["branch"] for one in told]
    assert len(set(names)) == len(names)
    assert "same" in names
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert {name: tree["tips"][name] for name in names} == {
        one["branch"]: one["item"] for one in told
    }
