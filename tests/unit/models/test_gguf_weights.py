from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from recollect.models.gguf_weights import (
    LAYOUTS,
    READABLE_KINDS,
    Shards,
    f32_bytes,
    is_f32,
    take_apart,
    values_of,
    write_as_f32,
)

MakeBlocks = Callable[..., np.ndarray]

LIMITS = {"u4": (0, 15), "i4": (-8, 7), "u8": (0, 255), "i8": (-128, 127)}


def test_every_type_that_the_library_dequantizes_can_be_read() -> None:
    dequantized = set(gguf.quants._type_traits)
    assert dequantized <= READABLE_KINDS


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_numbers_and_scales_are_the_files_values(kind: Kind, make_blocks: MakeBlocks) -> None:
    blocks = make_blocks(kind, 200, np.random.default_rng(kind.value))
    before = blocks.copy()
    groups = take_apart(blocks, kind)
    assert (blocks == before).all()
    expected = dequantize(blocks.reshape(1, -1), kind).reshape(groups.numbers.shape)
    assert np.std(expected) > 0.1
    # Types with minima round once more: a minimum over its scale is a zero point.
    limit = 5e-7 * np.abs(expected).max() if LAYOUTS[kind].has_zeros else 1e-6 * np.abs(expected)
    assert (np.abs(groups.values() - expected) <= limit).all()
    assert np.prod(groups.numbers.shape) == 200 * GGML_QUANT_SIZES[kind][0]


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_numbers_fit_how_they_are_stored(kind: Kind, make_blocks: MakeBlocks) -> None:
    layout = LAYOUTS[kind]
    groups = take_apart(make_blocks(kind, 500, np.random.default_rng(1)), kind)
    lowest, highest = LIMITS[layout.storage]
    assert lowest <= groups.numbers.min() < groups.numbers.max() <= highest
    assert groups.numbers.shape[1] == layout.group
    assert (groups.zeros is not None) == layout.has_zeros
    if layout.half_scales:
        assert (groups.scales.astype(np.float16) == groups.scales).all()


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q2_K, Kind.Q4_1, Kind.Q5_1])
def test_a_group_without_a_scale_is_its_minimum(kind: Kind, make_blocks: MakeBlocks) -> None:
    """Real Q4_K files hold such groups; a zero point of minimum / 0 would lose them."""
    blocks = make_blocks(kind, 4, np.random.default_rng(0))
    places = {"Q4_K": [4, 5], "Q5_K": [4, 5], "Q2_K": [0, 3], "Q4_1": [0, 1], "Q5_1": [0, 1]}
    blocks[:2, places[kind.name]] &= 0xF0 if kind == Kind.Q2_K else 0x00
    expected = dequantize(blocks.reshape(1, -1), kind).reshape(-1, LAYOUTS[kind].group)
    flat = (expected == expected[:, :1]).all(axis=1)
    assert 0 < flat.sum() < len(flat)
    assert (expected[flat] != 0).any()
    found = take_apart(blocks, kind).values()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert (found[flat] == expected[flat]).all()


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.name)
def test_blocks_of_zeros_are_zeros(kind: Kind) -> None:
    blocks = np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8)
    assert (take_apart(blocks, kind).values() == values_of(blocks, kind).reshape(-1, 1)[0]).all()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.IQ4_XS, Kind.IQ2_S])
@pytest.mark.parametrize("scale", [0x7C00, 0x7E00], ids=["infinite", "no number"])
def test_a_scale_that_is_no_number_is_refused(
    kind: Kind, scale: int, make_blocks: MakeBlocks
) -> None:
    blocks = make_blocks(kind, 3, np.random.default_rng(0))
    blocks[1, 0:2] = np.array([scale], np.uint16).view(np.uint8)
    with pytest.raises(ValueError, match="infinite or no number"):
        take_apart(blocks, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16", "BF16"])
def test_a_file_written_as_f32_has_the_same_values_and_fields(
    make_decoder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    file, unpacked = make_decoder(kind=kind), tmp_path / "unpacked.gguf"
    before = Shards(file)
    assert not is_f32(before)
    write_as_f32(before, unpacked)
    after = Shards(unpacked)
    assert is_f32(after)
    assert after.fields == before.fields
    assert list(after.tensors) == list(before.tensors)
    assert after.total_bytes == f32_bytes(before) == f32_bytes(after)
    for name, tensor in after.tensors.items():
        assert tensor.shape == before.tensors[name].shape
        expected = values_of(before.blocks(name), before.kind(name))
        assert np.array_equal(values_of(after.blocks(name), Kind.F32), expected)
