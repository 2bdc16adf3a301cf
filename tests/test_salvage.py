"""What failed and interrupted work leaves, and what becomes of the operator's own files."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

FAILS = {"result": {"result": "failed", "summary": "cannot"}}
BUILDING = "WRK-001 in_progress phase=build phase_pool=main"
PLANNING = "WRK-001 in_progress phase=plan phase_pool=main"


def set_up(project: Any, item: str, script: dict[str, Any], execution: str = "max_retries = 0") -> None:
    project.configure(execution=execution)
    project.backlog(item)
    project.commit_all()
    project.script(script)


def test_operator_files_survive_an_agent_that_commits_and_reverts_them(project: Any) -> None:
    (project.root / "notes.txt").write_text("base\n")
    shell = (
        f"cd {project.root} && echo theirs > agent.txt && git add agent.txt && git commit -qm theirs"
        " && git checkout -q -- notes.txt && rm opfile.txt && echo half > half.txt"
    )
    set_up(project, BUILDING, {"*/build": [{"sh": shell, **FAILS}]})
    (project.root / "notes.txt").write_text("edited by the operator\n")
    (project.root / "opfile.txt").write_text("untracked\n")
    project.run("run", "--allow-dirty", code=3)
    assert (project.root / "notes.txt").read_text() == "edited by the operator\n"
    assert (project.root / "opfile.txt").read_text() == "untracked\n"
    assert project.git("show", "HEAD:agent.txt") == "theirs\n"
    assert not (project.root / "half.txt").exists()
    assert project.git("show", "refs/orchestrator/salvage/WRK-001/build/1:half.txt") == "half\n"
    assert project.status() == " M notes.txt\n?? opfile.txt\n"
    assert "refs/orchestrator/salvage/WRK-001/build/1" in project.text()


@pytest.mark.slow
def test_documents_of_an_attempt_interrupted_before_its_retry_are_committed(project: Any) -> None:
    step = {"document": "plan.md", "result": {"result": "failed", "summary": "cannot"}}
    set_up(project, PLANNING, {"*/plan": [step]}, "retry_delay_seconds = 200")
    text = (project.root / "orchestrator.toml").read_text().replace("retry_delay_seconds = 0\n", "")
    (project.root / "orchestrator.toml").write_text(text)
    process = project.start("run")
    project.read_until(process, "attempt 1 of 3 failed")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert "changes/WRK-001_item-wrk-001/plan.md" in project.git("ls-files")
    assert project.git("status", "--porcelain", "changes") == ""
    assert project.statuses() == {"WRK-001": "in_progress plan"}


@pytest.mark.slow
def test_an_item_deleted_by_hand_while_its_phase_fails_does_not_stop_the_run(project: Any) -> None:
    os.mkfifo(project.outside / "go")
    set_up(
        project, PLANNING,
        {"WRK-001/plan": [{"announce": True, "await": "go", **FAILS}], "*": [{}]}, "max_retries = 1",
    )
    process = project.start("run")
    project.announced()
    project.backlog("WRK-002 ready")
    (project.outside / "go").write_text("")
    project.announced()  # the second attempt
    (project.outside / "go").write_text("")
    _, err = process.communicate(timeout=60)
    assert "internal error" not in err
    assert "WRK-001" not in project.text()
    assert "WRK-002 plan 1" in project.agent_log()
    assert project.committed() == project.text()


@pytest.mark.slow
def test_stop_ends_the_retries_too(project: Any) -> None:
    os.mkfifo(project.outside / "go")
    set_up(project, PLANNING, {"*": [{"announce": True, "await": "go", **FAILS}]}, "max_retries = 3")
    process = project.start("run")
    project.announced()
    said = project.run("stop").stdout
    assert said.endswith("finishes the phases in flight and halts.\n")
    (project.outside / "go").write_text("")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert project.agent_log() == ["WRK-001 plan 1"]
    assert "attempts: 1" in project.committed()


def test_init_does_not_replace_a_backlog_that_is_only_missing_on_disk(project: Any) -> None:
    project.backlog("WRK-001 ready")
    project.commit_all()
    (project.root / "BACKLOG.yaml").unlink()
    done = project.run("init", code=1)
    assert f"git -C {project.root} restore BACKLOG.yaml" in done.stderr
    assert not (project.root / "BACKLOG.yaml").exists()


@pytest.mark.parametrize(
    "agent", ["git checkout -q -- BACKLOG.yaml", pytest.param("rm BACKLOG.yaml", marks=pytest.mark.slow)]
)
def test_a_backlog_reverted_by_an_agent_survives_a_sigkill(project: Any, agent: str) -> None:
    """The promotion was only on disk; the agent undoes it, and we are killed before noticing."""
    set_up(project, "WRK-001 ready", {"*/plan": [{"sh": f"cd {project.root} && {agent}", "announce": True, "hang": True}]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.communicate(timeout=60)
    project.run("run", "--cap", "0")
    assert project.statuses() == {"WRK-001": "in_progress plan"}
    assert project.committed() == project.text()
