"""
OpenVINO with paged attention on the CPU: the default runtime.

The first half changes a model's graph before it is compiled: it makes attention read KV through block
tables, computes logits only where they are sampled, and makes RoPE independent of the other sequences in
a pass. The second half, `OpenVinoRuntime`, owns the compiled model and its KV tensors.

Does not know which block belongs to which sequence.
"""

import ctypes
import functools
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from recollect.errors import ConfigError, UnsupportedModelError
from recollect.runtime.base import (
    PassResult,
    Reuse,
    Row,
    RuntimeInfo,
    allocated,
    check_block_bytes,
    check_blocks,
    check_rows,
    mapped_errors,
)
from recollect.types import Profile

LOGITS_ROWS: Final = "logits_rows"
BOUND_INPUTS: Final = frozenset(
    {
        "input_ids",
        "position_ids",
        "past_lens",
        "subsequence_begins",
        "block_indices",
        "block_indices_begins",
        "max_context_len",
        LOGITS_ROWS,
    }
)
"""The inputs that the runtime sets for each pass, besides the caches."""


def make_paged(model: ov.Model, *, long_context: bool = False) -> None:
    """
    Turn a stateful language model into one that reads and writes KV through block tables.

    Afterwards its caches are inputs `key_cache.N` and `value_cache.N`, `(blocks, ...)` each, and
    the input `logits_rows` names the tokens, counted over all rows, whose logits are computed.

    Args:
        model: As it was read; changed in place.
        long_context: Whether a model with LongRoPE uses the factors for its long context, for all
            tokens, or those for the context that it was trained on first.

    Raises:
        UnsupportedModelError: A part of it cannot be paged, or it needs an input that the runtime lacks.
    """
    decide_long_rope(model, long_context=long_context)
    if not _states(model):
        raise _no_cache()
    with mapped_errors("making attention paged"):
        paged_attention_transformation(model)
    if not any(_is_cache(port) for port in model.inputs):
        raise _no_cache()
    _compute_only_sampled_rows(model)
    _require_bound(model)


def join_embeddings(model: ov.Model, embeddings: ov.Model) -> None:
    """
    Make the text half of a multimodal export take token ids.

    Args:
        model: The language model, whose input is `inputs_embeds`; changed in place.
        embeddings: Turns token ids into embeddings; part of *model* afterwards.

    Raises:
        UnsupportedModelError: The two do not fit each other.
    """
    token_ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    known = {port.any_name: port.get_node() for port in model.inputs}
    if "inputs_embeds" not in known or len(embeddings.inputs) != 1:
        raise UnsupportedModelError(
            "This model's text half does not take the embeddings beside it: export it again."
        )
    embedded = embeddings.get_results()[0].input_value(0)
    embeddings.get_parameters()[0].output(0).replace(token_ids.output(0))
    known["inputs_embeds"].output(0).replace(embedded)
    model.remove_parameter(known["inputs_embeds"])
    if "token_type_ids" in known:  # which are parts of an image; here is only text
        text = ops.broadcast(ops.constant(np.int64(0)), ops.shape_of(token_ids))
        known["token_type_ids"].output(0).replace(text.output(0))
        model.remove_parameter(known["token_type_ids"])
    token_ids.output(0).set_names({"input_ids"})  # `replace` gave it the other's name, too
    model.add_parameters([token_ids])
    model.validate_nodes_and_infer_types()


def decide_long_rope(model: ov.Model, *, long_context: bool) -> bool:
    """
    Replace LongRoPE's choice between two sets of factors by one of them.

    Exports choose by the largest position in a pass. So one long sequence would change all short
    sequences in the pass, and KV computed with the short factors would be read with the long ones.
    Source: `_compute_longrope_parameters` and `longrope_frequency_update` in transformers.

    Returns:
        Whether there was a choice.

    Raises:
        UnsupportedModelError: Another part depends on the largest position, too.
    """
    decided = False
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReduceMax" and _comes_from(node, "position_ids"):
            for choice in _uses(node, "Select"):
                long, short = choice.input_value(1), choice.input_value(2)
                if not all(_is_constant(branch) for branch in (long, short)):
                    continue
                choice.output(0).replace(long if long_context else short)
                decided = True
    if any(
        node.get_type_name() == "ReduceMax" and _comes_from(node, "position_ids")
        for node in model.get_ordered_ops()
    ):
        raise UnsupportedModelError(
            "In this model what one sequence gets depends on how long the others in a pass are "
            "(RoPE that changes with the context), so nothing could be reused: take a model without."
        )
    return decided


def _comes_from(node: ov.Node, name: str) -> bool:
    """Return whether a node's value is computed from that input, through its first operands alone."""
    while node.get_input_size():
        node = node.input_value(0).get_node()
    return name in node.get_friendly_name() or any(
        name in output.names for output in node.outputs()
    )


def _uses(node: ov.Node, kind: str) -> list[ov.Node]:
    """Return the nodes of a kind that depend on a node through scalars alone."""
    found, pending = [], [node]
    while pending:
        for output in pending.pop().outputs():
            for target in output.get_target_inputs():
                user = target.get_node()
                if user.get_type_name() == kind:
                    found.append(user)
                elif user.get_output_partial_shape(0).rank.get_length() == 0:
                    pending.append(user)
    return found


def _is_constant(output: ov.Output) -> bool:
    """Return whether a value is a constant, or a constant in another type."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _is_cache(port: ov.Output) -> bool:
    return any("_cache." in name for name in port.names)


def _states(model: ov.Model) -> list[str]:
    """Return the names of the states that a model keeps between passes."""
    # From its operations: the model's list of variables also has those that nothing reads any more.
    return [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "ReadValue"
    ]


def _no_cache() -> UnsupportedModelError:
    return UnsupportedModelError(
        "This model has no KV cache that can be paged: export it with optimum-cli as "
        "text-generation-with-past."
    )


def _require_bound(model: ov.Model) -> None:
    """
    Check that a paged graph has no state but the caches, and no input that the runtime does not set.

    Raises:
        UnsupportedModelError: It has one; the message names it.
    """
    kept = _states(model)
    asked = [
        min(port.names, default=port.get_node().get_friendly_name())
        for port in model.inputs
        if not _is_cache(port) and not port.names & BOUND_INPUTS
    ]
    if kept or asked:
        raise UnsupportedModelError(
            f"This model keeps more than a KV cache ({', '.join((kept or asked)[:2])}, "
            f"{len(kept) + len(asked)} in all), as hybrids with convolutions or state spaces do, "
            "and that cannot be rewound here: take its GGUF file to llama.cpp."
        )


def _compute_only_sampled_rows(model: ov.Model) -> None:
    """
    Compute logits only for the rows that the input `logits_rows` names.

    The exported graph multiplies the hidden state of every prompt token with the whole vocabulary: a
    quarter of the work of prefill at 135M parameters. Source: our own measurement on SmolLM2-135M.
    """
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if node.get_input_size() == 0:
            raise UnsupportedModelError("This model's logits do not come from a matrix product.")
        node = node.input_value(0).get_node()
    hidden = node.input(0).get_source_output()
    rows = ops.parameter([-1], np.int64, name=LOGITS_ROWS)
    rows.output(0).set_names({LOGITS_ROWS})
    # Paged graphs put the tokens on axis 0 or, with a batch of one in front, on axis 1.
    token_axis = 0 if hidden.get_partial_shape()[0].is_dynamic else 1
    gathered = ops.gather(hidden, rows, ops.constant(np.int64(token_axis)))
    node.input(0).replace_source_output(gathered.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


BLOCK_SIZE: Final = 32
"""Token slots per block, fixed by OpenVINO's CPU plugin."""

ALIKE: Final = 4
"""
Tokens up to which OpenVINO's products of packed weights use one kernel, which gives a row the same whatever
the others are: for 2 to 4 rows. One row has a kernel of its own, and so have 5 or more. Source: `mb > 4` in
oneDNN's `jit_brgemm_inner_product_utils.cpp`; tests/real/test_drafts.py.
"""

DEVICE: Final = "CPU"
"""Where models run: its paged attention computes on KV that others can read and write."""

LANGUAGE_FILE: Final = "openvino_language_model.xml"
EMBEDDINGS_FILE: Final = "openvino_text_embeddings_model.xml"
"""Exports of multimodal models have these two files in place of one graph, besides those for images."""

SETTINGS: Final[dict[Profile, dict[str, str]]] = {
    # f32 everywhere, and activations are not quantized: prefill and decode, batched and alone, then
    # agree within 6e-5. Every numerical claim is tested in this profile.
    "exact": {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    },
    # A prefill gives bitwise the same wherever it is split.
    "fast": {"KV_CACHE_PRECISION": "f16"},
    # A scale covers a block, so a prefill gives the same only where it is split between blocks.
    "small": {"KV_CACHE_PRECISION": "u8"},
}


class OpenVinoRuntime:
    """
    A compiled model, and the KV tensors that block tables refer to.

    Owned by the engine; one thread at a time.

    Raises:
        UnsupportedModelError: The model cannot be made paged.
        RuntimeFailure: It cannot be read or compiled.
        ConfigError: The device is none, or gives no KV out.
    """

    def __init__(
        self,
        xml: Path,
        *,
        profile: Profile,
        context_length: int,
        long_context: bool = False,
        device: str | None = None,
    ) -> None:
        core = _core()
        _require_device(core, device)
        with mapped_errors(f"reading {xml.name}"):
            model = core.read_model(xml)
            embeddings = xml.with_name(EMBEDDINGS_FILE)
            if xml.name == LANGUAGE_FILE:
                join_embeddings(model, core.read_model(embeddings))
        make_paged(model, long_context=long_context)
        with mapped_errors("compiling the model"):
            settings = {"PERFORMANCE_HINT": "LATENCY", **SETTINGS[profile]}
            compiled = core.compile_model(model, DEVICE, settings)
            self._request = compiled.create_infer_request()
            is_rounded = compiled.get_property("INFERENCE_PRECISION_HINT") != ov.Type.f32
        self._cache_ports = [port for port in compiled.inputs if "_cache." in port.any_name]
        self._caches: list[ov.Tensor] = []
        self._bytes: list[np.ndarray] = []  # each cache as bytes, (blocks, bytes of a block)
        self._num_blocks = 0
        self._input_index = {port.any_name: n for n, port in enumerate(compiled.inputs)}
        self._bound: dict[str, np.ndarray] = {}  # the memory that each input reads
        self._info = RuntimeInfo(
            name=f"openvino-{ov.get_version()}-{profile}",
            block_size=BLOCK_SIZE,
            bytes_per_block=sum(
                int(np.prod(_block_shape(port))) * port.element_type.size
                for port in self._cache_ports
            ),
            vocab_size=compiled.outputs[0].partial_shape[-1].get_length(),
            context_length=context_length,
            reuse=Reuse(unit=BLOCK_SIZE if profile == "small" else 1),
            kv_format=",".join(
                f"{port.any_name}:{port.element_type.get_type_name()}{_block_shape(port)}"
                for port in self._cache_ports
            ),
            # A guess that is written over would leave its mark on the scale of a whole block.
            most_drafted=0 if profile == "small" else context_length,
            # In f32 what one kernel and another give differs too little for any token to be another.
            alike=ALIKE if profile == "fast" and is_rounded else 0,
        )

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, num_blocks: int) -> None:
        """
        Make room for that many blocks.

        The operating system gives a block memory when it is first written.
        """
        with mapped_errors(f"allocating {num_blocks} KV blocks"):
            for port in self._cache_ports:
                shape = ov.Shape([num_blocks + 1, *_block_shape(port)])  # the last fills passes up
                tensor = ov.Tensor(port.element_type, shape)
                self._request.set_tensor(port.any_name, tensor)
                self._caches.append(tensor)
                self._bytes.append(tensor.data.reshape(num_blocks + 1, -1).view(np.uint8))
        self._num_blocks = num_blocks

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Run one forward pass over the rows; see `PagedRuntime.forward`."""
        allocated(self._caches or None)
        check_rows(rows, self._info, self._num_blocks)
        with mapped_errors("running the model"):
            fed = alike(rows, self._num_blocks) if self._info.alike else rows
            for name, value in _inputs(fed).items():
                self._set_input(name, value)
            (logits,) = self._request.infer(share_outputs=True).values()
        wanted = sum([row.places for row in rows])
        rows_wanted = logits.reshape(-1, self._info.vocab_size)[:wanted]
        return PassResult(rows_wanted.astype(np.float32))  # a copy: the next pass writes there

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers, `(source, target)` each."""
        allocated(self._caches or None)
        check_blocks([block for pair in pairs for block in pair], self._num_blocks)
        for cache in self._caches:
            slots = cache.data
            for source, target in pairs:
                slots[target] = slots[source]

    def warm_up(self) -> None:
        """
        Run a small prefill and a decode step.

        The first pass of either kind in a process compiles kernels and lays out the weights: 0.45 s
        and 0.35 s for SmolLM2-135M on two cores. Without it a conversation whose KV was just read from
        disk would wait for that. Source: our own measurement, benchmarks/restart.py.
        """
        prompt = [0] * (BLOCK_SIZE + 1)
        if self._num_blocks > 1 and self._info.context_length > len(prompt):
            self.forward([Row(prompt, 0, [0, 1])])
            self.forward([Row([0], len(prompt), [0, 1])])
            # Beside what is asked first: for smollm2 it takes half a second of one core.
            threading.Thread(target=use_huge_pages, name="recollect-pages", daemon=True).start()

    def read_block(self, block: int, into: memoryview) -> None:
        """Copy a block's bytes, layer after layer, to *into*."""
        target = self._block_bytes(block, into)
        start = 0
        for cache in self._bytes:
            end = start + cache.shape[1]
            target[start:end] = cache[block]
            start = end

    def write_block(self, block: int, content: memoryview) -> None:
        """Make a block hold bytes that `read_block` gave."""
        source = self._block_bytes(block, content)
        start = 0
        for cache in self._bytes:
            end = start + cache.shape[1]
            cache[block] = source[start:end]
            start = end

    def close(self) -> None:
        """Free the model and its KV memory."""
        self._caches.clear()
        self._bytes.clear()
        self._bound.clear()
        self._cache_ports = []
        self._request = None

    def _set_input(self, name: str, value: np.ndarray) -> None:
        """
        Set an input, in place where its shape is the same as in the pass before.

        Setting eight tensors by name takes 0.14 to 0.25 ms a pass, writing in place 10 µs, and a
        decode pass is 15 ms. Source: our own measurement, benchmarks/runtime.py.
        """
        bound = self._bound.get(name)
        if bound is not None and bound.shape == value.shape:
            bound[...] = value
            return
        tensor = ov.Tensor(value)
        self._request.set_input_tensor(self._input_index[name], tensor)
        self._bound[name] = tensor.data

    def _block_bytes(self, block: int, content: memoryview) -> np.ndarray:
        """Return *content* as an array, after checking that it can be that block's."""
        allocated(self._caches or None)
        check_blocks([block], self._num_blocks)
        check_block_bytes(content, self._info)
        return np.frombuffer(content, np.uint8)


_HUGE_PAGE: Final = 2 << 20
_COLLAPSE: Final = 25
"""`MADV_COLLAPSE` in linux/mman.h, since Linux 6.1: join the pages of a range into one, now."""
_ANONYMOUS: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *(?:\[heap\]|\[anon.*)?\n"
)
_LOWEST_PRIORITY: Final = 19


def use_huge_pages() -> int:
    """
    Have Linux join the memory of this process into pages of 2 MiB; return how many.

    A pass reads all weights. In pages of 4 KiB they are more than the processor has addresses at hand for,
    and looking these up is a tenth of a pass of SmolLM2-135M on a virtual machine. Source: LOG.md.
    What is joined is in use as a whole, so that the process takes no more memory; what cannot be joined, on
    other systems everything, stays as it is.
    """
    joined = 0
    with suppress(OSError, AttributeError):  # no Linux, or one without these files or calls
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return 0
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        system = ctypes.CDLL(None)
        present = (ctypes.c_ubyte * (_HUGE_PAGE // mmap.PAGESIZE))()
        for start in _huge_places(Path("/proc/self/maps").read_text()):
            place, size = ctypes.c_void_p(start), ctypes.c_size_t(_HUGE_PAGE)
            is_in_use = system.mincore(place, size, present) == 0 and 0 not in bytes(present)
            if is_in_use and system.madvise(place, size, _COLLAPSE) == 0:
                joined += 1
    return joined


def _huge_places(maps: str) -> Iterator[int]:
    """Yield the addresses of all huge pages that would lie in anonymous memory, from /proc/self/maps."""
    for start, end in _ANONYMOUS.findall(maps):
        first = -(-int(start, 16) // _HUGE_PAGE) * _HUGE_PAGE
        yield from range(first, int(end, 16) - _HUGE_PAGE + 1, _HUGE_PAGE)


@functools.cache
def _core() -> ov.Core:
    """
    Return OpenVINO's core, of which a process has one until it ends.

    The CPU plugin of a core gives the thread that first uses it an alternate signal stack, and unmaps
    it when the core is freed. If another thread frees the core, or two cores are freed in the order in
    which they were made, the thread is left with an unmapped stack, and the next Ctrl-C there ends the
    process with a segmentation fault. Keeping the core costs nothing: models are freed without it.
    """
    return ov.Core()


def _require_device(core: ov.Core, device: str | None) -> None:
    """Refuse a device that is not there, or on which KV cannot be reached: the plugins keep it there."""
    if device is None or device.upper() == DEVICE:
        return
    here = core.available_devices
    if device.upper() not in (name.upper() for name in here):
        raise ConfigError(
            f"OpenVINO has no device {device!r} here: it has {', '.join(here)}; give one of these, or leave "
            "--device out."
        )
    raise ConfigError(
        f"On {device} OpenVINO does not give KV out, so nothing could be kept: leave --device out, or run a "
        "GGUF file on a graphics card with --runtime llama."
    )


def devices() -> list[tuple[str, str, tuple[str, ...]]]:
    """
    Return of each device its name, what it is called in full, and what numbers it computes with.

    Raises:
        RuntimeFailure: OpenVINO cannot be asked.
    """
    core = _core()
    with mapped_errors("looking for devices"):
        return [
            (
                name,
                str(core.get_property(name, "FULL_DEVICE_NAME")),
                tuple(core.get_property(name, "OPTIMIZATION_CAPABILITIES")),
            )
            for name in core.available_devices
        ]


def _block_shape(port: ov.ConstOutput) -> list[int]:
    """Return the shape of one block in a cache, such as `(kv_heads, 32, head_size)`."""
    return [dimension.get_length() for dimension in list(port.partial_shape)[1:]]


def alike(rows: Sequence[Row], spare: int) -> Sequence[Row]:
    """
    Return a pass over at most `ALIKE` tokens of replies so that each is computed by the same kernels.

    Each token becomes a row: attention has a kernel for rows of one token. A pass over one token gets
    another beside it, in the block *spare*, which nobody reads. Passes over more, or with a prompt, stay.
    """
    lengths = [len(row.token_ids) for row in rows]
    if max(lengths) == 1 < len(rows):
        return rows  # as they are in most passes
    if sum(lengths) > ALIKE or any(len(row.token_ids) - row.drafted > 1 for row in rows):
        return rows
    single = [
        replace(row, token_ids=[token], past=row.past + number, drafted=0)
        for row in rows
        for number, token in enumerate(row.token_ids)
    ]
    return single if len(single) > 1 else [*single, Row([0], 0, [spare])]


def _inputs(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return the paged graph's inputs for these rows."""
    # Lists, of which numpy makes one array each: in a decode step an array has a number for each row.
    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    blocks: list[int] = []
    begins, block_begins, longest = [0], [0], 0
    for row in rows:
        end = row.past + len(row.token_ids)
        token_ids += row.token_ids
        positions += range(row.past, end)
        begins.append(len(token_ids))
        places += range(begins[-1] - row.places, begins[-1])
        blocks += row.block_table[: -(-end // BLOCK_SIZE)]
        block_begins.append(len(blocks))
        longest = max(longest, end)
    return {
        "input_ids": np.array(token_ids, np.int64),
        "position_ids": np.array(positions, np.int64),
        "past_lens": np.array([row.past for row in rows], np.int32),
        "subsequence_begins": np.array(begins, np.int32),
        "block_indices": np.array(blocks, np.int32),
        "block_indices_begins": np.array(block_begins, np.int32),
        "max_context_len": np.array(longest, np.int32),
        # The graph takes no empty list; what it then computes is not asked for.
        LOGITS_ROWS: np.array(places or [begins[1] - 1], np.int64),
    }
