"""
The libraries that the same cases are run against: the original, and recollect.og on each runtime.

Converting the model takes the extra `convert`; without it the cases on ONNX folders are skipped.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.models.onnx_folder import Precision

QUESTION = "What is 2+2? Answer with one number."


@dataclass
class Library:
    """One of the two modules with a model that it has loaded; typed as loosely as scripts use it."""

    name: str
    og: Any
    model: Any

    @property
    def is_original(self) -> bool:
        return self.name == "original"

    def generator(self, **options: object) -> Any:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(**{"max_length": 400, **options})
        return self.og.Generator(self.model, params)

    def tokenizer(self) -> Any:
        return self.og.Tokenizer(self.model)

    def prompt(self, question: str = QUESTION) -> np.ndarray:
        tokenizer = self.tokenizer()
        messages = json.dumps([{"role": "user", "content": question}])
        ids: np.ndarray = tokenizer.encode(tokenizer.apply_chat_template(messages))
        return ids

    def fresh_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the oracle: the logits after one prefill that finds nothing computed before."""
        if self.is_original:
            generator = self.generator(max_length=600)
            generator.append_tokens(ids)
            output: np.ndarray = generator.get_output("logits")[0, -1]
            return output
        engine = self.model.loaded.engine
        fresh = engine.new_sequence(namespace=None)
        fresh.append(ids.tolist())
        engine.compute([fresh])
        logits: np.ndarray = fresh.logits
        fresh.release()
        return logits


def ours(name: str, where: str | Path) -> Library:
    og: Any = importlib.import_module("recollect.og")
    return Library(name, og, og.Model(where, profile="exact"))


def original(folder: Path) -> Library:
    og: Any = pytest.importorskip("onnxruntime_genai")
    return Library("original", og, og.Model(str(folder)))


@pytest.fixture(scope="session")
def make_library(
    onnx_folder: Callable[[Precision], Path],
) -> Iterator[Callable[[str], Library]]:
    """Return a maker of libraries by name; each is loaded once."""
    made: dict[str, Library] = {}

    def make(name: str) -> Library:
        if name not in made:
            if name == "reference":
                made[name] = ours(name, "reference")
            elif name == "openvino":
                made[name] = ours(name, "smollm2")
            elif name == "genai":
                made[name] = ours(name, onnx_folder("fp32"))
            else:
                made[name] = original(onnx_folder("fp32"))
        return made[name]

    yield make
    for library in made.values():
        if not library.is_original:
            library.model.loaded.engine.check()
            library.model.close()


WITH_WEIGHTS = [
    pytest.param(name, marks=pytest.mark.model) for name in ("openvino", "genai", "original")
]


@pytest.fixture(params=["reference", *WITH_WEIGHTS])
def library(request: pytest.FixtureRequest, make_library: Callable[[str], Library]) -> Library:
    """Return each library in turn."""
    return make_library(request.param)


@pytest.fixture(params=WITH_WEIGHTS)
def with_weights(request: pytest.FixtureRequest, make_library: Callable[[str], Library]) -> Library:
    """Return each library that says something sensible."""
    return make_library(request.param)


@pytest.fixture(params=["reference", *WITH_WEIGHTS[:-1]])
def own(request: pytest.FixtureRequest, make_library: Callable[[str], Library]) -> Library:
    """Return recollect.og on each runtime."""
    return make_library(request.param)
