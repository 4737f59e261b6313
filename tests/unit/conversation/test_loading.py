"""What loading remarks on."""

import sys
from pathlib import Path

import pytest

from recollect.conversation.loading import load


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
