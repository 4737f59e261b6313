"""
Export tiny random models for OpenVINO, with the logits that transformers gives for them.

    python make_exports.py FOLDER

Runs in an environment of its own (`requirements.txt` beside this file), because the exporter pins an
older transformers than the rest. Imports nothing of recollect: what comes out is what other people's
tools make of a model, and what they say it computes. Weights are drawn so that logits have a
standard deviation of about 8, as those of real models have; an error is then as large as it would be.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENS = 160
"""Longer than the windows (32) and the first contexts (64) of these models."""

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * pair for pair in range(16)],
        "long_factor": [1.0 + 0.5 * pair for pair in range(16)],
    },
}


def _configs() -> dict[str, Callable[[], Any]]:
    t = transformers
    return {
        "llama31": lambda: t.LlamaConfig(
            **SMALL,
            rope_theta=500_000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        "mistral-window": lambda: t.MistralConfig(**SMALL, sliding_window=32),
        "qwen2": lambda: t.Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=32),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(
            **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
        ),
        "phi3-4k": lambda: t.Phi3Config(
            **SMALL, original_max_position_embeddings=1024, sliding_window=None
        ),
        "phi3-128k": lambda: t.Phi3Config(**SMALL, **LONG_ROPE),
        "phi4-mini": lambda: t.Phi3Config(
            **SMALL,
            **{
                **LONG_ROPE,
                "rope_scaling": {
                    **LONG_ROPE["rope_scaling"],
                    "short_factor": [1.0 + 0.02 * pair for pair in range(12)],
                    "long_factor": [1.0 + 0.5 * pair for pair in range(12)],
                },
            },
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
        ),
        "gemma2": lambda: t.Gemma2Config(
            **SMALL, head_dim=32, sliding_window=32, query_pre_attn_scalar=32
        ),
        "gemma3": lambda: t.Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": 6},
            head_dim=32,
            sliding_window=32,
            query_pre_attn_scalar=32,
        ),
        "gemma3-multimodal": lambda: t.Gemma3Config(
            text_config={
                **SMALL,
                "num_hidden_layers": 6,
                "head_dim": 32,
                "sliding_window": 32,
                "query_pre_attn_scalar": 32,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=1000,
            boi_token_index=1001,
            eoi_token_index=1002,
        ),
        "gpt-oss": lambda: t.GptOssConfig(
            **SMALL,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=32,
        ),
        "lfm2": lambda: t.Lfm2Config(
            **{**SMALL, "num_hidden_layers": 3},
            layer_types=["conv", "full_attention", "conv"],
        ),
    }


def _tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of 1,024 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train_from_iterator([Path(__file__).read_text("utf-8")] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)


def _draw(model: torch.nn.Module, *, around_zero: bool) -> None:
    """Draw weights; norms of Gemma add one to what is kept, so theirs are drawn around zero."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            spread = 1.0 if "embed" in name else 1.3 / weight.shape[-1] ** 0.5
            weight.copy_(torch.randn_like(weight) * spread)
        elif "norm" in name:
            weight.copy_(torch.rand_like(weight) * 0.5 + (-0.25 if around_zero else 0.75))
        else:
            weight.copy_(torch.randn_like(weight) * 0.3)


def make(name: str, config: Any, folder: Path) -> None:
    """Write an OpenVINO folder and `logits.npz`."""
    torch.manual_seed(0)
    is_multimodal = hasattr(config, "vision_config")
    kind = (
        transformers.AutoModelForImageTextToText
        if is_multimodal
        else transformers.AutoModelForCausalLM
    )
    # Eager: the other kernels leave out the caps of Gemma 2's scores.
    model = kind.from_config(config, attn_implementation="eager").eval()
    ids = torch.tensor(np.random.default_rng(0).integers(2, 900, (1, TOKENS)))
    with torch.no_grad():
        _draw(model, around_zero="gemma" in name)
        head = model.get_output_embeddings().weight
        is_tied = head is model.get_input_embeddings().weight
        scale = 8 / model(input_ids=ids).logits.std()
        norms = [value for key, value in model.named_parameters() if key.endswith(".norm.weight")]
        (norms[0] if is_tied and norms else head).mul_(scale)
        logits = model(input_ids=ids).logits[0].numpy()
        # A context of its own for each: those with LongRoPE choose by the length.
        short = model(input_ids=ids[:, :50]).logits[0].numpy()
    source = folder / "source"
    model.save_pretrained(source)
    _tokenizer(source)
    if is_multimodal:
        processor = {"image_processor_type": "Gemma3ImageProcessor"}
        (source / "preprocessor_config.json").write_text(json.dumps(processor))
    task = "image-text-to-text" if is_multimodal else "text-generation-with-past"
    command = ["optimum-cli", "export", "openvino", "--model", str(source), "--task", task]
    subprocess.run([*command, "--weight-format", "fp32", str(folder)], check=True)  # noqa: S603
    np.savez(folder / "logits.npz", ids=ids[0].numpy(), logits=logits, short=short)


def main(target: Path, names: list[str]) -> None:
    """Make all of them that are not there yet, or those that are named."""
    for name, config in _configs().items():
        if names and name not in names:
            continue
        if not (target / name / "logits.npz").exists():
            (target / name).mkdir(parents=True, exist_ok=True)
            make(name, config(), target / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
