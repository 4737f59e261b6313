"""Real chat templates: those that llama.cpp keeps, from its Python package's source."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from recollect.conversation.model import Model
from recollect.engine.reply import IdleWork
from recollect.errors import TemplateError
from recollect.text.template import ChatTemplate
from recollect.types import Grammar, Message, SamplingParams

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

pytestmark = [pytest.mark.model, pytest.mark.slow]


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four turns of a client that trims replies; of each turn what was not reused is counted."""
    monkeypatch.setattr(IdleWork, "start", lambda _, sequence: sequence.release())
    rewrote, whole = set[str](), set[str]()
    for name, source in sources.items():
        model = make_model(template=source, context_length=60_000, num_blocks=8_000)
        messages: list[Message] = [{"role": "user", "content": "One"}]
        known = 0
        try:
            for number in range(4):
                params = SamplingParams(max_tokens=40, grammar=Grammar.regex("Well, you\\.\n"))
                reply = model.session_from(messages).respond(None, params=params)
                lost = known - reply.usage.reused_tokens
                if lost:
                    rewrote.add(name)
                    assert (name, reply.usage.reason) == (name, "template_rewrote")
                    assert lost <= reply.usage.computed_tokens
                else:
                    assert (name, reply.usage.reason) == (name, "new")
                ids = reply.node.token_ids
                assert ids is not None
                known = reply.usage.prompt_tokens + len(ids) - 1
                messages += [
                    {"role": "assistant", "content": reply.text.strip()},
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
