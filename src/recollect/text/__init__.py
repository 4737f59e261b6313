"""Strings to token ids and back: tokenizers, chat templates, and how models write calls of tools."""
