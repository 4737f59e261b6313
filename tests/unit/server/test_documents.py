"""What docs/openai-api.md shows of the client of OpenAI runs against a server."""

import re
from pathlib import Path

import httpx
import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "openai-api.md"


@pytest.mark.slow
def test_the_client_gets_a_reply(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    here = code.replace("http://127.0.0.1:8765", str(client.base_url).rstrip("/"))
    here = here.replace('"smollm2"', '"reference"').replace("messages=", "max_tokens=9, messages=")
    exec(here, {})  # noqa: S102 - our own document
    assert capsys.readouterr().out
