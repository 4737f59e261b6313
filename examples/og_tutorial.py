"""
A script as tutorials for ONNX Runtime GenAI have it: one generator, kept from turn to turn.

    python examples/og_tutorial.py MODEL [--original] [--lengths 2048 256 256 128]

MODEL is whatever recollect loads; with `--original`, which imports onnxruntime_genai instead and
changes nothing else, it is an ONNX GenAI folder.
"""

import argparse
import importlib
import json
import time
from typing import Any

QUESTIONS = (
    "My name is Alex, and I work as a data scientist.",
    "What is my name?",
    "What do I work as?",
)
MOST_NEW_TOKENS = 120
TEXT = "The harbour lies at the end of a long bay, and the road to it follows the river. "


class Tutorial:
    """What every part of the tutorial uses: the module, a model and its tokenizer."""

    def __init__(self, og: Any, model: str) -> None:
        self.og = og
        self.model = og.Model(model)
        self.tokenizer = og.Tokenizer(self.model)

    def generator(self, max_length: int, **options: Any) -> Any:
        """Return a new generator."""
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=max_length, **options)
        return self.og.Generator(self.model, params)

    def answer(self, generator: Any, question: str) -> str:
        """Append a question and return the answer: the new tokens, sliced from the sequence."""
        messages = json.dumps([{"role": "user", "content": question}])
        generator.append_tokens(self.tokenizer.encode(self.tokenizer.apply_chat_template(messages)))
        start = generator.token_count()
        while not generator.is_done() and generator.token_count() - start < MOST_NEW_TOKENS:
            generator.generate_next_token()
        text: str = self.tokenizer.decode(generator.get_sequence(0)[start:])
        return text

    def conversation(self) -> None:
        """Hold a conversation, then go back to the first answer and ask the second question again."""
        generator = self.generator(2048)
        ends, answers = [], []
        for question in QUESTIONS:
            answers.append(self.answer(generator, question))
            ends.append(generator.token_count())
            print(f"> {question}\n{answers[-1]}\n")
        generator.rewind_to(ends[0])
        again = self.answer(generator, QUESTIONS[1])
        print(f"rewound> {QUESTIONS[1]}\n{again}\n")
        print(f"the same answer after the rewind: {again == answers[1]}")

    def benchmark(self, lengths: tuple[int, int, int, int]) -> None:
        """Time the second of two turns: with the first one prefilled again, and with it kept."""
        tokens_in, tokens_out, tokens_in2, tokens_out2 = lengths
        ids = self.tokenizer.encode(TEXT)
        prompt = [int(ids[n % len(ids)]) for n in range(tokens_in)]
        prompt2 = [int(ids[n % len(ids)]) for n in range(tokens_in2)]
        for keep in (False, True):
            # min_length keeps the model from ending early, so that all replies have one length.
            generator = self.generator(sum(lengths), min_length=sum(lengths))
            self._timed(generator, prompt, tokens_out)
            new = prompt2
            if not keep:
                new = [*generator.get_sequence(0).tolist(), *prompt2]
                generator = self.generator(sum(lengths), min_length=sum(lengths))
            first, whole = self._timed(generator, new, tokens_out2)
            name = "kept" if keep else "prefilled again"
            print(f"second turn, {name}: first token {first:.2f} s, all {whole:.2f} s")

    def _timed(self, generator: Any, tokens: list[int], new_tokens: int) -> tuple[float, float]:
        begun = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        first = time.perf_counter() - begun
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return first, time.perf_counter() - begun


def main() -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[1])
    parser.add_argument("model")
    parser.add_argument("--original", action="store_true")
    parser.add_argument("--lengths", type=int, nargs=4, default=[2048, 256, 256, 128])
    arguments = parser.parse_args()
    og = importlib.import_module("onnxruntime_genai" if arguments.original else "recollect.og")
    tutorial = Tutorial(og, arguments.model)
    tutorial.conversation()
    tutorial.benchmark(tuple(arguments.lengths))


if __name__ == "__main__":
    main()
