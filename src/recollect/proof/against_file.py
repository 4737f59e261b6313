"""
Check that the model that runs is the model in its file.

The same tokens go through the runtime, as prompts and one at a time, and through a reference that
reads the file by itself; the logits are compared place by place. This sees what comparing reuse with
our own fresh prefill cannot: wrong weights, wrong RoPE, a norm that is missing.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np

from recollect.conversation.model import Model
from recollect.proof.gguf_reference import open_gguf
from recollect.proof.openvino_reference import open_openvino
from recollect.proof.reference_model import Array, NotCompared, log_softmax, logits_at
from recollect.types import Profile

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
