"""Replies that fail or are left in their middle, and marks where nobody looks for them."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx
import pytest

from recollect.errors import InvalidParameterError, RuntimeFailure

Json = dict[str, Any]

END: Final = 257
CALL: Final = '<tool_call>\n{"name": "light", "arguments": {"room": "hall"}}\n</tool_call>'
THOUGHT: Final = "<think>\nHmm.\n</think>\n\n"
ASKED: Final = [{"role": "user", "content": "Light!"}]
LIGHT: Final[Json] = {
    "name": "light",
    "description": "Turns a light on.",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string"}},
        "required": ["room"],
    },
}
TOOLS: Final = [{"type": "function", "function": LIGHT}]
BODIES: Final[dict[str, Json]] = {
    "/v1/chat/completions": {"messages": ASKED, "tools": TOOLS},
    "/v1/responses": {"input": ASKED, "tools": [{"type": "function", **LIGHT}]},
    "/v1/messages": {
        "messages": ASKED,
        "max_tokens": 400,
        "tools": [{"name": "light", "input_schema": LIGHT["parameters"]}],
    },
    "/api/chat": {"messages": ASKED, "tools": TOOLS},
}
"""What asks each API for a reply that may call a tool."""
EACH_API: Final = pytest.mark.parametrize("path", BODIES)
PLACES: Final = {
    "in a thought": THOUGHT[:12],
    "in the mark": f"{THOUGHT}{CALL[:6]}",
    "in the name": f"{THOUGHT}{CALL[:25]}",
    "in the arguments": f"{THOUGHT}{CALL[:-20]}",
}


class Script:
    """Chooses tokens of one text after the other, and can fail or tell when it is so far."""

    def __init__(self) -> None:
        self.texts: Iterator[str] = iter(())
        self.fails_after: int | None = None
        self.error: Exception = RuntimeFailure("a secret of this machine")
        self.said = 0
        self._ids: list[int] = []

    def say(self, *texts: str) -> None:
        self.texts = iter(texts)

    def choose(self, said: list[int], _: int) -> int:
        if not said:
            self._ids = [*next(self.texts).encode(), END]
        self.said = len(said)
        if self.said == self.fails_after:
            raise self.error
        return self._ids[len(said)]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def scripted(choosing: Callable[..., httpx.Client], script: Script) -> httpx.Client:
    """Return a client of a server whose model says what the script has."""
    pytest.importorskip("llguidance")
    return choosing(script.choose)


def told(client: httpx.Client, path: str, body: Json) -> list[Json]:
    """Return the events of a stream, or its lines."""
    response = client.post(path, json={"model": "reference", "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def calls_in(event: Json) -> bool:
    """Return whether an event of any API tells that a call is whole."""
    delta = event.get("delta")
    return (
        any(choice.get("finish_reason") == "tool_calls" for choice in event.get("choices", ()))
        or event.get("type") == "response.function_call_arguments.done"
        or (isinstance(delta, dict) and delta.get("stop_reason") == "tool_use")
        or bool(event.get("message", {}).get("tool_calls"))
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("place", PLACES)
@EACH_API
def test_a_reply_that_fails_in_its_middle_is_an_error_and_calls_nothing(
    scripted: httpx.Client, script: Script, path: str, place: str
) -> None:
    script.say(THOUGHT + CALL, THOUGHT + CALL)
    script.fails_after = len(PLACES[place])
    events = told(scripted, path, BODIES[path])
    failure = json.dumps(events[-1])
    assert "error" in failure
    assert "secret" not in json.dumps(events)
    assert not [event for event in events if calls_in(event)]
    # What failed is no part of the conversation; the same request is answered.
    script.fails_after = None
    again = told(scripted, path, BODIES[path])
    assert "error" not in again[-1]
    assert [event for event in again if calls_in(event)]


@pytest.mark.slow
@EACH_API
def test_a_client_that_leaves_within_a_call_leaves_a_server_that_answers(
    scripted: httpx.Client,
    script: Script,
    post_and_leave: Callable[..., None],
    until: Callable[..., None],
    path: str,
) -> None:
    cut = CALL[: CALL.index("hall")] + "l" * 2_000
    script.say(cut, CALL)
    body = {"model": "reference", "stream": True, **BODIES[path]}
    post_and_leave(scripted, path, body, lambda: script.said > len(CALL))
    seen = list[int]()

    def stands_still() -> bool:
        time.sleep(0.2)
        seen.append(script.said)
        return len(seen) > 2 and seen[-1] == seen[-3]

    until(stands_still)
    assert script.said < len(cut), "it went on though nobody was there"
    again = told(scripted, path, BODIES[path])
    assert [event for event in again if calls_in(event)]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("path", "error", "param"),
    [
        ("/v1/chat/completions", "grammar", "response_format"),
        ("/v1/chat/completions", "template_options", "chat_template_kwargs"),
        ("/v1/chat/completions", "temperature", "temperature"),
        ("/v1/completions", "messages", "prompt"),
        ("/v1/completions", "temperature", "temperature"),
        ("/v1/completions", "grammar", None),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_errors_name_the_field_of_the_request_that_they_are_about(
    scripted: httpx.Client, script: Script, path: str, error: str, param: str | None, streams: bool
) -> None:
    """Also where the stream has begun: there is no status then, but the same error."""
    script.say("Yes, of course.")
    script.fails_after = 5
    script.error = InvalidParameterError("It cannot be used: leave it out.", param=error)
    asked = {"messages": ASKED} if "chat" in path else {"prompt": "Light!"}
    body = {"model": "reference", **asked}
    if streams:
        events = told(scripted, path, body)
        assert events[0]["choices"]
        failure = events[-1]["error"]
    else:
        response = scripted.post(path, json=body)
        assert response.status_code == 400
        failure = response.json()["error"]
    assert failure == {
        "message": "It cannot be used: leave it out.",
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }


FENCED: Final = {
    "reasoning marks": "```\n<think>\nHmm.\n</think>\n```",
    "reasoning marks in a line": "Write `<think>` and `</think>`.",
    "what closes reasoning": "```xml\n</think>\n```\nSo.",
    "a call": f"```xml\n{CALL}\n```",
    "other marks": "```\n[TOOL_CALLS][{}]<|python_tag|>\n```",
}


@pytest.mark.few(1)
@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("kind", FENCED)
def test_marks_in_a_block_of_code_are_text_where_no_tool_is_offered(
    scripted: httpx.Client, script: Script, kind: str, thinks: bool
) -> None:
    text = FENCED[kind]
    for path, body in BODIES.items():
        plain = {name: value for name, value in body.items() if name != "tools"}
        script.say(*2 * [(THOUGHT if thinks else "") + text])
        assert not any(map(calls_in, told(scripted, path, plain)))
        asked = {"model": "reference", **plain, "stream": False}
        answer = scripted.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        assert json.dumps(text) in json.dumps(answer.json())


@pytest.mark.slow
def test_a_block_of_code_that_names_marks_is_the_same_text_in_the_next_turn(
    scripted: httpx.Client, script: Script
) -> None:
    """It is reused as it was generated, and no part of it is taken for a mark."""
    messages: list[Json] = [*ASKED]
    known = 0
    for text in [*FENCED.values(), "So."]:
        script.say(THOUGHT + text)
        body = {"model": "reference", "messages": messages}
        answer = scripted.post("/v1/chat/completions", json=body).json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
        assert (message["content"], message["reasoning_content"]) == (text, "Hmm.")
        assert usage["prompt_tokens_details"]["cached_tokens"] >= known
        known = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        messages += [message, {"role": "user", "content": "More!"}]


SCHEMA: Final = {
    "type": "object",
    "properties": {"room": {"type": "string", "enum": ["hall", "attic"]}},
    "required": ["room"],
    "additionalProperties": False,
}
FORMATTED: Final[dict[str, Json]] = {
    "/v1/chat/completions": {
        "messages": ASKED,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA, "strict": True}
        },
    },
    "/v1/responses": {
        "input": ASKED, "text": {"format": {"type": "json_schema", "name": "r", "schema": SCHEMA}},
    },
    "/v1/messages": {
        "messages": ASKED, "max_tokens": 400,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "/api/chat": {"messages": ASKED, "format": SCHEMA, "think": True},
    "/api/generate": {"prompt": "Light!", "format": SCHEMA, "think": True},
}  # fmt: skip


OPENS: Final = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.few(1)
@pytest.mark.parametrize("path", FORMATTED)
def test_a_schema_holds_the_answer_and_not_what_was_thought(
    start: Callable[..., httpx.Client],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    path: str,
) -> None:
    pytest.importorskip("llguidance")

    def choose(_: object, __: object, *, history: Any, reply_start: int, **more: Any) -> int:
        token = script.choose(history[reply_start:].tolist(), reply_start)
        allowed = more.get("allowed")
        assert allowed is None or allowed[token]
        return token

    monkeypatch.setattr("recollect.engine.sampling.choose_token", choose)
    scripted = start(load=lambda _: make_model(template=OPENS, context_length=4096))
    rest = THOUGHT.removeprefix("<think>\n")
    script.say(rest + '{"room": "attic"}', rest + '{"room": "hall"}')
    answer = scripted.post(path, json={"model": "reference", **FORMATTED[path], "stream": False})
    assert answer.status_code == 200, answer.text
    assert '"Hmm."' in answer.text
    assert json.dumps('{"room": "attic"}') in json.dumps(answer.json())
    assert "error" not in told(scripted, path, FORMATTED[path])[-1]
    script.say(rest + '{"room": "cellar"}')
    refused = scripted.post(path, json={"model": "reference", **FORMATTED[path], "stream": False})
    assert refused.status_code == 500, "the grammar allowed what the schema does not"


LEVELS: Final = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if reasoning_effort %}effort={{ reasoning_effort }}\n{% endif %}"
    "{% if enable_thinking is defined %}on={{ enable_thinking }}\n{% endif %}assistant: "
)


@pytest.mark.few(3)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_levels_of_thinking_reach_the_template_over_ollamas_api(
    start: Callable[..., httpx.Client], make_model: Callable[..., Any], path: str
) -> None:
    client = start(load=lambda _: make_model(template=LEVELS))
    asked: Json = {"messages": ASKED} if path.endswith("chat") else {"prompt": "Light!"}
    sizes = dict[str | bool | None, int]()
    for level in (None, False, True, "low", "medium", "high"):
        body: Json = {
            "model": "reference", **asked, "think": level, "stream": False,
            "options": {"num_predict": 1},
        }  # fmt: skip
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        sizes[level] = answer.json()["prompt_eval_count"]
    added = {level: size - sizes[None] for level, size in sizes.items()}
    on = len("on=True\n")
    expected: dict[str | bool | None, int] = {None: 0, False: len("on=False\n"), True: on}
    for level in ("low", "medium", "high"):
        expected[level] = on + len(f"effort={level}\n")
    assert added == expected
    refused = client.post(path, json={"model": "reference", **asked, "think": "sometimes"})
    assert refused.status_code == 400
    assert "think" in refused.json()["error"]
