"""
Time one response of a fixed length, and what it cost.

Knows a generator and a clock; not which case of a benchmark it is in.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from recollect.engine.sampling import Generator
from recollect.proof.energy import EnergyMeter
from recollect.types import SamplingParams


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
