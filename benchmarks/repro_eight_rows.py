"""
Why a pass over 5 rows or more costs twice that of 4: OpenVINO's CPU plugin alone, no model, no code of ours.

    python benchmarks/repro_eight_rows.py [--layers 60] [--rounds 20] [--only WORDS] [--save]

A chain of matrix products as in a small language model (576 to 1,536 numbers and back), weights in 4 bits
with a scale and a zero point for each 32. Up to 4 rows the kernel multiplies what it has just unpacked;
from 5 rows on oneDNN's inner product unpacks weights into a buffer first, and then multiplies (`mb > 4`
in `jit_brgemm_inner_product_utils.cpp` of openvinotoolkit/oneDNN: `weights_decomp_kind_t::prepack`).
What follows are ways around it: other shapes, two halves of four rows, other types, settings and streams.

Needs openvino and numpy; recollect only to keep the result (`--save`).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, Final

import numpy as np
import openvino as ov
from openvino import opset13 as ops

HIDDEN, WIDE, GROUP = 576, 1536, 32
ROWS: Final = (1, 2, 4, 5, 6, 8, 12, 16)
FEW: Final = 4
"""Rows up to which the kernel unpacks and multiplies at once."""


@dataclass(frozen=True)
class Way:
    """One way to compute the same chain."""

    weights: str = "u4"
    """Their type: u4, u8, or bf16, which is not packed."""
    zeros: str = "f32"
    """The type of the zero points; "none": there are none."""
    halves: bool = False
    """Each product in halves of at most 4 rows, inside one graph."""
    padded_to: int = 1
    """Rows are filled up to a multiple of that many."""
    requests: int = 1
    """Requests at once, each with its share of the rows."""
    settings: dict[str, str] = field(default_factory=dict)
    isa: str = ""
    """What oneDNN may use at most."""


F32: Final = {"INFERENCE_PRECISION_HINT": "f32"}
WAYS: Final = {
    "as it is": Way(),
    "filled up to 16 rows": Way(padded_to=16),
    "halves of 4 rows in one graph": Way(halves=True),
    "two requests, one thread each": Way(
        requests=2, settings={"NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "2"}
    ),
    "one thread": Way(settings={"INFERENCE_NUM_THREADS": "1"}),
    "threads not pinned": Way(settings={"ENABLE_CPU_PINNING": "NO"}),
    "throughput": Way(settings={"PERFORMANCE_HINT": "THROUGHPUT"}),
    "no AMX": Way(isa="AVX512_CORE_BF16"),
    "f16": Way(settings={"INFERENCE_PRECISION_HINT": "f16"}),
    "f32": Way(settings=F32),
    "whole zero points": Way(zeros="u8"),
    "no zero points": Way(zeros="none"),
    "8 bits": Way(weights="u8"),
    "8 bits, whole zero points": Way(weights="u8", zeros="u8"),
    "bf16, not packed": Way(weights="bf16"),
    "f32, whole zero points, inputs quantized by 32": Way(
        zeros="u8", settings={**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
    ),
    "f32, no zero points, inputs quantized by 32": Way(
        zeros="none", settings={**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
    ),
    "f32, 8 bits, no zero points, inputs quantized by 32": Way(
        weights="u8",
        zeros="none",
        settings={**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    ),
    "whole zero points, inputs not quantized": Way(
        zeros="u8", settings={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    ),
    "f32, whole zero points, inputs quantized by 64": Way(
        zeros="u8", settings={**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}
    ),
    "f32, whole zero points, inputs quantized by 128": Way(
        zeros="u8", settings={**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
    ),
}


def main() -> None:
    """Measure each way in a process of its own, and print a table and one JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=60, help="pairs of products")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--only", default="", help="ways whose name has these words")
    options.add_argument("--save", action="store_true", help="keep the result under results/")
    options.add_argument("--way", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.way is not None:
        print(json.dumps(measured(WAYS[arguments.way], arguments.layers, arguments.rounds)))
        return
    found = {}
    print(f"{'ms a pass, minimum; rows:':50}" + "".join(f"{rows:7}" for rows in ROWS))
    for name, way in WAYS.items():
        if arguments.only not in name:
            continue
        found[name] = apart(name, way, sys.argv[1:])
        print(f"{name:50}" + "".join(f"{ms:7.2f}" for ms in found[name]["minimum_ms"].values()))
        sys.stdout.flush()
    result = {"layers": arguments.layers, "openvino": ov.get_version(), "ways": found}
    print(json.dumps(result))
    if arguments.save:
        save(result)


def apart(name: str, way: Way, options: list[str]) -> dict[str, Any]:
    """Measure a way in a process of its own: oneDNN reads its environment once."""
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": way.isa} if way.isa else {})}
    command = [sys.executable, __file__, *options, "--way", name]
    told = subprocess.run(command, env=environment, check=True, capture_output=True)  # noqa: S603 - ourselves
    result: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return result


def measured(way: Way, layers: int, rounds: int) -> dict[str, Any]:
    """Return the minimum and the median of each number of rows, in milliseconds, and the kernel used."""
    core = ov.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", **way.settings}
    compiled = core.compile_model(chain(way, layers), "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(way.requests)]
    samples: dict[int, list[float]] = {rows: [] for rows in ROWS}
    random = np.random.default_rng(1)
    for number in range(rounds + 1):
        for rows in ROWS:
            filled = -(-rows // way.padded_to) * way.padded_to
            parts = np.array_split(
                random.standard_normal((filled, HIDDEN), np.float32), way.requests
            )
            for request, part in zip(requests, parts, strict=True):
                request.set_input_tensor(ov.Tensor(part))
            for timed in (False, True):  # the first of a shape makes its kernels
                begun = perf_counter()
                for request, part in zip(requests, parts, strict=True):
                    if len(part):
                        request.start_async()
                for request in requests:
                    request.wait()
                if timed and number:
                    samples[rows].append((perf_counter() - begun) * 1e3)
    return {
        "minimum_ms": {str(rows): min(times) for rows, times in samples.items()},
        "median_ms": {str(rows): median(times) for rows, times in samples.items()},
    }


def chain(way: Way, layers: int) -> ov.Model:
    """Return the products after each other; every one has weights of its own."""
    random = np.random.default_rng(0)
    start = ops.parameter([-1, HIDDEN], np.float32, name="rows")
    hidden = start.output(0)
    for _ in range(layers):
        for outputs, inputs in ((WIDE, HIDDEN), (HIDDEN, WIDE)):
            matrix = weights(way, outputs, inputs, random)
            hidden = ops.add(product(way, hidden, matrix), ops.constant(np.float32(1))).output(0)
    return ov.Model([hidden], [start])


def product(way: Way, rows: ov.Output, matrix: ov.Output) -> ov.Output:
    """Return the rows by the matrix, whole or in halves."""
    if not way.halves:
        return ops.matmul(rows, matrix, False, True).output(0)
    parts = [ops.matmul(part, matrix, False, True).output(0) for part in sliced(rows, 16 // FEW)]
    return ops.concat(parts, 0).output(0)


def sliced(rows: ov.Output, count: int) -> Iterator[ov.Output]:
    """Yield that many parts of at most 4 rows, the last of which may be empty."""
    for part in range(count):
        first, end = (ops.constant(np.array([n], np.int64)) for n in (part * FEW, part * FEW + FEW))
        one, axis = ops.constant(np.array([1], np.int64)), ops.constant(np.array([0], np.int64))
        yield ops.slice(rows, first, end, one, axis).output(0)


def weights(way: Way, outputs: int, inputs: int, random: np.random.Generator) -> ov.Output:
    """Return a matrix `(outputs, inputs)` as a graph that unpacks it."""
    groups = inputs // GROUP
    if way.weights == "bf16":
        values = random.standard_normal((outputs, inputs), np.float32) / inputs
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape([outputs, inputs]))
        tensor.data[:] = (values.view(np.uint32) >> 16).astype(np.uint16).view(tensor.data.dtype)
        return ops.convert(ov.op.Constant(tensor), np.float32).output(0)
    whole = ops.convert(packed(way.weights, [outputs, groups, GROUP], random), np.float32)
    if way.zeros == "f32":
        zeros = random.uniform(7, 8, (outputs, groups, 1)).astype(np.float32)
        whole = ops.subtract(whole, ops.constant(zeros))
    elif way.zeros != "none":
        zeros = ops.convert(packed(way.zeros, [outputs, groups, 1], random), np.float32)
        whole = ops.subtract(whole, zeros)
    scales = (random.uniform(1, 2, (outputs, groups, 1)) / inputs / 16).astype(np.float32)
    scaled = ops.multiply(whole, ops.constant(scales))
    return ops.reshape(scaled, ops.constant(np.array([outputs, inputs])), False).output(0)


def packed(kind: str, shape: list[int], random: np.random.Generator) -> ov.Node:
    """Return random whole numbers of 4 or 8 bits."""
    element = {"u4": ov.Type.u4, "u8": ov.Type.u8}[kind]
    size = int(np.prod(shape)) // (2 if kind == "u4" else 1)
    tensor = ov.Tensor(element, ov.Shape(shape))  # which has memory of its own
    tensor.data.reshape(-1).view(np.uint8)[:] = random.integers(0, 256, size, np.uint8)
    return ov.op.Constant(tensor)


def save(result: dict[str, Any]) -> None:
    """Keep the result beside the others."""
    from dataclasses import asdict  # noqa: PLC0415 - with what follows

    from harness import keep  # noqa: PLC0415 - without it the script needs nothing of ours
    from recollect.proof.report import this_machine  # noqa: PLC0415 - likewise

    machine = this_machine()
    keep("eight-rows", "fast", machine, {"machine": asdict(machine), **result})


if __name__ == "__main__":
    main()
