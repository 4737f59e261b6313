"""
llama.cpp's shared library: where it is found, how it is called, and which builds are known.

A binding of our own by ctypes, to the functions that the runtime needs. A library is used only if the
default parameters that it gives, read with the structures below, are those that this release of llama.cpp
is known to have: a field more or less shifts them, and passing a wrong structure would end the process.
Knows no KV and no conversations. Source of all structures and constants: include/llama.h of llama.cpp
b11549, and of the release in llama-cpp-python 0.3.36.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recollect.errors import UnsupportedModelError
from recollect.runtime.llama_threads import short_spins

_log = logging.getLogger(__name__)

VARIABLE: Final = "RECOLLECT_LLAMA_LIBRARY"
"""Names a libllama of one's own, before all others."""
XLLAMACPP: Final = "2026.10.11549"
"""The release of xllamacpp whose shared object this binding was tested with; no other is used."""
LLAMA_CPP_PYTHON: Final = ("0.3.36", "0.3.37")
"""The first release of llama-cpp-python that was tested, and the first one that was not."""

F32, F16, Q8_0, Q4_0, BF16 = 0, 1, 8, 2, 30
KV_TYPES: Final[Mapping[str, int]] = {
    "f32": F32,
    "f16": F16,
    "bf16": BF16,
    "q8_0": Q8_0,
    "q4_0": Q4_0,
}
"""Types of KV by name. Source: `enum ggml_type`."""
QUANTIZED: Final = ("q8_0", "q4_0")
"""Those of them that only attention in one kernel reads."""

_POINTER = c_void_p
_ROOM: Final = 512
"""Bytes behind each structure: where a library's own is longer, it writes there, and nothing breaks."""


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", _POINTER),
        ("tensor_buft_overrides", _POINTER),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", _POINTER),
        ("progress_callback", _POINTER),
        ("progress_callback_user_data", _POINTER),
        ("kv_overrides", _POINTER),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("room", ctypes.c_char * _ROOM),
    )


_CONTEXT_HEAD: Final = (
    ("n_ctx", c_uint32),
    ("n_batch", c_uint32),
    ("n_ubatch", c_uint32),
    ("n_seq_max", c_uint32),
    ("n_rs_seq", c_uint32),
    ("n_outputs_max", c_uint32),
    ("n_outputs_max_per_seq", c_uint32),
    ("n_threads", c_int32),
    ("n_threads_batch", c_int32),
    ("ctx_type", c_int32),
    ("rope_scaling_type", c_int32),
    ("pooling_type", c_int32),
    ("attention_type", c_int32),
    ("flash_attn_type", c_int32),
    ("rope_freq_base", c_float),
    ("rope_freq_scale", c_float),
    ("yarn_ext_factor", c_float),
    ("yarn_attn_factor", c_float),
    ("yarn_beta_fast", c_float),
    ("yarn_beta_slow", c_float),
    ("yarn_orig_ctx", c_uint32),
    ("defrag_thold", c_float),
    ("cb_eval", _POINTER),
    ("cb_eval_user_data", _POINTER),
    ("type_k", c_int32),
    ("type_v", c_int32),
)
_CONTEXT_TAIL: Final = (
    ("abort_callback", _POINTER),
    ("abort_callback_data", _POINTER),
    ("embeddings", c_bool),
    ("offload_kqv", c_bool),
    ("no_perf", c_bool),
    ("op_offload", c_bool),
    ("swa_full", c_bool),
    ("kv_unified", c_bool),
    ("samplers", _POINTER),
    ("n_samplers", c_size_t),
    ("ctx_other", _POINTER),
    ("room", ctypes.c_char * _ROOM),
)


class ContextParams(ctypes.Structure):
    """`struct llama_context_params` since builds around b11500."""

    _fields_ = (*_CONTEXT_HEAD, ("moe_cache_size", c_size_t), *_CONTEXT_TAIL)


class OlderContextParams(ctypes.Structure):
    """`struct llama_context_params` before `moe_cache_size`."""

    _fields_ = (*_CONTEXT_HEAD, *_CONTEXT_TAIL)


class Batch(ctypes.Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


MODEL_DEFAULTS: Final[Mapping[str, Any]] = {
    "devices": None,
    "tensor_buft_overrides": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
"""What `llama_model_default_params` gives."""
CONTEXT_DEFAULTS: Final[Mapping[str, Any]] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": F16,
    "type_v": F16,
    "abort_callback": None,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}
"""What `llama_context_default_params` gives."""

_FUNCTIONS: Final[Mapping[str, tuple[Any, tuple[Any, ...]]]] = {
    "llama_backend_init": (None, ()),
    "llama_version": (c_char_p, ()),
    "llama_log_set": (None, (_POINTER, _POINTER)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_free": (None, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_seq_rm": (c_bool, (_POINTER, c_int32, c_int32, c_int32)),
    "llama_state_seq_get_size": (c_size_t, (_POINTER, c_int32)),
    "llama_state_seq_get_data": (c_size_t, (_POINTER, _POINTER, c_size_t, c_int32)),
    "llama_state_seq_set_data": (c_size_t, (_POINTER, _POINTER, c_size_t, c_int32)),
    "llama_decode": (c_int32, (_POINTER, Batch)),
    "llama_get_logits_ith": (_POINTER, (_POINTER, c_int32)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_meta_val_str": (c_int32, (_POINTER, c_char_p, c_char_p, c_size_t)),
    "llama_model_n_swa": (c_int32, (_POINTER,)),
    "llama_model_is_recurrent": (c_bool, (_POINTER,)),
    "llama_model_is_hybrid": (c_bool, (_POINTER,)),
    "llama_model_is_diffusion": (c_bool, (_POINTER,)),
    "llama_model_has_encoder": (c_bool, (_POINTER,)),
    "llama_model_has_decoder": (c_bool, (_POINTER,)),
    "llama_vocab_n_tokens": (c_int32, (_POINTER,)),
    "llama_vocab_type": (c_int32, (_POINTER,)),
    "llama_vocab_get_attr": (c_int32, (_POINTER, c_int32)),
    "llama_tokenize": (
        c_int32,
        (_POINTER, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (c_int32, (_POINTER, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "ggml_backend_dev_count": (c_size_t, ()),
    "ggml_backend_dev_get": (_POINTER, (c_size_t,)),
    "ggml_backend_dev_name": (c_char_p, (_POINTER,)),
    "ggml_backend_dev_description": (c_char_p, (_POINTER,)),
    "ggml_backend_dev_type": (c_int32, (_POINTER,)),
    "ggml_backend_dev_memory": (None, (_POINTER, POINTER(c_size_t), POINTER(c_size_t))),
}
_LOG_CALLBACK: Final = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_DEVICE_KINDS: Final = {0: "CPU", 1: "GPU", 2: "iGPU", 3: "accelerator"}
_BACKENDS: Final = (
    "ggml-base",
    "ggml-cpu",
    "ggml-blas",
    "ggml-cuda",
    "ggml-metal",
    "ggml-vulkan",
    "ggml",
)
"""What a libllama is linked with, in the order in which one needs the other."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that llama.cpp can compute on."""

    name: str
    """As the library names it: `CUDA0`, `Metal`, `CPU`."""
    description: str
    kind: str
    """`CPU`, `GPU`, `iGPU` or `accelerator`."""
    free_bytes: int
    total_bytes: int
    handle: int = 0
    """The library's own."""

    @property
    def backend(self) -> str:
        """Return what it is one of, such as `CUDA`."""
        return self.name.rstrip("0123456789")

    @property
    def is_graphics(self) -> bool:
        """Return whether it is a graphics card, with memory of its own or not."""
        return self.kind in ("GPU", "iGPU")


@dataclass(frozen=True, slots=True)
class Found:
    """A library that lies on this disk."""

    path: Path
    build: str
    """Package and release, or version and digest: KV of two builds is not the same."""
    origin: str
    """Who brought it, for people."""


class LlamaLibrary:
    """
    A library that was loaded and checked: its functions, by their names in llama.h.

    Foreign memory is reached through it, so whoever calls a function checks the arguments before.

    Raises:
        UnsupportedModelError: It cannot be loaded, or its structures are not known.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        try:
            with short_spins():
                self._library = _loaded(found.path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, list(arguments)
                setattr(self, name, function)
        except (OSError, AttributeError) as cause:
            raise UnsupportedModelError(
                f"{found.path} cannot be used as llama.cpp's library ({cause}): {how_to_install()}"
            ) from cause
        self._check()
        self._error = ""
        self._on_log = _LOG_CALLBACK(self._note)
        self.llama_log_set(ctypes.cast(self._on_log, c_void_p), None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not a function of llama.cpp that is bound here")

    def model_params(self) -> Any:
        """Return the default parameters of a model."""
        return self._library.llama_model_default_params()

    def context_params(self) -> Any:
        """Return the default parameters of a context."""
        return self._library.llama_context_default_params()

    def load_model(self, path: Path, params: Any) -> int | None:
        """Return a handle of the model in a file; None where it cannot be loaded."""
        self._error = ""
        handle: int | None = self._library.llama_model_load_from_file(os.fsencode(path), params)
        return handle

    def new_context(self, model: int, params: Any) -> int | None:
        """Return a handle of a new context; None where there is no memory for it."""
        self._error = ""
        handle: int | None = self._library.llama_init_from_model(model, params)
        return handle

    def decode(self, context: int | None, batch: Batch) -> int:
        """Compute a batch; return 0, or a number of the library's for what failed."""
        self._error = ""
        code: int = self.llama_decode(context, batch)
        return code

    def field(self, model: int | None, name: str) -> str:
        """Return a field of a model's file as text, at most 255 bytes; empty: it has no such field."""
        text = ctypes.create_string_buffer(256)
        self.llama_model_meta_val_str(model, name.encode(), text, len(text))
        return text.value.decode(errors="replace")

    def devices(self) -> list[Device]:
        """Return the devices that the library computes on."""
        found = []
        for number in range(self.ggml_backend_dev_count()):
            device = self.ggml_backend_dev_get(number)
            free, total = c_size_t(), c_size_t()
            self.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(
                Device(
                    self.ggml_backend_dev_name(device).decode(),
                    self.ggml_backend_dev_description(device).decode(errors="replace"),
                    _DEVICE_KINDS.get(self.ggml_backend_dev_type(device), "other"),
                    free.value,
                    total.value,
                    device,
                )
            )
        return found

    def why(self) -> str:
        """Return the first error of the last call, from which others follow, as a clause."""
        return self._error or "it does not say why"

    def _note(self, level: int, text: bytes | None, _: int | None) -> None:
        said = (text or b"").decode(errors="replace").strip()
        _log.debug("llama.cpp: %s", said)
        if level >= _ERROR_LEVEL and said and not self._error:
            self._error = said

    def _check(self) -> None:
        """Bind what takes structures, after finding the ones whose default values are right."""
        library = self._library
        library.llama_model_default_params.restype = ModelParams
        wrong = _first_wrong(library.llama_model_default_params(), MODEL_DEFAULTS)
        for layout in (ContextParams, OlderContextParams):
            if wrong:
                break
            library.llama_context_default_params.restype = layout
            unlike = _first_wrong(library.llama_context_default_params(), CONTEXT_DEFAULTS)
            if unlike is None:
                library.llama_model_load_from_file.restype = _POINTER
                library.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
                library.llama_init_from_model.restype = _POINTER
                library.llama_init_from_model.argtypes = [_POINTER, layout]
                return
        raise UnsupportedModelError(
            f"{self.found.path} is a build of llama.cpp that is not known here (its default "
            f"{wrong or unlike} is another): {how_to_install()}"
        )


_ERROR_LEVEL: Final = 4
"""Of `enum ggml_log_level`; 5 continues the line before."""


def _first_wrong(params: ctypes.Structure, expected: Mapping[str, Any]) -> str | None:
    """Return the first field that has not the value that it is known to have."""
    return next((name for name, value in expected.items() if getattr(params, name) != value), None)


def _loaded(path: Path) -> ctypes.CDLL:
    """
    Load a library, and before it those beside it that it is linked with.

    Their symbols stay their own (RTLD_LOCAL): a backend for graphics cards may hold a C++ runtime of its
    own, and where libllama's calls went into that, loading any model was a segmentation fault.
    """
    for beside in _beside(path) if path.name.startswith(("libllama", "llama.")) else ():
        ctypes.CDLL(str(beside))
    return ctypes.CDLL(str(path))


def _beside(path: Path) -> Iterator[Path]:
    """Yield the libraries beside a libllama that it is linked with."""
    for name in _BACKENDS:
        for beside in (path.with_name(f"lib{name}{path.suffix}"), path.with_name(f"{name}.dll")):
            if beside.is_file():
                yield beside


def how_to_install() -> str:
    """Return the sentence that says how llama.cpp is had on this machine."""
    if sys.platform == "win32":
        return (
            "install `pip install llama-cpp-python`, or set "
            f"{VARIABLE} to a llama.dll of build b{XLLAMACPP.rsplit('.', 1)[1]}."
        )
    return (
        'install it with `pip install "recollect-llm[llama]"`, or for a graphics card '
        f"`pip install llama-cpp-python=={LLAMA_CPP_PYTHON[0]}` with its CMAKE_ARGS, or set {VARIABLE}."
    )


def found_libraries() -> list[Found]:
    """
    Return the libraries on this machine in the order in which they are tried.

    First what the variable names; then llama-cpp-python, which people build for their graphics card; then
    xllamacpp, which is in the extra `llama`.

    Raises:
        UnsupportedModelError: The variable names no file.
    """
    return list(_found())


def _found() -> Iterator[Found]:
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise UnsupportedModelError(
                f"{VARIABLE} names {named}, where no file is: give the path of a libllama, or unset it."
            )
        yield Found(path, f"llama.cpp-{_digest_of(path)}", VARIABLE)
    for package, module, pattern in (
        ("llama-cpp-python", "llama_cpp", "lib/*llama.*"),
        ("xllamacpp", "xllamacpp", "xllamacpp*.so"),
    ):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        spec = importlib.util.find_spec(module)  # without importing it
        places = None if spec is None else spec.submodule_search_locations
        for place in places or ():
            for path in sorted(Path(place).glob(pattern)):
                if path.suffix in (".so", ".dylib", ".dll") and "mtmd" not in path.name:
                    yield Found(path, f"{package}-{version}", f"{package} {version}")
                    break


def refusal_of(found: Found) -> str | None:
    """Return why a library is not used, as a clause; None: it may be."""
    package, _, version = found.build.rpartition("-")
    if package == "xllamacpp" and version != XLLAMACPP:
        return f"it is {version}, and {XLLAMACPP} was tested"
    if package == "llama-cpp-python":
        first, beyond = LLAMA_CPP_PYTHON
        if not _numbers(first) <= _numbers(version) < _numbers(beyond):
            return f"it is {version}, and from {first} to below {beyond} was tested"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@functools.lru_cache(maxsize=8)
def _digest_of(path: Path) -> str:
    """
    Return a short digest of a library and of those beside it that it is linked with.

    Read once by a process: those for graphics cards have hundreds of megabytes.
    """
    digest = hashlib.sha256()
    for file in (path, *_beside(path)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


@functools.cache
def library() -> LlamaLibrary:
    """
    Return llama.cpp, of which a process has one.

    Raises:
        UnsupportedModelError: There is none, or none that can be used; the message says how to get one.
    """
    if (found := chosen()) is not None:
        return LlamaLibrary(found)
    refusals = "; ".join(f"{found.origin}: {refusal_of(found)}" for found in found_libraries())
    reason = f"No llama.cpp on this machine can be used ({refusals})"
    reason = reason if refusals else "llama.cpp is not on this machine"
    raise UnsupportedModelError(f"{reason}: {how_to_install()}")


def chosen() -> Found | None:
    """Return the library that is used, which may not be loaded yet; None: there is none that may be."""
    return next((found for found in found_libraries() if refusal_of(found) is None), None)


def is_there() -> bool:
    """Return whether a library that may be used is on this machine; loads nothing."""
    return chosen() is not None
