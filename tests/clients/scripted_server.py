"""
A program: `recollect serve` with replies from a script, and a record of what it did.

It is the real server with a real tokenizer, template, engine, disk and forward passes. Only the
choice of a token is not the model's: `sampling.choose_token` gives the next token of a script, and
the grammar, where there is one, has to allow it. Replies are written in short tokens, which are seldom
those that their text would be encoded to; models write so too.

    python scripted_server.py SCRIPT RECORD serve ...

SCRIPT is JSON: for each marker, what is replied after it was said last; the second reply is to the
result of the first one's call, and so on. RECORD is written when the server has ended: the requests
as they came, the prompts and replies token by token, and the tokens that forward passes were fed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from recollect.cli import main
from recollect.conversation import formats
from recollect.engine import sampling
from recollect.models.catalog import LocalModel
from recollect.runtime.base import PagedRuntime, PassResult, Row
from recollect.server import app as server
from recollect.text.tokenizer import Tokenizer

END: Final = "<|im_end|>"
GENERATION_PROMPT: Final = "<|im_start|>assistant\n"
PIECES: Final = (3, 1, 5, 2, 7)
"""How many bytes of a reply a token has, over and over, where there is such a token."""
LONGEST: Final = 32
"""Longer tokens are not looked for."""
MARKS: Final = ("<tool_call>", "</tool_call>")
ASIDE: Final = "Rivers"
"""What is replied where nothing of the script fits, such as to a request for a title."""


@dataclass
class Record:
    """What the server did, in the order in which it did it."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    fed_tokens: int = 0

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self)), "utf-8")


class Script:
    """Chooses tokens."""

    def __init__(self, script: dict[str, list[str]], record: Record) -> None:
        self._script = script
        self._record = record
        self._replies: dict[bytes, bytes] = {}
        self._prompts: dict[bytes, dict[str, Any]] = {}
        self._ids: dict[bytes, int] = {}

    def use(self, tokenizer: Tokenizer) -> None:
        """Write with the tokens of a tokenizer from now on."""
        self._tokenizer = tokenizer
        self._bytes = tokenizer.vocabulary.token_bytes
        special = tokenizer.vocabulary.special_token_ids
        self._ids = {
            text: token
            for token, text in enumerate(self._bytes)
            if 0 < len(text) <= LONGEST and token not in special
        }
        (self._end,) = tokenizer.encode(END)

    def choose(
        self,
        logits: Any,
        params: Any,
        *,
        history: Any,
        reply_start: int,
        seed: int,
        allowed: Any = None,
        bias: Any = None,
    ) -> int:
        """Stand in for `sampling.choose_token`."""
        prompt, said = history[:reply_start], history[reply_start:].tolist()
        key = prompt.tobytes()
        if not said:
            self._replies[key] = self._reply_to(prompt.tolist()).encode()
            self._prompts[key] = {"tokens": self._texts(prompt.tolist()), "reply": []}
            self._record.prompts.append(self._prompts[key])
        rest = self._replies[key][sum(len(self._bytes[token]) for token in said) :]
        token = self._next(rest, len(said), allowed) if rest else self._end
        assert len(logits) > token, "the model knows the token"
        assert allowed is None or allowed[token], "the grammar lets the reply end"
        if token != self._end:  # which is not part of a reply
            self._prompts[key]["reply"] += self._texts([token])
        return token

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """Return the bytes of tokens, each as a character."""
        return [self._bytes[token].decode("latin-1") for token in ids]

    def _next(self, rest: bytes, number: int, allowed: Any) -> int:
        """Return a token that begins what is still to be said, and that the grammar allows."""
        most = PIECES[number % len(PIECES)]
        marks = [len(mark) for mark in MARKS if rest.startswith(mark.encode())]
        for length in (*marks, *range(most, 0, -1), *range(most + 1, LONGEST)):
            token = self._ids.get(rest[:length])
            if token is not None and (allowed is None or allowed[token]):
                return token
        raise AssertionError(f"the grammar allows no token that begins {rest[:40]!r}")

    def _reply_to(self, prompt: list[int]) -> str:
        text = self._tokenizer.decode(prompt, skip_special_tokens=False)
        marker = max(self._script, key=text.rfind)
        place = text.rfind(marker)
        if place < 0:
            return ASIDE
        number = text.count(GENERATION_PROMPT, place) - 1
        replies = self._script[marker]
        reply = replies[number] if 0 <= number < len(replies) else ASIDE
        return ASIDE if MARKS[0] in reply and "<tools>" not in text else reply


class CountingRuntime:
    """A runtime, and how many tokens it was fed."""

    def __init__(self, runtime: PagedRuntime, record: Record) -> None:
        self._runtime = runtime
        self._record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def forward(self, rows: Sequence[Row]) -> PassResult:
        # Guesses cost hardly anything beside the token before them; those that were right are not fed again.
        self._record.fed_tokens += sum(len(row.token_ids) - row.drafted for row in rows)
        return self._runtime.forward(rows)


class Recorder:
    """An ASGI middleware that notes requests and how they were answered."""

    def __init__(self, app: Any, record: Record) -> None:
        self._app = app
        self._record = record

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        noted: dict[str, Any] = {
            "method": scope["method"],
            "path": scope["path"],
            "headers": _texts(scope["headers"]),
            "status": None,
        }
        body, answer = bytearray(), bytearray()
        self._record.requests.append(noted)

        async def received() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                noted["status"] = message["status"]
                noted["answer_headers"] = _texts(message["headers"])
            answer.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            noted["body"] = body.decode()
            noted["answer"] = answer.decode()


def _texts(headers: Any) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def put_in_place(script: Script, record: Record) -> None:
    """Have the server use the script and the record, by the names that its modules show."""
    parts = formats.FORMATS["openvino"]

    def tokenizer(model: LocalModel) -> Tokenizer:
        made = parts.tokenizer(model)
        script.use(made)
        return made

    def runtime(model: LocalModel, options: formats.RunOptions) -> Any:
        return CountingRuntime(parts.runtime(model, options), record)

    wrapped = replace(parts, tokenizer=tokenizer, runtime=runtime)
    formats.FORMATS = MappingProxyType({**formats.FORMATS, "openvino": wrapped})  # type: ignore[misc]
    sampling.choose_token = script.choose
    create_app = server.create_app

    def create(*arguments: Any, **options: Any) -> Any:
        created = create_app(*arguments, **options)
        created.add_middleware(Recorder, record=record)
        return created

    server.create_app = create


def run(script_file: Path, record_file: Path, arguments: list[str]) -> None:
    """Serve until told to stop, then write the record."""
    record = Record()
    put_in_place(Script(json.loads(script_file.read_text("utf-8")), record), record)
    sys.argv = ["recollect", *arguments]
    try:
        main.run()
    finally:
        record.write(record_file)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
