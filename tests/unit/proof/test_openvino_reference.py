"""Claims about `proof/openvino_reference.py`: a folder that says what nobody reads is not judged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from recollect.proof.openvino_reference import open_openvino
from recollect.proof.reference_model import NotCompared, logits_at

WIDTH, INNER, VOCABULARY = 32, 64, 40
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LAYER = "model.layers.0"
LINEAR = {
    "lm_head": (VOCABULARY, WIDTH),
    **dict.fromkeys([f"{LAYER}.self_attn.{part}_proj" for part in "qkvo"], (WIDTH, WIDTH)),
    f"{LAYER}.mlp.gate_proj": (INNER, WIDTH),
    f"{LAYER}.mlp.up_proj": (INNER, WIDTH),
    f"{LAYER}.mlp.down_proj": (WIDTH, INNER),
}
NORMS = ("model.norm", f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm")
Write = Callable[..., Path]


def as_bytes(values: np.ndarray, name: str) -> ov.Node:
    """Return a matrix as u8 with zero points and scales by row, as exporters pack it."""
    scales = (values.max(axis=1, keepdims=True) - values.min(axis=1, keepdims=True)) / 255
    zeros = np.round(-values.min(axis=1, keepdims=True) / scales)
    packed = np.clip(np.round(values / scales) + zeros, 0, 255).astype(np.uint8)
    parts = [ops.convert(ops.constant(one.astype(np.uint8)), np.float32) for one in (packed, zeros)]
    node = ops.multiply(ops.subtract(*parts), ops.constant(scales.astype(np.float32)))
    node.friendly_name = name
    return node


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a writer of folders whose graph has nothing but weights, named as exports name them."""

    def make(
        config: object = None,
        *,
        without: str = "",
        linear: dict[str, tuple[int, int]] | None = None,
        norms: tuple[str, ...] = (),
        biases: tuple[str, ...] = (),
        packed: str = "",
        **settings: object,
    ) -> Path:
        random, results, inputs = np.random.default_rng(0), [], []
        named: list[tuple[str, Any, tuple[int, ...]]]
        named = [(name, ops.matmul, shape) for name, shape in {**LINEAR, **(linear or {})}.items()]
        named += [(name, ops.multiply, (1, 1, WIDTH)) for name in (*NORMS, *norms)]
        for name, operation, shape in named:
            if name == without:
                continue
            weight = ops.constant(random.normal(0, 0.2, shape).astype(np.float32))
            if name == packed:
                weight = as_bytes(weight.data, f"__module.{name}/weight")
            inputs.append(ops.parameter([1, 1, shape[-1]], np.float32))
            options = (False, True) if operation is ops.matmul else ()
            node = operation(inputs[-1], weight, *options)
            node.friendly_name = f"__module.{name}/aten::op"
            if name in biases:
                node = ops.add(
                    node, ops.constant(np.ones((1, 1, shape[0 if options else -1]), np.float32))
                )
                node.friendly_name = f"__module.{name}/aten::bias"
            results.append(ops.result(node))
        table = ops.constant(random.normal(0, 0.2, (VOCABULARY, WIDTH)).astype(np.float32))
        inputs.append(ops.parameter([1], np.int32))
        looked_up = ops.gather(table, inputs[-1], ops.constant(0))
        looked_up.friendly_name = "__module.model.embed_tokens/aten::embedding"
        results.append(ops.result(looked_up))
        ov.save_model(
            ov.Model(results, inputs), tmp_path / "openvino_model.xml", compress_to_fp16=False
        )
        said = {**CONFIG, **settings}
        said = {name: value for name, value in said.items() if value != "left out"}
        (tmp_path / "config.json").write_text(json.dumps(said if config is None else config))
        return tmp_path

    return make


def test_what_is_known_is_read(write: Write) -> None:
    description, tensors = open_openvino(write())
    assert logits_at(description, tensors, [1, 2, 3], [2]).shape == (1, VOCABULARY)
    assert tensors.shape("blk.0.ffn_down") == (WIDTH, INNER)


def test_a_weight_in_bytes_is_read_with_its_zero_points_and_scales(write: Write) -> None:
    module = f"{LAYER}.mlp.down_proj"
    plain = open_openvino(write())[1].matrix("blk.0.ffn_down")
    packed = open_openvino(write(packed=module))[1]
    assert np.abs(packed.matrix("blk.0.ffn_down") - plain).max() < 0.01
    assert packed.types()["u8"] == WIDTH * INNER


def test_a_bias_is_read_and_one_of_a_norm_is_named(write: Write) -> None:
    tensors = open_openvino(write(biases=(f"{LAYER}.mlp.up_proj",)))[1]
    assert (tensors.vector("blk.0.ffn_up.bias") == np.ones(INNER)).all()
    with pytest.raises(NotCompared, match=r"output_norm\.bias"):
        open_openvino(write(biases=("model.norm",)))


@pytest.mark.parametrize(
    "config", [[1], None, "text", {"text_config": None}, {**CONFIG, "model_type": ["llama"]}]
)
def test_a_configuration_that_is_none_is_not_judged(config: object, write: Write) -> None:
    folder = write()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotCompared):
        open_openvino(folder)


def test_an_empty_text_config_changes_nothing(write: Write) -> None:
    assert open_openvino(write(text_config=None))[0].layers == 1
    assert open_openvino(write(text_config={"num_attention_heads": 1}))[0].heads == 1


@pytest.mark.parametrize("text", ["", "{", '{"a": ' * 100_000, "NaN"])
def test_a_configuration_that_is_damaged_is_not_judged(text: str, write: Write) -> None:
    folder = write()
    (folder / "config.json").write_text(text)
    with pytest.raises(NotCompared):
        open_openvino(folder)


LONGROPE = {"type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rms_norm_eps": "left out"}, "rms_norm_eps is None"),
        ({"num_hidden_layers": "left out"}, "num_hidden_layers"),
        ({"num_attention_heads": "left out"}, "num_attention_heads"),
        ({"hidden_size": "left out"}, "hidden_size"),
        ({"model_type": "left out"}, "architecture"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2'"),
        ({"num_attention_heads": 4}, None),
        ({"num_attention_heads": 3}, "attn_q has the shape"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "unevenly"),
        ({"num_key_value_heads": 1}, "attn_k has the shape"),
        ({"num_hidden_layers": 2}, "blk.1."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"hidden_act": 3}, "activation 3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope"}}, "cannot be computed|factors"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "8 factors"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [0.0] * 8}}, "8 factors"),
        ({"rope_scaling": {**LONGROPE, "short_factor": "abc"}}, "cannot be computed"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": 3}}, "cannot be computed"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"partial_rotary_factor": 100.0}, "RoPE"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "mistral"}, "does not say sliding_window"),
        ({"model_type": "gemma2"}, "does not say"),
        ({"model_type": "qwen3"}, "no tensor blk.0.attn_q_norm"),
        ({"sliding_window": 8, "model_type": "mistral", "layer_types": ["new"]}, "layer_types"),
        ({"sliding_window": "x", "model_type": "mistral"}, "sliding_window is 'x'"),
    ],
)
def test_a_setting_that_has_no_sense_is_named(
    settings: dict[str, object], what: str | None, write: Write
) -> None:
    folder = write(**settings)
    if what is None:
        assert open_openvino(folder)[0].heads == settings["num_attention_heads"]
        return
    with pytest.raises(NotCompared, match=what):
        open_openvino(folder)


def test_layers_from_a_number_on_see_a_window_only(write: Write) -> None:
    said = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert open_openvino(write(**said, max_window_layers=0))[0].windows == (8,)
    assert open_openvino(write(**said, max_window_layers=1))[0].windows == (None,)
    assert open_openvino(write(**{**said, "use_sliding_window": False}))[0].windows == (None,)


@pytest.mark.parametrize("module", [*LINEAR, *NORMS])
def test_a_weight_that_is_missing_is_named(module: str, write: Write) -> None:
    folder = write(without=module)
    if module == "lm_head":  # the embeddings are used twice then
        assert "output" not in open_openvino(folder)[1]
        return
    with pytest.raises(NotCompared, match=r"no tensor|has the shape"):
        open_openvino(folder)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"norms": (f"{LAYER}.post_feedforward_layernorm",)}, "post_feedforward_layernorm"),
        ({"norms": (f"{LAYER}.self_attn.q_norm",)}, "attn_q_norm"),
        ({"norms": ("model.layers.1.input_layernorm",)}, "model.layers.1.input_layernorm"),
        ({"linear": {f"{LAYER}.mlp.router": (4, WIDTH)}}, "mlp.router"),
        ({"linear": {"score": (4, WIDTH)}}, "score"),
    ],
)
def test_a_weight_that_nobody_reads_is_named(
    more: dict[str, object], what: str, write: Write
) -> None:
    with pytest.raises(NotCompared, match=what):
        open_openvino(write(**more))
