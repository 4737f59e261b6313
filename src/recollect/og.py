"""
ONNX Runtime GenAI's Python API over every runtime of recollect.

    import recollect.og as og  # in place of: import onnxruntime_genai as og

Scripts that hold one `Generator` and append, generate and rewind run with the import changed. Where
the original is wrong this is right: docs/og.md lists each difference.
Names, defaults, types and the words of errors are the original's; as there, a `Generator` is used from one
thread at a time. `as_runtime_error` is the one place where recollect's exceptions become those that such
scripts catch.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from recollect import config
from recollect.conversation.loading import load
from recollect.engine.sampling import Generator as OwnGenerator
from recollect.errors import RecollectError
from recollect.models.catalog import LocalModel
from recollect.models.openvino_folder import as_ids
from recollect.text.detokenizer import Detokenizer
from recollect.text.template import ChatTemplate
from recollect.types import Profile, RuntimeChoice, SamplingParams

__all__ = [
    "Checkpoint",
    "Config",
    "Generator",
    "GeneratorParams",
    "Model",
    "Tensor",
    "Tokenizer",
    "TokenizerStream",
]


@contextmanager
def as_runtime_error() -> Iterator[None]:
    """Turn every exception of recollect's into a RuntimeError of the same words, the cause chained."""
    try:
        yield
    except RecollectError as cause:
        raise RuntimeError(str(cause)) from cause


class Config:
    """
    What is to be loaded, and settings that replace those of its folder.

    Execution providers are accepted and ignored: which device computes is the runtime's choice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Final = str(path)
        self.search: dict[str, Any] = {}

    def overlay(self, settings: str) -> None:
        """
        Replace settings by those in a JSON text; of them, those under "search" have an effect.

        Raises:
            RuntimeError: It is not a JSON object.
        """
        content = _from_json("The overlay", settings)
        search = content.get("search", {}) if isinstance(content, dict) else None
        if not isinstance(search, dict):
            raise RuntimeError("The overlay is no JSON object of settings.")  # noqa: TRY004 - as there
        self.search |= search

    def clear_providers(self) -> None:
        """Do nothing."""

    def append_provider(self, name: str) -> None:
        """Do nothing."""

    def set_provider_option(self, provider: str, name: str, value: str) -> None:
        """Do nothing."""


class Model:
    """
    A model that is loaded: a catalog name, a GGUF file, an OpenVINO folder, or an ONNX GenAI folder.

    Any number of generators share its KV memory; one finds what another has read.

    Args:
        path: As `recollect.load` takes it, or a `Config`.
        profile: `exact`, `fast` or `small`, as in `recollect.load`; not in the original.
        kv_memory: Most bytes of KV; not in the original.
        allow_native_code: As `recollect.load` takes it; not in the original, which runs any.
        runtime: What runs a GGUF file, as in `recollect.load`; not in the original.
        device, gpu_layers, kv_type: As in `recollect.load`; not in the original.

    Attributes:
        loaded: recollect's own model, which sessions can be held with; not in the original.
        local: What the model is on disk; not in the original.
        search_defaults: The search options that folder and `Config` set; not in the original.

    Raises:
        RuntimeError: It cannot be had or read.
    """

    def __init__(
        self,
        path: "str | Path | Config",
        *,
        profile: Profile = config.DEFAULT_PROFILE,
        kv_memory: int | None = None,
        allow_native_code: str | None = None,
        runtime: RuntimeChoice = "auto",
        device: str | None = None,
        gpu_layers: int | None = None,
        kv_type: str | None = None,
    ) -> None:
        overlay = path if isinstance(path, Config) else Config(path)
        with as_runtime_error():
            self.loaded: Final = load(
                overlay.path,
                profile=profile,
                kv_memory=kv_memory,
                allow_native_code=allow_native_code,
                runtime=runtime,
                device=device,
                gpu_layers=gpu_layers,
                kv_type=kv_type,
            )
        self.local: Final = self.loaded.local
        self.search_defaults: Final = {**self.local.search_defaults, **overlay.search}

    @property
    def type(self) -> str:
        """Return the architecture, such as `llama`."""
        return self.local.architecture or self.local.format

    @property
    def device_type(self) -> str:
        """Return the kind of device that computes: `CPU`, unless the original's own build says another."""
        return self.loaded.engine.info.device

    def close(self) -> None:
        """Give all memory back now; not in the original, which waits for the garbage collector."""
        self.loaded.close()


Ids = Sequence[int] | npt.NDArray[Any]


class Tensor:
    """A batch of ids, `(texts, longest)`, the shorter padded at their end."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array: Final = array

    def as_numpy(self) -> npt.NDArray[Any]:
        """Return the ids as an array."""
        return self._array

    def shape(self) -> list[int]:
        """Return the shape as a list."""
        return list(self._array.shape)


class TokenizerStream:
    """Turns tokens into text one by one; a character comes when its last token does."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def decode(self, token: int) -> str:
        """Return the text that *token* completes, which may be empty."""
        return self._detokenizer.push(int(token))


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.loaded.tokenizer
        self._local = model.local
        self._special = _special_ids(model.local)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of *text*, `(n,)`: nothing added, special tokens recognised."""
        return np.array(self._tokenizer.encode(text), np.int32)

    def decode(self, tokens: Ids) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(np.asarray(tokens, np.int64).reshape(-1).tolist())

    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of several texts, padded at their end to the longest."""
        rows = [self._tokenizer.encode(text) for text in texts]
        batch = np.full((len(rows), max(map(len, rows), default=0)), self.pad_token_id, np.int32)
        for row, ids in zip(batch, rows, strict=True):
            row[: len(ids)] = ids
        return Tensor(batch)

    def decode_batch(self, batch: Tensor | npt.NDArray[Any]) -> list[str]:
        """Return the texts of several rows of ids."""
        rows = batch.as_numpy() if isinstance(batch, Tensor) else batch
        return [self.decode(row) for row in rows]

    def apply_chat_template(
        self,
        messages: str,
        *,
        template_str: str | None = None,
        tools: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """
        Return a conversation as the text that the model was trained on.

        Args:
            messages: A JSON list of objects with "role" and "content".
            template_str: Another template than the model's.
            tools: A JSON list of descriptions.
            add_generation_prompt: Whether the text ends with the opening of a reply.

        Raises:
            RuntimeError: That is no JSON, or the template refuses it.
        """
        with as_runtime_error():
            template = ChatTemplate(
                template_str or self._local.chat_template,
                bos_token=self._local.bos_token,
                eos_token=self._local.eos_token,
                is_own=template_str is None and self._local.folder is None,
            )
            return template.render(
                _parsed("messages", messages),
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else _parsed("tools", tools),
            )

    def create_stream(self) -> TokenizerStream:
        """Return what turns the tokens of one reply into text as they come."""
        return TokenizerStream(Detokenizer(self._tokenizer))

    def to_token_id(self, text: str) -> int:
        """Return the one id that *text* encodes to; -1 where it takes none or several."""
        number = self._tokenizer.token_id(text)
        return -1 if number is None else number

    @property
    def eos_token_ids(self) -> npt.NDArray[np.int32]:
        """Return the ids that end a reply."""
        return np.array(sorted(self._local.eos_token_ids), np.int32)

    @property
    def bos_token_id(self) -> int:
        """
        Return the id that begins a text.

        Raises:
            RuntimeError: There is none.
        """
        return self._special_id("bos_token_id", self._local.bos_token)

    @property
    def pad_token_id(self) -> int:
        """
        Return the id that fills a batch: where the model names none, the one that ends a reply.

        Raises:
            RuntimeError: There is neither.
        """
        return self._special_id("pad_token_id", self._local.eos_token)

    def _special_id(self, name: str, text: str | None) -> int:
        number = self._special.get(name)
        if number is None and text is not None:
            number = self._tokenizer.token_id(text)
        if number is None:
            raise RuntimeError(f"{name} is not defined for this model")
        return number


def _special_ids(local: LocalModel) -> dict[str, int]:
    """Return the ids that an ONNX GenAI folder names."""
    named = {} if local.onnx_config is None else local.onnx_config["model"]
    found = {name: as_ids(named.get(name)) for name in ("bos_token_id", "pad_token_id")}
    return {name: ids[0] for name, ids in found.items() if ids}


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        raise RuntimeError(f"{name} is not JSON: {cause}") from cause


def _parsed(name: str, text: str) -> Any:
    if not isinstance(text, str):
        raise TypeError(
            f"{name} is {type(text).__name__}; it must be a JSON text, as json.dumps makes it"
        )
    content = _from_json(name, text)
    if not isinstance(content, list):
        raise RuntimeError(f"{name} is no JSON list.")  # noqa: TRY004 - as in the original
    return content


Option = float | bool

_DEFAULTS: Final[dict[str, Option]] = {
    "batch_size": 1,
    "chunk_size": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 0,  # the context length, which a model tells
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": True,
    "random_seed": -1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""What each option is unless it is set. Those that are `int` here take whole numbers alone."""


class GeneratorParams:
    """How a `Generator` chooses tokens, and how long its sequence may be."""

    def __init__(self, model: Model) -> None:
        self._context_length = model.loaded.context_length
        self._options: dict[str, Option] = {}
        known = {name: value for name, value in model.search_defaults.items() if name in _DEFAULTS}
        self.set_search_options(**{**_DEFAULTS, "max_length": self._context_length, **known})

    def set_search_options(self, **options: Option) -> None:
        """
        Set options by name.

        Raises:
            RuntimeError: One is unknown, or of another type. Nothing was changed.
        """
        self._options |= {name: _checked(name, value) for name, value in options.items()}

    def get_search_options(self) -> dict[str, Option]:
        """Return all options; numbers as floats, as the original has them."""
        return dict(self._options)

    def try_graph_capture_with_max_batch_size(self, max_batch_size: int) -> None:
        """Do nothing: there is no graph to capture. Older releases of the original have this."""

    def require_usable(self) -> None:
        """
        Check what a `Generator` cannot do with these options.

        Raises:
            RuntimeError: They ask for several sequences, or for one longer than the context.
        """
        for name in ("batch_size", "num_beams", "num_return_sequences"):
            if self._options[name] != 1:
                raise RuntimeError(
                    f"{name} is {int(self._options[name])}, and a Generator here holds one sequence: "
                    "make several Generators, which share what their prompts have in common."
                )
        if self.max_length == 0:
            raise RuntimeError("search max_length is 0")
        if self.max_length > self._context_length:
            raise RuntimeError(
                f"max_length ({self.max_length}) cannot be greater than model context_length "
                f"({self._context_length})"
            )

    @property
    def max_length(self) -> int:
        """Return the most tokens of the sequence, prompt included."""
        return int(self._options["max_length"])

    @property
    def min_length(self) -> int:
        """Return below how many tokens of the sequence no end of sequence is chosen."""
        return int(self._options["min_length"])

    @property
    def no_repeat_ngram_size(self) -> int:
        """Return how many tokens in a row may not come twice; 0: any number."""
        return int(self._options["no_repeat_ngram_size"])

    @property
    def seed(self) -> int | None:
        """Return the seed, or None for one drawn at random."""
        seed = int(self._options["random_seed"])
        return None if seed < 0 else seed

    def sampling(self, seed: int) -> SamplingParams:
        """
        Return the options as recollect's own parameters.

        Raises:
            RuntimeError: A value is out of its range.
        """
        top_k, top_p = int(self._options["top_k"]), float(self._options["top_p"])
        temperature = float(self._options["temperature"])
        samples = bool(self._options["do_sample"]) and top_k != 1
        if samples and not 0 <= top_p <= 1:
            raise RuntimeError("top_p must be between 0.0 and 1.0")
        if samples and top_k < 0:
            raise RuntimeError("top_k must be 0 or greater")
        if samples and temperature < 0:
            raise RuntimeError("temperature must be greater than 0")
        return SamplingParams(
            temperature=temperature if samples else 0.0,
            top_k=top_k if samples else 0,
            top_p=(top_p or 1.0) if samples else 1.0,  # 0 is off in the original
            repetition_penalty=float(self._options["repetition_penalty"]),
            seed=seed,
            ignore_eos=True,  # the generator looks for it, because it tells which one came
        )


def _checked(name: str, value: Any) -> Option:
    if name not in _DEFAULTS:
        raise RuntimeError(f'Unknown value "{name}"')
    if not isinstance(value, bool | int | float):
        raise RuntimeError(f"Unknown search option type, can be float/bool/int:{name}")  # noqa: TRY004
    wants_bool = isinstance(_DEFAULTS[name], bool)
    if wants_bool is not isinstance(value, bool):
        wanted, saw = ("bool", "number") if wants_bool else ("number", "bool")
        raise RuntimeError(f"{name} - Expected a {wanted} but saw a {saw}")
    if type(_DEFAULTS[name]) is int and value != int(value):
        raise RuntimeError(f"Field '{name}' value {value} is not an integer")
    return value if wants_bool else float(value)


_NO_PRIOR_STATE: Final = (
    "{0} called with no prior state. Please call AppendTokens, SetLogits, or SetInputs before "
    "calling {0}."
)


class Checkpoint:
    """A place that a generator can come back to by `restore`, KV included."""

    def __init__(self, generator: OwnGenerator, ended_by: int | None) -> None:
        self._generator = generator
        self._ended_by = ended_by

    def __len__(self) -> int:
        """Return the length of the sequence in tokens."""
        return len(self._generator.sequence)


class Generator:
    """
    One sequence: append, generate and rewind in any order.

    What was appended is computed at once. End of sequence ends a reply without entering the sequence.
    """

    def __init__(self, model: Model, params: GeneratorParams) -> None:
        params.require_usable()
        self._model = model
        self._params = params
        self._max_length = params.max_length
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._sampling = params.sampling(seed)
        self._own = OwnGenerator(model.loaded.engine, self._sampling)
        self._ended_by: int | None = None  # the end of sequence that was chosen last
        self._is_full = False
        self._terminated = False

    def append_tokens(self, tokens: "Ids | Tensor") -> None:
        """
        Add tokens to the sequence and compute them.

        Raises:
            RuntimeError: There are none, or they do not fit `max_length`. Nothing was changed.
        """
        ids = _flat(tokens)
        self._require_alive()
        length = self.token_count()
        if not len(ids):
            raise RuntimeError("input_ids is empty")
        if length + len(ids) > self._max_length:
            raise RuntimeError(
                f"input_ids size ({len(ids)}) + current sequence length ({length}) exceeds max "
                f"length ({self._max_length})"
            )
        with as_runtime_error():
            self._own.append_tokens(ids)
            try:
                self._compute()
            except BaseException:
                self._own.rewind_to(length)
                raise
        self._ended_by, self._is_full = None, False

    def generate_next_token(self) -> None:
        """
        Choose one more token and add it to the sequence, unless it is an end of sequence.

        Raises:
            RuntimeError: Nothing was appended yet, or the sequence is at `max_length`.
        """
        self._require_alive()
        length = self.token_count()
        if length == 0:
            raise RuntimeError(_NO_PRIOR_STATE.format("GenerateNextToken"))
        if length >= self._max_length:
            raise RuntimeError(
                f"GenerateNextToken called with sequence length already at max_length "
                f"({self._max_length})"
            )
        if self._ended_by is not None:
            return  # as there: nothing happens until something is appended
        with as_runtime_error():
            self._own.set_params(replace(self._sampling, logit_bias=self._banned()))
            token = self._own.generate_next_token()
            assert token is not None, "end of sequence is ignored, and there is room"
            if token in self._model.loaded.engine.eos_token_ids:
                self._own.rewind_to(length)
                self._ended_by = token
        self._is_full = self.token_count() == self._max_length

    def is_done(self) -> bool:
        """
        Return whether the reply has ended.

        Raises:
            RuntimeError: The session was terminated.
        """
        self._require_alive()
        return self._ended_by is not None or self._is_full

    def get_sequence(self, index: int) -> npt.NDArray[np.int32]:
        """
        Return a copy of all tokens, `(n,)`.

        Raises:
            RuntimeError: *index* is not 0; the original reads foreign memory there.
        """
        if index != 0:
            raise RuntimeError(f"There is no sequence {index}: a Generator holds one, of index 0.")
        return self._own.sequence.history.astype(np.int32)

    def get_next_tokens(self) -> npt.NDArray[np.int32]:
        """
        Return the token chosen last, `(1,)`; an end of sequence too.

        Raises:
            RuntimeError: There is none yet.
        """
        if self._ended_by is not None:
            return np.array([self._ended_by], np.int32)
        if not self.token_count():
            raise RuntimeError(_NO_PRIOR_STATE.format("GetNextTokens"))
        return np.array(self._own.sequence.tokens(self.token_count() - 1), np.int32)

    def token_count(self) -> int:
        """Return the length of the sequence in tokens."""
        return len(self._own.sequence)

    def get_logits(self) -> npt.NDArray[np.float32]:
        """
        Return the logits after the last token of the sequence, `(1, 1, vocab_size)`.

        Raises:
            RuntimeError: Nothing was appended yet.
        """
        if not self.token_count():
            raise RuntimeError(_NO_PRIOR_STATE.format("GetLogits"))
        with as_runtime_error():
            return self._compute().reshape(1, 1, -1).copy()

    def get_output(self, name: str) -> npt.NDArray[np.float32]:
        """
        Return the output "logits": those after the last token, whatever was appended last.

        Raises:
            RuntimeError: There is no output of that name.
        """
        if name != "logits":
            raise RuntimeError(f"Generator output '{name}' was not found.")
        return self.get_logits()

    def rewind_to(self, new_length: int) -> None:
        """
        Forget all tokens from *new_length* on; the next one is chosen anew, exactly there.

        Raises:
            RuntimeError: The sequence is shorter. Nothing was changed.
            TypeError: It is negative.
        """
        if new_length < 0:
            raise TypeError("rewind_to() takes a length of 0 or more")
        if new_length > self.token_count():
            raise RuntimeError("Cannot rewind to a length greater than the current sequence length")
        self._own.rewind_to(new_length)
        self._ended_by, self._is_full = None, False

    def set_runtime_option(self, key: str, value: str) -> None:
        """
        Set "terminate_session" to "1" or "0"; other keys are accepted without effect.

        Raises:
            RuntimeError: It is set to something else.
        """
        if key == "terminate_session":
            if value not in {"0", "1"}:
                raise RuntimeError(f"terminate_session key value unexpected: {value}")
            self._terminated = value == "1"

    def fork(self) -> "Generator":
        """Return a second generator over the same sequence; costs no forward pass."""
        other = Generator(self._model, self._params)
        other._sampling = self._sampling
        other.restore(self.checkpoint())
        return other

    def checkpoint(self) -> Checkpoint:
        """Return the place where the sequence stands; costs no forward pass."""
        return Checkpoint(self._own.fork(), self._ended_by)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Come back to a checkpoint of a generator of the same model; it can be come back to again."""
        self._own.close()
        self._own = checkpoint._generator.fork()
        self._ended_by, self._is_full = checkpoint._ended_by, False

    def _compute(self) -> npt.NDArray[np.float32]:
        sequence = self._own.sequence
        self._model.loaded.engine.compute([sequence])
        assert sequence.logits is not None, "compute() leaves the logits known"
        return sequence.logits

    def _banned(self) -> dict[int, float]:
        """Return the bias against tokens that may not come next."""
        banned: set[int] = set()
        if self.token_count() < self._params.min_length:
            banned |= self._model.loaded.engine.eos_token_ids
        if size := self._params.no_repeat_ngram_size:
            banned |= _completions(self._own.sequence.token_ids, size)
        return dict.fromkeys(banned, -np.inf)

    def _require_alive(self) -> None:
        if self._terminated:
            raise RuntimeError("Session in Terminated state, exiting!")


def _completions(ids: list[int], size: int) -> set[int]:
    """Return the tokens that would make the last *size* tokens a row that was there before."""
    end = ids[len(ids) - size + 1 :]
    return {
        ids[start + size - 1]
        for start in range(len(ids) - size + 1)
        if ids[start : start + size - 1] == end
    }


def _flat(tokens: Any) -> list[int]:
    array = np.asarray(tokens.as_numpy() if isinstance(tokens, Tensor) else tokens)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"append_tokens() takes token ids, and these are {array.dtype}")
    if array.ndim > 1 and array.size > array.shape[-1]:
        raise RuntimeError(
            f"These are {array.size // array.shape[-1]} rows of tokens, and a Generator here holds "
            "one sequence: make a Generator for each row."
        )
    return [int(number) for number in array.reshape(-1)]
