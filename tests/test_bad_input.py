"""Bad input gets one clear message that says what, where and what to do; nothing is written.

Tables of malformed configs, backlogs and repository states, each through
the real command line, with the bytes of the whole project and its git folder before and after.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from tests.conftest import in_process
from tests.gitkit import Act, run, table, write
from tests.test_cli import photograph

ITEM = """\
- id: WRK-001
  title: First
  status: ready
  requires_human_review: false
  created: 2026-01-01T00:00:00+00:00
  updated: 2026-01-01T00:00:00+00:00
"""
BACKLOG = f"schema_version: 3\nitems:\n{ITEM}next_item_id: 1\n"
CONFIG = '[agent]\ncli = "demo"\n'


@pytest.fixture
def root(make_repo: Callable[..., Path]) -> Path:
    """A sound project, committed."""
    root = make_repo()
    (root / "BACKLOG.yaml").write_text(BACKLOG)
    (root / "orchestrator.toml").write_text(CONFIG)
    run("git add -A && git commit -q -m 'Set up'")(root)
    return root


# What taking a lock makes: a folder, and files that name whoever had it last.
LOCKS = (".git/orchestrator", *(f".git/orchestrator/{name}.lock" for name in ("run", "tree", "backlog")))


def refused(root: Path, *argv: str, code: int = 1) -> str:
    """Run a command that must refuse and leave everything as it was; its one message."""
    before = photograph(root)
    found, out, err = in_process("--root", str(root), *argv)
    assert found == code, f"{argv} exited {found}, not {code}:\n{out}{err}"
    assert out == ""
    assert err.startswith("orchestrator: ")
    assert "\norchestrator: " not in err
    assert "Traceback" not in err
    after = photograph(root)
    for name in LOCKS:
        before.pop(name, None)
        after.pop(name, None)
    assert after == before
    return err


Refused = Callable[..., str]
READING = (["status"], ["status", "--json"], ["show", "WRK-001"], ["check"], ["run", "--dry-run"])
WRITING = (["add", "x"], ["advance", "WRK-001"], ["unblock", "WRK-001"], ["run"], ["triage"])
ALL = (*READING, *WRITING)


# ---- Backlogs ------------------------------------------------------------------------------------

def with_item(line: str) -> str:
    """The backlog with a line of its item, in place of that of the same key."""
    key = line.strip().partition(":")[0]
    return re.sub(rf"  {key}: .*\n", "", BACKLOG).replace("  title: First\n", f"  title: First\n{line}\n")


TEXTS = "description must be a mapping of texts with the keys context, problem, solution, impact, sizing_rationale, not "
WRONG = {
    "status: blokced": 'BACKLOG.yaml:5: WRK-001: status must be one of new, scoping, ready, in_progress, done, blocked, not "blokced" (did you mean "blocked"?)',
    "size: Small": 'WRK-001: size must be one of small, medium, large, not "Small" (did you mean "small"?)',
    "risk: [low]": 'risk must be one of low, medium, high, not ["low"]',
    "blocked_type: other": 'blocked_type must be one of clarification, decision, not "other"',
    "requires_human_review: 'no'": 'requires_human_review must be true or false, not "no"',
    "guardrail_override: 1": "guardrail_override must be true or false, not 1",
    "priority: high": 'priority must be a whole number, not "high"',
    "attempts: -1": "attempts must be a whole number from 0, not -1",
    "tags: auth": 'tags must be a list of texts, not "auth"; write it as ["auth"]',
    "tags: [a, 1]": 'tags must be a list of texts, not ["a", 1]',
    "dependencies: [null]": "dependencies must be a list of texts, not [null]",
    "phase: 12": "phase must be text, not 12 (in quotes it is text: '12')",
    "description:\n    context: 5\n    problem: x": TEXTS + '{"context": 5, "problem": "…"}',
    "description: in a word": TEXTS + '"in a word"; put the text below it, indented, as \'context: …\'',
}  # fmt: skip
BACKLOGS: dict[str, tuple[str | bytes, str]] = {
    "d63_empty": ("", "BACKLOG.yaml:1:1: "),
    "d63_comments_only": ("# nothing\n\n", "BACKLOG.yaml"),
    "d63_cut_off": (BACKLOG[: BACKLOG.index("created") + 4], "BACKLOG.yaml:7"),
    "not_utf8": (b"schema_version: 3\nitems: []\n# \xff\n", "BACKLOG.yaml:3:3: invalid UTF-8 (byte 0xFF); save the file as UTF-8"),
    "item_no_mapping": ("schema_version: 3\nitems:\n- just text\nnext_item_id: 0\n", "BACKLOG.yaml"),
    **{f"counter_{bad}": (BACKLOG.replace("_id: 1\n", f"_id: {bad}\n"), "next_item_id must be a whole number from 0, not") for bad in ("one", "1.5")},
    "no_title": (BACKLOG.replace("  title: First\n", ""), "title"),
    "title_number": (BACKLOG.replace("First", "12"), "BACKLOG.yaml:4"),
    **{
        f"verify_{bad}": (with_item(f"  verify: {bad}"), "WRK-001: verify must be a list of commands, each on a line of its own such as - [make, test], not ")
        for bad in ("make test", "[make, test]", "\n  - []", "\n  - [make, 5]")
    },
    **{f"w33_{line}": (with_item(f"  {line}"), says) for line, says in WRONG.items()},
    "d45_id_with_slash": (BACKLOG.replace("WRK-001", "../WRK-001"), "BACKLOG.yaml:3"),
    "duplicate_id": (BACKLOG.replace("next_item_id", f"{ITEM}next_item_id"), "WRK-001"),
    "conflict_markers": (f"<<<<<<< ours\n{BACKLOG}=======\n{BACKLOG}>>>>>>> theirs\n", "BACKLOG.yaml:1"),
}


def test_d63_bad_backlogs(root: Path) -> None:
    for n, (name, (content, says)) in enumerate(BACKLOGS.items()):
        (root / "BACKLOG.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        message = refused(root, *(["status"] if n % 4 else ["run", "--allow-dirty"]))
        assert "BACKLOG.yaml" in message, name
        assert says in message, name


def test_every_command_names_line_and_column(root: Path) -> None:
    (root / "BACKLOG.yaml").write_text(BACKLOG.replace("First", "&a First"))
    for argv in ALL:
        assert refused(root, *argv).startswith("orchestrator: BACKLOG.yaml:4:10: ")


NO_FILES: dict[str, tuple[Act, str]] = {
    "missing": (run("rm BACKLOG.yaml"), "there is no such file; "),
    "pipe": (run("rm BACKLOG.yaml && mkfifo BACKLOG.yaml"), "it is not a regular file; move it away"),
    "link": (run("mv BACKLOG.yaml real && ln -s real BACKLOG.yaml"), "it is a symbolic link, which a save would replace; put the file itself there"),
}


@pytest.mark.parametrize(("change", "says"), table(NO_FILES))
def test_a_backlog_that_is_no_file(root: Path, change: Act, says: str) -> None:
    change(root)
    for argv in (["status"], ["add", "x"], ["run", "--allow-dirty"]):
        message = refused(root, *argv)
        assert str(root / "BACKLOG.yaml") in message
        assert says in message


# ---- Configs -------------------------------------------------------------------------------------

def test_every_command_refuses_a_bad_config(root: Path) -> None:
    (root / "orchestrator.toml").write_text("[projekt]\n")
    for argv in (*ALL, ["stop"], ["init"]):
        assert refused(root, *argv) == (
            'orchestrator: orchestrator.toml: validation failed, correct this:\n  - projekt is no known key (did you mean "project"?)\n'
        )


def test_d28_the_config_that_is_named_is_the_one_that_counts(root: Path) -> None:
    (root / "other.toml").write_text("[projekt]\n")
    assert f"{root}/other.toml: validation failed" in refused(root, "--config", f"{root}/other.toml", "run")
    assert "nowhere.toml: there is no such config file" in refused(root, "--config", "nowhere.toml", "status")
    assert f"{root}: cannot be read: Is a directory" in refused(root, "--config", str(root), "run")


# ---- Repository states ---------------------------------------------------------------------------

DIVERGE = (
    "git switch -q -c other && echo theirs > README.md && git commit -q -am Theirs",
    "git switch -q main && echo ours > README.md && git commit -q -am Ours",
)
IGNORE = run("git rm -q --cached BACKLOG.yaml && echo BACKLOG.yaml > .gitignore", "git add .gitignore && git commit -q -m 'Ignore it'")
STATES: dict[str, tuple[Act, tuple[str, ...]]] = {
    "merge": (run(*DIVERGE, "git merge -q other || true"), ("merge is in progress", "git merge --abort")),
    "rebase": (run(*DIVERGE, "git rebase -q other || true"), ("rebase is in progress", "git rebase --abort")),
    "bisect": (run("git bisect start"), ("bisect is in progress", "git bisect reset")),
    "edited": (write("README.md"), ("the work tree has uncommitted changes: README.md", "--allow-dirty")),
    "untracked": (write("new/file with space.txt"), ("uncommitted changes: new/file with space.txt", "--allow-dirty")),
    "staged": (run("echo mine > mine.txt && git add mine.txt"), ("uncommitted changes: mine.txt", "--allow-dirty")),
    "ignored_backlog": (IGNORE, ("BACKLOG.yaml could not be committed", "ignore")),
    "assume_unchanged": (run("git update-index --assume-unchanged BACKLOG.yaml"), ("BACKLOG.yaml could not be committed", "--no-assume-unchanged")),
    "protected": (write("orchestrator.toml", f'{CONFIG}[project]\nprotected_branches = ["main"]\n'), ("branch main is protected", "project.protected_branches")),
    "damaged_index": (write(".git/index", "nonsense"), ("git",)),
    "missing_agent": (write("orchestrator.toml", '[agent]\ncli = "command"\ncommand = ["no-such-agent-xyz"]\n'), ("no-such-agent-xyz", "agent.command")),
    "missing_workflow": (write("orchestrator.toml", f"{CONFIG}[pipelines.feature]\nphases = [{{name = 'a', workflows = ['docs/gone.md']}}]\n"), ("Workflow file not found", "docs/gone.md", "Create it")),
    "damaged_journal": (write(".git/orchestrator/journal", "nonsense\n"), ("line 1 of the run's journal cannot be read", "delete that file and start again")),
    "journal_of_the_future": (write(".git/orchestrator/journal", '{"version": 99, "state": {}}\n'), ("it is not one of this version of the program", "delete that file and start again")),
    "state_folder_is_a_file": (write(".git/orchestrator"), (".git/orchestrator", "File exists")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("prepare", "says"), table(STATES))
def test_a_bad_state_of_the_repository(root: Path, prepare: Act, says: tuple[str, ...]) -> None:
    prepare(root)
    message = refused(root, "run")
    for text in says:
        assert text in message
    before = photograph(root)
    assert orchestrator.main(["--root", str(root), "check"]) == 1
    assert photograph(root) == before


def test_a_work_folder_that_is_a_file(root: Path) -> None:
    (root / ".git" / "info").mkdir(exist_ok=True)
    (root / ".git" / "info" / "exclude").write_text(".orchestrator\n")
    (root / ".orchestrator").write_text("in the way\n")
    assert f"{root}/.orchestrator: File exists" in refused(root, "run")


def test_a_folder_that_is_no_project(root: Path, tmp_path: Path) -> None:
    outside, bare = tmp_path / "outside", tmp_path / "bare.git"
    outside.mkdir()
    for argv in (*ALL, ["stop"], ["init"]):
        assert refused(outside, *argv) == (
            f"orchestrator: {outside} is not in a git repository. Run `git init` there, or name another folder with --root.\n"
        )
    for where in ("nowhere", "README.md", ".git"):
        message = refused(root, "--root", str(root / where), "run")
        assert str(root / where) in message
        assert "--root" in message
    run("git init -q --bare bare.git")(tmp_path)
    assert str(bare) in refused(bare, "init")
