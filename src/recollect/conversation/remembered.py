"""
The token ids of replies from other times: what a client sends as text is read as it was generated.

While the program runs, `MessageIndex` finds replies as nodes; this finds them after a restart, where
KV is kept on disk. Replies of conversations that are kept are in the journal, and not here.
"""

from dataclasses import replace

from recollect.conversation.tree import Node, message_key
from recollect.engine.tier import DiskTier
from recollect.journal.records import NewNode
from recollect.kv.replies import StoredReply, reply_name


class RememberedReplies:
    """
    Replies of one model in one namespace, on disk beside the KV.

    Holds no state but where to look; safe from any thread.
    """

    def __init__(self, tier: DiskTier, fingerprint: str, namespace: str) -> None:
        self._tier = tier
        self._fingerprint = fingerprint
        self._namespace = namespace

    def note(self, reply: Node) -> None:
        """Remember a reply that was generated; nothing where it was not, or by another model."""
        if reply.token_ids is not None and reply.fingerprint == self._fingerprint:
            self._tier.note_reply(
                self._name(reply.key), StoredReply(reply.content, reply.token_ids)
            )

    def recalled(self, parent: Node, message: NewNode) -> NewNode:
        """Return a message as it was generated after *parent*, or as it is."""
        if message.role != "assistant" or message.token_ids is not None:
            return message
        key = message_key(parent.key, message.role, message.content, message.links)
        found = self._tier.find_reply(self._name(key))
        if found is None:
            return message
        return replace(
            message,
            content=found.text,
            token_ids=found.token_ids,
            fingerprint=self._fingerprint,
        )

    def _name(self, key: bytes) -> bytes:
        return reply_name(self._tier.store, self._fingerprint, self._namespace, key)
