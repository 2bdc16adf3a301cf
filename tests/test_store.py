"""The backlog file: merging, waiting, atomic saves, locks, crashes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backlog import (
    OWNED_KEYS,
    Backlog,
    BacklogError,
    Draft,
    Item,
    KeyChange,
    SaveError,
    Store,
    YamlError,
    archive,
    block,
    transition,
)

NOW = datetime(2026, 2, 13, 12, tzinfo=UTC)
NOW_TEXT = "2026-02-13T12:00:00+00:00"
TIMES = "created: 2026-02-10T00:00:00+00:00\n  updated: 2026-02-10T00:00:00+00:00\n"
ROOT = Path(__file__).parent.parent

TEXT = f"""\
# The backlog of us
schema_version: 3
team: blue   # not ours

items:
# the important one
- id: WRK-001
  title: "First"   # quoted
  status: new
  ticket: 42
  {TIMES}
- {TIMES}  id: WRK-002
  status: ready
  title: Second
  tags: [a, b]
- id: WRK-003
  title: Third
  status: in_progress
  phase: build
  dependencies:
  - WRK-002
  {TIMES}
# numbers
next_item_id: 3
"""


class Bench:
    """A backlog file with its store, and what the store warned about."""

    def __init__(self, folder: Path, text: str = TEXT) -> None:
        self.path = folder / "BACKLOG.yaml"
        self.lock = folder / "state" / "backlog.lock"
        self.path.write_text(text)
        self.warnings: list[str] = []
        self.store = self.fresh()

    def fresh(self, **options: float) -> Store:
        """Another store on the same file, as another command has one."""
        store = Store(self.path, self.lock, warn=self.warnings.append, **options)
        store.load()
        return store

    @property
    def text(self) -> str:
        return self.path.read_text()

    def by_hand(self, old: str, new: str) -> None:
        """Edit the file as an editor does."""
        assert old in self.text
        self.path.write_text(self.text.replace(old, new, 1))

    def update(self, item_id: str, **changes: object) -> object:
        (result,) = self.store.transact([lambda d: d.update(item_id, NOW, **changes)])
        return result

    def item(self, item_id: str) -> Item:
        """The item as it is on disk."""
        return Store(self.path, self.lock, warn=print).load().items[item_id]

    def in_step(self) -> bool:
        """Whether memory is what the file holds, and nothing else lies around."""
        on_disk = Store(self.path, self.lock, warn=print).load()
        beside = sorted(os.listdir(self.path.parent))
        return on_disk == self.store.backlog and beside == ["BACKLOG.yaml", "state"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def add(title: str = "New") -> Callable[[Draft], Item]:
    return lambda draft: draft.add("WRK", title, NOW)


BROKEN = "items: [unclosed\n"

# ---- Saving --------------------------------------------------------------------------------------


def test_a_save_where_files_cannot_be_swapped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C library without the call: the file is renamed then."""
    other = {"linux": "darwin", "darwin": "linux"}[sys.platform]
    monkeypatch.setattr(sys, "platform", other)
    bench.store.transact([add()])
    assert sorted(path.name for path in bench.path.parent.iterdir()) == ["BACKLOG.yaml", "state"]
    assert bench.fresh().backlog.items["WRK-004"]["title"] == "New"


def test_d44_a_save_changes_only_the_lines_of_the_changed_keys(bench: Bench) -> None:
    bench.update("WRK-001", status="scoping", phase="research")
    assert bench.text == TEXT.replace(
        "status: new\n  ticket: 42\n  created: 2026-02-10T00:00:00+00:00\n  updated: 2026-02-10T00:00:00+00:00",
        "status: scoping\n  phase: research\n  ticket: 42\n  created: 2026-02-10T00:00:00+00:00\n  updated: '2026-02-13T12:00:00+00:00'",
    )
    assert bench.in_step()


def test_d44_nothing_is_written_when_nothing_changed(bench: Bench) -> None:
    before = bench.path.stat()
    called: list[object] = []
    results = bench.store.transact(
        [lambda d: d.update("WRK-001", NOW, status="new"), lambda d: d.item("WRK-002")["title"]],
        ahead=called.append,
    )
    assert results == [bench.store.backlog.items["WRK-001"], "Second"]
    assert bench.store.transact([]) == []
    assert (bench.path.stat(), called) == (before, [])


def test_additions_removals_and_the_counter_are_saved(bench: Bench) -> None:
    bench.store.transact([add("Fourth"), lambda d: archive(d, "WRK-002", NOW)])
    assert list(bench.store.backlog.items) == ["WRK-001", "WRK-003", "WRK-004"]
    assert bench.store.backlog.next_item_id == 4
    assert "dependencies" not in bench.item("WRK-003")
    assert bench.in_step()
    for kept in ("# The backlog of us\n", "team: blue   # not ours\n", '"First"   # quoted\n', "# numbers\n"):
        assert kept in bench.text


def test_several_items_leave_at_once(bench: Bench) -> None:
    bench.store.transact([lambda d: d.remove("WRK-003"), lambda d: d.remove("WRK-001")])
    assert list(bench.store.backlog.items) == ["WRK-002"]
    bench.store.transact([lambda d: [d.add("WRK", title, NOW) for title in "abc"]])
    gone = ["WRK-004", "WRK-002", "WRK-006"]
    bench.store.transact([lambda d: [d.remove(item_id) for item_id in gone]])
    assert list(bench.store.backlog.items) == ["WRK-005"]
    assert bench.in_step()


def test_group_commit_an_error_fails_only_its_own_edit(bench: Bench) -> None:
    def torn(draft: Draft) -> None:
        draft.update("WRK-001", NOW, size="large")
        draft.remove("WRK-003")
        raise BacklogError("no")

    seen: list[str] = []
    results = bench.store.transact(
        [
            add("A"),
            torn,
            lambda d: seen.extend(d.items),
            lambda d: transition(d, "WRK-001", "done", NOW),
            lambda d: d.add("WRK", "bad \udcff byte", NOW, origin="\udcff"),
            add("B"),
        ]
    )
    assert [r["id"] if isinstance(r, dict) else type(r).__name__ for r in results] == [
        "WRK-004",
        "BacklogError",
        "NoneType",
        "BacklogError",
        "BacklogError",
        "WRK-005",
    ]
    assert seen == ["WRK-001", "WRK-002", "WRK-003", "WRK-004"]
    assert bench.item("WRK-001").get("size") is None
    assert bench.store.backlog.next_item_id == 5
    assert bench.in_step()


def test_warnings_of_edits_are_passed_on_unless_they_fail(bench: Bench) -> None:
    def edit(draft: Draft) -> None:
        draft.warnings.append(f"seen {len(draft.items)}")
        draft.items.pop("WRK-002", None) or draft.item("none")

    bench.store.transact([edit, edit])
    assert bench.warnings == ["seen 3"]


def test_the_journal_is_told_ahead_of_the_save(bench: Bench) -> None:
    told: list[tuple[list[KeyChange], str]] = []
    bench.store.transact(
        [lambda d: d.update("WRK-001", NOW, size="small"), add("New"), lambda d: d.remove("WRK-002")],
        ahead=lambda changes: told.append((changes, bench.text)),
    )
    ((changes, text_then),) = told
    assert text_then == TEXT
    removed, *updates, added, counter = changes
    assert (removed.item_id, removed.key, removed.new) == ("WRK-002", "", None)
    assert sorted(updates) == [
        KeyChange("WRK-001", "size", None, "small"),
        KeyChange("WRK-001", "updated", "2026-02-10T00:00:00+00:00", NOW_TEXT),
    ]
    assert (added.item_id, added.key, added.old) == ("WRK-004", "", None)
    assert counter == KeyChange("", "next_item_id", 3, 4)
    assert bench.store.unsaved() == []


def test_without_the_journal_nothing_is_decided(bench: Bench) -> None:
    def fail(changes: list[KeyChange]) -> None:
        raise OSError(28, "No space left on device")

    before = bench.store.backlog
    with pytest.raises(OSError, match="No space"):
        bench.store.transact([add()], ahead=fail)
    assert (bench.store.backlog, bench.text) == (before, TEXT)
    assert bench.in_step()


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_the_mode_of_the_file_is_kept(bench: Bench, mode: int) -> None:
    bench.path.chmod(mode)
    bench.update("WRK-001", size="small")
    assert bench.path.stat().st_mode & 0o7777 == mode


def test_a_left_over_temporary_file_is_swept_and_never_followed(bench: Bench) -> None:
    victim = bench.path.parent / "state" / "victim"
    victim.write_text("precious")
    temporary = bench.path.with_name(".BACKLOG.yaml.tmp")
    temporary.symlink_to(victim)
    bench.update("WRK-001", size="small")
    assert victim.read_text() == "precious"
    temporary.write_text("half a backl")
    bench.fresh()
    assert bench.in_step()


# ---- Edits of others -----------------------------------------------------------------------------


def test_edits_by_hand_are_taken_up_and_kept(bench: Bench) -> None:
    bench.by_hand("title: Second\n", "title: 'Second, better'   # why\n  priority: 2\n")
    bench.by_hand("# the important one\n", "# really important\n\n")
    edited = bench.text
    bench.update("WRK-001", size="small")
    assert bench.text == edited.replace("status: new\n", "status: new\n  size: small\n").replace(
        "updated: 2026-02-10T00:00:00+00:00", "updated: '2026-02-13T12:00:00+00:00'", 1
    )
    assert bench.store.backlog.items["WRK-002"]["priority"] == 2
    assert (bench.warnings, bench.in_step()) == ([], True)


def test_edits_by_hand_are_taken_up_without_writing(bench: Bench) -> None:
    bench.by_hand("status: ready", "status: scoping")
    before = bench.path.stat()
    bench.store.transact([])
    assert bench.store.backlog.items["WRK-002"]["status"] == "scoping"
    after = bench.path.stat()  # the time of access is another: the file was read
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_items_added_and_deleted_by_hand(bench: Bench) -> None:
    tail = bench.text[bench.text.index("- id: WRK-003") : bench.text.index("# numbers")]
    bench.by_hand(tail, tail.replace("WRK-003", "WRK-009"))
    bench.store.transact([add("mine")])
    assert list(bench.store.backlog.items) == ["WRK-001", "WRK-002", "WRK-009", "WRK-010"]
    assert bench.in_step()


def test_the_counter_never_goes_back(bench: Bench) -> None:
    bench.by_hand("next_item_id: 3", "next_item_id: 1")
    bench.store.transact([])
    assert "next_item_id: 3\n" in bench.text
    assert bench.warnings == [
        "BACKLOG.yaml: next_item_id went back from 3 to 1; kept 3, because ids are never used twice"
    ]


def test_another_command_meanwhile(bench: Bench) -> None:
    other = bench.fresh()
    other.transact([add("theirs")])
    (mine,) = bench.store.transact([add("mine")])
    assert mine["id"] == "WRK-005"  # type: ignore[index]
    other.transact([])
    assert other.backlog == bench.store.backlog
    assert bench.in_step()


def race(bench: Bench, *edits: Callable[[], object]) -> Callable[[list[KeyChange]], None]:
    """An `ahead` that edits the file when the store has read it and is about to replace it."""
    todo: Iterator[Callable[[], object]] = iter(edits)

    def ahead(changes: list[KeyChange]) -> None:
        next(todo, lambda: None)()

    return ahead


def test_an_editor_that_saves_right_before_the_rename_is_merged(bench: Bench) -> None:
    calls: list[str] = []
    (added,) = bench.store.transact(
        [lambda d: (calls.append("edit"), d.add("WRK", "mine", NOW))[1]],
        ahead=race(
            bench,
            lambda: bench.by_hand("title: Second", "title: Zweites  # once"),
            lambda: bench.by_hand("title: Third", "title: Drittes  # twice"),
        ),
    )
    assert calls == ["edit"]
    assert added["id"] == "WRK-004"  # type: ignore[index]
    assert "title: Zweites  # once\n" in bench.text
    assert "title: Drittes  # twice\n" in bench.text
    assert bench.item("WRK-004")["title"] == "mine"
    assert bench.in_step()


def test_an_editor_that_leaves_a_broken_file_right_before_the_rename(bench: Bench) -> None:
    bench.store.transact([add()], ahead=race(bench, lambda: bench.path.write_text(BROKEN)))
    assert bench.text == BROKEN
    assert isinstance(bench.store.waiting, YamlError)
    assert "WRK-004" in bench.store.backlog.items


def test_a_file_deleted_right_before_the_rename_is_written_again(bench: Bench) -> None:
    bench.store.transact([add()], ahead=race(bench, bench.path.unlink))
    assert "WRK-004" in bench.store.backlog.items
    assert bench.in_step()


def test_a_program_that_never_stops_writing_is_named_and_wins(bench: Bench) -> None:
    count = 0

    def edit(changes: list[KeyChange]) -> None:
        nonlocal count
        count += 1
        bench.path.write_text(TEXT + f"# {count}\n")

    with pytest.raises(SaveError, match="another program changes the file all the time"):
        bench.store.transact([add()], ahead=edit)
    assert bench.text == TEXT + f"# {count}\n"
    assert bench.store.unsaved()
    bench.store.transact([])
    assert bench.text.endswith(f"# {count}\n")
    assert bench.in_step()


# ---- A file that cannot be used ------------------------------------------------------------------


def test_a_broken_file_is_left_alone_and_the_decisions_wait(bench: Bench) -> None:
    told: list[list[KeyChange]] = []
    bench.path.write_text(BROKEN)
    (added,) = bench.store.transact([add()], ahead=told.append)
    assert added == bench.store.backlog.items["WRK-004"]
    assert told == [bench.store.unsaved()]
    assert [c.item_id for c in told[0]] == ["WRK-004", ""]
    bench.update("WRK-001", size="small")
    assert bench.text == BROKEN
    (warning,) = bench.warnings
    copy = bench.store.copy_path
    assert warning == (
        f"{bench.store.waiting}\nThe file is left as it is; changes wait until it is mended."
        f" What it held before is in {copy}"
    )
    assert copy.read_text() == TEXT
    assert warning.startswith("BACKLOG.yaml:1:")

    bench.path.write_text("items: {also\n")
    bench.store.transact([])
    assert len(bench.warnings) == 2

    bench.path.write_text(TEXT.replace("Second", "Mended"))
    bench.store.transact([])
    assert bench.store.waiting is None
    assert bench.item("WRK-002")["title"] == "Mended"
    assert bench.item("WRK-001")["size"] == "small"
    assert bench.store.unsaved() == []
    assert bench.in_step()


def test_a_broken_file_put_back_as_it_was_is_saved_to(bench: Bench) -> None:
    bench.path.write_text(BROKEN)
    bench.store.transact([add()])
    bench.path.write_text(TEXT)
    bench.store.transact([])
    assert (bench.store.waiting, bench.in_step()) == (None, True)
    assert "WRK-004" in bench.store.backlog.items


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is cut off, its last"),
        ("# all gone\n", "the file holds no backlog"),
        ("items:\n", "BACKLOG.yaml: no items;"),
        (TEXT.replace("status: ready", "status: raedy"), "WRK-002: status is 'raedy'"),
        (TEXT.replace("WRK-002\n  status", "WRK-001\n  status"), "the id is used twice"),
        (TEXT.replace("schema_version: 3", "schema_version: 4"), "schema_version is the number 4, and only 3"),
        (TEXT[: TEXT.index("# numbers")], "the file is cut off, its last"),
        (TEXT[: TEXT.index("- id: WRK-003")], "the file is cut off, its last"),
    ],
)
def test_a_file_that_parses_but_is_no_backlog_waits_too(
    bench: Bench, text: str, problem: str
) -> None:
    bench.path.write_text(text)
    bench.update("WRK-001", size="small")
    assert bench.text == text
    assert problem in str(bench.store.waiting)
    assert problem in bench.warnings[0]
    bench.path.write_text(TEXT)
    bench.store.transact([])
    assert bench.item("WRK-001")["size"] == "small"


def test_a_failing_edit_fails_while_waiting_as_well(bench: Bench) -> None:
    bench.path.write_text(BROKEN)
    good, bad = bench.store.transact([add(), lambda d: d.add("WRK", "x", NOW, origin="\udcff")])
    assert good == bench.store.backlog.items["WRK-004"]
    assert isinstance(bad, BacklogError)
    bench.path.write_text(TEXT)
    bench.store.transact([])
    assert bench.in_step()


def test_a_deleted_file_is_written_again(bench: Bench) -> None:
    bench.update("WRK-001", size="small")
    before = bench.text
    bench.path.unlink()
    bench.store.transact([])
    assert bench.text == before
    assert bench.warnings == [f"{bench.path}: the file was gone; it is written again from memory"]
    assert bench.in_step()


# ---- Merging what had to wait --------------------------------------------------------------------


def waited(bench: Bench, edit: Callable[[Draft], object], old: str, new: str) -> list[str]:
    """Make an edit while the file is broken, then mend it with a change; the merge's warnings."""
    bench.path.write_text(BROKEN)
    bench.store.transact([edit])
    bench.warnings.clear()
    assert old in TEXT
    bench.path.write_text(TEXT.replace(old, new, 1))
    bench.store.transact([])
    assert bench.in_step()
    return bench.warnings


def test_only_ours_or_only_theirs_needs_no_warning(bench: Bench) -> None:
    warnings = waited(
        bench, lambda d: d.update("WRK-003", NOW, phase="review"), "title: Third", "title: Drittes"
    )
    found = bench.item("WRK-003")
    assert (found["phase"], found["title"], warnings) == ("review", "Drittes", [])


def test_the_same_change_on_both_sides_needs_no_warning(bench: Bench) -> None:
    edit = lambda d: d.update("WRK-003", NOW, phase="review")  # noqa: E731
    assert waited(bench, edit, "phase: build", "phase: review") == []


@pytest.mark.parametrize(
    ("key", "ours", "theirs", "kept"),
    [
        ("phase", "review", "design", "review"),
        ("phase", None, "design", None),
        ("status", "blocked", "ready", "blocked"),
        ("title", "Ours", "Theirs", "Theirs"),
        ("dependencies", ["WRK-001"], [], []),
    ],
)
def test_a_key_changed_on_both_sides(
    bench: Bench, key: str, ours: object, theirs: object, kept: object
) -> None:
    lines = {
        "phase": "phase: build\n",
        "status": "status: in_progress\n",
        "title": "title: Third\n",
        "dependencies": "dependencies:\n  - WRK-002\n",
    }
    edit = lambda d: d.update("WRK-003", NOW, **{key: ours})  # noqa: E731
    warnings = waited(bench, edit, lines[key], f"{key}: {theirs if theirs else '[]'}\n")
    assert warnings == [
        f"WRK-003: {key} was changed by hand to {theirs!r} and by the orchestrator to {ours!r};"
        f" kept {kept!r}"
    ]
    assert bench.item("WRK-003").get(key) == kept
    assert (key in OWNED_KEYS) is (kept == ours)


def test_a_change_of_an_item_that_was_removed_by_hand_is_dropped(bench: Bench) -> None:
    first = TEXT[TEXT.index("# the important one") : TEXT.index("- created")]
    edit = lambda d: block(d, "WRK-001", "why", NOW)  # noqa: E731
    assert waited(bench, edit, first, "") == [
        "WRK-001 was removed by hand; dropped status: 'new' → 'blocked',"
        " blocked_from_status: None → 'new', blocked_reason: None → 'why'"
    ]
    assert list(bench.store.backlog.items) == ["WRK-002", "WRK-003"]


def test_a_finished_item_that_was_edited_by_hand_is_gone_with_a_warning(bench: Bench) -> None:
    edit = lambda d: archive(d, "WRK-001", NOW)  # noqa: E731
    assert waited(bench, edit, "ticket: 42", "ticket: 43") == [
        "WRK-001: ticket was changed by hand from 42 to 43,"
        " but the item is finished and has left the backlog"
    ]
    assert list(bench.store.backlog.items) == ["WRK-002", "WRK-003"]


def test_an_id_taken_by_hand_meanwhile_gives_ours_a_new_one(bench: Bench) -> None:
    theirs = "- id: WRK-004\n  title: Theirs\n  status: new\n  " + TIMES.replace("10T", "12T")
    assert waited(bench, add("Ours"), "# numbers\n", theirs + "# numbers\n") == [
        "WRK-004 was added by hand as 'Theirs' and by the orchestrator as 'Ours';"
        " the latter is WRK-005 now"
    ]
    titles = {i: item["title"] for i, item in bench.store.backlog.items.items()}
    assert (titles["WRK-004"], titles["WRK-005"]) == ("Theirs", "Ours")
    assert bench.store.backlog.next_item_id == 5


# ---- Taking up what an earlier run left ----------------------------------------------------------


def as_journal(changes: list[KeyChange]) -> list[KeyChange]:
    """Changes that went through a JSON file."""
    return [KeyChange(**row) for row in json.loads(json.dumps([c._asdict() for c in changes]))]


def decide(draft: Draft) -> None:
    draft.update("WRK-003", NOW, phase="review", attempts=1)
    draft.add("WRK", "New", NOW, tags=["t"], description={"context": "c"})
    draft.remove("WRK-002")


def test_unsaved_changes_survive_a_restart(bench: Bench) -> None:
    bench.path.write_text(BROKEN)
    bench.store.transact([decide])
    wanted, left = bench.store.backlog, as_journal(bench.store.unsaved())
    bench.path.write_text(TEXT)
    bench.store = bench.fresh()
    bench.warnings.clear()
    bench.store.restore(left)
    assert bench.store.backlog == wanted
    assert bench.text == TEXT
    bench.store.transact([])
    assert (bench.store.backlog, bench.in_step(), bench.warnings) == (wanted, True, [])


def test_restoring_what_was_saved_after_all_changes_nothing(bench: Bench) -> None:
    told: list[list[KeyChange]] = []
    bench.store.transact([decide], ahead=told.append)
    saved = bench.text
    bench.by_hand("title: New", "title: Newer")
    bench.store = bench.fresh()
    bench.store.restore(as_journal(told[0]))
    bench.store.transact([])
    assert bench.text == saved.replace("title: New", "title: Newer")
    assert bench.warnings == []


def test_a_parked_state_is_merged(bench: Bench) -> None:
    base = TEXT.encode()
    theirs = TEXT.replace("phase: build", "phase: review").replace("WRK-001\n  title", "WRK-001\n  size: small\n  title")
    bench.by_hand("title: Second", "title: Newest")
    bench.store.merge_bytes(base, theirs.encode())
    bench.store.transact([])
    titles = [bench.item("WRK-003")["phase"], bench.item("WRK-001")["size"], bench.item("WRK-002")["title"]]
    assert titles == ["review", "small", "Newest"]
    bench.store.merge_bytes(b"", theirs.encode())
    bench.store.transact([])
    assert bench.item("WRK-002")["title"] == "Newest"
    with pytest.raises(YamlError):
        bench.store.merge_bytes(base, BROKEN.encode())


@pytest.mark.parametrize("removed", [True, False])
def test_a_file_that_was_set_back_is_written_again(bench: Bench, removed: bool) -> None:
    bench.update("WRK-001", size="small")
    ours = bench.text
    bench.store.older = frozenset([TEXT.encode()])
    assert not bench.store.put_back()
    if removed:
        bench.path.unlink()
    else:
        bench.path.write_text(TEXT)
        bench.store.transact([])
        assert bench.text == TEXT  # a `git stash pop` may follow
    assert bench.store.put_back()
    assert (bench.text, bench.in_step()) == (ours, True)
    bench.path.write_text(BROKEN)
    assert not bench.store.put_back()
    assert bench.text == BROKEN


def test_committed_bytes_are_those_of_the_file(bench: Bench) -> None:
    bench.path.write_bytes(b"anything")
    assert bench.store.committed_bytes() == b"anything"
    bench.path.unlink()
    with pytest.raises(SaveError, match=r"BACKLOG\.yaml: the file is gone"):
        bench.store.committed_bytes()


def test_what_is_committed_has_been_taken_up(bench: Bench) -> None:
    """Else a commit of ours that holds another command's item would pass for an older state."""
    bench.update("WRK-001", size="small")
    bench.fresh().transact([add("of another command")])
    bench.store.older = frozenset([bench.store.committed_bytes()])  # HEAD, while a phase runs
    bench.update("WRK-001", size="large")
    assert (bench.item("WRK-001")["size"], bench.item("WRK-004")["title"]) == ("large", "of another command")
    assert bench.in_step()


def test_the_copy_never_falls_behind(bench: Bench) -> None:
    bench.fresh().transact([add("of another command")])
    bench.store.keep_copy()
    assert bench.store.last_copy() == bench.text.encode()
    bench.by_hand("title: Second", "title: By hand")
    bench.store.transact([])
    assert bench.store.last_copy() == bench.text.encode()


# ---- What cannot be written ----------------------------------------------------------------------


@contextmanager
def no_files_larger_than(size: int) -> Iterator[None]:
    """Let writes fail as on a full disk, also for root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_old_file_and_the_decision(bench: Bench) -> None:
    with no_files_larger_than(200), pytest.raises(SaveError) as caught:
        bench.store.transact([add()])
    assert str(caught.value) == (
        f"{bench.path}: the backlog cannot be written (File too large); mend that and start again"
    )
    assert bench.text == TEXT
    assert [change.item_id for change in bench.store.unsaved()] == ["WRK-004", ""]
    assert sorted(os.listdir(bench.path.parent)) == ["BACKLOG.yaml", "state"]
    bench.store.transact([])
    assert "WRK-004" in bench.store.backlog.items
    assert bench.in_step()


def test_a_vanished_folder(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    bench = Bench(folder)
    bench.lock = tmp_path / "lock"
    bench.store = bench.fresh()
    folder.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(SaveError, match=r"cannot be written \(No such file or directory\)"):
            bench.store.transact([add()])
    (tmp_path / "away").rename(folder)
    bench.store.transact([])
    assert list(bench.item("WRK-005")) == list(bench.item("WRK-004"))
    assert bench.store.backlog == bench.fresh().backlog


def test_a_file_where_the_folder_was(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    bench = Bench(folder)
    bench.lock = tmp_path / "lock"
    bench.store = bench.fresh()
    folder.rename(tmp_path / "away")
    folder.write_text("a file")
    with pytest.raises(SaveError, match=r"cannot be read \(Not a directory\)"):
        bench.store.transact([add()])
    assert "WRK-004" in bench.store.backlog.items
    assert folder.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(bench: Bench) -> None:
    bench.path.parent.chmod(0o555)
    try:
        with pytest.raises(SaveError, match="Permission denied"):
            bench.store.transact([add()])
    finally:
        bench.path.parent.chmod(0o755)
    assert bench.text == TEXT


def make_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make_link, "it is a symbolic link"),
        (make_pipe, "it is not a regular file"),
        (make_folder, "it is not a regular file"),
    ],
)
def test_what_is_no_regular_file_is_neither_read_nor_replaced(
    bench: Bench, change: Callable[[Path], None], message: str
) -> None:
    change(bench.path)
    kind = bench.path.lstat()
    with pytest.raises(SaveError, match=message):
        bench.store.transact([add()])
    with pytest.raises(BacklogError, match=message):
        bench.fresh()
    assert bench.path.lstat()[:4] == kind[:4]
    assert "WRK-004" in bench.store.backlog.items


def test_a_store_that_was_not_loaded_says_so(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match="load"):
        Store(bench.path, bench.lock, warn=print).transact([])


# ---- Several processes ---------------------------------------------------------------------------

HOLDER = """
import fcntl, os, sys
path, lock = sys.argv[1:]
with open(lock, "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    os.pwrite(file.fileno(), b"%-12d" % os.getpid(), 0)
    text = open(path).read()
    print("read", flush=True)
    sys.stdin.readline()
    with open(path + ".new", "w") as new:
        new.write(text.replace("Second", "Zweites"))
    os.rename(path + ".new", path)
"""

ADDER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from backlog import Store
store = Store(Path(sys.argv[1]), Path(sys.argv[2]), warn=print)
store.load()
sys.stdin.readline()
for n in range(10):
    (item,) = store.transact([lambda d: d.add("WRK", sys.argv[3] + str(n), datetime.now(UTC))])
    print(item["id"])
"""


def child(code: str, *argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_a_writer_between_reading_and_renaming_is_waited_for(bench: Bench) -> None:
    holder = child(HOLDER, bench.path, bench.lock)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "read\n"
    impatient = bench.store
    impatient._lock_limit_s = 0
    with pytest.raises(SaveError) as caught:
        impatient.transact([add("kept in memory")])
    assert f"locked for 0 s by another process (probably {holder.pid}" in str(caught.value)
    assert "WRK-004" in impatient.backlog.items
    impatient._lock_limit_s = 30

    thread = threading.Thread(target=impatient.transact, args=([add("second")],))
    thread.start()
    holder.communicate("go\n")
    thread.join()
    assert [i["title"] for i in bench.fresh().backlog.items.values()] == [
        "First",
        "Zweites",
        "Third",
        "kept in memory",
        "second",
    ]
    assert bench.in_step()


def test_a_held_lock_stops_loading_as_well(bench: Bench) -> None:
    holder = child(HOLDER, bench.path, bench.lock)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "read\n"
    with pytest.raises(BacklogError, match=r"locked for 0\.05 s by another process"):
        bench.fresh(lock_limit_s=0.05)
    holder.communicate("go\n")


def test_four_processes_adding_at_once_lose_nothing(bench: Bench) -> None:
    adders = [child(ADDER, bench.path, bench.lock, name) for name in "abcd"]
    for adder in adders:
        assert adder.stdin is not None
        adder.stdin.write("go\n")
        adder.stdin.flush()
    ids = [adder.communicate()[0].split() for adder in adders]
    assert [len(own) for own in ids] == [10] * 4
    bench.store.transact([])
    everything = [f"WRK-{n:03d}" for n in range(1, 44)]
    assert list(bench.store.backlog.items) == everything
    assert sorted(item_id for own in ids for item_id in own) == everything[3:]
    assert bench.store.backlog.next_item_id == 43
    for own, name in zip(ids, "abcd", strict=True):
        titles = [bench.store.backlog.items[item_id]["title"] for item_id in own]
        assert titles == [f"{name}{n}" for n in range(10)]


def save_and_die(store: Store, countdown: int) -> int:
    """Save a new item in a child process that kills itself at the given call; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]

    def hook(event: str, args: object) -> None:
        nonlocal countdown
        if event.startswith(("open", "os.", "fcntl.")):
            countdown -= 1
            if not countdown:
                os._exit(9)

    try:
        sys.addaudithook(hook)
        store.transact([add("New")])
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the other thread: pytest's watchdog
def test_killed_at_any_point_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    contents: list[str] = []
    for countdown in range(1, 100):
        folder = tmp_path / str(countdown)
        folder.mkdir()
        bench = Bench(folder)
        status = os.waitstatus_to_exitcode(save_and_die(bench.store, countdown))
        contents.append(bench.text)
        bench.store = bench.fresh()
        assert bench.in_step()
        if status == 0:
            break
        assert status == 9
    new = contents[-1]
    assert "title: New" in new
    renamed = contents.index(new)
    assert renamed > 6
    assert contents == [TEXT] * renamed + [new] * (len(contents) - renamed)


def test_ten_thousand_items_are_compared_by_identity(tmp_path: Path) -> None:
    """What did not change is the same object before and after, in memory as in the diff."""
    times = "  " + TIMES
    rows = "".join(f"- id: WRK-{n:05d}\n  title: T{n}\n  status: new\n{times}" for n in range(10_000))
    bench = Bench(tmp_path, f"schema_version: 3\nitems:\n{rows}next_item_id: 9999\n")
    before: Backlog = bench.store.backlog
    bench.update("WRK-05000", size="small")
    after = bench.store.backlog
    assert sum(after.items[i] is not item for i, item in before.items.items()) == 1
    assert bench.item("WRK-05000")["size"] == "small"
