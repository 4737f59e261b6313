"""What clients say beside the usual is taken, or refused in words; all APIs decide alike."""

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic_core import from_json

from recollect.conversation.model import Model
from recollect.server.refusals import nearest

Json = dict[str, Any]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hello"}
ASK: dict[str, Json] = {
    CHAT: {"messages": [USER], "max_tokens": 8},
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 8},
    RESPONSES: {"input": [USER], "max_output_tokens": 8},
    MESSAGES: {"messages": [USER], "max_tokens": 8},
}
EVERYWHERE = pytest.mark.parametrize("path", list(ASK))
IGNORED = "x-recollect-ignored"


def said(path: str, answer: Json) -> str:
    """Return what a reply says, whatever the API; equal prompts have equal replies here."""
    text: str = {
        CHAT: lambda: answer["choices"][0]["message"]["content"],
        COMPLETIONS: lambda: answer["choices"][0]["text"],
        RESPONSES: lambda: answer["output"][0]["content"][0]["text"],
        MESSAGES: lambda: answer["content"][0]["text"],
    }[path]()
    return text


def with_history(path: str, *messages: Json, **fields: Any) -> Json:
    name = "input" if path == RESPONSES else "messages"
    return {**ASK[path], name: list(messages), **fields}


# --- fields


@pytest.mark.few(1)
@EVERYWHERE
def test_an_unknown_field_changes_nothing_and_is_named(
    client: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain = client.post(path, json=ASK[path])
    more = {**ASK[path], "client_metadata": {"a": 1}, "colour, of\nit": "red"}
    for stream in (False, True):
        answer = client.post(path, json={**more, "stream": stream})
        assert answer.status_code == 200
        assert answer.headers[IGNORED] == "client_metadata, colour??of?it"
    assert said(path, client.post(path, json=more).json()) == said(path, plain.json())
    assert IGNORED not in plain.headers
    logged = [line for line in caplog.messages if "client_metadata" in line]
    assert len(logged) == 1, "each name once, however many requests have it"
    assert f"requests to {path}: " in logged[0]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        (CHAT, {"tools": [{"type": "function", "function": None}]}, "tools.0.function"),
        (
            CHAT,
            {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": None}]}]},
            "messages.1.tool_calls.0.id",
        ),
        (
            CHAT,
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": None}}],
                    },
                ]
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
        (RESPONSES, {"input": [USER, {**OUTPUT, "output": None}]}, "input.1.output"),
        (
            RESPONSES,
            {"tools": [{"type": "namespace", "name": "a", "tools": None}]},
            "tools.0.tools",
        ),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": None}]}, "tools.0.input_schema"),
        (
            MESSAGES,
            {"messages": [USER, {"role": "assistant", "content": [{**USE, "input": None}]}, USER]},
            "messages.1.content.0.input",
        ),
    ],
)
def test_what_is_needed_and_null_is_told_at_its_place(
    client: httpx.Client, path: str, fields: Json, place: str
) -> None:
    refused = client.post(path, json={**ASK[path], **fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == f"{place}: Field required."


@EVERYWHERE
def test_a_mistyped_field_is_refused_naming_the_one_that_is_meant(
    client: httpx.Client, path: str
) -> None:
    for wrong, meant in (("temprature", "temperature"), ("steam", "stream"), ("modle", "model")):
        error = client.post(path, json={**ASK[path], wrong: 1})
        assert error.status_code == 400
        assert f"'{meant}'" in error.text
        assert wrong in error.text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("max_tokes", "max_tokens"),
        ("n", None),
        ("id", None),
        ("stpo", "stop"),
        ("step", "stop"),
        ("steps", None),
        ("client_metadata", None),
        ("Temperature", "temperature"),
        ("xtemperaturex", "temperature"),
        ("xxtemperaturex", None),
    ],
)
def test_a_name_is_near_within_two_edits(name: str, meant: str | None) -> None:
    known = ["temperature", "max_tokens", "stop", "user"]
    assert nearest(name, known) == meant


@pytest.mark.few(1)
@EVERYWHERE
def test_null_is_not_given(client: httpx.Client, path: str) -> None:
    """Of every field that the document has and that is not required."""
    document = client.get("/openapi.json").json()
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    names = [name for name in schema["properties"] if name not in (*required, *ASK[path])]
    assert len(names) > 10
    answer = client.post(path, json={**ASK[path], **dict.fromkeys(names), "unheard_of": None})
    assert answer.status_code == 200, answer.text
    assert IGNORED not in answer.headers
    assert said(path, answer.json()) == said(path, client.post(path, json=ASK[path]).json())
    for name in names:
        kinds = schema["properties"][name].get("anyOf")
        assert kinds is None or {"type": "null"} in kinds, "and the document says so"


def test_null_inside_parts_is_not_given_either(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f"}, "strict": None}
    message = {**USER, "name": None, "tool_calls": None, "tool_call_id": None, "audio": None}
    options = {"include_usage": None}
    body = {**ASK[CHAT], "messages": [message], "tools": [tool], "stream_options": options}
    assert client.post(CHAT, json={**body, "stream": True}).status_code == 200


@pytest.mark.few(1)
@EVERYWHERE
def test_a_strict_server_refuses_every_field_that_it_does_not_know(
    start: Callable[..., httpx.Client], path: str
) -> None:
    client = start(is_strict=True)
    assert client.post(path, json=ASK[path]).status_code == 200
    for name in ("client_metadata", "temprature"):
        refused = client.post(path, json={**ASK[path], name: 1})
        assert refused.status_code == 400
        assert name in refused.text
    if path != COMPLETIONS:
        tools = [{"type": "web_search", "name": "web_search"}]
        assert client.post(path, json={**ASK[path], "tools": tools}).status_code == 400


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        (CHAT, {"messages": [USER, {"role": "user", "content": [IMAGE]}]}, "messages.1.content"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"guided_json": {"type": "object"}}, "guided_json"),
        (CHAT, {"modalities": ["audio"]}, "modalities.0"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content",
        ),
        (RESPONSES, {"background": True}, "background"),
        (COMPLETIONS, {"suffix": "b"}, "suffix"),
        (COMPLETIONS, {"best_of": 3}, "best_of"),
        (RESPONSES, {"prompt": {"id": "a"}}, "prompt"),
        (RESPONSES, {"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input.0"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content.0",
        ),
        (MESSAGES, {"mcp_servers": [{}]}, "mcp_servers"),
        (COMPLETIONS, {"min_tokens": 4}, "min_tokens"),
    ],
)
def test_what_would_change_the_reply_and_cannot_be_done_is_refused_at_its_place(
    client: httpx.Client, path: str, fields: Json, place: str
) -> None:
    refused = client.post(path, json={**ASK[path], **fields})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].startswith(f"{place}: ")
    assert error.get("param", place) == place
    assert "Input should be" not in error["message"] or path == CHAT, "what to do instead"


TOOL = {"name": "f", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": TOOL}
NO_SCHEMA = {"name": "a", "schema": {"type": "nonsense"}}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"model": "nobody"}, "model"),
        (COMPLETIONS, {"model": "nobody"}, "model"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9_000}]}, "messages"),
        (RESPONSES, {"input": "x" * 9_000}, "input"),
        (COMPLETIONS, {"prompt": "x" * 9_000}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 99_999]}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (CHAT, {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
        (CHAT, {"tools": [CHAT_TOOL, CHAT_TOOL]}, "tools"),
        (RESPONSES, {"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (RESPONSES, {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": NO_SCHEMA}},
            "response_format",
        ),
        (RESPONSES, {"text": {"format": {"type": "json_schema", **NO_SCHEMA}}}, "text.format"),
        (
            RESPONSES,
            {
                "text": {"format": {"type": "json_schema", **NO_SCHEMA}},
                "tools": [{"type": "function", **TOOL}],
            },
            "text.format",
        ),
        (CHAT, {"logit_bias": {"9999999": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT, {"stop": ["x"] * 100}, "stop"),
        (CHAT, {"stop": ["x" * 9_000]}, "stop"),
        (CHAT, {"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        (CHAT, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        (RESPONSES, {"chat_template_kwargs": {"a": "<|im_end|>"}}, "chat_template_kwargs"),
    ],
)
def test_what_the_engine_refuses_is_told_at_its_place_too(
    client: httpx.Client, path: str, fields: Json, param: str
) -> None:
    refused = client.post(path, json={**ASK[path], **fields})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize("fields", [{"min_tokens": 0}, {"typical_p": 1.0}, {"functions": []}])
def test_what_asks_for_nothing_is_not_refused(client: httpx.Client, fields: Json) -> None:
    answer = client.post(CHAT, json={**ASK[CHAT], **fields})
    assert answer.status_code == 200
    assert answer.headers[IGNORED] == next(iter(fields))


# --- thinking

THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in c and not loop.last %}"
    "{{ c.split('</think>')[-1] }}|{{ c.split('</think>')[0] }}{% else %}{{ c }}{% endif %}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<quiet>{% endif %}"
    "{% if reasoning_effort is defined %}<{{ reasoning_effort }}>{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THOUGHT: dict[str, list[Json]] = {
    "reasoning_content": [{"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}],
    "reasoning": [{"role": "assistant", "content": "Hi", "reasoning": "Hm."}],
    "thinking parts": [
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hi"}],
        }
    ],
}
THINKING_BLOCKS = [
    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "text", "text": "Hi"},
]
REASONING_ITEM = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "Hm."}],
    "encrypted_content": "x",
}


@pytest.mark.few(3)
@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_thoughts_are_given_to_templates_that_use_them_and_dropped_by_others(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], path: str, knows: bool
) -> None:
    client = start(load=lambda _: make_model(template=THINKS if knows else None))
    plain = {"role": "assistant", "content": "Hi"}
    shown = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi"}
    shapes: dict[str, list[list[Json]]] = {
        CHAT: list(THOUGHT.values()),
        RESPONSES: [[REASONING_ITEM, plain]],
        MESSAGES: [[{"role": "assistant", "content": THINKING_BLOCKS}]],
    }
    wanted = with_history(path, USER, shown if knows else plain, USER)
    expected = said(path, client.post(path, json=wanted).json())
    for history in shapes[path]:
        answer = client.post(path, json=with_history(path, USER, *history, USER))
        assert answer.status_code == 200, answer.text
        assert said(path, answer.json()) == expected


@pytest.mark.slow
def test_whether_to_think_reaches_the_template_in_every_shape(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model]
) -> None:
    client = start(load=lambda _: make_model(template=THINKS))
    plain = said(CHAT, client.post(CHAT, json=ASK[CHAT]).json())
    quiet: dict[str, list[Json]] = {
        CHAT: [
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False},
            {"thinking": {"type": "disabled"}},
            {"reasoning": {"enabled": False}},
            {"reasoning_effort": "none"},
        ],
        RESPONSES: [{"reasoning": {"effort": "none"}}],
        MESSAGES: [{"thinking": {"type": "disabled"}}],
    }
    found = {
        said(path, client.post(path, json={**ASK[path], **fields}).json())
        for path, shapes in quiet.items()
        for fields in shapes
    }
    assert len(found) == 1
    assert plain not in found
    thinking = {"thinking": {"type": "adaptive", "budget_tokens": 9}}
    answer = client.post(MESSAGES, json={**ASK[MESSAGES], **thinking})
    assert said(MESSAGES, answer.json()) == plain
    efforts = {
        said(path, client.post(path, json={**ASK[path], **fields}).json())
        for path, fields in (
            (CHAT, {"reasoning_effort": "low"}),
            (RESPONSES, {"reasoning": {"effort": "minimal", "summary": "auto"}}),
            (MESSAGES, {"output_config": {"effort": "low"}}),
        )
    }
    assert len(efforts) == 1
    assert efforts.isdisjoint({plain, *found})


@pytest.mark.parametrize(
    "options", [{"messages": []}, {"a": "<|im_end|>"}, {"a": [{"b": "x<|im_"}]}, {"<|im_end|>": 1}]
)
def test_an_option_of_the_template_can_be_no_message_and_no_control_token(
    client: httpx.Client, options: Json
) -> None:
    refused = client.post(CHAT, json={**ASK[CHAT], "chat_template_kwargs": options})
    assert refused.status_code == 400
    assert "template" in refused.json()["error"]["message"]


# --- instructions, and the last message

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('first only') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("template", "messages", "folded"),
    [
        (NO_SYSTEM, [system("A"), user("b")], [user("A\n\nb")]),
        (NO_SYSTEM, [system("A"), system("B"), user("c")], [user("A\n\nB\n\nc")]),
        (NO_SYSTEM, [user("a"), system("B")], [user("a\n\nB")]),
        (FIRST_ONLY, [system("A"), system("B"), user("c")], [system("A\n\nB"), user("c")]),
        (FIRST_ONLY, [system("A"), user("b"), system("C")], [system("A"), user("b\n\nC")]),
        (
            FIRST_ONLY,
            [user("a"), system("B"), {"role": "assistant", "content": "c"}, user("d")],
            [user("a\n\nB"), {"role": "assistant", "content": "c"}, user("d")],
        ),
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_instructions_that_a_template_refuses_are_folded_into_what_it_takes(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Model],
    path: str,
    template: str,
    messages: list[Json],
    folded: list[Json],
) -> None:
    client = start(load=lambda _: make_model(template=template))
    answer = client.post(path, json=with_history(path, *messages))
    assert answer.status_code == 200, answer.text
    expected = client.post(path, json=with_history(path, *folded))
    assert said(path, answer.json()) == said(path, expected.json())


def test_a_template_that_takes_instructions_everywhere_gets_them_where_they_are(
    client: httpx.Client,
) -> None:
    one = said(CHAT, client.post(CHAT, json=with_history(CHAT, user("a"), system("B"))).json())
    two = said(CHAT, client.post(CHAT, json=with_history(CHAT, user("a\n\nB"))).json())
    assert one != two


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_last_message_of_the_assistant_is_continued(
    client: httpx.Client, post: Callable[..., Json], path: str
) -> None:
    ask = partial(with_history, path, user("Tell me"))
    whole = said(path, post(client, path, ask(max_tokens=24)))
    begun = whole[:9]
    answer = post(client, path, ask({"role": "assistant", "content": begun}, max_tokens=24))
    rest = said(path, answer)
    assert (begun + rest)[: len(whole)] == whole
    again = with_history(
        path, user("Tell me"), {"role": "assistant", "content": begun + rest}, user("And?")
    )
    own = post(client, path, again)["usage"]["recollect"]
    assert own["reused_tokens"] >= len(whole) + len("Tell me"), "as it was read and generated"


def test_a_response_follows_a_message_that_can_be_answered(client: httpx.Client) -> None:
    for items in ([{"role": "assistant", "content": "a"}], [system("a")]):
        for store in (True, False):
            refused = client.post(
                RESPONSES, json=with_history(RESPONSES, *items, store=store)
            ).json()
            assert refused["error"]["param"] == "input"
            assert "tool" in refused["error"]["message"]


def test_what_calls_tools_is_not_continued(client: httpx.Client) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    refused = client.post(CHAT, json=with_history(CHAT, USER, called))
    assert refused.status_code == 400
    assert "role tool" in refused.json()["error"]["message"]


# --- tools

FUNCTION = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
TOOLS: dict[str, Json] = {
    CHAT: {"type": "function", "function": {"name": "f", "parameters": FUNCTION}},
    RESPONSES: {"type": "function", "name": "f", "parameters": FUNCTION},
    MESSAGES: {"name": "f", "input_schema": FUNCTION},
}
OTHERS: dict[str, list[Json]] = {
    CHAT: [{"type": "custom", "custom": {"name": "g"}}],
    RESPONSES: [{"type": "web_search"}, {"type": "custom", "name": "g"}, {"type": "local_shell"}],
    MESSAGES: [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}],
}


@pytest.mark.few(1)
@pytest.mark.parametrize("path", list(TOOLS))
def test_tools_that_are_no_functions_are_left_out_and_named(
    client: httpx.Client, path: str
) -> None:
    plain = client.post(path, json={**ASK[path], "tools": [TOOLS[path]]})
    answer = client.post(path, json={**ASK[path], "tools": [*OTHERS[path], TOOLS[path]]})
    assert answer.status_code == 200, answer.text
    assert said(path, answer.json()) == said(path, plain.json())
    named = ", ".join(f"tools[{tool['type']}]" for tool in OTHERS[path])
    assert answer.headers[IGNORED] == named


@pytest.mark.parametrize(
    ("path", "choice"),
    [
        (CHAT, {"type": "custom", "custom": {"name": "g"}}),
        (RESPONSES, {"type": "web_search"}),
        (RESPONSES, {"type": "custom", "name": "g"}),
        (MESSAGES, {"type": "tool", "name": "web_search"}),
    ],
)
def test_such_a_tool_chosen_by_name_is_refused(
    client: httpx.Client, path: str, choice: Json
) -> None:
    body = {**ASK[path], "tools": [*OTHERS[path], TOOLS[path]], "tool_choice": choice}
    refused = client.post(path, json=body)
    assert refused.status_code == 400
    assert "tool_choice" in refused.json()["error"]["message"]
    assert "Input should be" not in refused.text, "it is said that such a tool cannot be called"


def calls_of(path: str, answer: Json) -> list[str]:
    if path == CHAT:
        calls = answer["choices"][0]["message"].get("tool_calls", [])
        return [call["function"]["name"] for call in calls]
    items = answer["output"] if path == RESPONSES else answer["content"]
    return [item["name"] for item in items if item["type"] in ("function_call", "tool_use")]


@pytest.mark.few(3)
@pytest.mark.parametrize("path", list(TOOLS))
@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_tool_called_like_a_mode_is_called_when_it_is_chosen(
    client: httpx.Client, post: Callable[..., Json], path: str, name: str
) -> None:
    choice = {
        CHAT: {"type": "function", "function": {"name": name}},
        RESPONSES: {"type": "function", "name": name},
        MESSAGES: {"type": "tool", "name": name},
    }[path]
    text = json.dumps([{**TOOLS[path]}]).replace('"f"', f'"{name}"')
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    tools = [TOOLS[path], *json.loads(text)]
    body = {**ASK[path], limit: 200, "tools": tools, "tool_choice": choice}
    assert calls_of(path, post(client, path, body)) == [name]


@pytest.mark.few(1)
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_some_of_the_tools_can_be_allowed(
    client: httpx.Client, post: Callable[..., Json], path: str
) -> None:
    other = json.loads(json.dumps(TOOLS[path]).replace('"f"', '"other"'))
    named = {"type": "function", "name": "other"}
    if path == CHAT:
        allowed = {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "other"}}],
        }
        choice: Json = {"type": "allowed_tools", "allowed_tools": allowed}
    else:
        choice = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = {**ASK[path], limit: 400, "tools": [TOOLS[path], other], "tool_choice": choice}
    found = calls_of(path, post(client, path, body))
    assert found
    assert set(found) == {"other"}


@pytest.mark.slow
def test_a_namespace_is_flattened_for_the_model_and_told_apart_to_the_client(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    namespace = {
        "type": "namespace",
        "name": "mcp__files__",
        "description": "Files.",
        "tools": [{**TOOLS[RESPONSES], "name": "read"}, {"type": "custom", "name": "g"}],
    }
    flat = {**TOOLS[RESPONSES], "name": "mcp__files__read"}
    body = {**ASK[RESPONSES], "max_output_tokens": 200, "tool_choice": "required"}
    body["parallel_tool_calls"] = False
    plain = post(client, RESPONSES, {**body, "tools": [flat]})["output"][0]
    answer = client.post(RESPONSES, json={**body, "tools": [namespace]})
    (call,) = answer.json()["output"]
    assert (call["namespace"], call["name"]) == ("mcp__files__", "read")
    assert call["arguments"] == plain["arguments"]
    assert answer.headers[IGNORED] == "tools.*.tools[custom]"
    kept = client.get(f"{RESPONSES}/{answer.json()['id']}").json()
    assert kept["output"] == [call]
    assert kept["tools"] == answer.json()["tools"]
    streamed = events(client, RESPONSES, {**body, "tools": [namespace], "stream": True})
    begun = next(event for event in streamed if event["type"] == "response.output_item.added")
    assert (begun["item"]["namespace"], begun["item"]["name"]) == ("mcp__files__", "read")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
    later = post(client, RESPONSES, {**body, "input": [USER, call, result], "tools": [namespace]})
    own = later["usage"]["recollect"]
    assert own["reused_tokens"] > own["computed_tokens"], "the call is the one that was generated"


# --- items that stand for others


@pytest.mark.slow
def test_a_reference_is_the_item_that_it_names(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    tools = {"tools": [TOOLS[RESPONSES]], "tool_choice": "required", "parallel_tool_calls": False}
    limit = {"max_output_tokens": 200}
    first = post(client, RESPONSES, {**ASK[RESPONSES], "store": True})
    (message,) = first["output"]
    called = post(client, RESPONSES, {**ASK[RESPONSES], **tools, **limit, "store": True})
    (call,) = called["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
    asked = client.get(f"{RESPONSES}/{first['id']}/input_items").json()["data"][0]
    for items in ([USER, message, USER], [USER, call, result], [asked, message, USER]):
        whole = with_history(RESPONSES, *items)
        named = [
            {"type": "item_reference", "id": item["id"]} if "id" in item else item for item in items
        ]
        short = with_history(RESPONSES, *named)
        assert short != whole
        answer = post(client, RESPONSES, short)
        assert said(RESPONSES, answer) == said(RESPONSES, post(client, RESPONSES, whole))
    assert answer["usage"]["recollect"]["reused_tokens"] > 30


def test_a_reference_to_an_item_of_a_conversation_resolves(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    conversation = post(client, "/v1/conversations", {"items": [user("One"), user("Two")]})
    items = client.get(f"/v1/conversations/{conversation['id']}/items?order=asc").json()["data"]
    named = [{"id": items[0]["id"]}, {"id": items[1]["id"], "type": None}]
    answer = post(client, RESPONSES, with_history(RESPONSES, *named))
    plain = post(client, RESPONSES, with_history(RESPONSES, user("One"), user("Two")))
    assert said(RESPONSES, answer) == said(RESPONSES, plain)


def test_a_reference_to_what_is_not_there_or_another_keys_is_told(
    start: Callable[..., httpx.Client], post: Callable[..., Json]
) -> None:
    client = start(keys=("one", "two"))
    (message,) = post(client, RESPONSES, ASK[RESPONSES])["output"]
    other = {"Authorization": "Bearer two"}
    for item_id, headers in ((message["id"], other), ("msg_nothing", {}), ("", {}), ("é", {})):
        item = {"type": "item_reference", "id": item_id}
        body = with_history(RESPONSES, item, USER)
        refused = client.post(RESPONSES, json=body, headers=headers)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "item_not_found"
        assert "store" in refused.json()["error"]["message"]


# --- Anthropic's own

BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=9f2c1;"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "system",
    [
        [{"type": "text", "text": BILLING}, {"type": "text", "text": "Be brief."}],
        f"{BILLING}\nBe brief.",
    ],
)
def test_the_volatile_billing_line_is_no_part_of_the_prompt(
    client: httpx.Client, post: Callable[..., Json], system: Any
) -> None:
    plain = {**ASK[MESSAGES], "system": "Be brief."}
    answer = client.post(MESSAGES, json={**ASK[MESSAGES], "system": system})
    assert answer.headers[IGNORED] == "system[x-anthropic-billing-header]"
    assert said(MESSAGES, answer.json()) == said(MESSAGES, post(client, MESSAGES, plain))
    other = json.loads(json.dumps(system).replace("9f2c1", "00000"))
    again = post(client, MESSAGES, {**ASK[MESSAGES], "system": other})
    assert again["usage"]["recollect"]["computed_tokens"] == 0
    del plain["max_tokens"]
    counted = post(client, f"{MESSAGES}/count_tokens", {**plain, "system": system})
    assert counted == post(client, f"{MESSAGES}/count_tokens", plain)


def block(text: str) -> Json:
    return {"type": "text", "text": text}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "plain", "given", "named"),
    [
        (
            CHAT,
            [{"role": "system", "content": "Be brief."}],
            [{"role": "system", "content": [block(BILLING), block("Be brief.")]}],
            "messages.*.content",
        ),
        (
            CHAT,
            [{"role": "system", "content": "Be brief."}],
            [
                {"role": "system", "content": BILLING.title()},
                {"role": "system", "content": "Be brief."},
            ],
            "messages.*.content",
        ),
        (
            CHAT,
            [{"role": "system", "content": "Be brief."}],
            [{"role": "system", "content": f"{BILLING}\nBe brief."}],
            "messages.*.content",
        ),
        (
            RESPONSES,
            [{"role": "developer", "content": "Be brief."}],
            [{"role": "developer", "content": f"{BILLING}\nBe brief."}],
            "input.*.content",
        ),
        (MESSAGES, [], [{"role": "system", "content": BILLING}], "messages.*.content"),
    ],
)
def test_nor_is_it_where_a_program_in_between_has_put_it_elsewhere(
    client: httpx.Client,
    post: Callable[..., Json],
    path: str,
    plain: list[Json],
    given: list[Json],
    named: str,
) -> None:
    expected = post(client, path, with_history(path, *plain, USER))
    answer = client.post(path, json=with_history(path, *given, USER))
    assert answer.status_code == 200, answer.text
    assert answer.headers[IGNORED] == f"{named}[x-anthropic-billing-header]"
    assert said(path, answer.json()) == said(path, expected)
    assert answer.json()["usage"]["recollect"]["computed_tokens"] == 0


@pytest.mark.slow
def test_nor_is_it_in_the_instructions_of_a_response(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    post(client, RESPONSES, {**ASK[RESPONSES], "instructions": "Be brief."})
    body = {**ASK[RESPONSES], "instructions": f"{BILLING}\nBe brief."}
    answer = client.post(RESPONSES, json=body)
    assert answer.headers[IGNORED] == "instructions[x-anthropic-billing-header]"
    assert answer.json()["usage"]["recollect"]["computed_tokens"] == 0


def test_a_message_that_says_so_is_left_whole(client: httpx.Client) -> None:
    said_by_a_person = {"role": "user", "content": f"{BILLING}\nWhat is this?"}
    answer = client.post(CHAT, json=with_history(CHAT, said_by_a_person))
    assert answer.status_code == 200
    assert IGNORED not in answer.headers


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_format_of_messages_is_structured_output(
    client: httpx.Client, post: Callable[..., Json], name: str
) -> None:
    wanted = {"type": "json_schema", "schema": {"enum": ["red", "blue"]}}
    config: Json = {"format": wanted} if name == "output_config" else wanted
    answer = post(client, MESSAGES, {**ASK[MESSAGES], "max_tokens": 40, name: config})
    assert json.loads(said(MESSAGES, answer)) in ("red", "blue")
    assert answer["stop_reason"] == "end_turn"


@pytest.mark.few(3)
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_format_that_nobody_knows_is_an_annotation_unless_the_schema_is_strict(
    client: httpx.Client, post: Callable[..., Json], path: str
) -> None:
    schema = {"type": "string", "format": "colour", "maxLength": 3}
    for strict in (False, True, None):
        named = {"name": "a", "schema": schema, "strict": strict}
        form: Json = {"type": "json_schema", "json_schema": named}
        fields = {"response_format": form}
        if path == RESPONSES:
            fields = {"text": {"format": {"type": "json_schema", **named}}}
        answer = client.post(path, json={**ASK[path], **fields})
        assert answer.status_code == (400 if strict else 200), answer.text
        if strict:
            assert "colour" in answer.text
        else:
            assert len(json.loads(said(path, answer.json()))) <= 3


# --- what the server says of itself


def test_a_server_answers_at_its_root_without_a_key(start: Callable[..., httpx.Client]) -> None:
    client = start(keys=("one",))
    for method in ("GET", "HEAD"):
        answer = client.request(method, "/", headers={"Authorization": ""})
        assert answer.status_code == 200
        assert bool(answer.content) == (method == "GET")


def test_models_tell_their_context_before_they_are_loaded_and_their_other_names(
    start: Callable[..., httpx.Client],
) -> None:
    lengths = {"one": 1234, "two": None}.get
    client = start(names=("one", "two"), aliases={"gpt-4o": "two"}, context_length=lengths)
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models.keys() == {"one", "two", "gpt-4o"}
    assert models["gpt-4o"]["alias_of"] == "two"
    assert models["two"]["context_length"] is None
    assert models["gpt-4o"] == client.get("/v1/models/gpt-4o").json()


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_reply_without_a_limit_has_that_of_the_server(
    start: Callable[..., httpx.Client], post: Callable[..., Json], path: str
) -> None:
    """Completions have OpenAI's limit of 16 then, and messages have to name one."""
    client = start(max_tokens=5)
    said = {name: value for name, value in ASK[path].items() if not name.startswith("max")}
    usage = post(client, path, {**said, "ignore_eos": True})["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == 5


# --- replies that are cut


def streamed_chat(found: list[Any]) -> tuple[str, list[tuple[str, str]], str]:
    """Return content, calls and why it ended, put together as OpenAI's clients do it."""
    content, calls, reason = "", dict[int, tuple[str, str]](), ""
    for event in found:
        if isinstance(event, str):
            continue
        (choice,) = event["choices"]
        content += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls", ()):
            name, arguments = calls.get(delta["index"], ("", ""))
            function = delta["function"]
            calls[delta["index"]] = (
                name + function.get("name", ""),
                arguments + function["arguments"],
            )
        reason = choice["finish_reason"] or reason
    return content, list(calls.values()), reason


def streamed_messages(found: list[Any]) -> list[tuple[str, Any]]:
    """Return the blocks, put together as Anthropic's clients do it."""
    blocks: list[tuple[str, Any]] = []
    for event in found:
        if event["type"] == "content_block_start":
            block = event["content_block"]
            blocks.append((block.get("name", ""), ""))
        elif event["type"] == "content_block_delta":
            name, text = blocks[-1]
            delta = event["delta"]
            blocks[-1] = name, text + delta.get("text", delta.get("partial_json", ""))
    return [
        (name, from_json(text or "{}", allow_partial=True) if name else text)
        for name, text in blocks
    ]


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, '"days', "name", "Pa"])
def test_a_call_that_is_cut_is_told_alike_in_a_stream_and_whole(
    client: httpx.Client,
    post: Callable[..., Json],
    events: Callable[..., list[Any]],
    stop: str | None,
) -> None:
    """At every length, and by a stop string: never as text, and no call that the other lacks."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    flat = {"name": "weather", "input_schema": PARAMETERS}
    seen = set()
    for length in [*range(1, 90, 4), 200]:
        ask = {**ASK[CHAT], "max_tokens": length, "tools": [tool], "tool_choice": "required"}
        ask |= {"parallel_tool_calls": False} | ({} if stop is None else {"stop": [stop]})
        (choice,) = post(client, CHAT, ask)["choices"]
        message = choice["message"]
        calls = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        assert "<tool" not in (message["content"] or "")
        found = streamed_chat(events(client, CHAT, {**ask, "stream": True}))
        assert found == (message["content"] or "", calls, choice["finish_reason"])
        seen.add((len(calls), choice["finish_reason"]))
        is_whole = all(given.endswith("}") for _, given in calls)
        assert is_whole or choice["finish_reason"] != "tool_calls", "a client would call it"
        said: Json = {**ASK[MESSAGES], "max_tokens": length, "tools": [flat]}
        said["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
        said |= {} if stop is None else {"stop_sequences": [stop]}
        blocks = [
            (block.get("name", ""), block.get("input", block.get("text")))
            for block in post(client, MESSAGES, said)["content"]
        ]
        assert streamed_messages(events(client, MESSAGES, {**said, "stream": True})) == blocks
        if stop is None:
            told = {**ASK[RESPONSES], "max_output_tokens": length, "tool_choice": "required"}
            told |= {"parallel_tool_calls": False}
            told |= {"tools": [{"type": "function", "name": "weather", "parameters": PARAMETERS}]}
            output = post(client, RESPONSES, told)["output"]
            streamed = events(client, RESPONSES, {**told, "stream": True})[-1]["response"]["output"]
            for items in (output, streamed):
                assert [
                    (one["type"], one["status"] == "completed", one["arguments"])
                    for one in items
                    if one["type"] == "function_call"
                ] == [("function_call", given.endswith("}"), given) for _, given in calls]
        if choice["finish_reason"] != "length":
            break  # every longer limit asks for the same reply
    assert {(0, "length"), (1, "length")} & seen
    assert stop is not None or (1, "tool_calls") in seen
