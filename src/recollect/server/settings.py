"""
What a server is told when it starts, and what it refuses to be told.

Settings and limits are values. Origins of web pages and names of hosts are kept as browsers send them
in `Origin` and `Host`. The sockets to listen on are bound before a model is loaded, so that a taken
address shows at once.
"""

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recollect.encryption import Cipher
from recollect.errors import ConfigError

_HOST: Final = r"[a-z0-9._-]+|\[[0-9a-f:.]+\]"
_NAME: Final = re.compile(_HOST)
_ORIGIN: Final = re.compile(rf"([a-z][a-z0-9+.-]*)://({_HOST})(?::([0-9]{{1,5}}))?/?")
_LAST_PORT: Final = 2**16 - 1
"""Ports are numbers of 16 bits."""
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
"""Which a browser leaves out. Source: RFC 9110, sections 4.2.1 and 4.2.2."""


def web_origin(text: str) -> str:
    """
    Return the origin of a web page as a browser sends it: lower case, no path, no usual port.

    Source: RFC 6454, section 6.2.

    Raises:
        ConfigError: No browser sends that, or pages send it that nobody has named.
    """
    if text.strip() == "*":
        raise ConfigError("--cors * lets every web page in: name the origins that may call.")
    if text.strip().lower() == "null":
        raise ConfigError(
            "--cors null lets in every page without an origin, such as any file: serve the page "
            "from an address, and name that."
        )
    found = _ORIGIN.fullmatch(text.strip().lower())
    if found is None or int(found[3] or 0) > _LAST_PORT:
        raise ConfigError(
            f"--cors {text!r} is no origin that a browser sends: write scheme://host:port, such as "
            "http://localhost:3000."
        )
    scheme, host, port = found.groups()
    if port is None or str(int(port)) == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{int(port)}"


def host_name(text: str) -> str:
    """
    Return a name of this machine as `Host` is compared with: lower case, without a port.

    Raises:
        ConfigError: It is no name of a host.
    """
    name = text.strip().lower()
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--allow-host {text!r} is no name of a host: write the name alone, without a scheme, a "
            "port or a path, such as box.local."
        )
    return name


DEFAULT_MAX_TOKENS: Final = 8192
"""
Of replies to requests that name no limit: more than files and answers have, which are rarely 4,096
tokens long, and an end for a model that repeats itself until its context is full.
"""
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8765
"""Ports are numbers of 16 bits."""
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a browser that was led here by another site's name does not send as Host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a server takes on; beyond each of them a request is refused, and told why."""

    header_bytes: int = 64 * 2**10
    """Of the first line and all headers: what uvicorn allows where h11 reads them."""
    header_s: float = 10.0
    """From the beginning of a connection, or of a request on it, to the end of its headers."""
    body_bytes: int = 16 * 2**20
    bodies_bytes: int = 256 * 2**20
    """Of all bodies that are held at one time, from their first byte until they are answered."""
    body_s: float = 60.0
    """From the end of the headers to the end of the body: the largest takes 2.3 Mbit/s."""
    values: int = 2**18
    """In a body: items of lists and members of objects; about as many as two prompts of 131,072 token ids."""
    depth: int = 100
    """Of lists and objects in each other. A schema takes two levels for one of what it describes; what
    writes JSON, or reads schemas, goes deeper by calling itself, and Python allows 1,000 calls."""
    messages: int = 4096
    """In one request: a template is rendered over all of them."""
    concurrent: int = 16
    """Replies generated at once, which share each forward pass; and keys that have some at once."""
    queue: int = 64
    """Requests that wait for their turn; the next is told to come back later (429)."""
    choices: int = 8
    """Most replies to one request (`n`)."""
    shutdown_s: float = 10.0
    """How long replies may go on after the server was asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    A server's settings.

    Raises:
        ConfigError: They would let anybody in who can reach the machine, there is no such port, or no
            browser sends such an origin or host.
    """

    home: Path
    """Where the journal is."""
    cipher: Cipher | None = None
    """Of an encrypted home; None: it is not encrypted."""
    models: tuple[str, ...]
    """What clients may ask for; the first is for those that name none."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names for them, such as the one that a tool has built in."""
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    allowed_hosts: tuple[str, ...] = ()
    """Host names beside those of the loopback interface; kept as `host_name` returns them."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call, as `https://host:port`; none by default. Kept as `web_origin` returns them."""
    temperature: float | None = None
    """Of requests that name none; None: as the makers of their model recommend."""
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    """The same; None: as many as the context holds."""
    is_strict: bool = False
    """Whether a field is refused that is not known."""
    keeps_words: bool = True
    """Whether the first words at which prompts part from earlier ones are kept for `recollect explain`."""
    keeps_chats: bool = False
    """Whether chats are kept whose clients send all of it each time, as if they had kept conversations."""
    has_keys: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.is_local and not self.has_keys:
            raise ConfigError(
                f"{self.host} can be reached from other machines: set RECOLLECT_API_KEY or --api-key, make a "
                "key by `recollect keys add NAME`, or stay on 127.0.0.1."
            )
        if not 0 <= self.port <= _LAST_PORT:
            raise ConfigError(
                f"There is no port {self.port}: take one from 1 to {_LAST_PORT}, or 0 for a free one."
            )
        # A frozen value is completed here, so that nobody can compare with what no browser sends.
        object.__setattr__(self, "cors_origins", tuple(map(web_origin, self.cors_origins)))
        object.__setattr__(self, "allowed_hosts", tuple(map(host_name, self.allowed_hosts)))

    @property
    def is_local(self) -> bool:
        """Return whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_WHY: Final = {
    errno.EADDRINUSE: "something else listens there: stop it, or take another --port (0: a free one).",
    errno.EACCES: "this user may not listen there: take a --port above 1023.",
    errno.EADDRNOTAVAIL: "this machine has no such address: see --host.",
}


def bind(host: str, port: int) -> list[socket.socket]:
    """
    Return a socket for each address of a host, bound and not yet listening.

    Args:
        host: A name or an address.
        port: 0 takes a free one, the same for all addresses.

    Raises:
        ConfigError: The address is none of this machine's, is taken, or may not be listened on.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as cause:
        raise ConfigError(
            f"Cannot listen on {host}: no address goes by that name; see --host."
        ) from cause
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            if os.name == "posix":  # elsewhere it would let two servers share a port
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            one.bind((address[0], taken, *address[2:]))
    except OSError as cause:
        for one in sockets:
            one.close()
        why = _WHY.get(cause.errno or 0, f"{os.strerror(cause.errno or 0)}.")
        raise ConfigError(f"Cannot listen on {host}, port {port}: {why}") from cause
    return sockets
