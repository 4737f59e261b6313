"""
The formats that a model can have on disk: which tokenizer reads it, and which runtime runs it.

`FORMATS` is the one table of them. To add a format, add a row there, its name to `models.catalog.Format`,
and to `models.prepare` what recognises it on disk and fills in the `LocalModel`. Libraries that take long
to load, or are in an extra, are imported where they are used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import psutil

from recollect.errors import ConfigError, UnsupportedModelError
from recollect.files import scratch_folder
from recollect.models.catalog import Format, LocalModel
from recollect.models.gguf_weights import Shards, f32_bytes, is_f32, write_as_f32
from recollect.runtime.base import PagedRuntime, ReferenceRuntime
from recollect.runtime.sequences import GenAiRuntime, SequenceAdapter
from recollect.text.file_tokenizers import TOKENIZER_NAME, HfTokenizer, OpenVinoTokenizer
from recollect.text.llama_tokenizer import LlamaTokenizer
from recollect.text.tokenizer import ByteTokenizer, Tokenizer
from recollect.types import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a model is run."""

    profile: Profile
    home: Path
    """The data folder, in which weights are unpacked for the time that they are used."""
    gpu_layers: int | None = None
    """Layers in the memory of graphics cards; None: as many as fit. Of llama.cpp alone."""
    device: str | None = None
    """What computes, such as `CPU` or `CUDA0`; None: the runtime's own choice. Not of ONNX Runtime GenAI."""
    kv_type: str | None = None
    """The type of keys and values, such as `q8_0`; None: as the profile says. Of llama.cpp alone."""


@dataclass(frozen=True, slots=True)
class FormatParts:
    """The functions that make the tokenizer and the runtime of a model of one format."""

    tokenizer: Callable[[LocalModel], Tokenizer]
    runtime: Callable[[LocalModel, RunOptions], PagedRuntime]


def load_tokenizer(model: LocalModel) -> Tokenizer:
    """
    Return the tokenizer of a model.

    Raises:
        UnsupportedModelError: Its files cannot be read.
    """
    return FORMATS[model.format].tokenizer(model)


def load_runtime(model: LocalModel, options: RunOptions) -> PagedRuntime:
    """
    Return the runtime of a model, which has no memory for KV yet.

    Raises:
        UnsupportedModelError: The runtime is not installed, or cannot run this model.
        RuntimeFailure: Its files cannot be read or compiled.
        ConfigError: An option is of another runtime, or means nothing here.
    """
    if model.format != "gguf" and (options.gpu_layers is not None or options.kv_type is not None):
        raise ConfigError(
            f"{model.name} does not run on llama.cpp here, which --gpu-layers and --kv-type are for: leave "
            "them out, or add --runtime llama."
        )
    if options.device is not None and model.format not in ("gguf", "openvino"):
        raise ConfigError(
            f"{model.name} runs where its folder says, and --device is for OpenVINO and llama.cpp: leave it "
            "out."
        )
    return FORMATS[model.format].runtime(model, options)


def _openvino_tokenizer(model: LocalModel) -> Tokenizer:
    assert model.folder is not None, "only the reference model has none"
    return OpenVinoTokenizer(model.folder, model.eos_token_ids, template=model.chat_template)


def _hf_tokenizer(model: LocalModel) -> Tokenizer:
    assert model.folder is not None, "only the reference model has none"
    file = model.folder / TOKENIZER_NAME
    return HfTokenizer(file, model.eos_token_ids, template=model.chat_template)


def _openvino(model: LocalModel, options: RunOptions) -> PagedRuntime:
    # Not at the top: OpenVINO takes half a second, for which `recollect --help` need not wait.
    from recollect.runtime.openvino import OpenVinoRuntime  # noqa: PLC0415 - as above

    assert model.folder is not None, "only the reference model has none"
    return OpenVinoRuntime(
        model.folder / model.graph,
        profile=options.profile,
        context_length=model.context_length,
        long_context=model.is_long,
        device=options.device,
    )


def _genai(model: LocalModel, _: RunOptions) -> PagedRuntime:
    assert model.folder is not None, "only the reference model has none"
    assert model.onnx_config is not None, "it was read with the folder"
    return SequenceAdapter(
        GenAiRuntime(
            model.folder,
            model.onnx_config,
            context_length=model.context_length,
            native_library=model.native_library,
        )
    )


def _gguf_file(model: LocalModel) -> Path:
    assert model.folder is not None, "only the reference model has none"
    return model.folder / model.graph


def _llama_tokenizer(model: LocalModel) -> Tokenizer:
    from recollect.runtime.llama_model import LlamaVocabulary  # noqa: PLC0415 - part of an extra

    table = LlamaVocabulary(_gguf_file(model))
    return LlamaTokenizer(table, model.eos_token_ids, template=model.chat_template)


def _llama(model: LocalModel, options: RunOptions) -> PagedRuntime:
    from recollect.runtime.llama_model import LlamaOptions  # noqa: PLC0415 - part of an extra
    from recollect.runtime.llamacpp import load_llama  # noqa: PLC0415 - part of an extra

    def load(file: Path) -> PagedRuntime:
        return load_llama(
            file,
            context_length=model.context_length,
            options=LlamaOptions(
                profile=options.profile,
                gpu_layers=options.gpu_layers,
                device=options.device,
                kv_type=options.kv_type,
            ),
        )

    file = _gguf_file(model)
    if options.profile != "exact" or is_f32(shards := Shards(file)):
        return load(file)
    needed, free = f32_bytes(shards), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"Profile exact computes with weights of 32 bits, which take {needed:,} bytes here, and "
            f"{free:,} are free: take --profile fast, or a smaller model."
        )
    with scratch_folder(options.home) as scratch:
        # The library has the file mapped, so its content stays although its name is gone.
        unpacked = scratch / "f32.gguf"
        write_as_f32(shards, unpacked)
        return load(unpacked)


def _no_weights(model: LocalModel, _: RunOptions) -> PagedRuntime:
    raise UnsupportedModelError(
        f"{model.name} holds a tokenizer and no weights that run here: say which engine computes (--engine)."
    )


def _reference(model: LocalModel, _: RunOptions) -> PagedRuntime:
    return ReferenceRuntime(
        vocab_size=ByteTokenizer().vocab_size, context_length=model.context_length
    )


FORMATS: Final[Mapping[Format, FormatParts]] = MappingProxyType(
    {
        # A GGUF file or an export of optimum's; models/prepare, models/openvino_folder.
        "openvino": FormatParts(tokenizer=_openvino_tokenizer, runtime=_openvino),
        # A folder for ONNX Runtime GenAI; models/onnx_folder.
        "onnx-genai": FormatParts(tokenizer=_hf_tokenizer, runtime=_genai),
        # A GGUF file as it is, for llama.cpp; models/prepare.
        "gguf": FormatParts(tokenizer=_llama_tokenizer, runtime=_llama),
        # A Hugging Face folder, for engines elsewhere; models/tokenizer_folder.
        "tokenizer": FormatParts(tokenizer=_hf_tokenizer, runtime=_no_weights),
        # The model without weights; models/catalog.
        "reference": FormatParts(tokenizer=lambda _: ByteTokenizer(), runtime=_reference),
    }
)
