"""
Turn a conversation into token ids, with each reply as the ids that the model generated.

A template gives text. Rendered once with marks in place of the replies, that text falls into
segments; each is encoded by itself, and the replies' own ids are put between them. So a reply is
never decoded and encoded again. Knows no KV: what of the result is computed already is the
session's to find out.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from recollect.conversation.tree import Node
from recollect.models.template import ChatTemplate
from recollect.models.tokenizer import Tokenizer
from recollect.types import Message

ToolSchemas = Sequence[Mapping[str, Any]]

_ENCODED_SEGMENTS: Final = 4096
"""Segments whose encoding is remembered: two a turn, so thousands of turns in all sessions together."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as token ids."""

    token_ids: list[int]
    rewritten_reply: int | None = None
    """
    The first reply, counted from 0, that the template does not show as it was generated; None
    where it shows all of them. From there on the ids are those of the template's text.
    """
    reencoded_replies: int = 0
    """Replies that another model wrote: their text is encoded, since its ids mean nothing here."""
    generated_length: int = 0
    """Leading ids that a model has seen or generated before: up to the end of the last own reply."""


class PromptEncoder:
    """
    Encodes conversations with one template and one tokenizer.

    Safe from any thread; what it remembers is derived.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, *, fingerprint: str = ""
    ) -> None:
        self._fingerprint = fingerprint
        self._template = template
        self._tokenizer = tokenizer
        self._encode_text = lru_cache(_ENCODED_SEGMENTS)(self._encode_anew)
        # Texts that nobody writes and that templates which strip or split leave whole.
        self._reply_mark = f"reply{secrets.token_hex(12)}x"
        self._typed_mark = f"typed{secrets.token_hex(12)}x"

    def encode(
        self, path: Sequence[Node], said: str | None = None, tools: ToolSchemas = ()
    ) -> Prompt:
        """
        Return the ids of the messages and of the start of the reply to them.

        Args:
            path: Messages from the first on.
            said: A user's message after those, which is no node yet.
            tools: What the model may call, as the template expects it.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        new: list[Message] = [] if said is None else [{"role": "user", "content": said}]

        def render(messages: list[Message]) -> str:
            return self._template.render([*messages, *new], add_generation_prompt=True, tools=tools)

        return self._encode_path(path, render)

    def encode_typed(self, path: Sequence[Node], typed: str, tools: ToolSchemas = ()) -> Prompt:
        """
        Return the ids of the messages and of a user's message that is still being typed.

        They end where the text ends: what the template puts after it would have to be taken back.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        last: Message = {"role": "user", "content": self._typed_mark}

        def render(messages: list[Message]) -> str:
            text = self._template.render(
                [*messages, last], add_generation_prompt=False, tools=tools
            )
            return text.partition(self._typed_mark)[0] + typed

        return self._encode_path(path, render)

    def _encode_path(self, path: Sequence[Node], render: Callable[[list[Message]], str]) -> Prompt:
        messages = [node.written_message() for node in path]
        replies = [node for node in path if node.role == "assistant"]
        text = render(messages)
        segments = render([self._marked(message) for message in messages]).split(self._reply_mark)
        ids: list[int] = []
        end = 0  # of the text whose ids are in the list
        rewritten = None
        generated_length = 0
        for number, reply in enumerate(replies):
            segment = segments[number]
            shown = segment + reply.content
            # The last segment is followed by no reply; fewer segments mean that a reply was dropped.
            if number + 1 >= len(segments) or not text.startswith(shown, end):
                rewritten = number
                break
            ids += self._encode_text(segment)
            ids += self._reply_ids(reply)
            end += len(shown)
            if self._is_own(reply):
                generated_length = len(ids)
        return Prompt(
            token_ids=ids + list(self._encode_text(text[end:])),
            rewritten_reply=rewritten,
            reencoded_replies=sum(not self._is_own(reply) for reply in replies),
            generated_length=generated_length,
        )

    def _marked(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        return {"role": "assistant", "content": self._reply_mark}

    def _reply_ids(self, reply: Node) -> tuple[int, ...]:
        """Return the generated ids; for a reply that this model did not generate, its text's."""
        if reply.token_ids is None or not self._is_own(reply):
            return self._encode_text(reply.content)
        return reply.token_ids

    def _is_own(self, reply: Node) -> bool:
        return reply.token_ids is not None and reply.fingerprint == self._fingerprint

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))
