"""A reply's text, its tokens in the history and its usage say the same, wherever it ends."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.engine.engine import Engine
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import RuntimeFailure
from recollect.runtime.base import Pace, PassResult, ReferenceRuntime, Row
from recollect.text.tokenizer import ControlTokens, Vocabulary
from recollect.types import SamplingParams

END = 16


class Pieces:
    """A tokenizer whose tokens are pieces of any bytes: letters, words, halves of characters."""

    PIECES: Final = (
        b"a", b"b", b"c", b"ab", b"bc", b"abc", b"cab", b" ", b"a\xc3", b"\xa9b", b"\xc3", b"\xa9",
        b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\xef\xbf\xbd", b"",
    )  # fmt: skip
    eos_token_ids: Final = frozenset({END})
    control_tokens: Final = ControlTokens({})

    @property
    def vocab_size(self) -> int:
        return len(self.PIECES)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.PIECES, frozenset({END}))

    def added_text(self, token_id: int) -> str | None:
        piece = self.PIECES[token_id] if token_id != END else b""
        is_whole = piece.decode("utf-8", "ignore").encode() == piece
        return piece.decode() if piece and is_whole else None

    def encode(self, text: str) -> list[int]:
        rest, ids = text.encode("utf-8", "replace"), []
        while rest:
            fitting = [i for i, piece in enumerate(self.PIECES) if piece and rest.startswith(piece)]
            if not fitting:
                rest = rest[1:]
                continue
            best = max(fitting, key=lambda i: len(self.PIECES[i]))
            ids.append(best)
            rest = rest[len(self.PIECES[best]) :]
        return ids

    def encode_text(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(self.PIECES[i] for i in ids).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


class Script(ReferenceRuntime):
    """A reference runtime whose logits after position `n` favour the n-th token of a script."""

    def __init__(self, script: Sequence[int], prompt: int, *, context_length: int = 64) -> None:
        super().__init__(vocab_size=len(Pieces.PIECES), context_length=context_length, block_size=4)
        self.script = list(script)
        self._prompt = prompt

    def forward(self, rows: Sequence[Row]) -> PassResult:
        result = super().forward(rows)
        logits = result.logits.copy()
        for place, row in enumerate(row for row in rows if row.wants_logits):
            said = row.past + len(row.token_ids) - self._prompt
            logits[place, self.script[said] if 0 <= said < len(self.script) else END] = 1000
        return replace(result, logits=logits)


PROMPT = [0, 1, 2, 3, 4, 5]


def reply_to(
    script: Sequence[int], params: SamplingParams | None = None
) -> tuple[Engine, Generator, ReplyGeneration]:
    engine = Engine(Script(script, len(PROMPT)), num_blocks=32, eos_token_ids=[END])
    generator = Generator(engine, params)
    generator.append_tokens(PROMPT)
    return engine, generator, started(ReplyGeneration(engine, generator, Pieces()))


def started(reply: ReplyGeneration) -> ReplyGeneration:
    reply.start()
    return reply


def ids(text: str) -> list[int]:
    return Pieces().encode(text)


def whole_characters(ids: Sequence[int]) -> str:
    """
    Return the text of tokens without the signs for a character's first bytes, at most three, at its end.

    A sign that a token says is told where there is text before it and nothing waits for its rest.
    """
    told, waiting = "", list[int]()
    for token in ids:
        says_all = bool(told) and not waiting and Pieces().added_text(token) is not None
        waiting.append(token)
        text = Pieces().decode(waiting)
        if says_all or (text and not text.endswith("\ufffd")):
            told, waiting = told + text, []
    rest = Pieces().decode(waiting)
    return told + rest[:-3] + rest[-3:].rstrip("\ufffd")


def verify(engine: Engine, generator: Generator, reply: ReplyGeneration) -> None:
    """The history ends with the reply's tokens, those are its text, and the KV is theirs."""
    reply.finish()
    assert generator.get_sequence()[: len(PROMPT)] == PROMPT
    assert generator.get_sequence()[len(PROMPT) :] == reply.token_ids
    text = Pieces().decode(reply.token_ids)
    # The part of a character in which a reply was cut is among its tokens, and not told.
    is_cut = reply.finish_reason != "stop"
    assert reply.text == text or (is_cut and reply.text == whole_characters(reply.token_ids))
    engine.check()
    probe: TokenSequence = generator.sequence.fork()
    engine.compute([probe])
    assert isinstance(engine.runtime, Script)
    fresh = Script(engine.runtime.script, len(PROMPT))
    fresh.allocate(32)
    expected = fresh.forward([Row(probe.token_ids, 0, range(32))]).logits[0]
    assert probe.logits is not None
    assert np.array_equal(probe.logits, expected)
    probe.release()


def test_the_pieces_are_the_text_of_the_tokens() -> None:
    script = [8, 9, 3, 7, 10, 11, 12, 13]
    engine, generator, reply = reply_to(script)
    pieces = list(reply)
    assert "".join(pieces) == reply.text == "aéb" + "ab" + " " + "é" + "€"
    assert all(pieces)
    assert reply.token_ids == script
    assert (reply.finish_reason, reply.generated_tokens) == ("stop", 8)
    verify(engine, generator, reply)


def test_a_reply_that_ends_inside_a_character_gives_out_the_replacement() -> None:
    engine, generator, reply = reply_to([0, 12])
    assert "".join(reply) == reply.text == "a\ufffd"
    verify(engine, generator, reply)


@pytest.mark.parametrize(
    ("script", "stop", "text", "tokens"),
    [
        ([0, 1, 2, 0], ("bc",), "a", [0]),
        ([0, 1, 2, 0], ("b",), "a", [0]),
        ([0, 4, 0], ("b",), "a", [0]),
        ([5, 5], ("b",), "a", [0]),  # "abc" is cut inside and its "a" encoded again
        ([5, 6], ("cc",), "ab", [3]),
        ([3, 3, 3], ("aba",), "", []),
        ([0, 1, 0, 2], ("bab", "ac"), "ab", [0, 1]),
        ([8, 9, 2], ("b",), "aé", [8, 11]),
        ([8, 9, 2], ("é",), "a", [0]),
        ([12, 13, 0], ("€a",), "", []),
        ([0, 7, 1], (" ",), "a", [0]),
    ],
)
def test_a_stop_string_ends_the_reply_before_it_also_inside_and_across_tokens(
    script: list[int], stop: tuple[str, ...], text: str, tokens: list[int]
) -> None:
    engine, generator, reply = reply_to(script, SamplingParams(stop=stop))
    assert "".join(reply) == reply.text == text
    assert reply.finish_reason == "stop"
    assert reply.generated_tokens >= len(tokens)
    reply.finish()
    if "é" not in text:
        assert reply.token_ids == tokens
    verify(engine, generator, reply)


def test_what_was_held_back_for_a_stop_string_that_never_came_is_given_out() -> None:
    engine, generator, reply = reply_to([0, 1], SamplingParams(stop=("abc",)))
    assert "".join(reply) == reply.text == "ab"
    verify(engine, generator, reply)


@pytest.mark.parametrize("limit", range(1, 7))
def test_max_tokens_ends_a_reply_with_everything_given_out(limit: int) -> None:
    script = [0, 12, 13, 8, 9, 1, 2]
    engine, generator, reply = reply_to(script, SamplingParams(max_tokens=limit, stop=("abc",)))
    assert "".join(reply) == reply.text == whole_characters(script[:limit])
    assert reply.token_ids == script[:limit]
    assert (reply.finish_reason, reply.generated_tokens) == ("length", limit)
    verify(engine, generator, reply)


SCRIPTS = st.lists(st.integers(0, END - 1), max_size=12)
STOPS = st.lists(st.text("abcé€ \ufffd", min_size=1, max_size=3), max_size=3).map(tuple)


@given(
    SCRIPTS,
    STOPS,
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(0, 12)),
)
def test_text_and_tokens_agree_for_any_reply_stop_strings_limit_and_stopping_place(
    script: list[int], stop: tuple[str, ...], limit: int | None, stop_after: int | None
) -> None:
    engine, generator, reply = reply_to(script, SamplingParams(stop=stop, max_tokens=limit))
    if stop_after == 0:
        reply.stop()
    out = []
    for number, piece in enumerate(reply, 1):
        out.append(piece)
        if number == stop_after:
            reply.stop()
    assert "".join(out) == reply.text
    assert not any(s in reply.text for s in stop)
    verify(engine, generator, reply)


async def read_on_loop(reply: ReplyGeneration, leave_after: int | None = None) -> list[str]:
    """Return the pieces that an event loop reads, all of them or the first few."""
    out = []
    async for piece in reply:
        out.append(piece)
        if len(out) == leave_after:
            break
    return out


@given(SCRIPTS, STOPS, st.one_of(st.none(), st.integers(1, 12)))
def test_an_event_loop_reads_what_a_thread_reads(
    script: list[int], stop: tuple[str, ...], leave_after: int | None
) -> None:
    engine, generator, reply = reply_to(script, SamplingParams(stop=stop))
    _, _, other = reply_to(script, SamplingParams(stop=stop))
    whole = list(other)
    assert asyncio.run(read_on_loop(reply, leave_after)) == whole[:leave_after]
    verify(engine, generator, reply)


def test_one_event_loop_reads_many_replies_at_once() -> None:
    replies = [reply_to([0, 1, 2] * 4)[2] for _ in range(5)]

    async def read_all() -> list[list[str]]:
        return await asyncio.gather(*map(read_on_loop, replies))

    assert asyncio.run(read_all()) == [list("abc" * 4)] * 5


def test_an_event_loop_is_told_what_the_engine_failed_with() -> None:
    class Broken(Script):
        def forward(self, rows: Sequence[Row]) -> PassResult:
            raise RuntimeFailure("injected")

    engine = Engine(Broken([0], len(PROMPT)), num_blocks=32)
    generator = Generator(engine)
    generator.append_tokens(PROMPT)
    reply = started(ReplyGeneration(engine, generator, Pieces()))
    with pytest.raises(RuntimeFailure, match="injected"):
        asyncio.run(read_on_loop(reply))


@given(SCRIPTS, STOPS, st.integers(0, 12))
def test_text_and_tokens_agree_when_the_loop_is_left(
    script: list[int], stop: tuple[str, ...], leave_after: int
) -> None:
    engine, generator, reply = reply_to(script, SamplingParams(stop=stop))
    pieces = iter(reply)
    out = [piece for _, piece in zip(range(leave_after), pieces, strict=False)]
    reply.finish()
    reply.finish()
    assert reply.text.startswith("".join(out))
    assert reply.finish_reason is not None
    verify(engine, generator, reply)


def test_a_cut_token_that_takes_more_tokens_still_fits_a_full_context() -> None:
    """The last token of the context reaches across the stop string, and its rest is two tokens."""
    script = [7] * (64 - len(PROMPT) - 1) + [6]
    engine = Engine(Script(script, len(PROMPT)), num_blocks=32, eos_token_ids=[END])

    class Letters(Pieces):
        """Encodes letter by letter, so that what is cut takes more tokens than it took."""

        def encode(self, text: str) -> list[int]:
            return ["abc".index(letter) if letter in "abc" else 7 for letter in text]

    generator = Generator(engine, SamplingParams(stop=("b",)))
    generator.append_tokens(PROMPT)
    reply = started(ReplyGeneration(engine, generator, Letters()))
    text = "".join(reply)
    reply.finish()
    assert reply.finish_reason == "stop"
    assert text.endswith(" ca")
    engine.check()
    assert len(generator.get_sequence()) <= 64


def test_stopping_before_the_first_pass_computes_nothing() -> None:
    engine = Engine(Script([0, 1], len(PROMPT)), num_blocks=32, eos_token_ids=[END])
    generator = Generator(engine)
    generator.append_tokens(PROMPT)
    reply = ReplyGeneration(engine, generator, Pieces())
    reply.stop()
    reply.start()
    assert list(reply) == []
    assert (reply.finish_reason, reply.generated_tokens) == ("cancelled", 0)
    assert engine.forward_passes == 0
    verify(engine, generator, reply)


@pytest.mark.parametrize("pace", [Pace(prefill_chunk=12)], ids=[""])
def test_a_long_prompt_can_be_cancelled_between_its_chunks(
    make_engine: Callable[..., Engine], tokenizer: Any
) -> None:
    engine = make_engine(vocab_size=259)
    generator = Generator(engine)
    generator.append_tokens([1] * 100)
    reply = ReplyGeneration(engine, generator, tokenizer)
    runtime: Any = engine.runtime
    forward, seen = runtime.forward, []

    def forward_then_stop(rows: Sequence[Row]) -> PassResult:
        result: PassResult = forward(rows)
        seen.append(reply.prefill_progress[0])
        if len(seen) == 3:
            reply.stop()
        return result

    runtime.forward = forward_then_stop
    reply.start()
    assert list(reply) == []
    assert seen == [0, 12, 24]
    assert (reply.finish_reason, reply.prefill_progress[1]) == ("cancelled", 100)
    assert engine.warm_tokens([1] * 100) == 36
    engine.check()


def test_a_reply_that_was_read_gives_nothing_more() -> None:
    """Reading it again, or after the end, waits for nobody."""
    engine, generator, reply = reply_to([0, 1, 2])
    assert len(list(reply)) == 3
    assert list(reply) == []
    reply.finish()
    assert list(reply) == []
    _, _, other = reply_to([0, 1, 2])
    pieces = iter(other)
    assert next(pieces) == "a"
    other.finish()
    assert list(other) == []
    assert other.text == "a"
    verify(engine, generator, reply)


def test_leaving_takes_back_what_was_generated_and_not_given_out() -> None:
    engine, generator, reply = reply_to([0, 1, 2, 0, 1, 2])
    pieces = iter(reply)
    assert (next(pieces), next(pieces)) == ("a", "b")
    for task in engine.tasks():
        task.join()  # the engine is far ahead of the reader
    assert len(generator.sequence) == len(PROMPT) + 6
    reply.finish()
    assert (reply.token_ids, reply.text, reply.finish_reason) == ([0, 1], "ab", "cancelled")
    assert reply.generated_tokens == 6
    verify(engine, generator, reply)


def test_a_reply_holds_no_blocks_once_it_has_ended_however_late_it_is_read() -> None:
    engine, generator, reply = reply_to([0, 1, 2])
    for task in engine.tasks():
        task.join()
    assert engine.cache.evictable_blocks == engine.pool.used_blocks == 3
    assert "".join(reply) == "abc"
    verify(engine, generator, reply)


def test_a_tokenizer_that_fails_ends_its_own_reply_only() -> None:
    class Broken(Pieces):
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            raise ZeroDivisionError

    engine, _, good = reply_to([0, 1, 2])
    generator = Generator(engine)
    generator.append_tokens(PROMPT)
    bad = started(ReplyGeneration(engine, generator, Broken()))
    with pytest.raises(ZeroDivisionError):
        list(bad)
    assert "".join(good) == "abc"
    engine.check()


def test_usage_adds_up_for_a_first_and_a_later_reply() -> None:
    engine, generator, reply = reply_to([0, 1, 2])
    list(reply)
    usage = reply.usage()
    assert (usage.prompt_tokens, usage.reused_tokens, usage.computed_tokens) == (6, 0, 6)
    assert usage.generated_tokens == 3
    assert usage.ttft_s > 0
    generator.append_tokens([1, 2])
    later = started(ReplyGeneration(engine, generator, Pieces()))
    list(later)
    usage = later.usage()
    # Three tokens of the reply went through a pass, the last of them for the end of sequence.
    assert (usage.prompt_tokens, usage.reused_tokens, usage.computed_tokens) == (11, 9, 2)


def test_usage_after_a_rewind_to_a_prompt_that_was_read_counts_no_token() -> None:
    engine, generator, reply = reply_to([0, 1, 2])
    list(reply)
    generator.rewind_to(len(PROMPT))
    again = started(ReplyGeneration(engine, generator, Pieces()))
    list(again)
    usage = again.usage()
    assert (usage.prompt_tokens, usage.reused_tokens, usage.computed_tokens) == (6, 6, 0)


def test_usage_of_a_reply_of_one_token_has_no_decode_rate() -> None:
    _, _, reply = reply_to([0], SamplingParams(max_tokens=1))
    list(reply)
    assert reply.usage().decode_tps is None
    assert reply.usage().prefill_tps is not None


def test_an_error_in_the_middle_keeps_text_and_tokens_in_step() -> None:
    engine = Engine(Script([0, 1, 12, 13], len(PROMPT)), num_blocks=32, eos_token_ids=[END])
    generator = Generator(engine)
    generator.append_tokens(PROMPT)
    reply = ReplyGeneration(engine, generator, Pieces())
    runtime: Any = engine.runtime
    forward, passes = runtime.forward, []

    def failing(rows: Sequence[Row]) -> PassResult:
        passes.append(rows)
        if len(passes) == 4:
            raise RuntimeFailure("injected")
        result: PassResult = forward(rows)
        return result

    runtime.forward = failing
    reply.start()
    with pytest.raises(RuntimeFailure):
        list(reply)
    reply.finish()
    assert reply.finish_reason == "cancelled"
    assert reply.text == "ab"
    assert reply.token_ids == [0, 1, 12]
    verify(engine, generator, reply)


def test_between_two_passes_no_token_is_decoded_whose_text_is_known() -> None:
    """Other sequences wait meanwhile: texts of whole characters are asked for, not decoded."""
    decoded: list[str] = []

    class Counting(Pieces):
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            decoded.append(threading.current_thread().name)
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    engine = Engine(Script([0, 1, 2] * 10, len(PROMPT)), num_blocks=32, eos_token_ids=[END])
    generator = Generator(engine)
    generator.append_tokens(PROMPT)
    assert "".join(started(ReplyGeneration(engine, generator, Counting()))) == "abc" * 10
    assert "recollect" not in decoded
    engine.close()


@pytest.mark.parametrize("stop", [(), ("c",)])
def test_taking_back_what_was_not_given_out_decodes_nothing_again(stop: tuple[str, ...]) -> None:
    """However many tokens that is; each decoding would be of the whole reply."""
    decoded: list[int] = []

    class Counting(Pieces):
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            decoded.append(len(ids))
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    script = [8, 9] * 20 + [2] + [8, 9] * 5
    engine = Engine(Script(script, len(PROMPT)), num_blocks=32, eos_token_ids=[END])
    generator = Generator(engine, SamplingParams(stop=stop))
    generator.append_tokens(PROMPT)
    reply = started(ReplyGeneration(engine, generator, Counting()))
    if stop:
        list(reply)
    else:
        next(iter(reply))
    for task in engine.tasks():
        task.join()
    decoded.clear()
    reply.finish()
    assert decoded == []
    verify(engine, generator, reply)


CYCLE = [0, 1, 2] * 500


def repeating(params: SamplingParams | None = None) -> tuple[Engine, Generator]:
    """Return an engine and a generator whose model says three tokens again and again, 1,500 of them."""
    script = Script(CYCLE, len(PROMPT), context_length=2048)
    engine = Engine(script, num_blocks=512, eos_token_ids=[END])
    generator = Generator(engine, params)
    generator.append_tokens(PROMPT)
    return engine, generator


def test_a_reply_that_only_repeats_itself_is_ended() -> None:
    """It is cut like one that was too long, says why, and its text is what was generated."""
    engine, generator = repeating()
    with started(ReplyGeneration(engine, generator, Pieces())) as generation:
        text = "".join(generation)
    reply = generation.reply
    assert reply is not None
    assert (reply.finish_reason, reply.ended) == ("length", "repetition")
    assert 288 < reply.usage.generated_tokens < 300
    assert text == reply.text == Pieces().decode(CYCLE[: reply.usage.generated_tokens])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(end_repetition=False), SamplingParams(ignore_eos=True, max_tokens=1500)],
)
def test_whoever_wants_repetition_gets_it(params: SamplingParams) -> None:
    """A measurement of a fixed length goes on, and so does a reply that may repeat."""
    engine, generator = repeating(params)
    with started(ReplyGeneration(engine, generator, Pieces())) as generation:
        for _ in generation:
            pass
    assert generation.generated_tokens >= 1500
    assert not generation.ran_away


@pytest.mark.slow
def test_a_generator_goes_on_through_repetition() -> None:
    """Its caller decides about each token."""
    _, generator = repeating()
    for _ in range(1400):
        generator.generate_next_token()
    assert not generator.is_done()
