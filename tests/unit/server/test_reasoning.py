"""What a model thinks is told by each API in its own words, and taken back as it was given out."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

import httpx
import pytest

Json = dict[str, Any]

TEXT: Final = "<think>\nHmm: 1?\n</think>\n\nIt is 1."
THOUGHT, SAID = "Hmm: 1?", "It is 1."
ASKED: Final[list[Json]] = [{"role": "user", "content": "One?"}]


@pytest.fixture
def client(choosing: Callable[..., httpx.Client]) -> httpx.Client:
    """Return a client of a server whose model thinks before it says something, always the same."""
    ids = [*TEXT.encode(), 257]
    return choosing(lambda said, _: ids[len(said)])


def read_again(usage: Json, before: Json) -> int:
    """Return the tokens that a prompt lost of an earlier prompt with its reply."""
    had = (
        before["prompt_tokens"] + before["completion_tokens"]
    )  # the pass that ended it fed the last
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return int(had) - cached


@pytest.mark.few(3)
@pytest.mark.parametrize("sends_back", [True, False])
def test_chat_completions_have_reasoning_content(openais: Any, sends_back: bool) -> None:
    messages, usages = [*ASKED], list[Json]()
    for _ in range(3):
        done = openais.chat.completions.create(model="reference", messages=messages)
        said = done.choices[0].message
        assert (said.reasoning_content, said.content) == (THOUGHT, SAID)
        usage = done.usage.model_dump()
        assert usage["completion_tokens_details"]["reasoning_tokens"] == len(TEXT) - len(SAID)
        if usages:
            assert read_again(usage, usages[-1]) == 0
        usages.append(usage)
        back = said.model_dump(exclude_none=True)
        if not sends_back:
            del back["reasoning_content"]
        messages += [back, {"role": "user", "content": "Two?"}]


def test_chat_completions_stream_reasoning_before_the_text(openais: Any) -> None:
    chunks = [*openais.chat.completions.create(model="reference", messages=ASKED, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thought)) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == SAID
    said = next(place for place, delta in enumerate(deltas) if delta.content)
    assert not any(thought[said:])


def test_a_template_that_is_told_not_to_think_closes_reasoning(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    prompts = [
        post(
            client,
            "/v1/chat/completions",
            {"messages": ASKED, **how},
        )["usage"]["prompt_tokens"]
        for how in (
            {},
            {"enable_thinking": False},
            {"reasoning_effort": "none"},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": True},
        )
    ]
    closed = len("<think>\n\n</think>\n\n")
    assert [length - prompts[0] for length in prompts] == [0, closed, closed, closed, 0]


@pytest.mark.few(1)
@pytest.mark.parametrize("streams", [True, False])
def test_messages_have_a_thinking_block_that_comes_back(anthropics: Any, streams: bool) -> None:
    messages: list[Json] = [*ASKED]
    spent = list[Any]()
    for _ in range(3):
        how: Json = {"model": "reference", "max_tokens": 400, "messages": messages}
        if streams:
            with anthropics.messages.stream(**how) as stream:
                done = stream.get_final_message()
        else:
            done = anthropics.messages.create(**how)
        thought, text = done.content
        assert (thought.type, thought.thinking, text.text) == ("thinking", THOUGHT, SAID)
        assert thought.signature
        spent.append(done.usage)
        messages = [
            *messages,
            {"role": "assistant", "content": [one.model_dump() for one in done.content]},
            {"role": "user", "content": "Two?"},
        ]
    new = spent[2].input_tokens
    assert new == spent[1].input_tokens < spent[0].input_tokens + spent[0].output_tokens


@pytest.mark.few(1)
@pytest.mark.parametrize("streams", [True, False])
def test_responses_have_a_reasoning_item_that_comes_back(openais: Any, streams: bool) -> None:
    items: list[Any] = [*ASKED]
    usages = list[Any]()
    for _ in range(3):
        how: Json = {"model": "reference", "input": items, "store": False}
        if streams:
            with openais.responses.stream(**how) as stream:
                kinds = [event.type for event in stream]
                done = stream.get_final_response()
            assert kinds.index("response.reasoning_text.done") < kinds.index(
                "response.output_text.done"
            )
        else:
            done = openais.responses.create(**how)
        thought, said = done.output
        assert (thought.type, thought.content[0].text) == ("reasoning", THOUGHT)
        assert done.output_text == SAID
        assert done.usage.output_tokens_details.reasoning_tokens == len(TEXT) - len(SAID)
        usages.append(done.usage)
        back = [one.model_dump(exclude_none=True) for one in (thought, said)]
        items = [*items, *back, {"role": "user", "content": "Two?"}]
    for before, after in pairwise(usages):
        had = before.input_tokens + before.output_tokens
        assert after.input_tokens_details.cached_tokens == had


@pytest.mark.slow
def test_a_kept_response_has_its_reasoning(openais: Any, client: httpx.Client) -> None:
    first = openais.responses.create(model="reference", input="One?")
    kept = openais.responses.retrieve(first.id)
    assert [item.type for item in kept.output] == ["reasoning", "message"]
    assert kept.output[0].content[0].text == THOUGHT
    again = openais.responses.create(
        model="reference",
        input=[
            {"role": "user", "content": "One?"},
            *({"type": "item_reference", "id": item.id} for item in first.output),
            {"role": "user", "content": "Two?"},
        ],
    )
    had = first.usage.input_tokens + first.usage.output_tokens
    assert again.usage.input_tokens_details.cached_tokens == had
    second = openais.responses.create(
        model="reference", input="Two?", previous_response_id=first.id
    )
    assert second.usage.input_tokens_details.cached_tokens >= had


def test_a_stream_numbers_its_items_as_the_response_does(client: httpx.Client) -> None:
    body = {"model": "reference", "input": "One?", "stream": True}
    text = client.post("/v1/responses", json=body).text
    events = [json.loads(line) for line in re.findall(r"^data: (\{.*)$", text, re.M)]
    places = {
        event["item"]["type"]: event["output_index"]
        for event in events
        if event["type"] == "response.output_item.done"
    }
    assert places == {"reasoning": 0, "message": 1}
    deltas = [event for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(event["delta"] for event in deltas) == THOUGHT


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/v1/chat/completions", {"thinking_budget": 12}),
        ("/v1/chat/completions", {"thinking": {"type": "enabled", "budget_tokens": 12}}),
        ("/v1/chat/completions", {"reasoning": {"max_tokens": 12}}),
        ("/v1/messages", {"max_tokens": 400, "thinking": {"type": "enabled", "budget_tokens": 12}}),
        ("/v1/responses", {"reasoning": {"max_tokens": 12}}),
    ],
)
def test_a_budget_ends_reasoning(
    choosing: Callable[..., httpx.Client], path: str, how: Json
) -> None:
    def choose(ids_said: list[int], _: int) -> int:
        said = bytes(ids_said).decode()
        rest = "Yes." if "</think>" in said else "<think>\n" + "Hmm. " * 50
        ids: list[int] = [*rest.encode(), 257]
        return ids[len(said.rpartition("</think>\n\n")[2])]

    client = choosing(choose)
    body = {"input": "One?"} if path.endswith("responses") else {"messages": ASKED}
    answer = client.post(path, json={**body, **how})
    assert answer.status_code == 200, answer.text
    assert "x-recollect-ignored" not in answer.headers
    assert '"Hmm. Hmm. H"' in answer.text
    assert '"Yes."' in answer.text
