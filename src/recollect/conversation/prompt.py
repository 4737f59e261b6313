"""
Turn a conversation into token ids, with each reply as the ids that the model generated.

A template gives text. Rendered once with marks in place of the replies, that text falls into
segments; each is encoded by itself, and the replies' own ids are put between them. So a reply is
never decoded and encoded again. Control tokens are those of the template alone: in what is said
their texts are text. Knows no KV: what of the result is computed already is the session's to find
out.
"""

import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from recollect.conversation.guarding import Guard, Render, Shown, ToolSchemas, said_alone, shown
from recollect.conversation.tree import Node
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Tokenizer
from recollect.types import Message

MOST_REMEMBERED_BYTES: Final = 32 << 20
"""
Of segments whose ids are remembered, for all sessions of a model together.

Four bytes a token, so 8 million tokens: thousands of turns, or 270 prompts of 30,000. What is
forgotten is encoded again, at 15 million characters in a second. Source: smollm2 on two cores.
"""

_ENTRY_BYTES: Final = 250
"""What one segment takes beside its ids: its name, the array's head and its place in the table.
Source: `sys.getsizeof` of these in CPython 3.12, rounded up."""


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


class RememberedIds:
    """
    The ids of segments that were encoded before. Safe from any thread.

    Invariant: `held_bytes` is the sum over all segments, and at most `most_bytes`.
    """

    def __init__(self, most_bytes: int = MOST_REMEMBERED_BYTES) -> None:
        self.most_bytes: Final = most_bytes
        self.held_bytes = 0
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many segments are remembered."""
        return len(self._ids)

    def get(self, name: bytes) -> list[int] | None:
        """Return the ids of a segment; None where they are not known."""
        with self._lock:
            ids = self._ids.get(name)
            if ids is None:
                return None
            self._ids.move_to_end(name)
        return ids.tolist()

    def put(self, name: bytes, token_ids: Sequence[int]) -> None:
        """Remember the ids of a segment, and forget those that were used longest ago."""
        ids = array("i", token_ids)
        if _size(ids) > self.most_bytes:
            return
        with self._lock:
            if name in self._ids:
                return
            self._ids[name] = ids
            self.held_bytes += _size(ids)
            while self.held_bytes > self.most_bytes:
                self.held_bytes -= _size(self._ids.popitem(last=False)[1])

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        with self._lock:
            held = sum(map(_size, self._ids.values()))
            assert held == self.held_bytes <= self.most_bytes, "bytes are not counted right"


def _size(ids: "array[int]") -> int:
    return ids.itemsize * len(ids) + _ENTRY_BYTES


class PromptEncoder:
    """
    Encodes conversations with one template and one tokenizer.

    Safe from any thread; what it remembers is derived, and bounded.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, *, fingerprint: str = ""
    ) -> None:
        self._fingerprint = fingerprint
        self._template = template
        self._tokenizer = tokenizer
        self.remembered: Final = RememberedIds()
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
        messages = [node.written_message() for node in path]
        if said is not None:
            messages.append({"role": "user", "content": said})

        def render(messages: list[Message], tools: ToolSchemas) -> str:
            return self._template.render(messages, add_generation_prompt=True, tools=tools)

        return self._encode_path(path, messages, tools, render)

    def encode_typed(self, path: Sequence[Node], typed: str, tools: ToolSchemas = ()) -> Prompt:
        """
        Return the ids of the messages and of a user's message that is still being typed.

        They end where the text ends: what the template puts after it would have to be taken back.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        last: Message = {"role": "user", "content": self._typed_mark}

        def render(messages: list[Message], tools: ToolSchemas) -> str:
            text = self._template.render(
                [*messages, last], add_generation_prompt=False, tools=tools
            )
            return text.partition(self._typed_mark)[0]

        messages = [node.written_message() for node in path]
        return self._encode_path(path, messages, tools, render, typed)

    def _encode_path(
        self,
        path: Sequence[Node],
        messages: list[Message],
        tools: ToolSchemas,
        render: Render,
        typed: str = "",
    ) -> Prompt:
        replies = [node for node in path if node.role == "assistant"]
        control = self._tokenizer.control_tokens
        whole, guard = shown(render, messages, tools, control)
        if typed:
            whole = whole.followed_by_said(typed, control)
        segments = self._segments(render, messages, tools, guard)
        ids: list[int] = []
        end = 0  # of the text whose ids are in the list
        rewritten = None
        generated_length = 0
        for number, reply in enumerate(replies):
            middle = end + len(segments[number])
            # The last segment is followed by no reply; fewer segments mean that a reply was dropped.
            if number + 1 >= len(segments) or not (
                whole.text.startswith(segments[number], end)
                and whole.says(reply.content, middle, control)
            ):
                rewritten = number
                break
            ids += self._ids(whole.part(end, middle))
            ids += self._reply_ids(reply)
            end = middle + len(reply.content)
            if self._is_own(reply):
                generated_length = len(ids)
        return Prompt(
            token_ids=ids + self._ids(whole.part(end)),
            rewritten_reply=rewritten,
            reencoded_replies=sum(not self._is_own(reply) for reply in replies),
            generated_length=generated_length,
        )

    def _segments(
        self, render: Render, messages: list[Message], tools: ToolSchemas, guard: Guard | None
    ) -> list[str]:
        """Return what the template shows before, between and after the replies."""
        if guard is not None:
            messages, tools = guard.messages(messages), guard.tools(tools)
        text = render([self._marked(message) for message in messages], tools)
        return (text if guard is None else guard.read(text).text).split(self._reply_mark)

    def _marked(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        return {"role": "assistant", "content": self._reply_mark}

    def _reply_ids(self, reply: Node) -> Sequence[int]:
        """Return the generated ids; for a reply that this model did not generate, its text's."""
        if reply.token_ids is None or not self._is_own(reply):
            return self._ids(said_alone(reply.content, self._tokenizer.control_tokens))
        return reply.token_ids

    def _is_own(self, reply: Node) -> bool:
        return reply.token_ids is not None and reply.fingerprint == self._fingerprint

    def _ids(self, part: Shown) -> list[int]:
        """Return the ids of a part of what is shown, from memory where they are there."""
        name = part.name()
        ids = self.remembered.get(name)
        if ids is None:
            ids = self._encoded(part)
            self.remembered.put(name, ids)
        return ids

    def _encoded(self, part: Shown) -> list[int]:
        """
        Return the ids of a part, control tokens only where the template wrote them.

        Between two of those the text is encoded in one piece, as it always is. So all but the
        pieces in which a control token was said have the ids that the whole text would have.
        """
        encode, find = self._tokenizer.encode, self._tokenizer.control_tokens.find
        text, ids = part.text, []
        done = piece = start = 0  # `[done, piece)` is encoded as always, once `[piece, …)` is not
        is_plain = False
        while part.breaks and (span := find(text, start)) is not None:
            begin, end = span
            if part.has_break(begin, end):
                is_plain, start = True, begin + 1
                continue
            if is_plain:
                ids += encode(text[done:piece]) + self._tokenizer.encode_text(text[piece:begin])
                done, is_plain = begin, False
            piece = start = end
        if is_plain:
            return ids + encode(text[done:piece]) + self._tokenizer.encode_text(text[piece:])
        return ids + encode(text[done:])
