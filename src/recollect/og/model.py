"""
`Config` and `Model`: what a script loads, in the original's words.

Knows which options the folder sets; how they choose tokens is the generator's business.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from recollect import config
from recollect.conversation.loading import load
from recollect.conversation.model import Model as LoadedModel
from recollect.models.catalog import LocalModel
from recollect.models.prepare import prepare
from recollect.og.errors import as_runtime_error
from recollect.types import Profile


class Config:
    """
    What is to be loaded, and settings that replace those of its folder.

    Execution providers are accepted and ignored: which device computes is the runtime's choice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Final = str(path)
        self.search: dict[str, Any] = {}

    def overlay(self, settings: str) -> None:
        """
        Replace settings by those in a JSON text; of them, those under "search" have an effect.

        Raises:
            RuntimeError: It is not a JSON object.
        """
        try:
            content = json.loads(settings)
        except json.JSONDecodeError as cause:
            raise RuntimeError(f"The overlay is not JSON: {cause}") from cause
        search = content.get("search", {}) if isinstance(content, dict) else None
        if not isinstance(search, dict):
            raise RuntimeError("The overlay is no JSON object of settings.")  # noqa: TRY004 - as there
        self.search |= search

    def clear_providers(self) -> None:
        """Do nothing."""

    def append_provider(self, name: str) -> None:
        """Do nothing."""

    def set_provider_option(self, provider: str, name: str, value: str) -> None:
        """Do nothing."""


class Model:
    """
    A model that is loaded: a catalog name, a GGUF file, an OpenVINO folder, or an ONNX GenAI folder.

    Any number of generators share its KV memory; one finds what another has read.

    Args:
        path: As `recollect.load` takes it, or a `Config`.
        profile: `exact`, `fast` or `small`, as in `recollect.load`; not in the original.
        kv_memory: Most bytes of KV; not in the original.
        allow_native_code: As `recollect.load` takes it; not in the original, which runs any.

    Raises:
        RuntimeError: It cannot be had or read.
    """

    def __init__(
        self,
        path: "str | Path | Config",
        *,
        profile: Profile = config.DEFAULT_PROFILE,
        kv_memory: int | None = None,
        allow_native_code: str | None = None,
    ) -> None:
        overlay = path if isinstance(path, Config) else Config(path)
        with as_runtime_error():
            self._local = prepare(
                overlay.path, home=config.home(), allow_native_code=allow_native_code
            )
            self._loaded = load(
                overlay.path,
                profile=profile,
                kv_memory=kv_memory,
                allow_native_code=allow_native_code,
            )
        self._search = {**self._local.search_defaults, **overlay.search}

    @property
    def type(self) -> str:
        """Return the architecture, such as `llama`."""
        return self._local.architecture or self._local.format

    @property
    def device_type(self) -> str:
        """Return the kind of device that computes: `CPU`, unless the original's own build says another."""
        if self._local.format == "onnx-genai":
            return self._loaded.engine.info.name.rpartition("-")[2]
        return "CPU"

    @property
    def loaded(self) -> LoadedModel:
        """Return recollect's own model, which sessions can be held with; not in the original."""
        return self._loaded

    @property
    def local(self) -> LocalModel:
        """Return what the model is on disk; not in the original."""
        return self._local

    @property
    def search_defaults(self) -> Mapping[str, Any]:
        """Return the search options that folder and config set; not in the original."""
        return self._search

    def close(self) -> None:
        """Give all memory back now; not in the original, which waits for the garbage collector."""
        self._loaded.close()
