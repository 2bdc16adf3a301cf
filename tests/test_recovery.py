"""Killed at any point, the next start finishes what was decided and starts again what was not.

The agents are not killed: ending them is the duty of the next start. See test_kill_matrix.py for
the kill at every event of a run.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

HANG = {"announce": True, "hang": True}
IN_BUILD = "in_progress phase=build phase_pool=main"
RECOVERED = "[orchestrator] Recover backlog state"
HALT = "[orchestrator] Save backlog state on halt"

# Kills the process as it is about to rename, or add to, a file for the NTH time, or the one after that.
WATCH = """
renamed = []
def watch(event, args):
    journal = event == "open" and str(args[0]).endswith("/journal") and args[2] & os.O_RDWR
    adds = journal or event == "open" and args[2] & os.O_APPEND
    if event == "os.rename" or adds:
        name = os.path.basename(os.fsdecode(args[0 if adds else 1]))
        renamed.append(name)
        nth = renamed.count(NAME) == NTH
        if nth and (not THEN and name == NAME or THEN and name == THEN):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_at_rename(project: Any, name: str, nth: int = 1, then: str = "") -> None:
    """Run until the given file is to be replaced, or until another one is after that."""
    project.inject(f"NAME, NTH, THEN = {name!r}, {nth}, {then!r}\n{WATCH}")
    process = project.start("run", "--cap", "1")
    assert process.wait() == -9
    project.inject("")


def prepare(project: Any, *items: str, phases: str = "plan build!", script: Any = None, execution: str = "") -> None:
    project.configure(phases, execution=execution)
    config = project.root / "orchestrator.toml"  # so that copies of the project use their own agent
    config.write_text(config.read_text().replace(str(project.outside), "../outside"))
    project.backlog(*items)
    project.commit_all()
    project.script(script or {})


def recovered(project: Any) -> str:
    """Start once more without working: everything holds after that; returns the log."""
    log: str = project.run("run", "--cap", "0").stderr
    assert project.committed() == project.text()
    assert project.status() == ""
    assert project.survivors() == []
    assert project.git("for-each-ref", "refs/orchestrator/snapshots", "refs/orchestrator/backlog") == ""
    return log


def worklog(project: Any) -> str:
    return "".join(path.read_text() for path in sorted((project.root / "_worklog").glob("*.md")))


# ---- The whole tool killed while an agent works --------------------------------------------------


@pytest.mark.slow
def test_f_f2_f3_killed_in_a_destructive_phase(project: Any) -> None:
    """The agent is ended before anything else is done; what it left is on a ref, and not charged."""
    prepare(project, f"WRK-001 {IN_BUILD}", "WRK-002 ready", execution="max_wip = 2", script={
        "*/build": [{**HANG, "write": {"half.py": "1\n", "README.md": "spoilt\n"}}, {"write": {"code.py": "1\n"}}]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.wait()
    assert len(project.survivors()) == 1
    assert project.committed() != project.text()  # the promotion of WRK-002
    (project.root / "mine.py").write_text("written after the crash\n")
    log = recovered(project)
    assert "ended a process that an agent left behind" in log
    assert project.subjects()[:2] == [RECOVERED, "Set up"]
    assert project.paths() == ["BACKLOG.yaml"]
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert project.git("show", f"{ref}:half.py", f"{ref}:README.md") == "1\nspoilt\n"
    assert f"to get a file of yours back: git restore --source={ref} -- PATH\n" in log
    project.git("restore", f"--source={ref}", "--", "mine.py")
    assert project.status() == "?? mine.py\n"
    (project.root / "mine.py").unlink()
    assert project.statuses() == {"WRK-001": "in_progress build", "WRK-002": "in_progress plan"}
    assert "attempts" not in project.text()
    project.run("run", "--target", "WRK-001")
    assert project.agent_log() == ["WRK-001 build 1"] * 2
    assert project.subjects()[0] == "[WRK-001][build] build done"


@pytest.mark.slow
def test_killed_in_a_document_phase_and_a_run_that_refuses_on_another_branch(project: Any) -> None:
    """Its documents so far are committed; on another branch a start says where to go first."""
    prepare(project, "WRK-001 ready", script={"*/plan": [{**HANG, "document": "half.md"}, {"document": "plan.md"}]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.wait()
    project.git("stash", "push", "-q", "BACKLOG.yaml")
    project.git("switch", "-q", "-c", "elsewhere")
    refused = project.run("run", code=1).stderr
    assert "git switch main" in refused
    assert "orchestrator/journal" in refused
    assert len(project.survivors()) == 1
    project.git("switch", "-q", "main")
    project.git("stash", "pop", "-q")
    recovered(project)
    assert project.git("show", "HEAD:changes/WRK-001_item-wrk-001/half.md", "HEAD~1:changes/WRK-001_item-wrk-001/half.md")
    assert project.statuses() == {"WRK-001": "in_progress plan"}


@pytest.mark.slow
def test_a_decision_by_hand_between_a_crash_and_the_next_start_is_merged(project: Any) -> None:
    """Killed between journal and save: the saved result meets an edit of the operator."""
    prepare(project, f"WRK-001 {IN_BUILD}", "WRK-002 ready", script={"*/build": [{"write": {"code.py": "1\n"}}]})
    kill_at_rename(project, "BACKLOG.yaml")
    assert "WRK-001" in project.text()
    (project.root / "BACKLOG.yaml").write_text("# by hand\n" + project.text().replace("Item WRK-002", "Renamed"))
    recovered(project)
    assert project.subjects()[0] in ("[WRK-001][build] build done", HALT + " (CapReached)")
    assert "[WRK-001][build] build done" in project.subjects()
    assert project.statuses() == {"WRK-002": "in_progress plan"}
    assert project.text().startswith("# by hand\n")
    assert "title: Renamed" in project.text()
    assert worklog(project).count("**Outcome:** Complete") == worklog(project).count("**Status:** Done") == 1
    assert project.agent_log() == ["WRK-001 build 1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "by_hand"), [("", False), ("journal", False), ("journal", True)],
    ids=["before-the-save", "after-it", "after-it-in-an-editor"],
)
def test_what_is_unblocked_after_a_crash_stays_so(project: Any, then: str, by_hand: bool) -> None:
    """Killed as a block is saved: journalled before, still in the journal right after."""
    prepare(project, "WRK-001 ready", script={"*/plan": [{"result": {"result": "blocked", "summary": "needs a decision"}}]})
    kill_at_rename(project, "BACKLOG.yaml", 2, then)
    assert project.statuses() == {"WRK-001": "blocked plan" if then else "in_progress plan"}
    if by_hand:
        text = re.sub(r"  blocked_.*\n", "", project.text()).replace("status: blocked", "status: in_progress")
        (project.root / "BACKLOG.yaml").write_text(text)
    else:
        project.run("unblock", "WRK-001", "--notes", "go on")
    recovered(project)
    assert project.statuses() == {"WRK-001": "in_progress plan"}
    assert "blocked" not in project.text()
    assert ("go on" in project.text()) != by_hand
    assert worklog(project).count("**Outcome:** Blocked") == 1
    assert "[WRK-001][plan] Blocked: needs a decision" in project.subjects()
