"""Every git call of the orchestrator, all of them through the `git` program.

Git is used as plumbing, never as `git commit`: a commit is built beside the operator's work
(private index, tree, commit object), checked to hold exactly the paths it should, entered into the
real index path by path, and only then the branch is moved by compare-and-swap. The order "index
entry first, branch second" makes every crash point harmless: the worst that a killed process leaves
is what `git add` of our own file would leave. Editors, filters of other files and the operator's
staging never come into it. The repository's own rules do where the caller asks for
them: `run_hooks` before a commit, signatures and sign-off by `Repo.sign` and `Repo.signoff`.

A git process costs some milliseconds, so nothing is asked twice: what is named by an object id is
remembered, what the index holds is asked again when its file was replaced, facts of the repository
are asked once.

Reading order: errors and records, starting a program, `Repo` (looking, the index, snapshots,
commits, state commits, salvage and restore, refs, hooks, signatures, preconditions).

Paths inside git are `str` decoded with surrogateescape, '/'-separated, relative to the top of the
work tree. Object ids are lower-case hexadecimal `str`.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

# ==== 1. Errors and records =======================================================================

OLDEST_GIT = (2, 34)
FSYNC_GIT = (2, 36)  # first with core.fsync

STEP_LIMIT_S = 10.0  # one git process of a commit
TREE_LIMIT_S = 300.0  # a process that reads the whole work tree, or all of history
HOOK_LIMIT_S = 120.0  # one hook of the operator
HURRIED_S = 2.0  # one hook when a run is to end at once
TERMINAL_LIMIT_S = 60.0  # a trial of signing, in which a passphrase is typed
KILL_GRACE_S = 2.0  # TERM to KILL
HURRY_POLL_S = 0.2
LOCK_PAUSE_S = 0.05
LOCK_TRIES = 60  # so a lock is waited for 3 s
RETRY_DELAYS_S = (0.02, 0.04, 0.08)  # between the four tries to move the branch
ADD_TRIES = 3  # a file that vanishes while the work tree is read makes a try incomplete

ABSENT_MODE = "000000"
ABSENT_OID = "0" * 40
GITLINK_MODE = "160000"
FEW_PATHS = 100  # as arguments of one command; it is to list all where there are more
BLOBS_AT_ONCE = 500  # that are read into one temporary file

# Variables by which a surrounding git, or the operator's shell, would send our calls elsewhere:
# `git rev-parse --local-env-vars`, plus those that change dates, pathspecs, diffs or traces.
GIT_DROPPED_ENV = re.compile(
    r"GIT_(DIR|WORK_TREE|IMPLICIT_WORK_TREE|INDEX_FILE|PREFIX|INTERNAL_SUPER_PREFIX|COMMON_DIR"
    r"|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|NAMESPACE|QUARANTINE_PATH|SHALLOW_FILE"
    r"|GRAFT_FILE|REPLACE_REF_BASE|NO_REPLACE_OBJECTS|CONFIG|CONFIG_PARAMETERS|ATTR_SOURCE"
    r"|AUTHOR_DATE|COMMITTER_DATE|REFLOG_ACTION|EXTERNAL_DIFF|DIFF_OPTS|[A-Z]+_PATHSPECS|TRACE.*)"
)
_GIT_ENV = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "false",
    "GIT_SEQUENCE_EDITOR": "false",
    "GIT_ASKPASS": "true",
    "SSH_ASKPASS": "true",
    "SSH_ASKPASS_REQUIRE": "never",
    "GIT_PAGER": "cat",
    "GIT_OPTIONAL_LOCKS": "0",  # a polling status must never make the operator's own git fail
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_NO_LAZY_FETCH": "1",
    "LC_ALL": "C.UTF-8",  # we read some messages
    "LANGUAGE": "",
}
# Nothing that a run decides waits for a network; whoever reads history of a partial clone does.
_GIT_FETCHING = {"GIT_NO_LAZY_FETCH": "0"}
_GIT_CONFIG = (
    *("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "gc.auto=0"),
    *("-c", "maintenance.auto=false", "-c", "commit.gpgSign=false", "-c", "core.safecrlf=false"),
    *("-c", "i18n.commitEncoding=UTF-8", "-c", "i18n.logOutputEncoding=UTF-8"),
    *("-c", "core.quotePath=false", "-c", "log.showRoot=true"),
    *("-c", "advice.addEmbeddedRepo=false"),
)
# An index of ours is gone before a power cut could matter, and is to have no shared part.
_GIT_PRIVATE = ("-c", "core.splitIndex=false", "-c", "core.fsync=objects")
# Identity for a commit where the operator has configured none; the configuration stays as it is.
_GIT_IDENTITY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "orchestrator"), ("EMAIL", "orchestrator@localhost"))
}
_GIT_HOOKS = ("--git-path", "hooks")
HOOK_NAMES = ("pre-commit", "prepare-commit-msg", "commit-msg")
_GIT_ENDINGS: Mapping[int | None, Literal["passed", "broken"]]  # of hooks; others reject
_GIT_ENDINGS = {0: "passed", 126: "broken", 127: "broken", None: "broken"}
_GIT_EMPTY = {  # tree and blob, by the length of ids
    40: ("4b825dc642cb6eb9a060e54bf8d69288fbee4904", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
    64: (
        "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
        "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
    ),
}
_GIT_HELD_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
_GIT_OPENING = {  # what git says of a folder in which it will not work, and what to do
    "dubious ownership": (
        "{0} belongs to another user, so git refuses to work there. If you trust it:"
        " `git config --global --add safe.directory '{0}'`."
    ),
    "must be run in a work tree": (
        "{0} is no work tree but a bare repository or a .git folder. Name the folder of a checkout"
        " with --root."
    ),
    "not a git repository": (
        "{0} is not in a git repository. Run `git init` there, or name another folder with --root."
    ),
}


class GitError(Exception):
    """Git could not do something; `str()` is one line for the operator.

    `command` holds git's arguments (empty when no single command failed), `status` its exit status
    (None: it ran into its time limit or could not be started), `stderr` what it said.
    """

    def __init__(self, stderr: str, command: Sequence[str] = (), status: int | None = None) -> None:
        self.command = tuple(command)
        self.status = status
        self.stderr = stderr
        text = "; ".join(stderr.strip().splitlines()[-5:])
        if command:
            line = " ".join(("git", *command))
            shown = line if len(line) <= 100 else line[:99] + "…"
            ending = "failed" if status is None else f"exited {status}"
            text = f"`{shown}` {ending}: {text or '(it said nothing)'}"
        super().__init__(text)


class HeadBusy(GitError):
    """The branch may not be moved now; the text says why, as a clause for the operator."""


class Entry(NamedTuple):
    """One path of a tree: mode as git writes it ("100644" …; "000000" = absent) and object id.

    An absent entry has the same null id in every repository, so entries compare by value.
    """

    path: str
    mode: str
    oid: str

    @property
    def absent(self) -> bool:
        return self.mode == ABSENT_MODE


class Change(NamedTuple):
    """One path that two trees disagree on."""

    before: Entry
    after: Entry


class Head(NamedTuple):
    """Where HEAD stands."""

    branch: str | None  # full ref, "refs/heads/main"; None = detached
    commit: str | None  # None = unborn branch


class Snapshot(NamedTuple):
    """Work tree and index at one moment; JSON-able.

    `tree` holds the whole work tree (without ignored files). `staging` holds the operator's index:
    one row "FLAG MODE OID STAGE<TAB>PATH" for every path whose index entry is not simply that of
    HEAD. FLAG is the letter of `git ls-files -v`, or N for an intent-to-add entry; mode 000000 is a
    staged deletion.
    """

    tree: str
    head: Head
    staging: Sequence[str]


class StateCommit(NamedTuple):
    """What `Repo.commit_state` did; `warning` is one complete message on what was left undone."""

    outcome: Literal["clean", "committed", "skipped"]
    commit: str | None
    warning: str | None


class HookResult(NamedTuple):
    """What the repository's hooks made of a commit.

    They passed it; rejected its files; rejected its message; or one could not do its work: it
    cannot be run, or did not end in time.
    """

    outcome: Literal["passed", "files", "message", "broken"]
    hook: str  # the last one that ran, so the one that decided; "" when there is none
    output: str  # the tail of what it printed
    entries: list[Entry]  # the commit as the hooks left it
    message: str


class Problem(NamedTuple):
    """Something that keeps a run from starting, and the command or act that mends it."""

    what: str
    remedy: str


class _GitRow(NamedTuple):
    """One entry of the index, as `git ls-files -s -v` writes it."""

    flag: str
    mode: str
    oid: str
    stage: str
    path: str

    @classmethod
    def parse(cls, row: str) -> Self:
        facts, path = row.split("\t", 1)
        flag, mode, oid, stage = facts.split(" ")
        return cls(flag, mode, oid, stage, path)

    def __str__(self) -> str:
        return f"{self.flag} {self.mode} {self.oid} {self.stage}\t{self.path}"

    @property
    def hidden(self) -> str:
        """The option by which git was told not to look at the file; "" if it was not."""
        if self.flag.islower():
            return "assume-unchanged"
        return "skip-worktree" if self.flag == "S" else ""


# ==== 2. Starting a program =======================================================================


class _GitEnded(NamedTuple):
    """How a child process ended: exit status (None = stopped at its time limit) and output."""

    status: int | None
    out: bytes
    err: bytes


def _git_run_child(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    limit_s: float,
    stdin: bytes = b"",
    out: IO[bytes] | None = None,
    terminal: bool = False,
    hurried: Callable[[], bool] | None = None,
) -> _GitEnded:
    """Run git or a hook to its end, in a session of its own; OSError when it cannot be started.

    With `terminal` it keeps ours, so that it can ask for a passphrase. Once it is `hurried`, its
    limit is HURRIED_S at most.

    Standard input and output are files, so a grandchild that keeps them open delays nobody; with
    `out`, the output goes to that file alone. Whatever ends the wait early (the limit, an exception
    of a signal handler) ends the child in order, with TERM first: a killed git leaves its lock
    files behind.
    """
    import subprocess
    import tempfile

    with ExitStack() as stack:
        source, kept, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        source.write(stdin)
        source.seek(0)
        files: dict[str, Any] = {"stdout": out or kept, "stderr": err}
        files["stdin"] = source if stdin else subprocess.DEVNULL
        process, ended = None, False
        try:
            # Between fork and setsid a child is in our foreground group: a Ctrl-C would end it.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, _GIT_HELD_SIGNALS)
            try:
                process = subprocess.Popen(
                    argv, cwd=cwd, env=env, start_new_session=not terminal, **files
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)  # may raise what a handler raises
            begun, turn_s = time.monotonic(), HURRY_POLL_S if hurried else limit_s
            while not ended:
                limit_s = min(limit_s, HURRIED_S) if hurried and hurried() else limit_s
                left_s = begun + limit_s - time.monotonic()
                ended = _git_wait(process.pid, process.wait, max(0.0, min(turn_s, left_s)))
                if left_s <= 0:
                    break
        finally:
            if process is not None and not ended:
                end = os.kill if terminal else os.killpg  # whatever is left of the group
                with suppress(ProcessLookupError, PermissionError):
                    end(process.pid, signal.SIGTERM)
                _git_wait(process.pid, process.wait, KILL_GRACE_S)
                with suppress(ProcessLookupError, PermissionError):
                    end(process.pid, signal.SIGKILL)
                process.wait()
        for file in (out or kept, err):
            file.seek(0)
        return _GitEnded(process.wait() if ended else None, kept.read(), err.read())


def _git_wait(pid: int, wait: Callable[[float | None], int], limit_s: float) -> bool:
    """Wait for a child's end; False at the limit. Does not reap where the system can tell so."""
    import select
    import subprocess

    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old kernel
        try:
            wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))
    finally:
        os.close(descriptor)


def _git_environment() -> dict[str, str]:
    """The environment without what would send git to another repository, index or date."""
    return {k: v for k, v in os.environ.items() if not GIT_DROPPED_ENV.fullmatch(k)}


def _git_rows(output: bytes) -> list[str]:
    """The fields of a NUL-terminated list."""
    return os.fsdecode(output).split("\0")[:-1]


def _git_paths(paths: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(path) + b"\0" for path in paths)


def _git_stamp(path: Path) -> object:
    """What changes whenever a file is replaced; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# ==== 3. The repository ===========================================================================


class Repo:
    """One work tree and everything that is done to it through git.

    `root` is the project's folder, `top` the work tree's, both absolute and without symlinks;
    `prefix` is "" or "sub/dir/": root relative to top. `git_dir` is this work tree's own,
    `common_dir` the one it shares with its sibling work trees. Methods raise GitError unless their
    docstring says otherwise.

    Not for use by several threads at once.
    """

    def __init__(
        self,
        root: Path,
        *,
        delay: Callable[[float], None] = time.sleep,
        limit_s: float = STEP_LIMIT_S,
    ) -> None:
        """Prefer `Repo.open`. `delay` is there for tests."""
        self.root = self.top = root
        self.git_dir = self.common_dir = root
        self.prefix = ""
        self.version = OLDEST_GIT
        self._delay = delay
        self._limit_s = limit_s
        self._null = ABSENT_OID  # as long as this repository's object ids
        self._empty_tree, self._empty_blob = _GIT_EMPTY[len(self._null)]
        self.sign: bool | None = None  # whether commits are; None: as git's configuration says
        self.signoff = False  # whether they carry Signed-off-by:
        self.hook_env: Mapping[str, str] = {}  # by which a hook is found that outlives its run
        self.hurried: Callable[[], bool] = lambda: False  # whether the run is to end at once
        self.sign_trouble = ""  # why no commit is signed any more, for the rest of the run
        self.unsigned: list[str] = []  # commits that were made without a signature since
        self.apart: tuple[str, ...] = ()  # paths that snapshots take from the index: not to be read
        self._seen: str | None = None  # the last commit that HEAD was at
        self._identity: Mapping[str, str] = {}  # once it is known that the operator has none
        self._trees: dict[str, str] = {}  # of commits that HEAD was at
        self._branch: tuple[object, str | None] = None, None  # see `branch`
        self._hooks_folder = ""  # as git said when it was last asked for HEAD
        self._read: tuple[str, bytes | None] = "", None  # see `committed`
        self._compared: dict[tuple[str, str], list[Change]] = {}  # see `changes`
        self._index: tuple[object, dict[str, list[str]]] = None, {}  # see `_all_rows`
        self._undated = False  # whether the index holds entries of ours, without the files' times
        self._staged: tuple[object, frozenset[str]] = None, frozenset()  # see `_staged_paths`

    @classmethod
    def open(cls, root: Path, **parameters: Any) -> Self:
        """The repository whose work tree holds the folder `root`.

        Raises GitError, saying what to do, when git is missing or there is no usable work tree.
        """
        repo = cls(Path(os.path.realpath(root)), **parameters)
        if not repo.root.is_dir():
            raise GitError(f"{repo.root} is not a folder. Name an existing one with --root.")
        said = repo._line("version")
        version = re.search(r"(\d+)\.(\d+)", said)
        if version is None:
            raise GitError(f"`git version` says {said!r}; is that git? Look at your PATH.")
        repo.version = int(version[1]), int(version[2])
        asked = ("--is-inside-work-tree", "--show-object-format", "--path-format=absolute")
        folders = ("--show-toplevel", "--git-dir", "--git-common-dir")
        try:
            facts = repo._line("rev-parse", *asked, *folders).split("\n")
        except GitError as error:
            known = [text for said, text in _GIT_OPENING.items() if said in error.stderr]
            advice = known[0].format(repo.root) if known else error.stderr.strip() or str(error)
            raise GitError(advice) from None
        if facts[0] != "true" or len(facts) != 5:
            raise GitError(
                f"git cannot tell the work tree of {repo.root}; is there a line break in its path?"
                " Name the folder of another checkout with --root."
            )
        repo.top, repo.git_dir, repo.common_dir = (Path(os.path.realpath(f)) for f in facts[2:])
        relative = os.path.relpath(repo.root, repo.top)
        repo.prefix = "" if relative == "." else relative + "/"
        repo._null = "0" * (64 if facts[1] == "sha256" else 40)
        repo._empty_tree, repo._empty_blob = _GIT_EMPTY[len(repo._null)]
        return repo

    @classmethod
    def init(cls, root: Path) -> Self:
        """Make a repository of the folder `root`, on branch main."""
        cls(Path(os.path.realpath(root))).git("init", "--quiet", "--initial-branch=main")
        return cls.open(root)

    @property
    def state_dir(self) -> Path:
        """Where locks and journal live, out of reach of `git clean -fdx`; one for each project."""
        name = os.fsencode(self.prefix.removesuffix("/"))
        below = re.sub(rb"[^\w.-]", lambda found: b"%%%02X" % ord(found[0]), name, flags=re.ASCII)
        return self.git_dir / ("orchestrator" + (f".{os.fsdecode(below)}" if below else ""))

    @cached_property
    def neighbours(self) -> list[str]:
        """The prefixes of the other projects in this work tree that have ever been run."""
        found = {path.name for path in self.git_dir.glob("orchestrator*")}
        codes = (os.fsencode(name.partition(".")[2]) for name in found)
        names = (re.sub(rb"%(..)", lambda one: bytes([int(one[1], 16)]), code) for code in codes)
        below = map(os.fsdecode, filter(None, names))
        known = {f"{name}/" for name in below if (self.top / name).is_dir()}
        return sorted((known | ({""} if "orchestrator" in found else set())) - {self.prefix})

    def is_tracked(self, path: str) -> bool:
        """Whether HEAD or the index holds a path."""
        head = self._entries(self.head().commit, [path])[path]
        return head.mode != ABSENT_MODE or bool(self.git("ls-files", "-z", "--", path))

    # -- calling git -------------------------------------------------------------------------------

    def git(
        self,
        *args: str,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        ok: Container[int] = (0,),
        limit_s: float | None = None,
    ) -> bytes:
        """Run git in `top` and return its output; GitError for an exit status not in `ok`."""
        return self._call(args, stdin=stdin, env=env, ok=ok, limit_s=limit_s).out

    def _call(
        self,
        args: Sequence[str],
        *,
        stdin: bytes = b"",
        out: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        ok: Container[int] = (0,),
        limit_s: float | None = None,
        settings: bool = True,
        terminal: bool = False,
    ) -> _GitEnded:
        """The one place where git is started. Without `settings` it runs as the operator's does."""
        env = env or {}
        limit_s = limit_s or (TERMINAL_LIMIT_S if terminal else self._limit_s)
        where = self.top if self.top.is_dir() else self.root
        # Git flushes nothing by default: a power cut leaves HEAD at nothing then.
        old = self.version < FSYNC_GIT
        flushed = "fsyncObjectFiles=true" if old else "fsync=objects,reference,index"
        private = _GIT_PRIVATE if "GIT_INDEX_FILE" in env else ()
        ours = (*_GIT_CONFIG, "-c", f"core.{flushed}", *private)
        argv = ("git", *(ours if settings else ()), *args)
        environment = {**_git_environment(), **_GIT_ENV, **env}
        try:
            ended = _git_run_child(argv, where, environment, limit_s, stdin, out, terminal)
        except FileNotFoundError:
            if not where.is_dir():
                raise GitError(f"the folder {where} is gone. Put it back.") from None
            raise GitError("git was not found on your PATH. Install git 2.34 or newer.") from None
        except OSError as error:
            raise GitError(f"could not be started: {error}", args) from None
        if ended.status is None:
            raise GitError(f"did not end within {limit_s:g} s and was stopped", args)
        if ended.status not in ok:
            raise GitError(ended.err.decode(errors="replace"), args, ended.status)
        return ended

    def _line(self, *args: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> str:
        return os.fsdecode(self.git(*args, env=env, stdin=stdin)).removesuffix("\n")

    # -- looking -----------------------------------------------------------------------------------

    def head(self) -> Head:
        """Branch and commit. GitError when HEAD is damaged."""
        # One process, so that all belongs together; it fails on an unborn branch. Without our
        # settings, which would hide where the hooks are.
        asked = ("rev-parse", "HEAD^{commit}", "HEAD^{tree}", "--symbolic-full-name", "HEAD")
        stamp = _git_stamp(self.git_dir / "HEAD")
        said = self._call((*asked, *_GIT_HOOKS), ok=range(256), settings=False)
        if said.status == 0:
            commit, tree, name, hooks = os.fsdecode(said.out).removesuffix("\n").split("\n", 3)
            self._hooks_folder = hooks
            self._trees[commit] = tree
            self._seen = commit
            self._branch = stamp, name if name != "HEAD" else None
            return Head(self._branch[1], commit)
        branch = self._line("symbolic-ref", "-q", "HEAD")
        if self._known("HEAD"):
            raise GitError(
                "HEAD points to a commit that cannot be read. See `git fsck` and `git reflog`, then"
                f" set the branch to a good commit: `git update-ref {branch} COMMIT`."
            )
        self._branch = stamp, branch
        return Head(branch, None)

    def _known(self, name: str) -> bool:
        """Whether there is a ref of this name."""
        return self._call(("rev-parse", "-q", "--verify", name), ok=(0, 1)).status == 0

    def branch(self) -> str | None:
        """The branch alone; git is asked again when the file was replaced that a switch writes."""
        same = self._branch[0] == _git_stamp(self.git_dir / "HEAD")
        reftable = (self.common_dir / "reftable").is_dir()
        return self._branch[1] if same and not reftable else self.head().branch

    def operation(self) -> str | None:
        """The operation that is open in this work tree ("merge", "rebase", …), if any."""
        here, reftable = self.git_dir, (self.common_dir / "reftable").is_dir()
        refs = {"MERGE_HEAD": "merge", "CHERRY_PICK_HEAD": "cherry-pick", "REVERT_HEAD": "revert"}
        files = {"rebase-apply/applying": "am", "rebase-merge": "rebase", "rebase-apply": "rebase"}
        for name, operation in {**files, **refs, "BISECT_LOG": "bisect"}.items():
            # With reftable some of these are refs without a file.
            if (here / name).exists() or (reftable and name in refs and self._known(name)):
                return operation
        # A cherry-pick or revert of several commits between two of its steps.
        if not (here / "sequencer").is_dir():
            return None
        with suppress(OSError):
            if (here / "sequencer/todo").read_bytes().startswith(b"revert"):
                return "revert"
        return "cherry-pick"

    def is_ancestor(self, commit: str) -> bool:
        """Whether `commit` is known to be in the history of HEAD (a shallow clone forgets)."""
        asked = ("merge-base", "--is-ancestor", commit, "HEAD")
        return self._call(asked, ok=(0, 1, 128)).status == 0

    def commits_between(self, old: str, new: str) -> list[str]:
        """The commits that `new` has and `old` has not, oldest first."""
        return [] if old == new else self._line("rev-list", "--reverse", new, f"^{old}").split()

    def mentions(self, token: str, since: str | None) -> bool:
        """Whether a commit of HEAD's history carries the trailer "Orchestrator-Attempt: token".

        Commits that `since` has already are not looked at.
        """
        if self.head().commit is None:
            return False
        bound = (f"^{since}",) if since else ()
        trailer = f"Orchestrator-Attempt: {token}"
        options = ("--ignore-missing", "--format=%B", "--fixed-strings", f"--grep={trailer}")
        bodies = self.git("rev-list", *options, "HEAD", *bound, limit_s=TREE_LIMIT_S)
        return trailer.encode() in bodies.splitlines()

    def dirty_paths(self) -> list[str]:
        """Every path that is not as in HEAD, untracked ones too (nested repositories as "x/")."""
        options = ("-z", "--untracked-files=all", "--no-renames", "--ignore-submodules=none")
        rows = _git_rows(self.git("status", "--porcelain=v2", *options, limit_s=TREE_LIMIT_S))
        fields = {"1": 8, "u": 10, "?": 1}  # how many fields precede the path
        return sorted(row.split(" ", fields[row[0]])[-1] for row in rows if row[0] in fields)

    def committed(self, commit: str | None, path: str) -> bytes | None:
        """What a commit holds of a file of ours; None when it holds none."""
        if commit is None:
            return None
        name = f"{commit}:{path}"
        if name != self._read[0]:
            found = self._call(("cat-file", "blob", name), ok=(0, 128), env=_GIT_FETCHING)
            data: bytes | None = found.out
            if found.status:  # there is none, or it cannot be read
                entry = self._entries(commit, [path])[path]
                data = None if entry.absent else next(self.read_blobs([entry.oid]))
            self._read = name, data
        return self._read[1]

    def _entries(self, tree: str | None, paths: Iterable[str]) -> dict[str, Entry]:
        """What a tree (or commit) holds at each path; a folder counts as absent."""
        found = {path: Entry(path, ABSENT_MODE, ABSENT_OID) for path in paths}
        if tree is None or not found:
            return found
        few = found if len(found) <= FEW_PATHS else ()
        options = () if few else ("-r",)
        for row in _git_rows(self.git("ls-tree", "-z", "--full-tree", *options, tree, "--", *few)):
            facts, path = row.split("\t", 1)
            mode, kind, oid = facts.split(" ")
            if path in found and kind != "tree":
                found[path] = Entry(path, mode, oid)
        return found

    def read_blobs(self, oids: Iterable[str]) -> Iterator[bytes]:
        """The bytes of any number of blobs, one by one, from few processes.

        GitError, in its place, for one that is not there.
        """
        import tempfile

        wanted = list(oids)
        for at in range(0, len(wanted), BLOBS_AT_ONCE):
            some = wanted[at : at + BLOBS_AT_ONCE]
            command, stdin = ("cat-file", "--batch"), "".join(f"{oid}\n" for oid in some).encode()
            with tempfile.TemporaryFile() as output:
                self._call(
                    command, stdin=stdin, out=output, env=_GIT_FETCHING, limit_s=TREE_LIMIT_S
                )
                for oid in some:
                    facts = output.readline().split()
                    if facts[1:2] != [b"blob"]:
                        place = self.common_dir / "objects" / oid[:2] / oid[2:]
                        raise GitError(
                            f"git's object {oid} is missing or damaged, as after a power cut. See"
                            f" `git fsck`; if there is a file {place}, remove it, then start again."
                        )
                    yield output.read(int(facts[2]) + 1)[:-1]

    def _read_back(self, entries: Iterable[Entry]) -> None:
        """Refuse what git does not hold: it takes a file that a power cut emptied for stored."""
        kept = (entry.oid for entry in entries if entry.mode not in (ABSENT_MODE, GITLINK_MODE))
        for _ in self.read_blobs(kept):
            pass

    def bring_out(self, *starts: str) -> None:
        """Write the files that a sparse checkout leaves out whose path has one of these starts.

        For what is to be read or appended to: a new file would take the place of what git has.
        """
        if not self._settings.get("core.sparsecheckout", False):
            return
        rows = [row for row in self._hidden_rows() if row.path.startswith(starts)]
        missing = [r for r in rows if r.hidden == "skip-worktree" and not self._exists(r.path)]
        contents = self.read_blobs(row.oid for row in missing)
        for row, content in zip(missing, contents, strict=True):
            place = self.top / row.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    @cached_property
    def _settings(self) -> dict[str, bool]:
        """Settings of git's that do not change while we run."""
        wanted = r"^(core\.(filemode|sparsecheckout)|commit\.gpgsign)$"
        asked = ("config", "-z", "--type=bool", "--get-regexp", wanted)
        said = self._call(asked, ok=(0, 1), settings=False)  # ours switch signatures off
        pairs = (row.partition("\n") for row in _git_rows(said.out))
        return {name: value == "true" for name, _, value in pairs}

    def old_versions(self, path: str, commit: str, most: int = 50) -> list[bytes]:
        """What a file held in the last commits up to `commit` that changed it, oldest first."""
        options = ("--no-show-signature", "--no-color", "--no-renames", "--first-parent", "-m")
        form = ("--raw", "-z", "--no-abbrev", "--no-ext-diff", "--format=")
        command = ("log", f"-{most}", *options, *form, commit, "--", path)
        output = self.git(*command, env=_GIT_FETCHING, limit_s=TREE_LIMIT_S)
        rows = [row.split(" ") for row in _git_rows(output) if row.startswith(":")]
        kept = [words[3] for words in reversed(rows) if words[1].startswith("100")]
        return list(self.read_blobs(kept))

    def changes(self, before: str | None, after: str) -> list[Change]:
        """The paths that differ between two trees or commits, given by id; sorted, no renames."""
        old = self._trees.get(before, before) if before else self._empty_tree
        new = self._trees.get(after, after)
        if old == new:
            return []
        if (old, new) not in self._compared:
            options = ("-r", "-z", "--no-renames", "--ignore-submodules=none")
            rows = _git_rows(self.git("diff-tree", *options, old, new, limit_s=TREE_LIMIT_S))
            found = []
            for facts, path in zip(rows[::2], rows[1::2], strict=True):  # `:modes ids status`
                was, now, old_oid, oid, _ = facts[1:].split(" ")
                gone = Entry(path, ABSENT_MODE, ABSENT_OID)
                left = gone if was == ABSENT_MODE else Entry(path, was, old_oid)
                right = gone if now == ABSENT_MODE else Entry(path, now, oid)
                found.append(Change(left, right))
            recent = list(self._compared.items())[-4:]
            self._compared = {**dict(recent), (old, new): sorted(found)}
        return list(self._compared[old, new])

    def relative(self, path: Path) -> str:
        """A file's path as git names it. GitError when it lies outside of the work tree."""
        folder = os.path.realpath(path.parent)
        relative = os.path.relpath(os.path.join(folder, path.name), self.top)
        if relative == ".." or relative.startswith("../"):
            raise GitError(f"{path} is outside of the repository {self.top}")
        return relative

    def blobs(self, files: Mapping[Path, bytes]) -> list[Entry]:
        """Store files of ours with these bytes the way `git add` would, from one process.

        One by one only where somebody is editing them. A mode of "" is that of HEAD.
        """
        names = [self.relative(path) for path in files]
        if all(path.is_file() and not path.is_symlink() for path in files):
            oids = self._line("hash-object", "-w", "--", *names).split()
            if all(path.is_file() and path.read_bytes() == data for path, data in files.items()):
                if not self._settings.get("core.filemode", True):
                    return [Entry(name, "", oid) for name, oid in zip(names, oids, strict=True)]
                bits = [path.stat().st_mode & stat.S_IXUSR for path in files]
                modes = ["100755" if bit else "100644" for bit in bits]
                return list(map(Entry, names, modes, oids))
        return [self._stored(name, data) for name, data in zip(names, files.values(), strict=True)]

    def _stored(self, name: str, data: bytes) -> Entry:
        """Bytes in a file's place; its executable bit stays as in HEAD."""
        oid = self._line("hash-object", "-w", "--stdin", f"--path={name}", stdin=data)
        return Entry(name, "", oid)

    # -- the index ---------------------------------------------------------------------------------

    @contextmanager
    def _private_index(self, *, copied: bool = False) -> Iterator[dict[str, str]]:
        """The environment for an index of our own, beside the real one; gone afterwards."""
        import shutil

        path = self.git_dir / f"orchestrator-index-{os.urandom(8).hex()}"
        try:
            # With its times: an entry as young as its index file is one that git reads the file
            # for. A copy that looks younger would hide an edit made in the tick of its staging.
            with suppress(FileNotFoundError):
                if copied:
                    shutil.copy2(self.git_dir / "index", path)
            yield {"GIT_INDEX_FILE": str(path)}
        finally:
            for end in ("", ".lock", "-message"):
                Path(f"{path}{end}").unlink(missing_ok=True)

    def _graft(self, base: str | None, entries: Iterable[Entry]) -> str:
        """The tree of `base` (a tree or a commit) with these entries."""
        with self._private_index() as env:
            self.git("read-tree", "--no-sparse-checkout", base or "--empty", env=env)
            rows = [_GitRow("H", e.mode, e.oid, "0", e.path) for e in entries]
            self.git("update-index", "-z", "--index-info", stdin=self._index_info(rows), env=env)
            # What a partial clone has not fetched is of `base`; for ours, see `_read_back`.
            return self._write_tree(env, "--missing-ok")

    def _write_tree(self, env: Mapping[str, str], *options: str) -> str:
        tree = self._line("write-tree", *options, env=env)
        if tree == self._empty_tree:  # git knows it without storing it, but others may not
            self.git("hash-object", "-w", "-t", "tree", "--stdin")
        return tree

    def _all_rows(self) -> dict[str, list[str]]:
        """Every entry of the real index by path, as `git ls-files` writes it."""
        stamp = _git_stamp(self.git_dir / "index")
        if stamp is None or stamp != self._index[0]:
            rows: dict[str, list[str]] = {}
            for row in _git_rows(self.git("ls-files", "-s", "-v", "-z", limit_s=TREE_LIMIT_S)):
                rows.setdefault(row.partition("\t")[2], []).append(row)
            self._index = stamp, rows
        return self._index[1]

    def _index_rows(self, paths: Iterable[str]) -> list[_GitRow]:
        """The index entries of the paths."""
        rows = self._all_rows()
        return [_GitRow.parse(row) for path in sorted(set(paths)) for row in rows.get(path, ())]

    def _hidden_rows(self) -> list[_GitRow]:
        """The entries that git was told not to look at the files of."""
        listed = (row for rows in self._all_rows().values() for row in rows)
        return [_GitRow.parse(row) for row in listed if row[0] == "S" or row[0].islower()]

    def _write_index(self, rows: Sequence[_GitRow]) -> None:
        """Make the real index hold exactly these rows for their paths; nothing else is touched.

        HeadBusy when somebody holds the index lock for too long.
        """
        self._index, self._undated = (None, {}), True
        self._patiently("update-index", "-z", "--index-info", stdin=self._index_info(rows))
        for option in ("assume-unchanged", "skip-worktree"):
            if paths := [row.path for row in rows if row.hidden == option]:
                command = ("update-index", f"--{option}", "-z", "--stdin")
                self._patiently(*command, stdin=_git_paths(paths))
        if paths := [row.path for row in rows if row.flag == "N" and self._exists(row.path)]:
            intend = ("add", "-N", "-f", "--pathspec-from-file=-", "--pathspec-file-nul")
            self._patiently(*intend, stdin=_git_paths(paths))

    def _exists(self, path: str) -> bool:
        return os.path.lexists(self.top / path)

    def _index_info(self, rows: Iterable[_GitRow]) -> bytes:
        """Input of `update-index --index-info`: removals first, so files and folders may swap."""
        rows = list(rows)
        removed = dict.fromkeys(row.path for row in rows)
        present = [row for row in rows if row.mode != ABSENT_MODE and row.flag != "N"]
        return _git_paths(
            [f"0 {self._null}\t{path}" for path in removed]
            + [f"{row.mode} {row.oid} {row.stage}\t{row.path}" for row in present]
        )

    def _patiently(self, *args: str, stdin: bytes) -> None:
        """Run a command on the real index, waiting a while for whoever holds its lock."""
        for _ in range(LOCK_TRIES):
            try:
                self.git(*args, stdin=stdin)
                return
            except GitError as error:
                if "index.lock" not in error.stderr:
                    raise
            self._delay(LOCK_PAUSE_S)
        raise HeadBusy(_git_lock_text(self.git_dir / "index.lock"))

    def _wait_for(self, locks: Sequence[Path]) -> None:
        """Wait for a git that is at work. HeadBusy when a lock stays."""
        held = list(locks)
        for _ in range(LOCK_TRIES):
            held = [lock for lock in locks if lock.exists()]
            if not held:
                return
            self._delay(LOCK_PAUSE_S)
        raise HeadBusy(_git_lock_text(held[0]))

    # -- snapshots ---------------------------------------------------------------------------------

    def snapshot(self, ref: str | None = None) -> Snapshot:
        """Store the whole work tree (but for ignored files and `apart`) as a tree; touches nothing.

        With `ref`, a commit of it is kept there, so that no garbage collection takes it; a second
        parent holds what was staged, as in a stash. GitError when a file cannot be read: a snapshot
        without it would look like its deletion.
        """
        head = self.head()
        staging = self._staging(head)
        taken = Snapshot(self._work_tree(), head, [str(row) for row in staging])
        base = head.commit
        if ref is not None and base and not staging and taken.tree == self._trees[base]:
            self.git("update-ref", ref, base)  # which holds all of it
        elif ref is not None:
            parents = [base] if base else []
            if staging and all(row.stage == "0" for row in staging):
                firm = [Entry(row.path, row.mode, row.oid) for row in staging if row.flag != "N"]
                tree = self._graft(base, firm)
                parents.append(self._commit_tree(tree, parents, "Staged before the phase"))
            commit = self._commit_tree(taken.tree, parents, "Work tree before the phase")
            self.git("update-ref", ref, commit)
        return taken

    def _work_tree(self) -> str:
        """The tree of the work tree: what `git add -A` makes of a copy of the index."""
        with self._private_index(copied=True) as env:
            return self._record(env)

    def _record(self, env: Mapping[str, str]) -> str:
        """Let a private copy of the index hold the work tree, and store that as a tree."""
        # A skip-worktree entry without a file is what a sparse checkout leaves out: no deletion.
        seen = [r for r in self._hidden_rows() if r.flag.islower() or self._exists(r.path)]
        for option in ("assume-unchanged", "skip-worktree"):
            if paths := [row.path for row in seen if row.hidden == option]:
                command = ("update-index", f"--no-{option}", "-z", "--stdin")
                self.git(*command, stdin=_git_paths(paths), env=env)
        self._add_everything(env)
        unmerged = [row.path for row in self._index_rows(self.apart) if row.stage != "0"]
        if unmerged:  # it keeps a tree from being written
            remove = ("update-index", "--force-remove", "-z", "--stdin")
            self.git(*remove, stdin=_git_paths(unmerged), env=env)
        return self._write_tree(env)

    def _add_everything(self, env: Mapping[str, str]) -> None:
        apart = (f":(exclude,top,literal){path}" for path in self.apart)
        add = ("add", "-A", "--sparse", "--ignore-errors", "--", ".", *apart)
        with_magic = {**env, "GIT_LITERAL_PATHSPECS": "0"}
        listing = ("ls-files", "-z", "--others", "--modified", "--exclude-standard")
        trouble = GitError("")
        for _ in range(ADD_TRIES):  # a file that vanishes while git looks at it is fatal for git
            said = self._call(add, env=with_magic, ok=(0, 1, 128), limit_s=TREE_LIMIT_S)
            missed = []
            if said.status == 1:  # a nested repository without a commit may stay out
                listed = _git_rows(self.git(*listing, env=env, limit_s=TREE_LIMIT_S))
                missed = [path for path in listed if path[-1] != "/" and path not in self.apart]
            if said.status == 0 or (said.status == 1 and not missed):
                return
            trouble = GitError(said.err.decode(errors="replace"), add, said.status)
            if missed:
                trouble = GitError(
                    f"cannot be read, so nothing could be recorded: {', '.join(missed[:5])}."
                    " Make it readable, remove it, or list it in .gitignore."
                )
        raise trouble

    def _staging(self, head: Head) -> list[_GitRow]:
        """The entries that say more than HEAD does, see `Snapshot.staging`."""
        staged = firm = self._staged_paths(head)
        hidden = [row for row in self._hidden_rows() if row.path not in staged]
        # Not what a sparse checkout leaves out: the operator set no flag there.
        hidden = [row for row in hidden if row.flag.islower() or self._exists(row.path)]
        rows = hidden + self._index_rows(staged)
        if any(row.oid == self._empty_blob for row in rows):
            # An intent-to-add entry looks like an empty file, unless one asks for the difference.
            firm = self._staged_now(head, "--ita-invisible-in-index")
        kept = [row._replace(flag="N") if row.path in staged - firm else row for row in rows]
        deleted = sorted(staged - {row.path for row in rows})
        return kept + [_GitRow("H", ABSENT_MODE, self._null, "0", path) for path in deleted]

    def _staged_paths(self, head: Head) -> frozenset[str]:
        """The paths in which the index differs from HEAD."""
        stamp = _git_stamp(self.git_dir / "index")
        if stamp is None or self._staged[0] != (stamp, head.commit):
            self._staged = (stamp, head.commit), self._staged_now(head)
        return self._staged[1]

    def _staged_now(self, head: Head, *options: str) -> frozenset[str]:
        form = ("--raw", "-z", "--no-renames", "--no-abbrev", "--ignore-submodules=none")
        against = ("diff-index", "--cached", *form, *options, head.commit or self._empty_tree)
        return frozenset(_git_rows(self.git(*against))[1::2])

    # -- commits -----------------------------------------------------------------------------------

    def commit(
        self,
        entries: Sequence[Entry],
        message: str | Callable[[Head], str],
        *,
        expect_branch: str | None = None,
    ) -> str | None:
        """Commit exactly these paths, as given, on the current branch; the commit's id.

        The message may depend on what it is committed on. Entries that HEAD holds already and
        those that are `unshared` are left out; None when nothing is left. A mode of "" keeps the
        executable bit that HEAD gives the path. Index entries of other paths, the work tree and
        hooks do not come into it. HeadBusy when the branch may not be moved: an open operation, a
        detached HEAD, a branch other than `expect_branch` (full ref), a lock that stays held, or
        somebody who keeps moving the branch.
        """
        for pause in (*RETRY_DELAYS_S, None):
            head = self.head()
            tree, wanted = self._build(head, entries)
            if not wanted:
                return None
            self._refuse_to_move(head, expect_branch)
            text = message if isinstance(message, str) else message(head)
            commit = self._try_commit(head, tree, wanted, self.signed_off(text))
            if commit is not None:
                return commit
            if pause is not None:
                self._delay(pause)
        raise HeadBusy("somebody else keeps moving the branch")

    def _build(self, head: Head, entries: Sequence[Entry]) -> tuple[str, list[Entry]]:
        """HEAD's tree with the entries, and which of them change it; nothing else does."""
        entries = self._news(head, entries)
        if not entries:
            return "", []
        self._read_back(entries)
        tree = self._graft(head.commit, entries)
        made = [change.after for change in self.changes(head.commit, tree)]
        foreign = set(made).difference(entries)
        if foreign:
            raise GitError(
                "the commit would not hold what it should, so the branch was left alone: it"
                f" changes {', '.join(sorted(entry.path for entry in foreign)[:5])}"
            )
        return tree, made

    def _news(self, head: Head, entries: Sequence[Entry]) -> list[Entry]:
        """The entries without what HEAD is known to hold and what none may; modes completed."""
        if all(entry.mode not in ("", GITLINK_MODE) for entry in entries):
            return list(entries)
        old = self._entries(head.commit, [entry.path for entry in entries])
        news, unshared = [], self.unshared(entries)
        for entry in entries:
            was = old[entry.path]
            kept = was.mode if was.mode in ("100644", "100755") else "100644"
            entry = entry._replace(mode=entry.mode or kept)
            if entry.path not in unshared and entry != was:
                news.append(entry)
        return news

    def unshared(self, entries: Iterable[Entry]) -> list[str]:
        """The nested repositories among the entries that others could not get: no commit has them.

        New ones, as a clone, and submodules at a commit that none of their remotes is known to
        have.
        """
        links = [entry for entry in entries if entry.mode == GITLINK_MODE]
        old = self._entries(self.head().commit if links else None, [e.path for e in links])
        lost = []
        for entry in links:
            asked = ("-C", entry.path, "branch", "-r", "--contains", entry.oid)
            known = old[entry.path].mode == GITLINK_MODE
            if not (known and self._call(asked, ok=range(256)).out):
                lost.append(entry.path)
        return lost

    def _refuse_to_move(self, head: Head, expect_branch: str | None) -> None:
        for problem in self.head_problems(head):
            raise HeadBusy(problem.what)
        name = str(head.branch).removeprefix("refs/heads/")
        if expect_branch not in (None, head.branch):
            expected = str(expect_branch).removeprefix("refs/heads/")
            raise HeadBusy(f"HEAD is on {name} now, the run began on {expected}")
        if head.commit is None and self._seen is not None:
            raise HeadBusy(f"the branch {name} was deleted (it was at {self._seen[:10]})")

    def _try_commit(
        self, head: Head, tree: str, wanted: Sequence[Entry], message: str
    ) -> str | None:
        """One try; None when HEAD moved meanwhile. The order of the steps is what makes it safe."""
        parents, commit = [head.commit] if head.commit else [], ""
        if self.wants_signatures() and not self.sign_trouble:
            try:
                commit = self._commit_tree(tree, parents, message, "-S")
            except GitError as error:  # a decision is worth more than a signature
                self.sign_trouble = str(error)
        commit = commit or self._commit_tree(tree, parents, message)
        # A git that is about to move HEAD is waited for before the index is touched.
        self._wait_for([self.git_dir / "HEAD.lock", self.common_dir / f"{head.branch}.lock"])
        (stamp, old), (known, staged) = self._index, self._staged
        self._stage(wanted)
        subject = message.split("\n", 1)[0]
        note = f"commit: {subject}" if head.commit else f"commit (initial): {subject}"
        # Compare-and-swap, and by name: the operator may switch meanwhile.
        move = ("update-ref", "-m", note, str(head.branch), commit, head.commit or self._null)
        try:
            self.git(*move)
        except GitError as error:
            if error.status is None or "cannot lock ref" not in error.stderr:
                raise
            return None  # moved meanwhile, or locked: looked at again by the next try
        self._trees[commit] = tree
        self.unsigned += [commit] if self.sign_trouble else []
        self._stage(wanted)  # a git that read the index before us may have written it back since
        if known == (stamp, head.commit):
            # What is staged now need not be asked, if nobody else has changed the index.
            now, paths = self._all_rows(), {entry.path for entry in wanted}
            changed = {path for path in now.keys() | old.keys() if now.get(path) != old.get(path)}
            if changed <= paths:
                self._staged = (self._index[0], commit), staged - paths
        return commit

    def _commit_tree(
        self,
        tree: str,
        parents: Sequence[str],
        message: str,
        *options: str,
        terminal: bool = False,
    ) -> str:
        above = [option for parent in parents for option in ("-p", parent)]
        command = ("commit-tree", *options, tree, *above, "-F", "-")
        text = (message.rstrip("\n") + "\n").encode(errors="replace")
        try:
            said = self._call(command, stdin=text, env=self._identity, terminal=terminal)
            return said.out.decode().strip()
        except GitError as error:
            unknown = r"identity unknown|ident name|auto-detect|tell me who you are"
            if self._identity or not re.search(unknown, error.stderr):
                raise
        self._identity = _GIT_IDENTITY
        return self._commit_tree(tree, parents, message, *options, terminal=terminal)

    def _stage(self, entries: Sequence[Entry]) -> None:
        """Enter the entries into the real index, where it does not hold them yet.

        No merge is open (see `_refuse_to_move`), so an unmerged entry is what is left of a
        `git stash pop`: the commit settles it.
        """
        present: dict[str, list[_GitRow]] = {}
        for row in self._index_rows([entry.path for entry in entries]):
            present.setdefault(row.path, []).append(row)
        rows = []
        for entry in entries:
            old = present.get(entry.path, [])
            flag = old[0].flag if len(old) == 1 else "H"
            row = _GitRow(flag, entry.mode, entry.oid, "0", entry.path)
            if old != [row] and (old or not entry.absent):
                rows.append(row)
        if rows:
            self._write_index(rows)

    # -- state commits -----------------------------------------------------------------------------

    def commit_state(
        self,
        path: Path,
        data: bytes,
        message: str | Callable[[bytes | None], str],
        *,
        expect_branch: str | None = None,
    ) -> StateCommit:
        """Commit one file of ours, holding `data`, alone, if that differs from HEAD.

        The message may depend on what HEAD holds of the file (None: nothing). Never raises for git
        trouble. Skipped, with a warning, where the branch may not be moved, and for a file that is
        missing, no regular file, ignored, or hidden by assume-unchanged or skip-worktree.
        """

        def text(head: Head) -> str:
            if isinstance(message, str):
                return message
            return message(self.committed(head.commit, name))

        def skipped(why: str) -> StateCommit:
            return StateCommit("skipped", None, f"{path.name} was not committed: {why}")

        try:
            name = self.relative(path)
            unfit = self._unfit(path)
            if unfit is not None:
                return skipped(f"{unfit.what}. {unfit.remedy}")
            entry = self._stored(name, data)
            hidden = self._hidden(path, name)
            if hidden is not None and self._news(self.head(), [entry]):
                return skipped(f"{hidden.what}. {hidden.remedy}")
            commit = self.commit([entry], text, expect_branch=expect_branch)
            settled = commit or [row.oid for row in self._index_rows([name])] == [entry.oid]
            if not settled and self.operation() is None:
                with suppress(HeadBusy):  # or the operator's next commit would undo it
                    self._stage([self._entries(self.head().commit, [name])[name]])
        except (GitError, OSError) as error:
            return skipped(f"{error}.")
        if self._undated:  # some programs take that for dirty
            with suppress(GitError):
                self.git("update-index", "-q", "--refresh", ok=range(256), limit_s=TREE_LIMIT_S)
            self._undated = False
        return StateCommit("committed" if commit else "clean", commit, None)

    def _unfit(self, path: Path) -> Problem | None:
        """Why there is no file to commit; its deletion is never committed."""
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return Problem("it is missing on disk", "Its deletion is not committed; put it back.")
        if not stat.S_ISREG(mode):
            return Problem("it is not a regular file", "Put the file itself there.")
        return None

    def _hidden(self, path: Path, name: str) -> Problem | None:
        """Why git does not look at a file, so that the operator does not expect a commit of it."""
        import shlex

        def command(words: str) -> str:  # valid in any folder
            return f"git -C {shlex.quote(str(path.parent))} {words} -- {shlex.quote(path.name)}"

        rows = self._index_rows([name])
        for row in rows:
            if row.hidden:
                undo = command(f"update-index --no-{row.hidden}")
                return Problem(f"it is marked {row.hidden}", f"Undo that: `{undo}`.")
        new = not rows and self._entries(self.head().commit, [name])[name].absent
        if new and self._ignored([name]):  # else it is not heeded
            show = command("check-ignore -v")
            return Problem("git ignores it", f"`{show}` names the rule; remove it.")
        return None

    def _ignored(self, paths: Sequence[str], *options: str) -> frozenset[str]:
        """Which paths the ignore rules of the work tree cover."""
        command = ("check-ignore", *options, "-z", "--stdin")
        stdin = _git_paths(f"./{path}" for path in paths)
        magic = {"GIT_LITERAL_PATHSPECS": "0"}  # it refuses them
        said = self._call(command, stdin=stdin, env=magic, ok=(0, 1)).out if paths else b""
        return frozenset(path.removeprefix("./") for path in _git_rows(said))

    # -- salvage and restore -----------------------------------------------------------------------

    def salvage(self, ref: str, parent: str | None, entries: Sequence[Entry], message: str) -> str:
        """Keep a commit on top of `parent` that holds these entries, on a new ref; its id.

        GitError when the ref exists already, or when not all of it is there.
        """
        self._read_back(entries)
        tree = self._graft(parent, entries)
        commit = self._commit_tree(tree, [parent] if parent else [], message)
        self.keep_commit(ref, commit, message)
        if self._line("rev-parse", "--verify", f"{ref}^{{tree}}") != tree:
            raise GitError(f"{ref} does not hold what was to be salvaged; nothing was put back")
        return commit

    def keep_commit(self, ref: str, commit: str, message: str) -> None:
        """Keep a commit on a new ref; GitError when the ref exists already."""
        subject = message.split("\n", 1)[0]
        self.git("update-ref", "--create-reflog", "-m", subject, ref, commit, self._null)

    def restore(self, before: Snapshot, changes: Sequence[Change]) -> None:
        """Put every changed path, with its index entry, back to what `before` recorded.

        `changes` are those from `before.tree` (a tree or a commit) to a later snapshot that is kept
        elsewhere. Folders emptied by it go; nested repositories stay, as nothing else holds their
        content, and so do new files that the restored .gitignore covers. GitError, with nothing
        touched, when a path is no longer as the later snapshot had it; and at the end when the work
        tree does not compare equal.
        """
        files = [c for c in changes if GITLINK_MODE not in (c.before.mode, c.after.mode)]
        # Ignore rules come first: what they cover was hidden before, so it is not the phase's.
        rules = [c for c in files if c.before.path.rpartition("/")[2] == ".gitignore"]
        self._put_back(rules, files)
        new = [c.before.path for c in files if c.before.absent and c not in rules]
        ignored = self._ignored(new, "--no-index")
        files = [c for c in files if c.before.path not in ignored]
        rest = [c for c in files if c not in rules]
        self._put_back(rest, rest)
        rewritten = {c.before.path for c in files if not c.before.absent}
        self._restage(before, [c.before.path for c in changes], rewritten)
        now = self._entries(self._work_tree(), [c.before.path for c in files])
        wrong = [c.before.path for c in files if now[c.before.path] != c.before]
        if wrong:
            raise GitError(
                f"could not be put back as it was: {', '.join(wrong[:5])}. What was there is"
                " salvaged."
            )

    def _put_back(self, changes: Sequence[Change], known: Sequence[Change]) -> None:
        """Let git take changes back in the work tree, if that is as recorded in all of `known`."""
        if not changes:
            return
        with self._private_index(copied=True) as env:
            now = self._record(env)
            self._refuse_if_edited(now, known, env)
            then = self._graft(now, [c.before for c in changes])
            options = ("-m", "-u", "--no-sparse-checkout", "--no-recurse-submodules")
            self.git("read-tree", *options, now, then, env=env, limit_s=TREE_LIMIT_S)

    def _refuse_if_edited(
        self, tree: str, changes: Sequence[Change], env: Mapping[str, str]
    ) -> None:
        """Only what is known to be kept elsewhere may be overwritten; `tree` is what there is now.

        Git itself takes ignored files in the way for expendable.
        """

        def in_the_way(path: str) -> bool:
            """Whether something else than a folder lies there, seen through no symbolic link."""
            place = self.top / path
            folder = place.is_dir() and not place.is_symlink()
            real = os.path.realpath(place.parent) == str(place.parent)
            return real and os.path.lexists(place) and not folder

        now = self._entries(tree, [c.after.path for c in changes])
        edited = [c.after.path for c in changes if now[c.after.path] not in c]
        back = [c.before for c in changes if not c.before.absent and now[c.before.path].absent]
        above = {str(folder) for e in back for folder in Path(e.path).parents} - {"."}
        held = self._entries(tree, above)
        edited += [path for path in sorted(above) if held[path].absent and in_the_way(path)]
        for entry in back:
            place = self.top / entry.path
            if in_the_way(entry.path):
                link = place.is_symlink()
                asked = ("hash-object", *(("--stdin",) if link else ("--", entry.path)))
                target = os.fsencode(os.readlink(place)) if link else b""
                edited += [] if self._line(*asked, stdin=target) == entry.oid else [entry.path]
            elif place.is_dir():
                edited += _git_rows(self.git("ls-files", "-o", "-z", "--", entry.path, env=env))
        if edited:
            raise GitError(
                "changed again since it was recorded, or ignored by git and in the way, so nothing"
                f" was put back: {', '.join(edited[:5])}. Look at it, then start again."
            )

    def restage(self, before: Snapshot, after: Snapshot, *, lost: bool = False) -> None:
        """Give back the staging of every path that is the same in both snapshots.

        An agent's `git add -A` or `git reset` disturbs the index of files it never changed. `lost`:
        only what is staged no more; others, too, may have staged things meanwhile.
        """
        first, last = ({_GitRow.parse(row).path for row in s.staging} for s in (before, after))
        rows = first - last if lost else first | last
        pairs = [(before.tree, after.tree), (before.head.commit, after.head.commit)]
        for old, new in pairs if rows else ():  # what somebody has committed is staged no more
            rows -= {one.after.path for one in self.changes(old, new)} if old and new else set()
        if rows:
            self._restage(before, sorted(rows))

    def _restage(
        self, before: Snapshot, paths: Sequence[str], rewritten: Set[str] = frozenset()
    ) -> None:
        """Put index entries back; a path that had no staging of its own follows HEAD again.

        Those of rewritten files are entered anew in any case: git takes a file for changed, without
        a look into it, if its size is another one now, as with other line ends.
        """
        head = self._entries(self.head().commit, paths)
        recorded: dict[str, list[_GitRow]] = {}
        for row in map(_GitRow.parse, before.staging):
            recorded.setdefault(row.path, []).append(row)
        rows: list[_GitRow] = []
        for path in paths:
            wanted = recorded.get(path) or [_GitRow("H", *head[path][1:], "0", path)]
            present = self._index_rows([path])
            absent = all(row.mode == ABSENT_MODE for row in wanted)
            same = wanted == present and path not in rewritten
            if not same and (present or not absent):
                rows += wanted
        if rows:
            self._write_index(rows)

    # -- refs --------------------------------------------------------------------------------------

    @contextmanager
    def checkout(self, commit: str) -> Iterator[Path]:
        """The project's folder in a temporary work tree of a commit, gone in the end."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
            place = Path(folder, self.top.name)
            self.git("worktree", "add", "-q", "--detach", str(place), commit, limit_s=TREE_LIMIT_S)
            try:
                yield place / self.prefix
            finally:
                self.git("worktree", "remove", "--force", str(place), limit_s=TREE_LIMIT_S)

    def refs(self, prefix: str) -> dict[str, str]:
        """Full name → object id of every ref below `prefix`, which ends in "/"."""
        pattern = prefix.rstrip("/")
        listed = self._line("for-each-ref", "--format=%(refname) %(objectname)", pattern)
        return dict(line.split(" ", 1) for line in listed.splitlines())

    def drop_refs(self, refs: Iterable[str]) -> None:
        """Delete refs, as far as they exist."""
        if commands := "".join(f"delete {ref}\n" for ref in refs):
            self.git("update-ref", "--stdin", stdin=os.fsencode(commands))

    def clean_leftovers(self) -> None:
        """Remove what a killed process left in the git directory (ours by name)."""
        for path in self.git_dir.glob("orchestrator-*"):
            path.unlink(missing_ok=True)

    # -- hooks -------------------------------------------------------------------------------------

    def hook_path(self, name: str) -> Path:
        """Where git looks for a hook: core.hooksPath, or the folder that all work trees share."""
        if not self._hooks_folder:  # without our settings, which switch hooks off
            said = self._call(("rev-parse", *_GIT_HOOKS), settings=False)
            self._hooks_folder = os.fsdecode(said.out).removesuffix("\n")
        return self.top / self._hooks_folder / name

    def run_hooks(
        self,
        entries: Sequence[Entry],
        message: str,
        *,
        own: Iterable[Path] = (),
        theirs: Container[str] = (),
        message_only: bool = False,
        limit_s: float = HOOK_LIMIT_S,
    ) -> HookResult:
        """Let the repository's hooks judge and mend a commit of these entries, as git would.

        They see a private index that holds HEAD, the entries and `own`: files of ours as they are
        on disk, so that nothing of ours looks unstaged. What counts is the index and the message
        that they leave, but for the paths of `own` and `theirs`, the operator's. `message_only` is
        for documents: no pre-commit hook, the entries stay. `limit_s` counts per hook.
        """
        names = HOOK_NAMES[1:] if message_only else HOOK_NAMES
        hooks = [self.hook_path(name) for name in names]
        hooks = [path for path in hooks if path.is_file() and os.access(path, os.X_OK)]
        message = self.signed_off(message)
        if not hooks:
            return HookResult("passed", "", "", list(entries), message)
        head = self.head()
        ours = self.blobs({path: path.read_bytes() for path in own if path.is_file()})
        with self._private_index(copied=True) as env:
            file = Path(f"{env['GIT_INDEX_FILE']}-message")
            file.write_bytes(message.encode(errors="replace"))
            self._show_commit(head, self._news(head, [*entries, *ours]), env)
            name, ended = "", _GitEnded(0, b"", b"")
            for path in hooks:
                name, ended = path.name, self._run_hook(path, file, env, limit_s)
                if ended.status != 0:
                    break
            tree = self._write_tree(env, "--missing-ok")
            message = file.read_text("utf-8", "replace").strip("\n") + "\n"
        kept_out = {entry.path for entry in ours}
        left = [change.after for change in self.changes(head.commit, tree)]
        left = [e for e in left if e.path not in kept_out and e.path not in theirs]
        said = (ended.out + ended.err).decode(errors="replace").strip().splitlines()
        outcome = _GIT_ENDINGS.get(ended.status) or ("files" if name == "pre-commit" else "message")
        if ended.status is None:
            limit = f"within {limit_s:g} s"
            said.append(f"it did not end {'before the stop' if self.hurried() else limit}")
        if outcome == "passed" and not message.strip():
            outcome, said = "message", [*said, "it left an empty message"]
        entries = list(entries) if message_only else left
        return HookResult(outcome, name, "\n".join(said[-40:]), entries, message)

    def _show_commit(self, head: Head, entries: Sequence[Entry], env: Mapping[str, str]) -> None:
        """Let a private copy of the index hold HEAD and the entries, as `git commit` shows them.

        A copy, for its times: else git would have to read every file.
        """
        base = ("--reset", head.commit) if head.commit else ("--empty",)
        self.git("read-tree", *base, env=env)
        rows = [_GitRow("H", e.mode, e.oid, "0", e.path) for e in entries]
        self.git("update-index", "-z", "--index-info", stdin=self._index_info(rows), env=env)
        self.git("update-index", "-q", "--refresh", env=env, ok=(0, 1), limit_s=TREE_LIMIT_S)

    def _run_hook(
        self, path: Path, message: Path, index: Mapping[str, str], limit_s: float
    ) -> _GitEnded:
        import errno

        env = {**_git_environment(), **self.hook_env, **index}
        env |= {"GIT_EDITOR": ":", "GIT_TERMINAL_PROMPT": "0"}
        args = {"prepare-commit-msg": (str(message), "message"), "commit-msg": (str(message),)}
        argv = (str(path), *args.get(path.name, ()))
        try:
            return _git_run_child(argv, self.top, env, limit_s, hurried=self.hurried)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                return _GitEnded(126, b"", f"{path} cannot be run: {error}".encode())
        # A script without a #! line: git, too, lets the shell have it.
        argv = ("/bin/sh", *argv)
        return _git_run_child(argv, self.top, env, limit_s, hurried=self.hurried)

    # -- signatures --------------------------------------------------------------------------------

    def wants_signatures(self) -> bool:
        """Whether commits are to be signed; where nothing else was said, as git is configured."""
        return self._settings.get("commit.gpgsign", False) if self.sign is None else self.sign

    def try_signing(self, *, terminal: bool = False) -> Problem | None:
        """Sign an object that nobody refers to; on a terminal a passphrase may be asked for."""
        try:
            self._commit_tree(self._empty_tree, [], "A trial", "-S", terminal=terminal)
        except GitError as error:
            return Problem(
                f"commits cannot be signed: {error}",
                "Unlock the key, or mend user.signingKey and gpg.format; `git commit --allow-empty"
                " -S` shows whether it works. To do without: commits.sign = false.",
            )
        return None

    def signed_off(self, message: str) -> str:
        """A message with the trailer of who commits, if `signoff` asks for it; only once."""
        body = message.rstrip("\n")
        if not self.signoff:
            return f"{body}\n"
        said = self._call(("var", "GIT_COMMITTER_IDENT"), ok=range(256), env=self._identity)
        name, email = _GIT_IDENTITY["GIT_COMMITTER_NAME"], _GIT_IDENTITY["GIT_COMMITTER_EMAIL"]
        who = f"{name} <{email}>" if said.status else os.fsdecode(said.out).rsplit(" ", 2)[0]
        trailer = f"Signed-off-by: {who}"
        last = body.rpartition("\n\n")[2].split("\n") if "\n\n" in body else [""]
        if trailer in last:
            return f"{body}\n"
        block = all(re.match(r"[A-Za-z0-9-]+: |[ \t]", line) for line in last)
        return f"{body}\n{trailer}\n" if block else f"{body}\n\n{trailer}\n"

    # -- preconditions -----------------------------------------------------------------------------

    def problems(self, backlog: Path) -> list[Problem]:
        """What forbids a run, each with its remedy. Dirtiness is the caller's to judge."""
        found: list[Problem] = []
        head, trouble = None, None
        if self.version < OLDEST_GIT:
            what = f"git {'.'.join(map(str, self.version))} is too old"
            found.append(Problem(what, "Install git 2.34 or newer."))
        if "GIT_INDEX_FILE" in os.environ:
            what = "GIT_INDEX_FILE is set: this looks like the inside of a git hook"
            found.append(Problem(what, "Start it outside of hooks, or `unset GIT_INDEX_FILE`."))
        try:
            head = self.head()
        except GitError as error:
            trouble = error
        locks = [self.git_dir / "index.lock", self.git_dir / "HEAD.lock"]
        locks += [self.common_dir / "packed-refs.lock", self.common_dir / "config.lock"]
        locks += [self.common_dir / f"{head.branch}.lock"] if head and head.branch else []
        with suppress(HeadBusy):
            self._wait_for(locks)
        for lock in locks:
            if lock.exists():
                what = f"another git command holds {lock}, or one that was killed left it"
                remedy = f"Wait for it, or end it; if no git is running: `rm '{lock}'`."
                found.append(Problem(what, remedy))
        try:
            if head is not None:
                found += self.head_problems(head)
                found += self._index_problems(backlog)
                self.git("hash-object", "-w", "--stdin", stdin=b"orchestrator\n")
        except GitError as error:
            trouble = error
        if trouble is not None:
            remedy = f"See `git -C '{self.top}' status` and `git -C '{self.top}' fsck`."
            found.append(Problem(f"git cannot work here: {trouble}", remedy))
        return found

    def head_problems(self, head: Head) -> Iterator[Problem]:
        """What forbids even a commit: an open operation, no branch, a damaged HEAD."""
        operation = self.operation()
        if operation is not None:
            what = f"{'an' if operation.startswith('a') else 'a'} {operation} is in progress"
            undo = "git bisect reset" if operation == "bisect" else f"git {operation} --abort"
            yield Problem(what, f"Finish it, or undo it: `{undo}`.")
        if head.branch is None:
            yield Problem("HEAD is detached", "Switch to a branch: `git switch BRANCH`.")

    def _index_problems(self, backlog: Path) -> Iterator[Problem]:
        unmerged = sorted(path for path, rows in self._all_rows().items() if rows[0][0] == "M")
        if unmerged:
            what = f"there are merge conflicts in {', '.join(unmerged[:5])}"
            yield Problem(what, "Resolve them, then `git add` the files.")
        name = self.relative(backlog)
        if os.path.lexists(backlog):
            obstacle = self._unfit(backlog) or self._hidden(backlog, name)
            if obstacle is not None:
                what = f"{name} could not be committed: {obstacle.what}"
                yield Problem(what, obstacle.remedy)

    def remarks(self, backlog: Path) -> list[str]:
        """What the operator should know, but what forbids nothing. Never raises for git trouble."""
        try:
            return list(self._remarks(self.relative(backlog)))
        except GitError as error:
            return [str(error)]

    def _remarks(self, name: str) -> Iterator[str]:
        if self.version < FSYNC_GIT:
            yield "git is older than 2.36, a power cut may lose the last commits. Update git."
        if self._call(("var", "GIT_COMMITTER_IDENT"), ok=range(256)).status:
            yield (
                "git knows no name and e-mail for you, commits will carry those of orchestrator."
                " Set them: `git config user.name NAME`, `git config user.email ADDRESS`."
            )
        if not self._index_rows([name]) and self._exists(name):
            yield f"{name} is not tracked by git yet; the run's first commit will add it."
        asked = ("filter", "ident", "working-tree-encoding")
        rows = _git_rows(self.git("check-attr", "-z", *asked, "--", name))
        for attribute, value in zip(rows[1::3], rows[2::3], strict=True):
            if value not in ("unspecified", "unset"):
                yield (
                    f"{name} has the attribute {attribute}={value}: what git stores is not what is"
                    " on disk. Take it out of .gitattributes."
                )


def _git_lock_text(lock: Path) -> str:
    return f"{lock} exists: another git command is running, or one that was killed left it"
