"""Git trouble during a run, through the real command: fault by fault, the whole outcome.

Each fault is made by the agent of a running phase (it stands for the operator, too), or is there
from the start. Whatever it is, the run ends in bounded time; the state is in HEAD, or one warning
names the journal that keeps it; nothing of the operator's changes; the next run has it all in HEAD.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gitutil import Repo
from tests.conftest import IDENTITY, sh
from tests.gitkit import table

BLOCKED = {"result": {"result": "blocked", "summary": "needs a decision"}}
READY = "WRK-001 ready"
HALT = "[orchestrator] Save backlog state on halt"
OURS = re.compile(r"(?:^|[/\s])(?:BACKLOG\.yaml|_worklog/.*|changes/WRK-001_.*)$")


class Fault(NamedTuple):
    """What happens to the repository, and what has to become of the run's state."""

    act: str = ""  # shell commands in the project's folder, while a phase is running
    says: str = ""  # in the warning that the state is only in the journal; "": it is committed
    end: str = ""  # shell commands that end the fault
    before: str = ""  # shell commands before the run
    prepare: Callable[[Any], None] = lambda project: None
    files: str = "staged dirty untracked"  # what the operator has lying about, as far as git lets them
    code: int = 3
    quick: bool = False
    lax: bool = False  # without --strict


def hooks(body: str) -> str:
    """What no state commit runs. A git that the hook itself calls runs none: that would never end."""
    names = "pre-commit post-commit reference-transaction post-index-change"
    guard = "test -z \"$INSIDE_A_HOOK\" || exit 0\nexport INSIDE_A_HOOK=1"
    script = f"#!/bin/sh\n{guard}\necho $0 >> $OUTSIDE/hooked\n{body}\n"
    return (
        f"mkdir -p .git/hooks; for hook in {names}; do cat > .git/hooks/$hook <<'END'\n{script}END\n"
        "chmod +x .git/hooks/$hook; done"
    )


def linked(project: Any) -> None:
    project.git("worktree", "add", "-q", "-b", "work", "../linked tree")
    project.root = project.root.parent / "linked tree"


def with_submodule(project: Any) -> None:
    """The project has a submodule, with commits of its own that the operator has not recorded yet."""
    shutil.copytree(project.root, project.root.parent / "library", symlinks=True)
    library = str(project.root.parent / "library")
    project.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", library, "vendor")
    project.git("commit", "-q", "-m", "Add a submodule")
    sh(project.root / "vendor", "git", "commit", "-q", "--allow-empty", "-m", "Theirs")


def below_the_top(project: Any, name: str) -> None:
    """The project is a folder of a bigger repository that has another BACKLOG.yaml at its top."""
    sub = project.root / name
    sub.mkdir()
    for path in ("BACKLOG.yaml", "orchestrator.toml"):
        shutil.copy(project.root / path, sub / path)
    (project.root / "BACKLOG.yaml").write_text("items: []\n")
    project.commit_all()
    project.root = sub


def renamed(name: str) -> Callable[[Any], None]:
    return lambda project: setattr(project, "root", project.root.rename(project.root.with_name(name)))


def below(name: str) -> Callable[[Any], None]:
    return lambda project: below_the_top(project, name)


def no_identity(project: Any) -> None:
    project.environment |= dict.fromkeys(IDENTITY)
    project.git("config", "user.useConfigOnly", "true")


SIGN = "git config commit.gpgSign true; git config gpg.program"
STOP_HERE = {"code": 1, "files": "untracked"}  # the phase's outcome cannot be judged on another branch
FAULTS = {
    # hooks and signing: a state commit runs none
    "hook modifies the backlog": Fault(before=hooks("echo '# hook' >> BACKLOG.yaml; git add BACKLOG.yaml")),
    "hook hangs": Fault(before=hooks("sleep 600")),
    "signing program hangs": Fault(act=f"printf '#!/bin/sh\\nsleep 600\\n' > $OUTSIDE/gpg; chmod +x $OUTSIDE/gpg; {SIGN} $OUTSIDE/gpg"),
    "no identity, useConfigOnly": Fault(prepare=no_identity),
    # locks
    "index.lock, stale": Fault(act="touch .git/index.lock", says="index.lock", end="rm .git/index.lock"),
    # operations that begin while a phase is running
    "merge": Fault(act="git merge -q --no-commit --no-ff side", says="a merge", end="git commit -qm merged", files="dirty untracked", quick=True, lax=True),
    "merge with conflicts, aborted": Fault(act="git merge -q clash || true", says="a merge", end="git merge --abort", files="dirty untracked"),
    "rebase with autostash": Fault(act="git -c rebase.autoStash=true rebase -q clash || true", says="a rebase", end="git checkout -q BACKLOG.yaml; git rebase --abort", **STOP_HERE),
    # the branch
    "branch switched": Fault(act="git switch -q side", says="HEAD is on side now, the run began on main", end="git switch -q main", **STOP_HERE),
    "branch deleted": Fault(act="git update-ref -d refs/heads/main", says="the branch main was deleted", end="git update-ref refs/heads/main $START", files="dirty untracked", code=1),
    # where the project is
    "linked work tree": Fault(prepare=linked),
    "with a submodule": Fault(prepare=with_submodule),
    "blanks, quotes, patterns and more in the path": Fault(prepare=renamed("it's  a \"repo\" Überraschung [a]*"), act="git checkout -q --detach", says="detached", end="git switch -q main", code=1, lax=True),
    "leading dash and line break below the top": Fault(prepare=below("-rf two\nlin'es\\"), act="git checkout -q --detach", says="detached", end="git switch -q main", code=1, lax=True),
    # how git sees the file
    "assume-unchanged": Fault(act="git update-index --assume-unchanged BACKLOG.yaml", says="assume-unchanged", end="git update-index --no-assume-unchanged BACKLOG.yaml"),
    "untracked": Fault(act="git rm -q --cached BACKLOG.yaml"),
    "ignored": Fault(act="git rm -q --cached BACKLOG.yaml; git commit -q -m gone; echo BACKLOG.yaml >> .git/info/exclude", says="git ignores it", end=": > .git/info/exclude", files="dirty untracked"),
    "eol=crlf": Fault(before="echo 'BACKLOG.yaml text eol=crlf' > .gitattributes; git add .gitattributes; git commit -qm eol; rm BACKLOG.yaml; git checkout -q BACKLOG.yaml; grep -q \"$(printf '\\r')\" BACKLOG.yaml"),
    # what cannot be written
    "objects cannot be written": Fault(act="git gc -q --prune=now; cd .git/objects; for a in 0 1 2 3 4 5 6 7 8 9 a b c d e f; do for b in 0 1 2 3 4 5 6 7 8 9 a b c d e f; do touch $a$b; done; done", says="was not committed", end="find .git/objects -maxdepth 1 -name '??' -type f -delete", code=1),
    "reflog cannot be written": Fault(act="mv .git/logs .git/logs.away; touch .git/logs", says="was not committed", end="rm .git/logs; mv .git/logs.away .git/logs"),
}  # fmt: skip


def theirs(project: Any) -> tuple[set[str], dict[str, bytes]]:
    """What is the operator's: git's view of all paths but ours, and the bytes of their files."""
    rows = project.git("status", "--porcelain", "-z", "--untracked-files=all", "--no-renames").split("\0")
    staged = project.git("ls-files", "-s", "-z").split("\0")
    names = ("staged.txt", "README.md", "untracked.txt", "-odd näme.txt")
    files = {name: (project.root / name).read_bytes() for name in names if (project.root / name).exists()}
    return {row for row in (*rows, *staged) if not OURS.search(row)}, files


def shell(project: Any, commands: str) -> None:
    env = {**os.environ, "OUTSIDE": str(project.outside), "ROOT": str(project.root), "START": project.start_commit, "GIT_EDITOR": "true"}
    where = project.root if project.root.exists() else project.outside
    done = subprocess.run(["sh", "-ec", commands], cwd=where, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def branch_off(project: Any, branch: str, path: str) -> None:
    project.git("switch", "-q", "-c", branch)
    (project.root / path).write_text("# theirs\n")
    project.commit_all(branch)
    project.git("switch", "-q", "main")


def set_up(project: Any, fault: Fault) -> None:
    """Branches to merge from, the backlog, the operator's files, and an agent that makes the fault."""
    project.configure("plan")
    project.backlog(READY)
    (project.root / "clash.txt").write_text("base\n")
    project.commit_all()
    branch_off(project, "backlog", "BACKLOG.yaml")
    project.backlog(READY, head="# mine\n")
    project.commit_all("mine")
    branch_off(project, "side", "side.txt")
    branch_off(project, "clash", "clash.txt")
    for text in ("one\n", "two\n"):
        (project.root / "clash.txt").write_text(text)
        project.commit_all(text)
    fault.prepare(project)
    project.start_commit = project.git("rev-parse", "HEAD").strip()
    shell(project, fault.before)
    if "staged" in fault.files:
        (project.root / "staged.txt").write_text("staged by the operator\n")
        project.git("add", "staged.txt")
        (project.root / "staged.txt").write_text("staged by the operator, and edited since\n")
    if "dirty" in fault.files and (project.root / "README.md").exists():
        (project.root / "README.md").write_text("edited by the operator\n")
    for name in ("untracked.txt", "-odd näme.txt"):
        (project.root / name).write_text("untracked\n")
    project.script({"*/plan": [{"announce": True, "await": "go", **BLOCKED}]})


def saved(project: Any) -> bool:
    """Whether HEAD holds the file, seen through git's filters."""
    committed = sh(project.root, "git", "rev-parse", "-q", "--verify", "HEAD:./BACKLOG.yaml", check=False)
    return committed == project.git("hash-object", "BACKLOG.yaml")


def stray_paths(project: Any) -> set[str]:
    """What commits of ours hold beside our own files."""
    subjects = (row.split(" ", 1) for row in project.git("log", "--all", "--format=%H %s", f"^{project.start_commit}").splitlines())
    ours = [commit for commit, subject in subjects if subject.startswith("[")]
    return {path for commit in ours for path in project.paths(commit) if not OURS.search(path)}


def told(log: str) -> str:
    """The one warning about the state: in the log, and again in the summary."""
    warnings = [line for line in log.splitlines() if "arning: BACKLOG.yaml" in line]
    assert [line.partition("arning: ")[2] for line in warnings] == [warnings[0].partition("arning: ")[2]] * 2, log
    return warnings[0]


def run_into(project: Any, fault: Fault, *args: str) -> tuple[int, str, object]:
    """A run that meets the fault; returns its exit code and log, and the operator's things before."""
    process = project.start("run", "--allow-dirty", *args)
    assert project.announced() == "WRK-001 plan 1"
    shell(project, fault.act)
    seen = theirs(project)
    (project.outside / "go").write_text("")
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err, seen


def check_run(project: Any, fault: Fault, log: str, seen: object) -> None:
    """Where the state is after the run, and that nothing else is anywhere."""
    assert "Traceback" not in log
    assert theirs(project) == seen
    assert stray_paths(project) == set()
    assert not (project.outside / "hooked").exists()
    if fault.says:
        warning = told(log)
        assert fault.says in warning
        assert str(journal(project)) in warning
        assert journal(project).exists()
    else:
        assert saved(project)
        assert "not committed" not in log
        assert project.statuses() == {"WRK-001": "blocked plan"}


def journal(project: Any) -> Path:
    """Of the project's work tree; a project below its top has one of its own in there."""
    return Repo.open(project.root).state_dir / "journal"


@pytest.fixture(autouse=True)
def no_hooks_for_the_test(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own git runs no hooks; the command does not hear of that."""
    for name, value in {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
        project.environment[name] = None


@pytest.mark.parametrize("name", table(dict(zip(FAULTS, FAULTS, strict=True)), [name for name, one in FAULTS.items() if not one.quick]))
def test_fault(project: Any, name: str) -> None:
    """Trouble changes the exit code only where --strict asked for it; the next run finishes."""
    fault = FAULTS[name]
    set_up(project, fault)
    code, log, seen = run_into(project, fault, *["--strict"] * (not fault.lax))
    assert code == (1 if fault.says and not fault.lax else fault.code), log
    check_run(project, fault, log, seen)
    shell(project, fault.end)
    seen = theirs(project)
    done = project.run("run", "--allow-dirty", "--cap", "0", code=None)
    assert saved(project), log + done.stderr
    assert project.statuses() == {"WRK-001": "in_progress plan" if fault.code == 1 and not fault.says.startswith("was not committed") else "blocked plan"}
    assert theirs(project) == seen
    assert stray_paths(project) == set()
    assert not journal(project).exists()
    assert project.git("fsck", "--no-dangling", "--no-progress", "--connectivity-only") == ""


# ---- The hooks of a destructive phase ------------------------------------------------------------

class Hook(NamedTuple):
    """A hook of the operator's, and what it makes of the commit of a destructive phase."""

    name: str
    body: str
    code: int = 0  # of the run
    says: str = ""
    subject: str = "[WRK-001][build] build done"


ONCE = "test -e $OUTSIDE/mended || "
HOOKS = {
    "pre-commit hangs and ignores TERM": Hook("pre-commit", f"trap '' TERM; {ONCE}sleep 600", 4, "pre-commit hook cannot do its work: it did not end within 1 s"),
    "pre-commit calls what is not there": Hook("pre-commit", f"{ONCE}exec no-such-tool", 4, "no-such-tool"),
    "commit-msg rejects": Hook("commit-msg", f"{ONCE}{{ echo 'no ticket'; exit 1; }}", 1, "rejected the commit's message, tried on a sample: no ticket"),
    "commit-msg rejects later": Hook("commit-msg", f"{ONCE}! grep -q done $1 || {{ echo 'no ticket'; exit 1; }}", 4, "no ticket"),
    "commit-msg hangs": Hook("commit-msg", f"{ONCE}sleep 600", 1, "it did not end within 1 s"),
    "commit-msg rewrites": Hook("commit-msg", "sed -i '1s/$/ (TICKET-1)/' $1", subject="[WRK-001][build] build done (TICKET-1)"),
    "pre-commit sweeps": Hook("pre-commit", "echo x > swept.txt; git add -A"),
    "pre-commit leaves a child": Hook("pre-commit", "sleep 600 & exit 0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
def test_hook_of_a_destructive_phase(project: Any, name: str) -> None:
    """What a hook cannot judge charges nobody: once it is mended, the next start commits what was paid for."""
    hook = HOOKS[name]
    project.set_up(
        "WRK-001 in_progress phase=build phase_pool=main", phases="build!",
        script={"*/build": [{"write": {"code.py": "1\n"}}]}, execution="max_retries = 0\nhook_timeout_seconds = 1",
    )  # fmt: skip
    (project.root / "own.txt").write_text("the operator's\n")
    project.hook(hook.name, hook.body)
    project.environment["OUTSIDE"] = str(project.outside)

    done = project.run("run", "--strict", "--allow-dirty", code=hook.code)

    assert project.survivors() == []
    if hook.says:
        assert hook.says in done.stderr
        assert project.statuses() == {"WRK-001": "in_progress build"}
        assert "attempts" not in project.text()
        assert saved(project)
        (project.outside / "mended").touch()
        if hook.code == 4:  # set aside meanwhile, and the start finds it all the same
            (project.root / "code.py").unlink()
        project.run("run", "--allow-dirty", code=None)
    assert project.agent_log() == ["WRK-001 build 1"]
    assert project.items() == {}
    assert saved(project)
    assert project.git("log", "-1", "--format=%s", "--", "code.py") == f"{hook.subject}\n"
    swept = ["swept.txt"] if "sweeps" in name else []  # as `git commit` would have it
    code = project.git("log", "-1", "--format=%H", "--", "code.py").strip()
    assert [path for path in project.paths(code) if not OURS.search(path)] == ["code.py", *swept]
    assert project.status() == "?? own.txt\n"
    assert not journal(project).exists()


# ---- Saves that fail -----------------------------------------------------------------------------

class NoSave(NamedTuple):
    """Why BACKLOG.yaml cannot be saved while a phase is running."""

    act: str
    says: str
    end: str
    prepare: Callable[[Any], None] = lambda project: None
    kept: str = "blocked_reason: needs a decision"  # what the next start recovers; "": nothing was decided


def without_root_rights(project: Any) -> None:
    """Root heeds permissions once it may not override them."""
    if os.geteuid() == 0:
        launcher = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
        if shutil.which("setpriv") is None or subprocess.run([*launcher, "true"], capture_output=True, check=False).returncode:
            pytest.skip("root cannot give up its rights here")
        project.launcher = launcher


def small_disk(project: Any) -> None:
    """The project, git directory and all, on a small file system."""
    original, place = project.root, project.root.parent / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    project.at_end.append(lambda: sh(place.parent, "umount", "-l", str(place)))
    sh(original.parent, "git", "clone", "-q", str(original), str(place))
    project.root = place


FILL = "dd if=/dev/zero of=fill bs=4k 2> /dev/null || true"
AWAY, BACK = 'mv "$ROOT" ../gone', 'cd ..; mv gone "$ROOT"'
NO_SAVES = {
    "read-only folder": NoSave("chmod a-w .", "Permission denied", "chmod u+w .", without_root_rights),
    "read-only git directory": NoSave("chmod -R a-w .git", "Permission denied", "chmod -R u+w .git", without_root_rights, kept=""),
    "full disk, journal and all": NoSave(FILL, "No space left on device", "rm fill", small_disk, kept=""),
    "vanished folder": NoSave(AWAY, "is gone", BACK, linked, kept=""),
    "vanished folder, git directory and all": NoSave(AWAY, "is gone", BACK, kept=""),
    "symbolic link in its place": NoSave("mv BACKLOG.yaml real; ln -s real BACKLOG.yaml", "symbolic link", "mv real BACKLOG.yaml"),
    "folder in its place": NoSave("mv BACKLOG.yaml real; mkdir BACKLOG.yaml", "not a regular file", "rmdir BACKLOG.yaml; mv real BACKLOG.yaml"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", table(dict(zip(NO_SAVES, NO_SAVES, strict=True)), NO_SAVES.keys() - {"folder in its place"}))
def test_a_save_that_fails(project: Any, name: str) -> None:
    """No halt commit, exit code 1; the decision is in the journal, or the phase is done again."""
    fault = NO_SAVES[name]
    set_up(project, Fault(prepare=fault.prepare, files=""))
    process = project.start("run", "--allow-dirty")
    project.announced()
    shell(project, fault.act)
    (project.outside / "go").write_text("")
    log = "".join(process.communicate(timeout=60))
    assert process.returncode == 1, log
    assert fault.says in log
    assert "Traceback" not in log.replace("Last output: Traceback", "")
    assert "saved the backlog state" not in log
    assert "journal; once that is mended" in log or not fault.kept, log
    assert project.root.exists() != ("vanished" in name)  # nothing is made anew where it was
    shell(project, fault.end)
    assert not [subject for subject in project.subjects() if subject.startswith(HALT)]
    project.run("run", "--allow-dirty", "--cap", "0", code=None)
    assert saved(project)
    assert fault.kept in project.text()
    assert project.statuses() == {"WRK-001": "blocked plan" if "blocked" in fault.kept else "in_progress plan"}
    assert stray_paths(project) == set()
