"""What the tests of git share: a small repository, acts on it, and looking at it by git alone."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from gitutil import ABSENT_MODE, ABSENT_OID, Entry, Repo, Snapshot
from tests.conftest import sh

NAME = "BACKLOG.yaml"
OLD, NEW = b"v: 1\n", b"v: 2\n"
Act = Callable[[Path], object]


def table(rows: Mapping[str, object], slow: str | Collection[str] = "") -> list[object]:
    """Parameters named by their keys; those named in `slow` run only when asked for."""
    marks = dict.fromkeys(slow.split() if isinstance(slow, str) else slow, pytest.mark.slow)
    assert marks.keys() <= rows.keys()
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=marks.get(name, ()))
        for name, row in rows.items()
    ]


def no_delay(_: float) -> None:
    pass


def git(where: Path, *args: str, check: bool = True) -> str:
    """A git command of the test's own; the hooks under test are for the orchestrator's calls."""
    quiet = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false")
    return sh(where, "git", *quiet, *args, check=check)


def run(*commands: str) -> Act:
    def act(where: Path) -> None:
        sh(where, "sh", "-ec", "\n".join(commands))

    return act


def write(name: str, data: str = "x\n") -> Act:
    def act(where: Path) -> None:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(data)

    return act


FILES = {NAME: "v: 1\n", ".gitignore": "*.log\nbuild/\n", "a.txt": "a1\na2\na3\n", "b.txt": "b\n", "c.txt": "c\n", "d.txt": "d\n", "run.sh": "#!/bin/sh\n", "src/one.py": "1\n", "src/deep/two.py": "2\n", "docs/x.md": "x\n"}  # fmt: skip


def new_project(tmp_path: Path, *, messy: bool = False) -> Path:
    """A repository with a few files; a copy, which is cheaper than making it anew."""
    template = tmp_path.parent / f"template-{messy}"
    if not template.exists():
        for name, data in FILES.items():
            (template / name).parent.mkdir(parents=True, exist_ok=True)
            (template / name).write_text(data)
        (template / "link").symlink_to("a.txt")
        run("git init -q -b main", "git config maintenance.auto false", "rm -rf .git/hooks", "git add -A", "git commit -q -m Start")(template)
        if messy:
            stage_everything(template)
    return Path(shutil.copytree(template, tmp_path / "project", symlinks=True))


def stage_everything(where: Path) -> None:
    """The operator's: staged, partly staged, new, deleted, intended, hidden, untracked and ignored files."""
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


def made(repo: Repo, path: Path, data: bytes) -> Entry:
    """The entry of a file with this content, which need not be there."""
    return repo.blobs({path: data})[0]


def salvage(repo: Repo, ref: str, seen: Snapshot, message: str = "x") -> str:
    """Keep all that differs from HEAD in a snapshot on a ref."""
    return repo.salvage(ref, seen.head.commit, [change.after for change in repo.changes(seen.head.commit, seen.tree)], message)


def absent(path: str) -> Entry:
    return Entry(path, ABSENT_MODE, ABSENT_OID)


def entry_of(repo: Repo, tree: str, path: str) -> Entry:
    """What a tree or commit holds at a path."""
    rows = repo.git("ls-tree", "-z", tree, "--", path).decode(errors="surrogateescape").split("\0")
    found = [re.match(r"(\d+) \w+ (\w+)\t(.*)", row, re.S) for row in rows if row]
    entries = [Entry(match[3], match[1], match[2]) for match in found if match]
    return next((entry for entry in entries if entry.path == path), absent(path))


def content(repo: Repo, entry: Entry) -> bytes:
    (data,) = repo.read_blobs([entry.oid])
    return data


def blob(where: Path, name: str) -> bytes:
    return subprocess.run(["git", "cat-file", "blob", name], cwd=where, capture_output=True, check=True).stdout


def work_tree(where: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder outside of .git: its mode, and content or target."""
    found = {}
    for path in sorted(where.rglob("*")):
        name, mode = str(path.relative_to(where)), path.lstat().st_mode
        if name != ".git" and not name.startswith(".git/"):
            link = stat.S_ISLNK(mode)
            regular = stat.S_ISREG(mode)
            found[name] = mode, os.fsencode(os.readlink(path)) if link else path.read_bytes() if regular else b""
    return found


def index(where: Path, *but: str) -> str:
    """All index entries (`but` for some) with flags, intent-to-add too; without cached times."""
    lines = git(where, "ls-files", "-s", "-v", "--debug").splitlines()
    flags = [line.split("flags:")[1].strip() for line in lines if line.startswith("  size")]
    listed = [line for line in lines if not line.startswith("  ")]
    rows = zip(listed, flags, strict=True)
    return "\n".join(f"{entry} {flag}" for entry, flag in rows if not entry.endswith(but or "\0"))


def state_files(where: Path) -> dict[str, bytes]:
    """Everything in the git directory but objects."""
    paths = [path for path in (where / ".git").rglob("*") if path.is_file()]
    return {str(p): p.read_bytes() for p in paths if "objects" not in p.relative_to(where).parts}


def leftovers(where: Path) -> list[str]:
    folder = Path(git(where, "rev-parse", "--absolute-git-dir").strip())
    return [str(p) for pattern in ("**/*.lock", "orchestrator-*-*") for p in folder.glob(pattern)]


def is_alive(pid_file: Path) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    state = sh(pid_file.parent, "ps", "-o", "stat=", "-p", pid_file.read_text().strip(), check=False)
    return state.strip() != "" and not state.startswith("Z")


def sign_with_a_key(where: Path, outside: Path) -> Path:
    """Let git's configuration ask for signatures with a new key."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not there")
    key = outside / "key"
    sh(where, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    (outside / "signers").write_text(f"operator@example.invalid {key.with_suffix('.pub').read_text()}")
    for setting in (f"user.signingKey {key}", f"gpg.ssh.allowedSignersFile {outside}/signers", "gpg.format ssh", "commit.gpgSign true"):
        git(where, "config", *setting.split(" ", 1))
    return key
