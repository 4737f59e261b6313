"""
A chat without a person at the keyboard: prompts from lines, replies to stdout.

Reads and writes streams; knows no commands, and never touches the terminal.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from recollect.cli.terminal import printable
from recollect.conversation.session import Session
from recollect.errors import ConfigError

MOST_CHARACTERS: Final = 16 * 2**20
"""Of a line. The server takes as many bytes in a request; a device such as /dev/zero is one line."""


@contextmanager
def open_prompts(file: Path | None) -> Iterator[Iterator[str]]:
    """
    Open a file of prompts, one a line, or stdin where there is none.

    Yields:
        The prompts, as they come, without blank lines.

    Raises:
        ConfigError: It cannot be opened, or, from the iterator, is not UTF-8 text, or has a line
            without an end.
    """
    if file is None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        yield _prompts(sys.stdin, "stdin")
        return
    try:
        stream = file.open(encoding="utf-8-sig")
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    with stream:
        yield _prompts(stream, str(file))


def answer_all(session: Session, prompts: Iterable[str], *, as_json: bool) -> None:
    """
    Say each prompt in turn and print its reply: plain text, or one JSON object a line.

    Raises:
        RecollectError: A turn failed; what was printed of the turns before is complete.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and as_json:
        sys.stdout.reconfigure(encoding="utf-8")  # what JSON is written in, whatever the locale
    for prompt in prompts:
        tip = session.name
        if as_json:
            _answer_as_json(session, prompt, sys.stdout)
        else:
            _answer_as_text(session, prompt, sys.stdout)
        if session.name != tip:
            print(
                f"recollect: {tip!r} has gone on in another chat: this one is a branch now, "
                f"{session.name!r}.",
                file=sys.stderr,
            )


def _prompts(stream: TextIO, source: str) -> Iterator[str]:
    try:
        while line := stream.readline(MOST_CHARACTERS):
            if len(line) == MOST_CHARACTERS:
                raise ConfigError(
                    f"{source} has a line of {MOST_CHARACTERS:,} characters or more: a line is a prompt, "
                    "so part it."
                )
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{source} is not UTF-8 text: convert it first.") from cause


def _answer_as_text(session: Session, prompt: str, out: TextIO) -> None:
    with session.stream(prompt) as stream:
        for piece in stream:
            out.write(printable(piece) if out.isatty() else piece)
            out.flush()
    out.write("\n")
    out.flush()


def _answer_as_json(session: Session, prompt: str, out: TextIO) -> None:
    reply = session.respond(prompt)
    turn = {
        "prompt": prompt,
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "usage": reply.usage.to_dict(),
    }
    # On a terminal all but ASCII is escaped: some of the rest would be obeyed and not shown.
    out.write(json.dumps(turn, ensure_ascii=out.isatty()) + "\n")
    out.flush()
