"""What the page asks of a server whose model an engine elsewhere computes."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from recollect.conversation.model import Model
from recollect.server.access import Keyring
from recollect.server.app import create_app, uvicorn_config
from recollect.server.hub import ModelHub
from recollect.server.settings import Limits, Settings, bind

Json = dict[str, Any]
PATH = "/v1/conversations"


@pytest.fixture(params=["vllm", "llama"])
def client(
    request: pytest.FixtureRequest,
    make_stub: Callable[..., tuple[Any, str]],
    load: Callable[..., Model],
    tmp_path: Path,
) -> Iterator[httpx.Client]:
    """Return a client of a server that listens: events never end, which a test client waits for."""
    _, url = make_stub(request.param, **({"slots": 4} if request.param == "llama" else {}))
    hub = ModelHub(lambda _: load(f"{request.param}={url}"), ["reference"])
    limits = Limits(shutdown_s=5)
    settings = Settings(home=tmp_path, models=("reference",), has_keys=False, limits=limits)
    server = uvicorn.Server(uvicorn_config(create_app(settings, hub, Keyring([])), limits))
    sockets = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=[sockets], daemon=True)
    thread.start()
    port = sockets[0].getsockname()[1]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
    ) as connected:
        yield connected
    server.should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def conversation(client: httpx.Client) -> str:
    """Return the id of a conversation with one turn."""
    items = [{"role": "system", "content": "You are careful. " * 10}]
    made: str = posted(client, PATH, {"items": items})["id"]
    body = {"input": "Where is the oak?", "conversation": made, "max_output_tokens": 6}
    posted(client, "/v1/responses", body)
    return made


def posted(client: httpx.Client, path: str, body: Json) -> Json:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


@pytest.mark.few(1)
def test_the_page_and_the_tree_come(client: httpx.Client, conversation: str) -> None:
    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "<html" in page.text
    tree = client.get(f"{PATH}/{conversation}/tree").json()
    assert [one["role"] for one in tree["nodes"]] == ["system", "user", "assistant"]
    # The engine elsewhere has the KV: nobody here knows what going on costs.
    assert {(one["warmth"], one["going_on"]) for one in tree["nodes"]} == {(None, None)}
    memory = client.get("/v1/kv").json()
    assert [one["id"] for one in memory["data"]] == [conversation]


@pytest.mark.few(1)
def test_replies_are_explored_side_by_side(client: httpx.Client, conversation: str) -> None:
    body = {"prompts": ["A?", "B?"], "max_output_tokens": 6, "temperature": 1.0, "seed": 3}
    told = posted(client, f"{PATH}/{conversation}/explore", body)
    assert len(told["branches"]) == 2
    assert all(one["text"] for one in told["branches"])
    assert told["usage"]["recollect"]["computed_tokens"] > 0
    names = client.get(f"{PATH}/{conversation}/tree").json()["tips"]
    assert len(names) == 3


@pytest.mark.few(1)
def test_what_was_said_is_found(client: httpx.Client, conversation: str) -> None:
    found = client.get("/v1/search", params={"query": "oak"}).json()["data"]
    assert [(one["conversation"], one["snippet"]) for one in found] == [
        (conversation, "Where is the oak?")
    ]


@pytest.mark.few(1)
def test_who_watches_is_told_of_replies(client: httpx.Client, conversation: str) -> None:
    kinds = list[str]()
    body = {"input": "And then?", "conversation": conversation, "max_output_tokens": 6}
    with client.stream("GET", "/v1/events") as events:
        assert events.status_code == 200
        asking = threading.Thread(target=posted, args=[client, "/v1/responses", body])
        asking.start()
        for line in events.iter_lines():
            if line.startswith("data: "):
                kinds.append(json.loads(line[6:])["type"])
            if "reply.completed" in kinds:
                break
        asking.join()
    assert "reply.delta" in kinds


@pytest.mark.few(1)
def test_a_checkpoint_is_a_place_and_says_why_no_kv_is_kept(
    client: httpx.Client, conversation: str
) -> None:
    made = posted(client, f"{PATH}/{conversation}/checkpoint", {"name": "safe"})
    assert made["checkpoint"] == "safe"
    assert made["kv"] == {"kept": False, "reason": "the model's runtime keeps its KV to itself"}
    body = {"input": "And then?", "conversation": conversation, "max_output_tokens": 6}
    posted(client, "/v1/responses", body)
    posted(client, f"{PATH}/{conversation}/rewind", {"checkpoint": "safe"})
    items = client.get(f"{PATH}/{conversation}/items").json()["data"]
    assert len(items) == 3
