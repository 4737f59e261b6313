"""
Tools as text in the Hermes format, which ChatML models were trained on.

A call is a JSON object between marks. Pure: messages in, messages out; templates and tokens are
others' business. Source: the chat templates of Qwen2.5 and Hermes 2 Pro, whose words these are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from recollect.types import Message

CALL_START: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"

_PREAMBLE: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def call_opening(name: str) -> str:
    """Return what comes before the arguments of a call."""
    return f'{CALL_START}\n{{"name": {json.dumps(name)}, "arguments": '


CALL_CLOSING: Final = f"}}\n{CALL_END}"
"""What comes after the arguments of a call."""


def call_text(name: str, arguments: str) -> str:
    """Return a call, its arguments JSON text, as a model writes it."""
    return call_opening(name) + arguments + CALL_CLOSING


def spelled_out(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """
    Return messages for a template that knows neither tools nor their results.

    Tools are described in the instructions, and results are what the user says, those that follow
    each other in one message.
    """
    spelled: list[Message] = []
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            spelled.append(message)
            continue
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if place and messages[place - 1]["role"] == "tool":
            spelled[-1] = {"role": "user", "content": f"{spelled[-1]['content']}\n{result}"}
        else:
            spelled.append({"role": "user", "content": result})
    if not tools:
        return spelled
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    preamble = _PREAMBLE.format(tools=lines)
    if spelled and spelled[0]["role"] == "system":
        instructions = f"{spelled[0]['content']}\n\n{preamble}"
        return [{"role": "system", "content": instructions}, *spelled[1:]]
    return [{"role": "system", "content": preamble}, *spelled]
