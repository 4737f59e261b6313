"""A conversation with Pydantic AI: a line of stdin for each turn, "/new" for a new one."""

import json
import sys
from pathlib import Path

from block import model
from pydantic_ai import Agent

agent = Agent(model, instructions="You look things up in notes.")


@agent.tool_plain
def read_notes(path: str) -> str:
    """Read a file."""
    return Path(path).read_text(encoding="utf-8")


history: list = []
for line in sys.stdin:
    text = ""
    if line.strip() == "/new":
        history = []
    else:
        result = agent.run_sync(line.strip(), message_history=history)
        history, text = result.all_messages(), result.output
    print(json.dumps(text), flush=True)
