"""
How models write calls of tools: one row of data for each family.

A row says between which marks calls stand, how one is written, and how tools are offered where a
template does not do that itself. `of_template` chooses the row by what a chat template has in it. The
finder in `tool_calls` and the grammars of `conversation/tool_grammar` are made from these rows, so a
family that writes in one of the known ways is one more row. Pure: text in, text out.
Source of the words: the families' own chat templates, and for those that leave a part out, what their
makers publish beside the weights.
"""

# ruff: noqa: RUF001 - marks of calls have letters that look like others

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from recollect.errors import InvalidParameterError
from recollect.text.tokenizer import ControlTokens

Kind = Literal["object", "named", "elements", "python", "braces", "channels"]
"""
How a call is written.

`object`: as a JSON object with name and arguments. `named`: the name, then the arguments as JSON.
`elements`: the name, then an element for each argument. `python`: as a call in Python with keywords.
`braces`: the name, then an object whose keys have no quotation marks, and whose texts have `quote`.
`channels`: as a message to the tool in a channel, the arguments as JSON.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """
    How one family writes calls.

    A reply has sections of calls: `mark`, `opening`, calls, `closing`. Around each call are `head` and
    `tail`. White space between these is as models were trained on it; the finder does not mind it.
    """

    name: str
    kind: Kind
    mark: str = ""
    """What a section begins with; empty: nothing tells it but the call itself."""
    opening: str = ""
    closing: str = ""
    head: str = ""
    tail: str = ""
    between: str | None = None
    """Between the calls of a section; None: a section has one call."""
    after: str = "\n"
    """Between sections."""
    keys: tuple[str, str] = ("name", "arguments")
    """Of an `object`, for the name and for the arguments."""
    separator: str = ""
    """What follows the name where that is no part of an object."""
    parameter: tuple[str, str, str] = ("", "", "")
    """Before an argument's name, between it and the value, and after the value. A `{}` in between stands
    for the one or the other of `kinds`."""
    kinds: tuple[str, str] = ("", "")
    """What an element has that is a text, and what one that is other JSON; empty: nothing tells them."""
    is_numbered: bool = False
    """Whether a colon and the number of the call follow the name."""
    quote: str = ""
    """What texts in `braces` stand between."""
    is_bare: bool = False
    """Whether calls come without marks, at the beginning of a line."""
    lead: str = ""
    """What may come before calls that need no marks."""
    is_single: bool = False
    """Whether a reply has one call at most: the models know no more."""
    preamble: str = ""
    """How tools are offered where a template does not know them; `{tools}` are their descriptions.
    Empty: as elsewhere, with a call as an example."""

    @property
    def beginning(self) -> str:
        """Return what a template writes where calls begin."""
        if self.kind == "channels":
            return "<|start|>assistant"
        return self.mark or (self.opening if self.kind == "python" else f'{{"{self.keys[0]}"')

    def between_name_and(self, *, is_text: bool) -> str:
        """Return what stands between an argument's name and its value."""
        return self.parameter[1].replace("{}", self.kinds[0 if is_text else 1])

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the texts in which the marks of calls are, which may be control tokens."""
        channels = ("<|start|>", "<|end|>", "<|message|>") if self.kind == "channels" else ()
        texts = (self.lead, self.mark, self.opening, self.head, self.separator, self.tail)
        others = (self.between or "", self.closing, self.quote, *self.parameter)
        return (*texts, *others, "[CALL_ID]", *channels)

    def offering(self, tools: str) -> str:
        """Return the instructions that offer tools, of which these are the descriptions."""
        if self.preamble:
            return self.preamble.format(tools=tools)
        example = self.text_of([("example_tool", '{"example_parameter": "a value"}')])
        return (
            f"{_JSON_PREAMBLE.format(tools=tools)}To call tools, reply in this format:\n{example}"
        )

    def text_of(self, calls: Sequence[tuple[str, str]]) -> str:
        """
        Return calls as a model writes them.

        Args:
            calls: Names and arguments, these as JSON text of an object.
        """
        numbers = [f":{n}" if self.is_numbered else "" for n in range(len(calls))]
        written = [
            f"{self.head}{self._call(name, given, number)}{self.tail}"
            for (name, given), number in zip(calls, numbers, strict=True)
        ]
        start = self.mark + self.opening
        if self.between is None:
            return self.after.join(f"{start}{one}{self.closing}" for one in written)
        return f"{start}{self.between.join(written)}{self.closing}"

    def _call(self, name: str, arguments: str, number: str) -> str:
        if self.kind == "object":
            key, value = self.keys
            return f'{{"{key}": {json.dumps(name)}, "{value}": {arguments}}}'
        if self.kind in ("named", "channels"):
            return f"{name}{number}{self.separator}{arguments}"
        given: dict[str, Any] = json.loads(arguments)
        if self.kind == "python":
            pairs = ", ".join(f"{key}={python_literal(one)}" for key, one in given.items())
            return f"{name}({pairs})"
        if self.kind == "braces":
            return f"{name}{braced(given, self.quote)}"
        before, _, end = self.parameter
        pairs = "".join(
            f"{before}{key}{self.between_name_and(is_text=isinstance(one, str))}{_plain(one)}{end}"
            for key, one in given.items()
        )
        return f"{name}{self.separator}{pairs}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def braced(value: Any, quote: str) -> str:
    """Return a JSON value with keys as they are, and texts between *quote*."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        pairs = (f"{key}:{braced(one, quote)}" for key, one in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(braced(one, quote) for one in value) + "]"
    return json.dumps(value)


def python_literal(value: Any) -> str:
    """Return a JSON value as Python writes it, texts in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        pairs = (f"{python_literal(key)}: {python_literal(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    return repr(value)


_HERMES_PREAMBLE: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

"""
_JSON_PREAMBLE: Final = """You have access to the following functions, described in JSON:

{tools}

"""
_XML_PREAMBLE: Final = """# Tools

You have access to the following functions, described in JSON:

<tools>
{tools}
</tools>

If you choose to call a function, reply in the following format:
"""

HERMES: Final = ToolFormat(
    name="hermes",
    kind="object",
    mark="<tool_call>",
    opening="\n",
    closing="\n</tool_call>",
    preamble=_HERMES_PREAMBLE
    + """For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>""",
)
"""Qwen2.5, Qwen3, Hermes, and every model whose template names no other."""

LLAMA_3: Final = ToolFormat(
    name="llama-3",
    kind="object",
    keys=("name", "parameters"),
    lead="<|python_tag|>",
    is_bare=True,
    is_single=True,
    preamble=_JSON_PREAMBLE
    + 'To call a function, respond with {{"name": function name, "parameters": dictionary of '
    "argument name and its value}} and nothing else. Do not use variables.",
)
MISTRAL: Final = ToolFormat(
    name="mistral",
    kind="object",
    mark="[TOOL_CALLS]",
    opening="[",
    closing="]",
    between=", ",
    preamble="[AVAILABLE_TOOLS][{tools}][/AVAILABLE_TOOLS]",
)
"""Mistral 7B v0.3, Nemo, and Small up to 3.1."""
MISTRAL_V11: Final = ToolFormat(
    name="mistral-v11",
    kind="named",
    mark="[TOOL_CALLS]",
    separator="[ARGS]",
    after="",
    preamble="[AVAILABLE_TOOLS][{tools}][/AVAILABLE_TOOLS]",
)
"""Mistral Small 3.2, Devstral, Magistral, Ministral 3."""
QWEN_3_CODER: Final = ToolFormat(
    name="qwen3-coder",
    kind="elements",
    mark="<tool_call>",
    opening="\n<function=",
    separator=">\n",
    parameter=("<parameter=", ">\n", "\n</parameter>\n"),
    closing="</function>\n</tool_call>",
    preamble=_XML_PREAMBLE
    + """<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
</function>
</tool_call>""",
)
"""Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5."""
SEED_OSS: Final = ToolFormat(
    name="seed-oss",
    kind="elements",
    mark="<seed:tool_call>",
    opening="\n<function=",
    separator=">\n",
    parameter=("<parameter=", ">", "</parameter>\n"),
    closing="</function>\n</seed:tool_call>",
)
MINIMAX_M2: Final = ToolFormat(
    name="minimax-m2",
    kind="elements",
    mark="<minimax:tool_call>",
    opening="\n",
    head='<invoke name="',
    separator='">\n',
    parameter=('<parameter name="', '">', "</parameter>\n"),
    tail="</invoke>\n",
    between="",
    closing="</minimax:tool_call>",
)
GLM_4_5: Final = ToolFormat(
    name="glm-4.5",
    kind="elements",
    mark="<tool_call>",
    separator="\n",
    parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    closing="</tool_call>",
    preamble=_XML_PREAMBLE
    + """<tool_call>{{function-name}}
<arg_key>{{arg-key-1}}</arg_key>
<arg_value>{{arg-value-1}}</arg_value>
</tool_call>""",
)
GLM_4_7: Final = ToolFormat(
    name="glm-4.7",
    kind="elements",
    mark="<tool_call>",
    parameter=("<arg_key>", "</arg_key><arg_value>", "</arg_value>"),
    closing="</tool_call>",
    after="",
    preamble=_XML_PREAMBLE + "<tool_call>{{function-name}}<arg_key>{{arg-key-1}}</arg_key>"
    "<arg_value>{{arg-value-1}}</arg_value></tool_call>",
)
"""GLM 4.7, and others who took its elements without line feeds."""
LFM_2: Final = ToolFormat(
    name="lfm2",
    kind="python",
    mark="<|tool_call_start|>",
    opening="[",
    closing="]<|tool_call_end|>",
    between=", ",
    preamble="List of tools: [{tools}]",
)
PYTHONIC: Final = ToolFormat(
    name="pythonic",
    kind="python",
    lead="<|python_start|>",
    opening="[",
    closing="]",
    between=", ",
    is_bare=True,
    preamble="""You are an expert in composing functions. You have these functions, described in JSON:

{tools}

If you decide to invoke any of the functions, reply with nothing but a list of calls:
[func_name1(params_name1="value", params_name2=2), func_name2(params_name1="value")]""",
)
"""Llama 3.2 and Llama 4 where they are asked to write so, ToolACE."""
DEEPSEEK: Final = ToolFormat(
    name="deepseek",
    kind="named",
    mark="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    separator="\n```json\n",
    tail="\n```<｜tool▁call▁end｜>",
    between="\n",
    closing="<｜tool▁calls▁end｜>",
    preamble=_JSON_PREAMBLE
    + """To call functions, use this format:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>example_function_name
```json
{{"arg1": "some_value"}}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>""",
)
"""DeepSeek V3 and R1."""
DEEPSEEK_V3_1: Final = ToolFormat(
    name="deepseek-v3.1",
    kind="named",
    mark="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    tail="<｜tool▁call▁end｜>",
    between="",
    closing="<｜tool▁calls▁end｜>",
    preamble="""## Tools
You have access to the following tools:

{tools}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
<｜tool▁calls▁end｜>

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces""",
)
DSML: Final = ToolFormat(
    name="dsml",
    kind="elements",
    mark="<｜DSML｜tool_calls>",
    opening="\n",
    head='<｜DSML｜invoke name="',
    separator='">\n',
    parameter=('<｜DSML｜parameter name="', '" string="{}">', "</｜DSML｜parameter>\n"),
    kinds=("true", "false"),
    tail="</｜DSML｜invoke>\n",
    between="",
    closing="</｜DSML｜tool_calls>",
)
"""DeepSeek V4."""
DSML_V3_2: Final = replace(
    DSML,
    name="dsml-v3.2",
    mark="<｜DSML｜function_calls>",
    closing="</｜DSML｜function_calls>",
)
"""DeepSeek V3.2."""
KIMI: Final = ToolFormat(
    name="kimi",
    kind="named",
    mark="<|tool_calls_section_begin|>",
    head="<|tool_call_begin|>functions.",
    is_numbered=True,
    separator="<|tool_call_argument_begin|>",
    tail="<|tool_call_end|>",
    between="",
    closing="<|tool_calls_section_end|>",
)
"""Kimi K2."""
GEMMA_4: Final = ToolFormat(
    name="gemma-4",
    kind="braces",
    mark="<|tool_call>",
    opening="call:",
    closing="<tool_call|>",
    quote='<|"|>',
    after="",
)
HARMONY: Final = ToolFormat(
    name="harmony",
    kind="channels",
    mark="<|channel|>",
    opening="commentary to=functions.",
    separator=" <|constrain|>json<|message|>",
    is_single=True,
    preamble=_JSON_PREAMBLE
    + "Calls to these tools must go to the commentary channel: 'functions'.",
)
"""gpt-oss. A reply ends with its call."""
NEMOTRON: Final = ToolFormat(
    name="nemotron",
    kind="object",
    mark="<TOOLCALL>",
    opening="[",
    closing="]</TOOLCALL>",
    between=", ",
    preamble=_JSON_PREAMBLE
    + 'To call functions: <TOOLCALL>[{{"name": "tool_name", "arguments": {{}}}}]</TOOLCALL>',
)
GRANITE: Final = ToolFormat(
    name="granite",
    kind="object",
    mark="<|tool_call|>",
    opening="[",
    closing="]",
    between=", ",
    preamble=_JSON_PREAMBLE
    + "When a tool is required to answer the user's query, respond only with <|tool_call|> followed "
    "by a JSON list of tools used.",
)
"""Granite 3."""

APRIEL: Final = ToolFormat(
    name="apriel",
    kind="object",
    mark="<tool_calls>",
    opening="[",
    closing="]</tool_calls>",
    between=", ",
    preamble=_JSON_PREAMBLE
    + 'To call functions: <tool_calls>[{{"name": "tool_name", "arguments": {{}}}}]</tool_calls>',
)


def control_marks(format_: ToolFormat, control: ControlTokens) -> dict[int, str]:
    """Return the control tokens in which a model writes calls: their texts by their ids."""
    names = (text[slice(*span)] for text in format_.marks for span in control.spans(text))
    return {control.ids[name]: name for name in names}


_TELLING: Final[Sequence[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]]]] = (
    # What a template has in it, and what it has not. The first row that fits counts.
    (HARMONY, ("<|channel|>", "to=", "functions."), ()),
    (DSML_V3_2, ("｜DSML｜", "function_calls>"), ()),
    (DSML, ("｜DSML｜", "tool_calls>"), ()),
    (KIMI, (KIMI.mark, "<|tool_call_argument_begin|>"), ()),
    (GEMMA_4, ("<|tool_call>call:", "<tool_call|>"), ()),
    (DEEPSEEK, ("<｜tool▁calls▁begin｜>", "```json"), ()),
    (DEEPSEEK_V3_1, ("<｜tool▁calls▁begin｜>",), ()),
    (SEED_OSS, ("<seed:tool_call>", "<function="), ()),
    (MINIMAX_M2, ("<minimax:tool_call>", "<invoke name="), ()),
    (QWEN_3_CODER, ("<tool_call>", "<function=", "<parameter="), ()),
    (GLM_4_7, ("<tool_call>", "</arg_key><arg_value>"), ()),
    (GLM_4_5, ("<tool_call>", "<arg_key>", "<arg_value>"), ()),
    (MISTRAL_V11, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ()),
    (LFM_2, ("<|tool_call_start|>",), ()),
    (LFM_2, ("List of tools: ",), ()),
    (NEMOTRON, ("<TOOLCALL>",), ()),
    (APRIEL, ("<tool_calls>[",), ()),
    (GRANITE, ("<|tool_call|>", "JSON list of tools"), ()),
    (PYTHONIC, ("[func_name1(",), ("<tool_call>",)),
    (LLAMA_3, ('"parameters": ', "ipython"), ("<function=",)),
)
FORMATS: Final[Mapping[str, ToolFormat]] = {
    one.name: one for one in (HERMES, *(row[0] for row in _TELLING))
}
"""By the names that people give."""


def of_template(source: str, *, knows_tools: bool) -> ToolFormat | None:
    """
    Return the format that a chat template was written for; None: it names none that is known.

    Args:
        source: The template.
        knows_tools: Whether it looks at the descriptions of tools.
    """
    for format_, there, absent in _TELLING:
        if all(one in source for one in there) and not any(one in source for one in absent):
            return format_
    is_hermes = knows_tools and HERMES.mark in source and "<invoke name=" not in source
    return HERMES if is_hermes else None


def named(name: str | None) -> ToolFormat | None:
    """
    Return a format by its name; None where none is named.

    Raises:
        InvalidParameterError: There is none of that name.
    """
    if name is not None and name not in FORMATS:
        raise InvalidParameterError(
            f"There is no tool format {name!r}: take one of {', '.join(FORMATS)}."
        )
    return None if name is None else FORMATS[name]
