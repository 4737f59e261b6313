"""
The page at `/`: what of it is sent, and what a browser may do with it.

On its own because nothing here knows of conversations or models: the page is a client like others,
whose files are in the package, and it reaches what it shows by the public API alone, with a key where
one is needed. A browser may load nothing but these files, and run nothing that they do not name.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect import __version__
from recollect.server.refusals import not_found, quoted

PREFIX: Final = "/web/"
"""What the addresses of the page's files begin with. They are the same for everybody, so no key is asked."""

router = APIRouter(tags=["Server"])

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""What is sent, by the ends of names; licences and notes stay in the package."""
_INDEX: Final = "index.html"
_IMPORT_MAP: Final = re.compile(rb'<script type="importmap">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    tag: str
    """Changes with the content; a browser asks by it whether what it has is right."""


@router.get("/")
@router.head("/", include_in_schema=False)
def root(request: Request) -> Response:
    """Say that a server is here, which clients ask without a key; a browser gets the page."""
    if "text/html" in request.headers.get("accept", ""):
        return _send(request, page_files()[_INDEX])
    about: dict[str, Any] = {"name": "recollect", "version": __version__}
    return JSONResponse(about, headers={"Vary": "Accept"})


@router.get(PREFIX + "{name:path}", include_in_schema=False)
def page_file(name: str, request: Request) -> Response:
    """Return a file of the page."""
    file = page_files().get(name)
    if file is None or name == _INDEX:
        raise not_found(f"file {quoted(name)} of the page")
    return _send(request, file)


@cache
def page_files() -> dict[str, PageFile]:
    """Return the page's files by their names; they are read once, and are 400 kB."""
    found = {}
    folders = [("", resources.files("recollect") / "web")]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif (kind := entry.name.rpartition(".")[2]) in _TYPES:
                content = entry.read_bytes()
                tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
                found[prefix + entry.name] = PageFile(content, _TYPES[kind], tag)
    return found


@cache
def security_policy() -> str:
    """
    Return what a browser may do with the page: load its own files, and call this server.

    The import map is the only script in the page itself, and is allowed by its hash. Text becomes
    elements only by way of the sanitizer (`trusted-types`).
    """
    found = _IMPORT_MAP.search(page_files()[_INDEX].content)
    assert found is not None, "the page has an import map"
    digest = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'sha256-{digest}'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    )


def _send(request: Request, file: PageFile) -> Response:
    headers = {
        "Cache-Control": "no-cache",
        "ETag": file.tag,
        "Vary": "Accept",
        "Content-Security-Policy": security_policy(),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
