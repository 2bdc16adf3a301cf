"""Committing BACKLOG.yaml alone, in whatever state the operator's repository is.

Real git in real repositories. Most cases only differ in how the repository was prepared, so they are
tables: a preparation, and what must be true afterwards.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import gitutil
from gitutil import Entry, GitError, HeadBusy, Repo, StateCommit
from tests.conftest import IDENTITY, sh

MESSAGE = "[orchestrator] Save backlog state on halt (CapReached)"
OLD, NEW = b"v: 1\n", b"v: 2\n"
NAME = "BACKLOG.yaml"
Prepare = Callable[[Path], object]


def table(rows: Mapping[str, object], slow: str = "") -> list[object]:
    """Parameters named by their keys; those named in `slow` run only when asked for."""
    marks = dict.fromkeys(slow.split(), pytest.mark.slow)
    assert marks.keys() <= rows.keys()
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=marks.get(name, ()))
        for name, row in rows.items()
    ]




@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a few files, copied for each test: cheaper than making it anew."""
    where = tmp_path_factory.mktemp("template") / "project"
    (where / "src").mkdir(parents=True)
    files = {NAME: OLD, "a.txt": b"a1\na2\na3\n", "b.txt": b"b\n", "d.txt": b"d\n", "src/c.py": b"c\n"}
    for name, data in files.items():
        (where / name).write_bytes(data)
    env = {**os.environ, **IDENTITY, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    for command in ("init -q -b main", "add -A", "commit -q -m Start"):
        subprocess.run(["git", *command.split()], cwd=where, env=env, check=True)
    shutil.rmtree(where / ".git/hooks", ignore_errors=True)
    return where


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    where = tmp_path / "project"
    shutil.copytree(template, where, symlinks=True)
    return where


def git(where: Path, *args: str, check: bool = True) -> str:
    """A git command of the test's own; the hooks under test are for the orchestrator's calls."""
    quiet = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false")
    return sh(where, "git", *quiet, *args, check=check)


def no_delay(_: float) -> None:
    pass


def save(where: Path, data: bytes = NEW, *, expect_branch: str | None = None) -> StateCommit:
    """What the orchestrator does at a halt: the file is on disk, and those bytes are committed."""
    (where / NAME).write_bytes(data)
    return commit(where, data, expect_branch=expect_branch)


def commit(where: Path, data: bytes = NEW, *, expect_branch: str | None = None) -> StateCommit:
    repo = Repo.open(where, delay=no_delay)
    return repo.commit_state(where / NAME, data, MESSAGE, expect_branch=expect_branch)


def blob(where: Path, name: str) -> bytes:
    done = subprocess.run(["git", "cat-file", "blob", name], cwd=where, capture_output=True, check=True)
    return done.stdout


def others(where: Path) -> str:
    """The index entries of all other paths, with flags and cached times."""
    listed = git(where, "ls-files", "-s", "--debug")
    blocks = listed.replace("\n  ", "\0  ").splitlines()
    return "\n".join(block for block in blocks if not block.split("\0")[0].endswith(NAME))


def work_tree(where: Path) -> dict[str, tuple[int, bytes]]:
    """Every file outside of .git: its mode and content."""
    found = {}
    for path in sorted(where.rglob("*")):
        name = str(path.relative_to(where))
        mode = path.lstat().st_mode
        if not name.startswith(".git/") and not stat.S_ISDIR(mode):
            regular = stat.S_ISREG(mode)
            found[name] = mode, path.read_bytes() if regular else b""
    return found


def leftovers(where: Path) -> list[str]:
    folder = Path(git(where, "rev-parse", "--absolute-git-dir").strip())
    return [str(p) for pattern in ("**/*.lock", "orchestrator-*-*") for p in folder.glob(pattern)]


def assert_only_the_backlog(where: Path, made: StateCommit, before: str | None) -> None:
    """The branch advanced by one commit that holds one path, and nothing is left to commit of it."""
    assert (made.outcome, made.warning) == ("committed", None)
    assert git(where, "rev-parse", "HEAD").strip() == made.commit
    assert git(where, "log", "-1", "--format=%P").split() == ([before] if before else [])
    assert git(where, "log", "-1", "--format=%B").rstrip("\n") == MESSAGE
    changed = git(where, "diff-tree", "-r", "--root", "--no-commit-id", "--name-only", "HEAD")
    assert changed.split() == [NAME]
    assert git(where, "status", "--porcelain", "--", NAME) == ""
    assert leftovers(where) == []
    assert git(where, "fsck", "--no-dangling", "--no-progress", "--connectivity-only") == ""


# ---- committed -----------------------------------------------------------------------------------


def stage_everything(where: Path) -> None:
    """The operator's staging: edited, partly staged, new, deleted, intended, untracked."""
    (where / "a.txt").write_bytes(b"a1 staged\na2\na3\n")
    git(where, "add", "a.txt")
    (where / "a.txt").write_bytes(b"a1 staged\na2\na3 not staged\n")
    (where / "new-staged.txt").write_bytes(b"new\n")
    (where / "intended.txt").write_bytes(b"later\n")
    git(where, "add", "new-staged.txt")
    git(where, "add", "-N", "intended.txt")
    git(where, "rm", "-q", "--cached", "src/c.py")
    (where / "b.txt").write_bytes(b"b edited\n")
    (where / "untracked.txt").write_bytes(b"untracked\n")


def write(name: str, data: str) -> Prepare:
    return lambda where: (where / name).write_text(data)


def run(*commands: str) -> Prepare:
    def prepare(where: Path) -> None:
        sh(where, "sh", "-ec", "\n".join(commands))

    return prepare


def failing_hooks(body: str) -> Prepare:
    """Every hook; a git that the hook itself calls runs none: that would never end."""
    guard = "test -z \"$INSIDE_A_HOOK\" || exit 0\nexport INSIDE_A_HOOK=1"

    def prepare(where: Path) -> None:
        folder = where / ".git/hooks"
        folder.mkdir(exist_ok=True)
        for name in ["pre-commit", "prepare-commit-msg", "commit-msg", "post-commit", "reference-transaction", "post-index-change", "fsmonitor-watchman"]:
            (folder / name).write_text(f"#!/bin/sh\n{guard}\n{body}\n")
            (folder / name).chmod(0o755)
        git(where, "config", "core.fsmonitor", str(folder / "fsmonitor-watchman"))

    return prepare


HOSTILE_SETTINGS = run(
    "git config commit.gpgSign true",
    "git config gpg.program /nonexistent",
    "git config core.editor 'sleep 60'",
    "git config core.pager 'sleep 60'",
    "git config commit.template /nonexistent",
    "git config commit.verbose true",
    "git config commit.cleanup strip",
    "git config core.commentChar '['",
    "git config i18n.commitEncoding ISO-8859-1",
    "git config status.showUntrackedFiles no",
    "git config core.quotePath true",
    "git config diff.noprefix true",
    "git config diff.renames copies",
    "git config log.showSignature true",
)

COMMITTED: Mapping[str, Prepare] = {
    "modified_unstaged": lambda where: None,
    "modified_staged": run(f"echo 'v: 2' > {NAME}", f"git add {NAME}"),
    "staged_older_than_worktree": run(f"echo 'v: 1.5' > {NAME}", f"git add {NAME}"),
    "staged_deletion_file_present": run(f"git rm -q --cached {NAME}"),
    "other_staged_everything": stage_everything,
    "a01_other_file_staged": run("echo x > a.txt", "git add a.txt"),
    "a10_renamed_onto_it": run(f"git rm -q --cached {NAME}", f"git mv -f a.txt {NAME}"),
    "untracked": run(f"git rm -q --cached {NAME}", "git commit -q -m gone"),
    "untracked_ita": run(f"git rm -q --cached {NAME}", "git commit -q -m gone", f"git add -N {NAME}"),
    "ignored_tracked": write(".gitignore", f"{NAME}\n"),
    "ignored_but_staged": run(
        f"git rm -q --cached {NAME}", "git commit -q -m gone", f"echo {NAME} > .gitignore", f"git add -f {NAME}"
    ),
    "sparse_noncone": run("git sparse-checkout set --no-cone '/src/' '/a.txt'"),
    "sparse_index": run("git sparse-checkout set --cone --sparse-index src"),
    "safecrlf": run("git config core.autocrlf input", "git config core.safecrlf true"),
    "merge_squash_pending": run(
        "git switch -q -c side", "echo s > side.txt && git add side.txt && git commit -q -m side",
        "git switch -q main", "git merge -q --squash side",
    ),
    "cherry_pick_n_pending": run(
        "git switch -q -c side", "echo s > side.txt && git add side.txt && git commit -q -m side",
        "git switch -q main", "git cherry-pick -n side",
    ),
    "a29_stash_pop_conflict": run(
        "echo one > a.txt && git stash -q", "echo two > a.txt && git commit -q -am two",
        "git stash pop -q || true",
    ),
    "a11_hooks_fail": failing_hooks("exit 1"),
    "a12_hooks_hang": failing_hooks("sleep 60"),
    "hook_adds_files": failing_hooks("GIT_LITERAL_PATHSPECS= git -c core.fsmonitor= add -u"),
    "hooks_path_config": run("mkdir -p h", "printf '#!/bin/sh\\nexit 1\\n' > h/pre-commit", "chmod +x h/pre-commit", "git config core.hooksPath h"),
    "a13_hostile_settings": HOSTILE_SETTINGS,
    "split_index": run("git update-index --split-index"),
    "index_v4_untracked_cache": run("git update-index --index-version 4", "git update-index --force-untracked-cache"),
    "packed_refs": run("git pack-refs --all", "git gc -q"),
    "stale_squash_message": write(".git/SQUASH_MSG", "theirs\n"),
    "leftover_of_a_crash": write(".git/orchestrator-index-x", "junk"),
}  # fmt: skip


@pytest.mark.parametrize(
    "prepare",
    table(
        COMMITTED,
        slow="modified_staged ignored_but_staged sparse_index hooks_path_config"
        " index_v4_untracked_cache packed_refs stale_squash_message a01_other_file_staged"
        " hook_adds_files safecrlf untracked_ita split_index leftover_of_a_crash a11_hooks_fail"
        " a12_hooks_hang merge_squash_pending untracked a10_renamed_onto_it"
        " cherry_pick_n_pending staged_older_than_worktree ignored_tracked",
    ),
)
def test_committed_alone(project: Path, prepare: Prepare) -> None:
    prepare(project)
    Repo.open(project).clean_leftovers()
    (project / NAME).write_bytes(NEW)
    head, index, files = git(project, "rev-parse", "HEAD").strip(), others(project), work_tree(project)
    made = commit(project)
    assert others(project) == index
    assert work_tree(project) == files
    assert_only_the_backlog(project, made, head)
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_d08_only_the_backlog_of_much_that_is_staged(project: Path) -> None:
    stage_everything(project)
    head, status = git(project, "rev-parse", "HEAD").strip(), git(project, "status", "--porcelain")
    assert_only_the_backlog(project, save(project), head)
    assert git(project, "status", "--porcelain") == status
    assert "intended.txt" not in git(project, "diff", "--cached", "--name-only").split()


@pytest.mark.parametrize("prepare", [run("git checkout -q --orphan fresh"), run("git update-ref -d HEAD")])
def test_unborn_branch_gets_a_root_commit(project: Path, prepare: Prepare) -> None:
    prepare(project)
    index = others(project)
    assert_only_the_backlog(project, save(project), None)
    assert others(project) == index


def test_a27_missing_index_deletes_nothing(project: Path) -> None:
    (project / ".git/index").unlink()
    head = git(project, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(project, save(project), head)
    assert "a.txt" in git(project, "ls-tree", "--name-only", "HEAD").split()


def test_sha256_repository(project: Path) -> None:
    shutil.rmtree(project / ".git")
    git(project, "init", "-q", "-b", "main", "--object-format=sha256")
    git(project, "add", "-A")
    assert save(project).outcome == "committed"
    (project / "a.txt").unlink()
    assert save(project, b"v: 3\n").outcome == "committed"
    before = Repo.open(project).snapshot("refs/orchestrator/snapshots/x")
    (project / "b.txt").write_text("other\n")
    repo = Repo.open(project)
    repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert (project / "b.txt").read_text() == "b\n"


@pytest.mark.slow
def test_shallow_clone(project: Path, tmp_path: Path) -> None:
    git(project, "commit", "-q", "--allow-empty", "-m", "second")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{project}", "shallow")
    where = tmp_path / "shallow"
    head = git(where, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(where, save(where), head)


def test_autocrlf_stores_line_feeds_and_eol_alone_is_no_change(project: Path) -> None:
    git(project, "config", "core.autocrlf", "true")
    assert save(project, b"v: 1\r\n").outcome == "clean"
    assert save(project, b"v: 2\r\n").outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_the_executable_bit_of_head_is_kept(project: Path) -> None:
    git(project, "update-index", "--chmod=+x", NAME)
    git(project, "commit", "-q", "-m", "executable")
    assert save(project).outcome == "committed"
    assert git(project, "ls-tree", "HEAD", NAME).startswith("100755 ")


def test_clean_filter_is_applied(project: Path) -> None:
    git(project, "config", "filter.up.clean", "tr a-z A-Z")
    (project / ".gitattributes").write_text(f"{NAME} filter=up\n")
    assert save(project).outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == b"V: 2\n"
    assert git(project, "status", "--porcelain", "--", NAME) == ""


@pytest.mark.parametrize("settings", [(), ("user.useConfigOnly",)])
def test_no_identity_borrows_ours_for_this_commit(
    project: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    for name in IDENTITY:
        monkeypatch.delenv(name)
    for setting in settings:
        git(project, "config", setting, "true")
    git(project, "config", "user.name", "")
    config = (project / ".git/config").read_bytes()
    assert save(project).outcome == "committed"
    assert git(project, "log", "-1", "--format=%an <%ae>").strip() == "orchestrator <orchestrator@localhost>"
    assert (project / ".git/config").read_bytes() == config


def test_author_reflog_and_encoding(project: Path) -> None:
    message = "[orchestrator] Überraschung ✓\n\nBody line\n"
    (project / NAME).write_bytes(NEW)
    git(project, "config", "i18n.commitEncoding", "ISO-8859-1")
    made = Repo.open(project).commit_state(project / NAME, NEW, message)
    raw = git(project, "cat-file", "commit", str(made.commit))
    assert raw.endswith(f"\n\n{message}")
    assert "encoding" not in raw.split("\n\n")[0]
    assert git(project, "log", "-1", "--format=%an %cn").strip() == "Operator Operator"
    assert git(project, "reflog", "-1", "--format=%gs").strip() == "commit: [orchestrator] Überraschung ✓"


def test_a23_variables_of_another_repository_are_not_heeded(
    project: Path, make_repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_repo("other")
    before = git(other, "rev-parse", "HEAD")
    for name, value in {
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(other / ".git/index"),
        "GIT_OBJECT_DIRECTORY": str(other / ".git/objects"),
        "GIT_ICASE_PATHSPECS": "1",
        "GIT_CONFIG_PARAMETERS": "'core.bare'='true'",
        "GIT_AUTHOR_DATE": "2001-01-01T00:00:00Z",
    }.items():
        monkeypatch.setenv(name, value)
    made = save(project)
    monkeypatch.undo()
    assert made.outcome == "committed"
    assert git(project, "rev-parse", "HEAD").strip() == made.commit
    assert not git(project, "log", "-1", "--format=%aI").startswith("2001")
    assert git(other, "rev-parse", "HEAD") == before


def test_a08_d06_project_in_a_subdirectory(project: Path) -> None:
    sub = project / "deep/er"
    sub.mkdir(parents=True)
    (sub / NAME).write_bytes(OLD)
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "sub")
    (project / NAME).write_bytes(b"top: dirty\n")
    repo = Repo.open(sub)
    assert (repo.prefix, repo.top, repo.root) == ("deep/er/", project, sub)
    assert save(sub).outcome == "committed"
    changed = git(project, "diff-tree", "-r", "--no-commit-id", "--name-only", "HEAD")
    assert changed.split() == [f"deep/er/{NAME}"]


@pytest.mark.parametrize("root", ["project", pytest.param("project/src/..", marks=pytest.mark.slow)])
def test_a09_d06_relative_root(
    project: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.chdir(project.parent)
    (project / NAME).write_bytes(NEW)
    repo = Repo.open(Path(root))
    assert repo.root == project
    assert repo.commit_state(Path(root) / NAME, NEW, MESSAGE).outcome == "committed"


def test_d09_absolute_path_through_a_symlink(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project)
    (project / NAME).write_bytes(NEW)
    made = Repo.open(project).commit_state(tmp_path / "link" / NAME, NEW, MESSAGE)
    assert made.outcome == "committed"


def test_d09_backlog_in_an_untracked_directory(project: Path) -> None:
    (project / "plan").mkdir()
    path = project / "plan" / NAME
    path.write_bytes(NEW)
    (project / "plan/other.txt").write_text("not ours\n")
    assert Repo.open(project).commit_state(path, NEW, MESSAGE).outcome == "committed"
    assert git(project, "status", "--porcelain") == "?? plan/other.txt\n"


def test_linked_worktree_commits_on_its_own_branch(project: Path, tmp_path: Path) -> None:
    git(project, "worktree", "add", "-q", "-b", "side", "../linked")
    where, main = tmp_path / "linked", git(project, "rev-parse", "main")
    made = save(where)
    assert made.outcome == "committed"
    assert git(project, "rev-parse", "side").strip() == made.commit
    assert git(project, "rev-parse", "main") == main
    repo = Repo.open(where)
    assert repo.git_dir == project / ".git/worktrees/linked"
    assert repo.common_dir == project / ".git"
    assert repo.state_dir == repo.git_dir / "orchestrator"


def test_submodule_is_a_repository_of_its_own(project: Path, make_repo: Callable[..., Path]) -> None:
    outer = make_repo("outer")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(project), "sub")
    git(outer, "commit", "-q", "-m", "sub")
    head = git(outer, "rev-parse", "HEAD")
    inner = outer / "sub"
    start = git(inner, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(inner, save(inner), start)
    assert git(outer, "rev-parse", "HEAD") == head


ODD_NAMES = ["with space.yaml", "äöü€.yaml", "-dash.yaml", "B*[a].yaml", ":(top)B.yaml", 'quo"te\\.yaml', "new\nline.yaml", os.fsdecode(b"latin-\xe4.yaml"), "data[1].yaml", " lead and trail "]  # fmt: skip


@pytest.mark.slow
def test_d04_a05_a07_odd_names_are_paths_not_patterns(project: Path) -> None:
    for other in ("Ba.yaml", "B.yaml", "data1.yaml"):
        (project / other).write_text("theirs\n")
    for name in ODD_NAMES:
        (project / name).write_bytes(NEW)
        made = Repo.open(project).commit_state(project / name, NEW, MESSAGE)
        assert made.outcome == "committed"
        changed = git(project, "diff-tree", "-r", "-z", "--no-commit-id", "--name-only", "HEAD")
        assert changed == f"{name}\0"


# ---- nothing to commit ---------------------------------------------------------------------------

CLEAN: Mapping[str, Prepare] = {
    "nothing_changed": stage_everything,
    "exec_bit_only": run(f"chmod +x {NAME}"),
    "a24_merge_pending_elsewhere": run("git rev-parse HEAD > .git/MERGE_HEAD"),
    "detached": run("git checkout -q --detach"),
}


@pytest.mark.parametrize("prepare", table(CLEAN))
def test_clean_makes_no_commit(project: Path, prepare: Prepare) -> None:
    prepare(project)
    head, index = git(project, "rev-parse", "HEAD"), (project / ".git/index").read_bytes()
    assert save(project, OLD) == StateCommit("clean", None, None)
    assert git(project, "rev-parse", "HEAD") == head
    assert (project / ".git/index").read_bytes() == index


def test_staged_but_as_in_head_mends_the_entry(project: Path) -> None:
    save(project)
    git(project, "add", NAME)
    assert save(project, OLD).outcome == "committed"
    git(project, "update-index", "--cacheinfo", f"100644,{git(project, 'rev-parse', f'HEAD^:{NAME}').strip()},{NAME}")
    assert save(project, OLD).outcome == "clean"
    assert git(project, "status", "--porcelain") == ""


def test_entry_left_behind_by_a_commit_is_mended(project: Path) -> None:
    """The branch moved, the index did not: the operator's next commit would revert the backlog."""
    old = (project / ".git/index").read_bytes()
    save(project)
    (project / ".git/index").write_bytes(old)
    assert commit(project) == StateCommit("clean", None, None)
    (project / "a.txt").write_text("theirs\n")
    git(project, "commit", "-q", "-m", "theirs", "--", "a.txt")
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_a28_a_check_does_not_write_the_index(project: Path) -> None:
    os.utime(project / "a.txt", ns=(1, 1))
    index = (project / ".git/index").stat()
    save(project, OLD)
    repo = Repo.open(project)
    repo.dirty_paths()
    repo.problems(project / NAME)
    repo.snapshot()
    after = (project / ".git/index").stat()
    assert (after.st_ino, after.st_mtime_ns) == (index.st_ino, index.st_mtime_ns)


# ---- HEAD may not move --------------------------------------------------------------------------------------

SIDE = (
    "git switch -q -c side",
    "echo side > a.txt && git commit -q -am side1",
    "echo side2 > a.txt && git commit -q -am side2",
    "git switch -q main",
    "echo main > a.txt && git commit -q -am main1",
)
BACKLOG_SIDE = (
    "git switch -q -c side",
    f"echo side > {NAME} && git commit -q -am side1",
    "git switch -q main",
    f"echo main > {NAME} && git commit -q -am main1",
)
KEPT: Mapping[str, tuple[Prepare, str]] = {
    "a02_merge_clean": (
        run("git switch -q -c side && git commit -q --allow-empty -m s && git switch -q main", "git merge -q --no-ff --no-commit side"),
        "merge",
    ),
    "merge_conflict": (run(*SIDE, "git merge -q side || true"), "merge"),
    "merge_conflict_in_backlog": (run(*BACKLOG_SIDE, "git merge -q side || true"), "merge"),
    "cherry_pick": (run(*SIDE, "git cherry-pick side || true"), "cherry-pick"),
    "cherry_pick_range": (run(*SIDE, "git cherry-pick side~2..side || true"), "cherry-pick"),
    "revert": (run(*SIDE, "echo x > a.txt && git commit -q -am x", "git revert --no-edit HEAD~1 || true"), "revert"),
    "rebase_merge": (run(*SIDE, "git rebase -q --merge side || true"), "rebase"),
    "rebase_apply": (run(*SIDE, "git rebase -q --apply side || true"), "rebase"),
    "am": (run(*SIDE, "git format-patch -q -1 side -o ../patches", "git am -q ../patches/*.patch || true"), "am"),
    "bisect": (run(*SIDE, "git bisect start -q HEAD HEAD~1"), "bisect"),
    "detached": (run("git checkout -q --detach"), "detached"),
    "a25_d09_ignored_untracked": (run(f"git rm -q --cached {NAME}", "git commit -q -m gone", f"echo {NAME} > .gitignore"), "git ignores it"),
    "assume_unchanged": (run(f"git update-index --assume-unchanged {NAME}"), "assume-unchanged"),
    "a24_skip_worktree": (run(f"git update-index --skip-worktree {NAME}"), "skip-worktree"),
}  # fmt: skip


def state_files(where: Path) -> dict[str, bytes]:
    """Everything in the git directory but objects."""
    folder = where / ".git"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "objects" not in path.relative_to(folder).parts
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "reason"), table(KEPT, slow="merge_conflict cherry_pick cherry_pick_range rebase_apply am bisect revert assume_unchanged")
)
def test_nothing_is_touched(project: Path, prepare: Prepare, reason: str) -> None:
    prepare(project)
    (project / NAME).write_bytes(NEW)
    before, files = state_files(project), work_tree(project)
    made = commit(project)
    assert state_files(project) == before
    assert work_tree(project) == files
    assert (made.outcome, made.commit) == ("skipped", None)
    assert reason in str(made.warning)


FINISHED: Mapping[str, tuple[str, str]] = {
    "merge_continue": ("merge_conflict", "git add a.txt && git merge --continue"),
    "merge_abort": ("merge_conflict", "git merge --abort"),
    "cherry_pick": ("cherry_pick", "git add a.txt && git cherry-pick --continue"),
    "cherry_pick_range": ("cherry_pick_range", "git checkout -q --theirs a.txt && git add a.txt && git cherry-pick --continue"),
    "revert_continue": ("revert", "git add a.txt && git revert --continue"),
    "revert_abort": ("revert", "git revert --abort"),
    "rebase": ("rebase_merge", f"git checkout -q {NAME} && git add a.txt && git rebase --continue"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "finish"),
    table(FINISHED, slow="merge_abort revert_continue cherry_pick cherry_pick_range revert_abort rebase"),
)
def test_the_operation_can_be_finished(
    project: Path, monkeypatch: pytest.MonkeyPatch, operation: str, finish: str
) -> None:
    KEPT[operation][0](project)
    (project / NAME).write_bytes(NEW)
    assert commit(project).outcome == "skipped"
    (project / "a.txt").write_text("resolved\n")
    git(project, "stash", "list")
    monkeypatch.setenv("GIT_EDITOR", "true")
    sh(project, "sh", "-c", finish)
    (project / NAME).write_bytes(NEW)
    assert commit(project).outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_a_conflict_that_a_stash_left_in_the_backlog_is_settled(project: Path) -> None:
    """No operation is open, so an unmerged entry keeps no decision out of history."""
    sh(project, "sh", "-ec", f"echo one > {NAME} && git stash -q && echo two > {NAME} && git commit -q -am two; ! git stash pop -q")
    assert git(project, "ls-files", "-u", "--", NAME) != ""
    head = git(project, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(project, save(project), head)
    assert git(project, "ls-files", "-u") == ""


def test_a_hidden_backlog_as_in_head_needs_no_warning(project: Path) -> None:
    git(project, "update-index", "--assume-unchanged", NAME)
    assert save(project, OLD) == StateCommit("clean", None, None)


def test_a_branch_deleted_meanwhile_gets_no_new_root(project: Path) -> None:
    repo = Repo.open(project)
    head = repo.head().commit
    (project / NAME).write_bytes(NEW)
    git(project, "update-ref", "-d", "refs/heads/main")
    made = repo.commit_state(project / NAME, NEW, MESSAGE, expect_branch="refs/heads/main")
    assert made.outcome == "skipped"
    assert f"the branch main was deleted (it was at {str(head)[:10]})" in str(made.warning)
    assert git(project, "for-each-ref") == ""


def test_another_branch_than_expected(project: Path) -> None:
    git(project, "switch", "-q", "-c", "other")
    made = save(project, expect_branch="refs/heads/main")
    assert made.outcome == "skipped"
    assert "HEAD is on other now, the run began on main" in str(made.warning)
    assert save(project, expect_branch="refs/heads/other").outcome == "committed"


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["index.lock", "HEAD.lock", "refs/heads/main.lock"])
def test_a20_lock_that_stays(project: Path, lock: str) -> None:
    (project / ".git" / lock).write_text("somebody's")
    waited: list[float] = []
    (project / NAME).write_bytes(NEW)
    index = (project / ".git/index").read_bytes()
    made = Repo.open(project, delay=waited.append).commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert lock in str(made.warning)
    assert sum(waited) == pytest.approx(3)
    assert (project / ".git" / lock).read_text() == "somebody's"
    assert (project / ".git/index").read_bytes() == index
    (project / ".git" / lock).unlink()
    assert commit(project).outcome == "committed"


@pytest.mark.parametrize(
    "lock", ["index.lock", "HEAD.lock", pytest.param("refs/heads/main.lock", marks=pytest.mark.slow)]
)
def test_a20_lock_that_goes_away(project: Path, lock: str) -> None:
    held = project / ".git" / lock
    held.write_text("")
    waits = iter(range(100))

    def delay(_: float) -> None:
        if next(waits) == 3:
            held.unlink()

    (project / NAME).write_bytes(NEW)
    repo = Repo.open(project, delay=delay)
    assert repo.commit_state(project / NAME, NEW, MESSAGE).outcome == "committed"


# ---- skipped -------------------------------------------------------------------------------------


def make_fifo(where: Path) -> None:
    (where / NAME).unlink()
    os.mkfifo(where / NAME)


SKIPPED: Mapping[str, tuple[Prepare, str]] = {
    "a26_missing": (run(f"rm {NAME}"), "missing on disk"),
    "symlink": (run(f"mv {NAME} real", f"ln -s real {NAME}"), "not a regular file"),
    "directory": (run(f"rm {NAME}", f"mkdir {NAME}"), "not a regular file"),
    "fifo": (make_fifo, "not a regular file"),
    "index_corrupt": (write(".git/index", "DIRCgarbage that is no index at all, but long enough to be one"), "index"),
    "ref_broken": (write(".git/refs/heads/main", "garbage\n"), "HEAD"),
    "ref_to_nothing": (write(".git/refs/heads/main", "1" * 40 + "\n"), "cannot be read"),
    "bad_config": (write(".git/config", "[core\n"), "bad config"),
    "filter_required_missing": (run(f"echo '{NAME} filter=f' > .gitattributes", "git config filter.f.clean /nonexistent", "git config filter.f.required true"), "filter"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "why"), table(SKIPPED, slow="directory symlink ref_to_nothing bad_config"))
def test_skipped_with_a_warning(project: Path, prepare: Prepare, why: str) -> None:
    repo = Repo.open(project)
    (project / NAME).write_bytes(NEW)
    prepare(project)
    before = state_files(project)
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert (made.outcome, made.commit) == ("skipped", None)
    assert made.warning is not None
    assert why in made.warning
    assert NAME in made.warning
    assert "\n" not in made.warning
    assert state_files(project) == before


def is_alive(pid_file: Path) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    state = sh(pid_file.parent, "ps", "-o", "stat=", "-p", pid_file.read_text().strip(), check=False)
    return state.strip() != "" and not state.startswith("Z")


@pytest.mark.slow
def test_a12_filter_that_hangs_is_ended(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gitutil, "KILL_GRACE_S", 0.2)
    mark = project / "filter.pid"
    (project / ".gitattributes").write_text(f"{NAME} filter=f\n")
    git(project, "config", "filter.f.clean", f"trap '' TERM; echo $$ > {mark}; sleep 60")
    (project / NAME).write_bytes(NEW)
    repo = Repo.open(project)
    repo._limit_s = 1.0
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert "did not end within" in str(made.warning)
    assert not is_alive(mark)
    assert leftovers(project) == []


def test_the_repository_vanished(project: Path) -> None:
    repo = Repo.open(project)
    shutil.rmtree(project / ".git")
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert "not a git repository" in str(made.warning)


def test_git_vanished(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Repo.open(project)
    (project / NAME).write_bytes(NEW)
    monkeypatch.setenv("PATH", "/nonexistent")
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert "git was not found" in str(made.warning)


def test_objects_that_cannot_be_written(project: Path) -> None:
    """A full disk or a read-only file system looks the same: a file where a folder should be."""
    oid = git(project, "hash-object", "--stdin", check=False)
    assert oid
    repo = Repo.open(project)
    (project / NAME).write_bytes(NEW)
    want = subprocess.run(["git", "hash-object", NAME], cwd=project, capture_output=True, text=True, check=True).stdout
    (project / ".git/objects" / want[:2]).write_text("in the way")
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert f"{NAME} was not committed: " in str(made.warning)
    (project / ".git/objects" / want[:2]).unlink()
    assert commit(project).outcome == "committed"


# ---- races ---------------------------------------------------------------------------------------


class Meddled(Repo):
    """A repository in which something happens before or after certain steps of ours.

    They have the names of git's commands, also where they are done without git.
    """

    before: Mapping[str, Callable[[], object]] = {}
    after: Mapping[str, Callable[[], object]] = {}

    def _around(self, step, work, *args, **options):  # type: ignore[no-untyped-def]
        self.before.get(step, bool)()
        done = work(*args, **options)
        self.after.get(step, bool)()
        return done

    def _call(self, args, **options):  # type: ignore[no-untyped-def]
        if args[0] in ("update-index", "update-ref"):
            return super()._call(args, **options)
        return self._around(args[0], super()._call, args, **options)

    def _write_index(self, rows):  # type: ignore[no-untyped-def]
        return self._around("update-index", super()._write_index, rows)

    def _move_branch(self, *args):  # type: ignore[no-untyped-def]
        return self._around("update-ref", super()._move_branch, *args)


@pytest.fixture
def meddled(project: Path) -> Iterator[Meddled]:
    (project / NAME).write_bytes(NEW)
    repo = Meddled.open(project, delay=no_delay)
    yield repo
    assert leftovers(project) == []


def once(act: Callable[[], object]) -> Callable[[], object]:
    left = [act]
    return lambda: left.pop()() if left else None


@pytest.mark.parametrize(
    "step", ["commit-tree", pytest.param("update-index", marks=pytest.mark.slow), "update-ref"]
)
def test_a32_head_moves_meanwhile(project: Path, meddled: Meddled, step: str) -> None:
    def theirs() -> None:
        new = git(project, "commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", "theirs").strip()
        git(project, "update-ref", "refs/heads/main", new)

    meddled.before = {step: once(theirs)}
    made = meddled.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "committed"
    assert git(project, "log", "--format=%s").splitlines() == [MESSAGE, "theirs", "Start"]
    assert git(project, "rev-parse", "HEAD").strip() == made.commit


def test_head_moves_always(project: Path, meddled: Meddled) -> None:
    meddled.before = {"update-ref": lambda: git(project, "commit", "-q", "--allow-empty", "-o", "-m", "theirs")}
    made = meddled.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "skipped"
    assert "keeps moving the branch" in str(made.warning)
    assert git(project, "rev-list", "--count", "HEAD").strip() == "5"  # Start, four tries


def test_branch_switched_meanwhile(project: Path, meddled: Meddled) -> None:
    head = git(project, "rev-parse", "HEAD").strip()
    meddled.before = {"update-ref": once(lambda: git(project, "switch", "-q", "-c", "other"))}
    made = meddled.commit_state(project / NAME, NEW, MESSAGE)
    assert made.outcome == "committed"
    assert git(project, "rev-parse", "main").strip() == made.commit
    assert git(project, "rev-parse", "other").strip() == head


def test_index_written_back_by_a_slow_git(project: Path, meddled: Meddled) -> None:
    old = (project / ".git/index").read_bytes()
    meddled.after = {"update-ref": once(lambda: (project / ".git/index").write_bytes(old))}
    head = git(project, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(project, meddled.commit_state(project / NAME, NEW, MESSAGE), head)


def test_operator_commits_the_staged_backlog_first(project: Path, meddled: Meddled) -> None:
    meddled.before = {"update-ref": once(lambda: git(project, "commit", "-q", "-m", "theirs"))}
    assert meddled.commit_state(project / NAME, NEW, MESSAGE).outcome == "clean"
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_self_check_refuses_a_second_path(project: Path) -> None:
    """The file has taken the place of a folder, whose files a commit of it would delete."""
    (project / NAME).unlink()
    (project / NAME).mkdir()
    (project / NAME / "x.txt").write_text("x\n")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "A folder")
    shutil.rmtree(project / NAME)
    head, index = git(project, "rev-parse", "HEAD"), (project / ".git/index").read_bytes()
    made = save(project)
    assert made.outcome == "skipped"
    assert "would not hold what it should" in str(made.warning)
    assert git(project, "rev-parse", "HEAD") == head
    assert (project / ".git/index").read_bytes() == index


STEPS = ["commit-tree", "update-index", "update-ref"]


class Killed(BaseException):
    """Stands for the end of the process in the middle of a commit."""


@pytest.mark.slow
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    "step", table({step: step for step in STEPS}, slow="commit-tree")
)
def test_a_run_cut_off_at_any_step_harms_nothing(
    project: Path, meddled: Meddled, step: str, side: str
) -> None:
    stage_everything(project)
    index = others(project)

    def die() -> None:
        raise Killed

    setattr(meddled, side, {step: die})
    with pytest.raises(Killed):
        meddled.commit_state(project / NAME, NEW, MESSAGE)
    assert others(project) == index
    git(project, "stash", "list")
    done = commit(project)
    assert done.outcome == ("clean" if (step, side) == ("update-ref", "after") else "committed")
    assert blob(project, f"HEAD:{NAME}") == NEW
    assert others(project) == index
    assert git(project, "status", "--porcelain", "--", NAME) == ""


@pytest.mark.parametrize("editor", ["commit", pytest.param("commit -a", marks=pytest.mark.slow)])
def test_operators_commit_is_open_in_an_editor(project: Path, editor: str) -> None:
    """Their saved message survives; nothing they staged is lost."""
    (project / "a.txt").write_text("theirs\n")
    git(project, "add", "a.txt")
    script = project.parent / "editor.sh"
    ready, go = project.parent / "ready", project.parent / "go"
    os.mkfifo(ready)
    os.mkfifo(go)
    script.write_text(f'#!/bin/sh\necho their message > "$1"\necho > {ready}\nread _ < {go}\n')
    script.chmod(0o755)
    with subprocess.Popen(
        ["git", *editor.split()], cwd=project, env={**os.environ, "GIT_EDITOR": str(script)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as theirs:  # fmt: skip
        ready.read_text()
        made = save(project)
        assert made.outcome == ("committed" if editor == "commit" else "skipped")
        assert (project / ".git/COMMIT_EDITMSG").read_text() == "their message\n"
        go.write_text("\n")
        theirs.wait()
    assert "M  a.txt" in git(project, "status", "--porcelain") or theirs.returncode == 0
    assert save(project, b"v: 3\n").outcome == "committed"


# ---- several paths -------------------------------------------------------------------------------


def absent(path: str) -> Entry:
    return Entry(path, gitutil.ABSENT_MODE, gitutil.ABSENT_OID)


def test_commit_of_many_kinds_of_entries(project: Path) -> None:
    stage_everything(project)
    index = others(project)
    repo = Repo.open(project)
    (project / "src/run.sh").write_text("#!/bin/sh\n")
    (project / "src/run.sh").chmod(0o755)
    (project / "link").symlink_to("a.txt")
    (project / "d.txt").unlink()
    names = ("src/run.sh", "link", "d.txt")
    entries = [repo.blob(project / name) for name in names]
    made = repo.commit(entries, "three")
    changed = git(project, "diff-tree", "-r", "--no-commit-id", "--raw", "--abbrev=4", "HEAD")
    assert sorted((row.split()[1], row.split()[4:]) for row in changed.splitlines()) == [
        ("000000", ["D", "d.txt"]),
        ("100755", ["A", "src/run.sh"]),
        ("120000", ["A", "link"]),
    ]
    assert git(project, "status", "--porcelain", "--", *names) == ""
    kept = [line for line in others(project).splitlines() if not line.split("\0")[0].endswith(names)]
    assert kept == [line for line in index.splitlines() if not line.split("\0")[0].endswith(names)]
    assert repo.commit(entries, "again") is None
    assert git(project, "rev-parse", "HEAD").strip() == made


@pytest.mark.slow
def test_commit_of_more_paths_than_fit_on_a_command_line(project: Path) -> None:
    repo = Repo.open(project)
    oid = repo.blob(project / "a.txt").oid
    entries = [Entry(f"many/{n:04}.txt", "100644", oid) for n in range(700)]
    assert repo.commit(entries, "many") is not None
    assert repo.commit([absent(entry.path) for entry in entries], "none") is not None
    assert git(project, "ls-tree", "--name-only", "HEAD", "many") == ""
    assert git(project, "ls-files", "many") == ""


@pytest.mark.parametrize(
    ("there", "entries"),
    [
        ("a/b", ["a"]),
        ("a", ["a/b"]),
        ("a/b/c", ["a/b", "a/d"]),
    ],
)
def test_files_and_folders_swap(project: Path, there: str, entries: list[str]) -> None:
    repo = Repo.open(project)
    oid = repo.blob(project / "a.txt").oid
    repo.commit([Entry(there, "100644", oid)], "first")
    wanted = [absent(there), *(Entry(path, "100644", oid) for path in entries)]
    assert repo.commit(wanted, "swap") is not None
    assert git(project, "ls-tree", "-r", "--name-only", "HEAD", "a", "a/").split() == entries
    assert git(project, "ls-files", "a").split() == entries


def test_a_folder_is_never_dropped_by_a_file_of_its_name(project: Path) -> None:
    repo = Repo.open(project)
    oid = repo.blob(project / "a.txt").oid
    with pytest.raises(GitError, match="would not hold what it should"):
        repo.commit([Entry("src", "100644", oid)], "not the deletion of src/c.py")
    assert git(project, "rev-list", "--count", "HEAD").strip() == "1"


def test_a19_new_nested_repository_is_left_out(project: Path, make_repo: Callable[..., Path]) -> None:
    make_repo("project/vendor/lib")
    repo = Repo.open(project)
    (project / "a.txt").write_text("changed\n")
    changes = repo.changes("HEAD", repo.snapshot().tree)
    assert [(c.after.path, c.after.mode) for c in changes] == [("a.txt", "100644"), ("vendor/lib", "160000")]
    repo.commit([change.after for change in changes], "phase")
    assert git(project, "ls-tree", "-r", "--name-only", "HEAD").split() == [NAME, "a.txt", "b.txt", "d.txt", "src/c.py"]
    assert blob(project, "HEAD:a.txt") == b"changed\n"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [(run("git checkout -q --detach"), "HEAD is detached"), KEPT["merge_conflict"], KEPT["bisect"]],
)
def test_commit_refuses_when_the_branch_may_not_move(project: Path, prepare: Prepare, reason: str) -> None:
    prepare(project)
    before = state_files(project)
    repo = Repo.open(project)
    with pytest.raises(HeadBusy) as busy:
        repo.commit([absent("d.txt")], "phase")
    assert reason in busy.value.reason
    assert state_files(project) == before


def test_an_unmerged_path_is_settled_by_its_commit(project: Path) -> None:
    COMMITTED["a29_stash_pop_conflict"](project)
    assert Repo.open(project).commit([absent("a.txt")], "phase")
    assert git(project, "ls-files", "-u") == ""


def test_flags_of_a_committed_path_stay(project: Path) -> None:
    git(project, "update-index", "--skip-worktree", "a.txt")
    git(project, "update-index", "--assume-unchanged", "b.txt")
    repo = Repo.open(project)
    oid = repo.blob(project / "d.txt").oid
    repo.commit([Entry("a.txt", "100644", oid), Entry("b.txt", "100644", oid)], "phase")
    assert [line[0] for line in git(project, "ls-files", "-v", "a.txt", "b.txt").splitlines()] == ["S", "h"]
