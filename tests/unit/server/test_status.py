"""What a server says of itself, and what it makes of conversations that come early."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model
from recollect.engine.drafts import Drafts, PassTimes
from recollect.server.usage import PrefillSpeed, cost
from recollect.types import Usage

Json = dict[str, Any]


def metric(client: httpx.Client, start: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


def test_metrics_count_what_was_done(client: httpx.Client, chat: Callable[..., Json]) -> None:
    first = chat(client, ("system", "a" * 100), ("user", "Hello"))
    second = chat(client, ("system", "a" * 100), ("user", "Hello you"))
    client.get("/v1/nowhere")
    tokens = 'recollect_prompt_tokens_total{model="reference",source='
    computed = [one["usage"]["recollect"]["computed_tokens"] for one in (first, second)]
    reused = second["usage"]["recollect"]["reused_tokens"]
    assert metric(client, tokens + '"computed"}') == sum(computed)
    assert metric(client, tokens + '"memory"}') == reused > 100
    assert metric(client, "recollect_first_token_seconds_count") == 2
    assert metric(client, 'recollect_replies_total{model="reference",reason="new"}') == 2
    requests = 'recollect_requests_total{endpoint="/v1/chat/completions",status="200"}'
    assert metric(client, requests) == 2
    assert metric(client, 'recollect_requests_total{endpoint="other",status="404"}') == 1
    assert metric(client, 'recollect_blocks{model="reference",state="') == 512
    assert metric(client, "recollect_running") == 0


def test_guesses_are_told_and_counted(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    chat: Callable[..., Json],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PassTimes, "of", lambda _self, width: 1 + width / 50)  # so that they pay

    def load(_: str) -> Model:
        model = make_model()
        model.engine.drafts = Drafts(model.engine.info)
        return model

    client = start(load=load)
    for _ in range(2):
        usage = chat(client, ("user", "Hello"), max_tokens=40)["usage"]
    told = usage["recollect"]
    assert 0 < told["accepted_tokens"] <= told["drafted_tokens"]
    guessed = 'recollect_drafted_tokens_total{model="reference",outcome="'
    assert metric(client, guessed + 'accepted"}') >= told["accepted_tokens"]
    assert metric(client, guessed) >= told["drafted_tokens"]


def test_a_conversation_is_computed_before_it_is_asked(
    client: httpx.Client, post: Callable[..., Json], chat: Callable[..., Json]
) -> None:
    said = [("system", "a" * 100), ("user", "What is")]
    messages = [{"role": role, "content": content} for role, content in said]
    warm = post(client, "/v1/prewarm", {"messages": messages})
    assert warm["computed_tokens"] == warm["prompt_tokens"] > 100
    again = post(client, "/v1/prewarm", {"messages": messages})
    assert again["computed_tokens"] <= 1
    answer = chat(client, said[0], ("user", "What is it?"))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= warm["prompt_tokens"] - 1
    post(client, "/v1/prewarm", {"messages": messages[:1]})
    post(client, "/v1/prewarm", {"messages": messages[1:]})


def usage(prompt: int, computed: int, *, prefill_tps: float | None = None) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        reused_tokens=prompt - computed,
        computed_tokens=computed,
        generated_tokens=3,
        ttft_s=0.1,
        prefill_tps=prefill_tps,
        decode_tps=None,
    )


def test_time_saved_is_what_the_reused_tokens_would_have_taken() -> None:
    speed = PrefillSpeed()
    assert cost([usage(100, 10)], speed).time_saved_s is None
    speed.learn(usage(100, 10, prefill_tps=1.0))  # too few to tell
    assert speed.time_saved_s(usage(100, 10)) is None
    speed.learn(usage(100, 100, prefill_tps=200.0))
    assert cost([usage(100, 10)], speed).time_saved_s == 90 / 200


def test_replies_that_share_a_prompt_cost_it_once() -> None:
    shared = cost([usage(100, 100), usage(100, 1)], PrefillSpeed())
    assert (shared.prompt_tokens, shared.computed_tokens, shared.cached_tokens) == (100, 100, 0)
    assert shared.generated_tokens == 6
    each = cost([usage(100, 100), usage(50, 1)], PrefillSpeed(), per_prompt=1)
    assert (each.prompt_tokens, each.computed_tokens, each.reused_tokens) == (150, 101, 49)


def test_a_call_by_another_method_is_told_which_there_is(client: httpx.Client) -> None:
    answer = client.get("/v1/chat/completions")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert "GET" in error["message"]
    assert "/openapi.json" in error["message"]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1", "the calls below it are /v1/chat/completions, /v1/responses, "),
        ("/api", "the calls below it are /api/chat, "),
        (
            "/chat/completions",
            "the call is /v1/chat/completions here, so correct the client's base URL",
        ),
        ("/v1/v1/messages", "the call is /v1/messages here, so correct the client's base URL"),
        ("/v1/api/tags", "the call is /api/tags here, so correct the client's base URL"),
        ("/models", "the call is /v1/models here, so correct the client's base URL"),
        ("/v1/embeddings", "these models write text and make no embeddings"),
        ("/api/embed", "these models write text and make no embeddings"),
        ("/api/embeddings", "these models write text and make no embeddings"),
        ("/v1/audio/speech", "these models read and write text alone"),
        ("/api/pull", "models are fetched on the server's own machine, by `recollect pull NAME`"),
        (
            "/v1/files",
            "of OpenAI's and Anthropic's APIs there are chat completions, completions, responses",
        ),
        ("/v2", "the usual calls are /v1/chat/completions, "),
        ("/v1/nowhere", "the usual calls are /v1/chat/completions, "),
        ("//", "the usual calls are /v1/chat/completions, "),
    ],
)
def test_a_path_where_nothing_is_leads_to_what_is_there(
    client: httpx.Client, path: str, told: str
) -> None:
    answer = client.get(str(client.base_url).rstrip("/") + path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message.startswith(f"There is nothing at {path!r}: {told}")
    assert message.endswith("; /openapi.json describes all calls.")
    if not isinstance(error, str):
        assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
