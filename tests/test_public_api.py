"""What `import recollect` promises."""

import inspect
import re
from types import ModuleType

import pytest

import recollect
from recollect import errors


def test_all_equals_what_the_package_exports() -> None:
    exported = {
        name
        for name in dir(recollect)
        if not isinstance(getattr(recollect, name), ModuleType)
        and (not name.startswith("_") or name == "__version__")
    }
    assert set(recollect.__all__) == exported


def test_all_is_sorted_and_has_nothing_twice() -> None:
    assert list(recollect.__all__) == sorted(set(recollect.__all__))


@pytest.mark.parametrize("name", [name for name in recollect.__all__ if name != "__version__"])
def test_each_export_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(recollect, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), (
        "a dataclass's generated signature is no docstring"
    )


@pytest.mark.parametrize("name", [name for name in recollect.__all__ if name != "__version__"])
def test_each_public_method_of_an_export_has_a_docstring(name: str) -> None:
    value = getattr(recollect, name)
    if not inspect.isclass(value):
        return
    missing = [
        member
        for member, what in vars(value).items()
        if not member.startswith("_")
        and (inspect.isfunction(what) or isinstance(what, property))
        and not inspect.getdoc(what)
    ]
    assert missing == []


def drawn_tree() -> dict[str, str]:
    """Return each class drawn in the docstring of errors.py, with the one that it hangs under."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+(?:Error|Failure))\b", line)
        if drawn is None:
            continue
        depth, name = len(drawn["branch"]), drawn["name"]
        while above and above[-1][0] >= depth:
            above.pop()
        parents[name] = above[-1][1] if above else ""
        above.append((depth, name))
    return parents


def real_tree() -> dict[str, str]:
    classes = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    return {
        name: next((base.__name__ for base in value.__bases__ if base in classes.values()), "")
        for name, value in classes.items()
    }


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    assert drawn_tree() == real_tree()


def test_misuse_is_a_runtime_error_and_no_recollect_error() -> None:
    assert issubclass(recollect.MisuseError, RuntimeError)
    assert not issubclass(recollect.MisuseError, recollect.RecollectError)


def test_what_the_caller_got_wrong_is_also_a_value_error() -> None:
    for error in (errors.InvalidParameterError, errors.TokenIdError, errors.RewindError):
        assert issubclass(error, ValueError)
