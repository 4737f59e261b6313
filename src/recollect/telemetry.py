"""
Switches off what libraries would report by themselves to those who made them.

On its own because it must have run before they are loaded, which the package itself sees to. It
imports none of them.
"""

import os
import sys
from typing import Final

OFF_BY_VARIABLE: Final = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""
Variables that libraries read when they are loaded, in this process and in those that it starts.

ONNX Runtime, and with it ONNX Runtime GenAI, keeps a device id and what it is about to report in
the user's cache folder from the moment that it is loaded, whatever is called afterwards.
huggingface_hub counts what programs do with it. Source: their binaries and sources, 1.32, 0.18, 2.4.
"""


def switch_off() -> None:
    """
    Make OpenVINO, ONNX Runtime and huggingface_hub report nothing, here and in child processes.

    OpenVINO has no such variable. Importing it looks up a name and writes a client id into the
    user's home folder, unless its package for that is missing, which it then does without: to this
    process it is missing from now on. Where somebody has imported it before, it stays as it is.
    A variable that the user has set is the user's decision.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # "not to be found"
    for name in OFF_BY_VARIABLE:
        os.environ.setdefault(name, "1")
