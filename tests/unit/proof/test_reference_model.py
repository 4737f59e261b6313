"""Claims about `proof/reference_model.py`: what two sets of logits are worth, whatever they come from."""

from collections.abc import Collection

import numpy as np
import pytest

from recollect.proof.reference_model import (
    LIMITS,
    Array,
    Description,
    Judgement,
    NotCompared,
    Rope,
    Tensors,
    judge,
)
from recollect.types import Profile

PLACES, VOCABULARY = 40, 500
FOLLOWING = {row: (7 * row) % VOCABULARY for row in range(PLACES - 1)}


def logits(deviation: float = 8.0) -> Array:
    values = np.random.default_rng(0).normal(0, deviation, (PLACES, VOCABULARY))
    return values.astype(np.float32)


def off_by(difference: float, *, deviation: float = 8.0, noise: float = 1e-5) -> Judgement:
    """Judge logits of which one in the middle differs."""
    theirs = logits(deviation)
    ours = theirs.copy()
    ours[20, 30] += np.float32(difference)
    return judge("exact", ours, theirs, noise=noise, following=FOLLOWING)


@pytest.mark.parametrize(
    ("difference", "deviation", "noise", "outcome"),
    [
        (0.0, 8.0, 1e-5, "PASS"),
        (0.8e-3, 8.0, 1e-5, "PASS"),
        (1.3e-3, 8.0, 1e-5, "FAIL"),
        (1.3e-3, 0.1, 1e-5, "FAIL"),
        (0.5, 8000.0, 1e-2, "PASS"),
        (1.5, 8000.0, 1e-2, "FAIL"),
        (2e-3, 8.0, 3e-4, "PASS"),
        (3e-3, 8.0, 3e-4, "FAIL"),
        (9e-3, 8.0, 1.0, "PASS"),
        (float("nan"), 8.0, 1e-5, "FAIL"),
        (float("inf"), 8.0, 1e-5, "FAIL"),
        (float("nan"), 8.0, 1.0, "FAIL"),
    ],
)
def test_the_limit_follows_the_size_of_logits_and_what_rounding_does(
    difference: float, deviation: float, noise: float, outcome: str
) -> None:
    assert off_by(difference, deviation=deviation, noise=noise).outcome == outcome


def test_rounding_excuses_ten_times_the_limit_and_no_more() -> None:
    """Beyond, nothing is said: it is neither passed, nor failed for what it may not have done."""
    assert off_by(9e-3, noise=1.0).limit == pytest.approx(10 * LIMITS["exact"], rel=0.02)
    with pytest.raises(NotCompared, match="rounding alone moves its logits by 1"):
        off_by(2e-2, noise=1.0)
    assert off_by(2e-2, noise=2e-3).outcome == "FAIL"


def test_other_profiles_are_not_excused_by_rounding() -> None:
    theirs = logits()
    weaker: tuple[Profile, ...] = ("fast", "small")
    for profile in weaker:
        found = judge(profile, theirs + np.float32(2.6), theirs, noise=1.0, following=FOLLOWING)
        assert found.outcome == "FAIL"
        assert found.limit == pytest.approx(LIMITS[profile], rel=0.02)


def test_a_shift_that_no_single_logit_shows_is_seen_by_perplexity() -> None:
    theirs = logits()
    ours = theirs.copy()
    ours[list(FOLLOWING), list(FOLLOWING.values())] += np.float32(0.1)
    found = judge("fast", ours, theirs, noise=0.0, following=FOLLOWING)
    assert found.outcome == "FAIL"
    assert found.reason.startswith("perplexity")


@pytest.mark.parametrize("columns", [VOCABULARY - 1, VOCABULARY + 1])
def test_another_number_of_logits_fails(columns: int) -> None:
    ours = np.zeros((PLACES, columns), np.float32)
    found = judge("exact", ours, logits(), noise=0.0, following=FOLLOWING)
    assert found.outcome == "FAIL"
    assert f"{columns} logits" in found.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_file_without_finite_logits_judges_nothing(value: float) -> None:
    theirs = logits()
    theirs[3, 4] = value
    with pytest.raises(NotCompared, match="no finite numbers"):
        judge("exact", theirs, theirs, noise=0.0, following=FOLLOWING)


class Fused(Tensors):
    """A layer as Phi-3's files have it: what they call up is gate and up in one."""

    def __init__(self) -> None:
        super().__init__()
        width, inner = 4, 6
        shapes = {
            "token_embd": (10, width),
            "output_norm": (1, width),
            "blk.0.attn_norm": (1, width),
            "blk.0.attn_qkv": (3 * width, width),
            "blk.0.attn_output": (width, width),
            "blk.0.ffn_norm": (1, width),
            "blk.0.ffn_up": (2 * inner, width),
            "blk.0.ffn_down": (width, inner),
        }
        self.values = {
            name: np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
            for name, (rows, columns) in shapes.items()
        }

    def names(self) -> Collection[str]:
        return self.values

    def types(self) -> dict[str, int]:
        return {"F32": sum(values.size for values in self.values.values())}

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.values[name].shape
        return rows, columns

    def _read(self, name: str, rows: slice | list[int]) -> Array:
        return self.values[name][rows]


def test_a_whole_may_have_the_name_of_one_of_its_parts() -> None:
    model = Description(
        architecture="phi3",
        layers=1,
        heads=2,
        kv_heads=2,
        head_size=2,
        epsilon=1e-5,
        ropes=(Rope(np.ones(1), "halves"),),
        windows=(None,),
    )
    tensors = Fused()
    tensors.require_known(model)
    whole = tensors.values["blk.0.ffn_up"]
    np.testing.assert_array_equal(tensors.matrix("blk.0.ffn_gate"), whole[:6])
    np.testing.assert_array_equal(tensors.matrix("blk.0.ffn_up"), whole[6:])
    np.testing.assert_array_equal(tensors.matrix("blk.0.ffn_up", slice(2, 4)), whole[8:10])
    assert tensors.shape("blk.0.ffn_up") == (6, 4)
