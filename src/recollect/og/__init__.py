"""
ONNX Runtime GenAI's Python API over every runtime of recollect.

    import recollect.og as og  # in place of: import onnxruntime_genai as og

Scripts that hold one `Generator` and append, generate and rewind run with the import changed. Where
the original is wrong this is right: docs/og.md lists each difference.
"""

from recollect.og.generation import Checkpoint, Generator, GeneratorParams
from recollect.og.model_and_tokenizer import Config, Model, Tensor, Tokenizer, TokenizerStream

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
