"""Every command through the real command line: what it prints, writes, commits and exits with.

In-process (`orchestrator.main`) wherever no behaviour of a process is at stake.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from tests.conftest import Cli
from tests.gitkit import git

COMMANDS = tuple(orchestrator.COMMANDS)


def photograph(root: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything below a folder, but for git's object store."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.startswith(".git/objects"):
            continue
        mode = path.lstat().st_mode
        if path.is_symlink():
            content = os.readlink(path).encode()
        else:
            content = path.read_bytes() if path.is_file() else b""
        found[name] = (mode, content)
    return found


WORKS = {"sh": "echo $ORCHESTRATOR_ITEM_ID >> code.txt"}  # a step that changes code


@pytest.fixture
def bare(make_repo: Callable[..., Path]) -> Path:
    """A repository that the tool has never seen."""
    return make_repo("bare")


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").out.startswith(f"orchestrator {orchestrator.__version__} (three modules)")
    assert cli().out == cli("--help").out
    summaries = re.findall(r"^    (\w+)\s+\w", cli("--help").out, re.M)
    assert {*COMMANDS} <= {*summaries}
    for command in ("", "add", "run", "hook"):
        done = cli(*filter(None, [command, "--help"]))
        assert done.out.startswith(f"usage: {f'python3 orchestrator.py {command}'.strip()} ")
        assert done.err == ""
        assert "--root DIR" in done.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["retry"], "orchestrator: retry: there is no such command; `unblock ID` lets a blocked item go on, `run` tries again what failed. `orchestrator --help` shows what there is."),
        (["list"], "orchestrator: list: there is no such command; `status` lists the items. `orchestrator --help` shows what there is."),
        (["stauts"], 'orchestrator: stauts: there is no such command (did you mean "status"?). `orchestrator --help` shows what there is.'),
        (["xyzzy"], "orchestrator: xyzzy: there is no such command. `orchestrator --help` shows what there is."),
        (["stauts", "run"], 'orchestrator: stauts: there is no such command (did you mean "status"?). `orchestrator --help` shows what there is.'),
        (["run", "--tagret", "X"], "orchestrator: unrecognized arguments: --tagret X. `orchestrator --help` shows what there is."),
        (["add"], "orchestrator add: the following arguments are required: title. `orchestrator add --help` shows what there is."),
        (["run", "--cap", "-1"], 'orchestrator run: argument --cap: must be a whole number from 0 to 4294967295, not "-1". `orchestrator run --help` shows what there is.'),
        (["run", "--cap", "9" * 5000], f'orchestrator run: argument --cap: must be a whole number from 0 to 4294967295, not "{"9" * 78}…. `orchestrator run --help` shows what there is.'),
        (["add", "x", "--priority", "high"], 'orchestrator add: argument --priority: must be a whole number, not "high". `orchestrator add --help` shows what there is.'),
        (["add", "x", "--size", "huge"], 'orchestrator add: argument --size: must be one of small, medium, large, not "huge". `orchestrator add --help` shows what there is.'),
        (["add", "x", "--risk", ""], 'orchestrator add: argument --risk: must be one of low, medium, high, not "". `orchestrator add --help` shows what there is.'),
        *(
            (["add", "x", "--tag", tag], f'orchestrator add: argument --tag: must be one line, not blank, without a comma, not {json.dumps(tag)}. `orchestrator add --help` shows what there is.')
            for tag in ("a,b", " ", "")
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(cli: Cli, argv: list[str], says: str) -> None:
    done = cli(*argv, code=2)
    assert (done.out, done.err) == ("", says.replace("`orchestrator ", f"`{orchestrator.SCRIPT} ") + "\n")


@pytest.mark.slow
def test_messages_call_the_program_as_it_was_started(bare: Path, program: Path) -> None:
    """From a folder of tools, from a folder below, and with options: every command works as printed."""
    tools = bare / "tools"
    tools.mkdir()
    run = lambda *argv, cwd=bare: subprocess.run(argv, cwd=cwd, capture_output=True, text=True)  # noqa: E731
    run(sys.executable, str(program), "vendor", "tools")
    run("python3", "tools/orchestrator.py", "init", "--agent", "demo")
    add = run("python3", "tools/orchestrator.py", "add", "Fix", "the", "login bug")
    assert add.stdout == "Added WRK-001: Fix the login bug\n"
    (bare / "below").mkdir()
    for cwd, argv in ((bare, ["tools/orchestrator.py"]), (bare / "below", ["../tools/orchestrator.py", "--root", ".."])):
        run("python3", *argv, "close", "WRK-001", "--reason", "no", cwd=cwd)
        said = run("python3", *argv, "unblock", "WRK-001", cwd=cwd)
        command = said.stderr.partition("what became of it: ")[2].strip()
        assert command == " ".join(["python3", *argv, "log", "WRK-001"])
        assert run("sh", "-c", command, cwd=cwd).returncode == 0


def with_stdout(project: Any, stdout: Any, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its standard output somewhere else."""
    words = [sys.executable, "-m", project.program.stem, "--root", str(project.root), *argv]
    env = {**os.environ, "PYTHONPATH": str(project.program.parent)}
    done = subprocess.run(words, cwd=project.outside, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.slow
def test_a_closed_pipe_gives_no_traceback_and_hides_no_exit_code(project: Any) -> None:
    project.script({"*": [{"result": {"result": "blocked"}}]})
    project.backlog(*(f"WRK-{n:03} {'ready' if n == 1 else 'blocked'}" for n in range(1, 1200)))  # more than a pipe holds
    project.commit_all()
    reading, writing = os.pipe()
    os.close(reading)
    for argv in (["status"], ["--help"]):
        done = with_stdout(project, writing, *argv)
        assert (done.returncode, done.stderr) == (0, "")
    assert with_stdout(project, writing, "run", "--json").returncode == 3
    os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_error(project: Any) -> None:
    with open("/dev/full", "w") as full:
        done = with_stdout(project, full, "status")
    assert done.returncode != 0
    assert "No space left on device" in done.stderr


def test_d38_d39_options_stand_before_or_after_and_a_relative_root_means_the_same(project: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.root / "OTH.toml"
    other.write_text('[project]\nprefix = "OTH"\n')
    given = ["--root", project.root, "--config", other, "--log-level", "error"]
    for n, argv in enumerate(([*given, "add", "x"], ["add", "x", *given], ["--config", "nowhere.toml", "--root", "/nowhere", "add", "x", *given]), 1):
        assert cli(*argv).out == f"Added OTH-{n:03}: x\n"
    monkeypatch.chdir(project.root.parent)
    assert cli("--root", project.root.name, "add", "x").out == "Added WRK-004: x\n"
    monkeypatch.chdir(project.root)
    assert cli("add", "y").out == "Added WRK-005: y\n"

def test_init_makes_and_commits_exactly_two_files(bare: Path, cli: Cli) -> None:
    (bare / "mine.txt").write_text("staged\n")
    git(bare, "add", "mine.txt")
    (bare / "README.md").write_text("edited\n")
    done = cli("--root", bare, "init")
    commit = git(bare, "rev-parse", "--short=10", "HEAD").strip()
    assert done.out.splitlines() == [
        f"made orchestrator.toml and BACKLOG.yaml, committed as {commit}",
        "agents: permission prompts are off (claude --dangerously-skip-permissions); commits go to main, see protected_branches",
        f'Next: python3 orchestrator.py --root {bare} add "What shall be done", then python3 orchestrator.py --root {bare} run',
    ]
    assert done.err == ""
    assert git(bare, "show", "--format=%s", "--name-only", "HEAD").split("\n") == [
        "[orchestrator] Set up the backlog", "", "BACKLOG.yaml", "orchestrator.toml", "",
    ]
    assert git(bare, "status", "--porcelain") == " M README.md\nA  mine.txt\n"
    assert (bare / "BACKLOG.yaml").read_text() == "schema_version: 3\nitems: []\nnext_item_id: 0\n"
    assert (bare / ".orchestrator" / ".gitignore").read_text() == "*\n"


def test_init_never_writes_over_a_file_and_heeds_the_config(bare: Path, cli: Cli) -> None:
    (bare / "orchestrator.toml").write_text('[project]\nbacklog_path = "plan/TODO.yaml"\n')
    assert cli("--root", bare, "init").out.startswith("made plan/TODO.yaml, committed as ")
    assert git(bare, "show", "--format=", "--name-only", "HEAD") == "plan/TODO.yaml\n"
    assert git(bare, "status", "--porcelain") == "?? orchestrator.toml\n"
    before = photograph(bare)
    done = cli("--root", bare, "init", "--prefix", "OTH", "--agent", "codex")
    assert done.out.splitlines()[0] == "nothing to do: the files are there already"
    assert photograph(bare) == before
    assert cli("--root", bare, "add", "x").out == "Added WRK-001: x\n"


def test_init_says_what_the_repository_seems_to_want(bare: Path, cli: Cli) -> None:
    """Six lines at most; nothing is set but the wording of its own commit."""
    for subject in ("fix: one", "feat(app)!: two", "Three"):
        git(bare, "commit", "-q", "--allow-empty", "-s", "-m", subject)
    git(bare, "config", "commit.gpgSign", "true")
    git(bare, "config", "gpg.program", "/nonexistent")
    (bare / ".commitlintrc.yml").touch()
    says = cli("--root", bare, "init", "--agent", "gemini").out.splitlines()
    config = orchestrator.load_config(bare, None)
    assert says[1] == "commits: look conventional (.commitlintrc.yml); for ours, set style in orchestrator.toml"
    assert says[2].startswith("signatures: git is configured to sign commits, and so are ours, but that failed: ")
    assert says[3].startswith("agents: permission prompts are off (gemini --yolo); commits go to main")
    assert len(says) == 5
    assert (config.commits.style, config.commits.signoff) == ("bracket", False)
    assert git(bare, "log", "-1", "--format=%B").split("\n")[:3] == ["chore(backlog): set up the backlog", "", "[orchestrator] Set up the backlog"]
    text = (bare / "orchestrator.toml").read_text()
    (bare / "orchestrator.toml").write_text(text.replace("# style", "style"))
    hook = bare / ".git/hooks/commit-msg"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    again = cli("--root", bare, "init").out.splitlines()
    assert again[:2] == ["nothing to do: the files are there already", "hooks: commit-msg; what agents build has to pass them"]
    assert "commits: " not in "\n".join(again)


def test_in_a_subfolder_the_project_above_is_named(bare: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("--root", bare, "init")
    (bare / "sub" / "deep").mkdir(parents=True)
    monkeypatch.chdir(bare / "sub" / "deep")
    for command in (["status"], ["add", "x"], ["run"]):
        assert cli(*command, code=1).err == (
            f"orchestrator: {bare}/sub/deep holds no BACKLOG.yaml; the project is {bare}. Go there, or name it with --root.\n"
        )
    refused = cli("init", code=1).err
    assert refused.startswith(f"orchestrator: {bare} is a project already, and this folder is inside it. For one more, ")
    assert git(bare, "status", "--porcelain") == ""
    cli("--root", bare / "sub" / "deep", "init")
    assert git(bare, "show", "--format=", "--name-only", "HEAD").split() == ["sub/deep/BACKLOG.yaml", "sub/deep/orchestrator.toml"]
    assert cli("status").out == "No items.\n"
    assert cli("add", "x", "--commit").out == "Added WRK-001: x\n"
    assert git(bare, "status", "--porcelain") == ""


def test_d38_init_refuses_a_bad_prefix_and_leaves_commits_to_others_when_asked(tmp_path: Path, cli: Cli) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    before = photograph(tmp_path)
    for prefix in ("", "a b", "-", "a/b", "ä", "A" * 65):
        assert cli("--root", tmp_path, "init", f"--prefix={prefix}", code=2).err.startswith("orchestrator init: argument --prefix: must be ")
    assert photograph(tmp_path) == before
    cli("--root", tmp_path, "init", "--no-commit", "--agent", "demo")
    assert git(tmp_path, "status", "--porcelain") == "?? BACKLOG.yaml\n?? orchestrator.toml\n"
    cli("--root", tmp_path, "add", "x")  # on an unborn branch
    assert json.loads(cli("--root", tmp_path, "show", "WRK-001", "--json").out)["commits"] == []
    for name in ("orchestrator.toml", "BACKLOG.yaml"):
        (tmp_path / name).unlink()
    cli("--root", tmp_path, "init", "--prefix", "Ab_c-1", "--agent", "demo")
    assert git(tmp_path, "log", "--format=%s") == "[orchestrator] Set up the backlog\n"
    cli("--root", tmp_path, "check")
    assert cli("--root", tmp_path, "add", "x").out == "Added Ab_c-1-001: x\n"


def test_add_with_all_options(project: Any, here: Cli) -> None:
    here("add", "First")
    done = here(
        "add", "  A  title ", "--size", "LARGE", "--complexity", "m", "--risk", "Low", "--impact", "H", "--priority", "-3",
        "--pipeline", "feature", "--tag", "ui", "--tag", "a b", "--depends-on", "WRK-001", "--description", "Why\nso",
    )
    assert (done.out, done.err) == ("Added WRK-002: A title\n", "")
    row = project.items()["WRK-002"]
    assert row.pop("created") == row.pop("updated")
    assert row == {
        "id": "WRK-002", "title": "A title", "status": "new", "size": "large", "complexity": "medium", "risk": "low",
        "impact": "high", "requires_human_review": False, "tags": ["ui", "a b"], "dependencies": ["WRK-001"],
        "pipeline_type": "feature", "priority": -3,
        "description": {"context": "Why\nso", "problem": "", "solution": "", "impact": "", "sizing_rationale": ""},
    }
    assert project.status() == " M BACKLOG.yaml\n"


REFUSED: list[tuple[str, list[str], int, str]] = [
    ("new", ["add", "\n\t"], 2, "the title is empty"),
    ("new", ["add", "x", "--pipeline", "featur"], 2, '--pipeline featur: there is no such pipeline (did you mean "feature"?)'),
    ("new", ["add", "x", "--depends-on", "WRK-01"], 2, 'WRK-01: there is no such item (did you mean "WRK-001"?)'),
    ("in_progress phase=build", ["advance", "WRK-001"], 1, "WRK-001: build is its last phase"),
    ("in_progress phase=plan", ["advance", "WRK-001", "--to", "nope"], 1, "WRK-001: no main phase nope; there are plan, build"),
    ("new", ["advance", "WRK-001"], 1, "WRK-001: it is new; only items in_progress advance"),
    ("in_progress phase=plan pipeline_type=gone", ["advance", "WRK-001"], 1, "WRK-001: pipeline gone is not in the config"),
    ("new", ["complete", "WRK-01"], 2, 'WRK-01: there is no such item (did you mean "WRK-001"?)'),
    ("new", ["close", "WRK-001", "--reason", " "], 2, "--reason is blank; say why the item is not wanted any more"),
    *((row, ["step", "WRK-001"], 1, "WRK-001: no step can be taken; ") for row in ("blocked blocked_reason=Why", "new dependencies=[WRK-002]", "done")),
    ("new", ["unblock", "WRK-001"], 1, "WRK-001: it is not blocked, but new"),
    ("new", ["show", "WRK-01"], 2, 'WRK-01: there is no such item (did you mean "WRK-001"?)'),
    ("new", ["edit", "WRK-001"], 2, "nothing to change; see "),
    ("new", ["edit", "WRK-001", "--title", " "], 2, "the title is empty"),
    ("new", ["edit", "WRK-001", "--depends-on", "WRK-009"], 2, "WRK-009: there is no such item"),
    ("new", ["edit", "WRK-001", "--depends-on", "WRK-001"], 2, "--depends-on: WRK-001 → WRK-001 could never start"),
    ("new", ["run", "--target", "WRK-01"], 2, 'WRK-01: there is no such item (did you mean "WRK-001"?)'),
    ("new", ["run", "--dry-run", "--target", "WRK-001", "--only", "size=small"], 2, "--target and --only cannot be combined: name the items"),
    ("new", ["status", "--only", "size"], 2, "--only: Filter must be in format KEY=VALUE[,VALUE…] or KEY!=VALUE[,VALUE…], not 'size'"),
    ("new", ["run", "--only", "foo=1"], 2, "--only: Unknown filter field: foo. "),
    ("new", ["status", "--only", "size=huge"], 2, "--only: Invalid value 'huge' for field 'size': "),
    ("new", ["status", "--done", "--only", "id=WRK-001"], 2, "--done and --only cannot"),
]


def test_what_makes_no_sense_is_refused_in_one_line_and_changes_nothing(project: Any, here: Cli) -> None:
    project.backlog()
    before = photograph(project.root)
    for row, argv, code, says in REFUSED:
        project.backlog(f"WRK-001 {row}", "WRK-002 new")
        before["BACKLOG.yaml"] = (before["BACKLOG.yaml"][0], project.text().encode())
        done = here(*argv, code=code)
        assert (done.out, done.err.count("\n")) == ("", 1)
        assert done.err.startswith(f"orchestrator: {says}"), argv
        assert photograph(project.root) == before, argv


def test_status_of_an_empty_backlog(here: Cli) -> None:
    assert here("status").out == "No items.\n"
    assert json.loads(here("status", "--json").out) == {"schema": 1, "active": None, "unfinished": None, "counts": {}, "items": [], "salvage": []}
    assert here("status", "--done").out == "No item has been finished yet.\n"
    assert here("log").out == "There is no commit of the orchestrator's.\n"


def test_d52_status_table(project: Any, here: Cli) -> None:
    project.backlog(
        "WRK-001 new impact=low", "WRK-002 in_progress phase=plan phase_pool=main size=small risk=low",
        "WRK-003 new impact=high", "WRK-004 blocked blocked_reason=Unclear", "WRK-005 ready dependencies=[WRK-002]",
    )
    lines = here("status").out.splitlines()
    assert lines == [
        "ID      STATUS      PHASE IMPACT SIZE  RISK TITLE",
        "WRK-002 in_progress plan  -      small low  Item WRK-002",
        "WRK-004 blocked     -     -      -     -    Item WRK-004",
        "WRK-005 ready       -     -      -     -    Item WRK-005",
        "WRK-003 new         -     high   -     -    Item WRK-003",
        "WRK-001 new         -     low    -     -    Item WRK-001",
        "",
        "5 items: 1 in_progress, 1 blocked, 1 ready, 2 new",
        "",
        "Blocked, each needs you:",
        "  WRK-004 Unclear",
        f'  {orchestrator.SCRIPT} --root {project.root} unblock ID --notes "YOUR ANSWER"',
        "",
        "Waiting for other items:",
        "  WRK-005 WRK-002 (in_progress)",
    ]
    for only, ids in {"size=small": [2], "status=new impact=low": [1], "id=WRK-001,WRK-004": [4, 1], "tag=zzz": []}.items():
        args = [word for one in only.split() for word in ("--only", one)]
        assert [row["id"] for row in json.loads(here("status", "--json", *args).out)["items"]] == [f"WRK-00{n}" for n in ids]
        assert (here("status", *args).out == "No item matches.\n") is (not ids)


def test_d52_the_table_is_as_wide_as_the_terminal(project: Any, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells with wide characters; titles get the room that is left, and go on below themselves."""
    project.backlog("WRK-001 in_progress phase=build size=small", "WRK-002 new priority=3 pipeline_type=feature")
    long = "日本語の題名 and a title that is too long for one line of a terminal of eighty columns"
    (project.root / "BACKLOG.yaml").write_text(project.text().replace("title: Item WRK-001", f"title: {long}"))
    lines = {}
    for width in (40, 80, 113, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        lines[width] = here("status").out.splitlines()
        assert max(map(orchestrator.cell_width, lines[width])) <= width
    assert lines[80][:3] == [
        "ID      STATUS      PHASE PRIO SIZE  TITLE",
        "WRK-001 in_progress build -    small 日本語の題名 and a title that is too long",
        "                                     for one line of a terminal of eighty",
    ]
    assert lines[140][1].endswith(f" {long}")
    assert "WRK-001 in_progress build -    small" in lines[40]  # the title below it


def test_check_names_all_problems_each_with_its_remedy(project: Any, here: Cli) -> None:
    project.configure(more='[[pipelines.feature.phases]]\nname = "more"\nworkflows = ["gone.md"]\n')
    project.set_up("WRK-001 ready dependencies=[WRK-002]", "WRK-002 ready dependencies=[WRK-001]", "WRK-003 in_progress phase=plam")
    (project.root / "README.md").write_text("edited\n")
    lines = here("check", code=1).out.splitlines()
    problems = [line for line in lines if line.startswith("problem: ")]
    wanted = ["uncommitted changes: README.md", "Workflow file not found", "unknown phase 'plam'", "Circular dependency"]
    assert len(problems) == len(wanted)
    for problem, want in zip(problems, wanted, strict=True):
        assert want in problem
        assert lines[lines.index(problem) + 1].startswith("  ")
    assert lines[-1] == "4 problems"
    got = json.loads(here("check", "--json", code=1).out)
    assert [set(row) for row in got["problems"]] == [{"what", "remedy"}] * 4
    refused = here("run", code=1).err.splitlines()
    assert (refused[0], [line[:2] for line in refused[1:]]) == ("orchestrator: cannot start:", ["- ", "  "] * 4)


def test_commands_that_only_look_write_nothing(project: Any, here: Cli) -> None:
    project.set_up("WRK-001 new", "WRK-002 blocked", "WRK-003 ready")
    (project.root / "README.md").write_text("edited\n")
    before = photograph(project.root)
    for line in (
        "status --json", "status --graph", "status --done", "show WRK-001", "log", "logs WRK-001", "check", "stop", "run --dry-run", "triage --dry-run",
    ):  # fmt: skip
        here(*line.split(), code=1 if "check" in line else 0)
    assert photograph(project.root) == before


def test_dry_run_says_what_would_run_and_why_the_rest_would_not(project: Any, here: Cli) -> None:
    items = ("WRK-001 ready", "WRK-002 ready", "WRK-003 blocked blocked_reason=Unclear", "WRK-004 new dependencies=[WRK-001]", "WRK-005 done")
    project.set_up(*items)
    would = [
        "Would start now:",
        "  WRK-001 plan Item WRK-001",
        "",
        "Would not start:",
        "  1 item blocked, each needs you: WRK-003",
        "  1 item later (max_wip = 1, max_concurrent = 1): WRK-002",
        "  1 item waiting for WRK-001 (in_progress): WRK-004",
        "",
    ]
    nothing = "Nothing was started and nothing was written."
    assert here("run", "--dry-run", "--cap", "2").out.splitlines() == [*would, nothing]
    got = json.loads(here("run", "--dry-run", "--cap", "2", "--json").out)
    assert got["schema"] == 1
    assert [(row["id"], row["phase"]) for row in got["items"]] == [
        ("WRK-001", "plan"), ("WRK-003", None), ("WRK-002", None), ("WRK-004", None),
    ]
    (project.root / "README.md").write_text("edited\n")
    dirt = "the work tree has uncommitted changes: README.md"
    assert here("run", "--dry-run", "--cap", "2").out.splitlines() == [
        *would, "But a run cannot start:", f"- {dirt}",
        "  Commit them, or run with --allow-dirty, or set them aside: git stash push --include-untracked -- :/README.md", "", nothing,
    ]  # fmt: skip
    (problem,) = json.loads(here("run", "--dry-run", "--json").out)["problems"]
    assert problem["what"] == dirt
    assert "cannot start" not in here("run", "--dry-run", "--allow-dirty").out
    (project.root / "my notes.txt").write_text("mine\n")
    (project.root / "BACKLOG.yaml").write_text(project.text() + "# not committed\n")
    remedy = json.loads(here("check", "--json", code=1).out)["problems"][0]["remedy"].partition("set them aside: ")[2]
    assert remedy == "git stash push --include-untracked -- :/README.md ':/my notes.txt'"
    subprocess.run(["sh", "-c", remedy], cwd=project.root, check=True, capture_output=True)
    assert here("check").out.endswith("unchecked: build\nready to run\n")
    assert project.text().endswith("# not committed\n")  # the backlog is left alone


@pytest.mark.slow
def test_run_json_is_the_only_thing_on_stdout_and_the_summary_goes_to_stderr(project: Any) -> None:
    project.set_up("WRK-001 ready", "WRK-002 ready", script={"*/build": [WORKS]})
    got = json.loads(project.run("run", "--json", "--target", "WRK-001").stdout)
    form = re.findall(r"\w+", orchestrator.JSON_FORMS["run"].partition("--dry-run")[0])
    assert set(got) - {"schema"} <= set(form)
    assert (got["schema"], got["halt_reason"], got["exit_code"]) == (1, "TargetCompleted", 0)
    assert got["completed"] == [{"id": "WRK-001", "title": "Item WRK-001", "commit": project.git("rev-parse", "HEAD").strip(), "verified": []}]
    done = project.run("run", "--log-level", "error")
    assert done.stdout == ""
    assert done.stderr.startswith("\nHalt: nothing is left that can run (AllDoneOrBlocked)\n")
    assert re.search(r"\nDone \(1\):\n  WRK-002 [0-9a-f]{10} Item WRK-002 \(not checked\)\n", done.stderr)


@pytest.mark.slow
def test_d37_triage_rates_new_items_starts_nothing_else_and_is_not_held_up(project: Any) -> None:
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", "WRK-002 new", "WRK-003 new", "WRK-004 new", "WRK-005 ready")
    project.run("triage", "--target", "WRK-004", "--target", "WRK-002")
    assert project.agent_log() == ["WRK-002 triage 1", "WRK-004 triage 1"]
    got = json.loads(project.run("triage", "--json").stdout)
    assert project.agent_log()[2:] == ["WRK-003 triage 1"]
    assert (got["phases"], got["exit_code"]) == (1, 0)
    assert set(project.statuses().values()) == {"in_progress plan", "ready"}
    assert (project.committed(), project.status()) == (project.text(), "")
