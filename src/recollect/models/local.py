"""
What a model is, once it is ready on this disk.

Values only: does not know where a model came from or how it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from recollect.errors import ConfigError
from recollect.files import combine

Format = Literal["openvino", "onnx-genai", "reference"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded now, without a network."""

    name: str
    """What the user called it."""
    format: Format
    folder: Path | None
    """
    Holds the .xml and .bin of openvino_model, _tokenizer, _detokenizer, or a genai_config.json, what
    it names, and a tokenizer.json; None for "reference".
    """
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
    search_defaults: Mapping[str, Any] = field(default_factory=dict)
    """How the folder says that tokens be chosen, in ONNX Runtime GenAI's words; only `recollect.og` asks."""
    onnx_config: Mapping[str, Any] | None = None
    """What ONNX Runtime GenAI is told, checked: it never reads the folder's own file."""
    native_library: Path | None = None
    """The vendor's operators that the user allowed by name."""
    architecture: str | None = None
    """What the model's own files call it, such as `llama`; None where they do not say."""
    graph: str = "openvino_model.xml"
    """The file in the folder that says what is computed; of OpenVINO's format alone."""
    source: Path | None = None
    """What says which values its weights have: the GGUF file that it was made of, the first of several,
    or an export's own folder. None: it is not here, or there is none."""
    long_context_length: int | None = None
    """Of a model with LongRoPE, which has other factors for it; None: the model has no such choice."""
    is_long: bool = False
    """Whether it was opened for that length; see `for_long_context`."""
    boundaries: tuple[int, ...] = ()
    """Lengths at which a model computes differently from there on: windows, first contexts; ascending."""

    def for_long_context(self) -> "LocalModel":
        """
        Return the same model with the factors for its long context; a model of its own for KV.

        Raises:
            ConfigError: It has no such choice.
        """
        if self.long_context_length is None:
            raise ConfigError(
                f"{self.name} has one context, of {self.context_length:,} tokens: leave "
                "--long-context out."
            )
        return replace(
            self,
            context_length=self.long_context_length,
            long_context_length=None,
            is_long=True,
            fingerprint=combine([self.fingerprint, "long"]),
        )
