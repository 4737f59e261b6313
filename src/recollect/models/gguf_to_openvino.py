"""
A program: a GGUF file as an OpenVINO model and tokenizer.

Run by `convert` in a process of its own: a damaged file can crash a library, and the memory is
given back. Prints how many bytes of how many are done, a line each time.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Final

import openvino as ov

from recollect.errors import UnsupportedModelError
from recollect.models.convert import NO_ROOM, REFUSED
from recollect.models.folder import MODEL_FILES
from recollect.models.gguf_decoder import read_decoder
from recollect.models.gguf_graph import Constants, GraphBuilder, has_avx2_kernel
from recollect.models.gguf_shards import Shards
from recollect.models.gguf_tokenizer import write_tokenizer

_REPORT_EVERY_S: Final = 0.1  # more often than a bar is drawn would be for nobody


def main(gguf: Path, folder: Path) -> None:
    """Write the model of *gguf* and its tokenizer into *folder*."""
    write_tokenizer(gguf, folder)
    shards = Shards(gguf)
    report = _Reporter(shards.total_bytes)
    # Beside the model and not in memory; it goes with the folder that all this is in.
    constants = Constants(folder.parent / "constants.bin")
    builder = GraphBuilder(
        read_decoder(shards), shards, constants, report, fuses_gate=has_avx2_kernel()
    )
    model = builder.build()
    # As f16 the rotary frequencies, norms and scales would be rounded.
    xml = folder / MODEL_FILES[0]
    try:
        ov.save_model(model, xml, compress_to_fp16=False)
        ov.Core().read_model(xml)  # checks that the weights are as long as the graph says
    except RuntimeError as cause:  # what OpenVINO raises where it cannot write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from cause


class _Reporter:
    """Counts bytes, and prints them now and then."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._next_s = 0.0

    def __call__(self, count: int) -> None:
        self._done += count
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _REPORT_EVERY_S
            print(self._done, self._total, flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UnsupportedModelError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    except OSError as error:
        print(error.errno, error.filename or sys.argv[2], file=sys.stderr)
        sys.exit(NO_ROOM)
