"""
How commands print numbers, times, tables and progress.

Knows no command and no chat. Progress is drawn on stderr and only on a terminal; it leaves nothing
behind.
"""

import sys
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime

import typer
from rich import box
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
from rich.table import Table
from rich.text import Text

from recollect.errors import ConfigError
from recollect.types import Progress


def printable(text: str) -> str:
    """
    Return *text* without control characters other than newline and tab.

    What a model writes must not move the cursor, or set the title, of the terminal it is shown on.
    """
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )


def format_bytes(size: int) -> str:
    """Return a size for people, in powers of ten as disks are sold and `--kv-memory` reads them."""
    if size < 10**6:
        return f"{size / 10**3:.0f} kB"
    return f"{size / 10**6:.0f} MB" if size < 10**9 else f"{size / 10**9:.1f} GB"


def format_duration(seconds: float) -> str:
    """Return a duration for people: milliseconds below a second."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def format_time(moment: datetime) -> str:
    """Return a moment in the time zone of this machine, to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 turn`, `2 turns`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def make_table(*headings: str, right: Collection[str] = (), whole: Collection[str] = ()) -> Table:
    """
    Return an empty table with these columns.

    Args:
        headings: Of all columns, from left to right.
        right: Headings of the columns with numbers: aligned to the right, never wrapped.
        whole: Headings of the other columns that are never wrapped.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            no_wrap=heading in right or heading in whole,
            overflow="fold",
        )
    return table


def confirm(question: str, *, yes: bool, to: str) -> bool:
    """
    Return whether the user agrees to something that cannot be undone.

    Args:
        question: As it is asked on a terminal.
        yes: Whether --yes was given; nothing is asked then.
        to: What --yes would allow, as in "Add --yes to delete."

    Raises:
        ConfigError: There is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(f"Not a terminal, so I cannot ask. Add --yes to {to}.")
    return typer.confirm(question)


class _SizeColumn(ProgressColumn):
    """How many bytes or tokens are done; empty for a step whose size is not known."""

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
    Show a spinner beside *waiting*, and a bar for each step that reports its progress.

    Args:
        waiting: What is being done.
        tokens: Whether the steps count tokens rather than bytes.

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
