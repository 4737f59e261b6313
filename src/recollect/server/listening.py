"""
Sockets to listen on, taken before anything is loaded: whether the address is free shows at once.
"""

import errno
import os
import socket
from typing import Final

from recollect.errors import ConfigError

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
