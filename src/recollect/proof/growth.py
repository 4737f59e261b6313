"""
How long a turn takes as a conversation grows, with and without reuse.

Every turn is timed both ways over the same token ids: appended to the sequence that holds the
history, and prefilled whole in blocks of its own. Prints and plots nothing.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from recollect.conversation.model import Model
from recollect.engine.sampling import Generator
from recollect.proof.bench import BenchConfig, check_room, cut_to_length
from recollect.proof.energy import EnergyMeter
from recollect.proof.statistics import Summary, summarize
from recollect.proof.timing import ResponseSample, time_response
from recollect.types import Progress, no_progress


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
    with closing(Generator(model.engine, namespace=None)) as live:
        for turn in range(config.growth_turns):
            new = ids[turn * config.input2_tokens :][: config.input2_tokens]
            whole = live.get_sequence() + new

            def without(whole: list[int] = whole) -> ResponseSample:
                with closing(Generator(model.engine, namespace=None)) as fresh:
                    return time_response(fresh, whole, config.output2_tokens, meter=meter)

            def reuse(new: list[int] = new) -> ResponseSample:
                return time_response(live, new, config.output2_tokens, meter=meter)

            order = (reuse, without) if reuse_first else (without, reuse)
            timed = {way: way() for way in order}
            samples.append(GrowthSample(turn + 1, timed[without], timed[reuse]))
    return samples
