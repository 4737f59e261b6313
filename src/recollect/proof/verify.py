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

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from recollect.conversation.model import Model
from recollect.engine.sampling import Generator
from recollect.engine.sequence import Sequence
from recollect.errors import ConfigError
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.openvino_reference import open_openvino
from recollect.proof.reference_model import Array, NotCompared, log_softmax, logits_at
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

BOUNDARY_S: Final = 60.0
"""How long one boundary may take: then a check of a small model with 8,192 tokens takes a minute more."""
_BEFORE: Final = 4
"""Tokens before a boundary from which on it is looked at."""
_COMPARISONS: Final = 4
_NOISE_CONTROLS: Final = 4
_LONGEST_TOKENS: Final = 400
"""Histories are kept below this: a fault shows at any length, and each check is a whole prefill."""
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
        generator.append_tokens(self.model.tokenizer.encode(said)[: max(1, room)])

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
            take longer is left out, and the report says so.
        progress: Called after each operation with (operations done, largest difference so far).

    Raises:
        ConfigError: There is nothing to do.
        OutOfBlocksError: The KV memory is too small for a handful of short conversations.
    """
    if operations < 1:
        raise ConfigError(f"{operations} operations prove nothing: give at least 1.")
    conversations = _Conversations(model, random.Random(seed))  # noqa: S311 - not for secrets
    fed_before, restored_before = model.engine.computed_tokens, _restored(model)
    counts: Counter[str] = Counter()
    largest = Difference(0.0, 0, "", 0)
    controls = set(range(operations - 1, 0, -max(1, operations // _NOISE_CONTROLS)))
    noise = 0.0
    try:
        for number in range(operations):
            name, generator = conversations.operate()
            counts[name] += 1
            ids = generator.get_sequence()
            fresh = _fresh_logits(model, ids)
            difference = _difference(_next_logits(model, generator.sequence), fresh)
            is_largest = not difference <= largest.logits  # so that NaN is a difference too
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
        if found.difference is not None and not found.difference <= largest.logits:
            largest = Difference(found.difference, operations, "boundary", found.tokens)
    limit = max(EXACT_LIMIT, min(NOISE_ALLOWANCE * noise, NOISE_CAP[model.profile]))
    if model.profile == "exact":
        limit = EXACT_LIMIT
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
    """Return the boundaries of a model that a conversation can reach, ascending."""
    most = model.context_length
    within = [length for length in model.local.boundaries if _LONGEST_REPLY < length < most]
    return [*within, *([most] if most > _LONGEST_TOKENS else [])]


def _look_around(model: Model, length: int, most_s: float, dice: random.Random) -> Boundary:
    """
    Compare before, at and after a length, then after a rewind across it.

    Each comparison is a prefill of that length, so there are four: what is wrong at a boundary is
    wrong at each place beyond it.
    """
    begun = time.perf_counter()
    ids = _tokens(model, length - _BEFORE, dice)
    generator = Generator(model.engine)
    try:
        generator.append_tokens(ids)
        model.engine.compute([generator.sequence])
        needed_s = (_COMPARISONS + 1) * (time.perf_counter() - begun)
        if needed_s > most_s:
            return Boundary(
                length, None, f"left out, it would take {needed_s / 60:.0f} min: add --long"
            )
        generator.set_params(SamplingParams(ignore_eos=True))
        worst = 0.0
        at_end = length == model.context_length
        for place in (length - 1, length - 1 if at_end else length + 2):
            _generate_until(generator, place)
            worst = max(worst, _against_fresh(model, generator))
        generator.rewind_to(length - _BEFORE)
        worst = max(worst, _against_fresh(model, generator))
        _generate_until(generator, length - 1 if at_end else length + 1)
        worst = max(worst, _against_fresh(model, generator))
    finally:
        generator.close()
    return Boundary(length, worst)


def _generate_until(generator: Generator, length: int) -> None:
    while len(generator.sequence) < length:
        generator.generate_next_token()


def _against_fresh(model: Model, generator: Generator) -> float:
    ids = generator.get_sequence()
    return _difference(_next_logits(model, generator.sequence), _fresh_logits(model, ids))


def _tokens(model: Model, count: int, dice: random.Random) -> list[int]:
    """Return so many token ids of sentences in random order."""
    ids: list[int] = []
    while len(ids) < count:
        ids += model.tokenizer.encode(" ".join(dice.choices(_SENTENCES, k=8)))
    return ids[:count]


def _restored(model: Model) -> int:
    tier = model.engine.tier
    return 0 if tier is None else tier.statistics().restored_tokens


def _longest(model: Model) -> int:
    return min(_LONGEST_TOKENS, model.context_length)


def _next_logits(model: Model, sequence: Sequence) -> Logits:
    """Return the logits after the sequence as it stands, computed on a fork so that it stays as it is."""
    fork = sequence.fork()
    try:
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
    return float(np.abs(first - second).max())


Outcome = Literal["PASS", "FAIL", "NOT COMPARED"]

LIMITS: Final[dict[Profile, float]] = {"exact": 1e-3, "fast": 2.0, "small": 2.5}
"""
The largest difference of any logit that passes, by profile, whatever the types of the tensors are:
each type that we read is stored so that the values are the file's, so none may be further off.

`exact`: f32 products in another order. Twenty-eight layers, 1,536 wide, at a standard deviation of 8,
came out 1e-4 off; ten times that leaves room for larger models, and the smallest fault that was ever
seen in use (groups without a scale, in one matrix of 196) was 90 times as large.
`fast`: KV in f16, and products of rounded activations on processors with bf16 or VNNI, which alone
move the largest of millions of logits by up to 1.0. `small`: KV in u8 besides. A fault that moves
every logit by less is seen in `exact` only, which is why `verify` runs in it unless told otherwise.
"""

PERPLEXITY_LIMIT: Final[dict[Profile, float]] = {"exact": 1e-3, "fast": 0.03, "small": 0.05}
"""How far the ratio of perplexities may be from 1; wrong zero points gave 0.07 and 0.24."""

_TEXT: Final = (
    "The old lighthouse stood at the end of the pier, and every evening its keeper climbed the 214 "
    "steps to light the lamp. “Is anybody there?” she asked once, but only the sea answered.\n\n"
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n"
    "Wie spät ist es? 図書館はどこですか。 If each of 120 trees bears 42 apples, 5,040 apples are to be "
    "picked; at 60 an hour that takes one person 84 hours. She said that the answer is 84, and wrote "
    "it into the book of the lighthouse, where all such answers were kept.\n"
)
"""Prose, code, digits and other scripts, because a fault in a part of the vocabulary shows only there."""

_MOST_TOKENS: Final = 192
"""RoPE frequencies in f16 were 0.35 off at 150 tokens and are not seen at 10."""
_LEAST_TOKENS: Final = 48
_SINGLE_TOKENS: Final = 24
"""Fed one at a time, which other kernels compute; the rest goes in chunks of a few sizes."""
_CHUNKS: Final = (1, 2, 3, 5, 8, 13)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What came out of comparing a model with its file."""

    outcome: Outcome
    reason: str = ""
    """Why nothing was compared, or which limit was passed; empty where all is well."""
    file: str = ""
    architecture: str = ""
    tensor_types: dict[str, int] | None = None
    """How many numbers each type holds."""
    tokens: int = 0
    places: int = 0
    """At which logits were compared."""
    largest: float = 0.0
    """Difference of a logit."""
    limit: float = 0.0
    agreement: float = 0.0
    """Share of places at which both have the same likeliest token."""
    perplexity: float = 0.0
    """Of the text, as it runs here."""
    reference_perplexity: float = 0.0
    """Of the text, by the file's values."""
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
    local, path = model.local, model.local.source
    if path is None:
        return FileReport(outcome="NOT COMPARED", reason=_why_not(model))
    began = time.monotonic()
    try:
        description, tensors = (
            open_openvino(path, long_context=local.is_long) if path.is_dir() else open_gguf(path)
        )
    except NotCompared as unknown:
        return FileReport(outcome="NOT COMPARED", reason=str(unknown), file=path.name)
    ids = _token_ids(model)
    places = _places(len(ids))
    ours = _our_logits(model, ids, places)
    theirs = logits_at(description, tensors, ids, places, progress=progress)
    if ours.shape[1] > theirs.shape[1]:  # rows that were added to fill a tensor up are no tokens
        ours = ours[:, : theirs.shape[1]]
    largest = float(np.abs(ours - theirs[:, : ours.shape[1]]).max())
    perplexity, by_file = (_perplexity(logits, ids, places) for logits in (ours, theirs))
    limit = LIMITS[model.profile]
    reasons = [
        *([] if largest <= limit else [f"a logit is {largest:.2g} off, and {limit:g} is allowed"]),
        *(
            []
            if abs(perplexity / by_file - 1) <= PERPLEXITY_LIMIT[model.profile]
            else [f"perplexity is {perplexity:.2f}, and {by_file:.2f} by the file"]
        ),
    ]
    return FileReport(
        outcome="FAIL" if reasons else "PASS",
        reason="; ".join(reasons),
        file=path.name,
        architecture=description.architecture,
        tensor_types=tensors.types(),
        tokens=len(ids),
        places=len(places),
        largest=largest,
        limit=limit,
        agreement=float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
        perplexity=perplexity,
        reference_perplexity=by_file,
        seconds=time.monotonic() - began,
    )


def _why_not(model: Model) -> str:
    if model.local.format == "openvino":
        return f"its GGUF file is not here: `recollect pull {model.name}` fetches it"
    return f"the reference does not read models of the format {model.local.format}"


def _token_ids(model: Model) -> list[int]:
    """Return what is compared: the text, again and again where a vocabulary makes it short."""
    ids = model.tokenizer.encode(_TEXT)
    longest = min(_MOST_TOKENS, model.context_length - 1)
    repeated = ids * (-(-_LEAST_TOKENS // max(1, len(ids))))
    return repeated[:longest]


def _places(tokens: int) -> list[int]:
    """Return after which tokens logits are compared; where a forward pass of ours will end."""
    places = list(range(min(_SINGLE_TOKENS, tokens)))
    number = 0
    while places[-1] + 1 < tokens:
        places.append(min(places[-1] + _CHUNKS[number % len(_CHUNKS)], tokens - 1))
        number += 1
    return places


def _our_logits(model: Model, ids: list[int], places: list[int]) -> Array:
    """Return what the runtime gives at these places, shape `(places, vocabulary)`."""
    sequence = model.engine.new_sequence(namespace=None)
    logits = []
    try:
        start = 0
        for place in places:
            sequence.append(ids[start : place + 1])
            model.engine.compute([sequence])
            assert sequence.logits is not None, "compute() leaves the logits known"
            logits.append(np.array(sequence.logits, np.float32))
            start = place + 1
    finally:
        sequence.release()
    return np.stack(logits)


def _perplexity(logits: Array, ids: list[int], places: list[int]) -> float:
    """Return the perplexity of the tokens that follow the places."""
    known = [(row, ids[place + 1]) for row, place in enumerate(places) if place + 1 < len(ids)]
    rows, following = zip(*known, strict=True)
    return float(np.exp(-log_softmax(logits[list(rows)])[range(len(rows)), following].mean()))
