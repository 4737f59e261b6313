"""The engine behind the APIs that every tool speaks: HTTP, for clients of OpenAI and Anthropic."""
