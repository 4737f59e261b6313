"""
Check that the model that runs is the model in its file, and that what is reused is right.

The model against its file: the same tokens go through the runtime, as prompts and one at a time, and
through a reference that reads the file by itself; the logits are compared place by place. This sees what
comparing reuse with our own fresh prefill cannot: wrong weights, wrong RoPE, a norm that is missing.

Reuse: random conversations are held on the engine: append, generate, stop in the middle, rewind, fork,
regenerate, several sequences in one pass and, where KV is kept on disk, all of it forgotten in memory
and read back. After each operation the logits of the next token are compared with those of a fresh
prefill of the same token ids in other blocks. Then the same is done at the lengths where a model
computes differently from there on: its window, the context that it was trained on first, and the end of
its context. Nothing here looks at how reuse is done; only at what comes out of it.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Final

import numpy as np

from recollect.conversation.model import Model
from recollect.engine.sampling import Generator
from recollect.engine.sequence import Sequence
from recollect.errors import ConfigError
from recollect.kv.blocks import blocks_for
from recollect.models.catalog import LocalModel
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.openvino_reference import open_openvino
from recollect.proof.reference_model import (
    USUAL_DEVIATION,
    Array,
    Judgement,
    NotCompared,
    judge,
    logits_and_noise,
)
from recollect.runtime.base import Logits
from recollect.types import Profile, SamplingParams

EXACT_LIMIT: Final = 1e-3
"""A fault moves logits by 0.1 to 10; f32 arithmetic in another order by less than 1e-4."""

NOISE_ALLOWANCE: Final = 2.0
"""Outside `exact` the limit is this times the noise control: the largest of hundreds of differences
against the largest of a few."""

NOISE_CAP: Final[dict[Profile, float]] = {"exact": EXACT_LIMIT, "fast": 2.0, "small": 2.5}
"""What noise may excuse at most, whatever it is: a noise control that has a fault, too, would excuse that
fault. Decode differs from prefill by up to 0.8 where activations are quantized, and by 1.0 in bf16."""

BOUNDARY_S: Final = 300.0
"""How long one boundary may take: a prefill of 8,192 tokens by smollm2 took two minutes on two cores that
eight programs shared, and there are two."""
_BEFORE: Final = 4
"""Tokens before a boundary from which on it is looked at."""
_BEYOND: Final = 2
_PREFILLS: Final = 2
"""Of a boundary's length: one to reuse, one to compare with."""
_PIECE_TOKENS: Final = 512
"""Read at once towards a boundary, before the time is looked at."""
_NOISE_CONTROLS: Final = 4
_LONGEST_TOKENS: Final = 400
"""Histories are kept below this: a fault shows at any length, and each check is a whole prefill."""
_LEAST_TOKENS: Final = 48
"""Of a context: four of the longest replies, or enough places to compare logits at."""
_MOST_SEQUENCES: Final = 4
_LONGEST_REPLY: Final = 12

_SENTENCES: Final = (
    "My name is Alex, and I work as a data scientist.",
    "Write a function that reverses a linked list, in Python.",
    "The Nile flows north through eleven countries before it reaches the sea.",
    "¿Dónde está la biblioteca? 図書館はどこですか。",
    "If each tree bears 120 apples, how many apples do 240 trees bear?",
    "x = [i ** 2 for i in range(100) if i % 7 == 3]",
    "Please answer with three bullet points only.",
    "🎉 That is all I wanted to know. Thanks!",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference that was seen, and where."""

    logits: float
    operation: int
    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Boundary:
    """A length at which a model computes differently from there on, and what was seen around it."""

    tokens: int
    difference: float | None
    """The largest; None: it was left out."""
    left_out: str = ""
    """Why; empty where it was not."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a run of `verify` found."""

    model: str
    profile: str
    seed: int
    operations: int
    counts: dict[str, int]
    largest: Difference
    noise: float
    limit: float
    computed_tokens: int
    restored_tokens: int
    """From disk."""
    boundaries: list[Boundary]
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _Conversations:
    """The live sequences, and one random operation at a time on them."""

    model: Model
    dice: random.Random
    live: list[Generator] = field(default_factory=list)

    def operate(self) -> tuple[str, Generator]:
        """Do something at random; return its name and the sequence that it was done to."""
        if not self.live:
            self.live.append(self._generator())
            self.append(self.live[0])
            return "append", self.live[0]
        generator = self.dice.choice(self.live)
        if len(generator.sequence) > _longest(self.model) - 2 * _LONGEST_REPLY:
            self.rewind(generator)
            return "rewind", generator
        do = self.dice.choice(self._operations())
        return do.__name__, do(generator) or generator

    def append(self, generator: Generator) -> None:
        """Say one to three sentences, as many tokens of them as fit."""
        said = " ".join(self.dice.choices(_SENTENCES, k=self.dice.randint(1, 3)))
        room = _longest(self.model) - len(generator.sequence) - _LONGEST_REPLY
        generator.append_tokens(_encoded(self.model, said)[: max(1, room)])

    def generate(self, generator: Generator) -> None:
        """Generate a few tokens greedily; the last is in the history without KV."""
        self._generate(generator, SamplingParams(ignore_eos=True))

    def stop(self, generator: Generator) -> None:
        """Be cut off by the caller in the middle of a reply, and go on with another message."""
        self._generate(generator, SamplingParams(ignore_eos=True))
        self.append(generator)

    def rewind(self, generator: Generator) -> None:
        """Go back to any length of at least one token."""
        generator.rewind_to(self.dice.randint(1, len(generator.sequence)))

    def fork(self, generator: Generator) -> Generator:
        """Fork, and let both go on; the eldest makes room."""
        if len(self.live) == _MOST_SEQUENCES:
            eldest = next(other for other in self.live if other is not generator)
            self.live.remove(eldest)
            eldest.close()
        other = generator.fork()
        self.live.append(other)
        self._generate(self.dice.choice([generator, other]), SamplingParams(ignore_eos=True))
        return other

    def regenerate(self, generator: Generator) -> None:
        """Take the reply back and draw another."""
        generator.rewind_to(max(1, generator.reply_start))
        self._generate(
            generator,
            SamplingParams(
                temperature=1.0, top_p=0.95, seed=self.dice.getrandbits(32), ignore_eos=True
            ),
        )

    def together(self, _: Generator) -> None:
        """Compute all live sequences in shared passes, then generate one token in each."""
        self.model.engine.compute([other.sequence for other in self.live])
        for other in self.live:
            other.set_params(SamplingParams(ignore_eos=True))
            if not other.is_done():
                other.generate_next_token()

    def restore(self, _: Generator) -> None:
        """Have everything come back from disk, as after a restart."""
        tier = self.model.engine.tier
        assert tier is not None, "there is a disk to restore from"
        for other in self.live:
            other.sequence.park()
        tier.flush()
        self.model.engine.forget()

    def _operations(self) -> list[Callable[[Generator], Generator | None]]:
        return [
            self.append,
            self.generate,
            self.stop,
            self.rewind,
            self.fork,
            self.regenerate,
            self.together,
            *([] if self.model.engine.tier is None else [self.restore]),
        ]

    def _generator(self) -> Generator:
        return Generator(self.model.engine)

    def _generate(self, generator: Generator, params: SamplingParams) -> None:
        generator.set_params(params)
        for _ in range(self.dice.randint(1, _LONGEST_REPLY)):
            generator.generate_next_token()


def verify(
    model: Model,
    *,
    operations: int = 200,
    seed: int = 0,
    boundary_s: float = BOUNDARY_S,
    progress: Callable[[int, float], None] = lambda _done, _largest: None,
) -> VerifyReport:
    """
    Hold random conversations and compare each state with a fresh prefill.

    Args:
        model: The model, in the profile that is to be checked.
        operations: How many, >= 1.
        seed: The same seed gives the same operations.
        boundary_s: How long looking at one boundary may take, by what was measured; one that would
            take longer is left out, and the report says so, as it does of one that memory is short of.
        progress: Called after each operation with (operations done, largest difference so far).

    Raises:
        ConfigError: There is nothing to do, the model's context is below 48 tokens, or its tokenizer
            makes no tokens.
        OutOfBlocksError: The KV memory is too small for a handful of short conversations.
    """
    if operations < 1:
        raise ConfigError(f"{operations} operations prove nothing: give at least 1.")
    if model.context_length < _LEAST_TOKENS:
        raise ConfigError(
            f"A context of {model.context_length} tokens is too short for conversations: "
            f"{_LEAST_TOKENS} are needed to verify reuse."
        )
    conversations = _Conversations(model, random.Random(seed))  # noqa: S311 - not for secrets
    fed_before, restored_before = model.engine.computed_tokens, _restored(model)
    counts: Counter[str] = Counter()
    largest = Difference(0.0, 0, "", 0)
    controls = set(range(operations - 1, 0, -max(1, operations // _NOISE_CONTROLS)))
    noise = deviation = 0.0
    try:
        for number in range(operations):
            name, generator = conversations.operate()
            counts[name] += 1
            ids = generator.get_sequence()
            fresh = _fresh_logits(model, ids)
            with np.errstate(invalid="ignore"):  # where one is infinite, which is a difference
                deviation += float(fresh.std(dtype=np.float64)) / operations
            difference = _difference(_next_logits(model, generator.sequence), fresh)
            is_largest = difference > largest.logits
            if is_largest:
                largest = Difference(difference, number, name, len(ids))
            # Noise differs between histories, so where it decides it is measured on the worst too.
            if number in controls or operations == 1 or (is_largest and model.profile != "exact"):
                noise = max(noise, _difference(_token_by_token(model, ids), fresh))
            model.engine.check()
            progress(number + 1, largest.logits)
    finally:
        for generator in conversations.live:
            generator.close()
    boundaries = [
        _look_around(model, length, boundary_s, conversations.dice) for length in _lengths(model)
    ]
    for found in boundaries:
        if found.difference is not None and found.difference > largest.logits:
            largest = Difference(found.difference, operations, "boundary", found.tokens)
    size = max(1.0, deviation / USUAL_DEVIATION)
    limit = EXACT_LIMIT * size
    if model.profile != "exact":
        limit = max(limit, min(NOISE_ALLOWANCE * noise, NOISE_CAP[model.profile] * size))
    return VerifyReport(
        model=model.name,
        profile=model.profile,
        seed=seed,
        operations=operations,
        counts=dict(sorted(counts.items())),
        largest=largest,
        noise=noise,
        limit=limit,
        computed_tokens=model.engine.computed_tokens - fed_before,
        restored_tokens=_restored(model) - restored_before,
        boundaries=boundaries,
        passed=largest.logits <= limit,
    )


def _lengths(model: Model) -> list[int]:
    """Return the boundaries of a model that a conversation can reach, ascending, its end last."""
    most = model.context_length
    within = [length for length in model.local.boundaries if _LONGEST_REPLY < length < most]
    return [*within, most]


def _look_around(model: Model, length: int, most_s: float, dice: random.Random) -> Boundary:
    """
    Read across a length and go back, several times, and compare with one fresh prefill.

    What is wrong at a boundary is wrong at each place beyond it, so one such place is enough.
    """
    begin, end = length - _BEFORE, min(length + _BEYOND, model.context_length)
    pool = model.engine.pool
    needed = _PREFILLS * (blocks_for(end, pool.block_size) + 1)  # a fork takes one more
    if needed > pool.num_blocks:
        size = math.ceil(needed * model.engine.info.bytes_per_block / 10**6)
        return Boundary(length, None, f"left out, memory is short: add --kv-memory {size}MB")
    ids, generator = _tokens(model, end, dice), Generator(model.engine)
    sequence, across = generator.sequence, ids[begin:]
    try:
        if (needed_s := _read(model, generator, ids[:begin], most_s)) > most_s:
            why = f"left out, it would take {needed_s / 60:.0f} min: add --long"
            return Boundary(length, None, why)
        before, beyond = _next_logits(model, sequence), _fresh_logits(model, ids)
        worst = 0.0
        for pieces in (
            [[abs(token - 1)] for token in across],  # others, whose KV must not stay
            [across],
            [[token] for token in across],
        ):
            for piece in pieces:
                generator.append_tokens(piece)
                model.engine.compute([sequence])
            if generator.get_sequence() == ids:
                worst = max(worst, _difference(_next_logits(model, sequence), beyond))
            generator.rewind_to(begin)
            worst = max(worst, _difference(_next_logits(model, sequence), before))
    finally:
        generator.close()
    return Boundary(length, worst)


def _read(model: Model, generator: Generator, ids: list[int], most_s: float) -> float:
    """
    Read so many tokens, or stop where a boundary would take too long.

    Returns:
        Seconds that looking at it takes, at least: a longer history is read more slowly.
    """
    began, needed_s = time.perf_counter(), 0.0
    for start in range(0, len(ids), _PIECE_TOKENS):
        piece = ids[start : start + _PIECE_TOKENS]
        generator.append_tokens(piece)
        model.engine.compute([generator.sequence])
        passed_s = time.perf_counter() - began
        needed_s = _PREFILLS * passed_s * len(ids) / (start + len(piece))
        if needed_s > most_s and passed_s > most_s / 20:  # one slow pass decides nothing
            break
    return needed_s


def _tokens(model: Model, count: int, dice: random.Random) -> list[int]:
    """Return so many token ids of sentences in random order."""
    ids: list[int] = []
    while len(ids) < count:
        ids += _encoded(model, " ".join(dice.choices(_SENTENCES, k=8)))
    return ids[:count]


def _encoded(model: Model, text: str) -> list[int]:
    """
    Return the token ids of a text.

    Raises:
        ConfigError: There are none.
    """
    if ids := model.tokenizer.encode(text):
        return ids
    raise ConfigError(
        "The model's tokenizer makes no tokens of a text: fetch or export the model again."
    )


def _restored(model: Model) -> int:
    tier = model.engine.tier
    return 0 if tier is None else tier.statistics().restored_tokens


def _longest(model: Model) -> int:
    return min(_LONGEST_TOKENS, model.context_length)


def _next_logits(model: Model, sequence: Sequence) -> Logits:
    """
    Return the logits after the sequence as it stands, computed on a fork so that it stays as it is.

    By a pass over its KV: those that are kept of a prompt would be compared with themselves.
    """
    fork = sequence.fork()
    try:
        sequence.memory.ends.clear()
        return _computed(model, fork)
    finally:
        fork.release()


def _fresh_logits(model: Model, ids: list[int]) -> Logits:
    """Return the logits after one prefill of the ids, in blocks that share nothing."""
    fresh = model.engine.new_sequence(namespace=None)
    try:
        fresh.append(ids)
        return _computed(model, fresh)
    finally:
        fresh.release()


def _token_by_token(model: Model, ids: list[int]) -> Logits:
    """Return the logits after feeding the ids one at a time: the noise that needs no reuse."""
    single = model.engine.new_sequence(namespace=None)
    try:
        for token in ids[:-1]:
            single.append([token])
            model.engine.compute([single])
        single.append(ids[-1:])
        return _computed(model, single)
    finally:
        single.release()


def _computed(model: Model, sequence: Sequence) -> Logits:
    model.engine.compute([sequence])
    assert sequence.logits is not None, "compute() leaves the logits known"
    return sequence.logits


def _difference(first: Logits, second: Logits) -> float:
    """Return the largest difference of a logit; infinite where one is no finite number."""
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(first - second).max())
    return largest if math.isfinite(largest) else math.inf


_MOST_TOKENS: Final = 192
"""RoPE frequencies in f16 were 0.35 off at 150 tokens and are not seen at 10."""
_WIDEST_WINDOW: Final = 1024
"""The widest window that is looked beyond: Gemma 3's. One of 4,096 would take twenty times as long."""
_AROUND_WINDOW: Final = 16
"""Tokens before and beyond a window after each of which logits are compared."""
_SINGLE_TOKENS: Final = 24
"""Fed one at a time, which other kernels compute; the rest goes in chunks of a few sizes."""
_CHUNKS: Final = (1, 2, 3, 5, 8, 13)
_LONG_CHUNK: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport(Judgement):
    """What came out of comparing a model with its file."""

    file: str = ""
    architecture: str = ""
    tensor_types: dict[str, int] | None = None
    """How many numbers each type holds."""
    tokens: int = 0
    places: int = 0
    """At how many places logits were compared; 0: nothing was."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def compare_with_file(
    model: Model,
    *,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> FileReport:
    """
    Compare the logits of a loaded model with those that its file gives.

    Args:
        model: The model, in the profile that is to be checked.
        progress: Called with the layers of the reference that are done, and how many there are.

    Raises:
        UnsupportedModelError: The file cannot be read.
    """
    try:
        return _compare(model, progress)
    except NotCompared as unknown:
        file = "" if model.local.source is None else model.local.source.name
        return FileReport(outcome="NOT COMPARED", reason=str(unknown), file=file)


def _compare(model: Model, progress: Callable[[int, int], None]) -> FileReport:
    """
    Do what `compare_with_file` says.

    Raises:
        NotCompared: There is nothing to compare with, or the reference does not know all of it.
    """
    began, path = time.monotonic(), model.local.source
    if path is None:
        raise NotCompared(why_not_compared(model.local))
    if path.is_dir():
        opened = open_openvino(path, long_context=model.local.is_long)
    else:
        opened = open_gguf(path, sha256=model.local.source_sha256)
    description, tensors = opened
    ids = _token_ids(model)
    if max(ids) >= tensors.shape("token_embd")[0]:
        raise NotCompared(f"its tokenizer makes the token {max(ids)}, which its file lacks")
    places = _places(len(ids))
    ours = _our_logits(model, ids, places)
    theirs, noise = logits_and_noise(description, tensors, ids, places, progress=progress)
    following = {row: ids[place + 1] for row, place in enumerate(places) if place + 1 < len(ids)}
    return FileReport(
        **asdict(judge(model.profile, ours, theirs, noise=noise, following=following)),
        file=path.name,
        architecture=description.architecture,
        tensor_types=tensors.types(),
        tokens=len(ids),
        places=len(places),
        seconds=time.monotonic() - began,
    )


def why_not_compared(local: LocalModel) -> str:
    """Return why a model without a source cannot be compared with its file, and what helps."""
    if local.format != "openvino":
        return f"the reference does not read models of the format {local.format}"
    if str(local.folder) == local.name:
        return "the folder does not say where its GGUF file is: name the model or the file"
    return f"its GGUF file is not here: with a network, `recollect pull {local.name} --check` fetches it"


def _token_ids(model: Model) -> list[int]:
    """Return what is compared: the text, again and again where a window is longer."""
    within = [length for length in model.local.boundaries if length <= _WIDEST_WINDOW]
    wanted = max([_LEAST_TOKENS, *(length + _AROUND_WINDOW for length in within)])
    longest = min(max(wanted, _MOST_TOKENS), model.context_length - 1)
    if longest < _LEAST_TOKENS:
        raise NotCompared(
            f"its context of {model.context_length} tokens is too short: {_LEAST_TOKENS} are compared"
        )
    ids = model.tokenizer.encode(_text())
    if not ids:
        raise NotCompared("its tokenizer makes no tokens of a text")
    return (ids * -(-wanted // len(ids)))[:longest]


def _text() -> str:
    """Return prose, code, digits and scripts: a fault in a part of the vocabulary shows only there."""
    return resources.files("recollect.proof").joinpath("data/compared.txt").read_text("utf-8")


def _places(tokens: int) -> list[int]:
    """Return after which tokens logits are compared; where a forward pass of ours will end."""
    places = list(range(min(_SINGLE_TOKENS, tokens)))
    number = 0
    while (at := places[-1]) + 1 < tokens:
        step = _CHUNKS[number % len(_CHUNKS)]
        if at >= _MOST_TOKENS:  # far to the window, then one by one around it
            step = max(1, min(_LONG_CHUNK, tokens - 2 * _AROUND_WINDOW - at))
        places.append(min(at + step, tokens - 1))
        number += 1
    return places


def _our_logits(model: Model, ids: list[int], places: list[int]) -> Array:
    """Return what the runtime gives at these places, shape `(places, vocabulary)`."""
    sequence = model.engine.new_sequence(namespace=None)
    logits = []
    try:
        for start, place in zip([0, *(place + 1 for place in places)], places, strict=False):
            sequence.append(ids[start : place + 1])
            logits.append(np.array(_computed(model, sequence), np.float32))
    finally:
        sequence.release()
    return np.stack(logits)
