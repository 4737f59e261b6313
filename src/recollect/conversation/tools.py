"""
The tools that a session offers, and the grammar that holds replies to them.

Pure: descriptions in, a grammar out. No tool is called here.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from recollect.engine.grammar import JSON_STYLE, check_schema
from recollect.errors import InvalidParameterError
from recollect.text.tool_calls import CALL_CLOSING, CALL_START, call_opening
from recollect.types import Grammar

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MODES: Final = ("none", "auto", "required")

_LINE: Final = re.compile(r"at (\d+)\(\d+\)")
"""The line, from 1, and the column at which llguidance finds a Lark grammar wrong."""
_ARGUMENTS: Final = re.compile(r"(?:bare_)?arguments_(\d+):")
"""The beginning of the rule for a tool's arguments, with the index of the tool."""

# Lenient: a keyword of a schema that llguidance does not know is ignored, and the tool is not refused.
_GUIDANCE: Final = {**JSON_STYLE, "lenient": True}
_BARE_GUIDANCE: Final = {"whitespace_pattern": r"[\x20\x0A]{1,20}", "lenient": True}
"""White space in calls without marks, which span lines. Bounded: small models repeat it endlessly."""

# A reply is text with calls in it, or it begins with calls without marks (`text/tool_calls.py`). A lazy
# rule wins over free text as soon as it matches.
_AUTO: Final = r"""
tail: TEXT
TEXT: /(?s:.*)/
trigger[lazy]: TEXT "<tool_call>"
call: trigger after_mark
BARE_END: /[ \n]{0,20}\}?[ \n]{0,20}(```)?/
SPACE: /[ \n]{1,20}/
"""
_BARE_HEAD: Final = (
    r"/[ \n]{0,20}(```(json)?[ \n]{0,20})?\{\{?[ \n]{0,20}"
    r'"name"[ \n]{0,20}:[ \n]{0,20}"NAME"[ \n]{0,20},[ \n]{0,20}"arguments"[ \n]{0,20}:/'
)
_NO_CALL: Final = "start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/"


@dataclass(frozen=True, slots=True)
class Tools:
    """
    The tools that a reply may call, and whether it has to call one.

    Made by `Tools.of`. The prompt depends on the schemas and not on the choice.
    """

    schemas: tuple[Mapping[str, Any], ...] = ()
    """Descriptions as in OpenAI's API: `{"type": "function", "function": {"name": …, "parameters": …}}`."""
    choice: str = "auto"
    """`none`, `auto` (text, calls, or both), `required`, or the name of the one tool to call."""
    parallel: bool = True
    """Whether one reply may have several calls."""

    @classmethod
    def of(
        cls,
        schemas: Sequence[Mapping[str, Any]] | None,
        choice: str = "auto",
        *,
        parallel: bool = True,
    ) -> Self:
        """
        Return the tools of these descriptions, after checking them.

        Raises:
            InvalidParameterError: A description is not JSON or has no valid name, its parameters are
                not an object or too large, two have the same name, or there is no such choice.
        """
        tools = cls(tuple(map(_copied, schemas or ())), choice, parallel)
        names = [_name(schema) for schema in tools.schemas]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise InvalidParameterError(
                f"Two tools have the name {twice!r}: give each a name of its own."
            )
        for name, schema in zip(names, tools.schemas, strict=True):
            _check_parameters(name, schema["function"].get("parameters"))
        known = [*_MODES, *names] if names else _MODES[:2]
        if choice not in known:
            raise InvalidParameterError(
                f"tool_choice is {choice!r}: give one of {', '.join(known)}."
            )
        return tools

    def grammar(self, answer: Grammar | None = None) -> Grammar | None:
        """
        Return the grammar of replies; None: replies are free.

        A call has to follow the schema of its tool, and a reply cannot end inside a call.

        Args:
            answer: The grammar of replies without calls; None: those are free text.

        Raises:
            InvalidParameterError: *answer* is a Lark grammar, which cannot be joined with others.
        """
        if not self.schemas:
            return answer
        if self.choice == "none":
            return answer or Grammar.lark(_NO_CALL)
        schemas = self._callable()
        one_only = not self.parallel or self.choice not in _MODES
        if self.choice == "auto" and answer is None:
            many = "start: call | tail | bare" if one_only else "start: call* tail | bare+"
            start = f"{many} BARE_END?"
            return Grammar.lark(f"{start}\n{_AUTO}{_bodies(schemas)}\n{_bare(schemas)}")
        calls = "calls: one" if one_only else r'calls: one ("\n" one)*'
        rules = [calls, f'one: "{CALL_START}" after_mark', _bodies(schemas)]
        if self.choice == "auto" and answer is not None:
            return Grammar.lark("\n".join(["start: calls | answer", _answer(answer), *rules]))
        return Grammar.lark("\n".join(["start: calls", *rules]))

    def bare_names(self, answer: Grammar | None = None) -> tuple[str, ...]:
        """Return the names of the tools whose calls `grammar` allows without marks."""
        is_free = self.choice == "auto" and answer is None
        return tuple(_name(schema) for schema in self.schemas) if is_free else ()

    def named(self, error: InvalidParameterError, grammar: Grammar) -> InvalidParameterError:
        """Return an error about a grammar that `grammar` returned, which names the tool at fault."""
        reason = str(error)
        why = reason[reason.find("(") + 1 : reason.rfind(")")]
        at = _LINE.match(why)
        line = grammar.source.splitlines()[int(at[1]) - 1] if at else ""
        rule = _ARGUMENTS.match(line)
        if rule is None:
            return InvalidParameterError(
                f"The tools cannot be held to their schemas ({why}): offer fewer, or simpler ones."
            )
        name = _name(self._callable()[int(rule[1])])
        return InvalidParameterError(
            f"The parameters of the tool {name!r} are a schema that cannot be followed "
            f"({why.partition('schema: ')[2] or why}): correct them."
        )

    def _callable(self) -> list[Mapping[str, Any]]:
        """Return the descriptions of the tools that may be called."""
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
        words = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
        return f"Tools: {'; '.join(words) or 'in another order'}."


NO_TOOLS: Final = Tools()


def _copied(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of a description, as JSON values."""
    try:
        copied: Mapping[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidParameterError(
            f"The description of a tool is not a JSON value ({cause}): correct it."
        ) from cause
    return copied


def _name(schema: Any) -> str:
    function = schema.get("function") if isinstance(schema, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParameterError(
            f"A tool has the name {name!r}: give it a function with a name of 1 to 64 letters, "
            "digits, dots, dashes or underscores."
        )
    return name


def _check_parameters(name: str, parameters: Any) -> None:
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidParameterError(
            f"The parameters of the tool {name!r} are not an object: give a JSON schema, such as "
            '{"type": "object"}, or leave them out.'
        )
    check_schema(parameters, f"The schema of the parameters of the tool {name!r}")


def _bodies(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Return the rules for what follows the mark of a call: the tool's name and its arguments."""
    rules = ["after_mark: " + " | ".join(f"call_{n}" for n in range(len(schemas)))]
    for n, schema in enumerate(schemas):
        opening = call_opening(_name(schema)).removeprefix(CALL_START)
        rules.append(
            f"call_{n}: {json.dumps(opening)} arguments_{n} {json.dumps(CALL_CLOSING)}\n"
            f"arguments_{n}: {_arguments(schema, _GUIDANCE)}"
        )
    return "\n".join(rules)


def _bare(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Return the rules for calls without marks."""
    rules = ["bare: " + " | ".join(f"bare_{n}" for n in range(len(schemas)))]
    for n, schema in enumerate(schemas):
        head = _BARE_HEAD.replace("NAME", re.escape(_name(schema)))
        rules.append(
            f"bare_head_{n}[lazy]: {head}\n"
            f'bare_{n}: bare_head_{n} SPACE? bare_arguments_{n} SPACE? "}}"\n'
            f"bare_arguments_{n}: {_arguments(schema, _BARE_GUIDANCE)}"
        )
    return "\n".join(rules)


def _arguments(schema: Mapping[str, Any], guidance: Mapping[str, Any]) -> str:
    parameters = schema["function"].get("parameters") or {"type": "object", "properties": {}}
    return f"%json {json.dumps({**parameters, 'x-guidance': guidance})}"


def _answer(answer: Grammar) -> str:
    if answer.kind == "json_schema":
        schema = json.loads(answer.source)
        check_schema(schema, "The JSON schema")
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": JSON_STYLE}
        return f"answer: %json {json.dumps(schema)}"
    if answer.kind == "regex":
        pattern = answer.source.replace("/", r"\/")
        return f"answer: ANSWER\nANSWER: /{pattern}/"
    raise InvalidParameterError(
        "A Lark grammar cannot be joined with tools: use a JSON schema or a regular expression, or "
        "write the calls into the grammar and offer no tools."
    )
