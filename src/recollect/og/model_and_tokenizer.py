"""
What a script for ONNX Runtime GenAI loads, in the original's words: model, tokenizer, and their settings.

`Config` and `Model` say what is loaded, `Tokenizer`, `TokenizerStream` and `Tensor` give text and ids
as the original's arrays. `as_runtime_error` is the one place where recollect's exceptions become
those that such scripts catch. Does not choose tokens.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from recollect import config
from recollect.conversation.loading import load
from recollect.conversation.model import Model as LoadedModel
from recollect.errors import RecollectError
from recollect.models.catalog import LocalModel
from recollect.models.openvino_folder import as_ids
from recollect.models.prepare import prepare
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import Detokenizer
from recollect.types import Profile


@contextmanager
def as_runtime_error() -> Iterator[None]:
    """Turn every exception of recollect's into a RuntimeError of the same words, the cause chained."""
    try:
        yield
    except RecollectError as cause:
        raise RuntimeError(str(cause)) from cause


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
        return self._loaded.engine.info.device

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


Ids = Sequence[int] | npt.NDArray[Any]


class Tensor:
    """A batch of ids, `(texts, longest)`, the shorter padded at their end."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array: Final = array

    def as_numpy(self) -> npt.NDArray[Any]:
        """Return the ids as an array."""
        return self._array

    def shape(self) -> list[int]:
        """Return the shape as a list."""
        return list(self._array.shape)


class TokenizerStream:
    """Turns tokens into text one by one; a character comes when its last token does."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def decode(self, token: int) -> str:
        """Return the text that *token* completes, which may be empty."""
        return self._detokenizer.push(int(token))


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.loaded.tokenizer
        self._local = model.local
        self._special = _special_ids(model.local)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of *text*, `(n,)`: nothing added, special tokens recognised."""
        return np.array(self._tokenizer.encode(text), np.int32)

    def decode(self, tokens: Ids) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(np.asarray(tokens, np.int64).reshape(-1).tolist())

    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of several texts, padded at their end to the longest."""
        rows = [self._tokenizer.encode(text) for text in texts]
        batch = np.full((len(rows), max(map(len, rows), default=0)), self.pad_token_id, np.int32)
        for row, ids in zip(batch, rows, strict=True):
            row[: len(ids)] = ids
        return Tensor(batch)

    def decode_batch(self, batch: Tensor | npt.NDArray[Any]) -> list[str]:
        """Return the texts of several rows of ids."""
        rows = batch.as_numpy() if isinstance(batch, Tensor) else batch
        return [self.decode(row) for row in rows]

    def apply_chat_template(
        self,
        messages: str,
        *,
        template_str: str | None = None,
        tools: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """
        Return a conversation as the text that the model was trained on.

        Args:
            messages: A JSON list of objects with "role" and "content".
            template_str: Another template than the model's.
            tools: A JSON list of descriptions.
            add_generation_prompt: Whether the text ends with the opening of a reply.

        Raises:
            RuntimeError: That is no JSON, or the template refuses it.
        """
        with as_runtime_error():
            template = ChatTemplate(
                template_str or self._local.chat_template,
                bos_token=self._local.bos_token,
                eos_token=self._local.eos_token,
                is_own=template_str is None and self._local.folder is None,
            )
            return template.render(
                _parsed("messages", messages),
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else _parsed("tools", tools),
            )

    def create_stream(self) -> TokenizerStream:
        """Return what turns the tokens of one reply into text as they come."""
        return TokenizerStream(Detokenizer(self._tokenizer))

    def to_token_id(self, text: str) -> int:
        """Return the one id that *text* encodes to; -1 where it takes none or several."""
        number = self._tokenizer.token_id(text)
        return -1 if number is None else number

    @property
    def eos_token_ids(self) -> npt.NDArray[np.int32]:
        """Return the ids that end a reply."""
        return np.array(sorted(self._local.eos_token_ids), np.int32)

    @property
    def bos_token_id(self) -> int:
        """
        Return the id that begins a text.

        Raises:
            RuntimeError: There is none.
        """
        return self._special_id("bos_token_id", self._local.bos_token)

    @property
    def pad_token_id(self) -> int:
        """
        Return the id that fills a batch: where the model names none, the one that ends a reply.

        Raises:
            RuntimeError: There is neither.
        """
        return self._special_id("pad_token_id", self._local.eos_token)

    def _special_id(self, name: str, text: str | None) -> int:
        number = self._special.get(name)
        if number is None and text is not None:
            number = self._tokenizer.token_id(text)
        if number is None:
            raise RuntimeError(f"{name} is not defined for this model")
        return number


def _special_ids(local: LocalModel) -> dict[str, int]:
    """Return the ids that an ONNX GenAI folder names."""
    named = {} if local.onnx_config is None else local.onnx_config["model"]
    found = {name: as_ids(named.get(name)) for name in ("bos_token_id", "pad_token_id")}
    return {name: ids[0] for name, ids in found.items() if ids}


def _parsed(name: str, text: str) -> Any:
    if not isinstance(text, str):
        raise TypeError(
            f"{name} is {type(text).__name__}; it must be a JSON text, as json.dumps makes it"
        )
    try:
        content = json.loads(text)
    except json.JSONDecodeError as cause:
        raise RuntimeError(f"{name} is not JSON: {cause}") from cause
    if not isinstance(content, list):
        raise RuntimeError(f"{name} is no JSON list.")  # noqa: TRY004 - as in the original
    return content
