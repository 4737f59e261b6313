"""What comes in as a body: what is refused, where that is said to be, and that it costs little."""

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, ValidationError

from recollect.conversation.model import Model
from recollect.kv.blocks import CachedBlock
from recollect.kv.prefix import PrefixCache
from recollect.server.anthropic import MessagesRequest
from recollect.server.chat_completions import ChatRequest
from recollect.server.completions import CompletionRequest
from recollect.server.conversation_routes import ConversationChange, NewConversation, NewItems
from recollect.server.fields import MOST_TOOLS, Bodies, Body, read_body, read_json
from recollect.server.refusals import ApiError
from recollect.server.response_object import ResponseRequest
from recollect.server.settings import Limits
from recollect.text.tokenizer import ByteTokenizer

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "get"}}


def refusal(data: str | bytes, limits: Limits | None = None) -> ApiError:
    body = data if isinstance(data, bytes) else data.encode()
    with pytest.raises(ApiError) as refused:
        read_json(body, limits or Limits())
    assert refused.value.status == 400
    assert refused.value.code == "invalid_json"
    assert refused.value.param is not None
    return refused.value


# --- JSON


@pytest.mark.parametrize(
    ("data", "told", "param"),
    [
        ("", "EOF", "body"),
        ("{", "column", "body"),
        ("NaN", "column 1", "body"),
        ('{"a": Infinity}', "column 7", "body"),
        (b"\xff", "column 1", "body"),
        (b'"\xed\xa0\x80"', "unicode", "body"),
        (r'{"a": "\ud800"}', "half a character", "body"),
        (r'{"\udfff": 1}', "half a character", "body"),
        ("1" * 5000, "out of range", "body"),
        ('{"a": [1, {"b": 1e400}]}', "a.1.b: ", "a.1.b"),
        ("-1e999", "larger than", "body"),
        ('{"tools": ' + "[" * 150 + "]" * 150 + "}", "100 deep", "tools.0.0"),
        ("[" * 100_000, "", "body"),
    ],
)
def test_what_is_no_json_that_can_be_written_again_is_refused_with_its_place(
    data: str | bytes, told: str, param: str
) -> None:
    refused = refusal(data)
    assert told in refused.message
    assert refused.param == param
    assert len(refused.message) < 300


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=30,
    )
)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    for is_ascii in (True, False):
        text = json.dumps(value, ensure_ascii=is_ascii)
        if not any("\ud800" <= char <= "\udfff" for char in text):
            assert read_json(text.encode(), Limits()) == value


def test_depth_is_counted_in_lists_and_objects() -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        end = "1" if opening != "[" else ""
        assert read_json((opening * 100 + end + closing * 100).encode(), Limits())
        refusal(opening * 101 + end + closing * 101)


def test_values_are_counted_and_not_commas_in_texts() -> None:
    limits = Limits(values=100)
    assert len(read_json(json.dumps(list(range(98))).encode(), limits)) == 98
    refusal(json.dumps(list(range(200))), limits)
    refusal(json.dumps([{} for _ in range(60)]), limits)
    refusal(json.dumps({str(name): 1 for name in range(200)}), limits)
    assert read_json(json.dumps([r"a\",[{" * 1000, "b"]).encode(), limits)


@pytest.mark.parametrize("piece", ["[],", "{},", "1,", '"",', '"" ', '{"":', "[", '"a":1,'])
def test_what_is_read_of_too_many_values_does_not_grow_with_them(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens looked at before a body is refused, at 10 and at 100 times as many as are allowed."""
    from recollect.server import fields

    limits, real = Limits(values=1000), fields.TOKEN
    counts = []

    class Counting:
        def finditer(self, data: bytes) -> Any:
            counts.append(0)
            for token in real.finditer(data):
                counts[-1] += 1
                yield token

    monkeypatch.setattr(fields, "TOKEN", Counting())
    monkeypatch.setattr(fields, "from_json", lambda *_args, **_options: pytest.fail("was read"))
    for times in (10, 100):
        body = "[" + piece * (limits.values * times) + "]"
        if piece != '"" ':  # nothing parts these, so the reader stops at the second
            refusal(body, limits)
    assert all(count <= 3 * limits.values + 2 for count in counts), counts
    assert len(set(counts)) <= 1


# --- mistakes


MANY = [
    (ChatRequest, lambda n: {"messages": [{}] * n}),
    (ChatRequest, lambda n: {"messages": [5] * n}),
    (ChatRequest, lambda n: {"messages": [USER], **{f"x{i}": 1 for i in range(n)}}),
    (ChatRequest, lambda n: {"messages": [{**USER, **{f"x{i}": 1 for i in range(n)}}]}),
    (ChatRequest, lambda n: {"messages": [{**USER, "content": [{"type": "x"}] * n}]}),
    (ChatRequest, lambda n: {"messages": [{**USER, "tool_calls": [{}] * n}]}),
    (ChatRequest, lambda n: {"messages": [USER], "logit_bias": {str(i): "x" for i in range(n)}}),
    (ChatRequest, lambda n: {"messages": [USER], "stop": [1] * n}),
    (ChatRequest, lambda n: {"messages": [USER], "tools": [{}] * n}),
    (ChatRequest, lambda n: {"messages": [USER], "modalities": ["x"] * n}),
    (CompletionRequest, lambda n: {"prompt": [None] * n}),
    (CompletionRequest, lambda n: {"prompt": [[None] * n] * 10}),
    (CompletionRequest, lambda n: {"prompt": [-1] * n}),
    (ResponseRequest, lambda n: {"input": [{}] * n}),
    (ResponseRequest, lambda n: {"input": [{"type": "function_call"}] * n}),
    (ResponseRequest, lambda n: {"input": "a", "tools": [{}] * n}),
    (ResponseRequest, lambda n: {"input": "a", "include": [1] * n}),
    (MessagesRequest, lambda n: {"messages": [{}] * n}),
    (MessagesRequest, lambda n: {"messages": [{"role": "user", "content": [{}] * n}]}),
    (MessagesRequest, lambda n: {"messages": [USER], "stop_sequences": [1] * n}),
    (NewConversation, lambda n: {"items": [{}] * n}),
    (NewItems, lambda n: {"items": [1] * n}),
    (ConversationChange, lambda n: {f"x{i}": 1 for i in range(n)}),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("kind", "body"), MANY)
def test_mistakes_are_not_collected(kind: type[Body], body: Callable[[int], Json]) -> None:
    """As many errors are held of 10,000 mistakes as of 1,000: a handful."""
    counts = []
    for n in (1000, 10_000):
        with pytest.raises(ValidationError) as wrong:
            kind.model_validate(body(n))
        counts.append(wrong.value.error_count())
    assert counts[0] == counts[1] <= 12, wrong.value.errors()[:20]


@pytest.mark.parametrize(
    ("kind", "body", "param", "told"),
    [
        (ChatRequest, 5, "body", "an object; it is 5"),
        (ChatRequest, None, "body", "it is null"),
        (ChatRequest, [], "body", "it is a list"),
        (ChatRequest, {}, "messages", "Field required"),
        (ChatRequest, {"messages": {}}, "messages", "a valid list; it is an object"),
        (ChatRequest, {"messages": [USER, {"content": "a"}]}, "messages.1.role", "required"),
        (
            ChatRequest,
            {"messages": [{"role": "bot", "content": "a"}]},
            "messages.0.role",
            "it is 'bot'",
        ),
        (
            ChatRequest,
            {"messages": [USER], "tool_choice": "any"},
            "tool_choice",
            "'required' or an object; it is 'any'",
        ),
        (
            ChatRequest,
            {"messages": [USER], "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "required",
        ),
        (
            ChatRequest,
            {
                "messages": [USER],
                "response_format": {"type": "json_schema", "json_schema": {"schema": 5}},
            },
            "response_format.json_schema.schema",
            "it is 5",
        ),
        (
            ChatRequest,
            {"messages": [{**USER, "contnet": 1}]},
            "messages.0.contnet",
            "'content'",
        ),
        (ChatRequest, {"messages": [USER], "logit_bias": {"5": 101}}, "logit_bias", "token 5"),
        (ResponseRequest, {"input": 5}, "input", "string or a valid list; it is 5"),
        (
            ResponseRequest,
            {"input": [{"role": "user", "content": 5}]},
            "input.0.content",
            "string; it is 5",
        ),
        (
            ResponseRequest,
            {"input": [{"type": "function_call", "call_id": "a", "name": 1, "arguments": ""}]},
            "input.0.name",
            "it is 1",
        ),
        (ResponseRequest, {"input": [{"type": "image"}]}, "input.0", "'image'"),
        (
            MessagesRequest,
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "required",
        ),
        (
            MessagesRequest,
            {
                "max_tokens": 1,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "citation": 1}]}
                ],
            },
            "messages.0.content.0.citation",
            "'citations'",
        ),
        (NewConversation, {"metadata": {"a": "b" * 70_000}}, "metadata", "65,536"),
    ],
)
def test_a_mistake_is_told_where_it_is_and_what_is_there(
    kind: type[Body], body: Any, param: str, told: str
) -> None:
    with pytest.raises(ApiError) as refused:
        read_body(json.dumps(body).encode(), kind, Limits())
    assert refused.value.param == param
    assert told in refused.value.message
    assert refused.value.code is not None
    assert refused.value.status == 400


def test_long_texts_of_a_client_are_not_sent_back(client: httpx.Client) -> None:
    long = "x" * 1_000_000
    for body in (
        {"messages": [USER], "model": long},
        {"messages": [{**USER, "contant": long}]},
        {"messages": [{"role": long, "content": "a"}]},
        {"messages": [USER], "tools": [{**TOOL, "function": {"name": long}}]},
    ):
        refused = client.post(CHAT, json=body)
        assert 400 <= refused.status_code < 500
        assert len(refused.content) < 3000


# --- what it costs


@pytest.mark.parametrize(
    "body", [b'{"text": "%b"}' % (b"a" * 100_000), b'{"text": [%b]}' % (b",".join([b"1"] * 2000))]
)
def test_a_large_body_is_read_beside_the_event_loop(body: bytes) -> None:
    may_go_on, threads = threading.Event(), []

    def slowly(value: Any) -> Any:
        threads.append(threading.current_thread().name)
        assert may_go_on.wait(60)
        return value

    class Slow(Body):
        text: Annotated[Any, BeforeValidator(slowly)]

    async def run() -> None:
        fields = Bodies(Limits())
        large = asyncio.create_task(fields.read(body, Slow))
        while not threads:
            await asyncio.sleep(0.001)  # the loop goes on
        may_go_on.set()
        await large
        await fields.read(b'{"text": "a"}', Slow)
        fields.close()

    asyncio.run(run())
    assert threads[0].startswith("recollect-body")
    assert threads[1] == threading.current_thread().name


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "piece", ["{}", "[]", '""', '{"a":{}}', '{"role":"user","contents":"a","x":1}', "5"]
)
def test_what_a_wrong_body_takes_has_a_bound(piece: str) -> None:
    """Bytes of Python objects at the peak: for the most values that are taken, and for ten times more."""
    limits, peaks = Limits(values=8192), []
    most = limits.values // (piece.count(":") + 2)
    for count in (most, 10 * most):
        body = f'{{"messages": [{",".join([piece] * count)}]}}'.encode()
        tracemalloc.start()
        with pytest.raises(ApiError) as refused:
            read_body(body, ChatRequest, limits)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(refused.value.message) < 300
    assert peaks[0] < 400 * limits.values, peaks
    assert peaks[1] < 100_000, peaks


# --- counts


@pytest.mark.slow
def test_counts_have_limits_that_are_told(client: httpx.Client) -> None:
    messages = [USER] * 5000
    tools = [
        {**TOOL, "function": {"name": f"tool_{number}", "parameters": {"type": "object"}}}
        for number in range(MOST_TOOLS + 1)
    ]
    call = {"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "b"}
    blocks = [{"role": "user", "content": [result] * 5000}]
    for path, body, param, most in (
        (CHAT, {"messages": messages}, "messages", "4,096"),
        (CHAT, {"messages": [USER], "tools": tools}, "tools", f"{MOST_TOOLS}"),
        ("/v1/responses", {"input": [call] * 5000}, "input", "4,096"),
        ("/v1/messages", {"messages": blocks, "max_tokens": 1}, "messages", "4,096"),
        ("/v1/messages/count_tokens", {"messages": blocks}, "messages", "4,096"),
        ("/v1/prewarm", {"messages": messages}, "messages", "4,096"),
        ("/v1/conversations", {"items": [call] * 5000}, "items", "4,096"),
    ):
        refused = client.post(path, json=body)
        error = refused.json()["error"]
        assert refused.status_code == 400, (path, refused.text)
        assert most in error["message"], error
        if "messages" not in path:  # Anthropic's errors have no such field
            assert error["param"] == param, (path, error)


# --- what is refused leaves nothing


def bad_bodies() -> list[tuple[str, bytes]]:
    """Return bodies that were each answered with a 500 once, or are next to such."""
    deep: Any = {"type": "string"}
    for _ in range(45):
        deep = {"type": "object", "properties": {"a": deep}}
    schemas: list[Any] = [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"allOf": [{"$ref": "#"}]},
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 10**300},
        {"$ref": "http://127.0.0.1:9/x"},
        {"not": {}},
        {"type": "object", "properties": 5},
        {"properties": {"a": {"$ref": "#/nowhere"}}},
        {"enum": []},
        deep,
    ]
    fields: list[tuple[str, str]] = []
    for schema in schemas:
        flat = {"type": "json_schema", "name": "a", "schema": schema}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        fields.append((CHAT, json.dumps({"messages": [USER], "response_format": form})))
        fields.append(("/v1/responses", json.dumps({"input": "a", "text": {"format": flat}})))
    for parameters in (5, [], "a", True, *schemas):
        function = {"name": "get", "parameters": parameters}
        tool = {"type": "function", "function": function}
        flat = {"type": "function", **function}
        chosen: Json = {"messages": [USER], "tool_choice": "required"}
        fields.append((CHAT, json.dumps({**chosen, "tools": [tool]})))
        fields.append(("/v1/responses", json.dumps({"input": "a", "tools": [flat]})))
        named = {"name": "get", "input_schema": parameters}
        chosen = {"messages": [USER], "max_tokens": 2, "tool_choice": {"type": "any"}}
        fields.append(("/v1/messages", json.dumps({**chosen, "tools": [named]})))
    for value in ("NaN", "1e400", "-Infinity", r'"\ud800"', "[" * 300 + "]" * 300):
        fields += [
            (CHAT, f'{{"messages": [{{"role": "user", "content": {value}}}]}}'),
            (CHAT, f'{{"messages": [{{"role": "user", "content": "a"}}], "user": {value}}}'),
            (CHAT, f'{{"messages": [{{"role": "user", "content": "a"}}], "top_k": {value}}}'),
            ("/v1/responses", f'{{"input": "a", "previous_response_id": {value}}}'),
            ("/v1/responses", f'{{"input": "a", "metadata": {{"a": {value}}}}}'),
            ("/v1/conversations", f'{{"metadata": {{"a": {value}}}}}'),
            ("/v1/conversations", f'{{"items": [{{"role": "user", "content": {value}}}]}}'),
            ("/v1/completions", f'{{"prompt": {value}}}'),
            ("/v1/messages", f'{{"max_tokens": 2, "messages": {value}}}'),
            ("/v1/prewarm", f'{{"messages": [{{"role": "user", "content": {value}}}]}}'),
        ]
    huge = str(10**300)
    for name in ("top_k", "seed", "max_tokens", "n", "top_logprobs", "temperature"):
        body = f'{{"messages": [{{"role": "user", "content": "a"}}], "{name}": {huge}}}'
        fields.append((CHAT, body))
    fields.append(("/v1/completions", f'{{"prompt": [{huge}]}}'))
    fields.append((CHAT, json.dumps({"messages": [USER], "logit_bias": {huge: 1}})))
    for name, token in (("messages", USER), ("prompt", "a")):
        banned = {str(token_id): -100 for token_id in range(ByteTokenizer().vocab_size)}
        path = CHAT if name == "messages" else "/v1/completions"
        body = json.dumps({name: [token], "logit_bias": banned, "max_tokens": 2})
        fields.append((path, body))
    raw = [(path, body.encode()) for path, body in fields]
    return [*raw, (CHAT, b"\xff\xfe"), (CHAT, b'{"messages": "\xff"}'), (CHAT, b"\x00" * 50)]


@pytest.mark.slow
def test_mistakes_are_refused_by_their_place_and_leave_nothing(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespaces: set[str] = set()
    root = PrefixCache.root

    def noting(cache: PrefixCache, namespace: str = "") -> CachedBlock:
        namespaces.add(namespace)
        return root(cache, namespace)

    monkeypatch.setattr(PrefixCache, "root", noting)
    model = make_model()
    client = start(load=lambda _: model, keys=["a", "b"], operators=["a"])
    client.post(CHAT, json={"messages": [USER], "max_tokens": 1})

    def left() -> tuple[Any, ...]:
        kept = client.get("/v1/conversations").json()["data"]
        lines = client.get("/metrics").text.splitlines()
        now = [line for line in lines if line.startswith(("recollect_running", "recollect_queue"))]
        return kept, now, sorted(namespaces)

    before = left()
    for path, body in bad_bodies():
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        shown = (path, body[:200], answer.text)
        assert answer.status_code < 500, shown
        if answer.status_code < 400:  # there is nothing wrong with it here
            if path == "/v1/responses":
                client.delete(f"{path}/{answer.json()['id']}")
            continue
        error = answer.json()["error"]
        assert error["message"], shown
        if path != "/v1/messages":
            assert error["code"], shown
        for key in ("wrong", "b\xff"):
            headers = {b"Authorization": f"Bearer {key}".encode("latin-1")}
            assert client.post(path, content=body, headers=headers).status_code == 401
    assert left() == before
    model.engine.check()
    assert [task for task in model.engine.tasks() if not task.idle] == []


# --- anything at all


SEEDS: dict[str, Json] = {
    CHAT: {
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "function": {"name": "get", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "d"},
        ],
        "max_tokens": 1,
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {}}}],
        "tool_choice": "auto",
        "logit_bias": {"5": 1},
        "stop": ["x"],
        "seed": 1,
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "c", "name": "get", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "d"},
        ],
        "max_output_tokens": 1,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "max_tokens": 1,
        "tools": [{"name": "get", "input_schema": {"type": "object"}}],
    },
    "/v1/completions": {"prompt": [[1, 2], [3]], "max_tokens": 1, "echo": True},
    "/v1/prewarm": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/conversations": {
        "items": [{"role": "user", "content": "a"}],
        "metadata": {"a": {"b": [1]}},
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}], "system": "b"},
    "/v1/conversations/{id}": {"metadata": {"a": "b"}},
    "/v1/conversations/{id}/items": {"items": [{"role": "assistant", "content": "a"}]},
    "/v1/conversations/{id}/rewind": {"turns": 1},
    "/v1/conversations/{id}/fork": {"name": "a", "at": None},
    "/v1/conversations/{id}/checkpoint": {"name": "a"},
    "/v1/conversations/{id}/explore": {
        "branches": [{"prompt": "a", "name": "b", "temperature": 1, "max_output_tokens": 1}],
        "max_output_tokens": 1,
        "reasoning": {"effort": "low"},
        "keep": False,
    },
}

NASTY = st.sampled_from(
    [
        "NaN",
        "1e999",
        "null",
        "true",
        "-1",
        str(2**63),
        str(10**200),
        "0.5",
        '""',
        r'"\ud800"',
        r'"\u0000"',
        '"<|im_end|>"',
        "[]",
        "{}",
        "[[]]",
        '{"$ref": "#"}',
        "[" * 120 + "]" * 120,
        '{"a": ' * 99 + "1" + "}" * 99,
    ]
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = [at]
    for name, part in inside:
        here = (*at, name)
        found += places(part, here) if isinstance(part, dict | list) else [here]
    return found


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a request that is right but for one place, or for a few bytes."""
    path = draw(st.sampled_from(sorted(SEEDS)))
    body = json.loads(json.dumps(SEEDS[path]))
    at = draw(st.sampled_from(places(body)))
    if at:
        parent = body
        for name in at[:-1]:
            parent = parent[name]
        parent[at[-1]] = "@@"
    else:
        body = "@@"
    text = json.dumps(body).replace('"@@"', draw(NASTY)).encode()
    if draw(st.booleans()):
        return path, text
    where = draw(st.integers(0, len(text)))
    return path, text[:where] + draw(st.binary(max_size=4)) + text[
        where + draw(st.integers(0, 3)) :
    ]


MADE = {"/v1/responses", "/v1/conversations"}
"""What makes conversations."""


@given(broken())
def test_no_broken_body_makes_it_fail_or_leaves_anything(
    shared: Callable[[str, bytes], httpx.Response],
    client: httpx.Client,
    wrong: tuple[str, bytes],
) -> None:
    path, body = wrong
    conversation = ""
    if "{id}" in path:
        asked = {"items": [{"role": "user", "content": "a"}]}
        conversation = client.post("/v1/conversations", json=asked).json()["id"]
        before = client.get(f"/v1/conversations/{conversation}/tree").json()
    answer = shared(path.replace("{id}", conversation), body)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
    elif path in MADE:
        assert client.delete(f"{path}/{answer.json()['id']}").status_code == 200
    if conversation:
        after = client.get(f"/v1/conversations/{conversation}/tree").json()
        assert answer.status_code < 400 or after == before
        assert client.delete(f"/v1/conversations/{conversation}").status_code == 200
    assert client.get("/v1/conversations").json()["data"] == []


@given(
    st.sampled_from(sorted(path for path in SEEDS if "{id}" not in path)), st.binary(max_size=64)
)
def test_no_bytes_make_it_fail(
    shared: Callable[[str, bytes], httpx.Response], path: str, body: bytes
) -> None:
    assert 400 <= shared(path, body).status_code < 500


@pytest.fixture
def shared(client: httpx.Client) -> Callable[[str, bytes], httpx.Response]:
    def ask(path: str, body: bytes) -> httpx.Response:
        return client.post(path, content=body, headers={"Content-Type": "application/json"})

    return ask


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/conversations/%ED%A0%80",
        "/v1/conversations/%00",
        "/v1/conversations/conv_0.%FF",
        "/v1/conversations/x/items?limit=1e9",
        "/v1/conversations/x/items?limit=" + "9" * 5000,
        "/v1/conversations/x/items?after=%ED%A0%80",
        "/v1/conversations/x/items?order=%00",
        "/v1/responses/%F0%9F",
        "/v1/models/%ED%A0%80/%2F..%2F",
        "/v1/responses/" + "a" * 50_000,
        "/%ED%A0%80",
    ],
)
def test_no_address_makes_it_fail(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 3000


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "Content-Type", "Origin", "Host"])
def test_no_header_makes_it_fail(client: httpx.Client, name: str) -> None:
    for value in (b"", b"\xff\xfe", b"Bearer \xed\xa0\x80", b"a" * 60_000, b"[::1", b":" * 100):
        answer = client.post(CHAT, json={"messages": [USER]}, headers={name.encode(): value})
        assert answer.status_code < 500, (name, value[:20])
