"""A server whose model runs on llama.cpp."""

import json
from collections.abc import Callable
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
    """Return what starts a server."""
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
