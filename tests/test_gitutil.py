"""Git calls, snapshots, salvage, restoring, hooks and preconditions, against real git.

Committing BACKLOG.yaml has its own file, test_state_commit.py.
"""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gitutil
from gitutil import Change, Entry, GitError, Head, HeadBusy, HookResult, Problem, Repo, Snapshot
from tests import gitkit
from tests.conftest import IDENTITY, sh
from tests.gitkit import NAME, Act, content, entry_of, git, index, made, run, table, work_tree


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return gitkit.new_project(tmp_path)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """The project with much that is the operator's."""
    return gitkit.new_project(tmp_path, messy=True)


@pytest.fixture
def repo(project: Path) -> Repo:
    return Repo.open(project, delay=gitkit.no_delay)


def stored(where: Path, tree: str) -> dict[str, str]:
    """Path and blob of every file of a tree."""
    rows = git(where, "ls-tree", "-r", "-z", tree).split("\0")[:-1]
    return {row.split("\t")[1]: row.split("\t")[0].split()[2] for row in rows}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def paths(changes: list[Change]) -> list[str]:
    return [change.after.path for change in changes]


def phase(repo: Repo, *commands: str) -> tuple[Snapshot, list[Change]]:
    """What a phase that runs these commands finds, and what it changes."""
    before = repo.snapshot()
    run(*commands)(repo.top)
    return before, repo.changes(before.tree, repo.snapshot().tree)


# ---- starting git --------------------------------------------------------------------------------

@pytest.fixture
def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Repo]:
    """Put a shell script in git's place; returns a repository object that calls it."""

    def make(body: str) -> Repo:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "git").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return Repo(tmp_path)

    return make


def test_a33_every_call_is_shielded(fake_git: Callable[[str], Repo], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/elsewhere/index")
    monkeypatch.setenv("GIT_TRACE2_EVENT", "/elsewhere/trace")
    monkeypatch.setenv("GIT_GLOB_PATHSPECS", "1")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "0")
    repo = fake_git('printf "%s\\n" "$@"; echo --; env; echo --; readlink /proc/self/fd/0; pwd')
    repo.version = (2, 36)
    argv, env, where = (part.split("\n") for part in repo.git("status", "-z").decode().split("--\n"))
    for setting in ("core.hooksPath=/dev/null", "core.fsmonitor=false", "commit.gpgSign=false", "core.fsync=objects,reference,index"):
        assert argv[argv.index(setting) - 1] == "-c"
    assert argv[-3:] == ["status", "-z", ""]
    assert {"GIT_OPTIONAL_LOCKS=0", "GIT_LITERAL_PATHSPECS=1", "GIT_TERMINAL_PROMPT=0", "GIT_CONFIG_COUNT=0"} <= set(env)
    names = {line.split("=")[0] for line in env}
    assert not names & {"GIT_DIR", "GIT_INDEX_FILE", "GIT_TRACE2_EVENT", "GIT_GLOB_PATHSPECS"}
    assert where == ["/dev/null", str(tmp_path), ""]
    repo.version = (2, 35)
    assert b"core.fsyncObjectFiles=true\n" in repo.git("status")


def test_a30_a_ctrl_c_cannot_reach_git(fake_git: Callable[[str], Repo], tmp_path: Path) -> None:
    repo = fake_git("")
    report = (  # not by the shell, which sets its own mask
        "import os, signal; print(*signal.pthread_sigmask(signal.SIG_BLOCK, ()));"
        " print(os.getpid(), os.getsid(0), os.getpgrp())"
    )
    (tmp_path / "bin/git").write_text(f"#!{sys.executable} -IS\n{report}\n")
    mask, session = repo.git("x").decode().splitlines()
    blocked = set(map(int, mask.split()))
    assert blocked == {signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP}
    assert len(set(session.split())) == 1  # it leads a session
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_the_time_limit_ends_the_whole_group_with_term_first(
    fake_git: Callable[[str], Repo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(gitutil, "KILL_GRACE_S", 0.1 if stubborn else 9.0)
    trap = "trap '' TERM" if stubborn else f"trap 'rm {tmp_path}/lock; exit 1' TERM"
    repo = fake_git(f"{trap}; : > {tmp_path}/lock; sleep 60 & echo $! > {tmp_path}/child; wait; wait; sleep 60")
    with pytest.raises(GitError, match=r"did not end within 0\.5 s") as error:
        repo.git("gc", limit_s=0.5)
    assert (error.value.status, error.value.command) == (None, ("gc",))
    assert (tmp_path / "lock").exists() == stubborn
    assert not gitkit.is_alive(tmp_path / "child")


def test_grandchild_that_keeps_the_output_open_delays_nobody(fake_git: Callable[[str], Repo], tmp_path: Path) -> None:
    repo = fake_git(f"sleep 60 & echo $! > {tmp_path}/child; echo done")
    assert repo.git("x", limit_s=30) == b"done\n"
    assert gitkit.is_alive(tmp_path / "child")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


class Interrupted(BaseException):
    """What a signal handler raises."""


def test_exception_in_a_signal_handler_ends_git_in_order(fake_git: Callable[[str], Repo], tmp_path: Path) -> None:
    repo = fake_git(f"trap 'rm {tmp_path}/lock; exit 1' TERM; : > {tmp_path}/lock; : > {tmp_path}/fifo; while :; do sleep 0.02; done")
    os.mkfifo(tmp_path / "fifo")

    def interrupt(*_: object) -> None:
        raise Interrupted

    def strike() -> None:
        (tmp_path / "fifo").read_bytes()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, interrupt)
    threading.Thread(target=strike, daemon=True).start()
    try:
        with pytest.raises(Interrupted):
            repo.git("gc", limit_s=30)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "lock").exists()


def test_without_pidfd(fake_git: Callable[[str], Repo], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(subprocess, "_CAN_USE_PIDFD_OPEN", False, raising=False)  # Python 3.15
    repo = fake_git('[ "$1" = quick ] || case "$*" in *slow*) sleep 60;; esac; cat')
    assert repo.git("x", stdin=b"bytes\xff\0") == b"bytes\xff\0"
    data = os.urandom(1 << 20)
    assert repo.git("x", stdin=data) == data
    with pytest.raises(GitError, match="did not end"):
        repo.git("slow", limit_s=0.2)


def test_a_failure_says_what_and_why(repo: Repo) -> None:
    with pytest.raises(GitError) as error:
        repo.git("cat-file", "-p", "nonsense")
    assert (error.value.command, error.value.status) == (("cat-file", "-p", "nonsense"), 128)
    assert str(error.value) == "`git cat-file -p nonsense` exited 128: fatal: Not a valid object name nonsense"
    assert repo.git("cat-file", "-e", "nonsense", ok=(0, 128)) == b""
    assert "\n" not in str(GitError("a\nb\n", ["x" * 300], 1))


# ---- opening -------------------------------------------------------------------------------------

def test_facts(project: Path, repo: Repo) -> None:
    assert (repo.root, repo.top, repo.git_dir, repo.common_dir) == (project, project, project / ".git", project / ".git")
    assert (repo.prefix, repo.state_dir) == ("", project / ".git/orchestrator")
    assert Repo.open(project / "src/deep").prefix == "src/deep/"
    git(project, "worktree", "add", "-q", "-b", "side", "../linked")
    git(project.parent / "linked", "bisect", "start", "-q")
    linked = Repo.open(project.parent / "linked")
    assert (linked.git_dir, linked.common_dir) == (project / ".git/worktrees/linked", project / ".git")
    assert (linked.operation(), repo.operation()) == ("bisect", None)
    commit = git(project, "rev-parse", "HEAD").strip()
    assert repo.head() == Head("refs/heads/main", commit)
    git(project, "checkout", "-q", "--detach")
    assert repo.head() == Head(None, commit)
    git(project, "checkout", "-q", "--orphan", "a/b")
    assert repo.head() == Head("refs/heads/a/b", None)


def chown_away(where: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a repository away")
    for path in (where, where / ".git"):
        os.chown(path, 12345, 12345)


OPENING: Mapping[str, tuple[Act, str, str]] = {
    "no_repo": (run("rm -rf .git"), ".", "is not in a git repository. Run `git init`"),
    "no_folder": (run("true"), "nowhere", "is not a folder"),
    "bare": (run("git clone -q --bare . ../project.git && mv ../project.git bare"), "bare", "is no work tree but"),
    "inside_git_dir": (run("true"), ".git", "is no work tree but"),
    "foreign_owner": (chown_away, ".", "safe.directory"),
    "bad_config": (run("echo '[core' > .git/config"), ".", "bad config"),
}


@pytest.mark.parametrize(("act", "where", "says"), table(OPENING))
def test_opening_refuses(project: Path, monkeypatch: pytest.MonkeyPatch, act: Act, where: str, says: str) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    act(project)
    with pytest.raises(GitError, match=says):
        Repo.open(project / where)


def test_no_git(project: Path, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GitError, match="Install git"):
        Repo.open(project)
    done = repo.commit_state(project / NAME, b"v: 2\n", "m")
    assert (done.outcome, "git was not found" in str(done.warning)) == ("skipped", True)


# ---- questions -----------------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["garbage\n", "", "1" * 40 + "\n"])
def test_a_damaged_head_is_no_unborn_branch(project: Path, repo: Repo, content: str) -> None:
    (project / ".git/refs/heads/main").write_text(content)
    with pytest.raises(GitError):
        repo.head()
    assert "git cannot work here" in " ".join(p.what for p in repo.problems(project / NAME))


def test_history(project: Path, repo: Repo) -> None:
    start = git(project, "rev-parse", "HEAD").strip()
    git(project, "commit", "-q", "--allow-empty", "-m", "one\n\nOrchestrator-Attempt: abc")
    git(project, "commit", "-q", "--allow-empty", "-m", "two\n\nsays Orchestrator-Attempt: def")
    old, new = git(project, "rev-parse", "HEAD^", "HEAD").split()
    assert repo.commits_between(start, new) == [old, new]
    assert repo.commits_between(new, start) == []
    assert repo.is_ancestor(start)
    git(project, "switch", "-q", "-c", "side", start)
    assert not repo.is_ancestor(new)
    assert not repo.is_ancestor("1" * 40)
    git(project, "switch", "-q", "main")
    asked = [("abc", None), ("abc", start), ("abc", old), ("ab", None), ("def", None), ("abc", "1" * 40)]
    assert [repo.mentions(*question) for question in asked] == [True, True, False, False, False, True]
    git(project, "checkout", "-q", "--orphan", "empty")
    assert not repo.mentions("abc", start)


HARD_NAMES = ["plain.txt", "with space.txt", "ünï.txt", "tab\there", "new\nline", 'quo"te\\', "arrow -> b", "-dash", ":(top)x", "*", "data[1].txt", " lead and trail ", os.fsdecode(b"latin-\xe4")]  # fmt: skip


def test_d04_a05_a07_a21_names_are_paths_and_never_mangled(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    for name in HARD_NAMES:
        (project / name).write_text(name, errors="surrogateescape")
    assert repo.dirty_paths() == sorted(HARD_NAMES)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    assert paths(changes) == sorted(HARD_NAMES)
    commit = repo.commit([c.after for c in changes], "names")
    assert repo.changes(before.head.commit, str(commit)) == changes
    assert git(project, "status", "--porcelain") == ""
    for name in HARD_NAMES[::4]:
        assert content(repo, entry_of(repo, "HEAD", name)) == os.fsencode(name)
        (project / name).write_text("new\n")
        assert repo.commit_state(project / name, b"new\n", "m").outcome == "committed"
        assert git(project, "diff-tree", "-r", "-z", "--no-commit-id", "--name-only", "HEAD") == f"{name}\0"


def test_a14_dirty_paths(project: Path, repo: Repo, make_repo: Callable[..., Path]) -> None:
    assert repo.dirty_paths() == []
    make_repo("project/vendor/lib")
    git(project, "config", "status.showUntrackedFiles", "no")
    run("echo x > a.txt", "git add a.txt", "mkdir new", "touch new/f new/g x.log", "git rm -q --cached b.txt", "chmod +x c.txt")(project)
    assert repo.dirty_paths() == ["a.txt", "b.txt", "b.txt", "c.txt", "new/f", "new/g", "vendor/lib/"]
    assert Repo.open(project / "src").dirty_paths() == repo.dirty_paths()


def test_files_are_stored_as_git_add_would(project: Path, repo: Repo) -> None:
    git(project, "config", "core.autocrlf", "true")
    (project / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (project / "src/tool").write_text("#!/bin/sh\n")
    (project / "src/tool").chmod(0o755)
    names = ("crlf.txt", "src/tool", "a.txt")
    entries = repo.blobs({project / name: (project / name).read_bytes() for name in names})
    git(project, "add", "-A")
    staged = git(project, "ls-files", "-s", "-z", *names).split("\0")[:-1]
    assert sorted(f"{e.mode} {e.oid} 0\t{e.path}" for e in entries) == sorted(staged)
    assert content(repo, made(repo, project / "a.txt", b"other\n")) == b"other\n"  # somebody edits it
    git(project, "config", "filter.loud.clean", "tr a-z A-Z")
    (project / ".gitattributes").write_text("a.txt filter=loud\n")
    assert content(repo, made(repo, project / "a.txt", b"other\n")) == b"OTHER\n"
    with pytest.raises(GitError, match="outside of the repository"):
        repo.relative(project.parent / "x")
    assert repo.committed("HEAD", "src/none") is repo.committed(None, "a.txt") is None
    git(project, "update-index", "--chmod=+x", "run.sh")
    git(project, "config", "core.fileMode", "false")  # modes that the file system does not keep
    (project / "a.txt").chmod(0o755)
    repo = Repo.open(project)
    assert [entry_of(repo, repo.snapshot().tree, name).mode for name in ("a.txt", "run.sh")] == ["100644", "100755"]


def test_refs(project: Path, repo: Repo) -> None:
    head = git(project, "rev-parse", "HEAD").strip()
    for name in ("A-1/build/1", "A-1/build/12", "A-10/build/1", "A-1x"):
        git(project, "update-ref", f"refs/orchestrator/salvage/{name}", head)
    stem = "refs/orchestrator/salvage/A-1/build/"
    assert repo.refs(stem) == {f"{stem}1": head, f"{stem}12": head}
    for _ in range(2):
        repo.drop_refs([f"{stem}1"])
    assert list(repo.refs(stem)) == [f"{stem}12"]
    commit = gitkit.salvage(repo, f"{stem}2", repo.snapshot(), "first")
    with pytest.raises(GitError):
        gitkit.salvage(repo, f"{stem}2", repo.snapshot(), "second")
    assert git(project, "log", "-1", "--format=%H %P %s", f"{stem}2").split() == [commit, head, "first"]


# ---- snapshots -----------------------------------------------------------------------------------

def test_a_file_that_vanishes_while_git_looks_is_looked_for_again(project: Path, fake_git: Callable[[str], Repo]) -> None:
    """For `git add` that is fatal, but a temporary file of anybody's is no reason to end a run."""
    real, tries = shutil.which("git"), project.parent / "tries"
    (project / "new.txt").write_text("new\n")
    for times in (1, 99):
        tries.unlink(missing_ok=True)
        fails = f'echo x >> {tries}; if [ "$(wc -l < {tries})" -le {times} ]; then echo "fatal: unable to stat \'x\'" >&2; exit 128; fi'
        fake_git(f'case " $* " in *" add "*) {fails} ;; esac; exec {real} "$@"')
        repo = Repo.open(project)
        if times == 1:
            assert not entry_of(repo, repo.snapshot().tree, "new.txt").absent
        else:
            with pytest.raises(GitError, match="exited 128: fatal: unable to stat 'x'"):
                repo.snapshot()
        assert len(tries.read_text().split()) == min(times + 1, 3)


def test_a_snapshot_touches_nothing_and_sees_everything(messy: Path) -> None:
    project, repo = messy, Repo.open(messy)
    before, files = (project / ".git/index").read_bytes(), work_tree(project)
    taken = repo.snapshot("refs/orchestrator/snapshots/run/1")
    assert ((project / ".git/index").read_bytes(), work_tree(project)) == (before, files)
    assert gitkit.leftovers(project) == []
    assert stored(project, taken.tree) == {
        name: blob_id(data)
        for name, (kind, data) in files.items()
        if not stat.S_ISDIR(kind) and name not in ("x.log", "build/out")
    }
    assert json.loads(json.dumps(taken.staging)) == taken.staging
    assert sorted(row[0] + row.split("\t")[1] for row in taken.staging) == [
        "Ha.txt", "Hdocs/x.md", "Hempty-staged.txt", "Hnew-staged.txt", "Nintended.txt", "Srun.sh", "hc.txt"
    ]  # fmt: skip
    assert git(project, "rev-parse", "refs/orchestrator/snapshots/run/1^{tree}").strip() == taken.tree


@pytest.mark.parametrize("gone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_apart_stays_as_the_index_has_it(messy: Path, gone: bool) -> None:
    """Our own state is not read; and files beside it whose names look like patterns are."""
    repo = Repo.open(messy)
    repo.apart = NAME, f".{NAME}.tmp", "docs/[x].md"
    before = entry_of(repo, "HEAD", NAME)
    (messy / NAME).unlink() if gone else (messy / NAME).write_text("v: 2\n")
    (messy / f".{NAME}.tmp").write_text("half")
    (messy / "docs/x.md").write_text("new\n")
    taken = repo.snapshot()
    assert entry_of(repo, taken.tree, NAME) == before
    assert entry_of(repo, taken.tree, f".{NAME}.tmp").absent
    assert content(repo, entry_of(repo, taken.tree, "docs/x.md")) == b"new\n"


def test_an_edit_in_the_tick_of_the_staging_stays_seen(project: Path, repo: Repo) -> None:
    """An entry as young as its index file is one that git reads the file for."""
    git(project, "config", "core.trustctime", "false")
    (project / "b.txt").write_text("one\n")
    git(project, "add", "b.txt")
    (project / "b.txt").write_text("two\n")
    moment = (project / ".git/index").stat().st_mtime_ns
    os.utime(project / "b.txt", ns=(moment, moment))
    assert content(repo, entry_of(repo, repo.snapshot().tree, "b.txt")) == b"two\n"
    assert repo.commit([made(repo, project / "state", b"1\n")], "state")
    assert git(project, "status", "--porcelain", "b.txt") == "MM b.txt\n"


def test_a19_nested_repositories(project: Path, repo: Repo, make_repo: Callable[..., Path]) -> None:
    """New ones are in no commit, and nothing is taken from them."""
    before = repo.snapshot()
    make_repo("project/vendor/lib")
    run("git init -q vendor/empty", "echo z > after.txt")(project)
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    assert [(c.after.path, c.after.mode) for c in changes] == [("after.txt", "100644"), ("vendor/lib", "160000")]
    gitkit.salvage(repo, "refs/orchestrator/salvage/1", after, "x")
    repo.restore(before, changes)
    assert not (project / "after.txt").exists()
    assert (project / "vendor/lib/README.md").exists()
    entries = [change.after for change in changes]
    assert repo.unshared(entries) == ["vendor/lib"]
    assert repo.commit(entries, "phase")
    assert git(project, "diff-tree", "-r", "--no-commit-id", "--name-only", "HEAD").split() == ["after.txt"]


def test_a_commit_in_a_submodule_is_recorded_once_somebody_else_has_it(project: Path, repo: Repo, make_repo: Callable[..., Path]) -> None:
    theirs = make_repo("theirs")
    git(theirs, "config", "receive.denyCurrentBranch", "ignore")
    run(f"git -c protocol.file.allow=always submodule --quiet add {theirs} sub", "git commit -q -m sub")(project)
    _, changes = phase(repo, "cd sub && git commit -q --allow-empty -m 'by the agent' && echo x > ../d.txt")
    entries = [change.after for change in changes]
    assert (paths(changes), repo.unshared(entries)) == (["d.txt", "sub"], ["sub"])
    assert repo.commit(entries, "phase")
    assert repo.dirty_paths() == ["sub"]
    git(project / "sub", "push", "-q")
    assert repo.unshared(entries) == []
    assert repo.commit(entries, "again")
    assert repo.dirty_paths() == []


@contextmanager
def powerless(where: Path) -> Iterator[Path]:
    """A copy that belongs to somebody for whom file modes count, and that somebody's rights."""
    place = Path(tempfile.mkdtemp()) / "project"
    place.parent.chmod(0o755)
    shutil.copytree(where, place, symlinks=True)
    user = os.geteuid()
    if user == 0:
        for path in (place, *place.rglob("*")):
            os.lchown(path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield place
    finally:
        os.seteuid(user)
        sh(place, "chmod", "-R", "u+rwX", ".")
        shutil.rmtree(place.parent)


def test_a_file_that_cannot_be_read_is_no_deletion(project: Path) -> None:
    with powerless(project) as where:
        repo = Repo.open(where, delay=gitkit.no_delay)
        before = repo.snapshot()
        (where / "secret.txt").write_text("x")
        (where / "secret.txt").chmod(0)
        with pytest.raises(GitError, match=r"cannot be read.*secret\.txt.*gitignore"):
            repo.snapshot()
        (where / "secret.txt").unlink()
        (where / "src").chmod(0)
        assert repo.snapshot().tree == before.tree
        (where / "src").chmod(0o700)
        (where / "a.txt").write_text("changed\n")
        (where / "a.txt").chmod(0)
        with pytest.raises(GitError, match=r"cannot be read.*a\.txt"):
            repo.snapshot()


# ---- salvage and restore -------------------------------------------------------------------------

PHASES: Mapping[str, Act] = {
    "edit": run("echo agent > b.txt", "echo agent >> src/one.py"),
    "new_files": run("mkdir -p n/e/w && echo 1 > n/e/w/f && echo 2 > n/g"),
    "remove": run("rm b.txt", "git rm -q src/deep/two.py"),
    "move": run("git mv src/one.py src/uno.py", "mv b.txt docs/b.txt"),
    "chmod": run("chmod +x b.txt"),
    "symlinks": run("ln -sf b.txt link", "rm b.txt && ln -s link b.txt", "ln -s nowhere dangling"),
    "file_becomes_folder": run("rm b.txt && mkdir -p b.txt/deep && echo x > b.txt/deep/f"),
    "folder_becomes_file": run("rm -r src && echo x > src"),
    "folder_becomes_link": run("mv src elsewhere && ln -s elsewhere src"),
    "file_becomes_empty_folder": run("rm b.txt && mkdir -p b.txt/one/two"),
    "odd_names": run("echo x > 'sp ace' && echo x > '-dash' && echo x > '*' && echo x > ':(top)b.txt' && printf x > \"$(printf 'new\\nline')\""),
    "a01_stages_all": run("echo agent > b.txt", "git -c core.fileMode=true add b.txt docs"),
    "adds_everything": run("echo agent > b.txt && echo agent > n.txt", "git add b.txt n.txt"),
    "stash": run("echo agent > b.txt && git add intended.txt", "git stash -q"),
    "stash_untracked": run("echo agent > n.txt && git add intended.txt", "git stash -q -u"),
    "reset_hard": run("echo agent > b.txt", "git reset -q --hard"),
    "checkout": run("git checkout -q -- a.txt && git clean -q -fd"),
    "unstages": run("git reset -q && echo agent > a.txt"),
    "takes_intended": run("git add intended.txt && echo agent > intended.txt"),
    "touches_hidden": run("echo agent > c.txt && echo agent > run.sh"),
    "ignores_more": run("echo '*.txt' >> .gitignore && rm b.txt"),
    "ignores_less": run(": > .gitignore && echo agent > n.txt"),
    "removes_ignore_rules": run("rm .gitignore"),
    "throws_away": run("git reset -q --hard && git clean -q -fd && git gc -q --prune=now"),
    "new_ignore_rules": run("mkdir n && echo '*.tmp' > n/.gitignore && echo x > n/f.tmp && echo x > n/g"),
}  # fmt: skip


KEPT_BY_GIT = {"n", "n/f.tmp"}  # ignored by a rule of the agent's own: never recorded, never removed


@pytest.mark.parametrize("act", table(PHASES, slow=PHASES.keys() - {"folder_becomes_link", "takes_intended"}))
def test_a_failed_phase_is_kept_and_undone(messy: Path, act: Act) -> None:
    project, repo = messy, Repo.open(messy)
    files, staged = work_tree(project), index(project)
    before = repo.snapshot("refs/orchestrator/snapshots/run/1")
    act(project)
    stashes = git(project, "stash", "list")
    agents = work_tree(project)
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    commit = gitkit.salvage(repo, "refs/orchestrator/salvage/A/build/1", after, "[A][build] Salvaged")
    before = Snapshot(**{**json.loads(json.dumps(before._asdict())), "head": before.head})
    repo.restore(before, changes)
    repo.restage(before, after)
    left = {name: row for name, row in work_tree(project).items() if name not in KEPT_BY_GIT}
    assert left == files
    assert index(project) == staged
    if left == work_tree(project):
        assert repo.snapshot() == before
    assert git(project, "stash", "list") == stashes
    assert repo.changes(commit, after.tree) == []
    kept = stored(project, commit)
    assert kept == {name: blob_id(agents[name][1]) for name in kept}
    assert git(project, "show", ":a.txt") == "a1 staged\na2\na3\n"


def test_restoring_refuses_what_was_changed_since(project: Path, repo: Repo) -> None:
    before, changes = phase(repo, "echo agent > b.txt && echo agent > n.txt && rm docs/x.md")
    run("echo operator > n.txt")(project)
    files = work_tree(project)
    with pytest.raises(GitError, match=r"changed again.*n\.txt"):
        repo.restore(before, changes)
    assert work_tree(project) == files
    run("echo agent > n.txt && git add n.txt && touch .git/index.lock")(project)
    with pytest.raises(HeadBusy, match=r"index\.lock"):
        repo.restore(before, changes)
    (project / ".git/index.lock").unlink()
    for some in (changes[:1], changes, changes):  # as often as a start is killed
        repo.restore(before, some)
    assert git(project, "status", "--porcelain") == ""


NOT_KEPT = {
    "ignored_file_in_a_folder": run("rm b.txt && mkdir b.txt && echo secret > b.txt/x.log"),
    "ignored_file_above": run("rm -r docs && echo '/docs' >> .git/info/exclude && echo secret > docs"),
    "ignored_file_itself": run("echo '/u.txt' >> .git/info/exclude && echo secret > u.txt"),
}


@pytest.mark.parametrize("act", table(NOT_KEPT))
def test_restoring_never_removes_what_is_not_kept(project: Path, repo: Repo, act: Act) -> None:
    (project / "u.txt").write_text("operator\n")
    before = repo.snapshot()
    act(project)
    with pytest.raises(GitError):
        repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert any(data == b"secret\n" for _, data in work_tree(project).values())


def test_a_file_that_cannot_be_put_back_is_named(project: Path, repo: Repo) -> None:
    run("mkdir -p .git/info", "echo 'b.txt filter=f' > .git/info/attributes", "git config filter.f.smudge 'echo broken'")(project)
    before, changes = phase(repo, "echo agent > b.txt")
    with pytest.raises(GitError, match=r"could not be put back as it was: b\.txt"):
        repo.restore(before, changes)


def test_ignore_rules_in_a_folder_that_became_a_file(project: Path, repo: Repo) -> None:
    run("echo '*.tmp' > docs/.gitignore", "echo hidden > docs/x.tmp")(project)
    before, changes = phase(repo, "mv docs/x.tmp . && rm -r docs && echo agent > docs")
    repo.restore(before, changes)
    assert repo.snapshot().tree == before.tree
    assert (project / "docs/.gitignore").read_text() == "*.tmp\n"


@pytest.mark.parametrize("command", ["git add -A", pytest.param("git rm -q -f --cached a.txt b.txt", marks=pytest.mark.slow)])
def test_staging_that_an_agent_disturbed_is_given_back(messy: Path, command: str) -> None:
    project, repo = messy, Repo.open(messy)
    staged = index(project, "src/one.py")
    before = repo.snapshot()
    run("echo agent > src/one.py", command)(project)
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    assert paths(changes) == ["src/one.py"]
    repo.commit([c.after for c in changes], "phase")
    repo.restage(before, after)
    assert index(project, "src/one.py") == staged


def test_a15_a16_documents_are_the_recorded_bytes_and_never_staged(project: Path, repo: Repo) -> None:
    _, changes = phase(repo, "echo as the phase left it > docs/new.md")
    assert git(project, "diff", "--cached", "--name-only") == ""
    (project / "docs/new.md").write_text("typed on since\n")
    (project / "docs/x.md").write_text("half done by another phase\n")  # a17
    repo.commit([c.after for c in changes], "batch")
    assert git(project, "show", "HEAD:docs/new.md") == "as the phase left it\n"
    assert repo.dirty_paths() == ["docs/new.md", "docs/x.md"]


def test_a_conflict_in_our_own_file_keeps_no_snapshot_from_being_taken(project: Path) -> None:
    repo, blob = Repo.open(project), git(project, "rev-parse", f"HEAD:{NAME}").strip()
    repo.apart = (NAME,)
    rows = f"0 {gitutil.ABSENT_OID}\t{NAME}\n" + "".join(f"100644 {blob} {stage}\t{NAME}\n" for stage in "123")
    subprocess.run(["git", "update-index", "--index-info"], cwd=project, input=rows, text=True, check=True)
    (project / "a.txt").write_text("edited\n")
    before, changes = phase(repo, "echo edited again > a.txt")
    assert {c.after.path for c in repo.changes(before.head.commit, before.tree)} == {"a.txt", NAME}
    repo.restore(before, changes)
    assert (project / "a.txt").read_text() == "edited\n"
    assert len(git(project, "ls-files", "-u").splitlines()) == 3


# ---- hooks ---------------------------------------------------------------------------------------

def put_hook(where: Path, name: str, body: str, *, folder: str = ".git/hooks", line: str = "#!/bin/sh\n") -> None:
    (where / folder).mkdir(parents=True, exist_ok=True)
    (where / folder / name).write_text(f"{line}{body}\n")
    (where / folder / name).chmod(0o755)


@pytest.fixture
def phase_commit(project: Path, repo: Repo) -> list[Entry]:
    """One file edited, one new, one gone; the operator has something staged and something untracked."""
    run("echo theirs > c.txt && git add c.txt && echo x > theirs.txt", "echo edited > b.txt && echo new > n.txt && rm docs/x.md")(project)
    return [made(repo, project / "b.txt", b"edited\n"), gitkit.absent("docs/x.md"), made(repo, project / "n.txt", b"new\n")]


def texts(repo: Repo, entries: list[Entry]) -> dict[str, str]:
    return {entry.path: "" if entry.absent else content(repo, entry).decode() for entry in entries}


def test_hooks_see_exactly_the_commit_and_our_files_as_on_disk(project: Path, repo: Repo, phase_commit: list[Entry]) -> None:
    put_hook(project, "pre-commit", "git diff --cached --name-status; git diff --name-only; pwd; readlink /proc/self/fd/0; echo $GIT_EDITOR")
    put_hook(project, "prepare-commit-msg", 'echo "$2"; cat "$1"')
    (project / NAME).write_text("v: 2\n")
    own = [project / NAME]
    before = index(project), work_tree(project)
    done = repo.run_hooks(phase_commit, "Subject\n\nBody: ü", own=own)
    assert done == HookResult("passed", "prepare-commit-msg", "message\nSubject\n\nBody: ü", phase_commit, "Subject\n\nBody: ü\n")
    assert repo.run_hooks(phase_commit, "x", own=own, message_only=True).output == "message\nx"
    (project / ".git/hooks/prepare-commit-msg").unlink()
    seen = repo.run_hooks(phase_commit, "x", own=own).output.splitlines()
    assert seen == [f"M\t{NAME}", "M\tb.txt", "D\tdocs/x.md", "A\tn.txt", "c.txt", str(project), "/dev/null", ":"][: len(seen)]
    assert (index(project), work_tree(project)) == before
    assert gitkit.leftovers(project) == []


OUTCOMES: Mapping[str, tuple[str, str, str, str]] = {  # hook, body, outcome, what it said
    "files": ("pre-commit", "echo out; echo no good >&2; exit 3", "files", "out\nno good"),
    "message": ("commit-msg", "echo no ticket; exit 1", "message", "no ticket"),
    "prepared": ("prepare-commit-msg", "exit 1", "message", ""),
    "emptied": ("commit-msg", ': > "$1"', "message", "it left an empty message"),
    "missing_tool": ("pre-commit", "echo npx: not found; exit 127", "broken", "npx: not found"),
    "not_executable": ("commit-msg", "exit 126", "broken", ""),
    "hangs": ("pre-commit", "echo begun; trap '' TERM; echo $$ > .git/pid; sleep 60; sleep 60", "broken", "begun\nit did not end within 0.5 s"),
}


@pytest.mark.parametrize(("name", "body", "outcome", "says"), table(OUTCOMES, slow="hangs prepared not_executable emptied"))
def test_a_hook_rejects_files_or_the_message_or_cannot_work(
    project: Path, repo: Repo, phase_commit: list[Entry], monkeypatch: pytest.MonkeyPatch, name: str, body: str, outcome: str, says: str
) -> None:
    monkeypatch.setattr(gitutil, "KILL_GRACE_S", 0.1)
    put_hook(project, name, body)
    done = repo.run_hooks(phase_commit, "x", limit_s=0.5 if "sleep" in body else 60)
    assert (done.outcome, done.hook, done.output, done.entries) == (outcome, name, says, phase_commit)
    assert not (project / ".git/pid").exists() or not gitkit.is_alive(project / ".git/pid")
    if name == "pre-commit":  # a commit of documents does not ask it
        assert repo.run_hooks(phase_commit, "x", message_only=True).outcome == "passed"


AS_IT_WAS = {"b.txt": "edited\n", "docs/x.md": "", "n.txt": "new\n"}
MENDS: Mapping[str, tuple[str, str, dict[str, str]]] = {  # body, outcome, the commit then
    "index_and_exit_0": ("echo fixed > b.txt; git add b.txt", "passed", {**AS_IT_WAS, "b.txt": "fixed\n"}),
    "work_tree_and_exit_0": ("echo fixed > b.txt", "passed", AS_IT_WAS),
    "mends_and_says_no": ("echo fixed > b.txt; exit 1", "files", AS_IT_WAS),
    "touches": ("touch b.txt; echo x > a.txt; exit 1", "files", AS_IT_WAS),
    "takes_out": ("git rm -q --cached n.txt; rm b.txt; git add b.txt", "passed", {"b.txt": "", "docs/x.md": ""}),
    "takes_in": ("echo made > g.txt; git add -A", "passed", {**AS_IT_WAS, "g.txt": "made\n"}),
    "our_own": (f"echo '# x' >> {NAME}; git add -u", "passed", AS_IT_WAS),
}


@pytest.mark.parametrize(("body", "outcome", "left"), table(MENDS, slow=MENDS.keys() - {"index_and_exit_0", "takes_in"}))
def test_what_a_hook_mends_is_taken_over_but_nothing_of_others(
    project: Path, repo: Repo, phase_commit: list[Entry], body: str, outcome: str, left: dict[str, str]
) -> None:
    put_hook(project, "pre-commit", body)
    put_hook(project, "commit-msg", "echo 'Change-Id: 1' >> \"$1\"")
    staged, head = index(project), repo.head()
    done = repo.run_hooks(phase_commit, "Subject\n\nA: b", own=[project / NAME], theirs={"c.txt", "theirs.txt"})
    assert (done.outcome, texts(repo, done.entries)) == (outcome, left)
    assert index(project) == staged
    if outcome == "passed":
        assert done.message == "Subject\n\nA: b\nChange-Id: 1\n"
        commit = repo.commit(done.entries, done.message)
        assert texts(repo, [c.after for c in repo.changes(head.commit, str(commit))]) == left
        assert git(project, "log", "-1", "--format=%B").rstrip() == done.message.rstrip()


def test_which_hooks_count(project: Path, repo: Repo, phase_commit: list[Entry]) -> None:
    nothing = HookResult("passed", "", "", phase_commit, "x\n")
    assert repo.run_hooks(phase_commit, "x") == nothing
    put_hook(project, "pre-commit", "exit 1")
    (project / ".git/hooks/pre-commit").chmod(0o644)
    assert repo.run_hooks(phase_commit, "x") == nothing
    put_hook(project, "pre-commit", "echo without a shebang; exit 1", folder="my hooks", line="")
    git(project, "config", "core.hooksPath", "my hooks")
    repo.head()
    assert repo.run_hooks(phase_commit, "x").output == "without a shebang"
    put_hook(project, "pre-commit", "", folder="my hooks", line="#!/nonexistent\n")
    done = repo.run_hooks(phase_commit, "x")
    assert (done.outcome, "cannot be run" in done.output) == ("broken", True)
    git(project, "config", "--unset", "core.hooksPath")  # a linked work tree without commits
    put_hook(project, "pre-commit", "git diff --cached --name-only; exit 1")
    where = project.parent / "linked"
    git(project, "worktree", "add", "-q", "--detach", "../linked")
    git(where, "checkout", "-q", "--orphan", "fresh")
    repo = Repo.open(where)
    assert repo.run_hooks([made(repo, where / "b.txt", b"b\n")], "x").output == "b.txt"


# ---- signatures ----------------------------------------------------------------------------------

def test_commits_are_signed_as_git_is_configured_until_that_fails(project: Path, repo: Repo) -> None:
    key = gitkit.sign_with_a_key(project, project.parent)
    assert (repo.wants_signatures(), repo.try_signing(), repo.try_signing(terminal=True)) == (True, None, None)
    for n in range(3):
        (project / NAME).write_text(f"v: {n + 2}\n")
        assert repo.commit_state(project / NAME, b"v: %d\n" % (n + 2), f"State {n}").outcome == "committed"
        if n == 1:
            key.unlink()
    assert git(project, "log", "--format=%G? %s").splitlines() == ["N State 2", "G State 1", "G State 0", "N Start"]
    assert repo.unsigned == [git(project, "rev-parse", "HEAD").strip()]
    assert "sign" in repo.sign_trouble
    problem = repo.try_signing()
    assert problem is not None
    assert "commits cannot be signed: " in problem.what


def test_a_commit_is_signed_off_once_where_that_is_asked_for(project: Path, repo: Repo) -> None:
    assert repo.wants_signatures() is False
    assert repo.signed_off("x") == "x\n"
    repo.signoff, trailer = True, "Signed-off-by: Operator <operator@example.invalid>\n"
    messages = {"x": f"x\n\n{trailer}", "x\n\nbody: of words\nmore": f"x\n\nbody: of words\nmore\n\n{trailer}", "x\n\nbody\n\nA-b: c\n d\n": f"x\n\nbody\n\nA-b: c\n d\n{trailer}"}
    for message, wanted in messages.items():
        assert repo.signed_off(message) == repo.signed_off(wanted) == wanted
    put_hook(project, "commit-msg", 'grep -q ^Signed-off-by: "$1"')
    done = repo.run_hooks([made(repo, project / "n.txt", b"new\n")], "x")
    assert (done.outcome, done.message) == ("passed", messages["x"])
    assert repo.commit(done.entries, done.message)
    assert repo.commit_state(project / NAME, b"v: 2\n", "x").outcome == "committed"
    for commit in ("HEAD", "HEAD~"):
        assert git(project, "log", "-1", "--format=%B", commit).rstrip("\n") + "\n" == messages["x"]


# ---- preconditions -------------------------------------------------------------------------------

PROBLEMS: Mapping[str, tuple[Act, str, str]] = {
    "a22_cherry_pick": (run("git rev-parse HEAD > .git/CHERRY_PICK_HEAD"), "a cherry-pick is in progress", "git cherry-pick --abort"),
    "a22_revert": (run("git rev-parse HEAD > .git/REVERT_HEAD"), "a revert is in progress", "git revert --abort"),
    "a22_am": (run("mkdir .git/rebase-apply && touch .git/rebase-apply/applying"), "an am is in progress", "git am --abort"),
    "revert_between_steps": (run("mkdir .git/sequencer", "echo 'revert abc' > .git/sequencer/todo"), "a revert is in progress", "git revert --abort"),
    "picks_between_steps": (run("mkdir .git/sequencer .git/reftable"), "a cherry-pick is in progress", "git cherry-pick --abort"),
    "detached": (run("git checkout -q --detach"), "HEAD is detached", "git switch BRANCH"),
    "unmerged": (run("echo one > a.txt && git stash -q", "echo two > a.txt && git commit -q -am two", "git stash pop -q || true"), "merge conflicts in a.txt", "git add"),
    "index_lock": (run("touch .git/index.lock"), "index.lock", "rm '"),
    "head_lock": (run("touch .git/HEAD.lock"), "HEAD.lock", "rm '"),
    "branch_lock": (run("touch .git/refs/heads/main.lock"), "main.lock", "rm '"),
    "packed_refs_lock": (run("touch .git/packed-refs.lock"), "packed-refs.lock", "rm '"),
    "config_lock": (run("touch .git/config.lock"), "config.lock", "rm '"),
    "index_damaged": (run("printf 'DIRCgarbage, but long enough to be looked at by git' > .git/index"), "git cannot work here", "fsck"),
    "tree_gone": (run("t=$(git rev-parse HEAD^{tree}) && rm -f .git/objects/$(echo $t | cut -c1-2)/$(echo $t | cut -c3-)"), "git cannot work here", "fsck"),
    "backlog_skip_worktree": (run(f"git update-index --skip-worktree {NAME}"), "skip-worktree", "--no-skip-worktree"),
}  # fmt: skip


@pytest.mark.parametrize(("act", "what", "remedy"), table(PROBLEMS, slow="revert_between_steps a22_am a22_cherry_pick index_damaged head_lock branch_lock packed_refs_lock a22_revert"))
def test_problem(project: Path, repo: Repo, act: Act, what: str, remedy: str) -> None:
    act(project)
    [problem] = repo.problems(project / NAME)
    assert what in problem.what
    assert remedy in problem.remedy


def test_no_problem_and_all_at_once(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, repo = messy, Repo.open(messy, delay=gitkit.no_delay)
    assert repo.problems(project / NAME) == repo.remarks(project / NAME) == []
    (project / NAME).unlink()
    assert repo.problems(project / NAME) == []
    run(f"git checkout -q {NAME}", "git checkout -q --detach", "git bisect start -q", f"git update-index --skip-worktree {NAME}", "touch .git/index.lock")(project)
    monkeypatch.setenv("GIT_INDEX_FILE", "/somewhere")
    repo.version = (2, 30)
    found = " | ".join(problem.what for problem in repo.problems(project / NAME))
    for what in ("2.30 is too old", "inside of a git hook", "index.lock", "bisect", "detached", "skip-worktree"):
        assert what in found
    assert Problem("git 2.30 is too old", "Install git 2.34 or newer.") in repo.problems(project / NAME)


REMARKS = {
    f"git rm -q --cached {NAME} && git commit -q -m x": "not tracked",
    f"git add {NAME} && git commit -q -m y; echo '{NAME} filter=lfs' > .gitattributes": "filter=lfs",
    f"echo '{NAME} ident' > .gitattributes": "ident=set",
}


def test_remarks(project: Path, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, says in REMARKS.items():
        run(command)(project)
        [remark] = repo.remarks(project / NAME)
        assert says in remark
        assert repo.problems(project / NAME) == []
    for name in IDENTITY:
        monkeypatch.delenv(name)
    git(project, "config", "user.useConfigOnly", "true")
    repo.version = (2, 35)
    found = " | ".join(repo.remarks(project / NAME))
    for what in ("older than 2.36", "no name and e-mail"):
        assert what in found


# ---- what is asked once, and what of git is not trusted ------------------------------------------

def test_what_is_staged_is_known_after_commits_as_before(project: Path) -> None:
    """Concluded, not asked again; a repository opened anew finds the same."""
    repo = Repo.open(project)
    (project / "a.txt").write_text("staged\n")
    (project / "later").write_text("meant to come\n")
    git(project, "add", "a.txt")
    git(project, "add", "-N", "later")
    git(project, "rm", "-q", "--cached", "b.txt")
    for n in range(3):
        assert repo.snapshot() == Repo.open(project).snapshot()
        assert repo.commit([made(repo, project / "state", b"%d\n" % n)], "state")
        if n == 1:
            git(project, "add", "later")
    assert [row.split("\t")[1] for row in repo.snapshot().staging] == ["a.txt", "later", "b.txt"]


def test_what_is_staged_during_a_commit_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, update = Repo.open(project), Repo.git
    (project / "b.txt").write_text("theirs\n")
    assert repo.snapshot().staging == []

    def beside(self: Repo, *args: str, **rest: Any) -> bytes:
        if args[0] == "update-ref":
            git(project, "add", "b.txt")
        return update(self, *args, **rest)

    monkeypatch.setattr(Repo, "git", beside)
    assert repo.commit([made(repo, project / "state", b"1\n")], "state")
    assert [row.split("\t")[1] for row in repo.snapshot().staging] == ["b.txt"]


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param({"b.txt": None, "b.txt/b": "inside", "none/none": None}, marks=pytest.mark.slow),
        {"d/x": None, "d/y/z": None, "d": "a file"},
        {"n\nl": "x", "b.txt-": "1", '"quoted"': "q", "-dash": "d", ":(top)x": "t", "*": "s"},
    ],
)
def test_files_and_folders_may_change_places_in_a_commit(project: Path, wanted: dict[str, str | None]) -> None:
    (project / "d/y").mkdir(parents=True)
    for name in ("d/x", "d/y/z", "n\nl"):
        (project / name).write_text(name)
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Files")
    before = set(git(project, "ls-files", "-z").split("\0"))
    repo = Repo.open(project)
    oids = {path: made(repo, project / "any", text.encode()).oid for path, text in wanted.items() if text}
    entries = [Entry(path, "100644", oids[path]) if path in oids else gitkit.absent(path) for path in wanted]
    assert repo.commit(entries, "text")
    now = set(git(project, "ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0"))
    assert now - {""} == (before - {""} - wanted.keys()) | oids.keys()
    assert git(project, "diff", "--cached", "HEAD") == ""
    assert git(project, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


def test_what_git_does_not_hold_is_not_committed(project: Path) -> None:
    """As when an agent's `git gc --prune=now`, or a power cut, took the recorded bytes of a document."""
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    entry = made(repo, project / "new", b"new\n")
    place = project / ".git/objects" / entry.oid[:2] / entry.oid[2:]
    for damage in (place.unlink, place.touch):
        damage()
        with pytest.raises(GitError, match=f"object {entry.oid} is missing or damaged.*{place}, remove it"):
            repo.commit([entry], "text")
        assert git(project, "rev-parse", "HEAD") == head
        assert git(project, "status", "-s") == ""
    place.unlink()  # as the message says
    assert repo.commit([made(repo, project / "new", b"new\n")], "text")


def test_a_commit_asks_git_for_little_and_for_nothing_twice(project: Path) -> None:
    repo, seen = Repo.open(project), list[list[str]]()
    asking = repo.git_dir

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and args[1][0] == "git" and asking:
            seen.append(list(args[1]))

    repo.snapshot()
    sys.addaudithook(watch)
    before = repo.snapshot("refs/orchestrator/snapshots/1")
    (project / "new").write_text("1\n")
    after = repo.snapshot()
    entries = [change.after for change in repo.changes(before.tree, after.tree)]
    assert repo.commit(entries, "text")
    asking = None  # type: ignore[assignment]  # a hook stays for good
    assert len(seen) <= 18, seen
