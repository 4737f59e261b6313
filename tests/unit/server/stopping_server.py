"""A server on the reference model that takes its time; `test_stopping.py` runs it as a process."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import recollect.conversation.loading
from recollect.cli.main import run
from recollect.conversation.model import Model
from recollect.models.catalog import reference_model
from recollect.runtime.base import ReferenceRuntime
from recollect.text.tokenizer import ByteTokenizer

_CONTEXT_LENGTH = 8192


class SlowRuntime(ReferenceRuntime):
    """Takes as long for a forward pass as a large model does."""

    def forward(self, rows: Sequence[Any]) -> Any:
        time.sleep(0.02)
        return super().forward(rows)


def load_slowly(*_arguments: object, **_options: object) -> Model:
    """Return a model whose replies take minutes; with STOPPING_LOAD_S it takes long to load, too."""
    time.sleep(float(os.environ.get("STOPPING_LOAD_S", "0")))
    runtime = SlowRuntime(
        vocab_size=ByteTokenizer().vocab_size, context_length=_CONTEXT_LENGTH, block_size=8
    )
    local = replace(reference_model(), context_length=_CONTEXT_LENGTH)
    home = Path(os.environ["RECOLLECT_HOME"])
    memory = 1024 * runtime.info.bytes_per_block
    return Model(local, runtime, profile="exact", home=home, kv_memory=memory, store=None)


if __name__ == "__main__":
    recollect.conversation.loading.load = load_slowly
    sys.argv = ["recollect", "serve", "-m", "reference", "--port", "0"]
    run()
