"""Random edits by hand and random decisions on one file, against a slow model of what may change."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from backlog import (
    ITEM_KEYS,
    Backlog,
    BacklogError,
    Draft,
    Outside,
    State,
    Store,
    archive,
    block,
    parse_yaml,
    transition,
    unblock,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TIMES = "created: 2026-02-10T00:00:00+00:00\n  updated: 2026-02-10T00:00:00+00:00"

TEXT = f"""\
# The backlog of us
schema_version: 3
team: blue
own:
  deep:
  - 1

items:
# the important one
- id: WRK-001
  title: "First"
  status: new
  ticket: 42
  description:
    context: some text
      that goes on
    # about the problem
    problem: |
      # not a comment
      - not a list

    owner: 'nobody'
  {TIMES}

# belongs to the file

- {TIMES}
  id: WRK-002
  status: ready
  title: Second
  tags: [a, b]
  size: small
-
  id: 'WRK-003'
  title: Third
  status: in_progress
  phase: build
  tags:
  - y  # mine

  - x
  dependencies:
  # the first of all
  - WRK-001
  - WRK-002
  notes:
  - by: me
    text: >-
      folded

      text
  {TIMES}
- id: WRK-004
  title: 'it''s the fourth'
  status: blocked
  blocked_from_status: ready
  blocked_reason: |-
    two
    lines
  'tags':
    - x
    - y
  {TIMES}
# numbers
next_item_id: 4
"""


# ---- The model of the text -----------------------------------------------------------------------


class Line(NamedTuple):
    """A line, and whose it is."""

    text: str  # an item's dash is a space here: it is no key's, and moves when the first key goes
    item: str  # the id of the item; "" outside of all
    key: str  # the key whose entry it is part of; "" for what stands between entries


def indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def is_content(text: str) -> bool:
    return text.strip(" ")[:1] not in ("", "#")


def labelled(text: str) -> list[Line]:
    """Say for each line of a backlog whose it is, looking at nothing but columns."""
    parsed = parse_yaml(text.encode())
    assert isinstance(parsed, dict)
    ids = [str(item["id"]) for item in parsed["items"]]
    texts = text.split("\n")
    dash = next(indent(line) for line in texts[texts.index("items:") + 1 :] if is_content(line))
    found: list[Line] = []
    item, key, column, scalar, between = "", "", 0, -1, 0
    for line in texts:
        if scalar >= 0 and (not line.strip(" ") or indent(line) > scalar):
            found.append(Line(line, item, key))
            continue
        for blank in range(len(found) - 1 if scalar >= 0 else -1, -1, -1):
            if found[blank].text.strip(" "):
                break
            found[blank] = Line(found[blank].text, "", "")
        scalar = -1
        if not is_content(line):
            deep = item and line.strip(" ") and indent(line) > dash
            found.append(Line(line, item if deep else "", ""))
            continue
        for between in range(len(found), 0, -1):
            if found[between - 1].key:
                break
        starts_item = ids and indent(line) == dash and line.lstrip(" ")[:2] in ("-", "- ")
        if starts_item and (item or key == "items"):
            item, key = ids.pop(0), "-"
            line = line.replace("-", " ", 1)
            column = indent(line) if line.strip(" ") else dash + 2
            for above in range(len(found) - 1, between - 1, -1):
                if not found[above].text.strip(" ") or indent(found[above].text) > dash:
                    break
                found[above] = found[above]._replace(item=item)
            if not line.strip(" "):
                found.append(Line(line, item, "-"))
                continue
        elif indent(line) == 0:
            item, column = "", 0
        if indent(line) == column and line.lstrip(" ")[:2] != "- ":
            match = re.match(r""" *(['"]?)([\w-]+)\1 *:""", line)
            assert match, line
            key = match[2]
        else:  # the entry goes on, whatever stood in between
            found[between:] = [Line(each.text, item, key) for each in found[between:]]
        found.append(Line(line, item, key))
        if re.search(r"(:|-) +[|>][-+]?( +#.*)?$", line):
            scalar = indent(line)
    return found


def is_untouched(before: str, after: str, named: set[tuple[str, str]], items: set[str]) -> bool:
    """Whether all lines stayed when `named` keys changed and `items` came or went.

    Comments inside of a value may have gone with it, or have been kept; of blank lines beside an
    item that came or went one may have done so, too.
    """
    old, new = labelled(before), labelled(after)
    spare = [line.text for line in old if line[1:] in named and not is_content(line.text)]
    olds, news = (
        [line.text for line in lines if line[1:] not in named and line.item not in items]
        for lines in (old, new)
    )
    if items:
        olds, news = ([text for text in texts if text.strip(" ")] for texts in (olds, news))
    for text in news:
        if olds and text == olds[0]:
            del olds[0]
        elif text in spare:
            spare.remove(text)
        else:
            return False
    return not olds


def comment_behind(text: str, item: str, key: str) -> str:
    """The comment on the first line of an entry, as `by_hand` writes it."""
    first = next((line.text for line in labelled(text) if line[1:] == (item, key)), "")
    match = re.search(r" +# h[0-9]+$", first)
    return match[0] if match else ""


def inside(text: str, item: str, key: str) -> set[str]:
    """The lines of an entry, without indentation."""
    return {line.text.strip(" ") for line in labelled(text) if line[1:] == (item, key)}


# ---- What a human does ---------------------------------------------------------------------------


class Human:
    """Edits a text at random, in ways that leave it a backlog."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.number = 0
        self.reordered = False  # once: nobody can tell an order that was there before from an old copy

    def edit(self, text: str) -> str:
        edits = (
            self.comment, self.tail, self.blank, self.swap, self.requote, self.own, self.shift, self.retitle, self.tag, self.decide,
            self.reorder, self.describe, self.describe,
        )  # fmt: skip
        return self.rng.choice(edits)(text)

    def sign(self) -> str:
        self.number += 1
        return f"# h{self.number}"

    def heads(self, text: str) -> list[int]:
        """The lines at which an entry of an item starts, but for those behind a dash."""
        lines = labelled(text)
        return [
            number
            for number, line in enumerate(lines)
            if line.item and line.key not in ("", "-") and line[1:] != lines[number - 1][1:]
            and text.split("\n")[number] == line.text
        ]  # fmt: skip

    def insert(self, text: str, at: int, line: str) -> str:
        lines = text.split("\n")
        return "\n".join([*lines[:at], line, *lines[at:]])

    def comment(self, text: str) -> str:
        at = self.rng.choice(self.heads(text))
        return self.insert(text, at, " " * indent(text.split("\n")[at]) + self.sign())

    def blank(self, text: str) -> str:
        return self.insert(text, self.rng.choice(self.heads(text)), self.rng.choice(["", "  "]))

    def own(self, text: str) -> str:
        at = self.rng.choice(self.heads(text))
        value = self.rng.choice(["x", "[a, 'b']", "'q'  # mine", "\n{}  a: 1\n{}  b:\n{}  - 2", "|-\n{}  # text\n{}  more"])
        pad = " " * indent(text.split("\n")[at])
        self.number += 1
        return self.insert(text, at, f"{pad}own{self.number}: {value.replace('{}', pad)}".replace(": \n", ":\n"))

    def one_line(self, text: str) -> list[int]:
        """Entries on one line, or with nothing but a key or a block header on their first."""
        lines = labelled(text)
        return [
            at
            for at in self.heads(text)
            if (lines[at + 1][1:] != lines[at][1:] or re.search(r"(:|[|>]-?)$", lines[at].text))
            and " #" not in lines[at].text
        ]

    def tail(self, text: str) -> str:
        lines = text.split("\n")
        places = self.one_line(text)
        for place in self.rng.sample(places, len(places) // 2):
            lines[place] += "   " + self.sign()
        return "\n".join(lines)

    def swap(self, text: str) -> str:
        """Exchange two neighbouring entries."""
        lines, heads, texts = labelled(text), self.heads(text), text.split("\n")
        for one, other in pairwise(heads):
            end = next(n for n in range(other, len(lines)) if lines[n][1:] != lines[other][1:])
            if lines[one].item == lines[other].item and lines[other - 1][1:] == lines[one][1:] and self.rng.random() < 0.2:
                return "\n".join([*texts[:one], *texts[other:end], *texts[one:other], *texts[end:]])
        return text

    def reorder(self, text: str) -> str:
        """Put the items into another order, each with what stands below it."""
        if self.reordered:
            return text
        self.reordered = True
        lines, texts = labelled(text), text.split("\n")
        starts = [n for n, line in enumerate(lines) if line.key and line.item and line.item != lines[n - 1].item]
        starts = [n for n in starts if texts[n].lstrip(" ").startswith("-")]
        ends = [*starts[1:], max(n for n, line in enumerate(texts) if line.startswith("# numbers"))]
        chunks = [texts[start:end] for start, end in zip(starts, ends, strict=True)]
        self.rng.shuffle(chunks)
        return "\n".join([*texts[: starts[0]], *(line for chunk in chunks for line in chunk), *texts[ends[-1] :]])

    def describe(self, text: str) -> str:
        """Write on, or add a line or a key, inside of a description that has lines of its own."""
        lines, texts = labelled(text), text.split("\n")
        inner = [n for n, line in enumerate(lines) if line.key == "description" == lines[n - 1].key and line.text.strip(" ")]
        if not inner:
            return text
        self.number += 1
        at = self.rng.choice(inner)
        key = re.fullmatch(r"( *)\w+:(?: .*)?", texts[at])
        if texts[at].endswith("|") or texts[at].endswith("|-"):
            return self.insert(text, at + 1, f"{key[1] if key else ''}  h{self.number}: # text")
        if key:
            return self.insert(text, at, f"{key[1]}h{self.number}: 'mine'  # h{self.number}")
        if not texts[at].strip(" ").startswith("#"):
            texts[at] += f" h{self.number}"
        return "\n".join(texts)

    def requote(self, text: str) -> str:
        quote = self.rng.choice("'\"")
        return re.sub(r"(?m)^((?:  +|- )(?:status|phase|size): )(\w+)", rf"\1{quote}\2{quote}", text, count=self.rng.randint(1, 3))

    def shift(self, text: str) -> str:
        """Indent all items by two more columns."""
        lines = text.split("\n")
        start = lines.index("items:") + 1
        end = max(number for number, line in enumerate(lines) if line.startswith("# numbers"))
        inner = ["  " + line if line.strip(" ") else line for line in lines[start:end]]
        return text if indent(lines[start]) else "\n".join([*lines[:start], *inner, *lines[end:]])

    def retitle(self, text: str) -> str:
        self.number += 1
        places = list(re.finditer(r"(?m)^[- ]+title: (.*)$", text))
        place = self.rng.choice(places)
        value = self.rng.choice(["Plain {}", "'quoted {}'", '"double {}"   # why', "{}th: 'it''s'"[:2] + " word"])
        return text[: place.start(1)] + value.replace("{}", str(self.number)) + text[place.end(1) :]

    def tag(self, text: str) -> str:
        return re.sub(r"(?m)^( *- [xy])$", r"\1  # mine", text)

    def decide(self, text: str) -> str:
        """Change what is the orchestrator's, too."""
        status, phase = self.rng.choice(("ready", "scoping")), self.rng.choice(("design", "spec"))
        text = re.sub(r"(?m)^((?:  +|- )status: )in_progress", rf"\1{status}", text)
        return re.sub(r"(?m)^((?:  +|- )phase: )[a-z]+", rf"\1{phase}", text)


# ---- What the orchestrator decides ---------------------------------------------------------------

Edit = Callable[[Draft], object]
VALUES: dict[str, list[object]] = {
    "title": ["New title", "a: b", "# c", "61e9540", "it's", "x" * 200],
    "status": ["ready", "scoping"],
    "phase": ["prd", "review", None],
    "size": ["small", "large", None],
    "blocked_reason": ["one line", "several\nlines\n\n# and more", "", None, " \n x", "yes"],
    "unblock_context": ["go on: please", None],
    "tags": [["a"], ["x", "y", "z"], ["y", "x"], ["- q", "x"], [], None],
    "dependencies": [["WRK-001"], ["WRK-002", "WRK-001"], None],
    "description": [{"context": "c"}, {"context": "some text that goes on", "problem": "a\nb"}, None],
    "attempts": [1, 2, None],
    "guardrail_override": [True, None],
}


def decision(rng: random.Random, ids: list[str], now: datetime) -> Edit:
    one = rng.choice(ids)
    keys = rng.sample([*VALUES, "tags", "tags", "tags", "status", "status"], rng.randint(1, 4))
    changes = {key: rng.choice(VALUES[key]) for key in keys}
    rare: list[Edit] = [
        lambda d: archive(d, one, now),
        lambda d: d.add("WRK", "Added", now, tags=["new"], description={"context": "a\nb"}),
    ]
    usual: list[Edit] = [
        lambda d: transition(d, one, "scoping", now),
        lambda d: block(d, one, "it went wrong:\n- badly", now, "decision"),
        lambda d: unblock(d, one, now, "try again # soon"),
        lambda d: d.update(one, now, size="medium", risk="low"),
    ]
    update: Edit = lambda d: d.update(one, now, **changes)  # noqa: E731
    return rng.choice(rare if rng.random() < 0.12 and len(ids) > 2 else [update, update, *usual])


# ---- Both together -------------------------------------------------------------------------------


class Desk:
    """One file that a run's store and a human work on in turn."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.human = Human(self.rng)
        self.path = folder / str(seed) / "BACKLOG.yaml"
        (folder / str(seed) / "state").mkdir(parents=True)
        self.crlf, self.final = self.rng.random() < 0.3, self.rng.random() < 0.7
        self.mode = self.rng.choice((0o644, 0o600, 0o664))
        self.now = NOW
        self.write(TEXT)
        self.path.chmod(self.mode)
        self.store = self.another_store()
        self.store.look()
        self.store.begin({"id": "1", "branch": "main", "head": None}, self.path.read_bytes())

    def another_store(self) -> Store:
        outside = Outside(lambda run: True, lambda run: (), lambda: (None, b""))
        here = self.path.parent
        return Store(self.path, here / "state", here, outside, prefix="WRK", warn=lambda _: None, clock=lambda: self.now)

    def write(self, text: str) -> None:
        text = text if self.final else text.removesuffix("\n")
        self.path.write_bytes((text.replace("\n", "\r\n") if self.crlf else text).encode())

    def text(self) -> str:
        """The file, with the line ends of the model; they and the mode have to be as they were."""
        data = self.path.read_bytes()
        assert data.count(b"\r\n") == (data.count(b"\n") if self.crlf else 0)
        assert data.endswith(b"\n") == self.final
        assert self.path.stat().st_mode & 0o777 == self.mode
        return data.decode().replace("\r\n", "\n") + ("" if self.final else "\n")

    def work_by_hand(self, text: str) -> str:
        for _ in range(self.rng.randint(0, 3)):
            text = self.human.edit(text)
        self.write(text)
        return text

    def decide(self) -> list[Edit]:
        self.now += timedelta(seconds=1)
        ids = list(self.store.backlog.items)
        return [decision(self.rng, ids, self.now) for _ in range(self.rng.choice((1, 1, 2)))]

    def change(self, edits: list[Edit]) -> None:
        for edit in edits:
            with suppress(BacklogError):
                self.store.change(edit)

    def step(self) -> None:
        """The human works, then the orchestrator decides."""
        theirs, edits = self.work_by_hand(self.text()), self.decide()
        merged = self.another_store().look()
        self.change([*edits, lambda draft: None])
        self.check(theirs, carried_out(merged, edits))

    def step_while_broken(self) -> None:
        """The orchestrator decides while the file is broken; it is mended with further changes."""
        before, edits = self.text(), self.decide()
        self.path.write_bytes(b"items: [\r\n")
        self.path.chmod(self.mode)
        self.change(edits)
        assert self.path.read_bytes() == b"items: [\r\n"
        theirs = self.work_by_hand(before)
        merged = self.another_store().look()
        self.change([lambda draft: None])
        self.check(theirs, [merged])

    def check(self, before: str, states: list[Backlog]) -> None:
        """The file went from `before` through `states`, and only what differs between two changed."""
        after, found, old = self.text(), self.store.backlog, State.read(before.encode(), "before").backlog
        states = [old, *states]
        assert found == states[-1] == State.read(self.path.read_bytes(), "after").backlog
        named = {name for one, other in pairwise(states) for name in names(one, other)}
        assert {key for _, key in named} <= {*ITEM_KEYS, "next_item_id"}
        come_or_gone = old.items.keys() ^ found.items.keys()
        assert is_untouched(before, after, named, come_or_gone), f"{named} {come_or_gone}\n{before}"
        for item_id, key in named - {("", "next_item_id")}:
            if item_id in found.items and len(states) == 3 and found.items[item_id].get(key) is not None:
                comment = comment_behind(before, item_id, key)
                assert comment in ("", comment_behind(after, item_id, key))
                kept = {f"- {tag}  # mine" for tag in found.items[item_id].get("tags", ())}
                assert inside(before, item_id, key) & kept <= inside(after, item_id, key)


def carried_out(backlog: Backlog, edits: list[Edit]) -> list[Backlog]:
    """The backlog as it was, and after each of the edits."""
    states = [backlog]
    for edit in edits:
        draft = Draft(states[-1])
        try:
            edit(draft)
        except BacklogError:
            continue
        states.append(draft.backlog())
    return states


def names(old: Backlog, new: Backlog) -> set[tuple[str, str]]:
    """The keys that differ, with their item; those of items that came or went do not count."""
    named = {("", "next_item_id")} if old.next_item_id != new.next_item_id else set()
    for item_id in old.items.keys() & new.items.keys():
        one, other = dict(old.items[item_id]), dict(new.items[item_id])
        named |= {(item_id, key) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return named


def work(folder: Path, seeds: range) -> None:
    for seed in seeds:
        desk = Desk(folder, seed)
        for number in range(6):
            try:
                (desk.step_while_broken if desk.rng.random() < 0.3 else desk.step)()
            except Exception as error:
                raise AssertionError(f"seed {seed}, step {number}\n{desk.path.read_text()}") from error


def test_only_the_lines_of_decided_keys_change_whatever_a_human_did(tmp_path: Path) -> None:
    work(tmp_path, range(8))


@pytest.mark.slow
def test_only_the_lines_of_decided_keys_change_two_hundred_files(tmp_path: Path) -> None:
    work(tmp_path, range(8, 216))
