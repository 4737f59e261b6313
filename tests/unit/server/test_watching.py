"""Events over HTTP: what whoever watches is told, of whom, and where it goes on."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from recollect.conversation.event_log import TAKEN_BYTES, EventLog, Watch
from recollect.conversation.model import Model
from recollect.server import streaming
from recollect.server.streaming import MOST_OF_A_KEY, Watchers, WatchStream, of_conversation

Json = dict[str, Any]
PATH = "/v1/conversations"


class Watcher:
    """A client of the events, which are read on a thread of its own."""

    def __init__(self, client: httpx.Client, **options: Any) -> None:
        self.events: list[Json] = []
        self.ended = False
        self.last_id = 0
        self._opened = threading.Event()
        self._came = threading.Condition()
        self._client = httpx.Client(
            base_url=client.base_url, headers=client.headers, timeout=60, trust_env=False
        )
        self._thread = threading.Thread(target=self._read, args=[options], daemon=True)
        self._thread.start()
        assert self._opened.wait(60)

    def _read(self, options: Json) -> None:
        try:
            with self._client.stream("GET", "/v1/events", **options) as response:
                assert response.status_code == 200, response.read()
                assert response.headers["content-type"].startswith("text/event-stream")
                number = kind = None
                for line in response.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "id":
                        number = int(value)
                    elif name == "event":
                        kind = value
                    elif name == "data":
                        event = json.loads(value)
                        assert event["type"] == kind
                        with self._came:
                            self.events.append({**event, "id": number})
                            self._came.notify_all()
                    elif not line:
                        self.last_id = number or 0
                        self._opened.set()
        finally:
            self._client.close()
            self.ended = True
            with self._came:
                self._came.notify_all()

    def until(self, holds: Callable[[list[Json]], Any]) -> list[Json]:
        """Return the events as soon as something holds of them."""
        with self._came:
            assert self._came.wait_for(lambda: holds(self.events), timeout=60), self.kinds()
            return list(self.events)

    def until_kind(self, kind: str) -> Json:
        """Return the first event of a kind."""
        events = self.until(lambda all_: any(one["type"] == kind for one in all_))
        return next(one for one in events if one["type"] == kind)

    def kinds(self) -> list[str]:
        """Return the kinds of what came."""
        return [one["type"] for one in self.events]

    def join(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def watch() -> Callable[..., Watcher]:
    """Return what begins to watch; the streams end with their server."""
    return Watcher


@pytest.mark.slow
def test_what_is_said_is_told_in_the_order_in_which_it_happens(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    watcher = watch(client)
    conversation = post(client, PATH, {})["id"]
    body = {"input": "Hello", "conversation": conversation, "max_output_tokens": 6}
    said = post(client, "/v1/responses", body)
    watcher.until_kind("reply.completed")
    told = [one for one in watcher.events if one.get("conversation") == conversation]
    kinds = [one["type"] for one in told]
    assert kinds[0] == "conversation.created"
    asked, reply = [one for one in told if one["type"] == "message.created"]
    started = watcher.until_kind("reply.started")
    completed = watcher.until_kind("reply.completed")
    assert (
        kinds.index("message.created") < kinds.index("reply.started") < kinds.index("reply.delta")
    )
    assert told.index(reply) < told.index(completed)
    assert (asked["role"], asked["content"], asked["branch"]) == ("user", "Hello", "main")
    assert (reply["role"], reply["parent"]) == ("assistant", asked["item"])
    assert started["parent"] == asked["item"]
    deltas = [one for one in told if one["type"] == "reply.delta"]
    text = said["output"][0]["content"][0]["text"]
    assert "".join(one["text"] for one in deltas) == text == reply["content"]
    assert completed["usage"]["prompt_tokens"] == said["usage"]["input_tokens"]
    assert completed["finish_reason"] == "length"
    began, ended = watcher.until_kind("job.started"), watcher.until_kind("job.ended")
    assert (began["job"], began["kind"], began["model"]) == (ended["job"], "reply", "reference")


@pytest.mark.slow
def test_ids_in_events_are_those_of_the_tree(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    watcher = watch(client)
    conversation = post(client, PATH, {})["id"]
    body = {"input": "Hello", "conversation": conversation, "max_output_tokens": 6}
    post(client, "/v1/responses", body)
    post(client, f"{PATH}/{conversation}/items", {"items": [{"role": "user", "content": "More"}]})

    def last_names(events: list[Json]) -> dict[str, str]:
        names: dict[str, str] = {}
        for one in events:
            if one["type"] == "message.created":
                names[one["item"]] = one["item"]
            if one["type"] == "message.renamed":
                names = {
                    old: one["item"] if new == one["was"] else new for old, new in names.items()
                }
        return names

    tree = client.get(f"{PATH}/{conversation}/tree").json()
    ids = [node["id"] for node in tree["nodes"]]
    watcher.until(lambda events: sorted(last_names(events).values()) == sorted(ids))
    moved = [one for one in watcher.events if one["type"] == "branch.moved"]
    assert (moved[-1]["branch"], moved[-1]["item"]) == ("main", tree["tips"]["main"])


@pytest.mark.slow
def test_branches_checkpoints_and_deletions_are_told(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    items = [{"role": "user", "content": text} for text in ("One", "Two")]
    conversation = post(client, PATH, {"items": items})["id"]
    first = client.get(f"{PATH}/{conversation}/tree").json()["nodes"][0]["id"]
    watcher = watch(client)
    post(client, f"{PATH}/{conversation}/fork", {"at": first, "name": "other"})
    moved = watcher.until_kind("branch.moved")
    assert (moved["branch"], moved["item"], moved["conversation"]) == ("other", first, conversation)
    post(client, f"{PATH}/{conversation}/checkpoint", {"name": "safe"})
    assert watcher.until_kind("checkpoint.created")["checkpoint"] == "safe"
    client.delete(f"{PATH}/{conversation}/checkpoints/safe")
    assert watcher.until_kind("checkpoint.deleted")["checkpoint"] == "safe"
    post(client, f"{PATH}/{conversation}", {"metadata": {"topic": "new"}})
    watcher.until_kind("conversation.updated")
    client.delete(f"{PATH}/{conversation}")
    assert watcher.until_kind("conversation.deleted")["conversation"] == conversation


@pytest.mark.slow
def test_a_watcher_goes_on_where_it_was(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    watcher = watch(client)
    post(client, PATH, {})
    first = watcher.until_kind("conversation.created")
    made = post(client, PATH, {})["id"]
    watcher.until(lambda events: events[-1].get("conversation") == made)
    for options in (
        {"headers": {"Last-Event-ID": str(first["id"])}},
        {"params": {"after": str(first["id"])}},
    ):
        again = watch(client, **options)
        rest = watcher.events[1:]
        assert again.until(lambda events: len(events) >= len(rest))[: len(rest)] == rest  # noqa: B023


@pytest.mark.few(1)
@pytest.mark.parametrize("last", ["1", "99999999999999999"])
def test_a_watcher_whose_place_is_not_known_is_told_so_and_hears_what_comes(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher], last: str
) -> None:
    watcher = watch(client, headers={"Last-Event-ID": last})
    watcher.until(lambda events: [one["type"] for one in events] == ["events.lost"])
    made = post(client, PATH, {})["id"]
    assert watcher.until_kind("conversation.created")["conversation"] == made


@pytest.mark.slow
def test_after_a_restart_an_old_id_is_not_taken_for_a_new_one(
    start: Callable[..., httpx.Client],
    servers: ExitStack,
    post: Callable[..., Json],
    watch: Callable[..., Watcher],
) -> None:
    client = start()
    watcher = watch(client)
    post(client, PATH, {})
    old = watcher.until_kind("conversation.created")["id"]
    servers.close()
    client = start()
    watcher = watch(client, headers={"Last-Event-ID": str(old)})
    watcher.until(lambda events: events)
    assert watcher.kinds() == ["events.lost"]
    assert watcher.events[0]["id"] > old


@pytest.mark.few(3)
@pytest.mark.parametrize("last", ["x", "-1", "1" * 19, "²"])
def test_what_is_no_id_is_refused(client: httpx.Client, last: str) -> None:
    with client.stream(
        "GET", "/v1/events", headers=[(b"Last-Event-ID", last.encode())]
    ) as response:
        assert response.status_code == 400
        assert "Last-Event-ID" in response.read().decode()


@pytest.mark.slow
def test_a_watcher_of_one_conversation_hears_of_no_other(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    one, other = post(client, PATH, {})["id"], post(client, PATH, {})["id"]
    watcher = watch(client, params={"conversation": one})
    item = {"items": [{"role": "user", "content": "Hello"}]}
    for conversation in (other, one):
        post(client, f"{PATH}/{conversation}/items", item)
    watcher.until_kind("branch.moved")
    assert {event["conversation"] for event in watcher.events} == {one}
    assert client.get("/v1/events", params={"conversation": "conv_none"}).status_code == 404


def test_what_is_sent_at_once_is_little_however_much_has_happened() -> None:
    """What waits for a client that does not read is in memory, once for each client."""
    log = EventLog(first_id=1)
    for number in range(50):
        log.add("one", "mine" if number % 25 == 24 else "another", {"text": "x" * 30_000})

    async def sent(label: str | None, parts: int) -> list[str]:
        watch = Watch(log, "", after=0, wake=lambda _: None, leave=lambda _: None)
        stream = WatchStream(Watchers(), watch, of_conversation(label))
        found = aiter(stream.body_iterator)
        return [str(await anext(found)) for _ in range(1 + parts)][1:]

    every = asyncio.run(sent(None, 25))
    assert max(map(len, every)) <= TAKEN_BYTES
    assert sum(part.count("event: one") for part in every) == 50
    assert [part.count('"mine"') for part in asyncio.run(sent("mine", 2))] == [1, 1]


def test_a_key_has_so_many_streams_also_where_all_are_asked_for_at_once(
    start: Callable[..., httpx.Client], until: Callable[..., None]
) -> None:
    client = start(keys=("one", "two"))
    url = client.base_url

    def asked(key: str) -> socket.socket:
        connection = stack.enter_context(
            closing(socket.create_connection((url.host, url.port), 60))
        )
        head = f"GET /v1/events HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {key}\r\n\r\n"
        connection.sendall(head.encode())
        return connection

    def status(connection: socket.socket) -> int:
        data = b""
        while b"\r\n" not in data:
            data += connection.recv(4096)
        return int(data.split()[1])

    with ExitStack() as stack:
        opened = [asked("one") for _ in range(MOST_OF_A_KEY + 30)]
        found = [(status(one), one) for one in opened]
        assert sorted(number for number, _ in found) == [200] * MOST_OF_A_KEY + [429] * 30
        assert status(asked("two")) == 200
        refused = client.get("/v1/events")
        assert refused.json()["error"]["code"] == "too_many_watchers"
        assert int(refused.headers["Retry-After"]) > 0
        next(one for number, one in found if number == 200).close()
        until(lambda: status(asked("one")) == 200)


def test_all_keys_together_have_so_many_streams(
    start: Callable[..., httpx.Client],
    watch: Callable[..., Watcher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "MOST_WATCHERS", 2)
    client = start(keys=("one", "two", "three"))
    for key in ("one", "two"):
        watch(client, headers={"Authorization": f"Bearer {key}"})
    refused = client.get("/v1/events", headers={"Authorization": "Bearer three"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_watchers")


def test_a_stream_that_is_silent_gets_a_comment(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert streaming.BEAT_S == 15
    monkeypatch.setattr(streaming, "BEAT_S", 0.05)
    with client.stream("GET", "/v1/events") as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(4)]
        assert first[0] == ": watching"
        assert [next(lines) for _ in range(3)] == [": still here", first[2], ""]


@pytest.mark.slow
def test_a_key_hears_only_of_its_own(
    start: Callable[..., httpx.Client], post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    client = start(keys=("one", "two"))
    theirs = {"Authorization": "Bearer two"}
    watcher, others = watch(client), watch(client, headers=theirs)
    body = {"input": "Hello", "max_output_tokens": 6}
    post(client, "/v1/responses", body, headers=theirs)
    others.until_kind("reply.completed")
    mine = post(client, PATH, {})["id"]
    watcher.until_kind("conversation.created")
    assert {event.get("conversation") for event in watcher.events} == {mine}
    assert mine not in {event.get("conversation") for event in others.events}
    assert client.get("/v1/events", headers={"Authorization": "Bearer no"}).status_code == 401


@pytest.mark.slow
def test_what_another_program_says_appears(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    watch: Callable[..., Watcher],
) -> None:
    """With a journal of its own, as the terminal's chat has one; nothing but the file is shared."""
    client = start()
    watcher = watch(client)
    with make_model() as model:
        model.session(name="elsewhere").respond("Hello there")
    told = watcher.until(
        lambda events: sum(one["type"] == "message.created" for one in events) == 2
    )
    assert [one["role"] for one in told if one["type"] == "message.created"] == [
        "user",
        "assistant",
    ]
    assert watcher.until_kind("conversation.created")["name"] == "elsewhere"


def test_a_server_that_stops_ends_the_streams(
    start: Callable[..., httpx.Client], servers: ExitStack, watch: Callable[..., Watcher]
) -> None:
    watcher = watch(start())
    servers.close()
    watcher.join()


@pytest.mark.slow
def test_nothing_of_a_reply_that_never_came_stays(
    client: httpx.Client, post: Callable[..., Json], watch: Callable[..., Watcher]
) -> None:
    """A message that was taken back, because nothing came of it, is told as gone."""
    watcher = watch(client)
    conversation = post(client, PATH, {})["id"]
    body = {"input": "x" * 100_000, "conversation": conversation}
    assert client.post("/v1/responses", json=body).status_code == 400
    post(client, PATH, {})
    watcher.until(lambda events: sum(one["type"] == "conversation.created" for one in events) == 2)
    created = {one["item"] for one in watcher.events if one["type"] == "message.created"}
    deleted = {one["item"] for one in watcher.events if one["type"] == "message.deleted"}
    assert created == deleted


@pytest.mark.slow
def test_the_tree_says_what_going_on_would_cost_page_by_page(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    conversation = post(client, PATH, {})["id"]
    for text in ("Hello", "And then?"):
        said = {"input": text, "conversation": conversation, "max_output_tokens": 6}
        last = post(client, "/v1/responses", said)
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert [node["warmth"] for node in tree["nodes"]] == ["memory"] * 4
    cost = tree["nodes"][-1]["going_on"]
    assert cost["tokens"] == cost["in_memory"] + cost["on_disk"] + cost["to_compute"]
    assert cost["tokens"] > last["usage"]["input_tokens"]
    assert tree["model"] == "reference"
    assert not tree["has_more"]
    pages: list[Json] = []
    while not pages or pages[-1]["has_more"]:
        after = {"after": pages[-1]["last_id"]} if pages else {}
        shown = client.get(f"{PATH}/{conversation}/tree", params={"limit": 3, **after})
        pages.append(shown.json())
    assert [len(page["nodes"]) for page in pages] == [3, 1]
    assert [node["id"] for page in pages for node in page["nodes"]] == [
        node["id"] for node in tree["nodes"]
    ]
    assert client.get(f"{PATH}/{conversation}/tree", params={"after": "msg_no"}).status_code == 404


def test_a_tree_whose_model_is_not_loaded_is_told_without_costs(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., Json],
    until: Callable[..., None],
) -> None:
    goes_on = threading.Event()

    def load(_: str) -> Model:
        assert goes_on.wait(60)
        return make_model()

    client = start(load=load)
    items = [{"role": "user", "content": "Hello"}]
    conversation = post(client, PATH, {"items": items})["id"]
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert (tree["model"], tree["nodes"][0]["going_on"]) == (None, None)
    goes_on.set()
    until(lambda: client.get("/health").status_code == 200)
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert tree["nodes"][0]["warmth"] == "none"


def test_kv_is_told_by_conversation_and_branch_and_to_its_key_alone(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keys=("one", "two"))
    conversation = post(client, PATH, {})["id"]
    for text in ("Hello there, this is a long question", "And then?"):
        said = {"input": text, "conversation": conversation, "max_output_tokens": 6}
        post(client, "/v1/responses", said)
    post(client, f"{PATH}/{conversation}/fork", {"name": "other"})
    held = client.get("/v1/kv").json()
    (one,) = held["data"]
    assert (one["id"], set(one["branches"])) == (conversation, {"main", "other"})
    main = one["branches"]["main"]
    assert main["in_memory"] > 0
    assert main["blocks_in_memory"] == -(-main["in_memory"] // held["models"][0]["block_tokens"])
    assert held["models"][0]["tokens_in_memory"] >= main["in_memory"]
    assert held["saved"]["tokens"] > 0
    assert {block["conversation"] for block in held["evicted_next"]} == {conversation}
    theirs = client.get("/v1/kv", headers={"Authorization": "Bearer two"}).json()
    assert (theirs["data"], theirs["evicted_next"]) == ([], [])
    assert theirs["models"][0]["tokens_in_memory"] == theirs["saved"]["tokens"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_read_ahead")  # which may be warm after all else was evicted
def test_what_became_warm_and_what_was_evicted_is_told(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., Json],
    watch: Callable[..., Watcher],
) -> None:
    model = make_model()
    client = start(load=lambda _: model)
    watcher = watch(client)
    post(client, "/v1/responses", {"input": "Hello there", "max_output_tokens": 6})
    warm = watcher.until_kind("kv.warm")
    assert warm["tokens"] > 0
    assert warm["in_memory"] > 0
    blocks = model.engine.forget()
    assert blocks
    assert watcher.until_kind("kv.evicted")["in_memory"] == 0
