"""
The OpenVINO graph of a decoder, with the exact weights of its GGUF file.

The graph has the form of an `optimum-cli` export (ReadValue, Gather by beam_idx, Concat, SDPA, Assign), which
the paged-attention transformation recognizes. Weights are written into a mapped file, so that only the chunks
that are being unpacked are in memory.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino as ov
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from openvino import opset13 as ops

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_decoder import Decoder, Rope
from recollect.models.gguf_weights import (
    LAYOUTS,
    Layout,
    Shards,
    iterate_rows,
    take_apart,
    values_of,
)

_CHUNK_BYTES: Final = 1 << 19
"""
Bytes of the file that a thread unpacks at once: about a million weights, whose f32 copies take 20 MB.
"""
_PLAIN: Final[Mapping[Kind, tuple[np.dtype[Any], Any]]] = {
    Kind.F32: (np.dtype(np.float32), ov.Type.f32),
    Kind.F16: (np.dtype(np.float16), ov.Type.f16),
    Kind.BF16: (np.dtype(np.uint16), ov.Type.bf16),
}
_MASKED: Final = -65504.0
"""Value of a masked place: the lowest f16, which stays finite in every precision."""


class Constants:
    """
    Arrays in a file that is mapped into memory, for the constants of a graph.

    The system can write their pages to the disk when memory runs short. Constants point into the arrays, so
    this object must live as long as the graph.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._end = 0
        self._arrays: list[np.ndarray] = []
        file.touch()

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """
        Return a new array of zeros.

        Raises:
            OSError: The disk is full, or the file cannot be written to.
        """
        shape = tuple(shape)
        size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._file.open("r+b") as file:
            _reserve(file.fileno(), self._end, size_bytes)
        made = np.memmap(self._file, dtype, "r+", offset=self._end, shape=shape)
        self._end += size_bytes
        self._arrays.append(made)
        return made

    def constant(self, array: np.ndarray, shape: Sequence[int], kind: ov.Type) -> ov.Node:
        """Return a constant that points into an array of this object."""
        # As a plain ndarray, because OpenVINO does not accept subclasses.
        tensor = ov.Tensor(array.view(np.ndarray), ov.Shape(list(shape)), kind)
        return ov.op.Constant(tensor)


def _reserve(descriptor: int, start: int, size_bytes: int) -> None:
    """
    Extend a file, and allocate its space on the disk if the system can.

    A full disk is then reported here. Otherwise writing to the mapped pages would crash the process.
    """
    try:
        os.posix_fallocate(descriptor, start, size_bytes)
    except AttributeError:  # macOS and Windows do not have it
        os.truncate(descriptor, start + size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot allocate
            raise
        os.truncate(descriptor, start + size_bytes)


class GraphBuilder:
    """
    Builds the graph of one model.

    Args:
        decoder: What is built.
        shards: The file's weights.
        constants: Where the weights are stored; it must live as long as the graph.
        on_bytes: Called with the number of the file's bytes that were unpacked since the last call.
        fuses_gate: Whether gate and up are one product. That is faster if `has_avx2_kernel()`. Otherwise a
            prefill takes a tenth longer, because SiLU is no longer fused with the product and the result has
            to be copied into two. Source: LOG.md, 2026-11-26.
    """

    def __init__(
        self,
        decoder: Decoder,
        shards: Shards,
        constants: Constants,
        on_bytes: Callable[[int], None],
        *,
        fuses_gate: bool = False,
    ) -> None:
        self._decoder = decoder
        self._shards = shards
        self._constants = constants
        self._on_bytes = on_bytes
        self._fuses_gate = fuses_gate
        self._sinks: list[ov.Node] = []
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def build(self) -> ov.Model:
        """
        Return the graph: token ids, mask, positions and beam indices in, logits out.

        Raises:
            UnsupportedModelError: A tensor is damaged, or its shape does not fit those of others.
            OSError: The disk is full.
        """
        with self._pool:
            return self._build()

    def _build(self) -> ov.Model:
        decoder = self._decoder
        inputs = self._inputs()
        ids = inputs[0]
        embedding = self._matrix(["token_embd.weight"])
        hidden = ops.gather(embedding, ids, _number(0))
        hidden = _scaled(hidden, decoder.embedding_scale)
        for layer in range(decoder.layers):
            hidden = self._layer(hidden, layer)
        hidden = self._norm(hidden, "output_norm")
        if decoder.has("output.weight"):
            (logits,) = self._products(hidden, ["output"])
        else:
            logits = ops.matmul(hidden, embedding, False, True).output(0)
        result = ops.result(_scaled(logits, 1 / decoder.logit_divisor))
        result.output(0).set_names({"logits"})
        return ov.Model([result], self._sinks, inputs, decoder.architecture)

    def _inputs(self) -> list[ov.Node]:
        names = "input_ids", "attention_mask", "position_ids"
        ids, attention, positions = (ops.parameter([-1, -1], np.int64, name=name) for name in names)
        self._beam = ops.parameter([-1], np.int32, name="beam_idx")
        inputs = [ids, attention, positions, self._beam]
        for parameter in inputs:
            parameter.output(0).set_names({parameter.get_friendly_name()})
        self._batch = ops.gather(ops.shape_of(ids), _integers(0), _integers(0))
        self._rotation = self._rotation_of(positions, self._decoder.rope)
        if self._decoder.local_rope is not None:
            self._local_rotation = self._rotation_of(positions, self._decoder.local_rope)
        self._set_masks(ids, attention, positions)
        return inputs

    def _set_masks(self, ids: ov.Node, attention: ov.Node, positions: ov.Node) -> None:
        """
        Make the attention masks of the stateful graph.

        The paged-attention transformation removes both, since paged attention masks by itself. From the mask
        of layers with a sliding window it takes the window's length, which it recognizes only in this form,
        that of gpt-oss in transformers. Source: OpenVINO, state_management_pattern.cpp.
        """
        length = ops.gather(ops.shape_of(attention), _number(1), _number(0))
        places = ops.unsqueeze(ops.range(_number(0), length, _number(1), "i64"), _integers(0, 1, 2))
        own = ops.unsqueeze(positions, _integers(1, 3))
        is_seen = ops.less_equal(places, own)
        self._mask = ops.select(is_seen, _number(0.0), _number(_MASKED))
        if not self._decoder.window:
            return
        yes = ops.constant(np.array(True))
        is_near = ops.greater(places, ops.add(own, _number(-self._decoder.window)))
        both = ops.bitwise_and(ops.bitwise_and(yes, is_near), is_seen)
        both = ops.bitwise_and(ops.bitwise_and(yes, both), yes)
        width = ops.unsqueeze(length, _integers(0))
        tokens = ops.gather(ops.shape_of(ids), _integers(1), _integers(0))
        shape = ops.concat([self._batch, _integers(1), tokens, width], 0)
        wide = ops.broadcast(both, shape, broadcast_spec="BIDIRECTIONAL")
        mask = ops.select(wide, _number(0.0), _number(_MASKED))
        self._window_mask = ops.slice(mask, _integers(0), width, _integers(1), _integers(3))

    def _layer(self, hidden: ov.Node, layer: int) -> ov.Node:
        """Return the output of a layer. `_norm` returns its input if the file has no such norm."""
        name, scale = f"blk.{layer}", self._decoder.residual_scale
        attended = self._attention(self._norm(hidden, f"{name}.attn_norm"), layer)
        attended = self._norm(attended, f"{name}.post_attention_norm")
        hidden = ops.add(hidden, _scaled(attended, scale))
        normed = self._norm(hidden, f"{name}.ffn_norm")
        gate, up = self._gate_and_up(normed, name)
        gate = ops.gelu(gate, "tanh") if self._decoder.has_gelu else ops.swish(gate)
        (down,) = self._products(ops.multiply(gate, up), [f"{name}.ffn_down"])
        down = self._norm(down, f"{name}.post_ffw_norm")
        return ops.add(hidden, _scaled(down, scale))

    def _gate_and_up(self, hidden: ov.Node, name: str) -> list[ov.Output]:
        if not self._decoder.fused:
            names = [f"{name}.ffn_gate", f"{name}.ffn_up"]
            if self._fuses_gate:
                return self._products(hidden, names)
            return [self._products(hidden, [part])[0] for part in names]
        (both,) = self._products(hidden, [f"{name}.ffn_up"])
        halves: list[ov.Output] = ops.split(both, _number(-1), 2).outputs()
        return halves

    # ---------------------------------------------------------------- attention

    def _attention(self, hidden: ov.Node, layer: int) -> ov.Output:
        decoder, name = self._decoder, f"blk.{layer}."
        query, key, value = self._query_key_value(hidden, name)
        query = self._heads(query, decoder.heads, f"{name}attn_q_norm")
        key = self._heads(key, decoder.kv_heads, f"{name}attn_k_norm")
        is_windowed = layer in decoder.windowed
        if layer not in decoder.unrotated:
            is_local = is_windowed and decoder.local_rope is not None
            rotation = self._local_rotation if is_local else self._rotation
            query, key = self._rotated(query, rotation), self._rotated(key, rotation)
        state = f"past_key_values.{layer}.{{0}}present.{layer}.{{0}}"
        keys = self._cached(key, state.format("key"))
        values = self._cached(self._heads(value, decoder.kv_heads), state.format("value"))
        mixed = ops.scaled_dot_product_attention(
            query,
            keys,
            values,
            self._window_mask if is_windowed else self._mask,
            _number(decoder.attention_scale),
        )
        width = decoder.heads * decoder.head_size
        flat = ops.reshape(
            ops.transpose(mixed, _integers(0, 2, 1, 3)), _integers(0, 0, width), True
        )
        return self._products(flat, [f"{name}attn_output"])[0]

    def _query_key_value(self, hidden: ov.Node, name: str) -> list[ov.Output]:
        decoder = self._decoder
        if not decoder.fused:
            return self._products(hidden, [f"{name}attn_{part}" for part in "qkv"])
        (all_three,) = self._products(hidden, [f"{name}attn_qkv"])
        heads = decoder.heads, decoder.kv_heads, decoder.kv_heads
        widths = _integers(*[count * decoder.head_size for count in heads])
        parts: list[ov.Output] = ops.variadic_split(all_three, _integers(-1), widths).outputs()
        return parts

    def _heads(self, hidden: ov.Output, count: int, norm: str = "") -> ov.Node:
        """Return `(batch, heads, tokens, head size)`, normed over each head or over all of them."""
        size = self._decoder.head_size
        is_whole = norm and self._norm_width(norm) == count * size
        if is_whole:
            hidden = self._norm(hidden, norm)
        heads = ops.reshape(hidden, _integers(0, 0, count, size), True)
        if norm and not is_whole:
            heads = self._norm(heads, norm)
        return ops.transpose(heads, _integers(0, 2, 1, 3))

    def _rotation_of(self, positions: ov.Node, rope: Rope) -> tuple[ov.Node, ov.Node]:
        """Return the cosines and sines of all positions, f32, shape `(batch, 1, tokens, rotated)`."""
        angles = ops.multiply(
            ops.unsqueeze(ops.convert(positions, np.float32), _integers(2)),
            ops.constant(rope.frequencies.astype(np.float32)),
        )
        angles = ops.unsqueeze(ops.concat([angles, angles], -1), _integers(1))
        return _scaled(ops.cos(angles), rope.factor), _scaled(ops.sin(angles), rope.factor)

    def _rotated(self, heads: ov.Node, rotation: tuple[ov.Node, ov.Node]) -> ov.Node:
        """Return heads with their first dimensions rotated; a pair is half of these dimensions apart."""
        cos, sin = rotation
        rotated, size = 2 * len(self._decoder.rope.frequencies), self._decoder.head_size
        turning = heads if rotated == size else _part(heads, 0, rotated)
        first, second = _part(turning, 0, rotated // 2), _part(turning, rotated // 2, rotated)
        swapped = ops.concat([ops.multiply(second, _number(-1.0)), first], -1)
        turned = ops.add(ops.multiply(turning, cos), ops.multiply(swapped, sin))
        return turned if rotated == size else ops.concat([turned, _part(heads, rotated, size)], -1)

    def _cached(self, new: ov.Node, name: str) -> ov.Node:
        """Append *new* to the state *name*; return all of it, with heads repeated for the query's heads."""
        heads, kv_heads = self._decoder.heads, self._decoder.kv_heads
        size = self._decoder.head_size
        empty_shape = ops.concat([self._batch, _integers(kv_heads, 0, size)], 0)
        empty = ops.broadcast(_number(0.0), empty_shape)
        shape = ov.PartialShape([-1, kv_heads, -1, size])
        state = ops.read_value(empty, name, ov.Type.f32, shape)
        both = ops.concat([ops.gather(state, self._beam, _number(0)), new], 2)
        self._sinks.append(ops.assign(both, name))
        if heads == kv_heads:
            return both
        wide_shape = ops.concat([self._batch, _integers(kv_heads, heads // kv_heads, 1, 1)], 0)
        # By keyword, because the third positional argument of `broadcast` is `axes_mapping`.
        wide = ops.broadcast(
            ops.unsqueeze(both, _integers(2)), wide_shape, broadcast_spec="BIDIRECTIONAL"
        )
        return ops.reshape(wide, _integers(0, heads, -1, size), True)

    # ---------------------------------------------------------------- norms and products

    def _norm(self, hidden: ov.Output, name: str) -> ov.Node:
        """Return x / sqrt(mean(x^2) + e) * weight, in the order of operations that OpenVINO fuses."""
        if self._norm_width(name) is None:
            return hidden
        mean = ops.reduce_mean(ops.power(hidden, _number(2.0)), _integers(-1), True)
        root = ops.sqrt(ops.add(mean, _number(self._decoder.epsilon)))
        weight = ops.constant(self._vector(f"{name}.weight"))
        return ops.multiply(weight, ops.multiply(hidden, ops.divide(_number(1.0), root)))

    def _norm_width(self, name: str) -> int | None:
        tensor = self._shards.tensors.get(f"{name}.weight")
        return None if tensor is None else tensor.shape[-1]

    def _products(self, hidden: ov.Node, names: Sequence[str]) -> list[ov.Output]:
        """
        Return the products of several matrices with one input.

        Matrices of the same tensor type are multiplied as one, because the overhead of a product is as large
        as the computation of a narrow one.
        """
        by_kind: dict[Kind, list[str]] = {}
        for name in names:
            by_kind.setdefault(self._shards.kind(f"{name}.weight"), []).append(name)
        found: dict[str, ov.Output] = {}
        for group in by_kind.values():
            weights = [f"{name}.weight" for name in group]
            out = ops.matmul(hidden, self._matrix(weights), False, True)
            if any(self._decoder.has(f"{name}.bias") for name in group):
                out = ops.add(
                    out, ops.constant(np.concatenate([self._bias(name) for name in group]))
                )
            widths = _integers(*[self._shards.tensors[name].shape[0] for name in weights])
            parts = ops.variadic_split(out, _integers(-1), widths) if len(group) > 1 else out
            found.update(zip(group, parts.outputs(), strict=True))
        return [found[name] for name in names]

    def _bias(self, name: str) -> np.ndarray:
        if not self._decoder.has(f"{name}.bias"):
            return np.zeros(self._shards.tensors[f"{name}.weight"].shape[0], np.float32)
        values = self._vector(f"{name}.bias")
        return self._in_halves(f"{name}.bias", values[:, None])[:, 0]

    def _vector(self, name: str) -> np.ndarray:
        """Return the f32 values of a norm or bias, shape `(n,)`."""
        return values_of(self._shards.blocks(name), self._shards.kind(name))

    # ---------------------------------------------------------------- weights

    def _matrix(self, names: Sequence[str]) -> ov.Node:
        """Return tensors of one type, concatenated by rows, as an f32 matrix of the graph."""
        kind = self._shards.kind(names[0])
        shapes = [self._shards.tensors[name].shape for name in names]
        if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise self._damaged(names[0], f"of shapes {shapes}, which do not fit each other")
        rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
        if kind in _PLAIN:
            dtype, stored = _PLAIN[kind]
            matrix = self._constants.array((rows, width), dtype)
            for place, part in self._chunks(names):
                matrix[place] = part.view(dtype)
                self._on_bytes(part.nbytes)
            constant = self._constants.constant(matrix, (rows, width), stored)
            return constant if stored == ov.Type.f32 else ops.convert(constant, np.float32)
        return self._packed(names, rows, width, LAYOUTS[kind])

    def _packed(self, names: Sequence[str], rows: int, width: int, layout: Layout) -> ov.Node:
        """Return `(numbers - zeros) * scales` in the form that the CPU plugin keeps packed in memory."""
        kind = self._shards.kind(names[0])
        groups = width // layout.group
        make, is_half_byte = self._constants.array, layout.storage in ("u4", "i4")
        numbers = make((rows, width // 2 if is_half_byte else width), np.dtype(np.uint8))
        precision = np.dtype(np.float16 if layout.half_scales else np.float32)
        scales = make((rows, groups), precision)
        zeros = make((rows, groups), np.dtype(np.float32)) if layout.has_zeros else None

        def store(place: slice, part: np.ndarray) -> int:
            taken = take_apart(part.reshape(-1, _block_bytes(kind)), kind)
            flat: np.ndarray = taken.numbers.reshape(-1).view(np.uint8)
            if is_half_byte:  # OpenVINO has the first number in the low half
                flat = flat[0::2] & 15 | flat[1::2] << 4
            numbers[place] = flat.reshape(len(part), -1)
            scales[place] = taken.scales.reshape(len(part), -1)
            if zeros is not None and taken.zeros is not None:
                zeros[place] = taken.zeros.reshape(len(part), -1)
            return part.nbytes

        try:
            for done in self._pool.map(lambda chunk: store(*chunk), self._chunks(names)):
                self._on_bytes(done)
        except ValueError as cause:
            raise self._damaged(names[0], f"with {cause}") from cause
        return self._dequantized(numbers, scales, zeros, (rows, groups, layout.group), layout)

    def _dequantized(
        self,
        numbers: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        shape: tuple[int, int, int],
        layout: Layout,
    ) -> ov.Node:
        constant = self._constants.constant
        each_group = (*shape[:2], 1)
        precision = ov.Type.f16 if layout.half_scales else ov.Type.f32
        packed = constant(numbers, shape, getattr(ov.Type, layout.storage))
        whole = ops.convert(packed, scales.dtype.type)
        if zeros is not None:
            whole = ops.subtract(whole, constant(zeros, each_group, ov.Type.f32))
        scaled = ops.multiply(whole, constant(scales, each_group, precision))
        matrix = ops.reshape(scaled, _integers(shape[0], shape[1] * shape[2]), False)
        return ops.convert(matrix, np.float32) if layout.half_scales else matrix

    def _chunks(self, names: Sequence[str]) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the bytes of some rows at a time, with the place of these rows in the concatenated matrix."""
        first = 0
        for name in names:
            rows = self._in_halves(name, self._shards.rows(name))
            for place in iterate_rows(rows, _CHUNK_BYTES):
                yield (
                    slice(first + place.start, first + place.stop),
                    np.ascontiguousarray(rows[place]),
                )
            first += len(rows)

    def _in_halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        """
        Return a tensor's rows; those of query and key reordered so that rotated pairs are half a head apart.

        In files of some architectures the two dimensions of a rotated pair are adjacent. Only rows change
        places, so it does not matter how a row is packed.
        """
        decoder = self._decoder
        heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}.get(name.split(".")[-2])
        if not decoder.interleaved or heads is None:
            return rows
        if len(rows) != heads * decoder.head_size:
            raise self._damaged(name, f"of {len(rows)} rows for {heads} heads")
        pairs = rows.reshape(heads, decoder.head_size // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def _damaged(self, name: str, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._shards.path.name} holds {name} {what}: the file is damaged; download it again."
        )


def has_avx2_kernel() -> bool:
    """
    Return whether OpenVINO multiplies packed weights with its AVX2 kernel on this machine.

    Found out by running a product of 64 x 64 and asking which kernel ran.
    """
    numbers = ov.op.Constant(ov.Type.u4, ov.Shape([64, 2, 32]), [1])
    shifted = ops.subtract(ops.convert(numbers, np.float32), ops.constant(_ONES))
    matrix = ops.reshape(ops.multiply(shifted, ops.constant(_ONES)), _integers(64, 64), False)
    hidden = ops.parameter([-1, 64], np.float32)
    product = ov.Model([ops.matmul(hidden, matrix, False, True)], [hidden])
    request = ov.compile_model(product, "CPU", {"PERF_COUNT": "YES"}).create_infer_request()
    request.infer([np.ones((4, 64), np.float32)])
    return any("avx2" in node.exec_type for node in request.profiling_info)


_ONES: Final = np.ones((64, 2, 1), np.float32)


def _block_bytes(kind: Kind) -> int:
    size_bytes: int = GGML_QUANT_SIZES[kind][1]
    return size_bytes


def _integers(*numbers: int) -> ov.Node:
    return ops.constant(np.array(numbers, np.int64))


def _number(value: float) -> ov.Node:
    """Return a scalar constant: i64 for an int, f32 for a float."""
    return ops.constant(np.int64(value) if isinstance(value, int) else np.float32(value))


def _scaled(value: ov.Output, factor: float) -> ov.Output:
    return value if factor == 1 else ops.multiply(value, _number(float(factor)))


def _part(heads: ov.Node, start: int, stop: int) -> ov.Node:
    """Return the dimensions `[start, stop)` of each head."""
    return ops.slice(heads, _integers(start), _integers(stop), _integers(1), _integers(3))
