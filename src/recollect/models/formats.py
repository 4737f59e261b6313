"""What reads the files of each format of a model."""

from recollect.models.catalog import LocalModel
from recollect.text.file_tokenizers import TOKENIZER_NAME, HfTokenizer, OpenVinoTokenizer
from recollect.text.tokenizer import ByteTokenizer, Tokenizer


def load_tokenizer(model: LocalModel) -> Tokenizer:
    """
    Return the tokenizer of a model.

    Raises:
        UnsupportedModelError: Its files cannot be read.
    """
    if model.folder is None:
        return ByteTokenizer()
    if model.format == "onnx-genai":
        file = model.folder / TOKENIZER_NAME
        return HfTokenizer(file, model.eos_token_ids, template=model.chat_template)
    return OpenVinoTokenizer(model.folder, model.eos_token_ids, template=model.chat_template)
