"""The YAML subset of backlog.py: reading, refusing, hostile input, writing, surgical editing."""

import itertools
import json
import random
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from backlog import ITEM_KEYS, Document, YamlError, parse_yaml, render_yaml
from tests.gitkit import table

DATA = Path(__file__).parent / "data" / "yaml"
OTHER_WRITERS = sorted(DATA.glob("*.yaml"))
assert OTHER_WRITERS, f"no files in {DATA}"


def read(text: str) -> object:
    return parse_yaml(text.encode("utf-8", "surrogatepass"), "t")


def same(one: object, other: object) -> bool:
    return repr(one) == repr(other)  # unlike ==, 1, 1.0 and true differ; and the order of keys counts


def attempt(load: Callable[[bytes, str], object], data: bytes) -> object:
    """What `load` gives, or the YamlError that it raises; nothing else may come out of it."""
    try:
        return load(data, "t")
    except YamlError as error:
        return error


def refusal(data: bytes | str) -> YamlError:
    with pytest.raises(YamlError) as caught:
        parse_yaml(data if isinstance(data, bytes) else data.encode(), "t")
    error = caught.value
    assert str(error) == f"t:{error.line}:{error.column}: {error.problem}"
    assert "; " in error.problem, "says what to write instead"
    return error


# ---- reading -------------------------------------------------------------------------------------

READ: dict[str, tuple[str, object]] = {
    "empty_file_is_none": ("", None),
    "comments_only_is_none": ("# a\n\n  # b\n", None),
    "root_empty_flow_list": ("[]\n", []),
    "root_empty_flow_mapping": ("{ }  # none\n", {}),
    "leading_dashes_accepted": ("# c\n---  # d\na: 1\n", {"a": 1}),
    "leading_dashes_alone": ("---\n", None),
    "dash_alone_then_mapping": ("-\n  a: 1\n-\n- b\n", [{"a": 1}, None, "b"]),
    "null_before_same_column_sequence": ("- a:\n- b\n", [{"a": None}, "b"]),
    "key_yes_and_on_are_strings": ("yes: no\non: off\n", {"yes": "no", "on": "off"}),
    "quoted_keys": ("'1': a\n\"b: c\" : d\n'it''s': e\n", {"1": "a", "b: c": "d", "it's": "e"}),
    "plain_with_brackets_hash_colon_inside": ("a: b [c] {d}, e#f g:h 'i' \"j\" & * !\n", {"a": "b [c] {d}, e#f g:h 'i' \"j\" & * !"}),
    "plain_multi_line_is_text": ("a: 1\n  2\nb: null\n  x\n", {"a": "1 2", "b": "null x"}),
    "plain_continuation_starting_with_quote_sign": ("a: b\n  'c'\n  \"d\n  [e\n  &f\n", {"a": "b 'c' \"d [e &f"}),
    "single_multi_line": ("a: 'b  \n\n  c\n  d '\n", {"a": "b\nc d "}),
    "double_all_escapes": (r'a: "\0\a\b\t\n\v\f\r\e\ \"\/\\\N\_\L\P\x41\u263A\U0001F600"' + "\n", {"a": "\0\a\b\t\n\v\f\r\x1b \"/\\\x85\xa0\u2028\u2029A☺😀"}),
    "double_multi_line_backslash_join": ('a: "b \\\n   c\\\n  \\ d"\n', {"a": "b c d"}),
    "double_escaped_space_before_break": ('a: "b\\   \n  c"\n', {"a": "b  c"}),
    "block_eof_without_newline_strip": ("a: |-\n  b", {"a": "b"}),
    "comment_below_block_scalar_less_indented": ("a: |\n    b\n  # c\n    # d\n# e\nf: 1\n", {"a": "b\n", "f": 1}),
    "flow_list_of_scalars": ("a: [b, 'c, d', \"e]\", 1, -2, true, x y, a/b.c] # f\n", {"a": ["b", "c, d", "e]", 1, -2, True, "x y", "a/b.c"]}),
    "tab_inside_quotes": ("a: 'b\tc'\nd: \"e\tf\"\n", {"a": "b\tc", "d": "e\tf"}),
    "tab_behind_a_colon_that_is_text": ('a: "b:\tc"\nd: x # e:\tf\n', {"a": "b:\tc", "d": "x"}),
    "tab_inside_literal_and_comment": ("a: | #\tx\n  b\tc\t\n", {"a": "b\tc\t\n"}),
}


@pytest.mark.parametrize(("text", "value"), READ.values(), ids=READ)
def test_read(text: str, value: object) -> None:
    assert same(read(text), value)


NUMBER_FORMS: dict[str, object] = {
    # the core schema's constants
    "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    # numbers that every parser reads the same
    "0": 0, "-0": 0, "7": 7, "-12": -12, "999999999999999": 999999999999999,
    "0.5": 0.5, "-1.25": -1.25, "1e3": 1e3, "1E+3": 1e3, "1.5e-7": 1.5e-7, "-0.0": -0.0,
    # texts in YAML 1.2, whatever they are elsewhere
    **{
        text: text
        for text in ["yes", "Yes", "YES", "no", "on", "Off", "y", "n", "Y", "N", "nUll", "TrUe", "=", "<<", "e3", "E9", ".", "+e1", "-e1", "1e", "1e+", ".", "..", "...", "+", "-", "1_000", "1__0", "1_", "0x_1", "0_7", "-_1", "1:30", "12:30:45", "-1:30", "190:20:30.15", "1_0:30", "01:30", "0:0", "2026-02-13", "2026-2-3", "2026-13-45", "0_B0", "0_X9", "0b+1", "0o-1", "++1", "0o+1", "0x-9", "0xg", "0b2", "0o8", "1.2.3", "1-2", "--1", ".inf0", "4c0bd27", "deadbeef", "0192117a", "1e1_0", "1_000.5", "._5", ".nano"]
        if text not in ("-", "...")
    },
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBER_FORMS)
def test_number_forms_table(text: str) -> None:
    value = NUMBER_FORMS[text]
    assert same(read(f"a: {text}\nb:\n- {text}\n"), {"a": value, "b": [value]})
    assert same(read(f"a: {text}   # c\nb: {text}\n"), {"a": value, "b": value})


NUMBERS_REFUSED = ["01", "00", "-01", "007", "010", "08", "+1", "+0", "0x1F", "0X1f", "0o7", "0O7", "0b11", "0B1", "-0x1F", "-0b1", "-0o7", ".5", "1.", "-.5", "+.5", "1.e3", "01.5", ".inf", "-.INF", "+.Inf", ".nan", ".NAN", "1234567890123456", "-1234567890123456", "1e400", "-1e400", "61e9540", "0192117"]


@pytest.mark.parametrize("text", NUMBERS_REFUSED)
def test_leading_zero_hex_octal_inf_nan_16_digits_1e400_refused(text: str) -> None:
    for document, line, column in ((f"a: {text}\n", 1, 4), (f"b: 1\na:\n- {text}\n", 3, 3)):
        error = refusal(document)
        assert (error.line, error.column) == (line, column)
        assert text in error.problem
        assert "quote it" in error.problem
    assert "number" in refusal(f"a: [x, {text}]\n").problem
    assert read(f"a: '{text}'\n") == {"a": text}


# name: text, line, column, what the message names
REFUSED: dict[str, tuple[str, int, int, str]] = {
    "directive": ("%YAML 1.2\n---\na: 1\n", 1, 1, "directive"),
    "content_on_marker_line": ("--- a: 1\n", 1, 5, "content on the line of `---`"),
    "root_indented": (" a: 1\n", 1, 2, "indented document"),
    "bare_scalar_document": ("hello\n", 1, 1, "bare scalar document"),
    "mixed_seq_columns": ("a:\n  - 1\n - 2\n", 3, 2, "indented deeper than its neighbours"),
    "mixed_seq_columns_root": ("- 1\n - b: 2\n", 2, 2, '"- " inside a plain scalar'),
    "mixed_key_columns": ("a:\n    b: 1\n  c: 2\n", 3, 3, "indented deeper than its neighbours"),
    "duplicate_key_in_item": ("- a: 1\n  b: 2\n- a: 1\n  b: 2\n  a: 3\n", 5, 3, "first on line 3"),
    "duplicate_items_across_sections": ("items:\n- a: |\n   items: 1\nb: 1\nitems: []\n", 5, 1, "first on line 1"),
    "key_too_long": (f"{'k' * 1001}: 1\n", 1, 1, "more than 1000 characters"),
    "comment_then_continuation": ("a: b # c\n  d\n", 2, 3, "text after a comment"),
    "comment_line_then_continuation": ("a: b\n  # c\n  d\n", 3, 3, "text after a comment"),
    "deeper_line_after_blank_and_comment": ("a: b\n\n# c\n\n  d\n", 5, 3, "text after a comment"),
    "continuation_looks_like_list": ("a: b\n  - c\n", 2, 3, '"- " inside a plain scalar'),
    "continuation_looks_like_key": ("a: b\n  c: d\n", 2, 3, '": " inside a plain scalar'),
    "key_one_column_too_deep": ("a:\n- b: c\n  d: e\n   f: g\n", 4, 4, "continues line 3, because it is indented deeper"),
    "key_too_deep_below_a_first_key": ("- b: c\n   f: g\n", 2, 4, "continues line 1"),
    "key_too_deep_below_a_quoted_value": ("- b: 'c'\n   f: g\n", 2, 4, "(column 4, theirs is 3)"),
    "key_too_deep_below_a_folded_text": ("a: b\n  c\n   f: g\n", 3, 4, "continues line 2"),
    "key_one_column_too_shallow": ("- b: c\n f: g\n", 2, 2, "(column 2, theirs is 1)"),
    "dash_one_column_too_deep": ("a:\n- b\n - c\n", 3, 2, "continues line 2"),
    "last_key_indented": ("items:\n- id: A\n next_item_id: 1\n", 3, 2, "(column 2, theirs is 1)"),
    "key_among_sequence_entries": ("- a\nb: 1\n", 2, 1, "does not belong"),
    "scalar_on_own_line": ("a:\n  b\n", 2, 3, "line of its own"),
    "unclosed_quote_reports_opening": ('a: 1\nb: "c\n  d\n\n', 2, 4, "never closed"),
    "unclosed_single_quote": ("a: 'b''\n", 1, 4, "never closed"),
    "quote_not_indented": ("a: 'b\nc'\n", 2, 1, "continuation of a quoted scalar is not indented"),
    "unknown_escape_on_second_line": ('a: "b\n   c\\x4"\n', 2, 5, "unknown escape \\x"),
    "blank_after_escaped_break": ('a: "b\\\n\n  c"\n', 2, 1, "blank line after an escaped line break"),
    "block_first_blank_wider": ("a: |\n    \n  b\n", 3, 3, "leading blank line has more spaces"),
    "block_less_indented": ("a: |\n   b\n  c\n", 3, 3, "indented less than the first line"),
    "block_spaces_only_line": ("a: |\n  b\n    \n  c\n", 3, 3, "blank line with more spaces"),
    "block_line_starting_with_tab": ("a: |\n  b\n  \tc\n", 3, 3, "starts with a tab character"),
    "block_eof_without_newline": ("a: |\n  b", 2, 4, "without a final line break"),
    "block_eof_keep_without_newline": ("a: |+\n  b\n\n ", 4, 2, "without a final line break"),
    "flow_as_key": ("[a]: b\n", 1, 4, "text after the closing bracket"),
    "flow_then_deeper_line": ("a: [b]\n  c\n", 2, 3, "indented deeper"),
    "tab_on_blank_line": ("a: 1\n \t\nb: 2\n", 2, 2, "tab character in indentation"),
    "tab_at_end_of_quoted_line": ("a: 'b\t\n  c'\n", 1, 6, "tab character at the end"),
    "tab_at_start_of_quoted_line": ("a: 'b\n  \tc'\n", 2, 3, "tab character at the start"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "names"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, line: int, column: int, names: str) -> None:
    error = refusal(text)
    assert (error.line, error.column) == (line, column)
    assert names in error.problem


@pytest.mark.parametrize("path", OTHER_WRITERS, ids=lambda path: path.stem)
def test_other_writers_output_reads_equal(path: Path) -> None:
    expected = json.loads((DATA / "value.json").read_text(encoding="utf-8"))
    assert same(parse_yaml(path.read_bytes(), path.name), expected)


# ---- real files and the public test suite, where this machine has them -------------------------------

def backlogs(corpus: Path) -> list[Path]:
    found = sorted(corpus.glob("*/*.yaml"))
    assert found
    return found


def test_corpus_noop_bytes_identical(corpus: Path) -> None:
    for path in backlogs(corpus):
        data = path.read_bytes()
        value = parse_yaml(data, path.name)
        if isinstance(value, dict):
            assert Document.parse(data, path.name).to_bytes() == data
        if value is not None:
            assert same(read(render_yaml(value)), value)


def test_corpus_every_version_equals_core_pyyaml(corpus: Path) -> None:
    yaml = pytest.importorskip("yaml")

    class Core(yaml.CSafeLoader):  # type: ignore[misc,name-defined]
        yaml_implicit_resolvers: ClassVar = {
            sign: [pair for pair in pairs if pair[0][-4:] in ("null", "bool", ":int")]
            for sign, pairs in yaml.CSafeLoader.yaml_implicit_resolvers.items()
            if sign not in "yYoO"  # yes, on and the like are texts
        }

    for path in backlogs(corpus):
        data = path.read_bytes()
        assert same(parse_yaml(data, path.name), yaml.load(data, Core)), path.name


def test_suite_no_silent_error(corpus: Path) -> None:
    cases = json.loads((corpus / "yaml-cases.json").read_text(encoding="utf-8"))
    wrong, equal, refused = [], 0, 0
    for case in cases:
        value = attempt(parse_yaml, case["yaml"].encode("utf-8", "surrogatepass"))
        if isinstance(value, YamlError):
            refused += 1
            assert min(value.line, value.column) >= 1
            assert "; " in value.problem
            continue
        expected = case["expected"]
        right = not case["error"] and (same(expected, [value]) or (not expected and value is None))
        equal += right
        wrong += [] if right else [case["id"]]
    assert wrong == []
    assert equal + refused == len(cases)
    assert equal >= len(cases) // 10


# ---- hostile input -------------------------------------------------------------------------------

BYTES_REFUSED: dict[str, tuple[bytes, int, int, str]] = {
    "nul": (b"a: b\nc: d\0\n", 2, 5, "U+0000"),
    "invalid_utf8_column": ("a: é".encode() + b"\xff\n", 1, 5, "0xFF"),
    "truncated_utf8": (b"a: 1\nb: \xe2\x98", 2, 4, "0xE2"),
    "utf16": ("a: 1\n".encode("utf-16"), 1, 1, "UTF-8"),
    "bom_inside": (b"a: \xef\xbb\xbfb\n", 1, 4, "byte order mark"),
    "two_boms": (b"\xef\xbb\xbf\xef\xbb\xbfa: b\n", 1, 1, "byte order mark"),
    "mixed_endings": (b"a: 1\r\nb: 2\nc: 3\r\n", 2, 5, "mixed line endings"),
    "lone_cr": (b"a: 1\rb: 2\n", 1, 5, "lone carriage return"),
    "escape_character": (b"a: \x1b[31m\n", 1, 4, "U+001B"),
    "del": (b"a: \x7f\n", 1, 4, "U+007F"),
    "c1": ("a: é\x80\n".encode(), 1, 5, "U+0080"),
    "nel": ("a: b\n\x85\n".encode(), 2, 1, "U+0085"),
    "ls": ("a: b\u2028c\n".encode(), 1, 5, "U+2028"),
    "ps": ("a: '\u2029'\n".encode(), 1, 5, "U+2029"),
    "surrogate": (b"a: \xed\xa0\x80\n", 1, 4, "0xED"),
    "noncharacter": ("a: \uffff\n".encode(), 1, 4, "U+FFFF"),
    "too_large": (b"#" * (64 * 1024 * 1024 + 1), 1, 1, "64 MiB"),
}


@pytest.mark.parametrize(("data", "line", "column", "names"), BYTES_REFUSED.values(), ids=BYTES_REFUSED)
def test_bytes_refused(data: bytes, line: int, column: int, names: str) -> None:
    error = refusal(data)
    assert (error.line, error.column) == (line, column)
    assert names in error.problem


def test_depth_32_ok_33_refused() -> None:
    def nested(depth: int) -> str:
        return "".join(f"{' ' * n}a:\n" for n in range(depth - 1)) + " " * (depth - 1) + "a: 1\n"

    assert same(read(nested(32)), json.loads('{"a": ' * 32 + "1" + "}" * 32))
    error = refusal(nested(33))
    assert (error.line, error.column) == (33, 33)
    assert "nesting deeper than 32" in error.problem
    assert "nesting deeper than 32" in refusal(nested(3000)).problem


HOSTILE: dict[str, Callable[[], bytes]] = {
    "million_dashes_one_line": lambda: b"- " * 1_000_000,
    "hundred_thousand_levels": lambda: b"".join(b" " * (n % 400) + b"a:\n" for n in range(100_000)),
    "million_brackets": lambda: b"a: " + b"[" * 1_000_000,
    "long_flow_list": lambda: b"a: [" + b"b, " * 200_000 + b"c]\n",
    "million_colons": lambda: b"a" + b": " * 500_000,
    "million_backslashes": lambda: b'a: "' + b"\\" * 1_000_001,
    "million_escapes": lambda: b'a: "' + b"\\n" * 1_000_000 + b'"\n',
    "hundred_thousand_documents": lambda: b"---\na: 1\n" * 100_000,
    "block_scalar_of_many_lines": lambda: b"a: >\n" + b"  x\n\n" * 50_000,
    "blank_lines_in_a_quoted_scalar": lambda: b'a: "b' + b"\n" * 100_000 + b' c"\n',
    "invalid_utf8_far_behind": lambda: b"a: " + "é".encode() * 1_000_000 + b"\xc3",
    "carriage_returns": lambda: b"\r" * 1_000_000,
    "million_quotes": lambda: b"a: " + b"'" * 1_000_001,
    "huge_integer_refused_quickly": lambda: b"a: " + b"1" * 1_000_000 + b"\n",
    "huge_float": lambda: b"a: 1." + b"1" * 1_000_000 + b"\n",
    "million_spaces": lambda: b" " * 1_000_000,
    "deep_indent": lambda: b"a:\n" + b" " * 1_000_000 + b"b: 1\n",
    "unclosed_over_many_lines": lambda: b'a: "b\n' + b"  c\n" * 200_000,
    "late_duplicate": lambda: b"".join(b"k%d: v\n" % n for n in range(50_000)) + b"k7: v\n",
}
HOSTILE_AND_LONG = ("million_dashes_one_line", "long_flow_list", "million_escapes", "block_scalar_of_many_lines", "late_duplicate", "unclosed_over_many_lines", "million_backslashes", "hundred_thousand_levels")


@pytest.mark.parametrize("make", table(HOSTILE, HOSTILE_AND_LONG))
def test_hostile_input_is_read_or_refused_by_name(make: Callable[[], bytes]) -> None:
    data = make()
    for load in (parse_yaml, Document.parse):
        outcome = attempt(load, data)
        if isinstance(outcome, YamlError):
            assert len(str(outcome)) < 300, "a message fits on a screen"


def test_ten_mb_line_memory_bound() -> None:
    for data in (b"a: " + b"word " * 2_000_000 + b"x\n", b"word " * 2_000_000 + b": x\n"):
        tracemalloc.start()
        attempt(parse_yaml, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * len(data)


def test_mutated_files_raise_nothing_but_yaml_error() -> None:
    rng = random.Random(67)
    seeds = [path.read_bytes() for path in OTHER_WRITERS]
    for _ in range(400):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.choice(
                [b"\t", b"\n", b"- ", b": ", b'"', b"'", b"#", b"\xff", b"|", b"[", b"  ", b"\r", b"a"]
            )
        made = attempt(Document.parse, bytes(data))
        if isinstance(made, Document):
            value = parse_yaml(bytes(data))
            assert isinstance(value, dict)
            assert made.to_bytes() == data
            assert same([*made.items], value.pop("items", None) or [])
            assert same(made.top, value)


# ---- writing -------------------------------------------------------------------------------------

def written(value: object) -> str:
    """How a value is written behind a key; checked by reading it back."""
    text = render_yaml({"a": value})
    assert same(read(text), {"a": value})
    assert text.startswith("a: ")
    return text[3:-1]


def quoted(texts: Iterable[str]) -> dict[str, str]:
    return {text: "'" + text.replace("'", "''") + "'" for text in texts}


WORDS = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"]
SIGNS = "!\"#%&'*,>@[]`{|}-?:"
WRITTEN: dict[str, dict[str, str]] = {
    "signs in front": quoted([*SIGNS, *(f"{sign}x" for sign in SIGNS), "x:"]),
    "signs elsewhere": {text: text for text in (f"x{sign}" for sign in SIGNS if sign != ":")},
    "inside, quoted": quoted(["a: b", "a #b", "a:", " a", "a ", ""]),
    "inside, plain": {text: text for text in ("a:b", "a#b", "a, [b] {c}", "it's \"so\"", "a - b", "yEs")},
    "words of YAML 1.1": quoted([*WORDS, *map(str.capitalize, WORDS), *map(str.upper, WORDS), "~", "=", "<<", "..."]),
    "like numbers or dates": quoted(
        ["61e9540", "1234567", "e123456", "0192117", "0_B0", "++1", "0b+1", "0", "-0", "+1", "007", "0x1F", "0o7", "-0b1", "1_000", "-_1", "1.", ".5", "1e3", "1E+3", "e3", "E9", ".", "+e1", ".inf", "-.INF", ".nan", "1:30", "12:30:45", "190:20:30.15", "2026-02-13", "2026-2-3", "2026-13-45", "2026-02-13T10:00:00Z"]
    ),
    "no numbers for any reader": {text: text for text in ("4c0bd27", "8957cea715e8", "1.2.3", "v1.0", "10 items", "2026-02")},
    "other spaces": quoted([text for space in "\xa0\u3000\u2003" for text in (f"{space}a", f"a{space}")]) | {"a\u3000b": "a\u3000b"},
    "controls": {"\x00\x1b\x7f\x85\u2028\u2029\ufeff\t\"\\": r'"\x00\x1B\x7F\x85\u2028\u2029\uFEFF\t\"\\"', "a\rb": r'"a\x0Db"'},
    "literals": {"a\nb": "|-\n  a\n  b", "a\nb\n": "|\n  a\n  b", "a\n\n  b\n": "|\n  a\n\n    b", "# a\n- b": "|-\n  # a\n  - b"},
    "no literals": {
        text: json.dumps(text) for text in (" a\nb", "a \nb", "a\nb ", "a\n\n", "\na", "\n", "a\tb\nc", "a\n\u2028")
    },
}


@pytest.mark.parametrize("forms", WRITTEN.values(), ids=WRITTEN)
def test_how_texts_are_written(forms: dict[str, str]) -> None:
    """In quotes wherever a reader of YAML 1.1 or 1.2 would take them for something else."""
    for text, form in forms.items():
        assert written(text) == form
        assert "\n" in form or render_yaml([text]) == f"- {form}\n"


def test_how_keys_and_numbers_are_written() -> None:
    value = {"e9": 1, "yes": 2, "1": 3, "a b": 4, "a: b": 5, "": 6, "é": 7, "a-b_c": 8, "-": 9, "\t": 10}
    text = render_yaml(value)
    assert text == ("'e9': 1\n'yes': 2\n'1': 3\n'a b': 4\n'a: b': 5\n'': 6\n'é': 7\na-b_c: 8\n'-': 9\n\"\\t\": 10\n")
    assert same(read(text), value)
    for number, form in ((1e16, "1.0e+16"), (1e-7, "1.0e-07"), (1.5e300, "1.5e+300"), (0.1, "0.1"), (-0.0, "-0.0"), (-999_999_999_999_999, "-999999999999999")):
        assert written(number) == form


def test_what_cannot_be_written_is_refused() -> None:
    value: object = "x"
    for depth in range(32):
        value = {"a": value} if depth % 2 else [value]
    assert same(read(render_yaml(value)), value)
    cycle: list[object] = []
    cycle.append(cycle)
    refused: list[tuple[object, str]] = [
        ([value], "nesting deeper than 32"), (cycle, "nesting deeper than 32"), ([10**15], "15 digits"),
        *(([float(text)], "cannot be written") for text in ("inf", "-inf", "nan")),
        *(({"a": one}, r"U\+D") for one in ("a\ud800", ["\udfff"], {"\ud800": 1})),
        *((one, ".") for one in ({1: "a"}, {None: 1}, {"k" * 1001: 1}, {"a": (1, 2)}, {"a": b"x"}, [object()], "text", 1, True)),
    ]  # fmt: skip
    for one, says in refused:
        with pytest.raises(ValueError, match=says):
            render_yaml(one)


def test_nested_layout_and_empty_collections() -> None:
    assert [render_yaml(one) for one in (None, [], {})] == ["", "[]\n", "{}\n"]
    assert render_yaml({"a": [], "b": {}, "c": [[], {}], "d": None}) == "a: []\nb: {}\nc:\n- []\n- {}\nd: null\n"
    value = {"a": [[1, [2]], {"b": {"c": ["d"]}, "e": "f\ng"}], "h": True}
    text = "a:\n- - 1\n  - - 2\n- b:\n    c:\n    - d\n  e: |-\n    f\n    g\nh: true\n"
    assert render_yaml(value) == text
    assert same(read(text), value)


TEXT_SIGNS = "ab01 :#-?,[]{}'\"|>%@`&*!~=<.+_eExo\n\t\\/é\xa0\u3000\u2028\x85\x07😀Yn"
TRAPS = [*NUMBER_FORMS, *NUMBERS_REFUSED, *(text for forms in WRITTEN.values() for text in forms), "0o+1", ": a", "? a", "- a", "a\t\nb", "''", 'a "b"', "\\n", "[a", "{a}"]
TRAPS = [form for word in TRAPS for form in dict.fromkeys((word, word.capitalize(), word.upper()))]
STYLES = ["plain", "'single'", '"double"', "[flow]", "|-\n    literal", "plain  # why", "'x'  # why"]


def positions(texts: list[str]) -> Iterator[tuple[str, object]]:
    """Texts in every position: documents, and what they mean."""
    value: dict[str, object] = {
        "values": {f"k{number}": text for number, text in enumerate(texts)},
        "keys": dict.fromkeys(texts, "x"),
        "list": texts,
        "items": [{"id": text, "tags": [text], "in": {"deep": [[text], {"k": text}]}} for text in texts],
    }
    yield render_yaml(value), value
    lines = [f"- a: {STYLES[number % len(STYLES)]}\n  b:\n  - x" for number in range(len(texts))]
    document = Document.parse(("items:\n" + "\n".join(lines) + "\n").encode(), "edited")
    for number, text in enumerate(texts):
        new: object = [text, "x"] if STYLES[number % len(STYLES)] == "[flow]" else text
        document = document.with_item(number, {"a": new, "b": ["x", text]})
    yield document.to_bytes().decode(), {"items": [*document.items]}


def reader(name: str) -> Callable[[str], object]:
    """How a document is read: by us, and by others where they are installed."""
    if name == "PyYAML":
        yaml = pytest.importorskip("yaml")
        return lambda text: yaml.load(text, yaml.CSafeLoader)
    if name == "ruamel":
        made = pytest.importorskip("ruamel.yaml").YAML(typ="safe", pure=True)
        return lambda text: made.load(text)
    return read


@pytest.mark.parametrize(
    ("name", "count"), [("us", 500), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("us", 8_000), ("PyYAML", 8_000), ("ruamel", 500)))]
)
def test_random_texts_are_read_as_what_they_are(name: str, count: int) -> None:
    """Written in every position, new and in place of another value."""
    rng, load = random.Random(99), reader(name)
    texts = TRAPS + ["".join(rng.choices(TEXT_SIGNS, k=rng.randint(0, 8))) for _ in range(count)]
    for start in range(0, len(texts), 100):
        for text, meant in positions(texts[start : start + 100]):
            assert same(load(text), meant)


@pytest.mark.parametrize("length", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_all_texts_of_the_signs_of_numbers_are_read_as_what_they_are(length: int) -> None:
    for size in range(1, length + 1):
        texts = ["".join(text) for text in itertools.product("0179-+._eExXoObB:aF", repeat=size)]
        assert read(render_yaml(texts)) == texts


# ---- editing -------------------------------------------------------------------------------------

BACKLOG = """\
# the backlog of a test

schema_version: 3  # ours
items:
# about A
- id: A-1   # first
  title: 'it''s A'   # title
  status: "new"
  custom:   [x, 'y z']   # mine
  # about the tags
  tags:  # tags
  # about one
  - one
  - two  # second

  - three
  description:   # text
    context: some text
      that goes on   # end
    problem: |-  # literal
      # not a comment
      - not a list

    other: "x"

# belongs to the file

# about B
- id: B-2
  'status': new
  created: 2026-02-12T16:23:33.711239234+00:00
  # phase: old

- id: C-3
  title: C
# at the end
next_item_id: 3
"""


def document(text: str = BACKLOG) -> Document:
    return Document.parse(text.encode(), "B.yaml")


Edit = Callable[[Document], Document]


def edited(text: str, *edits: Edit) -> str:
    """The text after edits; its values are compared with what a fresh reading of it gives."""
    made = document(text)
    for edit in edits:
        made = edit(made)
    data = made.to_bytes()
    again = Document.parse(data, "again")
    assert same(made.items, again.items)
    assert made.top == again.top
    assert again.to_bytes() == data
    return data.decode()


def changed(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines that only one of the two has."""
    old, new = before.splitlines(), after.splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return old, new


def update(index: int, **changes: object) -> Edit:
    return change(index, changes)


def change(index: int, changes: dict[str, object]) -> Edit:
    return lambda made: made.with_item(index, changes, ITEM_KEYS)


def remove(index: int) -> Edit:
    return lambda made: made.with_chunks([*made.chunks[:index], *made.chunks[index + 1 :]])


def append(item: dict[str, object]) -> Edit:
    item = {**{key: item[key] for key in ITEM_KEYS if key in item}, **item}
    return lambda made: made.with_chunks([*made.chunks, made.render_chunk(item)])


def set_top(key: str, value: object) -> Edit:
    return lambda made: made.with_top({key: value})


def test_set_same_value_changes_nothing() -> None:
    everything = document().items[0]
    assert edited(BACKLOG, change(0, everything), update(0, gone=None)) == BACKLOG
    assert edited(BACKLOG, set_top("next_item_id", 3), set_top("no", None)) == BACKLOG


EDITS: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "set_scalar_changes_one_line": ({"id": "A-9"}, ["- id: A-1   # first"], ["- id: A-9   # first"]),
    "set_keeps_trailing_comment_and_its_spacing": (
        {"title": "A's"}, ["  title: 'it''s A'   # title"], ["  title: 'A''s'   # title"],
    ),
    "set_keeps_quote_kind": ({"status": "ready"}, ['  status: "new"'], ['  status: "ready"']),
    "set_keeps_flow_list": (
        {"custom": ["x", "a b", "c: d"]},
        ["  custom:   [x, 'y z']   # mine"], ["  custom: [x, a b, 'c: d']   # mine"],
    ),
    "set_value_with_comments_inside_list": (
        {"tags": ["two", "four", "one"]},
        ["  # about one", "  - one", "  - two  # second", "", "  - three"],
        ["  - two  # second", "  - four", "  # about one", "  - one"],
    ),
    "set_replaces_multi_line_plain": (
        {"description": {"context": "short", "problem": "# not a comment\n- not a list", "other": "x"}},
        ["    context: some text", "      that goes on   # end"], ["    context: short   # end"],
    ),
    "set_literal_containing_comment_like_lines": (
        {"description": {"context": "some text that goes on", "problem": "one\n# two\n", "other": "x"}},
        ["    problem: |-  # literal", "      # not a comment", "      - not a list"],
        ["    problem: |  # literal", "      one", "      # two"],
    ),
    "nested_key_deleted_and_added": (
        {"description": {"context": "some text that goes on", "impact": "big", "other": "x"}},
        ["    problem: |-  # literal", "      # not a comment", "      - not a list"],
        ["    impact: big"],
    ),
    "set_mapping_to_scalar_keeps_comment": (
        {"description": "short"},
        BACKLOG.splitlines()[16:24], ["  description: short   # text"],
    ),
    "set_list_empty": ({"tags": []}, BACKLOG.splitlines()[10:16], ["  tags: []  # tags"]),
    "delete_key": ({"custom": None}, ["  custom:   [x, 'y z']   # mine"], []),
    "new_key_in_its_place": ({"phase": "build"}, [], ["  phase: build"]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "old", "new"), EDITS.values(), ids=EDITS)
def test_edit(changes: dict[str, object], old: list[str], new: list[str]) -> None:
    text = edited(BACKLOG, change(0, changes))
    assert changed(BACKLOG, text) == (old, new)
    assert edited(BACKLOG, update(0, id="A-1"), change(0, changes)) == text


def test_dash_moves_when_the_first_key_is_deleted() -> None:
    assert edited("items:\n- id: A\n  title: B\n", update(0, id=None)) == "items:\n- title: B\n"
    assert edited("items:\n-\n  id: A\n  title: B\n", update(0, id=None)) == "items:\n-\n  title: B\n"
    assert edited("items:\n- id: A\n", update(0, id=None)) == "items:\n- {}\n"
    assert edited("items:\n- {}\n", update(0, id="A")) == "items:\n- id: A\n"


def test_delete_item_takes_its_comment_not_the_next() -> None:
    def without(start: str, end: str) -> str:
        return BACKLOG[: BACKLOG.index(start)] + BACKLOG[BACKLOG.index(end) :]

    assert edited(BACKLOG, remove(1)) == without("# about B\n", "- id: C-3")
    assert edited(BACKLOG, remove(0)) == without("# about A\n", "# belongs to the file\n")
    assert edited(BACKLOG, remove(2)) == without("- id: C-3", "# at the end")
    for tail in ("n: 1\n", "\nn: 1\n"):
        assert edited(f"items:\n- id: A\n\n- id: B\n{tail}", remove(1)) == f"items:\n- id: A\n{tail}"
    assert edited("items:\n- id: A\n\n- id: B\n", remove(0)) == "items:\n- id: B\n"
    head, rest = "# the backlog of a test\n\nschema_version: 3  # ours\n", "# belongs to the file\n\n# at the end\nnext_item_id: 3\n"
    assert edited(BACKLOG, *[remove(0)] * 3) == f"{head}items: []\n{rest}"
    assert edited(BACKLOG, *[remove(0)] * 3, append({"id": "D"})) == f"{head}items:\n- id: D\n{rest}"


APPENDED = {
    "items:\n- id: A\nnext_item_id: 1\n": "items:\n- id: A\n- id: Z\nnext_item_id: 1\n",
    "next_item_id: 1\nitems:\n- id: A\n": "next_item_id: 1\nitems:\n- id: A\n- id: Z\n",
    "items:\n- id: A\n\n- id: B\n# c\nn: 1\n": "items:\n- id: A\n\n- id: B\n\n- id: Z\n# c\nn: 1\n",
    "items:\n  - id: A\n\n  # d\n": "items:\n  - id: A\n  - id: Z\n\n  # d\n",
    "items:\n- id: A\n  # p: q\n": "items:\n- id: A\n  # p: q\n- id: Z\n",
    "items: []  # none\nn: 1\n": "items:  # none\n- id: Z\nn: 1\n",
    "items:\n\n# c\nn: 1": "items:\n- id: Z\n\n# c\nn: 1",
    "items: null": "items:\n- id: Z\n",
    "items: []\n  # c\n": "items:\n- id: Z\n  # c\n",
    "---\nschema_version: 3\nn: 1\n": "---\nschema_version: 3\nitems:\n- id: Z\nn: 1\n",
    "items: ~\n": "items:\n- id: Z\n",
}


def test_where_an_item_is_appended() -> None:
    for before, after in APPENDED.items():
        assert edited(before, append({"id": "Z", "phase": None})) == after
def test_appended_item_is_written_in_canonical_order_and_the_files_indentation() -> None:
    item = {"own": 1, "tags": ["x"], "title": "a: b", "id": "Z", "description": {"context": "a\nb"}}
    text = edited("items:\n  - id: A\n", append(item))
    assert text == (
        "items:\n  - id: A\n  - id: Z\n    title: 'a: b'\n    tags:\n      - x\n"
        "    description:\n      context: |-\n        a\n        b\n    own: 1\n"
    )
    for offset in ("", "  "):
        text = f"items:\n{offset}- id: A\n"
        assert edited(text, update(0, tags=["x"])) == f"{text}{offset}  tags:\n{offset}  {offset}- x\n"


def test_file_without_final_newline() -> None:
    text = "schema_version: 3\nitems:\n- id: A\n  title: x"
    assert edited(text) == text
    assert edited(text, update(0, title="z")) == text[:-1] + "z"
    assert edited(text, append({"id": "B"})) == text + "\n- id: B\n"
    assert edited(text, set_top("next_item_id", 2)) == text + "\nnext_item_id: 2\n"
    assert edited(text, update(0, title=None)) == "schema_version: 3\nitems:\n- id: A"
    assert edited(text + "\n- id: B", remove(1)) == text + "\n"
    block = edited("items:\n- id: A\n  title: x", update(0, title="a\nb\n"))  # which needs one
    assert block == "items:\n- id: A\n  title: |\n    a\n    b\n"


def test_line_ends_and_a_byte_order_mark_are_kept() -> None:
    data = b"\xef\xbb\xbf" + BACKLOG.replace("\n", "\r\n").encode()
    made, plain = Document.parse(data, "t"), document()
    assert made.to_bytes() == data
    for edit in (update(0, title="B", description={"context": "a\nb"}), append({"id": "Z"}), set_top("next_item_id", 9)):
        made, plain = edit(made), edit(plain)
    assert made.to_bytes() == b"\xef\xbb\xbf" + plain.to_bytes().replace(b"\n", b"\r\n")
    assert made.items[0]["description"] == {"context": "a\nb"}
    assert parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


def test_d44_unknown_keys_and_order_kept() -> None:
    text = "zeta: [1]\nitems:\n- own: x\n  status: new\n  id: A\n  more: {}\nnext_item_id: 1\nalpha: ~\n"
    assert edited(text, update(0, status="ready"), set_top("next_item_id", 2)) == (
        text.replace("new", "ready").replace("next_item_id: 1", "next_item_id: 2")
    )


def test_set_top() -> None:
    text = edited(BACKLOG, set_top("next_item_id", 4), set_top("schema_version", 2))
    assert text == BACKLOG.replace("next_item_id: 3", "next_item_id: 4").replace("version: 3", "version: 2")
    assert edited(BACKLOG, set_top("next_item_id", None)) == BACKLOG.replace("next_item_id: 3\n", "")
    assert edited("items:\n# c\n\n- id: A\n", set_top("schema_version", 3), set_top("next_item_id", 1)) == (
        "items:\n# c\n\n- id: A\nnext_item_id: 1\nschema_version: 3\n"
    )


def test_key_removed_below_a_keep_block_scalar_at_the_end() -> None:
    text = "items:\n- title: |+\n    x\n  id: A\n\nn: 1\n"
    assert edited(text, update(0, id=None)) == "items:\n- title: |\n    x\n\nn: 1\n"
    assert edited(text, update(0, id="B")) == text.replace("A", "B")


class Liar(str):
    """A text that equals nothing that is read."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


UNWRITABLE: dict[str, Edit] = {
    "update": change(0, {"title": "fine", "status": Liar("new")}),
    "append": append({"id": Liar("new")}),
    "set_top": set_top("next_item_id", Liar("new")),
    "type": change(0, {"tags": ("a",)}),
    "nested": change(0, {"tags": ["x", float("nan")]}),
    "surrogate": append({"id": "\ud800"}),
    "key": change(0, {"k" * 1001: 1}),
    "too_deep": change(0, {"tags": json.loads("[" * 31 + "1" + "]" * 31)}),
}


@pytest.mark.parametrize("edit", UNWRITABLE.values(), ids=UNWRITABLE)
@pytest.mark.parametrize("text", [BACKLOG, "items:\n- id: A", "items:\n- id: A\n  tags:\n  - x\n"])
def test_edit_self_check_raises_not_writes(text: str, edit: Edit) -> None:
    made = document(text)
    with pytest.raises(ValueError, match=r"."):
        edit(made)
    assert made == document(text)


DOCUMENT_REFUSED: dict[str, tuple[str, int, int, str]] = {
    "d63_empty_file": ("", 1, 1, "holds no backlog"),
    "d63_comments_only": ("# a\n\n", 1, 1, "holds no backlog"),
    "list": ("# a\n- id: A\n", 2, 1, "not a mapping"),
    "flow": ("{}\n", 1, 1, "not a mapping"),
    "scalar": ("text\n", 1, 1, "bare scalar"),
    "items_mapping": ("n: 1\nitems:\n  a: 1\n", 2, 1, "`items` is not a list"),
    "items_text": ("items: x\n", 1, 1, "`items` is not a list"),
    "items_flow_list": ("items: [a]\n", 1, 1, "`items` is not a list"),
}


@pytest.mark.parametrize(("text", "line", "column", "names"), DOCUMENT_REFUSED.values(), ids=DOCUMENT_REFUSED)
def test_d63_document_refused(text: str, line: int, column: int, names: str) -> None:
    with pytest.raises(YamlError) as caught:
        document(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert caught.value.source == "B.yaml"
    assert names in caught.value.problem


def test_item_that_is_no_mapping_is_kept_as_parsed() -> None:
    text = "items:\n- text\n- id: A\n- - x\n- null\n"
    made = document(text)
    assert made.items == ("text", {"id": "A"}, ["x"], None)
    with pytest.raises(ValueError, match="item number 1 is not a mapping"):
        made.with_item(0, {"id": "B"})
    assert edited(text, update(1, id="B"), remove(0)) == "items:\n- id: B\n- - x\n- null\n"


def test_values_and_lines_of_items_and_keys() -> None:
    made = document()
    assert made.top == {"schema_version": 3, "next_item_id": 3}
    assert made.items[0]["description"] == {
        "context": "some text that goes on", "problem": "# not a comment\n- not a list", "other": "x",
    }  # fmt: skip
    lines = BACKLOG.splitlines()
    assert [made.line_of(index) for index in range(3)] == [lines.index(line) + 1 for line in lines if line[:2] == "- "]
    assert lines[made.line_of(0, "description") - 1] == "  description:   # text"
    assert lines[made.line_of(1, "status") - 1] == "  'status': new"
    assert made.line_of(1, "context") == made.line_of(1)
    assert document("items:\n# c\n- text\n-\n  id: A\n").line_of(1, "id") == 5


# ---- chunks --------------------------------------------------------------------------------------

def test_chunks_with_the_tail_of_another_document() -> None:
    one = document("schema_version: 3\nitems:\n- id: A\n- id: B\nn: 1\n")
    other = document("# c\nitems:\n- id: C\n# t\nn: 2\n")
    empty = document("items: []  # none\nn: 3\n")
    text = "schema_version: 3\nitems:\n- id: A\n- id: B\n# t\nn: 2\n"
    assert one.with_chunks(one.chunks, other.tail).to_bytes() == text.encode()
    assert empty.with_chunks(one.chunks) == document("items:  # none\n- id: A\n- id: B\nn: 3\n")
    assert empty.with_chunks(one.chunks).with_chunks([]) == empty
    with pytest.raises(ValueError, match="duplicate key"):
        one.with_chunks(one.chunks, "schema_version: 3\n")


@pytest.mark.parametrize(
    ("text", "order", "after"),
    [
        ("items:\n- a\n\n- b\n\n- c\n", [2, 0], "items:\n- c\n\n- a\n"),
        ("items:\n- a\n- b\n- c\n\nn: 1\n", [2, 1, 0], "items:\n- c\n- b\n- a\n\nn: 1\n"),
        ("items:\n- a\n\n- b\n# t\n", [0], "items:\n- a\n\n# t\n"),
        ("items:\n- a\n\n\n- b\n\n- c\n", [0, 2], "items:\n- a\n\n- c\n"),
        ("items:\n- a\n- b", [1, 0], "items:\n- b\n- a\n"),
        ("items:\n- |+\n  a\n\n- b\n\nn: 1\n", [0], "items:\n- |+\n  a\n\nn: 1\n"),
        ("items:\n- >\n  a\n- b\n\n  # t\n", [0], "items:\n- >\n  a\n\n# t\n"),
        ("items:\n- a\n- b\n\n# f\n\n- c\nn: 1\n", [0, 2], "items:\n- a\n\n# f\n\n- c\nn: 1\n"),
        ("items:\n- a\n- b\n\n# f\n\n- c\nn: 1\n", [0], "items:\n- a\n\n# f\n\nn: 1\n"),
    ],
)  # fmt: skip
def test_gaps_where_pieces_meet(text: str, order: list[int], after: str) -> None:
    made = document(text)
    done = made.with_chunks([made.chunks[place] for place in order])
    assert done.to_bytes().decode() == after
    assert done == document(after)
    assert [*done.items] == [made.items[place] for place in order]


def test_a_list_keeps_the_comments_of_what_stays() -> None:
    text = "items:\n- id: A\n  notes:\n  # one\n  - by: me  # mine\n    # two\n    text: x\n  # last\n  - done\n"
    notes = [{"by": "you", "at": 1}, {"by": "me", "text": "x"}, "more", "done"]
    assert edited(text, update(0, notes=notes)) == (
        "items:\n- id: A\n  notes:\n  - by: you\n    at: 1\n  # one\n  - by: me  # mine\n    # two\n    text: x\n"
        "  - more\n  # last\n  - done\n"
    )
    text = "items:\n- id: A\n  deep:\n  - - a  # a\n    - b  # b\n"
    assert edited(text, update(0, deep=["x", ["a", "b"]])) == text.replace("  - -", "  - x\n  - -")
    assert edited(text, update(0, deep=[["x", "b"]])) == "items:\n- id: A\n  deep:\n  - - x\n    - b\n"
    assert edited(text, update(0, deep="x")) == "items:\n- id: A\n  deep: x\n"


# ---- random edits --------------------------------------------------------------------------------

def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(12)
    if kind == 0 and depth < 3:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if kind == 1 and depth < 3:
        keys = rng.sample(["context", "problem", "own key", "1"], rng.randint(0, 4))
        return {key: random_value(rng, depth + 1) for key in keys}
    return rng.choice(
        [True, 1, -2.5, "", "x", "yes", "two words", "a: b", "# c", "it's", "a\nb", "a\n\n# b\n", " a\nb ",
         "- x", "é\t", "61e9540", "long " * 30 + "end", "0x1", [], {}]
    )  # fmt: skip


def random_edit(rng: random.Random, made: Document) -> Document:
    kind = rng.randrange(10)
    if kind == 0:
        return append({"id": "N", "title": random_value(rng, 3), "tags": random_value(rng)})(made)
    if kind == 1 and len(made.items) > 1:
        return remove(rng.randrange(len(made.items)))(made)
    if kind == 2:
        key = rng.choice(["next_item_id", "own", "schema_version"])
        return set_top(key, rng.randint(0, 9))(made)
    if not made.items:
        return made
    index = rng.randrange(len(made.items))
    keys = [*made.items[index], *rng.sample(ITEM_KEYS, 2), "own"]
    value = random_value(rng) if rng.random() < 0.8 else None
    return change(index, {rng.choice(keys): value})(made)


def check_random_edits(texts: list[str], count: int) -> None:
    """Each edit gives what a dict would hold, and touches no line of another item."""
    rng = random.Random(118)
    for _ in range(count // 20):
        made = document(rng.choice(texts))
        for _ in range(20):
            before, made = made, random_edit(rng, made)
            again = Document.parse(made.to_bytes(), "again")
            assert same(again.items, made.items)
            assert again.top == made.top
            known = [repr(item) for item in before.items]
            gained = [item for item in made.items if repr(item) not in known]
            assert len(gained) <= 1
            if len(made.chunks) == len(before.chunks):
                assert sum(map(str.__ne__, made.chunks, before.chunks)) <= 1
            if same(made.items, before.items) and made.top == before.top:
                assert made.to_bytes() == before.to_bytes()


@pytest.mark.parametrize("count", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_random_edits_touch_only_their_lines(count: int) -> None:
    check_random_edits([BACKLOG, *(path.read_text(encoding="utf-8") for path in OTHER_WRITERS)], count)


@pytest.mark.slow
def test_random_edits_of_corpus(corpus: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in backlogs(corpus) if "backlogs" in path.parts]
    check_random_edits([text for text in texts if "\nitems:" in text and len(text) < 60_000], 200)
