"""Blocks of KV: who holds them, and what they hold."""
