import struct

import pytest

from recollect.text.file_tokenizers import added_texts, recognising_only, without_truncation

LIMITED = """<net name="t"><layers>
<layer id="0" type="Parameter"/>
<layer id="1" type="Const"><data element_type="i32" shape="" offset="4" size="4"/></layer>
<layer id="2" type="Minimum"/>
<layer id="3" type="Const"><data element_type="i32" shape="" offset="4" size="4"/></layer>
<layer id="4" type="Add"/>
</layers><edges>
<edge from-layer="0" to-layer="2"/><edge from-layer="1" to-layer="2"/>
<edge from-layer="3" to-layer="4"/>
</edges></net>"""
WEIGHTS = struct.pack("<ii", 7, 512)


def test_the_limit_is_replaced_and_an_equal_constant_is_not() -> None:
    xml, weights = without_truncation(LIMITED, WEIGHTS)
    assert weights == WEIGHTS + struct.pack("<i", 2**31 - 1)
    assert xml.count('offset="8"') == 1
    assert xml.count('offset="4"') == 1


def test_files_without_a_limit_come_back_as_they_were() -> None:
    unlimited = LIMITED.replace("Minimum", "Maximum")
    assert without_truncation(unlimited, WEIGHTS) == (unlimited, WEIGHTS)


PATTERN = rb"(\<s\>|\[\(x\)\])|(?:\s*)(\<\|a\\\|\>)(?:\s*)|(\<b\>)"
SPLITTING = """<net name="t"><layers>
<layer id="0" type="Const"><data element_type="u8" shape="SIZE" offset="4" size="SIZE"/>
<output><port id="0"><dim>SIZE</dim></port></output></layer>
<layer id="1" type="SpecialTokensSplit"/>
<layer id="2" type="Parameter"/>
</layers><edges>
<edge from-layer="2" to-layer="1"/><edge from-layer="0" to-layer="1"/>
</edges></net>"""


def splitting(pattern: bytes) -> tuple[str, bytes]:
    return SPLITTING.replace("SIZE", str(len(pattern))), b"head" + pattern


def test_the_texts_that_are_tokens_wherever_they_are_can_be_read() -> None:
    assert added_texts(*splitting(PATTERN)) == ["<s>", "[(x)]", "<|a\\|>", "<b>"]


@pytest.mark.parametrize(
    ("texts", "pattern"),
    [
        (["<s>", "<|a\\|>"], rb"(\<s\>)|(?:\s*)(\<\|a\\\|\>)(?:\s*)"),
        (["<b>"], rb"(\<b\>)"),
        ([], rb"(?!)"),
    ],
)
def test_only_those_that_are_wanted_are_left(texts: list[str], pattern: bytes) -> None:
    xml, weights = recognising_only(*splitting(PATTERN), texts)
    assert weights == b"head" + PATTERN + pattern
    assert f'offset="{4 + len(PATTERN)}"' in xml
    assert f'shape="{len(pattern)}"' in xml
    assert f"<dim>{len(pattern)}</dim>" in xml
    assert added_texts(xml, weights) == texts


def test_a_pattern_of_another_form_has_no_known_texts() -> None:
    assert added_texts(*splitting(rb"[a-z]+")) == []
    assert added_texts(LIMITED, WEIGHTS) == []
    assert recognising_only(LIMITED, WEIGHTS, []) == (LIMITED, WEIGHTS)
