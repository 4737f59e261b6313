"""
The tools that a session offers, and the grammar that holds replies to them.

Pure: descriptions in, a grammar out. No tool is called here.
"""

import json
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final, Self

from recollect.conversation.tool_grammar import CallGrammar, texts_of
from recollect.engine.grammar import JSON_STYLE, check_schema
from recollect.errors import InvalidParameterError
from recollect.text.tokenizer import ControlTokens
from recollect.text.tool_calls import CallRules
from recollect.text.tool_formats import HERMES, ToolFormat
from recollect.types import Grammar

_log = logging.getLogger(__name__)

MOST_NAME_CHARACTERS: Final = 128
"""Of a tool: what OpenAI and Anthropic take."""
_NAME: Final = re.compile(rf"[A-Za-z0-9_.-]{{1,{MOST_NAME_CHARACTERS}}}")
_MODES: Final = ("none", "auto", "required")

_LINE: Final = re.compile(r"at (\d+)\(\d+\)")
"""Where llguidance says that a Lark grammar is wrong: the line, from 1, and the column."""
_SOURCE_LINES: Final = re.compile(r"\s\d+ \| .*")
"""What llguidance adds to a reason: lines of a grammar that nobody sent."""
_NO_CONTROL: Final = ControlTokens({})
_ARGUMENTS: Final = re.compile(r"(?:bare_)?arguments_(\d+)(?:_\w+)?:")
"""The beginning of the rule for a tool's arguments, with the index of the tool."""

_MOST_TRIED: Final = 4
"""Tools whose schemas cannot be held to and that are found one by one: each try makes the grammar anew."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tools that may be called, by their names, whatever those are; not the name of a mode."""

    names: tuple[str, ...]
    is_required: bool = True
    """Whether the reply has to call one of them."""
    is_single: bool = True
    """Whether it calls once at most."""


ToolChoice = str | Mapping[str, Any] | Chosen
"""`none`, `auto`, `required`, or the name of a tool; or that name as OpenAI's API has it, also where it
is the name of a mode: `{"type": "function", "function": {"name": "auto"}}`."""


@dataclass(frozen=True, slots=True)
class Tools:
    """
    The tools that a reply may call, and whether it has to call one.

    Made by `Tools.of`. The prompt depends on the schemas and not on the choice.
    """

    schemas: tuple[Mapping[str, Any], ...] = ()
    """As in OpenAI's API: `{"type": "function", "function": {"name": …, "parameters": …}}`."""
    choice: str | Chosen = "auto"
    """`none`, `auto` (text, calls, or both), `required`, or what is called: a name, or several."""
    parallel: bool = True
    """Whether one reply may have several calls."""
    unheld: frozenset[str] = frozenset()
    """Names of tools whose calls have any JSON object as arguments: their schemas cannot be held to."""

    @classmethod
    def of(
        cls,
        schemas: Sequence[Mapping[str, Any]] | None,
        choice: ToolChoice = "auto",
        *,
        parallel: bool = True,
    ) -> Self:
        """
        Return the tools of these descriptions, after checking them.

        Raises:
            InvalidParameterError: A description is no JSON or has no name that can be one, its
                parameters are no object, two have the same name, or the choice is none.
        """
        chosen = _chosen(choice)
        tools = cls(tuple(map(_copied, schemas or ())), chosen, parallel)
        names = [_name(schema) for schema in tools.schemas]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise InvalidParameterError(
                f"Two tools have the name {twice!r}: give each a name of its own.", param="tools"
            )
        parameters = [schema["function"].get("parameters") for schema in tools.schemas]
        too_large = [
            name
            for name, schema in zip(names, parameters, strict=True)
            if not _is_small_enough(name, schema)
        ]
        if isinstance(chosen, Chosen):
            wrong = [name for name in chosen.names if name not in names]
        else:
            wrong = [chosen] if chosen not in (_MODES if names else _MODES[:2]) else []
            wrong = [name for name in wrong if name not in names]
        if wrong:
            known = [*_MODES, *names] if names else _MODES[:2]
            raise InvalidParameterError(
                f"tool_choice is {wrong[0]!r}; it must be one of {', '.join(known)}.",
                param="tool_choice",
            )
        return replace(tools, unheld=frozenset(too_large)) if too_large else tools

    def grammar(
        self,
        answer: Grammar | None = None,
        format_: ToolFormat = HERMES,
        control: ControlTokens = _NO_CONTROL,
        budget: int | None = None,
    ) -> Grammar | None:
        """
        Return the grammar of replies; None: replies are free.

        A call has to follow the schema of its tool, and a reply cannot end inside a call.

        Args:
            answer: The grammar of replies without calls; None: those are free text.
            format_: How the model writes calls.
            control: The model's control tokens, of which marks of calls may be some.
            budget: Most tokens of reasoning; None: as many as the model wants.

        Raises:
            InvalidParameterError: *answer* is a Lark grammar, which cannot be joined with others.
        """
        if not self.schemas:
            return answer
        mode, schemas = self._mode(), self._callable()
        one_only = not self.parallel or self._is_single()
        calls = CallGrammar(
            format_,
            schemas or self.schemas,
            self.unheld,
            control,
            one_only=one_only,
            budget=budget,
        )
        if mode == "none" or not schemas:
            return answer or Grammar.lark(calls.none())
        if mode == "auto":
            return Grammar.lark(calls.auto() if answer is None else calls.required(_answer(answer)))
        return Grammar.lark(calls.required())

    def rules(self, answer: Grammar | None = None, format_: ToolFormat = HERMES) -> CallRules:
        """Return what the calls look like that `grammar` allows."""
        mode = self._mode()
        is_free = (mode == "auto" and answer is None) or (format_.is_bare and mode != "none")
        names = tuple(_name(schema) for schema in self._callable()) if is_free else ()
        return CallRules(format_, names, texts_of(self.schemas))

    def loosened(self, error: InvalidParameterError, grammar: Grammar) -> Self:
        """
        Return the same tools, of which one more is not held to its schema, or none is.

        Args:
            error: What was wrong with the grammar.
            grammar: As `grammar` returned it.

        Raises:
            InvalidParameterError: It is not about one of the tools; the same error, in other words.
        """
        reason = str(error)
        why = _SOURCE_LINES.sub("", reason[reason.find("(") + 1 : reason.rfind(")")])
        at = _LINE.match(why)
        line = grammar.source.splitlines()[int(at[1]) - 1] if at else ""
        why = why.partition("schema: ")[2] or why
        if line.startswith("answer:"):
            raise InvalidParameterError(
                f"The JSON schema of the reply cannot be held to ({why}): correct it.",
                param="grammar",
            ) from error
        rule = _ARGUMENTS.match(line)
        held = {_name(one) for one in self.schemas} - self.unheld
        name = None if rule is None else _name(self._callable()[int(rule[1])])
        if name not in held:
            raise InvalidParameterError(
                f"The tools cannot be held to their schemas ({why}): offer fewer, or simpler ones.",
                param="tools",
            ) from error
        is_one_more = len(self.unheld) < _MOST_TRIED
        _log.warning(
            "Calls of %s are not held to a schema, which cannot be followed",
            f"the tool {name!r}" if is_one_more else "all tools",
        )
        return replace(self, unheld=self.unheld | ({name} if is_one_more else held))

    def _mode(self) -> str:
        if isinstance(self.choice, Chosen):
            return "required" if self.choice.is_required else "auto"
        return self.choice if self.choice in _MODES else "required"

    def _is_single(self) -> bool:
        if isinstance(self.choice, Chosen):
            return self.choice.is_single
        return self.choice not in _MODES

    def _callable(self) -> list[Mapping[str, Any]]:
        """Return the descriptions of the tools that may be called."""
        if isinstance(self.choice, Chosen):
            return [one for one in self.schemas if _name(one) in self.choice.names]
        return [one for one in self.schemas if self.choice in (*_MODES, _name(one))]

    def difference(self, earlier: "Tools") -> str | None:
        """Return in words how these differ from earlier tools; None: the schemas are the same."""
        if self.schemas == earlier.schemas:
            return None
        now = {_name(schema): schema for schema in self.schemas}
        was = {_name(schema): schema for schema in earlier.schemas}
        both = [name for name in now if name in was]
        kinds = {
            "added": [name for name in now if name not in was],
            "removed": [name for name in was if name not in now],
            "changed": [name for name in both if now[name] != was[name]],
        }
        words = [f"{kind} {_few(names)}" for kind, names in kinds.items() if names]
        return f"Tools: {'; '.join(words) or 'in another order'}."


NO_TOOLS: Final = Tools()


MOST_TOOL_BYTES: Final = 8 << 20
"""Of descriptions that are kept, for a whole model: 800 sets of twenty tools of 500 bytes."""


class KnownTools:
    """
    Sets of tools by a short name: clients send the same descriptions with every request.

    Owned by `matching.KnownMessages`, under whose lock it is used.

    Invariant: `held_bytes` is the sum over all sets, and at most `MOST_TOOL_BYTES`.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._sets: OrderedDict[bytes, bytes] = OrderedDict()

    def note(self, tools: Tools) -> bytes:
        """Return the name of a set, which is known from now on unless it is larger than the bound."""
        if not tools.schemas:
            return b""
        text = json.dumps(tools.schemas).encode()
        name = blake2b(text, digest_size=16).digest()
        if name not in self._sets and len(text) <= MOST_TOOL_BYTES:
            self._sets[name] = text
            self.held_bytes += len(text)
        if name in self._sets:
            self._sets.move_to_end(name)
        while self.held_bytes > MOST_TOOL_BYTES:
            self.held_bytes -= len(self._sets.popitem(last=False)[1])
        return name

    def get(self, name: bytes) -> Tools | None:
        """Return a set; None where it was forgotten."""
        if not name:
            return NO_TOOLS
        text = self._sets.get(name)
        return None if text is None else Tools(tuple(json.loads(text)))

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        held = sum(map(len, self._sets.values()))
        assert held == self.held_bytes <= MOST_TOOL_BYTES, "bytes are not counted right"


_MOST_NAMED: Final = 8
"""Names in a difference, which is told in a header: clients refuse headers of 8 KiB."""


def _few(names: Sequence[str]) -> str:
    """Return names in words, the first few of many."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _chosen(choice: Any) -> str | Chosen:
    """Return a choice as `Tools` has it."""
    if isinstance(choice, str | Chosen):
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidParameterError(
            f"tool_choice is {choice!r}: give none, auto, required, the name of a tool, or "
            '{"type": "function", "function": {"name": …}}.',
            param="tool_choice",
        )
    return Chosen((name,))


def _copied(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of a description, as JSON values."""
    try:
        copied: Mapping[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidParameterError(
            f"The description of a tool is not a JSON value ({cause}): correct it.", param="tools"
        ) from cause
    return copied


def _name(schema: Any) -> str:
    function = schema.get("function") if isinstance(schema, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParameterError(
            f"A tool is called {name!r}: give it a function with a name of 1 to "
            f"{MOST_NAME_CHARACTERS} letters, digits, dots, dashes or underscores.",
            param="tools",
        )
    return name


def _is_small_enough(name: str, parameters: Any) -> bool:
    """
    Return whether a schema can be compiled in bounded time.

    Raises:
        InvalidParameterError: It is no object.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidParameterError(
            f"The parameters of the tool {name!r} are not an object: give a JSON schema, such as "
            '{"type": "object"}, or leave them out.',
            param="tools",
        )
    try:
        check_schema(parameters, f"The schema of the parameters of the tool {name!r}")
    except InvalidParameterError as error:
        _log.warning("%s Its calls are not held to it.", error)
        return False
    return True


def _answer(answer: Grammar) -> str:
    if answer.kind == "json_schema":
        schema = json.loads(answer.source)
        check_schema(schema, "The JSON schema")
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {**schema.get("x-guidance", {}), **JSON_STYLE}}
        return f"answer: %json {json.dumps(schema)}"
    if answer.kind == "regex":
        pattern = answer.source.replace("/", r"\/")
        return f"answer: ANSWER\nANSWER: /{pattern}/"
    raise InvalidParameterError(
        "A Lark grammar cannot be joined with tools: use a JSON schema or a regular expression, or "
        "write the calls into the grammar and offer no tools.",
        param="grammar",
    )
