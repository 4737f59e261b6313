"""
`recollect models`, `recollect pull` and `recollect convert`: what can be loaded, and how to get it.

Prints what `models/` knows and does; decides nothing about models.
"""

import json
import sys
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect import config
from recollect.cli.display import format_bytes, make_table, printable, progress_bar
from recollect.cli.options import JsonOption, OfflineOption, model_names
from recollect.conversation.loading import which_llama
from recollect.errors import UnknownModelError
from recollect.models import stores
from recollect.models.catalog import LocalModel, is_repository
from recollect.models.fetch import what_is_there
from recollect.models.listing import KeptElsewhere, ModelStatus, installed, look_into
from recollect.models.listing import prune as prune_source
from recollect.models.onnx_folder import convert_to_onnx, require_convertible
from recollect.models.prepare import original_of, prepare

app = typer.Typer()

_MOST_ROWS: Final = 200
"""Most models of other programs that are shown to people."""
_OUTCOMES: Final = {
    "PASS": "computes what its file says",
    "FAIL": "does not compute what its file says",
}


@app.command("models")
def list_models(
    as_json: JsonOption = False,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Delete the GGUF file that this model was converted from; the model stays.",
        ),
    ] = None,
) -> None:
    """List the models that have a name, and those on this disk."""

    if prune is not None:
        size = prune_source(prune, config.home())
        typer.echo(
            f"Deleted {format_bytes(size)} of GGUF; {prune} stays as it is."
            if size
            else f"No GGUF file of {prune} was kept: nothing to delete."
        )
        return
    found = installed(config.home())
    kept = stores.stored()
    llama = which_llama() if kept else "missing"
    elsewhere = [look_into(one, llama) for one in (kept if as_json else kept[:_MOST_ROWS])]
    converted = {status.name for status in found if status.is_installed}
    if as_json:
        rows = [_as_dict(status) for status in found]
        rows += [_kept_as_dict(one, one.stored.name in converted) for one in elsewhere]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(models_table(found))
    if elsewhere:
        console.print("\nKept by other programs, and taken from where they lie", style="bold")
        console.print(kept_table(elsewhere, converted))
    if len(kept) > _MOST_ROWS:
        console.print(f"and {len(kept) - _MOST_ROWS:,} more; --json lists all", style="dim")
    console.print(
        "[dim]`recollect pull NAME` fetches a model ahead of time; `recollect chat --model NAME` "
        "does so the first time.\nThe path of a .gguf file or an OpenVINO folder is a name, too.[/]",
        highlight=False,
    )


@app.command()
def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A model as `recollect chat --model` takes it.",
            autocompletion=model_names,
        ),
    ],
    offline: OfflineOption = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare the model with its file afterwards, or do not; asks on a terminal by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """
    Fetch a model and convert it, so that it loads without a network.

    With --check, what it computes is compared with what its file says, as `recollect verify` does
    first; a GGUF file that was deleted is fetched again for that. The exit status is 1 where that fails.
    """

    def fetch(*, with_source: bool) -> LocalModel:
        with progress_bar(f"Fetching {name}") as progress:
            try:
                return prepare(
                    name,
                    home=config.home(),
                    progress=progress,
                    offline=offline or None,
                    with_source=with_source,
                )
            except UnknownModelError as error:
                if offline or config.is_offline() or not is_repository(name):
                    raise
                repository = name.rstrip(":")
                raise UnknownModelError(
                    f"{repository} is to be named with a file, as {repository}:FILE: "
                    f"{what_is_there(repository)}."
                ) from error

    local = fetch(with_source=check is True)
    where = f" in {local.folder}" if local.folder else ""
    typer.echo(f"{local.name} is ready{where}")
    can_ask = local.format == "openvino" and sys.stdin.isatty() and sys.stdout.isatty()
    if check is None and can_ask:
        check = typer.confirm("Compare what it computes with its file now?", default=False)
        local = fetch(with_source=True) if check else local
    if not check:
        return
    # Here and not above: listing models need not wait 0.1 s for all that proves.
    from recollect.cli.prove import EXACT, compare, file_lines  # noqa: PLC0415
    from recollect.proof.verify import FileReport, why_not_compared  # noqa: PLC0415 - as above

    if local.source is None:
        report = FileReport(outcome="NOT COMPARED", reason=why_not_compared(local))
    else:
        with replace(EXACT, offline=offline).load(name) as loaded:
            report = compare(loaded)
    for line in file_lines(name, "exact", report)[:-1]:
        typer.echo(line)
    if report.outcome == "FAIL":
        raise typer.Exit(1)


def models_table(found: list[ModelStatus]) -> Table:
    """Return the models as a table for people."""
    table = make_table("name", "here", "size", "what", right=("size",), whole=("name",))
    for status in found:
        here = Text("yes", "green") if status.is_installed else Text("no", "dim")
        if status.is_installed and not status.is_exact:
            here = Text("rounded", "yellow")
        size = status.disk_bytes if status.is_installed else status.download_bytes
        about = Text(status.description)
        if status.source_bytes:
            about.append(f"\n{format_bytes(status.source_bytes)} of it is the GGUF file", "dim")
        if status.is_installed and not status.is_exact:
            about.append(
                f"\nits weights are rounded; `recollect pull {status.name}` converts it again",
                "dim",
            )
        if status.compared is not None:
            what = status.compared
            about.append(
                f"\n{_OUTCOMES.get(what.outcome, what.outcome)} ({what.profile}, {what.at[:10]})",
                "dim",
            )
        if status.path is not None:
            about.append(f"\n{status.path}", "dim")
        table.add_row(
            Text(status.name),
            here,
            "" if size is None else format_bytes(size),
            about,
        )
    return table


def kept_table(found: list[KeptElsewhere], converted: Collection[str]) -> Table:
    """
    Return the models of other programs as a table for people.

    Args:
        found: The models.
        converted: The names of those that were converted already.
    """
    table = make_table(
        "name", "architecture", "type", "size", "runs with", right=("size",), whole=("name",)
    )
    for one in found:
        runs = Text(one.runs.reason or "", "yellow")
        if one.runs.runtime is not None:
            runs = Text(one.runs.runtime, "green")
            runs.append(", converted" if one.stored.name in converted else "", "dim")
        table.add_row(
            Text(printable(one.stored.name)),
            Text(printable(one.architecture or "")),
            Text(printable(one.quantization or "")),
            format_bytes(one.stored.size_bytes),
            runs,
        )
    return table


def _kept_as_dict(one: KeptElsewhere, is_converted: bool) -> dict[str, object]:
    return {
        "name": one.stored.name,
        "program": one.stored.program,
        "format": one.stored.format,
        "architecture": one.architecture,
        "type": one.quantization,
        "installed": is_converted,
        "disk_bytes": one.stored.size_bytes,
        "path": str(one.stored.path),
        "runs_with": one.runs.runtime,
        "reason": one.runs.reason,
    }


def _as_dict(status: ModelStatus) -> dict[str, object]:
    return {
        "name": status.name,
        "program": None,
        "description": status.description,
        "licence": status.licence,
        "installed": status.is_installed,
        "exact": status.is_exact,
        "download_bytes": status.download_bytes,
        "disk_bytes": status.disk_bytes,
        "source_bytes": status.source_bytes,
        "compared": None if status.compared is None else asdict(status.compared),
        "path": None if status.path is None else str(status.path),
    }


@app.command()
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name that `recollect models` lists, a .gguf file, or a Hugging Face folder.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    to: Annotated[
        Literal["onnx-genai"], typer.Option(help="The format: a folder for ONNX Runtime GenAI.")
    ] = "onnx-genai",
    precision: Annotated[
        Literal["int8", "fp32"],
        typer.Option(help="Precision of the weights; fp32 is exact and four times as large."),
    ] = "int8",
    offline: OfflineOption = False,
) -> None:
    """
    Convert a model for another runtime.

    A model that is on this disk needs no network.
    """
    with progress_bar(f"Converting {model}") as progress:
        require_convertible(out)
        with original_of(
            model, home=config.home(), progress=progress, offline=offline or None
        ) as source:
            convert_to_onnx(source, out, precision=precision, progress=progress)
    typer.echo(f"{out} is ready, as {to} in {precision}: recollect chat --model {out}")
