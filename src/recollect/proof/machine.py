"""
The machine card: on what, and with what, a number was measured.

Reads the operating system; names no host and no path.
"""

import contextlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

from recollect._version import __version__
from recollect.conversation.model import Model

_CPUINFO: Final = Path("/proc/cpuinfo")
_PACKAGES: Final = ("openvino", "openvino-genai", "onnxruntime-genai", "onnxruntime", "numpy")
_INTERESTING_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
"""What decides the arithmetic of the CPU plugin: without a bf16 flag, `fast` computes in f32."""


@dataclass(frozen=True, slots=True)
class MachineCard:
    """Where a measurement was taken."""

    cpu: str
    cpu_features: tuple[str, ...]
    """Those that decide how fast matrices are multiplied; empty where unknown."""
    physical_cores: int | None
    logical_cores: int | None
    memory_bytes: int
    load_average: float | None
    """Of the last minute, before the measurement; None where unknown."""
    system: str
    python: str
    versions: dict[str, str]
    model: str
    profile: str
    runtime: str
    kv_bytes_per_token: int
    kv_blocks: int
    context_length: int


def machine_card(model: Model) -> MachineCard:
    """Return the card of this machine with that model on it."""
    info = model.engine.info
    return MachineCard(
        cpu=_cpu_name(),
        cpu_features=_cpu_features(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        load_average=psutil.getloadavg()[0],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={"recollect": __version__, **_versions()},
        model=Path(model.name).name,
        profile=model.profile,
        runtime=info.name,
        kv_bytes_per_token=info.bytes_per_block // info.block_size,
        kv_blocks=model.engine.pool.num_blocks,
        context_length=model.context_length,
    )


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # some are extras
            installed[name] = metadata.version(name)
    return installed


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_features() -> tuple[str, ...]:
    present = set(_cpuinfo("flags").split())
    return tuple(flag for flag in _INTERESTING_FLAGS if flag in present)


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor; empty where the system has none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
