"""
Which settings in a folder's genai_config.json are passed on to ONNX Runtime GenAI.

The library does what the file says: it loads native code, writes files, and opens paths. The file may come
from a stranger, so it is checked against tables of settings that are known to be harmless, and anything else
is refused. The library gets the checked values and never the file. This module opens no file, but looks
which files exist.

Source of the names: the library's own reader, src/config.cpp of release 0.18; for AMD's builds, the pages and
samples of Ryzen AI 1.3 to 1.7.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Final, Literal, NoReturn

from recollect import files
from recollect.errors import UnsupportedModelError

CONFIG_NAME: Final = "genai_config.json"
MOST_CONFIG_BYTES: Final = 4 * files.MIB
"""Most bytes of a genai_config.json: a thousand times what the library's builder writes."""

_MOST_THREADS: Final = 256
_MOST_NUMBER: Final = 2**31 - 1
_MOST_WORD: Final = 256
_MOST_FILES: Final = 64
"""Most files that a config names. A pipeline has one for each stage; the longest known one has four."""

_Kind = Literal["number", "threads", "flag", "word", "file", "graph", "numbers", "words"]
_Schema = Mapping[str, "_Kind | _Schema"]


def _each(kind: _Kind, *names: str) -> dict[str, "_Kind | _Schema"]:
    return dict.fromkeys(names, kind)


_ANY: Final = "*"
"""Stands for any key of an object in a schema. The makers of models choose names of tensors and stages."""

_RUN_OPTIONS: Final[_Schema] = _each(
    "word",
    "gpu_graph_id",
    "memory.enable_memory_arena_shrinkage",
    "disable_synchronize_execution_providers",
)
_VENDOR_OPTIONS: Final[_Schema] = _each(
    "word",
    "dd_use_aie_rope",
    "hybrid_dbg_use_aie_rope",
    "hybrid_opt_chunk_context",
    "hybrid_opt_chunk_context_threshold",
    "hybrid_opt_disable_npu_ops",
    "hybrid_opt_free_after_prefill",
    "hybrid_opt_gpu_jit",
    "hybrid_opt_host_prefill",
    "hybrid_opt_max_seq_length",
    "hybrid_opt_npu_jit",
    "hybrid_opt_qos_priority",
    "hybrid_opt_token_backend",
    "fusion_opt_io_bind_kv_cache",
    "max_length_for_kv_cache",
)
_PROVIDERS: Final[dict[str, _Schema]] = {
    "cpu": {},
    "cuda": _each(
        "word",
        "device_id",
        "enable_cuda_graph",
        "enable_skip_layer_norm_strict_mode",
        "gpu_mem_limit",
        "arena_extend_strategy",
        "do_copy_in_default_stream",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "prefer_nhwc",
        "sdpa_kernel",
        "use_tf32",
    ),
    "dml": _each(
        "word",
        "device_filter",
        "device_id",
        "disable_metacommands",
        "enable_graph_capture",
        "performance_preference",
    ),
    "webgpu": _each(
        "word",
        "dawnBackendType",
        "deviceId",
        "enableGraphCapture",
        "powerPreference",
        "preferredLayout",
        "validationMode",
    ),
    "qnn": _each(
        "word",
        "backend_type",
        "device_id",
        "enable_htp_fp16_precision",
        "enable_htp_shared_memory_allocator",
        "enable_htp_weight_sharing",
        "htp_arch",
        "htp_graph_finalization_optimization_mode",
        "htp_performance_mode",
        "offload_graph_io_quantization",
        "qnn_context_priority",
        "rpc_control_latency",
        "soc_model",
        "vtcm_mb",
    ),
    "openvino": _each(
        "word",
        "device_type",
        "disable_dynamic_shapes",
        "enable_causallm",
        "model_priority",
        "num_of_threads",
        "num_streams",
        "precision",
    ),
    "nvtensorrtrtx": _each(
        "word", "device_id", "enable_cuda_graph", "nv_multi_profile_enable", "nv_max_workspace_size"
    ),
    "vitisai": {},
    "amdgpu": {},
    "ryzenai": {**_VENDOR_OPTIONS, "external_data_file": "file"},
}
"""Harmless options of execution providers, which excludes those that name a library, cache or output file."""

_DEVICES: Final[_Schema] = {
    "hardware_device_type": "word",
    **_each("number", "hardware_device_id", "hardware_vendor_id"),
}
_SESSION_OPTIONS: Final[_Schema] = {
    **_each("threads", "intra_op_num_threads", "inter_op_num_threads"),
    **_each("number", "log_severity_level", "log_verbosity_level"),
    **_each("flag", "enable_cpu_mem_arena", "enable_mem_pattern"),
    **_each(
        "word",
        "log_id",
        "graph_optimization_level",
        "ep.cuda.fpa_intb_gemm",
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "optimization.disable_specified_optimizers",
        "session.disable_cpu_ep_fallback",
        "session.disable_prepacking",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_quant_qdq_cleanup",
        "session.inter_op.allow_spinning",
        "session.intra_op.allow_spinning",
        "session.qdq_matmulnbits_accuracy_level",
        "session.set_denormal_as_zero",
        "session.use_device_allocator_for_initializers",
        "session.use_env_allocators",
    ),
}
_NATIVE: Final = "custom_ops_library"
_WITH_NATIVE: Final[_Schema] = {
    "external_data_file": "file",
    "custom_allocator": "word",
    "config_entries": {**_VENDOR_OPTIONS, "dd_cache": "word"},
}
"""Further session options of vendors' builds with a library of operators; the public build knows none."""

_GRAPH: Final[_Schema] = {
    "filename": "graph",
    "session_options": {},  # checked by `_Check._session_options`
    "run_options": _RUN_OPTIONS,
    "inputs": {_ANY: "word"},
    "outputs": {_ANY: "word"},
}
_SIZES: Final = _each(
    "number",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_size",
)
_STAGE: Final[_Schema] = {
    **_GRAPH,
    **_each("flag", "run_on_prompt", "run_on_token_gen", "is_lm_head", "run_on_cpu"),
    **_each("flag", "inherit_session_options"),
    "reset_session_idx": "number",
    "inputs": "words",
    "outputs": "words",
    "output_names_forwarder": {_ANY: "word"},
}
_DECODER: Final[_Schema] = {
    **_GRAPH,
    **_SIZES,
    **_each("number", "conv_cache_size", "ple_token_pad_id"),
    "layer_types": "words",
    "sliding_window": {
        **_each("number", "window_size", "pad_value", "cache_slack"),
        **_each("flag", "slide_key_value_cache", "slide_inputs"),
        "alignment": "word",
        "layers": "numbers",
    },
}
_MODEL: Final[_Schema] = {
    "type": "word",
    **_each(
        "number",
        "vocab_size",
        "context_length",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "sep_token_id",
        "image_token_id",
        "audio_token_id",
        "boa_token_id",
        "video_token_id",
        "vision_start_token_id",
        "bot_token_id",
        "eot_token_id",
        "bor_token_id",
        "eor_token_id",
    ),
    "decoder": _DECODER,
    "encoder": {**_GRAPH, **_SIZES},
    "embedding": _GRAPH,
    "vision": {
        **_GRAPH,
        **_each("file", "config_filename", "adapter_filename"),
        **_each("number", "spatial_merge_size", "tokens_per_second", "patch_size"),
        **_each("number", "num_visual_tokens", "window_size", "num_position_embeddings"),
    },
    "speech": {**_GRAPH, **_each("file", "config_filename", "adapter_filename")},
}
_SEARCH_PASSED_ON: Final[_Schema] = {"chunk_size": "number", "past_present_share_buffer": "flag"}
"""Settings under `search` that are passed on. The others are for sampling, which the library does not do."""

_NEEDED: Final = ("num_hidden_layers", "num_key_value_heads", "head_size")


@dataclass(frozen=True, slots=True)
class OnnxConfig:
    """The checked settings for ONNX Runtime GenAI, and the files that they name."""

    content: Mapping[str, Any]
    """The settings, as the JSON object that the library reads."""
    file_names: tuple[str, ...]
    """The files that the settings name, relative to the folder. All are regular files in it."""
    native_library: Path | None = None
    """The operator library that the user allowed, which is `custom_ops_library` in the settings."""


def parse(text: str, path: Path) -> Mapping[str, Any]:
    """
    Return the JSON object in a text; an empty one if the text is another JSON value.

    Args:
        text: The content of the file.
        path: The file, for the error.

    Raises:
        UnsupportedModelError: It is not JSON, or an object has a key twice, of which readers may use either.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as cause:
        raise UnsupportedModelError(
            f"{path} is not valid JSON ({cause}): get the whole folder again."
        ) from cause
    return content if isinstance(content, dict) else {}


def check(
    content: Mapping[str, Any], folder: Path, *, allow_native_code: str | None = None
) -> OnnxConfig:
    """
    Return the settings in a folder's config that are passed on.

    Args:
        content: The whole file, as `parse` returns it.
        folder: The folder that the file is in.
        allow_native_code: The one native library that may be loaded: the name of a file in the folder, or a
            path to one elsewhere. The config must name it by the same file name.

    Raises:
        UnsupportedModelError: A setting is not known to be harmless, or names a file that is not in the
            folder; the message names it.
    """
    return _Check(folder, allow_native_code).result(content)


class _Check:
    def __init__(self, folder: Path, allow_native_code: str | None) -> None:
        self._folder = folder
        self._allowed = allow_native_code
        self._file_names: list[str] = []
        self._native: Path | None = None

    def result(self, content: Mapping[str, Any]) -> OnnxConfig:
        model = content.get("model")
        search = content.get("search")
        if not isinstance(model, dict):
            self._refuse("model", "it is no object")
        passed: dict[str, Any] = {"model": self._model(model)}
        if isinstance(search, dict):
            known = {name: search[name] for name in _SEARCH_PASSED_ON if name in search}
            passed["search"] = self._object(known, _SEARCH_PASSED_ON, "search")
        return OnnxConfig(passed, tuple(self._file_names), self._native)

    def _model(self, content: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: value for name, value in content.items() if name != "eos_token_id"}
        passed = self._object(plain, _MODEL, "model")
        if "eos_token_id" in content:
            ends = content["eos_token_id"]
            kind: _Kind = "numbers" if isinstance(ends, list) else "number"
            passed["eos_token_id"] = self._value(ends, kind, "model.eos_token_id")
        decoder = passed.get("decoder") or {}
        sizes = [passed.get("vocab_size"), passed.get("context_length")]
        sizes += [decoder.get(name) for name in _NEEDED]
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            self._refuse(
                "model", f"vocab_size, context_length and {', '.join(_NEEDED)} have to be there"
            )
        return passed

    def _object(self, content: object, schema: _Schema, where: str) -> dict[str, Any]:
        if not isinstance(content, dict):
            self._refuse(where, "it is no object")
        passed: dict[str, Any] = {}
        for name, value in content.items():
            place = f"{where}.{name}"
            kind = schema.get(name, schema.get(_ANY))
            if name == "session_options" and kind is not None:
                passed[name] = self._session_options(value, place)
            elif name == "pipeline" and "filename" in schema:
                passed[name] = self._pipeline(value, place)
            elif kind is None:
                self._refuse_unknown(place)
            elif isinstance(kind, str):
                passed[name] = self._value(value, kind, place)
            else:
                passed[name] = self._object(value, kind, place)
        return passed

    def _pipeline(self, content: object, where: str) -> list[dict[str, Any]]:
        """Return the stages of a pipeline. Each is named by a key of an object, or of an object in a list."""
        groups = content if isinstance(content, list) else [content]
        return [self._object(group, {_ANY: _STAGE}, where) for group in groups]

    def _session_options(self, content: object, where: str) -> dict[str, Any]:
        if not isinstance(content, dict):
            self._refuse(where, "it is no object")
        passed = dict(content)
        providers = passed.pop("provider_options", None)
        native = passed.pop(_NATIVE, None)
        schema = _SESSION_OPTIONS if self._allowed is None else {**_SESSION_OPTIONS, **_WITH_NATIVE}
        passed = self._object(passed, schema, where)
        if providers is not None:
            passed["provider_options"] = self._providers(providers, f"{where}.provider_options")
        if native is not None:
            passed[_NATIVE] = self._native_code(native, f"{where}.{_NATIVE}")
        return passed

    def _providers(self, content: object, where: str) -> list[dict[str, Any]]:
        if not isinstance(content, list):
            self._refuse(where, "it is no list")
        passed = []
        for item in content:
            if not isinstance(item, dict):
                self._refuse(where, "it holds what is no object")
            for name, options in item.items():
                plain = name.lower().removesuffix("executionprovider")
                schema = _PROVIDERS.get(plain)
                if schema is None:
                    self._refuse_unknown(f"{where}.{name}")
                schema = {**schema, "device_filtering_options": _DEVICES}
                passed.append({name: self._object(options, schema, f"{where}.{name}")})
        return passed

    def _native_code(self, value: object, where: str) -> str:
        name = PureWindowsPath(value).name if isinstance(value, str) else ""
        if self._allowed is None or not name:
            raise UnsupportedModelError(
                f"{self._folder / CONFIG_NAME} wants the native code in {value!r} to run "
                f"({where}), which can do anything that you can: if the folder's maker is to be "
                f"trusted with that, give --allow-native-code {name or 'NAME'} "
                "(allow_native_code in Python)."
            )
        if PureWindowsPath(self._allowed).name != name:
            self._refuse(where, f"it asks for {name!r}, and {self._allowed!r} was allowed")
        try:
            if self._allowed == name:
                self._native = files.inside(self._folder, name)
                return name
            self._native = Path(self._allowed).expanduser().resolve(strict=True)
            files.require_regular(self._native)
        except OSError as cause:
            raise UnsupportedModelError(
                f"The native code {self._allowed} cannot be loaded ({cause.strerror or cause}): name "
                "a file in the model's folder, or give the path of one."
            ) from cause
        return str(self._native)

    def _value(self, value: object, kind: _Kind, where: str) -> object:
        match kind:
            case "number" | "threads":
                most = _MOST_THREADS if kind == "threads" else _MOST_NUMBER
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                is_good = is_number and -1 <= value <= most  # type: ignore[operator]  # just seen
            case "flag":
                is_good = isinstance(value, bool)
            case "word":
                is_good = isinstance(value, str) and _is_word(value)
            case "file" | "graph":
                return self._file(value, kind, where)
            case "numbers" | "words":
                if not isinstance(value, list):
                    self._refuse(where, "it is no list")
                return [self._value(item, kind[:-1], where) for item in value]  # type: ignore[arg-type]  # one of them
        if not is_good:
            self._refuse(
                where, f"{str(value)[:_MOST_WORD]!r} is no {kind} that is known to be harmless"
            )
        return value

    def _file(self, value: object, kind: _Kind, where: str) -> object:
        if value in ("", "null"):  # AMD's configs have these for "no file"
            return value
        if not isinstance(value, str) or len(self._file_names) >= _MOST_FILES:
            self._refuse(where, "it is no name of a file, or one too many")
        if kind == "graph" and not is_graph(value):
            self._refuse(where, f"{value!r} does not end in .onnx")
        try:
            files.inside(self._folder, value)
        except FileNotFoundError as cause:
            raise UnsupportedModelError(
                f"{self._folder} holds no {value}, which its {CONFIG_NAME} names: get the whole folder."
            ) from cause
        except OSError as cause:
            self._refuse(where, f"{value!r} cannot be taken: {cause.strerror or cause}")
        self._file_names.append(value)
        return value

    def _refuse_unknown(self, where: str) -> NoReturn:
        self._refuse(where, "recollect does not know that it is harmless")

    def _refuse(self, where: str, why: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self._folder / CONFIG_NAME} cannot be followed in {where} ({why}): take that out of "
            "the file, or get the folder from somebody you trust."
        )


def is_graph(file_name: str) -> bool:
    """Return whether a file is a graph by its name, .onnx being the one format that can be checked."""
    return file_name.lower().endswith(".onnx")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it gives one name two values")
    return found


_WORD: Final = re.compile(r"[^%\x00-\x1f\\]*(%d)?[^%\x00-\x1f\\]*")
"""
Characters of a harmless text, with at most one %d.

The library uses names of tensors as printf formats, in which %d is the layer. Others would read memory.
"""


def _is_word(text: str) -> bool:
    # A path can match, too. The tables have no option that takes a path as a word.
    return len(text) <= _MOST_WORD and _WORD.fullmatch(text) is not None
