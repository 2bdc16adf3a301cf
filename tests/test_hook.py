"""hooks/pre-commit on real repositories: warns when BACKLOG.yaml is left dirty, never blocks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parent.parent / "hooks" / "pre-commit"
WARNING = (
    "warning: BACKLOG.yaml has changes that are not in this commit.\n"
    "         To commit them as well: git add BACKLOG.yaml && git commit --amend --no-edit\n"
)


def git(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["git", *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def commit(root: Path, *argv: str) -> str:
    """Make a commit; what the hook said."""
    before = git(root, "rev-parse", "HEAD").stdout
    said = git(root, "commit", "-q", "-m", "Mine", *argv).stderr
    assert git(root, "rev-parse", "HEAD").stdout != before
    return said


def install(root: Path) -> None:
    """As the README says."""
    folder = Path(git(root, "rev-parse", "--git-common-dir").stdout.strip())
    target = (root / folder / "hooks" / "pre-commit").resolve()
    target.parent.mkdir(exist_ok=True)
    shutil.copy(HOOK, target)
    target.chmod(0o755)


@pytest.fixture
def root(make_repo: Callable[..., Path]) -> Path:
    root = make_repo()
    (root / "BACKLOG.yaml").write_text("one\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Backlog")
    install(root)
    (root / "README.md").write_text("edited\n")
    git(root, "add", "README.md")
    return root


def test_silent_when_the_backlog_is_clean(root: Path) -> None:
    assert commit(root) == ""


def test_silent_when_the_backlog_is_part_of_the_commit(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    git(root, "add", "BACKLOG.yaml")
    assert commit(root) == ""


def test_warns_when_the_backlog_is_dirty(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    assert commit(root) == WARNING
    assert git(root, "status", "--porcelain").stdout == " M BACKLOG.yaml\n"


def test_warns_when_the_backlog_changed_after_it_was_staged(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    git(root, "add", "BACKLOG.yaml")
    (root / "BACKLOG.yaml").write_text("three\n")
    assert commit(root) == WARNING
    assert git(root, "show", "HEAD:BACKLOG.yaml").stdout == "two\n"


def test_warns_when_the_backlog_is_untracked(root: Path) -> None:
    git(root, "rm", "-q", "--cached", "BACKLOG.yaml")
    assert commit(root) == WARNING


def test_warns_when_the_backlog_is_deleted(root: Path) -> None:
    (root / "BACKLOG.yaml").unlink()
    assert commit(root) == WARNING


def test_silent_with_commit_all(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    assert commit(root, "-a") == ""
    assert git(root, "status", "--porcelain").stdout == ""


def test_silent_with_commit_of_the_backlog_by_name(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    assert commit(root, "BACKLOG.yaml") == ""
    assert git(root, "status", "--porcelain").stdout == "M  README.md\n"


def test_warns_with_commit_of_another_file_by_name(root: Path) -> None:
    """Also when the backlog is staged: it is not part of such a commit."""
    (root / "BACKLOG.yaml").write_text("two\n")
    assert commit(root, "README.md") == WARNING
    (root / "README.md").write_text("again\n")
    git(root, "add", "BACKLOG.yaml")
    commit(root, "README.md")
    assert git(root, "show", "HEAD:BACKLOG.yaml").stdout == "one\n"


def test_silent_without_a_backlog(make_repo: Callable[..., Path]) -> None:
    root = make_repo()
    install(root)
    assert commit(root, "--allow-empty") == ""


def test_in_a_linked_worktree_it_looks_at_the_backlog_there(root: Path) -> None:
    git(root, "commit", "-q", "-m", "Rest")
    (root / "BACKLOG.yaml").write_text("dirty in the main one\n")
    linked = root.parent / "linked"
    git(root, "worktree", "add", "-q", "-b", "other", str(linked))
    assert commit(linked, "--allow-empty") == ""
    (linked / "BACKLOG.yaml").write_text("dirty here\n")
    assert commit(linked, "--allow-empty") == WARNING


def test_from_a_subfolder(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    (root / "sub").mkdir()
    assert commit(root / "sub") == WARNING


def test_on_the_first_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    install(tmp_path)
    (tmp_path / "BACKLOG.yaml").write_text("one\n")
    said = git(tmp_path, "commit", "-q", "--allow-empty", "-m", "First").stderr
    assert said == WARNING


def test_silent_in_the_commits_of_a_run_and_of_its_agents(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    monkeypatch.setenv("ORCHESTRATOR_RUN_ID", "20260101T000000-abc")
    assert commit(root) == ""


@pytest.mark.parametrize("damage", ["index", "no git"])
def test_it_never_blocks(root: Path, damage: str) -> None:
    """Whatever goes wrong inside, the hook itself exits 0 and prints no more than its warning."""
    (root / "BACKLOG.yaml").write_text("two\n")
    path = "/usr/bin:/bin"
    if damage == "index":
        (root / ".git" / "index").write_text("nonsense")
    else:
        path = str(root / "empty")
    done = subprocess.run(["/bin/sh", str(HOOK)], cwd=root, env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_changes_nothing(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text("two\n")
    index = (root / ".git" / "index").read_bytes()
    done = subprocess.run(["/bin/sh", str(HOOK)], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, WARNING)
    assert (root / ".git" / "index").read_bytes() == index


def test_it_is_plain_sh() -> None:
    assert HOOK.read_text().startswith("#!/bin/sh\n")
    assert subprocess.run(["sh", "-n", str(HOOK)], capture_output=True).returncode == 0
    assert HOOK.stat().st_mode & 0o111 == 0o111
