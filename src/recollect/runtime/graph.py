"""
Changes to an OpenVINO model's graph before it is compiled: paged attention, fewer logits, and RoPE
that does not depend on who else is in a pass.

Knows graphs only: no compilation, no memory.
"""

from typing import Final

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from recollect.errors import UnsupportedModelError
from recollect.runtime.base import mapped_errors

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
"""What the runtime gives each pass, beside the caches."""


def make_paged(model: ov.Model, *, long_context: bool = False) -> None:
    """
    Turn a stateful language model into one that reads and writes KV through block tables.

    Afterwards its caches are inputs `key_cache.N` and `value_cache.N`, `(blocks, ...)` each, and
    the input `logits_rows` names the tokens, counted over all rows, whose logits are computed.

    Args:
        model: As it was read; changed in place.
        long_context: Which factors a model with LongRoPE uses, for all tokens: those for its long
            context, or those for the one that it was trained on first.

    Raises:
        UnsupportedModelError: Something in it cannot be paged, or needs what we do not give it.
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
    Make the text half of a multimodal export a model of token ids.

    Args:
        model: The language model, whose input is `inputs_embeds`; changed in place.
        embeddings: What turns token ids into those; part of *model* afterwards.

    Raises:
        UnsupportedModelError: They do not fit each other.
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
    Put one of LongRoPE's two sets of factors in place of the choice between them.

    Exports choose by the largest position in a pass. So one long sequence would change all short
    ones beside it, and KV from before the border would be read with factors that it was not made
    with. Source: `_compute_longrope_parameters` and `longrope_frequency_update` in transformers.

    Returns:
        Whether there was a choice.

    Raises:
        UnsupportedModelError: Something else depends on the largest position, too.
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
    """Return what a model keeps between passes, by name."""
    # By operations: the list of a model's variables keeps those that nothing reads any more.
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
    Check that a paged graph keeps nothing to itself, and asks for nothing that the runtime lacks.

    Raises:
        UnsupportedModelError: It does; the message names it.
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
    Gather the hidden rows that are sampled before the matrix product that turns them into logits.

    The plain graph multiplies every prompt token with the whole vocabulary: a quarter of the work
    of prefill at 135M parameters. Source: our own measurement on SmolLM2-135M.
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
