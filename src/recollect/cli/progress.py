"""
Progress of something long, drawn on stderr while it lasts.

Draws on terminals only, and leaves nothing behind; does not know what is being done.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from recollect.types import Progress


class _SizeColumn(ProgressColumn):
    """Bytes or tokens done, for what is counted; nothing for what is only waited for."""

    def __init__(self, sizes: DownloadColumn | MofNCompleteColumn) -> None:
        super().__init__()
        self._sizes = sizes

    def render(self, task: Task) -> Text:
        """Return the sizes as text."""
        counted = task.total is not None and task.total > 1
        return self._sizes.render(task) if counted else Text("")


@contextmanager
def progress_bar(waiting: str, *, tokens: bool = False) -> Iterator[Progress]:
    """
    Show a spinner beside *waiting*, and a bar for each thing that progress is reported of.

    Args:
        waiting: What is being done.
        tokens: Whether tokens are counted, and not bytes.

    Yields:
        What to pass as `progress`.
    """
    console = Console(stderr=True)
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _SizeColumn(MofNCompleteColumn() if tokens else DownloadColumn()),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        bars.add_task(waiting, total=None)
        yield report
