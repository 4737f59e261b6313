"""Models come when they are asked for, and go when others need their memory."""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

import recollect
from recollect.conversation.model import Model
from recollect.errors import FetchError, UnknownModelError
from recollect.server.hub import ModelHub
from recollect.server.refusals import ApiError
from recollect.server.settings import Limits


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def make_hub(make_model: Callable[..., Model], loads: list[str]) -> Callable[..., ModelHub]:
    """Return a maker of hubs whose models take 64 blocks of KV."""

    def load(name: str) -> Model:
        loads.append(name)
        return make_model(num_blocks=64)

    def make(names: str, *, models_in_memory: int | None = None, **more: Any) -> ModelHub:
        size = load("size").engine.info.bytes_per_block * 64
        loads.clear()
        budget = None if models_in_memory is None else models_in_memory * size
        return ModelHub(load, names.split(), memory_bytes=budget, **more)

    return make


def test_a_model_is_loaded_once_for_all_who_wait(
    make_hub: Callable[..., ModelHub], loads: list[str]
) -> None:
    async def run() -> None:
        hub = make_hub("a b", aliases={"gpt": "b"})
        leases = await asyncio.gather(*(hub.acquire(name) for name in (None, "a", "gpt", "b")))
        assert [lease.name for lease in leases] == ["a", "a", "b", "b"]
        assert leases[0].model is leases[1].model
        await hub.close()

    asyncio.run(run())
    assert loads == ["a", "b"]


def test_what_guesses_for_a_model_takes_memory_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights and its KV, as the larger one's."""

    def load_it(_: str) -> Model:
        kv = 2 * 40_960
        return recollect.load(
            "reference", home=tmp_path, kv_disk=0, kv_memory=kv, draft_model="reference"
        )

    async def run() -> Model:
        hub = ModelHub(
            load_it, ["a"], memory_bytes=1, weight_bytes=lambda _: 100_000, draft_bytes=7_000
        )
        model = (await hub.acquire("a")).model
        await hub.close()
        return model

    with caplog.at_level("INFO"):
        model = asyncio.run(run())
    assert model.kv_bytes == 2 * 40_960
    assert f"a takes about {107_000 + 81_920:,} bytes with its KV" in caplog.text
    assert "loaded a, guessed by reference, in" in caplog.text


@pytest.mark.parametrize("which", [0, 1])
def test_where_the_system_has_no_thread_left_the_turn_is_given_back(
    start: Callable[..., httpx.Client], monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The one that begins a reply, and the one that ends it."""
    client = start(limits=Limits(concurrent=1, queue=0, shutdown_s=5))
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    begin, asked = threading.Thread.start, list[str]()

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "recollect-request":
            asked.append(thread.name)
            if len(asked) == which + 1:
                raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    refused = client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_threads")
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_what_was_not_offered_is_never_loaded(
    make_hub: Callable[..., ModelHub], loads: list[str]
) -> None:
    async def run() -> None:
        hub = make_hub("a")
        for name in ("b", "../a", "/etc/passwd", "org/repo:x.gguf"):
            with pytest.raises(UnknownModelError, match="choose one of a"):
                await hub.acquire(name)

    asyncio.run(run())
    assert loads == []


def test_the_least_recently_used_goes_and_what_is_in_use_stays(
    make_hub: Callable[..., ModelHub], loads: list[str]
) -> None:
    async def run() -> None:
        hub = make_hub("a b c", models_in_memory=2)
        (await hub.acquire("a")).release()
        held = await hub.acquire("b")
        (await hub.acquire("c")).release()
        assert set(hub.loaded()) == {"b", "c"}
        (await hub.acquire("a")).release()
        assert set(hub.loaded()) == {"a", "b"}
        held.release()
        held.release()
        (await hub.acquire("c")).release()
        assert set(hub.loaded()) == {"b", "c"}  # b was in use longer
        await hub.close()
        assert hub.loaded() == {}

    asyncio.run(run())
    assert loads == ["a", "b", "c", "a", "c"]


def test_where_all_memory_is_in_use_a_client_is_told_to_come_back(
    make_hub: Callable[..., ModelHub],
) -> None:
    async def run() -> None:
        hub = make_hub("a b", models_in_memory=1, weight_bytes=lambda _: 1)
        await hub.acquire("a")
        with pytest.raises(ApiError, match="no memory") as refused:
            await hub.acquire("b")
        assert refused.value.status == 503
        assert "Retry-After" in refused.value.sent_headers
        await hub.close()

    asyncio.run(run())


@pytest.mark.slow
def test_what_is_loaded_can_be_looked_at_while_it_changes(
    make_hub: Callable[..., ModelHub],
) -> None:
    """Between any two steps of the look, another thread has loaded one more model."""

    async def run() -> None:
        more = [f"m{number}" for number in range(30)]
        hub = make_hub(" ".join(["a", "b", *more]))
        loop = asyncio.get_running_loop()
        (await hub.acquire("a")).release()
        (await hub.acquire("b")).release()
        names = iter(more)

        async def change(name: str) -> None:
            (await hub.acquire(name)).release()

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            if not frame.f_code.co_filename.endswith("hub.py"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and (name := next(names, None)) is not None:
                asyncio.run_coroutine_threadsafe(change(name), loop).result(20)
            return trace

        def look() -> dict[str, Model]:
            sys.settrace(trace)
            try:
                return hub.loaded()
            finally:
                sys.settrace(None)

        seen = await asyncio.to_thread(look)
        assert {"a", "b"} <= set(seen)
        assert next(names, None) in {None, *more[5:]}, "it was looked at while others came"
        await hub.close()

    asyncio.run(run())


def test_health_answers_while_the_model_is_loaded(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model]
) -> None:
    go = threading.Event()

    def load(_name: str) -> Model:
        assert go.wait(60)
        return make_model()

    client = start(load=load)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "loading")
    assert client.get("/v1/models").json()["data"][0]["recollect"]["loaded"] is False
    go.set()
    hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=hello).status_code == 200
    assert client.get("/health").json()["status"] == "ok"
    one = client.get("/v1/models/reference").json()
    assert one["recollect"] == {"loaded": True, "context_length": 2048, "profile": "exact"}
    assert client.get("/v1/models/other").status_code == 404


def test_a_model_that_cannot_be_loaded_is_told_without_this_machines_paths(
    start: Callable[..., httpx.Client],
) -> None:
    def load(_name: str) -> Model:
        raise FetchError("/home/somebody/models cannot be written.")

    client = start(load=load)
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    answer = client.post("/v1/chat/completions", json=hello)
    assert answer.status_code == 503
    assert "somebody" not in answer.text
    assert client.get("/health").json()["status"] == "failed"


@pytest.mark.slow
def test_conversations_stay_when_their_model_is_unloaded(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    post: Callable[..., dict[str, Any]],
) -> None:
    size = make_model(num_blocks=128).engine.info.bytes_per_block * 128
    client = start(load=lambda _: make_model(num_blocks=128), names=["a", "b"], memory_bytes=size)
    body = {"input": "Hello", "max_output_tokens": 4}
    first = post(client, "/v1/responses", body)
    other = post(client, "/v1/responses", {**body, "model": "b"})
    second = post(client, "/v1/responses", {**body, "previous_response_id": first["id"]})
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert other["model"] == "b"
    loaded = [one["recollect"]["loaded"] for one in client.get("/v1/models").json()["data"]]
    assert loaded == [True, False]


@pytest.mark.parametrize(("budget", "told"), [(1, True), (10**12, False)])
def test_a_budget_that_one_model_exceeds_is_remarked_on(
    caplog: pytest.LogCaptureFixture,
    make_model: Callable[..., Model],
    budget: int,
    told: bool,
) -> None:
    hub = ModelHub(
        lambda _: make_model(num_blocks=64),
        ["a"],
        memory_bytes=budget,
        weight_bytes=lambda _: 7 * 10**9,
    )

    async def run() -> None:
        (await hub.acquire(None)).release()
        await hub.close()

    asyncio.run(run())
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == told
    assert all("takes about 7,000" in one and "--memory" in one for one in warnings)
