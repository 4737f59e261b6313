"""The runtimes that the contract is checked on."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from random_model import SHAPES, Shape, write_random_model
from recollect import config
from recollect.conversation.formats import RunOptions, load_runtime
from recollect.models.onnx_folder import Precision
from recollect.models.prepare import prepare
from recollect.runtime.base import PagedRuntime, ReferenceRuntime
from recollect.runtime.llama_model import LlamaOptions
from recollect.runtime.llamacpp import load_llama
from recollect.runtime.openvino import OpenVinoRuntime
from recollect.runtime.sequences import GenAiRuntime, SequenceAdapter, SequenceRuntime

NUM_BLOCKS = 24


def _reference(whole_blocks_only: bool) -> PagedRuntime:
    return ReferenceRuntime(
        vocab_size=300, context_length=512, block_size=32, whole_blocks_only=whole_blocks_only
    )


def _openvino() -> PagedRuntime:
    # RECOLLECT_TEST_MODEL: another model, or a folder, in place of the default one.
    local = prepare(os.environ.get("RECOLLECT_TEST_MODEL", "smollm2"), home=config.home())
    assert local.folder is not None
    xml = Path(local.folder) / "openvino_model.xml"
    return OpenVinoRuntime(xml, profile="exact", context_length=512)


DOCUMENT = Path(__file__).parents[2] / "docs" / "runtimes.md"


def _documented() -> PagedRuntime:
    """Return the runtime that the document shows, from the document."""
    variables: dict[str, Any] = {}
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)[0]
    exec(code, variables)  # noqa: S102 - our own document
    runtime: PagedRuntime = variables["OneLayer"]()
    return runtime


Maker = Callable[[], PagedRuntime]

RUNTIMES: dict[str, Maker] = {
    "reference": lambda: _reference(False),
    "reference-whole-blocks": lambda: _reference(True),
    "documented": _documented,
    "openvino-exact": _openvino,
}
LLAMA_SHAPES = {
    **{f"llama-{name}": shape for name, shape in SHAPES.items()},
    "llama-qwen3": Shape(architecture="qwen3", head_norms=True),
}
"""Random models for llama.cpp, in profile `exact`."""
LLAMA_FILES = {f"llama-{name}": name for name in ("smollm2", "gemma-3-270m", "qwen2.5-coder-0.5b")}
"""Real ones, with weights unpacked to f32."""
WITHOUT_WEIGHTS = [
    "reference",
    "reference-whole-blocks",
    "documented",
    *LLAMA_SHAPES,
    "sequences",
    "sequences-copied",
]
WITH_WEIGHTS = ["openvino-exact", "genai-fp32", *LLAMA_FILES]
EVERY_DAY = [name for name in WITHOUT_WEIGHTS if name == "llama-plain" or name not in LLAMA_SHAPES]
PARAMS = [
    *EVERY_DAY,
    *(pytest.param(name, marks=pytest.mark.slow) for name in LLAMA_SHAPES if name not in EVERY_DAY),
    *(pytest.param(name, marks=pytest.mark.model) for name in WITH_WEIGHTS),
]


@pytest.fixture(scope="module", params=PARAMS)
def runtime_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def maker(
    runtime_name: str,
    onnx_folder: Callable[[Precision], Path],
    make_sequences: Callable[..., SequenceRuntime],
    real_gguf: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Maker:
    """Return what makes one runtime of the kind under test."""
    if runtime_name.startswith("sequences"):
        copies = runtime_name == "sequences-copied"
        sizes = {"vocab_size": 300, "context_length": 512, "block_size": 32}
        return lambda: SequenceAdapter(make_sequences(copies=copies, **sizes))
    if runtime_name in LLAMA_SHAPES:
        path = tmp_path_factory.mktemp("llama") / "random.gguf"
        write_random_model(path, LLAMA_SHAPES[runtime_name])
        options = LlamaOptions(profile="exact", threads=1, recurrent_block_size=32)
        return lambda: load_llama(path, context_length=512, options=options)
    if runtime_name in LLAMA_FILES:
        home = config.home()
        file = prepare(str(real_gguf(LLAMA_FILES[runtime_name])), home=home, runtime="llama")
        short = replace(file, context_length=512)
        return lambda: load_runtime(short, RunOptions(profile="exact", home=home))
    if runtime_name == "genai-fp32":
        folder = onnx_folder("fp32")
        local = prepare(str(folder), home=config.home())
        assert local.onnx_config is not None
        settings = local.onnx_config
        return lambda: SequenceAdapter(GenAiRuntime(folder, settings, context_length=512))
    return RUNTIMES[runtime_name]


@pytest.fixture
def make_runtime(maker: Maker) -> Iterator[Maker]:
    """Return a maker of runtimes that have no memory yet."""
    made: list[PagedRuntime] = []

    def make() -> PagedRuntime:
        made.append(maker())
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()


@pytest.fixture(scope="module")
def runtime(maker: Maker) -> Iterator[PagedRuntime]:
    """Return a runtime of 24 blocks; tests leave KV behind in it, and no test may be disturbed by that."""
    runtime = maker()
    runtime.allocate(NUM_BLOCKS)
    yield runtime
    runtime.close()
