"""
Conversations with local language models that never read a token twice, and prove it.

    import recollect

    model = recollect.load()
    chat = model.session("You are a careful assistant.")
    print(chat.respond("My name is Alex."))
"""

from recollect._version import __version__
from recollect.cipher import Cipher
from recollect.conversation.conversation import Conversation
from recollect.conversation.encryption import encrypt
from recollect.conversation.model import Model, load
from recollect.conversation.reply import Reply, ReplyStream
from recollect.conversation.session import Session
from recollect.conversation.tree import Node, Tree
from recollect.engine.engine import Engine
from recollect.engine.generator import Generator
from recollect.engine.sequence import Sequence
from recollect.errors import MisuseError, RecollectError
from recollect.keyfile import unlock
from recollect.types import Message, SamplingParams, Usage

__all__ = [
    "Cipher",
    "Conversation",
    "Engine",
    "Generator",
    "Message",
    "MisuseError",
    "Model",
    "Node",
    "RecollectError",
    "Reply",
    "ReplyStream",
    "SamplingParams",
    "Sequence",
    "Session",
    "Tree",
    "Usage",
    "__version__",
    "encrypt",
    "load",
    "unlock",
]
