from collections import Counter
from collections.abc import Sequence

import numpy as np
import openvino as ov
import psutil
import pytest
from openvino import opset13 as ops

from recollect.models.int8_weights import has_room, write_as_int8

WIDTH, GROUP = 64, 32
CORE = ov.Core()  # one that stays: see `recollect.runtime.openvino`


def constant(numbers: np.ndarray, bits: int) -> ov.Node:
    kind = ov.Type.u4 if bits == 4 else ov.Type.u8
    return ov.op.Constant(kind, ov.Shape(numbers.shape), numbers.reshape(-1).tolist())


def product(
    hidden: ov.Node, rows: int, *, bits: int, highest: int | None = None, group: int = GROUP
) -> ov.Node:
    """Return a product with random packed weights, in the form that the converter writes."""
    random = np.random.default_rng(rows * group)
    shape = (rows, WIDTH // group)
    numbers = random.integers(0, (highest or 2**bits - 1) + 1, (*shape, group))
    zeros = random.integers(0, 2**bits if bits == 4 else 1, (*shape, 1)) + (bits == 8) * 128
    if highest is not None:  # from 0 on: over 127 there is no int8
        numbers[0, 0, 0] = highest
        zeros[...] = 0
    shifted = ops.subtract(
        ops.convert(constant(numbers, bits), np.float16),
        ops.convert(constant(zeros, bits), np.float16),
    )
    scales = (random.random((*shape, 1)) / 100).astype(np.float16)
    scaled = ops.multiply(shifted, ops.constant(scales))
    matrix = ops.reshape(scaled, ops.constant(np.array([rows, WIDTH], np.int64)), False)
    return ops.matmul(hidden, ops.convert(matrix, np.float32), False, True)


def logits(model: ov.Model, tokens: int = 5) -> Sequence[np.ndarray]:
    values = np.random.default_rng(0).standard_normal((tokens, WIDTH)).astype(np.float32)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return list(CORE.compile_model(model, "CPU", settings)([values]).to_tuple())


def kinds(model: ov.Model) -> Counter[str]:
    """Count products, and the stored matrices by the type of their numbers."""
    found: Counter[str] = Counter()
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            found["MatMul"] += 1
        elif node.get_type_name() == "Constant" and list(node.get_output_shape(0))[2:] == [GROUP]:
            found[node.get_output_element_type(0).get_type_name()] += 1
    return found


def model_of(*widths: int, bits: int, highest: int | None = None) -> ov.Model:
    hidden = ops.parameter([-1, WIDTH], np.float32)
    products = [product(hidden, rows, bits=bits, highest=highest) for rows in widths]
    return ov.Model(products, [hidden])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_keeps_its_value(bits: int) -> None:
    model = model_of(96, bits=bits)
    before = logits(model)
    write_as_int8(model)
    assert kinds(model) == {"MatMul": 1, "i8": 1}
    np.testing.assert_allclose(logits(model)[0], before[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("widths", [(96, 32, 64), (96, 96)], ids=["query key value", "gate up"])
def test_products_of_one_input_become_one(bits: int, widths: tuple[int, ...]) -> None:
    model = model_of(*widths, bits=bits)
    before = logits(model)
    write_as_int8(model)
    assert kinds(model) == {"MatMul": 1, "i8": 1}
    after = logits(model)
    assert [array.shape for array in after] == [(5, width) for width in widths]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


def test_products_with_other_groups_stay_apart() -> None:
    hidden = ops.parameter([-1, WIDTH], np.float32)
    groups = (GROUP, GROUP, GROUP // 2)
    model = ov.Model([product(hidden, 32, bits=8, group=group) for group in groups], [hidden])
    before = logits(model)
    write_as_int8(model)
    assert kinds(model)["MatMul"] == 3
    for old, new in zip(before, logits(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("highest", "kind"), [(127, "i8"), (128, "u8")])
def test_what_does_not_fit_int8_stays_as_it_was(highest: int, kind: str) -> None:
    model = model_of(96, bits=8, highest=highest)
    before = logits(model)
    write_as_int8(model)
    assert kinds(model) == {"MatMul": 1, kind: 1}
    np.testing.assert_allclose(logits(model)[0], before[0], rtol=0, atol=1e-5)


def test_a_model_without_packed_weights_stays_as_it_was() -> None:
    hidden = ops.parameter([-1, WIDTH], np.float32)
    weights = ops.constant(np.eye(WIDTH, dtype=np.float32))
    model = ov.Model([ops.matmul(hidden, weights, False, True)], [hidden])
    operations = [node.get_type_name() for node in model.get_ordered_ops()]
    write_as_int8(model)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == operations


def test_a_large_model_stays_small() -> None:
    total = psutil.virtual_memory().total
    assert has_room(total // 8)
    assert not has_room(total // 8 + 1)
