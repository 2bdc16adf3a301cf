"""The backlog: its file, its items and the rules they obey.

BACKLOG.yaml belongs to the operator, who may edit it at any time, and to the orchestrator, which
writes it at every decision. So it is never rendered anew: the lines of the file are the truth, a
save replaces the lines of changed keys and nothing else, and what somebody else has saved in the
meantime is read and merged first. While a run is active, the truth is its journal, out of reach
of any git command: what is in the file counts by what it changes of what was decided before.

Reading order:

1. The YAML subset: what it is, and its one error · 2. From bytes to text · 3. Scalars ·
4. The reader · 5. The writer · 6. Surgical edits · 7. The backlog file as a document ·
8. Fields · 9. Items · 10. Drafts and rules · 11. What a phase decides · 12. Filters ·
13. Worklog · 14. States, and their merge · 15. The journal · 16. Store
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import MAXYEAR, UTC, datetime, timedelta
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self, TypeAlias, TypeVar, cast

T = TypeVar("T")

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

TOP_KEYS = ("schema_version", "items", "next_item_id")

_YAML_MAX_BYTES = 64 * 1024 * 1024
_YAML_MAX_DEPTH = 32
_YAML_MAX_KEY = 1_000  # characters; YAML itself stops at 1,024
_YAML_MAX_DIGITS = 15  # more do not survive a reader that takes numbers for doubles


class YamlError(ValueError):
    """A YAML text that cannot be used: `SOURCE:LINE:COLUMN: PROBLEM`, counted from 1."""

    def __init__(self, source: str, line: int, column: int, problem: str) -> None:
        super().__init__(f"{source}:{line}:{column}: {problem}")
        self.source, self.line, self.column, self.problem = source, line, column, problem


def parse_yaml(data: bytes, source: str = "<yaml>") -> object:
    """Read one document, in linear time; None if it is empty, YamlError, and nothing else, for all
    that is not in the subset. `source` is what messages name."""
    return _YamlReader(_yaml_decode(data, source)[0], source).document().value


# ==== 2. From bytes to text =======================================================================

_YAML_BOM = b"\xef\xbb\xbf"
_YAML_USUAL_BYTES = bytes([9, 10, *range(0x20, 0x7F)])
# Not printable in YAML, or a line break for some readers only.
_YAML_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _yaml_decode(data: bytes, source: str) -> tuple[str, bool, str]:
    """The text of a file, its lines ending in LF; whether it has a BOM; how its lines end."""

    def error(place: int, problem: str) -> YamlError:
        start = data.rfind(b"\n", 0, place) + 1
        column = len(data[start:place].decode(errors="replace")) + 1
        return YamlError(source, data.count(b"\n", 0, place) + 1, column, problem)

    if len(data) > _YAML_MAX_BYTES:
        limit = _YAML_MAX_BYTES >> 20
        raise error(0, f"the file is larger than {limit} MiB; archive what is done")
    bom, newline = data.startswith(_YAML_BOM), "\n"
    data = data.removeprefix(_YAML_BOM)
    if b"\r" in data:
        newline = "\r\n"
        if lone := re.search(rb"\r(?!\n)", data) or re.search(rb"(?<!\r)\n", data):
            what = "a lone carriage return is" if lone[0] == b"\r" else "mixed line endings are"
            remedy = "end lines with LF, or all with CR LF"
            raise error(lone.start(), f"{what} not supported; {remedy}")
        data = data.replace(b"\r\n", b"\n")
    try:
        text = data.decode()
    except UnicodeDecodeError as bad:
        problem = f"invalid UTF-8 (byte 0x{data[bad.start]:02X}); save the file as UTF-8"
        raise error(bad.start, problem) from None
    # To leave out the usual bytes first is six times as fast as searching the text.
    rest = data.translate(None, _YAML_USUAL_BYTES)
    if rest and (found := _YAML_UNPRINTABLE.search(rest.decode())):
        code = f"{ord(found[0]):04X}"
        name = "a byte order mark inside the text" if code == "FEFF" else "this character"
        remedy = f'remove it, or write it as "\\u{code}" in double quotes'
        problem = f"{name} (U+{code}) is not supported; {remedy}"
        raise error(data.index(found[0].encode()), problem)
    return text, bom, newline


# ==== 3. Scalars ==================================================================================

_YAML_CONSTANTS = {
    "null": None, "Null": None, "NULL": None, "~": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
# Written the one way that all parsers read the same: group 1 is the integer part, 2 the rest.
_YAML_NUMBER = re.compile(r"-?(0|[1-9][0-9]*+)((?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?)")
# Everything that some YAML 1.2 parser takes for a number.
_YAML_NUMBER_LIKE = re.compile(
    r"[-+]?(?:(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?"
    r"|0[bB][01]++|0[oO][0-7]++|0[xX][0-9a-fA-F]++|\.(?:inf|Inf|INF|nan|NaN|NAN))"
)
# What stands between quotes, as far as it goes on one line.
_YAML_QUOTED = {"'": re.compile(r"(?:[^']++|'')*+"), '"': re.compile(r'(?:[^"\\]++|\\.)*+')}
_YAML_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")
_YAML_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\",
    "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip
_YAML_FLOW_ITEM = re.compile(
    r" *+('(?:[^']++|'')*+'|\"(?:[^\"\\]++|\\.)*+\""
    r"|(?!- |-[\],])[A-Za-z0-9_./+-]++(?: [A-Za-z0-9_./+-]++)*+) *+(?=[],])"
)
_YAML_FLOW_EMPTY = re.compile(r"\[ *\]|\{ *\}")
_YAML_USUAL_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_-]{0,99}+):(?: |$)")  # most keys, found fast
_YAML_COLON = re.compile(r":(?:[ \t]|$)")

# What a value or key may not begin with: the construct, and what to do instead.
_YAML_REFUSED = {
    "\t": ("a tab character between tokens", "use spaces"),
    "&": ("an anchor (&)", "write the value out wherever it is needed"),
    "*": ("an alias (*)", "write the value out, or quote the text"),
    "!": ("a tag (!)", "remove it, or quote the text"),
    "%": ("a directive indicator (%)", "remove the directive, or quote the text"),
    **{sign: (f"the reserved indicator {sign} at the start", "quote the text") for sign in "@`,]}"},
    "[": ("a flow sequence in this place", "write it behind its key or dash, or quote the text"),
    "{": ("a flow mapping in this place", 'write "key: value" lines, or quote the text'),
    "|": ("a block scalar in this place", "write the | behind its key or dash"),
    ">": ("a block scalar in this place", "write the > behind its key or dash"),
}
# The same, if a space or the end of the line is behind it.
_YAML_REFUSED_ALONE = {
    "-": ("a sequence entry on the line of its key", "put it on the next line, or quote the text"),
    "?": ("an explicit key (?)", 'write "key: value"'),
    ":": ("an empty key", 'write "" for an empty key'),
}


def _yaml_text_start(line: str, start: int = 0) -> int:
    """Column of the first character from `start` on that is not a space."""
    return len(line) - len(line[start:].lstrip(" "))


def _yaml_quote_end(line: str, begin: int, quote: str) -> int:
    """Where the closing quote stands of what begins at `begin`, or the end of its text."""
    return cast(re.Match[str], _YAML_QUOTED[quote].match(line, begin)).end()


# ==== 4. The reader ===============================================================================


class _YamlNode(NamedTuple):
    """A value and where it stands; lines and columns count from 0."""

    value: object
    start: int  # the line of its key or dash
    end: int  # the line behind its last one
    head: int  # the column behind the colon or dash
    tail: str = ""  # spaces and comment behind it (behind the colon, if it is on the lines below)
    column: int = -1  # of the keys or dashes of a block collection
    keys: Mapping[str, _YamlNode] = {}  # what a block mapping holds
    elements: Sequence[_YamlNode] = ()  # what a block sequence holds


class _YamlReader:
    """Reads lines into nodes, by recursive descent.

    Every method that reads something starts on line `at`, and leaves `at` on the next line that
    holds more than a comment. `column` or `parent` is that of the collection which owns what is
    read: whatever is indented deeper belongs to its entry.
    """

    def __init__(self, text: str, source: str) -> None:
        self.complete = text[-1:] in ("", "\n")  # whether the last line has an end
        self.lines = text.split("\n") if self.complete else [*text.split("\n"), ""]
        self.last = len(self.lines) - 1  # this line is always blank
        self.source = source
        self.at = 0
        self.indent = 0  # of line `at`; -1: nothing is left
        self.end = 0  # the line behind the last one that was read
        self.tail = ""  # what stood behind the last scalar on its line

    def fail(self, column: int, problem: str, remedy: str, at: int | None = None) -> NoReturn:
        """Raise for what stands at `column` of line `at`, the present one if not given."""
        line = self.at if at is None else at
        raise YamlError(self.source, line + 1, column + 1, f"{problem}; {remedy}")

    def refuse(self, column: int, construct: str, remedy: str, at: int | None = None) -> NoReturn:
        """Raise for a construct that is not in the subset."""
        self.fail(column, f"{construct} is not supported here", remedy, at)

    def document(self) -> _YamlNode:
        self.seek(0, opening=True)
        line = self.lines[self.at]
        if line[:3] == "---" and line[3:4] in ("", " "):
            if line[3:].lstrip(" ")[:1] not in ("", "#"):
                self.refuse(4, "content on the line of `---`", "move it to the next line")
            self.seek(self.at + 1)
        if self.indent < 0:
            return _YamlNode(None, 0, self.last, 0)
        if self.indent > 0:
            self.refuse(self.indent, "an indented document", "start it in column 1")
        at, first = self.at, self.lines[self.at][0]
        if first not in "[{" and not self.is_dash(0) and not self.is_entry(0):
            self._check_start(0)
            self.refuse(0, "a bare scalar document", 'write "key: value" or "- value"')
        node = self._below(0, 1) if first not in "[{" else _YamlNode(self._flow(0), at, self.end, 0)
        if self.indent >= 0:
            problem = "this line does not belong to what is above"
            self.fail(self.indent, problem, "make the file one list or one mapping")
        return node

    def seek(self, line: int, opening: bool = False) -> None:
        """All before `line` is read: go to the next line with content."""
        self.end = line
        text = self.lines[line].lstrip(" ")
        while text[:1] in ("", "#") and line < self.last:
            line += 1
            text = self.lines[line].lstrip(" ")
        self.at, self.indent = line, len(self.lines[line]) - len(text) if text else -1
        if text[:1] == "\t":
            self.refuse(self.indent, "a tab character in indentation", "use spaces", line)
        if self.indent == 0 and text[:3] in ("---", "...") and text[3:4] in ("", " ", "\t"):
            name = "start" if text[0] == "-" else "end"
            if name == "end" or not opening or text[3:4] == "\t":
                what = f"a document {name} marker ({text[:3]})"
                self.refuse(0, what, "keep one document per file", line)

    def _filled(self, line: int) -> int:
        """The first line from `line` on that is not blank, or the last one."""
        return next((n for n in range(line, self.last) if self.lines[n].strip(" ")), self.last)

    def _sign_alone(self, column: int) -> str:
        """Which of `-`, `?`, `:` stands at `column`, with a space or the line's end behind it."""
        sign, behind = self.lines[self.at][column : column + 1], self.lines[self.at][column + 1 :]
        return sign if sign in _YAML_REFUSED_ALONE and behind[:1] in ("", " ") else ""

    def is_dash(self, column: int) -> bool:
        return self._sign_alone(column) == "-"

    def is_entry(self, column: int) -> bool:
        """Whether a mapping entry (or what is wrongly written like one) starts at `column`."""
        line = self.lines[self.at]
        first = line[column : column + 1]
        if first in ("'", '"'):
            close = _yaml_quote_end(line, column + 1, first)
            colon = _yaml_text_start(line, close + 1)
            return line[close : close + 1] == first and line[colon : colon + 2] in (":", ": ")
        if first in ("|", ">", "[", "{"):
            return False
        text = line[column:].partition(" #")[0]
        return self._sign_alone(column) in ("?", ":") or ": " in text or text.endswith(":")

    def _below(self, column: int, depth: int) -> _YamlNode:
        """Read the block collection that starts at `column` of line `at`."""
        if depth > _YAML_MAX_DEPTH:
            self.refuse(column, f"nesting deeper than {_YAML_MAX_DEPTH}", "flatten the structure")
        start, keys, elements = self.at, dict[str, _YamlNode](), list[_YamlNode]()
        found: object
        if self.is_dash(column):
            while not elements or (self.indent == column and self.is_dash(column)):
                elements.append(self.element(column, depth))
            found = [node.value for node in elements]
        elif self.is_entry(column):
            while not keys or self.indent == column:
                key, colon = self._key(column)
                if key in keys:
                    problem = f"duplicate key {key[:40]!r}, first on line {keys[key].start + 1}"
                    self.fail(column, problem, "remove one of the two")
                keys[key] = self.value(colon + 1, column, depth, dash_from=column)
            found = {key: node.value for key, node in keys.items()}
        else:
            self._check_start(column)
            self.refuse(column, "a scalar on a line of its own", "write it behind its key or dash")
        if self.indent > column:
            where = f"column {self.indent + 1}, theirs is {column + 1}"
            problem = f"this line is indented deeper than its neighbours ({where})"
            self.fail(self.indent, problem, "align it with them or with the block above")
        return _YamlNode(found, start, self.end, column, "", column, keys, elements)

    def element(self, column: int, depth: int) -> _YamlNode:
        """Read one entry of a sequence; its dash stands at `column`."""
        line = self.lines[self.at]
        start = _yaml_text_start(line, column + 1)
        compact = line[start : start + 1] not in ("", "#") and self.is_entry(start)
        if compact or self.is_dash(start):
            return self._below(start, depth + 1)._replace(head=column + 1)
        return self.value(column + 1, column, depth, dash_from=column + 1)

    def _key(self, column: int) -> tuple[str, int]:
        """The key at `column` of line `at`, and the column of its colon."""
        line = self.lines[self.at]
        usual = _YAML_USUAL_KEY.match(line, column)
        if usual and usual[1] not in _YAML_CONSTANTS:
            return usual[1], usual.end(1)
        if line[column] in "'\"" and self.is_entry(column):
            close = _yaml_quote_end(line, column + 1, line[column])
            key = self._unquoted(column + 1, close, self.at, line[column])
            colon = _yaml_text_start(line, close + 1)
        else:
            if self.indent == column and self.is_dash(column):
                remedy = "indent it, or write it directly below its key"
                self.fail(column, "a sequence entry among mapping keys", remedy)
            self._check_start(column)
            found = _YAML_COLON.search(line, column)
            if not found or line[column] in "'\"":
                hint = "a quoted key stands on one line with its colon, a text that goes on is"
                self.fail(column, 'expected "key: value"', f"{hint} indented deeper than its key")
            colon, key = found.start(), line[column : found.start()].rstrip(" ")
            if found[0] == ":\t":
                what, remedy = "a tab character behind a colon", "use spaces, or quote the key"
                self.refuse(colon + 1, what, remedy)
            for sign, name in (("\t", "a tab character"), ("#", "`#`"), (":", "`:`")):
                if sign in key:
                    self.refuse(column + key.index(sign), f"{name} in a plain key", "quote the key")
            if key == "<<":
                self.refuse(column, "a merge key (<<)", "write the keys out, or quote it")
            if key[0] in "-?":
                self.refuse(column, f"a plain key that starts with `{key[0]}`", "quote the key")
            if key in _YAML_CONSTANTS or _YAML_NUMBER_LIKE.fullmatch(key):
                self.fail(column, f"the key {key[:40]} is not a string", "quote it")
        if len(key) > _YAML_MAX_KEY:
            self.refuse(column, f"a key of more than {_YAML_MAX_KEY} characters", "shorten it")
        return key, colon

    def value(self, head: int, column: int, depth: int, dash_from: int) -> _YamlNode:
        """Read what stands behind the colon or dash of an entry, from `head` of line `at` on.

        `dash_from`: the smallest column at which a sequence on the lines below belongs to it.
        """
        at, line = self.at, self.lines[self.at]
        start = _yaml_text_start(line, head)
        first = line[start : start + 1]
        found: object
        if first in ("", "#"):
            self.seek(at + 1)
            if self.indent <= column and not (self.indent == dash_from and self.is_dash(dash_from)):
                return _YamlNode(None, at, at + 1, head, line[head:])
            below = self._below(self.indent, depth + 1)
            return below._replace(start=at, head=head, tail=line[head:])
        if first in ("'", '"'):
            found = self._quoted(start, column)
        elif first in ("|", ">"):
            found = self._block_scalar(start, column)
        elif first in ("[", "{"):
            found = self._flow(start)
        else:
            found = self._plain(start, column)
        return _YamlNode(found, at, self.end, head, self.tail)

    def _check_start(self, column: int) -> None:
        """Raise if no plain text can start at `column` of line `at`."""
        first = self.lines[self.at][column]
        if first in _YAML_REFUSED:
            self.refuse(column, *_YAML_REFUSED[first])
        if self._sign_alone(column):
            self.refuse(column, *_YAML_REFUSED_ALONE[first])

    def _plain(self, start: int, parent: int) -> object:
        opened, first = (self.at, start), self.lines[self.at][start]
        if not first.isalnum():
            self._check_start(start)
        if first in "?:":
            self.refuse(start, f"a plain text that starts with `{first}`", "quote the text")
        parts = [self._plain_line(start)]
        while self.indent > parent:
            start, gap = self.indent, self.lines[self.end : self.at]
            if self.tail.strip(" ") or any(line.strip(" ") for line in gap):
                what = "text after a comment inside a multi-line plain scalar"
                self.refuse(start, what, "move the comment, or quote the text")
            sign = self._sign_alone(start)
            if sign or self.is_entry(start):
                why = f"this line continues line {self.end}, because it is indented deeper"
                what = f'"{sign or ":"} " inside a plain scalar ({why})'
                self.refuse(start, what, "align it with its neighbours, or quote the text")
            parts += ("\n" * len(gap) or " ", self._plain_line(start))
        return "".join(parts) if len(parts) > 1 else self._resolve(parts[0], *opened)

    def _plain_line(self, start: int) -> str:
        """The plain text on line `at` from `start` on, without the comment behind it."""
        line = self.lines[self.at]
        comment = line.find(" #", start)
        text = line[start:].rstrip(" ") if comment < 0 else line[start:comment].rstrip(" ")
        self.tail = line[start + len(text) :]
        if "\t" in text:
            place = start + text.index("\t")
            remedy = "use a space, or quote the text"
            self.refuse(place, "a tab character in a plain scalar", remedy)
        if ": " in text or text.endswith(":"):
            place = start + (text + " ").index(": ")
            self.refuse(place, '": " inside a plain scalar', "quote the text")
        self.seek(self.at + 1)
        return text

    def _resolve(self, text: str, line: int, column: int) -> object:
        """The value of a plain scalar of one line, by the core schema."""
        if text in _YAML_CONSTANTS:
            return _YAML_CONSTANTS[text]
        if not _YAML_NUMBER_LIKE.fullmatch(text):
            return text
        number, most = _YAML_NUMBER.fullmatch(text), _YAML_MAX_DIGITS
        if number and not number[2] and len(number[1]) <= most:
            return int(text)
        if number and number[2] and len(text) <= 2 * most and math.isfinite(float(text)):
            return float(text)
        what = f"a number in a form that parsers read differently ({text[:40]})"
        remedy = f"quote it, or write it as a decimal number of at most {most} digits"
        return self.refuse(column, what, remedy, line)

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
            kept = line[begin:].rstrip(" ")
            stop = begin + len(kept)
            if kept.endswith("\t"):
                what = "a tab character at the end of a line of a quoted scalar"
                self.refuse(stop - 1, what, "write it as \\t, in double quotes", at)
            # An odd backslash escapes the line break, or the first of the spaces before it.
            escaped = quote == '"' and (len(kept) - len(kept.rstrip("\\"))) % 2 == 1
            joined = escaped and stop == len(line)
            stop += -1 if joined else escaped
            parts += (glue, self._unquoted(begin, stop, at, quote))
            below = self._filled(at + 1)
            begin = _yaml_text_start(self.lines[below])
            if below == self.last:
                problem = "this quoted scalar is never closed"
                self.fail(start, problem, "add the closing quote", opened)
            if self.lines[below][begin] == "\t":
                what = "a tab character at the start of a line of a quoted scalar"
                self.refuse(begin, what, "use spaces, or write it as \\t in double quotes", below)
            if begin <= parent:
                problem = "the continuation of a quoted scalar is not indented"
                remedy = f"indent it, or close the quote of line {opened + 1}"
                self.fail(begin, problem, remedy, below)
            blank = below - at - 1
            if joined and blank:
                what = "a blank line after an escaped line break"
                self.refuse(0, what, "write \\n, or remove the line", at + 1)
            at, glue = below, "" if joined else "\n" * blank or " "
        parts += (glue, self._unquoted(begin, close, at, quote))
        self._check_behind(at, close + 1, "the closing quote")
        self.seek(at + 1)
        return "".join(parts)

    def _unquoted(self, begin: int, stop: int, at: int, quote: str) -> str:
        """The text of a piece of a quoted scalar on line `at`, `''` and escapes resolved."""
        text = self.lines[at][begin:stop]
        if quote == "'":
            return text.replace("''", "'")

        def escaped(match: re.Match[str]) -> str:
            code, place = match[1], begin + match.start()
            if len(code) == 1:
                if code not in _YAML_ESCAPES:
                    remedy = "write \\\\ for a backslash, or use single quotes"
                    self.refuse(place, f"the unknown escape \\{code}", remedy, at)
                return _YAML_ESCAPES[code]
            number = int(code[1:], 16)
            if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
                what = f"\\{code}, which is not a character (or half of one),"
                self.refuse(place, what, "write the character itself", at)
            return chr(number)

        return _YAML_ESCAPE.sub(escaped, text) if "\\" in text else text

    def _check_behind(self, at: int, column: int, what: str) -> None:
        """Nothing but a comment may stand on the line from `column` on; it becomes the tail."""
        self.tail = self.lines[at][column:]
        text = self.tail.lstrip(" ")
        if text and (text[0] != "#" or self.tail[0] != " "):
            place = _yaml_text_start(self.lines[at], column)
            remedy = "quote all of the text, or put a space before the # of a comment"
            self.refuse(place, f"text after {what}", remedy, at)

    def _block_scalar(self, start: int, parent: int) -> str:
        """Read a literal or folded scalar; its lines are indented deeper than `parent`."""
        at, line = self.at, self.lines[self.at]
        signs = line[start + 1 :].partition(" ")[0]
        chomp, digit = signs.strip("123456789"), signs.strip("+-")
        if len(chomp) > 1 or len(digit) > 1 or len(signs) != len(chomp) + len(digit):
            remedy = "write `|`, `>`, `|-` or the like alone, and the text on the next lines"
            self.refuse(start, "a malformed block scalar header", remedy)
        self._check_behind(at, start + 1 + len(signs), "a block scalar header")
        tail, indent = self.tail, parent + int(digit or "1")
        if not digit:  # as deep as its first line with text
            first = self._filled(at + 1)
            if (found := _yaml_text_start(self.lines[first])) > parent and first < self.last:
                indent = found
                if max(map(len, self.lines[at + 1 : first]), default=0) > indent:
                    what = "a leading blank line has more spaces than the first line of the block"
                    self.fail(indent, f"{what} scalar", "empty the blank lines", first)
        content, end = self._block_lines(at + 1, indent, parent)
        text = "\n".join(content).rstrip("\n")
        trailing = len(content) - text.count("\n") - 1
        if not text:
            self.refuse(start, "a block scalar without content", 'write ""')
        if end == self.last and not self.complete and chomp != "-":
            problem = "the file ends inside a block scalar without a final line break"
            self.fail(len(self.lines[end - 1]), problem, "add one", end - 1)
        self.seek(end if chomp == "+" else end - trailing)
        self.tail = tail
        if line[start] == ">":
            # A line break becomes a space, or less by one where blank lines follow, but not around
            # lines that are indented more.
            alike = r"(?m)^([^ \n].*)\n(\n*)(?=[^ \n])"
            text = re.sub(alike, lambda match: match[1] + (match[2] or " "), text)
        return text + "\n" * {"-": 0, "": 1, "+": trailing + 1}[chomp]

    def _block_lines(self, first: int, indent: int, parent: int) -> tuple[list[str], int]:
        """The lines of a block scalar without their indentation, and the line behind them."""
        pad, at = " " * indent, first
        content: list[str] = []
        while at < self.last:
            line = self.lines[at]
            text = line[indent:] if line.startswith(pad) else line.lstrip(" ")
            if text and not line.startswith(pad):
                break
            if text[:1] == "\t":
                what = "a line of a block scalar that starts with a tab character"
                self.refuse(indent, what, "use spaces, or a quoted text", at)
            if text and not text.strip(" "):
                what = "a blank line with more spaces than the indentation of its block scalar"
                self.refuse(indent, what, "empty the line", at)
            content.append(text)
            at += 1
        below = _yaml_text_start(self.lines[at])
        if at < self.last and below > parent and self.lines[at][below] != "#":
            problem = "this line is indented less than the first line of the block scalar"
            self.fail(below, problem, "align the two", at)
        return content, at

    def _flow(self, start: int) -> object:
        """Read a flow collection that stands on one line."""
        at, line = self.at, self.lines[self.at]
        empty = _YAML_FLOW_EMPTY.match(line, start)
        if line[start] == "{" and not empty:
            remedy = 'write one "key: value" per line'
            self.refuse(start, "a flow mapping that is not empty", remedy)
        found: list[object] = []
        place = empty.end() if empty else start + 1
        while not empty and line[place - 1] != "]":
            match = _YAML_FLOW_ITEM.match(line, place)
            if not match:
                place = place if found else _yaml_text_start(line, place)
                what = "a flow sequence that is not a one-line list of simple scalars"
                self.refuse(place, what, "write one `- value` per line")
            begin, end = match.span(1)
            if line[begin] in "'\"":
                found.append(self._unquoted(begin + 1, end - 1, at, line[begin]))
            else:
                found.append(self._resolve(match[1], at, begin))
            place = match.end() + 1
        self._check_behind(at, place, "the closing bracket")
        self.seek(at + 1)
        return {} if line[start] == "{" else found


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
_YAML_QUOTE_NUMBER = re.compile(
    r"[-+]*(?:0_*[bB][-+01_]+|0_*[oO][-+0-7_]+|0_*[xX][-+0-9a-fA-F_]+"
    r"|[0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]+)?|[0-9][0-9_]*(?::[0-9]{1,2})+(?:\.[0-9_]*)?"
    r"|\.(?:inf|Inf|INF|nan|NaN|NAN)|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?)"
)


def render_yaml(value: object) -> str:
    """Write a dict or list (or None: an empty text) as one document in block style; ValueError for
    what cannot be written so that every reader agrees on it."""
    if value is None:
        return ""
    if not isinstance(value, dict | list):
        raise ValueError(f"a document is a mapping or a list, not {type(value).__name__}")
    lines = _yaml_block(value, 0, 0, 1) if value else [_yaml_scalar(value)]
    return "\n".join([*lines, ""])


def _yaml_block(
    value: Mapping[Any, object] | Sequence[object], column: int, offset: int, depth: int
) -> list[str]:
    """The lines of a dict or list that is not empty, its keys or dashes at `column`; the dashes of
    lists in it stand `offset` right of their key."""
    if depth > _YAML_MAX_DEPTH:
        raise ValueError(f"nesting deeper than {_YAML_MAX_DEPTH} cannot be written")
    pad, lines = " " * column, []
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or len(key) > _YAML_MAX_KEY:
                limit = f"a string of at most {_YAML_MAX_KEY} characters"
                raise ValueError(f"the key {str(key)[:40]!r} is not {limit}")
            plain = key.replace("-", "_").isidentifier() and key.isascii() and _yaml_is_plain(key)
            name = key if plain else _yaml_quoted(key)
            lines += _yaml_entry(f"{pad}{name}:", item, column, offset, depth)
        return lines
    for item in value:
        if isinstance(item, dict | list) and item:
            inner = _yaml_block(item, column + 2, offset, depth + 1)
            lines += [f"{pad}- {inner[0][column + 2 :]}", *inner[1:]]
        else:
            lines += _yaml_entry(f"{pad}-", item, column, offset, depth)
    return lines


def _yaml_entry(
    head: str, value: object, column: int, offset: int, depth: int, tail: str = ""
) -> list[str]:
    """The lines of `head` (up to its colon or dash, which stands at `column`), value, comment."""
    if isinstance(value, dict | list) and value:
        inner = column + (2 if isinstance(value, dict) else offset)
        return [head + tail, *_yaml_block(value, inner, offset, depth + 1)]
    if isinstance(value, str) and "\n" in value and value[0] not in " \n":
        # A literal block holds it, if no reader disagrees about its line breaks.
        odd = value.endswith(("\n\n", " ")) or " \n" in value
        if not odd and not _YAML_UNPRINTABLE.search(value.replace("\n", "")):
            body, sign = (value[:-1], "|") if value.endswith("\n") else (value, "|-")
            pad = " " * (column + 2)
            return [f"{head} {sign}{tail}", *(line and pad + line for line in body.split("\n"))]
    return [f"{head} {_yaml_scalar(value)}{tail}"]


def _yaml_scalar(value: object) -> str:
    """How a value is written on one line."""
    if isinstance(value, str):
        return value if _yaml_is_plain(value) else _yaml_quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        if abs(value) >= 10**_YAML_MAX_DIGITS:
            raise ValueError(f"an integer of more than {_YAML_MAX_DIGITS} digits cannot be written")
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        # YAML 1.1 knows exponents only behind a decimal point and with a sign.
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    if isinstance(value, dict | list):
        return "{}" if isinstance(value, dict) else "[]"
    raise ValueError(f"{value} of type {type(value).__name__} cannot be written")


def _yaml_is_plain(text: str) -> bool:
    """Whether every reader takes `text`, unquoted and on one line, for just this text."""
    if not text or text[0] in _YAML_INDICATORS or text in _YAML_RESERVED:
        return False
    if ": " in text or " #" in text or text[-1] == ":" or text != text.strip():
        return False
    return not (_YAML_UNPRINTABLE.search(text) or _YAML_QUOTE_NUMBER.fullmatch(text))


def _yaml_quoted(text: str, double: bool = False) -> str:
    """`text` in single quotes, or in double quotes if it needs escapes (or if `double`)."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xD800 <= code <= 0xDFFF:
            raise ValueError(f"a text with half a character (U+{code:04X}) cannot be written")
        short = {"\n": "\\n", "\t": "\\t"}.get(match[0])
        return short or (f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}")

    if not double and not _YAML_UNPRINTABLE.search(text):
        return "'" + text.replace("'", "''") + "'"
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + _YAML_UNPRINTABLE.sub(escape, text) + '"'


# ==== 6. Surgical edits ===========================================================================
#
# Only the lines of changed keys are written anew; a comment belongs to the line below it, what
# stands behind a value stays on its line.


def _yaml_same(one: object, other: object) -> bool:
    """Whether two values are the same in YAML: 1, 1.0 and true are not, key order is nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_yaml_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_yaml_same, one, other))
    same_type = type(one) is type(other) or (isinstance(one, str) and isinstance(other, str))
    return same_type and one == other


def _yaml_changed(old: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """A mapping with other values for some keys; None removes one."""
    new = {**old, **changes}
    return {key: new[key] for key in new if new[key] is not None or key not in changes}


def _yaml_edited(
    lines: list[str], node: _YamlNode, new: object, column: int, offset: int
) -> list[str]:
    """The lines of an entry, its key or dash at `column`, changed to read `new`."""
    if _yaml_same(node.value, new):
        return lines[node.start : node.end]
    if node.keys and isinstance(new, dict) and new:
        return _yaml_edited_mapping(lines, node, new, tuple(new), offset)
    if node.elements and isinstance(new, list) and new and node.elements[0].start > node.start:
        return _yaml_edited_list(lines, node, new, offset)
    head, behind = lines[node.start][: node.head], lines[node.start][node.head :].lstrip(" ")
    tail = node.tail.rstrip(" ")
    if isinstance(new, str) and "\n" not in new and behind[:1] in ("'", '"'):
        written = _yaml_quoted(new, double=behind[0] == '"')
        return [f"{head} {written}{tail}"]
    if behind[:1] == "[" and node.value and isinstance(new, list) and new:
        texts = [item for item in new if isinstance(item, str)]
        for place, text in enumerate(texts):
            found = _YAML_FLOW_ITEM.match(text + "]") if _yaml_is_plain(text) else None
            if not found or found.end() < len(text):
                texts[place] = _yaml_quoted(text)
        if len(texts) == len(new):
            return [f"{head} [{', '.join(texts)}]{tail}"]
    return _yaml_entry(head, new, column, offset, 1, tail)


def _yaml_edited_mapping(
    lines: list[str], node: _YamlNode, new: Mapping[str, object], order: Sequence[str], offset: int
) -> list[str]:
    """The lines of a block mapping changed to read `new`; a new key is put behind the one that is
    before it in `order`, else to the end."""
    added: dict[str, list[str]] = {key: [] for key in node.keys}
    first, *_, last = [*added, *added]
    place = first
    for key in order:
        if key in added:
            place = key
        elif key in new:
            added[place].append(key)
    added[last] += [key for key in new if key not in added and key not in order]
    done = node.keys[first].start
    header, prefix = lines[node.start : done], lines[done][: node.column]
    out: list[str] = []
    for key, part in node.keys.items():
        out += lines[done : part.start]
        if key in new:
            out += _yaml_edited(lines, part, new[key], node.column, offset)
        if added[key]:
            out += _yaml_block({name: new[name] for name in added[key]}, node.column, offset, 1)
        done = part.end
    top = next(n for n, line in enumerate(out) if line.lstrip(" ")[:1] not in ("", "#"))
    out[top] = prefix + out[top][len(prefix) :]  # there may be a dash in it
    return [*header, *out]


def _yaml_edited_list(
    lines: list[str], node: _YamlNode, new: list[object], offset: int
) -> list[str]:
    """The lines of a block list changed to read `new`: an element that stays keeps its own."""
    kept: defaultdict[str, list[list[str]]] = defaultdict(list)
    done = node.start + 1
    for part in node.elements:
        kept[repr(part.value)].append(lines[done : part.end])
        done = part.end
    out = lines[node.start : node.start + 1]
    for value in new:
        known = kept.get(repr(value))
        out += known.pop(0) if known else _yaml_block([value], node.column, offset, 1)
    return out


# ==== 7. The backlog file as a document ===========================================================

_YAML_UNSOUND = "an edit cannot be written so that it reads back; nothing was changed"
_YAML_REMEMBERED = 50_000  # chunks whose values are kept: a few versions of a large backlog


@lru_cache(maxsize=_YAML_REMEMBERED)
def read_chunk(chunk: str) -> object:
    """The value of one chunk of a Document, remembered by its text: never change it. YamlError."""
    return _yaml_chunk(chunk).value


def _yaml_chunk(chunk: str) -> _YamlNode:
    reader = _YamlReader(chunk, "item")
    reader.seek(0)
    column = max(reader.indent, 0)
    if not reader.is_dash(column):
        reader.fail(column, "this is not an item", "begin it with `- `")
    node = reader.element(column, 2)
    if reader.indent >= 0:
        what = "this line does not belong to the item above"
        reader.fail(reader.indent, what, "indent it, or remove it")
    return node


@dataclass(frozen=True)
class Document:
    """A backlog file: a head up to the `items:` line, one chunk of lines per item, and a tail.

    A chunk begins with the comments directly above its dash, and ends where the next one begins;
    blank lines and comments behind the last item belong to the tail. An edit gives a new document;
    what it changes is read back and compared, and ValueError if it would not read as intended.
    """

    source: str  # the file's name, for messages
    bom: bool
    newline: str  # "\n" or "\r\n"
    head: str
    chunks: tuple[str, ...]
    tail: str

    @classmethod
    def parse(cls, data: bytes, source: str) -> Document:
        """Read a file; YamlError if it is not a mapping, or `items` is neither list nor null."""
        text, bom, newline = _yaml_decode(data, source)
        lines = text.splitlines(keepends=True)
        cuts = _yaml_cuts(lines)
        chunks = tuple("".join(lines[start:end]) for start, end in itertools.pairwise(cuts))
        above, below = "".join(lines[: cuts[0]]), "".join(lines[cuts[-1] :])
        made = cls(source, bom, newline, above, chunks, below)
        try:
            _ = made.items
            frame = _YamlReader(made._frame, source).document()
        except YamlError:
            _YamlReader(text, source).document()  # says the same with the lines of the file
            raise

        items, line = frame.keys.get("items"), frame.start
        if frame.value is None:
            remedy = "take the file back from git history, or write `items: []`"
            problem = f"the file holds no backlog; {remedy}"
        elif not frame.keys:
            problem = "this is not a mapping; write the backlog's list below `items:`"
        elif items and items.value not in ([0] if chunks else None, []):
            remedy = "write one `- id: …` below it per item"
            line, problem = items.start, f"`items` is not a list in block style; {remedy}"
        else:
            return made._ended(chunks, below, made.items[-1]) if chunks else made
        raise YamlError(source, line + 1, 1, problem)

    def to_bytes(self) -> bytes:
        """The file; without edits, the bytes that were parsed."""
        text = "".join((self.head, *self.chunks, self.tail)).replace("\n", self.newline)
        return (_YAML_BOM if self.bom else b"") + text.encode()

    @cached_property
    def items(self) -> tuple[object, ...]:
        """The values under `items`, as they were read: an entry may be no mapping."""
        return tuple(map(read_chunk, self.chunks))

    @cached_property
    def top(self) -> Mapping[str, object]:
        """The other keys and values of the file."""
        found = _YamlReader(self._frame, self.source).document().keys
        return {key: node.value for key, node in found.items() if key != "items"}

    def line_of(self, index: int, key: str = "") -> int:
        """The line, from 1, of an item's dash, or of a key if the item has it."""
        node = _yaml_chunk(self.chunks[index])
        above = "".join((self.head, *self.chunks[:index])).count("\n")
        return above + node.keys.get(key, node).start + 1

    @property
    def column(self) -> int:
        """The column of the items' dashes."""
        return _yaml_column(self.chunks[0]) if self.chunks else 0

    @property
    def _frame(self) -> str:
        """The file with one entry, 0, instead of all items; with none if there are none."""
        hole = " " * self.column + "- 0\n" if self.chunks else ""
        return self.head + hole + self.tail

    def with_top(self, changes: Mapping[str, object]) -> Document:
        """Change keys of the file besides the items."""
        old, lines = _YamlReader(self._frame, self.source).document(), self._frame.split("\n")
        new = _yaml_changed(cast(Item, old.value), changes)
        edited = _yaml_edited_mapping(lines, old, new, TOP_KEYS, self.column)
        lines = [*lines[: old.start], *edited, *lines[old.end :]]
        found = _YamlReader("\n".join(lines), self.source).document()
        if not _yaml_same(found.value, new):
            raise ValueError(_YAML_UNSOUND)
        if not new.get("items"):
            return replace(self, head="\n".join(lines), chunks=(), tail="")
        hole = found.keys["items"].end - 1
        head, tail = "\n".join([*lines[:hole], ""]), "\n".join(lines[hole + 1 :])
        made = replace(self, head=head, chunks=("- 0\n",), tail=tail)
        return made._ended(self.chunks, tail, read_chunk(self.chunks[-1])) if self.chunks else made

    def with_item(
        self, index: int, changes: Mapping[str, object], order: Sequence[str] = ()
    ) -> Document:
        """Change keys of an item; None removes one. A new one is put where `order` wants it."""
        chunk, column = self.chunks[index], self.column
        old = read_chunk(chunk)
        if not isinstance(old, dict):
            raise ValueError(f"{self.source}: item number {index + 1} is not a mapping")
        new = _yaml_changed(old, changes)
        if _yaml_same(old, new):
            return self
        node, lines, body = _yaml_chunk(chunk), chunk.split("\n"), ""
        if node.keys and new:
            edited = _yaml_edited_mapping(lines, node, new, order, column)
            ended = "\n" * (node.end < len(lines))  # else the file has no final line break
            body = "\n".join([*lines[: node.start], *edited]) + ended
        text = _yaml_fitted(body, "\n".join(lines[node.end :]), new, column)
        chunks = (*self.chunks[:index], text, *self.chunks[index + 1 :])
        last = index + 1 == len(chunks)
        return self._ended(chunks, self.tail, new) if last else replace(self, chunks=chunks)

    def with_chunks(self, chunks: Sequence[str], tail: str | None = None) -> Document:
        """This file with other chunks, of this or another document, and with another tail.

        Where pieces meet that did not before, there are as many blank lines as between the last two
        items. Comments in a chunk that is left out stay if they belong to no item.
        """
        tail = self.tail if tail is None else tail
        if (tuple(chunks), tail) == (self.chunks, self.tail):
            return self
        if chunks and not self.chunks:  # all of such a file is head
            return self.with_top({"items": [0]}).with_chunks(chunks)
        known, pieces = set(self.chunks), list(chunks)
        for place, chunk in enumerate(chunks):
            if chunk not in known and (by := self.column - _yaml_column(chunk)):
                text = re.sub(rf"(?m)^ {{0,{max(-by, 0)}}}", " " * by, chunk)
                text = re.sub(r"(?m)^ +$", "", text)
                pieces[place] = _yaml_fitted(text, "", read_chunk(chunk), self.column)
        free = self._free(pieces)
        head = self.head + (f"{free[-1]}\n\n" if -1 in free else "")
        if not pieces:
            return replace(self, head=head + tail, chunks=(), tail="").with_top({"items": []})
        apart = len(self.chunks) > 1 and self.chunks[-2].endswith("\n\n")
        met, made, rest = {*itertools.pairwise((*self.chunks, ""))}, list[str](), ""
        for at, (piece, following) in enumerate(itertools.pairwise((*pieces, ""))):
            if (piece, following) in met and at not in free:
                rest = ""
                made.append(piece)
                continue
            had, below = piece.endswith("\n\n"), (following or tail)[:1]
            rest = "\n" * (had or apart if following else had and below == "#")
            if at in free:
                rest = f"\n{free[at]}\n" + "\n" * (below not in ("", "\n"))
            body, value = piece.rstrip("\n") + "\n", read_chunk(piece)
            made.append(_yaml_fitted(body, rest, value, self.column) if following else body)
        whole = replace(self, head=head)._ended(made, rest + tail, read_chunk(pieces[-1]))
        _ = whole.top  # raises where head and tail do not fit together
        return whole

    def render_chunk(self, item: Mapping[str, object]) -> str:
        """The chunk of a new item, in this file's indentation; keys that hold None are left out."""
        return _yaml_fitted("", "", _yaml_changed({}, item), self.column)

    def _free(self, pieces: Sequence[str]) -> dict[int, str]:
        """The comments that belong to no item and would go, by the place they are to stay behind
        (-1: above all)."""
        own, free, place = set(self.chunks), dict[int, str](), -1
        # An edited piece follows on its item's earlier one.
        places = {p if p in own else _yaml_name(p): at for at, p in enumerate(pieces)}
        for chunk in self.chunks:
            name = chunk if chunk in places else _yaml_name(chunk)
            if name in places:
                place = places[name]
            elif rest := chunk[len(_yaml_own_text(chunk)) :].strip("\n"):
                free[place] = f"{free[place]}\n\n{rest}" if place in free else rest
        return free

    def _ended(self, chunks: Sequence[str], tail: str, value: object) -> Document:
        """This file with other chunks and another tail: what stands behind the last item, which is
        to read as `value`, is the tail's, and no text of it."""
        last = chunks[-1] + "\n" * (bool(tail) and not chunks[-1].endswith("\n"))
        lead = cast(re.Match[str], re.match(r"(?: *(?:#.*)?(?:\n|\Z))*", tail))[0]
        text = _yaml_fitted(last, lead, value, self.column)
        own = _yaml_own_text(text)
        below = text[len(own) :] + tail[len(lead) :]
        return replace(self, chunks=(*chunks[:-1], own), tail=below)


_YAML_ITEMS = re.compile(r"""(?:items|'items'|"items") *:(?: *| +#.*)\n?$""")


def _yaml_cuts(lines: list[str]) -> list[int]:
    """The lines where the chunks of a file begin, and the one behind the last.

    What stands in column 1 is a key, never text, and whatever belongs to an item stands deeper than
    its dash: so the dashes in one column below `items:` are the items.
    """
    first = next((n for n, line in enumerate(lines, 1) if _YAML_ITEMS.match(line)), len(lines))
    cuts, stop, pad, deeper = list[int](), len(lines), "", ""
    for number, line in enumerate(lines[first:], first):
        if (deeper and line.startswith(deeper)) or line.lstrip(" ")[:1] in ("", "#", "\n"):
            continue
        dash = re.match(r"( *)-(?:[ \n]|$)", line)
        if not dash or (cuts and dash[1] != pad):
            stop = number
            break
        cuts.append(number)
        pad, deeper = dash[1], dash[1] + " "
    if not cuts:
        return [len(lines)]
    cuts.append(stop)
    for place, cut in enumerate(cuts):  # the comments above it belong to it
        while first < cut < len(lines) and re.match(f" {{0,{len(pad)}}}#", lines[cut - 1]):
            cut -= 1
        cuts[place] = cut
    return cuts


@lru_cache(maxsize=100)  # the last items of many versions are few
def _yaml_own_text(chunk: str) -> str:
    """What of a chunk belongs to its item: not blank lines and comments behind it, but comments
    directly below that are deeper than its dash."""
    node, column, lines = _yaml_chunk(chunk), _yaml_column(chunk), chunk.splitlines(keepends=True)
    own = takewhile(lambda line: re.match(f" {{{column + 1},}}#", line), lines[node.end :])
    return "".join([*lines[: node.end], *own])


def _yaml_column(chunk: str) -> int:
    """The column of a chunk's dash: nothing but comments is above it."""
    found = re.search(r"^ *(?=-)", chunk, re.M)
    return len(found[0]) if found else 0


def _yaml_name(chunk: str) -> object:
    """What a chunk is known by in every version of it: the item's id, else its text."""
    item = read_chunk(chunk)
    found = item.get("id") if isinstance(item, dict) else None
    return found if isinstance(found, str) else chunk


def _yaml_fitted(body: str, rest: str, value: object, column: int) -> str:
    """The chunk that an item's lines and what is behind them make, if they read as `value`; if not,
    the item is written anew. ValueError if that does not read back either."""
    flush = re.sub(r"(?m)^ +", " " * column, rest)  # deeper, a block scalar may take it for text
    for text in (body + rest, body + flush, ""):
        text = text or "\n".join([*_yaml_block([value], column, column, 2), flush])
        with suppress(YamlError):
            if _yaml_same(read_chunk(text), value):
                return text
    raise ValueError(_YAML_UNSOUND)


# ==== 8. Fields ===================================================================================


class Kind(NamedTuple):
    """What one field may hold, be it of the config, of an item or of an agent's result."""

    expected: str  # put behind "must be"
    fits: Callable[[object], bool]
    words: tuple[str, ...] = ()  # all there is to choose from, if it is a choice
    meant: Mapping[str, object] = {}  # what else a text in lower case is taken for, leniently
    remedies: Mapping[type, str] = {}  # by the type that stands there instead; {} is the value

    def problem(self, value: object) -> str:
        """What is wrong with a value, to stand behind the field's name; "" if nothing."""
        if self.fits(value):
            return ""
        remedy = self.remedies.get(type(value), "").format(shown(value))
        hint = did_you_mean(value, self.words) if isinstance(value, str) else ""
        return f"must be {self.expected}, not {shown(value)}{remedy}{hint}"

    def typed(self, text: str) -> object:
        """What somebody means who types a text at the command line; may not fit."""
        if re.fullmatch(r"[+-]?[0-9]{1,15}", text) and self.fits(int(text)):
            return int(text)
        return self.meant.get(text.lower(), text)


IN_QUOTES = dict.fromkeys((bool, int, float), " (in quotes it is text: '{}')")


def choice(*words: str) -> Kind:
    """One of a few words; lenient readers take them in any case, and their first letters."""
    meant = {short: word for word in reversed(words) for short in (word[0], word)}
    return Kind(f"one of {', '.join(words)}", words.__contains__, words, meant)


def number_within(
    least: float = -math.inf, most: float = math.inf, types: tuple[type, ...] = (int, float)
) -> Kind:
    """A number within bounds; nan is none, nor is a bool, which is a kind of int in Python."""
    expected = "a number" if float in types else "a whole number"
    expected += "" if math.isinf(least) else f" from {least}"
    expected += "" if math.isinf(most) else f" to {most}"
    return Kind(expected, lambda n: type(n) in types and least <= cast(float, n) <= most)


def whole_number(least: float = -math.inf, most: float = math.inf) -> Kind:
    return number_within(least, most, (int,))


def matching_text(expected: str, pattern: str) -> Kind:
    """A text that a regular expression matches as a whole."""
    fits = re.compile(pattern).fullmatch
    return Kind(expected, lambda text: type(text) is str and bool(fits(text)), remedies=IN_QUOTES)


def list_of(kind: Kind, expected: str, remedy: str = "") -> Kind:
    """A list, possibly empty, whose elements are all of a kind; the remedy is for a text."""
    return Kind(
        expected,
        lambda value: type(value) is list and all(map(kind.fits, value)),
        remedies={str: remedy},
    )


TEXT = Kind("text", lambda value: type(value) is str, remedies=IN_QUOTES)
TEXTS = list_of(TEXT, "a list of texts", "; write it as [{}]")
LIST = Kind("a list", lambda value: type(value) is list)
PLAIN = Kind("text", lambda text: type(text) is str and "\0" not in text)  # an argument ends there
WORD = Kind("text", lambda text: PLAIN.fits(text) and bool(str(text).strip()))
ARGV = Kind(  # a list of words, which runs without a shell
    'a command such as ["make", "test"]',
    lambda row: type(row) is list and all(map(PLAIN.fits, row)) and any(map(WORD.fits, row[:1])),
)
MAPPING = Kind("a mapping of keys to values", lambda value: type(value) is dict)
FLAG = Kind(
    "true or false",
    lambda value: type(value) is bool,
    meant={"true": True, "yes": True, "false": False, "no": False},
)


class Fields:
    """A mapping that comes from outside, while it is read field by field.

    A field that does not fit reads as its default, and a complaint goes to the list that all
    mappings of a document share. Texts are stripped; a blank one counts as absent, as null does.
    """

    lenient = False

    def __init__(self, values: Mapping[str, object], where: str, complaints: list[str]) -> None:
        self.values = values
        self.where = where  # "execution", "pipelines.feature.phases[2]"; "" for the whole document
        self.complaints = complaints
        self.known: list[str] = []

    def path(self, key: str) -> str:
        """How a message names a field."""
        return f"{self.where}.{key}" if self.where else key

    def complain(self, key: str, trouble: str) -> None:
        """Put a sentence that begins with the key on the list."""
        self.complaints.append(f"{self.path(key)} {trouble}")

    def raw(self, key: str) -> object:
        """What stands there; None if nothing does. From now on the key is a known one."""
        self.known.append(key)
        value = self.values.get(key)
        return value.strip() if isinstance(value, str) else value

    def get(self, key: str, kind: Kind, default: object = None) -> Any:
        """The value, lists as tuples."""
        value = self.raw(key)
        if self.lenient and isinstance(value, str):
            value = kind.meant.get(value.lower(), value or None)
        problem = kind.problem(value) if value is not None else ""
        if problem:
            self.complain(key, f"{problem}; dropped" if self.lenient else problem)
        return default if problem or value is None or value == "" else _frozen(value)

    def table(self, key: str) -> Self:
        """The mapping below a key; an empty one if there is none."""
        return type(self)(self.get(key, MAPPING, {}), self.path(key), self.complaints)

    def tables(self, key: str) -> list[Self]:
        """The mappings that are listed below a key."""
        listed = {f"{key}[{n}]": entry for n, entry in enumerate(self.get(key, LIST, ()))}
        return list(map(type(self)(listed, self.where, self.complaints).table, listed))

    def close(self) -> None:
        """Complain about every key that nobody asked for."""
        for key in self.values:
            if key not in self.known:
                self.complain(key, f"is no known key{did_you_mean(key, self.known)}")


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def shown(value: object) -> str:
    """A value as a message names it: as JSON, cut short, without a mapping's texts (passwords)."""
    hidden: dict[type, object] = {str: "…", list: "[…]", dict: "{…}"}
    if isinstance(value, dict):
        value = {key: hidden.get(type(inner), inner) for key, inner in value.items()}
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):  # thousands of digits
        return "something far too large"
    text = text if len(text) <= 80 else text[:79] + "…"
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint such as ` (did you mean "build"?)` to put behind a message, or nothing."""
    import difflib

    spelt = {other.casefold(): other for other in words}
    close = difflib.get_close_matches(word.casefold(), spelt, n=1)
    return f' (did you mean "{spelt[close[0]]}"?)' if close else ""


# ==== 9. Items ====================================================================================

SCHEMA_VERSION = 3

STATUS_WORDS = ("new", "scoping", "ready", "in_progress", "done", "blocked")
SIZE_WORDS = ("small", "medium", "large")
LEVEL_WORDS = ("low", "medium", "high")
DESCRIPTION_KEYS = ("context", "problem", "solution", "impact", "sizing_rationale")
DEFAULT_PIPELINE = "feature"  # of an item that names none
MAX_COUNTER = 10**15 - 1  # more digits do not survive every YAML reader


class ItemKey(NamedTuple):
    """A row of the table of an item's keys."""

    kind: Kind
    meaning: str
    # Whose word counts where an edit and a decision meet: "run" (what the orchestrator decided
    # stays), "person" (the edit stays); "both" for what is written once, and for times.
    owner: Literal["person", "run", "both"]
    filter: str = ""  # its name in `--only`
    option: str = ""  # the option of `add` that sets it
    default: object = None  # what an item without the key means
    written: Literal["always", "if set"] = "if set"


_ID = matching_text(  # it goes into file names and git refs
    "up to 100 letters, digits, '-', '_' and '.', beginning with a letter or digit",
    r"\w[\w.-]{0,99}",
)
_STATUS, _SIZE, _LEVEL = choice(*STATUS_WORDS), choice(*SIZE_WORDS), choice(*LEVEL_WORDS)
_TEXTS = Kind(
    f"a mapping of texts with the keys {', '.join(DESCRIPTION_KEYS)}",
    lambda value: isinstance(value, dict)  # unknown keys may hold anything
    and all(value.get(key) is None or type(value[key]) is str for key in DESCRIPTION_KEYS),
    remedies={str: "; put the text below it, indented, as 'context: …'"},
)
# The one place that knows an item's keys, in the order in which they are written. Keys that are
# not here are kept as they are.
ITEM_TABLE: Mapping[str, ItemKey] = {
    "id": ItemKey(_ID, "PREFIX-NUMBER, never used twice", "both", "id", written="always"),
    "title": ItemKey(TEXT, "one line", "person", written="always"),
    "status": ItemKey(_STATUS, "where it stands", "run", "status", "", "new", "always"),
    "phase": ItemKey(TEXT, "the one to run next, or at work", "run"),
    "size": ItemKey(_SIZE, "of the change", "person", "size", "size"),
    "complexity": ItemKey(_LEVEL, "of the change", "person", "complexity", "complexity"),
    "risk": ItemKey(_LEVEL, "of the change", "person", "risk", "risk"),
    "impact": ItemKey(_LEVEL, "higher goes first", "person", "impact", "impact"),
    "requires_human_review": ItemKey(
        FLAG, "a human must approve it before code is touched", "person", "", "", False, "always"
    ),
    "origin": ItemKey(TEXT, "ID/phase that suggested it", "both", "origin"),
    "blocked_from_status": ItemKey(_STATUS, "where unblocking puts it back", "run"),
    "blocked_reason": ItemKey(TEXT, "what a human is asked", "run"),
    "blocked_type": ItemKey(choice("clarification", "decision"), "what is needed", "run"),
    "unblock_context": ItemKey(TEXT, "a human's notes for the next phase", "person"),
    "tags": ItemKey(TEXTS, "may be repeated", "person", "tag", "tag", []),
    "dependencies": ItemKey(
        TEXTS, "ids that must be done first; may be repeated", "person", "", "depends-on", []
    ),
    "created": ItemKey(TEXT, "RFC 3339, in UTC", "both", written="always"),
    "updated": ItemKey(TEXT, "RFC 3339, in UTC; by us at every change", "run", written="always"),
    "pipeline_type": ItemKey(
        TEXT, "a pipeline of the config; default: triage chooses", "person", "pipeline_type",
        "pipeline", DEFAULT_PIPELINE,
    ),
    "description": ItemKey(_TEXTS, "what the agents should know", "person", "", "description"),
    "phase_pool": ItemKey(choice("pre", "main"), "the list its phase is in", "run"),
    "guardrail_override": ItemKey(FLAG, "a human lets it pass", "person", default=False),
    "priority": ItemKey(
        whole_number(), "higher goes first, before impact", "person", "priority", "priority"
    ),
    "attempts": ItemKey(whole_number(0), "failed ones of its phase", "run", default=0),
    "verify": ItemKey(
        list_of(ARGV, "a list of commands, each on a line of its own such as - [make, test]"),
        "must succeed, too, behind the last phase that changes code", "person", default=[],
    ),
}  # fmt: skip
ITEM_KEYS = tuple(ITEM_TABLE)
REQUIRED_KEYS = ("id", "title", "status", "created", "updated")
RATING_KEYS = ("size", "complexity", "risk", "impact")
RATING_WORDS = {key: ITEM_TABLE[key].kind.words for key in RATING_KEYS}
OWNED_KEYS = frozenset(key for key, row in ITEM_TABLE.items() if row.owner == "run")


class BacklogError(Exception):
    """The backlog, or a request on it, cannot be used; the message is for the operator."""


# One entry, treated as immutable: an update makes a new dict. Its keys are those of ITEM_TABLE, of
# which REQUIRED_KEYS are always there, and any that a person has added.
Item: TypeAlias = dict[str, Any]


class Backlog(NamedTuple):
    """A snapshot: it never changes, and shares the dicts of unchanged items with others."""

    items: Mapping[str, Item]  # by id, in the order of the file
    next_item_id: int  # the last number handed out


def timestamp(now: datetime) -> str:
    """RFC 3339 text in UTC, as `created` and `updated` hold it."""
    return now.astimezone(UTC).isoformat()


def moment(text: object) -> datetime:
    """The time that `created` or `updated` tell; long ago if none that a later one can follow."""
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(str(text))
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        if found.year < MAXYEAR:
            return found
    return datetime.min.replace(tzinfo=UTC)


def read_item(raw: object) -> tuple[Item, list[tuple[str, str]]]:
    """An item without its bad values and nulls, and (key, problem) of all that is wrong with it;
    the key is "" for what is no mapping at all."""
    if not isinstance(raw, dict):
        return {}, [("", f"must be a mapping that begins with 'id: …', not {shown(raw)}")]
    missing = [key for key in REQUIRED_KEYS if raw.get(key) is None]
    problems = [(key, f"the key '{key}' is missing") for key in missing] + _misfits(raw)
    bad = dict(problems)
    item = raw
    if bad or None in raw.values():
        item = {key: value for key, value in raw.items() if value is not None and key not in bad}
    texts = item.get("description")
    if texts and None in texts.values():
        texts = {key: "" if text is None else text for key, text in texts.items()}
        item = {**item, "description": texts}
    return item, problems


def _misfits(values: Item) -> list[tuple[str, str]]:
    """The keys whose values do not fit, and the problem."""
    return [
        (key, f"{key} {row.kind.problem(value)}")
        for key, value in values.items()
        if value is not None and (row := ITEM_TABLE.get(key)) and not row.kind.fits(value)
    ]


# ==== 10. Drafts and rules ========================================================================


class Draft:
    """A working copy of a backlog that one edit changes; `warnings` are for the operator."""

    def __init__(self, backlog: Backlog) -> None:
        self.items: dict[str, Item] = dict(backlog.items)
        self.next_item_id = backlog.next_item_id
        self.warnings: list[str] = []

    def backlog(self) -> Backlog:
        """What the draft has become."""
        return Backlog(dict(self.items), self.next_item_id)

    def item(self, item_id: str) -> Item:
        """The item; BacklogError if there is none of this id."""
        if item_id not in self.items:
            hint = did_you_mean(item_id, self.items)
            raise BacklogError(f"item {item_id} not found in the backlog{hint}")
        return self.items[item_id]

    def update(self, item_id: str, now: datetime, **changes: object) -> Item:
        """Set keys, or delete those whose value is None; BacklogError, and nothing changed, if a
        key cannot hold its value."""
        item = self.item(item_id)
        if changes := {key: value for key, value in changes.items() if item.get(key) != value}:
            _refuse_bad_values(item_id, changes)
            self.put({**item, **changes}, now)
        return self.items[item_id]

    def put(self, item: Item, now: datetime) -> None:
        """Set a whole item; its `updated` is later than it was, whatever the clock does."""
        known = self.items.get(item["id"], item)
        stamp = max(now, moment(known.get("updated")) + timedelta(microseconds=1))
        self.items[item["id"]] = _item_of({**item, "updated": timestamp(stamp)})

    def add(self, prefix: str, title: str, now: datetime, **fields: object) -> Item:
        """Append a new item with the next id; BacklogError, and nothing changed, if the title is
        blank or a field cannot hold its value."""
        title = _one_line_title(title)
        if not title:
            raise BacklogError("a new item needs a title; this one is blank")
        _refuse_bad_values("the new item", {**fields, "title": title})
        self.next_item_id = max(self.next_item_id, highest_number(prefix, self.items)) + 1
        known: dict[str, object] = {
            **{key: row.default for key, row in ITEM_TABLE.items() if row.written == "always"},
            **fields,
            "id": f"{prefix}-{self.next_item_id:03d}",
            "title": title,
            "created": timestamp(now),
            "updated": timestamp(now),
        }
        item = _item_of({key: known.get(key) for key in dict.fromkeys((*ITEM_KEYS, *known))})
        self.items[item["id"]] = item
        return item


def _item_of(values: Mapping[str, object]) -> Item:
    return {key: value for key, value in values.items() if value is not None}


def id_parts(item_id: str) -> tuple[str, int]:
    """Prefix and number of an id PREFIX-N; 0 if there is none, or a date or the like."""
    prefix, _, digits = item_id.rpartition("-")
    return prefix, int(digits) if re.fullmatch("[0-9]{1,9}", digits) else 0


def highest_number(prefix: str, ids: Iterable[str]) -> int:
    """The highest number among ids of this prefix, 0 if there is none."""
    return max((number for name, number in map(id_parts, ids) if name == prefix), default=0)


def normalise_title(title: str) -> str:
    """What makes two titles the same: their words, without case and punctuation."""
    folded = title.casefold()
    return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


def _one_line_title(title: str) -> str:
    """A title without line breaks, control characters and spaces around it."""
    return "".join(c for c in " ".join(title.split()) if c.isprintable())


def _refuse_bad_values(owner: str, changes: Mapping[str, object]) -> None:
    gone = [f"{key} cannot be removed" for key in REQUIRED_KEYS if changes.get(key, 0) is None]
    if problems := gone + [problem for _, problem in _misfits({**changes})]:
        raise BacklogError(f"{owner}: {problems[0]}")


# ---- Life cycle ----------------------------------------------------------------------------------

LEGAL_TRANSITIONS: Mapping[str, frozenset[str]] = {
    "new": frozenset({"scoping", "blocked"}),
    "scoping": frozenset({"ready", "blocked"}),
    "ready": frozenset({"in_progress", "blocked"}),
    "in_progress": frozenset({"done", "blocked"}),
    "done": frozenset(),
    "blocked": frozenset({"new", "scoping", "ready", "in_progress"}),
}


def transition(draft: Draft, item_id: str, status: str, now: datetime, **changes: object) -> Item:
    """Move an item to another status, with other changes; BacklogError if it may not go there.

    Entering `blocked` remembers where it came from, leaving it clears what the block recorded.
    """
    item = draft.item(item_id)
    if status not in LEGAL_TRANSITIONS[item["status"]]:
        allowed = ", ".join(w for w in STATUS_WORDS if w in LEGAL_TRANSITIONS[item["status"]])
        problem = f"it is {item['status']} and cannot become {status}"
        raise BacklogError(f"{item_id}: {problem}; possible is {allowed or 'nothing'}")
    if item["status"] == "blocked":
        block = ("blocked_from_status", "blocked_reason", "blocked_type", "unblock_context")
        changes = {**dict.fromkeys(block), **changes}
    if status == "blocked":
        changes["blocked_from_status"] = item["status"]
    return draft.update(item_id, now, status=status, **changes)


def block(draft: Draft, item_id: str, reason: str, now: datetime, kind: str | None = None) -> Item:
    """Block an item until a human unblocks it; `kind`: see `blocked_type`. BacklogError."""
    return transition(draft, item_id, "blocked", now, blocked_reason=reason, blocked_type=kind)


def unblock(
    draft: Draft, item_id: str, now: datetime, notes: str | None = None, override: bool = False
) -> Item:
    """Put a blocked item back to where it was, with fresh attempts; `notes` reach the next prompt,
    `override` lets it pass the guardrails from now on. BacklogError if it is not blocked."""
    item = draft.item(item_id)
    if item["status"] != "blocked":
        raise BacklogError(f"{item_id}: it is not blocked, but {item['status']}")
    back = item.get("blocked_from_status")
    changes: dict[str, Any] = {"attempts": None, "unblock_context": (notes or "").strip() or None}
    if override:
        changes["guardrail_override"] = True
    back = back if back in LEGAL_TRANSITIONS["blocked"] else "new"
    return transition(draft, item_id, back, now, **changes)


def advance(
    draft: Draft, item_id: str, phases: Sequence[str], to: str | None, now: datetime
) -> Item:
    """Move an item that is in progress to its next main phase, or the one named; BacklogError."""
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


def archive(draft: Draft, item_id: str, now: datetime) -> list[str]:
    """Take an item out of the backlog and out of all dependencies; the ids that waited for it."""
    del draft.items[draft.item(item_id)["id"]]
    waited = [other for other in draft.items.values() if item_id in other.get("dependencies", ())]
    for other in waited:
        rest = [need for need in other["dependencies"] if need != item_id]
        draft.update(other["id"], now, dependencies=rest or None)
    return [other["id"] for other in waited]


# ---- New items -----------------------------------------------------------------------------------


class FollowUp(NamedTuple):
    """New work as an agent reports it."""

    title: str
    context: str | None = None
    size: str | None = None
    risk: str | None = None


def add_follow_ups(
    draft: Draft, prefix: str, origin: str, follow_ups: Sequence[FollowUp], now: datetime
) -> list[Item]:
    """Add what an agent suggests as new items; one that an open item covers already (same words in
    the title), or that cannot be added, is left out with a warning."""
    added: list[Item] = []
    open_titles = {
        normalise_title(item["title"]): item["id"]
        for item in (reversed(draft.items.values()) if follow_ups else ())
        if item["status"] != "done"
    }
    for title, context, size, risk in follow_ups:
        if known := open_titles.get(normalise_title(title)):
            draft.warnings.append(f"follow-up {title!r} is already there as {known}")
            continue
        fields = {"size": size, "risk": risk, "description": context_description(context)}
        try:
            item = draft.add(prefix, title, now, origin=origin, **fields)
        except BacklogError as error:
            draft.warnings.append(f"follow-up {title!r} is left out: {error}")
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


class Route(NamedTuple):
    """What a pipeline is to items: the names of its phases, in the order in which they run."""

    pre: tuple[str, ...]
    main: tuple[str, ...]


class Rules(NamedTuple):
    """What the config says about items."""

    prefix: str  # of new ids
    limits: Mapping[str, str]  # by measure (size, complexity, risk): what may run without a human
    pipelines: Mapping[str, Route]
    source: str  # where the pipelines are, as a message names it


class PhaseResult(NamedTuple):
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
    commit_type: str | None = None
    duplicates: tuple[str, ...] = ()  # ids of items that triage takes for the same
    description: Mapping[str, str] = {}
    requires_human_review: bool | None = None
    block_type: str | None = None
    warnings: tuple[str, ...] = ()


class Applied(NamedTuple):
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


def _unknown_pipeline(name: str, rules: Rules) -> str:
    """The reason an item with such a pipeline is blocked; "" if there is one."""
    known = ", ".join(sorted(rules.pipelines))
    problem = f"unknown pipeline type {name!r}; {rules.source} has: {known}"
    return "" if name in rules.pipelines else problem


def guardrail_objection(item: Item, limits: Mapping[str, str], before: Item | None = None) -> str:
    """Why a human has to decide before the item goes on; "" when it may.

    An unset rating passes, an equal one too. `before`: only what has risen since then counts.
    """
    if item.get("guardrail_override"):
        return ""
    since, objections = before or {}, list[str]()
    if item.get("requires_human_review") and not since.get("requires_human_review"):
        objections.append("human review is required")
    excesses = [
        f"{measure} {item[measure]} (limit {limit})"
        for measure, limit in limits.items()
        if _rank(measure, item) > max(_rank(measure, limits), _rank(measure, since))
    ]
    if excesses:
        objections.append(f"the guardrails are exceeded by {', '.join(excesses)}")
    return f"{' and '.join(objections)}; a human has to accept it" if objections else ""


def _rank(measure: str, ratings: Mapping[str, Any]) -> int:
    """How high a rating is; -1 without one."""
    return (None, *RATING_WORDS[measure]).index(ratings.get(measure)) - 1


def apply_result(
    draft: Draft, started: Item, result: PhaseResult, rules: Rules, now: datetime
) -> Applied:
    """Apply what a phase reported; `started` is the item as it began.

    A failed result blocks the item: its attempts are used up.
    """
    item_id, noted = result.item_id, len(draft.warnings)
    origin = f"{item_id}/{result.phase}"
    added = add_follow_ups(draft, rules.prefix, origin, result.follow_ups, now)
    if item_id in draft.items:
        applied = _decide(draft, started, result, rules, now)
    else:  # removed meanwhile: what the phase said is kept in the worklog alone
        reason = "the item left the backlog while the phase ran"
        told = _told(started, result, f"{result.summary} ({reason})", now)
        applied = Applied("dropped", started, reason, worklog=told)
    return applied._replace(
        follow_ups=tuple(item["id"] for item in added), warnings=tuple(draft.warnings[noted:])
    )


def _decide(
    draft: Draft, started: Item, result: PhaseResult, rules: Rules, now: datetime
) -> Applied:
    """Block the item, with the question that its phase leaves, or let it go on."""
    item_id = result.item_id
    # A rating that stands is a floor: an agent may raise it, and ask for a review, never waive.
    raised: dict[str, Any] = {
        key: word
        for key, word in result.ratings.items()
        if _rank(key, result.ratings) > _rank(key, draft.items[item_id])
    }
    if result.requires_human_review:
        raised["requires_human_review"] = True
    draft.update(item_id, now, **raised)
    reason, kind = result.context or result.summary, result.block_type
    question = _duplicate_question(draft, result) if result.result != "failed" else ""
    if result.result in ("failed", "blocked"):
        reason = "; ".join(filter(None, (reason, question)))
        return _blocked(draft, result, reason, kind, now)
    told = _told(draft.update(item_id, now, attempts=None), result, result.summary, now)
    if result.phase == TRIAGE:
        reason, kind = _after_triage(draft, result, question, rules, now)
    else:
        reason, kind = _after_phase(draft, started, result, rules, now)
    if reason:
        applied = _blocked(draft, result, reason, kind, now)
    elif draft.items[item_id]["status"] == "done":
        item = draft.items[item_id]
        archive(draft, item_id, now)
        applied = Applied("completed", item, worklog=archive_entry(now, item))
    else:
        again = result.result == "subphase_complete"
        applied = Applied("again" if again else "advanced", draft.items[item_id])
    return applied._replace(worklog=told + applied.worklog)


def _after_triage(
    draft: Draft, result: PhaseResult, question: str, rules: Rules, now: datetime
) -> tuple[str, str | None]:
    """Small and safe items are ready, others start with the pre-phases; what stops the item there,
    before a pre-phase costs anything, and the kind of block."""
    item_id = result.item_id
    item = draft.items[item_id]
    if given := {field: text for field, text in result.description.items() if text}:
        texts = dict.fromkeys(DESCRIPTION_KEYS, "") | item.get("description", {}) | given
        item = draft.update(item_id, now, description=texts)
    if question:
        return question, "decision"
    if result.result == "subphase_complete":
        return "triage cannot be completed in parts", None
    name = result.pipeline_type or pipeline_name(item)
    if problem := _unknown_pipeline(name, rules):
        return problem, None
    chosen = {"pipeline_type": name} if result.pipeline_type else {}
    item = transition(draft, item_id, "scoping", now, **chosen)
    pre = rules.pipelines[name].pre
    if not pre or (item.get("size") == "small" and item.get("risk") in ("low", None)):
        item = transition(draft, item_id, "ready", now, phase=None, phase_pool=None)
    else:
        item = draft.update(item_id, now, phase=pre[0], phase_pool="pre")
    return guardrail_objection(item, rules.limits), "decision"


def _after_phase(
    draft: Draft, started: Item, result: PhaseResult, rules: Rules, now: datetime
) -> tuple[str, str | None]:
    """The same phase again, the next one, ready, or done; what stops the item there, and the kind
    of block. It has moved on then: unblocked, it repeats nothing."""
    item_id, phase = result.item_id, result.phase
    item, since = draft.items[item_id], started
    if result.result == "phase_complete":
        item = draft.update(item_id, now, unblock_context=None)  # its notes have been used
        name = pipeline_name(item)
        route = rules.pipelines.get(name, Route((), ()))
        pool, phases = ("pre", route.pre) if phase in route.pre else ("main", route.main)
        if phase not in phases:
            return f"pipeline {name!r} has no phase {phase!r} to go on from", None
        if following := phases[phases.index(phase) + 1 :]:
            item = draft.update(item_id, now, phase=following[0], phase_pool=pool)
        elif pool == "main":
            transition(draft, item_id, "done", now)
            return "", None
        else:
            item = transition(draft, item_id, "ready", now, phase=None, phase_pool=None)
            since = {}
    return guardrail_objection(item, rules.limits, since), "decision"


def _duplicate_question(draft: Draft, result: PhaseResult) -> str:
    """What to ask the operator about items that ask for the same; "" if there are none."""
    known = []
    for other in result.duplicates:
        if other in draft.items and other != result.item_id:
            known.append(f"{other} ({_one_line_title(draft.items[other]['title'])})")
        else:
            text = f"{result.item_id}: there is no other item {other} that it could repeat"
            draft.warnings.append(text)
    remedy = "if it is, `close` it, else `unblock` it with a note"
    return f"it seems to be a duplicate of {', '.join(known)}; {remedy}" if known else ""


def _told(item: Item, result: PhaseResult, summary: str, now: datetime) -> str:
    """The worklog's text for a result."""
    words = {"phase_complete": "Complete", "subphase_complete": "Subphase Complete"}
    outcome = words.get(result.result, result.result.capitalize())
    return worklog_entry(now, item["id"], item["title"], result.phase, outcome, summary)


def _blocked(
    draft: Draft, result: PhaseResult, reason: str, kind: str | None, now: datetime
) -> Applied:
    """Block the item; the attempts start anew when it is unblocked."""
    item_id, phase = result.item_id, result.phase
    reason = reason or f"{phase} gave no reason"
    draft.update(item_id, now, attempts=None)
    item = block(draft, item_id, reason, now, kind)
    outcome = "Failed" if result.result == "failed" else "Blocked"
    told = worklog_entry(now, item_id, item["title"], phase, outcome, reason)
    return Applied("blocked", item, reason, worklog=told)


# ---- Promotion, repair, and what the operator takes out ------------------------------------------


def charge_attempt(draft: Draft, started: Item, now: datetime) -> int:
    """Charge a failed attempt to the item; returns how many the current phase has had."""
    attempts = (draft.items.get(started["id"], started).get("attempts") or 0) + 1
    if started["id"] in draft.items:
        draft.update(started["id"], now, attempts=attempts)
    return attempts


def promote(draft: Draft, item_id: str, rules: Rules, now: datetime) -> Applied:
    """Move a ready item to its first main phase, or block it where it may not start; "dropped", if
    an edit of the file has made something else of it since."""
    item = draft.items.get(item_id)
    if item is None or item["status"] != "ready":
        return Applied("dropped", item or Item(id=item_id), "it is not ready any more")
    name = pipeline_name(item)
    if reason := _unknown_pipeline(name, rules) or guardrail_objection(item, rules.limits):
        result = PhaseResult(item_id, "promotion", "blocked", reason)
        return _blocked(draft, result, reason, "decision", now)
    start = {"phase": rules.pipelines[name].main[0], "phase_pool": "main", "attempts": None}
    return Applied("advanced", transition(draft, item_id, "in_progress", now, **start))


def repair_items(draft: Draft, rules: Rules, now: datetime) -> list[str]:
    """Before a run: bring items that could never be scheduled back on track; says what it did.

    Dependencies on items that left the backlog are removed, ids that were never handed out stay: to
    remove them would lose the order meant.
    """
    messages: list[str] = []
    issued = IssuedIds(rules.prefix, draft)
    for item_id, item in list(draft.items.items()):
        needs = item.get("dependencies", [])
        if finished := [need for need in needs if need not in draft.items and need in issued]:
            rest = [need for need in needs if need not in finished]
            draft.update(item_id, now, dependencies=rest or None)
            gone = ", ".join(finished)
            messages.append(f"{item_id}: dropped its dependencies on finished items: {gone}")
        if item["status"] not in ("scoping", "in_progress", "ready"):
            continue
        name, pool = pipeline_name(item), "pre" if item["status"] == "scoping" else "main"
        if problem := _unknown_pipeline(name, rules):
            block(draft, item_id, problem, now, "decision")
            messages.append(f"{item_id}: blocked: {problem}")
        elif item["status"] != "ready" and not item.get("phase"):
            if phases := getattr(rules.pipelines[name], pool):
                draft.update(item_id, now, phase=phases[0], phase_pool=pool)
                done = f"starts with {phases[0]}"
            else:
                transition(draft, item_id, "ready", now)
                done = f"{name} has no pre-phases, so it is ready"
                if objection := guardrail_objection(item, rules.limits):
                    block(draft, item_id, objection, now, "decision")
                    done = f"blocked: {objection}"
            messages.append(f"{item_id}: was {item['status']} without a phase; {done}")
    return messages


def take_out(
    draft: Draft, item_id: str, status: Literal["Done", "Closed"], why: str, now: datetime
) -> tuple[Item, list[str], str]:
    """Take an item out of the backlog because the operator says so; whatever depended on it depends
    on it no longer, and says why in its context. The item, the ids that waited, worklog text."""
    item = draft.item(item_id)
    dependants = archive(draft, item_id, now)
    fate = "was done outside of this backlog" if status == "Done" else "was closed"
    note = f"[{item_id}, which this depended on, {fate}] {_one_line_title(item['title'])}"
    note = f"{note}: {why}" if why else note
    for one in dependants:
        texts = dict.fromkeys(DESCRIPTION_KEYS, "") | draft.items[one].get("description", {})
        context = "\n".join(filter(None, (texts["context"], note)))
        draft.update(one, now, description={**texts, "context": context})
    return item, dependants, archive_entry(now, item, status, why)


# ---- Ids and dependencies ------------------------------------------------------------------------


class IssuedIds:
    """The ids that were ever handed out: `"WRK-007" in issued`.

    With the prefix of the config those up to the counter, with another one those up to the highest
    that is still there; as we write them (WRK-7 is a slip, not an item that was finished).
    """

    def __init__(self, prefix: str, backlog: Backlog | Draft) -> None:
        self.highest = {prefix: backlog.next_item_id}
        for name, number in map(id_parts, backlog.items):
            self.highest[name] = max(number, self.highest.get(name, 0))

    def __contains__(self, item_id: str) -> bool:
        name, number = id_parts(item_id)
        written = item_id == f"{name}-{number:03d}"
        return written and 0 < number <= self.highest.get(name, 0)


def unmet_dependencies(items: Mapping[str, Item], item: Item) -> list[str]:
    """The ids that must be done first: an id that is not in the backlog (any more) is met."""
    needs = item.get("dependencies", ())
    return [need for need in needs if need in items and items[need]["status"] != "done"]


def dependency_cycles(items: Mapping[str, Item]) -> list[list[str]]:
    """Cycles among the items that are not done, each as a closed path A, B, A."""
    import graphlib

    needs = {key: dict.fromkeys(unmet_dependencies(items, item)) for key, item in items.items()}
    cycles: list[list[str]] = []
    while True:
        try:
            graphlib.TopologicalSorter(needs).prepare()
            return cycles
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1]  # from an item to what it needs
            cycles.append(cycle)
            del needs[cycle[0]][cycle[1]]


# ==== 12. Filters =================================================================================


class Filter(NamedTuple):
    """One `--only`: the item's value is one of these, or, negated, none of them."""

    key: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.key}{'!=' if self.negated else '='}{','.join(self.values)}"


FILTER_KEYS = {row.filter: key for key, row in ITEM_TABLE.items() if row.filter}


def parse_filter(text: str) -> Filter:
    """Read `KEY=VALUE[,VALUE…]` or `KEY!=VALUE[,VALUE…]`, words of a choice in any case and by
    their first letters; BacklogError says what is wrong."""
    parts = re.fullmatch(r"(?s)\s*([^=]*?)\s*(!?=)\s*(.*?)\s*", text)
    if parts is None or not parts[1] or not parts[3]:
        form = "KEY=VALUE[,VALUE…] or KEY!=VALUE[,VALUE…]"
        raise BacklogError(f"Filter must be in format {form}, not '{text}'")
    key = parts[1].lower()
    if key not in FILTER_KEYS:
        hint = f"{did_you_mean(key, FILTER_KEYS)}. Supported: {', '.join(FILTER_KEYS)}"
        raise BacklogError(f"Unknown filter field: {key}{hint}")
    kind, values = ITEM_TABLE[FILTER_KEYS[key]].kind, list[str]()
    for token in map(str.strip, parts[3].split(",")):
        if not token:
            raise BacklogError(f"Empty value in comma-separated list: '{text}'")
        value = kind.typed(token)
        if problem := kind.problem([value] if kind is TEXTS else value):
            raise BacklogError(f"Invalid value '{token}' for field '{key}': it {problem}")
        if str(value) in values:
            where = f"comma-separated list for field '{key}'"
            raise BacklogError(f"Duplicate value '{value}' in {where}")
        values.append(str(value))
    return Filter(key, tuple(values), parts[2] == "!=")


def check_filters(filters: Sequence[Filter]) -> None:
    """Refuse flags that contradict or repeat each other; all of them have to hold together."""
    for earlier, later in itertools.combinations(filters, 2):
        if earlier[::2] == later[::2] and (later.key != "tag" or earlier == later):
            sign = "!=" if later.negated else "="
            raise BacklogError(
                f"Field '{later.key}' specified multiple times in separate --only flags;"
                f" put the values in one: --only {later.key}{sign}value1,value2"
            )


def matches(item: Item, filters: Iterable[Filter]) -> bool:
    """Whether an item passes all filters. One without the key passes only a negated filter."""
    for key, wanted, negated in filters:
        value = item.get(FILTER_KEYS[key])
        found = value if isinstance(value, list) else [] if value is None else [str(value)]
        if key == "origin" and found:  # `ID/phase` is found by the id alone, too
            found = [*found, found[0].partition("/")[0]]
        if negated == any(one in wanted for one in found):
            return False
    return True


def matching(backlog: Backlog, filters: Sequence[Filter]) -> set[str]:
    """The ids of all items that pass."""
    return {item_id for item_id, item in backlog.items.items() if matches(item, filters)}


# ==== 13. Worklog =================================================================================

_WORKLOG_RULE = "\n---\n"  # between entries; what people wrote is indented, so it cannot be theirs


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
    lines = [f"## {timestamp(now)} — {item_id} ({_one_line_title(title)})", ""]
    for name, text in facts.items():
        first, *others = text.strip().splitlines() or [""]
        lines += [f"- **{name}:** {first}", *(f"  {line}".rstrip() for line in others)]
    return "\n".join([*lines, _WORKLOG_RULE, ""])


def with_cost(text: str, cost: str) -> str:
    """A phase's entry with what the phase cost; an entry of another kind, or no cost: as it is."""
    entry, rule, rest = text.partition(_WORKLOG_RULE)
    return f"{entry}- **Cost:** {cost}\n{rule}{rest}" if cost and rule else text


def read_worklog(text: str) -> list[dict[str, str]]:
    """The entries of a worklog, as far as people have left them what they were.

    Each has "when", "item" and "title", and what its bullets hold, by their names in lower case.
    """
    entries: list[dict[str, str]] = []
    key = ""
    for line in text.split("\n"):
        if head := re.match(r"## (\S+) — (\S+) \((.*)\)$", line):
            entries.append({"when": head[1], "item": head[2], "title": head[3]})
            key = ""
        elif entries and (found := re.match(r"- \*\*(\w+):\*\* (.*)", line)):
            key = found[1].lower()
            entries[-1][key] = found[2]
        elif key and (not line or line.startswith("  ")):
            entries[-1][key] += f"\n{line[2:]}"
        else:
            key = ""
    return [{key: value.strip() for key, value in entry.items()} for entry in entries]


def last_summary(entries: Iterable[Mapping[str, str]], item_id: str) -> str | None:
    """What the item's last completed phase reported; `entries`: see `read_worklog`."""
    done = ("Complete", "Subphase Complete")
    told = (one for one in entries if one["item"] == item_id and one.get("outcome") in done)
    return [None, *(one["summary"] for one in told if "summary" in one)][-1]


def recent_worklogs(directory: Path) -> list[Path]:
    """The files of the last two months that have one, the older one first."""
    return sorted(directory.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9].md"))[-2:]


def append_worklog(directory: Path, now: datetime, text: str) -> Path:
    """Append an entry to the month's file, unless one of the last two has exactly this text already
    (so that it can be done again after a crash); returns the file. OSError."""
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


def replace_file(
    path: Path, data: bytes, mode: int = 0o644, still: Callable[[], bool] = lambda: True
) -> bool:
    """Write a file so that a crash leaves the old or the new content; OSError. False, and the old
    one, if not `still()` just before it is replaced."""
    path.parent.mkdir(exist_ok=True)  # not a folder above it that vanished
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)  # it may be a link
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not still():
            return False
        os.replace(unfinished, path)
        sync_directory(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


# ==== 14. States, and their merge =================================================================


class _Row(NamedTuple):
    """What a chunk holds."""

    key: str  # its item's id, or its own text
    item: Item
    problems: tuple[tuple[str, str], ...]  # (key, what is wrong)
    whole: bool  # nothing is lacking


@lru_cache(maxsize=_YAML_REMEMBERED)
def _row_of(chunk: str) -> _Row:
    """What only has to be completed, in an item with a title, is no problem."""
    item, problems = read_item(read_chunk(chunk))
    if "title" in item:
        raw = cast(Item, read_chunk(chunk))
        lacking = {key for key in REQUIRED_KEYS if raw.get(key) is None}
        problems = [one for one in problems if one[0] not in lacking]
    return _Row(item.get("id", chunk), item, tuple(problems), item.keys() >= set(REQUIRED_KEYS))


class State:
    """A backlog at one moment: a document, and what can be read of it. Never changes.

    All is keyed by the item's id, or by the chunk's own text where it has no id of its own. `found`
    holds every item, `items` those that can be used, `problems` what is wrong; one that is neither
    usable nor wrong was added by hand, and lacks what we complete.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.chunks: dict[str, str] = {}
        rows: dict[str, _Row] = {}
        for chunk in document.chunks:
            row = _row_of(chunk)
            if row.key in rows:
                twice = f"the id {row.key} is used twice; give one of the two another one"
                row = _Row(chunk, {}, (*row.problems, ("id", twice)), False)
            self.chunks[row.key], rows[row.key] = chunk, row
        self.found = {key: row.item for key, row in rows.items()}
        self.items = {key: row.item for key, row in rows.items() if row.whole}
        self.problems = {key: row.problems for key, row in rows.items() if row.problems}
        self.lacks = any(not (row.whole or row.problems) for row in rows.values())

    @classmethod
    def read(cls, data: bytes, source: str) -> State:
        """YamlError or BacklogError for a file that cannot be meant: broken, cut off, foreign."""
        document = Document.parse(data, source)
        version, counter = document.top.get("schema_version"), document.top.get("next_item_id")
        if not document.chunks and cast(Item, parse_yaml(data, source)).get("items") != []:
            problem, remedy = "no items", "write 'items: []' for an empty backlog"
        elif type(version) is not int or version != SCHEMA_VERSION:
            found = "missing" if version is None else shown(version)
            raise BacklogError(
                f"{source}: schema_version is {found}, and only {SCHEMA_VERSION} can be read; use"
                " the program that wrote the file, or bring its items to schema"
                f" {SCHEMA_VERSION} and write 'schema_version: {SCHEMA_VERSION}'"
            )
        elif counter is None:
            problem = "the line 'next_item_id: N' is missing, so the file may be cut off"
            remedy = "add it (N is the last number handed out)"
        elif type(counter) is not int or not 0 <= counter <= MAX_COUNTER:
            problem = f"next_item_id must be a whole number from 0, not {shown(counter)}"
            remedy = "write the last number handed out"
        else:
            return cls(document)
        whole = f"get the whole file back with 'git checkout -- {source}', or {remedy}"
        raise BacklogError(f"{source}: {problem}; {whole}")

    @property
    def counter(self) -> int:
        return cast(int, self.document.top["next_item_id"])

    @property
    def backlog(self) -> Backlog:
        return Backlog(self.items, self.counter)

    def complaints(self) -> list[str]:
        """All that is wrong with items, each with file, line and item."""
        told: list[str] = []
        for at, (owner, chunk) in enumerate(self.chunks.items()):
            name = owner if owner != chunk else f"item number {at + 1}"
            for key, problem in self.problems.get(owner, ()):
                place = f"{self.document.source}:{self.document.line_of(at, key)}"
                told.append(f"{place}: {name}: {problem}")
        return told

    def changed(self, backlog: Backlog) -> State:
        """This state with the items and the counter of `backlog`; BacklogError if something cannot
        be written as YAML."""
        old, new, document = self.items, backlog.items, self.document
        edited = [key for key, item in new.items() if old.get(key, item) is not item]
        places = list(self.chunks) if edited else []
        try:
            for key in edited:
                changes = _differing(old[key], new[key])
                document = document.with_item(places.index(key), changes, ITEM_KEYS)
            fresh = [document.render_chunk(new[key]) for key in new if key not in old]
            if fresh or len(new) < len(old):
                pairs = zip(self.chunks, document.chunks, strict=True)
                kept = [chunk for key, chunk in pairs if key not in old or key in new]
                document = document.with_chunks([*kept, *fresh])
            if backlog.next_item_id != self.counter:
                document = document.with_top({"next_item_id": backlog.next_item_id})
        except ValueError as error:
            raise BacklogError(f"the change cannot be written as YAML: {error}") from error
        return self if document is self.document else State(document)


def _differing(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """What leads from one item to the other; None for a key that goes."""
    return {key: new.get(key) for key in {**old, **new} if old.get(key) != new.get(key)}


def _distance(one: State, other: State, key: str) -> tuple[int, int, int]:
    """How far apart two states are in one item: its stamp, which a decision moves and a person does
    not, then keys, then the text."""
    if one.chunks.get(key) == other.chunks.get(key):
        return 0, 0, 0
    mine, theirs = one.items.get(key), other.items.get(key)
    if mine is None or theirs is None:
        return 1, 4, 1
    keys = _differing(mine, theirs).keys()
    return int("updated" in keys), len(keys - {"updated"}), 1


class _Merge:
    """The merge while it is made; see `merge`."""

    def __init__(self, decided: State, file: State, running: Container[str]) -> None:
        self.decided, self.file, self.running = decided, file, running
        # By id and `updated`, each text that there was of an item, and what it held.
        self.versions: dict[str, dict[str, dict[str, Item]]] = {}
        self.counter = max(decided.counter, file.counter)
        self.items: dict[str, Item] = {}
        self.chunks: dict[str, str] = {}  # what an item's lines start from
        self.renamed: dict[str, str] = {}  # key in the file → key in the result
        self.notes: list[str] = []

    def find_base(self, states: Iterable[State], now: datetime, in_head: bool) -> None:
        """Look through the states up to now for the one that somebody started from."""
        file, last, best, total = self.file, dict[str, str](), None, [0, 0, 0]
        far: dict[str, tuple[int, int, int]] = {}  # how far the file is from a state, by item
        for state in states:
            new = {key for key, chunk in state.chunks.items() if last.get(key) is not chunk}
            for key in new | (last or file.chunks).keys() - state.chunks.keys():
                was, far[key] = far.get(key, (0, 0, 0)), _distance(file, state, key)
                total = [all_ - a + b for all_, a, b in zip(total, was, far[key], strict=True)]
            for key in new & state.items.keys():
                stamps = self.versions.setdefault(key, {})
                texts = stamps.setdefault(state.items[key]["updated"], {})
                texts[state.chunks[key]] = state.items[key]
            last = state.chunks
            mine, theirs = file.document, state.document
            layout = (mine.head != theirs.head) + (mine.tail != theirs.tail)
            both = file.chunks.keys() & last.keys()
            layout += [key for key in file.chunks if key in both] != [k for k in last if k in both]
            found = state.counter != file.counter, *total[:2], total[2] + layout
            if best is None or found <= best:  # the newest of equals
                best, self.base = found, state
        stale = (  # an item as it was before its last decision
            item.get("updated") in self.versions.get(key, ())
            and item["updated"] != self.decided.items.get(key, {}).get("updated")
            for key, item in file.found.items()
        )
        if in_head and file.counter > self.decided.counter and not any(stale):
            self.base = self.decided
        self.now = max([now, *map(moment, set().union(*self.versions.values()))])

    def start_of(self, item_id: str, item: Item) -> tuple[Item | None, Container[str | None]]:
        """What somebody started from in one item, and the texts of it that are no edit: the base's,
        unless its own stamp is an older one, as where a `stash pop` mixes lines of several states.
        """
        base, stamp = self.base.found.get(item_id), item.get("updated", "")
        known = self.versions.get(item_id, {}).get(stamp)
        if known is None or (base is not None and base.get("updated", "") == stamp):
            return base, (self.base.chunks.get(item_id),)
        return list(known.values())[-1], known

    def stamp(self) -> str:
        self.now += timedelta(microseconds=1)
        return timestamp(self.now)

    def add(self, key: str, item: Item, prefix: str) -> None:
        """A new item of somebody's: what it lacks is completed."""
        taken = {*self.decided.items, *self.items, *self.versions}
        item_id = asked = item.get("id", "")
        if not asked or asked in taken:
            self.counter = max(self.counter, highest_number(prefix, {*taken, *self.file.found})) + 1
            item_id = self.renamed[key] = f"{prefix}-{self.counter:03d}"
        if asked in taken:
            title = item.get("title")
            self.notes.append(f"{asked} is taken; the one added by hand is {item_id} now: {title}")
        now = self.stamp()
        fresh = {"status": "new", "created": now, "updated": now, **item, "id": item_id}
        self.items[item_id], self.chunks[item_id] = fresh, self.file.chunks[key]
        # So that older copies of the file are told apart from this one by their counter.
        self.counter = max(self.counter, self.base.counter + 1)

    def meet(self, key: str) -> tuple[Item, str]:
        """An item that both have: what was edited is taken, what was decided since stands."""
        d, d_chunk = self.decided.items[key], self.decided.chunks[key]
        f, f_chunk = self.file.found[key], self.file.chunks[key]
        if f_chunk == d_chunk:
            return d, d_chunk
        bad = {name for name, _ in self.file.problems.get(key, ())}
        newest = max(map(moment, self.versions[key]))
        whole = key in self.file.items and not bad and key not in self.running
        if whole and moment(f["updated"]) > newest:  # decided elsewhere
            return f, f_chunk
        b, texts = self.start_of(key, f)
        merged, old = dict(d), b or {}
        # A stamp that nobody knows is an older one: it was decided since, whatever the base says.
        firm = key in self.running or f.get("updated", d["updated"]) not in self.versions[key]
        for name in {**old, **f} if b else ():
            if name in ("id", "updated") or name in bad or f.get(name) == old.get(name):
                continue
            if name in REQUIRED_KEYS and name not in f:
                self.notes.append(f"{key}: the key '{name}' is missing; it stays as it was")
                continue
            three = old.get(name), f.get(name), merged.get(name)
            merged[name] = self.chosen(key, name, *three, firm=name in OWNED_KEYS and firm)
        item = _item_of(merged)
        if item != d:
            item = _item_of({**merged, "updated": self.stamp()})
        return item, d_chunk if f_chunk in texts or not b else f_chunk

    def chosen(self, key: str, name: str, old: Any, edit: Any, ours: Any, firm: bool) -> Any:
        """Of an edit from `old`, and what was decided since (`ours`), the one that counts."""
        if ours in (old, edit) and not firm:
            return edit
        if name in RATING_WORDS and edit is not None and ours is not None:
            return max(edit, ours, key=RATING_WORDS[name].index)
        if isinstance(edit, list) or isinstance(ours, list):
            was, theirs, mine = old or [], edit or [], ours or []
            kept = [one for one in mine if one in theirs or one not in was]
            return [*kept, *(one for one in theirs if one not in was and one not in kept)] or None
        winner = ours if name in OWNED_KEYS else edit
        if edit != ours:
            self.notes.append(
                f"{key}: {name} was edited to {edit!r} and decided as {ours!r}; kept {winner!r}"
            )
        return winner

    def document(self) -> Document:
        """The lines: a piece that is as in the base is no edit, any other is the file's."""
        file, decided, base = self.file.document, self.decided.document, self.base.document
        as_base = (file.head, file.column) == (base.head, base.column)
        frame = decided if as_base and (decided.chunks or file.tail == base.tail) else file
        tail = decided.tail if file.tail == base.tail else file.tail
        keys = self.in_order()
        chunks = [self.chunks[key] for key in keys]
        try:
            document = frame.with_chunks(chunks, tail)
        except ValueError:  # the two do not fit together
            document = file.with_chunks(chunks)
        form = decided if (file.bom, file.newline) == (base.bom, base.newline) else file
        document = replace(document, bom=form.bom, newline=form.newline)
        for at, key in enumerate(keys):
            found = _row_of(document.chunks[at]).item
            if key in self.items and (changes := _differing(found, self.items[key])):
                document = document.with_item(at, changes, ITEM_KEYS)
        return document.with_top({"next_item_id": self.counter})

    def in_order(self) -> list[str]:
        """The order of the result: the file's, if somebody has changed it, else the decided one."""
        file, base, decided = self.file.chunks, self.base.chunks, list(self.decided.chunks)
        in_file = [self.renamed.get(key, key) for key in file]
        moved = [key for key in file if key in base] != [key for key in base if key in file]
        first, second = (in_file, decided) if moved else (decided, in_file)
        order, others = ([key for key in keys if key in self.chunks] for keys in (first, second))
        known = set(order)
        for place, key in enumerate(others):
            if key not in known:  # it keeps its place behind the one before it
                order.insert(order.index(others[place - 1]) + 1 if place else 0, key)
        return order


def merge(
    decided: State,
    file: State,
    earlier: Iterable[State],
    now: datetime,
    prefix: str = "WRK",
    running: Container[str] = (),
    shown: Container[str] = (),
    in_head: bool = False,
) -> tuple[State, list[str]]:
    """What a file that somebody left makes of the decided state, and a line for each loser.

    A three-way merge whose base is the state that somebody started from: of all states up to now
    with the file's counter (else of all) the one least different, the newest of equals. What is as
    in the base is no edit, however old it is. `running`: ids whose phase is at work, which an agent
    does not mark done. `shown`: the chunks that were last written; what is gone since was not
    brought back. `in_head`: HEAD holds the decided state, so that a file whose counter is ahead of
    it, and that is not stale, is what commands without a journal have left since.
    """
    made = _Merge(decided, file, running)
    made.find_base(itertools.chain(earlier, [decided]), now, in_head)
    base = made.base
    for key, chunk in file.chunks.items():
        item, problems = file.found[key], file.problems.get(key, ())
        if key in decided.items:
            known = decided.items[key]
            if key not in base.chunks and item.get("created") != known["created"]:
                made.add(key, item, prefix)
            else:
                made.items[key], made.chunks[key] = made.meet(key)
                made.notes += [f"{key}: {problem}; it stays as it was" for _, problem in problems]
        elif key in made.versions:
            if chunk not in shown:
                made.notes.append(
                    f"{key} in the file is an old copy of an item that was finished, closed or"
                    " deleted; it is left out. To bring it back, add it under a new id"
                )
        elif key in base.chunks and key not in decided.chunks:
            continue  # an old copy of what has been completed, or mended, since
        elif not problems:
            made.add(key, item, prefix)
        else:  # somebody is still writing it; its lines stay as they are
            if key not in decided.chunks:
                first = chunk.strip().partition("\n")[0]
                made.notes.append(f"{first[:60]}: {problems[0][1]}; it waits")
            made.chunks[key] = chunk
    if missing := [key for key in decided.chunks if key not in file.chunks]:
        # By hand deleted; but for what is younger, and all that a file of several states lacks.
        mixed = any(
            made.start_of(key, item)[0] is not base.found.get(key)
            for key, item in file.found.items()
        )
        younger = {key for key in missing if highest_number(prefix, [key]) > file.counter}
        kept = [key for key in missing if mixed or key in younger or key not in base.chunks]
        made.chunks |= {key: decided.chunks[key] for key in kept}
        made.items |= {key: decided.items[key] for key in kept if key in decided.items}
    made.counter = max(made.counter, highest_number(prefix, made.items))  # ids given by hand
    document = made.document()
    return (decided if document == decided.document else State(document)), made.notes


# ==== 15. The journal =============================================================================


class Journal:
    """What is decided and begun, and not yet in git: append-only, one JSON line for one act.

    It lies in the git folder, where no agent's git command reaches it. Keys of a line, each
    optional: `run` (id, branch, and the commit it began on), `state` (a whole backlog), `step` (how
    the backlog changed: chunks by key, null for one that is gone), `attempt` (begun, by token),
    `process` (of an attempt), `ended` (tokens), `outcome` (to be committed, by token), `committed`
    (tokens), `rests` (by agent; null: it works again), `spent` (by item; null: the worklog tells).
    A torn last line counts as not written. Every method but `read` wants the backlog lock held.
    """

    VERSION = 3

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.run: dict[str, Any] = {}
        self.attempts: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.rests: dict[str, dict[str, Any]] = {}
        self.spent: dict[str, dict[str, Any]] = {}
        self._first: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self._begin = b""  # of the file, to tell another run's from it
        self._read = 0  # bytes that have been taken in
        self._lines = 0

    @classmethod
    def read(cls, path: Path, source: str) -> Journal | None:
        """None if there is none, BacklogError with the way out if it cannot be used."""
        journal = cls(path, source)
        try:
            journal.catch_up()
        except FileNotFoundError:
            return None
        return journal if journal._lines else None

    def catch_up(self) -> bool:
        """Take in the lines that were added since; whether one of them changed the backlog.
        FileNotFoundError if the run has ended and dropped it, be there another run's by now."""
        with self.path.open("rb") as file:
            begin = file.read(80)  # the id of the run that began it is in there
            if self._read and begin != self._begin:
                raise FileNotFoundError(self.path)
            self._begin = begin
            file.seek(self._read)
            data = file.read()
        steps, whole = len(self.steps), data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            try:
                self._fold(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BacklogError(
                    f"{self.path}: line {self._lines} of the run's journal cannot be read"
                    f" ({type(error).__name__}: {error}). What it held beyond {self.source} is"
                    f" lost to this program: compare {self.source} with `git diff`, then delete"
                    " that file and start again"
                ) from None
        self._read += len(whole)
        return len(self.steps) > steps

    def _fold(self, line: Mapping[str, Any]) -> None:
        foreign = line.get("version", self.VERSION) != self.VERSION
        if foreign or not (self._first or "state" in line):
            raise ValueError("it is not one of this version of the program; its own can finish it")
        self.run = line.get("run", self.run)
        if "state" in line:
            self._first, self.steps = {"chunks": {}, **line["state"]}, []
            _ = self._first["head"], self._first["tail"]
        if "step" in line:
            self.steps.append(line["step"])
        for key, book in (("attempt", self.attempts), ("outcome", self.outcomes)):
            if key in line:
                book[line[key]["token"]] = line[key]
        if "process" in line and line["process"]["token"] in self.attempts:
            pair = line["process"]["pid"], line["process"]["since"]
            self.attempts[line["process"]["token"]].setdefault("processes", []).append(pair)
        for key, book in (("ended", self.attempts), ("committed", self.outcomes)):
            for token in line.get(key, ()):
                book.pop(token, None)
        for key, book in (("rests", self.rests), ("spent", self.spent)):
            for name, entry in line.get(key, {}).items():
                book.pop(name, None)
                if entry is not None:
                    book[name] = entry

    def start(self, state: State, run: Mapping[str, Any]) -> None:
        """Begin the file, with a state that is in git or on disk. OSError."""
        line = {"version": self.VERSION, "run": run, "state": _parts_of(state)}
        replace_file(self.path, (json.dumps(line) + "\n").encode(), 0o600)
        self.catch_up()

    def append(self, line: Mapping[str, Any], *, flush: bool = True) -> None:
        """Add a line; OSError. Without `flush` a power cut may take it back."""
        with self.path.open("r+b") as file:
            file.truncate(self._read)  # what a crash left of a line
            file.seek(self._read)
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            if flush:
                os.fsync(file.fileno())
        self.catch_up()

    def states(self) -> Iterator[State]:
        """Every state up to now, the oldest first."""
        return map(self._state_of, self._played())

    def state(self) -> State:
        """The decided state."""
        *_, parts = self._played()
        return self._state_of(parts)

    def _played(self) -> Iterator[dict[str, Any]]:
        """The parts of every state, one after another in the same dict."""
        parts = dict(self._first, chunks=dict(self._first["chunks"]))
        yield parts
        for step in self.steps:
            parts |= {**step, "chunks": _take_step(parts["chunks"], step)}
            yield parts

    def _state_of(self, parts: Mapping[str, Any]) -> State:
        chunks, frame = tuple(parts["chunks"].values()), {name: parts[name] for name in _FRAME}
        return State(Document(self.source, chunks=chunks, **frame))

    @property
    def settled(self) -> bool:  # but for what HEAD may lack
        return not (self.attempts or self.outcomes or self.rests)


_FRAME = ("bom", "newline", "head", "tail")  # what a document is besides its chunks


def _parts_of(state: State) -> dict[str, Any]:
    frame = {name: getattr(state.document, name) for name in _FRAME}
    return {**frame, "chunks": state.chunks}


def _take_step(chunks: dict[str, Any], step: Mapping[str, Any]) -> dict[str, str]:
    """Change the chunks by a step; in another order they are a new dict."""
    for key, chunk in step.get("chunks", {}).items():
        if chunk is None:
            chunks.pop(key, None)
        else:
            chunks[key] = chunk
    return {key: chunks[key] for key in step["order"]} if "order" in step else chunks


def _step_between(old: State, new: State) -> dict[str, Any]:
    before, after = _parts_of(old), _parts_of(new)
    step = {name: after[name] for name in _FRAME if after[name] != before[name]}
    if chunks := _differing(old.chunks, new.chunks):
        step["chunks"] = chunks
    if list(_take_step(dict(old.chunks), step)) != list(new.chunks):
        step["order"] = list(new.chunks)
    return step


# ==== 16. Store ===================================================================================

_SAVE_TRIES = 20  # how often somebody may change the file just as it is to be replaced
_LOCK_POLL_S = 0.02
WRECK_S = 60.0  # how long a file that cannot be read has to stay as it is to be set aside


class SaveError(BacklogError):
    """The backlog could not be brought to disk, or not be read from there."""


class Outside(NamedTuple):
    """What a store asks of git, never while it holds the lock."""

    # The first two get what the journal holds of the run: its id, branch and first commit.
    at_home: Callable[[Mapping[str, Any]], bool]  # on its branch, no merge or the like is open
    versions: Callable[[Mapping[str, Any]], Iterable[bytes]]  # as it began, oldest first
    committed: Callable[[], tuple[str | None, bytes]]  # HEAD, and the file in it (b"": none)


@dataclass(eq=False)
class Store:
    """BACKLOG.yaml and the journal beside it: the only code that changes the file.

    Every change takes the lock and does five steps: read the file, merge it into the decided state,
    apply the change, append it to the journal, write the file. Without a journal (no run is active,
    and the last one left nothing unfinished) the file is the truth, and is just changed.

    For one thread at a time.
    """

    path: Path
    state_dir: Path
    aside: Path  # the folder for files that cannot be read
    outside: Outside
    prefix: str  # of new ids
    warn: Callable[[str], None]  # gets complete messages for the operator
    clock: Callable[[], datetime]
    monotonic: Callable[[], float] = time.monotonic
    lock_limit_s: float = 30.0  # how long to wait for another process that holds the lock

    def __post_init__(self) -> None:
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")  # where it is written
        self.lock_path = self.state_dir / "backlog.lock"
        self.journal_path = self.state_dir / "journal"
        self.journal: Journal | None = None
        self.trouble = ""  # why the file cannot be read just now: nothing new is to be started
        self._state: State | None = None
        self._foreseen = False  # it is what a merge will make, and not in the journal
        self._written: bytes | None = None  # the file's content as last written or merged
        self._wreck: tuple[object, float] = "", 0.0  # its content, and since when
        self._versions: list[State] | None = None
        self._committed = b""
        self._home = True
        self._mode = 0o644

    @property
    def state(self) -> State:
        """The decided state, as of the last `look` or `change`."""
        if self._state is None:
            raise RuntimeError("the backlog has not been read yet")
        return self._state

    @property
    def backlog(self) -> Backlog:
        return self.state.backlog

    def look(self) -> Backlog:
        """Read the backlog, with a journal as the next save would leave it; touches nothing.
        YamlError or BacklogError if it cannot be used."""
        self.journal = Journal.read(self.journal_path, self.path.name)
        if self.journal is None:
            self._state, self._written = self._usable(self._read())
            self._complete()
            return self.backlog
        self._state = self.journal.state()
        self._ask_outside()
        with suppress(YamlError, BacklogError):
            data = self._read() if self._home else None
            if data is not None and (self._state.lacks or data != self._state.document.to_bytes()):
                self._state = self._merged(State.read(data, self.path.name))[0]
                self._foreseen = True
        return self.backlog

    def _usable(self, data: bytes | None) -> tuple[State, bytes]:
        """A file that is the truth: it has to be right in all."""
        if data is None:
            raise BacklogError(
                f"{self.path}: there is no such file; if git has it, `git restore {self.path.name}`"
                " brings it back, else `init` makes one"
            )
        if complaints := (state := State.read(data, self.path.name)).complaints():
            raise BacklogError("\n".join(complaints))
        return state, data

    def _readable(self, *versions: bytes) -> list[State]:
        found: list[State] = []
        for data in versions:
            with suppress(YamlError, BacklogError):
                found.append(State.read(data, self.path.name))
        return found

    def _ask_outside(self) -> None:
        """Ask git what a merge needs, before the lock is taken."""
        if self.journal is None:
            head, self._committed = self.outside.committed()
            self._home, self._versions, run = True, None, {"head": head}
        else:
            self._home, run = self.outside.at_home(self.journal.run), self.journal.run
        if self._is_news():
            self._versions = self._readable(*self.outside.versions(run))

    def _is_news(self) -> bool:
        """Whether the file was saved by somebody and git not asked since: it may be an old copy."""
        known = [None, self._committed]
        if self.journal is not None:
            known = [None, self._written, self.state.document.to_bytes()]
        with suppress(SaveError):
            return self._versions is None and self._home and self._read() not in known
        return False

    def _read(self) -> bytes | None:
        """The file's bytes, None if there is no file; SaveError if it is none that we replace."""
        path = self.path
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise SaveError(
                    f"{path}: it is a symbolic link, which a save would replace; put the file"
                    " itself there, or name the real file in the config"
                )
            if not stat.S_ISREG(mode):
                raise SaveError(f"{path}: it is not a regular file; move it away")
            self._mode = stat.S_IMODE(mode)
            # Whatever it has become meanwhile: a named pipe must not hold us up.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SaveError(f"{path}: cannot be read ({error.strerror})") from error

    def change(
        self,
        edit: Callable[[Draft], T],
        note: Callable[[T], Mapping[str, Any]] | None = None,
        *,
        patient: bool = True,
    ) -> T:
        """Merge what others did, make the edit, journal it, write the file; what `edit` returned.

        `note` gives what else belongs into the same line of the journal. A file that cannot be read
        is left alone for a minute, or, if not `patient`, set aside at once. Raises what `edit`
        raises (nothing is kept then), and SaveError: with a journal the decision stands, unless the
        journal was the trouble.
        """
        if self._state is None:
            self.look()
        made, decided = list[T](), False
        for _ in range(_SAVE_TRIES):
            self._ask_outside()
            with self._locked():
                if self._is_news():
                    continue
                found = self._take_in(patient)
                if not decided:
                    draft = Draft(self.backlog)
                    made = [edit(draft)]
                    self._decide(self.state.changed(draft.backlog()), note(made[0]) if note else {})
                    for text in draft.warnings:
                        self.warn(text)
                    decided = self.journal is not None  # else it is made again, on a fresh file
                if self._publish(found):
                    return made[0]
        raise SaveError(
            f"{self.path}: another program changes the file all the time; stop it, then try again"
        )

    def note(self, line: Mapping[str, Any], *, flush: bool = True) -> None:
        """Journal something that does not change the backlog; SaveError."""
        with self._locked():
            self._append(line, flush=flush)

    def begin(self, run: Mapping[str, Any], committed: bytes | None) -> None:
        """Open a run's journal with the file as in HEAD, or go on with the one there; SaveError."""
        with self._locked():
            if self.journal is not None:
                return self._append({"run": run})
            states = self._readable(committed or b"")
            if not states or states[0].problems:  # what is spoilt in HEAD is mended in the file
                states = [self._usable(self._read())[0]]
            journal = Journal(self.journal_path, self.path.name)
            with self._writing(self.journal_path):
                journal.start(states[0], run)
            self.journal, self._state, self._written = journal, states[0], None
            return None

    def settle(self, committed: bytes | None) -> bool:
        """Drop the journal, if nothing is left to do and HEAD holds all; whether there is none."""
        with self._locked():
            data = self.state.document.to_bytes()
            done = self.journal is not None and self.journal.settled
            if done and data == committed == self._read():
                self.journal_path.unlink()
                self.journal = None
            return self.journal is None

    def _take_in(self, patient: bool) -> bytes | None:
        """Merge the file into the decided state; returns what it holds (None: it is missing)."""
        try:
            data = self._read() if self._home else None
        except SaveError as error:  # a link or a folder is in its place
            if self.journal is None:
                raise
            self._suffer(None, str(error), patient)
            return None
        if self.journal is None:
            self._take_in_alone(data)
        elif not self._home or data in (None, self._written, self.state.document.to_bytes()):
            self.trouble = ""
        else:
            try:
                state, notes = self._merged(State.read(data, self.path.name))
            except (YamlError, BacklogError) as error:
                self._suffer(data, str(error), patient)
                return data
            self.trouble, self._written = "", data
            self._decide(state)
            for text in notes:
                self.warn(text)
        self._complete()
        return data

    def _complete(self) -> None:
        """Give what was added by hand, and is in git as it was written, what it lacks."""
        if self.state.lacks or highest_number(self.prefix, self.state.items) > self.state.counter:
            self._decide(merge(self.state, self.state, (), self.clock(), self.prefix)[0])

    def _take_in_alone(self, data: bytes | None) -> None:
        """The file is the truth, but an old copy in it undoes nothing that is committed."""
        self._state, self._written = self._usable(data)
        for known in self._readable(self._committed) if data != self._committed else ():
            if not known.problems:
                told = known, self._state, self._versions or (), self.clock(), self.prefix
                self._state, notes = merge(*told, in_head=True)
                for text in notes:
                    self.warn(text)

    def _merged(self, file: State) -> tuple[State, list[str]]:
        journal = cast(Journal, self.journal)
        earlier = itertools.chain(self._versions or (), journal.states())
        running = {attempt["item"] for attempt in journal.attempts.values()}
        written = self._readable(self._written or b"")
        shown = {chunk for state in written for chunk in state.document.chunks}
        told = self.state, file, earlier, self.clock(), self.prefix, running, shown
        return merge(*told, in_head=not journal.steps)

    def _suffer(self, data: bytes | None, why: str, patient: bool) -> None:
        """A file that does not parse (None: is none): somebody may be typing, or it is wrecked."""
        now = self.monotonic()
        if self._wreck[0] != data:
            self._wreck = data, now
            if patient:
                self.warn(f"{why}. Nothing new is started until it is mended, or after a minute.")
        self.trouble = why
        if now - self._wreck[1] < WRECK_S if patient else data is None:
            return
        kept = self.aside / f"{self.path.name}.broken-{self.clock():%Y%m%dT%H%M%S}"
        with self._writing(kept):
            if data is None:
                self.aside.mkdir(exist_ok=True)
                os.rename(self.path, kept)
            else:
                replace_file(kept, data)
        self.warn(f"{why}. It is set aside as {kept}, where any edit in it is, and written again.")
        self.trouble, self._wreck = "", ("", 0.0)

    def _decide(self, state: State, extra: Mapping[str, Any] = {}) -> None:
        """Make this the decided state: a line of the journal, before anything else."""
        if self.journal is not None:
            step = _step_between(self.state, state) if state is not self.state else {}
            if line := {**({"step": step} if step else {}), **extra}:
                self._append(line)
        self._state = state

    def _append(self, line: Mapping[str, Any], *, flush: bool = True) -> None:
        if self.journal is None:
            raise SaveError(f"{self.journal_path}: the run's journal is gone")
        with self._writing(self.journal_path):
            self.journal.append(line, flush=flush)

    def _publish(self, found: bytes | None) -> bool:
        """Write the decided state, if the file is still as it was found; False if it is not."""
        data = self.state.document.to_bytes()
        if self.trouble or not self._home:
            return True
        if data != found:
            with self._writing(self.path):
                os.stat(self.path.parent)  # a project that vanished is not made anew
                if not replace_file(self.path, data, self._mode, lambda: self._read() == found):
                    return False
        self._written = data
        return True

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); mend that and start again"
            if path == self.path and self.journal is not None:
                problem += ". The change is made all the same: it is in the journal"
            raise SaveError(f"{path}: {problem}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock that all writers of the file take, and know what other processes decided;
        SaveError if it is not had in time."""
        try:
            self.lock_path.parent.mkdir(exist_ok=True)  # not a folder above it that vanished
            fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SaveError(f"{self.lock_path}: cannot be locked ({error.strerror})") from error
        give_up = time.monotonic() + self.lock_limit_s
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() < give_up:
                        time.sleep(_LOCK_POLL_S)
                        continue
                    holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                    raise SaveError(
                        f"{self.path}: locked for {self.lock_limit_s:g} s by another process"
                        f" (probably {holder or 'unknown'}, see 'ps'); wait for it or end it, then"
                        f" try again; the lock is {self.lock_path}"
                    ) from None
            os.pwrite(fd, b"%-12d\n" % os.getpid(), 0)  # for the message of whoever waits in vain
            self._catch_up()
            yield
        finally:
            os.close(fd)

    def _catch_up(self) -> None:
        with suppress(FileNotFoundError):  # that run has ended
            if self.journal is not None:
                if self.journal.catch_up() or self._foreseen:
                    self._state, self._foreseen = self.journal.state(), False
                return
        self._written = None
        self.journal = Journal.read(self.journal_path, self.path.name)
        if self.journal is not None:
            self._state, self._foreseen = self.journal.state(), False
