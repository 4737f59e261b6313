"""Texts that may repeat themselves, as people ask for them: none of them has run away."""

from collections.abc import Callable, Iterator
from typing import Final

_DAYS: Final = (
    "a partridge in a pear tree",
    "two turtle doves",
    "three French hens",
    "four calling birds",
    "five golden rings",
    "six geese a-laying",
    "seven swans a-swimming",
    "eight maids a-milking",
    "nine ladies dancing",
    "ten lords a-leaping",
    "eleven pipers piping",
    "twelve drummers drumming",
)
_ORDINALS: Final = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)
_NAMES: Final = (
    "id",
    "name",
    "email",
    "phone",
    "street",
    "city",
    "country",
    "zip",
    "created",
    "updated",
    "deleted",
    "owner",
    "status",
    "role",
    "team",
    "title",
    "body",
    "color",
    "width",
    "height",
    "depth",
    "weight",
    "price",
    "stock",
    "unit",
    "tax",
    "discount",
    "total",
    "currency",
    "note",
)
_VERSES: Final = (
    "The morning came up slowly over the harbour wall,\nthe boats were lying quiet, no wind to speak of "
    "at all,\nand somewhere in a kitchen a radio began to play\na song about the summer from very far "
    "away.",
    "We walked along the water with our shoes tied at our sides,\nand counted all the pebbles that were "
    "left there by the tides,\nyou told me of a city where nobody ever sleeps,\nand I told you of a "
    "garden and the secrets that it keeps.",
    "The evening laid its shadows on the windows of the town,\nthe swallows wrote their letters to the "
    "sun as it went down,\nand someone closed the shutters, and someone lit a light,\nand all the "
    "little lanterns were sailing through the night.",
    "Now years have gone behind us like the trains behind the hill,\nthe harbour and the kitchen and "
    "the garden are there still,\nand when I hear that radio, whoever turns it on,\nI know the summer "
    "stays with us when all its days are gone.",
    "So pour another coffee and come sit a while with me,\nthe boats are going out again, there's wind "
    "upon the sea,\nand if you have forgotten how the melody goes on,\njust hum along beside me till "
    "the last of it is gone.",
)
_REFRAIN: Final = (
    "Oh summer, stay a little, don't you hurry down the lane,\nthe road is long and dusty and it won't "
    "be here again,\noh summer, stay a little, let the evening be long,\nand leave us when you leave us "
    "with the ending of a song."
)


def _bottles() -> Iterator[str]:
    for n in range(99, 0, -1):
        after = n - 1 or "no more"
        yield (
            f"{n} bottles of beer on the wall, {n} bottles of beer.\n"
            f"Take one down and pass it around, {after} bottles of beer on the wall.\n"
        )


def _christmas() -> Iterator[str]:
    for n, ordinal in enumerate(_ORDINALS):
        lines = [f"On the {ordinal} day of Christmas my true love gave to me"]
        lines += list(reversed(_DAYS[1 : n + 1]))
        lines.append(("and " if n else "") + _DAYS[0])
        yield ",\n".join(lines) + ".\n"


def _tests() -> Iterator[str]:
    yield "import unittest\n\nfrom text import reverse\n\n\nclass TestReverse(unittest.TestCase):\n"
    for word in _NAMES:
        yield (
            f"    def test_reverse_{word}(self):\n"
            f'        """The word {word} is reversed."""\n'
            f'        result = reverse("{word}")\n'
            f'        self.assertEqual(result, "{word[::-1]}")\n\n'
        )


def _accessors() -> Iterator[str]:
    yield "public class Customer {\n"
    for name in _NAMES:
        title = name.capitalize()
        yield (
            f"    private String {name};\n\n"
            f"    public String get{title}() {{\n        return this.{name};\n    }}\n\n"
            f"    public void set{title}(String {name}) {{\n        this.{name} = {name};\n    }}\n\n"
        )
    yield "}\n"


def _multiplication() -> Iterator[str]:
    for a in range(1, 13):
        yield f"## Table of {a}\n\n"
        yield from (f"{a} x {b} = {a * b}\n" for b in range(1, 13))
        yield "\n"


def _records() -> Iterator[str]:
    yield "[\n"
    for n, name in enumerate(_NAMES * 2, 1):
        yield (
            f'  {{\n    "id": {n},\n    "name": "{name}",\n    "active": true,\n'
            f'    "tags": [],\n    "parent": null,\n    "score": {n * 37 % 101}\n  }},\n'
        )
    yield "]\n"


def _table() -> Iterator[str]:
    yield "| # | field | type | required | default | description |\n|---|---|---|---|---|---|\n"
    for n, name in enumerate(_NAMES, 1):
        yield f"| {n} | `{name}` | string | no | none | The {name} of the customer. |\n"


def _inserts() -> Iterator[str]:
    for n, name in enumerate(_NAMES * 2, 1):
        statement = "INSERT INTO fields (id, name, type, required) VALUES"
        yield f"{statement} ({n}, '{name}', 'text', false);\n"


def _song() -> Iterator[str]:
    for verse in _VERSES:
        yield f"{verse}\n\n{_REFRAIN}\n\n"


def _meetings() -> Iterator[str]:
    for day in range(1, 32):
        yield f"2026-05-{day:02} 09:00 Stand-up, 15 minutes\n2026-05-{day:02} 12:30 Lunch\n"


def _styles() -> Iterator[str]:
    for n, name in enumerate(_NAMES, 1):
        yield f".{name} {{\n  margin: 0;\n  padding: 0;\n  width: {n * 10}px;\n  color: #fff;\n}}\n\n"


def _dated_inserts() -> Iterator[str]:
    for n in range(1, 80):
        times = "'2024-01-01 00:00:00', '2024-01-01 00:00:00', '2024-01-01 00:00:00'"
        statement = "INSERT INTO users (id, name, at) VALUES"
        yield f"{statement} ({n}, 'User{n}', {times}, TRUE);\n"


def _things() -> Iterator[str]:
    for n in range(1, 80):
        yield (
            f'  {{\n    "id": {n},\n    "price": 9.99,\n    "in_stock": true,\n    "tags": ["a", "b"],\n'
            '    "size": {"width": 10, "height": 10, "depth": 10}\n  },\n'
        )


def _firewall() -> Iterator[str]:
    for n in range(120):
        yield (
            f"Nov 27 10:{n // 60:02}:{n % 60:02} host kernel: [BLOCK] IN=eth0 OUT= "
            "MAC=01:00:5e:00:00:fb:ac:9e:17:aa:bb:cc:08:00 SRC=192.0.2.1 DST=224.0.0.251 LEN=32\n"
        )


_FILLER: Final = (
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore "
    "et dolore magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut "
    "aliquip ex ea commodo consequat."
)
_BOX: Final = f'  <div class="card">\n    <h2>Title</h2>\n    <p>{_FILLER}</p>\n  </div>\n'


TEXTS: Final[dict[str, Callable[[], str]]] = {
    "99 bottles of beer": lambda: "".join(_bottles()),
    "the twelve days of Christmas": lambda: "".join(_christmas()),
    "a song with a refrain": lambda: "".join(_song()),
    "unit tests": lambda: "".join(_tests()),
    "accessors": lambda: "".join(_accessors()),
    "tables of multiplication": lambda: "".join(_multiplication()),
    "JSON records": lambda: "".join(_records()),
    "a table in Markdown": lambda: "".join(_table()),
    "INSERT statements": lambda: "".join(_inserts()),
    "a diary of meetings": lambda: "".join(_meetings()),
    "style sheets": lambda: "".join(_styles()),
    "numbers to a thousand": lambda: ", ".join(map(str, range(1, 1001))),
    "numbers, one a line": lambda: "\n".join(map(str, range(1, 501))),
    "an identity matrix": lambda: "\n".join(
        "[" + ", ".join(str(int(a == b)) for b in range(12)) + "]," for a in range(12)
    ),
    "a larger one": lambda: "\n".join(
        "[" + ", ".join(str(int(a == b)) for b in range(30)) + "]," for a in range(30)
    ),
    "INSERT statements with times": lambda: "".join(_dated_inserts()),
    "JSON with numbers": lambda: "".join(_things()),
    "a log of a firewall": lambda: "".join(_firewall()),
    "bytes that are zero": lambda: "".join(
        f"{n * 16:08x}  {'00 ' * 16} |{'.' * 16}|\n" for n in range(48)
    ),
    "an empty board": lambda: ("+---" * 8 + "+\n" + "|   " * 8 + "|\n") * 12,
    "a hundred zeros": lambda: "[" + ", ".join("0" * 100) + "]",
    "a word a hundred times": lambda: "hello " * 100,
    "a sentence two dozen times": lambda: "I will not talk in class again.\n" * 24,
    "a page with filler text in six boxes": lambda: "<main>\n" + _BOX * 6 + "</main>\n",
    "six paragraphs of filler text": lambda: (_FILLER + "\n\n") * 6,
    "a paragraph three times": lambda: (_VERSES[0] + "\n\n") * 3,
    "rules between sections": lambda: "".join(
        f"{'-' * 80}\nSection {n}: {name}\n{'-' * 80}\n\nAbout {name}.\n\n"
        for n, name in enumerate(_NAMES, 1)
    ),
}
"""What it is, to its text."""
