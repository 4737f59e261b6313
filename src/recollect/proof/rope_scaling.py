"""
How positions become angles: the formulas of the papers, for the reference.

Pure. Frequencies are in radians a position, in float64.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float64]


def plain(turned: int, base: float) -> Frequencies:
    """
    Return the frequency of each pair, shape `(turned / 2,)`.

    Source: RoFormer (Su et al. 2021), equation 15.
    """
    pairs = np.arange(turned // 2, dtype=np.float64)
    frequencies: Frequencies = np.power(float(base), -2 * pairs / turned)
    return frequencies


def yarn(
    frequencies: Frequencies,
    *,
    base: float,
    factor: float,
    original: float,
    fast: float = 32.0,
    slow: float = 1.0,
) -> tuple[Frequencies, float]:
    """
    Return the frequencies of a context that is *factor* times as long, and what scales cosine and sine.

    Pairs that turn often within the original context stay, those that turn less than once are
    stretched, those between are mixed. Source: YaRN (Peng et al. 2023), section 3.2 and equation 22,
    with the borders rounded outward as the authors' code does.
    """
    turned = 2 * len(frequencies)

    def pair_with(turns: float) -> float:
        return turned / 2 * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_with(fast)), 0)
    last = min(math.ceil(pair_with(slow)), turned - 1)
    stretched = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 0.001), 0.0, 1.0)
    return frequencies * (1 - stretched) + frequencies / factor * stretched, yarn_scale(factor)


def yarn_scale(factor: float) -> float:
    """Return what cosine and sine are multiplied by. Source: YaRN, equation 22."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0


def llama3(frequencies: Frequencies, scaling: dict[str, Any]) -> Frequencies:
    """
    Return the frequencies of Llama 3.1 and later: slow pairs are stretched, fast ones stay.

    Source: `apply_scaling` in the reference code that came with the model.
    """
    factor, original = float(scaling["factor"]), scaling["original_max_position_embeddings"]
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * frequencies / (2 * math.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: Frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    return scaled


def longrope_scale(factor: float, original: float) -> float:
    """Return what cosine and sine are multiplied by. Source: LongRoPE (Ding et al. 2024), Phi-3's code."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
