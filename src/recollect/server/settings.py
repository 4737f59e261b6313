"""
What a server is told when it starts, and what it may not be told.

Values only: opens no socket and no model.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recollect.cipher import Cipher
from recollect.errors import ConfigError

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8765
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a browser that was led here by another site's name does not send as Host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a server takes on; beyond each of them a request is refused, and told why."""

    body_bytes: int = 16 * 2**20
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
        ConfigError: They would let anybody in who can reach the machine.
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
    """Host names beside those of the loopback interface."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call, as `https://host:port`; none by default."""
    temperature: float = 0.0
    """Of requests that name none."""
    has_keys: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.is_local and not self.has_keys:
            raise ConfigError(
                f"{self.host} can be reached from other machines: give an --api-key, make one by "
                "`recollect keys add NAME`, or stay on 127.0.0.1."
            )
        if "*" in self.cors_origins:
            raise ConfigError("--cors * lets every web page in: name the origins that may call.")

    @property
    def is_local(self) -> bool:
        """Return whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
