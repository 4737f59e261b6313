"""
Writes the weights of a converted model as int8, where this processor computes faster on them.

Every weight keeps its value: logits differ by the order of sums at most. Works on the graph and
its file. Does not know where the model came from, and does not run it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import openvino as ov
import psutil
from openvino import opset13 as ops

from recollect.models.folder import MODEL_FILES

# The kernel that makes packed weights f32 before it multiplies: OpenVINO's choice on a processor
# with AVX2 and without VNNI.
_SLOW_KERNEL: Final = "brgemm_avx2_f32"
_MOST_OF_MEMORY: Final = 1 / 4
"""That weights of twice their size may take: with 8 GB, models of up to 1 GB become faster, and
larger ones stay small. As much is given to KV."""
_INT8: Final = np.iinfo(np.int8)


def write_as_int8(model: ov.Model) -> None:
    """
    Make weights that are packed with zero points plain int8, and products of one input one.

    The converter writes `(q - zero) * scale` with q and zero of 4 or 8 bits; q - zero is a whole
    number that mostly fits int8, and is written down as that. Where it does not, or where weights
    are of another form, they stay as they are. The products for query, key and value of a layer
    become one where their groups are alike, and so do those for gate and up: starting a product
    takes as long as a narrow one itself.

    A pass over 4 sequences takes 0.7 of its time, over one 0.9; prefill takes the same.
    Source: our own measurement on two cores with AVX2, benchmarks/weights.py.
    """
    for node in model.get_ops():
        packed = _packed(node)
        if packed is not None and (numbers := packed.numbers()) is not None:
            whole = ops.convert(ops.constant(numbers), node.get_output_element_type(0))
            node.output(0).replace(whole.output(0))
    for products in list(_of_one_input(model)):
        _fuse(products)
    model.validate_nodes_and_infer_types()


def has_room(packed_bytes: int) -> bool:
    """Return whether this machine's memory is so large that the model may take twice as much of it."""
    return 2 * packed_bytes <= psutil.virtual_memory().total * _MOST_OF_MEMORY


def is_faster_here() -> bool:
    """
    Return whether OpenVINO multiplies packed weights here with the kernel that int8 outruns.

    Asked of OpenVINO itself, by a product of 64 x 64: a processor with VNNI or AMX has kernels
    of its own for them, which were not measured.
    """
    ones = ov.op.Constant(ov.Type.u4, ov.Shape([64, 2, 32]), [1])
    zeros = ov.op.Constant(ov.Type.u4, ov.Shape([64, 2, 1]), [0])
    hidden = ops.parameter([-1, 64], np.float32)
    shifted = ops.subtract(ops.convert(ones, np.float16), ops.convert(zeros, np.float16))
    product = ops.matmul(
        hidden, _dequantized(shifted, np.ones((64, 2, 1), np.float16)), False, True
    )
    compiled = ov.compile_model(ov.Model([product], [hidden]), "CPU", {"PERF_COUNT": "YES"})
    request = compiled.create_infer_request()
    request.infer([np.ones((4, 64), np.float32)])
    return any(node.exec_type == _SLOW_KERNEL for node in request.profiling_info)


@dataclass(frozen=True)
class _Packed:
    """The constants behind `Convert(values) - Convert(zeros)`."""

    values: ov.Node
    zeros: ov.Node

    def numbers(self) -> np.ndarray | None:
        """Return the differences as int8 of the values' shape; None where one does not fit."""
        values, zeros = _unpacked(self.values), _unpacked(self.zeros)
        lowest = int(values.min()) - int(zeros.max())
        highest = int(values.max()) - int(zeros.min())
        if lowest < _INT8.min or highest > _INT8.max:
            wide = values.astype(np.int16) - zeros
            if wide.min() < _INT8.min or wide.max() > _INT8.max:
                return None
        # Bytes wrap around: a difference that fits int8 is right whatever was carried.
        np.subtract(values, zeros, out=values)
        return values.view(np.int8)


def _packed(node: ov.Node) -> _Packed | None:
    if node.get_type_name() != "Subtract":
        return None
    converts = [node.input_value(side).get_node() for side in (0, 1)]
    if any(convert.get_type_name() != "Convert" for convert in converts):
        return None
    values, zeros = (convert.input_value(0).get_node() for convert in converts)
    for constant in (values, zeros):
        unsigned = constant.get_output_element_type(0) in (ov.Type.u4, ov.Type.u8)
        if constant.get_type_name() != "Constant" or not unsigned:
            return None
    return _Packed(values, zeros)


def _unpacked(constant: ov.Node) -> np.ndarray:
    """Return a constant of u4 or u8 as a new array of bytes, one a number."""
    shape = tuple(constant.get_output_shape(0))
    stored = np.asarray(constant.data).reshape(-1).view(np.uint8)
    if constant.get_output_element_type(0) == ov.Type.u8:
        return stored.reshape(shape).copy()
    pairs = np.empty((stored.size, 2), np.uint8)
    np.bitwise_and(stored, 15, out=pairs[:, 0])
    np.right_shift(stored, 4, out=pairs[:, 1])
    return pairs.reshape(-1)[: np.prod(shape, dtype=int)].reshape(shape)


@dataclass(frozen=True)
class _Product:
    """A product with int8 weights: `(rows, groups, group)` numbers, `(rows, groups, 1)` scales."""

    node: ov.Node
    numbers: np.ndarray
    scales: np.ndarray


def _of_one_input(model: ov.Model) -> Iterator[list[_Product]]:
    """Yield the products that can be one: those of the same input, with groups alike."""
    sharing: dict[tuple[str, int], list[_Product]] = {}
    for node in model.get_ordered_ops():
        product = _product(node)
        if product is not None:
            source = node.input_value(0)
            key = (source.get_node().get_name(), source.get_index())
            sharing.setdefault(key, []).append(product)
    for products in sharing.values():
        if len(products) > 1 and len({product.numbers.shape[1:] for product in products}) == 1:
            yield products


def _product(node: ov.Node) -> _Product | None:
    """Return a node as a product with int8 weights; None where it is none."""
    if node.get_type_name() != "MatMul":
        return None
    attributes = node.get_attributes()
    if attributes["transpose_a"] or not attributes["transpose_b"]:
        return None
    inner = node.input_value(1).get_node()
    for kind in ("Convert", "Reshape", "Multiply"):
        if inner.get_type_name() != kind:
            return None
        scaled, inner = inner, inner.input_value(0).get_node()
    if inner.get_type_name() != "Convert":
        return None
    numbers, scales = inner.input_value(0).get_node(), scaled.input_value(1).get_node()
    is_int8 = numbers.get_output_element_type(0) == ov.Type.i8
    if not is_int8 or {numbers.get_type_name(), scales.get_type_name()} != {"Constant"}:
        return None
    return _Product(node, np.asarray(numbers.data), np.asarray(scales.data))


def _fuse(products: list[_Product]) -> None:
    """Put one product in the place of several, and split what comes out of it."""
    numbers = np.concatenate([product.numbers for product in products])
    scales = np.concatenate([product.scales for product in products])
    weights = _dequantized(ops.convert(ops.constant(numbers), scales.dtype.type), scales)
    one = ops.matmul(products[0].node.input_value(0), weights, False, True)
    widths = np.array([len(product.numbers) for product in products], np.int64)
    split = ops.variadic_split(one, ops.constant(np.int64(-1)), ops.constant(widths))
    for number, product in enumerate(products):
        product.node.output(0).replace(split.output(number))


def _dequantized(numbers: ov.Node, scales: np.ndarray) -> ov.Node:
    """Return the f32 matrix of grouped numbers, in the form that OpenVINO keeps compressed."""
    rows, groups, group = numbers.get_output_shape(0)
    scaled = ops.multiply(numbers, ops.constant(scales))
    shape = ops.constant(np.array([rows, groups * group], np.int64))
    return ops.convert(ops.reshape(scaled, shape, False), np.float32)


def main() -> None:
    """Rewrite the model in the folder that is the first argument; a half-made file is never seen."""
    xml, weights = (Path(sys.argv[1], name) for name in MODEL_FILES)
    if not (has_room(weights.stat().st_size) and is_faster_here()):
        return
    model = ov.Core().read_model(xml)
    write_as_int8(model)
    written = xml.with_suffix(".int8.xml")
    ov.save_model(model, written, compress_to_fp16=False)
    del model  # Windows replaces no file that is mapped
    written.with_suffix(".bin").replace(weights)
    written.replace(xml)


if __name__ == "__main__":
    main()
