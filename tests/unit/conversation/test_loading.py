"""What loading remarks on."""

import sys
from pathlib import Path

import pytest

from recollect.conversation.loading import load
from recollect.errors import ConfigError
from recollect.types import SamplingParams


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_a_data_folder_that_others_may_write_to_is_remarked_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    load("reference", home=home).close()
    assert caplog.messages == []
    home.chmod(0o707)
    load("reference", home=home).close()
    (message,) = caplog.messages
    assert f"The data folder {home} can be changed by others (everybody" in message
    assert "chmod 700" in message


def test_a_draft_model_guesses_and_is_named(tmp_path: Path) -> None:
    with load("reference", home=tmp_path, kv_disk=0, draft_model="reference") as model:
        assert model.draft_model == "reference"
        assert model.engine.drafts is not None
        assert model.engine.drafts.guesser is not None
        model.session(params=SamplingParams(max_tokens=40)).respond("A question")
        model.engine.check()
    with load("reference", home=tmp_path, kv_disk=0) as model:
        assert model.draft_model is None


def test_a_draft_model_is_refused_where_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guesses are turned off \(--no-draft"):
        load("reference", home=tmp_path, draft=False, draft_model="reference")
    with pytest.raises(ConfigError, match="draft_model cannot go with an engine elsewhere"):
        load("reference", home=tmp_path, engine="vllm=http://localhost:1", draft_model="reference")
