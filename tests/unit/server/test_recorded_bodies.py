"""
What real clients sent, recorded by `tests/clients`, is read by the schemas.

The bodies have the shape that they came in; texts of others are left out, and so are ids and paths.
"""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from recollect.server.anthropic import CountRequest, MessagesRequest
from recollect.server.chat_completions import ChatRequest
from recollect.server.fields import Body, read_body
from recollect.server.response_object import ResponseRequest
from recollect.server.settings import Limits

KINDS: Final[dict[str, type[Body]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/responses": ResponseRequest,
}
RECORDED: Final = {
    f"{file.stem}-{number}": one
    for file in sorted((Path(__file__).parent / "bodies").glob("*.json"))
    for number, one in enumerate(json.loads(file.read_text("utf-8")))
}


def test_there_are_some_of_every_api() -> None:
    assert {one["path"] for one in RECORDED.values()} >= {*KINDS} - {"/v1/messages/count_tokens"}


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_is_taken(recorded: dict[str, Any]) -> None:
    """What changes nothing here is named."""
    body = read_body(json.dumps(recorded["body"]).encode(), KINDS[recorded["path"]], Limits())
    assert sorted(body.ignored) == recorded["ignored"]
