"""
Renders a model's chat template the way its author tested it.

Templates are programs by strangers: they run in Jinja's sandbox, in a process of their own, within
bounds. Does not know tokens, and does not know which part of a conversation is new.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from recollect.errors import TemplateError
from recollect.models import template_engine
from recollect.models.template_engine import COMPILED, FAILURES, REFUSED, TEXT, words
from recollect.models.template_process import PROCESSES, TemplateProcesses
from recollect.models.tool_text import CALL_START, spelled_out
from recollect.types import Message

MOST_SOURCE: Final = 1 << 20
"""Characters of a template. The longest of 70 real ones has 17,000."""


class ChatTemplate:
    """
    A chat template, compiled once. Any thread may render it.

    A template that prints today's date gets the date on which this object was made, for as long
    as it lives: were it to change at midnight, every conversation would begin anew.

    Args:
        is_own: Whether it is part of recollect: such a one is rendered in this process.
        processes: Render the others.

    Raises:
        TemplateError: There is no template, it is not valid Jinja, or it takes too much to read.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        now: datetime | None = None,
        is_own: bool = False,
        processes: TemplateProcesses = PROCESSES,
    ) -> None:
        if not source:
            raise TemplateError(
                "This model has no chat template, so it cannot hold a conversation: "
                "choose one that was tuned for chat (its name often says Instruct or Chat)."
            )
        if len(source) > MOST_SOURCE:
            raise TemplateError(
                f"The model's chat template has {len(source):,} characters, and {MOST_SOURCE:,} are "
                "read: get a corrected version of the model."
            )
        self.source: Final = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # What the model lacks stays undefined and prints as nothing; None would print "None".
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._now = now or datetime.now().astimezone()
        self._processes = processes
        # A date is part of what is compiled, so templates of two days are two.
        named = f"{template_engine.moment_fields(self._now)}{source}".encode(
            "utf-8", "surrogatepass"
        )
        self._name = hashlib.sha256(named).hexdigest()
        self._own = None
        try:
            if is_own:
                self._own = template_engine.compiled(source, self._now)
                uses_tools = template_engine.looks_at_tools(self._own, source)
            else:
                uses_tools = self._compile()
        except FAILURES as cause:
            raise _broken(words(cause)) from cause
        self.knows_tools: Final = uses_tools and CALL_START in source
        """Whether it shows tools, and calls of them in the Hermes format, by itself."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """
        Return the conversation as the text that the model was trained on.

        Args:
            messages: From the first on.
            add_generation_prompt: Whether the text ends with the opening of a reply.
            tools: Descriptions of tools, as JSON values. A template that does not know them gets
                them spelled out in the instructions, and their results as what the user says.

        Raises:
            TemplateError: The template refuses this conversation; the message gives its words.
        """
        if not self.knows_tools:
            messages, tools = spelled_out(messages, tools or ()), None
        variables = {
            "messages": [dict(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        try:
            if self._own is not None:
                return self._own.render(variables)
            request = {"template": self._name, "variables": variables}
            kind, text = self._processes.ask(request, self._introduction())
        except FAILURES as cause:  # of the template here; elsewhere the request is no JSON
            raise _refused(words(cause)) from cause
        if kind == REFUSED:
            raise _refused(text)
        assert kind == TEXT, "a rendering is a text, or refused"
        return text

    def _compile(self) -> bool:
        """Have the process compile the template; return whether it looks at tools."""
        kind, text = self._processes.ask(self._introduction())
        if kind == REFUSED:
            raise _broken(text)
        assert kind == COMPILED, "what was compiled is not rendered yet"
        return bool(text)

    def _introduction(self) -> dict[str, Any]:
        """Return what a process is told that does not know the template."""
        return {
            "template": self._name,
            "source": self.source,
            "now": template_engine.moment_fields(self._now),
        }


def _broken(why: str) -> TemplateError:
    return TemplateError(
        f"The model's chat template is broken ({why}): get a corrected version of the model."
    )


def _refused(why: str) -> TemplateError:
    return TemplateError(f"The model's chat template refuses this conversation: {why}")
