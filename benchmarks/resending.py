"""
A client that keeps a conversation as text, and sends all of it with each question: vLLM used alone.

`TextSession` has what `traces` uses of a session, so that the same people and agents talk to both. What was
computed is the engine's own word, asked for before and after.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from random import Random
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

from recollect.conversation.model import Model
from recollect.text.tokenizer import Tokenizer
from recollect.types import SamplingParams
from traces import Trace, run_trace

_WAIT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Message:
    """Something said, as a client holds it."""

    role: str
    content: str


@dataclass(slots=True)
class TextClient:
    """Asks vLLM's `/v1/chat/completions`; takes the place of a model in `traces`."""

    urls: Sequence[str]
    """Of replicas, which are asked in turn."""
    tokenizer: Tokenizer
    """Of the model; only to find texts of some length."""
    context_length: int
    name: str
    """Of the model, as vLLM calls it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    asked: int = 0

    def session(self, system: str, *, params: SamplingParams) -> "TextSession":
        """Return a new conversation."""
        return TextSession(self, [Message("system", system)], params)

    def answer(self, messages: Sequence[Message], params: SamplingParams) -> str:
        """Ask, and return what was said."""
        url = self.urls[self.asked % len(self.urls)]
        self.asked += 1
        body = {
            "model": self.name,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "ignore_eos": params.ignore_eos,
            "seed": params.seed or 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = ""
        for event in _events(url, body):
            for choice in event.get("choices") or ():
                text += (choice.get("delta") or {}).get("content") or ""
            if usage := event.get("usage"):
                self.prompt_tokens += usage["prompt_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                self.cached_tokens += details.get("cached_tokens") or 0
        return text


@dataclass(slots=True)
class TextSession:
    """A conversation as a list of texts."""

    client: TextClient
    messages: list[Message]
    params: SamplingParams
    replies: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Keep nothing open."""

    def path(self) -> list[Message]:
        """Return the messages."""
        return list(self.messages)

    def respond(self, text: str) -> str:
        """Say something, and return the reply."""
        self.messages.append(Message("user", text))
        return self._answer()

    def regenerate(self) -> str:
        """Ask for the last reply again."""
        self.messages.pop()
        return self._answer()

    def edit(self, message: Message, text: str) -> str:
        """Say something else in the place of a message, and forget what followed."""
        place = next(n for n, one in enumerate(self.messages) if one is message)
        del self.messages[place:]
        return self.respond(text)

    def undo(self) -> None:
        """Take the last question and its reply back."""
        del self.messages[-2:]

    def fork(self) -> "TextSession":
        """Return a second conversation with the same beginning."""
        return TextSession(self.client, list(self.messages), self.params)

    def _answer(self) -> str:
        reply = self.client.answer(self.messages, self.params)
        self.messages.append(Message("assistant", reply))
        return reply


@dataclass(frozen=True, slots=True)
class Comparison:
    """One trace, held through recollect and by a client that resends text."""

    name: str
    requests: int
    front_prompt_tokens: int
    front_awaited_tokens: int
    """Of prompts, computed while somebody waited."""
    front_ahead_tokens: int
    """Of prompts, computed while nobody waited, and used."""
    front_unused_tokens: int
    """Computed while nobody waited, for a turn that did not come: what the engine counts beside those."""
    front_lost_tokens: int
    """Computed twice, beyond the one block of each request that is not whole."""
    alone_prompt_tokens: int
    alone_computed_tokens: int
    """All of them while somebody waited."""

    @property
    def front_computed_tokens(self) -> int:
        """Return how many tokens of prompts were computed, whenever that was."""
        return self.front_awaited_tokens + self.front_ahead_tokens


def compare(
    model: Model,
    client: TextClient,
    trace: Trace,
    params: SamplingParams,
    computed: Callable[[], int],
    *,
    seed: int = 0,
) -> Comparison:
    """
    Hold a trace both ways.

    Args:
        model: With an engine elsewhere; nothing else runs on it meanwhile.
        client: Of the same engine, under another salt.
        trace: What to run.
        params: Of all replies.
        computed: Returns how many tokens of prompts the engine has computed by now.
        seed: The same seed gives the same texts.
    """
    begun = computed()
    held = run_trace(model, trace, seed=seed, params=params)
    model.engine.abort(model.engine.tasks())
    middle, prompts = computed(), client.prompt_tokens
    dice = Random(f"{trace.name} {seed}")  # noqa: S311 - the texts of `run_trace`
    for _ in trace.run(cast(Model, client), dice, params):
        pass  # only what it costs counts
    unit = model.engine.info.reuse.unit
    return Comparison(
        name=trace.name,
        requests=held.requests,
        front_prompt_tokens=held.prompt_tokens,
        front_awaited_tokens=held.computed_tokens,
        front_ahead_tokens=held.read_ahead_tokens,
        front_unused_tokens=middle - begun - held.computed_tokens - held.read_ahead_tokens,
        front_lost_tokens=max(0, held.recomputed_tokens - held.requests * (unit - 1)),
        alone_prompt_tokens=client.prompt_tokens - prompts,
        alone_computed_tokens=computed() - middle,
    )


def _events(url: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=_WAIT_S)) as link:
        link.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = link.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
