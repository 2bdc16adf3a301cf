"""The store: five steps under one lock, with a run's journal and without; races, crashes, bad files."""

import fcntl
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
from typing import Any

import pytest

from backlog import BacklogError, Draft, Item, Journal, Outside, SaveError, Store, YamlError

NOW = datetime(2026, 2, 13, 12, tzinfo=UTC)
TIMES = "created: 2026-02-10T00:00:00+00:00\n  updated: 2026-02-10T00:00:00+00:00\n"
ROOT = Path(__file__).parent.parent
RUN = {"id": "run-1", "branch": "refs/heads/main", "head": None}

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
BROKEN = "items: [unclosed\n"


def make_store(path: Path, state: Path, warn: Callable[[str], None] = print, **options: Any) -> Store:
    outside = Outside(lambda run: True, lambda run: (), lambda: (None, b""))
    clock: dict[str, Any] = {"prefix": "WRK", "clock": lambda: NOW}
    return Store(path, state, path.parent / "aside", outside, warn=warn, **clock, **options)


class Bench:
    """A backlog file with its store, and what the store warned about."""

    def __init__(self, folder: Path, journal: bool = False) -> None:
        self.path, self.state_dir = folder / "BACKLOG.yaml", folder / "state"
        self.path.write_text(TEXT)
        self.state_dir.mkdir()
        self.warnings: list[str] = []
        self.time = 0.0
        self.store = self.fresh()
        if journal:
            self.store.begin(RUN, TEXT.encode())

    def fresh(self, **options: Any) -> Store:
        """Another store on the same file, as another command has one."""
        store = make_store(self.path, self.state_dir, self.warnings.append, monotonic=lambda: self.time, **options)
        store.look()
        return store

    @property
    def text(self) -> str:
        return self.path.read_text()

    def by_hand(self, old: str, new: str) -> None:
        assert old in self.text
        self.path.write_text(self.text.replace(old, new, 1))

    def update(self, item_id: str, **changes: object) -> Item:
        return self.store.change(lambda d: d.update(item_id, NOW, **changes))

    def add(self, title: str = "New") -> Item:
        return self.store.change(lambda d: d.add("WRK", title, NOW))

    def take_in(self, patient: bool = True) -> None:
        self.store.change(lambda d: None, patient=patient)

    def item(self, item_id: str) -> Item:
        """The item as another command sees it."""
        return self.fresh().backlog.items[item_id]

    def in_step(self) -> bool:
        """Whether memory is what the file holds, and nothing else lies around."""
        data = self.store.state.document.to_bytes()
        return data == self.path.read_bytes() and sorted(os.listdir(self.path.parent)) == ["BACKLOG.yaml", "state"]


@pytest.fixture(params=[False, True], ids=["without a journal", "with a journal"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, request.param)


@pytest.fixture
def running(tmp_path: Path) -> Bench:
    """As during a run."""
    return Bench(tmp_path, journal=True)


def test_an_edit_that_a_command_has_foreseen_is_in_the_journal_once_it_has_saved(running: Bench) -> None:
    """Else the run, which goes by the journal, takes the edit back when the file is an older copy to it."""
    running.by_hand("Second", "Edited")
    command = running.fresh()
    assert command.backlog.items["WRK-002"]["title"] == "Edited"
    command.change(lambda d: d.add("WRK", "New", NOW))
    journal = Journal.read(command.journal_path, "BACKLOG.yaml")
    assert journal is not None
    assert journal.state().items["WRK-002"]["title"] == "Edited"


def test_a_buffer_that_was_saved_before_a_run_began_is_merged_by_the_command_that_saw_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.by_hand("Second", "Edited")
    command = bench.fresh()  # sees the file alone
    bench.fresh().begin(RUN, TEXT.encode())
    command.change(lambda d: d.add("WRK", "New", NOW))
    assert "Edited" in bench.text
    assert command.backlog.items["WRK-002"]["title"] == "Edited"


# ---- Saving --------------------------------------------------------------------------------------

def test_d44_nothing_is_written_when_nothing_changed(bench: Bench) -> None:
    before = bench.path.stat()
    bench.update("WRK-001", status="new")
    bench.take_in()
    after = bench.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if (journal := bench.store.journal) is not None:
        assert len(list(journal.states())) == 1


def test_of_an_edit_that_fails_nothing_is_kept(bench: Bench) -> None:
    def torn(draft: Draft) -> None:
        draft.warnings.append("never told")
        draft.update("WRK-001", NOW, size="large")
        del draft.items["WRK-003"]
        raise BacklogError("no")

    with pytest.raises(BacklogError, match="no"):
        bench.store.change(torn)
    with pytest.raises(BacklogError, match="cannot be written as YAML"):
        bench.store.change(lambda d: d.add("WRK", "bad byte", NOW, origin="\udcff"))
    assert (bench.text, bench.warnings) == (TEXT, [])
    assert bench.add()["id"] == "WRK-004"
    assert bench.in_step()


def test_the_mode_is_kept_and_a_left_over_temporary_file_never_followed(bench: Bench) -> None:
    victim = bench.state_dir / "victim"
    victim.write_text("precious")
    bench.path.with_name(".BACKLOG.yaml.tmp").symlink_to(victim)
    for mode, size in ((0o600, "small"), (0o664, "medium"), (0o755, "large")):
        bench.path.chmod(mode)
        bench.update("WRK-001", size=size)
        assert bench.path.stat().st_mode & 0o7777 == mode
    assert victim.read_text() == "precious"
    assert bench.in_step()


# ---- Edits of others -----------------------------------------------------------------------------

def test_edits_by_hand_and_of_another_command_are_taken_up_and_kept(bench: Bench) -> None:
    bench.by_hand("title: Second\n", "title: 'Second, better'   # why\n  priority: 2\n")
    bench.by_hand("# the important one\n", "# really important\n\n")
    bench.by_hand("next_item_id: 3\n", "next_item_id: 3\nmore: ours\n")
    other = bench.fresh()
    other.change(lambda d: d.add("WRK", "theirs", NOW))
    assert bench.add("mine")["id"] == "WRK-005"
    other.change(lambda d: None)
    assert other.backlog == bench.store.backlog
    kept = ("'Second, better'   # why\n  priority: 2\n", "# really important\n\n- id: WRK-001\n", "\nmore: ours\n")
    assert all(text in bench.text for text in kept)
    assert bench.store.backlog.items["WRK-002"]["priority"] == 2
    assert (bench.warnings, bench.in_step()) == ([], True)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59.999999+00:00"])
def test_a_time_that_no_calendar_reaches_is_one_long_ago(bench: Bench, time: str) -> None:
    bench.by_hand("# numbers\n", f"- id: WRK-004\n  title: By hand\n  status: new\n  created: '{time}'\n  updated: '{time}'\n# numbers\n")
    assert bench.update("WRK-004", priority=1)["updated"] == NOW.isoformat()
    bench.by_hand("title: Third", f"title: Third one\n  updated: '{time}'\n  was:")
    bench.by_hand("  dependencies:\n  - WRK-002\n  " + TIMES, "  dependencies: []\n  created: now\n")
    assert bench.update("WRK-003", priority=1)["updated"] > "2026"
    assert (bench.item("WRK-003")["title"], bench.in_step()) == ("Third one", True)


def racing(bench: Bench, *edits: Callable[[], object]) -> Item:
    """Add an item while somebody edits the file after it was read, before it is replaced."""
    todo: Iterator[Callable[[], object]] = iter(edits)
    read = bench.store._read

    def edited() -> bytes | None:
        if bench.store.temporary.exists():
            next(todo, lambda: None)()
        return read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.store, "_read", edited)
        return bench.add("mine")


def test_an_editor_that_saves_right_before_the_rename_is_merged(bench: Bench) -> None:
    added = racing(
        bench,
        lambda: bench.by_hand("title: Second", "title: Zweites  # once"),
        lambda: bench.by_hand("title: Third", "title: Drittes  # twice"),
    )
    assert (added["id"], added["title"]) == ("WRK-004", "mine")
    assert "title: Zweites  # once\n" in bench.text
    assert "title: Drittes  # twice\n" in bench.text
    assert bench.item("WRK-004")["title"] == "mine"
    assert bench.in_step()


def test_a_file_deleted_right_before_the_rename_is_written_again_by_a_run(running: Bench) -> None:
    racing(running, running.path.unlink)
    assert "WRK-004" in running.store.backlog.items
    assert running.in_step()


def test_a_file_deleted_right_before_the_rename_is_missed_where_it_is_the_truth(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(BacklogError, match="git restore"):
        racing(bench, bench.path.unlink)


def test_a_program_that_never_stops_writing_is_named_and_wins(bench: Bench) -> None:
    texts = [f"{TEXT}# {n}\n" for n in range(100)]
    with pytest.raises(SaveError, match="another program changes the file all the time"):
        racing(bench, *(lambda text=text: bench.path.write_text(text) for text in texts))
    assert bench.text in texts
    decided = "WRK-004" in bench.fresh().backlog.items
    assert decided is (bench.store.journal is not None)
    bench.take_in()
    assert bench.in_step()


# ---- A file that cannot be used ------------------------------------------------------------------

def test_a_broken_file_is_left_alone_for_a_minute_then_set_aside(running: Bench) -> None:
    running.path.write_text(BROKEN)
    running.add()
    running.time = 59
    running.update("WRK-001", size="small")
    assert (running.text, len(running.warnings)) == (BROKEN, 1)
    assert running.warnings[0].startswith("BACKLOG.yaml:1:")
    assert running.store.trouble
    running.path.write_text(BROKEN + "# somebody is typing\n")
    running.time = 61
    running.take_in()
    assert len(running.warnings) == 2
    running.time = 121
    running.take_in()
    [kept] = (running.path.parent / "aside").iterdir()
    assert kept.read_text() == BROKEN + "# somebody is typing\n"
    assert str(kept) in running.warnings[2]
    assert not running.store.trouble
    assert running.item("WRK-001")["size"] == "small"
    assert running.text == running.store.state.document.to_bytes().decode()


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("old")], ids=["folder", "link"])
def test_what_stands_in_place_of_the_file_is_set_aside_after_a_minute(running: Bench, put: Callable[[Path], None]) -> None:
    running.path.rename(running.path.with_name("old"))
    put(running.path)
    running.add()
    running.time = 59
    running.take_in()
    assert running.store.trouble
    assert (len(running.warnings), "Nothing new is started" in running.warnings[0]) == (1, True)
    running.time = 61
    running.take_in()
    assert "is set aside as" in running.warnings[1]
    assert (running.store.trouble, len(running.store.backlog.items)) == ("", 4)
    assert running.text == running.store.state.document.to_bytes().decode()


CUT = TEXT[: TEXT.index("# numbers")]


UNMEANT = {
    "": "the file holds no backlog",
    "schema_version: 3\nitems:\nnext_item_id: 3\n": "BACKLOG.yaml: no items;",
    TEXT.replace("schema_version: 3", "schema_version: 4"): "schema_version is 4, and only 3 can be read",
    CUT: "'next_item_id: N' is missing",
    TEXT[: TEXT.index("- id: WRK-003")]: "'next_item_id: N' is missing",
}


@pytest.mark.parametrize("text", UNMEANT)
def test_what_cannot_be_meant_counts_as_not_parsing(bench: Bench, text: str) -> None:
    bench.path.write_text(text)
    if bench.store.journal is None:
        with pytest.raises((BacklogError, YamlError), match=UNMEANT[text]):
            bench.update("WRK-001", size="small")
    else:
        bench.update("WRK-001", size="small")
        assert UNMEANT[text] in bench.warnings[0]
    assert bench.text == text
    bench.path.write_text(TEXT)
    bench.update("WRK-002", size="small")
    assert bench.in_step()


SPOILT = TEXT.replace("status: ready", "status: raedy").replace("- WRK-002\n", "- 7\n").replace(
    "# numbers\n", "- id: WRK-009\n  title: Half\n  size: [\n# numbers\n".replace("[", "'big'")
)


def test_a_key_that_every_item_has_is_not_taken_away_by_hand(running: Bench) -> None:
    running.by_hand("  status: ready\n", "")
    running.by_hand("  title: Second\n", "  title: Edited\n")
    running.add()
    found = running.store.backlog.items["WRK-002"]
    assert (found["status"], found["title"]) == ("ready", "Edited")
    assert running.warnings == ["WRK-002: the key 'status' is missing; it stays as it was"]
    running.by_hand(f"  updated: '{found['updated']}'\n", "")
    running.take_in()
    assert running.store.backlog.items["WRK-002"]["updated"]
    assert running.in_step()


def test_with_a_journal_a_bad_value_costs_its_key_alone(running: Bench) -> None:
    running.path.write_text(SPOILT.replace("title: Second", "title: Edited"))
    running.add()
    found = running.store.backlog.items
    assert (found["WRK-002"]["status"], found["WRK-002"]["title"]) == ("ready", "Edited")
    assert found["WRK-003"]["dependencies"] == ["WRK-002"]
    assert list(found) == ["WRK-001", "WRK-002", "WRK-003", "WRK-004"]
    assert "- id: WRK-009\n  title: Half\n" in running.text
    assert [word for word in ("raedy", "7", "big") if not any(word in line for line in running.warnings)] == []
    told = len(running.warnings)
    running.take_in()
    assert len(running.warnings) == told
    running.by_hand("size: 'big'\n", "size: large\n")
    running.take_in()
    assert running.store.backlog.items["WRK-009"]["size"] == "large"
    assert running.in_step()


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


def test_a_full_disk_keeps_the_old_file_and_nothing_is_decided(bench: Bench) -> None:
    with no_files_larger_than(200), pytest.raises(SaveError, match=r"cannot be written \(File too large\)"):
        bench.add()
    assert bench.text == TEXT
    assert sorted(os.listdir(bench.path.parent)) == ["BACKLOG.yaml", "state"]
    bench.store = bench.fresh()
    bench.add()
    assert list(bench.fresh().backlog.items) == ["WRK-001", "WRK-002", "WRK-003", "WRK-004"]
    assert bench.in_step()


# ---- The journal ---------------------------------------------------------------------------------

def test_the_journal_tells_every_state_and_what_is_left_to_do(running: Bench) -> None:
    running.add()
    running.update("WRK-001", size="small")
    running.store.note({"attempt": {"token": "t1", "item": "WRK-001"}})
    running.store.note({"process": {"token": "t1", "pid": 7, "since": 8}})
    running.store.note({"rests": {"claude": {"until": 1}}}, flush=False)
    running.store.note({"ended": ["t1"], "outcome": {"token": "t1"}})
    journal = Journal.read(running.store.journal_path, "BACKLOG.yaml")
    assert journal is not None
    assert [len(state.items) for state in journal.states()] == [3, 4, 4]
    assert journal.state().document == running.store.state.document
    assert (journal.run, journal.attempts, list(journal.outcomes)) == (RUN, {}, ["t1"])
    assert running.store.journal_path.stat().st_mode & 0o777 == 0o600
    data = running.path.read_bytes()
    assert not running.store.settle(data)
    running.store.note({"committed": ["t1"], "rests": {"claude": None}})
    assert not running.store.settle(TEXT.encode())
    assert running.store.settle(data)
    assert not running.store.journal_path.exists()


def test_a_run_that_ends_while_a_command_looks_and_another_that_begins(running: Bench) -> None:
    """The command does not go on in the middle of the other journal."""
    command = running.fresh()
    running.store.change(lambda draft: draft.update("WRK-001", NOW, status="scoping"))
    assert running.store.settle(running.path.read_bytes())
    other = running.fresh()
    other.begin({**RUN, "id": "run-2", "more": "x" * 5000}, running.path.read_bytes())
    command.change(lambda draft: draft.add("WRK", "Added", NOW))
    other.change(lambda draft: None)
    assert other.backlog.items["WRK-001"]["status"] == "scoping"
    assert other.backlog.items["WRK-004"]["title"] == "Added"


def test_a_line_that_was_cut_off_does_not_count(running: Bench) -> None:
    path, before = running.store.journal_path, running.store.journal_path.read_bytes()
    running.add()
    whole = path.read_bytes()
    running.path.write_text(TEXT)
    for length in range(len(before), len(whole), 31):
        path.write_bytes(whole[:length])
        assert list(running.fresh().backlog.items) == ["WRK-001", "WRK-002", "WRK-003"]
        other = running.fresh()
        assert other.change(lambda d: d.add("WRK", "Again", NOW))["id"] == "WRK-004"
        assert len(running.fresh().backlog.items) == 4
        running.path.write_text(TEXT)


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

def child(code: str, *argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_a_writer_between_reading_and_renaming_is_waited_for(bench: Bench) -> None:
    bench.store.lock_path.touch()
    holder = child(HOLDER, bench.path, bench.store.lock_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "read\n"
    impatient = bench.fresh(lock_limit_s=0)
    with pytest.raises(SaveError) as caught:
        impatient.change(lambda d: d.add("WRK", "too soon", NOW))
    assert f"locked for 0 s by another process (probably {holder.pid}" in str(caught.value)
    thread = threading.Thread(target=bench.add)
    thread.start()
    holder.communicate("go\n")
    thread.join()
    assert [i["title"] for i in bench.fresh().backlog.items.values()] == ["First", "Zweites", "Third", "New"]
    assert bench.in_step()


def add_and_die(bench: Bench, countdown: int) -> int:
    """Add an item in a child process that kills itself at the given call; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def hook(event: str, args: object) -> None:
        nonlocal countdown
        if event.startswith(("open", "os.", "fcntl.")):
            countdown -= 1
            if not countdown:
                os._exit(9)

    try:
        sys.addaudithook(hook)
        bench.add()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the other thread: pytest's watchdog
@pytest.mark.parametrize("journal", [False, True])
def test_killed_at_any_point_a_decision_is_there_or_is_not(tmp_path: Path, journal: bool) -> None:
    """With a journal its line decides, without one the file."""
    added: list[bool] = []
    for countdown in range(1, 100):
        folder = tmp_path / str(countdown)
        folder.mkdir()
        bench = Bench(folder, journal)
        code = add_and_die(bench, countdown)
        assert bench.text == TEXT or "title: New" in bench.text
        bench.store = bench.fresh()
        added.append("WRK-004" in bench.store.backlog.items)
        assert added[-1] or bench.text == TEXT
        bench.update("WRK-001", size="small")
        assert bench.in_step()
        assert ("WRK-004" in bench.store.backlog.items) is added[-1]
        if code == 0:
            break
        assert code == 9
    assert added == sorted(added)
    assert added[-1]
    assert added.index(True) > 4


def test_a_buffer_that_is_saved_once_git_was_asked_brings_nothing_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the soak: a finished item came back with it, and was paid for again."""
    journal = bench.store.journal is not None
    stale = TEXT.replace("title: ", "title: by hand ", 1)
    done = bench.store.change(lambda d: (d.items.pop("WRK-001"), d.backlog())[1])
    known = lambda run: [TEXT.encode()]  # noqa: E731
    store = make_store(bench.path, bench.state_dir, bench.warnings.append)
    head = bench.path.read_bytes()
    store.outside = Outside(lambda run: True, known, lambda: (None, head))
    store.look()
    real, saved = fcntl.flock, []

    def lock(fd: int, how: int) -> None:
        if not saved:
            saved.append(bench.path.write_text(stale))
        real(fd, how)

    monkeypatch.setattr("backlog.fcntl.flock", lock)
    store.change(lambda d: d.add("WRK", "New", NOW))

    assert saved
    assert "WRK-001" not in store.backlog.items
    assert [item["title"] for item in store.backlog.items.values()][-1] == "New"
    assert journal == (store.journal is not None)
    assert done.items.keys() < store.backlog.items.keys()
