"""
Standard input, output and errors as they may be: closed, full, or with nobody who reads.
"""

import os
import sys
from contextlib import suppress
from typing import Final, TextIO, cast

_READ, _WRITE = os.O_RDONLY, os.O_WRONLY
# Opened the other way round: using a stream that was closed fails, as it would have. Nobody could
# be told where errors cannot be written, so those are let go.
_MISSING: Final = ((0, _WRITE), (1, _READ), (2, _WRITE))


def open_missing() -> None:
    """
    See that descriptors 0 to 2 are taken, and that Python has its three streams.

    Otherwise the next file, such as a database, gets the number, and whatever is written to the
    stream goes into it.
    """
    for number, flags in _MISSING:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = _stream(0, "r")
    if sys.stdout is None:
        sys.stdout = _stream(1, "w")
    if sys.stderr is None:
        sys.stderr = _stream(2, "w")


def let_go(stream: TextIO) -> None:
    """Forget what a stream could not write, so that the end of the process does not try again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, _WRITE)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(message: str) -> None:
    """Write a line to stderr, where that can be done."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        let_go(sys.stderr)


def _stream(number: int, mode: str) -> TextIO:
    stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
    return cast("TextIO", stream)  # a text mode
