"""What only asks changes nothing, costs the same however much there is, and survives what is there."""

import hashlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from recollect.conversation.model import Model
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, NewNode
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.server.access import Keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Limits, Settings

Json = dict[str, Any]
PATH = "/v1/conversations"
LONG = "You are careful with the boats in the harbour. " * 6


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def journal_path(home: Path) -> Path:
    return home / JOURNAL_NAME


def get_paths(home: Path) -> list[str]:
    """Return the paths of everything that an app answers a GET with."""
    hub = ModelHub(lambda _: pytest.fail("nothing is loaded here"), ["m"])
    app = create_app(Settings(home=home, models=("m",)), hub, Keyring([]))
    documented = [path for path, methods in app.openapi()["paths"].items() if "get" in methods]
    more = [r.path for r in app.routes if isinstance(r, Route) and "GET" in (r.methods or ())]
    return [*documented, *more]


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def files(home: Path) -> dict[str, str]:
    """Return what is in the files of a home, but for those that only say who has one open."""
    return {
        str(file.relative_to(home)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(home.rglob("*"))
        if file.is_file() and not file.name.endswith(("-shm", "lock.mdb"))
    }


@pytest.mark.slow
def test_no_get_changes_anything_in_the_home(
    start: Callable[..., httpx.Client],
    post: Callable[..., Json],
    make_model: Callable[..., Model],
    home: Path,
    journal_path: Path,
) -> None:
    with Journal.open(journal_path) as journal:  # one that no server has begun
        info = journal.create("terminal", model="reference", fingerprint="")
        journal.append(info.id, None, [NewNode(role="user", content="Hello")], tip="main")
    store = DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20)
    model = make_model(store=store)
    client = start(load=lambda _: model)
    conversation = post(client, PATH, {"metadata": {"a": "b"}})["id"]
    said = {"input": LONG, "max_output_tokens": 4}
    response = post(client, "/v1/responses", {**said, "conversation": conversation})
    post(client, "/v1/responses", said)  # a conversation that it begins itself
    post(client, f"{PATH}/{conversation}/checkpoint", {"name": "here"})
    item = client.get(f"{PATH}/{conversation}/items").json()["data"][0]["id"]
    known = {
        "conversation_id": conversation,
        "item_id": item,
        "response_id": response["id"],
        "model_id": "reference",
    }
    assert model.engine.tier is not None
    model.engine.tier.flush()
    assert list(store.holdings()), "there is KV on disk"
    before, kept = rows(journal_path), files(home)
    searched = {"/v1/search": "/v1/search?query=hello"}
    found = [searched.get(path, path).format_map(known) for path in get_paths(home)]
    found.remove("/v1/events")  # it has no end
    with client.stream("GET", "/v1/events") as events:
        assert events.status_code == 200
    assert len(found) >= 10
    for path in [
        *found,
        "/openapi.json",
        f"{PATH}?limit=1&order=asc",
        f"{PATH}?after={conversation}",
    ]:
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text)
    assert client.get(f"{PATH}/conv_unknown").status_code == 404
    assert rows(journal_path) == before
    assert files(home) == kept


def test_a_list_does_not_change_which_conversation_is_the_last(
    client: httpx.Client, journal_path: Path
) -> None:
    with Journal.open(journal_path) as journal:
        for name in ("old", "new"):
            journal.create(name, model="reference", fingerprint="")
        assert client.get(PATH).json()["data"][0]["name"] == "new"
        assert [info.name for info in journal.conversations()] == ["new", "old"]


@pytest.mark.slow
def test_notes_are_no_use_of_a_conversation(
    client: httpx.Client, post: Callable[..., Json], journal_path: Path
) -> None:
    first, second = (post(client, PATH, {})["id"] for _ in range(2))
    with Journal.open(journal_path) as journal:
        before = [info.updated_at for info in journal.conversations()]
        assert post(client, f"{PATH}/{first}", {"metadata": {"a": "b"}})["metadata"] == {"a": "b"}
        assert [info.updated_at for info in journal.conversations()] == before
    assert [one["id"] for one in client.get(PATH).json()["data"]] == [second, first]


@pytest.mark.few(1)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_conversations_come_in_pages(
    client: httpx.Client, post: Callable[..., Json], order: str
) -> None:
    made = [post(client, PATH, {})["id"] for _ in range(7)]
    expected = made if order == "asc" else made[::-1]
    seen: list[str] = []
    after: dict[str, str] = {}
    for expected_more in (True, True, False):
        page = client.get(PATH, params={"limit": 3, "order": order, **after}).json()
        assert page["has_more"] is expected_more
        seen += [one["id"] for one in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], seen[-1])
        after = {"after": page["last_id"]}
    assert seen == expected
    empty = client.get(PATH, params={"order": order, **after}).json()
    assert (empty["data"], empty["has_more"], empty["first_id"]) == ([], False, None)
    assert client.get(PATH, params={"after": "conv_unknown"}).status_code == 404
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
        assert client.get(PATH, params=wrong).status_code == 400


def filled(journal: Journal, conversations: int, turns: int, *, length: int = 2000) -> None:
    nodes = [
        NewNode(role=role, content="x" * length)
        for _ in range(turns)
        for role in ("user", "assistant")
    ]
    for _ in range(conversations):
        journal.begin(None, Entry(nodes=nodes, tip="main"), model="m", fingerprint="")


@pytest.mark.slow
def test_a_page_costs_the_same_however_many_there_are_and_however_long(
    start: Callable[..., httpx.Client], sql_work: Any, tmp_path: Path, journal_path: Path
) -> None:
    client = start()
    costs = []
    for conversations, turns in ((20, 1), (180, 10)):  # 20, then 200 with ten times the text
        with Journal.open(journal_path) as journal:
            filled(journal, conversations, turns)
        client.get(PATH)  # opens the journal
        sql_work.clear()
        listed = client.get(PATH).json()["data"]
        costs.append((sql_work.steps, len(sql_work.statements)))
        assert [one["turns"] for one in listed] == [turns] * 20
        assert not [one for one in sql_work.statements if " nodes" in one], "no text is read"
    (few, statements), (many, statements_of_many) = costs
    assert statements == statements_of_many < 20
    assert many < 1.2 * few


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    [
        ("post", "", {"metadata": {"a": "b"}}),
        ("post", "/items", {"items": [{"role": "user", "content": "more"}]}),
        ("post", "/rewind", {"turns": 1}),
        ("post", "/fork", {"name": "idea"}),
        ("get", "", None),
        ("delete", "/items/{item}", None),
        ("delete", "", None),
    ],
    ids=lambda change: " ".join(change[:2]),
)
def test_a_change_reads_no_messages_that_are_known(
    start: Callable[..., httpx.Client],
    post: Callable[..., Json],
    sql_work: Any,
    change: tuple[str, str, Json | None],
) -> None:
    client, (method, place, body) = start(), change
    items = [{"role": "user", "content": f"{n}"} for n in range(4)]
    conversation = post(client, PATH, {"items": items})["id"]
    item = client.get(f"{PATH}/{conversation}/items").json()["data"][1]["id"]
    sql_work.clear()
    path = f"{PATH}/{conversation}{place.format(item=item)}"
    assert client.request(method, path, json=body).status_code == 200
    loads = [one for one in sql_work.statements if "content" in one and one.startswith("SELECT")]
    # They are known from the list of items, but for those that the request itself adds.
    assert len(loads) == ((method, place) == ("post", "/items"))


BAD_ITEMS = [
    [{"role": "user", "content": "fine"}, {"role": "user", "content": "half \ud800"}],
    [{"role": "user", "content": "fine"}, {"type": "function_call_output", "output": "x"}],
]


@pytest.mark.few(3)
@pytest.mark.parametrize("items", BAD_ITEMS)
@pytest.mark.parametrize("place", ["", "/{id}/items"])
def test_what_is_refused_leaves_nothing_behind(
    client: httpx.Client, post: Callable[..., Json], journal_path: Path, items: Any, place: str
) -> None:
    made = post(client, PATH, {"items": [{"role": "user", "content": "first"}]})["id"]
    before = rows(journal_path)
    # As ASCII: httpx itself refuses half a character.
    answer = client.post(
        PATH + place.format(id=made),
        content=json.dumps({"items": items}),
        headers={"Content-Type": "application/json"},
    )
    assert 400 <= answer.status_code < 500, answer.text
    assert rows(journal_path) == before


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


BAD_METADATA = [{"a": "\ud800"}, {"\ud800": "a"}, nested(300), {"a": [nested(200)]}]


@pytest.mark.few(3)
@pytest.mark.parametrize("metadata", BAD_METADATA, ids=["value", "key", "deep", "deep list"])
def test_metadata_that_could_not_be_shown_again_is_refused_and_not_kept(
    client: httpx.Client, post: Callable[..., Json], journal_path: Path, metadata: Any
) -> None:
    made = post(client, PATH, {"metadata": {"a": "b"}})["id"]
    before = rows(journal_path)
    for path in (PATH, f"{PATH}/{made}"):
        answer = client.post(
            path,
            content=json.dumps({"metadata": metadata}),
            headers={"Content-Type": "application/json"},
        )
        assert 400 <= answer.status_code < 500, answer.text
    assert rows(journal_path) == before
    assert client.get(PATH).json()["data"][0]["metadata"] == {"a": "b"}


@pytest.mark.few(1)
@pytest.mark.parametrize("metadata", [*BAD_METADATA, nested(20_000)])
def test_a_list_survives_a_note_that_an_earlier_version_kept(
    client: httpx.Client, post: Callable[..., Json], journal_path: Path, metadata: Any
) -> None:
    made = [post(client, PATH, {"metadata": {"n": f"{n}"}})["id"] for n in range(2)]
    head, tail = '{"metadata": ', "}"
    text = _dumps(metadata)
    with closing(sqlite3.connect(journal_path, isolation_level=None)) as connection:
        connection.execute(
            "UPDATE labels SET note = ? WHERE label = ?", (head + text + tail, made[0])
        )
    listed = client.get(PATH)
    assert listed.status_code == 200
    assert [one["id"] for one in listed.json()["data"]] == made[::-1]
    assert listed.json()["data"][0]["metadata"] == {"n": "1"}
    for path in ("", "/items", "/tree"):
        assert client.get(f"{PATH}/{made[0]}{path}").status_code == 200
    changed = client.post(f"{PATH}/{made[0]}", json={"metadata": {"fine": "now"}})
    assert changed.json()["metadata"] == {"fine": "now"}


def _dumps(value: Any) -> str:
    """Return JSON text, also of what is nested deeper than Python writes."""
    depth = 0
    while isinstance(value, dict) and list(value) == ["a"] and isinstance(value["a"], dict):
        value, depth = value["a"], depth + 1
    return '{"a": ' * depth + json.dumps(value) + "}" * depth


def test_deleting_the_last_response_deletes_its_conversation_also_after_a_list(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    said = {"input": "Hello", "max_output_tokens": 2}
    response = post(client, "/v1/responses", said)["id"]
    assert len(client.get(PATH).json()["data"]) == 1
    assert client.delete(f"/v1/responses/{response}").status_code == 200
    assert client.get(PATH).json()["data"] == []


@pytest.mark.slow
def test_names_of_conversations_are_found_in_few_steps(sql_work: Any, journal_path: Path) -> None:
    costs = []
    with Journal.open(journal_path) as journal:
        for count in (50, 450):
            for _ in range(count):
                journal.create(model="m", fingerprint="")
            sql_work.clear()
            journal.create(model="m", fingerprint="")
            costs.append(sql_work.steps)
        names = [info.name for info in journal.conversations()]
    assert len(set(names)) == len(names) == 502
    assert costs[1] < 2 * costs[0]


@pytest.mark.slow
def test_many_requests_at_once_open_one_journal(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_it = itertools.count(), Journal.open

    def counted(*arguments: Any, **options: Any) -> Journal:
        next(opened)
        threading.Event().wait(0.05)  # as a slow disk: others come meanwhile
        return open_it(*arguments, **options)

    monkeypatch.setattr(Journal, "open", counted)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get(PATH).status_code, range(8)))
    assert answers == [200] * 8
    assert next(opened) == 1


@pytest.mark.slow
def test_a_held_journal_takes_no_turn_from_chats_that_keep_nothing(
    start: Callable[..., httpx.Client],
    post: Callable[..., Json],
    chat: Callable[..., Json],
    journal_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More responses wait for the journal than there are turns, and than threads that begin replies."""
    # They wait for as long as it takes, which on a busy machine is more than the 5 s that they would.
    monkeypatch.setattr(Journal, "open", partial(Journal.open, busy_timeout_s=60.0))
    client = start(limits=Limits(concurrent=2, shutdown_s=5))
    said = {"input": "Hello", "max_output_tokens": 2}
    post(client, "/v1/responses", said)
    with ThreadPoolExecutor(12) as pool:
        with closing(sqlite3.connect(journal_path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = [
                pool.submit(client.post, "/v1/responses", json={**said, "store": True})
                for _ in range(12)
            ]
            for text in ("one", "two", "three"):
                assert chat(client, ("user", text))["choices"][0]["message"]["content"]
            assert not any(one.done() for one in waiting), "they wait still"
            other.execute("ROLLBACK")
        assert [one.result().status_code for one in waiting] == [200] * 12


def test_a_reply_that_waits_to_be_kept_has_given_its_turn_back(
    start: Callable[..., httpx.Client],
    post: Callable[..., Json],
    chat: Callable[..., Json],
    journal_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = start(limits=Limits(concurrent=1, shutdown_s=5))
    said = {"input": "Hello", "max_output_tokens": 2}
    held, write = threading.Event(), Journal.write
    reached = threading.Event()

    def wait(journal: Journal, journal_id: int, entry: Entry, **options: Any) -> Any:
        if any(node.role == "assistant" for node in entry.nodes):
            reached.set()
            assert held.wait(60)
        return write(journal, journal_id, entry, **options)

    monkeypatch.setattr(Journal, "write", wait)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/responses", json=said)
        assert reached.wait(60)
        try:
            assert chat(client, ("user", "one"))["choices"][0]["message"]["content"]
            assert not waiting.done()
        finally:
            held.set()
        assert waiting.result().status_code == 200


def test_a_full_disk_has_a_code_of_its_own_and_can_be_read(
    small_disk: Any, client: httpx.Client, post: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    items = [{"role": "user", "content": "Hello"}]
    made = post(client, PATH, {"items": items})["id"]
    big = {"items": [{"role": "user", "content": "x" * 100_000}]}
    small_disk.fill()
    refused = client.post(f"{PATH}/{made}/items", json=big)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
    assert str(small_disk.path) not in refused.text
    assert client.get(PATH).json()["data"][0]["id"] == made
    assert len(client.get(f"{PATH}/{made}/items").json()["data"]) == 1
    assert chat(client, ("user", "keeps nothing"))["choices"]
    small_disk.make_room()
    post(client, f"{PATH}/{made}/items", big)


@pytest.mark.slow
def test_a_read_only_disk_has_a_code_of_its_own_and_can_be_read(
    small_disk: Any, client: httpx.Client, chat: Callable[..., Json], journal_path: Path
) -> None:
    with Journal.open(journal_path) as journal:
        filled(journal, 1, 1, length=10)
    small_disk.make_read_only()
    try:
        made = client.get(PATH).json()["data"][0]["id"]
        assert len(client.get(f"{PATH}/{made}/items").json()["data"]) == 2
        said = {"input": "Hello", "conversation": made, "max_output_tokens": 2}
        items = {"items": [{"role": "user", "content": "more"}]}
        for path, body in ((f"{PATH}/{made}/items", items), ("/v1/responses", said), (PATH, {})):
            refused = client.post(path, json=body)
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert str(small_disk.path) not in refused.text
        assert client.get(PATH).json()["data"][0]["turns"] == 1
        assert chat(client, ("user", "keeps nothing"))["choices"]
    finally:
        small_disk.make_read_only(again=True)
    assert client.post("/v1/responses", json=said).status_code == 200
