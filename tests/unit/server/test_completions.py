"""Plain completions: text or token ids go on, and what they share is read once."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

Json = dict[str, Any]
PATH = "/v1/completions"


def test_text_and_its_token_ids_are_the_same_prompt(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    text = post(client, PATH, {"prompt": "Hello there, all of you", "max_tokens": 8})
    ids = post(client, PATH, {"prompt": list(b"Hello there, all of you"), "max_tokens": 8})
    assert ids["choices"] == text["choices"]
    assert text["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ids["usage"]["recollect"]["computed_tokens"] == 1


def test_several_prompts_are_answered_in_their_order(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    answer = post(client, PATH, {"prompt": ["One", "Another"], "n": 2, "max_tokens": 4})
    single = post(client, PATH, {"prompt": "Another", "max_tokens": 4, "echo": True})
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert single["choices"][0]["text"] == f"Another{texts[2]}"
    assert answer["usage"]["prompt_tokens"] == len("One") + len("Another")


def test_a_stream_says_the_same(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    body = {"prompt": "Hello", "max_tokens": 8}
    found = events(client, PATH, {**body, "stream": True})
    assert found.pop() == "data: [DONE]"
    text = "".join(event["choices"][0]["text"] for event in found)
    assert text == post(client, PATH, body)["choices"][0]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [999]},
        {"prompt": "x" * 3000},
        {"prompt": ["a"] * 99},
        {"suffix": "b"},
        {"best_of": 2},
    ],
)
def test_what_cannot_be_done_is_refused(client: httpx.Client, fields: Json) -> None:
    assert client.post(PATH, json={"prompt": "a", **fields}).status_code == 400
