"""Which conversation the options of a chat mean."""

from pathlib import Path

import pytest

from recollect import config
from recollect.cli.chat import LAST, Opening, with_resume_value
from recollect.conversation.model import Model
from recollect.errors import (
    ConfigError,
    NameTakenError,
    StoreCorruptError,
    UnknownConversationError,
)
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home that the reference model of these tests has too."""
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    return config.home()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--resume"], ["--resume="]),
        (["--resume", "poem"], ["--resume", "poem"]),
        (["--resume", "--json"], ["--resume=", "--json"]),
        (["-n", "5", "--resume", "-t", "1"], ["-n", "5", "--resume=", "-t", "1"]),
        (["--resume=poem", "--json"], ["--resume=poem", "--json"]),
        (["--json"], ["--json"]),
    ],
)
def test_resume_may_stand_without_a_name(given: list[str], meant: list[str]) -> None:
    assert meant == with_resume_value(given)


def test_what_only_a_new_conversation_can_have_is_refused_with_resume() -> None:
    with pytest.raises(ConfigError, match="--name is for a new conversation"):
        Opening(keep=True, resume=LAST, name="poem")
    with pytest.raises(ConfigError, match="--system is for a new conversation"):
        Opening(keep=True, resume=LAST, system="be brief")


def test_what_is_not_kept_never_touches_the_journal(home: Path, model: Model) -> None:
    opening = Opening(keep=False)
    found = opening.find()
    opening.open(model, found, SHORT).respond("one")
    assert not (home / JOURNAL_NAME).exists()


def test_a_new_conversation_is_kept_from_the_first_turn_on(model: Model) -> None:
    session = Opening(keep=True, system="be brief").open(model, None, SHORT)
    assert model.sessions() == []
    session.respond("one")
    assert [kept.turns for kept in model.sessions()] == [1]


def test_a_name_keeps_what_comes_from_a_pipe(model: Model) -> None:
    Opening(keep=False, name="poem").open(model, None, SHORT).respond("one")
    assert [kept.name for kept in model.sessions()] == ["poem"]
    with pytest.raises(NameTakenError, match="--resume"):
        Opening(keep=False, name="poem").find()


def test_resume_finds_the_last_one_or_one_by_name(model: Model) -> None:
    for name in ("first", "second"):
        Opening(keep=True, name=name).open(model, None, SHORT).respond(name)
    last = Opening(keep=True, resume=LAST)
    assert last.open(model, last.find(), SHORT).conversation.name == "second"
    first = Opening(keep=True, resume="first", overflow="drop_oldest")
    session = first.open(model, first.find(), SHORT)
    assert session.transcript()[0]["content"] == "first"
    assert (session.params, session.overflow) == (SHORT, "drop_oldest")


@pytest.mark.parametrize(
    ("name", "says"), [(LAST, "There is no conversation yet"), ("poem", "'poem'")]
)
def test_there_may_be_none_to_resume(name: str, says: str) -> None:
    with pytest.raises(UnknownConversationError, match=says):
        Opening(keep=True, resume=name).find()


def test_a_damaged_journal_is_left_as_it_is_and_a_way_around_it_is_named(home: Path) -> None:
    home.mkdir(parents=True)
    (home / JOURNAL_NAME).write_bytes(b"no database " * 100)
    with pytest.raises(StoreCorruptError, match="--no-save"):
        Opening(keep=True).find()
    assert (home / JOURNAL_NAME).read_bytes() == b"no database " * 100
    assert Opening(keep=False).find() is None


def test_a_conversation_goes_on_with_another_model_and_that_is_noted(
    home: Path, model: Model
) -> None:
    with Journal.open(home / JOURNAL_NAME) as journal:
        journal.create("poem", model="bard", fingerprint="f00d")
    opening = Opening(keep=True, resume="poem")
    found = opening.find()
    assert found is not None
    assert found.model == "bard"
    session = opening.open(model, found, SHORT)
    assert session.conversation.other_model == "bard"
    session.respond("one")
    assert session.conversation.other_model is None
    (kept,) = model.sessions()
    assert (kept.model, kept.fingerprint) == (model.name, model.weights_fingerprint)
