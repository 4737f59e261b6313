"""What an operator marks public is computed once for all keys; everything else stays a key's own."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.server.hub import publish_later

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
SYSTEM = "You answer for the town library. " * 8
MARK: Json = {"messages": [{"role": "system", "content": SYSTEM}], "public": True}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def ask(post: Callable[..., Json]) -> Callable[..., Json]:
    """Return what says something under a key, and returns the answer."""

    def ask(client: httpx.Client, key: str, *said: str, system: str = SYSTEM) -> Json:
        roles = ["user", "assistant"] * len(said)
        messages = [{"role": "system", "content": system}]
        messages += [
            {"role": role, "content": text} for role, text in zip(roles, said, strict=False)
        ]
        body = {"messages": messages, "max_tokens": 4}
        return post(client, CHAT, body, headers=bearer(key))

    return ask


def computed(answer: Json) -> int:
    return int(answer["usage"]["recollect"]["computed_tokens"])


def own_part(answer: Json) -> int:
    return int(answer["usage"]["prompt_tokens"]) - len(SYSTEM)


def test_a_marked_prompt_is_computed_once_for_all_keys(
    start: Callable[..., httpx.Client], post: Callable[..., Json], ask: Callable[..., Json]
) -> None:
    client = start(keys=["operator", "a", "b"], operators=["operator"])
    marked = post(client, "/v1/prewarm", MARK)
    assert marked["public"]
    assert marked["computed_tokens"] == marked["prompt_tokens"] > len(SYSTEM)
    for key in ("a", "b", "operator"):
        answer = ask(client, key, "When do you open?")
        usage = answer["usage"]
        assert usage["recollect"]["reused_tokens"] == marked["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == marked["prompt_tokens"]
        assert usage["recollect"]["tier"] == "memory"
        assert computed(answer) == usage["prompt_tokens"] - marked["prompt_tokens"] < 60
    assert post(client, "/v1/prewarm", MARK)["computed_tokens"] == 0


def test_without_the_mark_each_key_computes_all(
    start: Callable[..., httpx.Client], post: Callable[..., Json], ask: Callable[..., Json]
) -> None:
    client = start(keys=["operator", "a", "b"], operators=["operator"])
    post(client, "/v1/prewarm", {**MARK, "public": False})
    for key in ("a", "b"):
        answer = ask(client, key, "When do you open?")
        assert computed(answer) == answer["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_what_one_key_goes_on_with_is_computed_again_for_another(
    start: Callable[..., httpx.Client], post: Callable[..., Json], ask: Callable[..., Json]
) -> None:
    client = start(keys=["operator", "a", "b"], operators=["operator"])
    post(client, "/v1/prewarm", MARK)
    first = ask(client, "a", "a secret " * 20)
    assert computed(ask(client, "a", "a secret " * 20)) == 0
    for key in ("b", "operator"):
        assert computed(ask(client, key, "a secret " * 20)) == computed(first) > 180
    other = ask(client, "b", "When?", system="You are a poet. " * 20)
    assert computed(other) > 320, "another prompt is shared with nobody"


@pytest.mark.slow
def test_replies_are_those_of_a_server_that_shares_nothing(
    start: Callable[..., httpx.Client], post: Callable[..., Json], ask: Callable[..., Json]
) -> None:
    plain, marked = (start(keys=["operator", "a", "b"], operators=["operator"]) for _ in range(2))
    post(marked, "/v1/prewarm", MARK)
    for key in ("a", "b"):
        said = ["When do you open?", "At nine.", "And on Sunday?"]
        one, other = (ask(client, key, *said) for client in (plain, marked))
        assert one["choices"][0]["message"] == other["choices"][0]["message"]


def test_only_an_operator_may_mark(
    start: Callable[..., httpx.Client], ask: Callable[..., Json]
) -> None:
    client = start(keys=["operator", "a", "b"], operators=["operator"])
    refused = client.post("/v1/prewarm", json=MARK, headers=bearer("a"))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "operator_only"
    assert "--operator" in refused.json()["error"]["message"]
    answer = ask(client, "b", "When do you open?")
    assert computed(answer) == answer["usage"]["prompt_tokens"]


def test_what_does_not_fit_is_refused_and_told(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model]
) -> None:
    client = start(load=lambda _: make_model(num_blocks=64))
    refused = client.post("/v1/prewarm", json=MARK)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "memory_limit"


def test_what_fills_no_block_is_refused_and_told(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model]
) -> None:
    client = start(load=lambda _: make_model(whole_blocks_only=True, block_size=512))
    refused = client.post("/v1/prewarm", json=MARK)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "too_short"


def test_the_beginning_of_a_conversation_may_be_marked(
    start: Callable[..., httpx.Client], post: Callable[..., Json], ask: Callable[..., Json]
) -> None:
    client = start()  # without keys whoever is there is the operator
    said = [
        ("system", SYSTEM),
        ("user", "When do you open?"),
        ("assistant", "At nine."),
        ("user", "And on"),
    ]
    messages = [{"role": role, "content": content} for role, content in said]
    marked = post(client, "/v1/prewarm", {"messages": messages, "public": True})
    answer = ask(client, "any", "When do you open?", "At nine.", "And on Sunday?")
    assert answer["usage"]["recollect"]["reused_tokens"] == marked["prompt_tokens"]


@pytest.mark.slow
def test_prompts_are_published_after_each_load(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], ask: Callable[..., Json]
) -> None:
    threads: list[threading.Thread] = []
    client = start(
        keys=["a", "b"],
        names=("one", "other"),
        memory_bytes=1,  # so that there is only one at a time
        on_load=lambda model: threads.append(publish_later(model, [SYSTEM, "too long " * 1000])),
    )
    for number, name in enumerate(("one", "other", "one"), 1):
        client.post(CHAT, json={"model": name, "messages": [{"role": "user", "content": "Hi"}]})
        assert len(threads) == number
        threads[-1].join(timeout=60)
        body = {"model": name, "messages": [*MARK["messages"], {"role": "user", "content": "Hi"}]}
        answer = client.post(CHAT, json=body, headers=bearer("b")).json()
        assert computed(answer) < 60


@pytest.mark.parametrize("working", [False, True])
def test_a_model_that_goes_takes_the_work_with_it(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, working: bool
) -> None:
    model = make_model()
    forward = model.engine.runtime.forward
    begun, goes_on = threading.Event(), threading.Event()

    def slow(rows: Any) -> Any:
        begun.set()
        assert goes_on.wait(timeout=60)
        return forward(rows)

    monkeypatch.setattr(model.engine.runtime, "forward", slow)
    closing = threading.Thread(target=model.close)
    if not working:
        goes_on.set()
        closing.start()
        closing.join(timeout=60)
    publishing = publish_later(model, ["long " * 200, SYSTEM])
    if working:
        assert begun.wait(timeout=60)
        closing.start()
        goes_on.set()
    for thread in (publishing, closing):
        thread.join(timeout=60)
        assert not thread.is_alive()
