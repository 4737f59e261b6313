"""
The clipboard of whoever sits at the terminal.

On its own because it knows programs and terminals, and nothing of chats. The terminal is asked to
take the text (OSC 52), which works over SSH too; a program of this system is used where there is
one and the terminal is on this machine.
"""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Final

from recollect.errors import ConfigError

MOST_OSC_BYTES: Final = 74_994
"""Most bytes of text in one OSC 52, so that base64 stays below 100,000. Source: xterm's limit, which
others took over."""
_TIMEOUT_S: Final = 5
_PROGRAMS: Final[tuple[tuple[str | None, tuple[str, ...]], ...]] = (
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    (None, ("pbcopy",)),
    (None, ("clip.exe",)),
)
"""The variable that each needs, and how it is called; the text is its standard input."""


def copy_text(text: str, terminal: IO[str], environment: Mapping[str, str] = os.environ) -> str:
    """
    Put a text on the clipboard, and return what took it, for people.

    Args:
        text: What is copied.
        terminal: Where an OSC 52 is written, if it is a terminal.
        environment: Says whether the terminal is on this machine, and which programs there are.

    Raises:
        ConfigError: There is no clipboard to be had, or it cannot take so much.
    """
    data = text.encode("utf-8", errors="replace")
    used = []
    if terminal.isatty() and len(data) <= MOST_OSC_BYTES:
        terminal.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\a")
        terminal.flush()
        used.append("the terminal (OSC 52, where it takes that)")
    program = _program(environment)
    if program is not None and _run(program, data, environment):
        used.append(program[0])
    if used:
        return " and ".join(used)
    if terminal.isatty():
        raise ConfigError(
            f"This has {len(data):,} bytes, and terminals take {MOST_OSC_BYTES:,}: install wl-copy, "
            "xclip or xsel, or save the conversation and use `recollect conversations export`."
        )
    raise ConfigError("There is no clipboard here: install wl-copy, xclip or xsel.")


def _program(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    if "SSH_CONNECTION" in environment or "SSH_TTY" in environment:
        return None  # its clipboard would be that of the machine over there
    for variable, command in _PROGRAMS:
        needed = variable is None or environment.get(variable)
        if needed and shutil.which(command[0], path=environment.get("PATH")):
            return command
    return None


def _run(command: tuple[str, ...], data: bytes, environment: Mapping[str, str]) -> bool:
    """Give the text to a program; return whether it took it."""
    encoded = data if sys.platform != "win32" else data.decode().encode("utf-16")
    path = shutil.which(command[0], path=environment.get("PATH"))
    try:
        done = subprocess.run(  # noqa: S603 - one of the programs above
            [path or command[0], *command[1:]],
            input=encoded,
            stdout=subprocess.DEVNULL,  # xclip stays, and would keep a pipe open
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
