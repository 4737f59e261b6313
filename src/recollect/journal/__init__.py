"""Conversations on disk, and as files."""
