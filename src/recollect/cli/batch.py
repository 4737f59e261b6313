"""
What is said to a model without a terminal: one question, a pipe, or a message in each line.

Reads the messages, and files with instructions, within bounds, and prints the replies: plain text, or one
JSON object a turn.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console

from recollect import files
from recollect.cli.display import fitted
from recollect.conversation.session import Session
from recollect.conversation.turn import Reply
from recollect.errors import ConfigError
from recollect.text.tool_calls import TextDelta

MOST_CHARACTERS: Final = 16 * 2**20
"""Most characters in a message: the server takes as many bytes in a request, and /dev/zero has no end."""


MOST_BYTES: Final = 64 * files.MIB
"""Sixteen million tokens: more than any context holds."""


def read_text(file: Path) -> str:
    """
    Return what is in a file, without the line ends after it.

    Raises:
        ConfigError: It cannot be read, is no file or too large, is not UTF-8 text, or has nothing in it.
    """
    try:
        text = files.read_text(file, most_bytes=MOST_BYTES, encoding="utf-8-sig").rstrip()
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{file} is not UTF-8 text: convert it first.") from cause
    if not text:
        raise ConfigError(f"{file} has no text in it: give another file.")
    return text


def one_message(question: str | None) -> str:
    """
    Return the one message of a question, of standard input, or of both.

    What was piped stands before the question: the next question about the same text finds its KV.
    A terminal is not read where there is a question.

    Raises:
        ConfigError: There is nothing to say, or what was piped is too long or not UTF-8 text.
    """
    if question is not None and not question.strip():
        raise ConfigError('The question is empty: give one, as in recollect chat "What is KV?".')
    piped = "" if question is not None and sys.stdin.isatty() else _read_stdin()
    if question is not None:
        return f"{piped}\n\n{question}" if piped else question
    if not piped:
        raise ConfigError(
            "Standard input has no text: pipe a message in, or give a question: "
            'recollect chat "What is KV?".'
        )
    return piped


def _read_stdin() -> str:
    """Return the whole text of standard input, without blank lines around it."""
    _decode_stdin()
    try:
        text = sys.stdin.read(MOST_CHARACTERS)
    except UnicodeDecodeError as cause:
        raise ConfigError("Standard input is not UTF-8 text: convert it first.") from cause
    if len(text) == MOST_CHARACTERS:
        raise ConfigError(
            f"Standard input has {MOST_CHARACTERS:,} characters or more, which is too long for one "
            "message: shorten it, or send each line as a message with --lines."
        )
    return text.rstrip().lstrip("\r\n")


def _decode_stdin() -> None:
    """Read standard input as UTF-8, whatever the locale, and nothing that is not."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")


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
        _decode_stdin()
        yield _prompts(sys.stdin, "Standard input")
        return
    try:
        stream = file.open(encoding="utf-8-sig")
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    with stream:
        yield _prompts(stream, str(file))


def answer_all(
    session: Session, prompts: Iterable[str], *, as_json: bool, plain: bool = False
) -> None:
    """
    Say each prompt in turn and print its reply: text, or one JSON object a line.

    Text that goes to a terminal is shown as Markdown, unless *plain* is set.

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
            _answer_as_text(session, prompt, sys.stdout, plain=plain)
        if session.name != tip:
            _remark(
                f"another program has moved the branch {tip!r}: this chat goes on in the new branch "
                f"{session.name!r}."
            )


def _prompts(stream: TextIO, source: str) -> Iterator[str]:
    try:
        while line := stream.readline(MOST_CHARACTERS):
            if len(line) == MOST_CHARACTERS:
                raise ConfigError(
                    f"{source} has a line of {MOST_CHARACTERS:,} characters or more: each line is one "
                    "prompt, so divide it."
                )
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{source} is not UTF-8 text: convert it first.") from cause


def _answer_as_text(session: Session, prompt: str, out: TextIO, *, plain: bool) -> None:
    if out.isatty():
        # Here and not above: a pipe need not wait for what shows Markdown.
        from recollect.cli.markdown import make_writer  # noqa: PLC0415

        writer = make_writer(Console(file=out), plain=plain)
        with session.stream(prompt) as stream:
            try:
                for event in stream.events():
                    if isinstance(event, TextDelta):
                        writer.push(event.text)
            finally:
                writer.finish()
        _say_why_cut(stream.reply)
        return
    with session.stream(prompt) as stream:
        for event in stream.events():
            if isinstance(event, TextDelta):
                out.write(event.text)
                out.flush()
    out.write("\n")
    out.flush()
    _say_why_cut(stream.reply)


def _say_why_cut(reply: Reply | None) -> None:
    """Say on stderr why a reply ends where it does, if the model did not end it."""
    if reply is not None and reply.finish_reason == "length":
        why = (
            "repeated itself and was ended"
            if reply.ended == "repetition"
            else "was cut at the token limit"
        )
        _remark(f"The reply {why}.")


def _remark(text: str) -> None:
    with suppress(OSError):  # the reply was written, and the status is that of the reply
        print(fitted(f"recollect: {text}", sys.stderr), file=sys.stderr, flush=True)


def _answer_as_json(session: Session, prompt: str, out: TextIO) -> None:
    reply = session.respond(prompt)
    turn = {
        "prompt": prompt,
        "reply": reply.said,
        **({"reasoning": reply.reasoning} if reply.reasoning else {}),
        "finish_reason": reply.finish_reason,
        "ended": reply.ended,
        "usage": reply.usage.to_dict(),
    }
    # On a terminal all but ASCII is escaped: some of the rest would be obeyed and not shown.
    out.write(json.dumps(turn, ensure_ascii=out.isatty()) + "\n")
    out.flush()
