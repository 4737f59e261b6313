"""
A program: a GGUF file as a Hugging Face folder with float weights.

On its own because it runs in a process of its own, which gives the memory back: all weights are f32
here. Nothing imports it, because it takes torch along; `onnx_folder` starts it.
"""

import sys
from pathlib import Path

import torch
import transformers


def main(gguf: Path, folder: Path, eos_token_ids: list[int]) -> None:
    """Write the model of *gguf* and its tokenizer into *folder*."""
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases would keep the blocks as they are
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights are plain numbers now; what says otherwise would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    if eos_token_ids:  # a GGUF file names one; a chat can also end with another
        model.generation_config.eos_token_id = eos_token_ids
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(number) for number in sys.argv[3:]])
