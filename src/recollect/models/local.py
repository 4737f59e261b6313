"""
What a model is, once it is ready on this disk.

Values only: does not know where a model came from or how it runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["openvino", "reference"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded now, without a network."""

    name: str
    """What the user called it."""
    format: Format
    folder: Path | None
    """Holds the .xml and .bin of openvino_model, _tokenizer, _detokenizer; None for "reference"."""
    context_length: int
    """Most tokens that one sequence may have."""
    chat_template: str | None
    """Jinja source; None where the model has none."""
    eos_token_ids: frozenset[int]
    """Tokens that end a reply."""
    bos_token: str | None
    eos_token: str | None
    fingerprint: str
    """Hex sha256 of weights, tokenizer, template and format: KV is shared only under the same."""
