"""Real chat templates: those that llama.cpp keeps, from its Python package's source."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from recollect.conversation.model import Model
from recollect.errors import TemplateError
from recollect.text.reasoning import Begun
from recollect.text.template import ChatTemplate
from recollect.types import Message, SamplingParams, common_prefix_length

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
SAID: Final[list[Message]] = [
    {"role": "system", "content": "Be naïve."},
    {"role": "user", "content": "Hi <b> 🎉"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More?"},
]
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": "Gets it.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]
WHOLE: Final = 50
"""Templates under which nothing is read again; six refuse what is said here."""
REWRITE: Final = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "GLM-4.7-Flash",
    "Kimi-K3",
    "MiniMax-M3",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Spark2.5",
    "deepseek-ai-DeepSeek-V3.2",
    "inclusionai-ling-3.0-flash",
    "muse-glimmer",
    "openai-gpt-oss-120b",
    "poolside-Laguna-S-2.1",
    "upstage-Solar-Open-100B",
}
"""Those that show in history what leads to a reply otherwise, and not by space or an opened mark: it has
the name of a channel there, or thinking is closed."""

THINKING: Final = 40
"""Templates with marks of reasoning."""
MARKS: Final = {
    "Qwen-Qwen3-0.6B": ("<think>", "</think>", "", "reasoning_content"),
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>", "", "reasoning_content"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("[THINK]", "[/THINK]", "", "parts"),
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "thinking",
    ),
    "google-gemma-4-31B-it": ("<|channel>thought", "<channel|>", "", "reasoning_content"),
    "MiniMax-M3": ("<mm:think>", "</mm:think>", "", "reasoning_content"),
    "Cohere2MoE": (
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_TEXT|>",
        "reasoning_content",
    ),
    "upstage-Solar-Open-100B": (
        "<|think|>",
        "<|end|>",
        "<|begin|>assistant<|content|>",
        "reasoning",
    ),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<think>", "</think>", "", "nowhere"),
    "LFM2.5-8B-A1B": ("<think>", "</think>", "", "thinking"),
    "HuggingFaceTB-SmolLM3-3B": ("<think>", "</think>", "", "text"),
}
"""Of some: what opens and closes reasoning, what leads to the answer, and where the template looks for it."""
KEEPS: Final = {
    "Bielik-11B-v3.0-Instruct",
    "ByteDance-Seed-OSS",
    "Cohere2MoE",
    "HuggingFaceTB-SmolLM3-3B",
    "Kimi-K3",
    "MiniMax-M3",
    "Spark2.5",
    "ibm-granite-granite-3.3-2B-Instruct",
    "inclusionai-ling-3.0-flash",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "muse-glimmer",
    "poolside-Laguna-S-2.1",
    "unsloth-Apriel-1.5",
}
"""Those that show reasoning in history: of these nothing is read again. The others drop it, all or all but
the last, and that is told."""

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.usefixtures("nothing_read_ahead"),
]

Says = Callable[[str], SamplingParams]


def rendered(source: str, *, is_own: bool) -> list[str]:
    texts = []
    for tools in (None, TOOLS):
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", now=NOW, is_own=is_own)
        try:
            texts.append(template.render(SAID, add_generation_prompt=True, tools=tools))
        except TemplateError as refusal:
            texts.append(str(refusal))
    return texts


def test_each_is_rendered_in_its_process_as_it_is_here(sources: dict[str, str]) -> None:
    """Within bounds that are far above what any of them takes."""
    assert len(sources) >= 70
    different = [
        name
        for name, source in sources.items()
        if rendered(source, is_own=False) != rendered(source, is_own=True)
    ]
    assert different == []
    refused = [
        name for name, source in sources.items() if "broken" in rendered(source, is_own=False)[0]
    ]
    assert refused == []


def test_nothing_that_was_read_or_generated_is_read_again_but_what_is_told(
    sources: dict[str, str],
    make_model: Callable[..., Model],
    says: Says,
) -> None:
    """Four turns of a client that trims replies; of each turn what was not reused is counted."""
    rewrote, whole = set[str](), set[str]()
    for name, source in sources.items():
        model = make_model(template=source, context_length=60_000, num_blocks=8_000)
        messages: list[Message] = [{"role": "user", "content": "One"}]
        known = 0
        try:
            for number in range(4):
                session = model.session_from(messages)
                text = "Well, you.\n"
                marks = model.template.reasoning
                ending = model.prompts.encode(session.path()).ending
                if marks is not None and marks.are_opened_by(ending):  # a model closes them first
                    text = f"{marks.close}{marks.lead or marks.space}{text}"
                reply = session.respond(None, params=says(text))
                lost = known - reply.usage.reused_tokens
                if lost > 0:
                    rewrote.add(name)
                    assert (name, reply.usage.reason) == (name, "template_rewrote")
                    assert lost <= reply.usage.computed_tokens
                else:
                    assert (name, reply.usage.reason) == (name, "new")
                ids = reply.node.token_ids
                assert ids is not None
                known = reply.usage.prompt_tokens + len(ids) - 1
                messages += [
                    {"role": "assistant", "content": reply.content.strip()},
                    {"role": "user", "content": f"And {number}?"},
                ]
        except TemplateError:
            continue  # it refuses what others take
        finally:
            model.close()
        if name not in rewrote:
            whole.add(name)
    assert len(whole) >= WHOLE, sorted(rewrote)
    assert rewrote <= REWRITE, sorted(rewrote - REWRITE)


def test_marks_of_reasoning_are_found(sources: dict[str, str]) -> None:
    found = {
        name: ChatTemplate(source, eos_token="</s>").reasoning for name, source in sources.items()
    }
    assert sum(marks is not None for marks in found.values()) >= THINKING
    told = {
        name: None if marks is None else (marks.open, marks.close, marks.lead, marks.way)
        for name, marks in found.items()
        if name in MARKS
    }
    assert told == MARKS
    for name in (
        "Qwen3-Coder",
        "meta-llama-Llama-3.1-8B-Instruct",
        "microsoft-Phi-3.5-mini-instruct",
    ):
        assert found[name] is None, name


@pytest.mark.parametrize("sends", ["all", "what was said"])
def test_reasoning_that_a_template_keeps_is_read_once(
    sources: dict[str, str],
    make_model: Callable[..., Model],
    says: Says,
    sends: str,
) -> None:
    """Three turns of a model that thinks, with clients that send reasoning back and others."""
    kept = set[str]()
    for name, source in sources.items():
        marks = ChatTemplate(source, eos_token="</s>").reasoning
        if marks is None:
            continue
        model = make_model(template=source, context_length=60_000, num_blocks=8_000)
        messages: list[Message] = [{"role": "user", "content": "One"}]
        lost, known, thinks = list[int](), 0, True
        try:
            for number in range(3):
                prompt = model.template.render(messages, add_generation_prompt=True)
                begun = Begun.of(marks, prompt)
                thinks = thinks and not begun.is_closed
                opening = "" if begun.is_inside or not thinks else f"{marks.open}\n"
                thought = f"{opening}Hmm: {number}.\n{marks.close}{marks.lead or marks.space}"
                text = (thought if thinks else "") + f"Well, {number}."
                reply = model.session_from(messages).respond(None, params=says(text))
                assert (name, reply.content) == (name, f"Well, {number}.")
                assert (name, reply.reasoning) == (name, f"Hmm: {number}." if thinks else "")
                if number:
                    lost.append(known - reply.usage.reused_tokens)
                    reason = "template_rewrote" if lost[-1] > 0 else "new"
                    assert (name, reply.usage.reason) == (name, reason)
                known = reply.usage.prompt_tokens + len(text)
                said: Message = {"role": "assistant", "content": reply.content}
                if sends == "all" and reply.reasoning:
                    said["reasoning_content"] = reply.reasoning
                messages += [said, {"role": "user", "content": f"And {number}?"}]
        except TemplateError:
            continue  # it refuses what others take
        finally:
            model.close()
        if thinks and max(lost) <= 0:
            kept.add(name)
    assert kept == KEEPS


FEW: Final = {
    "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "Qwen-QwQ-32B", "Reka-Edge", "NVIDIA-Nemotron-Nano-v2", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "google-gemma-4-31B-it", "Apriel-1.6-15b-Thinker-fixed", "upstage-Solar-Open-100B",
    "openai-gpt-oss-120b", "GLM-4.6", "GLM-4.7-Flash", "MiniMax-M2", "LFM2.5-8B-A1B",
}  # fmt: skip
"""Some that drop reasoning from history."""


@pytest.mark.parametrize("cuts", [True, False])
def test_only_what_is_shown_otherwise_is_read_again_of_reasoning_that_is_dropped(
    sources: dict[str, str], make_model: Callable[..., Model], says: Says, cuts: bool
) -> None:
    """
    What is reused ends where the prompt leaves what was read, and no token before.

    Where KV cannot be cut too, as with a recurrent state: it is kept there.
    """
    dropped = set[str]()
    for name, source in sources.items():
        options = {"enable_thinking": True, "thinking": True}
        marks = ChatTemplate(source, eos_token="</s>").reasoning
        if marks is None:
            continue
        how = {} if cuts else {"block_size": 256, "whole_blocks_only": True, "whole_tails": True}
        blocks = 8_000 if cuts else 250
        model = make_model(template=source, context_length=60_000, num_blocks=blocks, **how)
        messages: list[Message] = [{"role": "user", "content": "One"}]
        read, asked = list[int](), 0
        try:
            for number in range(4):
                session = model.session_from(messages, template_options=options)
                prompt = model.prompts.with_options(options).encode(session.path())
                begun = Begun.of(marks, prompt.ending)
                opening = "" if begun.is_inside else f"{marks.open}\n"
                thought = f"{opening}Hmm: {number}.\n{marks.close}{marks.lead or marks.space}"
                text = ("" if begun.is_closed else thought) + f"Well, {number}."
                reply = session.respond(None, params=says(text))
                same = common_prefix_length(read, prompt.token_ids)
                is_rewritten = same < len(read)
                if is_rewritten:
                    dropped.add(name)
                reason = "template_rewrote" if is_rewritten else "new"
                # Where KV cannot be cut, the first letters of a mark that a reply began with are not
                # found alone, though what is shown instead begins with them too.
                if is_rewritten and not cuts:
                    same = max(min(same, asked), same // 256 * 256)
                assert (name, reply.usage.reused_tokens) == (name, same)
                assert (name, reply.usage.reason) == (name, reason)
                asked = len(prompt.token_ids)
                assert reply.node.token_ids is not None
                read = [
                    *prompt.token_ids,
                    *reply.node.token_ids,
                ]  # the pass that ended it fed the last
                messages += [
                    {"role": "assistant", "content": reply.content},
                    {"role": "user", "content": f"And {number}?"},
                ]
        except TemplateError:
            continue  # it refuses what others take
        finally:
            model.close()
    assert dropped >= FEW, FEW - dropped


@pytest.mark.parametrize(
    "name",
    ["Qwen-Qwen3-0.6B", "Qwen3.5-4B", "GLM-4.6", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"],
)
def test_reasoning_between_calls_of_tools_is_read_once(
    sources: dict[str, str],
    make_model: Callable[..., Model],
    says: Says,
    name: str,
) -> None:
    """Until a person speaks again these templates show what was thought before each call."""
    model = make_model(template=sources[name], context_length=60_000, num_blocks=8_000)
    marks = model.template.reasoning
    assert marks is not None
    call = model.template.tool_format.text_of([("get", '{"a": "x"}')])
    messages: list[Message] = [{"role": "user", "content": "One"}]
    known = 0
    for number in range(4):
        session = model.session_from(messages, tools=TOOLS)
        begun = Begun.of(marks, model.prompts.encode(session.path(), tools=TOOLS).ending)
        thought = f"Hmm: {number}.\n{marks.close}{marks.space}"
        text = thought if begun.is_inside else f"{marks.open}\n{thought}"
        text += call if number < 3 else "Done."
        reply = session.respond(None, params=says(text))
        assert (reply.reasoning, len(reply.tool_calls)) == (f"Hmm: {number}.", number < 3)
        assert reply.usage.reused_tokens >= known
        known = reply.usage.prompt_tokens + len(text)
        messages.append(
            {
                "role": "assistant",
                "content": reply.content or None,
                "reasoning_content": reply.reasoning,
                "tool_calls": [one.to_dict() for one in reply.tool_calls],
            }
        )
        messages += [
            {"role": "tool", "tool_call_id": one.id, "content": "42"} for one in reply.tool_calls
        ]
