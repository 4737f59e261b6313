"""Plain completions: text or token ids go on, and what they share is read once."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from recollect.conversation.model import Model

Json = dict[str, Any]
PATH = "/v1/completions"


def test_text_and_its_token_ids_are_the_same_prompt(
    client: httpx.Client, post: Callable[..., Json]
) -> None:
    text = post(client, PATH, {"prompt": "Hello there, all of you", "max_tokens": 8})
    ids = post(client, PATH, {"prompt": list(b"Hello there, all of you"), "max_tokens": 8})
    assert ids["choices"] == text["choices"]
    assert text["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ids["usage"]["recollect"]["computed_tokens"] == 0


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


def test_a_prompt_that_was_evicted_is_told(
    start: Callable[..., httpx.Client], make_model: Callable[..., Model], post: Callable[..., Json]
) -> None:
    client = start(load=lambda _: make_model(num_blocks=40))
    *others, last = (
        post(client, PATH, {"prompt": letter * 300, "max_tokens": 4})["usage"]["recollect"]
        for letter in "abcdea"
    )
    assert {one["reason"] for one in others} == {"new"}
    assert last["reason"] == "evicted"
    assert last["difference"].endswith("tokens had been computed, and are no longer in memory.")


@pytest.mark.few(3)
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


def test_a_prompt_is_given_back_with_its_log_probabilities(
    client: httpx.Client, post: Callable[..., Json], events: Callable[..., list[Any]]
) -> None:
    """Each is what the reply's would be after the prompt up to there; the first has none."""
    prompt = "Hé, you"
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3}
    answer = post(client, PATH, body)
    (choice,) = answer["choices"]
    likely = choice["logprobs"]
    data = prompt.encode()
    assert len(likely["tokens"]) == len(data) + 3
    assert likely["token_logprobs"][0] is likely["top_logprobs"][0] is None
    assert likely["text_offset"][:5] == [0, 1, 1, 2, 3]
    for place in (1, 3, len(data) - 1):
        bias = {str(data[place]): 100}
        before = {"prompt": list(data[:place]), "logprobs": 2, "max_tokens": 1, "logit_bias": bias}
        (told,) = post(client, PATH, before)["choices"]
        assert told["logprobs"]["token_logprobs"] == [likely["token_logprobs"][place]]
        assert told["logprobs"]["top_logprobs"] == [likely["top_logprobs"][place]]
    plain = post(client, PATH, {"prompt": prompt, "logprobs": 2, "max_tokens": 3})["choices"][0]
    assert choice["text"] == prompt + plain["text"]
    assert likely["token_logprobs"][len(data) :] == plain["logprobs"]["token_logprobs"]
    own = answer["usage"]["recollect"]
    assert (own["computed_tokens"], own["reused_tokens"]) == (len(data), 0), "for this request"
    streamed = [
        event["choices"][0]["logprobs"]
        for event in events(client, PATH, {**body, "stream": True})
        if not isinstance(event, str) and event["choices"][0]["logprobs"]
    ]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in streamed for value in part[name]] == likely[name]


@pytest.mark.few(3)
@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_at_all_can_be_asked_for(
    client: httpx.Client,
    post: Callable[..., Json],
    events: Callable[..., list[Any]],
    stream: bool,
) -> None:
    """As tools do that measure how likely a text is."""
    body = {"prompt": ["Hello", "You"], "echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}
    full = post(client, PATH, {**body, "max_tokens": 1})["choices"]
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *found, last, _ = events(client, PATH, {**body, **options})
        usage = last["usage"]
        choices = [one for event in found for one in event["choices"]]
        assert [one["text"] for one in choices] == ["Hello", "Hello", "You", "You", "", "", "", ""]
        assert [one["finish_reason"] for one in choices[4:]] == ["length"] * 4
        choices = choices[:4]
    else:
        answer = post(client, PATH, body)
        usage, choices = answer["usage"], answer["choices"]
        assert [one["text"] for one in choices] == ["Hello", "Hello", "You", "You"]
        assert {one["finish_reason"] for one in choices} == {"length"}
    for one, more in zip(choices, full, strict=True):
        length = len(one["logprobs"]["tokens"])
        assert length == len(one["text"])
        assert one["logprobs"]["token_logprobs"] == more["logprobs"]["token_logprobs"][:length]
    assert usage["completion_tokens"] == 0
    assert usage["prompt_tokens"] == len("HelloYou")
    nothing = post(client, PATH, {"prompt": "Hello", "max_tokens": 0})
    assert nothing["choices"][0]["text"] == ""
    assert client.post(PATH, json={"prompt": "", "max_tokens": 0}).status_code == 400


@pytest.mark.parametrize("prompt", ["<|user|>Hé", [65, 256, 66, 258, 67]])
def test_a_prompt_is_given_back_whole_control_tokens_too(
    client: httpx.Client, post: Callable[..., Json], prompt: Any
) -> None:
    """The offsets of tokens are places in the text."""
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = post(client, PATH, body)["choices"]
    if isinstance(prompt, str):
        assert choice["text"] == prompt
    likely = choice["logprobs"]
    for token, at in zip(likely["tokens"], likely["text_offset"], strict=True):
        assert token.isascii() is False or choice["text"][at:].startswith(token)
