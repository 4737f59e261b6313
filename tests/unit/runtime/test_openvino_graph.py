"""Claims about changes to graphs, on graphs of a few nodes; whole exports are in `tests/exports`."""

from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from recollect.errors import UnsupportedModelError
from recollect.runtime.base import Row
from recollect.runtime.openvino import alike, decide_long_rope, join_embeddings, make_paged

LONG, SHORT = np.array([4.0, 8.0], np.float32), np.array([1.0, 2.0], np.float32)


def parameter(name: str, *, kind: type = np.int64, shape: tuple[int, ...] = (-1, -1)) -> ov.Node:
    node = ops.parameter(list(shape), kind, name=name)
    node.output(0).set_names({name})
    return node


def chooses_by_length(then: Callable[[ov.Node], ov.Node] = lambda longest: longest) -> ov.Model:
    """Return what an export of LongRoPE has: factors by the largest position of a pass."""
    positions = parameter("position_ids")
    longest = ops.reduce_max(positions, ops.constant(np.array([0, 1])), False)
    is_long = ops.greater(ops.add(longest, ops.constant(np.int64(1))), ops.constant(np.int64(64)))
    factors = ops.select(is_long, ops.constant(LONG), ops.constant(SHORT))
    used = then(longest)
    result = ops.multiply(factors, ops.convert(used, np.float32))
    return ov.Model([ops.result(result)], [positions], "longrope")


def own_positions(_: ov.Node) -> ov.Node:
    return ops.constant(np.int64(1))


@pytest.mark.parametrize(("long_context", "expected"), [(False, SHORT), (True, LONG)])
def test_the_choice_is_made_once(long_context: bool, expected: np.ndarray) -> None:
    model = chooses_by_length(own_positions)
    assert decide_long_rope(model, long_context=long_context)
    compiled = ov.Core().compile_model(model, "CPU")
    for length in (5, 500):
        assert np.array_equal(compiled([np.arange(length)[None]])[0], expected)


def test_whatever_else_depends_on_the_longest_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="how long the others in a pass are"):
        decide_long_rope(chooses_by_length(), long_context=False)


def test_a_model_without_a_choice_stays_as_it_is() -> None:
    positions = parameter("position_ids")
    model = ov.Model([ops.result(ops.convert(positions, np.float32))], [positions], "plain")
    before = len(model.get_ops())
    assert not decide_long_rope(model, long_context=True)
    assert len(model.get_ops()) == before


def embeddings() -> ov.Model:
    ids = parameter("input")
    table = ops.constant(np.arange(12, dtype=np.float32).reshape(6, 2))
    found = ops.gather(table, ids, ops.constant(np.int64(0)))
    return ov.Model([ops.result(found)], [ids], "embeddings")


def test_the_text_half_takes_token_ids() -> None:
    embedded = parameter("inputs_embeds", kind=np.float32, shape=(-1, -1, 2))
    kinds = parameter("token_type_ids")
    shown = ops.add(embedded, ops.convert(ops.unsqueeze(kinds, ops.constant(2)), np.float32))
    model = ov.Model([ops.result(shown)], [embedded, kinds], "half")
    join_embeddings(model, embeddings())
    assert [port.any_name for port in model.inputs] == ["input_ids"]
    compiled = ov.Core().compile_model(model, "CPU")
    assert compiled([np.array([[1, 5]])])[0].tolist() == [[[2.0, 3.0], [10.0, 11.0]]]


def test_a_text_half_without_embeddings_is_refused() -> None:
    ids = parameter("input_ids")
    model = ov.Model([ops.result(ops.convert(ids, np.float32))], [ids], "no half")
    with pytest.raises(UnsupportedModelError, match="does not take the embeddings beside it"):
        join_embeddings(model, embeddings())


def test_a_graph_without_attention_is_refused() -> None:
    ids = parameter("input_ids")
    model = ov.Model([ops.result(ops.convert(ids, np.float32))], [ids], "no attention")
    with pytest.raises(UnsupportedModelError, match="no KV cache that can be paged"):
        make_paged(model)


def test_a_narrow_pass_becomes_rows_of_one_token() -> None:
    """Two to four, which one kernel computes, whoever they are of."""
    one, reply, other = (
        Row([5], 40, [1, 2]),
        Row([5, 6, 7], 40, [1, 2], drafted=2),
        Row([8], 3, [4]),
    )
    assert alike([one], 9) == [one, Row([0], 0, [9])]
    assert alike([reply, other], 9) == [
        Row([5], 40, [1, 2]),
        Row([6], 41, [1, 2]),
        Row([7], 42, [1, 2]),
        other,
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [Row([5, 6], 0, [1])],
        [Row([5] * 5, 9, [1], drafted=4)],
        [Row([5], n, [n]) for n in range(5)],
    ],
    ids=["a prompt", "wide", "many"],
)
def test_other_passes_stay(rows: list[Row]) -> None:
    assert alike(rows, 9) is rows
