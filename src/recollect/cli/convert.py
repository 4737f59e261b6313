"""
`recollect convert`: a model in the form that another runtime takes.

Says what was made and how to use it; the work is done in `models/`.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from recollect import config
from recollect.cli.options import OfflineOption
from recollect.cli.progress import progress_bar


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
