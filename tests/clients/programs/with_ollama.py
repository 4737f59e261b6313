"""A conversation with Ollama's own client: a line of stdin for each turn, "/new" for a new conversation."""

import json
import sys
from pathlib import Path
from typing import Any

from block import client, model

SYSTEM = {"role": "system", "content": "You look things up in notes."}


def read_notes(path: str) -> str:
    """
    Read a file.

    Args:
        path: Of the file.
    """
    return Path(path).read_text("utf-8")


def answered(messages: list[Any], *, streams: bool) -> Any:
    """Return the message of a reply."""
    asked: dict[str, Any] = {"model": model, "messages": messages, "tools": [read_notes]}
    if not streams:
        return client.chat(**asked, keep_alive="5m").message
    text, calls = "", []
    for part in client.chat(**asked, stream=True, keep_alive=-1):
        text += part.message.content or ""
        calls += part.message.tool_calls or ()
    return {"role": "assistant", "content": text, "tool_calls": calls or None}


def main() -> None:
    assert model in {one.model for one in client.list().models}
    assert "tools" in (client.show(model).capabilities or ())
    messages: list[Any] = [SYSTEM]
    for line in sys.stdin:
        if line.strip() == "/new":
            messages = [SYSTEM]
            print('""', flush=True)
            continue
        messages.append({"role": "user", "content": line.strip()})
        while True:
            reply = answered(messages, streams=len(messages) > 2)  # both ways, as programs do
            messages.append(reply)
            if not reply["tool_calls"]:
                break
            for call in reply["tool_calls"]:
                result = read_notes(**call["function"]["arguments"])
                messages.append({"role": "tool", "content": result, "tool_name": "read_notes"})
        print(json.dumps(reply["content"]), flush=True)


main()
