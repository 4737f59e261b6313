"""Conversations as trees of messages, and sessions on them."""
