"""
`GeneratorParams`: the search options, their names, defaults and types.

Holds values and refuses wrong ones in the original's words; does not choose tokens.
"""

from typing import Any, Final

from recollect.og.model import Model
from recollect.types import SamplingParams

Option = float | bool

_DEFAULTS: Final[dict[str, Option]] = {
    "batch_size": 1.0,
    "chunk_size": 0.0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 0.0,  # the context length, which a model tells
    "min_length": 0.0,
    "no_repeat_ngram_size": 0.0,
    "num_beams": 1.0,
    "num_return_sequences": 1.0,
    "past_present_share_buffer": True,
    "random_seed": -1.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50.0,
    "top_p": 1.0,
}
_INTEGERS: Final = {
    "batch_size",
    "chunk_size",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "random_seed",
    "top_k",
}
_ONE_SEQUENCE: Final = ("batch_size", "num_beams", "num_return_sequences")


class GeneratorParams:
    """How a `Generator` chooses tokens, and how long its sequence may be."""

    def __init__(self, model: Model) -> None:
        self._context_length = model.loaded.context_length
        self._options: dict[str, Option] = {**_DEFAULTS, "max_length": float(self._context_length)}
        known = {name: value for name, value in model.search_defaults.items() if name in _DEFAULTS}
        self.set_search_options(**known)

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
        for name in _ONE_SEQUENCE:
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
    if name in _INTEGERS and value != int(value):
        raise RuntimeError(f"Field '{name}' value {value} is not an integer")
    return value if wants_bool else float(value)
