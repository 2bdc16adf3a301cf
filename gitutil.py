"""Every git call of the orchestrator.

Git is used as plumbing, never as `git commit`: a commit is built beside the operator's work
(private index, tree, commit object), checked to hold exactly the paths it should, entered into the
real index path by path, and only then the branch is moved by compare-and-swap. The order "index
entry first, branch second" makes every crash point harmless: the worst that a killed process leaves
is what `git add` of our own file would leave. Hooks, signing, editors, filters of other files and
the operator's staging never come into it.

Starting git costs more than what it is asked to do, so what it keeps in files of a published and
settled format is read and written here: the index (gitformat-index), loose refs and their logs
(gitrepository-layout), trees and commits. Whatever is stored in another way, and everything that
filters, attributes or ignore rules have a say in, is git's to do.

Reading order: data, the index file, objects, starting git, `Repo` (facts, index, snapshots,
commits, state commits, restoring, refs, hooks, preconditions).

Paths inside git are `str` decoded with surrogateescape, '/'-separated, relative to the top of the
work tree. Object ids are lower-case hexadecimal `str`.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, Self

if TYPE_CHECKING:
    import hashlib
    import subprocess

# ==== 1. Data and errors ==========================================================================

OLDEST_GIT = (2, 34)
FSYNC_GIT = (2, 36)  # first with core.fsync

STEP_LIMIT_S = 10.0  # one git process of a commit
COMMIT_LIMIT_S = 30.0  # everything that one commit does, retries included
TREE_LIMIT_S = 300.0  # a process that reads the whole work tree, or all of history
HOOK_LIMIT_S = 120.0  # one hook of the operator
KILL_GRACE_S = 2.0  # TERM to KILL
LOCK_PAUSE_S = 0.05
LOCK_TRIES = 60  # so a lock is waited for 3 s
LOCK_RESPITE_S = 30.0  # after that, it is only tried once for this long
RETRY_DELAYS_S = (0.02, 0.04, 0.08)  # between the four tries to move the branch
ADD_TRIES = 3  # a file that vanishes while the work tree is read makes a try incomplete

PARKED_REF = "refs/orchestrator/backlog"
_PARKED_FOR = "Orchestrator-Branch: "  # the trailer of a parked commit
ABSENT_MODE = "000000"
ABSENT_OID = "0" * 40
GITLINK_MODE = "160000"
SYMLINK_MODE = "120000"
LEFTOVER_PREFIXES = tuple(f"orchestrator-{what}-" for what in ("index", "message", "ref", "swap"))
LARGE_FILE_BYTES = 512 * 1024  # to read and hash more takes longer than to start a git
LOW_SPACE_BYTES = 16 * 1024 * 1024

# Variables by which a surrounding git, or the operator's shell, would send our calls elsewhere:
# `git rev-parse --local-env-vars`, plus those that change dates, pathspecs, diffs or traces.
_GIT_DROPPED_ENV = re.compile(
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
# Identity for a commit where the operator has configured none; the configuration stays as it is.
_GIT_IDENTITY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "orchestrator"), ("EMAIL", "orchestrator@localhost"))
}
_GIT_HEX = re.compile(r"[0-9a-f]+")
_GIT_EMPTY_TREE = {
    40: "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    64: "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
}
_GIT_HELD_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


class GitError(Exception):
    """Git could not do something; `str()` is one line for the operator.

    `command` holds git's arguments (empty when no single command failed), `status` its exit status
    (None: it ran into its time limit or could not be started), `stderr` what it said.
    """

    def __init__(self, stderr: str, command: Sequence[str] = (), status: int | None = None) -> None:
        self.command = tuple(command)
        self.status = status
        self.stderr = stderr
        super().__init__(self._text())

    def _text(self) -> str:
        said = "; ".join(self.stderr.strip().splitlines()[-5:])
        if not self.command:
            return said
        line = " ".join(("git", *self.command))
        shown = line if len(line) <= 100 else line[:99] + "…"
        ending = "failed" if self.status is None else f"exited {self.status}"
        return f"`{shown}` {ending}: {said or '(it said nothing)'}"


class HeadBusy(GitError):
    """The branch may not be moved now; `reason` says why, as a clause for the operator."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Entry(NamedTuple):
    """One path of a tree: mode as git writes it ("100644" …; "000000" = absent) and object id."""

    path: str
    mode: str
    oid: str

    @property
    def absent(self) -> bool:
        return self.mode == ABSENT_MODE


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


class Change(NamedTuple):
    """One path that two trees disagree on."""

    before: Entry
    after: Entry


class FileVersion(NamedTuple):
    """A commit that changed a file; of a merge, one that differs from all its parents."""

    commit: str
    time: str  # RFC 3339, the committer's
    message: str
    before: tuple[str, ...]  # blob ids, one per parent; ABSENT_OID: there was no file
    after: str


class StateCommit(NamedTuple):
    """What `Repo.commit_state` did; `warning` is one complete message on what was left undone."""

    outcome: Literal["clean", "committed", "parked", "skipped"]
    commit: str | None
    warning: str | None


class HookResult(NamedTuple):
    """What the operator's hooks said about a commit."""

    outcome: Literal["ok", "rejected", "timeout"]
    hook: str  # the one that decided; "" when none exists
    output: str  # the tail of what it printed
    changed: bool  # a hook changed files of the commit, in the work tree or in the index it saw

    @property
    def ok(self) -> bool:
        """Whether the entries may be committed just as they were given."""
        return self.outcome == "ok" and not self.changed


class Problem(NamedTuple):
    """Something that keeps a run from starting, and the command or act that mends it."""

    what: str
    remedy: str


class _IndexRow(NamedTuple):
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
    def assume_unchanged(self) -> bool:
        return self.flag.islower()

    @property
    def skip_worktree(self) -> bool:
        return self.flag in "Ss"


# ==== 2. The index file ===========================================================================


def _git_index_rows(data: bytes, id_size: int) -> list[_IndexRow] | None:
    """The entries of an index file, as `ls-files -s -v` lists them.

    `id_size` is the length of an object id in bytes. None for what only git can read: a split or
    sparse index, a version yet to come, damage.
    """
    import struct

    rows: list[_IndexRow] = []
    try:
        magic, version, count = struct.unpack_from(">4sII", data)
        if magic != b"DIRC" or version not in (2, 3, 4):
            return None
        at, path = 12, b""
        for _ in range(count):
            start, more = at + 42 + id_size, 0
            flags = data[start - 2] << 8 | data[start - 1]
            if flags & 0x4000:
                more = data[start] << 8 | data[start + 1]
                start += 2
            kept = b""
            if version == 4:  # the path begins as the one before it does
                dropped, start = _git_offset(data, start)
                kept = path[: len(path) - dropped]
            end = data.index(b"\0", start)
            path = kept + data[start:end]
            rows.append(_git_index_row(data[at + 24 : at + 40 + id_size], flags, more, path))
            at = end + 1 if version == 4 else at + (end - at + 8) // 8 * 8
        while at < len(data) - id_size:
            kind, size = struct.unpack_from(">4sI", data, at)
            if not kind[:1].isupper():  # an extension without which the entries are not all
                return None
            at += 8 + size
    except (struct.error, IndexError, ValueError):
        return None
    return rows if at == len(data) - id_size else None


def _git_offset(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, as packs have it, and where it ends."""
    value = data[at] & 0x7F
    while data[at] & 0x80:
        at += 1
        value = ((value + 1) << 7) | (data[at] & 0x7F)
    return value, at + 1


def _git_index_row(facts: bytes, flags: int, more: int, path: bytes) -> _IndexRow:
    """One entry; `facts` is mode, owner, size and object id, `more` the extended flags."""
    stage = flags >> 12 & 3
    letter = "M" if stage else "S" if more & 0x4000 else "H"
    mode, oid = f"{int.from_bytes(facts[:4]):06o}", facts[16:].hex()
    shown = letter.lower() if flags & 0x8000 else letter
    return _IndexRow(shown, mode, oid, str(stage), os.fsdecode(path))


_GIT_KEPT_EXTENSIONS = (b"TREE", b"REUC")
_GIT_DROPPED_EXTENSIONS = (b"EOIE", b"IEOT")  # tables of where things are; git does without


class _Index(NamedTuple):
    """An index file of version 2, cut into its entries without looking into each."""

    id_size: int
    entries: list[bytes]  # sorted by path
    extensions: list[tuple[bytes, bytes]]  # kind, content

    @classmethod
    def parse(cls, data: bytes, id_size: int) -> Self | None:
        """None for another version, entries that need another file, damage, and no checksum."""
        end = len(data) - id_size
        if data[:8] != b"DIRC\0\0\0\2" or _git_hash(data[:end], id_size).digest() != data[end:]:
            return None
        # An entry ends with the first eight bytes of it that end with NUL, once its path has begun.
        form = rb"(?s).{%d}(?:[^\0].{7})*\0" % ((42 + id_size + 8) // 8 * 8 - 1)
        count = int.from_bytes(data[8:12], "big")
        entries = re.compile(form).findall(data, 12, end)[:count]
        extensions, at = [], 12 + sum(map(len, entries))
        while at < end:
            size = int.from_bytes(data[at + 4 : at + 8], "big")
            extensions.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
            at += 8 + size
        whole = at == end and len(entries) == count
        if not whole or any(not kind[:1].isupper() for kind, _ in extensions):
            return None
        return cls(id_size, entries, extensions)

    def _path(self, entry: bytes) -> bytes:
        return entry[42 + self.id_size :].rstrip(b"\0")

    def _find(self, path: bytes) -> tuple[int, bool]:
        """Where a path is, or would be; and whether it is there."""
        import bisect

        at = bisect.bisect_left(self.entries, path, key=self._path)
        return at, at < len(self.entries) and self._path(self.entries[at]) == path

    def rows(self, path: bytes) -> list[_IndexRow]:
        """The entries of a path: none, one, or up to three of a conflict."""
        at, _ = self._find(path)
        found = itertools.takewhile(lambda e: self._path(e) == path, self.entries[at : at + 3])
        flags = 40 + self.id_size
        return [
            _git_index_row(e[24:flags], int.from_bytes(e[flags : flags + 2], "big"), 0, path)
            for e in found
        ]

    def edited(self, rows: Iterable[_IndexRow]) -> Self | None:
        """With these entries, as `update-index --index-info` makes it; None: that is git's to do.

        It is for flags, conflicts, a file in the place of a folder, and extensions that depend on
        the entries in other ways.
        """
        rows = sorted(rows, key=lambda row: row.mode != ABSENT_MODE)  # removals make room
        known = _GIT_KEPT_EXTENSIONS + _GIT_DROPPED_EXTENSIONS
        folders = {os.fsencode(f"{f}/") for row in rows for f in _git_folders(row.path) if f}
        kept = [
            (kind, _git_forget_trees(data, self.id_size, folders) if kind == b"TREE" else data)
            for kind, data in self.extensions
            if kind in _GIT_KEPT_EXTENSIONS
        ]
        new = self._replace(entries=list(self.entries), extensions=kept)
        plain = all(kind in known for kind, _ in self.extensions)
        return new if plain and all(new._enter(row) for row in rows) else None

    def file(self) -> bytes:
        parts = (kind + len(data).to_bytes(4, "big") + data for kind, data in self.extensions)
        count = len(self.entries).to_bytes(4, "big")
        data = b"".join((b"DIRC\0\0\0\2", count, *self.entries, *parts))
        return data + _git_hash(data, self.id_size).digest()

    def _enter(self, row: _IndexRow) -> bool:
        """Put one entry in its place; whether that is all there is to it."""
        path, flags = os.fsencode(row.path), 40 + self.id_size
        at, known = self._find(path)
        if row.flag != "H" or row.stage != "0" or (known and self.entries[at][flags] & 0xF0):
            return False
        if row.mode == ABSENT_MODE:
            del self.entries[at : at + known]
            return True
        below, _ = self._find(path + b"/")
        blocked = any(self._find(os.fsencode(f))[1] for f in _git_folders(row.path))
        if blocked or any(self._path(e).startswith(path + b"/") for e in self.entries[below:][:1]):
            return False
        facts = bytes(24) + int(row.mode, 8).to_bytes(4, "big") + bytes(12)
        entry = facts + bytes.fromhex(row.oid) + min(len(path), 0xFFF).to_bytes(2, "big") + path
        self.entries[at : at + known] = [entry.ljust((len(entry) + 8) // 8 * 8, b"\0")]
        return True


def _git_forget_trees(data: bytes, id_size: int, folders: Set[bytes]) -> bytes:
    """The extension TREE without the ids of the root and of these folders ("a/b/")."""
    parts, at = [], 0
    above: list[tuple[bytes, int]] = []  # folder, how many of those in it are still to come
    while at < len(data):
        named, line = data.index(b"\0", at), data.index(b"\n", at)
        count, below = map(int, data[named + 1 : line].split())
        end = line + 1 + (id_size if count >= 0 else 0)
        folder = b""
        if above:
            parent, left = above.pop()
            folder = b"%s%s/" % (parent, data[at:named])
            above += [(parent, left - 1)] * (left > 1)
        above += [(folder, below)] * (below > 0)
        forget = not folder or folder in folders
        parts.append(b"%s-1 %d\n" % (data[at : named + 1], below) if forget else data[at:end])
        at = end
    return b"".join(parts)


def _git_hash(data: bytes, id_size: int) -> hashlib._Hash:
    import hashlib

    return (hashlib.sha256 if id_size == 32 else hashlib.sha1)(data)


# ==== 3. Objects ==================================================================================

_Tree = dict[str, tuple[str, str]]  # name → mode as the tree has it ("40000" = folder), object id


class _Objects:
    """The trees and commits of an object store: read and written loose, otherwise by asking git.

    `folder` is "objects" of the repository; `cat_file` answers for `git cat-file` with an option
    and a standard input. Ids are SHA-1, or SHA-256 where they have 32 bytes. With `replaced`, one
    object may stand for another (see `git replace`), and git is asked for all of them.
    """

    KEPT_TREES = 2000  # then the memory is cleared

    def __init__(
        self,
        folder: Path,
        id_size: int,
        cat_file: Callable[[str, bytes], bytes],
        *,
        replaced: bool = False,
    ) -> None:
        self._replaced = replaced
        self._folder = folder
        self._id_size = id_size
        self._cat_file = cat_file
        self._new: dict[str, bytes] = {}  # what `settle` is to store: kind, size and content
        self._trees: dict[str, _Tree] = {}
        self._tree_ids: dict[str, str] = {}

    def tree_id(self, oid: str) -> str:
        """The tree of a commit; a tree is its own. GitError when it cannot be read."""
        if oid not in self._tree_ids:
            kind, data = self._read([oid])[oid]
            line = data.partition(b"\n")[0]
            self._tree_ids[oid] = line[5:].decode() if kind == b"commit" else oid
        return self._tree_ids[oid]

    def parents(self, commit: str) -> list[str]:
        """The ids of a commit's parents."""
        lines = self._read([commit])[commit][1].partition(b"\n\n")[0].split(b"\n")
        return [line[7:].decode() for line in lines if line.startswith(b"parent ")]

    def signatures(self, commit: str) -> list[bytes]:
        """Author and committer of a commit, "NAME <ADDRESS>", without the times."""
        lines = self._read([commit])[commit][1].partition(b"\n\n")[0].split(b"\n")
        signed = [line for line in lines if line.startswith((b"author ", b"committer "))]
        return [line.partition(b" ")[2].rsplit(b" ", 2)[0] for line in signed]

    def content(self, oid: str) -> bytes:
        """What an object holds."""
        return self._read([oid])[oid][1]

    def entries(self, root: str | None, paths: Iterable[str]) -> dict[str, Entry]:
        """What a tree holds at each path; a folder counts as absent. No tree holds nothing."""
        paths = list(paths)
        trees = self._trees_at(root, {folder for path in paths for folder in _git_folders(path)})
        found = {}
        for path in paths:
            folder, _, name = path.rpartition("/")
            found[path] = _git_tree_entry(path, trees.get(folder, {}).get(name))
        return found

    def changes(self, before: str | None, after: str | None) -> list[Change]:
        """The paths that differ between two trees, sorted; a change of kind is two changes."""
        found: list[Change] = []
        pairs = [("", before, after)]
        while pairs:
            trees = self._load({oid for _, *both in pairs for oid in both if oid})
            below = []
            for prefix, *both in pairs:
                old, new = (trees[oid] if oid else {} for oid in both)
                for name in sorted({name for name, _ in old.items() ^ new.items()}):
                    path, was, now = prefix + name, old.get(name), new.get(name)
                    change = Change(_git_tree_entry(path, was), _git_tree_entry(path, now))
                    if change.before != change.after:
                        found.append(change)
                    if _git_is_tree(was) or _git_is_tree(now):
                        below.append((f"{path}/", _git_subtree(was), _git_subtree(now)))
            pairs = below
        return sorted(found)

    def graft(self, root: str | None, entries: Iterable[Entry]) -> str:
        """A tree like `root` (None: the empty one) but for these entries; stored, its id."""
        entries = sorted(entries, key=lambda entry: not entry.absent)  # removals make room
        self._require(e.oid for e in entries if e.mode not in (ABSENT_MODE, GITLINK_MODE))
        folders = {folder for entry in entries for folder in _git_folders(entry.path)} | {""}
        old = self._trees_at(root, folders)
        new = {folder: dict(old.get(folder, {})) for folder in folders}
        for path, mode, oid in entries:
            folder, _, name = path.rpartition("/")
            if mode != ABSENT_MODE:
                new[folder][name] = mode, oid
            elif not _git_is_tree(new[folder].get(name)):
                new[folder].pop(name, None)
        for folder in sorted(folders - {""}, key=_git_depth, reverse=True):
            above, _, name = folder.rpartition("/")
            if new[folder] and new[folder] != old.get(folder):
                new[above][name] = "40000", self._write_tree(new[folder])
            elif not new[folder] and _git_is_tree(new[above].get(name)):
                del new[above][name]
        return root if root and new[""] == old.get("") else self._write_tree(new[""])

    def write(self, kind: bytes, data: bytes) -> str:
        """The id of an object, which is stored before anybody else can come to look for it."""
        content = b"%s %d\0%s" % (kind, len(data), data)
        oid = _git_hash(content, self._id_size).hexdigest()
        place = self._place(oid)
        try:
            # PermissionError: it is of another user of a shared repository. Git replaces it, too.
            with suppress(FileNotFoundError, PermissionError):
                os.utime(place)  # there already; and so that no garbage collection finds it old
                if self._is_stored(oid):
                    return oid
        except OSError as error:
            raise GitError(f"{place} cannot be written: {error.strerror}") from None
        self._new[oid] = content
        return oid

    def settle(self) -> None:
        """Store what was written since the last time as git does: flushed and then renamed.

        All of it is flushed together: the first flush then does most of the work of the others.
        What fails is tried again by the next call: nothing may name what is not stored.
        """
        new, place = dict(self._new), self._folder
        files: list[tuple[Path, Path]] = []
        try:
            for oid, content in new.items():
                place = self._place(oid)
                files.append((self._write_loose(place, content), place))
            for unfinished, _ in files:
                _git_flush(unfinished)
            for unfinished, place in files:
                os.rename(unfinished, place)
        except OSError as error:
            for unfinished, _ in files:
                with suppress(OSError):
                    unfinished.unlink()
            raise GitError(f"{place} cannot be written: {error.strerror}") from None
        for oid in new:
            del self._new[oid]

    def _write_loose(self, place: Path, content: bytes) -> Path:
        import zlib

        allowed = stat.S_IMODE(self._folder.stat().st_mode)  # shows whether others may read
        unfinished = place.with_name(f"tmp_obj_{os.urandom(6).hex()}")  # git gc knows that name
        try:
            unfinished.touch(0o600, exist_ok=False)
        except FileNotFoundError:  # no look ahead: git gc removes a folder once it is empty
            place.parent.mkdir(exist_ok=True)
            place.parent.chmod(allowed)
            unfinished.touch(0o600, exist_ok=False)
        with open(unfinished, "wb") as file:
            file.write(zlib.compress(content, 1))
            os.fchmod(file.fileno(), allowed & 0o444)
        return unfinished

    def _write_tree(self, tree: _Tree) -> str:
        oid = self.write(b"tree", _git_tree_bytes(tree))
        self._trees[oid] = tree
        return oid

    def _trees_at(self, root: str | None, folders: Iterable[str]) -> dict[str, _Tree]:
        """The trees that there are at these folders ("" is the root); given with those above."""
        found = {"": self._load({root})[root]} if root else {}
        deeper = sorted(set(folders) - {""}, key=_git_depth)
        for _, level in itertools.groupby(deeper, key=_git_depth):
            places = {folder: os.path.split(folder) for folder in level}
            rows = {f: found.get(above, {}).get(name) for f, (above, name) in places.items()}
            ids = {folder: oid for folder, row in rows.items() if (oid := _git_subtree(row))}
            trees = self._load(set(ids.values()))
            found |= {folder: trees[oid] for folder, oid in ids.items()}
        return found

    def _load(self, oids: set[str]) -> dict[str, _Tree]:
        """The trees with these ids."""
        if len(self._trees) > self.KEPT_TREES:
            self._trees.clear()
        for oid, (kind, data) in self._read(oids - self._trees.keys()).items():
            if kind != b"tree":
                raise GitError(f"object {oid} is a {kind.decode()}, not a tree. See `git fsck`.")
            self._trees[oid] = _git_parse_tree(data, self._id_size)
        return {oid: self._trees[oid] for oid in oids}

    def _require(self, oids: Iterable[str]) -> None:
        """GitError if one of these objects is missing: what names it would be damaged."""
        packed = [oid for oid in oids if oid not in self._new and not self._is_stored(oid)]
        said = self._cat_file("--batch-check", _git_lines(packed)) if packed else b""
        for line in said.decode().splitlines():
            if line.endswith(" missing"):
                raise self.missing(line.removesuffix(" missing"))

    def _is_stored(self, oid: str) -> bool:
        """Whether an object has a file of its own; a power cut leaves empty ones."""
        try:
            return self._place(oid).stat().st_size > 0
        except OSError:
            return False

    def missing(self, oid: str) -> GitError:
        """What there is to say of an object that cannot be read."""
        place = self._place(oid)
        if place.exists():
            return GitError(
                f"{place} is damaged, as by a power cut. Git stores it anew from your files once it"
                f" is gone: `rm -f {_git_word(str(place))}`, then start again."
            )
        return GitError(f"object {oid} is missing. See `git fsck`.")

    def _place(self, oid: str) -> Path:
        return Path(f"{self._folder}/{oid[:2]}/{oid[2:]}")  # this is asked some 40 times a phase

    def _read(self, oids: Iterable[str]) -> dict[str, tuple[bytes, bytes]]:
        """Kind and content of objects; of those that are packed or borrowed, git tells them."""
        found = {oid: self._read_loose(oid) for oid in oids}
        asked = [oid for oid, content in found.items() if content is None]
        told = self._ask(asked) if asked else {}
        return told | {oid: content for oid, content in found.items() if content is not None}

    def _read_loose(self, oid: str) -> tuple[bytes, bytes] | None:
        import zlib

        if self._replaced and oid not in self._new:
            return None
        try:
            raw = self._new.get(oid) or zlib.decompress(self._place(oid).read_bytes())
        except (OSError, zlib.error):
            return None
        header, _, data = raw.partition(b"\0")
        return header.partition(b" ")[0], data

    def _ask(self, oids: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        output, at, found = self._cat_file("--batch", _git_lines(oids)), 0, {}
        for oid in oids:
            end = output.index(b"\n", at)
            _, kind, *size = output[at:end].split(b" ")
            if not size:
                raise GitError(f"object {oid} is {kind.decode()}. See `git fsck`.")
            at = end + 1 + int(size[0])
            found[oid] = kind, output[end + 1 : at]
            at += 1
        return found


def _git_flush(path: Path) -> None:
    """Flush a file, or the names in a folder; OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _git_lines(words: Iterable[str]) -> bytes:
    return os.fsencode("".join(f"{word}\n" for word in words))


def _git_parse_tree(data: bytes, id_size: int) -> _Tree:
    tree: _Tree = {}
    at = 0
    while at < len(data):
        end = data.index(b"\0", at)
        mode, _, name = data[at:end].partition(b" ")
        at = end + 1 + id_size
        tree[os.fsdecode(name)] = mode.decode(), data[end + 1 : at].hex()
    return tree


def _git_tree_bytes(tree: _Tree) -> bytes:
    """A tree as git stores it: sorted as if the name of a folder ended with a slash."""
    rows = [
        (os.fsencode(f"{name}/" if _git_is_tree((mode, oid)) else name), mode, oid)
        for name, (mode, oid) in tree.items()
    ]
    return b"".join(
        b"%s %s\0%s" % (mode.encode(), path.rstrip(b"/"), bytes.fromhex(oid))
        for path, mode, oid in sorted(rows)
    )


def _git_is_tree(row: tuple[str, str] | None) -> bool:
    return row is not None and row[0] in ("40000", "040000")


def _git_subtree(row: tuple[str, str] | None) -> str | None:
    return row[1] if row is not None and _git_is_tree(row) else None


def _git_tree_entry(path: str, row: tuple[str, str] | None) -> Entry:
    """A row of a tree as an entry; a folder is none."""
    if row is None or _git_is_tree(row):
        return Entry(path, ABSENT_MODE, ABSENT_OID)
    return Entry(path, *row)


def _git_depth(folder: str) -> int:
    return folder.count("/")


def _git_folders(path: str) -> list[str]:
    """The folders above a path, the top of the work tree ("") included."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


# ==== 4. Starting git =============================================================================


class _Ended(NamedTuple):
    """How a child process ended: exit status (None = stopped at its time limit) and output."""

    status: int | None
    out: bytes
    err: bytes


def _git_child(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: bytes, limit_s: float
) -> _Ended:
    """Run a child to its end, in a session of its own; OSError when it cannot be started.

    Standard input and output are files, so a grandchild that keeps them open delays nobody.
    Whatever ends the wait early (the limit, an exception of a signal handler) ends the child in
    order, with TERM first: a killed git leaves its lock files behind.
    """
    import tempfile

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if stdin:
            with tempfile.TemporaryFile() as source:
                source.write(stdin)
                source.seek(0)
                status = _git_start_and_wait(argv, cwd, env, (source, out, err), limit_s)
        else:
            with open(os.devnull, "rb") as nothing:
                status = _git_start_and_wait(argv, cwd, env, (nothing, out, err), limit_s)
        out.seek(0)
        err.seek(0)
        return _Ended(status, out.read(), err.read())


def _git_start_and_wait(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    files: tuple[IO[bytes], IO[bytes], IO[bytes]],
    limit_s: float,
) -> int | None:
    with _git_started(argv, cwd, env, files) as process:
        if _git_wait(process.pid, process.wait, limit_s):
            return process.wait()
        _git_end_group(process.pid, process.wait)
    return None


@contextmanager
def _git_started(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    files: tuple[IO[bytes], IO[bytes] | int, IO[bytes]],
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own, which an exception ends; reaping it is the caller's."""
    import subprocess

    # Between fork and setsid the child is still in our foreground group: a Ctrl-C in that moment
    # would end it. So the terminal's signals wait until it has a session of its own.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _GIT_HELD_SIGNALS)
    process = None
    try:
        try:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=env,
                stdin=files[0],
                stdout=files[1],
                stderr=files[2],
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)  # may raise what a handler raises
        yield process
    except BaseException:
        if process is not None:
            _git_end_group(process.pid, process.wait)
        raise


@contextmanager
def _git_reading(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: bytes, limit_s: float
) -> Iterator[tuple[IO[bytes], Callable[[], _Ended]]]:
    """A child whose output is read while it comes; the function given waits for its end."""
    import subprocess
    import tempfile
    import threading

    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as err:
        source.write(stdin)
        source.seek(0)
        with _git_started(argv, cwd, env, (source, subprocess.PIPE, err)) as process:
            assert process.stdout
            # Whoever reads cannot look at a clock: at the limit the child's end ends the output.
            limit = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGTERM))
            limit.daemon = True

            def end() -> _Ended:
                limit.cancel()
                if not _git_wait(process.pid, process.wait, KILL_GRACE_S):
                    _git_end_group(process.pid, process.wait)
                err.seek(0)
                return _Ended(process.wait(), b"", err.read())

            with process.stdout:
                limit.start()
                try:
                    yield process.stdout, end
                finally:
                    limit.cancel()


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


def _git_end_group(pid: int, wait: Callable[[float | None], int]) -> None:
    """TERM to the child's group, two seconds, KILL to whatever is left of it, reap the child."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGTERM)
    _git_wait(pid, wait, KILL_GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    wait(None)


def _git_environment() -> dict[str, str]:
    """The environment without what would send git to another repository, index or date."""
    return {k: v for k, v in os.environ.items() if not _GIT_DROPPED_ENV.fullmatch(k)}


def _git_rows(output: bytes) -> list[str]:
    """The fields of a NUL-terminated list."""
    return os.fsdecode(output).split("\0")[:-1]


def _git_paths(paths: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(path) + b"\0" for path in paths)


def _git_tail(output: bytes, lines: int = 40) -> str:
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-lines:])


# ==== 5. The repository ===========================================================================


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
        clock: Callable[[], float] = time.monotonic,
        limit_s: float = STEP_LIMIT_S,
    ) -> None:
        """Prefer `Repo.open`. `delay` and `clock` (monotonic, seconds) are there for tests."""
        self.root = self.top = root
        self.git_dir = self.common_dir = root
        self.prefix = ""
        self.version = OLDEST_GIT
        self._delay = delay
        self._clock = clock
        self._limit_s = limit_s
        self._deadline = float("inf")  # of the commit in progress, by `clock`
        self._impatient_until = float("-inf")  # by `clock`; see `_lock_tries`
        self._null = ABSENT_OID  # as long as this repository's object ids
        self.apart: tuple[str, ...] = ()  # paths that snapshots take from the index: not to be read
        self._seen: str | None = None  # the last commit that HEAD was at
        self.taken_up: str | None = None  # the parked commit that the file on disk descends from
        self._file_mode: bool | None = None
        self._index_seen = b"", list[_IndexRow]()  # the index file as last read, and its rows
        self._index_cut: tuple[bytes, _Index | None] = b"", None  # the same, cut into entries
        self._staged_seen: tuple[object, frozenset[str]] = None, frozenset()  # see `_staged`
        self._plain: dict[str, tuple[list[object], bool]] = {}  # see `_is_plain`
        self._signatures: list[bytes] = []  # author and committer, once git has told them
        self._objects = _Objects(root, 20, self._cat_file)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        delay: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        limit_s: float = STEP_LIMIT_S,
    ) -> Self:
        """The repository whose work tree holds the folder `root`.

        Raises GitError, saying what to do, when git is missing or there is no usable work tree.
        """
        repo = cls(Path(os.path.realpath(root)), delay=delay, clock=clock, limit_s=limit_s)
        repo._find()
        return repo

    @classmethod
    def init(cls, root: Path) -> Self:
        """Make a repository of the folder `root`, on branch main."""
        cls(Path(os.path.realpath(root))).git("init", "--quiet", "--initial-branch=main")
        return cls.open(root)

    def _find(self) -> None:
        if not self.root.is_dir():
            raise GitError(f"{self.root} is not a folder. Name an existing one with --root.")
        self.version = self._read_version()
        facts = self._read_facts()
        inside, object_format, *folders = facts
        if inside != "true" or len(folders) != 3:
            raise GitError(
                f"git cannot tell the work tree of {self.root}; is there a line break in its path?"
                " Name the folder of another checkout with --root."
            )
        self.top, self.git_dir, self.common_dir = (Path(os.path.realpath(f)) for f in folders)
        relative = os.path.relpath(self.root, self.top)
        self.prefix = "" if relative == "." else relative + "/"
        self._null = "0" * (64 if object_format == "sha256" else 40)
        replaced = bool(self.refs("refs/replace/"))
        self._objects = _Objects(
            self.common_dir / "objects", self._id_size, self._cat_file, replaced=replaced
        )

    def _read_version(self) -> tuple[int, int]:
        said = self.git("version").decode(errors="replace")
        found = re.search(r"(\d+)\.(\d+)", said)
        if found is None:
            raise GitError(f"`git version` says {said.strip()!r}; is that git? Look at your PATH.")
        return int(found[1]), int(found[2])

    def _read_facts(self) -> list[str]:
        arguments = ("--path-format=absolute", "--show-toplevel", "--git-dir", "--git-common-dir")
        try:
            output = self.git(
                "rev-parse", "--is-inside-work-tree", "--show-object-format", *arguments
            )
        except GitError as error:
            raise GitError(_git_open_advice(self.root, error)) from None
        return os.fsdecode(output).removesuffix("\n").split("\n")

    @property
    def _id_size(self) -> int:
        return len(self._null) // 2

    @property
    def state_dir(self) -> Path:
        """Where locks and journal of this work tree live: out of reach of `git clean -fdx`."""
        return self.git_dir / "orchestrator"

    @property
    def state_dirs(self) -> list[Path]:
        """Those of all work trees of the repository: they share its refs."""
        return [
            folder / "orchestrator"
            for folder in (self.common_dir, *self.common_dir.glob("worktrees/*"))
        ]

    @property
    def parked_ref(self) -> str:
        """The ref for state that may not be committed now; refs are shared by all work trees."""
        if self.git_dir == self.common_dir:
            return PARKED_REF
        return f"{PARKED_REF}-{self.git_dir.name}"

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
        env: Mapping[str, str] | None = None,
        ok: Container[int] = (0,),
        limit_s: float | None = None,
    ) -> _Ended:
        self._objects.settle()
        limit_s = min(limit_s or self._limit_s, self._deadline - self._clock())
        argv, where = self._command(args), self._folder()
        environment = {**_git_environment(), **_GIT_ENV, **(env or {})}
        if limit_s <= 0:
            raise GitError("no time was left for it", args)
        try:
            ended = _git_child(argv, cwd=where, env=environment, stdin=stdin, limit_s=limit_s)
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

    def _command(self, args: Sequence[str]) -> Sequence[str]:
        return ("git", *_GIT_CONFIG, *self._durability(), *args)

    def _folder(self) -> Path:
        return self.top if self.top.is_dir() else self.root

    def _durability(self) -> tuple[str, str]:
        """Git flushes nothing by default: a power cut then leaves HEAD at an empty object."""
        if self.version >= FSYNC_GIT:
            return "-c", "core.fsync=objects,reference,index"
        return "-c", "core.fsyncObjectFiles=true"

    def _line(self, *args: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> str:
        return os.fsdecode(self.git(*args, env=env, stdin=stdin)).removesuffix("\n")

    def _succeeds(self, *args: str) -> bool:
        """Whether a question is answered by exit status 0 rather than 1."""
        return self._call(args, ok=(0, 1)).status == 0

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Bound the total time of all git calls inside."""
        outer = self._deadline
        self._deadline = min(outer, self._clock() + seconds)
        try:
            yield
        finally:
            self._deadline = outer

    # -- facts -------------------------------------------------------------------------------------

    def head(self) -> Head:
        """Branch and commit. GitError when HEAD is damaged."""
        head = self._head_by_files() or self._head_by_git()
        self._seen = head.commit or self._seen
        return head

    def _head_by_files(self) -> Head | None:
        """HEAD where it is a branch in a file of its own, whose commit can be read."""
        place = self.git_dir / "HEAD"
        with suppress(OSError, GitError):
            named = os.fsdecode(place.read_bytes())
            branch = named.removeprefix("ref: ").removesuffix("\n")
            commit = self._loose_ref(branch)
            if commit and branch.startswith("refs/heads/") and not place.is_symlink():
                self._objects.tree_id(commit)
                return Head(branch, commit)
        return None

    def _loose_ref(self, name: str) -> str | None:
        """The id in the file of a ref; None where it has none (packed, another way to store)."""
        try:
            said = os.fsdecode((self.common_dir / name).read_bytes()).removesuffix("\n")
        except OSError:
            return None
        return said if len(said) == len(self._null) and _GIT_HEX.fullmatch(said) else None

    def _head_by_git(self) -> Head:
        # One process, so that both belong together; it fails on an unborn branch.
        both = self._call(
            ("rev-parse", "HEAD^{commit}", "--symbolic-full-name", "HEAD"), ok=range(256)
        )
        if both.status == 0:
            commit, name = os.fsdecode(both.out).split("\n")[:2]
            return Head(name if name != "HEAD" else None, commit)
        branch = self._line("symbolic-ref", "-q", "HEAD")
        if self._succeeds("rev-parse", "-q", "--verify", "HEAD"):
            raise GitError(
                "HEAD points to a commit that cannot be read. See `git fsck` and `git reflog`, then"
                f" set the branch to a good commit: `git update-ref {branch} COMMIT`."
            )
        return Head(branch, None)

    def operation(self) -> str | None:
        """The operation that is open in this work tree ("merge", "rebase", …), if any."""
        here = self.git_dir
        if (here / "rebase-merge").is_dir():
            return "rebase"
        if (here / "rebase-apply").is_dir():
            return "am" if (here / "rebase-apply/applying").exists() else "rebase"
        for name, operation in (
            ("MERGE_HEAD", "merge"),
            ("CHERRY_PICK_HEAD", "cherry-pick"),
            ("REVERT_HEAD", "revert"),
            ("BISECT_LOG", "bisect"),
        ):
            if self._has_state(name):
                return operation
        return self._sequence()

    def _has_state(self, name: str) -> bool:
        if (self.git_dir / name).exists():
            return True
        # With reftable, some of these are refs without a file.
        reftable = (self.common_dir / "reftable").is_dir()
        return reftable and self._succeeds("rev-parse", "-q", "--verify", name)

    def _sequence(self) -> str | None:
        """A cherry-pick or revert of several commits between two of its steps."""
        try:
            todo = (self.git_dir / "sequencer/todo").read_text(errors="replace")
        except OSError:
            return "cherry-pick" if (self.git_dir / "sequencer").is_dir() else None
        return "revert" if todo.startswith("revert") else "cherry-pick"

    def is_ancestor(self, commit: str) -> bool:
        """Whether `commit` is in the history of HEAD. GitError when that is not known."""
        head = self.head().commit
        if head and commit in (head, *self._objects.parents(head)):
            return True
        shallow = (self.common_dir / "shallow").exists()
        answers = (0, 1, 128) if shallow else (0, 1)
        said = self._call(("merge-base", "--is-ancestor", commit, "HEAD"), ok=answers)
        if shallow and said.status:
            raise GitError(
                "this clone is shallow, its history does not reach back so far. Get the rest of it:"
                " `git fetch --unshallow`"
            )
        return said.status == 0

    def commits_between(self, old: str, new: str) -> list[str]:
        """The commits that `new` has and `old` has not, oldest first."""
        return [] if old == new else self._line("rev-list", "--reverse", new, f"^{old}").split()

    def mentions(self, token: str, since: str | None) -> bool:
        """Whether a commit of HEAD's history carries the trailer "Orchestrator-Attempt: token".

        Commits that `since` has already are not looked at, if `since` is in that history.
        """
        if self.head().commit is None:
            return False
        bound: tuple[str, ...] = ()
        with suppress(GitError):  # a commit that is gone bounds nothing
            if since is not None and self.is_ancestor(since):
                bound = (f"^{since}",)
        trailer = f"Orchestrator-Attempt: {token}"
        bodies = self.git(
            *("rev-list", "--format=%B", "--fixed-strings", f"--grep={trailer}", "HEAD", *bound),
            limit_s=TREE_LIMIT_S,
        )
        return trailer.encode() in bodies.splitlines()

    def dirty_paths(self) -> list[str]:
        """Every path that is not as in HEAD, untracked ones too (nested repositories as "x/")."""
        options = ("-z", "--untracked-files=all", "--no-renames", "--ignore-submodules=none")
        rows = _git_rows(self.git("status", "--porcelain=v2", *options, limit_s=TREE_LIMIT_S))
        fields = {"1": 8, "u": 10, "?": 1}  # how many fields precede the path
        return sorted(row.split(" ", fields[row[0]])[-1] for row in rows if row[0] in fields)

    def entry(self, commit: str, path: str) -> Entry | None:
        """The file at a path of a commit (or tree); None when there is none."""
        found = self._entries(commit, [path])[path]
        return None if found.absent else found

    def _entries(self, tree: str | None, paths: Iterable[str]) -> dict[str, Entry]:
        """What a tree (or commit) holds at each path; a folder counts as absent."""
        return self._objects.entries(self._tree(tree), paths)

    def _tree(self, name: str | None) -> str | None:
        """The tree of a commit or tree. None stands for no commit yet."""
        if name is None or (len(name) == len(self._null) and _GIT_HEX.fullmatch(name)):
            return name and self._objects.tree_id(name)
        return self._line("rev-parse", "--verify", f"{name}^{{tree}}")

    def _cat_file(self, option: str, stdin: bytes) -> bytes:
        return self.git("cat-file", option, stdin=stdin, limit_s=TREE_LIMIT_S)

    def read_blob(self, oid: str) -> bytes:
        """The bytes of a blob, as git stores them."""
        return self._objects.content(oid)

    def read_blobs(self, oids: Iterable[str]) -> Iterator[bytes]:
        """The bytes of any number of blobs, one by one, from one process.

        GitError, in its place, for one that is not there.
        """
        wanted = list(oids)
        if not wanted:
            return
        self._objects.settle()
        args = ("cat-file", "--batch")
        stdin = "".join(f"{oid}\n" for oid in wanted).encode()
        environment = {**_git_environment(), **_GIT_ENV, **_GIT_FETCHING}
        with _git_reading(
            self._command(args),
            cwd=self._folder(),
            env=environment,
            stdin=stdin,
            limit_s=TREE_LIMIT_S,
        ) as (output, end):
            for oid in wanted:
                facts = output.readline().split()
                if facts[1:2] != [b"blob"]:
                    why = "" if facts else end().err.decode(errors="replace")
                    raise GitError(why, args) if why else self._objects.missing(oid)
                yield output.read(int(facts[2]) + 1)[:-1]
            end()

    def files_under(self, folder: str) -> list[bytes]:
        """The contents of all files in a folder (with a slash at its end) of HEAD."""
        head = self.head().commit
        if head is None:
            return []
        rows = _git_rows(self.git("ls-tree", "-z", "--full-tree", head, "--", folder))
        facts = [row.partition("\t")[0].split(" ") for row in rows]
        return list(self.read_blobs(oid for _, kind, oid in facts if kind == "blob"))

    def bring_out(self, *starts: str) -> None:
        """Write the files that a sparse checkout leaves out whose path has one of these starts.

        For what is to be read or appended to: a new file would take the place of what git has.
        """
        rows = [row for row in self._index_rows() if row.skip_worktree]
        missing = [r for r in rows if r.path.startswith(starts) and not self._exists(r.path)]
        contents = self.read_blobs(row.oid for row in missing)
        for row, content in zip(missing, contents, strict=True):
            place = self.top / row.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    def file_versions(self, path: str) -> list[FileVersion]:
        """The commits of HEAD's history that changed a file, oldest first, through renames.

        Of a branch that was merged each commit is listed, and the merge itself only where it made
        something of its own.
        """
        if self.head().commit is None:
            return []
        options = ("--follow", "-c", "--date-order", "--no-show-signature", "--no-color")
        form = ("--raw", "-z", "--no-abbrev", "--no-ext-diff", "--format=%H %cI%n%B")
        command = ("log", *options, *form, "HEAD", "--", path)
        output = self.git(*command, env=_GIT_FETCHING, limit_s=TREE_LIMIT_S)
        return list(reversed(list(_git_versions(output))))

    def changes(self, before: str | None, after: str) -> list[Change]:
        """The paths that differ between two trees (or commits), sorted; renames are two changes."""
        return self._objects.changes(self._tree(before), self._tree(after))

    def relative(self, path: Path) -> str:
        """A file's path as git names it. GitError when it lies outside of the work tree."""
        folder = os.path.realpath(path.parent)
        relative = os.path.relpath(os.path.join(folder, path.name), self.top)
        if relative == ".." or relative.startswith("../"):
            raise GitError(f"{path} is outside of the repository {self.top}")
        return relative

    def blob(self, path: Path, data: bytes | None = None) -> Entry:
        """Store a file of the work tree (or `data` in its place) the way `git add` would.

        `path` is absolute. A missing file gives an absent entry.
        """
        name = self.relative(path)
        try:
            facts = path.lstat()
        except FileNotFoundError:
            if data is None:
                return Entry(name, ABSENT_MODE, ABSENT_OID)
            facts = None
        if facts is not None and stat.S_ISLNK(facts.st_mode):
            target = os.fsencode(os.readlink(path))
            oid = self._line("hash-object", "-w", "--stdin", stdin=target)
            return Entry(name, SYMLINK_MODE, oid)
        if facts is not None and not stat.S_ISREG(facts.st_mode):
            raise GitError(f"{path} is neither a file nor a symbolic link")
        return Entry(name, self._mode(name, facts), self._store(name, data))

    def _store(self, name: str, data: bytes | None) -> str:
        if data is None:
            return self._line("hash-object", "-w", "--", name)
        if self._is_plain(name, data):
            return self._objects.write(b"blob", data)
        return self._line("hash-object", "-w", "--stdin", f"--path={name}", stdin=data)

    def _is_plain(self, name: str, data: bytes) -> bool:
        """Whether git stores these bytes of a file as they are.

        Without a carriage return there is no line end to convert, without $Id$ no ident to take
        out; filter and encoding are asked for whenever a file of attributes has changed.
        """
        if b"\r" in data or b"$Id" in data:
            return False
        folders = [self.top / folder for folder in _git_folders(name)]
        files = [folder / ".gitattributes" for folder in folders]
        stamp = [_git_stamp(file) for file in (*files, self.common_dir / "info/attributes")]
        if self._plain.get(name, ([], False))[0] != stamp:
            self._plain[name] = stamp, not self._attributes(name, "filter", "working-tree-encoding")
        return self._plain[name][1]

    def _attributes(self, name: str, *attributes: str) -> dict[str, str]:
        """Those of the attributes that are set for a path."""
        rows = _git_rows(self.git("check-attr", "-z", *attributes, "--", name))
        values = dict(zip(rows[1::3], rows[2::3], strict=True))
        return {key: text for key, text in values.items() if text not in ("unspecified", "unset")}

    def _mode(self, name: str, facts: os.stat_result | None) -> str:
        if self._file_mode is None:
            said = self._call(("config", "--type=bool", "core.fileMode"), ok=(0, 1)).out
            self._file_mode = said.strip() != b"false"
        if facts is not None and self._file_mode:
            return "100755" if facts.st_mode & stat.S_IXUSR else "100644"
        return self._kept_mode(self._entries(self.head().commit, [name])[name])

    def _kept_mode(self, old: Entry) -> str:
        """A file keeps the executable bit that HEAD gives it."""
        return old.mode if old.mode in ("100644", "100755") else "100644"

    # -- the index ---------------------------------------------------------------------------------

    @contextmanager
    def _private_index(self, *, copied: bool = False) -> Iterator[dict[str, str]]:
        """The environment for an index of our own, beside the real one; gone afterwards."""
        path = self.git_dir / f"orchestrator-index-{os.urandom(8).hex()}"
        try:
            if copied:
                self._copy_index(path)
            yield {"GIT_INDEX_FILE": str(path)}
        finally:
            path.unlink(missing_ok=True)
            Path(f"{path}.lock").unlink(missing_ok=True)

    def _copy_index(self, path: Path) -> None:
        import shutil

        # With its times: an entry as young as its index file is one that git reads the file for.
        # A copy that looks younger would hide an edit made in the tick in which it was staged.
        with suppress(FileNotFoundError):
            shutil.copy2(self.git_dir / "index", path)

    def _index_rows(self, paths: Iterable[str] | None = None) -> list[_IndexRow]:
        """The index entries of the paths (None: of all)."""
        data = self._index_data(self.git_dir / "index")
        wanted = None if paths is None else frozenset(paths)
        if data != self._index_seen[0]:
            if wanted is not None and (index := self._cut(data)):
                return [
                    row for path in sorted(map(os.fsencode, wanted)) for row in index.rows(path)
                ]
            self._index_seen = data, self._parse_index(data)
        return [row for row in self._index_seen[1] if wanted is None or row.path in wanted]

    def _index_data(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""

    def _parse_index(self, data: bytes, env: Mapping[str, str] | None = None) -> list[_IndexRow]:
        rows = _git_index_rows(data, self._id_size) if data else []
        if rows is None:
            listed = _git_rows(self.git("ls-files", "-s", "-v", "-z", env=env))
            rows = [_IndexRow.parse(row) for row in listed]
        return rows

    def _cut(self, data: bytes) -> _Index | None:
        if data != self._index_cut[0]:
            self._index_cut = data, _Index.parse(data, self._id_size)
        return self._index_cut[1]

    def _write_index(self, rows: Sequence[_IndexRow]) -> None:
        """Make the real index hold exactly these rows for their paths; nothing else is touched.

        HeadBusy when somebody holds the index lock for too long.
        """
        if self._rewrite_index(rows):
            return
        self._patiently("update-index", "-z", "--index-info", stdin=self._index_info(rows))
        assumed = [row.path for row in rows if row.assume_unchanged]
        skipped = [row.path for row in rows if row.skip_worktree]
        intended = [row.path for row in rows if row.flag == "N" and self._exists(row.path)]
        for command, paths in (
            (("update-index", "--assume-unchanged", "-z", "--stdin"), assumed),
            (("update-index", "--skip-worktree", "-z", "--stdin"), skipped),
            (("add", "-N", "-f", "--pathspec-from-file=-", "--pathspec-file-nul"), intended),
        ):
            if paths:
                self._patiently(*command, stdin=_git_paths(paths))

    def _rewrite_index(self, rows: Iterable[_IndexRow]) -> bool:
        """Write the index file with these entries, if that is plainly done and nobody is at it."""
        place = self.git_dir / "index"
        data = self._index_data(place)
        index = self._cut(data)
        edited = index.edited(rows) if index else None
        if edited is None:
            return False
        self._index_cut = edited.file(), edited
        # With the times it had, see `_copy_index`.
        return self._swap(place, data, self._index_cut[0], keep_times=True)

    def _swap(
        self,
        place: Path,
        old: bytes,
        new: bytes,
        *,
        keep_times: bool = False,
        ahead: Callable[[], None] = lambda: None,
    ) -> bool:
        """Replace a file of git's under git's lock if it still holds `old`; whether it did.

        Flushed. `ahead` is done right before, under the lock. The lock is a second name of a file
        by which `clean_leftovers` knows that it is ours if we are killed.
        """
        self._objects.settle()
        unfinished = self.git_dir / f"orchestrator-swap-{os.urandom(8).hex()}"
        lock = Path(f"{place}.lock")
        try:
            facts = place.lstat()
            if not stat.S_ISREG(facts.st_mode):
                return False
            with open(unfinished, "xb") as file:
                os.fchmod(file.fileno(), stat.S_IMODE(facts.st_mode))
                file.write(new)
                file.flush()
                if keep_times:
                    os.utime(file.fileno(), ns=(facts.st_atime_ns, facts.st_mtime_ns))
                os.fsync(file.fileno())
            os.link(unfinished, lock)
            try:
                if same := place.read_bytes() == old:
                    ahead()
                    os.rename(lock, place)
            except BaseException:
                lock.unlink(missing_ok=True)
                raise
            if not same:
                lock.unlink()
        except OSError:  # it is locked, or no place for such files: git tells
            return False
        finally:
            unfinished.unlink(missing_ok=True)
        return same

    def _exists(self, path: str) -> bool:
        return os.path.lexists(self.top / path)

    def _index_info(self, rows: Iterable[_IndexRow]) -> bytes:
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
        for _ in range(self._lock_tries()):
            try:
                self.git(*args, stdin=stdin)
                return
            except GitError as error:
                if "index.lock" not in error.stderr:
                    raise
            self._delay(LOCK_PAUSE_S)
        raise self._locked_out(self.git_dir / "index.lock")

    def _lock_tries(self) -> int:
        """A lock that was just waited for in vain is not waited for again so soon."""
        return 1 if self._clock() < self._impatient_until else LOCK_TRIES

    def _locked_out(self, lock: Path) -> HeadBusy:
        self._impatient_until = self._clock() + LOCK_RESPITE_S
        return HeadBusy(_git_lock_text(lock))

    # -- snapshots ---------------------------------------------------------------------------------

    def snapshot(self, ref: str | None = None) -> Snapshot:
        """Store the whole work tree (but for ignored files and `apart`) as a tree; touches nothing.

        With `ref`, a commit of it is kept there, so that no garbage collection takes it. GitError
        when a file cannot be read: a snapshot without it would look like its deletion.
        """
        head = self.head()
        rows = self._index_rows()
        staging = [str(row) for row in self._staging(head, rows)]
        taken = Snapshot(self._work_tree(head, rows), head, staging)
        if ref is not None:
            self._keep(ref, taken)
        return taken

    def _work_tree(self, head: Head, rows: Sequence[_IndexRow]) -> str:
        """The tree of the work tree, given the entries of the real index.

        It is HEAD's, but for what is staged or what `git add -A` would stage.
        """
        with self._private_index(copied=True) as env:
            self._show_hidden(rows, env)
            self._add_everything(env)
            found = self._parse_index(self._index_data(Path(env["GIT_INDEX_FILE"])), env)
        new = {row.path: Entry(row.path, row.mode, row.oid) for row in found}
        old = {row.path: Entry(row.path, row.mode, row.oid) for row in rows}
        paths = {path for path, _ in new.items() ^ old.items()} | self._staged(head)
        absent = Entry("", ABSENT_MODE, ABSENT_OID)
        entries = [new.get(path, absent._replace(path=path)) for path in paths]
        return self._objects.graft(self._tree(head.commit), entries)

    def _present(self, paths: Iterable[str]) -> dict[str, Entry]:
        """What the work tree holds at each path."""
        return self._entries(self._work_tree(self.head(), self._index_rows()), paths)

    def _show_hidden(self, rows: Sequence[_IndexRow], env: Mapping[str, str]) -> None:
        """Let git look at files that the operator told it not to look at.

        A skip-worktree entry without a file is what a sparse checkout leaves out: no deletion.
        """
        assumed = [row.path for row in rows if row.assume_unchanged]
        skipped = [row.path for row in rows if row.skip_worktree and self._exists(row.path)]
        for option, paths in (("--no-assume-unchanged", assumed), ("--no-skip-worktree", skipped)):
            if paths:
                self.git("update-index", option, "-z", "--stdin", stdin=_git_paths(paths), env=env)

    def _add_everything(self, env: Mapping[str, str]) -> None:
        # A split index would leave a new shared part behind in the git directory; and no power cut
        # leaves anybody who would read this one.
        settings = ("-c", "core.splitIndex=false", "-c", "core.fsync=objects")
        apart = (f":(exclude,top,literal){path}" for path in self.apart)
        add = (*settings, "add", "-A", "--sparse", "--ignore-errors", "--", ".", *apart)
        with_magic = {**env, "GIT_LITERAL_PATHSPECS": "0"}
        missed: list[str] = []
        fatal: GitError | None = None
        for _ in range(ADD_TRIES):
            try:
                if self._call(add, env=with_magic, ok=(0, 1), limit_s=TREE_LIMIT_S).status == 0:
                    return
            except GitError as error:
                if error.status != 128:
                    raise
                fatal = error  # a file that vanishes while git looks at it is fatal for git
                continue
            missed = self._missed(env)
            if not missed:
                return
        raise fatal or GitError(
            f"cannot be read, so nothing could be recorded: {', '.join(missed[:5])}."
            " Make it readable, remove it, or list it in .gitignore."
        )

    def _missed(self, env: Mapping[str, str]) -> list[str]:
        """What `git add` could not take; a nested repository without a commit may stay out."""
        options = ("-z", "--others", "--modified", "--exclude-standard")
        listed = _git_rows(self.git("ls-files", *options, env=env, limit_s=TREE_LIMIT_S))
        return [  # "x/" is a repository
            path for path in listed if not path.endswith("/") and path not in self.apart
        ]

    def _staging(self, head: Head, rows: Sequence[_IndexRow]) -> list[_IndexRow]:
        """The entries that say more than HEAD does, see `Snapshot.staging`."""
        staged = firm = self._staged(head)
        if any(row.path in staged and row.oid == self._empty_blob for row in rows):
            # An intent-to-add entry looks like an empty file, unless one asks for the difference.
            firm = self._differing(head, "--ita-invisible-in-index")
        kept = [
            row._replace(flag="N") if row.path in staged - firm else row
            for row in rows
            if row.path in staged or self._is_hidden(row)
        ]
        deleted = sorted(staged - {row.path for row in rows})
        return kept + [_IndexRow("H", ABSENT_MODE, self._null, "0", path) for path in deleted]

    def _staged(self, head: Head) -> frozenset[str]:
        """The paths in which the index differs from HEAD."""
        state = self._index_data(self.git_dir / "index"), head.commit
        if state != self._staged_seen[0]:
            self._staged_seen = state, self._differing(head)
        return self._staged_seen[1]

    def _differing(self, head: Head, *options: str) -> frozenset[str]:
        form = ("--raw", "-z", "--no-renames", "--no-abbrev", "--ignore-submodules=none")
        against = ("diff-index", "--cached", *form, *options, head.commit or self._empty_tree)
        return frozenset(_git_rows(self.git(*against))[1::2])

    def _is_hidden(self, row: _IndexRow) -> bool:
        """Whether an entry carries a flag that the operator set (not one of a sparse checkout)."""
        if row.skip_worktree:
            return self._exists(row.path)
        return row.assume_unchanged

    @property
    def _empty_tree(self) -> str:
        return _GIT_EMPTY_TREE[len(self._null)]

    @property
    def _empty_blob(self) -> str:
        return _git_hash(b"blob 0\0", self._id_size).hexdigest()

    def _keep(self, ref: str, taken: Snapshot) -> None:
        """Put a snapshot on a ref; a second parent holds what was staged, as in a stash.

        Where HEAD holds all of it, that will do.
        """
        if taken.head.commit and not taken.staging and taken.tree == self._tree(taken.head.commit):
            self._create_ref(ref, taken.head.commit)
            return
        parents = [taken.head.commit] if taken.head.commit else []
        staged = [_IndexRow.parse(row) for row in taken.staging]
        if staged and all(row.stage == "0" for row in staged):
            firm = [Entry(row.path, row.mode, row.oid) for row in staged if row.flag != "N"]
            tree = self._objects.graft(self._tree(taken.head.commit), firm)
            parents.append(self._commit_tree(tree, parents, "Staged before the phase"))
        commit = self._commit_tree(taken.tree, parents, "Work tree before the phase")
        self._create_ref(ref, commit)

    # -- commits -----------------------------------------------------------------------------------

    def commit(
        self, entries: Sequence[Entry], message: str, *, expect_branch: str | None = None
    ) -> str | None:
        """Commit exactly these paths, as given, on the current branch; the commit's id.

        Entries that HEAD holds already and new nested repositories are left out; None when nothing
        is left. A mode of "" keeps the executable bit that HEAD gives the path. Index entries of
        other paths, the work tree and hooks do not come into it. HeadBusy when the branch may not
        be moved: an open operation, a detached HEAD, a branch other than `expect_branch` (full
        ref), a lock that stays held, an unmerged path, or somebody who keeps moving the branch.
        """
        with self._within(COMMIT_LIMIT_S):
            for pause in (*RETRY_DELAYS_S, None):
                head = self.head()
                wanted = self._news(head, entries)
                if not wanted:
                    return None
                self._refuse_to_move(head, expect_branch)
                commit = self._try_commit(head, wanted, message)
                if commit is not None:
                    return commit
                if pause is not None:
                    self._delay(pause)
        raise HeadBusy("somebody else keeps moving the branch")

    def _try_commit(self, head: Head, wanted: Sequence[Entry], message: str) -> str | None:
        """One try; None when HEAD moved meanwhile. The order of the steps is what makes it safe."""
        parents = [head.commit] if head.commit else []
        commit = self._build(head, wanted, message, parents)
        index, staged = self._index_seen, self._staged_seen
        self._await_ref_locks(head)
        if self.head() != head:
            return None
        self._stage(wanted)
        if not self._move_branch(head, commit, message):
            return None
        self._stage(wanted)  # a git that read the index before us may have written it back since
        self._note_times(wanted)
        if staged[0] == (index[0], head.commit):
            self._still_staged(index[1], staged[1], commit, {entry.path for entry in wanted})
        self._make_durable(str(head.branch))
        return commit

    def _still_staged(
        self, rows: Sequence[_IndexRow], staged: frozenset[str], commit: str, paths: Set[str]
    ) -> None:
        """Conclude what is staged now, if a commit and the index have changed in these paths only.

        `rows` and `staged` are the index and what was staged before that.
        """
        now = self._index_rows()
        if {row.path for row in set(rows) ^ set(now)} <= paths:
            self._staged_seen = (self._index_seen[0], commit), staged - paths

    def _news(self, head: Head, entries: Sequence[Entry]) -> list[Entry]:
        """The entries that would change HEAD."""
        old = self._entries(head.commit, [entry.path for entry in entries])
        news = []
        for entry in entries:
            was = old[entry.path]
            entry = entry._replace(mode=entry.mode or self._kept_mode(was))
            nested = entry.mode == GITLINK_MODE and was.mode != GITLINK_MODE
            same = entry.absent if was.absent else entry == was
            if not nested and not same:
                news.append(entry)
        return news

    def _refuse_to_move(self, head: Head, expect_branch: str | None) -> None:
        operation = self.operation()
        if operation is not None:
            raise HeadBusy(_git_open_operation(operation))
        if head.branch is None:
            raise HeadBusy("HEAD is detached")
        if expect_branch is not None and head.branch != expect_branch:
            raise HeadBusy(
                f"HEAD is on {_git_branch_name(head.branch)} now, the run began on"
                f" {_git_branch_name(expect_branch)}"
            )
        if head.commit is None and self._seen is not None:
            name = _git_branch_name(head.branch)
            raise HeadBusy(f"the branch {name} was deleted (it was at {self._seen[:10]})")

    def _build(
        self, head: Head, entries: Sequence[Entry], message: str, parents: Sequence[str]
    ) -> str:
        """The commit object: HEAD with these entries; checked to differ in nothing else."""
        tree = self._objects.graft(self._tree(head.commit), entries)
        commit = self._commit_tree(tree, parents, message)
        made = [change.after for change in self.changes(head.commit, commit)]
        if sorted(made) != sorted(_git_normal(entry) for entry in entries):
            raise GitError(
                f"the commit {commit[:10]} would not hold what it should, so the branch was left"
                f" alone: it changes {', '.join(entry.path for entry in made[:5])}"
            )
        return commit

    def _commit_tree(self, tree: str, parents: Sequence[str], message: str) -> str:
        text = (message.rstrip("\n") + "\n").encode(errors="replace")
        if not self._signatures:
            commit = self._commit_tree_by_git(tree, parents, text)
            self._signatures = self._objects.signatures(commit)
            return commit
        when = _git_now()
        author, committer = self._signatures
        lines = [f"tree {tree}", *(f"parent {parent}" for parent in parents)]
        signed = b"author %s %s\ncommitter %s %s\n\n%s" % (author, when, committer, when, text)
        return self._objects.write(b"commit", _git_lines(lines) + signed)

    def _commit_tree_by_git(self, tree: str, parents: Sequence[str], text: bytes) -> str:
        """The first commit is made by git, which knows whom it is by."""
        options = [option for parent in parents for option in ("-p", parent)]
        command = ("commit-tree", tree, *options, "-F", "-")
        try:
            return self._line(*command, stdin=text)
        except GitError as error:
            if not re.search(r"ident|auto-detect|tell me who you are", error.stderr):
                raise
        return self._line(*command, stdin=text, env=_GIT_IDENTITY)

    def _stage(self, entries: Sequence[Entry]) -> None:
        """Enter the entries into the real index, where it does not hold them yet."""
        present = self._index_rows([entry.path for entry in entries])
        unmerged = sorted({row.path for row in present if row.stage != "0"})
        if unmerged:
            raise HeadBusy(f"{', '.join(unmerged[:5])} has merge conflicts")
        have = {row.path: row for row in present}
        rows = []
        for entry in entries:
            old = have.get(entry.path)
            if old is None and entry.absent:
                continue
            if old is None or old[1:3] != entry[1:]:
                flag = old.flag if old else "H"
                rows.append(_IndexRow(flag, entry.mode, entry.oid, "0", entry.path))
        if rows:
            self._write_index(rows)

    def _note_times(self, entries: Sequence[Entry]) -> None:
        """Let the index know the times of large files: git reads again what it has no times of."""
        places = [(entry.path, self.top / entry.path) for entry in entries]
        large = [
            path
            for path, file in places
            if path not in self.apart and _git_size(file) > LARGE_FILE_BYTES
        ]
        if large:
            with suppress(GitError):  # it only saves time
                self.git("add", "--refresh", "--", *large)

    def _await_ref_locks(self, head: Head) -> None:
        """Wait for a git that is about to move HEAD; before the index is touched."""
        locks = [self.git_dir / "HEAD.lock", self.common_dir / f"{head.branch}.lock"]
        for _ in range(self._lock_tries()):
            if not any(lock.exists() for lock in locks):
                return
            self._delay(LOCK_PAUSE_S)
        held = next((lock for lock in locks if lock.exists()), None)
        if held is not None:
            raise self._locked_out(held)

    def _move_branch(self, head: Head, commit: str, message: str) -> bool:
        """Compare-and-swap of the branch (by name: the operator may switch meanwhile)."""
        subject = message.split("\n", 1)[0]
        note = f"commit: {subject}" if head.commit else f"commit (initial): {subject}"
        if self._move_by_files(head, commit, note):
            return True
        command = ("update-ref", "-m", note, str(head.branch), commit)
        try:
            self.git(*command, head.commit or self._null)
        except GitError as error:
            if error.status is None or not re.search(r"cannot lock ref", error.stderr):
                raise
            return False  # moved meanwhile, or locked: looked at again by the next try
        return True

    def _move_by_files(self, head: Head, commit: str, note: str) -> bool:
        """Do so where the branch has a file of its own, and logs; False: git is to try."""
        place = self.common_dir / str(head.branch)
        logs = {place: self.common_dir / "logs" / str(head.branch)}
        logs[self.git_dir / "HEAD"] = self.git_dir / "logs/HEAD"
        if not self._signatures or not all(map(Path.is_file, logs.values())):
            return False
        old, new = _git_lines([str(head.commit)]), _git_lines([commit])
        said = re.sub(rb"[ \t\r\n]+", b" ", os.fsencode(note)).strip()
        facts = b"%s %s %s %s" % (old[:-1], new[:-1], self._signatures[1], _git_now())
        here = {old, b"ref: %s\n" % os.fsencode(str(head.branch))}

        def log() -> None:
            for named, file in logs.items():
                if named.read_bytes() in here:  # HEAD may be on another branch by now
                    _git_append(file, b"%s\t%s\n" % (facts, said))

        return self._swap(place, old, new, ahead=log)

    def _make_durable(self, ref: str) -> None:
        """Flush the folder of a ref, so that its renaming survives a power cut."""
        with suppress(OSError):  # a packed ref or another ref backend has no such folder
            _git_flush((self.common_dir / ref).parent)

    # -- state commits -----------------------------------------------------------------------------

    def commit_state(
        self, path: Path, data: bytes, message: str, *, expect_branch: str | None = None
    ) -> StateCommit:
        """Commit one file of ours, holding `data`, alone, if that differs from HEAD.

        Never raises for git trouble. Where the branch may not be moved, and for a file that is
        ignored or hidden by assume-unchanged or skip-worktree, the commit is parked on
        `parked_ref`, see `_park`. A file that is missing or no regular file is skipped.
        """
        try:
            with self._within(COMMIT_LIMIT_S + STEP_LIMIT_S):
                return self._commit_state(path, data, message, expect_branch)
        except (GitError, OSError) as error:
            return _git_skipped(
                path,
                f"{error}. It is safe on disk; mend that, and the next run commits it, or do it"
                f" yourself: {_git_by_hand(path, message)}",
            )

    def _commit_state(
        self, path: Path, data: bytes, message: str, expect_branch: str | None
    ) -> StateCommit:
        name = self.relative(path)
        unfit = self._unfit(path)
        if unfit is not None:
            return _git_skipped(path, f"{unfit.what}. {unfit.remedy}")
        rows = self._index_rows([name])
        entry = Entry(name, "", self._store(name, data))
        try:
            self._refuse_hidden(path, entry, rows)
            commit = self.commit([entry], message, expect_branch=expect_branch)
        except HeadBusy as busy:
            return self._park(path, entry, message, busy.reason, expect_branch)
        if commit is None:
            self._repair(name, rows)
        outcome: Literal["clean", "committed"] = "clean" if commit is None else "committed"
        return StateCommit(outcome, commit, self._forget_parked(entry))

    def _unfit(self, path: Path) -> Problem | None:
        """Why there is no file to commit; its deletion is never committed."""
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return Problem("it is missing on disk", "Its deletion is not committed; put it back.")
        if not stat.S_ISREG(mode):
            return Problem("it is not a regular file", "Put the file itself there.")
        return None

    def _hidden(self, path: Path, name: str, rows: Sequence[_IndexRow]) -> Problem | None:
        """Why git does not look at a file, so that the operator does not expect a commit of it."""
        flags = {row.flag for row in rows}
        if flags & set("hms"):
            undo = _git_command("update-index --no-assume-unchanged", path)
            return Problem("it is marked assume-unchanged", f"Undo that: `{undo}`.")
        if "S" in flags:
            undo = _git_command("update-index --no-skip-worktree", path)
            return Problem("it is marked skip-worktree", f"Undo that: `{undo}`.")
        if not rows and self._is_ignored(name):
            show = _git_command("check-ignore -v", path)
            return Problem("git ignores it", f"`{show}` names the rule; remove it.")
        return None

    def _refuse_hidden(self, path: Path, entry: Entry, rows: Sequence[_IndexRow]) -> None:
        hidden = self._hidden(path, entry.path, rows)
        if hidden is not None and self._news(self.head(), [entry]):
            raise HeadBusy(hidden.what)

    def _is_ignored(self, name: str) -> bool:
        """Whether git would refuse to add a path; one that HEAD has is not ignored."""
        command = ("check-ignore", "-q", "--", f"./{name}")
        ignored = self._call(command, env={"GIT_LITERAL_PATHSPECS": "0"}, ok=(0, 1)).status == 0
        return ignored and self._entries(self.head().commit, [name])[name].absent

    def _repair(self, name: str, rows: Sequence[_IndexRow]) -> None:
        """The file is as in HEAD: let its index entry say so, or the next commit undoes it."""
        if any(row.stage != "0" for row in rows) or self.operation() is not None:
            return
        committed = self._entries(self.head().commit, [name])[name]
        with suppress(HeadBusy):
            self._stage([committed])

    def _park(
        self, path: Path, entry: Entry, message: str, reason: str, branch: str | None
    ) -> StateCommit:
        """Keep a state commit on a ref of ours: no garbage collection takes it.

        Its first parent is HEAD, a trailer names the branch that it is for. A state that was parked
        before is replaced if the file descends from it (see `taken_up`), and stays if it holds the
        same for the same branch; otherwise (nobody has taken it up yet) it becomes the second
        parent, and `unpark` brings it back.
        """
        head = self.head()
        head = head._replace(commit=head.commit or self._seen)  # a deleted branch comes back
        old = self._entries(head.commit, [entry.path])[entry.path]
        entry = entry._replace(mode=self._kept_mode(old))
        branch = branch or head.branch
        earlier = self._ref(self.parked_ref)
        if (
            earlier is None
            or self._entries(earlier, [entry.path])[entry.path] != entry
            or self._is_for_another(earlier, branch)
        ):
            trailer = f"\n\n{_PARKED_FOR}{branch}" if branch and branch.isprintable() else ""
            earlier = self._park_commit(head, entry, message + trailer, earlier)
        fetch = _git_command(f"checkout {self.parked_ref}", path)
        warning = (
            f"{path.name} is saved on disk but not committed on your branch: {reason}. The commit"
            f" waits on {self.parked_ref} ({earlier[:10]}). Once that is over, the next run takes"
            f" it up, or do it yourself: `{fetch} && {_git_command('commit', path, message)}`"
        )
        return StateCommit("parked", earlier, warning)

    def _park_commit(self, head: Head, entry: Entry, message: str, earlier: str | None) -> str:
        parents = [head.commit or self._nothing_yet()]
        if earlier is not None and earlier != self.taken_up:
            parents.append(earlier)
        commit = self._build(head, [entry], message, parents)
        self._set_ref(self.parked_ref, commit, earlier or self._null, message.partition("\n")[0])
        self.taken_up = commit
        return commit

    def _nothing_yet(self) -> str:
        """A commit of no files, so that a parked one always has a first parent."""
        return self._commit_tree(self._objects.graft(None, []), [], "No commit yet")

    def _forget_parked(self, entry: Entry) -> str | None:
        """HEAD holds the newest state: drop a parked one that it holds or that we have outrun.

        The commit is made, so trouble is only a warning: a later commit tidies up.
        """
        try:
            parked = self._ref(self.parked_ref)
            if parked is None:
                return None
            held = self._entries(parked, [entry.path])[entry.path].oid == entry.oid
            held = held and not self._is_for_another(parked, self.head().branch)
            if held or parked == self.taken_up:
                self.unpark(parked)
        except GitError as error:
            return f"{self.parked_ref} is of no use any more, but could not be deleted: {error}"
        return None

    def parked(self, path: Path | None = None) -> tuple[str, bytes, bytes] | None:
        """The parked state: commit, the file in it, the file in its parent (b"" when it has none).

        With `path`, only a parked state of that file counts.
        """
        commit = self._ref(self.parked_ref)
        if commit is None:
            return None
        change = self.changes(f"{commit}^1", commit)[0]
        if path is not None and self.relative(path) != change.after.path:
            return None
        before = b"" if change.before.absent else self.read_blob(change.before.oid)
        return commit, self.read_blob(change.after.oid), before

    def parked_for(self, commit: str) -> str | None:
        """The branch that a parked state is for, a full ref; None where that is not known."""
        lines = os.fsdecode(self._objects.content(commit)).splitlines()
        named = [line for line in lines if line.startswith(_PARKED_FOR)]
        return named[-1].removeprefix(_PARKED_FOR) if named else None

    def _is_for_another(self, parked: str, branch: str | None) -> bool:
        return branch is not None and self.parked_for(parked) not in (None, branch)

    def unpark(self, commit: str) -> None:
        """Drop a parked state, if it still is the one; an earlier one comes to light again."""
        earlier = self._ref(f"{commit}^2")
        if earlier is None:
            self.git("update-ref", "-d", self.parked_ref, commit)
        else:
            self.git("update-ref", self.parked_ref, earlier, commit)

    # -- salvage and restore -----------------------------------------------------------------------

    def salvage(self, ref: str, snapshot: Snapshot, message: str) -> str:
        """Keep a snapshot as a commit on a new ref, and read it back; the commit's id.

        GitError when the ref exists already, or when what differs from HEAD is not all there: git
        may have taken for stored what a power cut has damaged.
        """
        changes = self.changes(snapshot.head.commit, snapshot.tree)
        kept = [c.after.oid for c in changes if c.after.mode not in (ABSENT_MODE, GITLINK_MODE)]
        for _ in self.read_blobs(kept):
            pass
        parents = [snapshot.head.commit] if snapshot.head.commit else []
        commit = self._commit_tree(snapshot.tree, parents, message)
        self._set_ref(ref, commit, self._null, message)
        if self._line("rev-parse", "--verify", f"{ref}^{{tree}}") != snapshot.tree:
            raise GitError(f"{ref} does not hold what was to be salvaged; nothing was put back")
        return commit

    def keep_commit(self, ref: str, commit: str, message: str) -> None:
        """Keep a commit on a new ref; GitError when the ref exists already."""
        self._set_ref(ref, commit, self._null, message)

    def restore(self, before: Snapshot, changes: Sequence[Change]) -> None:
        """Put every changed path, with its index entry, back to what `before` recorded.

        `changes` are those from `before.tree` (a tree or a commit) to a later snapshot that is kept
        elsewhere. Folders emptied by it go; nested repositories stay, as nothing else holds their
        content, and so do new files that the restored .gitignore covers. GitError, with nothing
        touched, when a path is no longer as the later snapshot had it; and at the end when the work
        tree does not compare equal.
        """
        files = [c for c in changes if GITLINK_MODE not in (c.before.mode, c.after.mode)]
        self._refuse_if_edited(files)
        with self._private_index() as env:
            self.git("read-tree", before.tree, env=env)
            old = [c.before for c in files if not c.before.absent]
            new = [c.before.path for c in files if c.before.absent]
            folders = {str(folder) for entry in old for folder in Path(entry.path).parents}
            self._remove([path for path in new if path in folders])
            new = [path for path in new if path not in folders]
            # Ignore rules come first: what they cover was hidden before, so it is not the phase's.
            self._check_out([entry for entry in old if _git_is_rules(entry.path)], env)
            self._remove([path for path in new if _git_is_rules(path)])
            ignored = self._matching_ignore_rules(new)
            self._remove([path for path in new if path not in ignored])
            self._check_out(old, env)
        self._restage(before, [c.before.path for c in changes], {entry.path for entry in old})
        self._verify_restored([c for c in files if c.before.path not in ignored])

    def _refuse_if_edited(self, changes: Sequence[Change]) -> None:
        """Only what is known to be kept elsewhere may be overwritten."""
        now = self._present(change.after.path for change in changes)
        edited = [
            c.after.path
            for c in changes
            if now[c.after.path] not in (_git_normal(c.after), _git_normal(c.before))
            or (now[c.after.path].absent and self._is_unknown_file(c.before))
        ]
        if edited:
            raise GitError(
                f"changed again since it was recorded, so nothing was put back:"
                f" {', '.join(edited[:5])}. Look at it, then start again."
            )

    def _is_unknown_file(self, before: Entry) -> bool:
        """Whether an ignored file lies where a file of another content is to be put back."""
        path = self.top / before.path
        if before.absent or not os.path.lexists(path) or _git_is_folder(path):
            return False
        if os.path.realpath(path.parent) != str(path.parent):
            return False  # seen through a symbolic link in the place of a folder
        return self.blob(path) != before

    def _check_out(self, entries: Sequence[Entry], env: Mapping[str, str]) -> None:
        """Write files of a private index into the work tree, over what is there."""
        for entry in entries:
            self._clear_way(entry.path)
        if entries:
            paths = _git_paths(entry.path for entry in entries)
            command = ("checkout-index", "-f", "-z", "--stdin")
            self.git(*command, stdin=paths, env=env, limit_s=TREE_LIMIT_S)

    def _clear_way(self, path: str) -> None:
        """Remove an empty folder where a file is to be; GitError where something unknown lies."""
        place = self.top / path
        if _git_is_folder(place):
            for folder, _, _ in os.walk(place, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)
            if place.exists():
                raise GitError(f"{path}/ holds files that git ignores; move them away, then go on")
        for parent in Path(path).parents[:-1]:
            above = self.top / parent
            if os.path.lexists(above) and not _git_is_folder(above):
                raise GitError(f"{parent} is in the way of {path}; move it away, then go on")

    def _remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            place = self.top / path
            place.unlink(missing_ok=True)
            for folder in place.parents:
                if folder in (self.top, self.root):
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break  # not empty

    def _matching_ignore_rules(self, paths: Sequence[str]) -> frozenset[str]:
        """Which paths the ignore rules of the work tree cover, whether tracked or not."""
        if not paths:
            return frozenset()
        output = self._call(
            ("check-ignore", "--no-index", "-z", "--stdin"),
            stdin=_git_paths(f"./{path}" for path in paths),
            env={"GIT_LITERAL_PATHSPECS": "0"},
            ok=(0, 1),
        ).out
        return frozenset(path.removeprefix("./") for path in _git_rows(output))

    def _verify_restored(self, changes: Sequence[Change]) -> None:
        now = self._present(change.before.path for change in changes)
        wrong = [c.before.path for c in changes if now[c.before.path] != _git_normal(c.before)]
        if wrong:
            raise GitError(
                f"could not be put back as it was: {', '.join(wrong[:5])}. What was there is"
                " salvaged."
            )

    def restage(self, before: Snapshot, after: Snapshot) -> None:
        """Give back the staging of every path that is the same in both snapshots.

        An agent's `git add -A` or `git reset` disturbs the index of files it never changed.
        """
        changed = {change.after.path for change in self.changes(before.tree, after.tree)}
        rows = {_IndexRow.parse(row).path for row in (*before.staging, *after.staging)}
        self._restage(before, sorted(rows - changed))

    def _restage(
        self, before: Snapshot, paths: Sequence[str], rewritten: Set[str] = frozenset()
    ) -> None:
        """Put index entries back; a path that had no staging of its own follows HEAD again.

        Those of rewritten files are entered anew in any case: git takes a file for changed, without
        a look into it, if its size is another one now, as with other line ends.
        """
        head = self._entries(self.head().commit, paths)
        recorded: dict[str, list[_IndexRow]] = {}
        for row in map(_IndexRow.parse, before.staging):
            recorded.setdefault(row.path, []).append(row)
        present: dict[str, list[_IndexRow]] = {}
        for row in self._index_rows(paths):
            present.setdefault(row.path, []).append(row)
        rows: list[_IndexRow] = []
        for path in paths:
            wanted = recorded.get(path) or [_IndexRow("H", *head[path][1:], "0", path)]
            absent = all(row.mode == ABSENT_MODE for row in wanted)
            same = wanted == present.get(path, []) and path not in rewritten
            if not same and not (absent and path not in present):
                rows += wanted
        if rows:
            self._write_index(rows)

    def clean_leftovers(self) -> None:
        """Remove what a killed process left in the git directory (ours by name)."""
        for prefix in LEFTOVER_PREFIXES:
            for path in self.git_dir.glob(f"{prefix}*"):
                with suppress(OSError):
                    for lock in self._locks_of_ours() if path.stat().st_nlink > 1 else ():
                        if lock.samefile(path):  # see `_swap`
                            lock.unlink()
                path.unlink(missing_ok=True)

    def _locks_of_ours(self) -> list[Path]:
        """The locks that may be one of `_swap`; HEAD may be on another branch by now."""
        index = self.git_dir / "index.lock"
        branches = (self.common_dir / "refs/heads").rglob("*.lock")
        return [lock for lock in (index, *branches) if lock.is_file()]

    # -- refs --------------------------------------------------------------------------------------

    def _ref(self, name: str) -> str | None:
        """The commit that a name stands for, if it does."""
        if name.startswith("refs/") and self._has_no_refs(name):
            return None
        said = self._call(("rev-parse", "-q", "--verify", f"{name}^{{commit}}"), ok=(0, 1))
        return said.out.decode().strip() or None

    def _create_ref(self, ref: str, commit: str) -> None:
        """Make a ref whose name is new; a file like those beside it, if there are any."""
        self._objects.settle()
        unfinished = self.git_dir / f"orchestrator-ref-{os.urandom(8).hex()}"
        place = self.common_dir / ref
        try:
            allowed = place.parent.stat().st_mode & 0o666  # git fails at a ref it may not read
            with open(unfinished, "xb") as file:
                os.fchmod(file.fileno(), allowed)
                file.write(_git_lines([commit]))
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, place)
        except OSError:  # no such folder: it is the first, or refs are kept in another way
            unfinished.unlink(missing_ok=True)
            self.git("update-ref", ref, commit)

    def _set_ref(self, ref: str, new: str, old: str, message: str) -> None:
        """Move a ref of ours from `old`, and flush it."""
        subject = message.split("\n", 1)[0]
        self.git("update-ref", "--create-reflog", "-m", subject, ref, new, old)
        self._make_durable(ref)

    def refs(self, prefix: str) -> dict[str, str]:
        """Full name → object id of every ref whose name starts with `prefix`."""
        pattern = prefix.rstrip("/") if prefix.endswith("/") else os.path.dirname(prefix)
        if self._has_no_refs(pattern):
            return {}
        listed = self._line("for-each-ref", "--format=%(objectname) %(refname)", pattern)
        pairs = (line.split(" ", 1) for line in listed.splitlines())
        return {name: oid for oid, name in pairs if name.startswith(prefix)}

    def _has_no_refs(self, name: str) -> bool:
        """Whether surely no ref has this name, or one below it."""
        if (self.common_dir / "reftable").is_dir() or (self.common_dir / name).exists():
            return False
        try:
            packed = (self.common_dir / "packed-refs").read_bytes()
        except FileNotFoundError:
            return True
        return b" %s" % os.fsencode(name) not in packed

    def drop_refs(self, refs: Iterable[str]) -> None:
        """Delete refs, as far as they exist."""
        if commands := _git_lines(f"delete {ref}" for ref in refs):
            self.git("update-ref", "--stdin", stdin=commands)

    # -- hooks -------------------------------------------------------------------------------------

    def run_hooks(
        self, entries: Sequence[Entry], message: str, *, limit_s: float = HOOK_LIMIT_S
    ) -> HookResult:
        """Let the operator's pre-commit and commit-msg hooks judge a commit of these entries.

        They see a private index that holds HEAD and the entries; what they do to it, or to the
        message, is not taken over, but files that they mend in the work tree are there to stay
        (see `HookResult.changed`). `limit_s` counts per hook.
        """
        hooks = self._hooks("pre-commit", "commit-msg")
        if not hooks:
            return HookResult("ok", "", "", False)
        with self._private_index() as env, self._message_file(message) as file:
            tree = self._fill(env, entries)
            verdict = HookResult("ok", "", "", False)
            for name, path in hooks.items():
                args = (str(file),) if name == "commit-msg" else ()
                verdict = _git_verdict(name, self._run_hook((str(path), *args), env, limit_s))
                if verdict.outcome != "ok":
                    break
            return verdict._replace(changed=self._hook_changed(tree, entries, env))

    def _hooks(self, *names: str) -> dict[str, Path]:
        """Those of the operator's hooks that are executable."""
        folder = self._hooks_folder()
        hooks = {name: folder / name for name in names}
        return {n: path for n, path in hooks.items() if path.is_file() and os.access(path, os.X_OK)}

    def hook_path(self, name: str) -> Path:
        """Where git looks for a hook: core.hooksPath, or the folder that all work trees share."""
        return self._hooks_folder() / name

    def _hooks_folder(self) -> Path:
        return self.top / self._asked("rev-parse", "--git-path", "hooks")

    def hooks_setting(self) -> tuple[str, str] | None:
        """Scope ("global", "local" …) and value of core.hooksPath, if it is set."""
        said = self._asked("config", "--show-scope", "--get", "core.hooksPath", ok=(0, 1))
        scope, _, value = said.partition("\t")
        return (scope, value) if said else None

    def _asked(self, *args: str, ok: Container[int] = (0,)) -> str:
        """What git says without our own settings, for they switch hooks off."""
        env = {**_git_environment(), **_GIT_ENV}
        said = _git_child(("git", *args), cwd=self.top, env=env, stdin=b"", limit_s=self._limit_s)
        if said.status not in ok:
            raise GitError(said.err.decode(errors="replace"), args, said.status)
        return os.fsdecode(said.out).removesuffix("\n")

    def _fill(self, env: Mapping[str, str], entries: Sequence[Entry]) -> str:
        """Make a private index hold HEAD and the entries, as `git commit` shows it to hooks."""
        head = self.head()
        rows = [_IndexRow("H", e.mode, e.oid, "0", e.path) for e in self._news(head, entries)]
        self.git("read-tree", head.commit or "--empty", env=env)
        self.git("update-index", "-z", "--index-info", stdin=self._index_info(rows), env=env)
        self.git("update-index", "-q", "--refresh", env=env, ok=(0, 1), limit_s=TREE_LIMIT_S)
        return self._line("write-tree", env=env)

    @contextmanager
    def _message_file(self, message: str) -> Iterator[Path]:
        path = self.git_dir / f"orchestrator-message-{os.urandom(8).hex()}"
        try:
            path.write_text(message.rstrip("\n") + "\n", encoding="utf-8", errors="replace")
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _run_hook(self, argv: Sequence[str], index: Mapping[str, str], limit_s: float) -> _Ended:
        import errno

        env = {**_git_environment(), **index, "GIT_EDITOR": ":", "GIT_TERMINAL_PROMPT": "0"}
        try:
            return _git_child(argv, cwd=self.top, env=env, stdin=b"", limit_s=limit_s)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                return _Ended(126, b"", f"{argv[0]} cannot be run: {error}".encode())
        # A script without a #! line: git, too, lets the shell have it.
        return _git_child(("/bin/sh", *argv), cwd=self.top, env=env, stdin=b"", limit_s=limit_s)

    def _hook_changed(self, tree: str, entries: Sequence[Entry], env: Mapping[str, str]) -> bool:
        paths = {entry.path for entry in entries}
        staged = self._line("write-tree", env=env)
        kept = [entry.path for entry in entries if entry.mode != GITLINK_MODE]
        update = ("update-index", "--add", "--remove", "-z", "--stdin")
        self.git(*update, stdin=_git_paths(kept), env=env, limit_s=TREE_LIMIT_S)
        found = self._line("write-tree", env=env)
        changed = (*self.changes(tree, staged), *self.changes(tree, found))
        return any(change.after.path in paths for change in changed)

    # -- preconditions -----------------------------------------------------------------------------

    def problems(self, backlog: Path) -> list[Problem]:
        """What forbids a run, each with its remedy. Dirtiness is the caller's to judge."""
        found = [*self._program_problems(), *self._lock_problems()]
        try:
            found += self.head_problems()
            found += self._index_problems(backlog)
            self._objects.write(b"blob", b"orchestrator\n")
            self._objects.settle()
        except GitError as error:
            remedy = f"See `git -C '{self.top}' status` and `git -C '{self.top}' fsck`."
            found.append(Problem(f"git cannot work here: {error}", remedy))
        return found

    def _program_problems(self) -> Iterator[Problem]:
        if self.version < OLDEST_GIT:
            yield Problem(
                f"git {'.'.join(map(str, self.version))} is too old", "Install git 2.34 or newer."
            )
        if "GIT_INDEX_FILE" in os.environ:
            yield Problem(
                "GIT_INDEX_FILE is set: this looks like the inside of a git hook",
                "Start it outside of hooks, or `unset GIT_INDEX_FILE`.",
            )

    def _lock_problems(self) -> Iterator[Problem]:
        """Locks that stay; one that a working git holds for a moment is waited for."""
        locks = self._locks()
        for _ in range(LOCK_TRIES):
            if not any(lock.exists() for lock in locks):
                return
            self._delay(LOCK_PAUSE_S)
        for lock in locks:
            if lock.exists():
                yield Problem(
                    f"another git command holds {lock}, or one that was killed left it",
                    f"Wait for it, or end it; if no git is running: `rm '{lock}'`.",
                )

    def _locks(self) -> list[Path]:
        locks = [self.git_dir / "index.lock", self.git_dir / "HEAD.lock"]
        locks += [self.common_dir / "packed-refs.lock", self.common_dir / "config.lock"]
        with suppress(GitError):
            branch = self.head().branch
            locks += [self.common_dir / f"{branch}.lock"] if branch else []
        return locks

    def head_problems(self) -> Iterator[Problem]:
        """What forbids even a commit: an open operation, no branch, a damaged HEAD."""
        operation = self.operation()
        if operation is not None:
            undo = "git bisect reset" if operation == "bisect" else f"git {operation} --abort"
            yield Problem(_git_open_operation(operation), f"Finish it, or undo it: `{undo}`.")
        head = self.head()
        if head.branch is None:
            yield Problem("HEAD is detached", "Switch to a branch: `git switch BRANCH`.")
        if head.commit is not None:
            self._entries(head.commit, ())  # that is: its tree can be read

    def _index_problems(self, backlog: Path) -> Iterator[Problem]:
        rows = self._index_rows()
        unmerged = sorted({row.path for row in rows if row.stage != "0"})
        if unmerged:
            yield Problem(
                f"there are merge conflicts in {', '.join(unmerged[:5])}",
                "Resolve them, then `git add` the files.",
            )
        name = self.relative(backlog)
        mine = [row for row in rows if row.path == name and row.stage == "0"]
        if os.path.lexists(backlog):
            obstacle = self._unfit(backlog) or self._hidden(backlog, name, mine)
            if obstacle is not None:
                what = f"{name} could not be committed: {obstacle.what}"
                yield Problem(what, obstacle.remedy)

    def remarks(self, backlog: Path) -> list[str]:
        """What the operator should know, but what forbids nothing. Never raises for git trouble."""
        try:
            return [*self._setting_remarks(), *self._file_remarks(self.relative(backlog))]
        except GitError as error:
            return [str(error)]

    def _setting_remarks(self) -> Iterator[str]:
        import shutil

        if self.version < FSYNC_GIT:
            yield "git is older than 2.36, a power cut may lose the last commits. Update git."
        for name in ("GIT_DIR", "GIT_WORK_TREE"):
            if name in os.environ:
                yield f"{name} is set and is not heeded. `unset {name}` if that surprises you."
        if self.head().commit is None:
            yield "the branch has no commit yet; the first one will be made by the run."
        if (self.git_dir / "SQUASH_MSG").exists():
            yield "a squashed merge waits for its commit and is left so. `git commit` ends it."
        if not self._has_identity():
            yield (
                "git knows no name and e-mail for you, commits will carry those of orchestrator."
                " Set them: `git config user.name NAME`, `git config user.email ADDRESS`."
            )
        if shutil.disk_usage(self.common_dir).free < LOW_SPACE_BYTES:
            yield f"less than 16 MiB are free for {self.common_dir}. Make room."

    def _has_identity(self) -> bool:
        return self._call(("var", "GIT_COMMITTER_IDENT"), ok=range(256)).status == 0

    def _file_remarks(self, name: str) -> Iterator[str]:
        if not self._index_rows([name]) and os.path.lexists(self.top / name):
            yield f"{name} is not tracked by git yet; the run's first commit will add it."
        found = self._attributes(name, "filter", "ident", "working-tree-encoding")
        for attribute, value in found.items():
            yield (
                f"{name} has the attribute {attribute}={value}: what git stores is not what is"
                " on disk. Take it out of .gitattributes."
            )


def _git_open_advice(root: Path, error: GitError) -> str:
    """What keeps git from working in a folder, and what to do."""
    if "dubious ownership" in error.stderr:
        return (
            f"{root} belongs to another user, so git refuses to work there. If you trust it:"
            f" `git config --global --add safe.directory '{root}'`."
        )
    if "must be run in a work tree" in error.stderr:
        return (
            f"{root} is no work tree but a bare repository or a .git folder. Name the folder of a"
            " checkout with --root."
        )
    if "not a git repository" in error.stderr:
        return (
            f"{root} is not in a git repository. Run `git init` there, or name another folder with"
            " --root."
        )
    return error.stderr.strip() or str(error)


def _git_versions(output: bytes) -> Iterator[FileVersion]:
    """Read `git log --raw -z`: a message, then `:modes ids status`, a path (renamed: two)."""
    fields = iter(output.decode(errors="replace").split("\0"))
    head = ""
    for field in fields:
        facts = field.lstrip("\n")
        if not facts.startswith(":"):
            head = facts or head
            continue
        parents = len(facts) - len(facts.lstrip(":"))
        words = facts[parents:].split(" ")
        modes, oids, kind = words[: parents + 1], words[parents + 1 : -1], words[-1]
        next(fields)
        if kind[0] in "RC" and parents == 1:
            next(fields)
        *before, after = (
            oid if mode.startswith("100") else ABSENT_OID
            for mode, oid in zip(modes, oids, strict=True)
        )
        first, _, message = head.partition("\n")
        commit, _, when = first.partition(" ")
        yield FileVersion(commit, when, message, tuple(before), after)


def _git_normal(entry: Entry) -> Entry:
    """An absent entry has the same null id in every repository, so entries compare by value."""
    return entry._replace(oid=ABSENT_OID) if entry.absent else entry


def _git_branch_name(ref: str) -> str:
    return ref.removeprefix("refs/heads/")


def _git_open_operation(operation: str) -> str:
    return f"{'an' if operation.startswith('a') else 'a'} {operation} is in progress"


def _git_lock_text(lock: Path) -> str:
    return f"{lock} exists: another git command is running, or one that was killed left it"


def _git_skipped(path: Path, why: str) -> StateCommit:
    return StateCommit("skipped", None, f"{path.name} was not committed: {why}")


def _git_command(command: str, path: Path, message: str | None = None) -> str:
    """A git command for the operator to paste, about one file, valid in any folder."""
    subject = f" -m {_git_word(message.splitlines()[0])}" if message else ""
    folder, name = _git_word(str(path.parent)), _git_word(path.name)
    return f"git -C {folder} {command}{subject} -- {name}"


def _git_word(text: str) -> str:
    """A word of a shell command; one with control characters is written as $'…'."""
    import shlex

    if text.isprintable():
        return shlex.quote(text)
    escaped = (f"\\{char}" if char in "\\'" else char for char in text)
    return "$'" + "".join(map(_git_printable, escaped)) + "'"


def _git_printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(text))


def _git_by_hand(path: Path, message: str) -> str:
    return f"`{_git_command('add', path)} && {_git_command('commit', path, message)}`"


def _git_now() -> bytes:
    """The time as git notes it: seconds and zone."""
    return f"{int(time.time())} {time.strftime('%z')}".encode()


def _git_append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def _git_stamp(path: Path) -> object:
    """What changes whenever a file does; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _git_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _git_is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _git_is_rules(path: str) -> bool:
    return os.path.basename(path) == ".gitignore"


def _git_verdict(hook: str, ended: _Ended) -> HookResult:
    outcome: Literal["ok", "rejected", "timeout"] = "ok" if ended.status == 0 else "rejected"
    if ended.status is None:
        outcome = "timeout"
    return HookResult(outcome, hook, _git_tail(ended.out + ended.err), changed=False)
