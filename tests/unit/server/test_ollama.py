"""Ollama's API: what its clients send is answered as they read it, and nothing is read twice."""

import json
from collections.abc import Callable
from typing import Any, Final

import httpx
import pytest

Json = dict[str, Any]

CALL: Final = (
    '<tool_call>\n{"name": "light", "arguments": {"room": "hall", "on": true}}\n</tool_call>'
)
TOOL: Final[Json] = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Turns a light on or off.",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
HOME_ASSISTANT: Final[Json] = {
    "keep_alive": -1, "options": {"num_ctx": 8192.0}, "think": False, "format": None,
}  # fmt: skip
"""What its integration sends with every chat, as `ollama`'s client writes it. Source:
homeassistant/components/ollama/entity.py."""
AI_TASK: Final[Json] = {
    **HOME_ASSISTANT,
    "stream": True,
    "tools": None,
    "messages": [
        {"role": "system", "content": "You are a Home Assistant expert."},
        {"role": "user", "content": "How warm is it, and is it too warm?"},
    ],
    "format": {
        "type": "object",
        "properties": {
            "warmth": {"type": "number", "description": "In degrees"},
            "is_too_warm": {"type": "boolean"},
            "room": {"type": "string", "enum": ["hall", "attic"], "nullable": True},
        },
        "required": ["warmth", "is_too_warm"],
    },
}
"""What it sends where an automation wants data: a structure as OpenAPI has it. Source:
homeassistant/components/ollama/ai_task.py."""


@pytest.fixture
def scripted(choosing: Callable[..., httpx.Client]) -> Callable[..., httpx.Client]:
    """Return what starts a server whose model says one text after the other."""

    def begin(*texts: str) -> httpx.Client:
        left = [[*text.encode(), 257] for text in texts]
        replies: dict[int, list[int]] = {}

        def choose(said: list[int], reply_start: int) -> int:
            if reply_start not in replies:
                replies[reply_start] = left.pop(0)
            return replies[reply_start][len(said)]

        return choosing(choose)

    return begin


def lines(client: httpx.Client, path: str, body: Json) -> list[Json]:
    """Return the lines of a streamed answer."""
    response = client.post(path, json={"model": "reference", **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def whole(client: httpx.Client, path: str, body: Json) -> Json:
    response = client.post(path, json={"model": "reference", "stream": False, **body})
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def test_a_chat_is_streamed_as_lines_unless_it_is_not_to_be(
    scripted: Callable[..., httpx.Client],
) -> None:
    client = scripted("<think>\nHmm.\n</think>\n\nYes.")
    asked: Json = {"messages": [{"role": "user", "content": "One?"}]}
    told = lines(client, "/api/chat", asked)
    assert all(one["model"] == "reference" and one["created_at"] for one in told)
    assert [one["done"] for one in told] == [False] * (len(told) - 1) + [True]
    assert "".join(one["message"]["content"] for one in told) == "Yes."
    assert "".join(one["message"].get("thinking", "") for one in told) == "Hmm."
    last = told[-1]
    assert last["done_reason"] == "stop"
    assert last["eval_count"] == len("<think>\nHmm.\n</think>\n\nYes.")
    assert last["prompt_eval_count"] > 0
    assert last["total_duration"] >= last["prompt_eval_duration"] > 0
    once = whole(client, "/api/chat", asked)
    assert once["message"] == {"role": "assistant", "content": "Yes.", "thinking": "Hmm."}
    assert once["done"] is True


@pytest.mark.few(1)
@pytest.mark.parametrize("streams", [True, False])
def test_tools_are_called_for_three_turns_and_nothing_is_read_twice(
    scripted: Callable[..., httpx.Client], streams: bool
) -> None:
    """As Home Assistant does: calls have no ids, and results name no call."""
    pytest.importorskip("llguidance")
    client = scripted(CALL, "It is on.", f"Again.\n{CALL}", "Done.")
    messages: list[Json] = [{"role": "system", "content": "You control a house."}]
    spent: list[Json] = []
    for question in ("Light in the hall!", "Once more!"):
        messages.append({"role": "user", "content": question})
        for has_call in (True, False):
            body = {"messages": messages, "tools": [TOOL], **HOME_ASSISTANT}
            if streams:
                told = lines(client, "/api/chat", body)
                calls = [call for one in told for call in one["message"].get("tool_calls", ())]
                text = "".join(one["message"]["content"] for one in told)
                last = told[-1]
            else:
                last = whole(client, "/api/chat", body)
                calls = last["message"].get("tool_calls", [])
                text = last["message"]["content"]
            spent.append(last)
            assert bool(calls) == has_call
            said: Json = {"role": "assistant", "content": text}
            if has_call:
                (call,) = calls
                assert call["function"]["arguments"] == {"room": "hall", "on": True}
                function = {
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"],
                }
                said["tool_calls"] = [{"function": function}]
            messages.append(said)
            if has_call:
                messages.append({"role": "tool", "content": '{"data": "on", "error": null}'})
    for before, after in zip(spent, spent[1:], strict=False):  # noqa: RUF007 - as it reads best
        had = before["prompt_eval_count"] + before["eval_count"]
        assert after["recollect"]["reused_tokens"] >= had - len("<think>\n\n</think>\n\n") - 1
        assert after["recollect"]["reason"] == "new"


def test_generate_goes_on_from_the_context_that_it_gave(
    scripted: Callable[..., httpx.Client],
) -> None:
    client = scripted("<think>\nHmm.\n</think>\n\nYes.", "No.", "So.")
    first = lines(client, "/api/generate", {"prompt": "One?", "system": "Be brief."})
    assert "".join(one["response"] for one in first) == "Yes."
    assert "".join(one.get("thinking", "") for one in first) == "Hmm."
    assert "context" not in first[0]
    had = first[-1]["prompt_eval_count"] + first[-1]["eval_count"]
    context = first[-1]["context"]
    assert len(context) == had
    second = whole(client, "/api/generate", {"prompt": "Two?", "context": context})
    assert second["response"] == "No."
    assert second["recollect"]["reused_tokens"] == had
    added = second["prompt_eval_count"] - had
    # What the template has between a reply and the next: four control tokens, and the words.
    assert added == 4 + len("\nuser\nTwo?\nassistant\n")
    third = whole(client, "/api/generate", {"prompt": "x", "raw": True})
    assert (third["response"], third["prompt_eval_count"]) == ("So.", 1)


def test_instructions_beside_a_context_stand_before_the_question(
    scripted: Callable[..., httpx.Client],
) -> None:
    """As in Ollama: what the template shows of them follows the tokens of the context."""
    client = scripted("Yes.", "No.", "So.")
    first = whole(client, "/api/generate", {"prompt": "One?"})
    context = first["context"]
    asked: Json = {"prompt": "Two?", "context": context}
    second = whole(client, "/api/generate", {**asked, "system": "Be brief."})
    read = bytes(one for one in second["context"] if one < 256).decode()
    assert read.index("Yes.") < read.index("Be brief.") < read.index("Two?")
    assert second["recollect"]["reused_tokens"] == len(context)


def test_a_context_is_gone_on_from_again_after_a_rewind(
    scripted: Callable[..., httpx.Client],
) -> None:
    """A client that takes a question back sends an older context: nothing of it is read again."""
    client = scripted("Yes.", "No.", "So.", "Hm.")
    contexts: list[list[int]] = [whole(client, "/api/generate", {"prompt": "1?"})["context"]]
    for prompt in ("2?", "3?"):
        asked = {"prompt": prompt, "context": contexts[-1]}
        contexts.append(whole(client, "/api/generate", asked)["context"])
    again = whole(client, "/api/generate", {"prompt": "Or 2?", "context": contexts[0]})
    assert again["response"] == "Hm."
    assert again["context"][: len(contexts[0])] == contexts[0]
    assert again["recollect"]["reused_tokens"] >= len(contexts[0])


def test_a_context_of_other_tokens_is_refused(client: httpx.Client) -> None:
    body = {"model": "reference", "prompt": "x", "context": [1, 10**9]}
    response = client.post("/api/generate", json=body)
    assert response.status_code == 400
    assert "10" in response.json()["error"]


def test_format_holds_a_reply_to_a_schema(client: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [1, 2]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    for wanted in (schema, "json"):
        asked: Json = {"messages": [{"role": "user", "content": "Age?"}], "format": wanted}
        answer = whole(client, "/api/chat", {**asked, "options": {"num_predict": 200}})
        if wanted is schema:
            assert json.loads(answer["message"]["content"])["age"] in (1, 2)
        assert answer["message"]["content"].lstrip().startswith("{")
    assert whole(
        client, "/api/generate", {"prompt": "x", "format": "", "options": {"num_predict": 3}}
    )["done_reason"] in ("stop", "length")


def test_what_home_assistant_asks_for_as_data_is_data(
    scripted: Callable[..., httpx.Client],
) -> None:
    pytest.importorskip("llguidance")
    data = '{"warmth": 21.5, "is_too_warm": false}'
    client = scripted(data)
    told = lines(client, "/api/chat", AI_TASK)
    assert "".join(one["message"]["content"] for one in told) == data
    assert told[-1]["done_reason"] == "stop"


def test_copilot_finds_a_model_and_chats_with_it(scripted: Callable[..., httpx.Client]) -> None:
    """Source: ollamaProvider.ts of microsoft/vscode-copilot-chat, and what it does with the answers."""
    client = scripted("Yes.")
    assert client.get("/api/version").json()["version"].replace(".", "").isdecimal()
    (listed,) = client.get("/api/tags").json()["models"]
    shown = client.post("/api/show", json={"model": listed["model"]}).json()
    info = shown["model_info"]
    assert info[f"{info['general.architecture']}.context_length"] == 4096
    assert isinstance(info["general.basename"], str)
    assert {"completion", "tools"} <= set(shown["capabilities"])
    # It chats by OpenAI's API on the same port.
    body = {
        "model": listed["model"], "messages": [{"role": "user", "content": "One?"}], "stream": True,
        "max_tokens": 1024, "temperature": 0.1, "top_p": 1, "n": 1, "stream_options": {"include_usage": True},
        "tools": [TOOL], "tool_choice": "auto",
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(c["delta"].get("content") or "" for one in told for c in one["choices"])
    assert text == "Yes."


def test_options_reach_the_engine_and_others_are_named(client: httpx.Client) -> None:
    asked: Json = {"messages": [{"role": "user", "content": "Hello"}], "model": "reference"}
    how = {"num_predict": 5, "temperature": 1.5, "seed": 7, "num_ctx": 4096, "num_gpu": 1}
    response = client.post("/api/chat", json={**asked, "stream": False, "options": how})
    answer = response.json()
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 5)
    assert answer["recollect"]["sampling"]["seed"] == 7
    assert answer["recollect"]["sampling"]["temperature"] == 1.5
    ignored = response.headers["x-recollect-ignored"].split(", ")
    assert set(ignored) == {"options.num_ctx", "options.num_gpu"}
    kept = client.post("/api/chat", json={**asked, "stream": False, "keep_alive": "5m"})
    assert kept.headers["x-recollect-ignored"] == "keep_alive"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "other", "messages": []}, 404, "no model 'other'"),
        ("/api/show", {"model": "other:latest"}, 404, "no model"),
        (
            "/api/chat",
            {"model": "reference", "messages": [{"role": "user", "content": "?", "images": ["x"]}]},
            400,
            "messages.0.images: these models read text alone",
        ),
        ("/api/generate", {"model": "reference", "prompt": "x", "suffix": "y"}, 400, "suffix: "),
        (
            "/api/generate",
            {"model": "reference", "prompt": "x", "raw": True, "system": "y"},
            400,
            "system: a raw prompt is all that the model reads",
        ),
        (
            "/api/generate",
            {"model": "reference", "prompt": "x", "raw": True, "context": [1]},
            400,
            "context: a raw prompt",
        ),
        (
            "/api/generate",
            {"model": "reference", "prompt": "x", "options": {"mirostat": 2}},
            400,
            "options.mirostat: ",
        ),
        ("/api/chat", {"model": "reference", "mesages": []}, 400, "There is 'messages'"),
        ("/api/embed", {"model": "reference", "input": "x"}, 404, "nothing at"),
    ],
)
def test_what_cannot_be_done_is_refused_in_ollamas_form(
    client: httpx.Client, path: str, body: Json, status: int, words: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert words in response.json()["error"]


def test_what_says_nothing_changes_nothing(client: httpx.Client) -> None:
    asked: Json = {"messages": [{"role": "user", "content": "Hello", "images": []}]}
    how = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0, "num_predict": 2}
    assert whole(client, "/api/chat", {**asked, "tools": None, "options": how})["eval_count"] == 2


def test_models_are_listed_shown_and_loaded(client: httpx.Client) -> None:
    version = client.get("/api/version").json()["version"].split(".")
    assert tuple(map(int, version)) >= (0, 6, 4)  # what Copilot asks for
    for path, body in (("/api/chat", {"messages": []}), ("/api/generate", {"prompt": ""})):
        (loaded,) = lines(client, path, {**body, "keep_alive": -1})
        assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    (model,) = client.get("/api/tags").json()["models"]
    assert (model["name"], model["model"]) == ("reference", "reference")
    (running,) = client.get("/api/ps").json()["models"]
    assert running["context_length"] == 2048
    assert running["digest"] == model["digest"] != ""
    shown = client.post("/api/show", json={"model": "reference:latest"}).json()
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 2048
    assert "tools" in shown["capabilities"]
    assert shown["details"]["family"] == family


def test_a_thinking_model_says_so_and_can_be_told_not_to(
    scripted: Callable[..., httpx.Client],
) -> None:
    client = scripted("Yes.", "No.", "So.")
    asked: Json = {"messages": [{"role": "user", "content": "One?"}]}
    sizes = [
        whole(client, "/api/chat", {**asked, **how})["prompt_eval_count"]
        for how in ({}, {"think": False}, {"think": "high"})
    ]
    assert sizes[1] - sizes[0] == len("<think>\n\n</think>\n\n")
    assert sizes[2] == sizes[0]
    assert (
        "thinking" in client.post("/api/show", json={"model": "reference"}).json()["capabilities"]
    )


def test_log_probabilities_are_those_of_the_text(client: httpx.Client) -> None:
    asked: Json = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}
    how = {**asked, "top_logprobs": 2, "options": {"num_predict": 4}}
    answer = whole(client, "/api/chat", how)
    assert len(answer["logprobs"]) == 4
    assert all(len(one["top_logprobs"]) == 2 for one in answer["logprobs"])
    told = lines(client, "/api/chat", how)
    assert [one for line in told for one in line.get("logprobs", ())] == answer["logprobs"]
