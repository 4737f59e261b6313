"""
The grammar that holds calls of tools, made from a row of `text/tool_formats` and the tools' schemas.

A reply is text with sections of calls in it, or calls alone. Marks that are control tokens of the model
are tokens in the grammar too, and free text has none. Pure: descriptions in, a grammar in llguidance's
dialect of Lark out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from recollect.engine.grammar import JSON_STYLE
from recollect.text.tokenizer import ControlTokens
from recollect.text.tool_formats import HERMES, ToolFormat, braced, python_literal

# Arguments are held to what of their schema they can be held to: a word in it that is not known is
# no reason to refuse the tool.
_GUIDANCE: Final = {**JSON_STYLE, "lenient": True}
_BARE_GUIDANCE: Final = {"whitespace_pattern": r"[\x20\x0A]{1,20}", "lenient": True}
"""White space in calls without marks, which span lines. Bounded: small models repeat it endlessly."""

# A lazy rule wins over free text as soon as it matches.
_TEXT: Final = "TEXT: /(?s:.*)/\ntail: TEXT"
_BARE_END: Final = "BARE_END: /[ \\n]{0,20}\\}?[ \\n]{0,20}(```)?/\nSPACE: /[ \\n]{1,20}/"
_HERMES_HEAD: Final = (
    r"/[ \n]{0,20}(```(json)?[ \n]{0,20})?\{\{?[ \n]{0,20}"
    r'"name"[ \n]{0,20}:[ \n]{0,20}"NAME"[ \n]{0,20},[ \n]{0,20}"arguments"[ \n]{0,20}:/'
)
_OBJECT_HEAD: Final = (
    r"/((?s:.*)\n)?[ \n]{0,20}\{[ \n]{0,20}"
    r'"KEY"[ \n]{0,20}:[ \n]{0,20}"NAME"[ \n]{0,20},[ \n]{0,20}"VALUE"[ \n]{0,20}:/'
)
_LIST_HEAD: Final = r"/((?s:.*)\n)?\[NAME\(/"
_PYTHON: Final = r"""
PY_TEXT: /"([^"\\\n]|\\["'\\nrt]|\\u00[0-9a-f]{2})*"/ | /'([^'\\\n]|\\["'\\nrt]|\\u00[0-9a-f]{2})*'/
py_any: PY_TEXT | "True" | "False" | "None" | py_json
py_key: /[A-Za-z_][A-Za-z0-9_]{0,63}/
"""
_BRACES: Final = r"""
br_any: br_text | "true" | "false" | "null" | BR_NUMBER | br_list | br_object
br_list: "[" (br_any ("," br_any)*)? "]"
br_object: "{" (br_key ":" br_any ("," br_key ":" br_any)*)? "}"
br_key: /[\w.-]{1,64}/
BR_NUMBER: /-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?/
BR_WHOLE: /-?(0|[1-9][0-9]{0,20})/
"""
_KEY: Final = r'/[^<>"\n]{1,64}/'
"""Of an argument that no schema names."""
_VALUES: Final[Mapping[str, Mapping[str, str]]] = {
    "python": {
        "boolean": '"True" | "False"', "null": '"None"', "string": "PY_TEXT", "any": "py_any",
        "key": 'py_key "="', "comma": '", "',
    },
    "braces": {
        "boolean": '"true" | "false"', "null": '"null"', "string": "br_text", "any": "br_any",
        "key": 'br_key ":"', "comma": '","', "number": "BR_NUMBER", "integer": "BR_WHOLE",
        "object": "br_object",
    },
}  # fmt: skip
"""What values are, by the types of schemas, and what is around them."""


def name_of(schema: Mapping[str, Any]) -> str:
    """Return the name in a description that was checked."""
    name: str = schema["function"]["name"]
    return name


def parameters_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a tool's arguments."""
    return schema["function"].get("parameters") or {"type": "object", "properties": {}}


def texts_of(schemas: Sequence[Mapping[str, Any]]) -> Mapping[str, frozenset[str]]:
    """Return which arguments of tools are texts whatever they look like, by the tools' names."""
    found = {}
    for schema in schemas:
        parameters = parameters_of(schema)
        each = parameters.get("properties")
        pairs = each.items() if isinstance(each, Mapping) else ()
        found[name_of(schema)] = frozenset(key for key, one in pairs if _is_text(one, parameters))
    return found


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Return what a schema within another refers to, one step far."""
    target = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(target, str) or not target.startswith("#/"):
        return schema
    found: Any = root
    for part in target[2:].split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else schema


def _is_text(schema: Any, root: Mapping[str, Any]) -> bool:
    values, schema = _listed(schema, root), _resolved(schema, root)
    if values is not None:
        return bool(values) and all(isinstance(one, str) for one in values)
    return isinstance(schema, Mapping) and schema.get("type") == "string"


class CallGrammar:
    """The rules for calls of some tools in one format. Used once, by `conversation.tools`."""

    def __init__(
        self,
        format_: ToolFormat,
        schemas: Sequence[Mapping[str, Any]],
        unheld: frozenset[str],
        control: ControlTokens,
        *,
        one_only: bool,
        budget: int | None = None,
    ) -> None:
        """
        Hold what the rules are made of.

        Args:
            format_: How calls are written.
            schemas: Of the tools that may be called; not empty.
            unheld: Names of tools whose arguments are held to no schema.
            control: The model's control tokens.
            one_only: Whether a reply has one call at most.
            budget: Most tokens of reasoning, where the grammar is about that too; None: as many as the
                model wants.
        """
        self._budget = budget
        self._format = format_
        self._schemas = schemas
        self._unheld = unheld
        self._control = control
        self._one_only = one_only or format_.is_single

    def auto(self) -> str:
        """Return the grammar of replies that are text, calls or both."""
        form = self._format
        if form.kind == "channels":
            return self._channels("final | channel_call", with_final=True)
        rules = [_TEXT, self._calls()]
        if form is HERMES:
            rules += [_BARE_END, self._bare(_HERMES_HEAD)]
        if not form.mark:
            rules += [
                _BARE_END,
                self._bare_lists() if form.kind == "python" else self._bare(_OBJECT_HEAD),
            ]
            return "\n".join(["start: bare | tail", *rules])
        rules.append(f"section: {self._until(form.mark, 'trigger')} after_mark")
        if form.mark not in self._control.ids:
            rules.append(self._up_to("trigger", form.mark))
        bare = ("bare" if self._one_only else "bare+") if form is HERMES else ""
        many = "section | tail" if self._one_only else "section* tail"
        start = f"({many} | {bare}) BARE_END?" if bare else many
        return "\n".join([f"start: {start}", *rules])

    def required(self, answer: str | None = None) -> str:
        """
        Return the grammar of replies that are calls alone.

        Args:
            answer: Rules of what may come instead of calls, the first of them `answer`; None: nothing may.
        """
        form = self._format
        if form.kind == "channels":
            if answer is None:
                return self._channels("channel_call")
            return self._channels("answered | channel_call", answer)
        sections = "calls: one_section"
        if not self._one_only and form.between is None and form.mark:
            after = f"{self._literal(form.after)} " if form.after else ""
            sections = f"calls: one_section ({after}one_section)*"
        begins = self._literal(form.mark) if form.mark else ""
        start = "start: calls" if answer is None else f"start: calls | answer\n{answer}"
        return "\n".join([start, sections, f"one_section: {begins} after_mark", self._calls()])

    def none(self) -> str:
        """Return the grammar of replies without calls."""
        form = self._format
        if form.kind == "channels":
            return self._channels("final", with_final=True)
        if not form.mark or self._control.count(form.mark):  # which text has none of
            return f"start: tail\n{_TEXT}"
        mark = re.escape(form.mark).replace("/", r"\/")
        return f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*){mark}(?s:.*)/"

    def _literal(self, text: str) -> str:
        """Return what matches a text as it is, its control tokens as tokens."""
        parts, start = list[str](), 0
        for begin, end in self._control.spans(text):
            if begin > start:
                parts.append(_quoted(text[start:begin]))
            parts.append(f"<[{self._control.ids[text[begin:end]]}]>")
            start = end
        if start < len(text):
            parts.append(_quoted(text[start:]))
        return " ".join(parts)

    def _calls(self) -> str:
        """Return the rules for what follows the mark of calls."""
        form = self._format
        more = ""
        if form.between is not None and not self._one_only:
            more = f"({self._literal(form.between)} one)*"
        opening, closing = self._literal(form.opening), self._literal(form.closing)
        rules = [
            f"after_mark: {opening} one {more} {closing}",
            f"one: {self._literal(form.head)} ({self._any('call')}) {self._literal(form.tail)}",
        ]
        if form.kind == "python":
            rules.append(_PYTHON + f"py_json: %json {json.dumps({'x-guidance': _GUIDANCE})}")
        if form.kind == "braces":
            said = self._up_to("br_said", form.quote)
            rules.append(f"br_text: {self._literal(form.quote)} br_said\n{said}\n{_BRACES}")
        rules += [rule for n in range(len(self._schemas)) for rule in self._call(n)]
        return "\n".join(rules)

    def _any(self, rule: str) -> str:
        """Return what matches a rule of any of the tools."""
        return " | ".join(f"{rule}_{n}" for n in range(len(self._schemas)))

    def _call(self, n: int) -> Iterator[str]:
        """Yield the rules of calls of one tool."""
        form, schema = self._format, self._schemas[n]
        name = name_of(schema)
        if form.kind == "object":
            key, value = form.keys
            opening = f'{{"{key}": {json.dumps(name)}, "{value}": '
            yield f'call_{n}: {_quoted(opening)} arguments_{n} "}}"'
            yield f"arguments_{n}: {self._json(n)}"
        elif form.kind == "named":
            number = "/:[0-9]{1,4}/ " if form.is_numbered else ""
            parts = f"{self._literal(name)} {number}{self._literal(form.separator)}"
            yield f"call_{n}: {parts} arguments_{n}"
            yield f"arguments_{n}: {self._json(n)}"
        elif form.kind == "braces":
            yield f'call_{n}: {_quoted(name)} "{{" params_{n} "}}"'
            yield from self._keywords(n)
        elif form.kind == "python":
            yield f'call_{n}: {_quoted(name + "(")} params_{n} ")"'
            yield from self._keywords(n)
        else:
            yield f"call_{n}: {self._literal(name + form.separator)} params_{n}"
            yield from self._elements(n)

    def _json(self, n: int, guidance: Mapping[str, Any] = _GUIDANCE) -> str:
        parameters = parameters_of(self._schemas[n])
        if name_of(self._schemas[n]) in self._unheld:
            parameters = {"type": "object"}
        return f"%json {json.dumps({**parameters, 'x-guidance': guidance})}"

    def _properties(self, n: int) -> list[tuple[str, Any, bool]] | None:
        """Return each argument's name, schema, and whether it is required; None: any may be given."""
        schema = self._schemas[n]
        parameters = parameters_of(schema)
        each = parameters.get("properties")
        if name_of(schema) in self._unheld or not isinstance(each, Mapping):
            return None
        required = parameters.get("required")
        needed = required if isinstance(required, list) else []
        return [(key, one, key in needed) for key, one in each.items() if self._can_be_named(key)]

    def _can_be_named(self, key: str) -> bool:
        if self._format.kind == "python":
            return key.isidentifier()
        if self._format.kind == "braces":
            return re.fullmatch(r"[\w.-]{1,64}", key) is not None
        return bool(key.strip()) and not any(one in key for one in '<>"\n')

    def _elements(self, n: int) -> Iterator[str]:
        """Yield the rules of arguments that are elements."""
        before, _, end = self._format.parameter
        as_text = self._format.between_name_and(is_text=True)
        as_json = self._format.between_name_and(is_text=False)
        mark = end.strip()
        rest = end.partition(mark)[2]
        properties = self._properties(n)
        yield self._up_to(f"value_text_{n}", mark)
        close = self._literal(rest) if rest else ""
        if properties is None:
            values = [f"{self._literal(as_text)} value_text_{n} {close}"]
            if as_json != as_text:
                values.append(f"{self._literal(as_json)} arguments_{n} {self._literal(end)}")
                yield f"arguments_{n}: %json {json.dumps({'x-guidance': _GUIDANCE})}"
            yield f"params_{n}: param_{n}*"
            yield f"param_{n}: {self._literal(before)} {_KEY} ({' | '.join(values)})"
            return
        each = [
            f"param_{n}_{k}{'' if needed else '?'}" for k, (_, _, needed) in enumerate(properties)
        ]
        yield f"params_{n}: {' '.join(each)}"
        for k, (key, schema, _) in enumerate(properties):
            is_text = _is_text(schema, parameters_of(self._schemas[n]))
            head = before + key + (as_text if is_text else as_json)
            yield f"param_{n}_{k}: {self._literal(head)} value_{n}_{k}"
            if listed := _listed(schema, parameters_of(self._schemas[n])):
                is_plain = is_text or as_text == as_json
                each = [_plain(one) if is_plain else json.dumps(one) for one in listed]
                yield f"value_{n}_{k}: ({' | '.join(map(_quoted, each))}) {self._literal(end)}"
            elif is_text:
                yield f"value_{n}_{k}: value_text_{n} {close}"
            else:
                yield f"value_{n}_{k}: arguments_{n}_{k} {self._literal(end)}"
                yield f"arguments_{n}_{k}: {self._json_value(n, schema)}"

    def _json_value(self, n: int, schema: Any) -> str:
        """Return what matches the value of one argument as JSON."""
        parameters = parameters_of(self._schemas[n])
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        plain = schema if isinstance(schema, Mapping) else {}
        return f"%json {json.dumps({**shared, **plain, 'x-guidance': _GUIDANCE})}"

    def _keywords(self, n: int) -> Iterator[str]:
        """Yield the rules of arguments that are keywords in Python, or keys in braces."""
        properties, words = self._properties(n), _VALUES[self._format.kind]
        comma = words["comma"]
        if properties is None:
            yield f"params_{n}: (param_{n} ({comma} param_{n})*)?"
            yield f"param_{n}: {words['key']} {words['any']}"
            return
        middle = words["key"].split('"')[1]
        starts = list[str]()
        for k, (_, _, needed) in enumerate(properties):
            starts.append(f"param_{n}_{k} rest_{n}_{k + 1}")
            if needed:
                break
        else:
            starts.append('""')
        yield f"params_{n}: {' | '.join(starts)}"
        for k, (key, schema, needed) in enumerate(properties):
            yield f"param_{n}_{k}: {_quoted(key + middle)} value_{n}_{k}"
            optional = "" if needed else "?"
            yield f"rest_{n}_{k}: ({comma} param_{n}_{k}){optional} rest_{n}_{k + 1}"
            yield from self._keyword_value(n, f"value_{n}_{k}", schema)
        yield f'rest_{n}_{len(properties)}: ""'

    def _keyword_value(self, n: int, rule: str, schema: Any) -> Iterator[str]:
        """Yield the rules of one value as the format writes it."""
        words = _VALUES[self._format.kind]
        root = parameters_of(self._schemas[n])
        schema = _resolved(schema, root)
        if values := _listed(schema, root):
            yield f"{rule}: {' | '.join(map(self._constant, values))}"
            return
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if isinstance(kind, str) and kind in words:
            yield f"{rule}: {words[kind]}"
        elif kind == "array" and isinstance(schema.get("items"), Mapping):
            yield f'{rule}: "[" ({rule}_item ({words["comma"]} {rule}_item)*)? "]"'
            yield from self._keyword_value(n, f"{rule}_item", schema["items"])
        elif kind in ("integer", "number", "object"):
            name = f"arguments_{n}_{rule.removeprefix(f'value_{n}_')}"
            yield f"{rule}: {name}"
            yield f"{name}: {self._json_value(n, schema)}"
        else:
            yield f"{rule}: {words['any']}"

    def _constant(self, value: Any) -> str:
        """Return what matches one value as the format writes it."""
        if self._format.kind == "python":
            return _quoted(python_literal(value))
        return self._literal(braced(value, self._format.quote))

    def _bare(self, head: str) -> str:
        """Return the rules for calls that are objects without marks."""
        rules = [f"bare: {self._any('bare')}"]
        key, value = self._format.keys
        for n, schema in enumerate(self._schemas):
            this = head.replace("KEY", key).replace("VALUE", value)
            this = this.replace("NAME", re.escape(name_of(schema)))
            rules.append(
                f"bare_head_{n}[lazy]: {this}\n"
                f'bare_{n}: bare_head_{n} SPACE? bare_arguments_{n} SPACE? "}}"\n'
                f"bare_arguments_{n}: {self._json(n, _BARE_GUIDANCE)}"
            )
        return "\n".join(rules)

    def _bare_lists(self) -> str:
        """Return the rules for lists of calls in Python that stand without marks."""
        more = "" if self._one_only else f"({_quoted(self._format.between or '')} one)*"
        rules = [f"bare: {self._any('bare')}"]
        for n, schema in enumerate(self._schemas):
            head = _LIST_HEAD.replace("NAME", re.escape(name_of(schema)))
            rules.append(
                f"bare_head_{n}[lazy]: {head}\n"
                f'bare_{n}: bare_head_{n} params_{n} ")" {more} {self._literal(self._format.closing)}'
            )
        return "\n".join(rules)

    def _channels(self, ends: str, answer: str | None = None, *, with_final: bool = False) -> str:
        """Return the grammar of replies in channels: thoughts, then what *ends* names."""
        to = self._until("<|end|>", "said")
        lit = self._literal
        names = [
            f"to_{n}: {lit(name_of(one))} to_json arguments_{n}"
            for n, one in enumerate(self._schemas)
        ]
        role = [
            f"as_{n}: {lit(name_of(one) + '<|channel|>commentary')} to_json arguments_{n}"
            for n, one in enumerate(self._schemas)
        ]
        head, end = lit("<|channel|>"), f"{lit('<|message|>')} {to} {lit('<|start|>assistant')}"
        # Whoever ends the reasoning for the budget's sake must not see it begin again.
        before = {None: "(thought | aside)*", 0: "aside*"}.get(
            self._budget, "aside* (thought aside*)?"
        )
        rules = [
            f"start: {before} ({ends})",
            f'aside: {head} "commentary" {end}',
            *([] if self._budget == 0 else [f'thought: {head} "analysis" {end}']),
            f'channel_call: {lit("<|channel|>")} ("commentary" | "analysis") " to=functions." '
            f"({self._any('to')})"
            f' | " to=functions." ({self._any("as")})',
            f'to_json: " " ({lit("<|constrain|>")})? "json" {lit("<|message|>")}',
            *names,
            *role,
            *(f"arguments_{n}: {self._json(n)}" for n in range(len(self._schemas))),
            _TEXT,
        ]
        if "<|end|>" not in self._control.ids:
            rules.append(f"said[lazy]: TEXT {_quoted('<|end|>')}")
        head = lit("<|channel|>final<|message|>")
        if with_final:
            rules.append(f"final: {head} tail")
        if answer is not None:
            rules += [f"answered: {head} answer", answer]
        return "\n".join(rules)

    def _up_to(self, rule: str, mark: str) -> str:
        """Return the rule for text up to a mark and the mark, of which control tokens may be a part."""
        spans = list(self._control.spans(mark))
        if not spans:
            return f"{rule}[lazy]: /(?s:.*)/ {_quoted(mark)}"
        start = spans[0][0]
        before = re.escape(mark[:start]).replace("/", r"\/")
        text = rule.upper()
        return f"{rule}: {text} {self._literal(mark[start:])}\n{text}: /(?s:.*){before}/"

    def _until(self, mark: str, rule: str) -> str:
        """Return what matches text and the mark after it: tokens, or the rule for a mark that is text."""
        return f"TEXT {self._literal(mark)}" if mark in self._control.ids else rule


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(schema: Any, root: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that a schema lists; None where it lists none."""
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None
