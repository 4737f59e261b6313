"""
Choose the next token from logits.

Pure: everything that sampling depends on is in its arguments. The random number of a position
comes from (seed, position) and penalties from the history, so a rewind takes all of it back
without any state to restore.
"""

import numpy as np
import numpy.typing as npt

from recollect.errors import InvalidParameterError, RecollectError, RuntimeFailure
from recollect.types import SamplingParams

Scores = npt.NDArray[np.float32]
TokenArray = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_FIRST_GUESS = 256
"""Candidates that top_p sorts before it tries all: sorting 49,152 takes 40 times as long as selecting
256, and nearly always 256 hold the mass. Source: our own measurement, numpy 2.4."""


def choose_token(
    logits: Scores,
    params: SamplingParams,
    *,
    history: TokenArray,
    reply_start: int,
    seed: int,
    allowed: Mask | None = None,
) -> int:
    """
    Return the token id that follows *history*.

    Args:
        logits: Shape `(vocab_size,)`; not changed.
        params: What to do with them.
        history: All token ids so far, shape `(n,)`.
        reply_start: Where the reply begins in *history*; presence and frequency count from there.
        seed: The seed of the reply; unused when greedy.
        allowed: The tokens to choose among, shape `(vocab_size,)`; None: all. Applied before
            everything else.

    Raises:
        InvalidParameterError: All that is allowed is banned by `logit_bias`.
        RuntimeFailure: The logits hold no number to choose by.
    """
    masked = logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
    scores = _adjusted(masked, params, history, reply_start)
    best = int(scores.argmax())
    if not np.isfinite(scores[best]):
        raise _nothing_to_choose(masked, allowed)
    if params.temperature == 0:
        return best
    ids = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    candidates, probabilities = _candidates(ids, scores, params)
    cumulative = np.cumsum(probabilities)
    drawn = random_number(seed, len(history)) * cumulative[-1]
    place = int(np.searchsorted(cumulative, drawn, side="right"))
    return int(candidates[min(place, len(candidates) - 1)])


def log_probabilities(logits: Scores) -> Weights:
    """Return the natural logarithms of the model's own probabilities, `(vocab_size,)`."""
    below_best = logits.astype(np.float64) - logits.max()
    return below_best - np.log(np.exp(below_best).sum())  # type: ignore[no-any-return]


def most_likely(log_probs: Weights, count: int) -> TokenArray:
    """Return the ids of the likeliest tokens, the likeliest first; of equal ones the lower id."""
    if not count:
        return np.empty(0, np.int64)
    count = min(count, len(log_probs))
    chosen = np.sort(np.argpartition(-log_probs, count - 1)[:count])
    return chosen[np.argsort(-log_probs[chosen], kind="stable")]


def random_number(seed: int, position: int) -> float:
    """
    Return the random number in [0, 1) that belongs to a position.

    Source: Philox, a counter-based generator (Salmon et al., SC 2011).
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _adjusted(
    logits: Scores, params: SamplingParams, history: TokenArray, reply_start: int
) -> Scores:
    """Return the logits after bias and penalties; the same array where there are none."""
    scores = logits
    if params.logit_bias:
        scores = scores.copy()
        scores[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1 and len(history):
        scores = scores.copy()
        seen = np.flatnonzero(np.bincount(history, minlength=len(scores)))
        # Source: CTRL (Keskar et al., 2019), which divides; transformers multiplies negative scores.
        penalty = params.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    reply = history[reply_start:]
    if (params.presence_penalty or params.frequency_penalty) and len(reply):
        counts = np.bincount(reply, minlength=len(scores)).astype(np.float32)
        scores = scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
        scores = scores.astype(np.float32, copy=False)
    return scores


def _nothing_to_choose(masked: Scores, allowed: Mask | None) -> RecollectError:
    if np.isfinite(masked[masked.argmax()]):
        what = "there is" if allowed is None else "the grammar allows"
        return InvalidParameterError(f"logit_bias bans every token that {what}: lift a ban.")
    return RuntimeFailure("The model gave no finite logits: its weights or its KV are damaged.")


def _candidates(
    ids: TokenArray, scores: Scores, params: SamplingParams
) -> tuple[TokenArray, Weights]:
    """
    Return those of the token ids that may be drawn, and their weights.

    In the order of transformers: temperature, top_k, top_p, min_p.
    """
    if 0 < params.top_k < len(ids):
        chosen = np.argpartition(-scores[ids], params.top_k - 1)[: params.top_k]
        ids = np.sort(ids[chosen])
    below_best = scores[ids].astype(np.float64) - scores.max()
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0, is right
        weights = np.exp(below_best / params.temperature)
    weights /= weights.sum()
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p:
        likely = weights >= params.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _nucleus(weights: Weights, top_p: float) -> npt.NDArray[np.intp]:
    """Return the indices of the fewest weights that hold the mass *top_p*, largest first."""
    count = min(_FIRST_GUESS, len(weights))
    while True:
        # Ascending ids before a stable sort: ties fall the same way every time.
        chosen = np.sort(np.argpartition(-weights, count - 1)[:count])
        order = chosen[np.argsort(-weights[chosen], kind="stable")]
        mass_before = np.cumsum(weights[order]) - weights[order]
        kept = order[mass_before < top_p]
        if len(kept) < count or count == len(weights):
            return kept
        count = len(weights)
