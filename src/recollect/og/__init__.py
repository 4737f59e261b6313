"""
ONNX Runtime GenAI's Python API over every runtime of recollect.

    import recollect.og as og  # in place of: import onnxruntime_genai as og

Scripts that hold one `Generator` and append, generate and rewind run with the import changed. Where
the original is wrong this is right: docs/og.md lists each difference.
"""

from recollect.og.generator import Checkpoint, Generator
from recollect.og.model import Config, Model
from recollect.og.params import GeneratorParams
from recollect.og.tokenizer import Tensor, Tokenizer, TokenizerStream

__all__ = [
    "Checkpoint",
    "Config",
    "Generator",
    "GeneratorParams",
    "Model",
    "Tensor",
    "Tokenizer",
    "TokenizerStream",
]
