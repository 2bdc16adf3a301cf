"""Git calls, snapshots, salvage, restoring, hooks and preconditions, against real git.

Committing BACKLOG.yaml has its own file, test_state_commit.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gitutil
from gitutil import (
    ABSENT_MODE,
    ABSENT_OID,
    Change,
    Entry,
    GitError,
    Head,
    HeadBusy,
    HookResult,
    Problem,
    Repo,
    Snapshot,
)
from tests.conftest import IDENTITY, sh

NAME = "BACKLOG.yaml"
Act = Callable[[Path], object]


def made(repo: Repo, path: Path, data: bytes) -> Entry:
    """The entry of a file with this content, which need not be there."""
    return repo.blobs({path: data})[0]


def content(repo: Repo, oid: str) -> bytes:
    (data,) = repo.read_blobs([oid])
    return data


def entry_of(repo: Repo, tree: str, path: str) -> Entry | None:
    """What a tree or commit holds at a path."""
    rows = repo.git("ls-tree", "-z", tree, "--", path).decode(errors="surrogateescape").split("\0")
    found = [re.match(r"(\d+) \w+ (\w+)\t(.*)", row, re.S) for row in rows if row]
    return next((Entry(match[3], match[1], match[2]) for match in found if match and match[3] == path), None)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a few files, copied for each test: cheaper than making it anew."""
    where = tmp_path_factory.mktemp("template") / "project"
    (where / "src/deep").mkdir(parents=True)
    (where / "docs").mkdir()
    files = {NAME: "v: 1\n", ".gitignore": "*.log\nbuild/\n", "a.txt": "a1\na2\na3\n", "b.txt": "b\n", "c.txt": "c\n", "run.sh": "#!/bin/sh\n", "src/one.py": "1\n", "src/deep/two.py": "2\n", "docs/x.md": "x\n"}  # fmt: skip
    for name, data in files.items():
        (where / name).write_text(data)
    (where / "link").symlink_to("a.txt")
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


@pytest.fixture
def repo(project: Path) -> Repo:
    return Repo.open(project, delay=no_delay)


def table(rows: Mapping[str, object], slow: str = "") -> list[object]:
    """Parameters named by their keys; those named in `slow` run only when asked for."""
    marks = dict.fromkeys(slow.split(), pytest.mark.slow)
    assert marks.keys() <= rows.keys()
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=marks.get(name, ()))
        for name, row in rows.items()
    ]


def no_delay(_: float) -> None:
    pass


def git(where: Path, *args: str, check: bool = True) -> str:
    return sh(where, "git", *args, check=check)


def run(*commands: str) -> Act:
    def act(where: Path) -> None:
        sh(where, "sh", "-ec", "\n".join(commands))

    return act


def work_tree(where: Path) -> dict[str, tuple[str, bytes]]:
    """Every file and folder outside of .git: kind or executable bit, and content or target."""
    found = {}
    for path in sorted(where.rglob("*")):
        name = str(path.relative_to(where))
        if name == ".git" or name.startswith(".git/"):
            continue
        if path.is_symlink():
            found[name] = ("link", os.fsencode(os.readlink(path)))
        elif path.is_dir():
            found[name] = ("folder", b"")
        else:
            found[name] = ("x" if os.access(path, os.X_OK, effective_ids=False) and path.stat().st_mode & 0o100 else "-", path.read_bytes())  # fmt: skip
    return found


def index(where: Path) -> str:
    """All index entries with their flags, intent-to-add included; without cached times."""
    lines = git(where, "ls-files", "-s", "-v", "--debug").splitlines()
    flags = [line.split("flags:")[1].strip() for line in lines if line.startswith("  size")]
    listed = [line for line in lines if not line.startswith("  ")]
    return "\n".join(f"{entry} {flag}" for entry, flag in zip(listed, flags, strict=True))


def stored(where: Path, tree: str) -> dict[str, str]:
    """Path and blob of every file of a tree."""
    rows = git(where, "ls-tree", "-r", "-z", tree).split("\0")[:-1]
    return {row.split("\t")[1]: row.split("\t")[0].split()[2] for row in rows}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def paths(changes: list[Change]) -> list[str]:
    return [change.after.path for change in changes]


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


def is_alive(pid_file: Path) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    state = sh(pid_file.parent, "ps", "-o", "stat=", "-p", pid_file.read_text().strip(), check=False)
    return state.strip() != "" and not state.startswith("Z")


def test_a33_every_call_is_shielded(
    fake_git: Callable[[str], Repo], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
def test_time_limit_sends_term_first(fake_git: Callable[[str], Repo], tmp_path: Path) -> None:
    repo = fake_git(f"trap 'rm {tmp_path}/lock; exit 1' TERM; : > {tmp_path}/lock; while :; do sleep 0.02; done")
    with pytest.raises(GitError) as error:
        repo.git("gc", limit_s=0.5)
    assert error.value.status is None
    assert error.value.command == ("gc",)
    assert "did not end within 0.5 s" in str(error.value)
    assert not (tmp_path / "lock").exists()


@pytest.mark.slow
def test_time_limit_ends_the_whole_group(
    fake_git: Callable[[str], Repo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gitutil, "KILL_GRACE_S", 0.1)
    repo = fake_git(f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait; wait; sleep 60")
    with pytest.raises(GitError, match="did not end"):
        repo.git("gc", limit_s=0.5)
    assert not is_alive(tmp_path / "self")
    assert not is_alive(tmp_path / "child")


def test_grandchild_that_keeps_the_output_open_delays_nobody(
    fake_git: Callable[[str], Repo], tmp_path: Path
) -> None:
    repo = fake_git(f"sleep 60 & echo $! > {tmp_path}/child; echo done")
    assert repo.git("x", limit_s=30) == b"done\n"
    assert is_alive(tmp_path / "child")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


class Interrupted(BaseException):
    """What a signal handler raises."""


def test_exception_in_a_signal_handler_ends_git_in_order(
    fake_git: Callable[[str], Repo], tmp_path: Path
) -> None:
    repo = fake_git(f"trap 'rm {tmp_path}/lock; exit 1' TERM; : > {tmp_path}/lock; kill -HUP $PPID; while :; do sleep 0.02; done")

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGHUP, interrupt)
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
    with pytest.raises(GitError, match="did not end"):
        repo.git("slow", limit_s=0.2)


def test_large_input_and_output(fake_git: Callable[[str], Repo]) -> None:
    data = os.urandom(1 << 20)
    assert fake_git("cat; cat /dev/null >&2").git("x", stdin=data) == data


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


def test_no_git(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GitError, match="Install git"):
        Repo.open(project)


# ---- questions -----------------------------------------------------------------------------------


def test_head(project: Path, repo: Repo) -> None:
    commit = git(project, "rev-parse", "HEAD").strip()
    assert repo.head() == Head("refs/heads/main", commit)
    git(project, "checkout", "-q", "--detach")
    assert repo.head() == Head(None, commit)
    git(project, "checkout", "-q", "--orphan", "a/b")
    assert repo.head() == Head("refs/heads/a/b", None)


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
    with pytest.raises(GitError):
        repo.is_ancestor("1" * 40)
    git(project, "switch", "-q", "main")
    asked = [("abc", None), ("abc", start), ("abc", old), ("ab", None), ("def", None), ("abc", "1" * 40)]
    assert [repo.mentions(*question) for question in asked] == [True, True, False, False, False, True]
    git(project, "checkout", "-q", "--orphan", "empty")
    assert not repo.mentions("abc", start)


OPERATIONS: Mapping[str, tuple[Act, str | None]] = {
    "none": (run("true"), None),
    "range_between_steps": (run("mkdir .git/sequencer", "echo 'revert abc' > .git/sequencer/todo"), "revert"),
    "picks_between_steps": (run("mkdir .git/sequencer", "echo 'pick abc' > .git/sequencer/todo"), "cherry-pick"),
    "empty_sequencer": (run("mkdir .git/sequencer"), "cherry-pick"),
    "reftable_ref": (run("mkdir .git/reftable"), None),
    "squash_is_none": (run("echo x > .git/SQUASH_MSG"), None),
}


@pytest.mark.parametrize(("act", "operation"), table(OPERATIONS))
def test_operation(project: Path, repo: Repo, act: Act, operation: str | None) -> None:
    act(project)
    assert repo.operation() == operation


def test_operation_of_a_linked_worktree_is_its_own(project: Path, repo: Repo, tmp_path: Path) -> None:
    git(project, "worktree", "add", "-q", "-b", "side", "../linked")
    git(tmp_path / "linked", "bisect", "start", "-q")
    assert (repo.operation(), Repo.open(tmp_path / "linked").operation()) == (None, "bisect")


HARD_NAMES = ["plain.txt", "with space.txt", "ünï.txt", "tab\there", "new\nline", 'quo"te', "arrow -> b", "-dash", ":(top)x", "*", "data[1].txt", " lead", os.fsdecode(b"latin-\xe4")]  # fmt: skip


def test_d04_a05_a21_names_are_never_mangled(project: Path, repo: Repo) -> None:
    git(project, "config", "core.quotePath", "false")
    head = repo.head().commit
    before = repo.snapshot()
    for name in HARD_NAMES:
        (project / name).write_text(name, errors="surrogateescape")
    assert repo.dirty_paths() == sorted(HARD_NAMES)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    assert paths(changes) == sorted(HARD_NAMES)
    commit = repo.commit([c.after for c in changes], "names")
    assert commit is not None
    assert head is not None
    assert repo.changes(head, commit) == changes
    assert git(project, "status", "--porcelain") == ""
    for name in HARD_NAMES:
        entry = entry_of(repo, "HEAD", name)
        assert entry is not None
        assert content(repo, entry.oid) == os.fsencode(name)


def test_d04_a03_a04_renames_and_deletions_are_plain_changes(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    run("git mv a.txt renamed.txt", "git rm -q b.txt", "git mv src moved", "rm c.txt")(project)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    assert paths(changes) == ["a.txt", "b.txt", "c.txt", "moved/deep/two.py", "moved/one.py", "renamed.txt", "src/deep/two.py", "src/one.py"]
    assert repo.dirty_paths() == paths(changes)
    assert repo.commit([c.after for c in changes], "phase") is not None
    assert git(project, "status", "--porcelain") == ""


def test_a14_dirty_paths(project: Path, repo: Repo, make_repo: Callable[..., Path]) -> None:
    assert repo.dirty_paths() == []
    make_repo("project/vendor/lib")
    git(project, "config", "status.showUntrackedFiles", "no")
    run("echo x > a.txt", "git add a.txt", "mkdir new", "touch new/f new/g x.log", "git rm -q --cached b.txt", "chmod +x c.txt")(project)
    assert repo.dirty_paths() == ["a.txt", "b.txt", "b.txt", "c.txt", "new/f", "new/g", "vendor/lib/"]
    assert Repo.open(project / "src").dirty_paths() == repo.dirty_paths()


def test_blob_stores_what_git_add_would(project: Path, repo: Repo) -> None:
    git(project, "config", "core.autocrlf", "true")
    (project / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (project / "src/tool").write_text("#!/bin/sh\n")
    (project / "src/tool").chmod(0o755)
    (project / "dangling").symlink_to("../näwhere")
    names = ("crlf.txt", "src/tool", "dangling", "a.txt")
    entries = [repo.blob(project / name) for name in names]
    git(project, "add", "-A")
    staged = git(project, "ls-files", "-s", "-z", *names).split("\0")[:-1]
    assert sorted(f"{e.mode} {e.oid} 0\t{e.path}" for e in entries) == sorted(staged)
    assert repo.blob(project / "gone/f") == Entry("gone/f", "000000", "0" * 40)
    assert content(repo, made(repo, project / "a.txt", b"other\n").oid) == b"other\n"
    with pytest.raises(GitError, match="neither a file"):
        repo.blob(project / "src")
    with pytest.raises(GitError, match="outside of the repository"):
        repo.blob(project.parent / "x")


def test_file_modes_that_the_file_system_does_not_keep(project: Path) -> None:
    git(project, "update-index", "--chmod=+x", "run.sh")
    git(project, "commit", "-q", "-m", "x")
    git(project, "config", "core.fileMode", "false")
    (project / "a.txt").chmod(0o755)
    repo = Repo.open(project)
    assert [entry_of(repo, repo.snapshot().tree, name).mode for name in ("a.txt", "run.sh")] == ["100644", "100755"]  # type: ignore[union-attr]


def test_entry_of_a_folder_or_of_nothing(repo: Repo) -> None:
    assert repo.committed("HEAD", "src/none") is None
    assert repo.committed(None, "a.txt") is None
    assert entry_of(repo, "HEAD", "link") == Entry("link", "120000", repo.blob(repo.top / "link").oid)


def test_refs(project: Path, repo: Repo) -> None:
    head = git(project, "rev-parse", "HEAD").strip()
    for name in ("salvage/A-1/build/1", "salvage/A-1/build/12", "salvage/A-10/build/1", "salvage/A-1x"):
        git(project, "update-ref", f"refs/orchestrator/{name}", head)
    stem = "refs/orchestrator/salvage/A-1/build/"
    assert repo.refs(stem) == {f"{stem}1": head, f"{stem}12": head}
    assert len(repo.refs("refs/orchestrator/salvage/A-1")) == 4
    repo.drop_refs([f"{stem}1"])
    repo.drop_refs([f"{stem}1"])
    assert list(repo.refs(stem)) == [f"{stem}12"]


# ---- snapshots -----------------------------------------------------------------------------------


def operators_mess(where: Path) -> None:
    """Staged, partly staged, new, deleted, intended, hidden, empty and untracked files."""
    run(
        "printf 'a1 staged\\na2\\na3\\n' > a.txt && git add a.txt && printf 'a1 staged\\na2\\na3 not\\n' > a.txt",
        "echo new > new-staged.txt && git add new-staged.txt",
        "echo later > intended.txt && git add -N intended.txt",
        ": > empty-staged.txt && git add empty-staged.txt",
        "git rm -q --cached docs/x.md",
        "git update-index --assume-unchanged c.txt && echo hidden > c.txt",
        "git update-index --skip-worktree run.sh && echo local > run.sh",
        "echo mine > untracked.txt && echo noise > x.log && mkdir -p build && echo out > build/out",
    )(where)


@pytest.fixture(scope="session")
def messy_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("messy") / "project"
    shutil.copytree(template, where, symlinks=True)
    operators_mess(where)
    return where


@pytest.mark.parametrize("times", [1, 99])
def test_a_file_that_vanishes_while_git_looks_is_looked_for_again(project: Path, fake_git: Callable[[str], Repo], times: int) -> None:
    """For `git add` that is fatal, but a temporary file of anybody's is no reason to end a run."""
    real, tries = shutil.which("git"), project.parent / "tries"
    fails = f'echo x >> {tries}; if [ "$(wc -l < {tries})" -le {times} ]; then echo "fatal: unable to stat \'x\'" >&2; exit 128; fi'
    fake_git(f'case " $* " in *" add "*) {fails} ;; esac; exec {real} "$@"')
    repo = Repo.open(project)
    if times == 1:
        (project / "new.txt").write_text("new\n")
        assert entry_of(repo, repo.snapshot().tree, "new.txt") is not None
    else:
        with pytest.raises(GitError, match="exited 128: fatal: unable to stat 'x'"):
            repo.snapshot()
    assert len(tries.read_text().split()) == min(times + 1, 3)


@pytest.fixture
def messy(messy_template: Path, tmp_path: Path) -> Path:
    """The project with much that is the operator's."""
    where = tmp_path / "messy"
    shutil.copytree(messy_template, where, symlinks=True)
    return where


def test_a_snapshot_touches_nothing_and_sees_everything(messy: Path) -> None:
    project, repo = messy, Repo.open(messy)
    before, files = (project / ".git/index").read_bytes(), work_tree(project)
    taken = repo.snapshot("refs/orchestrator/snapshots/run/1")
    assert ((project / ".git/index").read_bytes(), work_tree(project)) == (before, files)
    assert not list((project / ".git").glob("orchestrator-*"))
    assert stored(project, taken.tree) == {
        name: blob_id(data)
        for name, (kind, data) in files.items()
        if kind != "folder" and name not in ("x.log", "build/out")
    }
    assert json.loads(json.dumps(taken.staging)) == taken.staging
    assert sorted(row[0] + row.split("\t")[1] for row in taken.staging) == [
        "Ha.txt", "Hdocs/x.md", "Hempty-staged.txt", "Hnew-staged.txt", "Nintended.txt", "Srun.sh", "hc.txt"
    ]  # fmt: skip
    assert git(project, "rev-parse", "refs/orchestrator/snapshots/run/1^{tree}").strip() == taken.tree


@pytest.mark.parametrize("gone", [False, True])
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
    assert entry_of(repo, taken.tree, f".{NAME}.tmp") is None
    assert content(repo, str(entry_of(repo, taken.tree, "docs/x.md").oid)) == b"new\n"  # type: ignore[union-attr]


def test_a_snapshot_of_an_unborn_branch(project: Path, repo: Repo) -> None:
    git(project, "update-ref", "-d", "HEAD")
    taken = repo.snapshot("refs/orchestrator/snapshots/x")
    assert taken.head == Head("refs/heads/main", None)
    assert len(taken.staging) == len(git(project, "ls-files").splitlines())
    (project / ".git/index").unlink()
    assert repo.snapshot().tree == taken.tree


def test_an_edit_in_the_tick_of_its_staging_is_seen(project: Path, repo: Repo) -> None:
    """Same size, same time as the index knows it: git looks at the content, the copy must too."""
    git(project, "config", "core.trustctime", "false")
    git(project, "config", "core.checkStat", "minimal")
    file, cached = project / "a.txt", 1_700_000_000 * 10**9
    os.utime(file, ns=(cached, cached))
    git(project, "update-index", "--refresh")
    os.utime(project / ".git/index", ns=(cached, cached))
    before = repo.snapshot()
    file.write_text("a9\na2\na3\n")
    os.utime(file, ns=(cached, cached))
    assert paths(repo.changes(before.tree, repo.snapshot().tree)) == ["a.txt"]


def test_a19_nested_repositories(project: Path, repo: Repo, make_repo: Callable[..., Path]) -> None:
    before = repo.snapshot()
    make_repo("project/vendor/lib")
    (project / "vendor/empty").mkdir()
    git(project / "vendor/empty", "init", "-q")
    (project / "after.txt").write_text("z\n")
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    assert [(c.after.path, c.after.mode) for c in changes] == [("after.txt", "100644"), ("vendor/lib", "160000")]
    repo.salvage("refs/orchestrator/salvage/1", after, "x")
    repo.restore(before, changes)
    assert not (project / "after.txt").exists()
    assert (project / "vendor/lib/README.md").exists()


@pytest.mark.parametrize("mode", ["--cone", pytest.param("--no-cone", marks=pytest.mark.slow)])
def test_a_sparse_checkout_is_no_deletion(project: Path, repo: Repo, mode: str) -> None:
    git(project, "update-index", "--refresh")  # a copied file looks changed, so it would stay
    git(project, "sparse-checkout", "set", mode, "docs" if mode == "--cone" else "/docs/")
    assert not (project / "src/one.py").exists()
    head, staged = repo.head().commit, index(project)
    before = repo.snapshot()
    assert head is not None
    assert repo.changes(head, before.tree) == []
    (project / "docs/x.md").write_text("changed\n")
    (project / "src").mkdir(exist_ok=True)
    (project / "src/new.py").write_text("outside of the sparse set\n")
    changes = repo.changes(before.tree, repo.snapshot().tree)
    assert paths(changes) == ["docs/x.md", "src/new.py"]
    repo.restore(before, changes)
    assert index(project) == staged
    assert not (project / "src/one.py").exists()
    assert repo.commit([c.after for c in changes], "phase") is not None


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
        repo = Repo.open(where, delay=no_delay)
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


def test_objects_that_cannot_be_written_are_a_problem(project: Path) -> None:
    with powerless(project) as where:
        for path in (where / ".git/objects", *(where / ".git/objects").rglob("*")):
            if path.is_dir():
                path.chmod(0o500)
        [problem] = Repo.open(where).problems(where / NAME)
        assert "insufficient permission for adding an object" in problem.what
        (where / NAME).write_text("v: 2\n")
        made = Repo.open(where).commit_state(where / NAME, b"v: 2\n", "m")
        assert made.outcome == "skipped"


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
    "new_ignore_rules": run("mkdir n && echo '*.tmp' > n/.gitignore && echo x > n/f.tmp && echo x > n/g"),
}  # fmt: skip
KEPT_BY_GIT = {"n", "n/f.tmp"}  # ignored by a rule of the agent's own: never recorded, never removed


@pytest.mark.parametrize(
    "act",
    table(
        PHASES,
        slow="edit remove move chmod checkout stash reset_hard removes_ignore_rules adds_everything"
        " odd_names folder_becomes_file file_becomes_empty_folder a01_stages_all new_ignore_rules"
        " stash_untracked new_files file_becomes_folder ignores_more",
    ),
)
def test_a_failed_phase_is_kept_and_undone(messy: Path, act: Act) -> None:
    project, repo = messy, Repo.open(messy)
    files, staged = work_tree(project), index(project)
    before = repo.snapshot("refs/orchestrator/snapshots/run/1")
    act(project)
    stashes = git(project, "stash", "list")
    agents = work_tree(project)
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    commit = repo.salvage("refs/orchestrator/salvage/A/build/1", after, "[A][build] Salvaged")
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


@pytest.mark.slow
def test_a_snapshot_on_a_ref_outlives_what_an_agent_throws_away(messy: Path) -> None:
    repo, files, staged = Repo.open(messy), work_tree(messy), index(messy)
    before = repo.snapshot("refs/orchestrator/snapshots/run/1")
    run("git reset -q --hard && git clean -q -fd && git gc -q --prune=now")(messy)
    after = repo.snapshot()
    repo.restore(before, repo.changes(before.tree, after.tree))
    repo.restage(before, after)
    assert (work_tree(messy), index(messy)) == (files, staged)
    assert git(messy, "show", ":a.txt") == "a1 staged\na2\na3\n"


def test_restoring_keeps_to_the_changes(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    run("echo agent > b.txt && echo agent > c.txt && echo x > n.txt")(project)
    changes = [c for c in repo.changes(before.tree, repo.snapshot().tree) if c.after.path != "c.txt"]
    repo.restore(before, changes)
    assert repo.dirty_paths() == ["c.txt"]
    assert (project / "c.txt").read_text() == "agent\n"


def test_restoring_refuses_what_was_changed_since(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    run("echo agent > b.txt && echo agent > n.txt && rm docs/x.md")(project)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    run("echo operator > n.txt")(project)
    files = work_tree(project)
    with pytest.raises(GitError, match=r"changed again.*n\.txt"):
        repo.restore(before, changes)
    assert work_tree(project) == files


@pytest.mark.slow
def test_restoring_is_repeatable(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    run("echo agent > b.txt && echo agent > n.txt && rm -r docs")(project)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    repo.restore(before, changes[:1])
    repo.restore(before, changes)
    repo.restore(before, changes)
    assert repo.dirty_paths() == []


@pytest.mark.parametrize(
    "act",
    [
        run("rm b.txt && mkdir b.txt && echo secret > b.txt/x.log"),
        run("rm -r docs && echo '/docs' >> .git/info/exclude && echo secret > docs"),
        run("echo '/u.txt' >> .git/info/exclude && echo secret > u.txt"),
    ],
    ids=["ignored_file_in_a_folder", "ignored_file_above", "ignored_file_itself"],
)
def test_restoring_never_removes_what_is_not_kept(project: Path, repo: Repo, act: Act) -> None:
    (project / "u.txt").write_text("operator\n")
    before = repo.snapshot()
    act(project)
    with pytest.raises(GitError):
        repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert any(data == b"secret\n" for _, data in work_tree(project).values())


def test_a_commit_of_the_agent_stays(project: Path, repo: Repo) -> None:
    """The rest goes back to what it committed, in the index too."""
    before = repo.snapshot()
    run("echo committed > b.txt && git commit -q -am agent", "echo more > b.txt && echo more > c.txt && git add -A")(project)
    head = repo.head().commit
    assert head is not None
    base = before._replace(tree=head)
    repo.restore(base, repo.changes(head, repo.snapshot().tree))
    assert git(project, "status", "--porcelain") == ""
    assert (project / "b.txt").read_text() == "committed\n"


def test_a_file_that_cannot_be_put_back_is_named(project: Path, repo: Repo) -> None:
    (project / ".git/info").mkdir(exist_ok=True)
    (project / ".git/info/attributes").write_text("b.txt filter=f\n")
    git(project, "config", "filter.f.smudge", "echo broken")
    before = repo.snapshot()
    run("echo agent > b.txt")(project)
    with pytest.raises(GitError, match=r"could not be put back as it was: b\.txt"):
        repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))


def test_ignore_rules_in_a_folder_that_became_a_file(project: Path, repo: Repo) -> None:
    (project / "docs/.gitignore").write_text("*.tmp\n")
    (project / "docs/x.tmp").write_text("hidden\n")
    before = repo.snapshot()
    run("mv docs/x.tmp . && rm -r docs && echo agent > docs")(project)
    repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert repo.snapshot().tree == before.tree
    assert (project / "docs/.gitignore").read_text() == "*.tmp\n"


def test_salvage_never_replaces(project: Path, repo: Repo) -> None:
    ref = "refs/orchestrator/salvage/A/build/1"
    first = repo.salvage(ref, repo.snapshot(), "first")
    with pytest.raises(GitError):
        repo.salvage(ref, repo.snapshot(), "second")
    assert git(project, "log", "-1", "--format=%H %P %s", ref).split() == [first, str(repo.head().commit), "first"]


@pytest.mark.parametrize("command", ["git add -A", pytest.param("git reset -q", marks=pytest.mark.slow), "git rm -q -f --cached a.txt b.txt"])
def test_staging_that_an_agent_disturbed_is_given_back(messy: Path, command: str) -> None:
    project, repo = messy, Repo.open(messy)
    staged = index(project)
    before = repo.snapshot()
    run("echo agent > src/one.py", command)(project)
    after = repo.snapshot()
    changes = repo.changes(before.tree, after.tree)
    assert paths(changes) == ["src/one.py"]
    repo.commit([c.after for c in changes], "phase")
    repo.restage(before, after)
    entries = [line for line in index(project).splitlines() if "src/one.py" not in line]
    assert entries == [line for line in staged.splitlines() if "src/one.py" not in line]


def test_a15_a16_documents_are_the_recorded_bytes_and_never_staged(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    (project / "docs/new.md").write_text("as the phase left it\n")
    entries = [c.after for c in repo.changes(before.tree, repo.snapshot().tree)]
    assert git(project, "diff", "--cached", "--name-only") == ""
    (project / "docs/new.md").write_text("typed on since\n")
    (project / "docs/x.md").write_text("half done by another phase\n")  # a17
    repo.commit(entries, "batch")
    assert git(project, "show", "HEAD:docs/new.md") == "as the phase left it\n"
    assert repo.dirty_paths() == ["docs/new.md", "docs/x.md"]


def test_lock_while_restoring_is_reported(project: Path, repo: Repo) -> None:
    before = repo.snapshot()
    run("echo agent > b.txt && git add b.txt")(project)
    changes = repo.changes(before.tree, repo.snapshot().tree)
    (project / ".git/index.lock").touch()
    with pytest.raises(HeadBusy, match=r"index\.lock"):
        repo.restore(before, changes)
    (project / ".git/index.lock").unlink()
    repo.restore(before, changes)
    assert git(project, "status", "--porcelain") == ""


def test_leftovers_of_a_killed_process(project: Path, repo: Repo) -> None:
    names = ("orchestrator-index-1", "orchestrator-index-1.lock", "orchestrator-message-2")
    for name in names:
        (project / ".git" / name).write_text("x")
    (project / ".git/orchestrator").mkdir()
    repo.clean_leftovers()
    assert [p.name for p in (project / ".git").glob("orchestrator*")] == ["orchestrator"]


# ---- hooks ---------------------------------------------------------------------------------------


def put_hook(where: Path, name: str, body: str, *, folder: str = ".git/hooks", line: str = "#!/bin/sh\n") -> None:
    (where / folder).mkdir(parents=True, exist_ok=True)
    (where / folder / name).write_text(f"{line}{body}\n")
    (where / folder / name).chmod(0o755)


@pytest.fixture
def entries(project: Path, repo: Repo) -> list[Entry]:
    """A phase's commit: one file edited, one new, one gone; the operator has something staged."""
    run("echo theirs > c.txt && git add c.txt", "echo edited > b.txt && echo new > n.txt && rm docs/x.md")(project)
    return [repo.blob(project / name) for name in ("b.txt", "n.txt", "docs/x.md")]


def test_hooks_see_exactly_the_commit(project: Path, repo: Repo, entries: list[Entry]) -> None:
    put_hook(project, "pre-commit", "git diff --cached --name-status; git add -- '*.none' 2>/dev/null; pwd; readlink /proc/self/fd/0 || true")
    put_hook(project, "commit-msg", 'echo "message:"; cat "$1"; basename "$1" >&2')
    before = index(project), work_tree(project)
    verdict = repo.run_hooks(entries, "Subject\n\nBody: ü")
    assert verdict.ok
    assert verdict.hook == "commit-msg"
    assert verdict.output.startswith("message:\nSubject\n\nBody: ü\norchestrator-message-")
    assert (index(project), work_tree(project)) == before
    (project / ".git/hooks/commit-msg").unlink()
    seen = repo.run_hooks(entries, "x").output.splitlines()
    assert seen[:4] == ["M\tb.txt", "D\tdocs/x.md", "A\tn.txt", str(project)]
    assert not list((project / ".git").glob("orchestrator-*"))


@pytest.mark.parametrize("name", ["pre-commit", "commit-msg"])
def test_a_hook_rejects(project: Path, repo: Repo, entries: list[Entry], name: str) -> None:
    put_hook(project, name, "echo out; echo no good >&2; exit 3")
    assert repo.run_hooks(entries, "x") == HookResult("rejected", name, "out\nno good", False)
    assert not repo.run_hooks(entries, "x").ok


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ("echo fixed > b.txt", True),
        ("echo fixed > b.txt; git add b.txt", True),
        ("touch b.txt n.txt", False),
        ("rm n.txt", True),
        ("git rm -q --cached n.txt", True),
        ("echo other > a.txt; git add -u", False),
    ],
)
def test_a_hook_that_mends_files(project: Path, repo: Repo, entries: list[Entry], body: str, changed: bool, status: int) -> None:
    put_hook(project, "pre-commit", f"{body}\nexit {status}")
    staged = index(project)
    verdict = repo.run_hooks(entries, "x")
    assert (verdict.outcome, verdict.changed) == ("rejected" if status else "ok", changed)
    assert verdict.ok == (status == 0 and not changed)
    assert index(project) == staged


@pytest.mark.slow
def test_a_hook_that_hangs(project: Path, repo: Repo, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gitutil, "KILL_GRACE_S", 0.1)
    put_hook(project, "pre-commit", "echo begun; trap '' TERM; echo $$ > .git/pid; sleep 60; sleep 60")
    assert repo.run_hooks(entries, "x", limit_s=0.5) == HookResult("timeout", "pre-commit", "begun", False)
    assert not is_alive(project / ".git/pid")


def test_which_hooks_count(project: Path, repo: Repo, entries: list[Entry]) -> None:
    nothing = HookResult("ok", "", "", False)
    assert repo.run_hooks(entries, "x") == nothing
    put_hook(project, "pre-commit", "exit 1")
    (project / ".git/hooks/pre-commit").chmod(0o644)
    assert repo.run_hooks(entries, "x") == nothing
    put_hook(project, "pre-commit", "echo without a shebang; exit 1", folder="my hooks", line="")
    git(project, "config", "core.hooksPath", "my hooks")
    repo.head()
    assert repo.run_hooks(entries, "x").output == "without a shebang"
    put_hook(project, "pre-commit", "", folder="my hooks", line="#!/nonexistent\n")
    assert "cannot be run" in repo.run_hooks(entries, "x").output


def test_hooks_of_a_linked_worktree_without_commits(project: Path, tmp_path: Path) -> None:
    put_hook(project, "pre-commit", "git diff --cached --name-only; exit 1")
    git(project, "worktree", "add", "-q", "--detach", "../linked")
    where = tmp_path / "linked"
    git(where, "checkout", "-q", "--orphan", "fresh")
    repo = Repo.open(where)
    assert repo.run_hooks([repo.blob(where / "b.txt")], "x").output == "b.txt"


# ---- preconditions -------------------------------------------------------------------------------

PROBLEMS: Mapping[str, tuple[Act, str, str]] = {
    "merge": (run("git rev-parse HEAD > .git/MERGE_HEAD"), "a merge is in progress", "git merge --abort"),
    "a22_cherry_pick": (run("git rev-parse HEAD > .git/CHERRY_PICK_HEAD"), "a cherry-pick is in progress", "git cherry-pick --abort"),
    "a22_revert": (run("git rev-parse HEAD > .git/REVERT_HEAD"), "a revert is in progress", "git revert --abort"),
    "a22_am": (run("mkdir .git/rebase-apply && touch .git/rebase-apply/applying"), "an am is in progress", "git am --abort"),
    "rebase": (run("mkdir .git/rebase-merge"), "a rebase is in progress", "git rebase --abort"),
    "bisect": (run("git bisect start -q"), "a bisect is in progress", "git bisect reset"),
    "detached": (run("git checkout -q --detach"), "HEAD is detached", "git switch BRANCH"),
    "unmerged": (run("echo one > a.txt && git stash -q", "echo two > a.txt && git commit -q -am two", "git stash pop -q || true"), "merge conflicts in a.txt", "git add"),
    "index_lock": (run("touch .git/index.lock"), "index.lock", "rm '"),
    "head_lock": (run("touch .git/HEAD.lock"), "HEAD.lock", "rm '"),
    "branch_lock": (run("touch .git/refs/heads/main.lock"), "main.lock", "rm '"),
    "packed_refs_lock": (run("touch .git/packed-refs.lock"), "packed-refs.lock", "rm '"),
    "config_lock": (run("touch .git/config.lock"), "config.lock", "rm '"),
    "index_damaged": (run("printf 'DIRCgarbage, but long enough to be looked at by git' > .git/index"), "git cannot work here", "fsck"),
    "tree_gone": (run("t=$(git rev-parse HEAD^{tree}) && rm -f .git/objects/$(echo $t | cut -c1-2)/$(echo $t | cut -c3-)"), "git cannot work here", "fsck"),
    "backlog_symlink": (run(f"mv {NAME} real && ln -s real {NAME}"), "not a regular file", "Put the file itself there"),
    "backlog_folder": (run(f"rm {NAME} && mkdir {NAME}"), "not a regular file", "Put the file itself there"),
    "backlog_skip_worktree": (run(f"git update-index --skip-worktree {NAME}"), "skip-worktree", "--no-skip-worktree"),
    "backlog_assume_unchanged": (run(f"git update-index --assume-unchanged {NAME}"), "assume-unchanged", "--no-assume-unchanged"),
    "backlog_ignored": (run(f"git rm -q --cached {NAME} && git commit -q -m x && echo {NAME} > .gitignore"), "git ignores it", "check-ignore -v"),
}  # fmt: skip


@pytest.mark.parametrize(("act", "what", "remedy"), table(PROBLEMS, slow="merge rebase a22_am a22_cherry_pick index_damaged backlog_symlink bisect head_lock branch_lock packed_refs_lock a22_revert backlog_folder backlog_assume_unchanged"))
def test_problem(project: Path, repo: Repo, act: Act, what: str, remedy: str) -> None:
    act(project)
    [problem] = repo.problems(project / NAME)
    assert what in problem.what
    assert remedy in problem.remedy


def test_no_problem(messy: Path) -> None:
    project, repo = messy, Repo.open(messy)
    assert repo.problems(project / NAME) == []
    assert repo.remarks(project / NAME) == []
    (project / NAME).unlink()
    assert repo.problems(project / NAME) == []


def test_a_lock_held_for_a_moment_is_no_problem(project: Path) -> None:
    lock = project / ".git/index.lock"
    lock.touch()
    repo = Repo.open(project, delay=lambda _: lock.unlink())
    assert repo.problems(project / NAME) == []


def test_problems_come_all_at_once(project: Path, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    run("git checkout -q --detach", "git bisect start -q", f"git update-index --skip-worktree {NAME}", "touch .git/index.lock")(project)
    monkeypatch.setenv("GIT_INDEX_FILE", "/somewhere")
    repo.version = (2, 30)
    found = " | ".join(problem.what for problem in repo.problems(project / NAME))
    for what in ("2.30 is too old", "inside of a git hook", "index.lock", "bisect", "detached", "skip-worktree"):
        assert what in found
    assert Problem("git 2.30 is too old", "Install git 2.34 or newer.") in repo.problems(project / NAME)


def test_backlog_outside_of_the_repository(project: Path, repo: Repo) -> None:
    [problem] = repo.problems(project.parent / NAME)
    assert "outside of the repository" in problem.what


REMARKS: Mapping[str, tuple[Act, str]] = {
    "squash": (run("echo x > .git/SQUASH_MSG"), "squashed merge"),
    "untracked": (run(f"git rm -q --cached {NAME} && git commit -q -m x"), "not tracked"),
    "filter": (run(f"echo '{NAME} filter=lfs' > .gitattributes"), "filter=lfs"),
    "ident": (run(f"echo '{NAME} ident' > .gitattributes"), "ident=set"),
}


@pytest.mark.parametrize(("act", "says"), table(REMARKS))
def test_remark(project: Path, repo: Repo, act: Act, says: str) -> None:
    act(project)
    [remark] = repo.remarks(project / NAME)
    assert says in remark
    assert repo.problems(project / NAME) == []


def test_remarks_on_the_surroundings(project: Path, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IDENTITY:
        monkeypatch.delenv(name)
    git(project, "config", "user.useConfigOnly", "true")
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    repo.version = (2, 35)
    found = " | ".join(repo.remarks(project / NAME))
    for what in ("older than 2.36", "GIT_DIR is set", "no name and e-mail"):
        assert what in found


# ==== What is asked once, and what of git is not trusted ==========================================


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
        {"d/y/new": "n", "new/folder/file": "f"},
        {"b.txt": None, "d/x": None, "none/none": None},
        {"b.txt": None, "b.txt/b": "inside"},
        {"d/x": None, "d/y/z": None, "d": "a file"},
        {"b.txt": None, "d/x": None, "d/y/z": None, "n\nl": None},
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
    entries = [
        Entry(path, "100644", oids[path]) if path in oids else Entry(path, ABSENT_MODE, ABSENT_OID) for path in wanted
    ]
    assert repo.commit(entries, "text")
    now = set(git(project, "ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0"))
    assert now - {""} == (before - {""} - wanted.keys()) | oids.keys()
    assert git(project, "diff", "--cached", "HEAD") == ""
    assert git(project, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


def test_a_commit_of_a_file_in_the_place_of_a_folder_takes_nothing_along(project: Path) -> None:
    (project / "d").mkdir()
    (project / "d/x").write_text("in HEAD\n")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Files")
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    with pytest.raises(GitError, match="changes d/x"):
        repo.commit([Entry("d", "100644", made(repo, project / "any", b"1\n").oid)], "text")
    assert git(project, "rev-parse", "HEAD") == head
    assert git(project, "status", "-s") == ""


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_what_git_does_not_hold_is_not_committed(project: Path, damage: str) -> None:
    """As when an agent's `git gc --prune=now`, or a power cut, took the recorded bytes of a document."""
    repo, head = Repo.open(project), git(project, "rev-parse", "HEAD")
    entry = made(repo, project / "new", b"new\n")
    place = project / ".git/objects" / entry.oid[:2] / entry.oid[2:]
    place.unlink()
    if damage == "empty":
        place.touch()
    with pytest.raises(GitError, match=f"object {entry.oid} is missing or damaged.*{place}, remove it"):
        repo.commit([entry], "text")
    assert git(project, "rev-parse", "HEAD") == head
    assert git(project, "status", "-s") == ""
    place.unlink(missing_ok=True)  # as the message says
    assert repo.commit([made(repo, project / "new", b"new\n")], "text")


def test_an_edit_in_the_tick_of_the_staging_stays_seen(project: Path) -> None:
    """An entry as young as its index file is one that git reads the file for."""
    repo, index = Repo.open(project), project / ".git/index"
    git(project, "config", "core.trustctime", "false")
    (project / "b.txt").write_text("one\n")
    git(project, "add", "b.txt")
    (project / "b.txt").write_text("two\n")
    moment = index.stat().st_mtime_ns
    os.utime(project / "b.txt", ns=(moment, moment))
    assert content(repo, str(entry_of(repo, repo.snapshot().tree, "b.txt").oid)) == b"two\n"  # type: ignore[union-attr]
    assert repo.commit([made(repo, project / "state", b"1\n")], "state")
    assert git(project, "status", "--porcelain", "b.txt") == "MM b.txt\n"


def test_a_filter_that_comes_later_is_heeded(project: Path) -> None:
    repo, path = Repo.open(project), project / "b.txt"
    git(project, "config", "filter.loud.clean", "tr a-z A-Z")
    path.write_text("text\n")
    assert content(repo, repo.blobs({path: b"text\n"})[0].oid) == b"text\n"
    (project / ".gitattributes").write_text("b.txt filter=loud\n")
    assert content(repo, repo.blobs({path: b"text\n"})[0].oid) == b"TEXT\n"
    assert content(repo, repo.blobs({path: b"other\n"})[0].oid) == b"OTHER\n"  # somebody edits it


def test_a_conflict_in_our_own_file_keeps_no_snapshot_from_being_taken(project: Path) -> None:
    repo, blob = Repo.open(project), git(project, "rev-parse", f"HEAD:{NAME}").strip()
    repo.apart = (NAME,)
    rows = f"0 {ABSENT_OID}\t{NAME}\n" + "".join(f"100644 {blob} {stage}\t{NAME}\n" for stage in "123")
    subprocess.run(["git", "update-index", "--index-info"], cwd=project, input=rows, text=True, check=True)
    (project / "a.txt").write_text("edited\n")
    before = repo.snapshot()
    assert {c.after.path for c in repo.changes(before.head.commit, before.tree)} == {"a.txt", NAME}
    (project / "a.txt").write_text("edited again\n")
    repo.restore(before, repo.changes(before.tree, repo.snapshot().tree))
    assert (project / "a.txt").read_text() == "edited\n"
    assert len(git(project, "ls-files", "-u").splitlines()) == 3


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
