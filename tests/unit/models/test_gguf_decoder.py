import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_decoder import FAMILIES, read_decoder, require_buildable
from recollect.models.gguf_weights import Shards

MakeDecoder = Callable[..., Path]
MakeGguf = Callable[..., Path]


def test_a_decoder_is_what_the_fields_say(make_decoder: MakeDecoder) -> None:
    decoder = read_decoder(Shards(make_decoder(heads=4, kv_heads=2, head_size=32, layers=3)))
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_size) == (3, 4, 2, 32)
    assert decoder.attention_scale == 1 / math.sqrt(32)
    assert decoder.epsilon == pytest.approx(1e-5)
    assert decoder.unrotated == frozenset()


def test_every_fourth_layer_of_smollm3_is_not_rotated(make_decoder: MakeDecoder) -> None:
    decoder = read_decoder(Shards(make_decoder(architecture="smollm3", layers=9)))
    assert decoder.unrotated == {3, 7}


def test_a_factor_without_a_kind_is_linear_as_in_old_files(make_decoder: MakeDecoder) -> None:
    for fields in ({"rope.scaling.factor": 8.0}, {"rope.scale_linear": 8.0}):
        rope = read_decoder(Shards(make_decoder(fields=fields))).rope
        np.testing.assert_allclose(rope.frequencies[0], 1 / 8)
        assert rope.factor == 1


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones(make_decoder: MakeDecoder) -> None:
    """Source of the numbers: transformers 5.24, `_compute_yarn_parameters`, head of 64, base 1e4."""
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 1024,
    }
    rope = read_decoder(Shards(make_decoder(fields=fields))).rope
    plain = 10_000.0 ** -(np.arange(0, 64, 2) / 64)
    assert rope.factor == pytest.approx(1.1386294361119891)
    np.testing.assert_allclose(rope.frequencies[:6], plain[:6])
    np.testing.assert_allclose(rope.frequencies[18:], plain[18:] / 4)
    np.testing.assert_allclose(rope.frequencies[12], 0.018852, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"rope.scaling.type": "longrope"}, "scales RoPE in the way 'longrope'"),
        ({"expert_count": 8}, "is a mixture of experts"),
        ({"attention.sliding_window": 512}, "has a sliding window"),
        ({"attn_logit_softcapping": 50.0}, "caps the logits of attention"),
        ({"final_logit_softcapping": 30.0}, "caps its logits"),
        ({"attention.causal": False}, "is no causal model"),
        ({"residual_scale": 0.5}, r"has the field llama\.residual_scale"),
        ({"rope.dimension_count": 32}, "rotates a part of each head"),
        ({"rope.dimension_count": 128}, "rotates 128 of 64 dimensions"),
        ({"attention.value_length": 32}, "has values of another size than keys"),
        ({"attention.head_count_kv": 3}, r"says that it has .* \(2, 4, 3, 64\)"),
        ({"block_count": 9_999}, r"says that it has .* \(9999, 4, 2, 64\)"),
        ({"attention.head_count_kv": [2, 1]}, "has layers of different attention.head count kv"),
    ],
)
def test_what_would_change_the_meaning_is_refused(
    make_decoder: MakeDecoder, fields: dict[str, object], what: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^decoder.gguf {what}.*, which .*: export"):
        require_buildable(make_decoder(fields=fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"attention.sliding_window": 4096},  # as long as the context
        {"expert_count": 0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 0.0},
        {"attention.causal": True},
        {"attention.head_count_kv": [2, 2]},
        {"vocab_size": 96},
    ],
)
def test_a_field_that_changes_nothing_is_no_obstacle(
    make_decoder: MakeDecoder, fields: dict[str, object]
) -> None:
    require_buildable(make_decoder(fields=fields))


@pytest.mark.parametrize("value", ["four", True, math.nan])
def test_a_field_of_a_strange_kind_is_damage(make_decoder: MakeDecoder, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope\.freq_base is"):
        require_buildable(make_decoder(fields={"rope.freq_base": value}))


def test_an_architecture_that_cannot_be_built_is_named(make_gguf: MakeGguf) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is of the gemma2 architecture, and .* llama"):
        require_buildable(make_gguf(architecture="gemma2"))
    assert "gemma2" not in FAMILIES


def test_a_tensor_type_that_cannot_be_read_is_named(
    make_gguf: MakeGguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.models.gguf_decoder.READABLE_KINDS", frozenset())
    with pytest.raises(UnsupportedModelError, match=r"holds F16, F32 tensors, .*: choose another"):
        require_buildable(make_gguf())


def test_a_missing_tensor_is_named(make_decoder: MakeDecoder) -> None:
    path = make_decoder(layers=2, fields={"block_count": 3})
    with pytest.raises(UnsupportedModelError, match=r"lacks the tensor blk\.2\.attn_k\.weight"):
        require_buildable(path)


def test_a_norm_that_the_architecture_has_is_missed(make_decoder: MakeDecoder) -> None:
    """Built without it, the model would run, and compute something else."""
    path = make_decoder(architecture="qwen3")
    with pytest.raises(
        UnsupportedModelError, match=r"lacks the tensor blk\.0\.attn_k_norm\.weight"
    ):
        require_buildable(path)


def test_a_norm_that_the_architecture_has_not_is_named(make_decoder: MakeDecoder) -> None:
    path = make_decoder(architecture="llama", head_norms=True)
    with pytest.raises(
        UnsupportedModelError, match=r"holds the tensor blk\.0\.attn_k_norm\.weight"
    ):
        require_buildable(path)


def test_a_tensor_without_a_place_is_named(make_decoder: MakeDecoder) -> None:
    path = make_decoder(layers=2, fields={"block_count": 1})
    with pytest.raises(UnsupportedModelError, match=r"holds the tensor blk\.1\.attn_k\.weight"):
        require_buildable(path)


def test_a_vocabulary_alone_is_no_model(make_gguf: MakeGguf) -> None:
    with pytest.raises(UnsupportedModelError, match="holds a vocabulary and no weights"):
        require_buildable(make_gguf(tensors=False))


def test_factors_of_another_length_are_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(UnsupportedModelError, match="RoPE factors of another size"):
        require_buildable(make_decoder(rope_freqs=[1.0] * 7))


def test_parts_that_were_renamed_are_refused(make_decoder: MakeDecoder) -> None:
    path = make_decoder()
    part = path.with_name("part.gguf")
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(part, "llama")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(reader.tensors) > 0
    with pytest.raises(UnsupportedModelError, match="one of 2 files of a model and was renamed"):
        require_buildable(part)
