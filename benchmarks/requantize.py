"""
Write a GGUF file's weights as Q8_0, which is llama.cpp's fast path on a processor.

    python benchmarks/requantize.py FROM.gguf TO.gguf
"""

import sys

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

_ROW = 32
"""Q8_0 takes rows of a multiple of this."""


def main() -> None:
    source, target = sys.argv[1:]
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        of_items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, of_items)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim < 2 or weights.shape[-1] % _ROW:
            writer.add_tensor(tensor.name, weights)
        else:
            as_q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(weights, as_q8), raw_dtype=as_q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
