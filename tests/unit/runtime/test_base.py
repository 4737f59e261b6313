"""A back-end's exceptions become one kind of ours, with the cause chained."""

import pytest

from recollect.errors import RuntimeFailure
from recollect.runtime.base import mapped_errors


@pytest.mark.parametrize("cause", [RuntimeError("first\nthe reason"), MemoryError("the reason")])
def test_a_back_ends_error_is_mapped_and_chained(cause: Exception) -> None:
    with (
        pytest.raises(RuntimeFailure, match="while thinking: the reason") as raised,
        mapped_errors("thinking"),
    ):
        raise cause
    assert raised.value.__cause__ is cause


def test_an_error_without_words_is_named_by_its_class() -> None:
    with pytest.raises(RuntimeFailure, match="MemoryError"), mapped_errors("thinking"):
        raise MemoryError


def test_bugs_and_interrupts_are_not_disguised() -> None:
    for error in (KeyError, AssertionError, KeyboardInterrupt):
        with pytest.raises(error), mapped_errors("thinking"):
            raise error
