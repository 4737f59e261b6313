"""
Which tokens a grammar allows next: compiled grammars, and where a reply stands in one.

Knows token ids; the grammars themselves are llguidance's. That compiles a JSON schema by calling itself
for each part and for each reference, in time that grows with the square of their number. A chain of a
thousand references, or a list of 40,000 required names, overflows a thread's stack, which ends the
process. So schemas are bounded before they are compiled.

What takes long is made while nobody waits: `Grammars.prepare` makes llguidance's table of tokens, from a
file where the tokens' bytes were found out before, and compiles the grammars that were used last.
"""

import contextlib
import importlib
import json
import struct
import threading
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Tokens
from hashlib import blake2b
from pathlib import Path
from sys import getsizeof
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from recollect import files
from recollect.errors import InvalidParameterError, MissingPackageError
from recollect.text.reasoning import ReasoningWatch
from recollect.text.tokenizer import Tokenizer, Vocabulary
from recollect.types import Grammar, Remembered, common_prefix_length

if TYPE_CHECKING:
    import llguidance


MOST_VALUES: Final = 4096
"""
Members of objects and items of lists in one schema: so many optional properties, the slowest kind,
take two seconds. OpenAI's API takes 5,000 properties and 1,000 values of enumerations.
"""
MOST_CHARACTERS: Final = 128 * 2**10
"""
In the names and texts of one schema: a regular expression of so many takes a third of a second, and
twice as many are more than llguidance takes. OpenAI's API takes 120,000.
"""
MOST_STEPS: Final = 1000
"""
Levels of lists and objects, those of each thing that is referred to added once: the longest way that
references can make. 1,400 fit into a thread's usual stack of 8 MiB, and 2,000 do not.
"""


def check_schema(schema: Any, what: str) -> None:
    """
    Check that a schema can be compiled in bounded time and stack.

    Args:
        schema: A JSON value.
        what: What it is, as the subject of a sentence.

    Raises:
        InvalidParameterError: It is larger than the bounds.
    """
    characters = 0
    targets: dict[str, None] = {}
    for values, (value, name) in enumerate(_inside(schema), start=1):
        characters += len(name) + (len(value) if isinstance(value, str) else 0)
        if name == "$ref" and isinstance(value, str):
            targets[value] = None
        if values > MOST_VALUES:
            raise InvalidParameterError(
                f"{what} has more than {MOST_VALUES:,} names and values: make it smaller.",
                param="grammar",
            )
        if characters > MOST_CHARACTERS:
            raise InvalidParameterError(
                f"{what} has more than {MOST_CHARACTERS:,} characters: make it smaller.",
                param="grammar",
            )
    steps = _depth(schema)
    for target in targets:
        steps += _depth(_referred(schema, target))
        if steps > MOST_STEPS:
            raise InvalidParameterError(
                f"{what} has more than {MOST_STEPS:,} levels, where what is referred to counts "
                "with it: use fewer references.",
                param="grammar",
            )


def _inside(value: Any) -> Iterator[tuple[Any, str]]:
    """Yield each value inside another, with its name; the name of an item is empty."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        members: Any = ()
        if isinstance(inner, dict):
            members = ((one, name) for name, one in inner.items())
        elif isinstance(inner, list):
            members = ((one, "") for one in inner)
        for one, name in members:
            yield one, name
            if isinstance(one, dict | list):
                waiting.append(one)


def _depth(value: Any) -> int:
    """Return how many lists and objects are in each other; a value that is neither is one level."""
    depth, level = 1, [value]
    while level := [
        inner
        for one in level
        if isinstance(one, dict | list)
        for inner in (one.values() if isinstance(one, dict) else one)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
    return depth


def _referred(schema: Any, target: str) -> Any:
    """Return what a reference leads to; the whole schema where that cannot be said."""
    if not target.startswith("#/"):
        return schema  # the schema itself, or a name that stands anywhere in it
    found = schema
    for part in target[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name[:6]) < len(found):
            found = found[int(name[:6])]
        else:
            return schema
    return found


Mask = npt.NDArray[np.bool_]

MOST_COMPILED_BYTES: Final = 64 << 20
"""
Of compiled grammars that are kept: a client sends the same few schemas again and again.

A hundred of a hundred fields, each of which takes half a megabyte.
"""

_GRAMMAR_BYTES: Final = 200 << 10
_BYTES_PER_CHARACTER: Final = 120
"""What a compiled grammar takes, and more for each character of its source. Source: JSON schemas of
10 to 1,000 fields took 0.17, 0.56 and 4.2 MB where their texts have 359, 3,374 and 34,424 characters."""

MOST_REFUSED_BYTES: Final = 1 << 20
"""Of what was wrong with grammars that cannot be used, a thousand at least: a client whose tool has such
a schema sends it with every request, and to find that out can take seconds."""
_MOST_TOLD: Final = 1000
"""Characters of a reason: it quotes what a client sent."""

JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""
How JSON is written: on one line, as Python's `json` does.

Models see it so in their templates; and small ones fall into endless white space where it is free.
"""


_MOST_REMEMBERED: Final = 16
"""Grammars that are compiled again after a restart: those of a few clients, each with its tools."""
_MOST_REMEMBERED_CHARACTERS: Final = 1 << 20
"""In these; the tools of Claude Code, the largest that were seen, make 40,000."""

VOCABULARIES: Final = "vocabularies"
"""Folder of the bytes of tokens, by the fingerprint of their model; derived, and nothing that was said."""
_MOST_VOCABULARIES: Final = 16
"""Files in it, a few megabytes each."""
_MOST_VOCABULARY_BYTES: Final = 64 << 20


class GrammarNotes:
    """Where the grammars that were used last are noted for another time. This one forgets them."""

    def read(self) -> str | None:
        """Return what was noted last; None where nothing was."""
        return None

    def write(self, text: str) -> None:
        """Note a text in the place of the one before."""


class Grammars:
    """
    Grammars over one tokenizer's tokens.

    Safe from any thread. llguidance is imported, and its table of tokens made, by `prepare` or when the
    first grammar is used: 2 s for a vocabulary of 151,936, the half of it for the bytes of its tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        home: Path | None = None,
        fingerprint: str = "",
        notes: GrammarNotes | None = None,
    ) -> None:
        """
        Hold what is compiled.

        Args:
            tokenizer: Of the model.
            vocab_size: Of the model; may be more than the tokenizer's.
            home: Where the bytes of tokens are kept in a file; None: nowhere.
            fingerprint: Of the model, the tokenizer among it.
            notes: Where the grammars that were used last are noted; None: nowhere.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._home = home
        self._fingerprint = fingerprint
        self._notes = notes or GrammarNotes()
        self._tokens: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self.held_bytes = 0
        """That the compiled grammars which are kept take, as estimated."""
        self.made = 0
        """Tables and grammars that were made, or tried in vain, ever."""
        self.refused: Final = Remembered[str](getsizeof, MOST_REFUSED_BYTES)
        """What was wrong with grammars, by a hash of each."""
        self._lock = threading.Lock()
        self._preparing: threading.Thread | None = None
        self._is_closing = False

    def prepare_later(self) -> None:
        """Have `prepare` done on a thread of its own; again is nothing."""
        with self._lock:
            if self._preparing is None and not self._is_closing:
                self._preparing = threading.Thread(
                    target=self.prepare, name="recollect-grammars", daemon=True
                )
                self._preparing.start()

    def prepare(self) -> None:
        """Make the table of tokens, and compile the grammars of last time, unless that was done."""
        try:
            library = _llguidance()
        except MissingPackageError:
            return  # whoever uses a grammar is told
        with self._lock:
            if not self._is_closing:
                self._table(library)
        for grammar in _noted(self._notes.read()):
            with self._lock, contextlib.suppress(InvalidParameterError):
                if not self._is_closing:
                    self._matcher(grammar)

    def join(self) -> None:
        """Wait for the end of what `prepare_later` began."""
        if self._preparing is not None:
            self._preparing.join()

    def close(self) -> None:
        """End what is prepared, and wait for that."""
        with self._lock:
            self._is_closing = True
        self.join()

    def start(self, grammar: Grammar) -> "GrammarState":
        """
        Return the state at the beginning of a reply.

        Raises:
            InvalidParameterError: The grammar is not valid; the message says what is wrong.
            MissingPackageError: llguidance is not installed.
        """
        with self._lock:
            is_new = grammar not in self._compiled
            state = GrammarState(self._matcher(grammar).deep_copy(), self._vocab_size)
            used = list(self._compiled)[-_MOST_REMEMBERED:]
        if is_new:
            self._notes.write(_note(used))
        return state

    def _matcher(self, grammar: Grammar) -> "llguidance.LLMatcher":
        matcher = self._compiled.get(grammar)
        if matcher is None:
            source = f"{grammar.kind}:{grammar.source}".encode(errors="surrogatepass")
            name = blake2b(source, digest_size=16).digest()
            if (known := self.refused.get(name)) is not None:
                raise InvalidParameterError(known, param="grammar")
            self.made += 1
            try:
                matcher = self._compile(grammar)
            except InvalidParameterError as error:
                self.refused.put(name, str(error)[:_MOST_TOLD])
                raise
            self._compiled[grammar] = matcher
            self.held_bytes += _compiled_size(grammar)
        self._compiled.move_to_end(grammar)
        while self.held_bytes > MOST_COMPILED_BYTES:
            forgotten, _ = self._compiled.popitem(last=False)
            self.held_bytes -= _compiled_size(forgotten)
        return matcher

    def _compile(self, grammar: Grammar) -> "llguidance.LLMatcher":
        library = _llguidance()
        make = library.LLMatcher
        if grammar.kind == "json_schema":
            check_schema(json.loads(grammar.source), "The JSON schema")
        try:
            if grammar.kind == "regex":
                source = make.grammar_from_regex(grammar.source)
            elif grammar.kind == "lark":
                source = make.grammar_from_lark(grammar.source)
            else:
                source = make.grammar_from_json_schema(grammar.source, JSON_STYLE)
        except ValueError as cause:  # such as a schema that is too deep
            raise _unusable(grammar, str(cause)) from cause
        matcher: llguidance.LLMatcher = make(self._table(library), source, log_level=0)
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # such as a schema that is itself and nothing else
            raise _unusable(
                grammar, f"nothing can begin by it, or it is too complex: {first.stop_reason()}"
            )
        return matcher

    def _table(self, library: ModuleType) -> "llguidance.LLTokenizer":
        if self._tokens is None:
            self.made += 1
            self._tokens = library.LLTokenizer(
                library.TokenizerWrapper(_Wrapped(self._tokenizer, self._vocabulary())),
                n_vocab=self._vocab_size,
                eos_token=sorted(self._tokenizer.eos_token_ids),
            )
        return self._tokens

    def _vocabulary(self) -> Vocabulary:
        """Return the bytes of the tokens, from the file of another time where there is one."""
        if self._home is None:
            return self._tokenizer.vocabulary
        path = self._home / VOCABULARIES / f"{self._fingerprint[:32]}.bin"
        size = self._tokenizer.vocab_size
        with contextlib.suppress(OSError):
            known = _unpacked(files.read_bytes(path, most_bytes=_MOST_VOCABULARY_BYTES))
            if known is not None and len(known.token_bytes) == size:
                return known
        vocabulary = self._tokenizer.vocabulary
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        # Without the file the bytes are found out again next time, which is slow but right.
        with contextlib.suppress(OSError):
            files.make_private(path.parent, self._home)
            temporary.write_bytes(_packed(vocabulary))
            temporary.replace(path)
            files.keep_newest(path.parent, _MOST_VOCABULARIES)
        return vocabulary


def _note(grammars: list[Grammar]) -> str:
    """Return grammars, the last used last, as a text; the older ones only where they are short."""
    noted: list[list[str]] = []
    left = _MOST_REMEMBERED_CHARACTERS
    for grammar in reversed(grammars):
        left -= len(grammar.source)
        if left < 0:
            break
        noted.append([grammar.kind, grammar.source])
    return json.dumps(noted[::-1])


def _noted(text: str | None) -> list[Grammar]:
    """Return the grammars of a note; what is none is left out."""
    try:
        noted = [] if text is None else json.loads(text)
        return [Grammar(kind, source) for kind, source in noted]
    except (ValueError, TypeError):
        return []


_HEAD: Final = struct.Struct("<8s16sII")
_MAGIC: Final = b"rcvocab1"


def _packed(vocabulary: Vocabulary) -> bytes:
    """Return a vocabulary as a file has it: a head with a checksum, lengths, ids, and the bytes."""
    special = sorted(vocabulary.special_token_ids)
    lengths = np.array([len(one) for one in vocabulary.token_bytes], "<u4")
    body = lengths.tobytes() + np.array(special, "<u4").tobytes() + b"".join(vocabulary.token_bytes)
    checksum = blake2b(body, digest_size=16).digest()
    return _HEAD.pack(_MAGIC, checksum, len(lengths), len(special)) + body


def _unpacked(data: bytes) -> Vocabulary | None:
    """Return the vocabulary in a file; None where it is not as it was written."""
    if len(data) < _HEAD.size:
        return None
    magic, checksum, count, specials = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or blake2b(body, digest_size=16).digest() != checksum:
        return None
    numbers = np.frombuffer(body[: 4 * (count + specials)], "<u4").tolist()
    place, token_bytes = 4 * (count + specials), []
    for length in numbers[:count]:
        token_bytes.append(body[place : place + length])
        place += length
    return Vocabulary(tuple(token_bytes), frozenset(numbers[count:]))


def _compiled_size(grammar: Grammar) -> int:
    return _GRAMMAR_BYTES + _BYTES_PER_CHARACTER * len(grammar.source)


class GrammarState:
    """
    Where a reply stands in its grammar.

    Derived from the reply's tokens, which are given anew with each question: what of them it has
    seen stays, what differs is rolled back. So a rewind, another choice or a fork needs no word to
    it. Used from one thread at a time.

    Invariants:
        1. The matcher has consumed exactly `_seen`.
    """

    def __init__(
        self, matcher: "llguidance.LLMatcher", vocab_size: int, seen: Tokens[int] = ()
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._seen = list(seen)
        self._reasoning: ReasoningWatch | None = None
        self._ends: Collection[int] = ()

    def begin_behind(self, reasoning: ReasoningWatch, ends: Collection[int]) -> None:
        """
        Let the grammar be about the answer alone, behind what the model thinks.

        Args:
            reasoning: Follows the same reply.
            ends: The tokens that end a reply; none does while it thinks.
        """
        self._reasoning, self._ends = reasoning, ends

    def allowed(self, reply: list[int]) -> Mask:
        """
        Return which tokens may follow the reply, `(vocab_size,)`.

        End of sequence is among them exactly where the reply is a sentence of the grammar.

        Raises:
            InvalidParameterError: The reply is no beginning of one.
                Or the grammar is too complex at this place, or allows nothing there.
        """
        start = self.start_in(reply)
        if start is None:
            thinking = np.ones(self._vocab_size, np.bool_)
            thinking[list(self._ends)] = False
            return thinking
        self._follow(reply[start:])
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._too_complex()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if (opening := self.opening(reply)) is not None:
            mask[opening] = True
        return mask

    def opening(self, reply: Tokens[int]) -> int | None:
        """Return the token that opens reasoning where the grammar would begin; None: none may."""
        return None if reply or self._reasoning is None else self._reasoning.opening

    def forced(self, reply: list[int]) -> list[int]:
        """
        Return the tokens of the text that has to follow the reply, as the tokenizer cuts it; perhaps none.

        Other tokens may say the same text, so that they are a guess all the same.
        """
        start = self.start_in(reply)
        if start is None or self.opening(reply) is not None:
            return []
        self._follow(reply[start:])
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def is_finished(self, reply: list[int]) -> bool:
        """Return whether nothing but the end may follow the reply."""
        start = self.start_in(reply)
        if start is None:
            return False
        self._follow(reply[start:])
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def copy(self) -> "GrammarState":
        """Return a second state at the same place; 10 microseconds, whatever the grammar."""
        other = GrammarState(self._matcher.deep_copy(), self._vocab_size, self._seen)
        if self._reasoning is not None:
            other.begin_behind(self._reasoning.copy(), self._ends)
        return other

    def start_in(self, reply: list[int]) -> int | None:
        """Return where in the reply the grammar begins; None while the model thinks."""
        return 0 if self._reasoning is None else self._reasoning.answer_start(reply)

    def _too_complex(self) -> InvalidParameterError:
        return InvalidParameterError(
            f"The grammar cannot be followed here ({self._matcher.stop_reason()}): simplify it.",
            param="grammar",
        )

    def _follow(self, reply: list[int]) -> None:
        if reply[: len(self._seen)] != self._seen:
            same = common_prefix_length(self._seen, reply)
            self._matcher.rollback(len(self._seen) - same)
            del self._seen[same:]
        new = reply[len(self._seen) :]
        if new:
            taken = self._matcher.try_consume_tokens(new)
            self._seen += new[:taken]
            if self._matcher.is_error():
                raise self._too_complex()
            if taken < len(new):
                raise InvalidParameterError(
                    f"Token {len(self._seen)} of the reply does not fit the grammar: "
                    "begin a new reply, or rewind to before it."
                )


def _unusable(grammar: Grammar, reason: str) -> InvalidParameterError:
    what = grammar.kind.replace("_", " ")
    if reason.startswith("panic"):  # with a trace of this machine's own code behind it
        reason = "it has more parts than can be followed"
    # A reason may come over several lines, the last of which says what it is.
    why = " ".join(reason.split()).rstrip(".")
    told = f"The {what} cannot be used as a grammar ({why}): correct it."
    return InvalidParameterError(told, param="grammar")


class _Wrapped:
    """A tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._encode = tokenizer.encode
        self.tokens = vocabulary.token_bytes
        self.special_token_ids = sorted(vocabulary.special_token_ids)
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _llguidance() -> ModuleType:
    try:
        return importlib.import_module("llguidance")
    except ImportError as cause:
        raise MissingPackageError(
            "Grammars, JSON schemas and tools need llguidance: "
            'install it with `python -m pip install "recollect-llm[grammar]"`.'
        ) from cause
