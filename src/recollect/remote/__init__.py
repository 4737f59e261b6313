"""Engines on other machines, which own their KV: vLLM, llama-server."""
