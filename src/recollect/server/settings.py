"""
What a server is told when it starts, and what it may not be told.

Values only: opens no socket and no model.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recollect.encryption import Cipher
from recollect.errors import ConfigError
from recollect.server.origins import host_name, web_origin

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8765
_LAST_PORT: Final = 2**16 - 1
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
    temperature: float = 0.0
    """Of requests that name none."""
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
