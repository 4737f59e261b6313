"""
Conversations with local language models that never read a token twice, and prove it.

    import recollect

    model = recollect.load()
    chat = model.session("You are a careful assistant.")
    print(chat.respond("My name is Alex."))

The exported names are loaded when they are first used (PEP 562), so that a program which needs few
of them, such as `recollect --help`, does not wait for numpy and SQLite.
"""

import importlib
import typing

from recollect import starting  # noqa: F401 - imported first, for what it does
from recollect.errors import MisuseError, RecollectError

__version__ = "0.1.0"
"""The build reads it from this line (pyproject.toml)."""

if typing.TYPE_CHECKING:
    from recollect.conversation.branches import Branch
    from recollect.conversation.conversation import Conversation
    from recollect.conversation.explore import Exploration
    from recollect.conversation.loading import load
    from recollect.conversation.model import Model, Warmed
    from recollect.conversation.session import ReplyStream, Session
    from recollect.conversation.tools import Tools
    from recollect.conversation.tree import Node, Tree
    from recollect.conversation.turn import Reply
    from recollect.encryption import Cipher, unlock
    from recollect.engine.engine import Engine
    from recollect.engine.pinning import Published
    from recollect.engine.sampling import Generator
    from recollect.engine.sequence import Sequence
    from recollect.journal.home import Checkpoint, encrypt
    from recollect.journal.requests import explain
    from recollect.text.tool_calls import ToolCallParser
    from recollect.types import Grammar, Message, SamplingParams, TokenLogprob, ToolCall, Usage

_MODULES: typing.Final = {
    "Branch": "recollect.conversation.branches",
    "Checkpoint": "recollect.journal.home",
    "Cipher": "recollect.encryption",
    "Conversation": "recollect.conversation.conversation",
    "Engine": "recollect.engine.engine",
    "Exploration": "recollect.conversation.explore",
    "Generator": "recollect.engine.sampling",
    "Grammar": "recollect.types",
    "Message": "recollect.types",
    "Model": "recollect.conversation.model",
    "Node": "recollect.conversation.tree",
    "Published": "recollect.engine.pinning",
    "Reply": "recollect.conversation.turn",
    "ReplyStream": "recollect.conversation.session",
    "SamplingParams": "recollect.types",
    "Sequence": "recollect.engine.sequence",
    "Session": "recollect.conversation.session",
    "TokenLogprob": "recollect.types",
    "ToolCall": "recollect.types",
    "ToolCallParser": "recollect.text.tool_calls",
    "Tools": "recollect.conversation.tools",
    "Tree": "recollect.conversation.tree",
    "Usage": "recollect.types",
    "Warmed": "recollect.conversation.model",
    "encrypt": "recollect.journal.home",
    "explain": "recollect.journal.requests",
    "load": "recollect.conversation.loading",
    "unlock": "recollect.encryption",
}
"""Of each exported name that is loaded on first use, its module; the imports above are for types."""

__all__ = [
    "Branch",
    "Checkpoint",
    "Cipher",
    "Conversation",
    "Engine",
    "Exploration",
    "Generator",
    "Grammar",
    "Message",
    "MisuseError",
    "Model",
    "Node",
    "Published",
    "RecollectError",
    "Reply",
    "ReplyStream",
    "SamplingParams",
    "Sequence",
    "Session",
    "TokenLogprob",
    "ToolCall",
    "ToolCallParser",
    "Tools",
    "Tree",
    "Usage",
    "Warmed",
    "__version__",
    "encrypt",
    "explain",
    "load",
    "unlock",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not typing.TYPE_CHECKING:  # a checker would take any name whatever for exported

    def __getattr__(name: str) -> object:
        """Load an exported name on its first use; then it is an ordinary attribute."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
