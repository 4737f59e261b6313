"""
The names of web pages and of this machine, as browsers send them in `Origin` and `Host`.

Pure: what an operator typed in, what a header can be compared with out.
"""

import re
from typing import Final

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
