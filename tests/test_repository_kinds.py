"""Snapshots, commits and restores in repositories that are set up in less usual ways."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gitutil import GitError, Repo, Snapshot
from tests.conftest import sh
from tests.gitkit import salvage, table


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


KINDS = {
    "plain": "",
    "split_index": "git update-index --split-index",
    "index_v4_untracked_cache": "git update-index --index-version 4 --untracked-cache",
    "sparse": "git sparse-checkout set d",
    "sparse_index": "git sparse-checkout set --cone --sparse-index d",
    "sparse_without_cones": "git sparse-checkout set --no-cone '/*' '!/e/'",
    "packed": "git gc -q && git pack-refs --all",
    "shared": "git init -q --shared=group",
    "latin1": "git config i18n.commitEncoding latin1 && git config core.quotePath true",
    "without_executable_bits": "git config core.fileMode false",
    "linked": "git worktree add -q -b other ../here",
    "shallow": "git commit -q --allow-empty -m 2 && git clone -q --depth=1 file://$PWD ../here",
    "partial": "git config uploadpack.allowFilter 1 && git clone -q --filter=blob:none file://$PWD ../here",
    "borrowing": "git clone -qs . ../here",
    "sha256": "git init -q --object-format=sha256 ../here && cp -r [!.]* ../here && cd ../here && git add . && git commit -qm 1",
    "reftable": "git clone -q --ref-format=reftable . ../here",
}


QUICK = ("sparse", "linked")


@pytest.mark.parametrize("kind", table(dict(zip(KINDS, KINDS, strict=True)), slow=" ".join(KINDS.keys() - set(QUICK))))
def test_a_phase_is_committed_and_another_one_put_back(repository: Path, kind: str) -> None:
    """What the operator staged and left untracked is as it was after both."""
    if kind == "reftable" and "ref-format" not in sh(repository, "git", "clone", "-h", check=False):
        pytest.skip("this git knows no reftable")
    for name in ("a", "d/x", "d/y", "e/out", "staged", "ä b", "state"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(f"{name}\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "Files")
    sh(repository, "sh", "-ec", KINDS[kind])
    here = repository.with_name("here")
    where = here if here.exists() else repository
    (where / "staged").write_text("theirs\n")
    git(where, "add", "staged")
    (where / "mine").write_text("untracked\n")
    as_it_was = git(where, "status", "--porcelain")
    repo, agent = Repo.open(where), "echo 1 >a; rm d/x; mkdir -p new; echo 1 >new/f; echo 1 >'ä b'; git add -A --sparse; mkdir other; echo 1 >other/late"
    before = repo.snapshot("refs/orchestrator/snapshots/1")
    sh(where, "sh", "-ec", agent)
    after = repo.snapshot()
    repo.restage(before, after)
    commit = repo.commit([change.after for change in repo.changes(before.tree, after.tree)], "Größe")
    assert commit == git(where, "rev-parse", "HEAD")
    raw = git(where, "diff-tree", "-r", "-z", "--name-status", "HEAD^", "HEAD")
    assert raw == "\0".join(("M", "a", "D", "d/x", "A", "new/f", "A", "other/late", "M", "ä b", ""))
    assert git(where, "status", "--porcelain") == as_it_was
    assert git(where, "log", "-1", "--format=%s", "--encoding=utf8") == "Größe"

    before = repo.snapshot("refs/orchestrator/snapshots/2")
    sh(where, "sh", "-ec", "rm -r d; echo 2 >d; echo 2 >a; rm mine new/f; rmdir new; echo 2 >more; git add -A --sparse")
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    salvage(repo, "refs/orchestrator/salvage/1", after, "Salvaged")
    repo.restore(before, changes)
    repo.restage(before, after)
    assert git(where, "status", "--porcelain") == as_it_was
    assert repo.snapshot() == before == Repo.open(where).snapshot()
    assert git(where, "show", "refs/orchestrator/salvage/1:d") == "2"

    (where / "state").write_text("decided\n")
    done = repo.commit_state(where / "state", b"decided\n", "State")
    assert (done.outcome, done.warning) == ("committed", None)
    assert git(where, "diff-tree", "-r", "--name-only", "HEAD^", "HEAD") == "state"
    repo.drop_refs(repo.refs("refs/orchestrator/"))
    assert git(where, "for-each-ref", "refs/orchestrator/") == ""
    assert git(where, "status", "--porcelain") == as_it_was
    assert git(where, "fsck", "--strict", "--no-dangling", "--no-progress") == ""
    assert not list(repo.git_dir.glob("orchestrator-*"))


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
    script = {"*/plan": [{"document": "plan.md"}], "*/build": [{"sh": "cat changes/WRK-001_*/plan.md >built"}]}
    project.set_up("WRK-001 ready", "WRK-002 ready", script=script)
    project.run("run", "--cap", "1")
    project.git("config", "uploadpack.allowFilter", "true")
    clone = project.root.with_name("clone")
    sh(project.root, "git", "clone", "-q", "--sparse", "--filter=blob:none", f"file://{project.root}", str(clone))
    project.root = clone
    assert not (clone / "_worklog").exists()
    project.run("run", "--cap", "1")
    assert (clone / "built").read_text() == "WRK-001 plan 1\n"
    assert "## Previous Phase Summary\n\n> plan done\n" in (project.outside / "prompt-WRK-001-build-1.md").read_text()
    changed = project.git("diff", "--numstat", "origin/main", "HEAD", "--", "_worklog", "changes")
    assert re.fullmatch(r"\d+\t0\t_worklog/.*\n", changed)
    assert "plan done" in project.run("log", "WRK-001").stdout
    project.git("status")  # else git takes the file for edited, and lets it be
    project.git("sparse-checkout", "reapply")
    assert not (clone / "_worklog").exists()
    project.run("close", "WRK-002", "--reason", "not wanted")
    assert project.git("diff", "--numstat", "--", "_worklog").split()[1] == "0"


def test_nothing_is_put_back_while_git_holds_it_only_damaged(repository: Path) -> None:
    """After a power cut an object of an agent's `git add` may be empty; git takes it for stored."""
    repo = Repo.open(repository)
    before = repo.snapshot()
    (repository / "work").write_text("of an hour\n")
    git(repository, "add", "work")
    oid = git(repository, "hash-object", "work")
    place = repository / ".git/objects" / oid[:2] / oid[2:]
    place.chmod(0o644)
    for damage in (bytes(20), b""):
        place.write_bytes(damage)
        repo = Repo.open(repository)
        with pytest.raises(GitError, match=f"object {oid} is missing or damaged.* {place}|loose object {oid} .* is corrupt"):
            salvage(repo, "refs/orchestrator/salvage/1", repo.snapshot(), "Salvaged")
        assert repo.refs("refs/orchestrator/") == {}
    place.unlink()
    after = repo.snapshot()
    salvage(repo, "refs/orchestrator/salvage/1", after, "Salvaged")
    repo.restore(before, repo.changes(before.tree, after.tree))
    assert not (repository / "work").exists()
    assert git(repository, "show", "refs/orchestrator/salvage/1:work") == "of an hour"


def test_history_is_read_whole_whatever_the_operator_likes_to_see(repository: Path) -> None:
    git(repository, "commit", "-q", "--amend", "-m", "Größe")
    for setting in ("log.showRoot=false", "i18n.logOutputEncoding=latin1"):
        git(repository, "config", *setting.split("="))
        versions = Repo.open(repository).old_versions("README.md", "HEAD")
        assert versions == [(repository / "README.md").read_bytes()]


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


def test_a_shallow_clone_does_not_know_what_is_no_longer_in_history(repository: Path) -> None:
    old = git(repository, "rev-parse", "HEAD")
    git(repository, "commit", "-q", "--allow-empty", "-m", "Second")
    git(repository, "clone", "-q", "--depth=1", f"file://{repository}", "../shallow")
    repo = Repo.open(repository.with_name("shallow"))
    assert repo.is_ancestor("HEAD")
    assert not repo.is_ancestor(old)
    git(repo.top, "fetch", "-q", "--unshallow")
    assert repo.is_ancestor(old)
