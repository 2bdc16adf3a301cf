"""Checks: what runs on exactly the tree that is committed, what the commit says of it, and `verify`."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from tests.conftest import Cli

IN_BUILD = "in_progress phase=build phase_pool=main"
LONG = 'true "a command whose text is longer than a line of a commit may be" and "goes on for quite a while behind that"'


def prepare(project: Any, *checks: list[str], own: str = "", **execution: str) -> None:
    """A project whose build is checked by these commands; WRK-002 waits, WRK-003 is built unchecked."""
    more = f"verify = {json.dumps(checks)}\n" if checks else ""
    bare = '[[pipelines.bare.phases]]\nname = "make"\ndestructive = true\n'
    project.configure("build!", more=more + bare, execution="".join(f"{k} = {v}\n" for k, v in {"max_retries": "0", **execution}.items()))
    project.backlog(f"WRK-001 {IN_BUILD}", "WRK-002 blocked blocked_from_status=ready", "WRK-003 in_progress phase=make phase_pool=main pipeline_type=bare")
    project.script({"*": [{"write": {"code.py": "ugly\n"}, "result": {"verify": [["touch", "owned"]]}}], "*/make": [{"write": {"made.py": "1\n"}}]})
    (project.root / "BACKLOG.yaml").write_text(project.text().replace("  phase: build\n", f"  phase: build\n{own}", 1))
    project.commit_all()


def trailers(project: Any, commit: str = "HEAD") -> list[str]:
    out: str = project.git("log", "-1", "--format=%(trailers:key=Orchestrator-Verified,valueonly,unfold)", commit)
    return out.split("\n")[:-2]


def test_a_commit_says_what_checked_it_and_everything_tells_it(project: Any, here: Cli) -> None:
    """The checks see what the hook has mended; the item's own come last; no check is no line."""
    seen = project.outside / "seen"
    prepare(project, ["sh", "-c", LONG], ["sh", "-c", f"cat code.py >> {seen}; exec sleep 0"], own="  verify:\n  - [grep, nice, code.py]\n")
    project.hook("pre-commit", "sed s/ugly/nice/ code.py > x && mv x code.py && git add code.py")
    told = json.loads(project.run("run", "--json").stdout)
    assert seen.read_text() == "nice\n"
    assert not (project.root / "owned").exists()
    one, three = told["completed"]
    commands = [f"sh -c '{LONG}'", f"sh -c 'cat code.py >> {seen}; exec sleep 0'", "grep nice code.py"]
    assert (one["verified"], three["verified"]) == (commands, [])
    assert (trailers(project, one["commit"]), trailers(project, three["commit"])) == (commands, [])
    assert max(map(len, project.git("log", "-1", "--format=%B", one["commit"]).splitlines())) <= 100
    checked = f"checked by {', '.join(commands)}"
    summary = orchestrator.render_summary(told, "o").splitlines()
    assert [line.partition(" Item ")[2] for line in summary if " Item " in line][:2] == [f"WRK-001 ({checked})", "WRK-003 (not checked)"]
    assert [row["verified"] for row in json.loads(here("status", "--done", "--json").out)["items"]] == [[], commands]
    assert [row["verified"] for row in json.loads(here("log", "--json").out)["log"] if row["phase"]] == [[], commands]
    for argv in (["show", "WRK-001"], ["log"], ["status", "--done"]):
        out = here(*argv).out
        assert checked in out
        assert ("not checked" in out) == (argv[0] != "show")
    assert "not checked" in here("show", "WRK-003").out
    assert here("check").out.count("no `verify`, so what an agent calls done is committed unchecked: make\n") == 1


SHELL = {
    "mends": "echo nice > code.py; echo round >> {outside}/rounds",
    "leaves": "touch left.txt; setsid sleep 1000 & echo $! > {outside}/pid; echo round >> {outside}/rounds",
    "commits": "git add code.py; git commit -qm mine || true; echo round >> {outside}/rounds",
    "edits": "sed s/title:.Item.WRK-002/title:\\ Renamed/ BACKLOG.yaml > x && mv x BACKLOG.yaml; echo round >> {outside}/rounds",
    "restless": "echo more >> code.py",
    "hangs": "sleep 100",
    "fails": "echo no good; exit 3",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounds", "text"),
    [
        ("mends", 2, ""), ("leaves", 2, ""), ("commits", 1, ""), ("edits", 1, ""),
        ("restless", 0, "hooks and checks change what is to be committed, in 4 rounds each time: code.py. Let git"),
        ("hangs", 0, "verify command `sh -c 'sleep 100'` ran out of time"), ("fails", 0, "failed with exit code 3\nLast output:\nno good"),
    ],
)  # fmt: skip
def test_checks_that_do_more_than_check(project: Any, name: str, rounds: int, text: str) -> None:
    """What is committed is what they passed on last; or the attempt fails, and nothing is lost."""
    (project.outside / "pid").write_text("none\n")
    next_one = f"cd {project.outside}; touch next; ! kill -0 $(cat pid) 2>&1"  # what the first has left is gone by then
    prepare(project, ["sh", "-c", SHELL[name].format(outside=project.outside)], ["sh", "-c", next_one], phase_timeout_minutes="0.02" if name == "hangs" else "5", max_retries="1" if name == "fails" else "0")
    project.run("run", "--target", "WRK-001", code=3 if text else 0)
    assert text in project.items().get("WRK-001", {}).get("blocked_reason", "")
    assert name != "fails" or "no good" in (project.outside / "prompt-WRK-001-build-2.md").read_text()
    if text:
        assert "code.py" in project.git("show", "--name-only", "refs/orchestrator/salvage/WRK-001/build/1")
        assert not (project.root / "code.py").exists()
    else:
        assert (project.outside / "rounds").read_text() == "round\n" * rounds
        assert project.git("show", "HEAD:code.py") == ("nice\n" if name == "mends" else "ugly\n")
        assert ("left.txt" in project.paths()) == (name == "leaves")
        assert len(trailers(project)) == 2
    assert (project.outside / "next").exists() == (not text or name == "restless")
    assert project.items()["WRK-002"]["title"] == ("Renamed" if name == "edits" else "Item WRK-002")
    assert project.status() == ""
    assert project.committed() == project.text()


@pytest.mark.slow
def test_a_check_that_changes_what_is_the_operators_fails_the_attempt(project: Any) -> None:
    prepare(project, ["sh", "-c", "echo spoilt > README.md"])
    (project.root / "README.md").write_text("mine\n")
    project.run("run", "--target", "WRK-001", "--allow-dirty", code=3)
    assert "changed README.md, which the operator had" in project.items()["WRK-001"]["blocked_reason"]
    assert (project.root / "README.md").read_text() == "mine\n"


@pytest.mark.slow
def test_documents_that_are_held_wait_beside_those_of_a_neighbour(project: Any) -> None:
    """What the neighbour wrote meanwhile, and committed, is no reason to start the phase again."""
    check = f'verify = [["sh", "-c", "test $ORCHESTRATOR_ITEM_ID = WRK-002 || test -e {project.outside}/fine || exit 127"]]\n'
    script = {"WRK-001/*": [{"document": "a.md", "await": "go"}], "WRK-002/*": [{"document": "b.md", "sh": f"echo > {project.outside}/go"}]}
    items = (f"WRK-00{n} in_progress phase=plan phase_pool=main" for n in (1, 2))
    project.set_up(*items, phases="plan", script=script, more=check, execution="max_concurrent = 2\nmax_wip = 2")
    project.run("run", code=4)
    (project.outside / "fine").touch()
    done = project.run("run")
    assert sorted(project.agent_log()) == ["WRK-001 plan 1", "WRK-002 plan 1"]
    assert "was cut off" not in done.stderr
    assert project.items() == {}
    assert project.status() == ""


@pytest.mark.slow
def test_verify_says_what_holds_now(project: Any) -> None:
    script = project.outside / "check.sh"
    script.write_text("test -e code.py")
    prepare(project, ["sh", str(script)], own="  verify:\n  - [grep, ugly, code.py]\n")
    project.run("run")
    commit = project.git("log", "-1", "--format=%H", "--grep", "Item: WRK-001$").strip()
    (project.root / "code.py").write_text("what is here now does not matter\n")
    held = f"sh {script}: holds\ngrep ugly code.py: holds\n2 of 2 checks of"
    assert project.run("verify", "WRK-001").stdout == f"{held} WRK-001 ({commit[:10]}) held\n"
    assert project.run("verify", commit[:12]).stdout == f"{held} {commit[:12]} ({commit[:10]}) held\n"
    script.write_text("echo broken since; exit 2")
    assert "failed with exit code 2\nLast output:\nbroken since\nThe work tree is a fresh one: what git ignores is missing in it\ngrep ugly code.py: holds\n1 of 2 " in project.run("verify", commit, code=1).stdout
    script.write_text("exit 127")
    assert "\nThe work tree is a fresh one: what git ignores" in project.run("verify", "WRK-001", code=1).stdout
    project.configure("build!", more='verify = [["true"]]\n')
    assert f"sh {script}: not run, for neither " in project.run("verify", "WRK-001", code=1).stdout
    assert "not checked" in project.run("verify", "WRK-003", code=1).stderr
    assert "not checked" in project.run("verify", "HEAD", code=1).stderr
    assert "there is no such item" in project.run("verify", "WRK-9", code=2).stderr
    assert len(project.git("worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "text", "command"),
    [
        ("Makefile", "all:\n\ntest: all\n\ttrue\n", "make test"), ("Makefile", "test := x\ntests:\n", ""), ("justfile", "test *args:\n  true\n", "just test"),
        ("package.json", '{"scripts": {"build": "x", "test": "jest"}}', "npm test"), ("package.json", r'{"scripts": {"test": "echo \"Error: no test specified\" && exit 1"}}', ""),
        ("pyproject.toml", "[tool.pytest.ini_options]\n", "pytest"), ("pyproject.toml", "[project]\n", ""), ("conftest.py", "", "pytest"),
        ("Cargo.toml", "", "cargo test"), ("go.mod", "module x\n", "go test ./..."),
    ],
)  # fmt: skip
def test_init_finds_what_a_project_is_tested_with(make_repo: Any, capsys: pytest.CaptureFixture[str], file: str, text: str, command: str) -> None:
    root: Path = make_repo()
    (root / file).write_text(text)
    assert orchestrator.main(["--root", str(root), "init"]) == 0
    said, config = capsys.readouterr().out, (root / "orchestrator.toml").read_text()
    assert (f"`verify`: {command}\n" in said) == bool(command)
    lines = [line.partition("# ")[2] for line in config.splitlines() if line.startswith("  # {")]
    build = [tomllib.loads(f"x = {line.rstrip(',')}")["x"] for line in lines]
    assert build == [{"name": "build", "is_destructive": True, "verify": [command.split()]}] * bool(command)
