"""
Downloads files from the model hub, with the huggingface_hub package where it is installed.

Does not know what the files are.
"""

import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any, Final

from recollect.errors import FetchError
from recollect.models.catalog import HubFile
from recollect.types import Progress

_PACKAGE: Final = "huggingface_hub"
_REACH_TIMEOUT_S: Final = 3.0  # asked before the download, which would retry for half a minute


def hub_is_installed() -> bool:
    """Return whether the optional package is there; it is not imported."""
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
    """Return a progress bar class, as the hub's package wants it, that draws nothing."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Reporter(tqdm):  # type: ignore[misc] # its base is known at run time only
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # a name for the hub's own settings
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            total = int(self.total) if self.total else None
            progress(f"downloading {file.filename}", int(self.n), total)
            return shown

    return Reporter
