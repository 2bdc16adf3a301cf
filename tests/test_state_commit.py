"""Committing BACKLOG.yaml alone, in whatever state the operator's repository is.

Most cases only differ in how the repository was prepared, so they are tables: a preparation, and
what must be true afterwards.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gitutil import Entry, HeadBusy, Repo, StateCommit
from tests import gitkit
from tests.conftest import IDENTITY, sh
from tests.gitkit import NAME, NEW, OLD, Act, absent, blob, git, index, run, table, work_tree, write

MESSAGE = "[orchestrator] Save backlog state on halt (CapReached)"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return gitkit.new_project(tmp_path)


def save(where: Path, data: bytes = NEW, *, expect_branch: str | None = None) -> StateCommit:
    """What the orchestrator does at a halt: the file is on disk, and those bytes are committed."""
    (where / NAME).write_bytes(data)
    return commit(where, data, expect_branch=expect_branch)


def commit(where: Path, data: bytes = NEW, *, expect_branch: str | None = None) -> StateCommit:
    repo = Repo.open(where, delay=gitkit.no_delay)
    return repo.commit_state(where / NAME, data, MESSAGE, expect_branch=expect_branch)


def others(where: Path) -> str:
    """The index entries of all other paths, with their flags."""
    return index(where, NAME)


def assert_only_the_backlog(where: Path, made: StateCommit, before: str | None) -> None:
    """The branch advanced by one commit that holds one path, and nothing is left to commit of it."""
    assert (made.outcome, made.warning) == ("committed", None)
    assert git(where, "rev-parse", "HEAD").strip() == made.commit
    assert git(where, "log", "-1", "--format=%P").split() == ([before] if before else [])
    assert git(where, "log", "-1", "--format=%B").rstrip("\n") == MESSAGE
    changed = git(where, "diff-tree", "-r", "--root", "--no-commit-id", "--name-only", "HEAD")
    assert changed.split() == [NAME]
    assert git(where, "status", "--porcelain", "--", NAME) == ""
    assert gitkit.leftovers(where) == []
    assert git(where, "fsck", "--no-dangling", "--no-progress", "--connectivity-only") == ""


# ---- committed -----------------------------------------------------------------------------------

def failing_hooks(body: str) -> Act:
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


SETTINGS = (
    "commit.gpgSign true; gpg.program /nonexistent; core.editor 'sleep 60'; core.pager 'sleep 60'; commit.template /nonexistent; commit.verbose true;"
    " commit.cleanup strip; core.commentChar '['; i18n.commitEncoding ISO-8859-1; status.showUntrackedFiles no; core.quotePath true;"
    " diff.noprefix true; diff.renames copies; log.showSignature true"
)
HOSTILE_SETTINGS = run(*(f"git config {setting}" for setting in SETTINGS.split(";")))


COMMITTED: Mapping[str, Act] = {
    "modified_unstaged": run(),
    "modified_staged": run(f"echo 'v: 2' > {NAME}", f"git add {NAME}"),
    "staged_older_than_worktree": run(f"echo 'v: 1.5' > {NAME}", f"git add {NAME}"),
    "staged_deletion_file_present": run(f"git rm -q --cached {NAME}"),
    "d08_other_staged_everything": gitkit.stage_everything,
    "a01_other_file_staged": run("echo x > a.txt", "git add a.txt"),
    "a10_renamed_onto_it": run(f"git rm -q --cached {NAME}", f"git mv -f a.txt {NAME}"),
    "ignored_tracked": write(".gitignore", f"{NAME}\n"),
    "sparse_noncone": run("git sparse-checkout set --no-cone '/src/' '/a.txt'"),
    "cherry_pick_n_pending": run("git switch -q -c side", "echo s > side.txt && git add side.txt && git commit -q -m side", "git switch -q main", "git cherry-pick -n side"),
    "a29_stash_pop_conflict": run("echo one > a.txt && git stash -q", "echo two > a.txt && git commit -q -am two", "git stash pop -q || true"),
    "a11_hooks_fail": failing_hooks("exit 1"),
    "a12_hooks_hang": failing_hooks("sleep 60"),
    "hook_adds_files": failing_hooks("GIT_LITERAL_PATHSPECS= git -c core.fsmonitor= add -u"),
    "hooks_path_config": run("mkdir -p h", "printf '#!/bin/sh\\nexit 1\\n' > h/pre-commit", "chmod +x h/pre-commit", "git config core.hooksPath h"),
    "a13_hostile_settings": HOSTILE_SETTINGS,
    "stale_squash_message": write(".git/SQUASH_MSG", "theirs\n"),
    "leftover_of_a_crash": write(".git/orchestrator-index-x", "junk"),
}  # fmt: skip


QUICK = {"modified_unstaged", "d08_other_staged_everything", "a29_stash_pop_conflict", "a13_hostile_settings"}


@pytest.mark.parametrize("prepare", table(COMMITTED, slow=" ".join(COMMITTED.keys() - QUICK)))
def test_committed_alone(project: Path, prepare: Act) -> None:
    prepare(project)
    Repo.open(project).clean_leftovers()
    (project / NAME).write_bytes(NEW)
    head, staged, files = git(project, "rev-parse", "HEAD").strip(), others(project), work_tree(project)
    made = commit(project)
    assert others(project) == staged
    assert work_tree(project) == files
    assert_only_the_backlog(project, made, head)
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_a27_an_unborn_branch_or_a_missing_index_deletes_nothing(project: Path) -> None:
    (project / ".git/index").unlink()
    head = git(project, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(project, save(project), head)
    assert "a.txt" in git(project, "ls-tree", "--name-only", "HEAD").split()
    git(project, "checkout", "-q", "--orphan", "fresh")
    staged = others(project)
    assert_only_the_backlog(project, save(project), None)
    assert others(project) == staged


def test_content_goes_through_filters_and_the_executable_bit_stays(project: Path) -> None:
    run(f"git update-index --chmod=+x {NAME}", "git commit -q -m x", "git config core.fileMode false", "git config core.autocrlf true")(project)
    assert save(project, b"v: 1\r\n").outcome == "clean"  # line ends alone are no change
    assert save(project, b"v: 2\r\n").outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == NEW
    assert git(project, "ls-tree", "HEAD", NAME).startswith("100755 ")
    run("git config filter.up.clean 'tr a-z A-Z'", f"echo '{NAME} filter=up' > .gitattributes")(project)
    assert save(project, b"v: 3\n").outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == b"V: 3\n"
    assert git(project, "status", "--porcelain", "--", NAME) == ""


def test_no_identity_borrows_ours_for_this_commit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IDENTITY:
        monkeypatch.delenv(name)
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


def test_a08_a09_d06_d09_project_in_a_subdirectory_by_relative_and_odd_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sub = project / "deep/er"
    sub.mkdir(parents=True)
    (sub / NAME).write_bytes(OLD)
    run("git add -A", "git commit -q -m sub", f"echo 'top: dirty' > {NAME}")(project)
    monkeypatch.chdir(project / "src")
    repo = Repo.open(Path("../deep/er"))
    assert (repo.prefix, repo.top, repo.root) == ("deep/er/", project, sub)
    (sub / NAME).write_bytes(NEW)
    assert repo.commit_state(Path("../deep/er") / NAME, NEW, MESSAGE).outcome == "committed"
    assert git(project, "diff-tree", "-r", "--no-commit-id", "--name-only", "HEAD").split() == [f"deep/er/{NAME}"]
    (project.parent / "link").symlink_to(project)  # an absolute path through a symlink into an untracked folder
    (project / "plan").mkdir()
    (project / "plan" / NAME).write_bytes(NEW)
    (project / "plan/other.txt").write_text("not ours\n")
    assert Repo.open(project).commit_state(project.parent / "link/plan" / NAME, NEW, MESSAGE).outcome == "committed"
    assert git(project, "status", "--porcelain") == f" M {NAME}\n?? plan/other.txt\n"


# ---- nothing to commit ---------------------------------------------------------------------------

CLEAN: Mapping[str, Act] = {
    "nothing_changed": gitkit.stage_everything,
    "exec_bit_only": run(f"chmod +x {NAME}"),
    "a24_merge_pending_elsewhere": run("git rev-parse HEAD > .git/MERGE_HEAD"),
    "hidden": run(f"git update-index --assume-unchanged {NAME}"),
    "detached": run("git checkout -q --detach"),
}


@pytest.mark.parametrize("prepare", table(CLEAN))
def test_clean_makes_no_commit(project: Path, prepare: Act) -> None:
    prepare(project)
    before = gitkit.state_files(project)
    assert save(project, OLD) == StateCommit("clean", None, None)
    assert gitkit.state_files(project) == before


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
    before = (project / ".git/index").stat()
    save(project, OLD)
    repo = Repo.open(project)
    repo.dirty_paths()
    repo.problems(project / NAME)
    repo.snapshot()
    after = (project / ".git/index").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# ---- HEAD may not move ---------------------------------------------------------------------------

SIDE = (
    "git switch -q -c side", "echo side > a.txt && git commit -q -am side1", "echo side2 > a.txt && git commit -q -am side2",
    "git switch -q main", "echo main > a.txt && git commit -q -am main1",
)  # fmt: skip
KEPT: Mapping[str, tuple[Act, str, str]] = {  # preparation, reason, how the operator finishes it
    "a02_merge_clean": (run("git switch -q -c side && git commit -q --allow-empty -m s && git switch -q main", "git merge -q --no-ff --no-commit side"), "merge", "git merge --abort"),
    "cherry_pick": (run(*SIDE, "git cherry-pick side || true"), "cherry-pick", "git add a.txt && git cherry-pick --continue"),
    "cherry_pick_range": (run(*SIDE, "git cherry-pick side~2..side || true"), "cherry-pick", "git checkout -q --theirs a.txt && git add a.txt && git cherry-pick --continue"),
    "revert": (run(*SIDE, "echo x > a.txt && git commit -q -am x", "git revert --no-edit HEAD~1 || true"), "revert", "git add a.txt && git revert --continue"),
    "rebase_apply": (run(*SIDE, "git rebase -q --apply side || true"), "rebase", "git rebase --abort"),
    "am": (run(*SIDE, "git format-patch -q -1 side -o ../patches", "git am -q ../patches/*.patch || true"), "am", "git am --abort"),
    "detached": (run("git checkout -q --detach"), "detached", "git switch -q main"),
    "a25_d09_ignored_untracked": (run(f"git rm -q --cached {NAME}", "git commit -q -m gone", f"echo {NAME} > .gitignore"), "git ignores it", ": > .gitignore"),
    "a24_skip_worktree": (run(f"git update-index --skip-worktree {NAME}"), "skip-worktree", f"git update-index --no-skip-worktree {NAME}"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "reason", "finish"), table(KEPT, slow="cherry_pick cherry_pick_range rebase_apply am revert"))
def test_nothing_is_touched_and_the_operation_can_be_finished(
    project: Path, monkeypatch: pytest.MonkeyPatch, prepare: Act, reason: str, finish: str
) -> None:
    prepare(project)
    (project / NAME).write_bytes(NEW)
    before, files = gitkit.state_files(project), work_tree(project)
    done = commit(project)
    assert gitkit.state_files(project) == before
    assert work_tree(project) == files
    assert (done.outcome, done.commit) == ("skipped", None)
    assert reason in str(done.warning)
    if (project / ".git/MERGE_HEAD").exists() or "detached" in reason:
        with pytest.raises(HeadBusy, match=reason):
            Repo.open(project).commit([absent("d.txt")], "phase")
    monkeypatch.setenv("GIT_EDITOR", "true")
    sh(project, "sh", "-ec", f"git ls-files -u | grep -q . && echo resolved > a.txt; {finish}")
    (project / NAME).write_bytes(NEW)
    assert commit(project).outcome == "committed"
    assert blob(project, f"HEAD:{NAME}") == NEW


def test_a_conflict_that_a_stash_left_is_settled_by_a_commit(project: Path) -> None:
    """No operation is open, so an unmerged entry keeps no decision out of history."""
    for name in ("a.txt", NAME):
        sh(project, "sh", "-ec", f"echo one > {name} && git stash -q && echo two > {name} && git commit -q -am two; ! git stash pop -q")
        assert git(project, "ls-files", "-u", "--", name) != ""
        head = git(project, "rev-parse", "HEAD").strip()
        if name == NAME:
            assert_only_the_backlog(project, save(project), head)
        else:
            assert Repo.open(project).commit([absent(name)], "phase")
            (project / name).unlink()
        assert git(project, "ls-files", "-u") == ""


@pytest.mark.parametrize("lock", table({lock: lock for lock in ("index.lock", "HEAD.lock", "refs/heads/main.lock")}, slow="HEAD.lock refs/heads/main.lock"))
def test_a20_lock_that_stays_or_goes_away(project: Path, lock: str) -> None:
    held, waited = project / ".git" / lock, list[float]()
    held.write_text("somebody's")
    (project / NAME).write_bytes(NEW)
    before = (project / ".git/index").read_bytes()
    done = Repo.open(project, delay=waited.append).commit_state(project / NAME, NEW, MESSAGE)
    assert (done.outcome, lock in str(done.warning), sum(waited)) == ("skipped", True, pytest.approx(3))
    assert (held.read_text(), (project / ".git/index").read_bytes()) == ("somebody's", before)
    repo = Repo.open(project, delay=lambda _: held.unlink())
    assert repo.commit_state(project / NAME, NEW, MESSAGE).outcome == "committed"


# ---- skipped -------------------------------------------------------------------------------------

SKIPPED: Mapping[str, tuple[Act, str]] = {
    "a26_missing": (run(f"rm {NAME}"), "missing on disk"),
    "symlink": (run(f"mv {NAME} real", f"ln -s real {NAME}"), "not a regular file"),
    "index_corrupt": (write(".git/index", "DIRCgarbage that is no index at all, but long enough to be one"), "index"),
    "ref_broken": (write(".git/refs/heads/main", "garbage\n"), "HEAD"),
    "ref_to_nothing": (write(".git/refs/heads/main", "1" * 40 + "\n"), "cannot be read"),
    "repository_gone": (run("rm -rf .git"), "not a git repository"),
    "filter_required_missing": (run(f"echo '{NAME} filter=f' > .gitattributes", "git config filter.f.clean /nonexistent", "git config filter.f.required true"), "filter"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "why"), table(SKIPPED, slow="index_corrupt ref_to_nothing"))
def test_skipped_with_a_warning(project: Path, prepare: Act, why: str) -> None:
    repo = Repo.open(project)
    (project / NAME).write_bytes(NEW)
    prepare(project)
    before = gitkit.state_files(project)
    made = repo.commit_state(project / NAME, NEW, MESSAGE)
    assert (made.outcome, made.commit) == ("skipped", None)
    assert all(text in str(made.warning) for text in (why, NAME))
    assert "\n" not in str(made.warning)
    assert gitkit.state_files(project) == before


# ---- races ---------------------------------------------------------------------------------------

class Meddled(Repo):
    """A repository in which something happens before or after certain commands of ours on the real index."""

    before: Mapping[str, Callable[[], object]] = {}
    after: Mapping[str, Callable[[], object]] = {}

    def _call(self, args: Any, **options: Any) -> Any:
        step = "" if options.get("env") else args[0]
        self.before.get(step, bool)()
        done = super()._call(args, **options)
        self.after.get(step, bool)()
        return done


@pytest.fixture
def meddled(project: Path) -> Iterator[Meddled]:
    (project / NAME).write_bytes(NEW)
    repo = Meddled.open(project, delay=gitkit.no_delay)
    yield repo
    assert gitkit.leftovers(project) == []


def once(act: Callable[[], object]) -> Callable[[], object]:
    left = [act]
    return lambda: left.pop()() if left else None


@pytest.mark.parametrize("step", ["commit-tree", pytest.param("update-index", marks=pytest.mark.slow), "update-ref"])
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


def test_a_slow_git_writes_the_index_back_or_the_operator_commits_first(project: Path, meddled: Meddled) -> None:
    old = (project / ".git/index").read_bytes()
    meddled.after = {"update-ref": once(lambda: (project / ".git/index").write_bytes(old))}
    head = git(project, "rev-parse", "HEAD").strip()
    assert_only_the_backlog(project, meddled.commit_state(project / NAME, NEW, MESSAGE), head)
    (project / NAME).write_bytes(b"v: 3\n")
    meddled.before = {"update-ref": once(lambda: git(project, "commit", "-q", "-m", "theirs"))}
    assert meddled.commit_state(project / NAME, b"v: 3\n", MESSAGE).outcome == "clean"
    assert blob(project, f"HEAD:{NAME}") == b"v: 3\n"


def test_self_check_refuses_a_second_path(project: Path) -> None:
    """The file has taken the place of a folder, whose files a commit of it would delete."""
    run(f"rm {NAME} && mkdir {NAME} && echo x > {NAME}/x.txt", "git add -A", "git commit -q -m 'A folder'", f"rm -r {NAME}")(project)
    head, before = git(project, "rev-parse", "HEAD"), (project / ".git/index").read_bytes()
    done = save(project)
    assert done.outcome == "skipped"
    assert "would not hold what it should" in str(done.warning)
    assert git(project, "rev-parse", "HEAD") == head
    assert (project / ".git/index").read_bytes() == before


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

def test_flags_of_a_committed_path_stay_also_of_very_many(project: Path) -> None:
    git(project, "update-index", "--skip-worktree", "a.txt")
    git(project, "update-index", "--assume-unchanged", "b.txt")
    repo = Repo.open(project)
    oid = git(project, "rev-parse", "HEAD:d.txt").strip()
    many = [Entry(f"many/{n:04}.txt", "100644", oid) for n in range(700)]  # more than fit on a command line
    repo.commit([Entry("a.txt", "100644", oid), Entry("b.txt", "100644", oid), *many], "phase")
    assert [line[0] for line in git(project, "ls-files", "-v", "a.txt", "b.txt").splitlines()] == ["S", "h"]
    assert repo.commit([absent(entry.path) for entry in many], "none") is not None
    assert git(project, "ls-tree", "--name-only", "HEAD", "many") == git(project, "ls-files", "many") == ""
