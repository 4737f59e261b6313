"""`recollect checkpoints` lists and drops, and deleting a conversation drops its own; no model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect.cli.chat import LAST, Opening
from recollect.cli.main import app
from recollect.conversation.model import Model
from recollect.errors import UnknownCheckpointError
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def kept(make_model: Callable[..., Model], open_home_store: Callable[..., object]) -> None:
    """Have two conversations with a checkpoint each, and no model any more."""
    model = make_model(store=open_home_store())
    for name in ("poem", "song"):
        session = model.session(name=name, params=SHORT)
        session.respond("one")
        session.checkpoint(f"a {name}")
        session.respond("two")
    model.close()


def test_without_any_the_list_says_how_to_make_one(home: Path) -> None:
    assert "/save NAME" in run("checkpoints")
    assert json.loads(run("checkpoints", "--json")) == []
    assert not home.exists(), "looking leaves nothing behind"


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_the_list_shows_where_each_stands_and_what_it_takes() -> None:
    (row,) = (line for line in run("checkpoints").splitlines() if "a poem" in line)
    (fields, other) = json.loads(run("checkpoints", "list", "--json"))
    assert (fields["name"], fields["conversation"], fields["turns"]) == ("a poem", "poem", 1)
    assert other["name"] == "a song"
    assert fields["stored_tokens"] == fields["tokens"] > 8
    assert fields["stored_bytes"] > 0
    assert row.split()[:5] == ["a", "poem", "poem", "1", str(fields["tokens"])]


@pytest.mark.usefixtures("kept")
def test_drop_lets_one_go_and_names_what_there_is_not() -> None:
    assert "its conversation is unchanged" in run("checkpoints", "drop", "a poem")
    assert [fields["name"] for fields in json.loads(run("checkpoints", "--json"))] == ["a song"]
    with pytest.raises(UnknownCheckpointError):
        run("checkpoints", "drop", "a poem")


@pytest.mark.usefixtures("kept")
def test_with_a_conversation_go_its_checkpoints() -> None:
    said = run("conversations", "delete", "poem", "--yes")
    assert "Its checkpoints were deleted, too: a poem." in said
    assert "`recollect cache clear`" in said
    assert [fields["name"] for fields in json.loads(run("checkpoints", "--json"))] == ["a song"]


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_a_checkpoint_names_the_conversation_that_a_chat_goes_on_with(
    make_model: Callable[..., Model], open_home_store: Callable[..., object]
) -> None:
    opening = Opening(keep=False, checkpoint="a poem")
    found = opening.find()
    assert found is not None
    assert found.name == "poem"
    session = opening.open(make_model(store=open_home_store()), found, SHORT)
    assert session.tip.turns == 1
    with pytest.raises(UnknownCheckpointError):
        Opening(keep=True, resume=LAST, checkpoint="nowhere").find()
