"""The commands around a run: step, complete, close, and what they commit."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

import orchestrator
from tests.conftest import Project, sh
from tests.test_cli import Cli, cli, here

__all__ = ["cli", "here"]  # fixtures


def worklog(project: Project) -> str:
    (path,) = (project.root / "_worklog").glob("*.md")
    return path.read_text()


# -- complete and close ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["new", "scoping", "ready", "in_progress phase=plan", "blocked blocked_reason=why"])
def test_complete_takes_an_item_out_and_tells_whoever_waited(project: Project, here: Cli, status: str) -> None:
    project.backlog(f"WRK-001 {status}", "WRK-002 new dependencies=[WRK-001,WRK-003]", "WRK-003 new")
    project.commit_all()
    done = here("complete", "WRK-001", "--summary", "Shipped\nby hand")
    assert (done.out, done.err) == ("Completed WRK-001: Item WRK-001\nNo longer waiting for it: WRK-002\n", "")
    items = project.items()
    assert list(items) == ["WRK-002", "WRK-003"]
    assert items["WRK-002"]["dependencies"] == ["WRK-003"]
    told = "[WRK-001, which this depended on, was done outside of this backlog] Item WRK-001: Shipped by hand"
    assert items["WRK-002"]["description"]["context"] == told
    phase = "plan" if "plan" in status else "N/A"
    entry = f"— WRK-001 (Item WRK-001)\n\n- **Status:** Done\n- **Phase:** {phase}\n- **Summary:** Shipped by hand\n"
    assert entry in worklog(project)
    assert project.status() == " M BACKLOG.yaml\n?? _worklog/\n"  # nothing is committed unasked


def test_close_keeps_the_context_of_whoever_waited(project: Project, here: Cli) -> None:
    project.backlog("WRK-001 new", "WRK-002 new dependencies=[WRK-001]")
    text = project.text().replace("[WRK-001]", "[WRK-001]\n  description:\n    context: Old\n    problem: P")
    (project.root / "BACKLOG.yaml").write_text(text)
    here("close", "WRK-001", "--reason", "Not wanted")
    assert "- **Status:** Closed\n- **Phase:** N/A\n- **Reason:** Not wanted\n" in worklog(project)
    other = project.items()["WRK-002"]
    note = "[WRK-001, which this depended on, was closed] Item WRK-001: Not wanted"
    assert "dependencies" not in other
    assert (other["description"]["context"], other["description"]["problem"]) == (f"Old\n{note}", "P")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("complete", "WRK-01"), 'orchestrator: WRK-01: there is no such item (did you mean "WRK-001"?)\n'),
        (("close", "WRK-001", "--reason", " "), "orchestrator: --reason is blank; say why the item is not wanted any more\n"),
        (("close", "WRK-001"), "orchestrator close: the following arguments are required: --reason. `orchestrator close --help` shows what there is.\n"),
    ],
)
def test_what_complete_and_close_refuse(project: Project, here: Cli, argv: tuple[str, ...], message: str) -> None:
    project.backlog("WRK-001 new")
    before = project.text()
    assert here(*argv, code=2).err == message
    assert project.text() == before
    assert not (project.root / "_worklog").exists()


@pytest.mark.slow
def test_an_item_whose_phase_is_running_is_not_taken_out(project: Project) -> None:
    project.script({"*/plan": [{"announce": True, "await": "go"}]})
    os.mkfifo(project.outside / "go")
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main", "WRK-002 new")
    project.commit_all()
    run = project.start("run", "--cap", "1")
    project.announced()
    refused = project.run("complete", "WRK-001", code=1)
    assert refused.stderr.startswith("orchestrator: WRK-001: its phase plan is running just now. Wait for it, or ask")
    other = project.run("close", "WRK-002", "--reason", "no", "--commit")  # the others are free
    assert other.stdout == "Closed WRK-002: Item WRK-002\nA run is active: its next commit carries the change.\n"
    (project.outside / "go").write_text("")
    project.finish(run)
    assert list(project.items()) == ["WRK-001"]
    assert project.status() == ""


# -- what a command commits ------------------------------------------------------------------------

COMMANDS = [
    (("add", "Write it"), "[orchestrator] Add WRK-004: Write it"),
    (("advance", "WRK-001"), "[orchestrator] Advance WRK-001 to build"),
    (("unblock", "WRK-002"), "[orchestrator] Unblock WRK-002"),
    (("complete", "WRK-001", "--summary", "x"), "[orchestrator] Complete WRK-001: Item WRK-001"),
    (("close", "WRK-003", "--reason", "x"), "[orchestrator] Close WRK-003: Item WRK-003"),
]


@pytest.mark.parametrize(("argv", "subject"), COMMANDS)
def test_a_command_commits_the_backlog_alone(
    project: Project, here: Cli, argv: tuple[str, ...], subject: str
) -> None:
    project.backlog("WRK-001 in_progress phase=plan", "WRK-002 blocked blocked_reason=x", "WRK-003 new")
    project.commit_all()
    (project.root / "README.md").write_text("edited\n")
    (project.root / "new.txt").write_text("new\n")
    project.git("add", "new.txt")
    here(*argv, "--commit")
    assert project.subjects()[0] == subject
    assert project.paths() == ["BACKLOG.yaml"]
    assert project.committed() == project.text()
    assert [line for line in project.status().splitlines() if "_worklog" not in line] == [" M README.md", "A  new.txt"]


# -- step ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_is_one_phase_with_the_guardrails_overridden(project: Project) -> None:
    project.script({"*/build": [{"write": {"code.py": "1\n"}}]})
    project.backlog("WRK-001 ready size=large risk=high", "WRK-002 new")
    project.commit_all()
    done = project.run("step", "WRK-001")
    assert project.agent_log() == ["WRK-001 plan 1"]
    assert "Halt: the limit for this run is used up (CapReached)" in done.stderr
    item: Any = project.items()["WRK-001"]
    assert (item["status"], item["phase"], item["guardrail_override"]) == ("in_progress", "build", True)
    assert project.status() == ""
    again = project.run("step", "WRK-001")
    assert "WRK-001 is done" in again.stderr
    assert list(project.items()) == ["WRK-002"]
    assert project.status() == ""


@pytest.mark.parametrize(
    ("item", "code", "message"),
    [
        ("blocked blocked_reason=Why", 1, "orchestrator: WRK-001 is blocked: Why. First: {} unblock WRK-001\n"),
        ("new dependencies=[WRK-002]", 1, "orchestrator: WRK-001 waits for WRK-002 (new)\n"),
        ("done", 1, "orchestrator: WRK-001 is done: there is no phase left to run\n"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(
    project: Project, here: Cli, item: str, code: int, message: str
) -> None:
    project.backlog(f"WRK-001 {item}", "WRK-002 new")
    project.commit_all()
    before = project.subjects(), project.text()
    err = here("step", "WRK-001", code=code).err
    assert err == message.format(err.rpartition("First: ")[2].partition(" unblock")[0])
    assert (project.subjects(), project.text()) == before
    wrong = here("step", "WRK-01", code=2).err
    assert wrong == 'orchestrator: WRK-01: there is no such item (did you mean "WRK-001"?)\n'


# -- what check remarks ----------------------------------------------------------------------------


def test_check_names_what_is_left_over(project: Project, here: Cli) -> None:
    project.backlog("WRK-002 new", head="")
    project.commit_all()
    for name in ("WRK-002_open", "WRK-001_done", "WRK-077_never", "notes"):
        (project.root / "changes" / name).mkdir(parents=True)
    (project.root / "BACKLOG.yaml").write_text(project.text().replace("next_item_id: 1", "next_item_id: 2"))
    project.commit_all()
    project.git("update-ref", "refs/orchestrator/snapshots/20260101T000000-abcdef/aa", "HEAD")
    project.git("update-ref", "refs/orchestrator/snapshots/20260101T000000-abcdef/bb", "HEAD")
    notes = [line for line in here("check").out.splitlines() if line.startswith("note: ")]
    refs = "refs/orchestrator/snapshots/20260101T000000-abcdef"
    assert notes == [
        "note: changes/WRK-077_never/ belongs to no item that ever was; move it away or rename it",
        "note: changes/notes/ belongs to no item that ever was; move it away or rename it",
        f"note: 2 snapshots of run 20260101T000000-abcdef, which is over, under {refs}/; to drop them:"
        f" git for-each-ref --format='delete %(refname)' {refs} | git update-ref --stdin",
    ]
    command = notes[2].partition("to drop them: ")[2]
    sh(project.root, "sh", "-c", command)
    assert project.git("for-each-ref", "refs/orchestrator") == ""


# -- output ----------------------------------------------------------------------------------------


def test_colour_is_for_terminals_and_can_be_asked_for(project: Project, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    project.backlog("WRK-001 in_progress phase=nope")
    (project.root / "new.txt").write_text("")
    assert "\x1b" not in here("check", code=1).out
    assert "\x1b" not in here("--color", "never", "check", code=1).out
    coloured = here("check", "--color", "always", code=1)
    assert "\x1b[31mproblem:\x1b[0m " in coloured.out
    assert here("--color=always", "show", "WRK-009", code=2).err.startswith("\x1b[31morchestrator:\x1b[0m WRK-009: ")


@pytest.mark.slow
def test_quiet_logs_of_a_run(project: Project) -> None:
    project.backlog("WRK-001 new")
    project.commit_all()
    quiet = project.run("--quiet", "triage")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    project.script({"*/plan": [{"result": {"result": "blocked", "context": "Which?"}}]})
    blocked = project.run("run", "--quiet", code=3).stderr
    assert blocked.splitlines()[0].endswith("warning: WRK-001 is blocked: Which?")
    assert "\nNext:\n" in blocked
    halt = project.run("triage").stderr.strip().splitlines()[0]
    assert halt == "Halt: no new item is left to triage (AllDoneOrBlocked)"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["statsu"], 'statsu: there is no such command (did you mean "status"?)'),
        (["run", "--taget", "WRK-001"], '--taget WRK-001 (did you mean "--target"?)'),
        (["status", "--only", "statsu=new"], 'Unknown filter field: statsu (did you mean "status"?). Supported'),
        (["status", "--only", "status=blokced"], '(did you mean "blocked"?)'),
        (["show", "WRK-0001"], 'there is no such item (did you mean "WRK-001"?)'),
        (["log", "WRK-0001"], 'history knows no such item (did you mean "WRK-001"?)'),
        (["add", "x", "--pipeline", "featur"], '(did you mean "feature"?)'),
    ],
)
def test_a_wrong_word_gets_a_hint(project: Project, here: Cli, argv: list[str], says: str) -> None:
    project.backlog("WRK-001 new")
    project.commit_all()
    done = here(*argv, code=2)
    assert done.out == ""
    assert says in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("option", [["--quiet"], ["--color", "never"], ["--log-level", "debug"]])
def test_global_options_stand_before_or_after_the_command(project: Project, here: Cli, option: list[str]) -> None:
    assert here(*option, "status").out == here("status", *option).out == "No items.\n"


@pytest.mark.parametrize(
    "argv", [["status"], ["status", "--graph"], ["show", "WRK-001"], ["log"], ["check"], ["run", "--dry-run"]], ids=" ".join
)
def test_the_form_of_json_is_documented(project: Project, here: Cli, argv: list[str]) -> None:
    project.backlog("WRK-001 new", "WRK-002 new dependencies=[WRK-001]")
    project.commit_all()
    got = json.loads(here(*argv, "--json").out)
    form = orchestrator.JSON_FORMS[argv[0]]
    documented = set(re.findall(r'"(\w+)"', form))
    assert got.pop("schema") == 1
    assert set(got) <= documented
    rows = [row for key, rows in got.items() if isinstance(rows, list) for row in rows if isinstance(row, dict)]
    assert {key for row in rows for key in row} <= documented
    shown = " ".join(here(argv[0], "--help").out.split())
    assert " ".join(form.split())[:60] in shown


def test_status_fits_a_narrow_terminal(project: Project, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    project.backlog("WRK-001 in_progress phase=build size=small", "WRK-002 blocked blocked_reason=" + "why_" * 9 + " priority=3")
    text = project.text().replace("why_", "why ").replace("title: Item WRK-001", "title: A title that is far too long for a narrow terminal")
    (project.root / "BACKLOG.yaml").write_text(text)
    monkeypatch.setenv("COLUMNS", "60")
    lines = here("status").out.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "ID      STATUS      PHASE PRIORITY SIZE  TITLE"
    assert lines[2] == "WRK-001 in_progress build -        small A title that is fa…"
    monkeypatch.delenv("COLUMNS")
    assert "A title that is far too long for a" in here("status").out.splitlines()[2]
