"""
What is wrong with a request, in words: where, what it should be, and what it is.

Pure: pydantic's errors in, one sentence out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from recollect.server.errors import ApiError, shortened

_MOST_QUOTED: Final = 40
"""Characters of a client's own text that are quoted to it: enough to know it again."""
_SHOULD_BE: Final = "Input should be "
_OBJECT: Final = {"model_type", "model_attributes_type", "dict_type"}
"""pydantic's names of an error where an object was expected; its words name our classes."""

Place = tuple[str | int, ...]
"""Names and numbers that lead to a value of a body."""


def wrong_request(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what a client is told of a path or a query that cannot be used, or of a missing body."""
    first = found[0]
    # The first part is where the value is: "body", "query" or "path".
    where, *place = first["loc"]
    if first["type"] == "missing" and where == "body" and not place:
        return ApiError(
            "The body is missing: send a JSON object.",
            code="missing_required_parameter",
            param="body",
        )
    return _told(tuple(place), [first], quoted(first["input"]))


def wrong_body(found: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """
    Return what a client is told of a body that cannot be used.

    Of a value that may be one of several things each of them says why it is none. Those that came
    farthest into the body know best.
    """
    places = [_place_of(error, body) for error in found]
    deepest = max(places, key=len)
    there = [error for error, at in zip(found, places, strict=True) if at == deepest]
    return _told(deepest, there, _kind(_value(body, deepest)))


def name_of(place: Place) -> str | None:
    """Return a place as clients write it, such as `messages.0.content`; None for the whole."""
    return ".".join(shortened(str(part), _MOST_QUOTED) for part in place) or None


def quoted(value: Any) -> str:
    """Return a value of a client's as it is quoted to it."""
    return shortened(repr(value) if isinstance(value, str) else str(value), _MOST_QUOTED)


def _told(place: Place, errors: Sequence[Mapping[str, Any]], is_now: str) -> ApiError:
    first = errors[0]
    if first["type"] == "unknown_parameter":
        param = name_of((*place, first["ctx"]["name"]))
        return ApiError(
            f"Unknown parameter: {param!r}. There is none of that name here: leave it out.",
            code="unknown_parameter",
            param=param,
        )
    param = name_of(place)
    where = "" if param is None else f"{param}: "
    if first["type"] == "missing":
        return ApiError(f"{where}Field required.", code="missing_required_parameter", param=param)
    words = list(dict.fromkeys(_words(error) for error in errors))
    if all(text.startswith(_SHOULD_BE) for text in words):
        rest = " or ".join(text.removeprefix(_SHOULD_BE) for text in words)
        told = f"{_SHOULD_BE}{rest}; it is {is_now}."
    else:
        told = f"{words[0]}."
    return ApiError(f"{where}{told}", code="invalid_value", param=param or "body")


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] in _OBJECT:
        return f"{_SHOULD_BE}an object"
    text: str = error["msg"]
    return text.removeprefix("Value error, ")


def _place_of(error: Mapping[str, Any], body: Any) -> Place:
    """Return which place of a body an error is about."""
    parts, kind = error["loc"], error["type"]
    name = parts[-1] if kind == "missing" else error.get("ctx", {}).get("name")
    if kind == "missing":
        return (*(_farthest(parts[:-1], body, lambda at: _lacks(at, name)) or ()), name)
    if kind == "unknown_parameter":
        return _farthest(parts, body, lambda at: isinstance(at, Mapping) and name in at) or ()
    return _farthest(parts, body, lambda _: True) or ()


def _lacks(value: Any, name: str | int) -> bool:
    return isinstance(value, Mapping) and name not in value


def _farthest(parts: Sequence[str | int], body: Any, fits: Callable[[Any], bool]) -> Place | None:
    """
    Return the place that leads farthest into a body to a value that fits; None where none does.

    Among the parts that pydantic gives are names of types that were tried, which lead nowhere. Such
    a name may be one in the body too, so that several readings are possible.
    """
    if not parts:
        return () if fits(body) else None
    first, *rest = parts
    found = [_farthest(rest, body, fits)]
    is_there = (isinstance(body, Mapping) and first in body) or (
        isinstance(body, list) and isinstance(first, int) and first < len(body)
    )
    if is_there:
        behind = _farthest(rest, body[first], fits)
        found.append(None if behind is None else (first, *behind))
    return max((place for place in found if place is not None), key=len, default=None)


def _value(body: Any, place: Place) -> Any:
    for part in place:
        if isinstance(body, Mapping) and part not in body:
            return None  # it is missing
        body = body[part]
    return body


def _kind(value: Any) -> str:
    """Return what a value is, in the words of JSON; a number or a short text as itself."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float() | str():
            return quoted(value)
        case list():
            return "a list"
        case _:
            return "an object"
