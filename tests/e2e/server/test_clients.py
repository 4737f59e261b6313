"""The clients that people use, unchanged, against a running server with a real model."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # theirs, of their own dependencies
]

MODEL = "smollm2"


@pytest.fixture(scope="module", autouse=True)
def what_the_clients_leave_behind() -> Iterator[None]:
    """Have their unclosed loops and sockets collected here, and not counted against other tests."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(5):  # as often as pytest does at its end: one round may free the next
            gc.collect()


SYSTEM = (
    "You are a careful assistant of a small harbour on the northern coast. You know the tides, "
    "the boats and their owners, and you answer in one short sentence."
)
QUESTION = "Which boats are in the harbour?"


@pytest.fixture
def client(url: str, keys: tuple[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=keys[0], max_retries=0)


def messages(*said: str) -> list[Any]:
    roles = ["user", "assistant"]
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return [{"role": "system", "content": SYSTEM}, *turns]


def test_openai_chat_a_second_turn_is_warm(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model=MODEL, messages=messages(QUESTION), max_tokens=16, user="alex"
    )
    text = first.choices[0].message.content
    assert text
    second = client.chat.completions.create(
        model="gpt-4o-mini",
        messages=messages(QUESTION, text, "And yesterday?"),
        max_completion_tokens=8,
        stop=["\n"],
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage is not None
    assert cached is not None
    # The last token of a reply has no KV when it ends.
    assert cached >= first.usage.total_tokens - 1
    assert second.usage.model_extra is not None
    own = second.usage.model_extra["recollect"]
    assert own["computed_tokens"] == second.usage.prompt_tokens - cached
    assert own["tier"] == "memory"


def test_openai_stream_equals_the_whole_reply(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=messages(QUESTION), max_tokens=16, n=2, seed=3, temperature=0.8
    )
    texts = ["", ""]
    reasons: dict[int, str | None] = {}
    usage = None
    with client.chat.completions.create(
        model=MODEL,
        messages=messages(QUESTION),
        max_tokens=16,
        n=2,
        seed=3,
        temperature=0.8,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_openai_async_requests_share_their_prefix(url: str, keys: tuple[str, str]) -> None:
    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key=keys[0], max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model=MODEL, messages=messages(f"{n}. {QUESTION}"), max_tokens=8
                )
                for n in range(4)
            ]
            return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert all(answer.choices[0].message.content for answer in answers)


def test_openai_responses_fork_and_survive(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model=MODEL, input=QUESTION, instructions=SYSTEM, max_output_tokens=16
    )
    assert first.output_text
    second = client.responses.create(
        model=MODEL,
        input="And yesterday?",
        instructions=SYSTEM,
        previous_response_id=first.id,
        max_output_tokens=8,
    )
    other = client.responses.create(
        model=MODEL,
        input="And tomorrow?",
        instructions=SYSTEM,
        previous_response_id=first.id,
        max_output_tokens=8,
    )
    assert first.usage is not None
    for later in (second, other):
        assert later.usage is not None
        cached = later.usage.input_tokens_details.cached_tokens
        assert cached >= first.usage.total_tokens - 1
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(other.id)
    assert len(items.data) == 3
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_openai_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input=QUESTION, instructions=SYSTEM, max_output_tokens=12
    ) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type in {"response.completed", "response.incomplete"}
    assert text == last.response.output_text
    assert last.response.usage is not None


def test_openai_conversations(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(
        items=[{"type": "message", "role": "system", "content": SYSTEM}], metadata={"a": "b"}
    )
    for text in (QUESTION, "And yesterday?"):
        client.responses.create(
            model=MODEL, input=text, conversation=conversation.id, max_output_tokens=8
        )
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert len(items) == 5
    rewound = client.post(
        f"/conversations/{conversation.id}/rewind", body={"turns": 1}, cast_to=httpx.Response
    )
    assert rewound.json()["turns"] == 1
    assert client.conversations.delete(conversation.id).deleted


def test_openai_completions_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "gpt-4o-mini"]
    assert client.models.retrieve(MODEL).id == MODEL
    completion = client.completions.create(model=MODEL, prompt="Rivers are", max_tokens=6)
    assert completion.choices[0].text


def test_openai_structured_output(client: openai.OpenAI) -> None:
    class Boat(BaseModel):
        name: str
        is_red: bool

    chat = client.chat.completions.parse(
        model=MODEL, messages=messages("Describe a boat."), response_format=Boat, max_tokens=200
    )
    assert isinstance(chat.choices[0].message.parsed, Boat)
    response = client.responses.parse(
        model=MODEL, input="Describe a boat.", text_format=Boat, max_output_tokens=200
    )
    assert isinstance(response.output_parsed, Boat)


def test_openai_tools(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"harbour": {"type": "string", "maxLength": 20}},
        "required": ["harbour"],
        "additionalProperties": False,
    }
    function = {"name": "tide", "description": "The tide.", "parameters": parameters}
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": messages("How is the tide?"),
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
    }
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls
    call = message.tool_calls[0]
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"harbour"}
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls
    assert final.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "High."}
    history = [*asked["messages"], message.model_dump(exclude_none=True), result]
    later = client.chat.completions.create(
        model=MODEL, messages=history, tools=asked["tools"], tool_choice="none", max_tokens=8
    )
    assert later.usage is not None
    assert later.usage.prompt_tokens_details is not None
    assert (later.usage.prompt_tokens_details.cached_tokens or 0) > later.usage.prompt_tokens // 2


def test_openai_errors_are_the_clients_own(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=messages("boat " * 9000))
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-nothing", messages=messages("a"))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()


def test_anthropic_messages(url: str, keys: tuple[str, str]) -> None:
    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=keys[0], max_retries=0)
    asked: dict[str, Any] = {
        "model": MODEL,
        "system": SYSTEM,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.usage.cache_read_input_tokens is not None
    assert final.usage.cache_read_input_tokens > 40
    assert final.usage.input_tokens == 0  # what is asked twice is not read again
    counted = client.messages.count_tokens(model=MODEL, system=SYSTEM, messages=asked["messages"])
    assert counted.input_tokens == final.usage.cache_read_input_tokens
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(
            base_url=url.removesuffix("/v1"), api_key="wrong", max_retries=0
        ).messages.create(**asked)


def close_kept(clients: dict[str, Any]) -> None:
    """Close what litellm keeps until the interpreter ends, which would then warn of open sockets."""
    for client in clients.values():
        if isinstance(client, openai.OpenAI):
            client.close()


def test_litellm(
    url: str,
    keys: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    import litellm

    request.addfinalizer(lambda: close_kept(litellm.in_memory_llm_clients_cache.cache_dict))
    # Its log of services (`_service_logger._sync_dispatch_loop`) takes the thread's event loop, and where
    # there is none asyncio makes one, which nobody would close.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    request.addfinalizer(loop.close)
    request.addfinalizer(lambda: asyncio.set_event_loop(None))
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=url,
        api_key=keys[0],
        messages=messages(QUESTION),
        max_tokens=8,
    )
    assert answer.choices[0].message.content
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(
            model=f"openai/{MODEL}",
            api_base=url,
            api_key=keys[0],
            messages=messages("boat " * 9000),
        )


def test_langchain(url: str, keys: tuple[str, str]) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    for uses_responses in (False, True):
        # A client of our own: the one that it makes is kept until the interpreter ends.
        with httpx.Client() as connections:
            chat = ChatOpenAI(
                model=MODEL,
                base_url=url,
                api_key=SecretStr(keys[0]),
                max_completion_tokens=8,
                use_responses_api=uses_responses,
                http_client=connections,
            )
            answer = chat.invoke([("system", SYSTEM), ("user", QUESTION)])
            assert answer.text
            assert "".join(piece.text for piece in chat.stream(QUESTION))


def test_the_llm_command(url: str, keys: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: smol\n  model_name: {MODEL}\n  api_base: {url}\n  api_key_name: here\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"here": keys[0]}))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    llm = [sys.executable, "-m", "llm", "prompt", "-m", "smol", "-o", "max_tokens", "8"]
    said = []
    for command in ([*llm, "-s", SYSTEM, QUESTION], [*llm, "-c", "And yesterday?"]):
        done = subprocess.run(  # noqa: S603 - our own interpreter
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert all(said)


def test_two_keys_share_nothing(http: httpx.Client, keys: tuple[str, str]) -> None:
    text = " ".join(f"Boat {n} came in and left again." for n in range(60))

    def ask(key: str) -> tuple[int, float]:
        begun = perf_counter()
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        answer = http.post("/v1/chat/completions", json=body, headers=headers).json()
        return answer["usage"]["recollect"]["computed_tokens"], perf_counter() - begun

    mine, other = ask(keys[0]), ask(keys[1])
    again = min((ask(keys[0]) for _ in range(3)), key=lambda told: told[1])
    assert other[0] >= mine[0] > 400  # the first had the template's own words already
    assert again[0] == 0
    assert other[1] > 2 * again[1]
