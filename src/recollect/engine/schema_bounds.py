"""
How large a JSON schema may be that replies are held to.

Pure. llguidance compiles a schema by calling itself for each part of it and follows each reference
where it stands, in time that grows with the square of its parts. A chain of a thousand references,
or a list of 40,000 required names, is more than a thread's stack holds, which ends the process.
"""

from collections.abc import Iterator
from typing import Any, Final

from recollect.errors import InvalidParameterError

MOST_VALUES: Final = 4096
"""
Members of objects and items of lists in one schema: so many optional properties, the slowest kind,
take two seconds. OpenAI's API takes 5,000 properties and 1,000 values of enumerations.
"""
MOST_CHARACTERS: Final = 128 * 2**10
"""
In the names and texts of one schema: a regular expression of so many takes a third of a second, and
twice as many are more than llguidance takes. OpenAI's API takes 120,000.
"""
MOST_STEPS: Final = 1000
"""
Levels of lists and objects, those of each thing that is referred to added once: the longest way that
references can make. 1,400 fit into a thread's usual stack of 8 MiB, and 2,000 do not.
"""


def check_schema(schema: Any, what: str) -> None:
    """
    Check that a schema can be compiled in bounded time and stack.

    Args:
        schema: A JSON value.
        what: What it is, as the subject of a sentence.

    Raises:
        InvalidParameterError: It is larger than the bounds.
    """
    characters = 0
    targets: dict[str, None] = {}
    for values, (value, name) in enumerate(_inside(schema), start=1):
        characters += len(name) + (len(value) if isinstance(value, str) else 0)
        if name == "$ref" and isinstance(value, str):
            targets[value] = None
        if values > MOST_VALUES:
            raise InvalidParameterError(
                f"{what} has more than {MOST_VALUES:,} names and values: make it smaller."
            )
        if characters > MOST_CHARACTERS:
            raise InvalidParameterError(
                f"{what} has more than {MOST_CHARACTERS:,} characters: make it smaller."
            )
    steps = _depth(schema)
    for target in targets:
        steps += _depth(_referred(schema, target))
        if steps > MOST_STEPS:
            raise InvalidParameterError(
                f"{what} has more than {MOST_STEPS:,} levels, where what is referred to counts "
                "with it: use fewer references."
            )


def _inside(value: Any) -> Iterator[tuple[Any, str]]:
    """Yield each value inside another, with its name; the name of an item is empty."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        members: Any = ()
        if isinstance(inner, dict):
            members = ((one, name) for name, one in inner.items())
        elif isinstance(inner, list):
            members = ((one, "") for one in inner)
        for one, name in members:
            yield one, name
            if isinstance(one, dict | list):
                waiting.append(one)


def _depth(value: Any) -> int:
    """Return how many lists and objects are in each other; a value that is neither is one level."""
    depth, level = 1, [value]
    while level := [
        inner
        for one in level
        if isinstance(one, dict | list)
        for inner in (one.values() if isinstance(one, dict) else one)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
    return depth


def _referred(schema: Any, target: str) -> Any:
    """Return what a reference leads to; the whole schema where that cannot be said."""
    if not target.startswith("#/"):
        return schema  # the schema itself, or a name that stands anywhere in it
    found = schema
    for part in target[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name[:6]) < len(found):
            found = found[int(name[:6])]
        else:
            return schema
    return found
