"""
How `recollect cache` shows what a store has: for people, and as JSON.

Pure: values in, tables and dictionaries out.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

from recollect.cli.models import format_bytes
from recollect.kv.accounts import Pin
from recollect.kv.maintenance import Holding
from recollect.kv.record import Identity

_ELEMENT_TYPE: Final = re.compile(r":([a-z]+\d+)")
_SHORT: Final = 12
"""Of a fingerprint that no model here has."""


def holdings_table(found: Sequence[Holding], names: Mapping[str, str]) -> Table:
    """Return what is stored of each model, runtime and precision."""
    table = _table(
        "model", "runtime", "KV", "blocks", "tokens", "size", "last used", right=range(3, 6)
    )
    for holding in found:
        table.add_row(
            Text(model_name(holding.identity, names)),
            Text(holding.identity.runtime),
            precision(holding.identity),
            f"{holding.blocks:,}",
            f"{holding.tokens:,}",
            format_bytes(holding.stored_bytes),
            _local(holding.last_used) if holding.last_used else "",
        )
    return table


def pins_table(found: Sequence[Pin], names: Mapping[str, str]) -> Table:
    """Return what is kept from eviction."""
    table = _table("kept", "what", "model", "tokens", "since", right=[3])
    for pin in found:
        table.add_row(
            Text(pin.name),
            str(pin.about.get("kind", "")),
            Text(names.get(pin.identity, pin.identity[:_SHORT])),
            f"{pin.tokens:,}",
            _local(pin.created),
        )
    return table


def holding_as_dict(holding: Holding, names: Mapping[str, str]) -> dict[str, object]:
    """Return what is stored of one model, runtime and precision as JSON values."""
    identity, savings = holding.identity, holding.savings
    last = datetime.fromtimestamp(holding.last_used, UTC).isoformat() if holding.last_used else None
    return {
        "model": names.get(identity.fingerprint),
        "fingerprint": identity.fingerprint,
        "runtime": identity.runtime,
        "precision": precision(identity),
        "blocks": holding.blocks,
        "tokens": holding.tokens,
        "stored_bytes": holding.stored_bytes,
        "last_used_at": last,
        "restored_tokens": savings.tokens,
        "saved_s": savings.seconds,
    }


def pin_as_dict(pin: Pin, names: Mapping[str, str]) -> dict[str, object]:
    """Return a pin as JSON values."""
    return {
        "name": pin.name,
        "kind": pin.about.get("kind"),
        "model": names.get(pin.identity),
        "tokens": pin.tokens,
        "created_at": datetime.fromtimestamp(pin.created, UTC).isoformat(),
    }


def names_by_digest(found: Sequence[Holding], names: Mapping[str, str]) -> dict[str, str]:
    """Return what models are called by what pins know of them."""
    return {
        holding.identity.digest().hex(): model_name(holding.identity, names) for holding in found
    }


def model_name(identity: Identity, names: Mapping[str, str]) -> str:
    """Return what a model is called here, or the beginning of its fingerprint."""
    return names.get(identity.fingerprint, identity.fingerprint[:_SHORT])


def precision(identity: Identity) -> str:
    """Return the element types of KV."""
    types = sorted(set(_ELEMENT_TYPE.findall(identity.kv_format)))
    return "+".join(types) or identity.kv_format


def _table(*headings: str, right: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        if number in right:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
