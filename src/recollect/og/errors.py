"""The one place where recollect's exceptions become those that scripts for the original catch."""

from collections.abc import Iterator
from contextlib import contextmanager

from recollect.errors import RecollectError


@contextmanager
def as_runtime_error() -> Iterator[None]:
    """Turn every exception of recollect's into a RuntimeError of the same words, the cause chained."""
    try:
        yield
    except RecollectError as cause:
        raise RuntimeError(str(cause)) from cause
