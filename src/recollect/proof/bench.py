"""
Measure what reuse saves: the two-turn benchmark of the field, and turns as a conversation grows.

Case 1, without reuse: the second prompt is prompt 1 + response 1 + prompt 2, prefilled anew.
Case 2, with reuse: prompt 2 is appended to the sequence that holds the rest.
Both cases run in every iteration and take turns at being first, so that a machine that slows down slows
both.

The saving is latency(case 1, response 2) - latency(case 2, response 2). The ideal is the time of a
prefill of exactly the tokens that were reused, measured in the same iteration in blocks of its own:
nothing but that work can be saved, because the new tokens attend to the reused ones in both cases.
The share is median(saving) / median(ideal) over the iterations.

As a conversation grows, every turn is timed both ways over the same token ids. Energy is that of the
processor package, from Linux powercap (intel-rapl, which has AMD's counters too). Prints nothing.

An engine elsewhere is asked in the same ways: without reuse under a salt that is thrown away, with reuse in
conversations that begin with words of their own. It tells what it computed; times are as this machine sees
them, the way to the engine and back included; energy is not told.
"""

import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from recollect import files
from recollect.conversation.model import Model
from recollect.engine.decoder import Decoder
from recollect.engine.sampling import Generator
from recollect.engine.sequence import warm_tokens
from recollect.errors import ConfigError, ContextFullError, InvalidParameterError, OutOfBlocksError
from recollect.kv.blocks import blocks_for
from recollect.types import Progress, SamplingParams, no_progress

POWERCAP: Final = Path("/sys/class/powercap")
_JOULES_PER_MICROJOULE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Energy cannot be read here; `reason` is a sentence for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Counter:
    path: Path
    range_uj: int
    """The counter begins again at 0 after this value."""


class EnergyMeter:
    """
    The energy counters of all processor packages.

    `read` before and after, then `joules` between the two readings. A counter may wrap around once
    in between; at 100 W that is after some ten minutes.
    """

    def __init__(self, counters: Sequence[_Counter]) -> None:
        self._counters = tuple(counters)

    def read(self) -> tuple[int, ...]:
        """
        Return the counters in microjoules, one per package.

        Raises:
            OSError: They cannot be read any more.
        """
        return tuple(_read_int(counter.path) for counter in self._counters)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Return the energy between two readings, over all packages."""
        microjoules = 0
        for counter, first, last in zip(self._counters, before, after, strict=True):
            # The range is the largest value, so one step more is a whole turn.
            microjoules += (last - first) % (counter.range_uj + 1)
        return microjoules * _JOULES_PER_MICROJOULE


def open_meter(root: Path = POWERCAP) -> EnergyMeter | Unreadable:
    """Return a meter over the package domains under *root*, or why there is none."""
    if not root.is_dir():
        return Unreadable(f"this system has no {root} (Linux powercap)")
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not packages:
        return Unreadable(f"{root} has no intel-rapl package domain")
    try:
        counters = [
            _Counter(zone / "energy_uj", _read_int(zone / "max_energy_range_uj"))
            for zone in packages
        ]
        meter = EnergyMeter(counters)
        meter.read()
    except PermissionError as cause:
        return Unreadable(f"{cause.filename} may be read by the administrator only")
    except (OSError, ValueError) as cause:
        return Unreadable(f"the counters cannot be read: {cause}")
    return meter


def meter_of(model: Model) -> EnergyMeter | Unreadable:
    """Return a meter of the machine that computes a model, or why there is none."""
    if isinstance(model.engine, Decoder):
        return Unreadable("an engine elsewhere computes, and does not tell it")
    return open_meter()


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _read_int(path: Path) -> int:
    return int(path.read_text())


@dataclass(frozen=True, slots=True)
class Summary:
    """Samples of one quantity, in its own unit."""

    count: int
    mean: float
    median: float
    stdev: float
    """Of the sample; 0 for a single one."""
    minimum: float
    maximum: float


def summarize(samples: Sequence[float]) -> Summary:
    """
    Return mean, median and spread of at least one sample.

    Raises:
        ValueError: There is none.
    """
    if not samples:
        raise ValueError("there are no samples to summarize")
    return Summary(
        count=len(samples),
        mean=statistics.fmean(samples),
        median=statistics.median(samples),
        stdev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        minimum=min(samples),
        maximum=max(samples),
    )


@dataclass(frozen=True, slots=True)
class ResponseSample:
    """One response: how long it took, and how much was computed for it."""

    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that were not fed: the prompt less what the forward pass counted."""
    computed_tokens: int
    """Prompt tokens that were fed, counted at the forward pass."""
    generated_tokens: int
    ttft_s: float
    """From the call to the first token."""
    decode_s: float
    """From the first token to the last."""
    energy_j: float | None
    """Of the processor package; None where it cannot be read."""

    @property
    def latency_s(self) -> float:
        """Return the time of the whole response."""
        return self.ttft_s + self.decode_s


def time_response(
    generator: Generator, new_ids: Sequence[int], tokens: int, *, meter: EnergyMeter | None = None
) -> ResponseSample:
    """
    Append *new_ids*, generate exactly *tokens* tokens, and return what it took.

    Greedy, and end of sequence is ignored: responses of one length can be compared. What the
    generator holds already is reused as far as its KV reaches.

    Raises:
        ContextFullError: They do not fit the context.
        OutOfBlocksError: They do not fit the KV memory.
    """
    generator.set_params(SamplingParams(max_tokens=tokens, ignore_eos=True))
    sequence = generator.sequence
    fed_before = sequence.fed_tokens
    energy_before = None if meter is None else meter.read()
    begun = time.perf_counter()
    generator.append_tokens(new_ids)
    prompt_tokens = len(sequence)
    generator.generate_next_token()
    first = time.perf_counter()
    computed = sequence.fed_tokens - fed_before
    while not generator.is_done():
        generator.generate_next_token()
    last = time.perf_counter()
    if not computed:  # an engine elsewhere tells it with the last token
        computed = sequence.fed_tokens - fed_before
    energy = None
    if meter is not None and energy_before is not None:
        energy = meter.joules(energy_before, meter.read())
    return ResponseSample(
        prompt_tokens=prompt_tokens,
        reused_tokens=prompt_tokens - computed,
        computed_tokens=computed,
        generated_tokens=len(sequence) - prompt_tokens,
        ttft_s=first - begun,
        decode_s=last - first,
        energy_j=energy,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """
    Lengths in tokens, and how often.

    Raises:
        InvalidParameterError: A length is below 1, or the first iteration would be the only one.
    """

    input_tokens: int = 2048
    output_tokens: int = 256
    input2_tokens: int = 256
    output2_tokens: int = 128
    iterations: int = 10
    """The first is discarded."""
    growth_turns: int = 12
    """Turns of `input2_tokens` and `output2_tokens` each; 0 leaves the growth curve out."""
    growth_iterations: int = 3

    def __post_init__(self) -> None:
        least = {"iterations": 2, "growth_turns": 0}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value < least.get(name, 1):
                raise InvalidParameterError(
                    f"{name} is {value}; it must be at least {least.get(name, 1)}."
                )

    @property
    def tokens_needed(self) -> int:
        """Return the longest history that any part of the benchmark reaches."""
        case = self.input_tokens + self.output_tokens + self.input2_tokens + self.output2_tokens
        return max(case, self.growth_turns * (self.input2_tokens + self.output2_tokens))


@dataclass(frozen=True, slots=True)
class Case:
    """Both responses of one case."""

    first: ResponseSample
    second: ResponseSample


@dataclass(frozen=True, slots=True)
class Iteration:
    """Both cases, and the prefill that the second one saves."""

    without: Case
    reuse: Case
    ideal_tokens: int
    ideal_s: float
    """Prefill of the reused tokens alone, in a fresh sequence."""
    reuse_went_first: bool

    @property
    def saving_s(self) -> float:
        """Return what reuse saves in the whole second response."""
        return self.without.second.latency_s - self.reuse.second.latency_s

    @property
    def ttft_saving_s(self) -> float:
        """Return what reuse saves before the first token of the second response."""
        return self.without.second.ttft_s - self.reuse.second.ttft_s


@dataclass(frozen=True, slots=True)
class ResponseSummary:
    """One response of one case over the iterations that count."""

    latency_s: Summary
    ttft_s: Summary
    decode_s: Summary
    energy_j: Summary | None


@dataclass(frozen=True, slots=True)
class BenchSummary:
    """What the iterations come to, the first left out."""

    without_first: ResponseSummary
    without_second: ResponseSummary
    reuse_first: ResponseSummary
    reuse_second: ResponseSummary
    saving_s: Summary
    ttft_saving_s: Summary
    ideal_s: Summary
    share_of_ideal: float
    """median(saving_s) / median(ideal_s), over whole responses."""
    ttft_share_of_ideal: float
    """The same up to the first token: without the noise of two times decoding."""
    ttft_ratio: float
    """median first-token time of response 2, reuse / without."""


def bench_text(path: Path | None = None) -> str:
    """
    Return the text that prompts are cut from: a file's, or the one that comes with the package.

    Raises:
        ConfigError: The file cannot be read as text.
    """
    if path is None:
        return resources.files("recollect.proof").joinpath("data/bench.txt").read_text("utf-8")
    try:
        return files.read_text(path, most_bytes=64 * files.MIB)
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path} cannot be read as text: {cause}; give a UTF-8 file.") from cause


def check_room(model: Model, config: BenchConfig) -> None:
    """
    Check that the benchmark can run to its end.

    Raises:
        ContextFullError: The context is too small for the lengths.
        OutOfBlocksError: The KV memory is, for two sequences of that length; of an engine elsewhere nobody
            knows it before.
    """
    needed = config.tokens_needed
    if needed > model.context_length:
        raise ContextFullError(needed=needed, limit=model.context_length)
    if isinstance(model.engine, Decoder):
        return
    pool = model.engine.pool
    blocks = 2 * blocks_for(needed, model.engine.block_size)
    if blocks > pool.free_blocks:
        raise OutOfBlocksError(needed=blocks, free=pool.free_blocks, total=pool.num_blocks)


def cut_to_length(model: Model, text: str, tokens: int) -> list[int]:
    """
    Return the first *tokens* ids of the text, repeated where it is too short.

    Raises:
        InvalidParameterError: The text has no tokens.
    """
    ids = model.tokenizer.encode(text)
    if not ids:
        raise InvalidParameterError("The text is empty: give a file with some words in it.")
    return repeated(ids, tokens)


def run_iterations(
    model: Model,
    config: BenchConfig,
    text: str,
    *,
    meter: EnergyMeter | None = None,
    progress: Progress = no_progress,
) -> list[Iteration]:
    """
    Run both cases as often as *config* says; the first iteration is a warm-up and in the list.

    Raises:
        ContextFullError: The context is too small for the lengths. Nothing was run.
        OutOfBlocksError: The KV memory is. Nothing was run.
        ConfigError: An engine elsewhere reused nothing, so that there is nothing to compare.
    """
    check_room(model, config)
    ids = cut_to_length(model, text, config.input_tokens + config.input2_tokens)
    prompt, prompt2 = ids[: config.input_tokens], ids[config.input_tokens :]
    run = _Run(model, config, prompt, prompt2, meter)
    iterations = []
    for number in range(config.iterations):
        progress("iteration", number, config.iterations)
        iterations.append(run.iteration(reuse_first=number % 2 == 1))
    return iterations


def summarize_iterations(iterations: Sequence[Iteration]) -> BenchSummary:
    """
    Return what all but the first iteration come to; the first is the warm-up.

    Raises:
        ValueError: There is no second one.
    """
    counted = iterations[1:]
    ideal = summarize([iteration.ideal_s for iteration in counted])
    saving = summarize([iteration.saving_s for iteration in counted])
    ttft_saving = summarize([iteration.ttft_saving_s for iteration in counted])
    without_second = _summarize_responses([i.without.second for i in counted])
    reuse_second = _summarize_responses([i.reuse.second for i in counted])
    return BenchSummary(
        without_first=_summarize_responses([i.without.first for i in counted]),
        without_second=without_second,
        reuse_first=_summarize_responses([i.reuse.first for i in counted]),
        reuse_second=reuse_second,
        saving_s=saving,
        ttft_saving_s=ttft_saving,
        ideal_s=ideal,
        share_of_ideal=saving.median / ideal.median,
        ttft_share_of_ideal=ttft_saving.median / ideal.median,
        ttft_ratio=reuse_second.ttft_s.median / without_second.ttft_s.median,
    )


def _summarize_responses(samples: Sequence[ResponseSample]) -> ResponseSummary:
    energies = [sample.energy_j for sample in samples if sample.energy_j is not None]
    return ResponseSummary(
        latency_s=summarize([sample.latency_s for sample in samples]),
        ttft_s=summarize([sample.ttft_s for sample in samples]),
        decode_s=summarize([sample.decode_s for sample in samples]),
        energy_j=summarize(energies) if energies else None,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What every case of an iteration is run with."""

    model: Model
    config: BenchConfig
    prompt: list[int]
    prompt2: list[int]
    meter: EnergyMeter | None

    def iteration(self, *, reuse_first: bool) -> Iteration:
        cases = {reuse: self._case(reuse=reuse) for reuse in (reuse_first, not reuse_first)}
        reused = cases[True].second.reused_tokens
        return Iteration(cases[False], cases[True], reused, self._prefill_s(reused), reuse_first)

    def _case(self, *, reuse: bool) -> Case:
        config, model = self.config, self.model
        if reuse:
            live, prompt = live_conversation(model, self.prompt)
            with closing(live):
                first = self._time(live, prompt, config.output_tokens)
                second = self._time(live, self.prompt2, config.output2_tokens)
            require_reuse(model, second, config.input_tokens + config.output_tokens)
            return Case(first, second)
        with closing(Generator(model.engine, namespace=None)) as generator:
            first = self._time(generator, self.prompt, config.output_tokens)
            history = generator.get_sequence()
        with closing(Generator(model.engine, namespace=None)) as generator:
            return Case(first, self._time(generator, history + self.prompt2, config.output2_tokens))

    def _prefill_s(self, tokens: int) -> float:
        """Return the time to compute that many tokens anew; which ones makes no difference."""
        ids = self.prompt + self.prompt2
        with closing(Generator(self.model.engine, namespace=None)) as generator:
            return self._time(generator, repeated(ids, tokens), 1).ttft_s

    def _time(self, generator: Generator, new: list[int], tokens: int) -> ResponseSample:
        return time_response(generator, new, tokens, meter=self.meter)


_NAMESPACE: Final = "bench"


def live_conversation(model: Model, ids: list[int]) -> tuple[Generator, list[int]]:
    """
    Return a generator that finds again what it computes itself and nothing else, and a first prompt for it.

    KV elsewhere is found by what a prompt begins with: so it begins with words that were never said. Here the
    sequence itself holds its KV, and the prompt is *ids*.
    """
    if not isinstance(model.engine, Decoder):
        return Generator(model.engine, namespace=None), ids
    name = secrets.token_hex(8)
    sequence = model.engine.new_sequence(_NAMESPACE)
    sequence.session = name
    begun = [*model.tokenizer.encode_text(f"{name}. "), *ids]
    return Generator(model.engine, sequence=sequence), begun[: len(ids)]


def require_reuse(model: Model, sample: ResponseSample, before: int) -> None:
    """
    Check that there is something to compare.

    Args:
        model: Has answered.
        sample: Of the answer, with reuse.
        before: Tokens of the conversation before it.

    Raises:
        ConfigError: It had all to compute.
    """
    if sample.reused_tokens:
        return
    unit = model.engine.info.reuse.unit
    if not warm_tokens(before, unit):
        raise ConfigError(
            f"The engine reuses blocks of {unit} tokens, and the conversation has {before} before its second "
            "turn: measure longer prompts (--input N)."
        )
    raise ConfigError(
        f"The engine reused none of {before:,} tokens of the conversation that is measured: something else "
        "took their place. Give it more room for KV, llama-server two slots or more (--parallel 2), and no "
        "other client meanwhile."
    )


def repeated(ids: list[int], length: int) -> list[int]:
    """Return the first *length* of the ids, over and over again."""
    return (ids * -(-length // len(ids)))[:length]


@dataclass(frozen=True, slots=True)
class GrowthSample:
    """One turn of one conversation, both ways."""

    turn: int
    """From 1."""
    without: ResponseSample
    reuse: ResponseSample


@dataclass(frozen=True, slots=True)
class GrowthTurn:
    """One turn over all conversations."""

    turn: int
    prompt_tokens: int
    without_latency_s: Summary
    reuse_latency_s: Summary
    without_ttft_s: Summary
    reuse_ttft_s: Summary


def run_growth(
    model: Model,
    config: BenchConfig,
    text: str,
    *,
    meter: EnergyMeter | None = None,
    progress: Progress = no_progress,
) -> list[GrowthSample]:
    """
    Hold `growth_iterations` conversations of `growth_turns` turns; return the samples in order.

    Raises:
        ContextFullError: The context is too small for the turns. Nothing was run.
        OutOfBlocksError: The KV memory is. Nothing was run.
        ConfigError: An engine elsewhere reused nothing where it could.
    """
    check_room(model, config)
    ids = cut_to_length(model, text, config.growth_turns * config.input2_tokens)
    samples = []
    for number in range(config.growth_iterations):
        progress("growth curve", number, config.growth_iterations)
        samples += _conversation(model, config, ids, meter, reuse_first=number % 2 == 1)
    return samples


def summarize_growth(samples: Sequence[GrowthSample]) -> list[GrowthTurn]:
    """Return the turns in order, each over all conversations."""
    by_turn: dict[int, list[GrowthSample]] = {}
    for sample in samples:
        by_turn.setdefault(sample.turn, []).append(sample)
    return [
        GrowthTurn(
            turn=turn,
            prompt_tokens=of_turn[0].reuse.prompt_tokens,
            without_latency_s=summarize([s.without.latency_s for s in of_turn]),
            reuse_latency_s=summarize([s.reuse.latency_s for s in of_turn]),
            without_ttft_s=summarize([s.without.ttft_s for s in of_turn]),
            reuse_ttft_s=summarize([s.reuse.ttft_s for s in of_turn]),
        )
        for turn, of_turn in sorted(by_turn.items())
    ]


def _conversation(
    model: Model,
    config: BenchConfig,
    ids: list[int],
    meter: EnergyMeter | None,
    *,
    reuse_first: bool,
) -> list[GrowthSample]:
    samples = []
    live, ids = live_conversation(model, ids)
    with closing(live):
        for turn in range(config.growth_turns):
            new = ids[turn * config.input2_tokens :][: config.input2_tokens]
            before = live.get_sequence()
            whole = before + new

            def without(whole: list[int] = whole) -> ResponseSample:
                with closing(Generator(model.engine, namespace=None)) as fresh:
                    return time_response(fresh, whole, config.output2_tokens, meter=meter)

            def reuse(new: list[int] = new) -> ResponseSample:
                return time_response(live, new, config.output2_tokens, meter=meter)

            order = (reuse, without) if reuse_first else (without, reuse)
            timed = {way: way() for way in order}
            if warm_tokens(len(before), model.engine.info.reuse.unit):
                require_reuse(model, timed[reuse], len(before))
            samples.append(GrowthSample(turn + 1, timed[without], timed[reuse]))
    return samples
