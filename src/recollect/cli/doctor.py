"""
`recollect doctor`: what this machine has, what recollect would use of it, and why.

Looks and changes nothing; loads no model. What is missing is told with what to do about it.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, TypeVar

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect import config, encryption
from recollect.cli.display import format_bytes
from recollect.cli.options import JsonOption, store_folder
from recollect.errors import RecollectError
from recollect.models.catalog import CATALOG, DEFAULT_MODEL
from recollect.models.listing import installed
from recollect.proof.report import Machine, this_machine

app = typer.Typer()

_EXTRAS: Final = {
    "recollect-llm[genai]": ("onnxruntime_genai", "ONNX GenAI folders"),
    "recollect-llm[llama]": ("xllamacpp", "GGUF files on llama.cpp"),
    "recollect-llm[grammar]": ("llguidance", "JSON schemas and tools"),
    "recollect-llm[encrypt]": ("cryptography", "an encrypted data folder"),
    "recollect-llm[server]": ("fastapi", "recollect serve"),
}
"""Of each extra the module that shows that it is installed, and what it is for."""
_Found = TypeVar("_Found")
_HALF_PRECISION: Final = ("BF16", "FP16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that OpenVINO sees."""

    name: str
    called: str
    """In full, such as the processor's name."""
    computes: tuple[str, ...]
    """The kinds of numbers that it can compute with, as OpenVINO names them."""
    is_used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """A library of llama.cpp on this machine."""

    origin: str
    """Who brought it: a variable, or a package with its release."""
    path: str
    refusal: str | None
    """Why it is not used, as a clause; None: it can be."""
    devices: tuple[str, ...] = ()
    """What the one that is used computes on, each with its free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What `recollect doctor` found, as `--json` prints it; sizes in bytes."""

    machine: Machine
    available_bytes: int
    """Memory that is free now."""
    kv_memory_bytes: int
    """The default budget for KV in memory."""
    home: str | None
    """The data folder; None where it cannot be one."""
    is_encrypted: bool
    free_disk_bytes: int | None
    """Of the disk with the data folder; None where that cannot be used."""
    kv_disk_bytes: int | None
    devices: tuple[Device, ...]
    llama: tuple[Llama, ...]
    """The libraries of llama.cpp, in the order in which they are tried."""
    extras: dict[str, bool]
    """Of each requirement that adds something whether it is installed."""
    models: tuple[str, ...]
    """Those that can be loaded without fetching anything."""
    would_use: dict[str, str]
    """What a chat without options takes, each with the reason."""
    problems: tuple[str, ...]
    """What would stop a chat; empty where all is well."""


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """
    Show what this machine has, what would be used of it, and why.

    The exit status is 1 where something would stop a chat.
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False, indent=2))
    else:
        _show(found, Console())
    if found.problems:
        raise typer.Exit(1)


def examine() -> Findings:
    """Return what this machine has, and what of it would be used."""
    problems: list[str] = []
    home = _tried(config.home, problems)
    devices = _tried(_devices, problems) or ()
    llama = _tried(_llama, problems) or ()
    here: tuple[str, ...] = ()
    free = kv_disk = None
    is_encrypted = False
    if home is not None:
        here = _tried(lambda: _models(home), problems) or ()
        free = _tried(lambda: _free_bytes(home), problems)
        kv_disk = _tried(lambda: config.default_kv_disk_bytes(store_folder()), problems)
        is_encrypted = encryption.is_encrypted(home)
    machine, kv_memory = this_machine(), config.default_kv_memory_bytes()
    return Findings(
        machine=machine,
        available_bytes=psutil.virtual_memory().available,
        kv_memory_bytes=kv_memory,
        home=None if home is None else str(home),
        is_encrypted=is_encrypted,
        free_disk_bytes=free,
        kv_disk_bytes=kv_disk,
        devices=devices,
        llama=llama,
        extras={name: find_spec(module) is not None for name, (module, _) in _EXTRAS.items()},
        models=here,
        would_use=_would_use(devices, llama, here, kv_memory, kv_disk),
        problems=tuple(dict.fromkeys(problems)),
    )


def _tried(find: Callable[[], _Found], problems: list[str]) -> _Found | None:
    try:
        return find()
    except (RecollectError, OSError, ImportError) as error:
        problems.append(str(error))
        return None


def _devices() -> tuple[Device, ...]:
    # Not at the top: the library takes half a second, and whether it can be loaded is a finding.
    from recollect.runtime.openvino import DEVICE, devices  # noqa: PLC0415 - as above

    return tuple(
        Device(name=name, called=called, computes=computes, is_used=name == DEVICE)
        for name, called, computes in devices()
    )


def _llama() -> tuple[Llama, ...]:
    from recollect.runtime.llama_library import (  # noqa: PLC0415 - as above
        found_libraries,
        library,
        refusal_of,
    )

    found, used = [], False
    for one in found_libraries():
        refusal = refusal_of(one)
        devices: tuple[str, ...] = ()
        if refusal is None and used:
            refusal = "one before it is used"
        elif refusal is None:
            used = True
            devices = tuple(
                f"{device.name} ({device.description}), {format_bytes(device.free_bytes)} free"
                for device in library().devices()
            )
        found.append(Llama(origin=one.origin, path=str(one.path), refusal=refusal, devices=devices))
    return tuple(found)


def _models(home: Path) -> tuple[str, ...]:
    return tuple(one.name for one in installed(home) if one.is_installed)


def _free_bytes(folder: Path) -> int:
    """Return the free space where the data folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _would_use(
    devices: tuple[Device, ...],
    llama: tuple[Llama, ...],
    here: tuple[str, ...],
    kv_memory: int,
    kv_disk: int | None,
) -> dict[str, str]:
    used = {
        "model": f"{DEFAULT_MODEL}, because it is the default, "
        + (
            "and it is on this disk"
            if DEFAULT_MODEL in here
            else f"and {format_bytes(CATALOG[DEFAULT_MODEL].bytes)} are fetched first"
        )
    }
    device = next((one for one in devices if one.is_used), None)
    if device is not None:
        kind = next((kind for kind in _HALF_PRECISION if kind in device.computes), None)
        precision = (
            "f32, because the processor has no arithmetic of half the width"
            if kind is None
            else f"{kind.lower()} where OpenVINO prefers it, which this processor has"
        )
        others = [one.name for one in devices if not one.is_used]
        unused = f"; {', '.join(others)} cannot, yet" if others else ""
        used["device"] = (
            f"OpenVINO's {device.name}, because paged attention gives its KV out there{unused}"
        )
        card = next((d for one in llama for d in one.devices if not d.startswith("CPU")), None)
        if card is not None:
            used["GGUF files"] = f"llama.cpp on {card}, because a graphics card is quicker"
        elif any(one.refusal is None for one in llama):
            used["GGUF files"] = (
                "OpenVINO where it reads them exactly, and llama.cpp for the others"
            )
        used["arithmetic"] = f"profile {config.DEFAULT_PROFILE}: f16 KV, and {precision}"
    used["cache in memory"] = (
        f"at most {format_bytes(kv_memory)}, a quarter of what is free, and no more than four full "
        "contexts need; --kv-memory changes it"
    )
    if kv_disk is not None:
        used["cache on disk"] = (
            f"at most {format_bytes(kv_disk)}: a tenth of what is free, or 10 GB if that is less; "
            "--kv-disk changes it"
            if kv_disk
            else "none, because the disk has no room; --kv-disk changes it"
        )
    return used


def _show(found: Findings, console: Console) -> None:
    machine = found.machine
    features = f" ({', '.join(machine.cpu_features)})" if machine.cpu_features else ""
    cores = f"{machine.physical_cores or '?'} cores, {machine.logical_cores or '?'} threads"
    free = "unknown" if found.free_disk_bytes is None else format_bytes(found.free_disk_bytes)
    encrypted = "encrypted" if found.is_encrypted else "not encrypted"
    rows = [
        ("processor", f"{machine.cpu}{features}, {cores}"),
        (
            "memory",
            f"{format_bytes(machine.memory_bytes)}, {format_bytes(found.available_bytes)} free",
        ),
        ("disk", f"{free} free for {found.home}, {encrypted}" if found.home else "unknown"),
        ("system", f"{machine.system}, Python {machine.python}"),
        ("versions", ", ".join(f"{name} {one}" for name, one in machine.versions.items())),
        *(
            (f"device {one.name}", f"{one.called}: {', '.join(one.computes)}")
            for one in found.devices
        ),
        *((f"llama.cpp {n}", _library(one)) for n, one in enumerate(found.llama, 1)),
        ("models here", ", ".join(found.models) or "none yet"),
        *((name, _extra(name, there)) for name, there in found.extras.items()),
    ]
    _print_rows(console, rows)
    console.print("\nA chat without options would use", style="bold")
    _print_rows(console, list(found.would_use.items()))
    for problem in found.problems:
        console.print(Text(f"Problem: {problem}", "red"), highlight=False)


def _library(library: Llama) -> str:
    state = (
        "; ".join(library.devices) if library.refusal is None else f"not used: {library.refusal}"
    )
    return f"{library.origin}: {state}"


def _extra(name: str, is_there: bool) -> str:
    purpose = _EXTRAS[name][1]
    return (
        f"for {purpose}: installed"
        if is_there
        else f"for {purpose}: not installed; pip install '{name}'"
    )


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(f"{name:<15}", "dim"), Text(value))
    console.print(table)
