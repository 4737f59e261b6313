"""
The model that needs no weights: bytes as tokens, and a plain chat template.

Pure. Its forward pass is the reference runtime's; here is only what the other parts ask of a model.
"""

from typing import Final

from recollect.files import combine
from recollect.models.local import LocalModel
from recollect.text.tokenizer import END_OF_TURN, SPECIAL_TOKENS, ByteTokenizer

REFERENCE_NAME: Final = "reference"
REFERENCE_CONTEXT_LENGTH: Final = 8192
_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reference_model() -> LocalModel:
    """Return the model named "reference"."""
    return LocalModel(
        name=REFERENCE_NAME,
        format="reference",
        folder=None,
        context_length=REFERENCE_CONTEXT_LENGTH,
        chat_template=_TEMPLATE,
        eos_token_ids=ByteTokenizer.eos_token_ids,
        bos_token=None,
        eos_token=END_OF_TURN,
        fingerprint=combine(["reference 1", *SPECIAL_TOKENS, _TEMPLATE]),
        architecture=REFERENCE_NAME,
    )
