"""
Changes to an OpenVINO model's graph before it is compiled: paged attention, and fewer logits.

Knows graphs only: no compilation, no memory.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from recollect.errors import UnsupportedModelError
from recollect.runtime.base import mapped_errors

LOGITS_ROWS = "logits_rows"


def make_paged(model: ov.Model) -> None:
    """
    Turn a stateful language model into one that reads and writes KV through block tables.

    Afterwards its caches are inputs `key_cache.N` and `value_cache.N`, `(blocks, ...)` each, and
    the input `logits_rows` names the tokens, counted over all rows, whose logits are computed.

    Raises:
        UnsupportedModelError: The model's attention cannot be paged.
    """
    with mapped_errors("making attention paged"):
        paged_attention_transformation(model)
    if not any("_cache." in name for port in model.inputs for name in port.names):
        raise UnsupportedModelError(
            "This model has no KV cache that can be paged: export it with optimum-cli as "
            "text-generation-with-past."
        )
    _compute_only_sampled_rows(model)


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
