"""What is read and written beside git (index, trees, commits, refs) is what git itself would say."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

import gitutil
from gitutil import ABSENT_MODE, ABSENT_OID, Entry, GitError, Repo
from tests.conftest import sh

Prepare = Callable[[Path], object]


def git(where: Path, *args: str) -> str:
    return sh(where, "git", *args).removesuffix("\n")


def fill(where: Path) -> None:
    """Names that sort oddly, a symbolic link, an executable, folders two deep."""
    names = ("a", "a.b", "a0", "d/x", "d/y/z", "d.e", "ä b", "-dash", '"quoted"', "n\nl", "e/only")
    for name in names:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(f"{name}\n")
    (where / "link").symlink_to("a")
    (where / "run.sh").write_text("#!/bin/sh\n")
    (where / "run.sh").chmod(0o755)
    git(where, "add", "-A")
    git(where, "commit", "-qm", "Files")


@pytest.fixture
def project(make_repo: Callable[..., Path]) -> Path:
    where = make_repo()
    fill(where)
    return where


def table(rows: Mapping[str, Prepare], slow: str = "") -> list[object]:
    """Parameters named by their keys; those named in `slow` run only when asked for."""
    marks = dict.fromkeys(slow.split(), pytest.mark.slow)
    assert marks.keys() <= rows.keys()
    return [pytest.param(row, id=name, marks=marks.get(name, ())) for name, row in rows.items()]


def script(text: str) -> Prepare:
    return lambda where: sh(where, "sh", "-ec", text)


# ==== The index file ==============================================================================

CONFLICT = "git switch -qc b && echo 1 >a && git commit -qam 1 && git switch -q - && echo 2 >a && git commit -qam 2"
READ: dict[str, Prepare] = {
    "plain": script(":"),
    "empty": script("git rm -qrf ."),
    "missing": script("rm .git/index"),
    "version_4": script("git update-index --index-version 4"),
    "flags": script("git update-index --assume-unchanged a && git update-index --skip-worktree d/x a0"),
    "flags_version_4": script("git update-index --index-version 4 && git update-index --skip-worktree d/x d/y/z"),
    "intent_to_add": script("echo >new && git add -N new"),
    "conflict": script(f"{CONFLICT} && ! git merge -q b"),
    "long_path": script('d=$(printf "%0200d" 0) && p=$(for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21; do printf $d/; done) && git update-index --add --cacheinfo 100644,$(git rev-parse :a),${p}f'),
    "untracked_cache": script("git update-index --force-untracked-cache && git status -s"),
}
LEFT_TO_GIT: dict[str, Prepare] = {
    "split": script("git update-index --split-index && echo >>a && git add a"),
    "sparse": script("git sparse-checkout init --cone --sparse-index && git sparse-checkout set e"),
    "garbage": script("printf 'DIRC, but what is this? Nobody would know' >.git/index"),
    "cut_off": script("head -c 200 .git/index >x && mv x .git/index"),
    "version_5": script(r"printf '\005' | dd of=.git/index bs=1 seek=7 conv=notrunc 2>/dev/null"),
}


@pytest.mark.parametrize("prepare", table(READ, slow="plain empty flags conflict long_path untracked_cache"))
def test_the_index_is_read_as_git_lists_it(project: Path, prepare: Prepare) -> None:
    prepare(project)
    listed = git(project, "ls-files", "-s", "-v", "-z").split("\0")[:-1]
    repo = Repo.open(project)
    assert [str(row) for row in repo._index_rows()] == listed
    assert [str(row) for row in Repo.open(project)._index_rows(["d/x", "ä b", "none"])] == [
        row for row in listed if row.split("\t", 1)[1] in ("d/x", "ä b")
    ]
    index = project / ".git/index"
    if index.exists():
        assert gitutil._git_index_rows(index.read_bytes(), 20) is not None


@pytest.mark.parametrize("prepare", table(LEFT_TO_GIT, slow="garbage cut_off version_5"))
def test_an_index_of_another_kind_is_left_to_git(project: Path, prepare: Prepare) -> None:
    prepare(project)
    assert gitutil._git_index_rows((project / ".git/index").read_bytes(), 20) is None


def test_what_is_staged_is_known_after_commits_as_before(project: Path) -> None:
    """Concluded, not asked again; a repository opened anew finds the same."""
    repo = Repo.open(project)
    (project / "a").write_text("staged\n")
    (project / "later").write_text("meant to come\n")
    git(project, "add", "a")
    git(project, "add", "-N", "later")
    git(project, "rm", "-q", "--cached", "a.b")
    for n in range(3):
        assert repo.snapshot() == Repo.open(project).snapshot()
        entry = repo.blob(project / "state", b"%d\n" % n)
        assert repo.commit([entry], "state") is not None
        if n == 1:
            git(project, "add", "later")
    assert [row.split("\t")[1] for row in repo.snapshot().staging] == ["a", "later", "a.b"]
    assert repo.snapshot() == Repo.open(project).snapshot()


def test_what_is_staged_during_a_commit_is_seen(project: Path) -> None:
    class Busy(Repo):
        def _move_branch(self, *args):  # type: ignore[no-untyped-def]
            git(project, "add", "a")
            return super()._move_branch(*args)

    repo = Busy.open(project)
    (project / "a").write_text("theirs\n")
    assert repo.snapshot().staging == []
    assert repo.commit([repo.blob(project / "state", b"1\n")], "state")
    assert [row.split("\t")[1] for row in repo.snapshot().staging] == ["a"]


# ==== Trees and commits ===========================================================================


def blob(where: Path, text: str) -> str:
    (where / ".git/text").write_text(text)
    return git(where, "hash-object", "-w", ".git/text")


GRAFTS: dict[str, dict[str, str | None]] = {
    "change": {"a": "new"},
    "deep": {"d/y/z": "new", "d/y/new": "n", "new/folder/file": "f"},
    "removals": {"a": None, "d/x": None, "none": None, "d/none": None, "none/none": None},
    "folder_emptied": {"e/only": None, "d/y/z": None},
    "file_becomes_folder": {"a": None, "a/b": "inside"},
    "folder_becomes_file": {"e/only": None, "e": "a file"},
    "folders_become_file": {"d/x": None, "d/y/z": None, "d": "a file"},
    "everything_goes": dict.fromkeys(("README.md", "a", "a.b", "a0", "d/x", "d/y/z", "d.e", "ä b", "-dash", '"quoted"', "n\nl", "e/only", "link", "run.sh")),
    "odd_names": {"n\nl": "x", "ä b": None, "a-": "1", "a": None},
    "nothing": {},
}


@pytest.mark.parametrize(
    "store", ["loose", pytest.param("packed", marks=pytest.mark.slow), pytest.param("borrowed", marks=pytest.mark.slow)]
)
def test_trees_are_made_and_compared_as_git_does(project: Path, tmp_path: Path, store: str) -> None:
    if store == "packed":
        git(project, "gc", "-q")
    elif store == "borrowed":
        git(tmp_path, "clone", "-qs", str(project), "clone")
        project = tmp_path / "clone"
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    for name, wanted in GRAFTS.items():
        entries = [
            Entry(path, ABSENT_MODE, ABSENT_OID) if text is None else Entry(path, "100644", blob(project, text))
            for path, text in wanted.items()
        ]
        tree = repo._objects.graft(repo._tree(head), entries)
        assert tree == made_by_git(project, entries), name
        raw = git(project, "diff-tree", "-r", "-z", "--no-renames", "--name-only", head, tree)
        assert [change.after.path for change in repo.changes(head, tree)] == sorted(raw.split("\0")[:-1]), name
        assert repo._entries(tree, wanted) == {entry.path: entry for entry in entries}, name
    assert git(project, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


def made_by_git(where: Path, entries: Sequence[Entry]) -> str:
    """HEAD's tree with these entries, by way of an index."""
    rows = [f"0 {ABSENT_OID}\t{entry.path}" for entry in entries]
    rows += [f"{entry.mode} {entry.oid}\t{entry.path}" for entry in entries if not entry.absent]
    (where / ".git/rows").write_text("".join(f"{row}\0" for row in rows))
    steps = ("read-tree HEAD", "update-index -z --index-info <.git/rows", "write-tree")
    return sh(where, "sh", "-ec", ";".join(f"GIT_INDEX_FILE=.git/other git {step}" for step in steps)).strip()


def test_a_commit_is_what_git_would_make_of_it(project: Path) -> None:
    """The second one is made without git: same names, same form, whatever the names hold."""
    git(project, "config", "user.name", "Ö. Per <Ator>")
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    first = repo._commit_tree(repo._tree(head) or "", [head], "one")
    second = repo._commit_tree(repo._tree(head) or "", [head], "zwei ä\n\nbody\n\n")
    repo._objects.settle()
    lines = git(project, "cat-file", "commit", second).split("\n")
    author, when, zone = lines[2].rsplit(" ", 2)
    assert author == git(project, "cat-file", "commit", first).split("\n")[2].rsplit(" ", 2)[0]
    os.environ["GIT_AUTHOR_DATE"] = os.environ["GIT_COMMITTER_DATE"] = f"{when} {zone}"
    try:
        theirs = git(project, "commit-tree", f"{head}^{{tree}}", "-p", head, "-m", "zwei ä\n\nbody")
    finally:
        del os.environ["GIT_AUTHOR_DATE"], os.environ["GIT_COMMITTER_DATE"]
    assert second == theirs


@pytest.mark.parametrize("shared", ["false", "group", pytest.param("all", marks=pytest.mark.slow), "0660"])
def test_objects_can_be_read_by_whom_git_would_let(tmp_path: Path, shared: str) -> None:
    where = tmp_path / "repo"
    git(tmp_path, "init", "-q", f"--shared={shared}", "repo")
    objects = Repo.open(where)._objects
    oid = objects.write(b"blob", b"ours\n")
    objects.settle()
    theirs = blob(where, "theirs\n")
    modes = [
        [stat.S_IMODE((where / ".git/objects" / part).stat().st_mode) for part in (o[:2], f"{o[:2]}/{o[2:]}")]
        for o in (oid, theirs)
    ]
    assert modes[0] == modes[1]
    assert git(where, "cat-file", "blob", oid) == "ours"


def test_an_object_that_is_missing_is_not_committed(project: Path) -> None:
    """As when an agent's `git gc --prune=now` took the recorded bytes of a document."""
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    gone = "12" * 20
    with pytest.raises(GitError, match=f"object {gone} is missing"):
        repo.commit([Entry("a", "100644", gone)], "text")
    assert git(project, "rev-parse", "HEAD") == head
    assert git(project, "status", "-s") == ""


@pytest.mark.slow
def test_sha256(tmp_path: Path) -> None:
    where = tmp_path / "repo"
    git(tmp_path, "init", "-q", "--object-format=sha256", "repo")
    fill(where)
    repo = Repo.open(where)
    for n in range(2):
        (where / "a").write_text(f"{n}\n")
        snapshot = repo.snapshot(f"refs/orchestrator/snapshots/run/{n}")
        assert repo.commit([repo.blob(where / "a", b"%d\n" % n)], "text") == git(where, "rev-parse", "HEAD")
        assert repo.changes("HEAD", snapshot.tree) == []
    assert git(where, "fsck", "--strict", "--no-progress") == ""
    assert git(where, "status", "-s") == ""


# ==== Files and refs ==============================================================================


def test_a_filter_that_comes_later_is_heeded(project: Path) -> None:
    repo = Repo.open(project)
    git(project, "config", "filter.loud.clean", "tr a-z A-Z")
    assert repo.read_blob(repo.blob(project / "a", b"text\n").oid) == b"text\n"
    (project / ".gitattributes").write_text("a filter=loud\n")
    assert repo.read_blob(repo.blob(project / "a", b"text\n").oid) == b"TEXT\n"
    (project / ".gitattributes").write_text("a text eol=crlf\n")
    assert repo.read_blob(repo.blob(project / "a", b"line\r\n").oid) == b"line\n"


@pytest.mark.parametrize("pack", [False, True])
def test_snapshot_refs_are_refs_like_any_other(project: Path, pack: bool) -> None:
    repo, stem = Repo.open(project), "refs/orchestrator/snapshots/run/"
    for n in range(3):
        repo.snapshot(f"{stem}{n}")
        if pack and n == 1:
            git(project, "pack-refs", "--all")
    listed = git(project, "for-each-ref", "--format=%(refname) %(objectname)", stem).splitlines()
    assert repo.refs(stem) == dict(line.split(" ") for line in listed)
    assert len(listed) == 3
    assert git(project, "fsck", "--no-progress") == ""
    repo.drop_refs(repo.refs(stem))
    assert repo.refs(stem) == {}
    assert git(project, "for-each-ref", stem) == ""


HEADS: dict[str, Prepare] = {
    "loose": script(":"),
    "packed_ref": script("git pack-refs --all"),
    "symbolic": script("git symbolic-ref refs/heads/other refs/heads/main && git symbolic-ref HEAD refs/heads/other"),
    "detached": script("git switch -q --detach"),
    "unborn": script("git switch -q --orphan new"),
    "symlink": script("rm .git/HEAD && ln -s refs/heads/main .git/HEAD"),
}


@pytest.mark.parametrize("prepare", table(HEADS, slow="packed_ref detached unborn symlink"))
def test_head_is_what_git_says(project: Path, prepare: Prepare) -> None:
    prepare(project)
    repo = Repo.open(project)
    assert repo.head() == repo._head_by_git()


def test_a_large_file_is_not_read_again_for_every_snapshot(project: Path) -> None:
    """The index knows the times of a large file after our commit of it, as after `git add`."""
    repo, data = Repo.open(project), b"x" * 80 * 10_000
    (project / "large").write_bytes(data)
    assert repo.commit([repo.blob(project / "large", data)], "text")
    debug = git(project, "ls-files", "--debug", "large")
    assert f"size: {len(data)}" in debug


def test_an_object_of_another_user_is_stored_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared repository: its times cannot be set, so it is replaced, as git does it."""

    def refuse(path: Path) -> None:
        if Path(path).exists():
            raise PermissionError(1, "Operation not permitted", str(path))
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    expected = git(project, "rev-parse", "HEAD:a")
    assert Repo.open(project).blob(project / "a", b"a\n").oid == expected
    assert git(project, "fsck", "--no-dangling", "--no-progress") == ""


def test_what_could_not_be_stored_is_not_forgotten(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git may be called where its failure does not matter: a ref may yet name the objects."""

    def fail(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    objects = Repo.open(project)._objects
    oid = objects.write(b"blob", b"not stored yet\n")
    with monkeypatch.context() as full:
        full.setattr(gitutil, "_git_flush", fail)
        with pytest.raises(GitError, match="No space left"):
            objects.settle()
    objects.settle()
    assert git(project, "cat-file", "-p", oid) == "not stored yet"
