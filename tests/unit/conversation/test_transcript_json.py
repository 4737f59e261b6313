"""A session as JSON and back: the same messages with the same token ids, and warm."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.errors import ConversationFileError, NameTakenError
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8)
SYSTEM = "You are careful. " * 10
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "town",
        "parameters": {
            "type": "object",
            "properties": {"small": {"type": "boolean"}},
            "required": ["small"],
            "additionalProperties": False,
        },
    },
}


def test_a_session_comes_back_the_same_and_warm(model: Model) -> None:
    session = model.session(SYSTEM, params=SHORT)
    session.respond("One — 一 \N{PARTY POPPER}")
    session.respond("Two")
    text = session.to_json()
    again = model.session_from_json(text, params=SHORT)
    assert [node.to_new() for node in again.path()] == [node.to_new() for node in session.path()]
    assert again.tip.token_ids == session.tip.token_ids is not None
    assert json.loads(again.to_json())["nodes"][1]["content"] == "One — 一 \N{PARTY POPPER}"
    usage = again.respond("Three").usage
    assert usage.computed_tokens < 40 < usage.reused_tokens
    assert again.tip.token_ids == session.respond("Three").node.token_ids


def test_calls_and_reasoning_come_back(model: Model) -> None:
    session = model.session(
        tools=[TOOL], tool_choice="required", parallel_tool_calls=False, params=SamplingParams()
    )
    reply = session.respond("Where?", params=SamplingParams(max_tokens=200))
    (call,) = reply.tool_calls
    session.add({"role": "tool", "content": "here", "tool_call_id": call.id, "name": "town"})
    session.add({"role": "assistant", "content": "There.", "reasoning_content": "Let me think."})
    again = model.session_from_json(session.to_json(), tools=[TOOL])
    assert again.transcript() == session.transcript()
    assert [node.links for node in again.path()] == [node.links for node in session.path()]


def test_what_is_kept_is_in_the_journal_at_once(model: Model) -> None:
    session = model.session(params=SHORT)
    session.respond("One")
    again = model.session_from_json(session.to_json(), keep=True, name="again", params=SHORT)
    assert model.resume("again").transcript() == session.transcript()
    again.respond("Two")
    assert len(model.resume("again").path()) == 4
    with pytest.raises(NameTakenError):
        model.session_from_json(session.to_json(), name="again")


def test_an_empty_session_comes_back(model: Model) -> None:
    assert model.session_from_json(model.session().to_json()).path() == []


def test_another_model_reads_the_text(make_model: Callable[..., Model], model: Model) -> None:
    session = model.session(params=SHORT)
    session.respond("One")
    text = session.to_json().replace(model.weights_fingerprint, "f00d")
    again = model.session_from_json(text, params=SHORT)
    assert again.respond("Two").text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format": "other"}', "\N{PARTY POPPER}"]
)
def test_what_is_no_session_is_refused(model: Model, text: str) -> None:
    with pytest.raises(ConversationFileError):
        model.session_from_json(text)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "wrong",
    ["x" * 100_000, 10**4000, ["x" * 1000] * 1000, {"x": "x" * 9999}],
    ids=["text", "number", "list", "object"],
)
def test_whatever_is_wrong_is_told_in_one_sentence_and_nothing_is_begun(
    model: Model, wrong: object
) -> None:
    """Each value of a transcript in turn is replaced by something long."""
    session = model.session("Be brief.", params=SHORT)
    session.respond("One")
    record, told = json.loads(session.to_json()), list[str]()
    for at in (record, record["tips"], *record["nodes"]):
        for key in list(at):
            right, at[key] = at[key], wrong
            try:
                model.session_from_json(json.dumps(record))
            except ConversationFileError as error:
                told.append(str(error))
            at[key] = right
    assert len(told) > 10
    assert max(len(one) for one in told) < 500
    assert model.sessions() == []


def test_token_ids_that_the_model_does_not_have_are_refused_in_a_sentence(model: Model) -> None:
    session = model.session(params=SHORT)
    session.respond("One")
    record = json.loads(session.to_json())
    record["nodes"][1]["token_ids"] = [2**31 - 1]
    with pytest.raises(ConversationFileError, match="does not have"):
        model.session_from_json(json.dumps(record))
