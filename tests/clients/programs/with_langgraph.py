"""A conversation with LangGraph: a line of stdin for each turn, "/new" for a new one."""

import json
import sys
from itertools import count
from pathlib import Path

from block import model
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.prebuilt import create_react_agent


@tool
def read_notes(path: str) -> str:
    """Read a file."""
    return Path(path).read_text(encoding="utf-8")


agent = create_react_agent(
    model, [read_notes], prompt="You look things up in notes.", checkpointer=InMemorySaver()
)
threads = count()
thread = next(threads)
for line in sys.stdin:
    text = ""
    if line.strip() == "/new":
        thread = next(threads)
    else:
        config = {"configurable": {"thread_id": str(thread)}}
        result = agent.invoke({"messages": [("user", line.strip())]}, config)
        text = result["messages"][-1].content
    print(json.dumps(text), flush=True)
