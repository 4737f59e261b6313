"""A checkpoint of a client keeps its KV on disk, in the client's namespace, until it is deleted."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import recollect
from recollect import encryption
from recollect.cli.main import app
from recollect.conversation.model import Model
from recollect.engine.pinning import pin_on_disk
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.server import conversation_routes

Json = dict[str, Any]
Start = Callable[..., httpx.Client]
Post = Callable[..., Json]
PATH = "/v1/conversations"
LONG = "You are careful with the boats in the harbour. " * 6
KEYS = ("rk-first", "rk-second")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def start_kept(start: Start, make_model: Callable[..., Model], home: Path) -> Start:
    """Return what starts a server whose models keep KV in the home."""

    def start_it(*, budget_bytes: int = 64 << 20, keys: Any = (), **settings: Any) -> httpx.Client:
        def load(_: str) -> Model:
            store = DiskStore(home / STORE_FOLDER, budget_bytes=budget_bytes)
            return make_model(store=store, **settings)

        return start(load=load, keys=keys)

    return start_it


@pytest.fixture
def restart(servers: ExitStack, start_kept: Start) -> Start:
    def restart_it(**settings: Any) -> httpx.Client:
        servers.close()
        return start_kept(**settings)

    return restart_it


@pytest.fixture
def as_second(servers: ExitStack) -> Callable[[httpx.Client], httpx.Client]:
    """Return what connects to the same server with the second key."""

    def connect(client: httpx.Client) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEYS[1]}"}
        other = httpx.Client(base_url=client.base_url, headers=headers, timeout=60, trust_env=False)
        return servers.enter_context(other)

    return connect


def say(post: Post, client: httpx.Client, conversation: str, text: str, **fields: Any) -> Json:
    body = {"input": text, "conversation": conversation, "max_output_tokens": 6, **fields}
    return post(client, "/v1/responses", body)


def begun(post: Post, client: httpx.Client, *said: str) -> str:
    """Return a conversation in which this was said."""
    conversation: str = post(client, PATH, {})["id"]
    for text in said:
        say(post, client, conversation, text)
    return conversation


def keep(post: Post, client: httpx.Client, conversation: str, name: str = "safe") -> Json:
    kept: Json = post(client, f"{PATH}/{conversation}/checkpoint", {"name": name})["kv"]
    return kept


def usage(response: Json) -> Json:
    own: Json = response["usage"]["recollect"]
    return own


def pinned(home: Path) -> list[tuple[str, str]]:
    store = DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20)
    try:
        return [(pin.name, pin.about["kind"]) for pin in store.pins()]
    finally:
        store.close()


@pytest.mark.slow
def test_the_answer_says_how_much_is_kept(start_kept: Start, post: Post, home: Path) -> None:
    client = start_kept()
    conversation = begun(post, client, LONG)
    made = post(client, f"{PATH}/{conversation}/checkpoint", {"name": "safe"})
    assert made["checkpoint"] == "safe"
    assert made["kv"]["kept"] is True
    assert made["kv"]["tokens"] > len(LONG)
    # What a message after it begins with, and the last token of the reply.
    assert made["kv"]["computed_tokens"] < 40
    assert pinned(home) == [(f"{conversation}.safe", "server checkpoint")]


@pytest.mark.slow
def test_it_survives_pressure_and_a_restart_and_is_warm_from_disk(
    start_kept: Start, restart: Start, post: Post
) -> None:
    """Everything else that was written is many times what the disk may hold."""
    small = {"budget_bytes": 1 << 20, "num_blocks": 64}
    client = start_kept(**small)
    conversation = begun(post, client, LONG)
    kept = keep(post, client, conversation)
    other = begun(post, client, LONG.upper())
    for number in range(12):
        begun(post, client, f"{number} " * 150)
    client = restart(**small)
    back = post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
    assert back["turns"] == 1
    again = usage(say(post, client, conversation, "Go on"))
    assert again["tier"] == "disk"
    assert again["restored_tokens"] >= kept["tokens"] - 1
    assert again["computed_tokens"] < 40
    cold = usage(say(post, restart(**small), other, "Go on"))
    assert cold["restored_tokens"] < 40 < cold["computed_tokens"], "there was pressure"


@pytest.mark.slow
def test_each_key_has_its_own_and_comes_back_to_it_from_disk(
    start_kept: Start, restart: Start, post: Post, as_second: Callable[[httpx.Client], httpx.Client]
) -> None:
    first = start_kept(keys=KEYS)
    conversations = []
    for client in (first, as_second(first)):
        conversations.append(begun(post, client, LONG))
        assert keep(post, client, conversations[-1])["kept"] is True
    for number, conversation in enumerate(conversations):
        # A second restore in one process may be measured to be slower than this runtime.
        client = restart(keys=KEYS)
        client = as_second(client) if number else client
        post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
        own = usage(say(post, client, conversation, "Go on"))
        assert own["tier"] == "disk"
        assert own["restored_tokens"] > len(LONG)
        assert own["computed_tokens"] < 40


@pytest.mark.slow
def test_another_key_neither_sees_nor_uses_nor_deletes_it(
    start_kept: Start, post: Post, home: Path, as_second: Callable[[httpx.Client], httpx.Client]
) -> None:
    client = start_kept(keys=KEYS)
    conversation = begun(post, client, LONG)
    keep(post, client, conversation)
    kept = pinned(home)
    other = as_second(client)
    own = begun(post, other, LONG)
    address = f"{PATH}/{conversation}"
    refused = [
        other.get(f"{address}/tree"),
        other.post(f"{address}/rewind", json={"checkpoint": "safe"}),
        other.post(f"{PATH}/{own}/rewind", json={"checkpoint": "safe"}),
        other.post(f"{address}/checkpoint", json={"name": "safe"}),
        other.delete(f"{address}/checkpoints/safe"),
        other.delete(f"{PATH}/{own}/checkpoints/safe"),
        other.delete(address),
    ]
    assert [answer.status_code for answer in refused] == [404] * len(refused)
    assert pinned(home) == kept
    cold = usage(say(post, other, post(other, PATH, {})["id"], LONG + "!"))
    assert cold["restored_tokens"] == 0


@pytest.mark.slow
def test_the_kv_is_that_of_the_prompt_with_its_instructions_and_tools(
    start_kept: Start, restart: Start, post: Post
) -> None:
    tool = {"type": "function", "name": "tide", "parameters": {"type": "object"}}
    fields = {"instructions": "Be brief. " * 20, "tools": [tool], "tool_choice": "none"}
    client = start_kept()
    conversation = post(client, PATH, {})["id"]
    say(post, client, conversation, LONG, **fields)
    kept = keep(post, client, conversation)
    client = restart()
    post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
    own = usage(say(post, client, conversation, "Go on", **fields))
    assert own["restored_tokens"] >= kept["tokens"] - 1
    assert own["computed_tokens"] < 40


@pytest.mark.slow
def test_the_same_name_at_the_same_place_keeps_what_is_kept(
    start_kept: Start, post: Post, home: Path
) -> None:
    client = start_kept()
    conversation = begun(post, client, LONG)
    first = keep(post, client, conversation)
    again = keep(post, client, conversation)
    assert again == {**first, "computed_tokens": 0}
    say(post, client, conversation, "Two")
    elsewhere = client.post(f"{PATH}/{conversation}/checkpoint", json={"name": "safe"})
    assert elsewhere.status_code == 409
    assert elsewhere.json()["error"]["code"] == "name_taken"
    assert len(pinned(home)) == 1


@pytest.mark.slow
def test_a_place_without_kv_is_kept_once_there_is_a_disk(
    start: Start, servers: ExitStack, start_kept: Start, post: Post
) -> None:
    client = start()
    conversation = begun(post, client, LONG)
    assert keep(post, client, conversation) == {
        "kept": False,
        "reason": "this server keeps no KV on disk",
    }
    servers.close()
    client = start_kept()
    assert keep(post, client, conversation)["kept"] is True


@pytest.mark.slow
def test_without_room_or_anything_said_the_place_is_named_all_the_same(
    start_kept: Start, post: Post, home: Path
) -> None:
    client = start_kept(budget_bytes=512 << 10)
    conversation = post(client, PATH, {})["id"]
    assert keep(post, client, conversation, "empty")["reason"] == "nothing has been said yet"
    say(post, client, conversation, LONG * 3)
    kept = keep(post, client, conversation, "full")
    assert "no room for it on disk" in kept["reason"]
    assert str(home) not in kept["reason"]
    say(post, client, conversation, "Two")
    for name, turns in (("full", 1), ("empty", 0)):
        back = post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": name})
        assert back["turns"] == turns
    assert pinned(home) == []


@pytest.mark.slow
def test_what_is_shorter_than_a_block_is_not_kept(start_kept: Start, post: Post) -> None:
    client = start_kept(whole_blocks_only=True, block_size=128)
    conversation = begun(post, client, "Hi")
    assert "shorter than a block" in keep(post, client, conversation)["reason"]


@pytest.mark.slow
def test_deleting_one_leaves_what_was_said(start_kept: Start, post: Post, home: Path) -> None:
    client = start_kept()
    conversation = begun(post, client, LONG)
    keep(post, client, conversation)
    keep(post, client, conversation, "other")
    before = client.get(f"{PATH}/{conversation}/tree").json()
    assert set(before["checkpoints"]) == {"safe", "other"}
    gone = client.delete(f"{PATH}/{conversation}/checkpoints/safe")
    assert gone.json() == {
        "id": conversation,
        "object": "conversation.checkpoint.deleted",
        "checkpoint": "safe",
        "deleted": True,
    }
    after = client.get(f"{PATH}/{conversation}/tree").json()
    assert (after["nodes"], set(after["checkpoints"])) == (before["nodes"], {"other"})
    assert [name for name, _ in pinned(home)] == [f"{conversation}.other"]
    for answer in (
        client.delete(f"{PATH}/{conversation}/checkpoints/safe"),
        client.post(f"{PATH}/{conversation}/rewind", json={"checkpoint": "safe"}),
    ):
        assert answer.status_code == 404


@pytest.mark.slow
def test_branches_are_no_checkpoints_and_checkpoints_do_not_move(
    start_kept: Start, post: Post
) -> None:
    client = start_kept()
    conversation = begun(post, client, "One")
    fork = post(client, f"{PATH}/{conversation}/fork", {"name": "safe"})["id"]
    assert keep(post, client, conversation)["kept"] is True
    say(post, client, fork, "Two")
    for name in ("main", "other"):
        assert client.delete(f"{PATH}/{conversation}/checkpoints/{name}").status_code == 404
    assert client.get(f"{PATH}/{conversation}.checkpoint:safe").status_code == 404
    body = {"input": "Hello", "conversation": f"{conversation}.checkpoint:safe"}
    assert client.post("/v1/responses", json=body).status_code == 404
    assert client.delete(f"{PATH}/{fork}/checkpoints/safe").json()["deleted"] is True
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert (set(tree["tips"]), tree["checkpoints"]) == ({"main", "safe"}, {})


@pytest.mark.slow
def test_one_that_is_deleted_while_it_is_kept_leaves_nothing(
    start_kept: Start, post: Post, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start_kept()
    conversation = begun(post, client, LONG)

    def meanwhile(*given: Any, **options: Any) -> Any:
        address = f"{client.base_url}{PATH}/{conversation}/checkpoints/safe"
        assert httpx.delete(address, timeout=60, trust_env=False).status_code == 200
        return pin_on_disk(*given, **options)

    monkeypatch.setattr(conversation_routes, "pin_on_disk", meanwhile)
    assert keep(post, client, conversation)["reason"] == "it was deleted meanwhile"
    assert pinned(home) == []


@pytest.mark.slow
def test_with_a_conversation_go_its_pins(start_kept: Start, post: Post, home: Path) -> None:
    client = start_kept()
    conversation, other = begun(post, client, LONG), begun(post, client, "Other")
    keep(post, client, conversation)
    keep(post, client, other)
    assert client.delete(f"{PATH}/{conversation}").json()["deleted"] is True
    assert [name for name, _ in pinned(home)] == [f"{other}.safe"]


@pytest.mark.slow
def test_with_the_last_response_of_a_conversation_go_its_pins(
    start_kept: Start, post: Post, make_model: Callable[..., Model], home: Path
) -> None:
    """Such as those that were made in a terminal, where the conversation has no key."""
    client = start_kept()
    response = post(client, "/v1/responses", {"input": LONG, "max_output_tokens": 4})["id"]
    model = make_model(store=DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20))
    model.resume().checkpoint("here")
    assert pinned(home) == [("here", "checkpoint")]
    assert client.delete(f"/v1/responses/{response}").json()["deleted"] is True
    assert pinned(home) == []


@pytest.mark.slow
def test_in_an_encrypted_home_no_name_of_them_can_be_read(
    start: Start, servers: ExitStack, post: Post, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "Scrypt", partial(encryption.Scrypt, n=2))
    cipher = recollect.encrypt(home, passphrase="open sesame")

    def load(_: str) -> Model:
        return recollect.load("reference", home=home, cipher=cipher, kv_disk=64 << 20)

    client = start(load=load, cipher=cipher)
    conversation = begun(post, client, LONG)
    assert keep(post, client, conversation, "treasure")["kept"] is True
    servers.close()
    written = {file.name: file.read_bytes() for file in home.rglob("*") if file.is_file()}
    assert "data.mdb" in written
    for word in (b"treasure", b"checkpoint", b"harbour"):
        assert [name for name, content in written.items() if word in content] == []
    client = start(load=load, cipher=cipher)
    post(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "treasure"})
    assert usage(say(post, client, conversation, "Go on"))["restored_tokens"] > len(LONG)
    gone = client.delete(f"{PATH}/{conversation}/checkpoints/treasure")
    assert gone.json()["deleted"] is True


@pytest.mark.slow
def test_the_command_line_tells_them_from_its_own(
    start_kept: Start, post: Post, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start_kept()
    conversation = begun(post, client, LONG)
    keep(post, client, conversation)
    monkeypatch.setenv("RECOLLECT_HOME", str(home))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert json.loads(run("checkpoints", "--json")) == []
    assert "Clients of `recollect serve` have 1 more" in run("checkpoints")
    (pin,) = json.loads(run("cache", "--json"))["pins"]
    assert (pin["name"], pin["kind"]) == (f"{conversation}.safe", "server checkpoint")
    (info,) = json.loads(run("conversations", "--json"))
    assert f"{conversation}.safe" in run("conversations", "delete", info["name"], "--yes")
    assert pinned(home) == []
