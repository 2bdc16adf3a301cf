"""Snapshots, commits and restores in repositories that are set up in less usual ways."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gitutil import GitError, Repo, Snapshot
from tests.conftest import sh


@pytest.fixture
def repository(make_repo: Callable[..., Path]) -> Path:
    return make_repo()


def git(where: Path, *args: str) -> str:
    return sh(where, "git", *args).strip()


def phase(repo: Repo, name: str, data: bytes) -> tuple[Snapshot, Snapshot]:
    """What a phase that writes one file finds and leaves."""
    before = repo.snapshot()
    (repo.top / name).write_bytes(data)
    return before, repo.snapshot()


def test_a_commit_that_stands_for_another_is_built_upon(repository: Path) -> None:
    """`git replace`: what only the replacement of HEAD holds is neither new nor deleted."""
    (repository / "more").write_text("1\n")
    git(repository, "add", "more")
    tree = git(repository, "write-tree")
    git(repository, "replace", "HEAD", git(repository, "commit-tree", tree, "-m", "In its place"))
    repo = Repo.open(repository)
    before, after = phase(repo, "file", b"1\n")
    assert (before.tree, before.staging) == (tree, [])
    commit = repo.commit([change.after for change in repo.changes(before.tree, after.tree)], "Add")
    assert git(repository, "diff", "--name-status", "HEAD~", str(commit)) == "A\tfile"
    assert git(repository, "status", "--porcelain") == ""


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_ref_of_a_shared_repository_can_be_read_by_the_others(repository: Path, umask: int) -> None:
    """Else their fetch, clone and gc fail at it."""
    sh(repository, "git", "init", "-q", "--shared=group")
    repo, old = Repo.open(repository), os.umask(umask)
    try:
        for name in "abc":  # the first one is made by git
            repo.snapshot(f"refs/orchestrator/snapshots/{name}")
    finally:
        os.umask(old)
    files = (repository / ".git/refs/orchestrator/snapshots").iterdir()
    modes = {file.name: file.stat().st_mode & 0o660 for file in files}
    assert modes == dict.fromkeys("abc", 0o660)


def test_a_file_with_other_line_ends_is_clean_when_it_is_put_back(repository: Path) -> None:
    """Agents write LF, the checkout has CRLF: the sizes differ, which is all that git looks at."""
    (repository / ".gitattributes").write_text("*.bat eol=crlf\n")
    (repository / "run.bat").write_bytes(b"1\n2\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "With LF on disk")
    git(repository, "status")  # notes its size
    repo = Repo.open(repository)
    before, after = phase(repo, "run.bat", b"wrong\n")
    repo.restore(before, repo.changes(before.tree, after.tree))
    assert (repository / "run.bat").read_bytes() == b"1\r\n2\r\n"
    assert repo.dirty_paths() == []


@pytest.mark.slow
def test_what_a_sparse_and_partial_clone_leaves_out_is_not_lost(project: Any) -> None:
    """The worklog goes on from what git has, the agent finds the documents, and history is read."""
    project.configure("plan build!")
    project.backlog("WRK-001 ready", "WRK-002 ready")
    project.script({"*/plan": [{"document": "plan.md"}], "*/build": [{"sh": "cat changes/WRK-001_*/plan.md >built"}]})
    project.commit_all()
    project.run("run", "--cap", "1")
    project.git("config", "uploadpack.allowFilter", "true")
    clone = project.root.with_name("clone")
    sh(project.root, "git", "clone", "-q", "--sparse", "--filter=blob:none", f"file://{project.root}", str(clone))
    project.root = clone
    assert not (clone / "_worklog").exists()
    project.run("run", "--cap", "1")
    assert (clone / "built").read_text() == "WRK-001 plan 1\n"
    changed = project.git("diff", "--numstat", "origin/main", "HEAD", "--", "_worklog", "changes")
    assert re.fullmatch(r"\d+\t0\t_worklog/.*\n", changed)
    assert "plan done" in project.run("log", "WRK-001").stdout
    project.git("status")  # else git takes the file for edited, and lets it be
    project.git("sparse-checkout", "reapply")
    assert not (clone / "_worklog").exists()
    project.run("close", "WRK-002", "--reason", "not wanted")
    assert project.git("diff", "--numstat", "--", "_worklog").split()[1] == "0"


@pytest.mark.parametrize("damage", [b"", bytes(20)], ids=["empty", "zeros"])
def test_nothing_is_put_back_while_git_holds_it_only_damaged(repository: Path, damage: bytes) -> None:
    """After a power cut an object of an agent's `git add` may be empty; git takes it for stored."""
    repo = Repo.open(repository)
    before = repo.snapshot()
    (repository / "work").write_text("of an hour\n")
    git(repository, "add", "work")
    oid = git(repository, "hash-object", "work")
    place = repository / ".git/objects" / oid[:2] / oid[2:]
    place.chmod(0o644)
    place.write_bytes(damage)
    repo = Repo.open(repository)
    with pytest.raises(GitError, match=f"{place}.* is damaged|loose object {oid} .* is corrupt"):
        repo.salvage("refs/orchestrator/salvage/1", repo.snapshot(), "Salvaged")
    assert repo.refs("refs/orchestrator/") == {}
    place.unlink()
    after = repo.snapshot()
    repo.salvage("refs/orchestrator/salvage/1", after, "Salvaged")
    repo.restore(before, repo.changes(before.tree, after.tree))
    assert not (repository / "work").exists()
    assert git(repository, "show", "refs/orchestrator/salvage/1:work") == "of an hour"


def test_an_object_that_a_power_cut_has_emptied_is_stored_again(repository: Path) -> None:
    repo = Repo.open(repository)
    journaled = repo.blob(repository / "new", b"new\n")
    place = repository / ".git/objects" / journaled.oid[:2] / journaled.oid[2:]
    place.parent.mkdir(exist_ok=True)
    place.touch()
    repo = Repo.open(repository)
    with pytest.raises(GitError, match=f"{place} is damaged"):
        repo.commit([journaled], "New")
    assert repo.commit([repo.blob(repository / "new", b"new\n")], "New")
    assert git(repository, "fsck", "--strict") == ""


@pytest.mark.parametrize("setting", ["log.showRoot=false", "i18n.logOutputEncoding=latin1"])
def test_history_is_read_whole_whatever_the_operator_likes_to_see(repository: Path, setting: str) -> None:
    git(repository, "config", *setting.split("="))
    git(repository, "commit", "-q", "--amend", "-m", "Größe")
    versions = Repo.open(repository).file_versions("README.md")
    assert [version.message for version in versions] == ["Größe\n"]


def test_a_shallow_clone_does_not_know_what_is_no_longer_in_history(repository: Path) -> None:
    """An item whose last phase was before the cut is not told that history was rewritten."""
    old = git(repository, "rev-parse", "HEAD")
    git(repository, "commit", "-q", "--allow-empty", "-m", "Second")
    git(repository, "commit", "-q", "--allow-empty", "-m", "Third")
    shallow = repository.with_name("shallow")
    git(repository, "clone", "-q", "--depth=1", f"file://{repository}", str(shallow))
    repo = Repo.open(shallow)
    assert repo.is_ancestor(git(shallow, "rev-parse", "HEAD"))
    with pytest.raises(GitError, match="git fetch --unshallow"):
        repo.is_ancestor(old)
    git(shallow, "fetch", "-q", "--depth=1", "origin", old)
    with pytest.raises(GitError, match="git fetch --unshallow"):
        repo.is_ancestor(old)
    git(shallow, "fetch", "-q", "--unshallow")
    assert repo.is_ancestor(old)


def test_what_is_staged_of_an_ignored_submodule_is_seen(repository: Path) -> None:
    (repository / "sub").mkdir()
    (repository / ".gitmodules").write_text('[submodule "s"]\npath = sub\nurl = .\nignore = all\n')
    ours, theirs = ("160000," + digit * 40 + ",sub" for digit in "12")
    git(repository, "add", ".")
    git(repository, "update-index", "--add", "--cacheinfo", ours)
    git(repository, "commit", "-q", "-m", "With a submodule")
    git(repository, "update-index", "--cacheinfo", theirs)
    repo = Repo.open(repository)
    before = repo.snapshot()
    git(repository, "reset", "-q")
    repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert git(repository, "ls-files", "-s", "sub") == f"160000 {'2' * 40} 0\tsub"


def test_a_garbage_collection_may_remove_an_empty_folder_at_any_moment(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git gc` beside a run: that the folder of an object was there a moment ago says nothing."""
    repo = Repo.open(repository)
    with monkeypatch.context() as moment_ago:
        moment_ago.setattr(Path, "is_dir", lambda _: True)
        oid = repo._objects.write(b"blob", b"new\n")
        repo._objects.settle()
    assert git(repository, "cat-file", "-p", oid) == "new"


@pytest.mark.slow
def test_check_does_not_offer_to_drop_the_snapshots_of_a_run_in_another_work_tree(project: Any) -> None:
    project.configure("build!")
    project.backlog("WRK-001 ready")
    project.script({"*": [{"announce": True, "hang": True}]})
    project.commit_all()
    project.git("worktree", "add", "-q", "-b", "other", "../other")
    process = project.start("run")
    assert project.announced()
    assert "refs/orchestrator/snapshots/" in project.git("for-each-ref")
    here, project.root = project.root, project.root.with_name("other")
    assert "snapshot" not in project.run("check").stdout
    project.root = here
    process.terminate()
    project.finish(process, 143)
