"""
Find the calls of tools in what a model writes, while it writes.

What calls look like says a row of `tool_formats`. Each letter is read a bounded number of times, so that
a long reply costs no more per token than a short one. The text within reasoning is not given to the
parser; `ToolFormat.mark` says where a call begins that stands in there. Pure: text in, events out.
"""

import json
from collections.abc import Generator, Iterator

from recollect.text.call_parts import (
    CHANNEL_MARKS,
    CLEARLY_A_MARK,
    HERMES_CALLS,
    LOOKED_AT,
    MOST_OPENING,
    NAME,
    PLAIN_CHANNEL,
    RECIPIENT,
    SILENT,
    SPACE,
    ArgumentsDelta,
    Bare,
    BracedArguments,
    CallEnded,
    CallRules,
    CallStarted,
    Event,
    JsonObject,
    PiecewiseReader,
    PythonArguments,
    Reader,
    TextDelta,
    as_call,
    before_mark,
    braced_arguments,
    escaped,
    held,
    json_value,
    object_opening,
    python_arguments,
)
from recollect.text.tool_formats import HERMES


class ToolCallParser(PiecewiseReader):
    """
    Turns pieces of a reply into events.

    White space around a call belongs to neither call nor text. What looks like a call and is none
    is text. Owned by whoever reads the reply.

    Args:
        id_prefix: What the ids of the calls begin with.
        rules: What calls look like. In the format of Hermes, calls of the tools that are named there
            need no marks where the reply begins with them.

    Invariants:
        1. The events do not depend on how the text falls into pieces, but for how deltas do.
        2. Without a call, the text deltas joined are the pieces joined.
        3. What was told is never taken back.
        4. What `parse_reply` returns for the whole text of a reply that was cut is what the events tell.
    """

    def __init__(self, id_prefix: str, rules: CallRules = HERMES_CALLS) -> None:
        super().__init__()
        self._prefix, self._mark = id_prefix, rules.format.mark
        self._format, self._texts, known = rules.format, rules.texts, rules.names or ()
        may_be_bare = known and (self._format is HERMES or self._format.is_bare)
        self._bare = Bare(self._format, known) if may_be_bare else None
        self._space: list[str] = []  # white space before what comes
        self._calls = 0
        self._after_call = False  # nothing was said since the last one
        self._opening = object_opening(self._format)
        self.end_of_calls = 0
        """After how many characters the last call, and what closes it, ended."""
        self.has_lost_an_opening = False
        """Whether the reply was cut in a call before its name was whole: that is told as nothing."""
        self._reader = self._read()

    @property
    def is_in_text(self) -> bool:
        """Return whether what comes next belongs to no call."""
        return not self._in_calls

    def push(self, piece: str) -> Iterator[Event]:
        """Take more text; yield what it tells."""
        for start in range(0, len(piece), LOOKED_AT):
            self._rest += piece[start : start + LOOKED_AT]
            while (event := next(self._reader, None)) is not None:
                yield event

    def finish(self, *, is_cut: bool = False) -> Iterator[Event]:
        """
        Yield what was held back, now that no more comes.

        Args:
            is_cut: Whether the reply would have gone on. What may be the beginning of a call is then
                no text.
        """
        self._is_over, self._is_cut = True, is_cut
        yield from (event for event in self._reader if event is not None)

    _in_calls = False

    def _read(self) -> Generator[Event | None, None, None]:
        while True:
            if self._bare is not None:
                self._in_calls = True
                while (yield from self._bare_calls(self._bare)):
                    pass
                self._in_calls = False
                if not self._bare.is_anywhere:
                    self._bare = None
            if not (yield from self._text()):
                return
            if self._trail:
                self._in_calls = True
                yield from self._section()
                self._in_calls = False

    def _text(self) -> Reader:
        """Tell text up to a mark or, where calls begin lines, to a line; False: it is over."""
        marks = [one for one in (self._mark, "\n" if self._is_anywhere() else "") if one]
        marks += CHANNEL_MARKS if self._format.kind == "channels" else ()
        while True:
            length, mark = before_mark(self._rest, marks)
            yield from self._say(self._take(length))
            if mark:
                self._take(len(mark))
                if mark == "\n":
                    self._space.append(mark)
                elif mark not in SILENT:
                    self._trail = [mark]
                return True
            kept = len(self._rest)
            if not (yield from self._more()):
                is_mark = self._is_cut and kept >= CLEARLY_A_MARK
                if is_mark:
                    self._lose(kept)
                    self._space.clear()
                yield from self._say_rest()
                return False

    def _is_anywhere(self) -> bool:
        return self._bare is not None and self._bare.is_anywhere

    def _say_rest(self) -> Iterator[Event]:
        """Tell what was held back; white space after a call is nothing."""
        rest = "".join(self._space) + self._take(len(self._rest))
        self._space.clear()
        if rest.strip() or not self._after_call:
            yield from self._tell(rest)

    def _say(self, text: str) -> Iterator[Event]:
        """Tell text, and hold back the white space at its end."""
        said = text.rstrip()
        if said:
            yield from self._tell("".join((*self._space, said)))
            self._space.clear()
        if len(said) < len(text):
            self._space.append(text[len(said) :])

    def _tell(self, text: str) -> Iterator[Event]:
        if text:
            self._after_call = False
            yield TextDelta(text)

    def _no_call(self) -> Reader:
        """Tell as text what was taken since the mark; False: it was no call."""
        text = "".join((*self._space, *self._trail))
        self._space.clear()
        self._trail.clear()
        if self._is_cut and self._ran_out:
            self._lose(len(self._rest))
        else:
            yield from self._tell(text)
        return False

    def _lose(self, length: int) -> None:
        """Take the beginning of a call of which no more comes."""
        self._take(length)
        self.has_lost_an_opening = True

    def _start(self, name: str) -> CallStarted:
        self._calls += 1
        self._space.clear()
        self._trail.clear()
        return CallStarted(self._calls - 1, f"{self._prefix}{self._calls - 1}", name)

    def _given(self, text: str) -> Iterator[Event]:
        if text:
            yield ArgumentsDelta(self._calls - 1, text)

    def _end(self) -> CallEnded:
        self._after_call, self.end_of_calls = True, self._taken
        return CallEnded(self._calls - 1)

    def _section(self) -> Reader:
        """Read what follows the mark of calls, up to where text goes on."""
        form = self._format
        if not (yield from self._words(form.opening if form.kind != "channels" else "")):
            return (yield from self._no_call())
        is_first = True
        while True:
            if not (yield from self._words(form.head)):
                if is_first:
                    return (yield from self._no_call())
                break
            if not (yield from self._call()):
                break
            is_first = False
            if form.between is None:
                break
            if form.between.strip() and not (yield from self._word(form.between.strip())):
                break
        if form.closing and not is_first:
            yield from self._close()
        return True

    def _close(self) -> Generator[Event | None, None, None]:
        """Take what closes a section, where it is there."""
        if self._format.kind == "object" and self._format.between is None:
            return  # the call has taken it
        if (yield from self._words(self._format.closing)):
            self.end_of_calls = self._taken
        self._trail.clear()

    # Calls, each kind in its way.

    def _call(self) -> Reader:
        """Read one call; False: there is none, or it is not whole."""
        kind = self._format.kind
        if kind in ("object", "named"):
            return (yield from (self._object() if kind == "object" else self._named()))
        if kind in ("elements", "channels"):
            return (yield from (self._elements() if kind == "elements" else self._channel()))
        return (yield from self._scanned())

    def _object(self) -> Reader:
        """Read a call that is a JSON object."""
        closing = self._format.closing.strip() if self._format.between is None else ""
        while not (opening := self._opening.match(self._rest[:MOST_OPENING])):
            if closing and closing in self._rest:
                return (yield from self._unusual(closing))
            if len(self._rest) >= MOST_OPENING or not (yield from self._more()):
                return (yield from self._unusual(closing))
        self._take(opening.end())
        yield self._start(json.loads(opening["name"], strict=False))
        if not (yield from self._json()):
            return False
        return (yield from self._end_of_object(closing))

    def _end_of_object(self, closing: str) -> Reader:
        """Pass over what is left of a call whose arguments are whole."""
        if closing:
            yield from self._up_to(closing)  # only the mark may be missing
        else:
            yield from self._whole_object(JsonObject(depth=1))
        yield self._end()
        return True

    def _unusual(self, closing: str) -> Reader:
        """Read a call whose name does not come first."""
        if closing:
            body, is_there = yield from self._up_to(closing)
            self._trail.append(body + (closing if is_there else ""))
        else:
            space = len(self._rest) - len(self._rest.lstrip(SPACE))
            self._trail.append(self._take(space))
            if not self._rest.startswith("{"):
                return (yield from self._no_call())
            body, is_there = yield from self._whole_object(JsonObject())
            self._trail.append(body)
        call = as_call(body, self._format.keys) if is_there else None
        if call is None:
            return (yield from self._no_call())
        name, arguments = call
        yield self._start(name)
        yield from self._given(arguments)
        yield self._end()
        return True

    def _json(self) -> Reader:
        """Tell the arguments, a JSON object that begins here; False: it is not whole."""
        whole = JsonObject()
        while True:
            yield from self._given(self._take(whole.length_in(self._rest)))
            if whole.closed:
                return True
            if not (yield from self._more()):
                return False

    def _name(self, separator: str) -> Generator[Event | None, None, str | None]:
        """Take the name of a tool and what follows it; None: there is none."""
        first = separator.split()[:1]
        while True:
            rest = self._rest.lstrip(SPACE)
            name = NAME.match(rest)
            is_whole = name is not None and len(name[0]) < len(rest)
            if is_whole or (rest and name is None) or len(rest) > MOST_OPENING:
                break
            if not (yield from self._more()):
                break
        if name is None or (not is_whole and not self._is_over):
            return None
        self._trail.append(self._take(len(self._rest) - len(rest) + len(name[0])))
        if first and not (yield from self._words(separator)):
            return None
        return name[0]

    def _named(self) -> Reader:
        """Read a name, and arguments as JSON."""
        separator = self._format.separator
        name = yield from self._name("")
        if name is None:
            return (yield from self._no_call())
        mark = ":" if self._format.is_numbered else "[CALL_ID]"
        if (yield from self._word(mark)):
            yield from self._name("")
        if not (yield from self._words(separator)):
            return (yield from self._no_call())
        return (yield from self._arguments_of(name))

    def _arguments_of(self, name: str) -> Reader:
        """Read the arguments of a call as JSON, and what closes it."""
        while not (rest := self._rest.lstrip(SPACE)):
            if not (yield from self._more()):
                break
        if not rest.startswith("{"):
            return (yield from self._no_call())
        self._take(len(self._rest) - len(rest))
        yield self._start(name)
        if not (yield from self._json()):
            return False
        yield self._end()
        if (yield from self._words(self._format.tail)):
            self.end_of_calls = self._taken
        self._trail.clear()
        return True

    def _channel(self) -> Reader:
        """Read the head of a message in a channel: a call, or text whose head is no text."""
        head, is_there = yield from self._up_to("<|message|>", most=MOST_OPENING)
        to = RECIPIENT.search(self._trail[0] + head)
        self._trail.append(head + ("<|message|>" if is_there else ""))
        if not is_there or to is None:
            if is_there and PLAIN_CHANNEL.fullmatch(head.strip()):
                self._trail.clear()
                return False
            return (yield from self._no_call())
        return (yield from self._arguments_of(to["name"]))

    def _elements(self) -> Reader:
        """Read a name, and an element for each argument."""
        form = self._format
        before = form.parameter[0].strip()
        name = yield from self._name(form.separator)
        if name is None:
            return (yield from self._no_call())
        texts, count = self._texts.get(name), 0
        # It is a call where an argument follows, or the end of the call.
        closing = (form.tail + form.closing).split()[0]
        has_one = yield from self._word(before)
        if not has_one and not (yield from self._word(closing)):
            return (yield from self._no_call())
        yield self._start(name)
        yield from self._given("{")
        while has_one:
            if not (yield from self._element(texts, count)):
                return False
            count += 1
            has_one = yield from self._word(before)
            if not has_one and not (yield from self._word(closing)) and self._is_over:
                return False
        yield from self._given("}")
        yield self._end()
        for word in (form.tail + ("" if form.between is not None else form.closing)).split()[1:]:
            if (yield from self._word(word)):
                self.end_of_calls = self._taken
        self._trail.clear()
        return True

    def _element(self, texts: frozenset[str] | None, count: int) -> Reader:
        """Tell an argument, of which there were *count* before; False: it is not whole."""
        form = self._format
        middle, _, behind = form.parameter[1].strip().partition("{}")
        key, is_there = yield from self._up_to(middle.split()[0])
        if not is_there or not (yield from self._words(" ".join(middle.split()[1:]))):
            return False
        is_text = None if texts is None else key in texts
        if form.kinds[0]:
            is_text = yield from self._word(form.kinds[0])
            is_known = is_text or (yield from self._word(form.kinds[1]))
            if not (is_known and (yield from self._words(behind))):
                return False
        yield from self._given(f"{', ' if count else ''}{json.dumps(key, ensure_ascii=False)}: ")
        return (yield from self._value(form.parameter[2].strip(), is_text))

    def _value(self, end: str, is_text: bool | None) -> Reader:
        """Tell the value of an argument as JSON; False: it is not whole."""
        _, middle, closing = self._format.parameter
        if middle.endswith("\n"):
            while not self._rest and (yield from self._more()):
                pass
            if self._rest.startswith("\n"):
                self._take(1)
        has_feed = closing.startswith("\n")
        if not is_text:
            value, is_there = yield from self._up_to(end, feed=has_feed)
            yield from self._given(json_value(value, is_text) if is_there else "")
            return is_there
        yield from self._given('"')
        while True:
            place = self._rest.find(end)
            if place >= 0:
                value = self._take(place)
                self._take(len(end))
                value = value[:-1] if has_feed and value.endswith("\n") else value
                yield from self._given(escaped(value) + '"')
                return True
            kept = held(self._rest, end)
            if has_feed and self._rest[: len(self._rest) - kept].endswith("\n"):
                kept += 1
            yield from self._given(escaped(self._take(len(self._rest) - kept)))
            if not (yield from self._more()):
                self._take(len(self._rest))  # the beginning of the mark
                return False

    def _scanned(self) -> Reader:
        """Read a call whose arguments are known when they are whole: as Python has it, or in braces."""
        quote = self._format.quote
        name = yield from self._name("{" if quote else "(")
        if name is None:
            return (yield from self._no_call())
        scan = BracedArguments(quote) if quote else PythonArguments()
        parts = list[str]()
        while True:
            parts.append(scan.taken_from(self._rest))
            self._trail.append(self._take(scan.length))
            if scan.closed or not (yield from self._more()):
                break
        text = "".join(parts)
        read = braced_arguments(text, quote) if quote else python_arguments(text)
        arguments = read if scan.closed else None
        if scan.closed and arguments is None:
            return (yield from self._no_call())
        if arguments is None and not self._is_cut:
            return (yield from self._no_call())
        yield self._start(name)
        if arguments is None:
            return False
        yield from self._given(arguments)
        yield self._end()
        return True

    def _bare_calls(self, bare: Bare) -> Reader:
        """Read a call without marks; False: there is none here."""
        while True:
            lead = bare.after.match(self._rest) if self._after_call else None
            rest = self._rest[lead.end() :] if lead is not None else self._rest
            if not bare.may_begin(rest):
                break
            if not (yield from self._more()):
                if self._is_cut and bare.is_clear(rest):
                    self._lose(len(self._rest))
                elif lead is not None:
                    self._take(lead.end())
                return False
        opening = bare.opening(rest)
        if lead is not None and not (bare.is_anywhere and opening is None):
            self._take(lead.end())
        if opening is None:
            return False
        if bare.is_python:
            self._trail = [self._take(opening.end())]
            return (yield from self._python_list())
        self._take(opening.end())
        yield self._start(opening["name"])
        if not (yield from self._json()):
            return False
        yield from self._word("}")
        self._trail.clear()
        yield self._end()
        return True

    def _python_list(self) -> Reader:
        """Read the calls of a list that stands without marks."""
        while (yield from self._scanned()):
            if not (yield from self._word(",")):
                yield from self._close()
                return True
        return False
