"""A conversation with the OpenAI Agents SDK: a line of stdin for each turn, "/new" for a new one."""

import json
import sys
from pathlib import Path

from agents import Agent, Runner, function_tool
from block import model


@function_tool
def read_notes(path: str) -> str:
    """Read a file."""
    return Path(path).read_text(encoding="utf-8")


agent = Agent(
    name="Notes", instructions="You look things up in notes.", model=model, tools=[read_notes]
)
history: list = []
for line in sys.stdin:
    text = ""
    if line.strip() == "/new":
        history = []
    else:
        result = Runner.run_sync(agent, [*history, {"role": "user", "content": line.strip()}])
        history, text = result.to_input_list(), result.final_output
    print(json.dumps(text), flush=True)
