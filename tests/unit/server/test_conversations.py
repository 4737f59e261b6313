"""Kept conversations over HTTP: items, rewind, fork, checkpoint, tree."""

import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from recollect.conversation.prompt import PromptEncoder
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, NewNode
from recollect.text.tokenizer import Shown

Json = dict[str, Any]
PATH = "/v1/conversations"
LONG = "You are careful. " * 10


@pytest.fixture
def say(post: Callable[..., Json]) -> Callable[..., Json]:
    def say(client: httpx.Client, conversation: str, text: str) -> Json:
        body = {"input": text, "conversation": conversation, "max_output_tokens": 6}
        return post(client, "/v1/responses", body)

    return say


def texts(client: httpx.Client, conversation: str) -> list[str]:
    items = client.get(f"{PATH}/{conversation}/items", params={"order": "asc"}).json()["data"]
    return [item["content"][0]["text"] for item in items if item["role"] != "assistant"]


def computed(response: Json) -> int:
    tokens: int = response["usage"]["recollect"]["computed_tokens"]
    return tokens


@pytest.mark.slow
def test_a_conversation_remembers_what_was_said_in_it(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    items = [{"type": "message", "role": "system", "content": LONG}]
    made = post(client, PATH, {"items": items, "metadata": {"topic": "a"}})
    assert made["object"] == "conversation"
    assert made["metadata"] == {"topic": "a"}
    first = say(client, made["id"], "Hello")
    second = say(client, made["id"], "Go on")
    assert computed(second) < 50 < first["usage"]["input_tokens"]
    assert texts(client, made["id"]) == [LONG, "Hello", "Go on"]
    assert client.get(f"{PATH}/{made['id']}").json() == made


@pytest.mark.slow
def test_rewind_goes_back_and_keeps_what_was_said_after(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    first = say(client, conversation, LONG)
    say(client, conversation, "Two")
    third = say(client, conversation, "Three")
    back = post(client, f"{PATH}/{conversation}/rewind", {"turns": 2})
    assert back["turns"] == 1
    assert texts(client, conversation) == [LONG]
    other = say(client, conversation, "Another two")
    assert computed(other) < 50
    post(client, f"{PATH}/{conversation}/rewind", {"to": third["id"]})
    assert texts(client, conversation) == [LONG, "Two", "Three"]
    item = first["output"][0]["id"]
    post(client, f"{PATH}/{conversation}/rewind", {"to": item})
    assert texts(client, conversation) == [LONG]


@pytest.mark.slow
def test_a_fork_has_an_id_of_its_own_and_shares_the_beginning(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    first = say(client, conversation, LONG)
    say(client, conversation, "Two")
    fork = post(client, f"{PATH}/{conversation}/fork", {"at": first["id"], "name": "idea"})
    assert computed(say(client, fork["id"], "Or so")) < 50
    assert texts(client, fork["id"]) == [LONG, "Or so"]
    assert texts(client, conversation) == [LONG, "Two"]
    again = client.post(f"{PATH}/{conversation}/fork", json={"name": "idea"})
    assert again.status_code == 409
    assert post(client, f"{PATH}/{conversation}/fork", {})["branch"].startswith("fork-")


@pytest.mark.slow
def test_a_checkpoint_is_a_place_to_come_back_to(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    say(client, conversation, "One")
    post(client, f"{PATH}/{conversation}/checkpoint", {"name": "safe"})
    say(client, conversation, "Two")
    back = post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
    assert back["turns"] == 1
    assert texts(client, conversation) == ["One"]
    missing = client.post(f"{PATH}/{conversation}/rewind", json={"checkpoint": "other"})
    assert missing.status_code == 404


@pytest.mark.slow
def test_the_tree_shows_all_branches(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    first = say(client, conversation, "One")
    say(client, conversation, "Two")
    post(client, f"{PATH}/{conversation}/rewind", {"to": first["id"]})
    last = say(client, conversation, "Other two")
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert len(tree["nodes"]) == 6
    by_id = {node["id"]: node for node in tree["nodes"]}
    assert len(by_id) == 6
    assert by_id[tree["tips"]["main"]]["response_id"] == last["id"]
    one = next(node for node in tree["nodes"] if node["response_id"] == first["id"])
    children = [node for node in tree["nodes"] if node["parent_id"] == one["id"]]
    assert [node["items"][0]["content"][0]["text"] for node in children] == ["Two", "Other two"]


def test_items_come_in_pages(client: httpx.Client, post: Callable[..., Json]) -> None:
    items = [{"role": "user", "content": f"{n}"} for n in range(5)]
    conversation = post(client, PATH, {})["id"]
    added = post(client, f"{PATH}/{conversation}/items", {"items": items})["data"]
    address = f"{PATH}/{conversation}/items"
    page = client.get(address, params={"limit": 2, "order": "asc"}).json()
    assert [item["id"] for item in page["data"]] == [item["id"] for item in added[:2]]
    assert page["has_more"] is True
    rest = client.get(address, params={"order": "asc", "after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "3", "4"]
    newest = client.get(address).json()["data"][0]
    assert newest["content"][0]["text"] == "4"
    assert client.get(f"{address}/{newest['id']}").json() == newest


@pytest.mark.slow
def test_a_conversation_can_be_deleted(
    client: httpx.Client, post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    response = say(client, conversation, "One")
    assert client.delete(f"{PATH}/{conversation}").json()["deleted"] is True
    for address in (f"{PATH}/{conversation}", f"/v1/responses/{response['id']}"):
        assert client.get(address).status_code == 404


def test_a_list_shows_those_that_responses_began_too(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    made = post(client, PATH, {"metadata": {"a": "b"}})
    post(client, "/v1/responses", {"input": "Hello", "max_output_tokens": 2})
    listed = client.get(PATH).json()["data"]
    assert [one["turns"] for one in listed] == [1, 0]
    assert listed[1]["id"] == made["id"]
    assert texts(client, listed[0]["id"]) == ["Hello"]
    changed = post(client, f"{PATH}/{made['id']}", {"metadata": {"c": "d"}})
    assert changed["metadata"] == {"c": "d"}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("rewind", {}),
        ("rewind", {"turns": 1, "to": "a"}),
        ("rewind", {"turns": 3}),
        ("fork", {"name": "a/b"}),
        ("checkpoint", {"name": ""}),
        ("items", {"items": []}),
    ],
)
def test_what_makes_no_sense_is_refused(
    client: httpx.Client, post: Callable[..., Json], path: str, body: Json
) -> None:
    conversation = post(client, PATH, {})["id"]
    assert client.post(f"{PATH}/{conversation}/{path}", json=body).status_code == 400


@pytest.mark.few(1)
@pytest.mark.parametrize("by", ["conversation", "previous_response_id"])
def test_an_input_whose_reply_was_cut_off_is_not_said_twice(
    start: Callable[..., httpx.Client],
    servers: ExitStack,
    post: Callable[..., Json],
    say: Callable[..., Json],
    tmp_path: Path,
    by: str,
) -> None:
    client = start()
    conversation = post(client, PATH, {})["id"]
    first = say(client, conversation, "One")
    servers.close()
    with Journal.open(tmp_path / "home" / JOURNAL_NAME) as journal:
        label = journal.find_label(conversation)
        assert label is not None
        stored = journal.load(label.conversation_id)
        # What a server that is killed during the reply leaves behind.
        question = NewNode(role="user", content="Two")
        journal.append(stored.id, stored.tips["main"], [question], tip="main")
        where = {"conversation": conversation} if by == "conversation" else {by: first["id"]}
        post(start(), "/v1/responses", {"input": "Two", "max_output_tokens": 4, **where})
        said = [node.content for node in journal.load(stored.id).nodes if node.role == "user"]
    assert said == ["One", "Two"]


@pytest.mark.slow
def test_messages_are_found_in_all_conversations_of_a_key_alone(
    start: Callable[..., httpx.Client], post: Callable[..., Json], say: Callable[..., Json]
) -> None:
    client = start(keys=["one", "two"])
    first = post(client, PATH, {"items": [{"role": "user", "content": "The Oak of one"}]})["id"]
    second = post(client, PATH, {})["id"]
    reply = say(client, second, "where is the oak")
    fork = post(client, f"{PATH}/{second}/fork", {"at": reply["id"], "name": "idea"})["id"]
    say(client, fork, "another 橡树 by an oak")
    post(client, f"{PATH}/{fork}/checkpoint", {"name": "a"})
    found = client.get("/v1/search", params={"query": "oak user", "limit": 1}).json()
    assert found["data"] == []
    found = client.get("/v1/search", params={"query": "OAK"}).json()
    asked = [hit for hit in found["data"] if hit["role"] == "user"]
    assert [(hit["conversation"], hit["branch"], hit["snippet"]) for hit in asked] == [
        (second, "idea", "another 橡树 by an oak"),
        (second, "main", "where is the oak"),
        (first, "main", "The Oak of one"),
    ]
    assert {hit["object"] for hit in asked} == {"search.hit"}
    for hit in asked:
        item = client.get(f"{PATH}/{hit['conversation']}/items/{hit['item']}").json()
        assert item["content"][0]["text"] == hit["snippet"]
    assert client.get("/v1/search", params={"query": "橡树"}).json()["data"] == asked[:1]
    reply_text = reply["output"][0]["content"][0]["text"]
    (hit,) = client.get("/v1/search", params={"query": f'"{reply_text.strip()}"'}).json()["data"]
    assert (hit["role"], hit["item"]) == ("assistant", reply["output"][0]["id"])
    after = client.get("/v1/search", params={"query": "oak", "after": hit["item"]}).json()["data"]
    assert [one["snippet"] for one in after] == ["where is the oak", "The Oak of one"]
    other = {"Authorization": "Bearer two"}
    assert client.get("/v1/search", params={"query": "oak"}, headers=other).json()["data"] == []
    lost = client.get("/v1/search", params={"query": "oak", "after": hit["item"]}, headers=other)
    assert lost.status_code == 404


@pytest.mark.few(3)
@pytest.mark.parametrize("query", ['"', "AND OR (", "*", "a:b", "\x00", "NEAR(", "'", "a" * 1000])
def test_no_search_is_an_error_of_the_server(client: httpx.Client, query: str) -> None:
    found = client.get("/v1/search", params={"query": query})
    assert found.status_code == (400 if query == '"' else 200)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"query": ""},
        {"query": "a" * 1001},
        {"query": "a", "limit": 101},
        {"query": "a", "limit": 0},
        {"query": "a", "after": "msg_1_1"},
        {"query": "a", "after": "msg_" + "9" * 30},
        {"query": "a", "after": "\x00"},
    ],
)
def test_a_search_that_cannot_be_is_refused(client: httpx.Client, params: Json) -> None:
    found = client.get("/v1/search", params=params)
    assert 400 <= found.status_code < 500
    assert found.json()["error"]["message"]


def pages(
    client: httpx.Client, address: str, limit: int, key: str = "data", **more: Any
) -> list[Json]:
    """Return what all pages of a list have together."""
    found: list[Json] = []
    after: Json = {}
    while True:
        page = client.get(address, params={"limit": limit, **after, **more}).json()
        assert len(page[key]) <= limit
        found += page[key]
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what tells how many thousands of steps SQLite's machine has made since it was asked before."""
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    connect = sqlite3.connect

    def counted(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_progress_handler(count, 1000)
        return connection

    monkeypatch.setattr(sqlite3, "connect", counted)

    def since() -> int:
        nonlocal taken
        before, taken = taken, 0
        return before

    return since


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what tells how many pieces of conversations were encoded since it was asked before."""
    taken = 0
    ids = PromptEncoder.ids

    def counted(self: PromptEncoder, part: Shown) -> list[int]:
        nonlocal taken
        taken += 1
        return ids(self, part)

    monkeypatch.setattr(PromptEncoder, "ids", counted)

    def since() -> int:
        nonlocal taken
        before, taken = taken, 0
        return before

    return since


def write_many(home: Path, conversation: str, count: int) -> None:
    """Have another process's journal go on with a conversation, by that many messages in a row."""
    with Journal.open(home / JOURNAL_NAME) as journal:
        label = journal.find_label(conversation)
        assert label is not None
        at = journal.tips(label.conversation_id)["main"]
        nodes = [NewNode(role="user", content=f"message {n}") for n in range(count)]
        journal.write(label.conversation_id, Entry(nodes=nodes, parent_id=at, tip="main"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tree", "items"])
def test_a_page_costs_what_is_on_it_however_large_the_conversation(
    client: httpx.Client,
    post: Callable[..., Json],
    tmp_path: Path,
    steps: Callable[[], int],
    encoded: Callable[[], int],
    what: str,
) -> None:
    """Rows are read with the first page alone, or with the page after a change, and encoded likewise."""
    conversation = post(client, PATH, {"items": [{"role": "user", "content": "first"}]})["id"]
    write_many(tmp_path / "home", conversation, 4_000)
    address, key = f"{PATH}/{conversation}/{what}", "nodes" if what == "tree" else "data"
    costs, names, last = [], set[str](), None
    steps(), encoded()
    for _ in range(10):
        params = {"limit": 50} if last is None else {"limit": 50, "after": last}
        page = client.get(address, params=params).json()
        names |= {one["id"] for one in page[key]}
        last = page["last_id"]
        costs.append((steps(), encoded()))
    assert len(names) == 500
    (whole, _), *rest = costs
    assert whole > 40
    for read, pieces in rest:
        assert read <= 4
        assert pieces <= 4 * 50
    post(client, address.replace(what, "items"), {"items": [{"role": "user", "content": "last"}]})
    tree = client.get(f"{PATH}/{conversation}/tree", params={"after": last, "limit": 2000}).json()
    assert steps() > 40
    newest = client.get(f"{PATH}/{conversation}/items", params={"limit": 1}).json()["data"]
    assert newest[0]["content"][0]["text"] == "last"
    assert tree["has_more"] == (what == "tree")  # items come the newest first
    assert client.delete(f"{PATH}/{conversation}").is_success
    assert client.get(address).status_code == 404


@pytest.mark.slow
def test_pages_of_a_tree_go_on_after_a_message_that_was_said_again(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    """After an item was deleted, those after it are on the branch as copies, much further down."""
    items = [{"role": "user", "content": f"message {n}"} for n in range(8)]
    conversation = post(client, PATH, {"items": items})["id"]
    address = f"{PATH}/{conversation}"
    whole = client.get(f"{address}/tree").json()["nodes"]
    assert client.delete(f"{address}/items/{whole[1]['id']}").is_success
    whole = client.get(f"{address}/tree").json()["nodes"]
    assert len(whole) == 14
    by_pages = pages(client, f"{address}/tree", 3, "nodes")
    assert [node["id"] for node in by_pages] == [node["id"] for node in whole]


@pytest.mark.slow
def test_every_list_of_ten_thousand_comes_in_pages(
    client: httpx.Client, post: Callable[..., Json], tmp_path: Path
) -> None:
    conversation = post(client, PATH, {"items": [{"role": "user", "content": "needle"}]})["id"]
    with Journal.open(tmp_path / "home" / JOURNAL_NAME) as journal:
        label = journal.find_label(conversation)
        assert label is not None
        at = journal.tips(label.conversation_id)["main"]
        nodes = [NewNode(role="user", content=f"message {n}") for n in range(10_000)]
        tips = {f"branch-{number}": number for number in range(0, 10_000, 40)}
        tips |= {f"checkpoint:{number}": number for number in range(0, 10_000, 40)}
        entry = Entry(nodes=nodes, parent_id=at, tip="main", tips=tips)
        journal.write(label.conversation_id, entry)
    address = f"{PATH}/{conversation}"
    tree = pages(client, f"{address}/tree", 1000, "nodes")
    assert len({node["id"] for node in tree}) == len(tree) == 10_001
    first = client.get(f"{address}/tree").json()
    assert len(first["nodes"]) == 1000
    assert 20 < len(first["tips"]) < 30
    assert len(pages(client, f"{address}/branches", 100)) == 251
    assert len({one["item"] for one in pages(client, f"{address}/checkpoints", 100)}) == 250
    newest = client.get(f"{address}/items", params={"limit": 100}).json()
    assert newest["has_more"]
    oldest = client.get(
        f"{address}/items", params={"order": "asc", "after": newest["last_id"], "limit": 100}
    ).json()
    assert len(oldest["data"]) == 99
    assert not oldest["has_more"]
    assert len(pages(client, "/v1/search", 100, query="needle")) == 1
    assert len(pages(client, "/v1/search", 100, query='"message 77"')) == 111
