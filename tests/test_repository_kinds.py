"""Snapshots, commits and restores in repositories that are set up in less usual ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gitutil import Repo, Snapshot
from tests.conftest import sh


@pytest.fixture
def project(make_repo: Callable[..., Path]) -> Path:
    return make_repo()


def git(where: Path, *args: str) -> str:
    return sh(where, "git", *args).strip()


def phase(repo: Repo, name: str, data: bytes) -> tuple[Snapshot, Snapshot]:
    """What a phase that writes one file finds and leaves."""
    before = repo.snapshot()
    (repo.top / name).write_bytes(data)
    return before, repo.snapshot()


def test_a_commit_that_stands_for_another_is_built_upon(project: Path) -> None:
    """`git replace`: what only the replacement of HEAD holds is neither new nor deleted."""
    (project / "more").write_text("1\n")
    git(project, "add", "more")
    tree = git(project, "write-tree")
    git(project, "replace", "HEAD", git(project, "commit-tree", tree, "-m", "In its place"))
    repo = Repo.open(project)
    before, after = phase(repo, "file", b"1\n")
    assert (before.tree, before.staging) == (tree, [])
    commit = repo.commit([change.after for change in repo.changes(before.tree, after.tree)], "Add")
    assert git(project, "diff", "--name-status", "HEAD~", str(commit)) == "A\tfile"
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_ref_of_a_shared_repository_can_be_read_by_the_others(project: Path, umask: int) -> None:
    """Else their fetch, clone and gc fail at it."""
    sh(project, "git", "init", "-q", "--shared=group")
    repo, old = Repo.open(project), os.umask(umask)
    try:
        for name in "abc":  # the first one is made by git
            repo.snapshot(f"refs/orchestrator/snapshots/{name}")
    finally:
        os.umask(old)
    files = (project / ".git/refs/orchestrator/snapshots").iterdir()
    modes = {file.name: file.stat().st_mode & 0o660 for file in files}
    assert modes == dict.fromkeys("abc", 0o660)


def test_a_file_with_other_line_ends_is_clean_when_it_is_put_back(project: Path) -> None:
    """Agents write LF, the checkout has CRLF: the sizes differ, which is all that git looks at."""
    (project / ".gitattributes").write_text("*.bat eol=crlf\n")
    (project / "run.bat").write_bytes(b"1\n2\n")
    git(project, "add", ".")
    git(project, "commit", "-qm", "With LF on disk")
    git(project, "status")  # notes its size
    repo = Repo.open(project)
    before, after = phase(repo, "run.bat", b"wrong\n")
    repo.restore(before, repo.changes(before.tree, after.tree))
    assert (project / "run.bat").read_bytes() == b"1\r\n2\r\n"
    assert repo.dirty_paths() == []
