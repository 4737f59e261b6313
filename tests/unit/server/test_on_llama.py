"""A server whose model runs on llama.cpp: all that it offers, and the same after a restart."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import recollect
from random_model import WITH_EXPERTS, write_bytes_as_vocabulary, write_random_model

pytestmark = pytest.mark.slow  # a model of its own computes, which takes long beside other tests
Json = dict[str, Any]
CHAT = "/v1/chat/completions"
PATH = "/v1/conversations"
LONG = "You are careful. " * 60
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have llama.cpp compute on one: several wait for each other while other tests have their cores."""
    monkeypatch.setattr(psutil, "cpu_count", lambda **_: 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    letters = write_bytes_as_vocabulary(folder / "letters.gguf")
    shape = replace(WITH_EXPERTS, context=4096, width=128, head_size=32)
    return write_random_model(folder / "experts.gguf", shape, vocabulary_of=letters)


@pytest.fixture
def begin(
    start: Callable[..., httpx.Client], file: Path, tmp_path: Path
) -> Callable[..., httpx.Client]:
    """Return what starts a server; the one after it finds what it left."""
    load = partial(
        recollect.load,
        str(file),
        runtime="llama",
        profile="exact",
        kv_disk=256 << 20,
        kv_memory=256 << 20,
        home=tmp_path / "home",
        tool_format="hermes",
    )
    return partial(start, load=lambda _: load(), names=("experts",))


def test_a_chat_reads_its_prompt_once(
    begin: Callable[..., httpx.Client], chat: Callable[..., Json]
) -> None:
    client = begin()
    first = chat(client, ("system", LONG), ("user", "One?"), temperature=0)
    said = first["choices"][0]["message"]["content"]
    second = chat(
        client, ("system", LONG), ("user", "One?"), ("assistant", said), ("user", "Two?")
    )["usage"]
    assert second["prompt_tokens"] > first["usage"]["prompt_tokens"] > len(LONG)
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


def test_calls_of_tools_and_forms_are_as_the_grammar_says(
    begin: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    """The weights are random, so that without one none would be."""
    client = begin()
    ask: Json = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 200,
        "temperature": 0.7,
        "seed": 5,
    }
    function = {"name": "look_up", "description": "Look something up.", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    choice = post(client, CHAT, {**ask, "tools": tools, "tool_choice": "required"})["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    called = choice["message"]["tool_calls"][0]["function"]
    assert called["name"] == "look_up"
    assert 0 <= json.loads(called["arguments"])["n"] <= 99
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
    answer = post(client, CHAT, {**ask, "response_format": form})["choices"][0]
    assert 0 <= json.loads(answer["message"]["content"])["n"] <= 99


def watched(client: httpx.Client, reading: threading.Event) -> set[str]:
    """Return the kinds of events up to the end of a reply; *reading* is set once they are watched."""
    kinds: set[str] = set()
    with client.stream("GET", "/v1/events") as response:
        for line in response.iter_lines():
            reading.set()
            kinds |= {line.removeprefix("event: ")} if line.startswith("event: ") else set()
            if "reply.completed" in kinds:
                break
    return kinds


def test_branches_events_and_costs_and_all_of_it_after_a_restart(
    begin: Callable[..., httpx.Client],
    post: Callable[..., Json],
    events: Callable[..., list[Any]],
    servers: ExitStack,
) -> None:
    client, reading = begin(), threading.Event()
    told = servers.enter_context(ThreadPoolExecutor()).submit(watched, client, reading)
    assert reading.wait(60)
    made = post(client, PATH, {"items": [{"role": "system", "content": LONG}]})["id"]
    body = {"conversation": made, "max_output_tokens": 8, "temperature": 0}
    asked = post(client, "/v1/responses", {**body, "input": "Hello"})
    prompt = asked["usage"]["input_tokens"]
    tree = f"{PATH}/{made}/tree"
    warm = client.get(tree).json()["nodes"][-1]["going_on"]
    assert warm["in_memory"] >= prompt
    assert warm["to_compute"] <= warm["tokens"] - prompt
    trial = {"prompts": [f"Way {n}?" for n in range(6)], "max_output_tokens": 6, "stream": True}
    tried = events(client, f"{PATH}/{made}/explore", trial)
    done = [one for one in tried if isinstance(one, dict)][-1]
    assert done["type"] == "explore.completed"
    assert done["usage"]["output_tokens"] == 6 * 6
    assert done["usage"]["recollect"]["computed_tokens"] < 6 * 60
    assert told.result(60) >= {"conversation.created", "reply.started", "reply.delta"}
    servers.close()

    client = begin()
    assert client.get(f"{PATH}/{made}/items").json()["data"]
    again = post(client, "/v1/responses", {**body, "input": "And now?"})["usage"]
    new = again["input_tokens"] - prompt - 8
    assert again["recollect"]["computed_tokens"] <= new + 32
    assert again["recollect"]["restored_tokens"] >= len(LONG) // 32 * 32
