"""
`recollect models` and `recollect pull`: what can be loaded, and getting it.

Shows what the model folder says; decides nothing about it.

`recollect convert`: a model in the form that another runtime takes.

Says what was made and how to use it; the work is done in `models/`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect import config
from recollect.cli.options import OfflineOption, open_model, progress_bar

if TYPE_CHECKING:
    from recollect.models.listing import ModelStatus


_OUTCOMES: Final = {
    "PASS": "computes what its file says",
    "FAIL": "does not compute what its file says",
}


def models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, sizes in bytes.")
    ] = False,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Delete the GGUF file that this model was converted from; the model stays.",
        ),
    ] = None,
) -> None:
    """List the models that go by a name, and what is on this disk."""
    # Here and not above: it takes the runtime's libraries along, half a second of start-up.
    from recollect.models.listing import installed  # noqa: PLC0415
    from recollect.models.listing import prune as prune_source  # noqa: PLC0415

    if prune is not None:
        size = prune_source(prune, config.home())
        typer.echo(
            f"Deleted {format_bytes(size)} of GGUF; {prune} stays as it is."
            if size
            else f"No GGUF file of {prune} was kept: nothing to delete."
        )
        return
    found = installed(config.home())
    if as_json:
        typer.echo(json.dumps([_as_dict(status) for status in found], ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(models_table(found))
    console.print(
        "[dim]`recollect pull NAME` fetches one ahead of time; `recollect chat --model NAME` does "
        "it the first time.\nPaths of .gguf files and OpenVINO folders work as names, too.[/]",
        highlight=False,
    )


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `chat --model` takes it.")],
    offline: OfflineOption = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Whether it is compared with its file then; without, a terminal is asked.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fetch a model and convert it, so that it can be loaded without a network."""
    with progress_bar(f"Fetching {name}") as progress:
        from recollect.models.prepare import prepare  # noqa: PLC0415 - as above

        local = prepare(name, home=config.home(), progress=progress, offline=offline or None)
    where = f" in {local.folder}" if local.folder else ""
    typer.echo(f"{local.name} is ready{where}")
    if local.source is None:
        return
    if check is None and sys.stdin.isatty() and sys.stdout.isatty():
        check = typer.confirm("Compare what it computes with its file now?", default=False)
    if check:
        from recollect.cli.prove import compare, file_lines  # noqa: PLC0415 - as above

        with open_model(name, profile="exact", kv_disk="0", offline=offline) as loaded:
            report = compare(loaded)
        for line in file_lines(name, "exact", report)[:-1]:
            typer.echo(line)
        if report.outcome == "FAIL":
            raise typer.Exit(1)


def models_table(found: "list[ModelStatus]") -> Table:
    """Return the models as a table for people."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("here")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
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
                f"\nits weights are rounded; `recollect pull {status.name}` converts it anew", "dim"
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


def format_bytes(size: int) -> str:
    """Return a size for people, in powers of ten as disks are sold and `--kv-memory` reads them."""
    if size < 10**6:
        return f"{size / 10**3:.0f} kB"
    return f"{size / 10**6:.0f} MB" if size < 10**9 else f"{size / 10**9:.1f} GB"


def _as_dict(status: "ModelStatus") -> dict[str, object]:
    return {
        "name": status.name,
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


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name of `recollect models`, a .gguf file, or a Hugging Face folder.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    to: Annotated[
        Literal["onnx-genai"], typer.Option(help="The form: a folder for ONNX Runtime GenAI.")
    ] = "onnx-genai",
    precision: Annotated[
        Literal["int8", "fp32"],
        typer.Option(help="Of the weights; fp32 is exact and four times as large."),
    ] = "int8",
    offline: OfflineOption = False,
) -> None:
    """Convert a model for another runtime, without a network once the model is here."""
    with progress_bar(f"Converting {model}") as progress:
        # Here and not above: it takes the runtime's libraries along, half a second of start-up.
        from recollect.models.onnx_folder import convert_to_onnx, require_convertible  # noqa: PLC0415
        from recollect.models.prepare import original_of  # noqa: PLC0415

        require_convertible(out)
        with original_of(
            model, home=config.home(), progress=progress, offline=offline or None
        ) as source:
            convert_to_onnx(source, out, precision=precision, progress=progress)
    typer.echo(f"{out} is ready, as {to} in {precision}: recollect chat --model {out}")
