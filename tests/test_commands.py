"""The commands around a run: step, complete, close, and what they commit."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.conftest import Project
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
    assert project.run("log", "--verify").stdout.endswith("all is in order\n")


# -- what a command commits ------------------------------------------------------------------------

COMMANDS = [
    (("add", "Write it"), "[orchestrator] Add WRK-004: Write it"),
    (("advance", "WRK-001"), "[orchestrator] Advance WRK-001 to build"),
    (("unblock", "WRK-002"), "[orchestrator] Unblock WRK-002"),
    (("complete", "WRK-001", "--summary", "x"), "[orchestrator] Complete WRK-001: Item WRK-001"),
    (("close", "WRK-003", "--reason", "x"), "[orchestrator] Close WRK-003: Item WRK-003"),
]


@pytest.mark.parametrize(("argv", "subject"), COMMANDS)
@pytest.mark.parametrize("by", ["--commit", "commit_commands"])
def test_a_command_commits_the_backlog_alone(
    project: Project, here: Cli, argv: tuple[str, ...], subject: str, by: str
) -> None:
    project.configure(execution="commit_commands = true" if by == "commit_commands" else "")
    project.backlog("WRK-001 in_progress phase=plan", "WRK-002 blocked blocked_reason=x", "WRK-003 new")
    project.commit_all()
    (project.root / "README.md").write_text("edited\n")
    (project.root / "new.txt").write_text("new\n")
    project.git("add", "new.txt")
    here(*argv, *([by] if by == "--commit" else []))
    assert project.subjects()[0] == subject
    assert project.paths() == ["BACKLOG.yaml"]
    assert project.committed() == project.text()
    assert [line for line in project.status().splitlines() if "_worklog" not in line] == [" M README.md", "A  new.txt"]
    assert here("log", "--verify").out.endswith("all is in order\n")


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
    assert project.run("log", "--verify").stdout.endswith("all is in order\n")


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
