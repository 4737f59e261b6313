# ruff: noqa: RUF001 - marks of calls have letters that look like others
"""
Models of each family behind real clients: they call tools for three turns, and nothing is read twice.

The templates are the families' own, the marks of their calls control tokens where they are theirs. Only
the choice of a token is a script's, and the grammar has to allow it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import httpx
import pytest

from recollect.conversation import formats
from recollect.conversation.model import Model
from recollect.engine import sampling
from recollect.models.catalog import reference_model
from recollect.runtime.base import ReferenceRuntime
from recollect.text.tokenizer import Tokenizer
from recollect.text.tool_formats import FORMATS

pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.model, pytest.mark.slow]

END: Final = "<|end_of_text|>"
CONTROL: Final = [
    END, "[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]", "<|tool_call_start|>", "<|tool_call_end|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|channel|>", "<|message|>",
    "<|constrain|>", "<|start|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|python_tag|>", "<|tool_call|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|eom|>", "<|eot|>", "<|think|>", "<|begin|>", "<|content|>", "<|open|>", "<|close|>", "<|sep|>",
    "<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>", "[THINK]", "[/THINK]",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "｜DSML｜", "<｜end▁of▁sentence｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_assistant|>", "<|im_middle|>",
    "<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>", "<turn|>", "<|channel>", "<channel|>",
    "<|tool_response>", "<tool_response|>",
]  # fmt: skip
FAMILIES: Final[Mapping[str, str]] = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-3",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral-v11",
    "unsloth-mistral-Devstral-Small-2507": "mistral-v11",
    "Qwen3-Coder": "qwen3-coder",
    "GLM-4.6": "glm-4.5",
    "GLM-4.7-Flash": "glm-4.7",
    "openai-gpt-oss-120b": "harmony",
    "LFM2.5-8B-A1B": "lfm2",
    "LFM2-8B-A1B": "lfm2",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "deepseek-ai-DeepSeek-V3.2": "dsml-v3.2",
    "deepseek-ai-DeepSeek-V4": "dsml",
    "Kimi-K2-Instruct": "kimi",
    "moonshotai-Kimi-K2": "kimi",
    "google-gemma-4-31B-it": "gemma-4",
    "ByteDance-Seed-OSS": "seed-oss",
    "MiniMax-M2": "minimax-m2",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "unsloth-Apriel-1.5": "apriel",
}
TOOL: Final = {
    "name": "weather",
    "description": "The weather in a city",
    "schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CITIES: Final = ("Paris", "Köln", "75001")


def told_of_weather(client: httpx.Client, **said: Any) -> dict[str, Any]:
    """Return the message that answers a question, where the tool for the weather is offered."""
    tool = {"name": "weather", "description": "It", "parameters": TOOL["schema"]}
    asked = {
        "model": "reference", "messages": [{"role": "user", "content": "?"}], "max_tokens": 300,
        "tools": [{"type": "function", "function": tool}], **said,
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


class Script:
    """Chooses tokens in the place of a model."""

    def __init__(self, tokenizer: Tokenizer, replies: Iterator[str]) -> None:
        self._tokenizer = tokenizer
        self._replies = replies
        self._rest: list[int] = []
        self.lengths: list[int] = []
        (self._end,) = tokenizer.encode(END)

    def choose(
        self, logits: Any, params: Any, *, history: Any, reply_start: int, allowed: Any = None,
        **_: Any,
    ) -> int:  # fmt: skip
        if len(history) == reply_start:
            self._rest = self._tokenizer.encode(next(self._replies))
            self.lengths.append(len(self._rest))
        place = len(history) - reply_start
        token = self._rest[place] if place < len(self._rest) else self._end
        text = self._tokenizer.decode(history[reply_start:].tolist(), skip_special_tokens=False)
        assert allowed is None or allowed[token], f"the grammar refuses what follows {text!r}"
        return token


@pytest.fixture
def tokenizer(make_byte_tokenizer: Callable[[Sequence[str]], Tokenizer]) -> Tokenizer:
    """Return a tokenizer of bytes, and of marks of all families as control tokens."""
    return make_byte_tokenizer(CONTROL)


THINKING: Final = {
    "GLM-4.7-Flash",
    "MiniMax-M2",
    "NVIDIA-Nemotron-Nano-v2",
}
"""Their templates open reasoning, which the script ends at once."""


def replies(name: str) -> Iterator[str]:
    family = FAMILIES[name]
    form, thought = FORMATS[family], "</think>\n\n" if name in THINKING else ""
    final = "<|channel|>final<|message|>" if family == "harmony" else ""
    for city in CITIES:
        given = json.dumps({"city": city, "days": 2}, ensure_ascii=False)
        yield thought + form.text_of([("weather", given)])
        yield f"{thought}{final}Sunny in {city}."


@pytest.fixture
def scripted(
    start: Callable[..., httpx.Client],
    sources: Mapping[str, str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[httpx.Client, Script]]:
    """Return what serves a scripted model with a real template."""

    def serve(name: str, said: Iterator[str] | None = None) -> tuple[httpx.Client, Script]:
        script = Script(tokenizer, said or replies(name))
        parts = replace(formats.FORMATS["reference"], tokenizer=lambda _: tokenizer)
        changed = MappingProxyType({**formats.FORMATS, "reference": parts})
        monkeypatch.setattr(formats, "FORMATS", changed)
        monkeypatch.setattr(sampling, "choose_token", script.choose)
        local = replace(
            reference_model(),
            chat_template=sources[name],
            context_length=60_000,
            eos_token_ids=tokenizer.eos_token_ids,
            eos_token=END,
        )
        runtime = ReferenceRuntime(vocab_size=tokenizer.vocab_size, context_length=60_000)
        model = Model(local, runtime, profile="exact", home=tmp_path / "home")
        assert model.template.tool_format.name == FAMILIES.get(name, "hermes")
        return start(load=lambda _: model), script

    return serve


def with_openai(url: str, http: httpx.Client) -> Iterator[tuple[int, int]]:
    """Have three turns; yield of each request how long its prompt was, and what of it was there."""
    openai = pytest.importorskip("openai")
    tools = [{"type": "function", "function": {**TOOL, "parameters": TOOL["schema"]}}]
    del tools[0]["function"]["schema"]  # type: ignore[attr-defined]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http)
    messages: list[Any] = []
    for city in CITIES:
        messages.append({"role": "user", "content": f"How is {city}?"})
        for is_last in (False, True):
            answer = client.chat.completions.create(
                model="reference", messages=messages, tools=tools, max_tokens=300
            )
            said, usage = answer.choices[0].message, answer.usage
            messages.append(said.model_dump(exclude_none=True))
            if is_last:
                assert (said.content, said.tool_calls) == (f"Sunny in {city}.", None)
            else:
                assert said.tool_calls, said
                (call,) = said.tool_calls
                assert (said.content or "", call.function.name) == ("", "weather")
                assert json.loads(call.function.arguments) == {"city": city, "days": 2}
                messages.append(
                    {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."}
                )
            yield usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def with_anthropic(url: str, _: httpx.Client) -> Iterator[tuple[int, int]]:
    """The same, streamed."""
    anthropic = pytest.importorskip("anthropic")
    tool = {"name": "weather", "description": "It", "input_schema": TOOL["schema"]}
    client = anthropic.Anthropic(base_url=url, api_key="none")
    messages: list[Any] = []
    for city in CITIES:
        messages.append({"role": "user", "content": f"How is {city}?"})
        for is_last in (False, True):
            with client.messages.stream(
                model="reference", messages=messages, tools=[tool], max_tokens=300
            ) as stream:
                answer = stream.get_final_message()
            messages.append({"role": "assistant", "content": answer.content})
            if is_last:
                assert [one.text for one in answer.content] == [f"Sunny in {city}."]
            else:
                (call,) = answer.content
                assert (call.name, call.input) == ("weather", {"city": city, "days": 2})
                result = {"type": "tool_result", "tool_use_id": call.id, "content": "It is sunny."}
                messages.append({"role": "user", "content": [result]})
            usage = answer.usage
            there = usage.cache_read_input_tokens or 0
            yield usage.input_tokens + there + (usage.cache_creation_input_tokens or 0), there
    client.close()


MOVING: Final = {"mistralai-Mistral-Nemo-Instruct-2407"}
"""Their templates show the tools before the last question, which is another in each turn."""


CLOSING: Final = {"GLM-4.7-Flash": 6}
"""Their templates open reasoning in a prompt, and show it only closed in history: those are read again."""


@pytest.mark.parametrize("talk", [with_openai, with_anthropic])
@pytest.mark.parametrize("name", FAMILIES)
def test_tools_are_called_for_three_turns_and_no_token_is_computed_twice(
    name: str,
    talk: Callable[[str, httpx.Client], Iterator[tuple[int, int]]],
    scripted: Callable[..., tuple[httpx.Client, Script]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client, script = scripted(name)
    known, lost = 0, []
    with httpx.Client(trust_env=False, timeout=60) as http:
        told = [*talk(str(client.base_url).rstrip("/"), http)]
    lengths = iter(script.lengths)
    for number, (prompt, there) in enumerate(told):
        is_other = number % 2 == 0 and name in MOVING
        few = CLOSING.get(name, 0)
        lost.append(0 if is_other else max(0, known - there - few))
        known = prompt + next(lengths) - 1
    assert lost == [0] * 2 * len(CITIES)


THINKERS: Final[Mapping[str, tuple[str, str]]] = {
    "Qwen-Qwen3-0.6B": ("<think>\n{}\n</think>\n\n", ""),
    "GLM-4.6": ("<think>{}</think>\n", ""),
    "MiniMax-M2": ("{}\n</think>\n\n", ""),
    "LFM2.5-8B-A1B": ("<think>{}</think>", ""),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]{}[/THINK]", ""),
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant", "<|channel|>final<|message|>",
    ),
    "Cohere2MoE": ("{}<|END_THINKING|><|START_TEXT|>", ""),
    "muse-glimmer": ("to=self<|message|>{}<|eom|><|start|>assistant to=user<|message|>", ""),
    "Kimi-K3": ("{}<|close|>think<|sep|><|open|>response<|sep|>", ""),
}  # fmt: skip
"""How they think, and what leads to an answer besides. They keep what was thought between calls."""


@pytest.mark.parametrize("sends", ["all", "what was said"])
@pytest.mark.parametrize("name", THINKERS)
def test_what_is_thought_between_calls_is_kept(
    name: str, sends: str, scripted: Callable[..., tuple[httpx.Client, Script]]
) -> None:
    think, lead = THINKERS[name]
    form = FORMATS[FAMILIES.get(name, "hermes")]
    calls = [
        form.text_of([("weather", json.dumps({"city": city}, ensure_ascii=False))])
        for city in CITIES
    ]
    said = [f"{think.format('Look.')}{call}" for call in calls]
    client, script = scripted(name, iter([*said, f"{think.format('So.')}{lead}Sunny."]))
    tool = {**TOOL, "parameters": TOOL["schema"]}
    del tool["schema"]
    messages: list[Any] = [{"role": "user", "content": "How is it there?"}]
    known = 0
    for city in (*CITIES, None):
        body = {"model": "reference", "messages": messages, "max_tokens": 400}
        answer = client.post(
            "/v1/chat/completions", json={**body, "tools": [{"type": "function", "function": tool}]}
        ).json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
        assert message["reasoning_content"] == ("Look." if city else "So.")
        assert (message["content"] or "") == ("" if city else "Sunny.")
        assert known - usage["prompt_tokens_details"]["cached_tokens"] <= 0
        known = usage["prompt_tokens"] + script.lengths[-1] - 1
        if sends != "all":
            del message["reasoning_content"]
        messages.append(message)
        if city:
            (call,) = message["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"city": city}
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "Sunny."})


@pytest.mark.parametrize(
    "name",
    ["Cohere2MoE", "muse-glimmer", "Kimi-K3", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b"],
)
def test_a_budget_ends_reasoning_where_tools_are_offered(
    name: str, scripted: Callable[..., tuple[httpx.Client, Script]], tokenizer: Tokenizer
) -> None:
    opening, ending = THINKERS[name][0].split("{}")
    form = FORMATS[FAMILIES.get(name, "hermes")]
    call = form.text_of([("weather", '{"city": "Rome"}')])
    most = 8
    thought = "Hm" * 4 if not opening.endswith("\n") else "Hm" * 3 + "H"
    endless = "x" * len(tokenizer.encode(ending.lstrip("\n")))
    client, _ = scripted(name, iter([f"{opening}{thought}{endless}{call}"]))
    message = told_of_weather(client, max_tokens=200, thinking_budget=most)
    assert message["reasoning_content"] == thought
    assert message["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "GLM-4.6"])
def test_a_call_that_a_model_makes_while_it_thinks_is_called(
    name: str, choice: str, scripted: Callable[..., tuple[httpx.Client, Script]]
) -> None:
    """It closes its thoughts behind the call, or not at all; the grammar holds the call as elsewhere."""
    call = FORMATS[FAMILIES.get(name, "hermes")].text_of([("weather", '{"city": "Rome"}')])
    client, _ = scripted(name, iter([f"<think>\nLook.\n{call}"]))
    message = told_of_weather(client, tool_choice=choice)
    assert message["reasoning_content"] == "Look."
    (told,) = message["tool_calls"]
    assert json.loads(told["function"]["arguments"]) == {"city": "Rome"}


@pytest.mark.usefixtures("nothing_read_ahead")
@pytest.mark.parametrize(
    ("name", "shown"),
    [("Qwen-Qwen3-0.6B", "<think>\nLook.\n"), ("GLM-4.6", "")],  # a line feed comes first there
)
def test_reasoning_that_a_call_ended_is_closed_in_the_next_turn_which_reads_the_call_again(
    name: str,
    shown: str,
    scripted: Callable[..., tuple[httpx.Client, Script]],
    tokenizer: Tokenizer,
) -> None:
    """All before what the template puts there is reused, and the turn after that reads nothing again."""
    call = FORMATS[FAMILIES[name]].text_of([("weather", '{"city": "Rome"}')])
    think, _ = THINKERS[name]
    said = [f"<think>\nLook.\n{call}", think.format("So.") + call, think.format("So.") + "Sunny."]
    client, script = scripted(name, iter(said))
    tool = {"name": "weather", "description": "It", "parameters": TOOL["schema"]}
    messages: list[Any] = [{"role": "user", "content": "?"}]
    told = list[tuple[int, int, str]]()
    for _ in said:
        asked = {
            "model": "reference", "messages": messages, "max_tokens": 300,
            "tools": [{"type": "function", "function": tool}],
        }  # fmt: skip
        answer = client.post("/v1/chat/completions", json=asked).json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        told.append((usage["prompt_tokens"], cached, usage["recollect"]["reason"]))
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": one["id"], "content": "Sunny."}
            for one in message.get("tool_calls", ())
        ]
    first, second, third = told
    assert first[1:] == (0, "new")
    assert second[1:] == (first[0] + len(tokenizer.encode(shown)), "template_rewrote")
    assert third[1:] == (second[0] + script.lengths[1], "new")


@pytest.mark.parametrize("most", [0, 1])
def test_a_model_of_harmony_calls_a_tool_on_the_smallest_budget(
    most: int, scripted: Callable[..., tuple[httpx.Client, Script]], tokenizer: Tokenizer
) -> None:
    call = FORMATS["harmony"].text_of([("weather", '{"city": "Rome"}')])
    ending = "x" * len(tokenizer.encode("<|end|><|start|>assistant"))
    thought = f"<|channel|>analysis<|message|>H{ending}" if most else ""
    client, _ = scripted("openai-gpt-oss-120b", iter([f"{thought}{call}"]))
    message = told_of_weather(client, thinking_budget=most)
    assert (message.get("reasoning_content") or "") == "H" * most
    assert message["tool_calls"][0]["function"]["name"] == "weather"
