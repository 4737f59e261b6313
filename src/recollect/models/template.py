"""
Renders a model's chat template the way its author tested it.

Templates are programs by strangers: they run in Jinja's sandbox. Does not know tokens, and does
not know which part of a conversation is new.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Never

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recollect.errors import TemplateError
from recollect.models.tool_text import CALL_START, spelled_out
from recollect.types import Message

# What an expression in a template can raise besides Jinja's own errors: `none + "x"`, `1 / 0`.
_FAILURES: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """
    A chat template, compiled once. Any thread may render it.

    A template that prints today's date gets the date on which this object was made, for as long
    as it lives: were it to change at midnight, every conversation would begin anew.

    Raises:
        TemplateError: There is no template, or it is not valid Jinja.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        now: datetime | None = None,
    ) -> None:
        if not source:
            raise TemplateError(
                "This model has no chat template, so it cannot hold a conversation: "
                "choose one that was tuned for chat (its name often says Instruct or Chat)."
            )
        self.source: Final = source
        self.knows_tools: Final = _knows_tools(source)
        """Whether it shows tools, and calls of them in the Hermes format, by itself."""
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # What the model lacks stays undefined and prints as nothing; None would print "None".
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        try:
            self._template = _environment(now or datetime.now().astimezone()).from_string(source)
        except (jinja2.TemplateError, RecursionError) as cause:
            raise TemplateError(
                f"The model's chat template is broken ({_words(cause)}): "
                "get a corrected version of the model."
            ) from cause

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
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except _FAILURES as cause:
            raise TemplateError(
                f"The model's chat template refuses this conversation: {_words(cause)}"
            ) from cause


class _Generation(Extension):
    """Accepts `{% generation %}` around a reply: a mark for training, without effect here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body in a scope of its own, as the tag's usual implementation has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _knows_tools(source: str) -> bool:
    """Return whether a template uses the variable `tools` and the marks of the Hermes format."""
    try:
        used = meta.find_undeclared_variables(
            _environment(datetime.now().astimezone()).parse(source)
        )
    except (jinja2.TemplateError, RecursionError):
        return False  # it is refused in a moment, with its words
    return "tools" in used and CALL_START in source


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as models were trained on it; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _words(cause: BaseException) -> str:
    return str(cause).strip().rstrip(".") or type(cause).__name__
