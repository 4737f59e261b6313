"""
What each format of a model is read and run with, in one table.

Whoever adds a format adds a row here, its name to `models.catalog.Format`, and what recognises it on disk
to `models.prepare`, which fills in the `LocalModel`. A module of its own, because `model` needs the
tokenizers and `loading` the runtimes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from recollect.models.catalog import Format, LocalModel
from recollect.runtime.base import PagedRuntime
from recollect.runtime.reference import ReferenceRuntime
from recollect.text.file_tokenizers import TOKENIZER_NAME, HfTokenizer, OpenVinoTokenizer
from recollect.text.tokenizer import ByteTokenizer, Tokenizer
from recollect.types import Profile


@dataclass(frozen=True, slots=True)
class FormatParts:
    """What makes the parts of a model of one format."""

    tokenizer: Callable[[LocalModel], Tokenizer]
    runtime: Callable[[LocalModel, Profile], PagedRuntime]


def load_tokenizer(model: LocalModel) -> Tokenizer:
    """
    Return the tokenizer of a model.

    Raises:
        UnsupportedModelError: Its files cannot be read.
    """
    return FORMATS[model.format].tokenizer(model)


def load_runtime(model: LocalModel, profile: Profile) -> PagedRuntime:
    """
    Return what runs a model, which has no memory for KV yet.

    Raises:
        UnsupportedModelError: The runtime is not installed, or cannot run this model.
        RuntimeFailure: Its files cannot be read or compiled.
    """
    return FORMATS[model.format].runtime(model, profile)


def _openvino_tokenizer(model: LocalModel) -> Tokenizer:
    assert model.folder is not None, "only the reference model has none"
    return OpenVinoTokenizer(model.folder, model.eos_token_ids, template=model.chat_template)


def _hf_tokenizer(model: LocalModel) -> Tokenizer:
    assert model.folder is not None, "only the reference model has none"
    file = model.folder / TOKENIZER_NAME
    return HfTokenizer(file, model.eos_token_ids, template=model.chat_template)


# Runtimes are imported when they are needed: OpenVINO takes half a second, for which `recollect --help`
# need not wait, and ONNX Runtime GenAI is part of an extra.


def _openvino(model: LocalModel, profile: Profile) -> PagedRuntime:
    from recollect.runtime.openvino import OpenVinoRuntime  # noqa: PLC0415 - as above

    assert model.folder is not None, "only the reference model has none"
    return OpenVinoRuntime(
        model.folder / model.graph,
        profile=profile,
        context_length=model.context_length,
        long_context=model.is_long,
    )


def _genai(model: LocalModel, _: Profile) -> PagedRuntime:
    from recollect.runtime.genai import GenAiRuntime  # noqa: PLC0415 - as above
    from recollect.runtime.sequences import SequenceAdapter  # noqa: PLC0415 - as above

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


def _reference(model: LocalModel, _: Profile) -> PagedRuntime:
    return ReferenceRuntime(
        vocab_size=ByteTokenizer().vocab_size, context_length=model.context_length
    )


FORMATS: Final[Mapping[Format, FormatParts]] = MappingProxyType(
    {
        # A GGUF file or an export of optimum's; models/prepare, models/openvino_folder.
        "openvino": FormatParts(tokenizer=_openvino_tokenizer, runtime=_openvino),
        # A folder for ONNX Runtime GenAI; models/onnx_folder.
        "onnx-genai": FormatParts(tokenizer=_hf_tokenizer, runtime=_genai),
        # The model without weights; models/catalog.
        "reference": FormatParts(tokenizer=lambda _: ByteTokenizer(), runtime=_reference),
    }
)
