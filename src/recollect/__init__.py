"""
Conversations with local language models that never read a token twice, and prove it.

    import recollect

    model = recollect.load()
    chat = model.session("You are a careful assistant.")
    print(chat.respond("My name is Alex."))
"""

from recollect import starting  # noqa: F401 - imported first, for what it does
from recollect.config import __version__
from recollect.conversation.conversation import Conversation
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
from recollect.errors import MisuseError, RecollectError
from recollect.journal.home import Checkpoint, encrypt
from recollect.text.tool_calls import ToolCallParser
from recollect.types import Grammar, Message, SamplingParams, TokenLogprob, ToolCall, Usage

__all__ = [
    "Checkpoint",
    "Cipher",
    "Conversation",
    "Engine",
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
    "load",
    "unlock",
]
