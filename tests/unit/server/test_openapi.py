"""The OpenAPI document is true: no request that it allows makes the server fail or hang."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = {
    "/",
    "/api/chat",
    "/api/generate",
    "/api/ps",
    "/api/show",
    "/api/tags",
    "/api/version",
    "/health",
    "/metrics",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/conversations",
    "/v1/conversations/{conversation_id}",
    "/v1/conversations/{conversation_id}/checkpoint",
    "/v1/conversations/{conversation_id}/branches/{branch}",
    "/v1/conversations/{conversation_id}/export",
    "/v1/conversations/import",
    "/v1/conversations/{conversation_id}/checkpoints/{name}",
    "/v1/conversations/{conversation_id}/explore",
    "/v1/conversations/{conversation_id}/fork",
    "/v1/conversations/{conversation_id}/items",
    "/v1/conversations/{conversation_id}/items/{item_id}",
    "/v1/conversations/{conversation_id}/rewind",
    "/v1/conversations/{conversation_id}/tree",
    "/v1/events",
    "/v1/kv",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/{model_id}",
    "/v1/prewarm",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/input_items",
    "/v1/search",
    "/v1/conversations/{conversation_id}/branches",
    "/v1/conversations/{conversation_id}/checkpoints",
}


@pytest.mark.slow
def test_the_document_names_every_call(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == PATHS


def test_no_page_runs_scripts_of_others_in_the_servers_name(client: httpx.Client) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404
    assert client.get("/").headers["content-type"] == "application/json"


@pytest.mark.slow
def test_every_body_passes_the_one_check(client: httpx.Client) -> None:
    """A body that is too deep is no JSON to any call that takes one."""
    document = client.get("/openapi.json").json()
    deep = "[" * 150 + "]" * 150
    takers = [path for path, calls in document["paths"].items() if "post" in calls]
    assert len(takers) > 10
    for path in takers:
        headers = {"Content-Type": "application/json"}
        refused = client.post(path.replace("{", "").replace("}", ""), content=deep, headers=headers)
        assert refused.status_code == 400, path
        error = refused.json()["error"]
        told = error if path.startswith("/api/") else error["message"]
        assert "100 deep" in told, path


SHORT = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
"""Where a reply would go on to the end of the context otherwise."""


def shorten(path: str, body: Any) -> None:
    """Ask for a short reply, without making a wrong request right."""
    name = SHORT.get(path)
    if isinstance(body, dict) and path.startswith("/api/"):
        options = body.setdefault("options", {})
        if isinstance(options, dict) and isinstance(options.get("num_predict", 4), int):
            options["num_predict"] = 4
    if isinstance(body, dict) and name is not None and isinstance(body.get(name, 4), int):
        body[name] = 4
        body.pop("max_completion_tokens", None)


def begun(client: httpx.Client, request: dict[str, Any]) -> int:
    """Return the status that a stream begins with, and leave."""
    names = ("method", "url", "params", "headers")
    with client.stream(**{name: request[name] for name in names}, timeout=60) as response:
        assert response.status_code < 500
        return response.status_code


@pytest.mark.slow
def test_no_request_makes_it_fail(client: httpx.Client) -> None:
    """Requests made from the document, nothing longer than 10 s."""
    import schemathesis  # takes a second, which no other test should pay
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.result import Ok

    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    statuses: Counter[int] = Counter()

    def try_out(case: Any) -> None:
        if case.operation.path == "/v1/events":  # goes on until its client leaves
            statuses[begun(client, case.as_transport_kwargs(base_url=str(client.base_url)))] += 1
            return
        shorten(case.operation.path, case.body)
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error])

    for result in schema.get_all_operations():
        bounded = settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        assert isinstance(result, Ok), result
        bounded(given(result.ok().as_strategy())(try_out))()
    assert statuses[200] > 20, statuses
    assert statuses.total() > 5 * len(PATHS)


@settings(max_examples=min(40, settings().max_examples))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "role", "content", "model", "stop", "n"]), inner
            )
        ),
        max_leaves=8,
    )
)
def test_no_json_makes_it_fail(shared: Callable[[Any], int], body: Any) -> None:
    assert shared(body) < 500


@pytest.fixture
def shared(client: httpx.Client) -> Callable[[Any], int]:
    def ask(body: Any) -> int:
        content = json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json"}
        path = "/v1/chat/completions"
        return client.post(path, content=content, headers=headers).status_code

    return ask
