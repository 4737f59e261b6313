"""
`recollect web` and `recollect chat --web`: the page of conversations, in a browser.

On its own because `chat` opens it too, which does not load what a server needs. A server that runs
already is used; otherwise one is started, as `recollect serve --web` does.
"""

import json
import urllib.request
import webbrowser
from dataclasses import fields
from typing import Annotated, Final

import typer

from recollect.cli.options import USUAL, ModelOptions, takes_model_options
from recollect.server.settings import DEFAULT_PORT

app = typer.Typer()

_WAIT_S: Final = 2.0
"""For an answer from this machine; who does not answer by then is no server of ours."""


@app.command()
@takes_model_options
def web(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            show_default=False,
            help="A model as in `recollect chat`; the first one is the default. May be given several times.",
        ),
    ] = None,
    loading: ModelOptions = USUAL,
    port: Annotated[
        int,
        typer.Option(
            metavar="P", min=0, max=65535, help="Where the server listens; 0: a free port."
        ),
    ] = DEFAULT_PORT,
) -> None:
    """
    Look at conversations as trees, in a browser.

    Opens the page of the server that runs on this machine, or starts one first; Ctrl-C stops that.
    """
    open_page(model, loading, port)


def open_page(model: list[str] | None, loading: ModelOptions, port: int | None = None) -> None:
    """
    Open the page, of a server that runs already or of one that is started and runs until Ctrl-C.

    Args:
        model, loading: Of a server that is started; see `serve`.
        port: Where it listens; None: where servers usually do.
    """
    port = DEFAULT_PORT if port is None else port
    page = f"http://127.0.0.1:{port}/"
    if port and is_served(page):
        typer.echo(f"Opening {page} of the server that runs.", err=True)
        webbrowser.open(page)
        return
    from recollect.cli.serve import serve  # noqa: PLC0415 - not needed where one runs

    options = {one.name: getattr(loading, one.name) for one in fields(loading)}
    serve(model=model, port=port, web=True, **options)


def is_served(page: str) -> bool:
    """Return whether a server of ours answers at an address of this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(page, timeout=_WAIT_S) as answer:
            return bool(json.load(answer).get("name") == "recollect")
    except (OSError, ValueError, AttributeError):
        return False
