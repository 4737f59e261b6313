"""
`Generator`: continuous decoding in the original's words.

Owns one generator of recollect's; used from one thread at a time, as there.
"""

import secrets
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from recollect.engine.sampling import Generator as OwnGenerator
from recollect.og.errors import as_runtime_error
from recollect.og.model import Model
from recollect.og.params import GeneratorParams
from recollect.og.tokenizer import Ids, Tensor

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
        if key != "terminate_session":
            return
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
        self._ended_by = checkpoint._ended_by
        self._is_full = False

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
        size = self._params.no_repeat_ngram_size
        if size:
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
    ids: list[int] = array.reshape(-1).tolist()
    return ids
