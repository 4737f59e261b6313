"""The clipboard, by the terminal and by a program that is really run."""

import base64
import io
import sys
from pathlib import Path

import pytest

from recollect.cli.clipboard import MOST_OSC_BYTES, copy_text
from recollect.cli.commands import run_command
from recollect.cli.repl import handle_line
from recollect.cli.state import Chat
from recollect.errors import ConfigError, ConversationError

TEXT = "ünf\x1b]52;c;!\a\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def osc_52(screen: Terminal) -> str:
    """Return what a terminal would have on its clipboard."""
    begin, _, rest = screen.getvalue().partition("\x1b]52;c;")
    encoded, end, after = rest.partition("\a")
    assert (begin, end, after) == ("", "\a", "")
    return base64.b64decode(encoded).decode()


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a wl-copy that keeps what it gets."""
    if sys.platform == "win32":
        pytest.skip("a script is no program there")
    program = tmp_path / "wl-copy"
    program.write_text(f'#!/bin/sh\nPATH=/bin:/usr/bin exec cat > "{tmp_path}/copied"\n')
    program.chmod(0o755)
    return {"WAYLAND_DISPLAY": "wayland-0", "PATH": str(tmp_path)}


def test_the_terminal_gets_the_text_and_no_sequence_in_it() -> None:
    screen = Terminal()
    assert "OSC 52" in copy_text(TEXT, screen, {})
    assert osc_52(screen) == TEXT


def test_a_program_gets_it_too(programs: dict[str, str], tmp_path: Path) -> None:
    screen = Terminal()
    assert copy_text(TEXT, screen, programs).endswith(" and wl-copy")
    assert (tmp_path / "copied").read_text() == osc_52(screen) == TEXT
    assert copy_text(TEXT, io.StringIO(), programs) == "wl-copy"


def test_over_ssh_the_terminal_alone_gets_it(programs: dict[str, str], tmp_path: Path) -> None:
    assert "wl-copy" not in copy_text(TEXT, Terminal(), programs | {"SSH_CONNECTION": "a 1 b 2"})
    assert not (tmp_path / "copied").exists()


def test_what_no_terminal_takes_goes_to_the_program_alone(
    programs: dict[str, str], tmp_path: Path
) -> None:
    long, screen = "x" * (MOST_OSC_BYTES + 1), Terminal()
    assert copy_text(long, screen, programs) == "wl-copy"
    assert ((tmp_path / "copied").read_text(), screen.getvalue()) == (long, "")
    with pytest.raises(ConfigError, match="terminals take"):
        copy_text(long, screen, {})


def test_without_a_clipboard_it_is_refused(programs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no clipboard here"):
        copy_text(TEXT, io.StringIO(), {})
    (tmp_path / "wl-copy").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match="no clipboard here"):
        copy_text(TEXT, io.StringIO(), programs)


def test_a_chat_copies_its_last_reply(
    chat: Chat, programs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in programs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.delenv("SSH_TTY", raising=False)
    with pytest.raises(ConversationError, match="no reply to copy"):
        run_command(chat, "/copy")
    handle_line(chat, "hello")
    run_command(chat, "/copy")
    copied = (tmp_path / "copied").read_bytes().decode()
    assert copied == chat.session.path()[-1].content
