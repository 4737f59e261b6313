"""
`/api/…`: the API of Ollama, for clients that know no other.

First the bodies and what they mean to the engine, then the calls and how replies are written: as lines
of JSON. A conversation is found again as in chat completions. `/api/generate` gives the tokens of a
conversation back as `context`, and goes on from exactly these.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from recollect import types
from recollect.conversation.model import Model
from recollect.conversation.prompt import shown
from recollect.conversation.turn import watch_of
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import ContextFullError, UnknownModelError
from recollect.server.events import Call, Ended, Piece, Progress, Thought, Told, call_input
from recollect.server.fields import (
    MOST_CALLS,
    MOST_TOOLS,
    Body,
    BodyRoute,
    Echoed,
    Ignored,
    Instructing,
    Items,
    LogprobCount,
    Text,
    check_count,
    named_sampling,
    sampled,
)
from recollect.server.parts import FunctionTool, Offer, Thinking, logprob_entry, offer
from recollect.server.refusals import ApiError
from recollect.server.services import Job, Services, begin, client_of, services_of, with_model
from recollect.server.settings import Settings
from recollect.text.reasoning import Begun
from recollect.text.tool_calls import ArgumentsDelta, CallEnded, CallStarted
from recollect.types import Grammar, Message, MessageToolCall, Role, SamplingParams, TokenLogprob

_LATEST: Final = ":latest"
"""The tag of a model's name that clients add where there is none."""
_NANOSECONDS: Final = 10**9
_IMAGES: Final = "these models read text alone; leave it out."


class OllamaOptions(Body):
    """How a reply is sampled, in Ollama's words."""

    refused: ClassVar = dict.fromkeys(
        ("mirostat", "tfs_z", "typical_p"), "would change the reply, and cannot be done."
    )

    num_predict: int | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: str | Items[str] | None = None

    repeat_last_n: Ignored = None
    num_ctx: Ignored = None
    num_keep: Ignored = None
    num_batch: Ignored = None
    num_gpu: Ignored = None
    num_thread: Ignored = None
    main_gpu: Ignored = None
    low_vram: Ignored = None
    f16_kv: Ignored = None
    numa: Ignored = None
    use_mmap: Ignored = None
    use_mlock: Ignored = None
    mirostat_tau: Ignored = None
    mirostat_eta: Ignored = None
    penalize_newline: Ignored = None

    @property
    def repetition_penalty(self) -> float | None:
        """Return the penalty by the engine's name."""
        return self.repeat_penalty


class ReplyRequest(Body):
    """What the bodies of `/api/chat` and `/api/generate` have in common."""

    model: str
    stream: bool | None = None
    """None: the reply is streamed, as Ollama does."""
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = False
    top_logprobs: LogprobCount | None = None
    keep_alive: Ignored = None
    truncate: Ignored = None
    shift: Ignored = None

    @property
    def streams(self) -> bool:
        """Return whether the reply is sent as it is generated."""
        return self.stream is not False

    @property
    def thinking(self) -> dict[str, Any]:
        """Return what the template is told of thinking."""
        if self.think is None:
            return {}
        effort = self.think if isinstance(self.think, str) else None
        return Thinking(enabled=bool(self.think), effort=effort).options()

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        if not self.format:
            return None
        if isinstance(self.format, str):
            return Grammar.json_object()
        return Grammar.json_schema({**self.format, "x-guidance": {"lenient": True}})

    def prepare(self) -> None:
        """Work out `grammar`."""
        _ = self.grammar

    def sampling(self, model: Model, settings: Settings) -> SamplingParams:
        """Return how the reply is sampled, as the model's makers recommend where nobody says."""
        how = self.options or OllamaOptions()
        most = how.num_predict if how.num_predict and how.num_predict > 0 else None
        params = sampled(
            settings,
            temperature=how.temperature,
            seed=how.seed,
            stop=how.stop,
            top_k=how.top_k,
            top_p=how.top_p or None,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
            presence_penalty=how.presence_penalty,
            frequency_penalty=how.frequency_penalty,
            max_tokens=most or settings.max_tokens,
            grammar=self.grammar,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        return params.with_recommended(model.local.sampling, named_sampling(how, settings))


class OllamaFunction(Body):
    """A function, and what it is called with."""

    name: str
    arguments: dict[str, Any]
    index: Echoed = None


class OllamaCall(Body):
    """A call of a tool; nothing says which result is its own but the order."""

    function: OllamaFunction
    id: str | None = None
    type: Echoed = None


class OllamaMessage(Instructing):
    """A message."""

    refused: ClassVar = {"images": _IMAGES}

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: str | None = None
    tool_calls: Annotated[Items[OllamaCall], Field(max_length=MOST_CALLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChat(ReplyRequest):
    """The body of `POST /api/chat`."""

    messages: Items[OllamaMessage] | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None

    @cached_property
    def conversation(self) -> list[Message]:
        """Return the messages as the engine has them, calls and results with ids by their order."""
        said: list[Message] = []
        pending: list[str] = []  # ids of calls that have no result yet
        calls = 0
        for one in self.messages or ():
            if one.is_left_out:
                continue
            role: Role = one.role
            message: Message = {"role": role, "content": one.content or ""}
            if role == "assistant" and one.tool_calls:
                told = [_call(call, calls + number) for number, call in enumerate(one.tool_calls)]
                calls += len(told)
                pending = [call["id"] for call in told]
                message["tool_calls"], message["content"] = told, one.content or None
            if role == "assistant" and one.thinking:
                message["reasoning_content"] = one.thinking
            if role == "tool":
                own = pending.pop(0) if pending else None
                if (call_id := one.tool_call_id or own) is not None:
                    message["tool_call_id"] = call_id
                if one.tool_name is not None:
                    message["name"] = one.tool_name
            said.append(message)
        return said

    @property
    def offered(self) -> Offer:
        """Return what the reply may call."""
        return offer([tool.schema_of() for tool in self.tools or ()], None, None, self.thinking)


def _call(call: OllamaCall, number: int) -> MessageToolCall:
    # Nine letters and digits: some templates take no other.
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    name = call.function.name
    return types.ToolCall(call.id or f"call{number:05d}", name, arguments).to_dict()


class OllamaPrompt(ReplyRequest):
    """The body of `POST /api/generate`."""

    refused: ClassVar = {
        "images": _IMAGES,
        "suffix": "these models do not fill in; leave it out.",
        "template": "the model's own chat template counts; leave it out, or say raw.",
    }

    prompt: str = ""
    system: str | None = None
    context: Items[Annotated[int, Field(ge=0)]] | None = None
    raw: bool | None = False

    def check(self) -> None:
        """
        Check what goes together, as Ollama does.

        Raises:
            ApiError: A prompt without the template has what the template would show.
        """
        name = "system" if self.system else "context" if self.context else None
        if self.raw and name is not None:
            raise ApiError(
                f"{name}: a raw prompt is all that the model reads; leave it out, or raw.",
                param=name,
            )

    def token_ids(self, model: Model, namespace: str) -> tuple[list[int], Begun]:
        """
        Return the prompt, and how reasoning stands where the reply begins.

        Raises:
            ContextFullError: It leaves no place for a reply.
            TemplateError: The template refuses it.
        """
        marks, ending = model.template.reasoning, ""
        said = [Message(role="user", content=self.prompt)]
        if self.system:
            said.insert(0, Message(role="system", content=self.system))
        if self.raw:
            ids = model.tokenizer.encode(self.prompt)
        elif self.context:
            encoder = model.prompts.with_options(self.thinking)
            before = [
                Message(role="user", content="?"),
                Message(role="assistant", content=encoder.mark(0)),
            ]
            after = [*before, *said]
            whole, _ = shown(encoder.asking, after, (), encoder.control)
            start = whole.text.index(encoder.mark(0)) + len(encoder.mark(0))
            ids, ending = [*self.context, *encoder.ids(whole.part(start))], whole.text[-200:]
        else:
            path = model.session_from(said, namespace=namespace).path()
            prompt = model.prompts.with_options(self.thinking).encode(path)
            ids, ending = prompt.token_ids, prompt.ending
        if len(ids) >= model.context_length:
            raise ContextFullError(needed=len(ids) + 1, limit=model.context_length)
        return ids, Begun.of(marks, ending)


router = APIRouter(tags=["Ollama"], route_class=BodyRoute)


@router.post("/api/chat")
async def chat(body: OllamaChat, request: Request) -> Response:
    """Answer the last message of a conversation."""
    services, client = services_of(request), client_of(request)
    name = named(services, body.model)
    check_count("messages", len(body.messages or ()), services.settings.limits.messages)
    if not body.conversation:
        return await _loaded(request, name, {"message": {"role": "assistant", "content": ""}})

    def prepare(model: Model) -> Sequence[ReplyGeneration]:
        session = model.session_from(body.conversation, namespace=client.namespace, **body.offered)
        return [session.stream(None, params=body.sampling(model, services.settings))]

    job = await begin(request, name, prepare)
    return await job.answer(request, _Lines(job, body.model, client.since_s), stream=body.streams)


@router.post("/api/generate")
async def generate(body: OllamaPrompt, request: Request) -> Response:
    """Answer a prompt, after the tokens of an earlier answer where there are some."""
    services, client = services_of(request), client_of(request)
    namespace, name = client.namespace, named(services, body.model)
    body.check()
    if not body.prompt:
        return await _loaded(request, name, {"response": ""})
    context: list[int] = []

    def prepare(model: Model) -> Sequence[ReplyGeneration]:
        ids, begun = body.token_ids(model, namespace)
        params = body.sampling(model, services.settings)
        sequence = model.engine.new_sequence(namespace)
        try:
            sequence.append(ids)
            generator = Generator(
                model.engine,
                params,
                sequence=sequence,
                grammars=model.grammars,
                reasoning=watch_of(model.tokenizer, begun, params),
            )
        except BaseException:
            sequence.release()
            raise
        stream = _Prompted(
            model.engine, generator, model.tokenizer, begun=begun, prompt=ids, context=context
        )
        stream.start()
        return [stream]

    job = await begin(request, name, prepare)
    writer = _PromptLines(job, body.model, client.since_s, context)
    return await job.answer(request, writer, stream=body.streams)


class _Prompted(ReplyGeneration):
    """The reply to a prompt, whose tokens are given back with those of the prompt."""

    def __init__(self, *given: Any, prompt: list[int], context: list[int], **more: Any) -> None:
        super().__init__(*given, **more)
        self._prompt, self._context = prompt, context

    def release(self) -> None:
        """Note the tokens, and give the blocks back."""
        self._context[:] = [*self._prompt, *self.token_ids]
        super().release()


def named(services: Services, name: str) -> str:
    """
    Return the name of a model without the tag that clients add.

    Raises:
        UnknownModelError: There is none of that name.
    """
    try:
        services.hub.resolve(name)
    except UnknownModelError:
        plain = name.removesuffix(_LATEST)
        services.hub.resolve(plain)
        return plain
    return name


async def _loaded(request: Request, name: str, answer: Mapping[str, Any]) -> Response:
    """Load a model, for a request that says nothing else."""
    await with_model(request, name, lambda _: None)
    told = {"model": name, "created_at": _now(), **answer, "done": True, "done_reason": "load"}
    return Response(f"{json.dumps(told)}\n", media_type="application/x-ndjson")


def moment(seconds: float) -> str:
    """Return seconds since 1970 as Ollama writes a time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _now() -> str:
    return moment(time.time())


class _Lines:
    """The reply to one request in Ollama's words, as lines of JSON; a `Writer`."""

    media_type: ClassVar = "application/x-ndjson"

    def __init__(self, job: Job, model_name: str, since_s: float) -> None:
        """
        Have told nothing.

        Args:
            job: Generates the reply.
            model_name: As the client says it.
            since_s: When the request came, by `time.perf_counter`.
        """
        self._job = job
        self._model_name = model_name
        self._since_s = since_s
        self._calls: dict[int, tuple[CallStarted, list[str]]] = {}
        self._told_calls: set[int] = set()

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return the reply at once."""
        (reply,) = replies
        calls = [_told_call(number, call) for number, call in enumerate(reply.tool_calls)]
        said = self._said(reply.content, reply.reasoning, calls)
        likely = {} if reply.logprobs is None else _likely(reply.logprobs)
        return {**self._head(), **said, **likely, **self._last(reply)}

    def begin(self) -> str:
        """Return nothing: each line says all."""
        return ""

    def waiting(self, _progress: Progress) -> str:
        """Return a line that says nothing new: a proxy sees that work goes on."""
        return self._line({**self._said(""), "done": False})

    def write(self, event: Told) -> str:
        """Return the line of an event."""
        match event:
            case Piece():
                said = self._said(event.text) | _likely(event.logprobs)
            case Thought():
                said = self._said("", event.text) | _likely(event.logprobs)
            case Call():
                return self._call(event)
            case Ended():
                return self._end(event.reply)
        return self._line({**said, "done": False})

    def fail(self, error: ApiError) -> str:
        """Return an error as Ollama's clients expect it."""
        return self._line({"error": error.message})

    def end(self) -> str:
        """Return nothing: the last line has said that it is the last."""
        return ""

    def _call(self, call: Call) -> str:
        match call.event:
            case CallStarted():
                self._calls[call.event.index] = (call.event, [])
            case ArgumentsDelta(index, text):
                self._calls[index][1].append(text)
            case CallEnded(index):
                started, pieces = self._calls[index]
                self._told_calls.add(index)
                whole = types.ToolCall(started.id, started.name, "".join(pieces))
                return self._line({**self._said("", "", [_told_call(index, whole)]), "done": False})
        return ""

    def _end(self, reply: GeneratedReply) -> str:
        left = [
            _told_call(number, call)
            for number, call in enumerate(reply.tool_calls)
            if number not in self._told_calls
        ]
        return self._line({**self._said("", "", left), **self._last(reply)})

    def _said(
        self, text: str, thought: str = "", calls: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought:
            message["thinking"] = thought
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}

    def _last(self, reply: GeneratedReply) -> dict[str, Any]:
        usage = reply.usage
        decode_s = (usage.generated_tokens - 1) / usage.decode_tps if usage.decode_tps else 0.0
        return {
            "done": True,
            "done_reason": "length" if reply.finish_reason == "length" else "stop",
            "total_duration": round((time.perf_counter() - self._since_s) * _NANOSECONDS),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(usage.ttft_s * _NANOSECONDS),
            "eval_count": usage.generated_tokens,
            "eval_duration": round(decode_s * _NANOSECONDS),
            "recollect": self._job.cost([reply]).own(),
        }

    def _head(self) -> dict[str, Any]:
        return {"model": self._model_name, "created_at": _now()}

    def _line(self, told: Mapping[str, Any]) -> str:
        return json.dumps({**self._head(), **told}, separators=(",", ":")) + "\n"


class _PromptLines(_Lines):
    """The reply to a prompt, with the tokens of both at its end."""

    def __init__(self, job: Job, model_name: str, since_s: float, context: list[int]) -> None:
        super().__init__(job, model_name, since_s)
        self._context = context

    def _said(
        self, text: str, thought: str = "", _calls: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        return {"response": text, **({"thinking": thought} if thought else {})}

    def _last(self, reply: GeneratedReply) -> dict[str, Any]:
        return {**super()._last(reply), "context": self._context}


def _told_call(number: int, call: types.ToolCall) -> dict[str, Any]:
    function = {"index": number, "name": call.name, "arguments": call_input(call)}
    return {"id": call.id, "function": function}


def _likely(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return how likely tokens were; nothing where nobody asked."""
    return {"logprobs": [logprob_entry(token) for token in tokens]} if tokens else {}
