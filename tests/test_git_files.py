"""The files of git that are written beside git (index, branch, reflogs) are as git would write them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gitutil
from gitutil import ABSENT_MODE, ABSENT_OID, Entry, GitError, Head, Repo, _Index, _IndexRow
from tests.conftest import sh
from tests.test_objects import LEFT_TO_GIT, Prepare, fill, git, script, table


@pytest.fixture
def project(make_repo: Callable[..., Path]) -> Path:
    where = make_repo()
    fill(where)
    return where


def row(path: str, oid: str = "", *, flag: str = "H", stage: str = "0") -> _IndexRow:
    return _IndexRow(flag, "100644" if oid else ABSENT_MODE, oid or ABSENT_OID, stage, path)


def new_index(where: Path, rows: list[_IndexRow], id_size: int = 20) -> bytes | None:
    index = _Index.parse((where / ".git/index").read_bytes(), id_size)
    edited = index.edited(rows) if index else None
    return edited.file() if edited else None


def index_by_git(where: Path, rows: list[_IndexRow]) -> bytes:
    copy, info = where / ".git/copy", Repo(where)._index_info(rows)
    copy.write_bytes((where / ".git/index").read_bytes())
    env = {**os.environ, "GIT_INDEX_FILE": str(copy)}
    subprocess.run(["git", "update-index", "-z", "--index-info"], cwd=where, env=env, input=info, check=True)
    return copy.read_bytes()


# ==== The index ===================================================================================

EDITS = {
    "nothing there": ["-none", "-d/none"],
    "other content": ["+a", "+d/y/z", "+link"],
    "first and last": ["-\"quoted\"", "+ ", "+ä b", "+ÿ"],
    "gone": ["-a", "-n\nl", "-run.sh"],
    "new": ["+a-", "+a00", "+d/xx", "+dd"],
    "new folders": ["+new/deep/er", "+d/new/x"],
    "folders gone": ["-d/y/z", "-e/only"],
    "a folder becomes a file": ["-d/x", "-d/y/z", "+d"],
    "a file becomes a folder": ["-a", "+a/b"],
    "many": [f"+many/{'x' * n}" for n in range(1, 40)],
    "long": ["+" + "/".join(["0" * 200] * 21)],
}  # fmt: skip
STATES: dict[str, Prepare] = {
    "plain": script(":"),
    "without_trees": script("git read-tree --empty && git add -A"),
    "a_tree_or_two": script("echo >>d/y/z && git add -A"),
    "no_entries": script("git rm -qrf --cached ."),
    "resolved": script("git switch -qc b && echo 1 >a && git commit -qam 1 && git switch -q - && echo 2 >a && git commit -qam 2 && ! git merge -q b && git add a"),
}


@pytest.mark.parametrize("state", table(STATES, slow="without_trees no_entries resolved"))
def test_an_index_is_written_byte_for_byte_as_by_git(project: Path, state: Prepare) -> None:
    state(project)
    oid = git(project, "rev-parse", "HEAD:run.sh")
    for name, edits in EDITS.items():
        rows = [row(edit[1:], oid if edit[0] == "+" else "") for edit in edits]
        ours, theirs = new_index(project, rows), index_by_git(project, rows)
        assert ours is not None
        if name == "a folder becomes a file":  # git forgets the tree of it, ours is of no known id
            (project / ".git/ours").write_bytes(ours)
            for question in ("ls-files -s --debug", "write-tree", "status --short", "fsck --strict --no-dangling"):
                asked = [sh(project, "env", f"GIT_INDEX_FILE=.git/{file}", "git", *question.split()) for file in ("ours", "copy")]
                assert asked[0] == asked[1], question
            continue
        assert ours == theirs, name


def spoil(where: Path, at: int, new: bytes) -> None:
    data = bytearray((where / ".git/index").read_bytes())
    data[at % len(data) : at % len(data) + len(new)] = new
    (where / ".git/index").write_bytes(data)


REFUSED: dict[str, tuple[Prepare, list[_IndexRow]]] = {
    "flag_to_set": (script(":"), [row("a", "1" * 40, flag="h")]),
    "flag_to_keep": (script("git update-index --assume-unchanged a"), [row("a", "1" * 40)]),
    "stages_to_set": (script(":"), [row("a", "1" * 40, stage="2")]),
    "conflict": (script("git switch -qc b && echo 1 >a && git commit -qam 1 && git switch -q - && echo 2 >a && git commit -qam 2 && ! git merge -q b"), [row("a", "1" * 40)]),
    "file_in_the_place_of_a_folder": (script(":"), [row("d", "1" * 40)]),
    "folder_in_the_place_of_a_file": (script(":"), [row("link/x/y", "1" * 40)]),
    "untracked_cache": (script("git update-index --force-untracked-cache && git status -s"), [row("a", "1" * 40)]),
    "version_3": (script("git update-index --skip-worktree a"), [row("d/x", "1" * 40)]),
    "version_4": (script("git update-index --index-version 4"), [row("d/x", "1" * 40)]),
    "damaged": (lambda where: spoil(where, 20, b"damage"), [row("d/x", "1" * 40)]),
    "no_checksum": (lambda where: spoil(where, -20, bytes(20)), [row("d/x", "1" * 40)]),
    **{name: (prepare, [row("a", "1" * 40)]) for name, prepare in LEFT_TO_GIT.items()},
}  # fmt: skip


OFTEN = ("flag_to_keep", "conflict", "damaged", "no_checksum", "file_in_the_place_of_a_folder")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED]
)
def test_an_index_of_another_kind_is_not_written(project: Path, name: str) -> None:
    state, rows = REFUSED[name]
    state(project)
    assert new_index(project, rows) is None


def test_a_large_index_loses_its_tables(project: Path) -> None:
    """They tell threads where to begin; git does without them, and makes them again."""
    index = project / ".git/index"
    data = index.read_bytes()[:-20] + b"EOIE" + (24).to_bytes(4, "big") + bytes(24)
    index.write_bytes(data + gitutil._git_hash(data, 20).digest())
    rows = [row("a", git(project, "rev-parse", "HEAD:run.sh"))]
    edited = new_index(project, rows)
    assert edited == index_by_git(project, rows)
    assert b"EOIE" not in edited


def test_an_edit_in_the_tick_of_the_staging_stays_seen(project: Path) -> None:
    """An entry as young as its index file is one that git reads the file for."""
    repo, index = Repo.open(project), project / ".git/index"
    (project / "a").write_text("one\n")
    git(project, "add", "a")
    (project / "a").write_text("two\n")
    moment = index.stat().st_mtime_ns
    os.utime(project / "a", ns=(moment, moment))
    git(project, "-c", "core.trustctime=false", "config", "core.trustctime", "false")
    assert repo.commit([repo.blob(project / "state", b"1\n")], "state")
    assert index.stat().st_mtime_ns == moment
    assert git(project, "status", "--porcelain", "a") == "MM a"


# ==== The branch ==================================================================================



def logs(where: Path) -> list[list[str]]:
    """The lines of the reflogs of branch and HEAD, without the time."""
    files = (where / ".git/logs/refs/heads/main", where / ".git/logs/HEAD")
    return [[re.sub(r"> \d+ ", "> ", line) for line in file.read_text().splitlines()] for file in files]


def about_to_move(project: Path) -> tuple[Repo, Head, str]:
    """HEAD after a first commit, which tells who we are, and a commit to move to."""
    repo = Repo.open(project)
    assert repo.commit([repo.blob(project / "state", b"1\n")], "first")
    head = repo.head()
    new = repo._commit_tree(repo._objects.tree_id(str(head.commit)), [str(head.commit)], "new")
    repo._objects.settle()
    return repo, head, new


@pytest.mark.parametrize("message", [pytest.param("Subject", marks=pytest.mark.slow), "  Much \t space \nand a body\n", "Ümläut"])
def test_a_branch_is_moved_as_by_git(project: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, head, new = about_to_move(project)
    (project / ".git/refs/heads/main").chmod(0o664)  # as in a shared repository
    with monkeypatch.context() as alone:
        alone.setattr(Repo, "git", None)
        assert repo._move_branch(head, new, message)
    ours = logs(project), git(project, "rev-parse", "HEAD")
    assert (project / ".git/refs/heads/main").stat().st_mode & 0o777 == 0o664
    git(project, "update-ref", "refs/heads/main", str(head.commit), new)
    for file, lines in zip(("refs/heads/main", "HEAD"), ours[0], strict=True):
        (project / ".git/logs" / file).write_text("\n".join([*(project / ".git/logs" / file).read_text().splitlines()[: len(lines) - 1], ""]))
    monkeypatch.setattr(Repo, "_move_by_files", lambda *_: False)
    assert repo._move_branch(head, new, message)
    assert ours == (logs(project), git(project, "rev-parse", "HEAD"))
    assert git(project, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


LEFT: dict[str, Prepare] = {
    "packed": script("git pack-refs --all"),
    "no_log": script("rm -r .git/logs"),
    "no_log_of_HEAD": script("rm .git/logs/HEAD"),
    "moved": script("git commit -qm theirs --allow-empty"),
    "locked": script(": >.git/refs/heads/main.lock"),
    "symbolic": script("git branch other && git symbolic-ref refs/heads/main refs/heads/other"),
    "other_line_end": script("git rev-parse HEAD | tr '\\n' ' ' >x && mv x .git/refs/heads/main"),
}


@pytest.mark.parametrize("prepare", table(LEFT, slow="packed no_log no_log_of_HEAD symbolic other_line_end"))
def test_a_branch_of_another_kind_is_left_to_git(project: Path, prepare: Prepare) -> None:
    repo, head, new = about_to_move(project)
    prepare(project)
    before = {file: file.read_bytes() for file in (project / ".git").rglob("*") if file.is_file()}
    assert not repo._move_by_files(head, new, "commit: new")
    assert before == {file: file.read_bytes() for file in (project / ".git").rglob("*") if file.is_file()}


def test_head_on_another_branch_is_not_told_of_the_move(project: Path) -> None:
    repo, head, new = about_to_move(project)
    git(project, "switch", "-qc", "other")
    old = logs(project)
    assert repo._move_by_files(head, new, "commit: new")
    assert [len(lines) for lines in logs(project)] == [len(old[0]) + 1, len(old[1])]


# ==== Objects =====================================================================================


def test_all_of_a_commit_is_flushed_before_anything_names_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not leave a branch, an index or a ref of ours at an empty file."""
    repo, *_ = about_to_move(project)
    flushed, named = set[int](), list[str]()
    fsync, rename = os.fsync, os.rename

    def flush(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def swap(old: Path, new: Path) -> None:
        assert old.stat().st_ino in flushed, new
        rename(old, new)
        if "objects" not in new.parts:
            named.append(new.name)
            git(project, "rev-list", "--objects", "--all", "--indexed-objects")  # fails if one is missing

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", swap)
    for n in range(2):
        (project / "state").write_text(f"{n}\n")
        repo.snapshot(f"refs/orchestrator/snapshots/run/{n}")
        files = ("state", "d/new", "d/deep/er/new")
        assert repo.commit([repo.blob(project / name, b"%d\n" % n) for name in files], "text")
    refs = [name for name in named if not name.startswith("orchestrator-")]
    assert refs == ["index", "main", "1", "index", "main"]  # the first ref of a folder is git's to make


def test_what_could_not_be_stored_is_stored_the_next_time(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, head, _ = about_to_move(project)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    entry = Entry("new/one", "100644", "")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(GitError, match=r"objects/.* cannot be written: No space left"):
            repo.commit([entry._replace(oid=repo.blob(project / "x", b"1\n").oid)], "text")
    assert repo.head() == head
    assert repo.commit([entry._replace(oid=repo.blob(project / "x", b"1\n").oid)], "text")
    assert git(project, "show", "HEAD:new/one") == "1"
    assert git(project, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


# ==== Killed meanwhile ============================================================================


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["index", "refs/heads/main", "refs/heads/of/another"])
def test_a_lock_of_ours_does_not_outlive_the_next_start(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, place = Repo.open(project), project / ".git" / name
    sh(project, "git", "branch", "of/another")
    old = place.read_bytes()

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as killed:  # with the lock held, and no tidying up
        for act in ("rename", "unlink"):
            killed.setattr(os, act, die)
        with pytest.raises(Killed):
            repo._swap(place, old, b"new")
    lock = Path(f"{place}.lock")
    assert lock.read_bytes() == b"new"
    assert place.read_bytes() == old
    repo.clean_leftovers()
    assert not lock.exists()
    assert not list((project / ".git").glob("orchestrator-*"))
    lock.write_text("somebody's")
    (project / ".git/orchestrator-swap-0").write_text("killed after the swap")
    os.link(project / ".git/orchestrator-swap-0", project / ".git/what-was-swapped")
    assert not repo._swap(place, old, b"new")
    repo.clean_leftovers()
    assert lock.read_text() == "somebody's"
