"""The backlog: its file, its items and the rules they obey.

BACKLOG.yaml belongs to the operator, who may edit it at any time, and to the orchestrator, which
writes it at every decision. So it is never rendered anew: the lines of the file are the truth, a
save replaces the lines of changed keys and nothing else, and what somebody else has saved in the
meantime is read and merged first. A file that does not parse is never written to.

Reading order:

 1. The YAML subset: what it is, and its one error
 2. From bytes to lines
 3. Scalars
 4. The reader
 5. The writer
 6. Surgical edits
 7. The backlog file as a document
 8. Items
 9. Reading a backlog file
10. Drafts and rules
11. What a phase decides
12. Filters
13. Worklog
14. Store

Chapters 1 to 6 know nothing of backlogs, 8 to 12 nothing of files; `Store` puts the two together
and is the only code that writes BACKLOG.yaml.
"""

from __future__ import annotations

import fcntl
import gc
import os
import re
import stat
import sys
import time
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import pairwise, takewhile

# `typing` is for type checkers alone: to import it, and to let it compile every annotation of a
# record, would double the time of importing this module. Hence the two stand-ins.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path
    from typing import Literal, NoReturn, TypedDict
    from typing import NamedTuple as _Record
    from typing import cast as _cast
else:

    def _cast(_type, value):
        return value

    class _RecordType(type):
        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            defaults = [body.pop(field) for field in fields if field in body]
            base = namedtuple(name, fields, defaults=defaults)
            return type(name, (base,), {"__slots__": (), **body})

    class _Record(metaclass=_RecordType):
        """Base of what is a `typing.NamedTuple` to type checkers, and works like one."""


# ==== 1. The YAML subset: what it is, and its one error ===========================================
#
# Accepted documents mean exactly what YAML 1.2 (core schema) says; everything else is refused by
# name. The grammar, in the order of the methods of `_YamlReader`:
#
#   document   comments, at most one bare `---`, then nothing, a block collection in column 1,
#              `[]`, `{}` or a one-line flow list
#   mapping    `key:` + value, all keys in one column; keys are strings, plain or quoted, one line
#   sequence   `- ` + value, or a mapping or sequence that starts behind the dash
#   value      nothing (null), a deeper block collection, or a scalar:
#   plain      one line, or folded over deeper lines
#   quoted     'single' or "double", one line, or folded over deeper lines
#   block      `|` literal or `>` folded, with `-`, `+` and an indentation digit
#   flow       `[]`, `{}` or `[a, 'b', "c"]` on one line
#
# Numbers look as in JSON; other forms, and line breaks, that parsers read differently are refused.

# The usual order of an item's keys; new keys of an item are put where this wants them.
ITEM_KEYS = (
    "id", "title", "status", "phase", "size", "complexity", "risk", "impact",
    "requires_human_review", "origin", "blocked_from_status", "blocked_reason", "blocked_type",
    "unblock_context", "tags", "dependencies", "created", "updated", "pipeline_type",
    "description", "phase_pool", "guardrail_override", "priority", "attempts",
)  # fmt: skip
_TOP_KEYS = ("schema_version", "items", "next_item_id")

_YAML_MAX_BYTES = 64 * 1024 * 1024
_YAML_MAX_DEPTH = 32
_YAML_MAX_KEY = 1_000  # characters; YAML itself stops at 1,024
_YAML_MAX_DIGITS = 15  # more do not survive a reader that takes numbers for doubles
_YAML_MEMO = 32  # longest text kept in a memo: bounds the memory that hostile input can take


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`pattern`, compiled when it is first used: all of them would double the time of importing."""
    return re.compile(pattern)


class YamlError(ValueError):
    """A YAML text that cannot be used; `str()` is `SOURCE:LINE:COLUMN: PROBLEM`.

    `line` and `column` count from 1, columns in characters; `problem` names the construct and
    says what to write instead.
    """

    def __init__(self, source: str, line: int, column: int, problem: str) -> None:
        super().__init__(f"{source}:{line}:{column}: {problem}")
        self.source = source
        self.line = line
        self.column = column
        self.problem = problem


def parse_yaml(data: bytes, source: str = "<yaml>") -> object:
    """Read one document into dicts, lists, strings, ints, floats, bools and None.

    An empty document is None. `source` is only used in messages. Raises YamlError, and nothing
    else, for everything that is not in the subset; takes time and memory linear in `data`.
    """
    with _yaml_opened(data, source) as (reader, _):
        return reader.document()


@contextmanager
def _yaml_opened(data: bytes, source: str) -> Iterator[tuple[_YamlReader, _YamlFile]]:
    """A reader of `data`, and the file as decoded, with the cycle collector off.

    It would walk all that was read so far again and again, for nothing: plain values hold no
    cycles. That costs half of the time at 10,000 items.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        file = _yaml_decode(data, source)
        yield _YamlReader(file.lines, source), file
    finally:
        if collecting:
            gc.enable()


# ==== 2. From bytes to lines ======================================================================

_YAML_BOM = b"\xef\xbb\xbf"
_YAML_USUAL_BYTES = bytes([9, 10, *range(0x20, 0x7F)])
# Not printable in YAML, or a line break for some readers only.
_YAML_UNPRINTABLE = "[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"


class _YamlFile(_Record):
    """A decoded file; `lines` joined by a line break are its text."""

    lines: list[str]  # the last one is "" if the file ends with a line break
    bom: bool
    newline: bytes  # b"\n" or b"\r\n"


def _yaml_decode(data: bytes, source: str) -> _YamlFile:
    if len(data) > _YAML_MAX_BYTES:
        problem = f"the file is larger than {_YAML_MAX_BYTES >> 20} MiB; archive what is done"
        raise YamlError(source, 1, 1, problem)
    bom = data.startswith(_YAML_BOM)
    if bom:
        data = data[len(_YAML_BOM) :]
    newline = b"\n"
    if b"\r" in data:
        newline = b"\r\n"
        _yaml_check_line_ends(data, source)
        data = data.replace(newline, b"\n")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        problem = f"invalid UTF-8 (byte 0x{byte:02X}); save the file as UTF-8"
        raise _yaml_byte_error(data, error.start, source, problem) from None
    _yaml_check_characters(data, text, source)
    return _YamlFile(text.split("\n"), bom, newline)


def _yaml_check_line_ends(data: bytes, source: str) -> None:
    pairs = data.count(b"\r\n")
    if data.count(b"\r") > pairs:
        place = re.search(rb"\r(?!\n)", data)
        problem = "a lone carriage return is not supported; end lines with LF, or all with CR LF"
    elif data.count(b"\n") > pairs:
        place = re.search(rb"(?<!\r)\n", data)
        problem = "mixed line endings (LF and CR LF) are not supported; use one kind"
    else:
        return
    assert place is not None
    raise _yaml_byte_error(data, place.start(), source, problem)


def _yaml_check_characters(data: bytes, text: str, source: str) -> None:
    # To leave out the usual bytes first is six times as fast as searching the text.
    rest = data.translate(None, _YAML_USUAL_BYTES)
    found = _regex(_YAML_UNPRINTABLE).search(rest.decode()) if rest else None
    if not found:
        return
    bad = found[0]
    name = "a byte order mark inside the text" if bad == "\ufeff" else "this character"
    remedy = f'remove it, or write it as "\\u{ord(bad):04X}" in double quotes'
    problem = f"{name} (U+{ord(bad):04X}) is not supported; {remedy}"
    place = text.index(bad)
    start = text.rfind("\n", 0, place) + 1
    raise YamlError(source, text.count("\n", 0, place) + 1, place - start + 1, problem)


def _yaml_byte_error(data: bytes, place: int, source: str, problem: str) -> YamlError:
    start = data.rfind(b"\n", 0, place) + 1
    column = len(data[start:place].decode(errors="replace")) + 1
    return YamlError(source, data.count(b"\n", 0, place) + 1, column, problem)


# ==== 3. Scalars ==================================================================================

_YAML_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_YAML_NUMBER_START = frozenset("-+.0123456789")
# Written the one way that all parsers read the same: group 1 is the integer part, 2 the rest.
_YAML_NUMBER = r"(-?(?:0|[1-9][0-9]*+))((?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?)"
# Everything that some YAML 1.2 parser takes for a number.
_YAML_NUMBER_LIKE = (
    r"[-+]?(?:(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
    r"|0[bB][01]++|0[oO][0-7]++|0[xX][0-9a-fA-F]++|\.(?:inf|Inf|INF|nan|NaN|NAN))"
)
_YAML_QUOTED = {
    "'": r"(?:[^']++|'')*+",
    '"': r'(?:[^"\\]++|\\.)*+',
}
_YAML_ESCAPE = r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)"
_YAML_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\",
    "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip
_YAML_FLOW_ITEM = (
    r" *+('(?:[^']++|'')*+'|\"(?:[^\"\\]++|\\.)*+\""
    r"|(?!- |-[\],])[A-Za-z0-9_./+-]++(?: [A-Za-z0-9_./+-]++)*+) *+(?=[],])"
)

# What a value or key may not begin with: the construct, and what to do instead.
_YAML_REFUSED = {
    "&": ("an anchor (&)", "write the value out wherever it is needed"),
    "*": ("an alias (*)", "write the value out, or quote the text"),
    "!": ("a tag (!)", "remove it, or quote the text"),
    "%": ("a directive indicator (%)", "remove the directive, or quote the text"),
    "@": ("the reserved indicator @ at the start of a text", "quote the text"),
    "`": ("the reserved indicator ` at the start of a text", "quote the text"),
    ",": ("the flow indicator , at the start of a text", "quote the text"),
    "]": ("the flow indicator ] at the start of a text", "quote the text"),
    "}": ("the flow indicator } at the start of a text", "quote the text"),
    "[": ("a flow sequence in this place", "write it behind its key or dash, or quote the text"),
    "{": ("a flow mapping in this place", 'write "key: value" lines, or quote the text'),
    "|": ("a block scalar in this place", "write the | behind its key or dash"),
    ">": ("a block scalar in this place", "write the > behind its key or dash"),
}


class _YamlSlow:
    """The type of the one value that says: this text needs the careful reader."""


_YAML_SLOW = _YamlSlow()
_YAML_CAREFUL_START = frozenset(["", *" -+.?:,[]{}#&*!|>%@`\t"])
_YAML_DIGITS = frozenset("0123456789")


class _YamlValues(dict[str, object]):
    """Memo of short texts, as `_yaml_value` takes them, to their values."""

    def __missing__(self, raw: str) -> object:
        value = _yaml_value(raw)
        if len(raw) <= _YAML_MEMO:
            self[raw] = value
        return value


def _yaml_value(raw: str) -> object:
    """The value of what stands behind `key: ` or `- `, up to the end of the line.

    Only the plainest forms get one, whatever they could be mistaken for is _YAML_SLOW.
    """
    first = raw[:1]
    if first in _YAML_CAREFUL_START:
        return _YAML_SLOW
    if first in _YAML_QUOTED:
        closed = raw.find(first, 1) == len(raw) - 1
        return raw[1:-1] if closed and (first == "'" or "\\" not in raw) else _YAML_SLOW
    # One character is found many times as fast as two.
    if ":" in raw:
        if ": " in raw or raw[-1] == ":":
            return _YAML_SLOW
    elif first in _YAML_DIGITS and _regex(_YAML_NUMBER_LIKE).fullmatch(raw):
        return _yaml_number(raw, _YAML_SLOW)
    if ("#" in raw and " #" in raw) or "\t" in raw or raw[-1] == " ":
        return _YAML_SLOW
    return raw


def _yaml_number(text: str, otherwise: object) -> object:
    """The number that `text` is in every parser; `otherwise` if there is no such number."""
    match = _regex(_YAML_NUMBER).fullmatch(text)
    if not match or len(text) > 2 * _YAML_MAX_DIGITS:
        return otherwise
    whole, rest = match.groups()
    if not rest:
        return int(whole) if len(whole.lstrip("-")) <= _YAML_MAX_DIGITS else otherwise
    number = float(text)
    return otherwise if number in (float("inf"), float("-inf")) else number


def _yaml_fold(lines: list[str]) -> str:
    """Join the lines of a folded block scalar.

    A line break becomes a space, except at blank lines and around lines that are indented more.
    """
    parts: list[str] = []
    previous, blank = "", 0
    for line in lines:
        if not line:
            blank += 1
            continue
        if not parts:
            glue = "\n" * blank
        elif line[0] == " " or previous[0] == " ":
            glue = "\n" * (blank + 1)
        else:
            glue = "\n" * blank or " "
        parts += (glue, line)
        previous, blank = line, 0
    return "".join(parts)


def _yaml_text_start(line: str, start: int) -> int:
    """Column of the first character from `start` on that is not a space."""
    return len(line) - len(line[start:].lstrip(" "))


def _yaml_quote_end(line: str, begin: int, quote: str) -> int:
    """Where the closing quote stands of what begins at `begin`, or the end of its text."""
    match = _regex(_YAML_QUOTED[quote]).match(line, begin)
    return match.end() if match else begin


def _yaml_ends_in_backslash(text: str) -> bool:
    """Whether the last backslash of `text` is not itself escaped."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


# ==== 4. The reader ===============================================================================


class _YamlSpan(_Record):
    """Where an entry of a block mapping stands; lines and columns count from 0."""

    start: int  # the line of the key
    end: int  # the line behind the last line of the value
    colon: int
    tail: str  # spaces and comment behind the value (behind the colon, if the value is a block)
    value: object
    block: bool  # the value is a block collection on the lines below


class _YamlReader:
    """Reads lines into values, by recursive descent.

    Every method that reads something starts on line `at` and leaves `at` on the next line that
    holds more than a comment. All columns count from 0; `column` or `parent` is always that of
    the collection which owns what is read: whatever is indented deeper belongs to its entry.
    """

    __slots__ = (
        "at", "complete", "end", "heads", "indent", "keys", "lines", "source", "tail", "values",
    )  # fmt: skip

    def __init__(self, lines: list[str], source: str) -> None:
        """`lines`: as in _YamlFile; all but the last end with a line break."""
        self.complete = not lines[-1]  # the file ends with a line break
        self.lines = lines if self.complete else [*lines, ""]  # always a blank line at the end
        self.source = source
        self.at = 0
        self.indent = 0  # of line `at`; -1: nothing is left
        self.end = 0  # the line behind the last one that was read
        self.tail = ""  # what stood behind the last scalar on its line
        self.values = _YamlValues(_YAML_CONSTANTS)
        # Memo of the text up to `: ` to its key, by column: one hit proves indentation and key.
        # `heads` is for mappings that start behind a dash: there the text begins with the dash.
        self.keys: defaultdict[int, dict[str, str]] = defaultdict(dict)
        self.heads: defaultdict[int, dict[str, str]] = defaultdict(dict)

    def fail(self, line: int, column: int, problem: str, remedy: str) -> NoReturn:
        """Raise for what stands at `column` of `line`; all four go into the message."""
        raise YamlError(self.source, line + 1, column + 1, f"{problem}; {remedy}")

    def refuse(self, line: int, column: int, construct: str, remedy: str) -> NoReturn:
        """Raise for a construct that is not in the subset."""
        self.fail(line, column, f"{construct} is not supported here", remedy)

    # ---- document and lines ----

    def document(self) -> object:
        """Read all lines as one document."""
        self.open()
        if self.indent < 0:
            return None
        value = self._root()
        if self.indent >= 0:
            problem = "this line does not belong to what is above"
            self.fail(self.at, self.indent, problem, "make the file one list or one mapping")
        return value

    def open(self) -> None:
        """Go to the first line with content, past one document start marker."""
        at = self._content(0)
        line = self.lines[at]
        if line[:1] == "%":
            self.refuse(at, 0, "a directive (%)", "remove the line")
        if line[:3] == "---" and line[3:4] in ("", " "):
            if line[3:].lstrip(" ")[:1] not in ("", "#"):
                self.refuse(at, 4, "content on the line of `---`", "move it to the next line")
            at += 1
        self.seek(at)

    def seek(self, line: int) -> None:
        """All before `line` is read: go to the next line with content."""
        self.end = line
        text = self.lines[line].lstrip(" ")
        if not text or text[0] == "#":
            line = self._content(line)
            text = self.lines[line].lstrip(" ")
        self.at, self.indent = line, len(self.lines[line]) - len(text) if text else -1
        if text[:1] == "\t":
            self.refuse(line, self.indent, "a tab character in indentation", "use spaces")
        if self.indent == 0 and text[:3] in ("---", "...") and text[3:4] in ("", " ", "\t"):
            name = "start" if text[0] == "-" else "end"
            what = f"a document {name} marker ({text[:3]})"
            self.refuse(line, 0, what, "keep one document per file")

    def _content(self, line: int) -> int:
        """The first line from `line` on that is neither blank nor a comment, or the last one."""
        last = len(self.lines) - 1
        while line < last and self.lines[line].lstrip(" ")[:1] in ("", "#"):
            line += 1
        return line

    def _root(self) -> object:
        line = self.lines[self.at]
        if self.indent > 0:
            self.refuse(self.at, self.indent, "an indented document", "start it in column 1")
        if line[0] in "[{":
            return self._flow(0)
        if not self._is_dash(0) and not self._is_entry(0):
            self._check_start(0)
            self.refuse(self.at, 0, "a bare scalar document", 'write "key: value" or "- value"')
        return self._block(0, 1)

    # ---- block collections ----

    def _is_dash(self, column: int) -> bool:
        line = self.lines[self.at]
        return line[column : column + 1] == "-" and line[column + 1 : column + 2] in ("", " ")

    def _is_entry(self, column: int) -> bool:
        """Whether a mapping entry (or what is wrongly written like one) starts at `column`."""
        line = self.lines[self.at]
        first = line[column : column + 1]
        if first in ("'", '"'):
            close = _yaml_quote_end(line, column + 1, first)
            colon = _yaml_text_start(line, close + 1)
            return line[close : close + 1] == first and line[colon : colon + 2] in (":", ": ")
        if first in ("|", ">", "[", "{"):
            return False
        if first in ("?", ":") and line[column + 1 : column + 2] in ("", " "):
            return True
        comment = line.find(" #", column)
        text = line[column:] if comment < 0 else line[column:comment]
        return ": " in text or text.endswith(":")

    def _block(self, column: int, depth: int) -> object:
        """Read the block collection that starts at `column` of line `at`."""
        if self._is_dash(column):
            return self._sequence(column, depth)
        if not self._is_entry(column):
            self._check_start(column)
            what = "a scalar on a line of its own"
            self.refuse(self.at, column, what, "write it behind its key or dash")
        return self._mapping(column, depth)

    def _check_depth(self, column: int, depth: int) -> None:
        if depth > _YAML_MAX_DEPTH:
            what = f"nesting deeper than {_YAML_MAX_DEPTH}"
            self.refuse(self.at, column, what, "flatten the structure")

    def _mapping(self, column: int, depth: int) -> dict[str, object]:
        """Read the mapping whose first key stands at `column` of line `at`."""
        self._check_depth(column, depth)
        first = self.at
        found: dict[str, object] = {}
        memo = (self.keys if self.indent == column else self.heads)[column]
        while not found or self._goes_on(column):
            start = self.at
            at = self._simple_entries(found, memo, column)
            if at > start:
                self.seek(at)
                if self.indent > column:  # the last value goes on: read it again, with care
                    found.popitem()
                    self.seek(at - 1)
                elif not self._goes_on(column):
                    break
            self._entry(found, first, column, depth)
            memo = self.keys[column]
        return found

    def _simple_entries(self, found: dict[str, object], memo: dict[str, str], column: int) -> int:
        """Read entries as long as they are `key: value` on one line in the plainest form.

        This is the loop in which nearly all lines of a backlog are read: no regular expression,
        no look ahead. `memo` is for the first line. Returns the line behind the last entry; a
        value that goes on below shows when that line is looked up.
        """
        lines, keys, values, at = self.lines, self.keys[column], self.values, self.at
        while True:
            left, _, raw = lines[at].partition(": ")
            key = memo.get(left)
            if key is None or key in found:
                return at
            value = values[raw] if len(raw) <= _YAML_MEMO else _yaml_value(raw)
            if value is _YAML_SLOW:
                return at
            found[key] = value
            at += 1
            memo = keys

    def _entry(self, found: dict[str, object], first: int, column: int, depth: int) -> None:
        """Read one entry, of any form, of the mapping that starts on line `first`."""
        key, colon = self._key(column)
        if key in found:
            self._duplicate(key, first, column)
        found[key] = self._value(colon + 1, column, depth, dash_from=column)

    def _goes_on(self, column: int) -> bool:
        """Whether line `at` is the next entry of the mapping at `column`."""
        if self.indent > column:
            self._refuse_deeper(column)
        return self.indent == column

    def _refuse_deeper(self, column: int) -> NoReturn:
        """Raise for line `at`, which is deeper than the entries at `column` before it."""
        where = f"column {self.indent + 1}, theirs is {column + 1}"
        problem = f"this line is indented deeper than its neighbours ({where})"
        self.fail(self.at, self.indent, problem, "align it with them or with the block above")

    def _duplicate(self, key: str, first: int, column: int) -> NoReturn:
        """Raise for the second `key`, on line `at`, of the mapping that starts on line `first`."""
        again = _YamlReader(self.lines, self.source)
        again.seek(first)
        line, other = first, ""
        while other != key:
            line = again.at
            other, colon = again._key(column)
            again._value(colon + 1, column, 1, dash_from=column)
        problem = f"duplicate key {key[:40]!r}, first on line {line + 1}"
        self.fail(self.at, column, problem, "remove one of the two")

    def spans(self, column: int, depth: int) -> dict[str, _YamlSpan]:
        """Read a mapping as `_mapping` does, and say where its entries stand."""
        found: dict[str, _YamlSpan] = {}
        first = self.at
        while True:
            start = self.at
            key, colon = self._key(column)
            if key in found:
                self._duplicate(key, first, column)
            behind = self.lines[start][colon + 1 :]
            value = self._value(colon + 1, column, depth, dash_from=column)
            block = behind.lstrip(" ")[:1] in ("", "#")
            tail = behind if block else self.tail
            found[key] = _YamlSpan(start, self.end, colon, tail, value, block)
            if not self._goes_on(column):
                return found

    def _sequence(self, column: int, depth: int) -> list[object]:
        return [value for value, _ in self.elements(column, depth)]

    def elements(self, column: int, depth: int) -> Iterator[tuple[object, int]]:
        """Read a sequence; per element its value and the line behind it."""
        self._check_depth(column, depth)
        while True:
            yield self._element(column, depth), self.end
            if self.indent > column:
                self._refuse_deeper(column)
            if self.indent < column or not self._is_dash(column):
                return

    def _element(self, column: int, depth: int) -> object:
        """Read one entry of a sequence; its dash stands at `column`."""
        at, line, start = self.at, self.lines[self.at], column + 2
        left, colon, _ = line.partition(": ")
        if colon and left in self.heads[start]:
            return self._mapping(start, depth + 1)
        value = _YAML_SLOW if colon else self.values[line[start:]]
        if value is not _YAML_SLOW:
            self.seek(at + 1)
            if self.indent <= column:
                return value
            self.seek(at)  # a line that goes on below: read all of it with care
        start = _yaml_text_start(line, column + 1)
        if self._is_dash(start):
            return self._sequence(start, depth + 1)
        if line[start : start + 1] not in ("", "#") and self._is_entry(start):
            return self._mapping(start, depth + 1)
        return self._value(start, column, depth, dash_from=column + 1)

    # ---- keys ----

    def _key(self, column: int) -> tuple[str, int]:
        """The key at `column` of line `at`, and the column of its colon."""
        line = self.lines[self.at]
        colon = line.find(": ", column)
        if colon < 0:
            colon = len(line) - 1 if line.endswith(":") else len(line)
        memo = (self.keys if self.indent == column else self.heads)[column]
        key = memo.get(line[:colon]) if colon < len(line) else None
        if key is not None:
            return key, colon
        if line[column] in "'\"":
            key, colon = self._quoted_key(column)
        else:
            key = self._plain_key(column, colon)
        if len(key) > _YAML_MAX_KEY:
            what = f"a key of more than {_YAML_MAX_KEY} characters"
            self.refuse(self.at, column, what, "shorten it")
        if len(key) <= _YAML_MEMO and ": " not in key:
            memo[line[:colon]] = key
        return key, colon

    def _quoted_key(self, column: int) -> tuple[str, int]:
        line = self.lines[self.at]
        if not self._is_entry(column):
            hint = "a quoted key stands on one line with its colon"
            self.fail(self.at, column, 'expected "key: value"', hint)
        close = _yaml_quote_end(line, column + 1, line[column])
        key = self._unquoted(self.at, column + 1, close, line[column])
        return key, _yaml_text_start(line, close + 1)

    def _plain_key(self, column: int, colon: int) -> str:
        at, line = self.at, self.lines[self.at]
        key = line[column:colon].rstrip(" ")
        if self.indent == column and self._is_dash(column):
            remedy = "indent it, or write it directly below its key"
            self.fail(at, column, "a sequence entry among mapping keys", remedy)
        self._check_start(column)
        if ":\t" in line[column:]:
            place = line.index(":\t", column) + 1
            self.refuse(at, place, "a tab character behind a colon", "use spaces, or quote the key")
        if colon == len(line):
            hint = "a text that goes on is indented deeper than its key"
            self.fail(at, column, 'expected "key: value"', hint)
        if not key:
            self.refuse(at, column, "an empty key", 'write "" for an empty key')
        for sign, name in (("\t", "a tab character"), ("#", "`#`"), (":", "`:`")):
            if sign in key:
                what = f"{name} in a plain key"
                self.refuse(at, column + key.index(sign), what, "quote the key")
        if key == "<<":
            self.refuse(at, column, "a merge key (<<)", "write the keys out, or quote it")
        if key[0] in "-?:":
            what = f"a plain key that starts with `{key[0]}`"
            self.refuse(at, column, what, "quote the key")
        if key in _YAML_CONSTANTS or _regex(_YAML_NUMBER_LIKE).fullmatch(key):
            self.fail(at, column, f"the key {key[:40]} is not a string", "quote it")
        return key

    # ---- values ----

    def _value(self, start: int, column: int, depth: int, dash_from: int) -> object:
        """Read what stands behind the colon or dash of an entry, from `start` of line `at` on.

        `dash_from`: the smallest column at which a sequence on the lines below belongs to it.
        """
        line = self.lines[self.at]
        start = _yaml_text_start(line, start)
        first = line[start : start + 1]
        if first in ("", "#"):
            self.seek(self.at + 1)
            if self.indent > column or (self.indent == dash_from and self._is_dash(dash_from)):
                return self._block(self.indent, depth + 1)
            return None
        if first in ("'", '"'):
            return self._quoted(start, column)
        if first in ("|", ">"):
            return self._block_scalar(start, column)
        if first in ("[", "{"):
            return self._flow(start)
        return self._plain(start, column)

    def _check_start(self, column: int) -> None:
        """Raise if no plain text can start at `column` of line `at`."""
        line = self.lines[self.at]
        first, second = line[column], line[column + 1 : column + 2]
        if first == "\t":
            self.refuse(self.at, column, "a tab character between tokens", "use spaces")
        if first in _YAML_REFUSED:
            self.refuse(self.at, column, *_YAML_REFUSED[first])
        if first == "-" and second in ("", " "):
            what = "a sequence entry on the line of its key"
            self.refuse(self.at, column, what, "put it on the next line, or quote the text")
        if first == "?" and second in ("", " "):
            self.refuse(self.at, column, "an explicit key (?)", 'write "key: value"')
        if first == ":" and second in ("", " "):
            self.refuse(self.at, column, "an empty key", 'write "" for an empty key')

    def _plain(self, start: int, parent: int) -> object:
        self._check_start(start)
        at, first = self.at, self.lines[self.at][start]
        if first in "?:":
            what = f"a plain text that starts with `{first}`"
            self.refuse(at, start, what, "quote the text")
        text = self._plain_line(start)
        self.seek(at + 1)
        if self.indent <= parent:
            return self._resolve(text, at, start)
        parts = [text]
        while self.indent > parent:
            gap = self.lines[self.end : self.at]
            if self.tail.strip(" ") or any(line.strip(" ") for line in gap):
                what = "text after a comment inside a multi-line plain scalar"
                self.refuse(self.at, self.indent, what, "move the comment, or quote the text")
            parts += ("\n" * len(gap) or " ", self._continuation())
            self.seek(self.at + 1)
        return "".join(parts)

    def _continuation(self) -> str:
        """A further line of a plain scalar."""
        at, start, line = self.at, self.indent, self.lines[self.at]
        sign = ":" if self._is_entry(start) else ""
        if line[start] in "-?:" and line[start + 1 : start + 2] in ("", " "):
            sign = line[start]
        if sign:
            why = f"this line continues line {self.end}, because it is indented deeper"
            what = f'"{sign} " inside a plain scalar ({why})'
            self.refuse(at, start, what, "align it with its neighbours, or quote the text")
        return self._plain_line(start)

    def _plain_line(self, start: int) -> str:
        """The plain text on line `at` from `start` on, without the comment behind it."""
        at, line = self.at, self.lines[self.at]
        comment = line.find(" #", start)
        text = line[start:].rstrip(" ") if comment < 0 else line[start:comment].rstrip(" ")
        self.tail = line[start + len(text) :]
        if "\t" in text:
            place = start + text.index("\t")
            remedy = "use a space, or quote the text"
            self.refuse(at, place, "a tab character in a plain scalar", remedy)
        if ": " in text or text.endswith(":"):
            place = start + (text + " ").index(": ")
            self.refuse(at, place, '": " inside a plain scalar', "quote the text")
        return text

    def _resolve(self, text: str, line: int, column: int) -> object:
        """The value of a plain scalar of one line, by the core schema."""
        if text in _YAML_CONSTANTS:
            return _YAML_CONSTANTS[text]
        if text[0] not in _YAML_NUMBER_START or not _regex(_YAML_NUMBER_LIKE).fullmatch(text):
            return text
        value = _yaml_number(text, _YAML_SLOW)
        if value is _YAML_SLOW:
            what = f"a number in a form that parsers read differently ({text[:40]})"
            remedy = "quote it, or write it as a decimal number of at most 15 digits"
            self.refuse(line, column, what, remedy)
        return value

    # ---- quoted scalars ----

    def _quoted(self, start: int, parent: int) -> str:
        """Read a quoted scalar; `parent` is the column its further lines must be deeper than."""
        opened, quote = self.at, self.lines[self.at][start]
        at, begin, glue = opened, start + 1, ""
        parts: list[str] = []
        while True:
            line = self.lines[at]
            close = _yaml_quote_end(line, begin, quote)
            if line[close : close + 1] == quote:
                break
            stop = self._segment_end(at, begin, quote)
            parts += (glue, self._unquoted(at, begin, stop, quote))
            joined = quote == '"' and _yaml_ends_in_backslash(line[begin:])
            at, begin, glue = self._next_segment(opened, start, at, parent, joined)
        parts += (glue, self._unquoted(at, begin, close, quote))
        self._check_behind(at, close + 1, "the closing quote")
        self.seek(at + 1)
        return "".join(parts)

    def _segment_end(self, at: int, begin: int, quote: str) -> int:
        """Where the text ends that `at`, not the last line of a quoted scalar, contributes."""
        line = self.lines[at]
        text = line[begin:]
        if quote == '"' and _yaml_ends_in_backslash(text):
            return len(line) - 1
        kept = text.rstrip(" ")
        if kept.endswith("\t"):
            what = "a tab character at the end of a line of a quoted scalar"
            self.refuse(at, begin + len(kept) - 1, what, "write it as \\t, in double quotes")
        if quote == '"' and len(kept) < len(text) and _yaml_ends_in_backslash(kept):
            return begin + len(kept) + 1  # an escaped space is not cut off
        return begin + len(kept)

    def _next_segment(
        self, opened: int, start: int, at: int, parent: int, joined: bool
    ) -> tuple[int, int, str]:
        """The next line of a quoted scalar that has text, where the text begins, and what the
        line breaks in between become."""
        following, last = at + 1, len(self.lines) - 1
        while following < last and not self.lines[following].strip(" "):
            following += 1
        if following >= last:
            self.fail(opened, start, "this quoted scalar is never closed", "add the closing quote")
        begin = _yaml_text_start(self.lines[following], 0)
        if self.lines[following][begin] == "\t":
            what = "a tab character at the start of a line of a quoted scalar"
            self.refuse(following, begin, what, "use spaces, or write it as \\t in double quotes")
        if begin <= parent:
            problem = "the continuation of a quoted scalar is not indented"
            remedy = f"indent it, or close the quote of line {opened + 1}"
            self.fail(following, begin, problem, remedy)
        blank = following - at - 1
        if joined and blank:
            what = "a blank line after an escaped line break"
            self.refuse(at + 1, 0, what, "write \\n, or remove the line")
        return following, begin, "" if joined else "\n" * blank or " "

    def _unquoted(self, at: int, begin: int, stop: int, quote: str) -> str:
        """The text of a piece of a quoted scalar, `''` and escapes resolved."""
        text = self.lines[at][begin:stop]
        if quote == "'":
            return text.replace("''", "'")
        if "\\" not in text:
            return text
        return _regex(_YAML_ESCAPE).sub(lambda match: self._escaped(match, at, begin), text)

    def _escaped(self, match: re.Match[str], at: int, begin: int) -> str:
        """The character that an escape in a double-quoted scalar stands for."""
        code, place = match[1], begin + match.start()
        if len(code) == 1:
            if code not in _YAML_ESCAPES:
                remedy = "write \\\\ for a backslash, or use single quotes"
                self.refuse(at, place, f"the unknown escape \\{code}", remedy)
            return _YAML_ESCAPES[code]
        number = int(code[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            what = f"\\{code}, which is not a character (or half of one),"
            self.refuse(at, place, what, "write the character itself")
        return chr(number)

    def _check_behind(self, at: int, column: int, what: str) -> None:
        """Nothing but a comment may stand on the line from `column` on; it becomes the tail."""
        self.tail = self.lines[at][column:]
        text = self.tail.lstrip(" ")
        if text and (text[0] != "#" or self.tail[0] != " "):
            place = _yaml_text_start(self.lines[at], column)
            remedy = "quote all of the text, or put a space before the # of a comment"
            self.refuse(at, place, f"text after {what}", remedy)

    # ---- block scalars ----

    def _block_scalar(self, start: int, parent: int) -> str:
        """Read a literal or folded scalar; its lines are indented deeper than `parent`."""
        style, (chomp, digit) = self.lines[self.at][start], self._block_header(start)
        first = self.at + 1
        indent = parent + digit if digit else self._block_indent(first, parent)
        content, end = self._block_lines(first, indent, parent)
        body = len(content)
        while body and not content[body - 1]:
            body -= 1
        if not body:
            self.refuse(self.at, start, "a block scalar without content", 'write ""')
        if end == len(self.lines) - 1 and not self.complete and chomp != "-":
            problem = "the file ends inside a block scalar without a final line break"
            self.fail(end - 1, len(self.lines[end - 1]), problem, "add one")
        trailing = len(content) - body
        self.seek(end if chomp == "+" else end - trailing)
        text = "\n".join(content[:body]) if style == "|" else _yaml_fold(content[:body])
        return text + {"-": "", "": "\n", "+": "\n" * (trailing + 1)}[chomp]

    def _block_header(self, start: int) -> tuple[str, int]:
        """The chomping sign ("", "-" or "+") and the indentation digit (0: none) of a header."""
        line = self.lines[self.at]
        stop = line.find(" ", start) if " " in line[start:] else len(line)
        signs = line[start + 1 : stop]
        chomp, digit = signs.strip("123456789"), signs.strip("+-")
        if len(chomp) > 1 or len(digit) > 1 or len(signs) != len(chomp) + len(digit):
            remedy = "write `|`, `>`, `|-` or the like alone, and the text on the next lines"
            self.refuse(self.at, start, "a malformed block scalar header", remedy)
        self._check_behind(self.at, stop, "a block scalar header")
        return chomp, int(digit or "0")

    def _block_indent(self, first: int, parent: int) -> int:
        """The indentation of the first line with text; `parent` + 1 if there is none."""
        line, last, widest = first, len(self.lines) - 1, 0
        while line < last and not self.lines[line].strip(" "):
            widest = max(widest, len(self.lines[line]))
            line += 1
        indent = _yaml_text_start(self.lines[line], 0)
        if line == last or indent <= parent:
            return parent + 1
        if widest > indent:
            problem = "a leading blank line has more spaces than the first line of the block scalar"
            self.fail(line, indent, problem, "empty the blank lines")
        return indent

    def _block_lines(self, first: int, indent: int, parent: int) -> tuple[list[str], int]:
        """The lines of a block scalar without their indentation, and the line behind them."""
        pad, at, last = " " * indent, first, len(self.lines) - 1
        content: list[str] = []
        while at < last:
            line = self.lines[at]
            text = line[indent:] if line.startswith(pad) else line.lstrip(" ")
            if text and not line.startswith(pad):
                break
            if text[:1] == "\t":
                what = "a line of a block scalar that starts with a tab character"
                self.refuse(at, indent, what, "use spaces, or a quoted text")
            if text and not text.strip(" "):
                what = "a blank line with more spaces than the indentation of its block scalar"
                self.refuse(at, indent, what, "empty the line")
            content.append(text)
            at += 1
        below = _yaml_text_start(self.lines[at], 0)
        if at < last and below > parent and self.lines[at][below] != "#":
            problem = "this line is indented less than the first line of the block scalar"
            self.fail(at, below, problem, "align the two")
        return content, at

    # ---- flow collections ----

    def _flow(self, start: int) -> object:
        at, line = self.at, self.lines[self.at]
        value: object
        if line[start] == "{":
            value, close = {}, _yaml_text_start(line, start + 1)
            if line[close : close + 1] != "}":
                remedy = 'write one "key: value" per line'
                self.refuse(at, start, "a flow mapping that is not empty", remedy)
        else:
            value, close = self._flow_items(start)
        self._check_behind(at, close + 1, "the closing bracket")
        self.seek(at + 1)
        return value

    def _flow_items(self, start: int) -> tuple[list[object], int]:
        """The values of a flow list, and the column of its closing bracket."""
        line = self.lines[self.at]
        found: list[object] = []
        place = _yaml_text_start(line, start + 1)
        if line[place : place + 1] == "]":
            return found, place
        while True:
            match = _regex(_YAML_FLOW_ITEM).match(line, place)
            if not match:
                what = "a flow sequence that is not a one-line list of simple scalars"
                self.refuse(self.at, place, what, "write one `- value` per line")
            found.append(self._flow_scalar(match[1], match.start(1)))
            place = match.end() + 1
            if line[place - 1] == "]":
                return found, place - 1

    def _flow_scalar(self, text: str, start: int) -> object:
        if text[0] in "'\"":
            return self._unquoted(self.at, start + 1, start + len(text) - 1, text[0])
        return self._resolve(text, self.at, start)


# ==== 5. The writer ===============================================================================
#
# What is written reads the same in YAML 1.1 and 1.2 parsers: whatever any of them takes for
# something else than a string is quoted.

_YAML_INDICATORS = frozenset("-?:,[]{}#&*!|>'\"%@`")
_YAML_RESERVED = frozenset(
    form
    for word in ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
    for form in (word, word.capitalize(), word.upper())
) | {"~", "=", "<<", "..."}
_YAML_QUOTE_START = frozenset("-+.0123456789_eE")
_YAML_QUOTE_NUMBER = (
    r"[-+]*(?:0_*[bB][-+01_]+|0_*[oO][-+0-7_]+|0_*[xX][-+0-9a-fA-F_]+"
    r"|[0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]+)?|[0-9][0-9_]*(?::[0-9]{1,2})+(?:\.[0-9_]*)?"
    r"|\.(?:inf|Inf|INF|nan|NaN|NAN)|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?)"
)


def render_yaml(value: object) -> str:
    """Write a dict or list (or None: an empty text) as one document in block style.

    Raises ValueError for what cannot be written so that every reader agrees on it: other types,
    a bare scalar, keys that are not strings, lone surrogates, integers of more than 15 digits,
    infinities, nesting deeper than 32.
    """
    if value is None:
        return ""
    writer = _YamlWriter(0)
    if isinstance(value, dict | list) and not value:
        return _yaml_scalar(value) + "\n"
    if isinstance(value, dict):
        writer.mapping(value, 0, 1)
    elif isinstance(value, list):
        writer.sequence(value, 0, 1)
    else:
        raise ValueError(f"a document is a mapping or a list, not {type(value).__name__}")
    return "\n".join(writer.lines) + "\n"


class _YamlTexts(dict[str, str]):
    """Memo of a text to how it is written on one line; "" for what becomes a literal block."""

    def __missing__(self, text: str) -> str:
        written = _yaml_written(text)
        if len(text) <= _YAML_MEMO:
            self[text] = written
        return written


class _YamlKeys(dict[str, str]):
    """Memo of a key to its indentation, the key as written, and the colon."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.pad = " " * column

    def __missing__(self, key: object) -> str:
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is not a string")
        if len(key) > _YAML_MAX_KEY:
            raise ValueError(f"the key {key[:40]!r}… has more than {_YAML_MAX_KEY} characters")
        name = key.replace("-", "_")
        plain = name.isidentifier() and key.isascii() and _yaml_is_plain(key)
        written = f"{self.pad}{key if plain else _yaml_quoted(key)}:"
        if len(key) <= _YAML_MEMO:
            self[key] = written
        return written


class _YamlWriter:
    """Appends the lines of values to `lines`."""

    __slots__ = ("_keys", "_offset", "_texts", "lines")

    def __init__(self, offset: int) -> None:
        """`offset`: how far the dashes of a list stand right of its key (0 or more)."""
        self.lines: list[str] = []
        self._offset = offset
        self._texts = _YamlTexts()
        self._keys: dict[int, _YamlKeys] = {}

    def mapping(self, value: Mapping[str, object], column: int, depth: int) -> None:
        """Write the entries of a mapping that is not empty, keys at `column`."""
        _yaml_check_depth(depth)
        keys = self._keys.get(column) or self._keys.setdefault(column, _YamlKeys(column))
        texts, add = self._texts, self.lines.append
        for key, item in value.items():
            if type(item) is not str:
                self.entry(keys[key], item, column, depth)
            elif text := texts[item]:
                add(f"{keys[key]} {text}")
            else:
                self._literal(keys[key], item, column)

    def sequence(self, value: Sequence[object], column: int, depth: int) -> None:
        """Write the elements of a list that is not empty, dashes at `column`."""
        _yaml_check_depth(depth)
        for item in value:
            self.element(item, column, depth)

    def element(self, item: object, column: int, depth: int) -> None:
        head, mark = " " * column + "-", len(self.lines)
        if isinstance(item, dict) and item:
            self.mapping(item, column + 2, depth + 1)
        elif isinstance(item, list) and item:
            self.sequence(item, column + 2, depth + 1)
        else:
            self.entry(head, item, column, depth)
            return
        self.lines[mark] = f"{head} {self.lines[mark][column + 2 :]}"

    def entry(self, head: str, value: object, column: int, depth: int, tail: str = "") -> None:
        """Write `head` (with its colon or dash, which stands at `column`), value and comment."""
        if isinstance(value, dict) and value:
            self.lines.append(head + tail)
            self.mapping(value, column + 2, depth + 1)
        elif isinstance(value, list) and value:
            self.lines.append(head + tail)
            self.sequence(value, column + self._offset, depth + 1)
        elif isinstance(value, str):
            self._text(head, value, column, tail)
        else:
            self.lines.append(f"{head} {_yaml_scalar(value)}{tail}")

    def _text(self, head: str, value: str, column: int, tail: str) -> None:
        if text := self._texts[value]:
            self.lines.append(f"{head} {text}{tail}")
        else:
            self._literal(head, value, column, tail)

    def _literal(self, head: str, value: str, column: int, tail: str = "") -> None:
        body, sign = (value[:-1], "|") if value.endswith("\n") else (value, "|-")
        pad = " " * (column + 2)
        self.lines.append(f"{head} {sign}{tail}")
        self.lines += [pad + line if line else "" for line in body.split("\n")]


def _yaml_check_depth(depth: int) -> None:
    if depth > _YAML_MAX_DEPTH:
        raise ValueError(f"nesting deeper than {_YAML_MAX_DEPTH} cannot be written")


def _yaml_scalar(value: object) -> str:
    """How anything but a text or a collection with content is written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if abs(value) >= 10**_YAML_MAX_DIGITS:
            raise ValueError(f"an integer of more than {_YAML_MAX_DIGITS} digits cannot be written")
        return str(int(value))
    if isinstance(value, float):
        return _yaml_float(value)
    if isinstance(value, dict | list):
        return "{}" if isinstance(value, dict) else "[]"
    raise ValueError(f"a value of type {type(value).__name__} cannot be written")


def _yaml_float(value: float) -> str:
    text = repr(value)
    if "n" in text:  # nan, inf
        raise ValueError(f"the number {text} cannot be written")
    # YAML 1.1 knows exponents only behind a decimal point and with a sign, as `repr` writes it.
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _yaml_written(text: str) -> str:
    """How `text` is written on one line: plain if possible, "" if it shall be a literal block."""
    if "\n" in text:
        return "" if _yaml_is_literal(text) else _yaml_quoted(text)
    return text if _yaml_is_printable(text) and _yaml_is_plain(text) else _yaml_quoted(text)


def _yaml_is_printable(text: str) -> bool:
    return text.isprintable() or not _regex(_YAML_UNPRINTABLE).search(text)


def _yaml_is_plain(text: str) -> bool:
    """Whether every reader takes the printable `text`, unquoted, for just this text."""
    if not text or text[0] in _YAML_INDICATORS or text in _YAML_RESERVED:
        return False
    if ": " in text or " #" in text or text[-1] == ":" or text != text.strip():
        return False
    return text[0] not in _YAML_QUOTE_START or not _regex(_YAML_QUOTE_NUMBER).fullmatch(text)


def _yaml_is_literal(text: str) -> bool:
    """Whether a literal block holds `text`, and no reader disagrees about its line breaks."""
    if text[0] in " \n" or text.endswith("\n\n") or " \n" in text or text[-1] == " ":
        return False
    return _yaml_is_printable(text.replace("\n", ""))


def _yaml_quoted(text: str, double: bool = False) -> str:
    """`text` in single quotes, or in double quotes if it needs escapes (or if `double`)."""
    if not double and not _regex(_YAML_UNPRINTABLE).search(text):
        return "'" + text.replace("'", "''") + "'"
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + _regex(_YAML_UNPRINTABLE).sub(_yaml_escape, text) + '"'


def _yaml_escape(match: re.Match[str]) -> str:
    sign = match[0]
    code = ord(sign)
    if 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"a text with half a character (U+{code:04X}) cannot be written")
    short = {"\n": "\\n", "\t": "\\t"}.get(sign)
    return short or (f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}")


# ==== 6. Surgical edits ===========================================================================
#
# Lines are lists as in _YamlFile. Only the lines of changed keys are written anew; a comment
# belongs to the line below it, what stands behind a value stays on its line.


def _yaml_same(one: object, other: object) -> bool:
    """Whether two values are the same in YAML: 1, 1.0 and true are not, key order is nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_yaml_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_yaml_same, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one == other
    return type(one) is type(other) and one == other


def _yaml_edit_mapping(
    lines: list[str],
    first: int,
    column: int,
    new: Mapping[str, object],
    order: Sequence[str],
    offset: int,
) -> list[str]:
    """Change the block mapping that starts at `column` of line `first` so that it reads `new`.

    Missing keys are put where `order` wants them; `offset` is as for _YamlWriter.
    """
    prefix, pad = lines[first][:column], " " * column  # the prefix may hold a dash
    lines = [*lines[:first], pad + lines[first][column:], *lines[first + 1 :]]
    reader = _YamlReader(lines, "")
    reader.seek(first)
    spans = reader.spans(column, 1)
    if not new:
        return [*lines[:first], f"{prefix}{{}}", *lines[reader.end :]]
    places = _yaml_places(list(spans), new, order)
    out: list[str] = []
    done = first
    for key, span in spans.items():
        out += lines[done : span.start]
        if key in new:
            out += _yaml_edit_entry(lines, span, column, new[key], offset)
        writer = _YamlWriter(offset)
        for added in places.get(key, ()):
            writer.mapping({added: new[added]}, column, 1)
        out += writer.lines
        done = span.end
    top = next(n for n, line in enumerate(out) if line.lstrip(" ")[:1] not in ("", "#"))
    out[top] = prefix + out[top][column:]
    return [*lines[:first], *out, *lines[done:]]


def _yaml_places(
    present: list[str], new: Mapping[str, object], order: Sequence[str]
) -> dict[str, list[str]]:
    """Per present key the missing keys to write behind it.

    That is the nearest predecessor in `order`; what `order` does not know goes to the end.
    """
    rank = {key: number for number, key in enumerate(order)}
    places: dict[str, list[str]] = {}
    for key in (*order, *(key for key in new if key not in rank)):
        if key not in new or key in present:
            continue
        before = [other for other in present if rank.get(other, len(rank)) < rank.get(key, -1)]
        place = max(before, key=rank.__getitem__, default=present[0 if key in rank else -1])
        places.setdefault(place, []).append(key)
    return places


def _yaml_edit_entry(
    lines: list[str], span: _YamlSpan, column: int, value: object, offset: int
) -> list[str]:
    """The lines of a mapping's entry with a new value."""
    old, head = span.value, lines[span.start][: span.colon + 1]
    if _yaml_same(old, value):
        return lines[span.start : span.end]
    if span.block and old and value and type(old) is type(value):
        body = [*lines[span.start + 1 : span.end], ""]
        return [lines[span.start], *_yaml_edit_body(body, value, offset)[:-1]]
    tail = span.tail.rstrip(" ")
    style = lines[span.start][span.colon + 1 :].lstrip(" ")[:1]
    written = _yaml_in_style(style, old, value)
    if written:
        return [f"{head} {written}{tail}"]
    writer = _YamlWriter(offset)
    writer.entry(head, value, column, 1, tail)
    return writer.lines


def _yaml_in_style(style: str, old: object, value: object) -> str:
    """`value` written as the old value was, quoted or as a flow list; "" for the usual way."""
    if isinstance(value, str) and "\n" not in value and style in ("'", '"'):
        return _yaml_quoted(value, double=style == '"')
    if style == "[" and old and isinstance(value, list) and value:
        texts = [_yaml_flow_text(item) for item in value if isinstance(item, str)]
        return f"[{', '.join(texts)}]" if len(texts) == len(value) else ""
    return ""


def _yaml_flow_text(text: str) -> str:
    match = _regex(_YAML_FLOW_ITEM).match(text + "]") if _yaml_is_plain(text) else None
    return text if match and match.end() == len(text) else _yaml_quoted(text)


def _yaml_edit_body(body: list[str], value: object, offset: int) -> list[str]:
    """Change the block collection that `body` holds into `value`, of the same type."""
    reader = _YamlReader(body, "")
    reader.seek(0)
    first, column = reader.at, reader.indent
    if isinstance(value, dict):
        return _yaml_edit_mapping(body, first, column, value, tuple(value), offset)
    assert isinstance(value, list)
    return _yaml_edit_sequence(body, reader, value, offset)


def _yaml_edit_sequence(
    body: list[str], reader: _YamlReader, new: list[object], offset: int
) -> list[str]:
    """Change a list; equal elements keep their lines, with the comments above them."""
    column, done = reader.indent, 0
    kept: defaultdict[str, list[list[str]]] = defaultdict(list)
    for value, end in reader.elements(column, 1):
        kept[repr(value)].append(body[done:end])
        done = end
    writer = _YamlWriter(offset)
    for value in new:
        same = kept.get(repr(value))
        if same:
            writer.lines += same.pop(0)
        else:
            writer.element(value, column, 1)
    return [*writer.lines, *body[done:]]


# ==== 7. The backlog file as a document ===========================================================

_YAML_HOLE = "- 0"  # stands for all items while the rest of the file is edited


class Document:
    """A backlog file open for editing: its text is the truth, and stays as it is where not edited.

    `items` holds the values under `items` in file order (an entry that is not a mapping is kept
    as it was parsed, for the caller to report); `top` the other top-level keys and values. Both
    and all they hold are to be changed by the methods only, which replace what they change.
    Every edit is read back and compared; one that would not read back as intended raises
    ValueError and leaves the document as it was.
    """

    __slots__ = ("_bom", "_chunks", "_dash", "_head", "_newline", "_tail", "items", "source", "top")

    source: str
    items: list[dict[str, object]]
    top: dict[str, object]
    _bom: bool
    _newline: bytes
    # The text is the lines `_head`, one text per item, and the lines `_tail`. An item's text
    # begins with the comment lines directly above its dash, and ends where the next one begins.
    _head: list[str]
    _chunks: list[str]
    _tail: list[str]  # empty: there are no items, or the last one ends the file without line break
    _dash: int  # the column of the items' dashes

    @classmethod
    def parse(cls, data: bytes, source: str) -> Document:
        """Read a file; YamlError if it is not a mapping, or `items` is neither list nor null."""
        with _yaml_opened(data, source) as (reader, file):
            return cls._read(reader, file)

    @classmethod
    def _read(cls, reader: _YamlReader, file: _YamlFile) -> Document:
        self = cls()
        self.source, self._bom, self._newline = reader.source, file.bom, file.newline
        self._head, self._chunks, self._tail, self._dash = file.lines, [], [], 0
        reader.open()
        if reader.indent < 0:
            remedy = "take the file back from git history, or write `items: []`"
            reader.fail(0, 0, "the file holds no backlog", remedy)
        if reader.indent or reader._is_dash(0) or not reader._is_entry(0):
            at = reader.at
            reader._root()
            reader.fail(at, 0, "this is not a mapping", "write the backlog's list below `items:`")
        spans = reader.spans(0, 1)
        self.top = {key: span.value for key, span in spans.items() if key != "items"}
        self.items = cls._items(reader, spans.get("items"))
        if self.items:
            self._cut(reader, spans["items"])
        return self

    @staticmethod
    def _items(reader: _YamlReader, span: _YamlSpan | None) -> list[dict[str, object]]:
        value = span.value if span else None
        if value is None:
            return []
        assert span is not None
        if not isinstance(value, list) or not (span.block or not value):
            remedy = "write one `- id: …` below it per item"
            reader.fail(span.start, 0, "`items` is not a list in block style", remedy)
        return value

    def _cut(self, reader: _YamlReader, span: _YamlSpan) -> None:
        """Cut the lines into head, items and tail; `span` is where `items` stands."""
        lines = self._head
        reader.seek(span.start + 1)
        self._dash = column = reader.indent
        # Whatever belongs to an item stands deeper than its dash, so this finds all and no more.
        dash = " " * column + "-"
        starts = [
            number
            for number, line in enumerate(lines[reader.at : span.end], reader.at)
            if line.startswith(dash) and line[column + 1 : column + 2] in ("", " ")
        ]
        assert len(starts) == len(self.items)
        cuts = [_yaml_lead(lines, start, column) for start in starts]
        cuts.append(_yaml_item_end(lines, span.end, column))
        self._head, self._tail = lines[: cuts[0]], lines[cuts[-1] :]
        self._chunks = ["\n".join(lines[a:b]) for a, b in pairwise(cuts)]

    def copy(self) -> Document:
        """A document of its own; costs a few pointers per item."""
        other = Document()
        other.source, other._bom, other._newline = self.source, self._bom, self._newline
        other._head, other._tail, other._dash = self._head, self._tail, self._dash
        other._chunks, other.items, other.top = [*self._chunks], [*self.items], {**self.top}
        return other

    def to_bytes(self) -> bytes:
        """The file as it is now; without edits, the bytes that were parsed."""
        text = "\n".join([*self._head, *self._chunks, *self._tail]).encode()
        if self._newline != b"\n":
            text = text.replace(b"\n", self._newline)
        return _YAML_BOM + text if self._bom else text

    # ---- edits ----

    def set_top(self, key: str, value: object) -> None:
        """Set a top-level key other than `items`; None deletes it. ValueError: see the class."""
        if key == "items":
            raise ValueError("items are changed one by one, not as a whole")
        if _yaml_same(self.top.get(key), value) and (key in self.top or value is None):
            return
        hole = [" " * self._dash + _YAML_HOLE] if self._chunks else []
        self._edit_top([*self._head, *hole, *self._tail], {key: value})
        top = {**self.top, key: value}
        self.top = {name: kept for name, kept in top.items() if name != key or value is not None}

    def update(self, index: int, changes: Mapping[str, object]) -> None:
        """Change keys of an item; None deletes a key, an equal value changes nothing.

        ValueError: see the class, and if the item is not a mapping.
        """
        old = self.items[index]
        if not isinstance(old, dict):
            raise ValueError(f"{self.source}: item number {index + 1} is not a mapping")
        kept = {key: value for key, value in old.items() if key not in changes}
        new = {**kept, **{key: value for key, value in changes.items() if value is not None}}
        if not _yaml_same(old, new):
            self._put(index, self._edited(self._chunks[index].split("\n"), new), new)

    def append(self, item: Mapping[str, object]) -> None:
        """Add an item behind the last one; a key whose value is None is left out.

        A blank line goes before it if the last two items are kept apart by one. ValueError: see
        the class.
        """
        draft = self.copy()
        draft._append({key: item[key] for key in item if item[key] is not None})
        self._become(draft)

    def remove(self, index: int) -> None:
        """Take an item out, with the comment lines directly above it. ValueError: see the class."""
        draft = self.copy()
        draft._remove(index)
        self._become(draft)

    def _become(self, draft: Document) -> None:
        self._head, self._chunks, self._tail = draft._head, draft._chunks, draft._tail
        self.items, self.top, self._dash = draft.items, draft.top, draft._dash

    # ---- how edits are made ----

    def _edit_top(self, lines: list[str], changes: Mapping[str, object]) -> None:
        """Change top-level keys of `lines`, the file with one hole for all items (or with none)."""
        reader = _YamlReader(lines, self.source)
        reader.open()
        first = reader.at
        old = {key: span.value for key, span in reader.spans(0, 1).items() if key not in changes}
        new = {**old, **{key: value for key, value in changes.items() if value is not None}}
        edited = _yaml_edit_mapping(lines, first, 0, new, _TOP_KEYS, self._dash)
        try:
            again = _YamlReader(edited, self.source)
            again.open()
            spans = again.spans(0, 1)
        except YamlError as error:
            raise self._unsound(error.problem) from error
        if not _yaml_same({key: span.value for key, span in spans.items()}, new):
            raise self._unsound("it reads back as something else")
        self._head, self._tail = edited, []
        if new.get("items"):
            hole = spans["items"].end - 1
            self._head, self._tail = edited[:hole], edited[hole + 1 :]

    def _edited(self, lines: list[str], new: Mapping[str, object]) -> list[str]:
        """The lines of an item, changed to read `new`."""
        lines = [*lines, ""]
        reader = _YamlReader(lines, self.source)
        reader.seek(0)
        first, column = reader.at, _yaml_text_start(lines[reader.at], reader.indent + 1)
        if lines[first][column : column + 1] in ("", "#"):  # the dash stands alone
            reader.seek(first + 1)
            first, column = reader.at, reader.indent
        if lines[first][column] == "{":
            return [*lines[:first], *self._written(new), *lines[first + 1 : -1]]
        return _yaml_edit_mapping(lines, first, column, new, ITEM_KEYS, self._dash)[:-1]

    def _written(self, item: Mapping[str, object]) -> list[str]:
        """The lines of an item that was not there before, keys in their usual order."""
        known = [key for key in ITEM_KEYS if key in item]
        keys = [*known, *(key for key in item if key not in known)]
        writer = _YamlWriter(self._dash)
        writer.element({key: item[key] for key in keys}, self._dash, 2)
        return writer.lines

    def _append(self, item: dict[str, object]) -> None:
        if not self._chunks:
            self._edit_top(self._head, {"items": [0]})
        apart = len(self._chunks) > 1 and _yaml_ends_blank(self._chunks[-2].split("\n"))
        self._chunks.append("")
        self.items.append({})
        self._put(len(self.items) - 1, self._written(item), item)
        if apart:
            index = len(self.items) - 2
            before = self._chunks[index].split("\n")
            wider = before if _yaml_ends_blank(before) else [*before, ""]
            self._settle(index, [(wider, [""]), (before, [""])], self.items[index])

    def _remove(self, index: int) -> None:
        gone = self._chunks.pop(index).split("\n")
        del self.items[index]
        if not self._chunks:
            self._edit_top([*self._head, *self._tail], {"items": []})
        elif index == len(self._chunks):
            self._close_end(index - 1)
        else:
            self._close_gap(index, gone)

    def _close_end(self, index: int) -> None:
        """The item behind `index` is gone, which makes this one the last."""
        before, tail = self._chunks[index].split("\n"), self._tail
        solid = next((n for n, line in enumerate(tail) if line.strip(" ")), len(tail) - 1)
        options = [(before, tail), (before, tail[max(solid, 0) :]), (before, tail or [""])]
        if _yaml_ends_blank(before) and "".join(tail[:1]).lstrip(" ")[:1] != "#":
            options.insert(0, (before[:-1], tail))
        self._settle(index, options, self.items[index])

    def _close_gap(self, index: int, gone: list[str]) -> None:
        """The item with the lines `gone`, which was not the last, is gone from before `index`."""
        reader = _YamlReader([*gone, ""], self.source)
        reader.seek(0)
        column = reader.indent
        reader._sequence(column, 2)
        kept = gone[_yaml_item_end(gone, reader.end, column) :]
        before = self._chunks[index - 1].split("\n") if index else self._head
        # One blank line is enough; comments that belong to nothing stay.
        if kept and not kept[0].strip(" ") and (not index or _yaml_ends_blank(before)):
            kept = kept[1:]
        if not index:
            self._head = [*before, *kept]
            return
        solid = [line for line in kept if line.strip(" ")]
        options = [([*before, *kept], [""]), ([*before, *solid], [""])]
        self._settle(index - 1, options, self.items[index - 1])

    def _put(self, index: int, lines: list[str], item: dict[str, object]) -> None:
        """Make `lines` the text of an item that shall read `item`."""
        last = index == len(self._chunks) - 1
        below = self._tail if last else [""]
        # Some block scalars cannot end a file that has no final line break: then it gets one.
        self.items[index] = self._settle(index, [(lines, below), (lines, below or [""])], item)

    def _settle(
        self, index: int, options: list[tuple[list[str], list[str]]], item: dict[str, object]
    ) -> dict[str, object]:
        """Take the first option, (lines of an item, lines behind it), that reads back as `item`.

        Returns what it reads back as, with the keys in the order of the lines.
        """
        reason = "it reads back as something else"
        for lines, below in options:
            blank = list(takewhile(lambda line: not line.strip(" "), below))
            end = [""] if len(blank) < len(below) else []
            reader = _YamlReader([*lines, *blank, *end], self.source)
            try:
                reader.seek(0)
                found = reader._sequence(reader.indent, 2)
            except YamlError as error:
                reason = error.problem
                continue
            if reader.indent < 0 and _yaml_same(found, [item]):
                self._chunks[index] = "\n".join(lines)
                if index == len(self._chunks) - 1:
                    self._tail = below
                return _cast("dict[str, object]", found[0])
        raise self._unsound(reason)

    def _unsound(self, reason: str) -> ValueError:
        what = f"{self.source}: an edit cannot be written so that it reads back"
        return ValueError(f"{what} ({reason}); nothing was changed")


def _yaml_lead(lines: list[str], start: int, column: int) -> int:
    """The first of the comment lines directly above `start` that are not deeper than `column`."""
    while start and lines[start - 1].lstrip(" ")[:1] == "#":
        if _yaml_text_start(lines[start - 1], 0) > column:
            break
        start -= 1
    return start


def _yaml_item_end(lines: list[str], end: int, column: int) -> int:
    """The line behind the comments directly below an item that are deeper than its dash."""
    while end < len(lines) and lines[end].lstrip(" ")[:1] == "#":
        if _yaml_text_start(lines[end], 0) <= column:
            break
        end += 1
    return end


def _yaml_ends_blank(lines: list[str]) -> bool:
    return not lines[-1].strip(" ")


# ==== 8. Items ====================================================================================

SCHEMA_VERSION = 3

STATUS_WORDS = ("new", "scoping", "ready", "in_progress", "done", "blocked")
SIZE_WORDS = ("small", "medium", "large")
LEVEL_WORDS = ("low", "medium", "high")
BLOCK_WORDS = ("clarification", "decision")
POOL_WORDS = ("pre", "main")
RATING_WORDS = {
    "size": SIZE_WORDS,
    "complexity": LEVEL_WORDS,
    "risk": LEVEL_WORDS,
    "impact": LEVEL_WORDS,
}
REQUIRED_KEYS = ("id", "title", "status", "created", "updated")
DESCRIPTION_KEYS = ("context", "problem", "solution", "impact", "sizing_rationale")

# What the orchestrator decides: where a human changed the same key meanwhile, its value stays.
OWNED_KEYS = frozenset(
    {
        "status",
        "phase",
        "phase_pool",
        "blocked_from_status",
        "blocked_reason",
        "blocked_type",
        "attempts",
        "updated",
    }
)

MAX_COUNTER = 10**15 - 1  # more digits do not survive every YAML reader
_ID_TEXT = r"\w[\w.-]{0,99}"  # goes into file names and git refs
_ITEM_ID = r"(.+)-([0-9]{1,10})"  # one that was handed out


class BacklogError(Exception):
    """The backlog, or a request on it, cannot be used; the message is for the operator."""


if TYPE_CHECKING:

    class Item(TypedDict, total=False):
        """One backlog entry. Treated as immutable: an update makes a new dict.

        Only `id`, `title`, `status`, `created` and `updated` are always there. Times are RFC 3339
        text in UTC. Keys this program does not know are kept beside these.
        """

        id: str
        title: str
        status: str  # one of STATUS_WORDS
        phase: str
        size: str  # one of SIZE_WORDS
        complexity: str  # one of LEVEL_WORDS, as risk and impact
        risk: str
        impact: str
        requires_human_review: bool
        origin: str  # "ID/phase" of the work that suggested it
        blocked_from_status: str
        blocked_reason: str
        blocked_type: str  # one of BLOCK_WORDS
        unblock_context: str
        tags: list[str]
        dependencies: list[str]
        created: str
        updated: str
        pipeline_type: str
        description: dict[str, str]  # the keys of DESCRIPTION_KEYS
        phase_pool: str  # one of POOL_WORDS
        guardrail_override: bool
        priority: int  # higher first
        attempts: int  # failed ones of the current phase

else:
    Item = dict


class Backlog(_Record):
    """A snapshot: it never changes, and shares the dicts of unchanged items with others."""

    items: Mapping[str, Item]  # by id, in the order of the file
    next_item_id: int  # the last number handed out


class KeyChange(_Record):
    """One difference between two backlogs, in values that JSON can hold; None = absent."""

    item_id: str  # "" for the counter `next_item_id`
    key: str  # "" for the whole item
    old: object
    new: object


def timestamp(now: datetime) -> str:
    """RFC 3339 text in UTC, as `created` and `updated` hold it."""
    from datetime import UTC

    return now.astimezone(UTC).isoformat()


def changes_between(old: Backlog, new: Backlog) -> list[KeyChange]:
    """What leads from one backlog to the other: removals, then item by item, then the counter.

    Cheap where the two share most of their dicts.
    """
    if old is new:
        return []
    changes: list[KeyChange] = []
    if not old.items.keys() <= new.items.keys():
        gone = (item_id for item_id in old.items if item_id not in new.items)
        changes += [KeyChange(item_id, "", old.items[item_id], None) for item_id in gone]
    known = old.items.get
    for item_id in [key for key, item in new.items.items() if known(key) is not item]:
        before, item = known(item_id), new.items[item_id]
        if before is None:
            changes.append(KeyChange(item_id, "", None, item))
        else:
            changes += _item_changes(item_id, before, item)
    if old.next_item_id != new.next_item_id:
        changes.append(KeyChange("", "next_item_id", old.next_item_id, new.next_item_id))
    return changes


def _item_changes(item_id: str, before: Item, after: Item) -> list[KeyChange]:
    old: Mapping[str, object] = before
    new: Mapping[str, object] = after
    return [
        KeyChange(item_id, key, old.get(key), new.get(key))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _with_keys(item: Item, changes: Mapping[str, object]) -> Item:
    """The item with some keys set, or deleted where the value is None."""
    merged: dict[str, object] = {**item, **changes}
    return _cast(Item, {key: value for key, value in merged.items() if value is not None})


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint such as ` (did you mean "build"?)` to put behind a message, or nothing."""
    import difflib

    spelt = {other.casefold(): other for other in words}
    close = difflib.get_close_matches(word.casefold(), spelt, n=1)
    return f' (did you mean "{spelt[close[0]]}"?)' if close else ""


# ---- What a key may hold -------------------------------------------------------------------------


class _Kind(_Record):
    """What an item's key may hold."""

    type: type
    expected: str
    words: tuple[str, ...] = ()


_TEXT = _Kind(str, "text")
_FLAG = _Kind(bool, "true or false")
_NUMBER = _Kind(int, "a whole number")
_TEXTS = _Kind(list, "a list of texts")

_ITEM_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "id",
            "title",
            "phase",
            "origin",
            "blocked_reason",
            "unblock_context",
            "created",
            "updated",
            "pipeline_type",
        ),
        _TEXT,
    ),
    **{key: _Kind(str, "text", words) for key, words in RATING_WORDS.items()},
    "status": _Kind(str, "text", STATUS_WORDS),
    "blocked_from_status": _Kind(str, "text", STATUS_WORDS),
    "blocked_type": _Kind(str, "text", BLOCK_WORDS),
    "phase_pool": _Kind(str, "text", POOL_WORDS),
    "requires_human_review": _FLAG,
    "guardrail_override": _FLAG,
    "priority": _NUMBER,
    "attempts": _NUMBER,
    "tags": _TEXTS,
    "dependencies": _TEXTS,
    "description": _Kind(dict, f"a mapping with the keys {', '.join(DESCRIPTION_KEYS)}"),
}


def _value_problem(key: str, value: object) -> str:
    """What is wrong with the value of an item's key; "" if nothing, and for unknown keys."""
    kind = _ITEM_KINDS.get(key)
    if kind is None:
        return ""
    if type(value) is not kind.type:
        return f"{key} must be {kind.expected}, not {_shown(value)}{_type_remedy(key, kind, value)}"
    if kind is _TEXT:
        return _id_problem(value) if key == "id" else ""
    if kind.words:
        return "" if value in kind.words else _word_problem(key, str(value), kind.words)
    if isinstance(value, list):
        wrong = [entry for entry in value if type(entry) is not str]
        return f"{key} must be a list of texts; {_shown(wrong[0])} is none" if wrong else ""
    if isinstance(value, dict):
        return _description_problem(value)
    if key == "attempts" and isinstance(value, int) and value < 0:
        return f"attempts must not be negative, it is {value}"
    return ""


def _word_problem(key: str, value: str, words: Sequence[str]) -> str:
    return f"{key} is {value!r}, expected one of {', '.join(words)}{did_you_mean(value, words)}"


def _id_problem(value: object) -> str:
    if _regex(_ID_TEXT).fullmatch(str(value)):
        return ""
    return (
        f"id {str(value)[:120]!r} cannot be used: up to 100 letters, digits, '-', '_' and '.',"
        " beginning with a letter or digit"
    )


def _description_problem(value: Mapping[str, object]) -> str:
    for key in DESCRIPTION_KEYS:
        text = value.get(key)
        if text is not None and type(text) is not str:
            return f"description.{key} must be text, not {_shown(text)}{_quoting(text)}"
    return ""


def _shown(value: object) -> str:
    """A value as a message names it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {value[:60]!r}" if isinstance(value, str) else f"the number {value}"


def _type_remedy(key: str, kind: _Kind, value: object) -> str:
    if key == "description" and isinstance(value, str):
        return "; put the text below it, indented, as 'context: …'"
    if kind.type is list and isinstance(value, str):
        return f"; write it as [{value}]"
    return _quoting(value) if kind.type is str else ""


def _quoting(value: object) -> str:
    if isinstance(value, bool):
        return f" (in quotes it is text: '{_shown(value)}')"
    return f" (in quotes it is text: '{value}')" if isinstance(value, int | float) else ""


# ==== 9. Reading a backlog file ===================================================================


class _FileState(_Record):
    """A backlog file as it was read: its bytes and what they mean."""

    data: bytes
    document: Document
    backlog: Backlog


def _read_backlog(data: bytes, source: str, warn: Callable[[str], None]) -> _FileState:
    """Read a file's bytes; YamlError or BacklogError, with all problems, if they are of no use."""
    document = Document.parse(data, source)
    _refuse_cut_off(document, data, source)
    _refuse_other_schemas(document, source)
    if "next_item_id" not in document.top:
        warn(
            f"{source}: next_item_id is missing, new ids go on from the highest one; if the"
            f" file was cut off, get it back with 'git checkout -- {source}'"
        )
        document = document.copy()
        document.set_top("next_item_id", 0)
    return _FileState(data, document, _backlog_of(document, data, source))


def _refuse_cut_off(document: Document, data: bytes, source: str) -> None:
    """An interrupted copy must not pass for a short backlog, or ids would be handed out twice."""
    remedy = f"get the whole file back with 'git checkout -- {source}'"
    if not document.items:
        root = parse_yaml(data, source)
        if not (isinstance(root, dict) and root.get("items") == []):
            raise BacklogError(
                f"{source}: no items; {remedy}, or write 'items: []' for an empty backlog"
            )
    if "next_item_id" not in document.top and not data.endswith(b"\n"):
        raise BacklogError(
            f"{source}: the file seems cut off: its last line is incomplete and 'next_item_id' is"
            f" missing; {remedy}, or add the line 'next_item_id: N' (the last number handed out)"
        )


def _refuse_other_schemas(document: Document, source: str) -> None:
    version = document.top.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        found = "is missing" if version is None else f"is {_shown(version)}"
        raise BacklogError(
            f"{source}: schema_version {found}, and only {SCHEMA_VERSION} can be read; use the"
            f" program that wrote the file, or bring its items to schema {SCHEMA_VERSION} and write"
            f" 'schema_version: {SCHEMA_VERSION}'"
        )


def _backlog_of(document: Document, data: bytes, source: str) -> Backlog:
    """Check every item and the counter; BacklogError lists all that is wrong."""
    items: dict[str, Item] = {}
    places: dict[str, int] = {}
    problems: list[str] = []
    for position, raw in enumerate(_cast(list[object], document.items)):
        found = _item_problems(raw)
        item_id = str(raw.get("id", "")) if isinstance(raw, dict) else ""
        if item_id in places:
            first = places[item_id] + 1
            both = f"the items number {first} and {position + 1}"
            found.append(("id", f"the id is used twice, by {both}; give one of them a new id"))
        for key, problem in found:
            line = _line_of(data, position, key)
            where = f"{source}:{line}" if line else source
            problems.append(f"{where}: {item_id or f'item number {position + 1}'}: {problem}")
        places.setdefault(item_id, position)
        items[item_id] = _clean_item(raw)
    counter = document.top.get("next_item_id")
    if counter is not None and (type(counter) is not int or not 0 <= counter <= MAX_COUNTER):
        shown = _shown(counter)
        problems.append(f"{source}: next_item_id must be a whole number from 0, not {shown}")
    if problems:
        raise BacklogError("\n".join(problems))
    return Backlog(items, _cast(int, counter or 0))


def _item_problems(raw: object) -> list[tuple[str, str]]:
    """(key, problem) of all that is wrong with an item as read; a null counts as absent."""
    if not isinstance(raw, dict):
        return [("", f"must be a mapping that begins with 'id: …', not {_shown(raw)}")]
    problems = [
        (key, f"the key '{key}' is missing") for key in REQUIRED_KEYS if raw.get(key) is None
    ]
    for key, value in raw.items():
        if value is not None and (problem := _value_problem(key, value)):
            problems.append((key, problem))
    return problems


def _clean_item(raw: object) -> Item:
    """An item without the keys that hold null; empty for something that is no item at all."""
    if not isinstance(raw, dict):
        return {}
    item = raw
    if None in raw.values():
        item = {key: value for key, value in raw.items() if value is not None}
    description = item.get("description")
    if isinstance(description, dict) and None in description.values():
        texts = {key: "" if text is None else text for key, text in description.items()}
        item = {**item, "description": texts}
    return _cast(Item, item)


def _line_of(data: bytes, position: int, key: str) -> int | None:
    """The line (from 1) of a key of the item at a position, or of the item's begin.

    A key's text always stands deeper than its item's dash, so the dashes in one column count the
    items. None where the file is written in another way.
    """
    lines = data.decode("utf-8", "replace").splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("items:")), len(lines))
    dashes = [i for i in range(begin, len(lines)) if re.match(r" *- ", lines[i])]
    if not dashes:
        return None
    dash = lines[dashes[0]].index("-")
    dashes = [i for i in dashes if lines[i].index("-") == dash]
    if position >= len(dashes):
        return None
    start, *following = dashes[position : position + 2]
    column = dash + 1 + len(lines[start][dash + 1 :]) - len(lines[start][dash + 1 :].lstrip())
    for i in range(start, following[0] if following else len(lines)):
        if lines[i][column:].startswith(f"{key}:") and lines[i][:column].strip() in ("", "-"):
            return i + 1
    return start + 1


# ---- Versions in history -------------------------------------------------------------------------


def item_texts(data: bytes) -> list[bytes]:
    """Cut a backlog file into one text per item, without reading any.

    For comparing many versions of the file: what two of them share need not be read at all. Cut at
    the dashes in the first one's column, for whatever belongs to an item stands deeper.
    """
    begin = re.search(rb"^(?:\xef\xbb\xbf)?items:[^\n]*\n", data, re.M)
    first = re.compile(rb"^ *- ", re.M).search(data, begin.end()) if begin else None
    if first is None:
        return []
    below = re.compile(rb"\n[^\s#-]").search(data, first.end())
    body = data[first.end() : below.start() if below else len(data)].removesuffix(b"\n")
    return [first[0] + text + b"\n" for text in body.split(b"\n" + first[0])]


def read_item_text(text: bytes, source: str) -> Item:
    """The item that one of `item_texts` holds; YamlError or BacklogError."""
    root = parse_yaml(b"items:" + (b"\r\n" if text.endswith(b"\r\n") else b"\n") + text, source)
    items = root["items"] if isinstance(root, dict) else None
    item = _clean_item(items[0]) if isinstance(items, list) else {}
    if any(type(item.get(key)) is not str for key in ("id", "status")):
        raise BacklogError(f"{source}: an item has no id or status")
    return item


# ==== 10. Drafts and rules ========================================================================


class Draft:
    """A working copy of a backlog that one edit changes; the backlog itself stays as it is.

    `warnings` collects what the edit could not do without failing for it; the store passes them on.
    """

    def __init__(self, backlog: Backlog) -> None:
        self.items: dict[str, Item] = dict(backlog.items)
        self.next_item_id = backlog.next_item_id
        self.warnings: list[str] = []

    def backlog(self) -> Backlog:
        """What the draft has become."""
        return Backlog(dict(self.items), self.next_item_id)

    def item(self, item_id: str) -> Item:
        """The item; BacklogError if there is none of this id."""
        try:
            return self.items[item_id]
        except KeyError:
            hint = did_you_mean(item_id, self.items)
            raise BacklogError(f"item {item_id} not found in the backlog{hint}") from None

    def update(self, item_id: str, now: datetime, **changes: object) -> Item:
        """Set keys, or delete those whose value is None; `updated` follows if anything changed.

        BacklogError, and nothing changed, if a key cannot hold its value.
        """
        item = self.item(item_id)
        old: Mapping[str, object] = item
        changes = {key: value for key, value in changes.items() if old.get(key) != value}
        if changes:
            _refuse_bad_values(item_id, changes)
            item = _with_keys(item, {**changes, "updated": timestamp(now)})
            self.items[item_id] = item
        return item

    def add(self, prefix: str, title: str, now: datetime, **fields: object) -> Item:
        """Append a new item with the next id; a field that is None is left out.

        BacklogError, and nothing changed, if the title is blank or a field cannot hold its value.
        """
        title = _one_line_title(title)
        if not title:
            raise BacklogError("a new item needs a title; this one is blank")
        _refuse_bad_values("the new item", {**fields, "title": title})
        known: dict[str, object] = {
            "requires_human_review": False,
            **fields,
            "id": self.allocate(prefix),
            "title": title,
            "status": "new",
            "created": timestamp(now),
            "updated": timestamp(now),
        }
        ordered = {key: known.get(key) for key in dict.fromkeys((*ITEM_KEYS, *known))}
        item = _with_keys({}, ordered)
        self.items[item["id"]] = item
        return item

    def allocate(self, prefix: str) -> str:
        """The next id, `PREFIX-007`; numbers are never handed out twice, whatever the prefix."""
        self.next_item_id = max(self.next_item_id, highest_number(prefix, self.items)) + 1
        return f"{prefix}-{self.next_item_id:03d}"

    def remove(self, item_id: str) -> Item:
        """Take an item out; BacklogError if there is none of this id."""
        item = self.item(item_id)
        del self.items[item_id]
        return item


def highest_number(prefix: str, ids: Iterable[str]) -> int:
    """The highest N among ids of the form PREFIX-N, 0 if there is none."""
    start = f"{prefix}-"
    suffixes = (item_id[len(start) :] for item_id in ids if item_id.startswith(start))
    numbers = (int(s) for s in suffixes if s.isascii() and s.isdecimal() and len(s) <= 9)
    return max(numbers, default=0)


def normalise_title(title: str) -> str:
    """What makes two titles the same: their words, without case and punctuation."""
    folded = title.casefold()
    return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


def _one_line_title(title: str) -> str:
    """A title without line breaks, control characters and spaces around it."""
    return "".join(c for c in " ".join(title.split()) if c.isprintable())


def _refuse_bad_values(owner: str, changes: Mapping[str, object]) -> None:
    for key, value in changes.items():
        problem = _value_problem(key, value) if value is not None else ""
        if value is None and key in REQUIRED_KEYS:
            problem = f"{key} cannot be removed"
        if problem:
            raise BacklogError(f"{owner}: {problem}")


# ---- Life cycle ----------------------------------------------------------------------------------

LEGAL_TRANSITIONS: Mapping[str, frozenset[str]] = {
    "new": frozenset({"scoping", "blocked"}),
    "scoping": frozenset({"ready", "blocked"}),
    "ready": frozenset({"in_progress", "blocked"}),
    "in_progress": frozenset({"done", "blocked"}),
    "done": frozenset(),
    "blocked": frozenset({"new", "scoping", "ready", "in_progress"}),
}
_NOT_BLOCKED: Mapping[str, object] = dict.fromkeys(
    ("blocked_from_status", "blocked_reason", "blocked_type", "unblock_context")
)


def transition(draft: Draft, item_id: str, status: str, now: datetime) -> Item:
    """Move an item to another status; BacklogError, and nothing changed, if it may not go there.

    Entering `blocked` remembers where it came from, leaving it clears what the block recorded.
    """
    item = draft.item(item_id)
    if status not in LEGAL_TRANSITIONS[item["status"]]:
        allowed = ", ".join(w for w in STATUS_WORDS if w in LEGAL_TRANSITIONS[item["status"]])
        raise BacklogError(
            f"{item_id}: it is {item['status']} and cannot become {status};"
            f" possible is {allowed or 'nothing'}"
        )
    changes: dict[str, object] = {"status": status}
    if item["status"] == "blocked":
        changes |= _NOT_BLOCKED
    if status == "blocked":
        changes["blocked_from_status"] = item["status"]
    return draft.update(item_id, now, **changes)


def block(draft: Draft, item_id: str, reason: str, now: datetime, kind: str | None = None) -> Item:
    """Block an item until a human unblocks it; `kind` is one of BLOCK_WORDS. BacklogError if it
    is blocked already or done."""
    _refuse_bad_values(item_id, {"blocked_reason": reason, "blocked_type": kind})
    transition(draft, item_id, "blocked", now)
    return draft.update(item_id, now, blocked_reason=reason, blocked_type=kind)


def unblock(
    draft: Draft, item_id: str, now: datetime, notes: str | None = None, override: bool = False
) -> Item:
    """Put a blocked item back to where it was, with fresh attempts.

    `notes` reach the next prompt; `override` lets it pass the guardrails from now on.
    BacklogError if it is not blocked.
    """
    item = draft.item(item_id)
    if item["status"] != "blocked":
        raise BacklogError(f"{item_id}: it is not blocked, but {item['status']}")
    back = item.get("blocked_from_status", "new")
    transition(draft, item_id, back if back in LEGAL_TRANSITIONS["blocked"] else "new", now)
    changes: dict[str, object] = {"attempts": None}
    if notes and notes.strip():
        changes["unblock_context"] = notes.strip()
    if override:
        changes["guardrail_override"] = True
    return draft.update(item_id, now, **changes)


def advance(
    draft: Draft, item_id: str, phases: Sequence[str], to: str | None, now: datetime
) -> Item:
    """Move an item that is in progress to the next of its main phases, or to the one named.

    BacklogError if it is not in progress or there is no such phase.
    """
    item = draft.item(item_id)
    if item["status"] != "in_progress":
        raise BacklogError(f"{item_id}: it is {item['status']}; only items in_progress advance")
    current, choice = item.get("phase"), ", ".join(phases)
    if to is None and current not in phases:
        where = f"in {current}, which is no main phase" if current else "in no phase"
        raise BacklogError(f"{item_id}: it is {where}; name one with --to: {choice}")
    if to is None and current == phases[-1]:
        raise BacklogError(f"{item_id}: {current} is its last phase; 'complete' finishes it")
    phase = phases[phases.index(current or "") + 1] if to is None else to
    if phase not in phases:
        raise BacklogError(f"{item_id}: no main phase {phase}; there are {choice}")
    return draft.update(item_id, now, phase=phase, phase_pool="main", attempts=None)


def archive(draft: Draft, item_id: str, now: datetime) -> Item:
    """Take an item out of the backlog and out of all dependencies; returns it."""
    item = draft.remove(item_id)
    for other in dependants_of(draft, item_id):
        rest = [need for need in other["dependencies"] if need != item_id]
        draft.update(other["id"], now, dependencies=rest or None)
    return item


def dependants_of(draft: Draft, item_id: str) -> list[Item]:
    """The other items that depend on this one."""
    others = (item for key, item in draft.items.items() if key != item_id)
    return [item for item in others if item_id in item.get("dependencies", ())]


# ---- New items -----------------------------------------------------------------------------------


class FollowUp(_Record):
    """New work as an agent reports it."""

    title: str
    context: str | None = None
    size: str | None = None
    risk: str | None = None


def add_follow_ups(
    draft: Draft, prefix: str, origin: str, follow_ups: Sequence[FollowUp], now: datetime
) -> list[Item]:
    """Add what an agent suggests as new items; returns those added.

    One that an open item already covers (same words in the title), or that cannot be added, is
    left out with a warning on the draft.
    """
    if not follow_ups:
        return []
    open_titles = {
        normalise_title(item["title"]): item["id"]
        for item in reversed(draft.items.values())
        if item["status"] != "done"
    }
    added: list[Item] = []
    for follow_up in follow_ups:
        known = open_titles.get(normalise_title(follow_up.title))
        if known:
            draft.warnings.append(f"follow-up {follow_up.title!r} is already there as {known}")
            continue
        try:
            item = draft.add(
                prefix,
                follow_up.title,
                now,
                size=follow_up.size,
                risk=follow_up.risk,
                origin=origin,
                description=context_description(follow_up.context),
            )
        except BacklogError as error:
            draft.warnings.append(f"follow-up {follow_up.title!r} is left out: {error}")
            continue
        open_titles[normalise_title(item["title"])] = item["id"]
        added.append(item)
    return added


def context_description(text: str | None) -> dict[str, str] | None:
    """A description that holds the text as its context; None for a blank one."""
    if not text or not text.strip():
        return None
    return {key: text.strip() if key == "context" else "" for key in DESCRIPTION_KEYS}


# ==== 11. What a phase decides ====================================================================
#
# Each of these edits one draft and so is one save. They may be applied again to a fresh draft, when
# the file changed underneath or after a crash, and must come to the same answer.

TRIAGE = "triage"  # the phase that rates and routes a new item; no pipeline lists it
DEFAULT_PIPELINE = "feature"

# What the operator may have edited while a phase ran, although it is for us to set. `attempts` and
# `updated` are left out: our own saves change them meanwhile.
CONTESTED_KEYS = [key for key in ITEM_KEYS if key in OWNED_KEYS - {"attempts", "updated"}]


class Route(_Record):
    """What a pipeline is to items: the names of its phases, in the order in which they run."""

    pre: tuple[str, ...]
    main: tuple[str, ...]


class Rules(_Record):
    """What the config says about items."""

    prefix: str  # of new ids
    limits: Mapping[str, str]  # by measure (size, complexity, risk): what may run without a human
    pipelines: Mapping[str, Route]
    source: str  # where the pipelines are, as a message names it


class PhaseResult(_Record):
    """What an agent reported, leniently parsed; `warnings` names every field that was dropped."""

    item_id: str
    phase: str
    result: Literal["phase_complete", "subphase_complete", "failed", "blocked"]
    summary: str
    context: str | None = None
    ratings: Mapping[str, str] = {}  # size, complexity, risk, impact as far as given
    follow_ups: tuple[FollowUp, ...] = ()
    pipeline_type: str | None = None
    commit_summary: str | None = None
    duplicates: tuple[str, ...] = ()  # ids of items that triage takes for the same
    description: Mapping[str, str] = {}
    requires_human_review: bool | None = None
    block_type: str | None = None
    warnings: tuple[str, ...] = ()


class Applied(_Record):
    """What applying an outcome to the backlog did, for the log and for counting."""

    state: Literal["completed", "advanced", "again", "blocked", "dropped"]
    item: Item  # after the change (as last known, when it left the backlog)
    reason: str = ""  # blocked: why
    follow_ups: tuple[str, ...] = ()  # ids
    warnings: tuple[str, ...] = ()
    worklog: str = ""  # text to append


def pipeline_name(item: Item) -> str:
    """An item that names no pipeline is on `feature`."""
    return item.get("pipeline_type") or DEFAULT_PIPELINE


def unknown_pipeline(name: str, rules: Rules) -> str:
    """The reason an item with such a pipeline is blocked."""
    known = ", ".join(sorted(rules.pipelines))
    return f"unknown pipeline type {name!r}; {rules.source} has: {known}"


def guardrail_objection(item: Item, limits: Mapping[str, str], before: Item | None = None) -> str:
    """Why a human has to decide before the item goes on; "" when it may.

    Names every measure with its value and limit. An unset rating passes, an equal one too.
    `before`: only what has risen since then counts. `guardrail_override` waives everything.
    """
    if item.get("guardrail_override"):
        return ""
    now: Mapping[str, object] = item
    since: Mapping[str, object] = before or {}
    objections: list[str] = []
    if now.get("requires_human_review") and not since.get("requires_human_review"):
        objections.append("human review is required")
    excesses = [
        f"{measure} {now[measure]} (limit {limit})"
        for measure, limit in limits.items()
        if _rank(measure, now) > max(_rank(measure, limits), _rank(measure, since))
    ]
    if excesses:
        objections.append(f"the guardrails are exceeded by {', '.join(excesses)}")
    if not objections:
        return ""
    remedy = f"orchestrator unblock {item['id']} --override-guardrails"
    return f"{' and '.join(objections)}; accept it with: {remedy}"


def _rank(measure: str, ratings: Mapping[str, object]) -> int:
    """How high a rating is; -1 without one."""
    return (None, *RATING_WORDS[measure]).index(_cast(str, ratings.get(measure))) - 1


def apply_result(
    draft: Draft, started: Item, result: PhaseResult, rules: Rules, now: datetime
) -> Applied:
    """Apply what a phase reported: ratings, follow-ups, the next phase or status, the worklog text.

    `started` is the item as the phase began: status, phase and pool follow from it, whatever the
    operator has made of them meanwhile. A failed result blocks the item: its attempts are used up.
    """
    item_id, noted = result.item_id, len(draft.warnings)
    origin = f"{item_id}/{result.phase}"
    added = add_follow_ups(draft, rules.prefix, origin, result.follow_ups, now)
    if item_id in draft.items:
        applied = _Decision(draft, started, result, rules, now).made()
    else:  # removed meanwhile: what the phase said is kept in the worklog alone
        reason = "the item left the backlog while the phase ran"
        told = _told(started, result, f"{result.summary} ({reason})", now)
        applied = Applied("dropped", started, reason, worklog=told)
    return applied._replace(
        follow_ups=tuple(item["id"] for item in added), warnings=tuple(draft.warnings[noted:])
    )


def charge_attempt(draft: Draft, started: Item, now: datetime) -> int:
    """Charge a failed attempt to the item; returns how many the current phase has had."""
    attempts = (draft.items.get(started["id"], started).get("attempts") or 0) + 1
    if started["id"] in draft.items:
        draft.update(started["id"], now, attempts=attempts)
    return attempts


def _told(item: Item, result: PhaseResult, summary: str, now: datetime) -> str:
    """The worklog's text for a result."""
    words = {"phase_complete": "Complete", "subphase_complete": "Subphase Complete"}
    outcome = words.get(result.result, result.result.capitalize())
    return worklog_entry(now, item["id"], item["title"], result.phase, outcome, summary)


def _blocked(
    draft: Draft,
    item_id: str,
    phase: str,
    reason: str,
    now: datetime,
    kind: str | None = None,
    outcome: str = "Blocked",
) -> Applied:
    """Block the item; the attempts start anew when it is unblocked."""
    reason = reason or f"{phase} gave no reason"
    draft.update(item_id, now, attempts=None)
    item = block(draft, item_id, reason, now, kind)
    told = worklog_entry(now, item_id, item["title"], phase, outcome, reason)
    return Applied("blocked", item, reason, worklog=told)


class _Decision:
    """What becomes of an item by the result of its phase, while it is decided."""

    def __init__(
        self, draft: Draft, started: Item, result: PhaseResult, rules: Rules, now: datetime
    ) -> None:
        self.draft, self.started, self.result = draft, started, result
        self.rules, self.now = rules, now

    @property
    def item(self) -> Item:
        return self.draft.items[self.result.item_id]

    def update(self, **changes: object) -> Item:
        return self.draft.update(self.result.item_id, self.now, **changes)

    def stop(self, reason: str, kind: str | None = None, outcome: str = "Blocked") -> Applied:
        item_id, phase = self.result.item_id, self.result.phase
        return _blocked(self.draft, item_id, phase, reason, self.now, kind, outcome)

    def made(self) -> Applied:
        """The decision, with a warning for every edit by hand that it overrules."""
        ours: Mapping[str, object] = self.started
        theirs: dict[str, object] = dict(self.item)
        contested = [key for key in CONTESTED_KEYS if theirs.get(key) != ours.get(key)]
        self.update(**{key: ours.get(key) for key in contested})
        self.take_ratings()
        applied = self.decide()
        final: Mapping[str, object] = applied.item
        self.draft.warnings += [
            f"{self.result.item_id}: {key} was set to {theirs.get(key)!r} while"
            f" {self.result.phase} ran; the run has the last word: {final.get(key)!r}"
            for key in contested
            if theirs.get(key) != final.get(key)
        ]
        return applied

    def take_ratings(self) -> None:
        """One that stands is a floor: an agent may raise it, and ask for a review, never waive."""
        given = self.result.ratings
        higher = {key: given[key] for key in given if _rank(key, given) > _rank(key, self.item)}
        self.update(**higher)
        if self.result.requires_human_review:
            self.update(requires_human_review=True)

    def decide(self) -> Applied:
        """Block the item, with the question that its phase leaves, or let it go on."""
        result = self.result
        reason = result.context or result.summary
        if result.result == "failed":
            return self.stop(reason, result.block_type, "Failed")
        question = self.duplicate_question()
        if result.result == "blocked":
            return self.stop("; ".join(filter(None, (reason, question))), result.block_type)
        told = _told(self.update(attempts=None), result, result.summary, self.now)
        if result.phase != TRIAGE:
            applied = self.go_on()
        else:
            self.describe()
            applied = self.stop(question, "decision") if question else self.route()
        return applied._replace(worklog=told + applied.worklog)

    def go_on(self) -> Applied:
        """After a phase of a pipeline: the same again, the next one, ready, or done.

        An item that a raised rating stops has moved on already: unblocked, it repeats nothing.
        """
        if self.result.result == "subphase_complete":
            return self.unless_objected("again", since=self.started)
        phase = self.result.phase
        name = pipeline_name(self.update(unblock_context=None))  # its notes have been used
        route = self.rules.pipelines.get(name, Route((), ()))
        pool, phases = ("pre", route.pre) if phase in route.pre else ("main", route.main)
        if phase not in phases:
            return self.stop(f"pipeline {name!r} has no phase {phase!r} to go on from")
        following = phases[phases.index(phase) + 1 :]
        if following:
            self.update(phase=following[0], phase_pool=pool)
            return self.unless_objected("advanced", since=self.started)
        if pool == "pre":
            return self.make_ready()
        transition(self.draft, self.result.item_id, "done", self.now)
        item = archive(self.draft, self.result.item_id, self.now)
        return Applied("completed", item, worklog=archive_entry(self.now, item))

    def route(self) -> Applied:
        """After triage: small and safe items are ready, others start with the pre-phases.

        What needs a human is stopped here, before a pre-phase costs anything.
        """
        if self.result.result == "subphase_complete":
            return self.stop("triage cannot be completed in parts")
        name = self.result.pipeline_type or pipeline_name(self.item)
        if name not in self.rules.pipelines:
            return self.stop(unknown_pipeline(name, self.rules))
        if self.result.pipeline_type:
            self.update(pipeline_type=name)
        item = transition(self.draft, self.result.item_id, "scoping", self.now)
        pre = self.rules.pipelines[name].pre
        if not pre or (item.get("size") == "small" and item.get("risk") in ("low", None)):
            return self.make_ready()
        self.update(phase=pre[0], phase_pool="pre")
        return self.unless_objected("advanced")

    def make_ready(self) -> Applied:
        """What needs a human is blocked as a ready item, so that nothing is repeated."""
        self.update(phase=None, phase_pool=None)
        transition(self.draft, self.result.item_id, "ready", self.now)
        return self.unless_objected("advanced")

    def unless_objected(
        self, state: Literal["advanced", "again"], since: Item | None = None
    ) -> Applied:
        """Let the item be where it is now, unless the guardrails object."""
        objection = guardrail_objection(self.item, self.rules.limits, since)
        return self.stop(objection, "decision") if objection else Applied(state, self.item)

    def describe(self) -> None:
        """Take the description, field by field: what the triage leaves out stays as it was."""
        given = {field: text for field, text in self.result.description.items() if text}
        if given:
            texts = {**self.item.get("description", {}), **given}
            self.update(description={field: texts.get(field, "") for field in DESCRIPTION_KEYS})

    def duplicate_question(self) -> str:
        """What to ask the operator about items that ask for the same; "" if there are none."""
        item_id, items, known = self.result.item_id, self.draft.items, []
        for other in self.result.duplicates:
            if other in items and other != item_id:
                known.append(f"{other} ({_one_line_title(items[other]['title'])})")
            else:
                text = f"{item_id}: there is no other item {other} that it could repeat"
                self.draft.warnings.append(text)
        if not known:
            return ""
        return (
            f"it seems to be a duplicate of {', '.join(known)}; if it is:"
            f" orchestrator close {item_id} --reason duplicate, else:"
            f" orchestrator unblock {item_id} --notes 'no duplicate'"
        )


# ---- Promotion, repair, and what the operator takes out ------------------------------------------


def promote(draft: Draft, item_id: str, rules: Rules, now: datetime) -> Applied:
    """Move a ready item to its first main phase, or block it where it may not start.

    State "dropped", and nothing changed, if it is not ready any more: the file may have been
    edited since the promotion was chosen.
    """
    item = draft.items.get(item_id)
    if item is None or item["status"] != "ready":
        return Applied("dropped", item or Item(id=item_id), "it is not ready any more")
    route = rules.pipelines.get(pipeline_name(item))
    if route is None:
        reason = unknown_pipeline(pipeline_name(item), rules)
    else:
        reason = guardrail_objection(item, rules.limits)
    if route is None or reason:
        return _blocked(draft, item_id, "promotion", reason, now, "decision")
    transition(draft, item_id, "in_progress", now)
    item = draft.update(item_id, now, phase=route.main[0], phase_pool="main", attempts=None)
    return Applied("advanced", item)


def repair_items(draft: Draft, rules: Rules, now: datetime) -> list[str]:
    """Before a run: bring items that could never be scheduled back on track; says what it did.

    Such items come from hand edits and configs that have changed. Dependencies on items that left
    the backlog are removed; ids that were never handed out stay: to remove them would lose the
    order meant.
    """
    messages: list[str] = []
    issued = IssuedIds(rules.prefix, draft)
    for item_id, item in list(draft.items.items()):
        needs = item.get("dependencies", [])
        finished = [need for need in needs if need not in draft.items and need in issued]
        if finished:
            rest = [need for need in needs if need not in finished]
            draft.update(item_id, now, dependencies=rest or None)
            gone = ", ".join(finished)
            messages.append(f"{item_id}: dropped its dependencies on finished items: {gone}")
        if item["status"] in ("scoping", "in_progress", "ready"):
            messages += _repair_active(draft, item, rules, now)
    return messages


def _repair_active(draft: Draft, item: Item, rules: Rules, now: datetime) -> list[str]:
    item_id, name = item["id"], pipeline_name(item)
    route = rules.pipelines.get(name)
    if route is None:
        reason = unknown_pipeline(name, rules)
        block(draft, item_id, reason, now, "decision")
        return [f"{item_id}: blocked: {reason}"]
    if item["status"] == "ready" or item.get("phase"):
        return []
    what = f"{item_id}: was {item['status']} without a phase"
    scoping = item["status"] == "scoping"
    if scoping and not route.pre:
        transition(draft, item_id, "ready", now)
        objection = guardrail_objection(item, rules.limits)
        if objection:
            block(draft, item_id, objection, now, "decision")
            return [f"{what}; blocked: {objection}"]
        return [f"{what}; {name} has no pre-phases, so it is ready"]
    first = (route.pre if scoping else route.main)[0]
    draft.update(item_id, now, phase=first, phase_pool="pre" if scoping else "main")
    return [f"{what}; starts with {first}"]


class Farewell(_Record):
    """An item that the operator took out of the backlog."""

    item: Item
    dependants: tuple[str, ...]  # ids that waited for it
    worklog: str


def take_out(
    draft: Draft, item_id: str, status: Literal["Done", "Closed"], why: str, now: datetime
) -> Farewell:
    """Take an item out of the backlog, from wherever it is, because the operator says so.

    Whatever depended on it depends on it no longer, and says why in its context.
    """
    item = draft.item(item_id)
    dependants = tuple(one["id"] for one in dependants_of(draft, item_id))
    archive(draft, item_id, now)
    fate = "was done outside of this backlog" if status == "Done" else "was closed"
    note = f"[{item_id}, which this depended on, {fate}] {_one_line_title(item['title'])}"
    note = f"{note}: {why}" if why else note
    for one in dependants:
        texts = dict.fromkeys(DESCRIPTION_KEYS, "") | draft.items[one].get("description", {})
        context = "\n".join(filter(None, (texts["context"], note)))
        draft.update(one, now, description={**texts, "context": context})
    return Farewell(item, dependants, archive_entry(now, item, status, why))


# ---- Ids and dependencies ------------------------------------------------------------------------


class IssuedIds:
    """The ids that were ever handed out, as far as a backlog can tell: `"WRK-007" in issued`.

    The counter is shared by all prefixes, so an id counts with the prefix of the config or of any
    item that is still there.
    """

    def __init__(self, prefix: str, backlog: Backlog | Draft) -> None:
        self.prefixes = {prefix}
        self.highest = backlog.next_item_id
        for item_id in backlog.items:
            if match := _regex(_ITEM_ID).fullmatch(item_id):
                self.prefixes.add(match[1])
                self.highest = max(self.highest, int(match[2]))

    def __contains__(self, item_id: str) -> bool:
        match = _regex(_ITEM_ID).fullmatch(item_id)
        return bool(match and match[1] in self.prefixes and int(match[2]) <= self.highest)


def unmet_dependencies(items: Mapping[str, Item], item: Item) -> list[str]:
    """The ids that must be done first: an id that is not in the backlog (any more) is met."""
    return [
        need
        for need in item.get("dependencies", ())
        if need in items and items[need]["status"] != "done"
    ]


def dependency_cycles(items: Mapping[str, Item]) -> list[list[str]]:
    """Cycles among the items that are not done, each once and as a closed path A, B, A.

    Depth-first search without recursion: a chain may be longer than Python's own stack.
    """
    needs = {item_id: unmet_dependencies(items, item) for item_id, item in items.items()}
    cycles: list[list[str]] = []
    finished: set[str] = set()
    for start in needs:
        path = {} if start in finished else {start: iter(needs[start])}  # in walking order
        while path:
            here = next(reversed(path))
            need = next(path[here], None)
            if need is None:
                finished.add(here)
                del path[here]
            elif need in path:
                walked = list(path)
                cycles.append([*walked[walked.index(need) :], need])
            elif need not in finished:
                path[need] = iter(needs[need])
    return cycles


# ==== 12. Filters =================================================================================


class FilterError(BacklogError):
    """A filter makes no sense."""


class Filter(_Record):
    """One `--only`: the item's value is one of these, or, negated, none of them."""

    key: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.key}{'!=' if self.negated else '='}{','.join(self.values)}"


# What may be written for each word; ratings may be shortened to their first letter.
_FILTER_WORDS: Mapping[str, Mapping[str, str]] = {
    "status": {word: word for word in STATUS_WORDS},
    **{
        key: {short: word for word in RATING_WORDS[key] for short in (word, word[0])}
        for key in ("impact", "size", "risk", "complexity")
    },
}
_FILTER_KEYS = (*_FILTER_WORDS, "tag", "pipeline_type", "id", "origin", "priority")
_FILTER_FORM = r"(?s)\s*([^=]*?)\s*(!?=)\s*(.*?)\s*"


def parse_filter(text: str) -> Filter:
    """Read `KEY=VALUE[,VALUE…]` or `KEY!=VALUE[,VALUE…]`; FilterError says what is wrong.

    Key and words in any case, with their first letters as short forms of sizes and levels; ids,
    tags, pipelines and origins exactly as they are.
    """
    parts = re.fullmatch(_FILTER_FORM, text)
    if parts is None or not parts[1] or not parts[3]:
        form = "KEY=VALUE[,VALUE…] or KEY!=VALUE[,VALUE…]"
        raise FilterError(f"Filter must be in format {form}, not '{text}'")
    key = parts[1].lower()
    if key not in _FILTER_KEYS:
        known = f"{did_you_mean(key, _FILTER_KEYS)}. Supported: {', '.join(_FILTER_KEYS)}"
        raise FilterError(f"Unknown filter field: {key}{known}")
    values: list[str] = []
    for token in parts[3].split(","):
        value = _filter_value(key, token.strip(), text)
        if value in values:
            raise FilterError(
                f"Duplicate value '{value}' in comma-separated list for field '{key}'"
            )
        values.append(value)
    return Filter(key, tuple(values), parts[2] == "!=")


def _filter_value(key: str, token: str, text: str) -> str:
    if not token:
        raise FilterError(f"Empty value in comma-separated list: '{text}'")
    words = _FILTER_WORDS.get(key)
    if words is not None:
        if token.lower() not in words:
            valid = ", ".join(dict.fromkeys(words.values()))
            hint = did_you_mean(token, set(words.values()))
            problem = f"Invalid value '{token}' for field '{key}'{hint}"
            raise FilterError(f"{problem}. Valid values: {valid}")
        return words[token.lower()]
    if key == "priority":
        if not re.fullmatch(r"[+-]?[0-9]{1,15}", token):
            raise FilterError(f"Invalid value '{token}' for field 'priority': no whole number")
        return str(int(token))
    return token


def check_filters(filters: Sequence[Filter]) -> None:
    """Refuse flags that contradict or repeat each other; all of them have to hold together."""
    for position, later in enumerate(filters):
        for earlier in filters[:position]:
            if later == earlier and later.key == "tag":
                raise FilterError(f"Duplicate filter: {later} specified multiple times")
            if later.key != "tag" and earlier[::2] == later[::2]:
                sign = "!=" if later.negated else "="
                raise FilterError(
                    f"Field '{later.key}' specified multiple times in separate --only flags;"
                    f" put the values in one: --only {later.key}{sign}value1,value2"
                )


def matches(item: Item, filters: Iterable[Filter]) -> bool:
    """Whether an item passes all filters. One without the key passes only a negated filter."""
    return all(
        filter_.negated != any(value in filter_.values for value in _filtered_values(item, filter_))
        for filter_ in filters
    )


def matching(backlog: Backlog, filters: Sequence[Filter]) -> set[str]:
    """The ids of all items that pass."""
    return {item_id for item_id, item in backlog.items.items() if matches(item, filters)}


def _filtered_values(item: Item, filter_: Filter) -> Sequence[str]:
    """What a filter compares: an origin `ID/phase` is found by the id alone, too."""
    if filter_.key == "tag":
        return item.get("tags", ())
    if filter_.key == "origin":
        origin = item.get("origin", "")
        return (origin, origin.partition("/")[0])
    value = _cast(Mapping[str, object], item).get(filter_.key)
    return () if value is None else (str(value),)


# ==== 13. Worklog =================================================================================


def worklog_entry(
    now: datetime, item_id: str, title: str, phase: str, outcome: str, summary: str
) -> str:
    """The worklog's text for a phase that ended; a summary of several lines stays in its bullet."""
    facts = {"Phase": phase, "Outcome": outcome, "Summary": summary}
    return _worklog_text(now, item_id, title, facts)


def archive_entry(now: datetime, item: Item, status: str = "Done", why: str = "") -> str:
    """The worklog's text for an item that leaves the backlog, done or closed, and a word on it."""
    facts = {"Status": status, "Phase": item.get("phase") or "N/A"}
    if why:
        facts["Summary" if status == "Done" else "Reason"] = why
    return _worklog_text(now, item["id"], item["title"], facts)


def _worklog_text(now: datetime, item_id: str, title: str, facts: Mapping[str, str]) -> str:
    bullets = "".join(f"- **{name}:** {_indented(text)}\n" for name, text in facts.items())
    return f"## {timestamp(now)} — {item_id} ({_one_line_title(title)})\n\n{bullets}\n---\n\n"


def _indented(text: str) -> str:
    """Text that belongs to a Markdown bullet, whatever is in it."""
    first, *others = text.strip().splitlines() or [""]
    return "\n".join([first, *(f"  {line}".rstrip() for line in others)])


def recent_worklogs(directory: Path) -> list[Path]:
    """The files of the last two months that have one, the older one first."""
    return sorted(directory.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9].md"))[-2:]


def append_worklog(directory: Path, now: datetime, text: str) -> Path:
    """Append an entry to the month's file and bring it to the disk; returns the file.

    Does nothing when one of the last two months has exactly this text already, so that it can be
    done again after a crash; nor for an empty text. Raises OSError.
    """
    from datetime import UTC

    path = directory / f"{now.astimezone(UTC):%Y-%m}.md"
    written = {month: month.read_bytes() for month in recent_worklogs(directory)}
    entry = text.encode("utf-8", "replace")
    if not entry or any(entry in content for content in written.values()):
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        before = written.get(path, b"")
        file.write(b"\n" * (bool(before) and not before.endswith(b"\n")) + entry)
        file.flush()
        os.fsync(file.fileno())
    if path not in written:
        sync_directory(directory)
    return path


def sync_directory(directory: Path) -> None:
    """Make renames and new files in a directory survive a power loss; OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def swap_files(new: Path, path: Path) -> None:
    """Put a file in another one's place, and that one in its place, in one act; OSError.

    Linux has renameat2(2) for it, macOS renamex_np(2). Where there is neither, or nothing at
    `path`, or the file system cannot do it, this is a plain rename.
    """
    import ctypes  # it takes as long to load as the rest of this module

    libc, at, one, other = ctypes.CDLL(None), -100, os.fsencode(new), os.fsencode(path)
    with suppress(AttributeError):  # an older C library
        if sys.platform == "darwin":
            failed = libc.renamex_np(one, other, 2)
        else:
            failed = libc.renameat2(at, one, at, other, 2)
        if not failed:
            return
    os.rename(new, path)


# ==== 14. Store ===================================================================================

_SAVE_TRIES = 20  # how often somebody may change the file just as it is to be replaced
_LOCK_POLL_S = 0.02
_WRECK_S = 1.0  # how long a cut-off file has to stay as it is before it is written again


class SaveError(BacklogError):
    """The backlog could not be brought to disk, or not be read from there.

    What was decided is in memory: see `Store.unsaved`.
    """


def _merge_changes(
    disk: Backlog, changes: Iterable[KeyChange], warn: Callable[[str], None]
) -> Backlog:
    """Carry out on one backlog what was decided on another, key by key.

    Where the disk has neither the old nor the new value, somebody else has changed it too: ours
    stays for OWNED_KEYS, theirs otherwise, with a warning that names both. An item removed by hand
    stays removed.
    """
    draft = Draft(disk)
    lost: dict[str, list[str]] = {}
    for change in changes:
        if not change.item_id:
            draft.next_item_id = max(draft.next_item_id, _cast(int, change.new))
        elif not change.key and change.new is not None:
            _merge_addition(draft, _cast(Item, change.new), warn)
        elif not change.key:
            _merge_removal(draft, change, warn)
        elif change.item_id in draft.items:
            _merge_key(draft, change, warn)
        elif change.key != "updated":
            dropped = f"{change.key}: {change.old!r} → {change.new!r}"
            lost.setdefault(change.item_id, []).append(dropped)
    for item_id, dropped_changes in lost.items():
        warn(f"{item_id} was removed by hand; dropped {', '.join(dropped_changes)}")
    return draft.backlog()


def _merge_key(draft: Draft, change: KeyChange, warn: Callable[[str], None]) -> None:
    item = draft.items[change.item_id]
    theirs, ours = _cast(Mapping[str, object], item).get(change.key), change.new
    if theirs == ours:
        return
    if change.key == "updated":
        ours = max(str(theirs), str(ours))
    elif theirs != change.old:
        kept = ours if change.key in OWNED_KEYS else theirs
        warn(
            f"{change.item_id}: {change.key} was changed by hand to {theirs!r} and by the"
            f" orchestrator to {ours!r}; kept {kept!r}"
        )
        ours = kept
    draft.items[change.item_id] = _with_keys(item, {change.key: ours})


def _merge_addition(draft: Draft, item: Item, warn: Callable[[str], None]) -> None:
    """Add our item. The same one on disk has been saved before, and maybe edited since; another
    one of that id was added by hand meanwhile, then ours gets a new id."""
    theirs = draft.items.get(item["id"])
    if theirs is None:
        draft.items[item["id"]] = item
    elif theirs["created"] != item["created"]:
        new_id = draft.allocate(item["id"].rpartition("-")[0] or item["id"])
        draft.items[new_id] = _cast(Item, {**item, "id": new_id})
        warn(
            f"{item['id']} was added by hand as {theirs['title']!r} and by the orchestrator as"
            f" {item['title']!r}; the latter is {new_id} now"
        )


def _merge_removal(draft: Draft, change: KeyChange, warn: Callable[[str], None]) -> None:
    theirs = draft.items.pop(change.item_id, None)
    if theirs is not None:
        for edit in _item_changes(change.item_id, _cast(Item, change.old), theirs):
            warn(
                f"{change.item_id}: {edit.key} was changed by hand from {edit.old!r} to"
                f" {edit.new!r}, but the item is finished and has left the backlog"
            )


def _is_saved(disk: Backlog, changes: Iterable[KeyChange]) -> bool:
    """Whether a save of these changes has reached the file: it has a time that they set.

    A save is one act, so what else differs from them has been edited since.
    """
    items = _cast(Mapping[str, Mapping[str, object]], disk.items)
    return any(
        items[change.item_id].get(change.key or "created") == _time_set(change)
        for change in changes
        if change.item_id in items and _time_set(change) is not None
    )


def _time_set(change: KeyChange) -> object:
    """The time that a change writes: it is exact to the microsecond, so no other change has it."""
    if change.key == "updated":
        return change.new
    added = change.new if change.item_id and not change.key else None
    return _cast(Item, added)["created"] if added else None


def _edit_document(document: Document, changes: Sequence[KeyChange]) -> Document:
    """The document with the changes made; the given one stays as it is.

    Raises BacklogError if something cannot be written as YAML.
    """
    if not changes:
        return document
    edited = document.copy()
    places = {item["id"]: position for position, item in enumerate(document.items)}
    updates: dict[str, dict[str, object]] = {}
    removed: list[int] = []
    for change in changes:
        if change.key and change.item_id:
            updates.setdefault(change.item_id, {})[change.key] = change.new
        elif change.item_id and change.new is None:
            removed.append(places[change.item_id])
    try:
        for item_id, update in updates.items():
            edited.update(places[item_id], update)
        for position in sorted(removed, reverse=True):
            edited.remove(position)
        for change in changes:
            if not change.item_id:
                edited.set_top(change.key, change.new)
            elif not change.key and change.new is not None:
                edited.append(_cast(Mapping[str, object], change.new))
    except ValueError as error:
        raise BacklogError(f"the change cannot be written as YAML: {error}") from error
    return edited


class Store:
    """The backlog file: the only code that writes it.

    Every change re-reads the file under a lock, merges what others did, and replaces the file
    atomically, so it is safe at any time beside other commands and editors (which take no lock:
    what was replaced is looked at once more, and put back if it is not what was read). Text that
    somebody else wrote is never overwritten without having been read and merged.

    For one thread at a time. `warn` gets complete messages for the operator.
    """

    def __init__(
        self,
        path: Path,
        lock_path: Path,
        *,
        warn: Callable[[str], None],
        lock_limit_s: float = 30.0,
    ) -> None:
        """`lock_limit_s`: how long to wait for another process that holds the lock."""
        self.path = path
        self.lock_path = lock_path
        self.backlog = Backlog({}, 0)  # as adopted; may be ahead of the disk
        self.waiting: YamlError | BacklogError | None = None  # why nothing can be saved now
        self._warn = warn
        self._lock_limit_s = lock_limit_s
        self.older: frozenset[bytes] = frozenset()  # what only git puts there: no edit of anybody
        self._disk: _FileState | None = None  # the last usable content of the file
        self._found: bytes | None = None  # what is there now: that, or what is worth nothing
        self._unusable = b""  # the content that `waiting` complains about
        self._unusable_since = 0.0  # monotonic seconds
        self._copy_seen: tuple[int, int] | None = None  # see `copy_path`
        self._mode = 0o644

    # -- for everybody -----------------------------------------------------------------------------

    def load(self, fallback: bytes | None = None) -> Backlog:
        """Read the file anew, forgetting what is only in memory.

        `fallback` is what it held, for the case that the file is gone: the first `transact` writes
        it again.

        Raises YamlError or BacklogError (with every problem found) if it cannot be used.
        """
        with self._locked():
            with suppress(OSError):
                self.temporary.unlink()  # left by a save that was killed
            return self.look(fallback)

    def look(self, fallback: bytes | None = None) -> Backlog:
        """`load` that touches nothing, not even the lock: a save replaces the file in one act."""
        self._copy_seen = self._stamp_of_copy()  # before the file: what is saved since counts
        data = self._read()
        content = fallback if data is None else data
        if content is None:
            raise BacklogError(
                f"{self.path}: there is no such file; if git has it, `git restore {self.path.name}`"
                " brings it back, else 'orchestrator init' makes one"
            )
        self._disk = self._parse(content)
        self.backlog = self._disk.backlog
        self.waiting, self._found = None, data
        return self.backlog

    def transact(
        self,
        edits: Sequence[Callable[[Draft], object]],
        *,
        ahead: Callable[[list[KeyChange]], None] | None = None,
    ) -> list[object]:
        """Make several edits and save once; returns the result of each.

        Each edit is called exactly once, with a draft of its own that has the effects of those
        before; if it raises, the exception is its result and its changes are dropped. `ahead` is
        called with all that is about to be written (or has to wait); if it raises, the edits are
        dropped. Without any difference nothing is written.

        If the file on disk cannot be used, it stays as it is, the changes stay in memory, and
        `waiting` says why until a later call (without edits, too) finds it mended.
        Raises SaveError, with the changes in memory, if the file cannot be locked, read or written.
        """
        document: Document | None = None
        failure: SaveError | None = None
        with ExitStack() as held:
            try:
                held.enter_context(self._locked())
                self._catch_up()
                document = self._working_document()
            except SaveError as error:
                failure = error
            results, document = self._apply(edits, document, ahead)
            if document is not None and not self.waiting:
                try:
                    self._save(document, ahead)
                except SaveError as error:
                    failure = error
        if failure is not None:
            raise failure
        return results

    def unsaved(self) -> list[KeyChange]:
        """What memory has and the disk, as last read, has not."""
        return changes_between(self._last.backlog, self.backlog)

    def restore(self, changes: Sequence[KeyChange]) -> None:
        """Take up changes that an earlier run could not save; the next `transact` writes them.

        Merged like edits made meanwhile, with the same warnings. Nothing happens if they were
        saved after all.
        """
        if not _is_saved(self.backlog, changes):
            self.backlog = _merge_changes(self.backlog, changes, self._warn)

    def merge_bytes(self, base: bytes, theirs: bytes) -> None:
        """Take up what leads from one content of the file to another, merged as by `restore`.

        An empty `base` is an empty backlog. Raises YamlError or BacklogError.
        """
        old = self._parse(base).backlog if base else Backlog({}, 0)
        changes = changes_between(old, self._parse(theirs).backlog)
        self.backlog = _merge_changes(self.backlog, changes, self._warn)

    def shows_none_of(self, base: bytes, theirs: bytes) -> bool:
        """Whether memory has no trace of what leads from one content of the file to the other.

        An item counts as untouched if all its keys that were changed are as in `base`. Raises
        YamlError or BacklogError.
        """
        old = self._parse(base).backlog if base else Backlog({}, 0)
        new = self._parse(theirs).backlog
        missing = changes_between(self.backlog, new)
        return all(c in missing for c in changes_between(old, new) if c.item_id)

    def committed_bytes(self) -> bytes:
        """The file's bytes now, complete; SaveError if it cannot be read.

        What others wrote is taken up: nothing gets into a commit that this store does not know of.
        """
        with self._locked():
            self._catch_up()
            data = self._read()
        if data is None:
            raise SaveError(f"{self.path}: the file is gone")
        return data

    @property
    def copy_path(self) -> Path:
        """The content that was last saved, by whatever process, where no agent's git reaches it.

        From it a store learns what another command saved, though the file was set back or deleted
        before it looked; and it is what the operator can mend a broken file with.
        """
        return self.lock_path.with_name(f"{self.path.name}.saved")

    def keep_copy(self) -> None:
        """Make the copy hold what the file does, edits by hand included.

        Not if the file has changed since it was read: then the copy may be ahead of memory.
        """
        with self._locked():
            if self._read() == self._last.data != self.last_copy():
                self._keep_copy(self._last.data)

    def last_copy(self) -> bytes | None:
        """The content of the copy, None if there is none."""
        try:
            return self.copy_path.read_bytes()
        except OSError:
            return None

    def disturbed(self) -> bool:
        """Whether anybody has written the file since it was last read or written here."""
        with self._locked():
            return self._read() != self._last.data or self._stamp_of_copy() != self._copy_seen

    def put_back(self) -> bool:
        """Write the file again if somebody removed it or set it back to one of the `older`
        contents; whether that was necessary.

        Those have to be older than what the store saw last, as the commit is that a phase started
        on; what was committed later may hold an edit. Any other content is left for the next
        `transact` to merge.
        """
        with self._locked():
            current, base = self._read(), self._last.data
            self._take_up_copy(current)
            if current == self._last.data or current not in (None, base, *self.older):
                return False
            document = self._working_document()
            return self._replace(document, current)

    # -- memory ------------------------------------------------------------------------------------

    @property
    def _last(self) -> _FileState:
        if self._disk is None:
            raise RuntimeError("Store.load() has to come first")
        return self._disk

    def _apply(
        self,
        edits: Sequence[Callable[[Draft], object]],
        document: Document | None,
        ahead: Callable[[list[KeyChange]], None] | None,
    ) -> tuple[list[object], Document | None]:
        """Make the edits in memory, and in the document so that each is known to be writable."""
        backlog = self.backlog
        results: list[object] = []
        for edit in edits:
            draft = Draft(backlog)
            try:
                result = edit(draft)
                after = draft.backlog()
                if document is not None:
                    document = _edit_document(document, changes_between(backlog, after))
            except Exception as error:  # the caller's business: it is the result of this edit
                results.append(error)
                continue
            backlog = after
            results.append(result)
            for warning in draft.warnings:
                self._warn(warning)
        changes = changes_between(self._last.backlog, backlog)
        if changes and ahead is not None:
            ahead(changes)
        self.backlog = backlog
        return results, document

    def _working_document(self) -> Document:
        """The document of the disk with what is only in memory."""
        try:
            return _edit_document(self._last.document, self.unsaved())
        except BacklogError as error:
            raise SaveError(f"{self.path}: {error}") from error

    def _catch_up(self) -> None:
        """Take up what is on disk now. If it cannot be used, `waiting` says why; SaveError if it
        cannot be read."""
        data, base = self._read(), self._last
        self._take_up_copy(data)
        known = (base.data, self._last.data, *self.older)
        if data is None or data in known or self._is_wreck(data):
            self.waiting, self._found = None, data
        else:
            self._take_up(data, changes_between(base.backlog, self.backlog))

    def _take_up_copy(self, data: bytes | None) -> None:
        """Take up what another process has saved and somebody then overwrote with `data`."""
        stamp = self._stamp_of_copy()
        if stamp == self._copy_seen:
            return
        self._copy_seen = stamp
        saved = self.last_copy()
        if saved is None or saved in (data, self._last.data):
            return
        with suppress(YamlError, BacklogError):  # cut off by a power failure
            self._adopt(self._parse(saved), self.unsaved())

    def _take_up(self, data: bytes, ours: Sequence[KeyChange]) -> None:
        """Merge `ours` into what somebody else wrote, if that can be used."""
        try:
            self._refuse_lost_tail(data)
            disk = self._parse(data)
        except (YamlError, BacklogError) as error:
            if self.waiting is None or data != self._unusable:
                self._unusable_since = time.monotonic()
                self._keep_copy(self._last.data)
                self._warn(
                    f"{error}\nThe file is left as it is; changes wait until it is mended."
                    f" What it held before is in {self.copy_path}"
                )
            self.waiting, self._unusable = error, data
            return
        self.waiting, self._found = None, data
        self._adopt(disk, ours)
        self._keep_copy(data)

    def _adopt(self, disk: _FileState, ours: Sequence[KeyChange]) -> None:
        self._disk = disk
        self.backlog = self._keep_counter(_merge_changes(disk.backlog, ours, self._warn))

    def _is_wreck(self, data: bytes) -> bool:
        """Whether nothing but the beginning of what we saw last has been there for a while.

        Nobody's edit is in that; but an editor at work leaves it so for a moment.
        """
        since = time.monotonic() - self._unusable_since
        stays = self.waiting is not None and data == self._unusable and since >= _WRECK_S
        return stays and self._last.data.startswith(data)

    def _refuse_lost_tail(self, data: bytes) -> None:
        """What an interrupted writer left of our file is no backlog from which items were taken."""
        last, counter = self._last.data, b"\nnext_item_id:"
        if last.startswith(data) and counter in last and counter not in data:
            raise BacklogError(
                f"{self.path.name}: the file is cut off, its last {len(last) - len(data)} bytes are"
                " missing; if that is meant, put 'next_item_id: …' back as its last line"
            )

    def _keep_counter(self, backlog: Backlog) -> Backlog:
        """Never hand out a number twice, whatever became of the counter on disk."""
        highest = self.backlog.next_item_id
        if backlog.next_item_id >= highest:
            return backlog
        self._warn(
            f"{self.path.name}: next_item_id went back from {highest} to {backlog.next_item_id};"
            f" kept {highest}, because ids are never used twice"
        )
        return backlog._replace(next_item_id=highest)

    def _parse(self, data: bytes) -> _FileState:
        return _read_backlog(data, self.path.name, self._warn)

    # -- disk --------------------------------------------------------------------------------------

    @property
    def temporary(self) -> Path:
        """Where the new content is written: one name is enough, only the lock's holder writes."""
        return self.path.with_name(f".{self.path.name}.tmp")

    def _save(
        self, document: Document, ahead: Callable[[list[KeyChange]], None] | None
    ) -> None:
        """Bring memory to disk; whoever changes the file just now is merged first."""
        for _ in range(_SAVE_TRIES):
            found, last = self._found, self._last.data
            # What an agent's `git stash` set back it may pop any moment: that is for `put_back`.
            if (found == last or found in self.older) and not self.unsaved():
                return
            if self._replace(document, found):
                if found != last:
                    what = "gone" if found is None else "set back or cut off"
                    self._warn(f"{self.path}: the file was {what}; it is written again from memory")
                return
            self._catch_up()
            if self.waiting:
                return
            document = self._working_document()
            changes = self.unsaved()
            if changes and ahead is not None:
                ahead(changes)
        raise SaveError(
            f"{self.path}: another program changes the file all the time; stop it, then try again"
        )

    def _replace(self, document: Document, expected: bytes | None) -> bool:
        """Replace the file, which has to hold the bytes `expected` (None: not to exist) until the
        last moment; False if it does not. Then memory and disk are the same."""
        data = document.to_bytes()
        try:
            if data != expected:
                self._write_temporary(data)
                self._keep_copy(data)
                if self._read() != expected or not self._swap_in(expected):
                    return False
                sync_directory(self.path.parent)
        except OSError as error:
            raise SaveError(
                f"{self.path}: the backlog cannot be written ({error.strerror}); mend that and"
                " start again"
            ) from error
        finally:
            with suppress(OSError):
                self.temporary.unlink()
        self._disk = _FileState(data, document, self.backlog)
        self.waiting, self._found = None, data
        return True

    def _swap_in(self, expected: bytes | None) -> bool:
        """Put the temporary file in the file's place; False, and all is as before, if somebody
        had written the file by then."""
        sys.audit("os.rename", self.temporary, self.path, -1, -1)  # hooks do not see the C library
        swap_files(self.temporary, self.path)
        try:
            if self._read(self.temporary) in (None, expected):  # None: a plain rename
                return True
        except SaveError:  # a link by now, say; the next look tells
            pass
        swap_files(self.temporary, self.path)
        return False

    def _keep_copy(self, data: bytes) -> None:
        """Not flushed: it outlives every process, and after a power cut nobody asks for it."""
        unfinished = self.copy_path.with_suffix(".tmp")
        with suppress(OSError):  # a second copy is no reason not to save
            unfinished.write_bytes(data)
            os.replace(unfinished, self.copy_path)
            self._copy_seen = self._stamp_of_copy()

    def _stamp_of_copy(self) -> tuple[int, int] | None:
        try:
            found = self.copy_path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _write_temporary(self, data: bytes) -> None:
        with suppress(FileNotFoundError):
            self.temporary.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(self.temporary, flags, 0o600), "wb") as file:
            os.fchmod(file.fileno(), self._mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path | None = None) -> bytes | None:
        """The file's bytes, None if there is no file; SaveError if it is none that we replace."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a named pipe must not hold us up
        path = path or self.path
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise SaveError(
                    f"{path}: it is a symbolic link, which a save would replace; put the file"
                    " itself there, or name the real file in the config"
                )
            if not stat.S_ISREG(mode):
                raise SaveError(f"{path}: it is not a regular file; move it away")
            with open(os.open(path, flags), "rb") as file:
                self._mode = stat.S_IMODE(mode)
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SaveError(f"{path}: cannot be read ({error.strerror})") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock that all writers of the file take; SaveError if it is not had in time."""
        try:
            self.lock_path.parent.mkdir(exist_ok=True)  # not a folder above it that vanished
            fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SaveError(f"{self.lock_path}: cannot be locked ({error.strerror})") from error
        try:
            self._take_lock(fd)
            os.pwrite(fd, b"%-12d\n" % os.getpid(), 0)  # for the message of whoever waits in vain
            yield
        finally:
            os.close(fd)

    def _take_lock(self, fd: int) -> None:
        give_up = time.monotonic() + self._lock_limit_s
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                    raise SaveError(
                        f"{self.path}: locked for {self._lock_limit_s:g} s by another process"
                        f" (probably {holder or 'unknown'}, see 'ps'); wait for it or end it, then"
                        f" try again; the lock is {self.lock_path}"
                    ) from None
                time.sleep(_LOCK_POLL_S)
