"""
A plugin for Simon Willison's `llm`: `llm -m recollect/smollm2`, with conversations, tools and schemas.

`llm` finds it by an entry point of this package, and gives it the whole conversation with each prompt, each
time in another process. What was said before is found by its text, and its KV is read from disk, so that
`llm -c` reads only what is new.
Source: https://llm.datasette.io/en/stable/plugins/advanced-model-plugins.html.
"""

import atexit
import json
import threading
from collections.abc import Iterator
from typing import Any, Final

import llm
from pydantic import Field

from recollect import config
from recollect.conversation.loading import load
from recollect.conversation.model import Model
from recollect.errors import InvalidParameterError, RecollectError
from recollect.models.catalog import DEFAULT_MODEL
from recollect.models.listing import installed
from recollect.text.reasoning import ReasoningDelta
from recollect.text.tool_calls import TextDelta
from recollect.types import Grammar, Message, SamplingParams

PREFIX: Final = "recollect/"
"""Before the names of models, so that they are not those of another plugin."""
_DEFAULT_MAX_TOKENS: Final = 2_048
"""Of a reply, where no option says otherwise: an end for a model that repeats itself."""

_models: Final[dict[str, Model]] = {}
_loading: Final = threading.Lock()


@llm.hookimpl
def register_models(register: Any) -> None:
    """Tell `llm` of the default model and of those that are installed."""
    names = [one.name for one in installed(config.home()) if one.is_installed]
    for name in dict.fromkeys([DEFAULT_MODEL, *names]):
        register(RecollectModel(name))


def loaded(name: str) -> Model:
    """
    Return a model, which is loaded with its first prompt and closed when the program ends.

    Raises:
        RecollectError: It cannot be loaded.
    """
    with _loading:
        if name not in _models:
            _models[name] = load(name)
            atexit.register(_models[name].close)  # writes the KV that is not on disk yet
        return _models[name]


class RecollectModel(llm.Model):
    """A model of recollect in `llm`."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    class Options(llm.Options):
        """How a reply is sampled; what is not said is as the model's makers recommend."""

        temperature: float | None = Field(default=None, ge=0, description="0: the likeliest token")
        top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling")
        top_k: int | None = Field(default=None, ge=0, description="0: all tokens")
        seed: int | None = Field(default=None, ge=0, description="For the same reply again")
        max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of a reply")

    def __init__(self, name: str) -> None:
        self.model_id = f"{PREFIX}{name}"
        self._name = name

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,  # noqa: ARG002 - pieces come in any case
        response: llm.Response,
        conversation: llm.Conversation | None,  # noqa: ARG002 - it is in the prompt
    ) -> Iterator[Any]:
        """Yield the pieces of a reply; `llm` has the whole conversation in `prompt.messages`."""
        try:
            yield from self._reply(prompt, response)
        except RecollectError as error:
            raise llm.ModelError(str(error)) from error

    def _reply(self, prompt: llm.Prompt, response: llm.Response) -> Iterator[Any]:
        model = loaded(self._name)
        session = model.session_from(
            [message for one in prompt.messages for message in messages_of(one)],
            tools=[_schema(tool) for tool in prompt.tools] or None,
        )
        told = {name: value for name, value in prompt.options if value is not None}
        grammar = None
        if prompt.schema is not None:
            assert isinstance(prompt.schema, dict), "a prompt makes a schema of a class"
            grammar = Grammar.json_schema(prompt.schema)
        params = SamplingParams(
            **{"max_tokens": _DEFAULT_MAX_TOKENS, **told}, grammar=grammar
        ).with_recommended(model.local.sampling, told)
        with session.stream(None, params=params) as reply:
            for event in reply.events():
                if isinstance(event, TextDelta):
                    yield event.text
                elif isinstance(event, ReasoningDelta):
                    yield llm.parts.StreamEvent(type="reasoning", chunk=event.text)
        whole = reply.reply
        if whole is None:
            return
        for call in whole.tool_calls:
            arguments = _arguments(call.arguments)
            if arguments is not None:
                made = llm.ToolCall(name=call.name, arguments=arguments, tool_call_id=call.id)
                response.add_tool_call(made)
        usage = whole.usage
        response.set_usage(
            input=usage.prompt_tokens,
            output=usage.generated_tokens,
            details={
                "reused_tokens": usage.reused_tokens,
                "computed_tokens": usage.computed_tokens,
            },
        )


def messages_of(message: Any) -> Iterator[Message]:
    """
    Yield the messages that one of `llm` is: each result of a tool is one by itself.

    Raises:
        InvalidParameterError: It has an attachment.
    """
    texts, thoughts, calls = list[str](), list[str](), list[Any]()
    for part in message.parts:
        match part:
            case llm.parts.TextPart():
                texts.append(part.text)
            case llm.parts.ReasoningPart():
                thoughts.append(part.text)
            case llm.parts.ToolCallPart():
                function = {"name": part.name, "arguments": json.dumps(part.arguments)}
                calls.append({"id": part.tool_call_id, "type": "function", "function": function})
            case llm.parts.ToolResultPart():
                yield {
                    "role": "tool",
                    "content": part.output,
                    "name": part.name,
                    "tool_call_id": part.tool_call_id or "",
                }
            case _:
                raise InvalidParameterError(
                    "Models of recollect read text alone: leave the attachment out.",
                    param="messages",
                )
    if not (texts or calls):
        return
    made: Message = {"role": message.role, "content": "".join(texts) or None}
    if message.role != "assistant":
        made["content"] = "".join(texts)
    if calls:
        made["tool_calls"] = calls
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    yield made


def _schema(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call; None of one that was cut, which is not to be made."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
