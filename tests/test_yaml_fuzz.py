"""Random documents of the whole grammar, whose values are known, and random faults in them."""

import random

import pytest

from backlog import Document, YamlError, parse_yaml, read_chunk
from tests.test_yaml import same

Scalar = tuple[list[str], object]  # the texts of its lines, without indentation, and its value

PLAIN = [
    "x", "two words", "a-b", "-x", "a:b", "a#b", "it's", 'a "b"', "x [y], {z}", "yes", "On", "2026-02-13",
    "2026-02-12T16:23:33.711239234+00:00", "12:30", "1_000", "1.2.3", "é → 😀", "x\\n", "http://a/b?c=d", "nul", "=", "...x",
]  # fmt: skip
PLAIN_VALUES: dict[str, object] = {
    **{text: text for text in PLAIN}, "1": 1, "-3": -3, "0": 0, "1.5": 1.5, "-0.25": -0.25, "2e3": 2000.0, "1.0E-2": 0.01,
    "123456789012345": 123456789012345, "true": True, "False": False, "null": None, "~": None, "NULL": None,
    "[]": [], "{}": {}, "[ ]": [], "[a, 'b c', \"d\"]": ["a", "b c", "d"], "[1, -2.5,true , null, x y]": [1, -2.5, True, None, "x y"],
}  # fmt: skip
PIECES = ["one", "two three", "a,b", "[c]", "d#e", "f:g", "-h", "é", "😀 x"]
ESCAPES = {
    "\\n": "\n", "\\t": "\t", "\\\\": "\\", '\\"': '"', "\\/": "/", "\\0": "\0", "\\x41": "A", "\\u263A": "☺",
    "\\U0001F600": "😀", "\\_": "\xa0", "\\N": "\x85", "\\L": "\u2028", "\\P": "\u2029", "\\e": "\x1b", "\\ ": " ",
}  # fmt: skip


class Maker:
    """Writes random values in random forms: the lines, and what they mean by the grammar."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def some(self, chance: float) -> bool:
        return self.rng.random() < chance

    # ---- scalars ----

    def plain(self) -> Scalar:
        text = self.rng.choice(list(PLAIN_VALUES))
        return [text], PLAIN_VALUES[text]

    def folded(self, pieces: list[tuple[str, str]], joins: bool = False) -> Scalar:
        """(written, meant) pieces on lines of their own, folded with random blank lines."""
        lines, value = [pieces[0][0]], pieces[0][1]
        for written, meant in pieces[1:]:
            if joins and self.some(0.3):
                lines[-1] += "\\"
                value += meant
            else:
                blank = self.rng.choice((0, 0, 1, 2))
                lines += [""] * blank
                value += "\n" * blank or " "
                value += meant
            lines.append(written)
        return lines, value

    def plain_folded(self) -> Scalar:
        texts = [self.rng.choice(PLAIN), *self.rng.choices(PIECES, k=self.rng.randint(1, 3))]
        return self.folded([(text, text) for text in texts])

    def single(self) -> Scalar:
        texts = self.rng.choices([*PIECES, "it's", "''", '"', "# x", "a: b", "- c", "\\n"], k=self.rng.randint(1, 3))
        lines, value = self.folded([(text.replace("'", "''"), text) for text in texts])
        return ["'" + lines[0], *lines[1:-1], lines[-1] + "'"] if lines[1:] else [f"'{lines[0]}'"], value

    def double(self) -> Scalar:
        def piece() -> tuple[str, str]:
            escape = self.rng.choice(list(ESCAPES))
            text = self.rng.choice([*PIECES, "it's", "# x", "a: b", "- c"])
            return text + escape + ".", text + ESCAPES[escape] + "."

        lines, value = self.folded([piece() for _ in range(self.rng.randint(1, 3))], joins=True)
        return ['"' + lines[0], *lines[1:-1], lines[-1] + '"'] if lines[1:] else [f'"{lines[0]}"'], value

    def literal_or_folded(self, owner: int, column: int) -> Scalar:
        """A block scalar below an entry at column `owner`, its text at `column`."""
        style, chomp = self.rng.choice("|>"), self.rng.choice(("", "-", "+"))
        digit = self.some(0.3) and column - owner <= 9
        first = self.rng.choice(["x", "# no comment", "- no list", "k: v"]) if not digit else self.rng.choice(["x", "  wide"])
        body = [first, *self.rng.choices(["y z", "", "  deeper", "# c", "'q", "&a *b !c"], k=self.rng.randint(0, 4))]
        while body[-1] == "":
            body.pop()
        leading, trailing = self.rng.choice((0, 0, 1)), self.rng.choice((0, 0, 2))
        text, blank = "\n" * leading, 0
        for number, line in enumerate(body):
            if number and style == "|":
                text += "\n"
            elif number and line:
                wide = line[0] == " " or next(b for b in reversed(body[:number]) if b)[0] == " "
                text += "\n" * (blank + 1) if wide else "\n" * blank or " "
            blank = 0 if line else blank + 1
            text += line
        text += {"": "\n", "-": "", "+": "\n" * (1 + trailing)}[chomp]
        header = style + self.rng.choice(((chomp + str(column - owner)), str(column - owner) + chomp)) if digit else style + chomp
        pad = " " * column
        return [header, *[""] * leading, *[pad + line if line else "" for line in body], *[""] * trailing], text

    # ---- entries ----

    def noise(self, column: int) -> list[str]:
        """Comments, with blank lines around, which belong to nothing."""
        if self.some(0.8):
            return []
        return [" " * self.rng.randint(0, column) + "# c: - x", *[""] * self.rng.choice((0, 1))]

    def entry(self, head: str, owner: int, depth: int, dash_from: int) -> tuple[list[str], object]:
        """What stands behind `head`, a key with its colon or a dash, at column `owner`."""
        comment = self.rng.choice(["", "", "", " # c", "   #"])
        kind = self.rng.randrange(10 if depth < 4 else 8)
        gap = self.rng.choice((" ", " ", " ", "   "))
        if kind == 7:
            return [head + comment], None
        if kind > 7:
            column = owner + self.rng.randint(1, 4)
            lines, value = self.block(column, depth + 1, self.rng.choice((dash_from, column)))
            return [head + comment, *self.noise(owner), *lines], value
        column = owner + self.rng.randint(1, 4)
        if kind == 6:
            lines, value = self.literal_or_folded(owner, column)
            return [head + gap + lines[0] + comment, *lines[1:]], value
        lines, value = (self.plain, self.plain, self.plain, self.plain_folded, self.single, self.double)[kind]()
        lines = [head + gap + lines[0], *(" " * column + line if line else "" for line in lines[1:])]
        lines[-1] += comment
        return lines, value

    def key(self, name: str) -> str:
        return self.rng.choice([name, name, name, f"'{name}'", f'"{name}"', f"{name} "]) + ":"

    def mapping(self, column: int, depth: int) -> tuple[list[str], object]:
        names = self.rng.sample(["a", "b c", "d-e", "f_1", "yes", "1a", "é", "x.y", "k/l"], self.rng.randint(1, 4))
        lines, value = [], {}
        for name in names:
            more, value[name] = self.entry(" " * column + self.key(name), column, depth, column)
            lines += [*(self.noise(column) if lines else []), *more]
        return lines, value

    def sequence(self, column: int, depth: int) -> tuple[list[str], object]:
        lines, value = [], []
        for _ in range(self.rng.randint(1, 3)):
            if depth < 4 and self.some(0.4):
                inner = column + self.rng.choice((2, 2, 2, 3, 4))
                more, element = self.block(inner, depth + 1, inner)
                more[0] = " " * column + "-" + " " * (inner - column - 1) + more[0][inner:]
            else:
                more, element = self.entry(" " * column + "-", column, depth, column + 1)
            lines += [*(self.noise(column) if lines else []), *more]
            value.append(element)
        return lines, value

    def block(self, column: int, depth: int, dashes: int) -> tuple[list[str], object]:
        return self.mapping(column, depth) if self.some(0.6) else self.sequence(dashes, depth)

    def document(self) -> tuple[list[str], object]:
        start = [*self.rng.choice(([], [], ["# top", ""], ["---"], ["# c", "--- # c"]))]
        lines, value = self.block(0, 1, 0)
        return [*start, *lines, *self.noise(0)], value


def as_bytes(rng: random.Random, lines: list[str]) -> bytes:
    text = "\n".join([*lines, ""])
    data = text.replace("\n", "\r\n").encode() if rng.random() < 0.2 else text.encode()
    return b"\xef\xbb\xbf" + data if rng.random() < 0.1 else data


@pytest.mark.parametrize("seeds", [range(400), pytest.param(range(400, 10_400), marks=pytest.mark.slow)])
def test_documents_of_the_grammar_mean_what_it_says(seeds: range) -> None:
    for seed in seeds:
        made = Maker(seed)
        lines, value = made.document()
        data = as_bytes(made.rng, lines)
        try:
            found = parse_yaml(data)
        except YamlError as error:
            pytest.fail(f"seed {seed}: {error}\n{data.decode()}")
        assert same(found, value), f"seed {seed}\n{data.decode()}"
        backlog = b"items:\n" + data.removeprefix(b"\xef\xbb\xbf")
        if isinstance(value, list) and b"\r" not in data and b"\n---" not in backlog:
            document = Document.parse(backlog, "x")
            assert same([*document.items], value), f"seed {seed}\n{backlog.decode()}"
            assert document.to_bytes() == backlog


# ---- chunks --------------------------------------------------------------------------------------

def backlog_text(made: Maker) -> str:
    """A backlog of random items with comments, gaps and line ends of all kinds around them."""
    rng, column = made.rng, made.rng.choice((0, 0, 2, 4))
    pad, lines = " " * column, []
    for number in range(rng.choice((0, 1, 2, 3, 4))):
        lines += rng.choice(([], [], [" " * rng.randint(0, column) + "# lead"]))
        if made.some(0.8):
            fields, _ = made.mapping(column + 2, 2)
            lines += [f"{pad}- id: {rng.randrange(10**9)}-{number}", *fields]
        else:
            lines += made.entry(f"{pad}-", column, 2, column + 1)[0]
        lines += rng.choice(([], [], [""], ["", ""], ["", "# free", ""], [f"{pad}   # own"], ["", f"{pad}   # deep"]))
    head = rng.choice((["schema_version: 3"], ["# top", "", "schema_version: 3"], []))
    tail = rng.choice((["next_item_id: 3"], ["", "next_item_id: 3"], ["# t", "next_item_id: 3"], ["", f"{pad}   # end"], []))
    items = rng.choice((["items:"], ["items:  # i"], ["items:", "# c", ""])) if lines else ["items: []  # none"]
    return "\n".join([*head, *items, *lines, *tail]) + rng.choice(("\n", "\n\n", "" if "next_item_id: 3" in tail else "\n"))


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 4_150), marks=pytest.mark.slow)])
def test_chunks_in_another_order_or_document_mean_the_same(seeds: range) -> None:
    """Chunks of two documents in any order read as before; what is left is as it was."""
    for seed in seeds:
        made = Maker(seed)
        one, other = (Document.parse(backlog_text(made).encode(), "x") for _ in range(2))
        pool = [*one.chunks, *(other.chunks if made.some(0.5) else ())]
        made.rng.shuffle(pool)
        pool = pool[: made.rng.randint(0, len(pool))]
        if made.some(0.3):
            pool.append(one.render_chunk({"id": f"new-{seed}", "tags": ["x", {"a": "b\nc"}], "none": None}))
        done = one.with_chunks(pool)
        again = Document.parse(done.to_bytes(), "x")
        told = f"seed {seed}\n{one.to_bytes().decode()}\n{pool}\n{done.to_bytes().decode()}"
        for document in (done, again):
            assert same([*document.items], [read_chunk(chunk) for chunk in pool]), told
            assert document.top == one.top, told
        assert done.to_bytes().count(b"# free") >= one.to_bytes().count(b"# free"), told
        lines = done.to_bytes().decode().split("\n")
        for index, item in enumerate(done.items):
            assert lines[done.line_of(index) - 1].lstrip(" ")[:1] == "-", told
            for key in item if isinstance(item, dict) else ():
                assert lines[done.line_of(index, key) - 1].lstrip(" -'\"").startswith(key), told


# ---- faults --------------------------------------------------------------------------------------

# One wrong entry of a mapping, with ¦ where it is refused, and what its refusal names.
FAULTS: dict[str, str] = {
    "z: ¦&a b": "anchor", "z: ¦*a": "alias", "z: ¦!t b": "tag", "z: ¦!!str 1": "tag", "z: ¦@b": "reserved indicator @", "z: ¦`b": "reserved indicator `",
    "z: ¦%b": "%", "z: ¦,b": ",", "z: ¦]": "]", "z: ¦}": "}", "z: a¦: b": '": " inside a plain scalar', "z: b¦:": '": " inside a plain scalar',
    'z: "b" ¦c': "closing quote", "z: 'b' ¦'c'": "closing quote", "z: 'b'¦#c": "closing quote", "z: 'b'¦: c": "closing quote",
    "z: [¦a": "flow sequence", "z: [a,¦ [b]]": "flow sequence", "z: [a,¦]": "flow sequence", "z: [¦a: b]": "flow sequence", "z: [¦?b]": "flow sequence",
    "z: [¦'b':c]": "flow sequence", "z: [b,¦ - c]": "flow sequence", "z: [¦-]": "flow sequence", "z: ¦{a: b}": "flow mapping", "z: [a]¦b": "closing bracket",
    "z: [] ¦b": "closing bracket", "z: [b]¦]": "closing bracket", "¦[z]: b": "flow sequence in this place", "¦{z}: b": "flow mapping in this place",
    "z: ¦|x": "malformed block scalar header", "z: ¦>12": "malformed block scalar header", "z: ¦|0": "malformed block scalar header",
    "z: ¦># c": "malformed block scalar header", "z: > ¦b": "text after a block scalar header", "z: ¦|": "block scalar without content",
    "z: ¦0x1F": "number", "z: ¦010": "number", "z: ¦+1": "number", "z: ¦.5": "number", "z: ¦1.": "number", "z: ¦.inf": "number",
    "z: ¦1234567890123456": "number", "z: ¦1e400": "number", "z: ¦- b": "sequence entry on the line of its key", "z: ¦?b": "starts with `?`", "z: ¦:b": "starts with `:`",
    "¦\tz: b": "tab character in indentation", "z:¦\tb": "tab character behind a colon", "z: ¦\tb": "tab character between tokens", "z: b¦\tc": "tab character in a plain scalar",
    "z: b¦\t# c": "tab character in a plain scalar", "z¦\ty: c": "tab character in a plain key", "z¦:y: c": "`:` in a plain key", "z¦#y: b": "`#` in a plain key",
    'z: "¦\\q"': "unknown escape \\q", 'z: "b¦\\x4"': "unknown escape \\x", 'z: "¦\\ud800"': "not a character", 'z: "¦\\U00110000"': "\\U00110000",
    "¦? z": "explicit key", "¦<<: z": "merge key", "¦1: z": "not a string", "¦true: z": "not a string", "¦~: z": "not a string", "¦: z": "empty key",
    "¦&a z: b": "anchor", "¦!t z: b": "tag", "¦-z: 1": "starts with `-`", "¦z": 'expected "key: value"', "¦'z'": 'expected "key: value"', "¦'z' b": 'expected "key: value"',
    "¦- z": "sequence entry among mapping keys", "¦---": "document start", "¦...": "document end", "¦--- # c": "document start",
    "¦first: again": "duplicate key 'first', first on line 1", "¦'first': x": "duplicate key 'first', first on line 1",
}  # fmt: skip


@pytest.mark.parametrize(("fault", "name"), FAULTS.items(), ids=list(FAULTS))
def test_a_fault_anywhere_in_a_document_is_refused_by_name_and_place(fault: str, name: str) -> None:
    column, line = fault.index("¦") + 1, fault.replace("¦", "")
    for seed in range(12):
        made = Maker(seed)
        above, _ = made.block(2, 2, 2)
        below, _ = made.block(2, 2, 2)
        lines = ["first: 1", "second:", *above, line, "third:", *below, ""]
        with pytest.raises(YamlError) as refused:
            parse_yaml("\n".join(lines).encode(), "f")
        found = (refused.value.line, refused.value.column)
        assert found == (lines.index(line) + 1, column), "\n".join([str(refused.value), *lines])
        assert name in refused.value.problem
