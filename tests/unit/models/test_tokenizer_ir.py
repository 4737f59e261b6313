import struct

from recollect.models.tokenizer_ir import without_truncation

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
